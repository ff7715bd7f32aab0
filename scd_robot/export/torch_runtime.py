"""torch, which computes the graphs of its own formats.

Files of torch-export are read by `torch.export.load`, which unpickles where it cannot do without, and files of aoti are
native code: whoever wrote them can run what they like here. Neither is loaded without an explicit word. An ONNX file is
data.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scd_robot.errors import CheckpointError, ConfigError
from scd_robot.export.manifest import Manifest
from scd_robot.export.runtimes import Arrays
from scd_robot.policies.sampling import inference

__all__ = ["TorchRuntime"]


class TorchRuntime:
    """Graphs that torch exported (torch-export), or compiled as well (aoti).

    Args:
        folder: that holds them.
        manifest: of the folder.
        trusted: the word that whoever wrote the files may run code here.

    Raises:
        ConfigError: without that word.
        CheckpointError: a graph cannot be read.
    """

    def __init__(self, folder: Path, manifest: Manifest, trusted: bool = False) -> None:
        does = "may be unpickled" if manifest.kind == "torch-export" else "are native code"
        if not trusted:
            raise ConfigError(
                f"{folder} holds graphs of kind {manifest.kind}, which {does}: whoever wrote them can run what they "
                "like here; say that you trust them (--trust, or trust=True), or export to ONNX"
            )
        self._graphs = {
            name: (_load(folder / graph.file, manifest.kind), graph) for name, graph in manifest.graphs.items()
        }

    def run(self, graph: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name."""
        call, ports = self._graphs[graph]
        with inference(torch.device("cpu"), len(next(iter(inputs.values())))):
            found = call(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in ports.inputs))
        tensors = found if isinstance(found, tuple | list) else (found,)
        return {name: tensor.numpy() for name, tensor in zip(ports.outputs, tensors, strict=True)}


def _load(path: Path, kind: str) -> Any:
    try:
        if kind == "torch-export":
            return torch.export.load(path).module()
        return torch._inductor.aoti_load_package(str(path))
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(
            f"torch {torch.__version__} cannot read {path}: {str(error).splitlines()[0]}; export the checkpoint again "
            "on this machine"
        ) from error
