"""`scd eval`: what is refused before the first episode, and what is kept when something fails after the last."""

import json

import numpy as np
import pytest

from scd_robot.analysis import history
from scd_robot.cli.main import main
from scd_robot.datasets import ZarrWriter
from scd_robot.errors import ConfigError
from scd_robot.types import ArraySpec, DatasetSpec


@pytest.fixture
def arguments(tiny_run, point):
    return ["eval", str(tiny_run), "--env", point, "--episodes", "2", "--max-steps", "4", "--num-videos", "0"]


@pytest.fixture
def no_episode(monkeypatch):
    """Fails the test if anything is evaluated."""
    monkeypatch.setattr("scd_robot.sim_eval.jobs.run_jobs", lambda *_, **__: pytest.fail("episodes were run"))


@pytest.mark.parametrize("earlier", [["0", "50"], ["0"]])
def test_a_curve_never_mixes_with_what_is_in_its_folder(arguments, tmp_path, refused, earlier):
    out = ["--out", str(tmp_path / "out")]
    assert main([*arguments, *out, "--latency-ms", *earlier]) == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    later = [*arguments, *out, "--latency-ms", "100", "200"]
    refused(later, "out is not empty", "allow overwriting (--overwrite)", unchanged=[tmp_path])
    assert main([*later, "--overwrite"]) == 0
    curve = json.loads((tmp_path / "out" / "latency.json").read_text())["curve"]
    assert [point["latency_ms"] for point in curve] == [100, 200]
    left = {path.name for path in (tmp_path / "out").iterdir()} - {"videos"}
    assert left == {"latency.json", "latency.html", "latency_100ms", "latency_200ms", "notes.txt"}


def test_a_folder_that_holds_something_is_refused_before_the_checkpoint_is_read(point, tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for delays in (["0"], ["0", "50"]):
        options = ["--env", point, "--out", tmp_path / "out", "--latency-ms", *delays]
        refused(["eval", tmp_path / "nowhere", *options], "out is not empty", unchanged=[tmp_path])


@pytest.mark.parametrize("episodes", ["1", "-2"])
def test_a_diagnosis_of_too_few_episodes_is_refused_at_once(arguments, no_episode, tmp_path, refused, episodes):
    options = ["--diagnose-history", episodes, "--out", tmp_path / "out"]
    refused([*arguments, *options], "--diagnose-history needs at least 2 episodes", f"got {episodes}")
    assert not (tmp_path / "out").exists()


def test_demonstrations_that_cannot_be_read_are_refused_at_once(arguments, no_episode, tmp_path, refused):
    options = ["--diagnose-history", "2", "--out", tmp_path / "out", "--dataset", tmp_path / "missing.zarr"]
    refused([*arguments, *options], "missing.zarr")
    assert not (tmp_path / "out").exists()


def test_demonstrations_of_another_robot_are_refused_at_once(arguments, no_episode, tmp_path, refused):
    spec = DatasetSpec({"position": ArraySpec((2,))}, 3, 0.05)
    with ZarrWriter(tmp_path / "other.zarr", spec) as writer:
        writer.append({"position": np.zeros((5, 2), np.float32), "action": np.zeros((5, 3), np.float32)})
    options = ["--diagnose-history", "2", "--dataset", tmp_path / "other.zarr"]
    refused([*arguments, *options], "other.zarr are 3 wide, those of the policy 2")


def test_demonstrations_without_a_diagnosis_are_refused(arguments, no_episode, tiny_store, refused):
    refused([*arguments, "--dataset", tiny_store], "--dataset is for the diagnosis", "--diagnose-history")


def test_a_diagnosis_that_fails_does_not_take_the_result_with_it(arguments, tmp_path, refused, monkeypatch):
    def fail(*_, **__):
        raise ConfigError("only 1 episodes are longer than one step")

    monkeypatch.setattr(history, "diagnose_history", fail)
    options = ["--diagnose-history", "2", "--json", tmp_path / "result.json"]
    refused([*arguments, *options], "longer than one step", at_once=False)
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["episodes"] == 2
    assert "history" not in document


def test_an_evaluation_without_a_valid_episode_is_kept_and_is_no_success(arguments, tmp_path, monkeypatch, capsys):
    arguments[arguments.index("--env") + 1] = "toy_environment:make_crashing_while_told"
    monkeypatch.setenv("TOY_CRASHES", "1")
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert "no valid episode" in told.out
    assert "no episode was valid; the first ended with: " in told.err
    assert "contact solver diverged" in told.err
    assert json.loads((tmp_path / "out" / "result.json").read_text())["invalid"] == 2


def test_tasks_and_goals_of_recordings_reach_the_evaluation(
    tiny_store, tiny_instructed_run, arguments, point, tmp_path, refused, capsys
):
    arguments[1] = str(tiny_instructed_run)
    goal = ["--goal", f"{tiny_store}:1"]
    assert main([*arguments, *goal, "--out", str(tmp_path / "out")]) == 0  # the task that is called as the environment
    assert main([*arguments, *goal, "--task", "pull"]) == 0
    refused([*arguments, *goal, "--task", "pul"], "unknown task of this policy 'pul'; did you mean 'pull'")
    refused(arguments, "needs the observation 'goal.position'", "give it one (scd eval --goal DATASET:EPISODE)")
    refused([*arguments, "--goal", f"{tiny_store}:99"], "has 6 episodes, from 0 on; got 99")
    arguments[arguments.index("--env") + 1] = "toy_environment:make_taking_poses"
    refused([*arguments, *goal], "several tasks; say which with --task", "'pull'")
    capsys.readouterr()
    assert main(["info", arguments[1]]) == 0
    assert f"tasks        'pull', '{point}'" in capsys.readouterr().out


def test_a_task_or_a_goal_for_a_policy_that_has_none_is_refused(arguments, tiny_store, refused):
    refused([*arguments, "--task", "push"], "trained with --tasks")
    refused([*arguments, "--goal", f"{tiny_store}:0"], "trained with --goals")
