"""A dataset as the model sees it."""

from dataclasses import replace
from functools import partial

import numpy as np

from scd_robot.datasets import ACTION, EXECUTED_ACTION, PRESENT, EpisodeDataset
from scd_robot.datasets.lazy import LazyArray, MappedArray, RowArray
from scd_robot.transforms import TransformConfig, Transforms

__all__ = ["transformed"]


def transformed(data: EpisodeDataset, config: TransformConfig) -> EpisodeDataset:
    """The episodes after all transforms of single control steps; those of chunks are left to the batches.

    Vectors are transformed once and for all, images when they are read.

    Raises:
        UnknownNameError, ShapeError, ConfigError: the transforms do not fit the dataset.
    """
    transforms = Transforms(config, data.spec)
    arrays: dict[str, RowArray] = {}
    for key, source in transforms.sources.items():
        array, convert = data.arrays[source], partial(transforms.convert, key)
        if isinstance(array, LazyArray):
            arrays[key] = MappedArray(array, convert, transforms.spec.observation[key].shape, array.dtype)
        else:
            arrays[key] = convert(array)
        if PRESENT + source in data.arrays:
            arrays[PRESENT + key] = data.arrays[PRESENT + source]
    for key in (ACTION, EXECUTED_ACTION):
        if key in data.arrays:
            arrays[key] = transforms.action(np.asarray(data.arrays[key][:]))
    return replace(data, spec=transforms.spec, arrays=arrays)
