import dataclasses
import functools
import importlib.util
import logging
import re
from fractions import Fraction
from html.parser import HTMLParser

import av
import numpy as np
import pytest

from scd_robot.errors import MissingDependencyError, OutputError
from scd_robot.sim_eval.faults import ObservationFaults
from scd_robot.sim_eval.report import render_report, write_report
from scd_robot.sim_eval.result import EpisodeRecord, EvaluationResult, VideoRecord
from scd_robot.sim_eval.rollout import evaluate
from scd_robot.sim_eval.video import frame_stride, write_video
from scd_robot.types import ArraySpec, EnvironmentSpec

SPEC = EnvironmentSpec("toy/a&b", {"x": ArraySpec((1,))}, 1, (-1.0,), (1.0,), 0.1, 50, "The <goal> is reached")


def record(index, success=False, invalid=False, steps=20):
    reason = "success" if success else "crash: <bad> asset" if invalid else "time limit"
    return EpisodeRecord(index, 100 + index, "ab" * 32, success, steps, invalid, -1.5, 0.25, reason)


def result_of(episodes, **changes):
    timings = {"act": [1.0, 2.0], "encoder": [0.5, 0.6], "plan": [5.0]}
    result = EvaluationResult(SPEC, "<script>alert(1)</script>", episodes, timings, 2, 50, 0, 3, 1.0, {"python": "3"})
    return dataclasses.replace(result, **changes)


class Structure(HTMLParser):
    """Checks that elements are closed in order, and keeps what could reach beyond the file."""

    VOID = ("meta", "path", "use", "rect", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "poster")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


MIXED = [record(0, success=True), record(1), record(2, invalid=True, steps=3), record(3, success=True, steps=30)]


@pytest.mark.parametrize(
    "episodes", [MIXED, [record(0, success=True)], [record(0)], [record(0, invalid=True, steps=0)]]
)
def test_report_is_well_formed_for_any_mix_of_outcomes(episodes, tmp_path):
    page = Structure(render_report(result_of(episodes), tmp_path))
    assert page.open == []
    assert page.tags.count("svg") == 4


def test_report_states_the_result_and_escapes_what_it_was_given(tmp_path):
    text = render_report(result_of(MIXED, video_error="no <camera> here"), tmp_path)
    assert "66.7 % success" in text
    assert "2 of 3 episodes; 95 % interval 20.8 to 93.9 %" in text
    assert "Success: The &lt;goal&gt; is reached." in text
    assert "1 episode invalid" in text
    assert "no &lt;camera&gt; here" in text
    assert "crash: &lt;bad&gt; asset" in text
    assert "script" not in Structure(text).tags
    assert "&lt;script&gt;alert(1)" in text


def test_report_tells_what_was_done_to_the_observations_and_how_the_robot_moved(tmp_path):
    plain = render_report(result_of(MIXED), tmp_path)
    assert "Disturbed on purpose" not in plain
    assert "jerk" not in plain
    motion = {"path_length": 0.5, "jerk": 123.4, "boundary_jump": 1.25}
    moved = [dataclasses.replace(one, motion=motion, completed=not one.invalid) for one in MIXED]
    text = render_report(result_of(moved, faults=ObservationFaults(latency_ms=200.0, drop=0.5)), tmp_path)
    assert "Disturbed on purpose: observations 200 ms late, 50 % lost." in text
    assert "<b>0.5</b><span>m path of the hand" in text
    assert "<b>123</b><span>m/s³ jerk" in text
    assert "<b>1.25</b>" in text
    assert "<b>2</b><span>of 3 episodes whose manipulation was completed succeeded" in text


def test_the_best_reward_has_an_interval(tmp_path):
    rewards = [0.1 * i for i in range(10)]
    episodes = [dataclasses.replace(record(i), best_reward=reward) for i, reward in enumerate(rewards)]
    lost = dataclasses.replace(record(10, invalid=True), best_reward=50.0)
    result = result_of([*episodes, lost])
    document = result.to_json()
    low, high = document["best_reward_interval"]
    assert 0.2 < low < 0.45 < high < 0.7
    assert f"mean best reward (95 %: {low:.3g} to {high:.3g})" in render_report(result, tmp_path)
    score = dataclasses.replace(result, environment=dataclasses.replace(SPEC, score="mean <coverage>"))
    assert "mean &lt;coverage&gt; (95 %: " in render_report(score, tmp_path)
    alone = result_of([*episodes[:1], lost])
    assert alone.to_json()["best_reward_interval"] is None
    assert "<span>mean best reward</span>" in render_report(alone, tmp_path)
    assert result_of([lost]).to_json()["best_reward_interval"] is None


def test_failures_come_first(tmp_path):
    (tmp_path / "videos").mkdir()
    videos = [VideoRecord(0, True, "videos/a.mp4"), VideoRecord(1, False, "videos/b.mp4")]
    for video in videos:
        (tmp_path / video.file).write_bytes(b"film")
    text = render_report(result_of(MIXED, videos=videos), tmp_path)
    films = re.findall(r"<figcaption><span class='badge (\w+)'>", text)
    assert films == ["failure", "success"]
    rows = re.findall(r"<td class='wrap'><span class='badge (\w+)'>", text)
    assert rows == ["failure", "invalid", "success", "success"]


def test_report_needs_nothing_but_itself(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"film")
    text = render_report(result_of(MIXED, videos=[VideoRecord(0, True, "a.mp4")]), tmp_path)
    links = Structure(text).links
    assert "data:video/mp4;base64,ZmlsbQ==" in links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "@import" not in text
    assert all(reference.startswith("#") for reference in re.findall(r"url\(([^)]*)\)", text))


def test_plots_take_their_colours_from_the_page_and_share_no_ids(tmp_path):
    text = render_report(result_of(MIXED), tmp_path)
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    for figure in figures:
        assert not re.search(r"fill: #|stroke: #", figure.replace("#ffffff", "")), "a colour that ignores dark mode"
        assert "<text" in figure
        assert all("fill: var(" in style for style in re.findall(r'<text[^>]*style="([^"]*)"', figure))
    clips = [set(re.findall(r'<clipPath id="([^"]*)"', figure)) for figure in figures]
    assert len(set.union(*clips)) == sum(len(c) for c in clips)


def test_latencies_are_told_with_the_rows_of_their_own_calls(tmp_path):
    text = render_report(result_of(MIXED, plan_batch_size=1.25), tmp_path)
    [plot] = [svg for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL) if "Histogram of latencies" in svg]
    assert ">encoder, batch 2 (median 0.55 ms)<" in plot
    assert ">plan, batch 1.25 (median 5 ms)<" in plot
    assert ">wall time per call [ms]<" in plot
    unknown = render_report(result_of(MIXED), tmp_path)
    assert ">plan (median 5 ms)<" in unknown


def test_missing_matplotlib_is_said_before_the_evaluation(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    policy = toy.GoToGoal()
    with pytest.raises(MissingDependencyError, match=r'pip install "scd_robot\[sim\]"'):
        evaluate(policy, "toy_environment:make_point", 1, out=tmp_path / "out", progress=False)
    assert policy.resets == []


def test_missing_video_is_an_error(tmp_path):
    with pytest.raises(OutputError, match=r"a\.mp4"):
        write_report(result_of(MIXED, videos=[VideoRecord(0, True, "a.mp4")]), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("control_dt", "stride"), [(0.0125, 3), (0.1, 1), (1 / 30, 1), (1 / 60, 2), (1 / 500, 17)])
def test_frame_rate_stays_at_or_under_30(control_dt, stride):
    assert frame_stride(control_dt) == stride


def test_video_can_be_played_by_browsers(tmp_path):
    frames = [np.full((33, 48, 3), shade, np.uint8) for shade in range(0, 200, 20)]
    write_video(tmp_path / "film.mp4", frames, Fraction(80, 3))
    with av.open(str(tmp_path / "film.mp4")) as film:
        stream = film.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.height, stream.width, stream.average_rate) == (32, 48, Fraction(80, 3))
        shades = [frame.to_ndarray(format="rgb24").mean() for frame in film.decode(stream)]
    np.testing.assert_allclose(shades, range(0, 200, 20), atol=6)
    data = (tmp_path / "film.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # the index comes first: plays while it loads
    assert [p.name for p in tmp_path.iterdir()] == ["film.mp4"]


def test_video_that_fails_leaves_nothing(tmp_path):
    def frames():
        yield np.zeros((32, 32, 3), np.uint8)
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        write_video(tmp_path / "film.mp4", frames(), Fraction(30))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match=r"film\.mp4"):
        write_video(tmp_path / "nowhere/film.mp4", [np.zeros((32, 32, 3), np.uint8)], Fraction(30))


@pytest.mark.parametrize(("render", "message"), [("missing", "no camera here"), ("blank", "blank")])
def test_rendering_that_fails_does_not_fail_the_evaluation(toy, tmp_path, render, message, caplog):
    source = functools.partial(toy.PointEnvironment, render=render)
    with caplog.at_level(logging.ERROR):
        result = evaluate(toy.GoToGoal(), source, 2, num_envs=1, out=tmp_path / "out", progress=False)
    assert result.successes == 2
    assert result.videos == []
    assert message in result.video_error
    assert list((tmp_path / "out/videos").iterdir()) == []
    assert message in (tmp_path / "out/report.html").read_text()


def test_replay_that_differs_is_no_video(toy, tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        result = evaluate(
            toy.GoToGoal(), "toy_environment:make_forgetful", 2, num_envs=1, out=tmp_path / "out", progress=False
        )
    assert result.videos == []
    assert result.video_error.count("began in another state") == 2
    assert "does not follow from its seed alone" in result.video_error
