"""Opens HDF5 files: robomimic's hold observations, robosuite's states, ALOHA's a single episode each."""

import logging

import h5py

from scd_robot.datasets.formats import ReadOptions, kept_episodes
from scd_robot.datasets.hdf5.aloha import is_aloha, read_aloha
from scd_robot.datasets.hdf5.demos import Demos
from scd_robot.datasets.hdf5.files import hdf5_file
from scd_robot.datasets.hdf5.robomimic import read_robomimic
from scd_robot.datasets.hdf5.robosuite import read_robosuite
from scd_robot.datasets.schema import EpisodeDataset
from scd_robot.errors import DatasetError

__all__ = ["open_hdf5"]

logger = logging.getLogger(__name__)


def open_hdf5(path: str, options: ReadOptions) -> EpisodeDataset:
    """Opens a file as `read_robomimic`, `read_robosuite` (raw states) or `read_aloha` (one episode) describe it.

    Raises:
        DatasetError: none of them, damaged, or being written by another program.
        UnknownNameError: a key or action array that was asked for is not there.
        MissingDependencyError: arrays are compressed by a plugin that is not installed.
    """
    with hdf5_file(path) as file:
        if is_aloha(file):
            return read_aloha(path, [path], kept_episodes(options, 1, path), options)
        demos = Demos.of(path, file).chosen(options)
        if any(isinstance(demos.item(demo, "obs"), h5py.Group) for demo in demos.groups):
            dataset = read_robomimic(demos, options)
        elif any(isinstance(demos.item(demo, "states"), h5py.Dataset) for demo in demos.groups):
            if any(isinstance(demos.item(demo, "next_obs"), h5py.Group) for demo in demos.groups):
                logger.warning(
                    "%s has 'next_obs', what was seen after each action, but no 'obs', what was seen before it: no "
                    "observations are read, the simulator's states stand for them; store 'obs' as well",
                    path,
                )
            dataset = read_robosuite(demos, options)
        else:
            first = next(iter(demos.groups))
            raise DatasetError(
                f"the demonstrations of {path} hold neither observations ('obs') nor simulator states ('states'); "
                f"{first!r} holds: {', '.join(sorted(demos.groups[first])) or 'nothing'}; store what was seen before "
                "each action as 'obs' ('next_obs', what was seen after it, is not read)"
            )
    return dataset
