"""What a robot calls its numbers and cameras, and where a policy's arrays have them: by name, never by place.

Shapes: Da action width, Do width of a vector, H W C picture.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scd_robot.control.interfaces import Command
from scd_robot.control.limits import Limits
from scd_robot.errors import ConfigError, DatasetError, ShapeError, nearest_names
from scd_robot.types import ArraySpec, Observation, PolicySpec

__all__ = ["PRESENT_STEPS", "NameMap", "Rest"]

Rest = tuple[float | None, ...]
"""(Da,) what standing still is, as in `Limits.rest`."""

PRESENT_STEPS = 2
"""Control steps for which a position that was measured is the present one, to which a robot is held."""

_CAMERAS = "observation.images."
_INFO, _STATISTICS = Path("meta", "info.json"), Path("meta", "stats.json")
_VISUAL = ("image", "video")


@dataclass(frozen=True)
class NameMap:
    """Names on the robot of what a policy sees and commands.

    Attributes:
        vectors: by observation key, the names of its numbers in the policy's order: ("shoulder.pos", "elbow.pos").
        cameras: by observation key, the name of the camera.
        action: (Da,) the names of the actions in the policy's order.
        ranges: by observation key, and by "action", the least and the greatest numbers of the data, where known.
    """

    vectors: Mapping[str, tuple[str, ...]]
    cameras: Mapping[str, str]
    action: tuple[str, ...]
    ranges: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, names in {**self.vectors, "action": self.action}.items():
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ConfigError(f"{key!r} names {twice[0]!r} more than once: {', '.join(names)}")
            if key in self.ranges and any(len(ends) != len(names) for ends in self.ranges[key]):
                raise ConfigError(f"{key!r} has {len(names)} names, and a range of {len(self.ranges[key][0])} numbers")

    @classmethod
    def of_dataset(cls, folder: str | Path) -> "NameMap":
        """The names with which a LeRobot dataset was recorded, and its ranges; of `folder`/meta two files are read.

        Raises:
            DatasetError: there is no such dataset, or its numbers have no names.
        """
        features = _read(Path(folder) / _INFO).get("features", {})
        vectors: dict[str, tuple[str, ...]] = {}
        cameras: dict[str, str] = {}
        for key, feature in features.items():
            if feature.get("dtype") in _VISUAL:
                cameras[key] = key.removeprefix(_CAMERAS)
            elif key == "action" or (key.startswith("observation.") and feature.get("names")):
                vectors[key] = _flat(feature.get("names"), key, Path(folder))
        if "action" not in vectors:
            raise DatasetError(f"{Path(folder) / _INFO} has no feature 'action'; it has {', '.join(features)}")
        path = Path(folder) / _STATISTICS
        told = _read(path) if path.is_file() else {}
        ranges = {
            key: (tuple(map(float, told[key]["min"])), tuple(map(float, told[key]["max"])))
            for key in vectors
            if {"min", "max"} <= set(told.get(key, {}))
        }
        action = vectors.pop("action")
        return cls(vectors, cameras, action, ranges)

    def check(self, spec: PolicySpec) -> None:
        """Raises where these are not the names of what a policy sees and commands.

        Raises:
            ConfigError: no names, or more or fewer names than numbers.
        """
        for key, array in spec.observation.items():
            if key in self.cameras:
                continue
            if key not in self.vectors:
                raise ConfigError(
                    f"the policy's {key!r} has no names; there are some of {_listed([*self.vectors, *self.cameras])}: "
                    "give all in a NameMap"
                )
            if array.shape != (len(self.vectors[key]),):
                raise ConfigError(
                    f"{key!r} is {array.shape} in the policy, and has {len(self.vectors[key])} names: "
                    f"{', '.join(self.vectors[key])}; take those of the dataset that it was trained on"
                )
        if len(self.action) != spec.action_dim:
            raise ConfigError(
                f"the policy has {spec.action_dim} actions, and they have {len(self.action)} names: "
                f"{', '.join(self.action)}; take those of the dataset that it was trained on"
            )

    def observation(self, values: Mapping[str, Any], spec: Mapping[str, ArraySpec]) -> dict[str, Any]:
        """The policy's arrays: (Do,) float32 and (H, W, C) uint8, which nobody else has.

        Args:
            values: numbers and pictures by their names on the robot, in any order.
            spec: of the policy's observations.

        Raises:
            ShapeError: something is missing, or is neither a number nor a picture. NaN is let through: the loop tells.
        """
        arrays: dict[str, Any] = {}
        for key in spec:
            if key in self.cameras:
                picture = np.array(_found(values, self.cameras[key], f"{key!r}"))
                if picture.dtype != np.uint8:
                    raise ShapeError(f"the camera {self.cameras[key]!r} must give uint8 pictures, got {picture.dtype}")
                arrays[key] = picture
            else:
                names = self.vectors[key]
                arrays[key] = np.array([_number(values, name, f"{key!r}") for name in names], np.float32)
        return arrays

    def pose(self, values: Mapping[str, Any], rest: Rest | None) -> Command:
        """(Da,) the command that leaves the robot where it is: what is measured under the name of each action.

        Args:
            values: numbers by their names on the robot.
            rest: None = all commands name places.

        Raises:
            ShapeError: an action that names a place is not measured.
        """
        still = rest or (None,) * len(self.action)
        pairs = zip(self.action, still, strict=True)
        return np.array([_number(values, name, "its pose") if at is None else at for name, at in pairs], np.float64)

    def resting(self, last: Command | None, rest: Rest | None) -> Command | None:
        """(Da,) what is safe to send where nobody knows the pose: rest where commands name no place, else the last one.

        Args:
            last: (Da,) the last command; None = there was none.
            rest: None = all commands name places.

        Returns:
            None where all commands name places, or some do and there was none before.
        """
        still = rest or (None,) * len(self.action)
        if all(at is None for at in still) or (last is None and None in still):
            return None
        before = still if last is None else last
        return np.array([was if at is None else at for was, at in zip(before, still, strict=True)], np.float64)

    def named(self, command: Command) -> dict[str, float]:
        """A command (Da,) by names."""
        return dict(zip(self.action, map(float, command), strict=True))

    def limits(self, speed: float, acceleration: float, margin: float = 0.05) -> Limits:
        """Limits from the data, for actions that name places: what was commanded or measured there, and a margin.

        Args:
            speed: most, in parts of each action's range per second.
            acceleration: most, in parts of it per second squared.
            margin: in parts of it, on both sides.

        Raises:
            DatasetError: the range is not known.
        """
        ends = {name: list(end) for name, *end in self._named_ranges("action", self.action)}
        if not ends:
            raise DatasetError("the range of the actions is not known: the dataset has no meta/stats.json with it")
        for key, names in self.vectors.items():
            for name, low, high in self._named_ranges(key, names):
                if name in ends:
                    ends[name] = [min(low, ends[name][0]), max(high, ends[name][1])]
        low, high = np.array([ends[name] for name in self.action]).T
        span = high - low
        bounds = (low - margin * span, high + margin * span, speed * span, acceleration * span)
        least, greatest, velocity, change = (tuple(map(float, bound)) for bound in bounds)
        return Limits(least, greatest, velocity, change, (None,) * len(span))

    def _named_ranges(self, key: str, names: Sequence[str]) -> list[tuple[str, float, float]]:
        return list(zip(names, *self.ranges[key], strict=True)) if key in self.ranges else []

    def check_start(self, observation: Observation, spec: Mapping[str, ArraySpec]) -> None:
        """Raises where the first observation is not such as the policy knows.

        Raises:
            ShapeError: an array of another size.
            ConfigError: a number far outside of the data's range.
        """
        for key, array in spec.items():
            if np.shape(observation[key]) != array.shape:
                raise ShapeError(
                    f"{self.cameras.get(key, key)!r} gives {np.shape(observation[key])}, and the policy's {key!r} is "
                    f"{array.shape}; set it up as it was when the data were recorded"
                )
            if key in self.ranges and key in self.vectors:
                self._check_range(key, np.asarray(observation[key], np.float64))

    def _check_range(self, key: str, values: Command) -> None:
        """Numbers that are farther out than the whole range is wide are of another unit, or another calibration."""
        low, high = np.array(self.ranges[key])
        span = high - low
        wrong = np.flatnonzero((span > 0) & ((values < low - span) | (values > high + span)))
        if len(wrong):
            i = int(wrong[0])
            raise ConfigError(
                f"{self.vectors[key][i]!r} is {values[i]:g}, far from the {low[i]:g} to {high[i]:g} that the policy "
                "learned from: the robot tells other units (degrees, radians, -100 to 100), or is calibrated otherwise"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot read {path}, which tells the names of a LeRobot dataset: {error}") from error
    if not isinstance(document, dict):
        raise DatasetError(f"{path} must hold an object, got {type(document).__name__}")
    return document


def _flat(names: Any, key: str, folder: Path) -> tuple[str, ...]:
    """Names as a list, or under one heading as in older datasets: {"motors": [...]}."""
    if isinstance(names, dict) and len(names) == 1:
        names = next(iter(names.values()))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DatasetError(
            f"{folder / _INFO} does not name the numbers of {key!r}; give the names in their order: "
            "NameMap({'observation.state': ('shoulder.pos', ...)}, ...)"
        )
    return tuple(names)


def _found(values: Mapping[str, Any], name: str, purpose: str) -> Any:
    if values.get(name) is None:
        near: Sequence[str] = nearest_names(name, values)
        hint = f"did it mean {' or '.join(map(repr, near))}?" if near else f"it tells {_listed(values)}"
        raise ShapeError(f"the robot does not tell {name!r}, which {purpose} needs; {hint}")
    return values[name]


def _number(values: Mapping[str, Any], name: str, purpose: str) -> float:
    value = _found(values, name, purpose)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ShapeError(f"{name!r} must be a number, got {value!r}") from error


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(repr, list(names)[:12])) or "nothing"
