"""The half of a policy that makes plans: nothing in it changes from one control step to the next.

Shapes: B rows, S samples of a row, Ta chunk length, k past actions, Da action width, d committed actions.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scd_robot.diffusion import Jacobian, TowardsActions
from scd_robot.errors import ConfigError
from scd_robot.model import ActionModel, ActionPlan, Conditioning, FixedActions
from scd_robot.normalization import Normalizer
from scd_robot.policies.chunked import recorded_chunk
from scd_robot.policies.config import ScdPolicyConfig
from scd_robot.policies.rows import PlanInput
from scd_robot.policies.sampling import inference
from scd_robot.transforms import Transforms
from scd_robot.types import ActionArray, GivenActions, RunningChunk

__all__ = ["Planner"]


class Planner:
    """Denoises chunks in the units of the dataset.

    Args:
        model: trained, on its device.
        normalizer: statistics it was trained with, there too.
        transforms: between the recording and the model.
        config: how the model is run.
        repeated: of a context and a number, each row's context so many times in a row.
    """

    def __init__(
        self,
        model: ActionModel[Any],
        normalizer: Normalizer,
        transforms: Transforms,
        config: ScdPolicyConfig,
        repeated: Callable[[Any, int], Any],
    ) -> None:
        self._model, self._normalizer, self._transforms = model, normalizer, transforms
        self._config, self._repeated = config, repeated
        self._conditioning: dict[float, Conditioning] | None = None  # of weights and sampler, which never change

    def normalised_actions(self, actions: NDArray[np.float32], state: Mapping[str, NDArray[Any]]) -> Tensor:
        """Actions (rows, L, Da) as recorded, to (rows, L, Da) as the model has them; `state` (rows, Do) by key."""
        converted = self._transforms.chunk(self._transforms.action(actions), state)
        device = self._model.decoder.position.device
        return self._normalizer.normalize("action", torch.as_tensor(converted, dtype=torch.float32, device=device))

    def denoise(
        self,
        given: PlanInput,
        prefix: ActionArray | None,
        running: RunningChunk | None = None,
        fixed: GivenActions | None = None,
    ) -> ActionArray:
        """Chunks (rows, Ta, Da), which begin with the committed actions `prefix` (rows, d, Da).

        Args:
            given: what they are made from.
            prefix: None = nothing is committed.
            running: what they are guided towards; None = nothing.
            fixed: numbers that are held on their value; None = none.

        Raises:
            ActionError: one holds a NaN or infinite action.
        """
        device, count = self._model.decoder.position.device, len(given.rows)
        config, copies, with_past = self._config, self._config.num_samples, self._config.num_samples > 1
        with inference(device, count):
            context, committed, past_known = given.context, None, None
            if prefix is not None:
                committed = self.normalised_actions(prefix, given.state).repeat_interleave(copies, 0)
            towards = None if running is None else self._towards(running, given.state, copies)
            held = None if fixed is None else self._held(fixed, given.state, copies)
            if with_past:
                context = self._repeated(context, copies)
                past_known = torch.as_tensor(given.past_known, device=device).repeat_interleave(copies, 0)
            if self._conditioning is None:
                self._conditioning = self._model.conditioning(config.sampler)
            plan = self._model.plan(
                context,
                sampler=config.sampler,
                noise=torch.as_tensor(given.noise, device=device).flatten(0, 1),
                prefix=committed,
                guidance_scale=config.guidance_scale,
                corruption_noise=torch.as_tensor(given.corruption, device=device).repeat_interleave(copies, 0),
                with_past=with_past,
                past_valid=past_known,
                conditioning=self._conditioning,
                towards=towards,
                fixed=held,
            )
            actions = plan.actions if plan.past is None else self._most_faithful(given, plan)
            chunk = self._normalizer.denormalize("action", actions).cpu().numpy()
        return recorded_chunk(chunk, given, prefix, self._transforms, fixed)

    def _towards(self, running: RunningChunk, state: Mapping[str, NDArray[np.float32]], copies: int) -> TowardsActions:
        actions = self.normalised_actions(running.actions, state).repeat_interleave(copies, 0)
        jacobian: Jacobian = "exact" if running.exact else "identity"
        return TowardsActions(actions, running.delay_steps, running.max_gain, jacobian)

    def _held(self, fixed: GivenActions, state: Mapping[str, NDArray[np.float32]], copies: int) -> FixedActions:
        transforms = self._transforms.config
        if transforms.rotations or transforms.chunk != "absolute":
            raise ConfigError(
                "single numbers of actions can be held only where the model has actions as they are recorded; this one "
                f"has chunk {transforms.chunk!r} and {len(transforms.rotations)} rotations"
            )
        values = self.normalised_actions(fixed.actions, state).repeat_interleave(copies, 0)
        return FixedActions(values, torch.as_tensor(fixed.mask, device=values.device))

    def _most_faithful(self, given: PlanInput, plan: ActionPlan) -> Tensor:
        """Of each row's samples the actions (rows, Ta, Da) of that whose past is nearest to what was executed."""
        assert plan.past is not None
        count, device = len(given.rows), plan.past.device
        believed = plan.past.unflatten(0, (count, -1))  # (rows, S, k, Da)
        executed = self.normalised_actions(given.past, given.state)
        known = torch.as_tensor(given.past_known, device=device)
        error = (believed - executed[:, None]).square().sum(-1)
        best = (error * known[:, None]).sum(-1).argmin(-1)
        return plan.actions.unflatten(0, (count, -1))[torch.arange(count, device=device), best]
