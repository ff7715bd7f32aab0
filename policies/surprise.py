"""How surprising the real next frame is to a model of frames: an anomaly score for every control step.

When a frame arrives, the model has predicted it from the frames and actions before it and from the action that was
really executed. It predicts best with one denoising step: at flow time 0 there is nothing to be seen but noise, so that
what the decoder says there is the expected frame, with the least squared error and for one call of the decoder.

A frame is judged by patches of P x P pixels. The error of patch l is the mean over its pixels and channels of the
squared difference of real and predicted frame, e_l [grey levels²], of two kinds:

    everywhere    all pixels
    moving        pixels that do not move count as 0; one moves where the real frame differs from the one before by
                  more than 8 grey levels in any channel

What is usual, u_l, is found on recorded episodes that the model was not trained on: the mean of e_l over their
frames, and of that the largest of the patch and its eight neighbours, since the robot might as well have passed there.

    score = max over l of log10((e_l + 1) / (u_l + 1))

1 grey level² is an error that nobody sees. A score of 1 says: somewhere the error is ten times the usual one. The
largest patch is taken, because a thing that was moved is small: averaged over the picture, its error would vanish in
those of the robot. An alarm is a score above the threshold: the quantile of the scores of other recorded
episodes than those that tell what is usual, 0.99 for one false alarm in 100 frames.

Shapes: B rows, T control steps, H W C picture, P patch size, h w patches, Da action width.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter

from scd_robot.config import to_json
from scd_robot.errors import ConfigError, ShapeError
from scd_robot.policies.frame_stream import FrameStream
from scd_robot.policies.imagination import Imagination
from scd_robot.types import ActionArray

__all__ = [
    "KINDS",
    "Surprise",
    "SurpriseCalibration",
    "calibrate",
    "load_calibration",
    "patch_errors",
    "prediction_settings",
    "scores_of",
]

KINDS = ("everywhere", "moving")
SCHEMA = 1

_MOVES = 8  # grey levels
_UNSEEN = 1.0  # grey levels²

Numbers = NDArray[np.float64]
ByKind = Mapping[str, Numbers]


@dataclass(frozen=True, eq=False)
class SurpriseCalibration:
    """What is usual.

    Attributes:
        usual: by kind (h, w) [grey levels²], u_l.
        thresholds: by kind, above which a score is an alarm.
        quantile: of the recorded scores that are below.
        episodes: numbers of episodes: for `usual`, and for `thresholds`.
        frames: likewise.
        model: SHA-256 of the weights whose errors these are; empty = not known.
        settings: that the model predicted with, see `prediction_settings`.
    """

    usual: dict[str, Numbers]
    thresholds: dict[str, float]
    quantile: float
    episodes: tuple[int, int]
    frames: tuple[int, int]
    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "schema": SCHEMA,
            "usual": {kind: self.usual[kind].tolist() for kind in KINDS},
            "thresholds": dict(self.thresholds),
            "quantile": self.quantile,
            "episodes": list(self.episodes),
            "frames": list(self.frames),
            "model": self.model,
            "settings": self.settings,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`.

        Raises:
            ConfigError: it is none, or of another version.
        """
        try:
            if data["schema"] != SCHEMA:
                raise ConfigError(f"this calibration has schema {data['schema']}, this version reads {SCHEMA}")
            return cls(
                {kind: np.asarray(data["usual"][kind], np.float64) for kind in KINDS},
                {kind: float(data["thresholds"][kind]) for kind in KINDS},
                float(data["quantile"]),
                (int(data["episodes"][0]), int(data["episodes"][1])),
                (int(data["frames"][0]), int(data["frames"][1])),
                str(data["model"]),
                dict(data["settings"]),
            )
        except (KeyError, TypeError, IndexError) as error:
            raise ConfigError(f"this is no calibration of surprise: {error} is missing or of another type") from error


def load_calibration(path: str | Path) -> SurpriseCalibration:
    """The calibration in a surprise.json that `scd surprise` wrote.

    Raises:
        ConfigError: it holds none, or of another version.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("calibration"), dict):
        raise ConfigError(f"{path} holds no calibration; name a surprise.json that 'scd surprise' wrote")
    return SurpriseCalibration.from_json(document["calibration"])


class Surprise:
    """Watches what a robot sees and does; beside a policy it is given what the policy's `act` is given.

    Rows are independent; noise is keyed by (seed, episode, control step).

    Args:
        imagination: model of frames, to predict with one denoising step: `load_imagination(path,
            num_denoising_steps=1)`.
        calibration: what is usual, from `calibrate`; None = `observe` gives errors of patches only.

    Attributes:
        errors: by kind (B, h, w) [grey levels²] of the frame last observed, NaN in rows that had just begun.
        predicted: (B, H, W, C) uint8, that frame as it was predicted; meaningless in rows that had just begun.

    Raises:
        ConfigError: the calibration is of another model, or of other denoising steps.
    """

    def __init__(self, imagination: Imagination, calibration: SurpriseCalibration | None = None) -> None:
        self.calibration = calibration
        self.errors: dict[str, Numbers] = {}
        self.predicted: NDArray[np.uint8] | None = None
        self._stream = FrameStream(imagination)
        self._patch = imagination.model.config.frames.patch_size
        if calibration is not None:
            _check_model(imagination, calibration)

    def reset(self, rows: Sequence[int] | None = None, episodes: Sequence[int] | None = None) -> None:
        """Begins new episodes; see `types.Policy.reset`."""
        self._stream.reset(rows, episodes)

    def observe(self, frames: NDArray[Any], executed_action: ActionArray | None = None) -> dict[str, Numbers]:
        """The score of every row's new frame.

        Args:
            frames: (B, H, W, C) uint8 as recorded.
            executed_action: (B, Da) as recorded, what was really executed since the frame before; not read in rows
                that begin, None in the first control step of all.

        Returns:
            By kind (B,); NaN in rows that begin, where nothing was predicted, and without a calibration.

        Raises:
            ShapeError: see `FrameStream.observe`.
        """
        stream = self._stream
        begun = None if stream.position is None else stream.position > 0
        last, predicted = stream.pictures, None
        if begun is not None and begun.any() and executed_action is not None:
            known, width = np.flatnonzero(begun), np.shape(executed_action)[-1:]
            given = np.asarray(executed_action)
            if given.shape != (len(begun), *width):
                raise ShapeError(f"executed_action must be ({len(begun)}, Da), got {given.shape}")
            predicted = stream.imagine(given[known, None, None], known)[:, 0, 0]
        stream.observe(frames, executed_action)
        seen = stream.pictures
        assert seen is not None
        shape = (len(seen), seen.shape[1] // self._patch, seen.shape[2] // self._patch)
        self.errors, self.predicted = {kind: np.full(shape, np.nan) for kind in KINDS}, seen.copy()
        if predicted is not None:
            assert last is not None
            self.predicted[known] = predicted
            for kind, values in patch_errors(seen[known], predicted, last[known], self._patch).items():
                self.errors[kind][known] = values
        if self.calibration is None:
            return {kind: np.full(len(seen), np.nan) for kind in KINDS}
        return scores_of(self.errors, self.calibration.usual)

    def alarms(self, scores: ByKind) -> dict[str, NDArray[np.bool_]]:
        """By kind (B,), whether scores are above the threshold; never where there is none (NaN)."""
        if self.calibration is None:
            raise ConfigError("there is no threshold without a calibration; give Surprise one, from calibrate")
        return {kind: scores[kind] > self.calibration.thresholds[kind] for kind in KINDS}


def patch_errors(
    real: NDArray[np.uint8], predicted: NDArray[np.uint8], last: NDArray[np.uint8], patch_size: int
) -> dict[str, Numbers]:
    """Mean squared errors e_l by kind, (B, h, w) [grey levels²], of frames (B, H, W, C) that follow `last`."""
    now = real.astype(np.float64)
    squared = np.square(now - predicted).mean(axis=-1)
    moves = (np.abs(now - last) > _MOVES).any(axis=-1)
    batch, height, width = squared.shape
    grid = (batch, height // patch_size, patch_size, width // patch_size, patch_size)
    pixels = {"everywhere": squared, "moving": squared * moves}
    return {kind: values.reshape(grid).mean(axis=(2, 4)) for kind, values in pixels.items()}


def scores_of(errors: ByKind, usual: ByKind) -> dict[str, Numbers]:
    """By kind (...,) the scores of errors (..., h, w), where (h, w) are usual; NaN where errors are."""
    ratios = {kind: np.log10((errors[kind] + _UNSEEN) / (usual[kind] + _UNSEEN)) for kind in KINDS}
    return {kind: ratio.max(axis=(-2, -1)) for kind, ratio in ratios.items()}


def prediction_settings(imagination: Imagination) -> dict[str, Any]:
    """What errors depend on besides the weights, as plain JSON types."""
    settings = to_json(imagination.config)
    return {name: settings[name] for name in ("sampler", "guidance_scale")}


def calibrate(imagination: Imagination, episodes: Sequence[ByKind], quantile: float = 0.99) -> SurpriseCalibration:
    """Finds what is usual.

    Args:
        imagination: whose errors they are.
        episodes: of each the errors by kind (T, h, w), from `Surprise.errors`, without the first control step. Those of
            even numbers in this order tell what errors are usual, the others what scores are.
        quantile: share of the latters' scores that is no alarm.

    Raises:
        ConfigError: fewer than two episodes, no frames, or a quantile that is none.
    """
    if not 0 < quantile < 1:
        raise ConfigError(f"quantile must be above 0 and below 1, got {quantile}")
    if len(episodes) < 2:
        raise ConfigError(
            f"a calibration needs at least 2 episodes, one for errors and one for scores, got {len(episodes)}"
        )
    parts = [{kind: np.concatenate([e[kind] for e in episodes[half::2]]) for kind in KINDS} for half in (0, 1)]
    frames = (len(parts[0][KINDS[0]]), len(parts[1][KINDS[0]]))
    if not all(frames):
        raise ConfigError(
            f"a calibration needs frames that were predicted in both halves of the episodes, got {frames}"
        )
    # A place that is usually still is surprising only where its neighbours are still as well.
    usual = {kind: maximum_filter(errors.mean(axis=0), size=3, mode="nearest") for kind, errors in parts[0].items()}
    scores = scores_of(parts[1], usual)
    thresholds = {kind: float(np.quantile(scores[kind], quantile, method="higher")) for kind in KINDS}
    counts, model = (len(episodes[0::2]), len(episodes[1::2])), imagination.provenance.get("weights_sha256", "")
    return SurpriseCalibration(usual, thresholds, quantile, counts, frames, model, prediction_settings(imagination))


def _check_model(imagination: Imagination, calibration: SurpriseCalibration) -> None:
    model = imagination.provenance.get("weights_sha256", "")
    if model and calibration.model and model != calibration.model:
        raise ConfigError(
            f"the calibration is of other weights ({calibration.model[:12]}) than the model of frames ({model[:12]}); "
            "calibrate this one: scd surprise CHECKPOINT --dataset PATH"
        )
    settings = prediction_settings(imagination)
    if settings != calibration.settings:
        raise ConfigError(f"the calibration is of {calibration.settings}, the model is run with {settings}; load it so")
    places = imagination.model.config.frames.places(imagination.pictures_shape)
    for kind, values in calibration.usual.items():
        if values.shape != places:
            raise ShapeError(f"the calibration of {kind!r} has patches {values.shape}, the model's pictures {places}")
