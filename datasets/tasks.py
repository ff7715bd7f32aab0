"""Which task an episode shows and what it is to lead to, as arrays whose rows are alike throughout an episode.

Shapes: N control steps, E episodes, n numbers of a task's vector.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.lazy import LazyArray, RowArray, SelectedArray
from scd_robot.datasets.schema import PRESENT, EpisodeDataset
from scd_robot.errors import DatasetError, UnknownNameError

__all__ = ["TASK_TEXT", "goal_rows", "one_hot_tasks", "read_task_vectors", "task_rows", "task_texts"]

TASK_TEXT = "task"  # in `episode_text`

TaskVectors = Mapping[str, Sequence[float]]


def task_texts(data: EpisodeDataset) -> list[str]:
    """The task of each episode in words (E); where the recording has none, where it came from."""
    return list(data.episode_text.get(TASK_TEXT) or [data.spec.source] * data.num_episodes)


def one_hot_tasks(data: EpisodeDataset) -> dict[str, tuple[float, ...]]:
    """A vector for each task of a dataset, by its words in alphabetical order: one number each, 1 for the task itself.

    Raises:
        DatasetError: there are fewer than two tasks.
    """
    if not data.episode_text.get(TASK_TEXT) and len(set(task_texts(data))) < 2:
        raise DatasetError(
            f"{data.spec.source} notes no tasks: expected them in the tables of a LeRobot dataset, in HDF5 as the "
            f"attribute {TASK_TEXT!r} of each demonstration ('language_instruction', 'lang' in 'ep_meta'), from "
            f"ZarrWriter.append(text={{{TASK_TEXT!r}: ...}}); note them there, or train without tasks"
        )
    texts = sorted(set(task_texts(data)))
    if len(texts) < 2:
        raise DatasetError(
            f"all episodes of {data.spec.source} are of one task, {texts[0]!r}: there is nothing to tell apart; train "
            "without tasks, or on several datasets"
        )
    return {text: tuple(float(i == j) for j in range(len(texts))) for i, text in enumerate(texts)}


def read_task_vectors(path: Path) -> dict[str, tuple[float, ...]]:
    """Vectors of tasks from a JSON file {"words": [numbers], ...}: embeddings of a language model, say.

    Raises:
        DatasetError: it is not of this form.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot read the tasks' vectors {path}: {error}") from error
    form = 'an object {"task in words": [numbers], ...} with as many finite numbers for each task'
    if not isinstance(table, dict) or not table:
        raise DatasetError(f"{path} must hold {form}, got {type(table).__name__}")
    vectors = {}
    for text, numbers in table.items():
        vector = np.asarray(numbers if isinstance(numbers, list) else [], object)
        if not vector.size or vector.ndim != 1 or not all(type(x) in (int, float) and np.isfinite(x) for x in vector):
            raise DatasetError(f"{path} must hold {form}; {text!r} has {str(numbers)[:60]}")
        vectors[text] = tuple(float(x) for x in vector)
    lengths = {text: len(vector) for text, vector in vectors.items()}
    if len(set(lengths.values())) > 1:
        raise DatasetError(f"{path} must hold {form}; they have {lengths}")
    return vectors


def task_rows(data: EpisodeDataset, vectors: TaskVectors) -> NDArray[np.float32]:
    """(N, n) the vector of the task that each control step belongs to.

    Raises:
        UnknownNameError: an episode is of a task without a vector.
    """
    texts = task_texts(data)
    for text in texts:
        if text not in vectors:
            raise UnknownNameError(f"task of an episode of {data.spec.source}", text, vectors)
    table = np.asarray([vectors[text] for text in texts], np.float32)
    return np.repeat(table, data.episode_lengths, axis=0)


def goal_rows(data: EpisodeDataset, key: str) -> RowArray:
    """(N, ...) what was observed under `key` last in the episode that each control step belongs to.

    Raises:
        DatasetError: it is absent in all of an episode.
    """
    last = data.episode_ends - 1
    if data.has_gaps(key):
        there = np.asarray(data.arrays[PRESENT + key][:]) != 0
        last = np.maximum.accumulate(np.where(there, np.arange(len(there)), -1))[last]
        if (never := np.flatnonzero(last < data.episode_ends - data.episode_lengths)).size:
            raise DatasetError(
                f"{key!r} is a goal, but absent in all of episode {data.number(int(never[0]))}; leave that out with "
                "--drop"
            )
    rows = np.repeat(last, data.episode_lengths)
    array = data.arrays[key]
    return SelectedArray(array, rows) if isinstance(array, LazyArray) else array[rows]
