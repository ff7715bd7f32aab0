"""A dataset as the model sees it, in memory where it fits."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets import ACTION, EXECUTED_ACTION, PRESENT, EpisodeDataset
from scd_robot.datasets.lazy import LazyArray, MappedArray, RowArray
from scd_robot.datasets.tasks import goal_rows, task_rows
from scd_robot.transforms import GOAL, TASK, TransformConfig, Transforms

__all__ = ["transformed", "with_pictures_in_memory"]

logger = logging.getLogger(__name__)


def transformed(data: EpisodeDataset, config: TransformConfig) -> EpisodeDataset:
    """The episodes after all transforms of single control steps; those of chunks are left to the batches.

    Vectors are transformed once and for all, images when they are read.

    Raises:
        UnknownNameError, ShapeError, ConfigError: the transforms do not fit the dataset.
    """
    transforms = Transforms(config, data.spec)
    arrays: dict[str, RowArray] = {}
    if config.tasks:
        arrays[TASK] = task_rows(data, config.tasks)
    goals = (source for source in transforms.sources.values() if source not in data.arrays)
    with_goals = dict(data.arrays) | {source: goal_rows(data, source.removeprefix(GOAL)) for source in goals}
    for key, source in transforms.sources.items():
        array, convert = with_goals[source], partial(transforms.convert, key)
        if isinstance(array, LazyArray):
            spec = transforms.spec.observation[key]
            arrays[key] = MappedArray(array, convert, spec.shape, np.dtype(spec.dtype))
        else:
            arrays[key] = convert(_filled(array, data.arrays.get(PRESENT + source), transforms, source))
        if PRESENT + source in data.arrays:
            arrays[PRESENT + key] = data.arrays[PRESENT + source]
    for key in (ACTION, EXECUTED_ACTION):
        if key in data.arrays:
            arrays[key] = transforms.action(np.asarray(data.arrays[key][:]))
    return replace(data, spec=transforms.spec, arrays=arrays)


def _filled(array: RowArray, present: RowArray | None, transforms: Transforms, source: str) -> NDArray[Any]:
    """Rows (N, ...) of which those that are absent hold what can be converted: they are masked, and never seen."""
    rows = np.asarray(array)
    if present is None or (there := np.asarray(present[:], bool)).all():
        return rows
    return np.where(there.reshape(-1, *[1] * (rows.ndim - 1)), rows, transforms.stand_in()[source])


def with_pictures_in_memory(data: EpisodeDataset, keys: Iterable[str], most_gb: float) -> EpisodeDataset:
    """The dataset with the pictures of `keys` read once and for all, if together they take at most `most_gb` GB."""
    on_disk = [key for key in keys if isinstance(data.arrays[key], LazyArray)]
    size = sum(data.arrays[key].nbytes for key in on_disk) / 1e9
    if not on_disk or size > most_gb:
        if on_disk:
            logger.info(
                "pictures of %.1f GB are read from disk in every batch (training.images_in_memory_gb is %g); more "
                "training.num_workers read ahead",
                size,
                most_gb,
            )
        return data
    return data.load(on_disk)
