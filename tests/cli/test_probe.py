"""`scd probe`: of policies and of models of frames, and what is refused."""

import json

import pytest
from frame_models import frame_experiment

from scd_robot.cli.main import main
from scd_robot.datasets import open_dataset, split_episodes
from scd_robot.training import train

QUICK = ["--positions", "2", "--num-denoising-steps", "2", "--full-steps", "1"]
AHEAD = ["--context", "4", "--length", "3"]


@pytest.fixture(scope="module")
def frames_run(tiny_frames_store, tmp_path_factory):
    """Two updates of an entangled model of frames of three layers."""
    out = tmp_path_factory.mktemp("entangled") / "frames"
    experiment = frame_experiment(2, "entangled", held_out=0.4)
    train(open_dataset(tiny_frames_store), experiment, out, accelerator="cpu", progress=False)
    return out


@pytest.fixture(scope="module")
def policy_run(tiny_store, tiny_train_options, tmp_path_factory):
    """The same of a policy."""
    out = tmp_path_factory.mktemp("entangled") / "policy"
    entangled = ["model.architecture=entangled", "model.context_corruption=0", "model.num_context_tokens=1"]
    options = ["--dataset", str(tiny_store), "--out", str(out), "--max-steps", "2", *tiny_train_options, *entangled]
    assert main(["train", "metaworld_state", *options]) == 0
    return out


def probed(tmp_path, *arguments):
    out = tmp_path / "probe"
    assert main(["probe", *map(str, arguments), *QUICK, "--out", str(out), "--overwrite"]) == 0
    return json.loads((out / "probe.json").read_text()), (out / "probe.html").read_text()


def test_a_model_of_frames_is_looked_into_and_its_shortcuts_are_paid_in_frames(
    tmp_path, frames_run, tiny_frames_store, capsys
):
    document, page = probed(tmp_path, frames_run, "--dataset", tiny_frames_store, *AHEAD)
    held_out = split_episodes(6, 0.4, 0)[1].tolist()
    assert (document["episode_numbers"], document["held_out"]) == (held_out, True)
    assert (document["denoises"], document["layers"], len(document["similarity"])) == ("frames", 3, 3)
    rows = document["imagined"]["shortcuts"]
    told = [(row["shortcut"] or {}).get("reuse") for row in rows]
    assert told == [None, True, False]
    assert rows[1]["shortcut"] == {"first": 1, "stop": 2, "full_steps": 1, "reuse": True}
    assert (document["imagined"]["context"], document["imagined"]["frames"]) == (4, 3)
    assert "Imagined frames" in page
    assert "held out from the training" in capsys.readouterr().out
    document, _ = probed(tmp_path, frames_run, "--dataset", tiny_frames_store, *AHEAD, "--episode", "0", "1", "2")
    assert document["episode_numbers"] == [0, 1, 2]
    assert document["held_out"] is False


def test_of_another_recording_nobody_knows_what_was_held_out(tmp_path, frames_run, tiny_frames_store):
    document, page = probed(tmp_path, frames_run, "--dataset", tiny_frames_store, *AHEAD, "--drop", "0")
    assert document["held_out"] is None
    assert document["episode_numbers"] == [0, 1, 2, 3, 4]
    assert "held out" not in page


def test_a_policy_is_looked_into_and_its_shortcuts_are_paid_in_success(tmp_path, policy_run, tiny_store, point):
    world = ["--env", point, "--env-episodes", "2"]
    document, page = probed(tmp_path, policy_run, "--dataset", tiny_store, *world)
    assert (document["denoises"], document["held_out"]) == ("actions", True)
    assert document["env"] == point
    assert [(row["shortcut"] or {}).get("reuse") for row in document["closed_loop"]] == [None, True, False]
    assert "In closed loop" in page
    assert "imagined" not in document


def test_in_closed_loop_a_policy_has_as_many_denoising_steps(policy_run, tiny_store, point, monkeypatch):
    from scd_robot.analysis import probe_costs

    used, evaluate = [], probe_costs.evaluate

    def noted(policy, *arguments, **options):
        used.append(policy.config.sampler.num_denoising_steps)
        return evaluate(policy, *arguments, **options)

    monkeypatch.setattr(probe_costs, "evaluate", noted)
    world = ["--env", point, "--env-episodes", "1", "--num-denoising-steps", "3"]
    assert main(["probe", str(policy_run), "--dataset", str(tiny_store), *QUICK, *world]) == 0
    assert used == [3, 3, 3]


def test_a_probe_that_is_cut_off_keeps_what_it_had_counted(tmp_path, policy_run, tiny_store, point, monkeypatch):
    from scd_robot.analysis import probe_costs

    left, evaluate = [1, 1], probe_costs.evaluate

    def interrupted(*arguments, **options):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return evaluate(*arguments, **options)

    monkeypatch.setattr(probe_costs, "evaluate", interrupted)
    world = ["--env", point, "--env-episodes", "1", "--out", str(tmp_path / "out")]
    assert main(["probe", str(policy_run), "--dataset", str(tiny_store), *QUICK, *world]) == 130
    document = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert [(row["shortcut"] or {}).get("reuse") for row in document["closed_loop"]] == [None, True]


def test_what_does_not_go_together_is_refused(
    tmp_path, frames_run, policy_run, tiny_frames_run, tiny_run, tiny_frames_store, tiny_store, refused
):
    frames, policy = (["probe", *x] for x in ([frames_run, "--dataset"], [policy_run, "--dataset"]))
    refused([*frames, tiny_frames_store, "--env", "toy:make"], "--env is for policies", "--context, --length")
    refused([*policy, tiny_store, "--length", 3], "--length is for models of frames", "--env")
    refused(["probe", tiny_frames_run, "--dataset", tiny_frames_store], "this one is separable")
    refused(["probe", tiny_run, "--dataset", tiny_store], "this one is separable")
    refused([*frames, tiny_store], "unknown camera", "eye")
    refused([*policy, tiny_frames_store], "unknown observation key")
    refused([*frames, tiny_frames_store], "none of the 2 held-out episodes has the 32 control steps", "longest has 24")
    refused([*frames, tiny_frames_store, "--full-steps", 0], "full_steps must be at least 1, got 0")
    few = ["--num-denoising-steps", 2, "--full-steps", 2]
    refused([*policy, tiny_store, *few], "after 2 of 2 denoising steps none is left to leave layers out in")
    refused([*frames, tiny_frames_store, *AHEAD, "--episode", 9], "there is no episode 9")
    refused([*frames, tiny_frames_store, "--context", 4, "--length", 21, "--episode", 0], "length must be 1 to 20")
