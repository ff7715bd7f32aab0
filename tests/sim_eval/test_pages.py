"""Reports as a browser shows them: no errors, no network, videos that play, plots that are there."""

import functools
import json

import numpy as np
import pytest
from browser import look_at

from scd_robot.cli.main import main
from scd_robot.seeding import EVALUATION, derive_seed
from scd_robot.sim_eval import evaluate
from scd_robot.sim_eval.faults import ObservationFaults

ENVIRONMENT = "toy_environment:make_point"


class Chaser:
    """Goes straight to the goal of the toy environment, at part of its speed."""

    def __init__(self, speed):
        self._speed = speed

    def reset(self, rows=None):
        pass

    def act(self, observation):
        way = observation["goal"] - observation["position"]
        return np.clip(way / 0.2, -1, 1).astype(np.float32) * self._speed


def check(path, videos, pictures):
    """The page is whole; returns its text."""
    page = look_at(path)
    path.with_suffix(".png").write_bytes(page.screenshot)
    assert page.complaints == []
    assert page.requests == []
    assert page.seen["videos"] == [True] * videos
    assert page.seen["pictures"].count(True) == pictures
    assert page.seen["unreadable"] == 0
    assert page.seen["cut"] == []
    assert page.seen["overflow"] <= 0
    return page.seen["text"]


@pytest.mark.parametrize(("required", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_missing_browser_is_a_failure_where_one_is_required(monkeypatch, tmp_path, required, outcome):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SCD_REQUIRE_BROWSER", required)
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception), match="no Chromium") as caught:
        look_at(tmp_path / "report.html")
    assert caught.type is outcome


@pytest.mark.slow
def test_evaluation_and_comparison(toy, tmp_path):
    arms = []
    for name, speed in (("far", 1.0), ("near", 0.2)):
        evaluate(Chaser(speed), ENVIRONMENT, 6, out=tmp_path / name, num_videos=2, progress=False)
        arms.append(str(tmp_path / name))
    text = check(tmp_path / "near" / "report.html", videos=3, pictures=4)
    assert "The point is within 0.15 of the goal." in text
    assert main(["compare", *arms, "--env", ENVIRONMENT, "--num-videos", "2", "--out", str(tmp_path / "out")]) == 0
    text = check(tmp_path / "out" / "comparison.html", videos=4, pictures=2)
    assert "Where only one succeeds" in text


@pytest.mark.slow
def test_invalid_episodes_and_injected_faults(toy, tmp_path):
    crashes = {derive_seed(EVALUATION, episode): "raise" for episode in (1, 3)}
    environment = functools.partial(toy.PointEnvironment, faults=crashes)
    troubles = ObservationFaults(latency_ms=100, jitter_ms=50, drop=0.3, freeze=0.01)
    options = {"num_envs": 2, "num_videos": 2, "faults": troubles, "progress": False}
    result = evaluate(Chaser(0.4), environment, 6, out=tmp_path / "out", **options)
    assert (result.invalid, 0 < result.successes < 4) == (2, True)
    text = check(tmp_path / "out" / "report.html", videos=len(result.videos), pictures=4)
    assert "2 episodes invalid: the simulator crashed twice or did not start again." in text
    assert "Disturbed on purpose: observations 100 + 0 to 50 ms late, 30 % lost, frozen for 20 steps" in text
    assert text.count("contact solver diverged") == 2
    assert f"{result.successes} of 4 episodes" in text


@pytest.mark.slow
def test_comparison_over_several_seeds(toy, tmp_path):
    """Each seed is a policy of its own, since evaluations that do not tell their weights count as trainings."""
    for arm, speeds in (("fast", (1.0, 0.6, 0.5)), ("slow", (0.3, 0.25, 0.2))):
        for seed, speed in enumerate(speeds):
            out = tmp_path / f"{arm}_seed{seed}"
            evaluate(Chaser(speed), ENVIRONMENT, 6, out=out, num_videos=0, progress=False)
    arms = [str(tmp_path / "fast_seed*"), str(tmp_path / "slow_seed*")]
    options = ["--env", ENVIRONMENT, "--num-videos", "1", "--out", str(tmp_path / "out")]
    assert main(["compare", *arms, *options]) == 0
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert len(document["a"]["seeds"]) == len(document["b"]["seeds"]) == 3
    text = check(tmp_path / "out" / "comparison.html", videos=2, pictures=2)
    assert all(note in text for note in document["notes"])
    assert document["verdict"] in text


@pytest.mark.slow
def test_delays(toy, tiny_run, tmp_path):
    arguments = ["eval", str(tiny_run), "--env", ENVIRONMENT, "--episodes", "4", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--latency-ms", "0", "100", "--num-videos", "0", "--diagnose-history", "0"]) == 0
    assert "100 ms" in check(tmp_path / "out" / "latency.html", videos=0, pictures=1)


@pytest.mark.slow
def test_history(toy, tiny_run, tiny_store, tmp_path):
    arguments = ["eval", str(tiny_run), "--env", ENVIRONMENT, "--episodes", "4", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--num-videos", "0", "--diagnose-history", "4", "--dataset", str(tiny_store)]) == 0
    told = json.loads((tmp_path / "out" / "result.json").read_text())
    text = check(tmp_path / "out" / "report.html", videos=0, pictures=4)
    assert f"plan, batch {told['plan_batch_size']:.3g} (median" in text
    text = check(tmp_path / "out" / "history.html", videos=0, pictures=3)
    assert "shuffled" in text


@pytest.mark.slow
def test_validation(tiny_store, tmp_path):
    main(["data", "validate", str(tiny_store), "--html", str(tmp_path / "report.html")])
    check(tmp_path / "report.html", videos=0, pictures=0)
