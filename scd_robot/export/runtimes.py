"""What computes exported graphs: ONNX Runtime, or torch for its own formats. numpy in and out.

Files of torch-export are read by `torch.export.load`, which unpickles where it cannot do without, and files of aoti are
native code: whoever wrote them can run what they like here. Neither is loaded without an explicit word. An ONNX file is
data.
"""

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import CheckpointError, ConfigError, MissingDependencyError
from scd_robot.export.manifest import Manifest

__all__ = ["Arrays", "OnnxRuntime", "Runtime", "TorchRuntime", "open_runtime"]

logger = logging.getLogger(__name__)

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
                    str(folder / graph.file), options, providers=["CPUExecutionProvider"]
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


class TorchRuntime:
    """Graphs that torch exported (torch-export), or compiled as well (aoti); needs torch.

    Args:
        folder: that holds them.
        manifest: of the folder.
        trusted: the word that whoever wrote the files may run code here.

    Raises:
        ConfigError: without that word.
        MissingDependencyError: there is no torch.
        CheckpointError: a graph cannot be read.
    """

    def __init__(self, folder: Path, manifest: Manifest, trusted: bool = False) -> None:
        does = "may be unpickled" if manifest.kind == "torch-export" else "are native code"
        if not trusted:
            raise ConfigError(
                f"{folder} holds graphs of kind {manifest.kind}, which {does}: whoever wrote them can run what they "
                "like here; say that you trust them (--trust, or trust=True), or export to ONNX"
            )
        if importlib.util.find_spec("torch") is None:
            raise MissingDependencyError(f"graphs of kind {manifest.kind} need torch: pip install torch")
        self._graphs = {
            name: (_load(folder / graph.file, manifest.kind), graph) for name, graph in manifest.graphs.items()
        }

    def run(self, graph: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name."""
        import torch

        from scd_robot.policies.sampling import inference

        call, ports = self._graphs[graph]
        with inference(torch.device("cpu"), len(next(iter(inputs.values())))):
            found = call(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in ports.inputs))
        tensors = found if isinstance(found, tuple | list) else (found,)
        return {name: tensor.numpy() for name, tensor in zip(ports.outputs, tensors, strict=True)}


def _load(path: Path, kind: str) -> Any:
    import torch

    try:
        if kind == "torch-export":
            return torch.export.load(path).module()
        return torch._inductor.aoti_load_package(str(path))
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(
            f"torch {torch.__version__} cannot read {path}: {str(error).splitlines()[0]}; export the checkpoint again "
            "on this machine"
        ) from error


def open_runtime(folder: Path, manifest: Manifest, *, trusted: bool = False, threads: int = 1) -> Runtime:
    """The runtime of the folder's kind of graphs; errors as of `OnnxRuntime` and `TorchRuntime`."""
    if manifest.kind == "onnx":
        return OnnxRuntime(folder, manifest, threads)
    return TorchRuntime(folder, manifest, trusted)
