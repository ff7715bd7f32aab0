"""Presets fit any dataset of their kind, and settings replace their fields strictly."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from scd_robot.cli.main import main
from scd_robot.config import from_json, to_json
from scd_robot.errors import ConfigError, DatasetError, UnknownNameError
from scd_robot.model import FrameConfig
from scd_robot.nn import AutoencoderConfig
from scd_robot.presets import PRESETS, resolve, with_settings
from scd_robot.training import ExperimentConfig
from scd_robot.transforms import TransformConfig
from scd_robot.types import ArraySpec, DatasetSpec

SPEC = DatasetSpec({"proprio": ArraySpec((4,)), "camera": ArraySpec((8, 8, 3), "uint8")}, 3, 0.1)


PUSHT = DatasetSpec(
    {"state": ArraySpec((5,)), "keypoint": ArraySpec((9, 2)), "img": SPEC.observation["camera"]}, 3, 0.1
)
CAMERA = DatasetSpec({"proprio": ArraySpec((4,)), "camera": ArraySpec((64, 64, 3), "uint8")}, 3, 0.1)
FITTING = {  # by preset a dataset, and the model's observations
    "frames_64": (CAMERA, {"camera": (64, 64, 3)}),
    "frames_latent": (
        DatasetSpec({"proprio": ArraySpec((4,)), "camera": ArraySpec((96, 128, 3), "uint8")}, 3, 0.1),
        {"camera": (96, 128, 3)},
    ),
    "image": (SPEC, {"proprio": (4,), "camera": (8, 8, 3)}),
    "image_frames": (CAMERA, {"proprio": (4,), "camera": (64, 64, 3)}),
    "memory_state": (SPEC, {"proprio": (4,)}),
    "metaworld_state": (SPEC, {"proprio": (4,)}),
    "pusht_state": (PUSHT, {"state": (5,), "keypoint": (18,)}),
}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_preset_takes_its_widths_from_the_dataset_and_survives_json(name: str) -> None:
    dataset, shapes = FITTING[name]
    experiment = resolve(name, dataset)
    assert experiment.preset == name
    assert experiment.model.action_dim == 3
    assert experiment.model.observation_shapes == shapes
    assert from_json(ExperimentConfig, json.loads(json.dumps(to_json(experiment)))) == experiment


def test_presets_are_listed_where_a_user_looks(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    assert main(["train", "--help"]) == 0
    told = capsys.readouterr().out
    for name, (dataset, _) in FITTING.items():
        [row] = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        experiment = resolve(name, dataset)
        assert row.endswith(f"| {experiment.training.max_steps:,} |")
        if name != "pusht_state":
            assert f" {experiment.model.history_length * experiment.model.history_stride} control steps" in row
        assert name in told


def test_state_preset_reads_vectors_only_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve("metaworld_state", SPEC).model.observation_shapes == {"proprio": (4,)}
    assert "camera are no vectors" in caplog.text
    assert "'flatten' in --transforms" in caplog.text
    with pytest.raises(DatasetError, match=r"needs vector observations, got \['camera'\]"):
        resolve("metaworld_state", DatasetSpec({"camera": SPEC.observation["camera"]}, 3, 0.1))


@pytest.mark.parametrize(
    ("observation", "told"),
    [
        ({"camera": SPEC.observation["camera"]}, r"of 64 x 64, 'camera' has 8 x 8: resize them with --transforms"),
        (
            {"camera": ArraySpec((64, 64, 3), "float32")},
            r"uint8 .*got camera float32 .*: record pictures so",
        ),
        (dict.fromkeys(("left", "right"), CAMERA.observation["camera"]), r"one camera.*left uint8.*: choose one with"),
        ({"proprio": ArraySpec((4,))}, r"one camera.*got proprio float32 \(4,\): record pictures so"),
    ],
)
def test_frames_preset_takes_one_camera_of_its_size(observation: dict, told: str) -> None:
    with pytest.raises(DatasetError, match=told):
        resolve("frames_64", DatasetSpec(observation, 3, 0.1))


def test_latent_preset_takes_pictures_of_many_sizes_with_about_as_many_tokens() -> None:
    def with_picture(*shape: int) -> DatasetSpec:
        return DatasetSpec({"camera": ArraySpec(shape, "uint8")}, 3, 0.1)

    for shape, seen, denoised in (
        ((64, 64, 3), 16, (16, 32)),
        ((96, 96, 1), 36, (36, 32)),
        ((128, 128, 3), 64, (64, 32)),
        ((240, 320, 3), 80, (300, 32)),
    ):
        model = resolve("frames_latent", with_picture(*shape)).model
        assert model.observation_shapes == {"camera": shape}
        assert model.images.num_tokens("camera", shape) == seen
        assert model.token_shape == denoised
        small = resolve("frames_64", with_picture(64, 64, shape[2])).model
        like = {"observation_shapes": small.observation_shapes, "images": small.images, "frames": small.frames}
        assert replace(model, **like) == small
    for size, told in (((100, 96), r"\[96, 96\]"), ((48, 48), r"\[64, 64\]")):
        with pytest.raises(
            DatasetError, match=rf"multiples of 16, 'camera' has {size[0]} x {size[1]}: resize .*{told}"
        ):
            resolve("frames_latent", with_picture(*size, 3))


def test_the_autoencoder_of_frames_is_no_single_setting() -> None:
    with pytest.raises(ConfigError, match=r"model\.frames\.autoencoder takes more than one value; .* --autoencoder"):
        with_settings(resolve("frames_64", CAMERA), ["model.frames.autoencoder=runs/ae"])
    latent = resolve("frames_latent", FITTING["frames_latent"][0])
    changed = with_settings(latent, ["model.frames.autoencoder.latent_channels=4"])
    assert changed.model.token_shape == (48, 16)
    larger = latent.with_autoencoder(AutoencoderConfig((8,) * 5, 6)).model
    assert larger.frames.patch_size == 32
    assert larger.token_shape == (12, 6)


def test_image_preset_takes_pictures_of_any_size(caplog: pytest.LogCaptureFixture) -> None:
    def with_pictures(**sizes: tuple[int, int]) -> DatasetSpec:
        cameras = {key: ArraySpec((*size, 3), "uint8") for key, size in sizes.items()}
        return DatasetSpec({**cameras, "points": ArraySpec((9, 2)), "depth": ArraySpec((8, 8, 1))}, 3, 0.1)

    for sizes, layers in (({"a": (96, 96)}, 3), ({"a": (64, 64), "b": (480, 640)}, 6), ({"a": (224, 224)}, 4)):
        model = resolve("image", with_pictures(**sizes)).model
        assert model.observation_shapes == {key: (*size, 3) for key, size in sizes.items()}
        assert len(model.images.channels) == layers
    assert "depth float32 (8, 8, 1), points float32 (9, 2): neither pictures" in caplog.text
    with pytest.raises(DatasetError, match=r"uint8 of 0 to 255, got front float32 \(96, 96, 3\): record pictures so"):
        resolve("image", DatasetSpec({"front": ArraySpec((96, 96, 3))}, 3, 0.1))


@pytest.mark.parametrize(("rate", "stride"), [(10, 1), (30, 1), (40, 2), (50, 2), (80, 4), (500, 8)])
def test_fast_robots_are_looked_at_20_times_a_second(rate: int, stride: int) -> None:
    experiment = resolve("image", replace(CAMERA, control_dt=1 / rate))
    assert experiment.model.history_stride == stride
    assert experiment.model.history_length * stride == 64
    assert resolve("image_frames", replace(CAMERA, control_dt=1 / rate)).model.history_stride == 1


def test_frames_beside_actions_need_to_be_told_which_of_several_cameras() -> None:
    two = DatasetSpec(dict.fromkeys(("left", "right"), CAMERA.observation["camera"]), 3, 0.1)
    with pytest.raises(DatasetError, match=r"one camera, got pictures left, right: name it, .*frames\.camera=KEY"):
        resolve("image_frames", two)
    settings = ["model.frames.beside_actions=true", "model.frames.camera=left"]
    chosen = with_settings(resolve("image", two), settings).model
    assert chosen.frames.beside_actions
    assert chosen.frames_alone.observation_shapes == {"left": (64, 64, 3)}
    alone = resolve("image_frames", CAMERA).model
    assert alone.frames.camera == "camera"
    assert replace(alone, frames=FrameConfig()) == resolve("image", CAMERA).model


def test_pusht_preset_names_what_it_misses() -> None:
    with pytest.raises(DatasetError, match=r"needs the observation 'state', got \['camera', 'proprio'\]"):
        resolve("pusht_state", SPEC)


def test_a_stored_experiment_has_its_own_transforms(tmp_path) -> None:
    with pytest.raises(ConfigError, match="transforms of its own; leave --transforms out"):
        resolve(str(tmp_path / "config.json"), SPEC, TransformConfig())


def test_given_transforms_change_what_a_preset_sees() -> None:
    experiment = resolve("metaworld_state", SPEC, TransformConfig(rename={"proprio": "joints"}))
    assert experiment.model.observation_shapes == {"joints": (4,)}
    assert experiment.transforms.rename == {"proprio": "joints"}


def test_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'metaworld_state'"):
        resolve("metaworld-state", SPEC)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("training.learning_rate=3e-4", 3e-4),
        ("training.learning_rate=1", 1.0),
        ("training.max_steps=7", 7),
        ("training.betas=0.8,0.99", (0.8, 0.99)),
        ("training.betas=[0.8, 0]", (0.8, 0.0)),
        ("model.fusion=concat", "concat"),
        ("model.memory_gate=True", True),
        ("model.images.channels=8,16", (8, 16)),
        ("training.augmentation.shift=0", 0.0),
        ("model.observation_shapes.proprio=9", (9,)),
        ("policy.sampler.num_denoising_steps=4", 4),
        ("transforms.goals=proprio,other", ("proprio", "other")),
    ],
)
def test_setting_becomes_a_value_of_the_field_s_type(setting: str, value: object) -> None:
    changed = with_settings(resolve("metaworld_state", SPEC), [setting])
    node: object = changed
    for name in setting.partition("=")[0].split("."):
        node = node[name] if isinstance(node, dict) else getattr(node, name)
    assert node == value
    assert type(node) is type(value)


def test_settings_change_nothing_else_and_the_last_one_counts() -> None:
    experiment = resolve("metaworld_state", SPEC)
    changed = with_settings(experiment, ["training.seed=1", "training.seed=2"])
    expected = to_json(experiment)
    expected["training"]["seed"] = 2
    assert to_json(changed) == expected
    assert with_settings(experiment, []) == experiment


@pytest.mark.parametrize("setting", ["training=3", "model.observation_shapes=4", "policy.sampler=euler"])
def test_a_group_cannot_be_set(setting: str) -> None:
    with pytest.raises(ConfigError, match="is a group of settings"):
        with_settings(resolve("metaworld_state", SPEC), [setting])


def test_a_missing_or_foreign_experiment_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the experiment"):
        resolve(str(tmp_path / "none.json"), SPEC)
    (tmp_path / "other.json").write_text('{"preset": "x"}')
    with pytest.raises(ConfigError, match="lacks model"):
        resolve(str(tmp_path / "other.json"), SPEC)


def test_settings_have_their_declared_types_whatever_stands_there_now() -> None:
    """Augmentation is off in frames_64: 0 there is no reason to take whole numbers only."""
    changed = with_settings(resolve("frames_64", CAMERA), ["training.augmentation.shift=0.05"])
    assert changed.training.augmentation.shift == 0.05
    with pytest.raises(ConfigError, match=r"training\.max_steps must be a whole number, got '0\.5'"):
        with_settings(resolve("metaworld_state", SPEC), ["training.max_steps=0.5"])
    with pytest.raises(ConfigError, match=r"transforms\.images takes more than one value; .* --transforms"):
        with_settings(resolve("metaworld_state", SPEC), ["transforms.images=camera"])
