"""Training on a pretrained backbone: frozen or fine-tuned, kept whole in checkpoints, which need no file of weights."""

import shutil
from dataclasses import replace
from pathlib import Path

import fake_timm
import numpy as np
import pytest
import torch
from fake_timm import FakeTimm, pretrained_network
from pictures import MODEL, SHAPES, picture_data
from safetensors.torch import load_file, save_file
from tiny import interrupted, tiny_experiment

from scd_robot.checkpoint import find_checkpoint, read_checkpoint
from scd_robot.datasets import PRESENT
from scd_robot.errors import CheckpointError, ConfigError, MissingDependencyError, OutputError
from scd_robot.nn import Backbone, ImageConfig
from scd_robot.policies import load_policy
from scd_robot.presets import resolve, with_settings
from scd_robot.training import ExperimentConfig, train
from scd_robot.training.augmentation import AugmentationConfig
from scd_robot.training.batches import SegmentDataset
from scd_robot.training.feature_cache import with_cached_features
from scd_robot.training.module import ScdLightningModule
from scd_robot.training.objective import encode_batch, loss_terms
from scd_robot.training.start import fit_normalizer

OPTIONS = {"accelerator": "cpu", "progress": False}
SHAPES_OF_EYE = {"eye": SHAPES["eye"]}
BACKBONE = "tokenizer.backbone."


@pytest.fixture(autouse=True)
def timm(monkeypatch: pytest.MonkeyPatch) -> FakeTimm:
    return fake_timm.install(monkeypatch)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file(pretrained_network("conv.a").state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def experiment(weights: Path | str, steps: int = 4, frozen: bool = True, **training: object) -> ExperimentConfig:
    images = ImageConfig("pretrained", backbone="conv.a", weights=str(weights), frozen=frozen)
    return tiny_experiment(steps, model={**MODEL, "images": images}, **{"validate_every": 2, **training})


def stored(run: Path) -> dict[str, torch.Tensor]:
    """The network in a run's newest checkpoint, by timm's names."""
    state = load_file(find_checkpoint(run) / "model.safetensors")
    prefix = BACKBONE + "network."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def actions(run: Path) -> np.ndarray:
    policy, data = load_policy(run), picture_data()
    policy.reset(episodes=[0, 1, 2])
    return np.stack([policy.act({key: data.arrays[key][3 * i : 3 * i + 3] for key in SHAPES}) for i in range(5)])


def test_a_frozen_backbone_is_stored_once_as_it_came_and_all_else_learns(weights: Path, tmp_path: Path) -> None:
    train(picture_data(), experiment(weights), tmp_path / "run", **OPTIONS)
    given, found = load_file(weights), stored(tmp_path / "run")
    assert found.keys() == {name for name in given if not name.startswith("fc.")}
    assert all(torch.equal(value, given[name]) for name, value in found.items())
    state = torch.load(find_checkpoint(tmp_path / "run") / "resume" / "training_state.ckpt", weights_only=True)
    names = {name for name in state["state_dict"] if "network.conv1" in name}
    assert names == {f"model.{BACKBONE}network.conv1.{name}" for name in ("weight", "bias")}
    network = ScdLightningModule(experiment(weights), fit_normalizer(picture_data(), experiment(weights)))
    trained = {p for group in network.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
    others = {p for name, p in network.model.named_parameters() if not name.startswith(BACKBONE)}
    assert trained == others


@pytest.mark.parametrize("frozen", [True, False])
def test_checkpoints_act_resume_and_are_gone_on_from_without_the_file(
    frozen: bool, weights: Path, tmp_path: Path, timm
):
    settings = experiment(weights, frozen=frozen, ema_decay=0.5)
    train(picture_data(), settings, tmp_path / "whole", **OPTIONS)
    with interrupted():
        train(picture_data(), settings, tmp_path / "parts", **OPTIONS)
    weights.unlink()
    timm.asked.clear()
    train(picture_data(), settings, tmp_path / "parts", resume=True, **OPTIONS)
    np.testing.assert_array_equal(actions(tmp_path / "parts"), actions(tmp_path / "whole"))
    origins = [read_checkpoint(tmp_path / name).origin["backbone"] for name in ("whole", "parts")]
    assert origins[0] == origins[1]
    assert origins[0]["weights"] == str(weights)
    more = replace(settings, model=replace(settings.model, images=replace(settings.model.images, frozen=False)))
    more = replace(more, training=replace(more.training, max_steps=2))
    train(picture_data(), more, tmp_path / "more", init=tmp_path / "whole", init_statistics="checkpoint", **OPTIONS)
    assert read_checkpoint(tmp_path / "more").origin["backbone"] == origins[0]
    assert not torch.equal(stored(tmp_path / "more")["conv2.weight"], stored(tmp_path / "whole")["conv2.weight"])
    assert not any(asked["pretrained"] for asked in timm.asked)


def test_fine_tuning_changes_the_weights_and_no_statistics(weights: Path, tmp_path: Path) -> None:
    train(picture_data(), experiment(weights, frozen=False, ema_decay=0.5), tmp_path / "run", **OPTIONS)
    given, found = load_file(weights), stored(tmp_path / "run")
    changed = {name for name, value in found.items() if not torch.equal(value, given[name])}
    assert changed == {f"{part}.{name}" for part in ("conv1", "bn1", "conv2", "bn2") for name in ("weight", "bias")}


def test_a_backbone_that_is_fine_tuned_has_a_learning_rate_of_its_own(weights: Path) -> None:
    settings = experiment(weights, frozen=False, learning_rate=1.0, backbone_learning_rate_factor=0.25, warmup_steps=0)
    module = ScdLightningModule(settings, fit_normalizer(picture_data(), settings))
    rates = {
        p: group["lr"] for group in module.configure_optimizers()["optimizer"].param_groups for p in group["params"]
    }
    for name, parameter in module.model.named_parameters():
        wanted = 0.25 if name.startswith(BACKBONE) else 2.0 if name.startswith("decoder.") else 1.0
        assert rates[parameter] == wanted, name


def test_absent_pictures_are_not_shown_to_the_backbone(weights: Path) -> None:
    settings, data, seen = experiment(weights), picture_data(), []
    module = ScdLightningModule(settings, fit_normalizer(data, settings))
    module.model.tokenizer.backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    batch = SegmentDataset(data, settings, np.arange(data.num_episodes))[0]
    loss_terms(module.model, module.normalizer, batch)
    assert seen == 2 * [int(batch.segments.step_valid.sum())]


class TestCachedFeatures:
    """What a frozen backbone makes of pictures is computed once, and trained on as if it were not."""

    @pytest.fixture
    def encoded(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Numbers of pictures that backbones are shown while data is prepared or trained on."""
        counts: list[int] = []
        forward = Backbone.forward

        def count(self, images):
            counts.append(len(images))
            return forward(self, images)

        monkeypatch.setattr(Backbone, "forward", count)
        return counts

    def settings(self, weights: Path, cache: bool = True, **training: object) -> ExperimentConfig:
        still = AugmentationConfig(0, 0, 0, 0)
        return experiment(weights, augmentation=still, cache_features=cache, **training)

    @pytest.mark.parametrize("in_memory_gb", [0.0, 1.0])
    def test_each_picture_is_encoded_once_and_a_run_learns_as_without(
        self, in_memory_gb: float, weights: Path, tmp_path: Path, encoded: list[int]
    ) -> None:
        data = picture_data()
        train(data, self.settings(weights, images_in_memory_gb=in_memory_gb), tmp_path / "cached", **OPTIONS)
        tries = 2  # one picture of each camera when the network is built
        assert sum(encoded) == 2 * data.num_steps + tries
        train(data, self.settings(weights, cache=False), tmp_path / "plain", **OPTIONS)
        cached, plain = (read_checkpoint(tmp_path / name).metrics for name in ("cached", "plain"))
        assert cached["val/loss"] == pytest.approx(plain["val/loss"], rel=1e-2)
        np.testing.assert_allclose(actions(tmp_path / "cached"), actions(tmp_path / "plain"), rtol=0, atol=5e-2)

    @pytest.mark.parametrize("stride", [1, 2])
    def test_what_is_learned_from_is_the_same_but_for_rounding(
        self, stride: int, weights: Path, tmp_path: Path
    ) -> None:
        data, settings = picture_data(), self.settings(weights)
        data.arrays[PRESENT + "eye"] = np.arange(data.num_steps) % 4 > 0
        settings = replace(settings, model=replace(settings.model, history_stride=stride))
        module = ScdLightningModule(settings, fit_normalizer(data, settings))
        module.load_pretrained()
        kept = with_cached_features(
            data, module.model.tokenizer.backbone, tmp_path / "f", "", most_gb=0, progress=False
        )
        batches = [SegmentDataset(d, settings, np.arange(d.num_episodes))[3] for d in (data, kept)]
        assert [batch.segments.observation["eye"].dtype for batch in batches] == [torch.uint8, torch.float16]
        contexts = [encode_batch(module.model, module.normalizer, batch) for batch in batches]
        torch.testing.assert_close(contexts[1], contexts[0], rtol=0, atol=5e-3)

    def test_a_resumed_run_finds_them_and_other_weights_or_data_do_not(
        self, weights: Path, tmp_path: Path, encoded: list[int]
    ) -> None:
        data, out = picture_data(), tmp_path / "run"
        train(data, self.settings(weights), out, **OPTIONS)
        for name in ("wrist", "eye"):
            assert np.load(out / "features" / f"{name}.npy").dtype == np.float16
        shutil.rmtree(find_checkpoint(out))  # the run was interrupted before
        encoded.clear()
        train(data, self.settings(weights), out, resume=True, **OPTIONS)
        assert sum(encoded) == 2
        file, backbone = out / "features", Backbone(experiment(weights).model.images, SHAPES_OF_EYE)
        backbone.load_pretrained(str(weights))
        options = {"most_gb": 1.0, "progress": False}
        fingerprint = read_checkpoint(out).origin["dataset"]
        encoded.clear()
        with_cached_features(data, backbone, file, fingerprint, **options)
        assert not encoded
        for change in ("data", "weights"):
            if change == "weights":
                backbone.network.conv2.bias.data += 1
            encoded.clear()
            changed = with_cached_features(data, backbone, file, "other", **options)
            assert sum(encoded) == data.num_steps
            wanted = backbone(torch.from_numpy(data.arrays["eye"])).detach().half().numpy()
            np.testing.assert_allclose(changed.arrays["eye"], wanted, rtol=0, atol=1e-2)

    def test_a_run_that_is_killed_meanwhile_leaves_nothing_that_counts(self, weights: Path, tmp_path: Path) -> None:
        def fail(self, images):
            if len(images) > 1:
                raise KeyboardInterrupt
            return torch.zeros(1, 4, 6, 8)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Backbone, "forward", fail)
            with pytest.raises(KeyboardInterrupt):
                train(picture_data(), self.settings(weights), tmp_path / "run", **OPTIONS)
        assert list((tmp_path / "run" / "features").iterdir()) == []

    def test_features_of_other_data_do_not_pass_for_the_first_ones(
        self, weights: Path, tmp_path: Path, encoded, monkeypatch
    ) -> None:
        data, backbone = picture_data(), Backbone(experiment(weights).model.images, SHAPES_OF_EYE)
        backbone.load_pretrained(str(weights))
        options = {"most_gb": 1.0, "progress": False}
        with_cached_features(data, backbone, tmp_path, "first", **options)
        replace_file = Path.replace

        def killed(self, target):
            if Path(target).suffix == ".json":
                raise KeyboardInterrupt
            return replace_file(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                with_cached_features(data, backbone, tmp_path, "second", **options)
        encoded.clear()
        with_cached_features(data, backbone, tmp_path, "first", **options)
        assert sum(encoded) == data.num_steps, "the file holds what was made for the second"

    def test_what_cannot_be_kept_is_refused(self, weights: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"cache_features and augmentation exclude each other.*brightness"):
            experiment(weights, cache_features=True)
        with pytest.raises(ConfigError, match=r"model\.images\.frozen=true, got 'pretrained' and false"):
            experiment(weights, frozen=False, cache_features=True)
        state = load_file(weights)
        save_file({**state, "bn2.weight": 1e6 + state["bn2.weight"]}, weights)
        with pytest.raises(ConfigError, match="do not fit float16"):
            train(picture_data(), self.settings(weights), tmp_path / "run", **OPTIONS)
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot write features to"):
            with_cached_features(
                picture_data(), Backbone(experiment("").model.images, SHAPES_OF_EYE), tmp_path / "file", "", most_gb=0.0
            )


@pytest.mark.parametrize(
    ("source", "error", "told"),
    [
        ("", ConfigError, "conv.a has no weights to begin with: set model.images.weights to a file or folder, or to"),
        ("nowhere.safetensors", CheckpointError, "there are no weights at nowhere.safetensors"),
        ("hub", CheckpointError, "could not be had from the hub: no connection"),
    ],
)
def test_a_training_begins_with_pretrained_weights_or_not_at_all(source: str, error, told: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=told):
        train(picture_data(), experiment(source), tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_without_timm_training_and_loading_say_what_to_install(weights: Path, tmp_path: Path, monkeypatch) -> None:
    train(picture_data(), experiment(weights, 2), tmp_path / "run", **OPTIONS)
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    for act in (
        lambda: load_policy(tmp_path / "run"),
        lambda: train(picture_data(), experiment(weights, 2), tmp_path / "other", **OPTIONS),
    ):
        with pytest.raises(MissingDependencyError, match=r"scd_robot\[vision\]"):
            act()


def test_the_image_preset_takes_a_backbone() -> None:
    settings = ["encoder=pretrained", "backbone=vit", "weights=hub", "frozen=false"]
    found = with_settings(resolve("image", picture_data().spec), [f"model.images.{text}" for text in settings])
    assert found.model.images.backbone == "vit"
    assert not found.model.images.frozen
