"""`scd surprise`: scores over recorded episodes, their calibration, and what is refused."""

import json

import numpy as np
import pytest

from scd_robot.cli.main import main
from scd_robot.datasets import open_dataset
from scd_robot.policies import Surprise, load_imagination
from scd_robot.policies.surprise import load_calibration


@pytest.fixture
def arguments(tiny_frames_run, tiny_frames_store, tmp_path):
    return ["surprise", str(tiny_frames_run), "--dataset", str(tiny_frames_store), "--out", str(tmp_path / "out")]


def test_scores_of_an_episode_are_those_that_a_robot_would_be_told(
    arguments, tiny_frames_run, tiny_frames_store, tmp_path, capsys, refused
):
    assert main([*arguments, "--episode", "4", "5"]) == 0
    assert "episode 4: alarms in 23 frames: " in capsys.readouterr().out
    assert (tmp_path / "out" / "surprise.png").stat().st_size > 1000
    document = json.loads((tmp_path / "out" / "surprise.json").read_text())
    assert document["calibration"]["episodes"] == [2, 2], "those that are not looked at"
    entry = document["episodes"][1]
    calibration = load_calibration(tmp_path / "out" / "surprise.json")
    assert entry["alarms"]["moving"] == [
        step
        for step, score in enumerate(entry["scores"]["moving"])
        if score is not None and score > calibration.thresholds["moving"]
    ]
    watch = Surprise(load_imagination(tiny_frames_run, num_denoising_steps=1, guidance_scale=1.0), calibration)
    watch.reset(episodes=[5])
    data = open_dataset(tiny_frames_store).episode(5)
    for step in range(24):
        scores = watch.observe(data["eye"][None, step], data["action"][None, step - 1] if step else None)
        if step:
            assert scores["moving"][0] == pytest.approx(entry["scores"]["moving"][step], abs=1e-6)
    assert np.ptp(entry["scores"]["everywhere"][1:]) > 0

    again = [*arguments, "--calibration", str(tmp_path / "out" / "surprise.json"), "--overwrite"]
    refused([*again, "--quantile", "0.5"], "was calibrated for --quantile 0.99", at_once=False)
    refused([*again, "--num-denoising-steps", "2"], "the model is run with", at_once=False)
    assert main([*again, "--episode", "5", "--json", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["episodes"] == [entry]


def test_what_cannot_be_scored_is_refused(arguments, tiny_run, refused):
    refused([*arguments, "--episode", *range(5)], "at least 2 episodes", at_once=False)
    refused([*arguments, "--episode", 6], "there is no episode 6")  # before minutes of calibration
    refused([*arguments, "--quantile", 1], "--quantile must be between 0 and 1, got 1")
    refused([*arguments, "--episode", 1, 1], "--episode names 1 twice")
    refused([*arguments, "--device", "abacus"], "cannot use device 'abacus'")
    refused([arguments[0], tiny_run, *arguments[2:]], "imagines no frames")


def test_episodes_that_are_looked_at_never_tell_what_is_usual(arguments, tiny_frames_store, tmp_path):
    assert main([*arguments, "--episode", "4", "5", "--calibration", str(tiny_frames_store)]) == 0
    document = json.loads((tmp_path / "out" / "surprise.json").read_text())
    assert document["calibration"]["episodes"] == [2, 2]
