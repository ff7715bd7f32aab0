"""Probes find things in pictures, and tell how far imagined ones are off."""

import json
import logging

import numpy as np
import pytest

from scd_robot.analysis.position_probe import ProbeConfig, probe_errors, train_probe
from scd_robot.errors import ConfigError, ShapeError

SIZE = 24  # pixels; one is 1 cm
QUICK = ProbeConfig(updates=250, batch_size=32)


def pictures(places, seed=0):
    """(..., 24, 24, 3) with a red block of 4 x 4 pixels at places (..., 2) [m] on grey noise."""
    corners = (100 * np.asarray(places)).round().astype(int)
    frames = np.random.default_rng(seed).integers(90, 110, (*corners.shape[:-1], SIZE, SIZE, 3)).astype(np.uint8)
    for index in np.ndindex(corners.shape[:-1]):
        row, column = corners[index]
        frames[(*index, slice(row, row + 4), slice(column, column + 4))] = (220, 30, 30)
    return frames


@pytest.fixture(scope="module")
def probe():
    places = np.random.default_rng(1).integers(0, SIZE - 4, (600, 2)) / 100
    return train_probe(pictures(places), {"block": places}, np.repeat(np.arange(20), 30), QUICK)


def path(pieces=4, frames=10):
    """Places (N, 1 + Tf, 2) of a block that moves 1 cm in each frame."""
    start = np.random.default_rng(2).integers(0, 8, (pieces, 1, 2))
    return (start + np.arange(frames + 1)[None, :, None] * [0, 1]) / 100


def test_a_probe_finds_what_it_has_not_seen(probe):
    assert probe.held_out_cm["block"] < 0.7
    assert probe.guess_cm["block"] > 6


def test_errors_are_distances_from_where_things_were(probe):
    places = path()
    recorded, last = pictures(places)[:, 1:], pictures(places)[:, 0]
    imagined = pictures(places + np.array([0.03, 0.04]), seed=5)[:, 1:]  # 5 cm off
    errors = probe_errors(probe, {"block": places[:, 1:]}, recorded, imagined, last)
    assert errors.imagined["block"] == pytest.approx(np.full((4, 10), 5.0), abs=2)
    assert errors.imagined["block"].mean() == pytest.approx(5, abs=0.7)
    assert errors.copied["block"].mean(axis=0) == pytest.approx(np.arange(1, 11), abs=0.8), "it moved on"
    assert errors.recorded["block"].mean() < 0.8
    assert errors.guessed["block"] == pytest.approx(
        100 * np.linalg.norm(places[:, 1:] - probe.mean.numpy(), axis=-1), rel=1e-5
    )
    found = json.loads(json.dumps(errors.to_json(), allow_nan=False))["positions"]["block"]
    assert found["copied"]["mean"] == pytest.approx(errors.copied["block"].mean(axis=0))
    assert found["better_by"]["mean"][-1] == pytest.approx(found["copied"]["mean"][-1] - found["imagined"]["mean"][-1])
    low, high = found["imagined"]["interval"][0]
    assert low <= found["imagined"]["mean"][0] <= high


def test_a_probe_is_a_function_of_its_seed_and_leaves_the_global_one_alone():
    import torch

    places = np.random.default_rng(1).integers(0, SIZE - 4, (60, 2)) / 100
    frames, episodes = pictures(places), np.repeat(np.arange(6), 10)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = (
        train_probe(frames, {"block": places}, episodes, ProbeConfig(updates=3, seed=seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    found = [one.positions(frames)["block"] for one in (first, again, other)]
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_a_thing_that_cannot_be_seen_is_told(caplog):
    places = np.random.default_rng(1).integers(0, SIZE - 4, (60, 2)) / 100
    with caplog.at_level(logging.WARNING):
        found = train_probe(
            pictures(places), {"hidden": places[::-1]}, np.repeat(np.arange(6), 10), ProbeConfig(updates=20)
        )
    assert "hardly sees where 'hidden' is" in caplog.text
    assert found.held_out_cm["hidden"] > 0.5 * found.guess_cm["hidden"]


def test_what_does_not_belong_together_is_named(probe):
    places = path(pieces=2, frames=3)
    frames = pictures(places)
    recorded, last, truth = frames[:, 1:], frames[:, 0], places[:, 1:]
    with pytest.raises(ShapeError, match=r"of \['block'\] as in the probe's training, got \['cup'\]"):
        probe_errors(probe, {"cup": truth}, recorded, recorded, last)
    with pytest.raises(ShapeError, match=r"'block' must be \(2, 3, 2\), one for each recorded frame"):
        probe_errors(probe, {"block": places}, recorded, recorded, last)
    with pytest.raises(ShapeError, match="a number for each piece"):
        probe_errors(probe, {"block": truth}, recorded, recorded, last, episodes=np.arange(3))
    with pytest.raises(ShapeError, match="the probe takes uint8"):
        probe.positions(recorded[:, :, :20])
    flat, places = frames.reshape(-1, SIZE, SIZE, 3), places.reshape(-1, 2)
    episodes = np.arange(len(flat))
    with pytest.raises(ShapeError, match=r"frames must be uint8 \(N, H, W, C\), got float64"):
        train_probe(flat / 255, {"block": places}, episodes)
    with pytest.raises(ShapeError, match=r"must be \(8, n\)"):
        train_probe(flat, {"block": places[:3]}, episodes)
    with pytest.raises(ShapeError, match="NaN"):
        train_probe(flat, {"block": places * np.nan}, episodes)
    with pytest.raises(ShapeError, match="at least one thing"):
        train_probe(flat, {}, episodes)
    with pytest.raises(ShapeError, match="a number for each frame"):
        train_probe(flat, {"block": places}, episodes[:3])
    with pytest.raises(ConfigError, match="at least 2 episodes"):
        train_probe(flat, {"block": places}, episodes * 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates": 0}, "updates"),
        ({"held_out": 1.0}, "held_out"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        ProbeConfig(**settings)
