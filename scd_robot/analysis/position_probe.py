"""Where things are in imagined frames: a small network finds them in real ones, then in those that were imagined.

What PSNR cannot tell, a robot needs to know: whether the block in the imagined picture lies where the recorded block
lies. A probe is trained to tell positions from real pictures, and asked the same of imagined ones, in cm. It has an
error of its own, which is told beside them: that of the recorded frames. And it is asked where things were in the last
seen frame: as far off is who imagines that nothing moves. Where a thing is not to be seen in an imagined picture, it
answers with some place in the middle, so the error of guessing the mean position is told as well: what is no better
may be no picture of the thing at all.

The network is that of Finn et al., "Deep spatial autoencoders for visuomotor learning", arXiv 1509.06113:
convolutions, then the centre of each of their maps (a softmax over its places), then a perceptron.

Shapes: N pictures or pieces of recordings, Tf frames, H W C picture, n coordinates of a position, M maps.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss
from tqdm import trange

from scd_robot.analysis.frame_metrics import check_frames, curve
from scd_robot.errors import ConfigError, ShapeError
from scd_robot.seeding import derive_seed, keyed_rng

__all__ = ["SCHEMA", "PositionErrors", "PositionProbe", "ProbeConfig", "probe_errors", "train_probe"]

logger = logging.getLogger(__name__)

SCHEMA = 1  # of the JSON
_KEY = 4713
_CHANNELS = (16, 32, 32)
_GROUPS = 4  # of channels that are normalised together
_HIDDEN = 64
_BLOCK = 256  # pictures that are looked at in one go
_SMALLEST_SPREAD = 1e-3  # [m] what moves less is not magnified further
_BLIND = 0.5  # error in units of a guess's, above which a probe is said not to see

Pixels = NDArray[np.uint8]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class ProbeConfig:
    """How a probe is trained.

    Attributes:
        updates: of Adam.
        batch_size: pictures of each.
        learning_rate: the highest; it rises and falls over the training.
        held_out: share of the episodes on which the probe's own error is measured.
        seed: of the weights, the order and the choice of episodes.
    """

    updates: int = 400
    batch_size: int = 32
    learning_rate: float = 5e-3
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.updates, self.batch_size) < 1:
            raise ConfigError(f"updates and batch_size must be at least 1, got {self.updates} and {self.batch_size}")
        if not 0 < self.learning_rate < 1:
            raise ConfigError(f"learning_rate must be above 0 and below 1, got {self.learning_rate}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out must be a share of the episodes above 0 and below 1, got {self.held_out}")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}")


@dataclass(frozen=True, eq=False)
class PositionProbe:
    """A trained probe.

    Attributes:
        network: of pictures (N, H, W, C) to standardised positions (N, sum of n).
        shape: (H, W, C) of the pictures.
        widths: n by name, in the network's order.
        mean: (sum of n,) [m].
        scale: (sum of n,) [m].
        held_out_cm: by name, mean error on episodes that were held out.
        guess_cm: by name, that of guessing the mean position.
    """

    network: nn.Module
    shape: tuple[int, ...]
    widths: dict[str, int]
    mean: Tensor
    scale: Tensor
    held_out_cm: dict[str, float]
    guess_cm: dict[str, float]

    def guesses(self) -> dict[str, Numbers]:
        """Mean positions (n,) [m] of the training by name: what is known without looking."""
        parts = np.split(self.mean.double().numpy(), np.cumsum(list(self.widths.values()))[:-1])
        return dict(zip(self.widths, parts, strict=True))

    def positions(self, frames: Pixels) -> dict[str, Numbers]:
        """Positions (..., n) [m] by name in frames (..., H, W, C) uint8.

        Raises:
            ShapeError: the frames are not like those of the training.
        """
        if frames.dtype != np.uint8 or frames.shape[-3:] != self.shape:
            raise ShapeError(f"the probe takes uint8 frames (..., {self.shape}), got {frames.dtype} {frames.shape}")
        flat = torch.from_numpy(np.ascontiguousarray(frames).reshape(-1, *self.shape))
        with torch.inference_mode():
            found = torch.cat([self.network(block) for block in flat.split(_BLOCK)]) * self.scale + self.mean
        parts = np.split(found.double().numpy(), np.cumsum(list(self.widths.values()))[:-1], axis=1)
        return {name: part.reshape(*frames.shape[:-3], -1) for name, part in zip(self.widths, parts, strict=True)}


@dataclass(frozen=True, eq=False)
class PositionErrors:
    """Distances [cm] by name, each (N, Tf).

    Attributes:
        imagined: of where a thing is in the imagined frames, from where it was.
        copied: in the last seen frame, from where it was later: the error of imagining that nothing moves.
        recorded: in the recorded frames: the probe's own error.
        guessed: of the mean position of the probe's training: what is known without looking.
        episodes: (N,) number of the episode of each piece; intervals are over episodes.
        probe: that looked.
    """

    imagined: dict[str, Numbers]
    copied: dict[str, Numbers]
    recorded: dict[str, Numbers]
    guessed: dict[str, Numbers]
    episodes: NDArray[np.int64]
    probe: PositionProbe

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, described in `docs/analysis.md`."""
        return {
            "schema": SCHEMA,
            "pieces": len(self.episodes),
            "episodes": len(np.unique(self.episodes)),
            "positions": {
                name: {
                    "imagined": curve(self.imagined[name], self.episodes),
                    "copied": curve(self.copied[name], self.episodes),
                    "recorded": curve(self.recorded[name], self.episodes),
                    "guessed": curve(self.guessed[name], self.episodes),
                    "better_by": curve(self.copied[name] - self.imagined[name], self.episodes),
                    "held_out_cm": self.probe.held_out_cm[name],
                }
                for name in self.imagined
            },
        }


def train_probe(
    frames: Pixels,
    positions: Mapping[str, NDArray[Any]],
    episodes: NDArray[np.integer[Any]],
    config: ProbeConfig | None = None,
    *,
    progress: bool = False,
) -> PositionProbe:
    """Trains a probe on recorded pictures; ten CPU seconds at 64 x 64.

    Take other episodes than those whose continuation is imagined: a probe is more exact on pictures that it knows.

    Args:
        frames: (N, H, W, C) uint8.
        positions: by name (N, n) [m] of what is to be found, "position.NAME" of a recording for example.
        episodes: (N,) which episode each picture is from: pictures of one are alike, so whole ones are held out.
        config: settings; None = the defaults.
        progress: show a bar.

    Raises:
        ShapeError: the arrays do not belong together, or hold NaN or infinite values.
        ConfigError: there are fewer than two episodes.
    """
    config = config or ProbeConfig()
    targets = _checked_targets(frames, positions, episodes)
    held = _held_out(episodes, config)
    seen = np.flatnonzero(~held)
    mean = torch.from_numpy(targets[seen].mean(axis=0))
    scale = torch.from_numpy(np.maximum(targets[seen].std(axis=0), _SMALLEST_SPREAD))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(_KEY, config.seed))
        network = _network(frames.shape[1:], targets.shape[1])
    optimizer = torch.optim.Adam(network.parameters(), config.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.updates)
    rng, wanted = keyed_rng(_KEY, config.seed, 1), (torch.from_numpy(targets) - mean) / scale
    for _ in trange(config.updates, desc="training a probe", disable=not progress):
        chosen = rng.choice(seen, config.batch_size)
        loss = smooth_l1_loss(network(torch.from_numpy(frames[chosen])), wanted[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    widths = {name: np.asarray(values).shape[1] for name, values in positions.items()}
    probe = PositionProbe(network.eval(), frames.shape[1:], widths, mean, scale, {}, {})
    return _with_own_error(probe, frames[held], {name: np.asarray(p)[held] for name, p in positions.items()})


def probe_errors(
    probe: PositionProbe,
    positions: Mapping[str, NDArray[Any]],
    recorded: Pixels,
    imagined: Pixels,
    last_context: Pixels,
    *,
    episodes: NDArray[np.integer[Any]] | None = None,
) -> PositionErrors:
    """How far things are from where they were, in imagined frames, in the last seen one, and in the recorded ones.

    Args:
        probe: that looks.
        positions: by name (N, Tf, n) [m] where things were in the recorded frames; the probe's names.
        recorded: (N, Tf, H, W, C) uint8.
        imagined: (N, Tf, H, W, C) uint8.
        last_context: (N, H, W, C) uint8, the frame before the first of them.
        episodes: (N,) which episode each piece is from; None = each from another.

    Raises:
        ShapeError: the arrays do not belong together, or are not like those of the probe's training.
    """
    check_frames(recorded, imagined, last_context)
    if set(positions) != set(probe.widths):
        raise ShapeError(
            f"positions must be of {sorted(probe.widths)} as in the probe's training, got {sorted(positions)}"
        )
    numbers = np.arange(len(recorded)) if episodes is None else np.asarray(episodes, np.int64)
    if numbers.shape != (len(recorded),):
        raise ShapeError(f"episodes must be ({len(recorded)},), a number for each piece, got {numbers.shape}")
    for name, width in probe.widths.items():
        if np.shape(positions[name]) != (*recorded.shape[:2], width):
            raise ShapeError(
                f"positions of {name!r} must be {(*recorded.shape[:2], width)}, one for each recorded frame, got "
                f"{np.shape(positions[name])}"
            )
    looked = (imagined, last_context[:, None], recorded)
    found = [_distances(probe.positions(frames), positions) for frames in looked]
    guessed = _distances(probe.guesses(), positions)
    return PositionErrors(found[0], found[1], found[2], guessed, numbers, probe)


def _distances(found: Mapping[str, Numbers], wanted: Mapping[str, NDArray[Any]]) -> dict[str, Numbers]:
    """In cm, by name."""
    return {name: 100 * np.linalg.norm(place - wanted[name], axis=-1) for name, place in found.items()}


def _checked_targets(
    frames: Pixels, positions: Mapping[str, NDArray[Any]], episodes: NDArray[np.integer[Any]]
) -> NDArray[np.float32]:
    """All positions side by side, (N, sum of n)."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or not len(frames):
        raise ShapeError(f"frames must be uint8 (N, H, W, C), got {frames.dtype} {frames.shape}")
    if np.shape(episodes) != (len(frames),):
        raise ShapeError(f"episodes must be ({len(frames)},), a number for each frame, got {np.shape(episodes)}")
    if not positions:
        raise ShapeError("positions must hold at least one thing to be found, got none")
    for name, values in positions.items():
        if np.ndim(values) != 2 or len(values) != len(frames):
            raise ShapeError(f"positions of {name!r} must be ({len(frames)}, n), got {np.shape(values)}")
        if not np.isfinite(values).all():
            raise ShapeError(f"positions of {name!r} hold NaN or infinite values; leave those frames out")
    return np.concatenate([np.asarray(values, np.float32) for values in positions.values()], axis=1)


def _held_out(episodes: NDArray[np.integer[Any]], config: ProbeConfig) -> NDArray[np.bool_]:
    """(N,) whether a picture is of an episode that is held out."""
    numbers = np.unique(episodes)
    if len(numbers) < 2:
        raise ConfigError(f"a probe needs pictures of at least 2 episodes, to hold one out, got {len(numbers)}")
    count = min(max(1, round(config.held_out * len(numbers))), len(numbers) - 1)
    return np.isin(episodes, keyed_rng(_KEY, config.seed, 2).permutation(numbers)[:count])


def _with_own_error(probe: PositionProbe, frames: Pixels, positions: Mapping[str, NDArray[Any]]) -> PositionProbe:
    """The probe with its error on pictures that it has not seen."""
    own = {name: float(error.mean()) for name, error in _distances(probe.positions(frames), positions).items()}
    guess = {name: float(error.mean()) for name, error in _distances(probe.guesses(), positions).items()}
    for name, error in own.items():
        if error > _BLIND * guess[name]:
            logger.warning(
                "the probe hardly sees where %r is: it is %.1f cm off, and %.1f cm without looking; its errors on "
                "imagined frames say little",
                name,
                error,
                guess[name],
            )
    return PositionProbe(probe.network, probe.shape, probe.widths, probe.mean, probe.scale, own, guess)


class _MapCentres(nn.Module):
    """Row and column, in -1..1, of the centre of each map: (N, M, h, w) to (N, 2 M)."""

    def __init__(self) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(3.0))

    def forward(self, maps: Tensor) -> Tensor:
        weights = (self.sharpness * maps).flatten(2).softmax(dim=-1).unflatten(2, maps.shape[2:])
        rows, columns = (torch.linspace(-1, 1, n, device=maps.device) for n in maps.shape[2:])
        return torch.cat(((weights.sum(3) * rows).sum(2), (weights.sum(2) * columns).sum(2)), dim=1)


class _Scaled(nn.Module):
    """Pictures (N, H, W, C) uint8 as (N, C, H, W) in -1..1."""

    def forward(self, frames: Tensor) -> Tensor:
        return frames.movedim(-1, 1).float() / 127.5 - 1


def _network(shape: tuple[int, ...], outputs: int) -> nn.Module:
    layers: list[nn.Module] = [_Scaled()]
    channels_in = shape[2]
    for i, channels in enumerate(_CHANNELS):
        last = i == len(_CHANNELS) - 1
        kernel = 5 if i == 0 else 3
        layers += [nn.Conv2d(channels_in, channels, kernel, stride=1 if last else 2, padding=kernel // 2)]
        layers += [nn.GroupNorm(_GROUPS, channels)] + ([] if last else [nn.GELU()])
        channels_in = channels
    layers += [_MapCentres(), nn.Linear(2 * channels_in, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, outputs)]
    return nn.Sequential(*layers)
