"""The policy for LeRobot's loops: windows in training, one observation per control step and a cache at inference.

Shapes: B windows or environments, T encoder steps of a window, Ta chunk length, Da action width; C H W picture as
LeRobot has it.
"""

import copy
import itertools
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.types import FeatureType
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor
from torch.nn.functional import interpolate

from lerobot_policy_scd.configuration_scd import ScdConfig
from lerobot_policy_scd.windows import WindowDraws, Windows, window_loss
from scd_robot.errors import ConfigError, ShapeError
from scd_robot.model import ScdModel
from scd_robot.nn import KVCache

__all__ = ["ScdPolicy"]

_STILL = 1e-5  # of its magnitude: within a hundred of float32's steps, a number has not moved


class ScdPolicy(PreTrainedPolicy):
    """`scd_robot.model.ScdModel`, its moving average, and the history of the running episodes.

    Attributes:
        model: what is trained.
        averaged: its moving average, which acts.
        still: (sum of Do,) bool, of the vectors side by side, keys sorted: numbers that did not move in the dataset but
            for rounding. They are 0 for the model, whatever they are later; LeRobot would stretch the rounding to
            [-1, 1], and divide any later change by 1e-8.
        places: by key, where a vector lies among them.
    """

    config_class = ScdConfig
    name = "scd"

    def __init__(
        self,
        config: ScdConfig,
        dataset_stats: Mapping[str, Any] | None = None,
        dataset_meta: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config)
        self._how = config.policy_config()
        self.model = ScdModel(config.model_config())
        self.averaged = copy.deepcopy(self.model).requires_grad_(False)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        shapes, keys = self.model.config.observation_shapes, self.model.config.vector_keys
        ends = list(itertools.accumulate(shapes[key][0] for key in keys))
        self.places = {key: slice(end - shapes[key][0], end) for key, end in zip(keys, ends, strict=True)}
        self.register_buffer("still", torch.zeros(ends[-1] if ends else 0, dtype=torch.bool))
        self._note_still(dataset_stats)
        self._stats_in_training: Mapping[str, Any] | None = None
        self.reset()

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, *, strict: bool = True, **kwargs: Any) -> "ScdPolicy":
        """As LeRobot's, but weights that are missing are an error unless `strict=False`.

        `still` is that of the statistics that LeRobot normalises with: those of the policy's folder, but in training
        those of the dataset, whose `dataset_stats` count from the first update on. (`lerobot-record` gives those of
        what is being recorded as well, and does not normalise by them.)
        """
        policy = super().from_pretrained(pretrained_name_or_path, strict=strict, **kwargs)
        policy._stats_in_training = kwargs.get("dataset_stats")
        return policy

    def _note_still(self, stats: Mapping[str, Any] | None) -> None:
        for key, place in self.places.items():
            if stats is not None and {"min", "max"} <= stats.get(key, {}).keys():
                low, high = (np.asarray(stats[key][name], np.float64).reshape(-1) for name in ("min", "max"))
                still = high - low <= _STILL * np.maximum(np.maximum(abs(low), abs(high)), _STILL)
                self.still[place] = torch.from_numpy(still).to(self.still.device)

    # Training.

    def get_optim_params(self) -> list[dict[str, Any]]:
        """Groups with a learning rate of its own for the decoder, and weight decay on matrices only."""
        config = self.config
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            groups.setdefault((name.startswith("decoder."), parameter.ndim > 1), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": config.optimizer_lr * (config.optimizer_decoder_lr_factor if is_decoder else 1.0),
                "weight_decay": config.optimizer_weight_decay if is_matrix else 0.0,
            }
            for (is_decoder, is_matrix), parameters in groups.items()
        ]

    def forward(self, batch: Mapping[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, Any]]:
        """The loss of a batch of windows.

        Args:
            batch: normalised; observations (B, T, ...), `action` (B, P, Da), and their `_is_pad`.
            reduction: "mean" over all counted actions, or "none": that of each window, (B,).

        Returns:
            The loss, and nothing more to log.
        """
        if reduction not in ("mean", "none"):
            raise ConfigError(f"reduction must be mean or none, got {reduction!r}")
        self._note_still(self._stats_in_training)
        self._stats_in_training = None
        windows = self._windows(batch)
        draws = WindowDraws.random(self.model, windows, self.config.positions_per_window)
        total, count = window_loss(self.model, windows, draws)
        if reduction == "none":
            return total / count.clamp(min=1), {}
        return total.sum() / count.sum().clamp(min=1), {}

    @torch.no_grad()
    def update(self) -> None:
        """Takes an update of the weights into their moving average; LeRobot calls it after each."""
        self.num_updates += 1
        done = int(self.num_updates)
        decay = min(self.config.ema_decay, (1 + done) / (10 + done))
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1 - decay)

    def _windows(self, batch: Mapping[str, Any]) -> Windows:
        steps, keys = self.config.n_obs_steps, self.config.observation_keys
        observation = {key: self._observed(batch, key, (steps,)) for key in keys}
        first = observation[keys[0]]
        action, length = batch["action"], len(self.config.action_delta_indices)
        if self.model.config.action_dim == 1 and action.ndim == 2:
            action = action[..., None]  # LeRobot has vectors of one number as numbers
        if action.ndim != 3 or action.shape[1] != length:
            raise ShapeError(
                f"action must be (B, {length}, {self.model.config.action_dim}), got {tuple(action.shape)}; LeRobot's "
                "dataset cuts such windows with this configuration's action_delta_indices"
            )
        # Where LeRobot renames observations (--rename_map), these keep the names of the dataset; all are the same.
        padded = sorted(name for name in batch if name.startswith("observation.") and name.endswith("_is_pad"))
        if (steps > 1 and not padded) or "action_is_pad" not in batch:
            raise ShapeError(
                "windows come with observation.KEY_is_pad and action_is_pad, by which LeRobot tells what is outside "
                f"the episode; got {sorted(name for name in batch if isinstance(name, str))}"
            )
        step_valid = torch.ones(len(first), steps, dtype=torch.bool, device=first.device)
        if padded:
            step_valid = ~batch[padded[0]].view(len(first), steps)
        return Windows(observation, step_valid, action, ~batch["action_is_pad"])

    # Inference.

    def reset(self) -> None:
        """Begins new episodes in all environments; LeRobot calls it once per batch of them."""
        self._cache: KVCache | None = None
        self._context: Tensor | None = None
        self._steps = 0
        self._action_queue: deque[Tensor] = deque()  # LeRobot may empty it; the history stays

    def select_action(self, batch: Mapping[str, Any], noise: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The next action (B, Da), normalised; to be called once per control step.

        The history of every environment grows by this observation; a plan is made where the last one is used up. What
        one environment is shown, finished or not, changes nothing for the others.

        Args:
            batch: observations (B, ...), normalised.
            noise: (B, Ta, Da) where a plan begins, if one is made; None = drawn.
            **kwargs: not used.
        """
        with torch.inference_mode():
            self._observe(batch)
            if not self._action_queue:
                chunk = self._plan(noise)[:, : self.config.n_action_steps - self._age]
                self._action_queue.extend(chunk.unbind(1))
            action = self._action_queue.popleft()
        return action.clone()

    def predict_action_chunk(self, batch: Mapping[str, Any], noise: Tensor | None = None, **kwargs: Any) -> Tensor:
        """A new plan (B, Ta, Da), normalised; its action 0 is for the control step of this observation.

        The history grows by the observation, as in `select_action`. With a `history_stride`, in control steps in which
        the encoder does not run, the plan is shorter by what has passed since it ran.

        Raises:
            ConfigError: LeRobot's real-time chunking is asked for, whose arguments would be left unheeded.
        """
        unheeded = sorted(name for name, value in kwargs.items() if value is not None)
        if unheeded:
            raise ConfigError(
                f"predict_action_chunk of an scd policy takes a batch and noise, got {', '.join(unheeded)} besides: "
                "LeRobot's real-time chunking (rtc) is not for it; turn that off, or convert the policy and use "
                "scd_robot.control, which has its own (python -m lerobot_policy_scd.convert)"
            )
        with torch.inference_mode():
            self._observe(batch)
            chunk = self._plan(noise)
        return chunk.clone()

    @property
    def context(self) -> Tensor:
        """(B, K, D) what the encoder made of each history when it ran last.

        Raises:
            ConfigError: there was no observation yet.
        """
        if self._context is None:
            raise ConfigError("there is no context before the first observation: call select_action(batch)")
        return self._context

    @property
    def _age(self) -> int:
        """Control steps since the encoder ran last."""
        return (self._steps - 1) % self.config.history_stride

    def _observe(self, batch: Mapping[str, Any]) -> None:
        """Advances every history by one control step."""
        self.eval()
        observation = {key: self._observed(batch, key) for key in self.config.observation_keys}
        count = len(next(iter(observation.values())))
        if self._cache is None:
            self._cache = self.averaged.new_cache(count)
        elif self._cache.position.shape[0] != count:
            raise ShapeError(
                f"the batch has {count} rows, the running episodes are {self._cache.position.shape[0]}; call reset() "
                "where episodes begin"
            )
        self._steps += 1
        if self._age == 0:
            with torch.autocast(self.num_updates.device.type, enabled=False):
                self._context = self.averaged.encode_step(observation, self._cache)

    def _plan(self, noise: Tensor | None) -> Tensor:
        """(B, Ta - age, Da) from the present control step on."""
        with torch.autocast(self.num_updates.device.type, enabled=False):
            plan = self.averaged.plan(self.context, sampler=self._how.sampler, noise=noise)
        return plan.actions[:, self._age :]

    def _observed(self, batch: Mapping[str, Any], key: str, steps: tuple[int, ...] = ()) -> Tensor:
        """One observation (B, *steps, ...) as the model has it: vectors clamped, pictures uint8 with channels last."""
        if key not in batch:
            raise ShapeError(f"observation {key!r} is missing; got {sorted(k for k in batch if isinstance(k, str))}")
        feature, value = self.config.input_features[key], batch[key]
        expected = (*steps, *feature.shape)
        if steps == (1,) and tuple(value.shape[1:]) == tuple(feature.shape):
            value = value[:, None]  # LeRobot leaves the axis of time out where there is one picture
        if tuple(feature.shape) == (1,) and value.ndim == 1 + len(steps):
            value = value[..., None]  # LeRobot has vectors of one number as numbers
        if tuple(value.shape[1:]) != expected:
            wanted = ", ".join(map(str, expected))
            raise ShapeError(f"observation {key!r} must be (B, {wanted}), got {tuple(value.shape)}")
        if feature.type is not FeatureType.VISUAL:
            limit = self.config.observation_limit
            return value.float().clamp(-limit, limit).masked_fill(self.still[self.places[key]], 0.0)
        return pictures_of(value, self.config.resize_images)


def pictures_of(images: Tensor, size: tuple[int, ...] = ()) -> Tensor:
    """Pictures (..., H, W, C) uint8 of LeRobot's (..., C, H, W) in [0, 1], resized as scd_robot's transforms do it."""
    levels = (images.float() * 255).round().clamp(0, 255)
    if size and tuple(size) != tuple(images.shape[-2:]):
        flat = levels.flatten(0, -4)
        # torch resizes bytes on a CPU only, and other than floats: it rounds in between
        flat = flat.to(torch.uint8) if flat.device.type == "cpu" else flat
        resized = interpolate(flat, tuple(size), mode="bilinear", antialias=True, align_corners=False)
        levels = resized.float().round().clamp(0, 255).unflatten(0, images.shape[:-3])
    return levels.to(torch.uint8).movedim(-3, -1).contiguous()
