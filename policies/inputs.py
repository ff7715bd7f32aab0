"""What a policy is given: looked at before anything is computed with it, and made into what its model takes.

Shapes: B rows, Da action width; H W C picture.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ShapeError
from scd_robot.transforms import Transforms
from scd_robot.types import ActionArray, GivenActions, Observation, RunningChunk
from scd_robot.usable import is_picture, missing, problem_with

__all__ = [
    "FarInputs",
    "as_float32",
    "checked_action",
    "checked_given",
    "checked_running",
    "model_observation",
    "optional_keys",
]


logger = logging.getLogger(__name__)

_FAR = 10.0  # times the range of the training, beyond its ends
_OTHER = 0.01  # share of a number that never moved in training, beyond which it is another one


class FarInputs:
    """Says in the log, once per key, where observations are far from all that was trained on.

    That is more than ten times their range away: degrees in the place of radians, another order, a broken sensor. The
    plan of such an observation is no better than a guess. So it is said where a number that never moved in training is
    another one, of which the model sees nothing.

    Args:
        ranges: smallest and largest value (Do,) in training, by the model's keys.
    """

    def __init__(self, ranges: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
        self._known = ranges
        self._limits: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        self._constants = dict(self._limits)
        for key, ends in ranges.items():
            low, high = (np.asarray(end, np.float64) for end in ends)
            moves = high - low > 1e-6 * np.maximum(np.maximum(np.abs(low), np.abs(high)), 1e-3)
            far = np.where(moves, _FAR * (high - low), np.inf)
            self._limits[key] = low - far, high + far
            slack = np.where(moves, np.inf, _OTHER * np.abs(high) + 1e-6)
            if not moves.all():
                self._constants[key] = low - slack, high + slack

    def look(self, seen: Mapping[str, NDArray[Any]], present: Mapping[str, bool]) -> None:
        """Looks at what `model_observation` gave."""
        for limits, words in (
            (self._limits, "{0:.6g} to {1:.6g}: other units, another order, a broken sensor?"),
            (self._constants, "always {1:.6g}: the model is not shown that it is another one"),
        ):
            for key, (low, high) in list(limits.items()):
                beyond = (seen[key] < low) | (seen[key] > high)
                if not beyond.any() or not present.get(key, True):
                    continue
                del limits[key]
                (row, dim), (least, most) = np.argwhere(beyond)[0], self._known[key]
                logger.warning(
                    "observation %r, dimension %d, is %.6g in row %d; in training it was %s (told once for this "
                    "observation)",
                    key,
                    dim,
                    seen[key][row, dim],
                    row,
                    words.format(least[dim], most[dim]),
                )


def model_observation(
    observation: Observation, sources: Mapping[str, str], transforms: Transforms, per_key: bool
) -> tuple[dict[str, NDArray[Any]], dict[str, bool]]:
    """An observation as recorded, as the model has it.

    Args:
        observation: arrays (B, ...) by the recording's keys.
        sources: the recording's key of each key of the model.
        transforms: between the recording and the model.
        per_key: whether each key has tokens of its own, and may be left out, or None. Pictures always have them, and
            may be None.

    Returns:
        Arrays (B, ...) by the model's keys, vectors float32 and pictures uint8; and False for each of them that is
        absent.

    Raises:
        ShapeError: missing keys, wrong widths, several batch sizes, NaN or infinite values; pictures that are none.
    """
    seen: dict[str, NDArray[Any]] = {}
    absent = []
    batch = None
    for key, source in sources.items():
        spec, name = transforms.recorded.observation[source], f"observation {source!r}"
        if observation.get(source) is None:
            if not per_key and not (is_picture(spec) and source in observation):
                raise ShapeError(f"{name} {missing(observation, is_picture(spec))}")
            absent.append(key)
            continue
        value: NDArray[Any] = np.asarray(observation[source])
        if (problem := problem_with(value, spec, batched=True)) is not None:
            raise ShapeError(f"{name} {problem}")
        batch = len(value) if batch is None else batch
        if len(value) != batch or not batch:
            expected = ", ".join(map(str, ("B", *spec.shape)))
            raise ShapeError(f"{name} must be ({expected}) with one B >= 1 for all keys, got {value.shape}")
        seen[key] = transforms.convert(key, value if is_picture(spec) else as_float32(value, name))
    if batch is None:
        raise ShapeError(f"no observation key is there; expected {sorted(sources.values())}")
    for key in absent:
        if _is_needed(key, transforms):
            raise ShapeError(f"observation {key!r} may not be absent: actions are relative to it")
        spec = transforms.spec.observation[key]
        seen[key] = np.zeros((batch, *spec.shape), spec.dtype)
    return seen, dict.fromkeys(absent, False)


def optional_keys(sources: Mapping[str, str], transforms: Transforms, per_key: bool) -> set[str]:
    """The recording's keys that `model_observation` takes None for; arguments as there."""
    specs = transforms.recorded.observation
    return {
        source
        for key, source in sources.items()
        if (per_key or is_picture(specs[source])) and not _is_needed(key, transforms)
    }


def _is_needed(key: str, transforms: Transforms) -> bool:
    """Whether actions are relative to this key of the model."""
    return any(part.key == key for part in transforms.config.chunk_parts)


def checked_action(name: str, action: ActionArray, shape: tuple[int, ...]) -> ActionArray:
    """The actions in float32; raises ShapeError where they have another shape, or hold NaN or infinite values."""
    value = as_float32(action, name)
    if value.shape != shape:
        raise ShapeError(f"{name} must be {shape}, got {value.shape}")
    if not np.isfinite(value).all():
        row = int(np.argwhere(~np.isfinite(value))[0][0])
        raise ShapeError(f"{name} holds a NaN or infinite value in row {row}")
    return value


def checked_running(running: RunningChunk, rows: int, action_dim: int) -> RunningChunk:
    """The running chunk in float32; raises ShapeError where it is not (rows, n, Da), or not finite."""
    count = np.shape(running.actions)[1] if np.ndim(running.actions) == 3 else 0
    return replace(running, actions=checked_action("running chunk", running.actions, (rows, count, action_dim)))


def checked_given(fixed: GivenActions, shape: tuple[int, int, int]) -> GivenActions:
    """Given actions in float32, 0 where nothing is given; raises ShapeError where they are not for such chunks."""
    mask = np.asarray(fixed.mask, np.bool_)
    if mask.shape != shape[1:] or np.shape(fixed.actions) != shape:
        raise ShapeError(
            f"given actions must be {shape} with a mask {shape[1:]}, got {np.shape(fixed.actions)} and {mask.shape}"
        )
    return GivenActions(checked_action("given actions", np.where(mask, fixed.actions, 0.0), shape), mask)


def as_float32(values: Any, name: str) -> ActionArray:
    """The values in float32, those that are too large as infinite."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ShapeError(f"{name} must hold numbers, got an array of {array.dtype}")
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)
