"""What a policy is given: looked at before anything is computed with it, and made into what its model takes.

Shapes: B rows, Da action width.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ShapeError
from scd_robot.model import ScdConfig
from scd_robot.normalization import Normalizer
from scd_robot.transforms import Transforms
from scd_robot.types import ActionArray, DatasetSpec, Observation

__all__ = ["check_widths", "checked_action", "model_observation"]


def check_widths(config: ScdConfig, normalizer: Normalizer, dataset: DatasetSpec) -> None:
    """Raises ShapeError where model, statistics and specification are not of one dataset."""
    specified = {key: spec.shape for key, spec in dataset.observation.items()} | {"action": (dataset.action_dim,)}
    for key, shape in {**config.observation_shapes, "action": (config.action_dim,)}.items():
        statistics = normalizer.statistics.get(key)
        found = (specified.get(key), None if statistics is None else (statistics.width,))
        if found != (tuple(shape), tuple(shape)):
            raise ShapeError(
                f"the model takes {key!r} of shape {tuple(shape)}, the dataset's specification has {found[0]} and the "
                f"normalisation {found[1]}; they must be of one checkpoint"
            )


def model_observation(
    observation: Observation, sources: Mapping[str, str], transforms: Transforms, may_be_absent: bool
) -> tuple[dict[str, NDArray[Any]], dict[str, bool]]:
    """An observation as recorded, as the model has it.

    Args:
        observation: arrays (B, ...) by the recording's keys.
        sources: the recording's key of each key of the model.
        transforms: between the recording and the model.
        may_be_absent: whether keys may be left out, or None.

    Returns:
        Arrays (B, ...) by the model's keys; and which keys are there, if some are not.

    Raises:
        ShapeError: missing keys, wrong widths, several batch sizes, NaN or infinite values.
    """
    seen: dict[str, NDArray[Any]] = {}
    absent = []
    batch = None
    for key, source in sources.items():
        if observation.get(source) is None:
            if not may_be_absent:
                raise ShapeError(f"observation {source!r} is missing; got {sorted(observation)}")
            absent.append(key)
            continue
        value = _as_float32(observation[source], f"observation {source!r}")
        batch = len(value) if batch is None and value.ndim else batch
        shape = transforms.recorded.observation[source].shape
        if value.shape != (batch, *shape) or not batch:
            expected = ", ".join(map(str, ("B", *shape)))
            raise ShapeError(
                f"observation {source!r} must be ({expected}) with one B >= 1 for all keys, got {value.shape}"
            )
        if not np.isfinite(value).all():
            row = int(np.argwhere(~np.isfinite(value))[0][0])
            raise ShapeError(f"observation {source!r} holds a NaN or infinite value in row {row}")
        seen[key] = transforms.convert(key, value)
    if batch is None:
        raise ShapeError(f"no observation key is there; expected {sorted(sources.values())}")
    for key in absent:
        if any(part.key == key for part in transforms.config.chunk_parts):
            raise ShapeError(f"observation {key!r} may not be absent: actions are relative to it")
        seen[key] = np.zeros((batch, *transforms.spec.observation[key].shape), np.float32)
    return seen, dict.fromkeys(seen, True) | dict.fromkeys(absent, False) if absent else {}


def checked_action(name: str, action: ActionArray, shape: tuple[int, ...]) -> ActionArray:
    """The actions in float32; raises ShapeError where they have another shape, or hold NaN or infinite values."""
    value = _as_float32(action, name)
    if value.shape != shape:
        raise ShapeError(f"{name} must be {shape}, got {value.shape}")
    if not np.isfinite(value).all():
        row = int(np.argwhere(~np.isfinite(value))[0][0])
        raise ShapeError(f"{name} holds a NaN or infinite value in row {row}")
    return value


def _as_float32(values: Any, name: str) -> ActionArray:
    """The values in float32, those that are too large as infinite."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ShapeError(f"{name} must hold numbers, got an array of {array.dtype}")
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)
