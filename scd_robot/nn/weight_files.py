"""Weights from files of others: tensors by name, and nothing of them is executed."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from scd_robot.errors import CheckpointError

__all__ = ["HUB", "OR_HUB", "find_weights", "read_weights"]

HUB = "hub"  # in the place of a path: to be downloaded
OR_HUB = f", or {HUB!r} to have them downloaded (model.images.weights)"

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_INSIDE = ("state_dict", "model")  # where training programs put the weights among other things


def find_weights(source: str | Path, otherwise: str = "") -> Path:
    """The file that `source` means: itself, or the one of a folder.

    Args:
        source: path of either.
        otherwise: what else could be named where there is none, for the message.

    Raises:
        CheckpointError: there is none, or several, or it is no file of weights by its name.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise CheckpointError(f"{path} must hold one file of weights *.safetensors, found {names}; name the file")
        return found[0]
    if not path.is_file():
        raise CheckpointError(f"there are no weights at {path}: name a file or folder{otherwise}")
    if path.suffix not in _SUFFIXES:
        raise CheckpointError(f"weights are read from {', '.join(_SUFFIXES)}, got {path}")
    return path


def read_weights(source: str | Path, otherwise: str = "") -> dict[str, Tensor]:
    """Tensors by name, on the CPU.

    Args:
        source: a .safetensors file or a folder with one, or a file of torch.save with tensors only.
        otherwise: as of `find_weights`.

    Raises:
        CheckpointError: it cannot be read so.
    """
    path = find_weights(source, otherwise)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_program(path):
            raise CheckpointError(
                f"{path} is TorchScript, a program, which is not run: take a file of the network's weights, or save "
                "its state_dict() where you trust the program"
            )
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        zipfile.BadZipFile,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read as weights of plain tensors ({reason})") from error
    for name in _INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path} must hold tensors by name, at the top or under {' or '.join(_INSIDE)}")
    return dict(found)


def _is_program(path: Path) -> bool:
    """Whether a file is of torch.jit.save: those of torch.save hold no constants apart."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
