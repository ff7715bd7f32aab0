"""A picture becomes a few tokens: features of its places, then learned queries that attend to them.

Shapes: N pictures, H W C picture, h w places of its feature map, F features of a place, K tokens, D width.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from scd_robot.errors import ConfigError
from scd_robot.nn.attention import multi_head_attention

__all__ = ["ImageConfig", "ImageEncoder", "sine_places"]

_FREQUENCIES = 4  # of the sines and cosines that tell a place
_MOST_PLACES = 1024
_PEAKED = 3.0  # standard deviation of the queries' logits at initialisation, about


@dataclass(frozen=True)
class ImageConfig:
    """How pictures become tokens; every camera has an encoder of its own, trained from scratch.

    Attributes:
        encoder: "convolutional"; "patch": patches are embedded each by itself; or "pretrained": the feature map of one
            network for all cameras, see `Backbone`, of which each camera has queries of its own.
        channels: convolutional: features of the layers, each of which halves the sides of what it gets.
        patch_size: patch: side of a square patch [pixel]; must divide height and width.
        tokens_per_image: K, 1 to 16; 0 = one for each place of the feature map, without queries.
        backbone: pretrained: name of a model of timm, such as "resnet18.a1_in1k".
        weights: pretrained: what a training begins with: a .safetensors file or a folder with one, a file of torch.save
            with tensors only, or "hub": timm downloads them. Checkpoints hold them and are read without.
        frozen: pretrained: the backbone keeps its weights; otherwise it is fine-tuned.
    """

    encoder: Literal["convolutional", "patch", "pretrained"] = "convolutional"
    channels: tuple[int, ...] = (16, 32, 64)
    patch_size: int = 8
    tokens_per_image: int = 2
    backbone: str = ""
    weights: str = ""
    frozen: bool = True

    def __post_init__(self) -> None:
        if self.encoder not in ("convolutional", "patch", "pretrained"):
            raise ConfigError(f"images.encoder must be convolutional, patch or pretrained, got {self.encoder!r}")
        self._check_backbone()
        if not self.channels or min(self.channels) < 1 or any(n % 8 for n in self.channels):
            raise ConfigError(f"images.channels must be multiples of 8, at least one of them, got {self.channels}")
        if self.patch_size < 1:
            raise ConfigError(f"images.patch_size must be at least 1, got {self.patch_size}")
        if not 0 <= self.tokens_per_image <= 16:
            raise ConfigError(f"images.tokens_per_image must be in 0..16, got {self.tokens_per_image}")

    def _check_backbone(self) -> None:
        if self.encoder != "pretrained":
            if self.backbone or self.weights:
                raise ConfigError(
                    f"images.backbone and images.weights are for images.encoder 'pretrained', got {self.encoder!r}"
                )
            return
        if not self.backbone or set(self.backbone) & set(":/\\"):
            raise ConfigError(
                "images.backbone must be the name of a model of timm, such as 'resnet18.a1_in1k', got "
                f"{self.backbone!r}; where its weights are says images.weights"
            )
        if not self.tokens_per_image:
            raise ConfigError("images.encoder 'pretrained' needs images.tokens_per_image of 1 to 16, got 0")

    def check(self, key: str, shape: tuple[int, ...]) -> None:
        """Raises ConfigError where the encoder does not fit pictures (H, W, C), as far as it can be told without it."""
        if self.encoder != "pretrained":
            self.places(key, shape)
        elif shape[2] == 4:
            raise ConfigError(
                f"images.encoder 'pretrained' takes grey pictures and those of three colours, {key!r} has 4 channels; "
                "record it without the fourth, or use another encoder"
            )

    def num_tokens(self, key: str, shape: tuple[int, ...]) -> int:
        """K, tokens of one picture (H, W, C)."""
        return self.tokens_per_image or math.prod(self.places(key, shape))

    def places(self, key: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """(h, w) of the feature map of pictures (H, W, C); of a pretrained encoder the `Backbone` knows.

        Raises:
            ConfigError: the encoder does not fit such pictures.
        """
        height, width = shape[:2]
        assert self.encoder != "pretrained"
        if self.encoder == "patch":
            if height % self.patch_size or width % self.patch_size:
                raise ConfigError(
                    f"images.patch_size {self.patch_size} must divide the sides of {key!r}, {height} x {width}; choose "
                    "another one, or resize the pictures (images of --transforms)"
                )
            places = (height // self.patch_size, width // self.patch_size)
        else:
            if min(height, width) < 2 ** len(self.channels):
                raise ConfigError(
                    f"pictures {key!r} of {height} x {width} are too small to be halved {len(self.channels)} times; "
                    "give images.channels fewer numbers"
                )
            factor = 2 ** len(self.channels)
            places = (-(-height // factor), -(-width // factor))
        if math.prod(places) > _MOST_PLACES:
            raise ConfigError(
                f"the feature map of {key!r} would be {places[0]} x {places[1]}, over {_MOST_PLACES} places; give "
                "images.channels more numbers (or patch_size a larger one), or resize the pictures"
            )
        return places


class ImageEncoder(nn.Module):
    """Features of places by a small network, and attention of K learned queries to them.

    What is attended to carries its place in the picture as Fourier features, so that a query can tell where something
    is. The queries pool as in Lee et al., "Set Transformer", arXiv 1810.00825, section 3.2. Without queries each place
    is a token.

    Args:
        config: settings.
        key: of the pictures, for messages.
        shape: (H, W, C).
        width: D.
        num_heads: heads of the queries.
        map_shape: (h, w, F) where the feature maps are given, as by a `Backbone`.
    """

    coordinates: Tensor

    def __init__(
        self,
        config: ImageConfig,
        key: str,
        shape: tuple[int, ...],
        width: int,
        num_heads: int,
        map_shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        if map_shape is not None:
            self.features, features = None, map_shape[2]
        elif config.encoder == "patch":
            self.features, features = _patch_features(shape[2], config.patch_size, width), width
        else:
            self.features, features = _convolutions(shape[2], config.channels), config.channels[-1]
        self.norm = nn.LayerNorm(features, eps=1e-6)
        self.project = nn.Linear(features, width)
        places = config.places(key, shape) if map_shape is None else map_shape[:2]
        self.register_buffer("coordinates", _fourier(places), persistent=False)
        self.place = nn.Linear(self.coordinates.shape[1], width, bias=False)
        self.place_norm = nn.LayerNorm(width, eps=1e-6)
        # Peaked from the start, each head on few places: an even mean hides what is in one of them from the first
        # updates, which then learn to do without pictures. For the same reason tokens are as large as vectors' tokens.
        self.pools = config.tokens_per_image > 0
        if self.pools:
            self.queries = nn.Parameter(_PEAKED * torch.randn(config.tokens_per_image, width))
            self.keys_values = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        for layer in (self.keys_values, self.out) if self.pools else (self.out,):
            nn.init.normal_(layer.weight, std=width**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens (N, K, D) of pictures (N, H, W, C) uint8, or of their feature maps (N, h, w, F)."""
        weight = self.project.weight
        if self.features is None:
            x = images.flatten(1, 2).to(weight.dtype)
        else:
            x = images.movedim(-1, 1).to(weight.dtype) / 127.5 - 1
            x = self.features(x).flatten(2).transpose(1, 2)
        x = gelu(self.project(self.norm(x)) + self.place(self.coordinates.to(weight.dtype)), approximate="tanh")
        x = self.place_norm(x)
        tokens: Tensor
        if not self.pools:
            tokens = self.out(x)
            return tokens
        pairs = self.keys_values(x).unflatten(-1, (2, self.num_heads, -1))
        keys, values = pairs.transpose(1, 3).unbind(2)
        queries = self.queries.unflatten(-1, (self.num_heads, -1)).transpose(0, 1).to(keys.dtype)
        tokens = self.out(multi_head_attention(queries.expand(len(x), -1, -1, -1), keys, values))
        return tokens


def _convolutions(channels_in: int, channels: tuple[int, ...]) -> nn.Sequential:
    """(N, C, H, W) to (N, channels[-1], h, w)."""
    layers: list[nn.Module] = []
    for i, count in enumerate(channels):
        kernel = 5 if i == 0 else 3
        layers += [nn.Conv2d(channels_in, count, kernel, stride=2, padding=kernel // 2), nn.GroupNorm(8, count)]
        layers += [nn.GELU(approximate="tanh")]
        channels_in = count
    return nn.Sequential(*layers)


def _patch_features(channels: int, patch_size: int, width: int) -> nn.Sequential:
    """(N, C, H, W) to (N, D, h, w): each patch through a perceptron."""
    return nn.Sequential(
        nn.Conv2d(channels, width, patch_size, stride=patch_size),
        nn.GELU(approximate="tanh"),
        nn.Conv2d(width, width, 1),
    )


def _fourier(places: tuple[int, int]) -> Tensor:
    """(h * w, 2 + 4 * _FREQUENCIES) row and column of each place in [-1, 1], and sines and cosines of them."""
    axes = [(torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1 for n in places]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    angles = (grid[..., None] * math.pi * 2.0 ** torch.arange(_FREQUENCIES, dtype=torch.float64)).flatten(1)
    return torch.cat((grid, angles.sin(), angles.cos()), dim=1).float()


def sine_places(places: tuple[int, int], width: int) -> Tensor:
    """(h * w, D) sines and cosines of row and column, half of the numbers each (He et al., arXiv 2111.06377, code).

    Places of a coarser grid have what lies between the places of a finer one that they cover.
    """
    axes = [(torch.arange(n, dtype=torch.float64) + 0.5) / n * 16 for n in places]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    frequencies = 100.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = (grid[..., None] * frequencies).flatten(1)
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    return nn.functional.pad(waves, (0, width - waves.shape[1])).float()
