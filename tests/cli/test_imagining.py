"""`scd eval --imagine`: a choice among chunks by imagined frames, kept in result.json, and what is refused."""

import json

import numpy as np
import pytest

from scd_robot.cli.main import main
from scd_robot.datasets import ZarrWriter, open_dataset


@pytest.fixture
def arguments(tiny_run, tiny_frames_run, point):
    world = ["--env", "toy_environment:make_seeing", "--episodes", "2", "--max-steps", "4", "--num-videos", "0"]
    return ["eval", str(tiny_run), *world, "--imagine", str(tiny_frames_run)]


def executed(arguments, tmp_path, *options):
    out = tmp_path / "-".join(options).replace("/", "").replace(":", "")
    assert main([*arguments, *options, "--out", str(out)]) == 0
    from safetensors.numpy import load_file

    return load_file(out / "actions.safetensors"), json.loads((out / "result.json").read_text())


def test_the_score_decides_what_is_executed_and_is_kept_in_the_result(arguments, tmp_path, tiny_frames_run):
    score = ["--score", "toy_environment:most_to_the_right"]
    alone, _ = executed(arguments, tmp_path, "--candidates", "1", *score)
    many, document = executed(arguments, tmp_path, "--candidates", "6", "--imagined-frames", "2", *score)
    first = [[actions["0"][0, 1], actions["1"][0, 1]] for actions in (alone, many)]
    assert (np.array(first[1]) >= first[0]).all()
    assert first[1] != first[0]
    told = document["provenance"]["policy"]
    assert told["type"] == "scd"
    imagined = told["imagination"]
    assert (imagined["candidates"], imagined["frames"], imagined["camera"]) == (6, 2, "eye")
    assert imagined["checkpoint"].startswith(str(tiny_frames_run))
    assert (imagined["score"]["name"], imagined["score"]["file"]) == (score[1], "toy_environment.py")


def test_a_score_may_be_a_class_with_options(arguments, tmp_path, tiny_frames_store):
    data = open_dataset(tiny_frames_store)
    with ZarrWriter(tmp_path / "placed.zarr", data.spec) as writer:
        for index in range(data.num_episodes):
            episode = data.episode(index)
            places = np.stack([np.argwhere(frame[..., 0] > 100).mean(axis=0) for frame in episode["eye"]])
            writer.append({**episode, "position.square": (places / 100).astype(np.float32)})
    near = ["--score", "scd_robot.analysis.position_score:NearTo", "--candidates", "2"]
    options = [f"dataset={tmp_path}/placed.zarr", "thing=square", "goal=[0.1,0.1]", "updates=2"]
    arguments = [*arguments, *near, "--score-options"]
    assert main([*arguments, *options, "--out", str(tmp_path / "out")]) == 0
    score = json.loads((tmp_path / "out" / "result.json").read_text())["provenance"]["policy"]["imagination"]["score"]
    assert score["options"]["goal"] == [0.1, 0.1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "--imagine needs a --score (package.module:callable) or a --goal-picture, and not both"),
        (["--score", "toy_environment:most", "--goal-picture", "a:0"], "and not both"),
        (["--goal-picture", "somewhere:x"], "--goal-picture takes DATASET:EPISODE"),
        (["--score", "toy_environment:most_to_the_left"], "'most_to_the_right'"),
        (["--score", "toy_environment:most_to_the_right", "--score-options", "speed=2"], "'speed'"),
        (["--score", "toy_environment:most_to_the_right", "--diagnose-history", "2"], "leave out --imagine"),
    ],
)
def test_what_cannot_choose_is_refused(arguments, refused, options, told):
    refused([*arguments, *options], told)


def test_models_of_another_kind_are_refused(arguments, tiny_run, refused):
    score = ["--score", "toy_environment:most_to_the_right"]
    refused([*arguments[:-1], tiny_run, *score], "imagines no frames")
    refused([*arguments[:-2], *score], "--score is for a choice by imagined frames; name a model with --imagine")
    refused(["eval", "toy_policy:GoToGoal", *arguments[2:], *score], "--imagine is for checkpoints")
