"""Pictures as few numbers per place, and back: a small convolutional autoencoder.

    latents = encoder(picture)      each place stands for factor x factor pixels
    picture = decoder(latents)

It has no normalisation over the picture, so that what stands still keeps its latents, whatever moves elsewhere: a place
depends on the pixels around it alone. Sides are halved first, and doubled last, by moving pixels into channels and back
(Chen et al., "Deep Compression Autoencoder", arXiv 2410.10733), which makes the largest maps the cheapest.

It is trained as a variational autoencoder whose posterior has one fixed standard deviation: noise is added to the
latents, and their squares are a penalty (Ghosh et al., "From Variational to Deterministic Autoencoders", arXiv
1903.12436: "CV-VAE"). In use nothing is random. Neighbouring latents then mean similar pictures,
as what is denoised is never exact.

Shapes: N pictures, H W C picture, h w places, F latent channels.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from scd_robot.errors import ConfigError
from scd_robot.resizing import told_resizing

__all__ = ["Autoencoder", "AutoencoderConfig"]

_HALF = 127.5  # grey levels to 1


@dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture of an autoencoder.

    Attributes:
        channels: features of the layers, each of which halves the sides of what it gets: 3 of them make 8 x 8 pixels
            one place.
        latent_channels: F, numbers that a place becomes.
    """

    channels: tuple[int, ...] = (16, 32, 64)
    latent_channels: int = 8

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 1:
            raise ConfigError(f"autoencoder.channels must be positive, at least one of them, got {self.channels}")
        if self.latent_channels < 1:
            raise ConfigError(f"autoencoder.latent_channels must be at least 1, got {self.latent_channels}")

    @property
    def factor(self) -> int:
        """Pixels on each side of what becomes one place."""
        return int(2 ** len(self.channels))

    def check_shape(self, key: str, shape: tuple[int, ...]) -> None:
        """Raises ConfigError where pictures (H, W, C) have no whole number of places, or a fourth channel."""
        height, width = shape[:2]
        if shape[2] == 4:
            raise ConfigError(
                f"an autoencoder takes grey pictures or those of three colours, {key!r} has 4 channels: record "
                "picture[..., :3]"
            )
        if height % self.factor or width % self.factor:
            size = [max(self.factor, round(side / self.factor) * self.factor) for side in (height, width)]
            raise ConfigError(
                f"an autoencoder of {len(self.channels)} layers takes pictures whose sides are multiples of "
                f"{self.factor}, {key!r} has {height} x {width}: {told_resizing(key, size)}"
            )


class Autoencoder(nn.Module):
    """Encoder and decoder, and what latents are normalised by.

    Args:
        config: architecture.
        channels: C.
    """

    def __init__(self, config: AutoencoderConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        widths = config.channels
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, widths[0], 3, padding=1)]
        for narrow, wide in pairwise(widths):
            layers += [_Residual(narrow), nn.Conv2d(narrow, wide, 4, stride=2, padding=1)]
        self.encoder = nn.Sequential(
            *layers, _Residual(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], config.latent_channels, 1)
        )
        layers = [nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)]
        for wide, narrow in pairwise(widths[::-1]):
            layers += [_Residual(wide), _Doubled(wide, narrow)]
        self.decoder = nn.Sequential(
            *layers,
            _Residual(widths[0]),
            nn.SiLU(),
            nn.Conv2d(widths[0], 4 * channels, 3, padding=1),
            nn.PixelShuffle(2),
        )
        # Statistics, not learned: latents of the training pictures have mean 0 and variance 1.
        self.mean = nn.Parameter(torch.zeros(config.latent_channels), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(config.latent_channels), requires_grad=False)

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents (N, h, w, F) of pictures (N, H, W, C) uint8."""
        return (self.raw_latents(pictures) - self.mean) / self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (N, H, W, C) uint8 of latents (N, h, w, F)."""
        values = self.raw_pictures(latents * self.scale + self.mean)
        return ((values + 1) * _HALF).round().clamp(0, 255).to(torch.uint8)

    def raw_latents(self, pictures: Tensor) -> Tensor:
        """As of `encode`, not normalised."""
        with torch.autocast(pictures.device.type, enabled=False):  # what changes little is a difference of latents
            out: Tensor = self.encoder(self.scaled(pictures).movedim(-1, 1)).movedim(1, -1)
        return out

    def raw_pictures(self, latents: Tensor) -> Tensor:
        """Pictures (N, H, W, C), about in -1..1, of latents that are not normalised."""
        with torch.autocast(latents.device.type, enabled=False):
            out: Tensor = self.decoder(latents.movedim(-1, 1)).movedim(1, -1)
        return out

    def scaled(self, pictures: Tensor) -> Tensor:
        """Pictures uint8 in -1..1."""
        return pictures.to(self.mean.dtype) / _HALF - 1


class _Residual(nn.Module):
    """Two convolutions beside the identity, which they are at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(silu(self.first(silu(x))))
        return out


class _Doubled(nn.Module):
    """Sides doubled, each place fourfold, then a convolution."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels_in, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.convolution(interpolate(x, scale_factor=2.0, mode="nearest"))
        return out
