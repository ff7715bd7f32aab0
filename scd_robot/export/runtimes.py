"""What computes exported graphs: ONNX Runtime, or torch for its own formats (`torch_runtime`). numpy in and out."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from scd_robot.errors import CheckpointError, MissingDependencyError
from scd_robot.export.manifest import Manifest

__all__ = ["Arrays", "OnnxRuntime", "Runtime", "open_runtime"]

logger = logging.getLogger(__name__)

SLOWER = ["MatMulAddFusion"]  # makes three operations of two: a reshape before and after each product with a bias

Arrays = Mapping[str, NDArray[Any]]


class Runtime(Protocol):
    """Computes graphs."""

    def run(self, graph: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name of a graph, see `Manifest.graphs`; may be called from several threads."""
        ...


class OnnxRuntime:
    """Graphs in ONNX; needs onnxruntime.

    Args:
        folder: that holds them.
        manifest: of the folder.
        threads: of each graph.

    Raises:
        MissingDependencyError: there is no onnxruntime.
        CheckpointError: a graph cannot be read.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int = 1) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                "running ONNX needs onnxruntime: pip install onnxruntime, or 'scd_robot[export]'"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self._sessions, self._outputs = {}, {}
        for name, graph in manifest.graphs.items():
            try:
                session = onnxruntime.InferenceSession(
                    str(folder / graph.file),
                    options,
                    providers=["CPUExecutionProvider"],
                    disabled_optimizers=SLOWER,
                )
            except Exception as error:  # of several kinds, all of which derive from nothing else
                raise CheckpointError(
                    f"onnxruntime {onnxruntime.__version__} cannot read {folder / graph.file}: "
                    f"{str(error).splitlines()[0]}; export the checkpoint again beside this version"
                ) from error
            self._sessions[name], self._outputs[name] = session, list(graph.outputs)

    def run(self, graph: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name."""
        found = self._sessions[graph].run(self._outputs[graph], dict(inputs))
        return dict(zip(self._outputs[graph], found, strict=True))


def open_runtime(folder: Path, manifest: Manifest, *, trusted: bool = False, threads: int = 1) -> Runtime:
    """The runtime of the folder's kind of graphs; errors as of `OnnxRuntime` and `TorchRuntime`."""
    if manifest.kind == "onnx":
        return OnnxRuntime(folder, manifest, threads)
    try:
        from scd_robot.export.torch_runtime import TorchRuntime
    except ModuleNotFoundError as error:  # also in scd_robot_runtime, which has no such module
        raise MissingDependencyError(
            f"graphs of kind {manifest.kind} need torch and all of scd_robot: pip install scd_robot, or export to ONNX"
        ) from error
    return TorchRuntime(folder, manifest, trusted)
