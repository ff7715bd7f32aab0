"""Reports as a browser shows them: no errors, no network, videos that play, plots that are there."""

import numpy as np
import pytest
from browser import look_at

from scd_robot.cli.main import main
from scd_robot.sim_eval import evaluate

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
def test_delays(toy, tiny_run, tmp_path):
    arguments = ["eval", str(tiny_run), "--env", ENVIRONMENT, "--episodes", "4", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--latency-ms", "0", "100", "--num-videos", "0", "--diagnose-history", "0"]) == 0
    assert "100 ms" in check(tmp_path / "out" / "latency.html", videos=0, pictures=1)


@pytest.mark.slow
def test_history(toy, tiny_run, tiny_store, tmp_path):
    arguments = ["eval", str(tiny_run), "--env", ENVIRONMENT, "--episodes", "4", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--num-videos", "0", "--diagnose-history", "4", "--dataset", str(tiny_store)]) == 0
    text = check(tmp_path / "out" / "history.html", videos=0, pictures=3)
    assert "shuffled" in text


@pytest.mark.slow
def test_validation(tiny_store, tmp_path):
    main(["data", "validate", str(tiny_store), "--html", str(tmp_path / "report.html")])
    check(tmp_path / "report.html", videos=0, pictures=0)
