"""Metrics of imagined frames: closed forms, agreement with torchmetrics, and what they refuse."""

import json

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from scd_robot.analysis.frame_metrics import HIGHEST_PSNR, MotionConfig, curve, frame_errors, moving_pixels
from scd_robot.errors import ConfigError, ShapeError


def moving_square(pieces=3, frames=6, size=24, channels=3, step=2):
    """Recorded frames and the last seen one: a bright square of 6 x 6 moves `step` pixels a frame on a grey ground."""
    rng = np.random.default_rng(0)
    pictures = np.repeat(rng.integers(90, 110, (pieces, 1, size, size, channels)), frames + 1, axis=1)
    for time in range(frames + 1):
        pictures[:, time, 9:15, 1 + step * time : 7 + step * time] = 240
    pictures = pictures.astype(np.uint8)
    return pictures[:, 1:], pictures[:, 0]


def repeated(last, frames):
    return np.repeat(last[:, None], frames.shape[1], axis=1)


def test_psnr_of_a_constant_offset_has_its_closed_form():
    recorded, last = moving_square()
    errors = frame_errors(recorded, recorded - 10, last)
    expected = 20 * np.log10(255 / 10)
    assert errors.imagined.psnr == pytest.approx(np.full((3, 6), expected))
    assert errors.imagined.psnr_moving == pytest.approx(np.full((3, 6), expected))


@pytest.mark.parametrize("channels", [1, 3])
def test_numbers_on_all_pixels_are_those_of_torchmetrics(channels):
    recorded, last = moving_square(channels=channels)
    imagined = np.clip(recorded + np.random.default_rng(1).normal(0, 12, recorded.shape), 0, 255).astype(np.uint8)
    errors = frame_errors(recorded, imagined, last)
    a, b = (torch.tensor(x).flatten(0, 1).permute(0, 3, 1, 2).double() for x in (recorded, imagined))
    psnr = peak_signal_noise_ratio(b, a, data_range=255.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(b, a, data_range=255.0, reduction=None)
    assert errors.imagined.psnr.ravel() == pytest.approx(psnr.numpy(), rel=1e-5)
    assert errors.imagined.ssim.ravel() == pytest.approx(ssim.numpy(), abs=1e-4)


def test_on_moving_pixels_a_still_picture_loses_what_it_wins_on_all():
    recorded, last = moving_square(size=64)
    noise = np.random.default_rng(1).normal(0, 6, recorded.shape)
    followed = np.clip(recorded + noise, 0, 255).astype(np.uint8)  # knows where the square is, but is noisy
    errors = frame_errors(recorded, followed, last)
    assert (errors.copied.ssim > errors.imagined.ssim).all()
    assert (errors.copied.ssim_moving < errors.imagined.ssim_moving).all()
    assert (errors.copied.psnr_moving < errors.imagined.psnr_moving).all()
    still = frame_errors(recorded, repeated(last, recorded), last)
    assert np.array_equal(still.imagined.psnr_moving, still.copied.psnr_moving)


def test_what_moves_is_where_a_thing_was_and_is_with_a_margin():
    recorded, last = moving_square(pieces=1, frames=3)
    for margin in (0, 2):
        expected = np.zeros((24, 24), bool)
        for left in (1, 7):  # it moved by its whole width: left there, came here
            expected[9 - margin : 15 + margin, max(0, left - margin) : left + 6 + margin] = True
        found = moving_pixels(recorded[0], last[0], MotionConfig(margin=margin))[2]
        assert np.array_equal(found, expected)
    assert not moving_pixels(recorded[0], last[0], MotionConfig(threshold=200)).any()


def test_where_nothing_moves_there_is_no_number_and_no_infinity():
    _, last = moving_square()
    still = np.repeat(last[:, None], 4, axis=1)
    errors = frame_errors(still, still, last)
    assert np.isnan(errors.imagined.psnr_moving).all()
    assert errors.imagined.psnr == pytest.approx(np.full((3, 4), HIGHEST_PSNR))
    found = json.loads(json.dumps(errors.to_json(), allow_nan=False))
    assert found["psnr_moving"]["imagined"] == {"mean": [None] * 4, "interval": [None] * 4}
    assert found["psnr_moving"]["drift"]["imagined"] == {"per_frame": None, "interval": None}
    assert found["moving_share"]["mean"] == [0.0] * 4


def test_pieces_in_which_nothing_moves_do_not_count_among_those_in_which_something_does():
    recorded, last = moving_square()
    recorded[0] = last[0]
    errors = frame_errors(recorded, recorded - 10, last)
    found = errors.to_json()["psnr_moving"]["imagined"]
    assert found["mean"] == pytest.approx([20 * np.log10(255 / 10)] * 6)


def test_drift_is_the_slope_of_a_growing_error():
    recorded, last = moving_square()
    error = (4 * 10 ** (np.arange(6.0) / 20)).round()  # about 1 dB more each frame
    found = frame_errors(recorded, recorded - error.astype(np.uint8)[:, None, None, None], last).to_json()
    expected = -20 * np.polyfit(np.arange(6), np.log10(error), 1)[0]
    assert found["psnr"]["drift"]["imagined"]["per_frame"] == pytest.approx(expected, rel=1e-6)
    assert found["psnr_moving"]["drift"]["copied"]["per_frame"] < 0


def test_intervals_are_over_episodes_not_over_pieces_of_them():
    values = np.random.default_rng(0).normal(0, 1, (8, 1))
    many = np.repeat(values, 50, axis=0)
    low, high = curve(many, np.repeat(np.arange(8), 50))["interval"][0]
    assert [low, high] == pytest.approx(curve(values, np.arange(8))["interval"][0])
    assert curve(many, np.zeros(400, np.int64))["interval"] == [None]  # one episode
    assert curve(many, np.arange(400))["interval"][0][1] - low < high - low


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x / np.float32(255), r"float32 .* in 0\.\.1; convert them with \(255 \* x\)"),
        (lambda x: x / np.float32(127.5) - 1, r"in -1\.\.1; convert"),
        (lambda x: x.astype(np.float64), r"float64 .* in \d+\.\.240; bring"),
        (lambda x: x.astype(np.int64), "int64"),
        (lambda x: x[..., 0], r"grey pictures need a last axis"),
        (lambda x: np.concatenate([x, x[..., :1]], axis=-1), "drop the alpha channel"),
        (lambda x: np.moveaxis(x, -1, -3), "the channels come first"),
        (lambda x: x[..., :2], "1 or 3 channels"),
        (lambda x: x[:, :, :8], "at least 11 x 11"),
        (lambda x: x[:0], "at least one of each"),
        (lambda x: x[:, :3], "like recorded"),
    ],
)
def test_what_are_no_pictures_of_bytes_is_named(spoil, message):
    recorded, last = moving_square()
    with pytest.raises(ShapeError, match=message):
        frame_errors(recorded, spoil(recorded), last)


def test_context_episodes_and_settings_must_fit():
    recorded, last = moving_square()
    with pytest.raises(ShapeError, match="one frame for each piece"):
        frame_errors(recorded, recorded, last[:2])
    with pytest.raises(ShapeError, match="a number for each piece"):
        frame_errors(recorded, recorded, last, episodes=np.arange(2))
    with pytest.raises(ConfigError, match="threshold"):
        MotionConfig(threshold=255)
    with pytest.raises(ConfigError, match="margin"):
        MotionConfig(margin=-1)
