"""Several datasets as one: joined for good, or mixed with weights for training."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.lazy import ConcatenatedArray, LazyArray, RowArray
from scd_robot.datasets.schema import ACTION, EXECUTED_ACTION, PRESENT, EpisodeDataset
from scd_robot.datasets.tasks import TASK_TEXT, task_texts
from scd_robot.errors import ConfigError, ShapeError

__all__ = ["join_datasets", "mix_datasets", "shares_among"]

logger = logging.getLogger(__name__)

_SAME_RATE = 1e-3  # relative difference of control_dt that is taken for the same


def join_datasets(datasets: Sequence[EpisodeDataset], names: Sequence[str] | None = None) -> EpisodeDataset:
    """The episodes of all, in this order.

    Observation keys, other arrays and notes that some do not have are left out, and the log says which; so are other
    arrays of different shapes (states of simulators with different objects). Where some have `executed_action` and
    others not, the others' is their `action`; where an observation is marked as absent in steps of some, it is present
    in all steps of the others. Episodes without a task in words have their source in its place. What the metadata of
    all say alike stays.

    Args:
        datasets: at least one.
        names: of them in messages; None = their sources.

    Raises:
        ShapeError: no observation key is common to all, or a common one or the actions differ in shape.
        ConfigError: they have different rates, or actions of different kinds; or some are mixed with weights, which say
            nothing about others.
    """
    first = datasets[0]
    names = list(names or (data.spec.source for data in datasets))
    if len(datasets) == 1:
        return first
    for name, data in zip(names, datasets, strict=True):
        if data.weights is not None:
            raise ConfigError(
                f"the episodes of {name} have weights, and nothing tells those of the others; give each dataset a "
                "share with mix_datasets"
            )
    keys = [key for key in first.spec.observation if all(key in data.spec.observation for data in datasets)]
    if not keys:
        have = "; ".join(
            f"{name}: {', '.join(data.spec.observation)}" for name, data in zip(names, datasets, strict=True)
        )
        raise ShapeError(f"the datasets have no observation key in common ({have}); rename them first")
    for name, data in zip(names, datasets, strict=True):
        _check_same(first, names[0], data, name, keys)
    datasets = [_completed(data, datasets, keys) for data in datasets]
    common = [key for key in datasets[0].arrays if all(key in data.arrays for data in datasets)]
    common = [key for key in common if key in keys or key not in first.spec.observation]
    common = [key for key in common if _alike([data.arrays[key] for data in datasets])]
    for name, data in zip(names, datasets, strict=True):
        notes = (*data.episode_info, *data.episode_text)
        everywhere = [note for note in notes if all(note in (*d.episode_info, *d.episode_text) for d in datasets)]
        dropped = sorted({*data.arrays, *notes} - {*common, *everywhere})
        if dropped:
            logger.info("%s: left out, because not all datasets have it alike: %s", name, ", ".join(dropped))
    return EpisodeDataset(
        spec=replace(
            first.spec,
            observation={key: first.spec.observation[key] for key in keys},
            source=" + ".join(names),
            action_kind=first.spec.action_kind if len({data.spec.action_kind for data in datasets}) == 1 else "",
        ),
        episode_ends=np.cumsum(np.concatenate([data.episode_lengths for data in datasets])),
        arrays={key: _join([data.arrays[key] for data in datasets]) for key in common},
        metadata={
            **{
                name: value
                for name, value in first.metadata.items()
                if all(data.metadata.get(name) == value for data in datasets)
            },
            "joined": [{"source": data.spec.source, **data.metadata} for data in datasets],
        },
        episode_info={
            name: np.concatenate([data.episode_info[name] for data in datasets])
            for name in first.episode_info
            if all(name in data.episode_info for data in datasets)
        },
        episode_text={
            name: [text for data in datasets for text in data.episode_text[name]]
            for name in datasets[0].episode_text
            if all(name in data.episode_text for data in datasets)
        },
        parts=np.repeat(np.arange(len(datasets)), [data.num_episodes for data in datasets]),
    )


def mix_datasets(
    datasets: Sequence[EpisodeDataset], weights: Sequence[float], names: Sequence[str] | None = None
) -> EpisodeDataset:
    """All episodes, drawn in training so that `weights` are the shares of control steps that each dataset supplies.

    Weights that a dataset has itself stand: they share out what it supplies among its episodes.

    Args:
        datasets: at least one.
        weights: one positive number per dataset, in any unit.
        names: of the datasets in messages; None = their sources.

    Raises:
        ConfigError: other weights than that, or different rates.
        ShapeError: see `join_datasets`.
    """
    share = np.asarray(weights, np.float64)
    if share.shape != (len(datasets),) or not (np.isfinite(share) & (share > 0)).all():
        raise ConfigError(f"{len(datasets)} datasets need as many positive weights, got {list(weights)}")
    joined = join_datasets([replace(data, weights=None) for data in datasets], names)
    parts = [np.ones(data.num_episodes) if data.weights is None else data.weights for data in datasets]
    steps = [float(part @ data.episode_lengths) for part, data in zip(parts, datasets, strict=True)]
    share /= share.sum()
    factors = share / np.array(steps)
    return replace(
        joined,
        weights=np.concatenate([f * part for f, part in zip(factors, parts, strict=True)]),
        metadata={**joined.metadata, "shares": share.tolist()},
    )


def shares_among(data: EpisodeDataset, episodes: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """(E,) weights with which `episodes` alone supply each dataset's share, as all of them would by their own."""
    if data.weights is None or data.parts is None:
        return data.weights
    supply = data.weights * data.episode_lengths
    chosen = np.zeros(data.num_episodes, bool)
    chosen[episodes] = True
    total, left = np.bincount(data.parts, supply), np.bincount(data.parts, supply * chosen)
    return np.asarray(data.weights * np.divide(total, left, out=np.zeros_like(total), where=left > 0)[data.parts])


def _check_same(first: EpisodeDataset, first_name: str, data: EpisodeDataset, name: str, keys: Sequence[str]) -> None:
    for key in keys:
        here, there = data.spec.observation[key], first.spec.observation[key]
        if here != there:
            raise ShapeError(
                f"{key!r} is {here.dtype} {here.shape} in {name}, {there.dtype} {there.shape} in {first_name}; datasets"
                " that are used together must agree: convert one of them, or leave the key out with --keys"
            )
    if data.spec.action_dim != first.spec.action_dim:
        raise ShapeError(
            f"actions have width {data.spec.action_dim} in {name}, {first.spec.action_dim} in {first_name}; datasets "
            "that are used together must be of one robot"
        )
    kinds = first.spec.action_kind, data.spec.action_kind
    if all(kinds) and kinds[0] != kinds[1]:
        raise ConfigError(
            f"actions are {kinds[1]} in {name}, {kinds[0]} in {first_name}; datasets that are used together must mean "
            "the same by an action: choose other labels with --action"
        )
    if abs(data.spec.control_dt / first.spec.control_dt - 1) > _SAME_RATE:
        raise ConfigError(
            f"{name} has control_dt {data.spec.control_dt:g} s, {first_name} {first.spec.control_dt:g} s; datasets "
            "that are used together must have one rate"
        )


def _completed(data: EpisodeDataset, datasets: Sequence[EpisodeDataset], keys: Sequence[str]) -> EpisodeDataset:
    """With what goes without saying in a dataset and is said in others."""
    said = {key for other in datasets for key in other.arrays}
    arrays = dict(data.arrays)
    if EXECUTED_ACTION in said:
        arrays.setdefault(EXECUTED_ACTION, arrays[ACTION])
    for key in keys:
        if PRESENT + key in said:
            there = arrays.get(PRESENT + key, np.ones(data.num_steps, bool))
            arrays[PRESENT + key] = np.asarray(there[:]) != 0
    return replace(data, arrays=arrays, episode_text={**data.episode_text, TASK_TEXT: task_texts(data)})


def _alike(parts: Sequence[RowArray]) -> bool:
    """Whether they can be joined; numbers in memory also if their dtypes differ."""
    shapes, dtypes = {part.shape[1:] for part in parts}, {part.dtype for part in parts}
    return len(shapes) == 1 and (len(dtypes) == 1 or not any(isinstance(part, LazyArray) for part in parts))


def _join(parts: Sequence[RowArray]) -> RowArray:
    if any(isinstance(part, LazyArray) for part in parts):
        return ConcatenatedArray(parts)
    arrays: list[Any] = list(parts)
    return np.concatenate(arrays)
