"""What of an observation can be used: one rule for policies, for the server's reader and for the control loop's gate.

numpy only. Sentences begin with what is wrong, so that whoever tells them puts the key's name before them.

Shapes: B rows, H W C picture.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.types import ArraySpec

__all__ = ["as_bytes", "is_picture", "is_there", "missing", "problem_of", "problem_with"]


def is_picture(spec: ArraySpec) -> bool:
    """Whether a key holds pictures (H, W, C) uint8."""
    return spec.dtype == "uint8" and len(spec.shape) == 3


def is_there(observation: Mapping[str, Any]) -> bool:
    """Whether anything was observed: not every key is None."""
    return any(value is not None for value in observation.values())


def problem_of(
    observation: Mapping[str, Any], spec: Mapping[str, ArraySpec], optional: Collection[str] = ()
) -> str | None:
    """The first thing that is wrong with what one control step saw, as a sentence; None = nothing.

    Args:
        observation: by key, without a batch axis; keys that are not in `spec` are ignored.
        spec: likewise.
        optional: keys that may be None.
    """
    for key, array in spec.items():
        value = observation.get(key)
        if value is not None:
            problem = problem_with(value, array)
        else:
            problem = None if key in optional and key in observation else missing(observation, key in optional)
        if problem is not None:
            return f"{key!r} {problem}"
    return None if is_there({key: observation[key] for key in spec}) else "every key is None: nothing was observed"


def missing(observation: Mapping[str, Any], optional: bool) -> str:
    """That a key is missing, and what came; `optional`: it could have been None."""
    none = "; give None where the camera or sensor sent nothing in this control step" if optional else ""
    return f"is missing; got {sorted(map(str, observation))}{none}"


def problem_with(value: Any, spec: ArraySpec, batched: bool = False) -> str | None:
    """What is wrong with the value of one key; None = nothing.

    Vectors may be of any kind of numbers, as long as they are finite in float32. Pictures must have something in them.

    Args:
        value: an array of the shape of `spec`, or one (B, ...) of several rows.
        spec: without a batch axis.
        batched: there are several rows.
    """
    if not isinstance(value, np.ndarray | np.generic):
        return f"must be an array, got {type(value).__name__}"
    value = np.asarray(value)
    fits = value.ndim == len(spec.shape) + batched and value.shape[int(batched) :] == spec.shape
    rows: NDArray[Any] = value if batched else value[None]
    if is_picture(spec):
        if not fits or value.dtype != np.uint8:
            return _no_picture(value, spec.shape, batched)
        return _content(rows, batched)
    if value.dtype.kind not in "biuf":
        return f"must hold numbers, got {value.dtype}"
    if not fits:
        hint = ": leave the batch axis out" if not batched and value.shape == (1, *spec.shape) else ""
        return f"must be {_shape(spec.shape, batched)}, got {value.shape}{hint}"
    if spec.dtype == "uint8" and value.dtype != np.uint8:
        return f"must hold uint8 from 0 to 255, got {value.dtype}"
    with np.errstate(over="ignore"):
        finite = np.isfinite(rows.astype(np.float32, copy=False))
    if not finite.all():
        return f"holds a NaN or infinite value{_row(int(np.argwhere(~finite)[0][0]), batched)}"
    return None


def _content(pictures: NDArray[np.uint8], batched: bool) -> str | None:
    """Of pictures (B, H, W, C) in which there is nothing to be seen."""
    rows = pictures.reshape(len(pictures), -1)
    few = rows[:, :: max(1, rows.shape[1] // 500)]  # which tell of nearly every picture that it is a good one
    if few.size and (few.max(axis=1) > np.maximum(few.min(axis=1), 1)).all():
        return None
    low, high = rows.min(axis=1), rows.max(axis=1)
    for row in np.flatnonzero(low == high)[:1]:
        return (
            f"is {low[row]} everywhere{_row(row, batched)}: the camera gave no picture; mend it, or give None for this "
            "control step"
        )
    for row in np.flatnonzero(high <= 1)[:1]:
        return (
            f"holds nothing but 0 and 1{_row(row, batched)}: a picture of 0 to 1 was converted to uint8; give "
            "np.round(255 * picture).astype(np.uint8)"
        )
    return None


def _no_picture(array: NDArray[Any], shape: tuple[int, ...], batched: bool) -> str:
    """What else it is than pictures of this shape, and what to do."""
    sentence = f"must be {_shape(shape, batched)} uint8 of 0 to 255, got {array.shape} {array.dtype}"
    found = array.shape if batched else (1, *array.shape)
    if found[1:] != shape or len(found) != 4:
        return sentence + (_batch_hint(array.shape, shape, batched) or _shape_hint(found, shape, batched))
    return sentence + as_bytes(array, "give")


def as_bytes(pictures: NDArray[Any], verb: str) -> str:
    """Which range pictures have that are not uint8, and what to `verb` in their place."""
    known = pictures[np.isfinite(pictures)] if pictures.dtype.kind in "iuf" else pictures[:0]
    if not known.size:
        return f": {verb} np.round(picture).astype(np.uint8) of what is of 0 to 255"
    low, high = known.min(), known.max()
    for least, most, whole in ((0, 1, "255 * picture"), (-1, 1, "127.5 * (picture + 1)"), (0, 255, "picture")):
        if least <= low and high <= most:
            return f" of {least} to {most}: {verb} np.round({whole}).astype(np.uint8)"
    return f" of {low:g} to {high:g}: bring pictures to 0 to 255, then {verb} np.round(picture).astype(np.uint8)"


def _batch_hint(found: tuple[int, ...], shape: tuple[int, ...], batched: bool) -> str:
    if batched:
        return ": there is no batch axis; give picture[None]" if found == shape else ""
    return ": leave the batch axis out" if found == (1, *shape) else ""


def _shape_hint(found: tuple[int, ...], shape: tuple[int, ...], batched: bool) -> str:
    """What to do about pictures of another shape than (B, *shape)."""
    height, width, channels = shape
    if found[1:] == (channels, height, width):
        return f": channels come last; give np.moveaxis(picture, {int(batched)}, -1)"
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


def _shape(shape: tuple[int, ...], batched: bool) -> str:
    return f"(B, {', '.join(map(str, shape))})" if batched else str(tuple(shape))


def _row(row: int, batched: bool) -> str:
    return f" in row {row}" if batched else ""
