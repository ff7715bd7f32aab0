"""The Separable Causal Diffusion policy: hides caches, normalisation and chunking behind `act`.

Per control step it runs one cached encoder step; every `num_executed` steps it denoises a new chunk.

Shapes: B rows, Ta chunk length, k past actions, Da action width, d committed actions.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scd_robot.config import from_json
from scd_robot.errors import CheckpointError
from scd_robot.model import ActionModel, ScdConfig, build_model, check_guidance, greatest_gain
from scd_robot.normalization import Normalizer
from scd_robot.policies.chunked import ChunkPolicy
from scd_robot.policies.config import ScdPolicyConfig, check_widths, with_overrides
from scd_robot.policies.planner import Planner
from scd_robot.policies.rows import Architecture, PlanInput, Rows
from scd_robot.policies.sampling import TorchCache, inference, ready
from scd_robot.transforms import TransformConfig, Transforms
from scd_robot.types import ActionArray, DatasetSpec, GivenActions, Observation, RunningChunk

__all__ = ["ScdPolicy", "ScdPolicyConfig"]


class ScdPolicy(ChunkPolicy):
    """A trained model in a control loop; see `ChunkPolicy` for what it does when.

    Args:
        model: trained model; moved to `device` and put into evaluation mode.
        normalizer: statistics it was trained with.
        dataset: specification of its training data, as recorded.
        config: how to run it.
        device: torch device.
        transforms: between the recording and the model; what they did to actions is undone.
        reproducible: see `ChunkPolicy`, likewise `task` and `goal`.
        task: of several.
        goal: by observation key.
    """

    config: ScdPolicyConfig

    def __init__(
        self,
        model: ActionModel[Any],
        normalizer: Normalizer,
        dataset: DatasetSpec,
        config: ScdPolicyConfig | None = None,
        device: str | torch.device = "cpu",
        transforms: TransformConfig | None = None,
        reproducible: bool = False,
        task: str | None = None,
        goal: Observation | None = None,
    ) -> None:
        config, between = config or ScdPolicyConfig(), Transforms(transforms or TransformConfig(), dataset)
        check_widths(model.config, normalizer, between.spec)
        config.check_fits(model.config)
        keys = list(model.config.observation_shapes)
        how = config, reproducible, task, goal
        super().__init__(Architecture.of(model.config), keys, dataset, normalizer.ranges(), between, *how)
        self.device = ready(model, device)
        self.model = model
        self.normalizer = normalizer.to(self.device)
        self._planner = Planner(self.model, self.normalizer, self.transforms, self.config, self._repeated)

    @classmethod
    def from_parts(
        cls,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        normalizer: Normalizer,
        dataset: DatasetSpec,
        device: str | torch.device = "cpu",
        reproducible: bool = False,
        task: str | None = None,
        goal: Observation | None = None,
        **overrides: Any,
    ) -> "ScdPolicy":
        """Builds a policy from a checkpoint's contents; `overrides` replace fields of `ScdPolicyConfig`.

        Raises:
            CheckpointError: the weights are not those of the configuration.
        """
        model = build_model(from_json(ScdConfig, config["model"], "model"))
        if not isinstance(model, ActionModel):
            raise CheckpointError("the configuration is of a model of frames, which plans no actions")
        try:
            model.load_state_dict(dict(weights), strict=True)
        except RuntimeError as error:
            raise CheckpointError(f"the weights do not fit the configuration: {str(error).splitlines()[-1]}") from error
        transforms = from_json(TransformConfig, config["transforms"], "transforms")
        how = with_overrides(config["policy"], overrides)
        return cls(model, normalizer, dataset, how, device, transforms, reproducible, task, goal)

    def _new_cache(self, batch_size: int) -> TorchCache:
        return TorchCache(self.model.new_cache(batch_size))

    def _encode(
        self,
        rows: Rows,
        seen: Mapping[str, NDArray[Any]],
        present: Mapping[str, bool],
        encodes: NDArray[np.bool_],
        state: Mapping[str, NDArray[Any]],
    ) -> Any:
        assert isinstance(rows.cache, TorchCache)
        active = None if encodes.all() else torch.as_tensor(encodes, device=self.device)
        with inference(self.device, rows.batch_size):
            normalised = self.normalizer.normalize_observation(
                {key: torch.as_tensor(value, device=self.device) for key, value in seen.items()}
            )
            there = {
                key: torch.full((rows.batch_size,), is_there, device=self.device) for key, is_there in present.items()
            }
            past, known = None, None
            if self.model.config.past_action_input != "none":
                past = self._planner.normalised_actions(rows.past[:, -1:], state)[:, 0]
                known = torch.as_tensor(rows.past_known[:, -1], device=self.device)
            context = self.model.encode_step(
                normalised, rows.cache.tensors, active, past_action=past, past_action_valid=known, present=there or None
            )
            if active is not None and self._context is not None:
                context = self._where(active, context, self._context)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        return context

    @property
    def max_gain(self) -> float:
        """The largest gain with which a plan can be guided."""
        return greatest_gain(self.config.sampler)

    def check_guidance(self, max_gain: float) -> None:
        """Raises ConfigError where plans of this policy cannot be guided towards a running chunk with this gain."""
        check_guidance(self.config.sampler, max_gain)

    def _denoise(
        self,
        given: PlanInput,
        prefix: ActionArray | None,
        running: RunningChunk | None = None,
        fixed: GivenActions | None = None,
    ) -> ActionArray:
        return self._planner.denoise(given, prefix, running, fixed)

    def _of_rows(self, context: Any, rows: NDArray[np.int64]) -> Any:
        with inference(self.device, len(rows)):
            return self._chosen(context, torch.as_tensor(rows, device=self.device))

    # A policy whose model makes something else of the history than one tensor replaces these.

    def _where(self, active: Tensor, new: Any, old: Any) -> Any:
        """The new context in the rows where `active` (B,) is True, the old one in the others."""
        return torch.where(active[:, None, None], new, old)

    def _chosen(self, context: Any, rows: Tensor) -> Any:
        """A copy of the context of some rows (n,)."""
        return context[rows]

    def _repeated(self, context: Any, copies: int) -> Any:
        """Each row's context so many times in a row."""
        return context.repeat_interleave(copies, 0)
