"""What recordings of robomimic and of robosuite have in common: demonstrations data/demo_N of one HDF5 file."""

import itertools
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.float32 import as_float32
from scd_robot.datasets.formats import ReadOptions, kept_episodes
from scd_robot.datasets.hdf5.files import (
    Hdf5Rows,
    arrays_below,
    check_length,
    child,
    read_texts,
    scalar_attributes,
    shared_notes,
    where,
)
from scd_robot.datasets.schema import DONE, EXECUTED_ACTION, MASK, POSITION, PRESENT, REWARD, SIM_STATE, TIMESTAMP
from scd_robot.errors import DatasetError, UnknownNameError

__all__ = ["Demos", "told_control_dt"]

logger = logging.getLogger(__name__)

ASSUMED_CONTROL_DT = 0.05  # [s]; robosuite's default
ACTIONS = "actions"  # the usual label
ACTION_DICT = "action_dict"
ATTRIBUTE = "scd_robot"  # of `data` in files of ours: JSON with what is made up, and the metadata
# Arrays of a demonstration that are no observations and no labels, by their names in the file.
EXTRAS = {
    "states": SIM_STATE, "rewards": REWARD, "dones": DONE, EXECUTED_ACTION: EXECUTED_ACTION, TIMESTAMP: TIMESTAMP,
}  # fmt: skip

_DTYPES = {SIM_STATE: np.float64, REWARD: np.float32, EXECUTED_ACTION: np.float32, TIMESTAMP: np.float64}
_DEMO = re.compile(r"demo_(\d+)")
_NAME, _MODEL = "name", "model_xml"  # of texts
_MOST_NAMED = 8  # in a message


@dataclass(frozen=True)
class Demos:
    """The demonstrations of an open file, in the order of their numbers.

    Attributes:
        path: of the file.
        data: the group that holds them.
        groups: E of them, by name.
        noted: the texts and numbers noted at each, by name.
        numbers: (E,) where each stands among all demonstrations of the file, as `ReadOptions.drop` counts them.
        whole: these are all demonstrations of the file.
    """

    path: str
    data: h5py.Group
    groups: dict[str, h5py.Group]
    noted: dict[str, dict[str, str | int | float]]
    numbers: NDArray[np.int64]
    whole: bool = True

    @classmethod
    def of(cls, path: str, file: h5py.File) -> "Demos":
        """Finds them; what `data` holds besides is left out, and told.

        Raises:
            DatasetError: there are none.
        """
        data = child(file, "data")
        if not isinstance(data, h5py.Group):
            raise DatasetError(
                f"{path} has no group 'data' (robomimic, robosuite) and no group 'observations' (ALOHA). It holds: "
                f"{_some(file)}; copy recordings of another layout with scd_robot.datasets.ZarrWriter (docs/data.md)"
            )
        names = [name for name in data if _DEMO.fullmatch(name)]
        if not names:
            raise DatasetError(
                f"{path} holds no demonstration: its group 'data' has no group 'demo_N', but: {_some(data)}; rename "
                "them so"
            )
        if len(names) < len(data):
            logger.warning("%s: %d entries of 'data' are no demonstrations and left out", path, len(data) - len(names))
        groups = {name: child(data, name) for name in sorted(names, key=lambda name: (int(name[5:]), name))}
        for name, group in groups.items():
            if not isinstance(group, h5py.Group):
                raise DatasetError(f"'data/{name}' of {path} is an array; expected a group with 'actions'")
        noted = {name: scalar_attributes(group) for name, group in groups.items()}
        return cls(path, data, groups, noted, np.arange(len(groups)))

    def chosen(self, options: ReadOptions) -> "Demos":
        """Those that the options keep; what is wrong with others does not matter then.

        Raises:
            UnknownNameError: no such list in `mask`.
            ConfigError: no such episodes.
            DatasetError: none is left.
        """
        names = list(self.groups)
        keep = np.zeros(len(names), bool)
        keep[kept_episodes(options, len(names), self.path)] = True
        if options.mask is not None:
            masks = {name.removeprefix(MASK): values for name, values in self._masks().items()}
            if options.mask not in masks:
                raise UnknownNameError(f"mask of {self.path}", options.mask, masks)
            keep &= masks[options.mask] != 0
            if not keep.any():
                raise DatasetError(f"no demonstration of {self.path} is left in the list {options.mask!r}")
        kept = [name for name, wanted in zip(names, keep, strict=True) if wanted]
        return replace(
            self,
            groups={name: self.groups[name] for name in kept},
            noted={name: self.noted[name] for name in kept},
            numbers=self.numbers[keep],
            whole=self.whole and bool(keep.all()),
        )

    def named(self, demo: str) -> str:
        """A demonstration in messages: its name, which may have gaps before it, and the number that `drop` takes."""
        return f"{demo!r} (episode {self.numbers[list(self.groups).index(demo)]})"

    def item(self, demo: str, name: str) -> Any:
        """The dataset or group of a demonstration at a name of one or several parts ("obs/image"), or None."""
        place: Any = self.groups[demo]
        for part in name.split("/"):
            place = child(place, part) if isinstance(place, h5py.Group) else None
        return place

    def rows(self, name: str, lengths: NDArray[np.int64] | None = None) -> Hdf5Rows:
        """The datasets of this name of all demonstrations.

        Args:
            name: as in `item`.
            lengths: (E,) rows that each must have; None = any.

        Raises:
            DatasetError: missing somewhere, of other lengths, or not to be read.
        """
        return self.joined(name, {demo: self.item(demo, name) for demo in self.groups}, lengths)

    def joined(self, name: str, items: Mapping[str, Any], lengths: NDArray[np.int64] | None) -> Hdf5Rows:
        """As `rows`, where the datasets have been opened: `items` by demonstration."""
        for demo in self.groups:
            if not isinstance(items.get(demo), h5py.Dataset):
                raise DatasetError(
                    f"{name!r} of demonstration {self.named(demo)} of {self.path} is missing or a group, but others "
                    "have it; leave that demonstration out"
                )
        rows = Hdf5Rows(self.path, [items[demo] for demo in self.groups])
        wanted = rows.lengths if lengths is None else lengths
        for demo, length, expected in zip(self.groups, rows.lengths, wanted, strict=True):
            told = f"{name!r} of demonstration {self.named(demo)} of {self.path}"
            check_length(told, length, expected, "the demonstration is damaged, leave it out")
        return rows

    def labels(self) -> list[str]:
        """Names of the first demonstration's arrays that can be labels: its own ones, and action_dict/KEY."""
        first = next(iter(self.groups.values()))
        own = [
            name
            for name in first
            if name not in EXTRAS
            and not name.startswith((PRESENT, POSITION))
            and isinstance(child(first, name), h5py.Dataset)
        ]
        grouped = child(first, ACTION_DICT)
        if not isinstance(grouped, h5py.Group):
            return own
        return own + [f"{ACTION_DICT}/{key}" for key in arrays_below(grouped)]

    def action(self, name: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The labels (N, Da), and the length of each demonstration (E,).

        Args:
            name: of an array; several ones are joined by "+".

        Raises:
            DatasetError: missing somewhere, of different lengths, or not to be read.
            UnknownNameError: no such array.
        """
        labels, parts = self.labels(), name.split("+")
        for part in parts:
            if part not in labels and name == ACTIONS:
                raise DatasetError(
                    f"{self.path} has no array 'actions' in its first demonstration; name the array of the labels, one "
                    f"of: {', '.join(labels) or 'none is there'}"
                )
            if part not in labels:
                raise UnknownNameError(f"action array of {self.path}", part, labels)
        first = self.rows(parts[0])
        rows = [first, *(self.rows(part, first.lengths) for part in parts[1:])]
        columns = [array[:].reshape(len(array), math.prod(array.shape[1:])) for array in rows]
        narrowed = [as_float32(column, f"{part!r} of {self.path}") for part, column in zip(parts, columns, strict=True)]
        action = np.concatenate(narrowed, axis=1)
        if action.shape[1] == 0:
            raise DatasetError(f"{name!r} of {self.path} holds no numbers: its shape is {first.shape}")
        return action, first.lengths

    def extras(self, lengths: NDArray[np.int64], label: str, needed: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
        """Arrays that are no observations, by the names of `scd_robot.datasets.schema`.

        States that are no vectors (Isaac Lab keeps them in groups) are left out, and executed actions where the label
        is not what they were compared with. So is, and that is told, what only some demonstrations have, and states of
        different widths: of scenes with different objects.

        Args:
            lengths: (E,) steps of the demonstrations.
            label: the array of the actions.
            needed: names that are not left out.

        Raises:
            DatasetError: executed actions or needed arrays are missing somewhere or differ; arrays of other lengths, or
                not to be read.
        """
        found: dict[str, NDArray[Any]] = {}
        made_up = self.own_note("filled", [])
        presence = {name: name for name in next(iter(self.groups.values())) if name.startswith(PRESENT)}
        positions = {name: name for name in next(iter(self.groups.values())) if name.startswith(POSITION)}
        for name, key in (EXTRAS | presence | positions).items():
            if name in made_up:
                continue
            items = {demo: self.item(demo, name) for demo in self.groups}
            datasets = [item for item in items.values() if isinstance(item, h5py.Dataset)]
            if key == SIM_STATE:
                datasets = [item for item in datasets if item.ndim == 2 and item.shape[1] > 0]
            if not datasets or (key == EXECUTED_ACTION and label != ACTIONS):
                continue
            if key not in (EXECUTED_ACTION, *needed) and self._told_apart(name, datasets):
                continue
            values = self.joined(name, items, lengths)[:]
            if key in (REWARD, DONE, TIMESTAMP) or key in presence:
                if values.size != len(values):
                    raise DatasetError(f"{name!r} of {self.path} must be one number per step, got {values.shape[1:]}")
                values = values.reshape(-1)
            if key == DONE or key in presence:
                found[key] = (values != 0).astype(np.uint8)
            else:
                found[key] = values.astype(_DTYPES.get(key, values.dtype), copy=False)
        return found

    def _told_apart(self, name: str, datasets: Sequence[h5py.Dataset]) -> bool:
        """Whether an array is not alike in all demonstrations, which is told; `datasets` are those there are."""
        widths = {dataset.shape[1:] for dataset in datasets}
        if len(datasets) == len(self.groups) and (len(widths) == 1 or name != "states"):
            return False
        why = f"only {len(datasets)} of {len(self.groups)} demonstrations have it"
        if len(datasets) == len(self.groups):
            why = f"its rows have {len(widths)} different shapes"
        logger.warning("%s: %r is left out: %s", self.path, name, why)
        return True

    def notes(self) -> tuple[dict[str, NDArray[Any]], dict[str, Sequence[str]]]:
        """`episode_info` and `episode_text`: what is noted at every demonstration, lists of `mask`, names, models."""
        noted = list(self.noted.values())
        others = ("num_samples", "model_file", _NAME, _MODEL)
        info, text = shared_notes(
            [
                {name: value for name, value in one.items() if name not in others and not name.startswith(MASK)}
                for one in noted
            ]
        )
        text[_NAME] = list(self.groups)
        models = [self._model(str(attributes["model_file"])) for attributes in noted if "model_file" in attributes]
        if len(models) == len(noted) and None not in models:
            text[_MODEL] = [str(model) for model in models]
        return info | self._masks(), text

    def _model(self, text: str) -> str | None:
        """The MuJoCo model: old versions of robosuite note the name of a file in the folder `models` beside."""
        if "<" in text:
            return text
        if Path(text).name != text:
            raise DatasetError(f"{self.path} names the model file {text!r}, which leaves the folder 'models'; refused")
        model = Path(self.path).parent / "models" / text
        if not model.is_file():
            logger.warning(
                "%s: the model file %s is missing; its states cannot be set in a simulator", self.path, model
            )
            return None
        return model.read_text(encoding="utf-8", errors="replace")

    def _masks(self) -> dict[str, NDArray[np.uint8]]:
        """By "mask_NAME" (E,), 1 where a demonstration is in the list."""
        group = child(self.data.file, "mask")
        if not isinstance(group, h5py.Group):
            return {}
        masks = {}
        for name, dataset in arrays_below(group).items():
            listed = read_texts(dataset)
            lost = [demo for demo in listed if child(self.data, demo) is None]
            if lost:
                some = ", ".join(map(repr, lost[:8]))
                logger.warning("%s lists %d demonstrations that are not there: %s", where(dataset), len(lost), some)
            masks[MASK + name.replace("/", ".")] = np.isin(list(self.groups), listed).astype(np.uint8)
        return masks

    def check_counts(self, lengths: NDArray[np.int64]) -> None:
        """Warns where the numbers of steps noted in the file are wrong; they are not used."""
        total = scalar_attributes(self.data).get("total")
        if self.whole and total is not None and total != lengths.sum():
            logger.warning(
                "%s notes %s steps in all, but holds %d; counted ones are used", self.path, total, lengths.sum()
            )
        wrong = [
            f"{demo} ({noted['num_samples']}, holds {length})"
            for (demo, noted), length in zip(self.noted.items(), lengths, strict=True)
            if noted.get("num_samples", length) != length
        ]
        if wrong:
            logger.warning("%s notes wrong numbers of steps for %d: %s", self.path, len(wrong), ", ".join(wrong[:8]))

    def json(self, *names: str) -> dict[str, Any]:
        """Those of these attributes of `data` that are there, as JSON objects; NAME_text, a text, where broken."""
        attributes = scalar_attributes(self.data)
        found: dict[str, Any] = {}
        for name in (name for name in names if name in attributes):
            text = str(attributes[name])
            try:
                parsed = json.loads(text)
            except (ValueError, RecursionError):
                parsed = None
            if isinstance(parsed, dict):
                found[name] = parsed
            else:
                logger.warning("%s: attribute %r is no JSON object, and kept as text", self.path, name)
                found[f"{name}_text"] = text
        return found

    def own_note(self, name: str, default: Any) -> Any:
        """What our writer noted in the file; the default in files of others, and where it is of another type."""
        noted = self.json(ATTRIBUTE).get(ATTRIBUTE, {}).get(name, default)
        return noted if isinstance(noted, type(default)) else default

    def control_dt(
        self, given: float | None, metadata: dict[str, Any], measured: float | None = None, clock: str = "states"
    ) -> tuple[float, str]:
        """Seconds between control steps: as given, as `metadata` tells, as measured, or assumed; and a note which.

        Args:
            given: by the user.
            metadata: with the arguments of the environment.
            measured: by the times in `clock`.
            clock: what tells the times, for messages.
        """
        told = given or told_control_dt(metadata)
        if told is not None:
            if measured is not None and not math.isclose(told, measured, rel_tol=0.02):
                logger.warning("%s: %g s per control step, but %g s pass in its %s", self.path, told, measured, clock)
            return told, ""
        if measured is not None:
            return measured, f", control_dt {measured} s measured in its {clock}"
        logger.warning(
            "%s does not tell its rate: %g s per control step assumed (--control-dt)", self.path, ASSUMED_CONTROL_DT
        )
        return ASSUMED_CONTROL_DT, f", control_dt {ASSUMED_CONTROL_DT} s assumed"


def told_control_dt(arguments: Any) -> float | None:
    """Seconds between control steps, from the arguments of an environment; None where they do not tell.

    Args:
        arguments: with `control_freq` [Hz] (robosuite), or `dt` [s] and `decimation` (Isaac Lab), at any depth.
    """
    level = [arguments]
    while level := [entry for entry in level if isinstance(entry, dict)]:
        for entry in level:
            if _is_sane(entry.get("control_freq")):
                return float(1 / entry["control_freq"])
            if _is_sane(entry.get("dt")) and _is_sane(entry.get("decimation")):
                return float(entry["dt"] * entry["decimation"])
        level = [value for entry in level for value in entry.values()]
    return None


def _some(group: h5py.Group) -> str:
    """Names of what is in a group, for messages."""
    names = list(itertools.islice(group, _MOST_NAMED + 1))
    return ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "") or "nothing"


def _is_sane(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-9 < value < 1e9
