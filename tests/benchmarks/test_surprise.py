"""The benchmark of surprise: its statistics, what it plays, and its table."""

import argparse
import json

import numpy as np
import pytest
from benchmark_jobs import load
from frame_models import moving_square
from known_frames import known_frames

from scd_robot.errors import ConfigError, SimulatorError
from scd_robot.policies.surprise import KINDS, SurpriseCalibration, prediction_settings
from scd_robot.types import EnvironmentSpec, StepResult

benchmark = load("surprise")
OPTIONS = argparse.Namespace(episodes=6, steps=12, within=2, noise=0.0, move_cm=[0.0, 400.0])


class Square:
    """The moving square as an environment; a metre is a pixel, and the expert goes to and fro."""

    def __init__(self):
        self.spec = EnvironmentSpec("square", dict(moving_square(1).spec.observation), 2, (), (), 0.1, 99, "")
        self.resets = 0

    def reset(self, seed):
        self._at, self._step = np.array([4 + seed % 3, 4]), 0
        self.resets += 1
        return self._observe()

    def step(self, action):
        self._at, self._step = self._at + np.rint(action).astype(int), self._step + 1
        return StepResult(self._observe(), 0.0, False, False, False, np.asarray(action, np.float32))

    def expert_action(self):
        return np.array([0.0, 1.0 if self._step % 4 < 2 else -1.0], np.float32)

    def move_object(self, offset):
        self._at = np.clip(self._at + np.rint(offset[:2]).astype(int), 0, 12)
        return self._observe()

    def _observe(self):
        eye = np.full((16, 16, 1), 30, np.uint8)
        eye[self._at[0] : self._at[0] + 4, self._at[1] : self._at[1] + 4] = 220
        return {"eye": eye}


def usual(imagination):
    grid = {kind: np.zeros((4, 4)) for kind in KINDS}
    settings = prediction_settings(imagination)
    return SurpriseCalibration(grid, dict.fromkeys(KINDS, 1.0), 0.99, (1, 1), (1, 1), settings=settings)


def test_a_moved_square_is_told_from_one_left_alone_and_the_tables_say_so():
    """The model knows what actions do, so everything else is a surprise; a move by nothing is none."""
    imagination = known_frames()
    arms = {"model": imagination, "last frame repeated": benchmark.LastFrame.instead_of(imagination)}
    everything = benchmark.watch(Square(), {arm: (model, usual(model)) for arm, model in arms.items()}, OPTIONS)
    still = benchmark.summary(everything["last frame repeated"], usual(imagination), OPTIONS.within)
    assert still["400"]["everywhere"]["false_alarms_calibrated"]["rate"] == 1.0, "the robot itself is surprising"
    found = everything["model"]
    assert np.abs(found["alone"]["moving"]).max() == 0
    told = benchmark.summary(found, usual(imagination), OPTIONS.within)
    assert told["0"]["everywhere"]["auroc"] == 0.5
    assert told["0"]["everywhere"]["detected"]["count"] == 0
    for kind in KINDS:
        entry = told["400"][kind]
        assert (entry["auroc"], entry["detected"]["rate"], entry["detected_calibrated"]["count"]) == (1.0, 1.0, 6)
        assert entry["false_alarms"] == {
            "count": 0,
            "of": 72,
            "rate": 0.0,
            "interval": [0.0, pytest.approx(0.0507, abs=1e-3)],
        }
    made = {"code": "abc", "torch": "2", "date": "today", "command": "python"}
    document = {"environment": "square", "episodes": 6, "steps": 12, "within": 2, "provenance": made}
    document["summary"] = {"model": told, "last frame repeated": still}
    text = benchmark.report(json.loads(json.dumps(document)))
    assert "| 400 cm | model | moving | 1.000 [1.000, 1.000] | 6/6, 100.0 % [61.0, 100.0] |" in text
    assert "| 0 cm | model | everywhere | 0.500 [0.500, 0.500] | 0/6, 0.0 % [0.0, 39.0] |" in text


def test_scores_from_the_move_on_are_taken_and_no_others():
    imagination, options = known_frames(), argparse.Namespace(**{**vars(OPTIONS), "episodes": 3, "within": 1})
    found = benchmark.watch(Square(), {"model": (imagination, usual(imagination))}, options)["model"]
    for step, [score] in zip(found["steps"], found["moved"]["400"]["everywhere"], strict=True):
        assert benchmark.EARLIEST <= step < OPTIONS.steps
        assert score > 3, "the first frame that shows the move"


def test_twins_that_differ_before_the_move_are_an_error():
    class Forgetful(Square):
        def reset(self, seed):
            return super().reset(self.resets)

    imagination = known_frames()
    with pytest.raises(SimulatorError, match="episode 0 differs before the move"):
        benchmark.watch(Forgetful(), {"model": (imagination, usual(imagination))}, OPTIONS)


def test_moves_are_horizontal_and_as_far_as_asked():
    for number in range(20):
        step, offset = benchmark.moves(number, 30, 3, 5.0)
        assert benchmark.EARLIEST <= step <= 27
        assert offset[2] == 0
        assert np.linalg.norm(offset) == pytest.approx(0.05)
    with pytest.raises(ConfigError, match="--steps must be at least 8, got 7"):
        benchmark.moves(0, 7, 3, 5.0)


def test_auroc_counts_pairs_of_different_episodes_and_ties_half():
    """Of 1, 3, 2 against 0, 1, 9: 1 loses one and ties one; 3 and 2 win one and lose one of two others."""
    positive, negative = np.array([1.0, 3.0, 2.0]), np.array([0.0, 1.0, 9.0])
    assert benchmark.auroc(positive, negative) == pytest.approx((0.5 + 1 + 2) / 6)
    weighted = benchmark.auroc(positive, negative, np.array([2, 1, 0]))  # 1 twice against 1, 3 twice against 0
    assert weighted == pytest.approx((2 * 0.5 + 2 * 1) / 4)
    shuffled = np.random.default_rng(0).permutation(20.0 + np.arange(20)) - 20
    low, high = benchmark.auroc_interval(np.arange(20.0) + 4, shuffled)
    assert low < benchmark.auroc(np.arange(20.0) + 4, shuffled) < high


def test_environments_and_options_that_do_not_fit_are_refused(tiny_frames_run, tiny_frames_store, tmp_path, capsys):
    common = ["--out", str(tmp_path)]
    assert benchmark.main(common) == 2
    assert "--checkpoint (of a model of frames) and --dataset" in capsys.readouterr().err
    assert benchmark.main([*common, "--checkpoint", "a", "--dataset", "b", "--episodes", "1"]) == 2
    assert "--episodes must be at least 2, got 1" in capsys.readouterr().err
    given = [*common, "--checkpoint", str(tiny_frames_run), "--dataset", str(tiny_frames_store)]
    assert benchmark.main([*given, "--env", "scd_memory/cue-reach"]) == 2
    assert "nothing can be moved by hand in scd_memory/cue-reach" in capsys.readouterr().err
    assert benchmark.main([*common, "--report"]) == 0
    assert "Nothing is done yet." in capsys.readouterr().out
