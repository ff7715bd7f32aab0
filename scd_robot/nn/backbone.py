"""Feature maps of pictures by a network of timm, with weights of its own (extra `[vision]`).

A network is always built without weights, by its name: whoever loads a checkpoint needs timm, and neither the file that
the weights came from nor a network connection. Only where a training begins are weights looked for.

Shapes: N pictures, H W C picture, h w places of its feature map, F features of a place.
"""

import hashlib
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from scd_robot.errors import CheckpointError, ConfigError, MissingDependencyError, UnknownNameError
from scd_robot.nn.images import ImageConfig
from scd_robot.nn.weight_files import HUB, OR_HUB, read_weights

__all__ = ["Backbone", "import_timm"]


class Backbone(nn.Module):
    """The last feature map of one network for the pictures of all cameras; no head, no pooling.

    It is in evaluation mode also while it is trained: statistics of BatchNorm stay those that it came with, and what is
    made of a picture does not depend on others in the batch. A frozen one gets no gradients.

    Args:
        config: settings, of encoder "pretrained".
        shapes: (H, W, C) of the pictures by key.

    Raises:
        MissingDependencyError: timm is not installed, or cannot be imported.
        UnknownNameError, ConfigError: no such network, or none that takes such pictures or gives a feature map.
    """

    network: Any  # timm's
    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.name, self.frozen = config.backbone, config.frozen
        self._size = _fixed_size(self.name, shapes)
        self.network = _create(self.name, self._size)
        for name in ("mean", "std"):  # kept with the weights: other versions of timm may say otherwise
            values = torch.tensor(self.network.pretrained_cfg[name], dtype=torch.float32)
            self.register_buffer(name, 255 * values)
        self.requires_grad_(not self.frozen)
        self.train()
        self.map_shapes = {key: self._map_shape(key, shape) for key, shape in shapes.items()}

    def forward(self, images: Tensor) -> Tensor:
        """Feature maps (N, h, w, F) of pictures (N, H, W, 1 or 3) uint8; grey ones have three equal channels."""
        dtype = self.mean.dtype
        x = (images.expand(*images.shape[:-1], 3).to(dtype) - self.mean) / self.std
        return self._places(self.network.forward_features(x.movedim(-1, 1)))

    def train(self, mode: bool = True) -> "Backbone":
        """Evaluation mode, whatever is asked for."""
        return super().train(False)

    def load_pretrained(self, source: str) -> None:
        """Takes pretrained weights.

        Args:
            source: a file or folder of weights with timm's names, or "hub": whatever timm has for this network, which
                is downloaded unless it was before.

        Raises:
            CheckpointError: there are none, or they are of another network.
        """
        loaded = _from_hub(self.name, self._size) if source == HUB else self._from_file(source)
        self.network.load_state_dict(loaded.state_dict())

    def digest(self) -> str:
        """SHA-256 of the weights."""
        digest = hashlib.sha256(self.name.encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _from_file(self, source: str) -> Any:
        given, cfg = read_weights(source, OR_HUB), self.network.pretrained_cfg
        classifiers = cfg.get("classifier") or ()
        classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
        heads = tuple(f"{name}." for name in classifiers)
        given = {name: value for name, value in given.items() if not name.startswith(heads)}
        wanted = self.network.state_dict()
        counts = {name for name in wanted if name.endswith("num_batches_tracked")}  # older files lack them
        missing, unexpected = sorted(wanted.keys() - given.keys() - counts), sorted(given.keys() - wanted.keys())
        if missing or unexpected:
            found = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(unexpected)}"] * bool(unexpected)
            raise CheckpointError(
                f"the weights {source} are not those of {self.name}: the file {' and '.join(found)}; set "
                "model.images.backbone to the network they are of, and take a file with timm's names"
            )
        try:
            return _create(self.name, self._size, pretrained=True, pretrained_cfg_overlay={"state_dict": given})
        except ConfigError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the weights {source} do not fit {self.name}: {reason}") from error

    def _places(self, features: Tensor) -> Tensor:
        """(N, h, w, F) of what a network gives: a map, channels first or last, or the tokens of a transformer."""
        width = self.network.num_features
        if features.ndim == 4:
            return features.movedim(1, -1) if features.shape[1] == width else features
        grid = getattr(getattr(self.network, "patch_embed", None), "grid_size", (0, 0))
        tokens = features[:, getattr(self.network, "num_prefix_tokens", 0) :]
        if features.ndim != 3 or tokens.shape[1] != math.prod(grid):
            raise ConfigError(
                f"backbone {self.name} gives no map of the picture but {tuple(features.shape[1:])}; choose another "
                "network, convolutional or a plain vision transformer"
            )
        return tokens.unflatten(1, tuple(grid))

    def _map_shape(self, key: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(h, w, F) of the feature map of pictures (H, W, C), told by trying."""
        patch = getattr(getattr(self.network, "patch_embed", None), "patch_size", (1, 1))
        if self._size is not None and (shape[0] % patch[0] or shape[1] % patch[1]):
            raise ConfigError(
                f"the patches of backbone {self.name}, {patch[0]} x {patch[1]}, must divide the sides of {key!r}, "
                f"{shape[0]} x {shape[1]}; resize the pictures (images of --transforms)"
            )
        with torch.no_grad():
            try:
                features = self(torch.zeros(1, *shape, dtype=torch.uint8))
            except (RuntimeError, AssertionError, ValueError) as error:
                if isinstance(error, ConfigError):
                    raise
                raise ConfigError(
                    f"backbone {self.name} does not take {key!r} of {shape[0]} x {shape[1]} ({error}); resize the "
                    "pictures (images of --transforms)"
                ) from error
        _, height, width, count = features.shape
        return height, width, count


def import_timm() -> ModuleType:
    """timm, or a MissingDependencyError."""
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise _broken(error) from error
        raise MissingDependencyError(
            "images.encoder 'pretrained' needs timm, which is not installed: pip install 'scd_robot[vision]' "
            "(docs/install.md says which torchvision goes with it)"
        ) from error
    except (ImportError, RuntimeError, OSError) as error:
        raise _broken(error) from error
    module: ModuleType = timm
    return module


def _broken(error: Exception) -> MissingDependencyError:
    return MissingDependencyError(
        f"timm is installed but cannot be imported ({error}); it needs a torchvision that was built for the installed "
        "torch: docs/install.md"
    )


def _create(name: str, size: tuple[int, int] | None, **weights: object) -> Any:
    """A network of timm without classifier; random weights unless `weights` says otherwise."""
    sized = {} if size is None else {"img_size": size}
    try:
        return import_timm().create_model(name, **{"pretrained": False, **weights}, num_classes=0, **sized)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"timm cannot build backbone {name}: {error}") from error


def _from_hub(name: str, size: tuple[int, int] | None) -> Any:
    try:
        return _create(name, size, pretrained=True)
    except (ConfigError, OSError, ValueError) as error:
        raise CheckpointError(
            f"weights of {name} could not be had from the hub: {error}; take its model.safetensors elsewhere and name "
            "the file with model.images.weights"
        ) from error


def _fixed_size(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """(H, W) for networks that are built for one size of pictures, as transformers are; else None."""
    timm = import_timm()
    if not timm.is_model(name.partition(".")[0]):
        raise UnknownNameError("backbone (model.images.backbone)", name, timm.list_models())
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ConfigError(f"timm has no backbone {name}: {error}") from error
    if not getattr(cfg, "fixed_input_size", False):
        return None
    sizes = {key: (shape[0], shape[1]) for key, shape in shapes.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{key!r} {height} x {width}" for key, (height, width) in sizes.items())
        raise ConfigError(
            f"backbone {name} is built for one size of pictures, got {told}; resize them alike (images of "
            "--transforms), or choose a convolutional network"
        )
    return next(iter(sizes.values()))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
