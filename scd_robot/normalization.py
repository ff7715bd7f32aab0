"""Normalisation of observations and actions, with its inverse. It is part of a checkpoint.

Shapes: Do width of one key; (..., Do) any batch axes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scd_robot.errors import CheckpointError, ConfigError, DatasetError, ShapeError, UnknownNameError

__all__ = ["MODES", "FieldStatistics", "Mode", "Normalizer", "compute_statistics"]

Mode = Literal["min_max", "mean_std", "quantile", "identity"]
MODES: tuple[Mode, ...] = ("min_max", "mean_std", "quantile", "identity")


@dataclass(frozen=True)
class FieldStatistics:
    """Per-dimension statistics of one key, Do floats each; `low` and `high` are the 1 % and 99 % quantiles."""

    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in self.__dataclass_fields__}
        if len(set(lengths.values())) != 1:
            raise CheckpointError(f"statistics of one key must have one width, got {lengths}")
        if not all(np.isfinite(getattr(self, name)).all() for name in lengths):
            raise CheckpointError("statistics hold NaN or infinite values")

    @property
    def width(self) -> int:
        """Do."""
        return len(self.mean)

    def center_and_half(self, mode: Mode) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Center and half-width (Do,) of what becomes [-1, 1]; half-width 0 marks a constant dimension.

        A dimension whose quantiles coincide although it moves (a gripper that is nearly always open) takes its range.
        """
        if mode == "identity":
            return np.zeros(self.width), np.ones(self.width)
        minimum, maximum = np.asarray(self.minimum, np.float64), np.asarray(self.maximum, np.float64)
        lower, upper = minimum, maximum
        if mode == "mean_std":
            lower, upper = np.subtract(self.mean, self.std), np.add(self.mean, self.std)
        if mode == "quantile":
            coincide = is_constant(np.asarray(self.low), np.asarray(self.high))
            lower, upper = np.where(coincide, minimum, self.low), np.where(coincide, maximum, self.high)
        return (lower + upper) / 2, np.where(is_constant(lower, upper), 0.0, (upper - lower) / 2)


def is_constant(lower: NDArray[np.float64], upper: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether a range is nothing but float32 rounding: under a millionth of its magnitude, or under 1e-9."""
    return upper - lower <= np.maximum(1e-6 * np.maximum(np.abs(lower), np.abs(upper)), 1e-9)


def compute_statistics(values: NDArray[Any], key: str) -> FieldStatistics:
    """Statistics over all but the last axis of `values` (..., Do).

    Raises:
        DatasetError: no values, or NaN or infinite ones.
    """
    flat = np.asarray(values, np.float64).reshape(-1, values.shape[-1])
    if not len(flat):
        raise DatasetError(f"cannot compute statistics of {key!r}: it holds no steps")
    if not np.isfinite(flat).all():
        step, dim = np.argwhere(~np.isfinite(flat))[0]
        raise DatasetError(f"{key!r} holds a NaN or infinite value at step {step}, dimension {dim}")
    low, high = np.quantile(flat, (0.01, 0.99), axis=0)
    columns = (flat.min(0), flat.max(0), flat.mean(0), flat.std(0), low, high)
    statistics = FieldStatistics(*(tuple(map(float, column)) for column in columns))
    return statistics


class Normalizer(nn.Module):
    """Affine normalisation per key, held as buffers so that it moves with the model.

    Args:
        statistics: by key; actions under the key "action".
        modes: by key, see `MODES`; "min_max" maps the data to [-1, 1], "quantile" its central 98 %, "mean_std" to zero
            mean and unit deviation, "identity" leaves it.
    """

    def __init__(self, statistics: Mapping[str, FieldStatistics], modes: Mapping[str, Mode]) -> None:
        super().__init__()
        if set(statistics) != set(modes):
            raise ConfigError(f"statistics are for {sorted(statistics)} but modes for {sorted(modes)}")
        self.statistics = dict(statistics)
        self.modes = dict(modes)
        for key, mode in modes.items():
            if mode not in MODES:
                raise UnknownNameError("normalisation mode", mode, MODES)
            center, half = statistics[key].center_and_half(mode)
            constant = half == 0
            # Constant dimensions are 0 on the way in, whatever they are later, since nothing was learned of them; and
            # held at the constant on the way out.
            gain = np.divide(1.0, half, out=np.zeros_like(half), where=~constant)
            values = {"center": center, "gain": gain, "half": half}
            for name, value in values.items():
                buffer = torch.tensor(value, dtype=torch.float32)
                self.register_buffer(f"{name}_{list(statistics).index(key)}", buffer, persistent=False)

    def normalize(self, key: str, x: Tensor) -> Tensor:
        """x (..., Do) in the dataset's units -> normalised."""
        center, gain = self._buffers_of(key, x, "center", "gain")
        return (x - center) * gain

    def normalize_observation(self, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Vectors (..., Do) by key normalised; pictures, uint8, as they are: their encoder knows their range.

        So are features of pictures, which are float16.
        """
        return {
            key: value if value.dtype in (torch.uint8, torch.float16) else self.normalize(key, value.float())
            for key, value in observation.items()
        }

    def denormalize(self, key: str, x: Tensor) -> Tensor:
        """Inverse of `normalize`; constant dimensions come out as their constant."""
        center, half = self._buffers_of(key, x, "center", "half")
        return x * half + center

    def ranges(self) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
        """Smallest and largest value (Do,) by key, in the dataset's units."""
        return {key: (found.minimum, found.maximum) for key, found in self.statistics.items()}

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            key: {"mode": self.modes[key]} | {name: list(values) for name, values in vars(self.statistics[key]).items()}
            for key in self.statistics
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Normalizer":
        """Inverse of `to_json`; CheckpointError for missing or extra entries."""
        statistics, modes = {}, {}
        names = set(FieldStatistics.__dataclass_fields__)
        for key, entry in data.items():
            if set(entry) != names | {"mode"}:
                raise CheckpointError(f"normalisation of {key!r} needs {sorted(names | {'mode'})}, got {sorted(entry)}")
            statistics[key] = FieldStatistics(**{name: tuple(float(v) for v in entry[name]) for name in names})
            modes[key] = entry["mode"]
        return cls(statistics, modes)

    def _buffers_of(self, key: str, x: Tensor, *names: str) -> list[Tensor]:
        if key not in self.statistics:
            raise UnknownNameError("normalised key", key, self.statistics)
        if x.shape[-1] != self.statistics[key].width:
            raise ShapeError(f"{key!r} must be (..., {self.statistics[key].width}), got {tuple(x.shape)}")
        index = list(self.statistics).index(key)
        return [getattr(self, f"{name}_{index}") for name in names]
