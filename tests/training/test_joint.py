"""Training of actions and frames together: what the frame decoder is shown, and what it changes for the actions."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from frame_models import joint_config, joint_experiment, pushed_square
from safetensors.torch import load_file

from scd_robot.checkpoint import find_checkpoint, read_checkpoint
from scd_robot.cli.main import main
from scd_robot.datasets import PRESENT
from scd_robot.datasets.convert import write_zarr
from scd_robot.errors import CheckpointError, ConfigError, ShapeError
from scd_robot.model import FrameConfig, JointModel, ScdConfig, build_model
from scd_robot.normalization import Normalizer
from scd_robot.policies import ChoosingPolicy, Surprise, load_imagination, load_policy
from scd_robot.policies.scd import ScdPolicyConfig
from scd_robot.training import ExperimentConfig, FrameLossConfig, ScdLightningModule, train
from scd_robot.training.batches import LATEST_FRAME_TIME, SegmentDataset, TrainingBatch
from scd_robot.training.objective import held_out_errors, losses, select_samples
from scd_robot.training.start import fit_normalizer
from scd_robot.transforms import ChunkPart, TransformConfig

DATA = pushed_square(6, steps=20)


def parts(settings: ExperimentConfig, data=DATA) -> tuple[JointModel, Normalizer, TrainingBatch]:
    torch.manual_seed(0)
    dataset = SegmentDataset(data, settings, np.arange(data.num_episodes))
    return build_model(settings.model), fit_normalizer(data, settings), dataset[1]


def test_frames_follow_the_first_of_the_positions_and_actions_are_drawn_as_without_them() -> None:
    settings = joint_experiment(
        noise_draws=2, positions_per_segment=12, frames=FrameLossConfig(positions_per_segment=5)
    )
    model, normalizer, batch = parts(settings)
    samples = select_samples(model, normalizer, batch)
    segments = SegmentDataset(DATA, settings, np.arange(6))._index.batch(1, range(4), 4)
    frames, index, left_out = DATA.arrays["eye"], 0, 0
    for b in range(4):
        for m in range(5):
            row = segments.start[b] + int(batch.draws.position[b, m])
            for _ in range(2):
                one = slice(index, index + 1)
                assert bool(samples.frames.counted[index]) == (row + 1 < segments.stop[b])
                last = model.frame_head.known(torch.from_numpy(frames[row : row + 1]))
                assert torch.equal(samples.frames.known[one], last)
                action = normalizer.denormalize("action", samples.frames.action[index])
                np.testing.assert_allclose(action, DATA.arrays["action"][row], atol=1e-5)
                if row + 1 < segments.stop[b]:
                    shown = model.frame_head.frames(samples.frames.data[one], last)
                    np.testing.assert_array_equal(shown[0], frames[row + 1])
                else:
                    left_out += 1
                index += 1
    assert index == len(samples.frames.data) == len(samples.frames.context)
    assert 0 < left_out < index  # of the last frame of a segment nobody knows what follows
    assert batch.draws.frames.flow_time.max() <= LATEST_FRAME_TIME

    _, _, without = parts(replace(settings, model=joint_config(frames=FrameConfig())))
    for name, value in vars(without.draws).items():
        alone = name in ("frames", "rolls")
        assert value is None if alone else torch.equal(value, getattr(batch.draws, name)), name


def test_a_frame_that_was_not_recorded_is_not_learned() -> None:
    there = np.ones(len(DATA.arrays["eye"]), np.float32)
    there[::3] = 0
    model, normalizer, batch = parts(joint_experiment(), replace(DATA, arrays={**DATA.arrays, PRESENT + "eye": there}))
    found = select_samples(model, normalizer, batch).frames
    follows = batch.segments.present["eye"][:, 1:] & batch.segments.present["eye"][:, :-1]
    position = batch.draws.frames.position
    expected = [bool(t < follows.shape[1] and follows[b, t]) for b in range(4) for t in position[b].tolist()]
    assert found.counted.tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_every_parameter_learns_also_in_bf16() -> None:
    model, normalizer, batch = parts(joint_experiment())
    for parameter in model.parameters():  # none of them at zero, where others get no gradient
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(model, select_samples(model, normalizer, batch), batch.draws, "flow_matching")
    sum(total / count for total, count in found.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_losses_and_errors_are_told_apart() -> None:
    """Spoiling one decoder leaves what is told of the other."""
    model, normalizer, batch = parts(joint_experiment())

    def told() -> dict[str, float]:
        with torch.no_grad():
            samples = select_samples(model, normalizer, batch)
            found = losses(model, samples, batch.draws, "flow_matching")
            found |= held_out_errors(model, samples, batch.draws, ScdPolicyConfig().sampler)
        return {name: float(total / count) for name, (total, count) in found.items()}

    before = told()
    torch.nn.init.normal_(model.frame_head.decoder.head.weight)
    after = told()
    changed = {name for name in before if before[name] != after[name]}
    assert set(before) == {"loss", "frame_loss", "chunk", "first_action", "frame", "repeated_frame"}
    assert changed == {"frame_loss", "frame"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Short trainings by the weight of the frames' loss and the positions that it is of."""
    folder, found = tmp_path_factory.mktemp("joint"), {}
    for weight, positions in ((0.0, 2), (0.0, 8), (1.0, 8)):
        name = f"{weight:g}-{positions}"
        settings = joint_experiment(4, frames=FrameLossConfig(weight, positions))
        train(DATA, settings, folder / name, accelerator="cpu", progress=False)
        found[name] = folder / name
    return found


def test_without_weight_frames_change_nothing_for_actions_and_with_it_they_do(runs: dict[str, Path]) -> None:
    weights = {name: load_file(find_checkpoint(run) / "model.safetensors") for name, run in runs.items()}
    of_actions = [name for name in weights["0-2"] if not name.startswith("frame_head.")]
    assert all(torch.equal(weights["0-2"][name], weights["0-8"][name]) for name in of_actions)
    assert not torch.equal(weights["0-8"]["encoder.blocks.0.qkv.weight"], weights["1-8"]["encoder.blocks.0.qkv.weight"])
    names = {"train/loss", "train/frame_loss", "val/loss", "val/frame_loss", "val/chunk_rmse", "val/frame_rmse"}
    metrics = {name: read_checkpoint(run).metrics for name, run in runs.items()}
    assert names <= metrics["1-8"].keys()
    assert metrics["0-2"]["val/loss"] == metrics["0-8"]["val/loss"] != metrics["1-8"]["val/loss"]


def test_one_checkpoint_acts_imagines_chooses_and_is_surprised(runs: dict[str, Path]) -> None:
    policy, imagination = load_policy(runs["1-8"]), load_imagination(runs["1-8"], num_denoising_steps=1)
    seen = {"eye": DATA.arrays["eye"][:1], "last": DATA.arrays["last"][:1]}
    policy.reset(episodes=[0])
    alone = policy.act(seen)
    assert alone.shape == (1, 2)
    frames, actions = DATA.arrays["eye"][None, :4], DATA.arrays["action"][None, :9]
    assert imagination.imagine(frames, actions).shape == (1, 6, 16, 16, 1)
    chooser = ChoosingPolicy(load_policy(runs["1-8"]), imagination, lambda frames, chunks: np.zeros(len(frames)), 3)
    chooser.reset(episodes=[0])
    np.testing.assert_allclose(chooser.act(seen), alone, atol=1e-5)
    watch = Surprise(imagination)
    watch.reset(episodes=[0])
    watch.observe(frames[:, 0])
    watch.observe(frames[:, 1], actions[:, 0])
    assert watch.predicted is not None


def test_the_verbs_for_frames_take_it(runs: dict[str, Path], tmp_path: Path, capsys) -> None:
    store = tmp_path / "square.zarr"
    write_zarr(DATA, store)
    out = ["--dataset", str(store), "--episode", "1", "--out"]
    assert main(["imagine", str(runs["1-8"]), *out, str(tmp_path / "imagined"), "--context", "8"]) == 0
    assert json.loads((tmp_path / "imagined" / "frames.json").read_text())["settings"]["sampler"]["solver"] == "euler"
    assert main(["surprise", str(runs["1-8"]), *out, str(tmp_path / "surprise")]) == 0
    capsys.readouterr()
    assert main(["info", str(runs["1-8"])]) == 0
    shown = capsys.readouterr().out
    assert "plan         chunk of 4" in shown
    assert "frames       of eye, patches of 4 pixels" in shown


def test_a_policy_without_frames_imagines_none(tmp_path: Path) -> None:
    settings = replace(joint_experiment(2), model=joint_config(frames=FrameConfig()))
    train(DATA, settings, tmp_path / "run", accelerator="cpu", progress=False)
    with pytest.raises(CheckpointError, match=r"holds a policy \(scd\).* scd train image_frames"):
        load_imagination(tmp_path / "run")


def test_fine_tuning_gives_a_policy_frames_and_takes_them_away(runs: dict[str, Path], tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO", "scd_robot.training.module")
    alone, still = joint_config(frames=FrameConfig()), {"learning_rate": 1e-12}
    train(DATA, joint_experiment(2, alone), tmp_path / "alone", accelerator="cpu", progress=False)

    def tuned(source: Path, model: ScdConfig, name: str, **changes: Any) -> dict[str, torch.Tensor]:
        settings = joint_experiment(2, model, **{**still, **changes})
        fine = {"init": source, "init_statistics": "checkpoint"}
        train(DATA, settings, tmp_path / name, **fine, accelerator="cpu", progress=False)
        return read_checkpoint(tmp_path / name).weights

    def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-4)

    policy = read_checkpoint(tmp_path / "alone").weights
    torch.manual_seed(0)
    head = {name: w for name, w in build_model(joint_config()).state_dict().items() if name.startswith("frame_head.")}
    assert_close(tuned(tmp_path / "alone", joint_config(), "given"), {**policy, **head})
    taken = len([name for name in policy if name.startswith("encoder.blocks.")])
    assert f"encoder.blocks ({taken}), " in caplog.text
    assert re.search(r"taken: .*; new, as initialised: frame_head\.action \(2\), frame_head\.decoder", caplog.text)
    assert "left out" not in caplog.text

    both = read_checkpoint(runs["1-8"]).weights
    kept = {name: w for name, w in both.items() if not name.startswith("frame_head.")}
    caplog.clear()
    assert_close(tuned(runs["1-8"], alone, "taken"), kept)
    assert re.search(r"left out: frame_head\.action \(2\), frame_head\.decoder \(\d+\)", caplog.text)
    assert "new, as" not in caplog.text

    with pytest.raises(ShapeError, match=r"another architecture \(width: 32 there, 16 here\)"):
        tuned(tmp_path / "alone", joint_config(width=16), "x")
    other = FrameConfig("eye", patch_size=8, beside_actions=True, decoder_layers=1)
    with pytest.raises(ShapeError, match=r"frames\.patch_size: 4 there, 8 here"):
        tuned(runs["1-8"], joint_config(frames=other), "x")


def test_a_checkpoint_that_lost_weights_begins_no_others_in_their_place(runs: dict[str, Path], tmp_path: Path) -> None:
    source = read_checkpoint(runs["1-8"])
    weights = {name: w for name, w in source.weights.items() if not name.startswith("frame_head.action.")}
    module = ScdLightningModule(joint_experiment(2), source.normalizer)
    with pytest.raises(CheckpointError, match=r"Missing key.*frame_head\.action\.weight.*frame_head\.action\.bias"):
        module.load_weights(replace(source, weights=weights))


def test_a_policy_learns_few_steps_and_its_frames_still_flow(tmp_path: Path) -> None:
    """The objective, and a sampler that no frames can be denoised with, are of actions alone."""
    settings = joint_experiment(2).with_objective("mip")
    train(DATA, settings, tmp_path / "run", accelerator="cpu", progress=False)
    imagined = load_imagination(tmp_path / "run").imagine(DATA.arrays["eye"][None, :2], DATA.arrays["action"][None, :3])
    assert imagined.shape == (1, 2, 16, 16, 1)


def test_settings_that_have_no_meaning_for_frames_are_refused() -> None:
    with pytest.raises(ConfigError, match="segment_length must be at least 2, got 1"):
        joint_experiment(segment_length=1)
    relative = TransformConfig(chunk="relative", chunk_parts=(ChunkPart(0, "last", 0, 2),))
    with pytest.raises(ConfigError, match=r"transforms\.chunk must be 'absolute', got 'relative'"):
        replace(joint_experiment(), transforms=relative)
    with pytest.raises(ConfigError, match=r"frames\.loss_weight must not be negative, got -1"):
        FrameLossConfig(loss_weight=-1)
    with pytest.raises(ConfigError, match=r"frames\.positions_per_segment must be at least 1, got 0"):
        FrameLossConfig(positions_per_segment=0)
