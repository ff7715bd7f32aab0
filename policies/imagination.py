"""Frames that a model of frames imagines: what would be seen if these actions were executed.

The model reads recorded pictures and actions first, control step by control step into its cache; from then on each
frame that it imagines is its next observation.

Shapes: B rows, Tc control steps that were seen, Tf frames imagined, Da action width, H W C picture, L patches, Dx
numbers in one, K context tokens, D width.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scd_robot.checkpoint import Checkpoint, read_checkpoint
from scd_robot.config import from_json, to_json
from scd_robot.errors import CheckpointError, ConfigError, ShapeError
from scd_robot.model import FrameModel, HistoryContext, JointModel, ScdConfig, build_model
from scd_robot.nn import KVCache, room_for
from scd_robot.normalization import Normalizer
from scd_robot.policies.config import ScdPolicyConfig, check_widths, with_overrides
from scd_robot.policies.inputs import checked_action, model_observation
from scd_robot.policies.registry import FRAMES
from scd_robot.policies.sampling import inference, ready
from scd_robot.seeding import POLICY_NOISE, keyed_rng
from scd_robot.transforms import TransformConfig, Transforms
from scd_robot.types import ActionArray, DatasetSpec

__all__ = ["Imagination", "imagination_of", "load_imagination"]

Frames = NDArray[np.uint8]


def load_imagination(path: str | Path, device: str | torch.device = "cpu", **overrides: Any) -> "Imagination":
    """Loads a trained model of frames, or that part of a policy that was trained with one beside its actions.

    Args:
        path: checkpoint folder, or a training run's folder (its newest checkpoint).
        device: torch device, e.g. "cpu" or "cuda".
        **overrides: as of `Imagination.from_parts`; None leaves the checkpoint's.

    Raises:
        CheckpointError: missing, foreign or damaged, or of a policy that plans actions alone.
    """
    return imagination_of(read_checkpoint(path), device, **overrides)


def imagination_of(checkpoint: Checkpoint, device: str | torch.device = "cpu", **overrides: Any) -> "Imagination":
    """The model of frames of a checkpoint that was read already; arguments and errors as for `load_imagination`.

    Its attribute `provenance` tells, as plain JSON types, what it was made of.
    """
    if checkpoint.policy != FRAMES and not checkpoint.config["model"]["frames"]["beside_actions"]:
        raise CheckpointError(
            f"{checkpoint.path} holds a policy ({checkpoint.policy}), which plans actions and imagines no frames; "
            "train a model of frames with: scd train frames_64, or a policy that has one: scd train image_frames"
        )
    found = Imagination.from_parts(
        checkpoint.config, checkpoint.weights, checkpoint.normalizer, checkpoint.dataset, device, **overrides
    )
    settings = to_json(found.config)
    found.provenance = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "weights_sha256": checkpoint.weights_sha256,
        "settings": {name: settings[name] for name in ("sampler", "guidance_scale", "seed")},
    }
    return found


class Imagination:
    """A trained model of frames; numpy in and out.

    Rows are independent: noise is keyed by (seed, episode, number of the frame).

    Args:
        model: trained model; moved to `device` and put into evaluation mode.
        normalizer: statistics it was trained with.
        dataset: specification of its training data, as recorded.
        config: sampler, guidance and seed; the rest is of policies and not read.
        device: torch device.
        transforms: between the recording and the model.

    Attributes:
        source: the recording's key of the camera.
        transforms: as given.
        provenance: what it was made of, see `imagination_of`; empty where nobody told.
    """

    def __init__(
        self,
        model: FrameModel[Any],
        normalizer: Normalizer,
        dataset: DatasetSpec,
        config: ScdPolicyConfig | None = None,
        device: str | torch.device = "cpu",
        transforms: TransformConfig | None = None,
    ) -> None:
        self.config = config or ScdPolicyConfig(num_executed=1)
        self.transforms = Transforms(transforms or TransformConfig(), dataset)
        self.device = ready(model, device)
        self.model, self.normalizer = model, normalizer.to(self.device)
        check_widths(model.config, normalizer, self.transforms.spec)
        self.config.check_fits(model.config)
        self._camera = model.config.frames.camera
        self.source = self.transforms.sources[self._camera]
        self.provenance: dict[str, Any] = {}

    @classmethod
    def from_parts(
        cls,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        normalizer: Normalizer,
        dataset: DatasetSpec,
        device: str | torch.device = "cpu",
        **overrides: Any,
    ) -> "Imagination":
        """From a checkpoint's contents; `overrides` are num_denoising_steps, guidance_scale and seed.

        Of a policy with frames beside its actions the seed is taken. Its sampler and guidance are those of plans; here
        they are the default ones.

        Raises:
            CheckpointError: the weights are not those of the configuration.
        """
        model = build_model(from_json(ScdConfig, config["model"], "model"))
        if not isinstance(model, FrameModel | JointModel):
            raise CheckpointError("the configuration is of a model that plans actions")
        try:
            model.load_state_dict(dict(weights), strict=True)
        except RuntimeError as error:
            raise CheckpointError(f"the weights do not fit the configuration: {str(error).splitlines()[-1]}") from error
        settings = dict(config["policy"])
        if isinstance(model, JointModel):
            model, settings = model.frame_model(), to_json(ScdPolicyConfig(num_executed=1, seed=settings["seed"]))
        transforms = from_json(TransformConfig, config["transforms"], "transforms")
        return cls(model, normalizer, dataset, with_overrides(settings, overrides), device, transforms)

    @property
    def pictures_shape(self) -> tuple[int, ...]:
        """(H, W, C) of pictures as the model sees them."""
        return tuple(self.model.config.observation_shapes[self._camera])

    def pictures(self, frames: NDArray[Any]) -> Frames:
        """Recorded frames (B, T, H, W, C) as the model sees them, which is how it imagines them.

        Raises:
            ShapeError: another size or number of channels than in training, not uint8 of 0 to 255, or nothing in them.
        """
        frames = np.asarray(frames)
        if frames.ndim < 3:
            raise ShapeError(f"frames must be (B, T, H, W, C), got {frames.shape}")
        flat = frames.reshape(-1, *frames.shape[2:])
        seen, _ = model_observation({self.source: flat}, {self._camera: self.source}, self.transforms, False)
        pictures: Frames = seen[self._camera]
        return pictures.reshape(*frames.shape[:2], *pictures.shape[1:])

    def imagine(self, frames: NDArray[Any], actions: ActionArray, episodes: Sequence[int] | None = None) -> Frames:
        """What is seen after each action from the last given frame on.

        Args:
            frames: (B, Tc, H, W, C) as recorded, at least one.
            actions: (B, Tc - 1 + Tf, Da) as recorded: action i is executed in control step i, of which the first Tc
                have a frame.
            episodes: B numbers, which key the noise; None = 0, 1, ...

        Returns:
            (B, Tf, H, W, C), frame 0 follows the last given one.

        Raises:
            ShapeError: see `pictures`; actions of another width, too few, or with NaN.
        """
        seen = self.pictures(frames)
        batch, known = seen.shape[:2]
        count = (np.shape(actions)[1] if np.ndim(actions) == 3 else 0) - known + 1
        if count < 1:
            raise ShapeError(
                f"actions must be (B, n, {self.transforms.recorded.action_dim}) with n >= {known}, one for each of the "
                f"{known} frames and each frame to imagine after the first, got {np.shape(actions)}"
            )
        checked = checked_action("actions", actions, (batch, known + count - 1, self.transforms.recorded.action_dim))
        numbers = list(range(batch)) if episodes is None else list(episodes)
        if len(numbers) != batch:
            raise ConfigError(f"episodes must be {batch} numbers, one of each row, got {len(numbers)}")
        with inference(self.device, batch):
            placed, action = torch.as_tensor(seen, device=self.device), self.normalised(checked)
            cache = self.model.new_cache(batch)
            for step in range(known):  # in the first control step the past action is ignored
                context = self.read(placed[:, step], action[:, max(step - 1, 0)], cache)
            keys = [(POLICY_NOISE, self.config.seed, number) for number in numbers]
            imagined: Frames = self.ahead(context, cache, placed[:, -1], action[:, known - 1 :], keys).cpu().numpy()
        return imagined

    # Step by step, as tensors: what `imagine` and `FrameStream` are made of.

    def normalised(self, actions: ActionArray) -> Tensor:
        """Actions (..., Da) as recorded, as the model has them."""
        given = torch.as_tensor(self.transforms.action(actions), device=self.device)
        return self.normalizer.normalize("action", given)

    def read(self, picture: Tensor, past_action: Tensor, cache: KVCache) -> Any:
        """The context of one more control step.

        Args:
            picture: (B, H, W, C) uint8, as the model sees it.
            past_action: (B, Da) normalised, executed one step before; ignored in the first step of a row.
            cache: of B rows; advanced in place.
        """
        past = past_action if self.model.config.past_action_input != "none" else None
        return self.model.encode_step({self._camera: picture}, cache, past_action=past)

    def ahead(
        self, context: Any, cache: KVCache, picture: Tensor, action: Tensor, keys: Sequence[tuple[int, ...]]
    ) -> Tensor:
        """Frames (B, Tf, H, W, C) that follow the control step last read.

        Args:
            context: of that step.
            cache: advanced in place by the frames imagined, but the last.
            picture: (B, H, W, C) uint8 of that step.
            action: (B, Tf, Da) normalised, the first one executed in that step.
            keys: of each row's noise; the number of the frame is added to them.

        Raises:
            ConfigError: there is no room for so many rows; the message has the sum.
        """
        imagined: list[Tensor] = []
        with self._room(*action.shape[:2]):
            conditioning, known = self.model.conditioning(self.config.sampler), self.model.known(picture)
            for number in range(action.shape[1]):
                if number:
                    context = self.read(picture, action[:, number - 1], cache)
                noise, corruption = self._noise(keys, number)
                tokens = self.model.imagine(
                    context,
                    action[:, number],
                    known,
                    sampler=self.config.sampler,
                    noise=noise,
                    guidance_scale=self.config.guidance_scale,
                    corruption_noise=corruption,
                    conditioning=conditioning,
                )
                picture, known = self.model.following(tokens, known)
                imagined.append(picture)
            return torch.stack(imagined, dim=1)

    def repeated(self, context: Any, rows: Tensor) -> Any:
        """A copy of the context of some rows (n,), any of them several times."""
        return context.rows(rows) if isinstance(context, HistoryContext) else context[rows]

    def _room(self, rows: int, frames: int) -> AbstractContextManager[None]:
        """For frames of so many rows, twice (one by one, then together), and the widest layer of the decoder."""
        config = self.model.config
        length, pixels = config.token_shape[0] + config.num_decoder_context, math.prod(self.pictures_shape)
        hidden = config.mlp_ratio * config.width
        size = self.model.decoder.position.element_size()
        told = (
            f"to imagine = {rows} rows x (2 x {frames} frames x {pixels} bytes + {length} tokens x {hidden} x "
            f"{size} bytes); take fewer rows at once (episodes, candidates), or fewer frames"
        )
        return room_for(rows * (2 * frames * pixels + length * hidden * size), self.device, told)

    def _noise(self, keys: Sequence[tuple[int, ...]], number: int) -> tuple[Tensor, Tensor | None]:
        """Of one frame: the sampler's (B, L, Dx), and that of guidance (B, K + 1, D)."""
        config = self.model.config
        guided = self.config.guidance_scale != 1.0
        noise = np.empty((len(keys), *config.token_shape), np.float32)
        corruption = np.empty((len(keys) * guided, config.num_decoder_context, config.width), np.float32)
        for row, key in enumerate(keys):
            rng = keyed_rng(*key, number)
            rng.standard_normal(dtype=np.float32, out=noise[row])
            if guided:
                rng.standard_normal(dtype=np.float32, out=corruption[row])
        placed = [torch.as_tensor(x, device=self.device) for x in (noise, corruption)]
        return placed[0], placed[1] if guided else None
