"""Autoencoders of pictures: trained, kept, and part of models of frames, which leave them as they are."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from frame_models import (
    ARCHITECTURES,
    SHAPE,
    frame_config,
    frame_experiment,
    joint_experiment,
    moving_square,
    pushed_square,
)

from scd_robot.checkpoint import read_checkpoint
from scd_robot.datasets import PRESENT, EpisodeDataset
from scd_robot.errors import CheckpointError, ConfigError, DatasetError, ShapeError, UnknownNameError
from scd_robot.model import FrameConfig, build_model
from scd_robot.nn import Autoencoder, AutoencoderConfig
from scd_robot.policies import Surprise, load_imagination, load_policy
from scd_robot.training import EpisodeDataModule, ExperimentConfig, ScdLightningModule, train
from scd_robot.training.autoencoder import AutoencoderTraining, camera_of, train_autoencoder
from scd_robot.training.autoencoder_file import read_autoencoder, write_autoencoder
from scd_robot.training.batches import SegmentDataset
from scd_robot.training.objective import losses, sampled_errors, select_samples
from scd_robot.training.start import fit_normalizer
from scd_robot.types import ArraySpec

DATA = moving_square(6, steps=20)
CONFIG = AutoencoderConfig((8, 16), 3)
SHORT = AutoencoderTraining(updates=200, batch_size=16, learning_rate=1e-2, held_out=0.2)
QUIET: dict[str, Any] = {"accelerator": "cpu", "progress": False}


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return train_autoencoder(DATA, "eye", CONFIG, SHORT, progress=False)


@pytest.fixture(scope="module")
def folder(autoencoder: Autoencoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("autoencoder") / "ae"
    write_autoencoder(autoencoder, "eye", SHAPE, path, {"held_out": None})
    return path


def latent_experiment(max_steps: int = 4, architecture: str = "separable", **training: Any) -> ExperimentConfig:
    return frame_experiment(max_steps, architecture, **training).with_autoencoder(CONFIG)


def changed(path: Path, folder: Path, **fields: Any) -> Path:
    """A copy of an autoencoder's folder, with other fields in its JSON."""
    path.mkdir()
    (path / "autoencoder.safetensors").write_bytes((folder / "autoencoder.safetensors").read_bytes())
    document = json.loads((folder / "autoencoder.json").read_text())
    (path / "autoencoder.json").write_text(json.dumps({**document, **fields}))
    return path


def test_a_few_updates_keep_far_more_than_the_mean_picture_and_normalise_latents(autoencoder: Autoencoder) -> None:
    held_out = SHORT.split(DATA)[1]
    pictures = torch.from_numpy(np.concatenate([DATA.episode(int(number))["eye"] for number in held_out]))
    with torch.no_grad():
        latents = autoencoder.encode(torch.from_numpy(DATA.arrays["eye"]))
        decoded = autoencoder.decode(autoencoder.encode(pictures))
    error = (decoded.float() - pictures).square().mean()
    guess = (pictures.float().mean(dim=0) - pictures).square().mean()
    assert error < 0.3 * guess
    assert latents.mean(dim=(0, 1, 2)).abs().max() < 0.1
    assert (latents.std(dim=(0, 1, 2)) - 1).abs().max() < 0.1
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())


def test_it_is_a_function_of_the_seed_and_of_training_episodes_alone() -> None:
    training = replace(SHORT, updates=2)
    spoiled = DATA.arrays["eye"].copy()
    for number in training.split(DATA)[1]:
        rows = DATA.rows(int(number))
        spoiled[rows.start : rows.stop] = 255
    one, two, other = (
        train_autoencoder(data, "eye", CONFIG, settings, progress=False).state_dict()
        for data, settings in (
            (DATA, training),
            (replace(DATA, arrays={**DATA.arrays, "eye": spoiled}), training),
            (DATA, replace(training, seed=1)),
        )
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["encoder.1.weight"], other["encoder.1.weight"])
    module = EpisodeDataModule(DATA, frame_experiment(held_out=0.2))
    assert training.split(DATA)[1].tolist() == module.held_out_episodes.tolist()


def test_pictures_that_are_not_there_are_not_learned_and_many_are_thinned_out() -> None:
    there = np.zeros(DATA.num_steps, np.float32)
    with pytest.raises(DatasetError, match="hold no pictures 'eye'"):
        train_autoencoder(
            replace(DATA, arrays={**DATA.arrays, PRESENT + "eye": there}), "eye", CONFIG, SHORT, progress=False
        )
    few = replace(SHORT, updates=1, images_in_memory_gb=5 * 256 / 1e9)  # five pictures
    train_autoencoder(DATA, "eye", CONFIG, few, progress=False)


@pytest.mark.parametrize(
    ("observation", "camera", "error", "told"),
    [
        ({"eye": (16, 16, 1)}, "nose", UnknownNameError, "unknown camera 'nose'; valid names: eye"),
        ({"eye": (16, 16, 1), "wrist": (8, 8, 1)}, None, DatasetError, "has eye, wrist: choose one with --camera"),
        ({"state": (3,)}, None, DatasetError, "the dataset has none"),
    ],
)
def test_one_camera_is_chosen(observation: dict, camera: str | None, error: type, told: str) -> None:
    spec = replace(DATA.spec, observation={key: ArraySpec(shape, "uint8") for key, shape in observation.items()})
    with pytest.raises(error, match=told):
        camera_of(EpisodeDataset(spec, DATA.episode_ends, {}), camera)


def test_settings_out_of_range_are_refused() -> None:
    for wrong in (
        {"updates": 0},
        {"learning_rate": 0.0},
        {"images_in_memory_gb": 0.0},
        {"noise": -0.1},
        {"held_out": 1.0},
    ):
        with pytest.raises(ConfigError, match="must"):
            AutoencoderTraining(**wrong)
    with pytest.raises(ConfigError, match="multiples of 32, 'eye' has 16 x 16: resize"):
        train_autoencoder(DATA, "eye", AutoencoderConfig((8,) * 5, 2), SHORT, progress=False)


def test_what_is_written_is_read_again(autoencoder: Autoencoder, folder: Path) -> None:
    saved = read_autoencoder(folder)
    again, pictures = saved.model(), torch.from_numpy(DATA.arrays["eye"][:3])
    assert (saved.camera, saved.shape, saved.config) == ("eye", SHAPE, CONFIG)
    assert torch.equal(again.encode(pictures), autoencoder.encode(pictures))
    assert not list(folder.glob("*.part"))


def test_folders_that_hold_none_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no autoencoder at .*nowhere .*train one with: scd train-autoencoder"):
        read_autoencoder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has schema 2, this version of scd_robot reads 1"):
        read_autoencoder(changed(tmp_path / "later", folder, schema=2))
    with pytest.raises(CheckpointError, match="not of an scd_robot autoencoder"):
        read_autoencoder(changed(tmp_path / "foreign", folder, format="another"))
    with pytest.raises(CheckpointError, match=r"damaged or foreign: .*latent_channels"):
        read_autoencoder(changed(tmp_path / "less", folder, config={"channels": [8, 16]}))
    other = changed(tmp_path / "other", folder, config={"channels": [8, 16], "latent_channels": 4})
    with pytest.raises(CheckpointError, match="do not fit its"):
        read_autoencoder(other).model()
    with (changed(tmp_path / "cut", folder) / "autoencoder.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="is not the file that was written"):
        read_autoencoder(tmp_path / "cut")
    (tmp_path / "cut" / "autoencoder.safetensors").unlink()
    with pytest.raises(CheckpointError, match="damaged or foreign"):
        read_autoencoder(tmp_path / "cut")


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"frames": FrameConfig()}, ConfigError, "for models that imagine frames"),
        (
            {"observation_shapes": {"nose": SHAPE}, "frames": FrameConfig("nose", 4, autoencoder=CONFIG)},
            ConfigError,
            "trained on pictures 'eye', the model imagines 'nose': train one on those, .* --camera nose",
        ),
        ({"observation_shapes": {"eye": (16, 32, 1)}}, ShapeError, r"of \(16, 16, 1\), the model's are \(16, 32, 1\)"),
        ({"observation_shapes": {"eye": (16, 16, 3)}}, ShapeError, r"the model's are \(16, 16, 3\): train one with"),
        (
            {"frames": FrameConfig("eye", 4, autoencoder=AutoencoderConfig((8, 16), 4))},
            ConfigError,
            "leave that setting out, it comes with --autoencoder",
        ),
    ],
)
def test_models_of_other_pictures_are_refused(folder: Path, changes: dict, error: type, told: str) -> None:
    defaults = {"frames": FrameConfig("eye", 4, autoencoder=CONFIG), "num_context_tokens": 1}
    with pytest.raises(error, match=told):
        read_autoencoder(folder).check_fits(frame_config(**{**defaults, **changes}))


def test_a_model_without_its_autoencoder_is_not_trained(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"denoises latents: train an autoencoder .* --camera eye, and name .*"):
        train(DATA, latent_experiment(2), tmp_path / "run", **QUIET)
    with pytest.raises(ConfigError, match=r"model\.frames\.autoencoder is None; leave that setting out"):
        train(DATA, frame_experiment(2), tmp_path / "run", autoencoder=folder, **QUIET)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_each_drawn_picture_is_encoded_once_and_latents_are_what_is_denoised(autoencoder: Autoencoder) -> None:
    settings = latent_experiment(noise_draws=3)
    model, normalizer = build_model(settings.model), fit_normalizer(DATA, settings)
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    batch = SegmentDataset(DATA, settings, np.arange(DATA.num_episodes))[1]
    encode, encoded = model.autoencoder.encode, []
    model.autoencoder.encode = lambda pictures: (encoded.append(len(pictures)), encode(pictures))[1]
    samples = select_samples(model, normalizer, batch)
    losses(model, samples, batch.draws, "flow_matching")["loss"][0].backward()
    sampled_errors(model, samples, batch.draws, settings.policy.sampler)
    assert encoded == [4 * 8, 4 * 8]
    assert samples.data.shape == samples.known.shape == (4 * 8 * 3, 16, 3)
    places = samples.known[::3].unflatten(1, (4, 4))
    row = SegmentDataset(DATA, settings, np.arange(6))._index.batch(1, range(4), 4).start[0]
    first = encode(torch.from_numpy(DATA.arrays["eye"][row + int(batch.draws.position[0, 0])][None]))
    torch.testing.assert_close(places[:1], first)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_leaves_it_as_it_is_and_its_weights_are_in_the_checkpoint(
    architecture: str, folder: Path, tmp_path: Path
) -> None:
    settings, saved = latent_experiment(4, architecture), read_autoencoder(folder)
    train(DATA, settings, tmp_path / "run", autoencoder=folder, **QUIET)
    whole = read_checkpoint(tmp_path / "run")
    held = {
        name.removeprefix("autoencoder."): w for name, w in whole.weights.items() if name.startswith("autoencoder.")
    }
    assert held.keys() == saved.weights.keys()
    assert all(torch.equal(held[name], value) for name, value in saved.weights.items())
    assert whole.origin["autoencoder"] == {"weights_sha256": saved.sha256}
    assert {"val/loss", "val/frame_rmse", "val/repeated_frame_rmse"} <= whole.metrics.keys()

    (tmp_path / "run" / "checkpoints" / "step_00000004").rename(tmp_path / "whole")
    with pytest.raises(ConfigError, match="name its folder with --autoencoder"):
        train(DATA, settings, tmp_path / "run", resume=True, **QUIET)
    train(DATA, settings, tmp_path / "run", resume=True, autoencoder=folder, **QUIET)
    again = read_checkpoint(tmp_path / "run")
    assert all(torch.equal(again.weights[name], value) for name, value in whole.weights.items())

    imagination = load_imagination(tmp_path / "run", num_denoising_steps=1)
    imagined = imagination.imagine(DATA.arrays["eye"][None, :4], DATA.arrays["action"][None, :9])
    assert imagined.shape == (1, 6, *SHAPE)
    watch = Surprise(imagination)
    watch.observe(DATA.arrays["eye"][None, 0])
    watch.observe(DATA.arrays["eye"][None, 1], DATA.arrays["action"][None, 0])
    assert watch.errors["everywhere"].shape == (1, 4, 4)

    init = {"init": tmp_path / "run", "init_statistics": "checkpoint"}
    with pytest.raises(ConfigError, match="brings its autoencoder with it; leave --autoencoder out"):
        train(DATA, latent_experiment(2, architecture), tmp_path / "tuned", autoencoder=folder, **init, **QUIET)
    train(DATA, latent_experiment(2, architecture), tmp_path / "tuned", **init, **QUIET)
    tuned = read_checkpoint(tmp_path / "tuned").weights
    assert all(torch.equal(tuned[f"autoencoder.{name}"], value) for name, value in saved.weights.items())


@pytest.mark.parametrize("trained", ["all", "decoder"])
def test_the_optimiser_does_not_know_it(trained: Any) -> None:
    for settings, part in (
        (latent_experiment(trained=trained), ""),
        (joint_experiment(trained=trained), "frame_head."),
    ):
        experiment = settings.with_autoencoder(CONFIG)
        module = ScdLightningModule(experiment, fit_normalizer(pushed_square(6, steps=20), experiment))
        frozen = [p for name, p in module.model.named_parameters() if name.startswith(f"{part}autoencoder.")]
        assert frozen
        assert not any(p.requires_grad for p in frozen)
        groups = module.configure_optimizers()["optimizer"].param_groups
        learned = {id(p) for group in groups for p in group["params"]}
        assert not learned & {id(p) for p in frozen}
        assert learned == {id(p) for p in module.model.parameters() if p.requires_grad}


def test_a_policy_that_imagines_may_have_one(folder: Path, tmp_path: Path) -> None:
    data, settings = pushed_square(6, steps=20), joint_experiment(2).with_autoencoder(CONFIG)
    train(data, settings, tmp_path / "run", autoencoder=folder, **QUIET)
    saved, weights = read_autoencoder(folder), read_checkpoint(tmp_path / "run").weights
    assert all(torch.equal(weights[f"frame_head.autoencoder.{name}"], value) for name, value in saved.weights.items())
    policy, imagination = load_policy(tmp_path / "run"), load_imagination(tmp_path / "run")
    policy.reset(episodes=[0])
    assert policy.act({key: data.arrays[key][:1] for key in ("eye", "last")}).shape == (1, 2)
    assert imagination.imagine(data.arrays["eye"][None, :2], data.arrays["action"][None, :4]).shape == (1, 3, *SHAPE)
    pictures = torch.from_numpy(data.arrays["eye"][:2])
    torch.testing.assert_close(
        imagination.model.known(pictures).unflatten(1, (4, 4)), saved.model().encode(pictures), rtol=0, atol=0
    )


def test_a_policy_that_gets_frames_by_fine_tuning_gets_its_autoencoder_too(folder: Path, tmp_path: Path) -> None:
    data, settings = pushed_square(6, steps=20), joint_experiment(2).with_autoencoder(CONFIG)
    alone = replace(settings, model=replace(settings.model, frames=FrameConfig()))
    train(data, alone, tmp_path / "alone", **QUIET)
    init = {"init": tmp_path / "alone", "init_statistics": "checkpoint"}
    with pytest.raises(ConfigError, match="name its folder with --autoencoder"):
        train(data, settings, tmp_path / "both", **init, **QUIET)
    train(data, settings, tmp_path / "both", autoencoder=folder, **init, **QUIET)
    weights = read_checkpoint(tmp_path / "both").weights
    for name, value in read_autoencoder(folder).weights.items():
        assert torch.equal(weights[f"frame_head.autoencoder.{name}"], value)
