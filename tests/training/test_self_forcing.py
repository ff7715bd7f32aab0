"""Models of frames trained on their own roll-outs: which pictures they imagine, from what, and what they learn."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from frame_models import ARCHITECTURES, joint_experiment, moving_square
from frame_models import frame_experiment as experiment
from safetensors.torch import load_file
from tiny import tiny_experiment

from scd_robot.checkpoint import list_checkpoints, read_checkpoint
from scd_robot.cli.main import main
from scd_robot.datasets import PRESENT
from scd_robot.datasets.convert import write_zarr
from scd_robot.diffusion import SamplerConfig
from scd_robot.errors import ConfigError
from scd_robot.model import FrameModel, build_model
from scd_robot.nn import AutoencoderConfig
from scd_robot.normalization import Normalizer
from scd_robot.training import ExperimentConfig, SelfForcingConfig, train
from scd_robot.training.batches import SegmentDataset, TrainingBatch
from scd_robot.training.objective import loss_terms, select_samples
from scd_robot.training.start import fit_normalizer

DATA = moving_square(6, steps=20)
ALWAYS = SelfForcingConfig(1.0, frames=4, num_denoising_steps=2)


def forced(forcing: SelfForcingConfig = ALWAYS, architecture: str = "separable", **training: Any) -> ExperimentConfig:
    return experiment(architecture=architecture, self_forcing=forcing, positions_per_segment=11, **training)


def parts(settings: ExperimentConfig, data=DATA, step: int = 1) -> tuple[FrameModel, Normalizer, TrainingBatch]:
    torch.manual_seed(0)
    dataset = SegmentDataset(data, settings, np.arange(data.num_episodes))
    return build_model(settings.model), fit_normalizer(data, settings), dataset[step]


def shaken(model: FrameModel, size: float = 0.05) -> FrameModel:
    """With no weight at zero: it does more than to repeat the last frame, from `size` 0.2 on by what it has read."""
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * size)
    return model


def shown(model: FrameModel, normalizer: Normalizer, batch: TrainingBatch, monkeypatch) -> dict[str, Any]:
    """What the encoder is given in the pass that has gradients."""
    given: dict[str, Any] = {}
    encode_at = model.encode_at

    def spy(position, **history):
        given.update(history)
        return encode_at(position, **history)

    monkeypatch.setattr(model, "encode_at", spy)
    select_samples(model, normalizer, batch)
    return given


def recorded_next(model: FrameModel, batch: TrainingBatch, samples) -> None:
    """Asserts that each sample's tokens are of the recorded frame that follows, seen from its last frame."""
    frames, index = batch.segments.observation["eye"], 0
    for b, positions in enumerate(batch.draws.position.tolist()):
        for m, at in enumerate(positions):
            if batch.draws.position_valid[b, m]:
                one = slice(index, index + 1)
                assert torch.equal(model.frames(samples.data[one], samples.known[one])[0], frames[b, at + 1])
            index += 1
    assert index == len(samples.data)


def test_without_it_nothing_changes_and_with_it_the_other_draws_stay() -> None:
    off, on = forced(SelfForcingConfig(0.0, frames=3)), forced()
    plain = experiment(positions_per_segment=11)
    model, normalizer, batch = parts(off)
    _, _, without = parts(plain)
    _, _, rolled = parts(on)
    assert batch.draws.rolls is None
    for name, value in vars(without.draws).items():
        if name not in ("rolls", "frames"):
            assert torch.equal(value, getattr(batch.draws, name)), name
            assert name == "stream" or torch.equal(value, getattr(rolled.draws, name)), name
    loss = loss_terms(model, normalizer, without)
    assert all(torch.equal(x, y) for x, y in zip(loss, loss_terms(model, normalizer, batch), strict=True))
    stopped = replace(rolled, draws=replace(rolled.draws, rolls=None, stream=batch.draws.stream))
    assert all(torch.equal(x, y) for x, y in zip(loss, loss_terms(model, normalizer, stopped), strict=True))
    assert not torch.equal(loss[0], loss_terms(model, normalizer, rolled)[0])


def test_roll_outs_follow_recorded_pictures_of_the_same_history_and_end_with_it() -> None:
    data = moving_square(6, steps=9)
    dataset = SegmentDataset(data, forced(virtual_reset_probability=0.7, segment_length=12), np.arange(6))
    lengths, inner_begins = set(), 0
    for step in range(40):
        draws = dataset[step].draws
        rolls = draws.rolls
        for i, begin, first, stop in zip(
            *(x.tolist() for x in (rolls.segment, rolls.begin, rolls.first, rolls.stop)), strict=True
        ):
            stream = draws.stream[i]
            assert begin < first < stop <= min(first + 4, 9)
            assert (stream[begin:stop] == stream[begin]).all()
            assert begin == 0 or stream[begin - 1] != stream[begin]
            assert (stream[stop:] > stream[first]).all()
            lengths.add(stop - first)
            inner_begins += begin > 0
    assert lengths == {1, 2, 3, 4}
    assert inner_begins > 5


def test_draws_are_a_function_of_seed_step_and_sample() -> None:
    def drawn(rank: int, world_size: int, **training: Any) -> list[tuple[int, ...]]:
        settings = forced(SelfForcingConfig(0.5, frames=4), **training)
        rolls = SegmentDataset(DATA, settings, np.arange(6), rank=rank, world_size=world_size)[3].draws.rolls
        noise = (rolls.noise[:, 0, 0, 0] * 1e6).int()
        columns = (rolls.segment + 2 * rank, rolls.begin, rolls.first, rolls.stop, noise)
        return list(zip(*(x.tolist() for x in columns), strict=True))

    whole = drawn(0, 1)
    assert whole == drawn(0, 1) == drawn(0, 2) + drawn(1, 2)
    assert 0 < len(whole) < 4
    assert whole != drawn(0, 1, seed=1)


def test_held_out_segments_are_as_recorded() -> None:
    assert SegmentDataset(DATA, forced(), np.arange(6), validation=True)[0].draws.rolls is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("past", ["none", "full"])
def test_a_model_that_knows_the_world_leaves_the_pictures_as_they_are(architecture, past, monkeypatch) -> None:
    settings = forced(architecture=architecture)
    settings = replace(settings, model=replace(settings.model, past_action_input=past))
    model, normalizer, batch = parts(settings)

    def truth(self, context, action, known, **_):
        last = self.frames(torch.zeros_like(known), known)  # which no change leaves as it is
        following = torch.full_like(last, 30)
        for row, (picture, moves) in enumerate(zip(last, normalizer.denormalize("action", action), strict=True)):
            square = (picture[..., 0] == 220).nonzero()
            if len(square):  # a row that is past its end may be given nothing
                y, x = (square[0] + moves.round().int()).clamp(0, 12).tolist()
                following[row, y : y + 4, x : x + 4] = 220
        return self.tokens(following, known)

    monkeypatch.setattr(model, "imagine", MethodType(truth, model))
    before = {name: value.clone() for name, value in batch.segments.observation.items()}
    given = shown(model, normalizer, batch, monkeypatch)
    assert torch.equal(given["observation"]["eye"], before["eye"])
    assert torch.equal(batch.segments.observation["eye"], before["eye"])


def test_a_model_that_repeats_the_last_frame_is_shown_repeats_and_learns_what_was_recorded(monkeypatch) -> None:
    model, normalizer, batch = parts(forced())  # untrained it does repeat it
    recorded, rolls = batch.segments.observation["eye"].clone(), batch.draws.rolls
    expected = recorded.clone()
    for i, first, stop in zip(rolls.segment, rolls.first, rolls.stop, strict=True):
        expected[i, first:stop] = recorded[i, first - 1]
    assert not torch.equal(expected, recorded)
    samples = select_samples(model, normalizer, batch)
    assert torch.equal(batch.segments.observation["eye"], recorded)
    recorded_next(model, batch, samples)
    position = batch.draws.position
    last = torch.stack([expected[b, at] for b in range(4) for at in position[b]])
    assert torch.equal(samples.known[samples.counted], model.known(last)[samples.counted])
    assert bool(samples.counted.any())
    assert torch.equal(shown(model, normalizer, batch, monkeypatch)["observation"]["eye"], expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_beside_the_next_tokens_stand_the_latents_that_were_denoised_as_in_use(architecture, monkeypatch) -> None:
    """Not those of the picture that was made of them, which a random autoencoder makes others of."""
    model, normalizer, batch = parts(forced(architecture=architecture).with_autoencoder(AutoencoderConfig((8, 16), 3)))
    shaken(model, 0.2)
    rolls, following, left = batch.draws.rolls, model.following, []

    def spy(tokens, known):
        left.append(following(tokens, known))
        return left[-1]

    monkeypatch.setattr(model, "following", spy)
    samples = select_samples(model, normalizer, batch)
    of_roll, compared = {int(i): row for row, i in enumerate(rolls.segment)}, 0
    positions, valid = batch.draws.position.flatten(), batch.draws.position_valid.flatten()
    for index, at in enumerate(positions.tolist()):
        segment = index // batch.draws.position.shape[1]
        row = of_roll[segment]
        number = at - int(rolls.first[row])
        if valid[index] and number >= 0 and at < rolls.stop[row]:
            frame, latents = left[number][0][row : row + 1], left[number][1][row]
            assert torch.equal(samples.known[index], latents)
            assert not torch.allclose(model.known(frame)[0], latents, atol=1e-2)
            recorded = model.known(batch.segments.observation["eye"][segment, at + 1][None])[0]
            torch.testing.assert_close(samples.data[index] + latents, recorded)
            compared += 1
    assert compared > 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("past", ["none", "noised", "full"])
def test_each_frame_is_that_of_one_pass_over_all_before_it(architecture, past, monkeypatch) -> None:
    """Cached = full: with virtual resets, and segments of unlike lengths."""
    data = moving_square(6, steps=20)
    data = replace(data, episode_ends=np.array([9, 20, 45, 60, 72, 120]))
    settings = forced(architecture=architecture, virtual_reset_probability=1.0)
    settings = replace(settings, model=replace(settings.model, past_action_input=past))
    model, normalizer, batch = parts(settings, data, step=7)
    shaken(model, 0.2)
    rolls = batch.draws.rolls
    read = rolls.first - rolls.begin
    assert ((rolls.begin > 0) & (read < read.max())).sum() >= 2
    with monkeypatch.context() as patch:
        history = shown(model, normalizer, batch, patch)
    pictures, compared = history["observation"]["eye"], 0
    executed = normalizer.normalize("action", batch.segments.past_action)
    for row, i in enumerate(rolls.segment.tolist()):
        for number, at in enumerate(range(int(rolls.first[row]), int(rolls.stop[row]))):
            with torch.no_grad():
                position = torch.full((len(pictures), 1), at - 1)
                context = model.samples(model.encode_at(position, **history), 1)
                tokens = model.imagine(
                    context,
                    executed[:, at],
                    known := model.known(pictures[:, at - 1]),
                    sampler=SamplerConfig("euler", 2),
                    noise=rolls.noise[row, number].expand(len(pictures), -1, -1),
                )
            frame = model.frames(tokens, known)[i]
            difference = (frame.int() - pictures[i, at].int()).abs()
            assert difference.max() <= 1
            assert (difference > 0).float().mean() < 0.02, "but for what is rounded"
            assert (frame.int() - batch.segments.observation["eye"][i, at].int()).abs().max() > 8
            compared += 1
    assert compared > 6


def test_without_a_recorded_picture_before_it_there_is_no_roll_out(monkeypatch) -> None:
    there = np.ones(len(DATA.arrays["eye"]), np.float32)
    there[::2] = 0
    model, normalizer, batch = parts(forced(), replace(DATA, arrays={**DATA.arrays, PRESENT + "eye": there}))
    rolls, seen = batch.draws.rolls, batch.segments.present["eye"]
    given = shown(shaken(model), normalizer, batch, monkeypatch)["observation"]["eye"]
    changed = (given != batch.segments.observation["eye"]).flatten(2).any(-1)
    for i, first, stop in zip(rolls.segment, rolls.first, rolls.stop, strict=True):
        assert bool(changed[i, first:stop].all()) == bool(seen[i, first - 1])
        assert bool(changed[i, first:stop].any()) == bool(seen[i, first - 1])
    assert 0 < sum(seen[rolls.segment, rolls.first - 1]) < len(rolls.first)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_bf16_frames_are_imagined_as_in_full_precision_and_every_parameter_learns(architecture, monkeypatch) -> None:
    model, normalizer, batch = parts(forced(architecture=architecture))
    shaken(model)
    with monkeypatch.context() as patch:
        full = shown(model, normalizer, batch, patch)["observation"]["eye"]
    with torch.autocast("cpu", torch.bfloat16):
        with monkeypatch.context() as patch:
            assert torch.equal(shown(model, normalizer, batch, patch)["observation"]["eye"], full)
        total, count = loss_terms(model, normalizer, batch)
    (total / count).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_a_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "progress": False}
    settings = forced(SelfForcingConfig(0.5, frames=3, num_denoising_steps=1), max_steps=4)
    train(DATA, settings, tmp_path / "run", **options)
    newest = list_checkpoints(tmp_path / "run")[-1]
    whole = load_file(newest / "model.safetensors")
    shutil.rmtree(newest)
    train(DATA, settings, tmp_path / "run", resume=True, **options)
    again = load_file(newest / "model.safetensors")
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())


def test_it_is_trained_by_a_setting(tmp_path: Path) -> None:
    write_zarr(moving_square(4, steps=8), tmp_path / "square.zarr")
    (tmp_path / "large.json").write_text('{"images": [{"key": "eye", "crop": [], "size": [64, 64]}]}')
    small = ["model.width=16", "model.num_heads=2", "training.validate_every=2", "training.batch_size=2"]
    forcing = ["training.self_forcing.probability=1", "training.self_forcing.frames=3"]
    arguments = ["--dataset", str(tmp_path / "square.zarr"), "--transforms", str(tmp_path / "large.json"), "--out"]
    run = ["--max-steps", "2", "--accelerator", "cpu", "--threads", "1", "--set", *small]
    for name, settings in (("on", forcing), ("off", [])):
        assert main(["train", "frames_64", *arguments, str(tmp_path / name), *run, *settings]) == 0
    on, off = (read_checkpoint(tmp_path / name) for name in ("on", "off"))
    assert on.config["training"]["self_forcing"] == {"probability": 1.0, "frames": 3, "num_denoising_steps": 4}
    assert off.config["training"]["self_forcing"]["probability"] == 0
    assert any(not torch.equal(weight, off.weights[name]) for name, weight in on.weights.items())


def test_settings_that_have_no_meaning_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"self_forcing\.probability must be in \[0, 1\], got 1\.5"):
        SelfForcingConfig(1.5)
    with pytest.raises(ConfigError, match=r"self_forcing\.frames must be at least 1, got 0"):
        SelfForcingConfig(frames=0)
    with pytest.raises(ConfigError, match=r"self_forcing\.num_denoising_steps must be at least 1, got 0"):
        SelfForcingConfig(num_denoising_steps=0)
    with pytest.raises(ConfigError, match=r"decode frames alone .*this is one with frames beside actions"):
        joint_experiment(self_forcing=ALWAYS)
    with pytest.raises(ConfigError, match=r"decode frames alone .*this is one that plans actions"):
        tiny_experiment(self_forcing=ALWAYS)
