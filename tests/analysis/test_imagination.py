"""`scd imagine`: imagined frames beside recorded ones, and what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from frame_models import ARCHITECTURES, SHAPE, frame_config, frame_experiment, moving_square

from scd_robot.analysis import position_score
from scd_robot.analysis.imagination import check_recording, imagine_episodes
from scd_robot.analysis.surprise import calibrate_surprise
from scd_robot.checkpoint import read_checkpoint
from scd_robot.cli.main import main
from scd_robot.datasets import POSITION, PRESENT, EpisodeDataset
from scd_robot.datasets.convert import write_zarr
from scd_robot.datasets.windows import split_episodes
from scd_robot.errors import CheckpointError, ConfigError, ShapeError, UnknownNameError
from scd_robot.model import build_model
from scd_robot.policies import Imagination, load_imagination, load_policy
from scd_robot.policies.scd import ScdPolicyConfig
from scd_robot.seeding import POLICY_NOISE
from scd_robot.training import train
from scd_robot.training.start import fit_normalizer
from scd_robot.types import ArraySpec

DATA = moving_square()


def untrained(**settings: object) -> Imagination:
    """Random weights, none of them zero."""
    torch.manual_seed(0)
    model = build_model(frame_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = ScdPolicyConfig(num_executed=1, **settings)
    return Imagination(model, fit_normalizer(DATA, frame_experiment()), DATA.spec, config)


def without(key: str, array: np.ndarray) -> EpisodeDataset:
    """The moving square under another key or in another form."""
    spec = replace(DATA.spec, observation={key: ArraySpec(array.shape[1:], str(array.dtype))})
    return replace(DATA, spec=spec, arrays={key: array, "action": DATA.arrays["action"]})


def test_imagined_frames_are_the_next_observations() -> None:
    """Many frames at once are those that come of giving each to the model as if it had been recorded."""
    imagination = untrained()
    frames, actions = DATA.arrays["eye"][None, :5], DATA.arrays["action"][None, :9]
    together = imagination.imagine(frames, actions, [3])
    assert together.shape == (1, 5, *SHAPE)
    assert together.dtype == np.uint8
    shown = np.concatenate([frames, together[:, :4]], axis=1)
    first = untrained()
    noises = [imagination._noise([(POLICY_NOISE, 0, 3)], number) for number in range(5)]
    first._noise = lambda keys, number: noises[4]  # type: ignore[method-assign]
    np.testing.assert_array_equal(first.imagine(shown, actions, [3])[:, 0], together[:, 4])


def test_a_row_imagines_alone_what_it_imagines_in_a_batch() -> None:
    imagination = untrained(guidance_scale=1.5)
    frames = np.stack([DATA.arrays["eye"][i : i + 4] for i in (0, 24)])
    actions = np.stack([DATA.arrays["action"][i : i + 8] for i in (0, 24)])
    together = imagination.imagine(frames, actions, [0, 1]).astype(int)
    alone = imagination.imagine(frames[1:], actions[1:], [1])[0].astype(int)
    assert np.abs(together[1] - alone).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 1


def test_untrained_weights_are_far_off_and_the_recording_decides_what_moves() -> None:
    found = imagine_episodes(untrained(), DATA, [2, 5], context=4)
    assert found.recorded.shape == (2, 20, *SHAPE)
    np.testing.assert_array_equal(found.recorded[1], DATA.arrays["eye"][5 * 24 + 4 : 6 * 24])
    np.testing.assert_array_equal(found.last_context[1], DATA.arrays["eye"][5 * 24 + 3])
    assert found.errors.moving_share.max() > 0


@pytest.mark.parametrize(
    ("data", "error", "told"),
    [
        (without("wrist", DATA.arrays["eye"]), UnknownNameError, r"unknown camera .* 'eye'; valid names: wrist"),
        (
            without("eye", DATA.arrays["eye"][:, :8]),
            ShapeError,
            r"\(16, 16, 1\) as in training, .* \(8, 16, 1\): they ha",
        ),
        (
            without("eye", DATA.arrays["eye"].repeat(3, -1)),
            ShapeError,
            r"has \(16, 16, 3\): the model was trained with 1",
        ),
        (
            without("eye", DATA.arrays["eye"] / np.float32(255)),
            ShapeError,
            r"has float32 of 0 to 1: record np.round\(255",
        ),
        (
            without("eye", DATA.arrays["eye"].astype(np.float32)),
            ShapeError,
            r"has float32 of 0 to 255: record np.round\(",
        ),
        (
            without("eye", DATA.arrays["eye"] / np.float32(127.5) - 1),
            ShapeError,
            r"has float32 of -1 to 1: record np.round\(127.5 \* \(picture \+ 1\)\)",
        ),
        (
            replace(DATA, spec=replace(DATA.spec, control_dt=2 * DATA.spec.control_dt)),
            ShapeError,
            r"must be of \S+ s as in training, the recording's are of \S+ s; .*--control-dt",
        ),
    ],
)
def test_recordings_of_another_kind_are_refused(data: EpisodeDataset, error: type, told: str) -> None:
    with pytest.raises(error, match=told):
        check_recording(untrained(), data)


def test_alpha_and_grey_are_named() -> None:
    colour = replace(untrained().transforms.recorded, observation={"eye": ArraySpec((16, 16, 3), "uint8")})
    imagination = untrained()
    imagination.transforms.recorded = colour
    for channels, told in ((4, r"alpha.*\[..., :3\]"), (1, "they are grey, the model was trained with 3")):
        with pytest.raises(ShapeError, match=told):
            check_recording(imagination, without("eye", DATA.arrays["eye"].repeat(channels, -1)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"context": 24}, "context must be 1 to 23, since episode 0 has 24 control steps"),
        ({"context": 0}, "context must be 1 to 23"),
        (
            {"context": 8, "length": 17},
            "length must be 1 to 16, since episode 0 has 24 control steps, 8 of them context",
        ),
        ({"context": 8, "episodes": [12]}, "there is no episode 12: the recording has 12, from 0 on"),
        ({"context": 8, "fvd_weights": "i3d.pt"}, "choose at least 2 episodes, better hundreds, got 1"),
        ({"context": 8, "episodes": [1, 1], "fvd_weights": "i3d.pt"}, "at least 2 episodes, better hundreds, got 1"),
        ({"context": 8, "episodes": [0, 1], "length": 8, "fvd_weights": "i3d.pt"}, "at least 9 frames: .* got 8"),
    ],
)
def test_episodes_that_are_too_short_or_not_there_are_refused(options: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        imagine_episodes(untrained(), DATA, **{"episodes": [0], **options})


def test_what_lies_in_the_place_of_an_absent_picture_is_not_taken_for_one() -> None:
    there = np.ones(DATA.num_steps, bool)
    there[[24 + 9, 24 + 12]] = False  # of episode 1
    data = replace(DATA, arrays={**DATA.arrays, PRESENT + "eye": there})
    told = r"episode 1 has no picture 'eye' in 1 of 10 control steps, first in step 9 \(present.eye is 0 there\)"
    with pytest.raises(ConfigError, match=told):
        imagine_episodes(untrained(), data, [0, 1], context=6, length=4)
    assert imagine_episodes(untrained(), data, [0, 1], context=6, length=3).episodes == [0, 1]
    with pytest.raises(ConfigError, match="episode 1 has no picture 'eye' in 2 of 24 control steps"):
        calibrate_surprise(untrained(), data, [0, 1, 2])


def test_a_score_by_position_learns_nothing_from_absent_pictures(tmp_path, monkeypatch) -> None:
    there = np.ones(DATA.num_steps, bool)
    there[[3, 24 + 9]] = False
    eye = DATA.arrays["eye"].copy()
    eye[~there] = 0
    places = np.arange(2 * DATA.num_steps, dtype=np.float32).reshape(-1, 2)
    arrays = {**DATA.arrays, "eye": eye, PRESENT + "eye": there, POSITION + "square": places}
    write_zarr(replace(DATA, arrays=arrays), tmp_path / "gaps.zarr")
    given = []
    monkeypatch.setattr(position_score, "train_probe", lambda *arguments: given.append(arguments))
    position_score.NearTo(untrained(), str(tmp_path / "gaps.zarr"), "square", [0.0, 0.0])
    ((pictures, positions, owner, _),) = given
    np.testing.assert_array_equal(pictures, DATA.arrays["eye"][there])
    np.testing.assert_array_equal(positions["square"], places[there])
    np.testing.assert_array_equal(owner, np.repeat(np.arange(DATA.num_episodes), DATA.episode_lengths)[there])


def test_recorded_frames_that_do_not_fit_into_memory_are_told_with_their_sum(monkeypatch) -> None:
    monkeypatch.setattr("scd_robot.nn.memory._SMALL", 0)
    monkeypatch.setattr("scd_robot.nn.memory.free_memory", lambda device: 9000)  # of 9728
    told = r"recorded frames = \(3 episodes x 9 control steps of context \+ 11 of one episode\) x 256 bytes; take fewer"
    imagination = untrained()
    monkeypatch.setattr(imagination, "imagine", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ConfigError, match=told):
        imagine_episodes(imagination, DATA, [0, 1, 2], 9, 2)


@pytest.mark.parametrize(
    ("frames", "actions", "told"),
    [
        (DATA.arrays["eye"][None, :4] / 255, DATA.arrays["action"][None, :4], r"give np.round\(255 \* picture\)"),
        (DATA.arrays["eye"][None, :4, :, :8], DATA.arrays["action"][None, :4], "a picture of another size"),
        (DATA.arrays["eye"][None, :4], DATA.arrays["action"][None, :3], "n >= 4, one for each of the 4 frames"),
        (DATA.arrays["eye"][None, :4], np.full((1, 5, 2), np.nan), "NaN or infinite value in row 0"),
    ],
)
def test_arrays_that_are_no_recording_are_refused(frames: np.ndarray, actions: np.ndarray, told: str) -> None:
    with pytest.raises(ShapeError, match=told):
        untrained().imagine(frames, actions)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_of_frames_trains_resumes_to_the_same_weights_and_imagines(
    tmp_path, architecture, capsys, refused
) -> None:
    options = {"accelerator": "cpu", "progress": False}
    train(DATA, frame_experiment(4, architecture), tmp_path / "run", **options)
    whole = read_checkpoint(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_00000004").rename(tmp_path / "whole")
    train(DATA, frame_experiment(4, architecture), tmp_path / "run", resume=True, **options)
    again = read_checkpoint(tmp_path / "run")
    assert all(torch.equal(again.weights[name], value) for name, value in whole.weights.items())
    assert {"val/loss", "val/frame_rmse", "val/repeated_frame_rmse"} <= whole.metrics.keys()

    write_zarr(DATA, tmp_path / "square.zarr")
    arguments = ["imagine", tmp_path / "run", "--dataset", tmp_path / "square.zarr", "--out", tmp_path / "out"]
    arguments += ["--episode", 1, 2, "--context", 6, "--length", 5, "--num-denoising-steps", 2]
    assert main([str(argument) for argument in arguments]) == 0
    assert "frames ahead" in capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "frames.json").read_text())
    assert (document["frames"], document["episode_numbers"], document["context"]) == (5, [1, 2], 6)
    assert document["settings"]["sampler"]["num_denoising_steps"] == 2
    assert (document["step"], document["weights_sha256"]) == (4, again.weights_sha256)
    held_out = split_episodes(DATA.num_episodes, 0.2, 0)[1].tolist()
    assert document["held_out"] == ({1, 2} <= set(held_out))
    place = arguments.index("--episode")
    short = arguments[:place] + arguments[place + 3 :]
    assert main([str(argument) for argument in [*short, "--overwrite"]]) == 0
    assert f"episodes {held_out[0]}: held out from training" in capsys.readouterr().out
    refused([*arguments, "--overwrite", "--episode", 1, 2, 1], "--episode names 1 twice")
    refused([*arguments, "--overwrite", "--device", "abacus"], "cannot use device 'abacus'")
    distill = ["distill", tmp_path / "run", "--objective", "mip", "--dataset", tmp_path / "square.zarr"]
    refused([*distill, "--out", tmp_path / "student"], "is a model of frames, and distillation is for policies")
    assert (tmp_path / "out" / "frames.png").stat().st_size > 1000
    assert (tmp_path / "out" / "frames.mp4").stat().st_size > 1000
    assert main(["info", str(tmp_path / "run")]) == 0
    assert "frames       of eye" in capsys.readouterr().out


def test_policies_and_models_of_frames_are_told_apart(tmp_path, tiny_run, refused) -> None:
    train(DATA, frame_experiment(2), tmp_path / "run", accelerator="cpu", progress=False)
    with pytest.raises(ConfigError, match=r"imagines frames and plans no actions: .* 'scd imagine'"):
        load_policy(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"holds a policy .* imagines no frames; train .* frames_64"):
        load_imagination(tiny_run)
    evaluation = ["eval", tmp_path / "run", "--env", "nowhere:make", "--out", tmp_path / "evaluation"]
    refused(evaluation, "imagines frames and plans no actions")
    with pytest.raises(ConfigError, match="nothing to evaluate in an environment"):
        train(DATA, frame_experiment(2), tmp_path / "other", evaluate=lambda policy: {}, evaluate_every=2)


@pytest.mark.slow
def test_imagination_of_a_moving_square_beats_the_last_frame_repeated_on_moving_pixels(tmp_path) -> None:
    data, held_out = moving_square(60), moving_square(8, seed=1)
    settings = frame_experiment(600, validate_every=100, warmup_steps=20, positions_per_segment=11)
    train(data, settings, tmp_path / "run", accelerator="cpu", progress=False)
    losses = [
        read_checkpoint(folder).metrics["val/loss"] for folder in sorted((tmp_path / "run" / "checkpoints").iterdir())
    ]
    assert losses[-1] < 0.5 * losses[0]
    found = imagine_episodes(load_imagination(tmp_path / "run"), held_out, list(range(8)), context=6, length=4)
    gain = np.nanmean(found.errors.imagined.psnr_moving - found.errors.copied.psnr_moving, axis=0)
    assert gain[0] > 3
    assert gain[3] > 0
