"""A policy of several tasks is told which, once or in every row; one that is shown a goal gets it once or always."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_data, tiny_experiment

from scd_robot.errors import ConfigError, ShapeError, UnknownNameError
from scd_robot.policies import load_policy
from scd_robot.policies.instructions import Instructions
from scd_robot.training import train
from scd_robot.types import ArraySpec

TASKS = {"left": (1.0, 0.0), "right": (0.0, 1.0)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Two updates of a policy with tasks, and of one with a goal."""
    folder = tmp_path_factory.mktemp("runs")
    data = replace(tiny_data(), episode_text={"task": ["left", "right"] * 3})
    shapes = {"position": (2,)}
    experiments = {
        "tasks": tiny_experiment(2).with_tasks(TASKS),
        "goal": tiny_experiment(2, model={"observation_shapes": shapes}).with_goals(["position"]),
    }
    for name, experiment in experiments.items():
        train(data, experiment, folder / name, accelerator="cpu", progress=False)
    return {name: folder / name for name in experiments}


def seen(rows: int = 2) -> dict[str, np.ndarray]:
    return {key: np.full((rows, 2), 0.3, np.float32) for key in ("position", "goal")}


def test_the_task_changes_what_is_planned_and_is_no_part_of_the_observation(runs) -> None:
    plans = {}
    for task in TASKS:
        policy = load_policy(runs["tasks"], task=task)
        assert policy.spec.tasks == ("left", "right")
        assert set(policy.spec.observation) == {"position", "goal"}
        policy.observe(seen())
        plans[task] = policy.context.numpy()
    assert not np.allclose(plans["left"], plans["right"])


def test_rows_of_different_tasks_do_as_they_do_alone(runs) -> None:
    policy = load_policy(runs["tasks"])
    policy.observe({**seen(), "task": np.stack([policy.task_vector(task) for task in TASKS])})
    together = policy.context.numpy()
    for row, task in enumerate(TASKS):
        alone = load_policy(runs["tasks"], task=task)
        alone.observe(seen(1))
        np.testing.assert_allclose(together[row], alone.context.numpy()[0], atol=1e-5)


def test_a_policy_that_was_not_told_its_task_says_which_there_are(runs) -> None:
    with pytest.raises(ConfigError, match="'left', 'right'"):
        load_policy(runs["tasks"]).observe(seen())
    with pytest.raises(UnknownNameError, match="did you mean 'right'"):
        load_policy(runs["tasks"], task="rihgt")
    with pytest.raises(ShapeError, match="'task'"):
        load_policy(runs["tasks"]).observe({**seen(), "task": np.zeros((2, 3))})


def test_a_goal_given_once_is_a_goal_given_in_every_step(runs) -> None:
    goal = np.array([0.5, -0.2], np.float32)
    always, once = load_policy(runs["goal"]), load_policy(runs["goal"], goal={"position": goal})
    assert set(always.spec.observation) == {"position", "goal.position"}
    assert set(once.spec.observation) == {"position"}
    always.observe({**seen(), "goal.position": np.stack([goal, goal])})
    once.observe(seen())
    np.testing.assert_array_equal(always.context.numpy(), once.context.numpy())
    other = load_policy(runs["goal"], goal={"position": -goal})
    other.observe(seen())
    assert not np.allclose(other.context.numpy(), once.context.numpy())
    with pytest.raises(ShapeError, match="missing"):
        always.observe(seen())
    with pytest.raises(UnknownNameError, match="goal 'place'"):
        load_policy(runs["goal"], goal={"place": goal})
    with pytest.raises(ShapeError, match=r"\(2,\)"):
        load_policy(runs["goal"], goal={"position": goal[:1]})


def test_a_goal_has_the_rows_of_the_observation_whatever_else_comes_first() -> None:
    shapes = {"goal.position": ArraySpec((2,)), "position": ArraySpec((2,))}
    instructions = Instructions(TASKS, None, {"position": np.zeros(2, np.float32)}, list(shapes), shapes)
    task = np.array([1.0, 0.0, 0.0], np.float32)  # of one task for all rows
    for rows in (1, 2):
        seen = instructions.with_goal({"task": task, "note": np.zeros(5), "position": np.zeros((rows, 2), np.float32)})
        assert seen["goal.position"].shape == (rows, 2)
