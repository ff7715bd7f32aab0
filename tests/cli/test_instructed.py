"""`--task` and `--goal` of `scd sweep` and `scd compare`: what they mean, and what is refused, is as in `scd eval`."""

import json

import pytest

from scd_robot.cli.main import main
from scd_robot.cli.policy_source import place_of_goal
from scd_robot.sim_eval.output import read_actions

POINT = "toy_environment:make_point"


@pytest.fixture
def instructed(tiny_instructed_run):
    return str(tiny_instructed_run)


@pytest.fixture
def options(point, tiny_store):
    return ["--env", point, "--episodes", "2", "--goal", f"{tiny_store}:1"]


@pytest.mark.parametrize(("task", "known_as"), [([], POINT), (["--task", "pull"], "pull")])
def test_a_sweep_does_what_an_evaluation_does(instructed, options, tiny_store, tmp_path, task, known_as):
    assert main(["eval", instructed, *options, *task, "--num-videos", "0", "--out", str(tmp_path / "eval")]) == 0
    assert main(["sweep", instructed, *options, *task, "--out", str(tmp_path / "sweep")]) == 0
    [swept] = (tmp_path / "sweep").glob("*/*/result.json")
    one, other = read_actions(tmp_path / "eval"), read_actions(swept.parent)
    assert {key: value.tolist() for key, value in one.items()} == {key: value.tolist() for key, value in other.items()}
    made = json.loads(swept.read_text())["provenance"]["policy"]
    assert (made["task"], made["goal"]) == (known_as, f"{tiny_store}:1")


def test_a_sweep_of_another_task_or_goal_is_another(instructed, options, tiny_store, tmp_path, refused):
    sweep = ["sweep", instructed, *options, "--out", str(tmp_path / "out")]
    assert main(sweep) == 0
    [file] = (tmp_path / "out").glob("**/result.json")
    written = file.stat().st_mtime_ns
    assert main(sweep) == 0
    assert main([*sweep, "--task", POINT]) == 0, "by name it is the same"
    assert file.stat().st_mtime_ns == written
    refused([*sweep, "--task", "pull"], f"holds another evaluation (with the task '{POINT}')")
    refused([*sweep[:-3], f"{tiny_store}:2", *sweep[-2:]], f"holds another evaluation (with the goal '{tiny_store}:1')")


def test_a_goal_is_the_same_however_its_path_is_typed(instructed, options, tiny_store, tmp_path, monkeypatch, capsys):
    sweep = ["sweep", instructed, *options[:-2], "--out", str(tmp_path / "out"), "--goal"]
    monkeypatch.chdir(tiny_store.parent)
    assert main([*sweep, f"{tiny_store.name}:1"]) == 0
    [file] = (tmp_path / "out").glob("**/result.json")
    document = json.loads(file.read_text())
    assert document["provenance"]["policy"]["goal"] == f"{tiny_store}:1"
    written = file.stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    assert main([*sweep, f"{tiny_store.parent}/../{tiny_store.parent.name}/{tiny_store.name}:1"]) == 0
    assert file.stat().st_mtime_ns == written
    monkeypatch.chdir(tiny_store.parent)
    document["provenance"]["policy"]["goal"] = f"{tiny_store.name}:1"  # as it was written once
    file.write_text(json.dumps(document))
    written = file.stat().st_mtime_ns
    assert main([*sweep, f"{tiny_store}:1"]) == 0
    assert file.stat().st_mtime_ns == written
    address = "s3://bucket/push.zarr:3"
    assert (place_of_goal(address), place_of_goal(None)) == (address, None)


def test_a_sweep_goes_on_beside_environments_whose_task_nobody_told(instructed, options, tmp_path, capsys):
    options[2:2] = ["toy_environment:make_taking_poses"]
    assert main(["sweep", instructed, *options, "--out", str(tmp_path / "out")]) == 2
    table = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert len(table["evaluations"]) == 1
    assert "this policy does several tasks; say which with --task" in table["failed"][0]["error"]


@pytest.mark.parametrize("verb", ["sweep", "compare"])
def test_what_an_evaluation_refuses_they_refuse_at_once(
    verb, instructed, tiny_run, options, tiny_store, tmp_path, refused, monkeypatch
):
    monkeypatch.setattr("scd_robot.sim_eval.jobs.run_jobs", lambda *_, **__: pytest.fail("episodes were run"))
    monkeypatch.setattr("scd_robot.sim_eval.evaluate", lambda *_, **__: pytest.fail("episodes were run"))
    both = [verb, instructed, *([instructed] if verb == "compare" else []), "--out", str(tmp_path / "out"), *options]
    refused([*both, "--task", "pul"], "unknown task of this policy 'pul'; did you mean 'pull'")
    refused([*both[:-1], f"{tiny_store}:99"], "has 6 episodes, from 0 on; got 99")
    plain = [verb, str(tiny_run), *([instructed] if verb == "compare" else []), "--out", str(tmp_path / "out")]
    refused([*plain, *options], "--goal is for policies that were trained with --goals")
    refused([*plain, *options[:-2], "--task", "pull"], "--task is for policies that were trained with --tasks")
    named = [verb, "toy_policy:GoToGoal", *([instructed] if verb == "compare" else []), "--out", str(tmp_path / "out")]
    refused([*named, *options[:-2], "--task", "pull"], "--task is for checkpoints; give toy_policy:GoToGoal options")


def test_both_arms_of_a_comparison_are_told(instructed, options, tmp_path, refused):
    out = tmp_path / "out"
    told = ["--out", str(out), "--num-videos", "0", "--task", "pull"]
    assert main(["compare", instructed, instructed, *options, *told]) == 0
    made = [json.loads((out / arm / "result.json").read_text())["provenance"]["policy"] for arm in "ab"]
    assert [one["task"] for one in made] == ["pull", "pull"]
    assert made[0]["goal"] == options[-1]
    arms = ["compare", out / "a", out / "b"]
    refused([*arms, "--task", "pull"], "--task and --goal are for what is evaluated now")
