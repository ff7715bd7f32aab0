"""The folder that a trained autoencoder of pictures is kept in.

    FOLDER/
        autoencoder.json           architecture, camera and size of its pictures, its training, SHA-256 of the weights
        autoencoder.safetensors    weights, and statistics of the latents

It is read when the training of a model of frames starts, whose checkpoints then hold its weights, and is not needed
afterwards.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from scd_robot.config import from_json, to_json
from scd_robot.errors import CheckpointError, ConfigError, ShapeError
from scd_robot.model import ScdConfig
from scd_robot.nn import Autoencoder, AutoencoderConfig
from scd_robot.output import write_bytes, write_json

__all__ = ["SavedAutoencoder", "read_autoencoder", "write_autoencoder"]

_FORMAT, _SCHEMA = "scd_robot autoencoder", 1
_COMMAND = "scd train-autoencoder --dataset PATH --out FOLDER"


@dataclass(frozen=True, eq=False)
class SavedAutoencoder:
    """A trained autoencoder, as it is kept.

    Attributes:
        config: architecture.
        camera: key of the pictures, after transforms.
        shape: (H, W, C) of them.
        weights: tensors by name, on the CPU.
        sha256: of the file of the weights.
        path: folder that it was read from.
    """

    config: AutoencoderConfig
    camera: str
    shape: tuple[int, ...]
    weights: dict[str, Tensor]
    sha256: str
    path: Path

    def model(self) -> Autoencoder:
        """With these weights.

        Raises:
            CheckpointError: they are of another architecture.
        """
        model = Autoencoder(self.config, self.shape[2])
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            raise CheckpointError(f"the weights in {self.path} do not fit its autoencoder.json: {error}") from error
        return model.requires_grad_(False).eval()

    def check_fits(self, model: ScdConfig) -> None:
        """Refuses a model of frames that this autoencoder is not for.

        Raises:
            ConfigError: the model has none, or one of another architecture; another camera.
            ShapeError: pictures of another size or number of channels.
        """
        frames = model.frames
        if not frames.camera:
            raise ConfigError("--autoencoder is for models that imagine frames (frames_latent), this one plans actions")
        if frames.camera != self.camera:
            raise ConfigError(
                f"the autoencoder {self.path} was trained on pictures {self.camera!r}, the model imagines "
                f"{frames.camera!r}: train one on those, {_COMMAND} --camera {frames.camera}"
            )
        shape = tuple(model.observation_shapes[frames.camera])
        if shape != self.shape:
            raise ShapeError(
                f"the autoencoder {self.path} was trained on pictures {self.camera!r} of {self.shape}, the model's are "
                f"{shape}: train one with the same --transforms"
            )
        if frames.autoencoder != self.config:
            raise ConfigError(
                f"the autoencoder {self.path} is {to_json(self.config)}, model.frames.autoencoder is "
                f"{to_json(frames.autoencoder)}; leave that setting out, it comes with --autoencoder"
            )


def write_autoencoder(
    model: Autoencoder, camera: str, shape: tuple[int, ...], folder: Path, told: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes a trained autoencoder; where that is cut short there is none.

    Args:
        model: trained.
        camera: key of its pictures, after transforms.
        shape: (H, W, C) of them.
        folder: made where missing; an earlier autoencoder in it is replaced.
        told: what else is to stand in autoencoder.json.

    Returns:
        Contents of autoencoder.json.

    Raises:
        OutputError: a file cannot be written.
    """
    weights = save({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()})
    document = {
        "format": _FORMAT,
        "schema": _SCHEMA,
        "camera": camera,
        "shape": list(shape),
        "config": to_json(model.config),
        **told,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    write_bytes(folder / "autoencoder.safetensors", weights)
    write_json(folder / "autoencoder.json", document)  # last: it vouches for the other
    return document


def read_autoencoder(folder: str | Path) -> SavedAutoencoder:
    """Reads what `write_autoencoder` wrote.

    Raises:
        CheckpointError: there is none, or it is damaged, or of a schema that this version cannot read.
    """
    path = Path(folder)
    file = path / "autoencoder.json"
    if not file.is_file():
        raise CheckpointError(f"there is no autoencoder at {path} (no {file.name}); train one with: {_COMMAND}")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["format"] != _FORMAT:
            raise CheckpointError(f"{file} is not of an scd_robot autoencoder")
        if document["schema"] != _SCHEMA:
            raise CheckpointError(f"{file} has schema {document['schema']}, this version of scd_robot reads {_SCHEMA}")
        content = (path / "autoencoder.safetensors").read_bytes()
        if hashlib.sha256(content).hexdigest() != document["sha256"]:
            raise CheckpointError(f"{path}/autoencoder.safetensors is not the file that was written; train it again")
        config = from_json(AutoencoderConfig, document["config"], f"{file}: config")
        shape = tuple(int(n) for n in document["shape"])
        return SavedAutoencoder(config, str(document["camera"]), shape, load(content), document["sha256"], path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or foreign: {error!r}; train the autoencoder again") from error
