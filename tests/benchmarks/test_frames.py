"""The benchmark of imagined frames: what it cuts out of episodes, and its tables."""

import json

import numpy as np
import pytest
import zarr
from benchmark_jobs import load

from scd_robot.analysis.frame_metrics import curve, frame_errors
from scd_robot.datasets import EpisodeDataset
from scd_robot.errors import ConfigError
from scd_robot.types import ArraySpec, DatasetSpec

benchmark = load("frames")
AHEAD = 4
LENGTHS = (20, 12, 25)


@pytest.fixture
def data():
    """Episodes of which one is too short, with a hand that moves and a goal that does not."""
    rows = np.arange(sum(LENGTHS))
    arrays = {
        "image": np.zeros((len(rows), 16, 16, 3), np.uint8),
        "action": np.zeros((len(rows), 2), np.float32),
        "position.hand": np.stack([rows, rows, rows], axis=1).astype(np.float32),
        "position.goal": np.ones((len(rows), 3), np.float32),
    }
    spec = DatasetSpec({"image": ArraySpec((16, 16, 3), "uint8")}, 2, 0.1, "rows")
    return EpisodeDataset(spec, np.cumsum(LENGTHS), arrays)


def test_frames_to_imagine_follow_those_that_are_seen_in_episodes_that_are_long_enough(data):
    episodes, rows = benchmark.long_enough(data, AHEAD)
    assert episodes == [0, 2], "episode 1 is too short"
    assert rows.tolist() == [[16, 17, 18, 19], [48, 49, 50, 51]]
    assert set(benchmark.moving_things(data)) == {"hand"}, "what stands still is not looked for"


def test_episodes_that_are_all_too_short_are_told(data):
    with pytest.raises(ConfigError, match="only 1 of 3 episodes have 25 control steps or more"):
        benchmark.long_enough(data, 9)


def test_tables_show_every_arm_beside_the_last_frame_repeated():
    recorded = np.random.default_rng(0).integers(0, 200, (2, AHEAD, 16, 16, 3), np.uint8)
    errors = {
        arm: frame_errors(recorded, recorded + np.uint8(off), recorded[:, 0])
        for arm, off in (("separable", 5), ("entangled", 10), ("self_forced", 20))
    }
    distance = np.array([[1.0] * AHEAD, [3.0] * AHEAD])
    place = curve(distance, np.arange(2))
    entry = {"imagined": place, "copied": place, "recorded": place, "guessed": place}
    names = [*benchmark.QUALITY, "hand [cm]"]
    found = {
        "environment": "rows", "context": 16, "ahead": AHEAD, "control_dt": 0.1,
        "training": {
            arm: {"steps": 7, "parameters": 1234, "cpu_s": None, "metrics": {"val/loss": 0.5}} for arm in errors
        },
        "frames": {arm: error.to_json() for arm, error in errors.items()},
        "positions": {arm: {"positions": {"hand": entry}} for arm in errors},
        **{f"separable_less_{arm}": dict.fromkeys(names, place) for arm in ("entangled", "self_forced")},
    }  # fmt: skip
    text = benchmark.quality_report(json.loads(json.dumps(found)))
    assert "| PSNR of all pixels [dB]: separable | 34.15 [34.15, 34.15] |" in text
    assert "| PSNR of all pixels [dB]: entangled | 28.13 [28.13, 28.13] |" in text
    assert "| PSNR of all pixels [dB]: self_forced | 22.11 [22.11, 22.11] |" in text
    assert "| SSIM of moving pixels: separable - self_forced | 2.000 [1.000, 3.000] |" in text
    assert "| hand: last frame repeated | 2.0 [1.0, 3.0] |" in text
    assert "PSNR of moving pixels [dB]: last frame repeated" in text
    assert "| separable | 7 | 1,234 | not known | val/loss 0.5 |" in text


def test_times_are_of_both_arms_in_turns():
    found = benchmark.time_frames(rounds=2, histories=(2, 4))
    text = benchmark.times_report(json.loads(json.dumps(found)))
    assert set(found["separable_over_entangled"]) == {"2", "4"}
    ours, theirs = (found["slope_us"][arm]["floor"] for arm in ("separable", "entangled"))
    assert 0 < ours < theirs / 8, "history costs something once per frame, the rival at 16 denoising steps"
    assert f"of the floor {ours:.1f}" in text
    for arm in benchmark.ARMS:
        assert found["floor_ms"][arm]["2"] < found["floor_ms"][arm]["4"]
        entry = found["ms"][arm]["4"]
        assert 0 < entry["read"]["p50"] < entry["frame"]["p50"]
    assert "| 4 | entangled |" in text
    assert "a frame with a history of 4 over 2" in text


def test_of_pusht_the_places_of_hand_block_and_foot_are_known(tmp_path):
    images = np.zeros((4, 96, 96, 3), np.float32)
    images[:, :48] = 240
    root = zarr.open_group(tmp_path / "pusht.zarr", mode="w", zarr_format=2)
    values = {
        "data/img": images,
        "data/state": np.array([[10, 20, 256, 300, angle] for angle in (0, np.pi / 2, np.pi, 0)], np.float32),
        "data/action": np.ones((4, 2), np.float32),
        "meta/episode_ends": np.array([2, 4]),
    }
    for name, value in values.items():
        root.create_array(name, data=value)
    data = benchmark.pusht(tmp_path / "pusht.zarr")
    assert data.arrays["image"].shape == (4, 64, 64, 3)
    assert data.arrays["image"][0, :30].min() == 240
    assert data.arrays["image"][0, 34:].max() == 0
    np.testing.assert_allclose(data.arrays["position.hand"][0], [0.01, 0.02, 0])
    np.testing.assert_allclose(data.arrays["position.block"][:, :2], [[0.256, 0.3]] * 4)
    stem = data.arrays["position.foot"] - data.arrays["position.block"]
    np.testing.assert_allclose(stem, [[0, 0.1, 0], [-0.1, 0, 0], [0, -0.1, 0], [0, 0.1, 0]], atol=1e-6)
    assert set(benchmark.moving_things(data)) == {"foot"}


def test_the_slope_is_that_of_a_line():
    assert benchmark.slope_us((8, 16, 64), (1.8, 2.6, 7.4)) == pytest.approx(100)
