"""Reads replay buffers of diffusion_policy: Zarr format 2 or 3, as a folder, a .zip archive or at an address.

data/KEY            (N, ...) all episodes one after the other, `action` among them
meta/episode_ends   (E,) cumulative
"""

import logging
import math

import numpy as np

from scd_robot.datasets.formats import ReadOptions, choose, measured_control_dt
from scd_robot.datasets.images import as_stored
from scd_robot.datasets.lazy import RowArray
from scd_robot.datasets.schema import ACTION, DONE, REWARD, TIMESTAMP, EpisodeDataset
from scd_robot.datasets.zarr.files import ZarrFiles, read_ends
from scd_robot.errors import DatasetError, UnknownNameError
from scd_robot.types import ArraySpec, DatasetSpec

__all__ = ["open_replay_buffer"]

logger = logging.getLogger(__name__)

ASSUMED_CONTROL_DT = 0.1  # [s]; nothing in the format tells it but time stamps, which few have

_EXTRAS = {"reward": REWARD, "rewards": REWARD, "done": DONE, "dones": DONE, "timestamp": TIMESTAMP}


def open_replay_buffer(path: str, options: ReadOptions) -> EpisodeDataset:
    """Opens a store whose every array in data/ is an observation, but for the action and what its name tells.

    `options.action` may join several arrays by "+". Poses that are labels (UMI's) are observations as well where
    `options.keys` names them.

    Raises:
        DatasetError: arrays missing, of different lengths or damaged, or images in a codec that is not installed.
        UnknownNameError: an array that was asked for is not there.
    """
    files = ZarrFiles.at(path, options)
    names = files.names("data")
    label = options.action or next((name for name in (ACTION, "actions") if name in names), ACTION)
    parts = label.split("+")
    for part in parts:
        if part in names:
            continue
        if options.action:
            raise UnknownNameError(f"action array of {files.address}", part, names)
        raise DatasetError(
            f"{files.address} has no array data/{label}; it is not a recording, a damaged one, or has the labels under "
            f"another name: say with --action which (NAME, or several: NAME+NAME). It holds: {', '.join(names)}"
        )
    ends = read_ends(files, unfinished=False)
    count = int(ends[-1]) if len(ends) else 0
    extras = {_EXTRAS[name]: name for name in names if name in _EXTRAS}
    available = [name for name in names if name not in _EXTRAS and (len(parts) > 1 or name != label)]
    for key in options.keys or ():
        if key not in available:
            raise UnknownNameError(f"key of the dataset {files.address}", key, available)
    if options.keys is not None:
        wanted = list(options.keys)
    else:  # but for what holds no numbers, (N, 0)
        wanted = [name for name in available if name not in parts and 0 not in files.array(f"data/{name}").shape[1:]]
    if not wanted:
        raise DatasetError(f"{files.address} has no observations: data/ holds no array but {label}")

    def stored(name: str) -> RowArray:
        return as_stored(files.rows(f"data/{name}", count, exact=True), f"data/{name} of {files.address}")

    arrays = {key: stored(key) for key in wanted}
    widths = [math.prod(files.array(f"data/{part}").shape[1:]) for part in parts]
    labels = [np.asarray(stored(part)[:]).reshape(count, width) for part, width in zip(parts, widths, strict=True)]
    arrays[ACTION] = np.concatenate(labels, axis=1)
    arrays |= {key: np.asarray(files.rows(f"data/{name}", count, exact=True)[:]) for key, name in extras.items()}
    control_dt, note = options.control_dt, ""
    if control_dt is None and TIMESTAMP in arrays and arrays[TIMESTAMP].shape in ((count,), (count, 1)):
        control_dt = measured_control_dt(np.asarray(arrays[TIMESTAMP], np.float64).reshape(-1), ends)
        note = f", control_dt {control_dt} s measured in its timestamp"
    if control_dt is None:
        logger.warning(
            "%s does not tell its rate: %g s per control step assumed (--control-dt)", files.address, ASSUMED_CONTROL_DT
        )
        control_dt, note = ASSUMED_CONTROL_DT, f", control_dt {ASSUMED_CONTROL_DT} s assumed"
    spec = DatasetSpec(
        {key: ArraySpec(arrays[key].shape[1:], str(arrays[key].dtype)) for key in wanted},
        action_dim=arrays[ACTION].shape[1],
        control_dt=control_dt,
        source=f"{files.name} (replay buffer of diffusion_policy{note})",
    )
    return choose(EpisodeDataset(spec, ends, arrays, {"format": "diffusion_policy"}), options)
