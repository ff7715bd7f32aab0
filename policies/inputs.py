"""What a policy is given: looked at before anything is computed with it, and made into what its model takes.

Shapes: B rows, Da action width; H W C picture.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ShapeError
from scd_robot.transforms import Transforms
from scd_robot.types import ActionArray, GivenActions, Observation, RunningChunk

__all__ = [
    "as_float32",
    "checked_action",
    "checked_given",
    "checked_running",
    "model_observation",
]


def model_observation(
    observation: Observation, sources: Mapping[str, str], transforms: Transforms, may_be_absent: bool
) -> tuple[dict[str, NDArray[Any]], dict[str, bool]]:
    """An observation as recorded, as the model has it.

    Args:
        observation: arrays (B, ...) by the recording's keys.
        sources: the recording's key of each key of the model.
        transforms: between the recording and the model.
        may_be_absent: whether keys may be left out, or None. Pictures may be None always: they have tokens of their
            own.

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
        spec = transforms.recorded.observation[source]
        is_picture = spec.dtype == "uint8" and len(spec.shape) == 3
        if observation.get(source) is None:
            if not may_be_absent and not (is_picture and source in observation):
                none = "; give None where the camera sent nothing in this control step" if is_picture else ""
                raise ShapeError(f"observation {source!r} is missing; got {sorted(observation)}{none}")
            absent.append(key)
            continue
        name = f"observation {source!r}"
        value: NDArray[Any] = (
            _as_picture(observation[source], name, spec.shape) if is_picture else as_float32(observation[source], name)
        )
        batch = len(value) if batch is None and value.ndim else batch
        if value.shape != (batch, *spec.shape) or not batch:
            expected = ", ".join(map(str, ("B", *spec.shape)))
            raise ShapeError(f"{name} must be ({expected}) with one B >= 1 for all keys, got {value.shape}")
        if is_picture:
            _check_content(value, name)
        elif not np.isfinite(value).all():
            row = int(np.argwhere(~np.isfinite(value))[0][0])
            raise ShapeError(f"{name} holds a NaN or infinite value in row {row}")
        seen[key] = transforms.convert(key, value)
    if batch is None:
        raise ShapeError(f"no observation key is there; expected {sorted(sources.values())}")
    for key in absent:
        if any(part.key == key for part in transforms.config.chunk_parts):
            raise ShapeError(f"observation {key!r} may not be absent: actions are relative to it")
        spec = transforms.spec.observation[key]
        seen[key] = np.zeros((batch, *spec.shape), spec.dtype)
    return seen, dict.fromkeys(absent, False)


def _as_picture(values: Any, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Pictures (B, H, W, C) uint8; raises ShapeError that names what else it is."""
    array = np.asarray(values)
    expected = f"(B, {', '.join(map(str, shape))}) uint8 of 0 to 255"
    found = f"{array.shape} {array.dtype}"
    if array.shape[1:] != shape:
        raise ShapeError(f"{name} must be {expected}, got {found}{_shape_hint(array.shape, shape)}")
    if array.dtype.kind == "f":
        mend = "np.round(255 * picture)" if array.size and np.nanmax(array) <= 1 else "np.round(picture)"
        raise ShapeError(f"{name} must be {expected}, got {found}: give {mend}.astype(np.uint8)")
    if array.dtype != np.uint8:
        raise ShapeError(f"{name} must be {expected}, got {found}: convert what is of 0 to 255 with astype(np.uint8)")
    return array


def _shape_hint(found: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """What to do about pictures of another shape than (B, *shape)."""
    height, width, channels = shape
    if found == shape:
        return ": there is no batch axis; give picture[None]"
    if found[1:] == (channels, height, width):
        return ": channels come last; give np.moveaxis(picture, 1, -1)"
    if found[1:] == (height, width) and channels == 1:
        return ": the channel's axis is missing; give picture[..., None]"
    if found[1:] in ((height, width), (height, width, 1)):
        return f": this is grey, the policy was trained with {channels} channels"
    if found[1:3] == (height, width) and len(found) == 4:
        alpha = (
            ": the fourth (alpha) is not known to it; give picture[..., :3]" if (found[3], channels) == (4, 3) else ""
        )
        return f": the policy was trained with {channels} channels{alpha}"
    if len(found) == 4 and found[3] == channels:
        return ": a picture of another size; resize it to that of the training, or use that camera's settings"
    return ": is it another camera?"


def _check_content(pictures: NDArray[np.uint8], name: str) -> None:
    """Refuses pictures (B, H, W, C) in which there is nothing to be seen."""
    rows = pictures.reshape(len(pictures), -1)
    low, high = rows.min(axis=1), rows.max(axis=1)
    for row in np.flatnonzero(low == high)[:1]:
        raise ShapeError(
            f"{name} is {low[row]} everywhere in row {row}: the camera gave no picture; mend it, or give None for this "
            "control step"
        )
    for row in np.flatnonzero(high <= 1)[:1]:
        raise ShapeError(
            f"{name} holds nothing but 0 and 1 in row {row}: a picture of 0 to 1 was converted to uint8; give "
            "np.round(255 * picture).astype(np.uint8)"
        )


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
