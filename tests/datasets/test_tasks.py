"""Tasks and goals as rows that are alike throughout an episode."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny import LENGTHS, tiny_data

from scd_robot.datasets.combine import join_datasets
from scd_robot.datasets.lazy import ConcatenatedArray, LazyArray
from scd_robot.datasets.tasks import goal_rows, one_hot_tasks, read_task_vectors, task_rows, task_texts
from scd_robot.errors import DatasetError, UnknownNameError


def test_each_step_has_the_vector_of_its_episodes_task() -> None:
    texts = ["push", "pull", "push", "lift", "pull", "push"]
    data = replace(tiny_data(), episode_text={"task": texts})
    vectors = one_hot_tasks(data)
    assert list(vectors) == ["lift", "pull", "push"]
    rows = task_rows(data, vectors)
    assert rows.shape == (sum(LENGTHS), 3)
    for episode, text in enumerate(texts):
        np.testing.assert_array_equal(rows[data.rows(episode)], np.tile(vectors[text], (LENGTHS[episode], 1)))
    with pytest.raises(UnknownNameError, match="lift"):
        task_rows(data, {"push": (1.0,), "pull": (2.0,)})


def test_recordings_without_words_are_told_apart_by_their_source() -> None:
    first = tiny_data()
    second = replace(first, spec=replace(first.spec, source="other"), episode_text={"task": ["carry"] * 6})
    joined = join_datasets([first, second])
    assert task_texts(joined) == ["tiny"] * 6 + ["carry"] * 6
    with pytest.raises(DatasetError, match=r"tiny notes no tasks: .* attribute .task. of each"):
        one_hot_tasks(first)


def test_the_goal_is_the_last_row_of_the_episode_also_of_arrays_on_disk() -> None:
    data = tiny_data()
    on_disk = replace(data, arrays={**data.arrays, "position": ConcatenatedArray([data.arrays["position"]])})
    for source in (data, on_disk):
        rows = goal_rows(source, "position")
        assert isinstance(rows, LazyArray) == (source is on_disk)
        for episode in range(data.num_episodes):
            part = data.rows(episode)
            np.testing.assert_array_equal(
                rows[part], np.tile(data.arrays["position"][part.stop - 1], (LENGTHS[episode], 1))
            )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1, 2]", "got list"),
        ("{}", "got dict"),
        ('{"push": 3}', "'push' has 3"),
        ('{"push": [1, true]}', "'push' has"),
        ('{"push": [1, NaN]}', "'push' has"),
        ('{"push": [1, 2], "pull": [1]}', "'pull': 1"),
        ("{", "cannot read"),
    ],
)
def test_vectors_of_another_form_are_refused(tmp_path, content: str, reason: str) -> None:
    (tmp_path / "tasks.json").write_text(content)
    with pytest.raises(DatasetError, match=reason):
        read_task_vectors(tmp_path / "tasks.json")
    (tmp_path / "tasks.json").write_text(json.dumps({"push": [1, 0.5], "pull": [0, 2]}))
    assert read_task_vectors(tmp_path / "tasks.json") == {"push": (1.0, 0.5), "pull": (0.0, 2.0)}


def test_one_task_in_words_is_nothing_to_tell_apart() -> None:
    with pytest.raises(DatasetError, match="are of one task, 'carry'"):
        one_hot_tasks(replace(tiny_data(), episode_text={"task": ["carry"] * 6}))


def test_the_goal_is_the_last_that_was_seen_where_the_last_step_saw_nothing() -> None:
    data = tiny_data()
    there = np.arange(data.num_steps) % 2 == 0
    marked = replace(data, arrays={**data.arrays, "present.position": there})
    rows = goal_rows(marked, "position")
    for episode in range(data.num_episodes):
        part = data.rows(episode)
        last = np.flatnonzero(there[part])[-1] + part.start
        np.testing.assert_array_equal(rows[part], np.tile(data.arrays["position"][last], (LENGTHS[episode], 1)))
    there[data.rows(2)] = False
    with pytest.raises(DatasetError, match="absent in all of episode 2; leave that out with --drop"):
        goal_rows(marked, "position")
