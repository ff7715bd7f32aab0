"""Reads robomimic's HDF5 files (0.2 to 0.5), which Isaac Lab, LIBERO and others write as well.

data                      attributes env_args (JSON), total (steps, often wrong)
data/demo_N               attributes num_samples, model_file, and others
    actions               (T, Da) labels; also actions_abs, action_dict/KEY
    obs/KEY               (T, ...), or groups of them; `next_obs` repeats them and is not read
    states                (T, S) simulator state (a group in Isaac Lab)
    rewards, dones        (T,)
mask/NAME                 names of demonstrations
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from scd_robot.datasets.formats import ReadOptions, measured_control_dt
from scd_robot.datasets.hdf5.action_kind import recorded_action_kind
from scd_robot.datasets.hdf5.demos import ACTIONS, Demos
from scd_robot.datasets.hdf5.files import arrays_below, where
from scd_robot.datasets.images import as_stored
from scd_robot.datasets.lazy import RowArray
from scd_robot.datasets.schema import ACTION, DONE, EXECUTED_ACTION, REWARD, SIM_STATE, TIMESTAMP, EpisodeDataset
from scd_robot.errors import DatasetError, UnknownNameError
from scd_robot.types import ArraySpec, DatasetSpec

__all__ = ["read_robomimic"]

logger = logging.getLogger(__name__)

_RESERVED = (ACTION, EXECUTED_ACTION, SIM_STATE, REWARD, DONE, TIMESTAMP)


def read_robomimic(demos: Demos, options: ReadOptions) -> EpisodeDataset:
    """Episodes in the order of their numbers, whatever gaps these have; steps are counted, not taken from notes.

    Nested groups become keys with dots ("robot.joint_pos"). An observation called as an array of ours is ("action",
    say) becomes "obs.action". Observations without numbers, (T, 0) or texts, are left out. The label is `actions`, or
    what `options.action` names: another array of the demonstrations ("actions_abs"), "action_dict/KEY", or several
    joined by "+". Isaac Lab's `obs/actions` is the previous action, an observation and never the label.

    Raises:
        DatasetError: demonstrations contradict each other or themselves, or are damaged.
        UnknownNameError: a key or action array that was asked for is not there.
    """
    path = demos.path
    keys = _observations(demos, all_alike=options.keys is None)
    for key in options.keys or ():
        if key not in keys:
            raise UnknownNameError(f"key of the dataset {path}", key, keys)
    wanted = list(options.keys) if options.keys is not None else _of_numbers(keys, path)
    if not wanted:
        raise DatasetError(f"{path} has no observations: the groups 'obs' of its demonstrations hold no arrays")
    label = options.action or ACTIONS
    others = [name for name in demos.labels() if "action" in name and name != ACTIONS]
    if others and options.action is None:
        logger.info("%s: the labels are 'actions'; --action takes others there are: %s", path, ", ".join(others))
    action, lengths = demos.action(label)
    demos.check_counts(lengths)
    arrays: dict[str, RowArray] = {
        key: as_stored(demos.joined(f"obs/{key}", keys[key], lengths), f"{key!r} of {path}") for key in wanted
    }
    arrays[ACTION] = action
    arrays |= demos.extras(lengths, label)
    metadata = demos.own_note("metadata", {}) | {"format": "robomimic", "action": label} | demos.json("env_args")
    name = metadata.get("env_args", {}).get("env_name")
    measured = measured_control_dt(arrays[TIMESTAMP][:], np.cumsum(lengths)) if TIMESTAMP in arrays else None
    control_dt, note = demos.control_dt(options.control_dt, metadata, measured, TIMESTAMP)
    spec = DatasetSpec(
        {key: ArraySpec(arrays[key].shape[1:], str(arrays[key].dtype)) for key in wanted},
        action_dim=action.shape[1],
        control_dt=control_dt,
        source=f"{Path(path).name} (robomimic{f', {name}' if name else ''}{note})",
        action_kind=demos.own_note("action_kind", recorded_action_kind(label, metadata)),
    )
    info, text = demos.notes()
    return EpisodeDataset(spec, np.cumsum(lengths), arrays, metadata, info, text, numbers=demos.numbers)


def _of_numbers(keys: Mapping[str, Mapping[str, h5py.Dataset]], path: str) -> list[str]:
    """Keys but those of texts, which are told: an instruction in each step, say."""
    texts = [
        key for key, found in keys.items() if all(h5py.check_string_dtype(array.dtype) for array in found.values())
    ]
    if texts:
        logger.warning("%s: observations that hold texts are left out: %s", path, ", ".join(texts))
    return [key for key in keys if key not in texts]


def _observations(demos: Demos, all_alike: bool) -> dict[str, dict[str, h5py.Dataset]]:
    """Datasets in the group `obs` by key and demonstration.

    Args:
        demos: the demonstrations.
        all_alike: refuse keys that some demonstrations lack.
    """
    found: dict[str, dict[str, h5py.Dataset]] = {}
    for number, demo in enumerate(demos.groups):
        group = demos.item(demo, "obs")
        datasets: dict[str, h5py.Dataset] = {}
        for name, dataset in (arrays_below(group) if isinstance(group, h5py.Group) else {}).items():
            key = name.replace("/", ".")
            key = f"obs.{key}" if key in _RESERVED else key
            if key in datasets:
                raise DatasetError(f"{where(dataset)} and {datasets[key].name!r} are the same key {key!r}; rename one")
            if not dataset.shape or 0 not in dataset.shape[1:]:
                datasets[key] = dataset
        different = datasets.keys() ^ found.keys()
        if number > 0 and different and all_alike:
            raise DatasetError(
                f"observations of the demonstrations of {demos.path} differ: of {demos.named(demo)} and those "
                f"before it not all have {', '.join(sorted(different))}; leave it out with --drop, or choose keys that "
                "all have with --keys"
            )
        for key, dataset in datasets.items():
            found.setdefault(key, {})[demo] = dataset
    return found
