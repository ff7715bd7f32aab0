"""Named experiments: functions from a dataset's specification to a resolved configuration.

A preset fits any dataset of its kind: widths come from the dataset. Another preset replaces fields of an earlier one
with `dataclasses.replace`.
"""

import json
import logging
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from scd_robot.checkpoint import list_checkpoints
from scd_robot.config import from_json, to_json
from scd_robot.diffusion import FlowTimeConfig
from scd_robot.errors import ConfigError, DatasetError, UnknownNameError
from scd_robot.model import FrameConfig, ScdConfig
from scd_robot.nn import AutoencoderConfig, ImageConfig
from scd_robot.policies.scd import ScdPolicyConfig
from scd_robot.resizing import told_resizing
from scd_robot.training.augmentation import AugmentationConfig
from scd_robot.training.config import ExperimentConfig, Objective, TrainingConfig
from scd_robot.transforms import ChunkPart, TransformConfig, Transforms
from scd_robot.types import ArraySpec, DatasetSpec

__all__ = [
    "PRESETS",
    "frames_64",
    "frames_latent",
    "image",
    "image_frames",
    "memory_state",
    "metaworld_state",
    "pusht_state",
    "resolve",
    "with_settings",
]

logger = logging.getLogger(__name__)

_PICTURE_S = 0.05  # between the pictures that policies with cameras look at
_PATCH = 16  # pixels on each side of what is one token of frames_latent
_MOST_TOKENS = 80  # of a picture, in its encoder


def metaworld_state(dataset: DatasetSpec) -> ExperimentConfig:
    """State policy for any Meta-World task: 1.5 million parameters, under 15 minutes on two CPU cores.

    Most tasks are solved after 2,000 steps; precise insertion needs the 4,000.
    """
    vectors: dict[str, tuple[int, ...]] = {
        key: spec.shape for key, spec in dataset.observation.items() if len(spec.shape) == 1
    }
    if not vectors:
        raise DatasetError(f"preset metaworld_state needs vector observations, got {sorted(dataset.observation)}")
    others = sorted(set(dataset.observation) - set(vectors))
    if others:
        logger.warning(
            "%s are no vectors: this preset trains without them ('flatten' in --transforms makes some of small arrays)",
            ", ".join(others),
        )
    return ExperimentConfig(
        preset="metaworld_state",
        model=ScdConfig(observation_shapes=vectors, action_dim=dataset.action_dim),
        training=TrainingConfig(max_steps=4000),
        policy=ScdPolicyConfig(),
        transforms=TransformConfig(),
    )


def pusht_state(dataset: DatasetSpec) -> ExperimentConfig:
    """Policy for diffusion_policy's recording of PushT: pusher, block pose and key points of the block, 10 Hz.

    Targets are relative to the pusher, in units of their standard deviation: absolute ones fill a small part of the
    range [-1, 1], and the sampler's errors are then many pixels. Nothing is hidden in this task, so it has no use for
    more history than velocities need.
    """
    for key in ("state", "keypoint"):
        if key not in dataset.observation:
            raise DatasetError(f"preset pusht_state needs the observation {key!r}, got {sorted(dataset.observation)}")
    target = ChunkPart(action_start=0, key="state", key_start=0, count=2)
    transforms = TransformConfig(
        keys=("state", "keypoint"), flatten=("keypoint",), chunk="relative", chunk_parts=(target,)
    )
    vectors = {key: spec.shape for key, spec in Transforms(transforms, dataset).spec.observation.items()}
    return ExperimentConfig(
        preset="pusht_state",
        model=ScdConfig(
            observation_shapes=vectors,
            action_dim=dataset.action_dim,
            history_length=2,
            num_past_actions=0,
            encoder_layers=4,  # these four as they were measured
            decoder_layers=2,
            add_context=False,
            context_in_history=True,
        ),
        training=TrainingConfig(
            max_steps=10_000, positions_per_segment=48, action_normalization="mean_std", validate_every=500
        ),
        policy=ScdPolicyConfig(num_executed=4),
        transforms=transforms,
    )


def memory_state(dataset: DatasetSpec) -> ExperimentConfig:
    """State policy for tasks of the memory suite: its history covers an episode of 512 control steps.

    The encoder runs in every second control step, which halves what an episode costs and loses nothing that moves at a
    hand's speed. The robot waits most of the time; the decoder is trained on a tenth of these steps only. What is to be
    remembered is one thing per episode, so that batches hold many of them. No history is cut:
    without the cue there is nothing to be learned from what follows. Chunks end where a disturbance begins, which
    recordings should have: else a policy with all its history in view goes by the time that has passed. For the same
    reason plans are short: what has been achieved is looked at every 4 control steps.
    """
    base = metaworld_state(dataset)
    return replace(
        base,
        preset="memory_state",
        model=replace(
            base.model,
            history_length=256,
            history_stride=2,
            encoder_layers=4,  # these four as they were measured
            decoder_layers=2,
            add_context=False,
            context_in_history=True,
        ),
        training=replace(
            base.training,
            max_steps=1000,
            batch_size=16,
            segment_length=512,
            group_by_length=True,
            positions_per_segment=16,
            idle_weight=0.1,
            disturbance_threshold=0.5,
            virtual_reset_probability=0.0,
        ),
        policy=replace(base.policy, num_executed=4),
    )


def image(dataset: DatasetSpec) -> ExperimentConfig:
    """Policy for any dataset with pictures, and vectors where there are some: as metaworld_state, for fewer steps.

    Larger pictures go through more layers. The history covers 64 control steps, since a batch holds the pictures of
    whole segments. Robots that are driven faster than at 20 Hz are looked at no more often than that: the encoder runs
    in every second, fourth or eighth control step, and a batch of as many pictures holds more episodes.
    """
    shapes: dict[str, tuple[int, ...]] = {
        key: spec.shape
        for key, spec in dataset.observation.items()
        if len(spec.shape) == 1 or (len(spec.shape) == 3 and spec.dtype == "uint8")
    }
    pictures = [shape for shape in shapes.values() if len(shape) == 3]
    if not pictures:
        raise DatasetError(
            f"preset image needs pictures, (H, W, C) uint8 of 0 to 255, got {_listed(dataset.observation)}: record "
            "pictures so, or train another preset (docs/training.md)"
        )
    others = {key: spec for key, spec in dataset.observation.items() if key not in shapes}
    if others:
        logger.warning(
            "%s: neither pictures, (H, W, C) uint8, nor vectors; this preset trains without", _listed(others)
        )
    layers = 3
    while max(shape[0] * shape[1] for shape in pictures) > 256 * 4**layers:
        layers += 1
    layers = min(layers, min(min(shape[:2]) for shape in pictures).bit_length() - 1)
    stride = 1  # divides the 8 actions that are executed of a plan
    while stride < 8 and 2 * stride * dataset.control_dt < _PICTURE_S + 1e-9:
        stride *= 2
    return ExperimentConfig(
        preset="image",
        model=ScdConfig(
            observation_shapes=shapes,
            action_dim=dataset.action_dim,
            history_length=64 // stride,
            history_stride=stride,
            images=ImageConfig(channels=(16, 32, 64, 128, 128, 128)[:layers]),
        ),
        training=TrainingConfig(
            max_steps=4000, batch_size=8 if stride == 1 else 16, segment_length=64, validate_every=250
        ),
        policy=ScdPolicyConfig(),
    )


def image_frames(dataset: DatasetSpec) -> ExperimentConfig:
    """As image, with a decoder of one camera's next frames on the same encoder, trained along with the actions.

    The same weights plan and imagine. What it costs is in training; plans are as fast as those of image. Frames are
    imagined control step by control step, so the encoder runs in each.
    """
    base = image(dataset)
    cameras = base.model.image_keys
    if len(cameras) != 1:
        raise DatasetError(
            f"preset image_frames imagines the frames of one camera, got pictures {', '.join(cameras)}: name it, "
            "scd train image --set model.frames.beside_actions=true model.frames.camera=KEY"
        )
    frames = FrameConfig(cameras[0], beside_actions=True)
    every_step = replace(base.model, history_length=64, history_stride=1, frames=frames)
    return replace(base, preset="image_frames", model=every_step, training=replace(base.training, batch_size=8))


def frames_64(dataset: DatasetSpec) -> ExperimentConfig:
    """Imagines the next frames of one camera, 64 x 64 pixels, given what was seen and the actions to be executed.

    The encoder has 16 tokens for each picture, the decoder 64 patches. Pictures are not augmented: what moves or
    changes its colour in them has done so. Flow times are near to noise, since changes are seen through much of it.
    """
    camera, shape = _only_camera(dataset, "frames_64")
    if shape[:2] != (64, 64):
        raise DatasetError(f"preset frames_64 takes pictures of 64 x 64, {_resize(camera, shape, (64, 64))}")
    return ExperimentConfig(
        preset="frames_64",
        model=ScdConfig(
            observation_shapes={camera: shape},
            action_dim=dataset.action_dim,
            encoder_layers=3,
            decoder_layers=2,
            history_length=16,
            num_context_tokens=0,
            add_context=False,
            chunk_length=1,
            num_past_actions=0,
            past_action_input="full",
            images=ImageConfig(channels=(16, 32, 64, 128), tokens_per_image=0),
            frames=FrameConfig(camera=camera),
        ),
        training=TrainingConfig(
            max_steps=4000,
            batch_size=4,
            segment_length=24,
            positions_per_segment=8,
            flow_time=FlowTimeConfig("logit_normal", mean=-2.0, std=1.2),
            ema_decay=0.999,
            augmentation=AugmentationConfig(0.0, 0.0, 0.0, 0.0),
            validate_every=250,
            validation_segments=16,
        ),
        policy=ScdPolicyConfig(num_executed=1),
    )


def frames_latent(dataset: DatasetSpec) -> ExperimentConfig:
    """As frames_64, for larger pictures: the decoder's tokens are patches of an autoencoder's latents.

    A patch covers 16 x 16 pixels, so that pictures of 128 x 128 have the 64 tokens that those of 64 x 64 have there.
    The encoder halves larger pictures more often, to at most 80 tokens of a picture.
    """
    camera, shape = _only_camera(dataset, "frames_latent")
    height, width = shape[:2]
    if height % _PATCH or width % _PATCH or min(height, width) < 64:
        size = [max(64, round(side / _PATCH) * _PATCH) for side in (height, width)]
        raise DatasetError(
            f"preset frames_latent takes pictures from 64 x 64 up, with sides that are multiples of {_PATCH}, "
            f"{_resize(camera, shape, size)}"
        )
    channels: tuple[int, ...] = (16, 32, 64, 128)
    while height * width > _MOST_TOKENS * 4 ** len(channels):
        channels += (128,)
    small = frames_64(replace(dataset, observation={camera: ArraySpec((64, 64, *shape[2:]), "uint8")}))
    model = replace(
        small.model,
        observation_shapes={camera: shape},
        images=ImageConfig(channels=channels, tokens_per_image=0),
        frames=FrameConfig(camera, patch_size=_PATCH, autoencoder=AutoencoderConfig()),
    )
    return replace(small, preset="frames_latent", model=model)


def _listed(observation: Mapping[str, ArraySpec]) -> str:
    return ", ".join(f"{key} {spec.dtype} {spec.shape}" for key, spec in sorted(observation.items()))


def _only_camera(dataset: DatasetSpec, preset: str) -> tuple[str, tuple[int, ...]]:
    """The key of the pictures, and their shape."""
    shapes = {
        key: spec.shape for key, spec in dataset.observation.items() if len(spec.shape) == 3 and spec.dtype == "uint8"
    }
    if len(shapes) != 1:
        raise DatasetError(
            f"preset {preset} takes the pictures of one camera, (H, W, C) uint8 of 0 to 255, got "
            f"{_listed(dataset.observation)}: "
            + ("choose one with --keys, or with keys of --transforms" if shapes else "record pictures so")
        )
    [found] = shapes.items()
    return found


def _resize(camera: str, shape: Sequence[int], size: Sequence[int]) -> str:
    """What to do about pictures of another size."""
    return f"{camera!r} has {shape[0]} x {shape[1]}: {told_resizing(camera, size)}"


PRESETS: dict[str, Callable[[DatasetSpec], ExperimentConfig]] = {
    "frames_64": frames_64,
    "frames_latent": frames_latent,
    "image": image,
    "image_frames": image_frames,
    "memory_state": memory_state,
    "metaworld_state": metaworld_state,
    "pusht_state": pusht_state,
}


def resolve(name: str, dataset: DatasetSpec, transforms: TransformConfig | None = None) -> ExperimentConfig:
    """The preset `name` for a dataset, or the experiment of a checkpoint's config.json where `name` is such a path.

    Args:
        name: of the preset, or path of the file.
        dataset: specification of the training data, as recorded.
        transforms: what to do to it before the preset sees it; None = the preset's own, or the file's, which has its
            own always.

    Raises:
        UnknownNameError: no preset of that name; the message has the nearest names.
        ConfigError: the file is missing, or no experiment; the folder of a run.
    """
    if name.endswith(".json"):
        if transforms is not None:
            raise ConfigError(f"{name} has transforms of its own; leave --transforms out, or edit that file")
        try:
            tree = json.loads(Path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the experiment {name}: {error}") from error
        return from_json(ExperimentConfig, tree, name)
    if name not in PRESETS:
        folders = [*list_checkpoints(Path(name)), Path(name)]
        if trained := [folder / "config.json" for folder in folders if (folder / "config.json").is_file()]:
            raise ConfigError(
                f"{name} is trained already, and a preset's name belongs there; to continue that run, repeat its "
                f"command with --resume; to fine-tune it, give a preset and --init {name}; to train anew with its "
                f"settings, give {trained[-1]}"
            )
        raise UnknownNameError("preset", name, PRESETS)
    if transforms is None:
        return PRESETS[name](dataset)
    return replace(PRESETS[name](Transforms(transforms, dataset).spec), transforms=transforms)


def with_settings(experiment: ExperimentConfig, settings: Sequence[str]) -> ExperimentConfig:
    """Replaces fields given as text.

    With training.objective come the sampler and the decoder's inputs that it needs.

    Args:
        experiment: what to change.
        settings: "training.learning_rate=3e-4", "model.fusion=concat", "policy.sampler.num_denoising_steps=4", ...

    Raises:
        ConfigError, UnknownNameError: not of that form, an unknown field, or a value that does not fit.
    """
    for setting in settings:
        path, _, text = setting.partition("=")
        if path == "training.objective":  # other settings may change what goes with it
            experiment = experiment.with_objective(cast(Objective, text))
    tree = to_json(experiment)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set takes FIELD=VALUE, for example training.learning_rate=3e-4; got {setting!r}")
        *parents, last = path.split(".")
        node: Any = tree
        for name in [*parents, last]:
            if name not in tree and not parents:
                raise UnknownNameError("setting", name, _paths(tree))
            if not isinstance(node, dict) or name not in node:
                raise UnknownNameError(f"setting {path!r}: field", name, node if isinstance(node, dict) else ())
            parent, node = node, node[name]
        if isinstance(node, dict) and node:
            raise ConfigError(
                f"{path} is a group of settings; set one of them: {', '.join(f'{path}.{n}' for n in node)}"
            )
        parent[last] = _parse(text, _declared_type(path), path)
    return from_json(ExperimentConfig, tree, "experiment")


def _paths(tree: Mapping[str, Any]) -> list[str]:
    """What --set takes: "training.max_steps", ..."""
    return [
        path
        for name, node in tree.items()
        for path in ([f"{name}.{below}" for below in _paths(node)] if isinstance(node, dict) else [name])
    ]


def _declared_type(path: str) -> Any:
    """The type of a field of an experiment; what may also be None counts as what it is otherwise."""
    kind: Any = ExperimentConfig
    for name in path.split("."):
        kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else typing.get_type_hints(kind)[name]
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _parse(text: str, kind: Any, path: str) -> Any:
    """The text as a value of a field's type."""
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        parts = text.strip("[]() ").split(",")
        try:
            return [_parse(part.strip(), element, path) for part in parts]
        except ConfigError as error:
            raise ConfigError(f"{error} in {text!r}" if len(parts) > 1 else str(error)) from error
    if kind is str or typing.get_origin(kind) is typing.Literal:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{path} must be true or false, got {text!r}")
        return text.lower() == "true"
    if kind not in (int, float):
        raise ConfigError(
            f"{path} takes more than one value; model.frames.autoencoder comes with --autoencoder, and transforms with "
            "--transforms, --tasks and --goals"
        )
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(f"{path} must be {'a whole number' if kind is int else 'a number'}, got {text!r}") from error
