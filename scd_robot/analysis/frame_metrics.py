"""How far imagined frames are from those that were recorded: PSNR and SSIM against the number of frames imagined.

On all pixels a still picture wins: where little moves, repeating the last frame that was seen is right nearly
everywhere. So everything is also told of moving pixels alone, and of the last frame repeated beside what was imagined.

A pixel moves where the recorded frame differs from the last seen one by more than a threshold in any channel, or is
within a few pixels of such a place. Both where a thing came to and what it uncovered differ. The margin takes in its
outline, where being off by a pixel shows. What moves is decided by the recording alone: models that are compared are
judged on the same pixels, and none can choose its own. What a model lets move where nothing did, all pixels tell.

Pictures of bytes cannot show errors below that of rounding, whose mean square is 1/12: a smaller one counts as that
much, which makes 58.9 dB the highest PSNR and leaves no infinities.

Shapes: N pieces of recordings, E episodes they are from, Tf frames, H W C picture, C 1 or 3.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter

from scd_robot.analysis.resampling import interval_of, resampled_sums
from scd_robot.errors import ConfigError, ShapeError
from scd_robot.training.compat import import_lightning

__all__ = [
    "SCHEMA",
    "FrameErrors",
    "FrameQuality",
    "MotionConfig",
    "check_frames",
    "curve",
    "frame_errors",
    "moving_pixels",
]

SCHEMA = 1  # of the JSON
HIGHEST_PSNR = 10 * float(np.log10(12 * 255**2))  # [dB] error of rounding
_WINDOW = 11  # pixels of SSIM's window
_LONGEST_FLOAT = 1.0 + 1e-6

Frames = NDArray[np.uint8]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class MotionConfig:
    """Which pixels move.

    Attributes:
        threshold: grey levels of 255 that a channel must differ by: 8 is above the noise of a camera and what JPEG or a
            video leaves of a flat wall, and below what anything that can be told from its background changes.
        margin: pixels around such a place that count as well, to all sides.
    """

    threshold: int = 8
    margin: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 255:
            raise ConfigError(f"threshold must be in 0..254 grey levels, got {self.threshold}")
        if self.margin < 0:
            raise ConfigError(f"margin must be 0 or more pixels, got {self.margin}")


@dataclass(frozen=True, eq=False)
class FrameQuality:
    """Of frames against the recorded ones, each (N, Tf); NaN on moving pixels where none moves.

    Attributes:
        psnr: peak signal-to-noise ratio [dB] of all pixels.
        psnr_moving: of moving pixels.
        ssim: structural similarity (Wang et al. 2004, Gaussian window of 11 pixels), the mean over all pixels.
        ssim_moving: over windows centred on moving pixels.
    """

    psnr: Numbers
    psnr_moving: Numbers
    ssim: Numbers
    ssim_moving: Numbers


@dataclass(frozen=True, eq=False)
class FrameErrors:
    """What `frame_errors` found.

    Attributes:
        imagined: of the imagined frames.
        copied: of the last seen frame, repeated: the floor.
        moving_share: (N, Tf) share of the pixels that move.
        episodes: (N,) number of the episode of each piece; intervals are over episodes.
        motion: which pixels move.
    """

    imagined: FrameQuality
    copied: FrameQuality
    moving_share: Numbers
    episodes: NDArray[np.int64]
    motion: MotionConfig

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, described in `docs/analysis.md`; None where nothing is known."""
        found: dict[str, Any] = {
            "schema": SCHEMA,
            "pieces": len(self.episodes),
            "episodes": len(np.unique(self.episodes)),
            "frames": self.moving_share.shape[1],
            "threshold": self.motion.threshold,
            "margin": self.motion.margin,
            "moving_share": curve(self.moving_share, self.episodes),
        }
        for name in (field.name for field in fields(FrameQuality)):
            own, floor = getattr(self.imagined, name), getattr(self.copied, name)
            found[name] = {
                "imagined": curve(own, self.episodes),
                "copied": curve(floor, self.episodes),
                "better_by": curve(own - floor, self.episodes),
                "drift": {"imagined": _drift(own, self.episodes), "copied": _drift(floor, self.episodes)},
            }
        return found


def frame_errors(
    recorded: Frames,
    imagined: Frames,
    last_context: Frames,
    *,
    episodes: NDArray[np.integer[Any]] | None = None,
    motion: MotionConfig | None = None,
) -> FrameErrors:
    """Judges imagined frames, and the last seen one repeated.

    Args:
        recorded: (N, Tf, H, W, C) uint8.
        imagined: (N, Tf, H, W, C) uint8.
        last_context: (N, H, W, C) uint8, the frame before the first of them: the last that the model saw.
        episodes: (N,) which episode each piece is from; None = each from another.
        motion: which pixels move; None = the defaults.

    Raises:
        ShapeError: the arrays do not belong together, or are not pictures of bytes.
    """
    motion = motion or MotionConfig()
    check_frames(recorded, imagined, last_context)
    numbers = np.arange(len(recorded)) if episodes is None else np.asarray(episodes, np.int64)
    if numbers.shape != (len(recorded),):
        raise ShapeError(f"episodes must be ({len(recorded)},), a number for each piece, got {numbers.shape}")
    own, floor, shares = [], [], []
    for truth, guess, last in zip(recorded, imagined, last_context, strict=True):
        moving = moving_pixels(truth, last, motion)
        shares.append(moving.mean(axis=(1, 2)))
        own.append(_quality(truth, guess, moving))
        floor.append(_quality(truth, np.broadcast_to(last, truth.shape), moving))
    return FrameErrors(_stacked(own), _stacked(floor), np.stack(shares), numbers, motion)


def moving_pixels(recorded: Frames, last_context: Frames, motion: MotionConfig) -> NDArray[np.bool_]:
    """(Tf, H, W) which pixels of recorded frames (Tf, H, W, C) moved since the last seen one (H, W, C)."""
    change = np.abs(recorded.astype(np.int16) - last_context).max(axis=-1) > motion.threshold
    side = 2 * motion.margin + 1
    grown: NDArray[np.bool_] = maximum_filter(change, size=(1, side, side), mode="constant")
    return grown


def curve(values: Numbers, episodes: NDArray[np.integer[Any]]) -> dict[str, list[Any]]:
    """Against the number of the frame: `mean` over pieces and `interval` (95 %, bootstrap over episodes) of each.

    Pieces without a value (NaN) are left out; None where no piece has one, or the interval needs more episodes.

    Args:
        values: (N, Tf); of a difference of two models on the same pieces they give its paired interval.
        episodes: (N,) which episode each piece is from.
    """
    _, member = np.unique(episodes, return_inverse=True)
    known = np.isfinite(values)
    parts = np.zeros((member.max() + 1, 2, values.shape[1]))
    np.add.at(parts, member, np.stack([np.where(known, values, 0.0), known.astype(np.float64)], axis=1))
    sums = np.concatenate([parts.sum(axis=0, keepdims=True), resampled_sums(parts)])
    means = np.divide(sums[:, 0], sums[:, 1], out=np.full(sums[:, 0].shape, np.nan), where=sums[:, 1] > 0)
    return {
        "mean": [float(mean) if np.isfinite(mean) else None for mean in means[0]],
        "interval": [interval_of(resampled) for resampled in means[1:].T],
    }


def check_frames(recorded: Frames, imagined: Frames, last_context: Frames) -> None:
    """Refuses what are no pictures of bytes, or do not belong together.

    Args:
        recorded: should be (N, Tf, H, W, C) uint8.
        imagined: should be the same.
        last_context: should be (N, H, W, C) uint8.

    Raises:
        ShapeError: says which, what came, and what to do.
    """
    _check_pictures("recorded", recorded, "(N, Tf, H, W, C)")
    _check_pictures("imagined", imagined, "(N, Tf, H, W, C)")
    _check_pictures("last_context", last_context, "(N, H, W, C)")
    if imagined.shape != recorded.shape:
        raise ShapeError(f"imagined must be {recorded.shape} like recorded, got {imagined.shape}")
    expected = (len(recorded), *recorded.shape[2:])
    if last_context.shape != expected:
        raise ShapeError(
            f"last_context must be {expected}, one frame for each piece of recorded, got {last_context.shape}"
        )


def _check_pictures(name: str, pictures: NDArray[Any], shape: str) -> None:
    if pictures.dtype != np.uint8:
        raise ShapeError(f"{name} must be uint8 {shape}, got {pictures.dtype} {pictures.shape}{_dtype_hint(pictures)}")
    dimensions = shape.count(",") + 1
    if pictures.ndim == dimensions - 1:
        raise ShapeError(
            f"{name} must be {shape}, got {pictures.shape}; grey pictures need a last axis of 1 (x[..., None]), a "
            "single piece a first one (x[None])"
        )
    if pictures.ndim != dimensions or 0 in pictures.shape:
        raise ShapeError(f"{name} must be {shape}, with at least one of each, got {pictures.shape}")
    channels = pictures.shape[-1]
    if channels == 4:
        raise ShapeError(f"{name} must have 1 or 3 channels, got 4; drop the alpha channel (x[..., :3])")
    if channels not in (1, 3):
        first = pictures.shape[-3] in (1, 3)
        hint = "; the channels come first: move them to the end (np.moveaxis(x, -3, -1))" if first else ""
        raise ShapeError(f"{name} must be {shape} with 1 or 3 channels, got {pictures.shape}{hint}")
    if min(pictures.shape[-3:-1]) < _WINDOW:
        raise ShapeError(f"{name} must be at least {_WINDOW} x {_WINDOW} pixels, SSIM's window, got {pictures.shape}")


def _dtype_hint(pictures: NDArray[Any]) -> str:
    if not np.issubdtype(pictures.dtype, np.floating) or not pictures.size:
        return "; convert them with astype(np.uint8) if they hold 0..255"
    low, high = float(pictures.min()), float(pictures.max())
    if low >= 0 and high <= _LONGEST_FLOAT:
        return " in 0..1; convert them with (255 * x).round().astype(np.uint8)"
    if low >= -_LONGEST_FLOAT and high <= _LONGEST_FLOAT:
        return " in -1..1; convert them with (127.5 * (x + 1)).round().astype(np.uint8)"
    return f" in {low:g}..{high:g}; bring them to 0..255, then x.round().clip(0, 255).astype(np.uint8)"


def _quality(recorded: Frames, frames: Frames, moving: NDArray[np.bool_]) -> FrameQuality:
    """Of one piece, with Tf numbers each."""
    error = np.square(recorded.astype(np.float32) - frames).mean(axis=-1)
    similarity = _similarity(recorded, frames)
    everywhere = np.ones_like(moving)
    return FrameQuality(
        _psnr(_mean_where(error, everywhere)),
        _psnr(_mean_where(error, moving)),
        _mean_where(similarity, everywhere),
        _mean_where(similarity, moving),
    )


def _psnr(error: Numbers) -> Numbers:
    """In dB, of a mean squared error in grey levels."""
    return np.asarray(10 * np.log10(255**2 / np.maximum(error, 1 / 12)))


def _mean_where(values: NDArray[np.float32], chosen: NDArray[np.bool_]) -> Numbers:
    """Mean (Tf,) of values (Tf, H, W) over the chosen pixels; NaN where there are none."""
    count = chosen.sum(axis=(1, 2))
    total = np.where(chosen, values, 0.0).sum(axis=(1, 2), dtype=np.float64)
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


def _similarity(recorded: Frames, frames: Frames) -> NDArray[np.float32]:
    """SSIM (Tf, H, W) of the window around each pixel, the mean over channels."""
    import_lightning()  # explains a torchvision that does not fit, which torchmetrics would meet
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = (torch.tensor(x).permute(0, 3, 1, 2).float() for x in (recorded, frames))
    _, similarity = structural_similarity_index_measure(b, a, data_range=255.0, reduction=None, return_full_image=True)
    found: NDArray[np.float32] = similarity.mean(dim=1).numpy()
    return found


def _drift(values: Numbers, episodes: NDArray[np.int64]) -> dict[str, Any]:
    """Slope per frame of a least-squares line through the known values of each piece, with its interval."""
    slopes = np.array([[_slope(row)] for row in values])
    found = curve(slopes, episodes)
    return {"per_frame": found["mean"][0], "interval": found["interval"][0]}


def _slope(row: Numbers) -> float:
    known = np.flatnonzero(np.isfinite(row))
    return float(np.polyfit(known, row[known], 1)[0]) if len(known) > 1 else float("nan")


def _stacked(pieces: list[FrameQuality]) -> FrameQuality:
    def columns() -> Iterator[Numbers]:
        for field in fields(FrameQuality):
            yield np.stack([getattr(piece, field.name) for piece in pieces])

    return FrameQuality(*columns())
