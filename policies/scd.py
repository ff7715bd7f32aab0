"""The Separable Causal Diffusion policy: hides caches, normalisation and chunking behind `act`.

Per control step it runs one cached encoder step; every `num_executed` steps it denoises a new chunk.

Shapes: B rows, Ta chunk length, k past actions, Da action width, d committed actions.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scd_robot.config import from_json
from scd_robot.errors import CheckpointError, ConfigError, ShapeError
from scd_robot.model import ActionModel, ScdConfig, build_model
from scd_robot.normalization import Normalizer
from scd_robot.policies.config import ScdPolicyConfig
from scd_robot.policies.inputs import check_widths, checked_action, model_observation
from scd_robot.policies.planner import Planner
from scd_robot.policies.rows import PlanInput, Rows
from scd_robot.policies.sampling import inference, plan_noise
from scd_robot.transforms import TransformConfig, Transforms
from scd_robot.types import ActionArray, DatasetSpec, Observation, PolicySpec

__all__ = ["ScdPolicy", "ScdPolicyConfig"]

_MOST_TIMINGS = 100_000  # a robot that runs for days and never asks for them must not run out of memory


class ScdPolicy:
    """A trained model in a control loop; numpy in and out, in the units and keys of the dataset.

    Rows are independent: each has its own history, position in its chunk, and noise keyed by (seed, episode, plan), so
    that a row does the same alone and in a batch.

    Args:
        model: trained model; moved to `device` and put into evaluation mode.
        normalizer: statistics it was trained with.
        dataset: specification of its training data, as recorded.
        config: how to run it.
        device: torch device.
        transforms: between the recording and the model; what they did to actions is undone.
        reproducible: `act` computes plans for all rows whenever one is due, so that every computation has the same
            shape and a row's actions are bitwise the same whatever the others do; takes more time.

    Attributes:
        planned: (B,) which rows the last `act` planned for; None before.
    """

    def __init__(
        self,
        model: ActionModel[Any],
        normalizer: Normalizer,
        dataset: DatasetSpec,
        config: ScdPolicyConfig | None = None,
        device: str | torch.device = "cpu",
        transforms: TransformConfig | None = None,
        reproducible: bool = False,
    ) -> None:
        self.config = config or ScdPolicyConfig()
        self.reproducible = reproducible
        self.transforms = Transforms(transforms or TransformConfig(), dataset)
        self.model = model.to(device).eval()
        self.normalizer = normalizer.to(device)
        self.device = torch.device(device)
        architecture = model.config
        check_widths(architecture, normalizer, self.transforms.spec)
        self.config.check_fits(architecture)
        self._sources = {key: self.transforms.sources[key] for key in architecture.observation_shapes}
        self.spec = PolicySpec(
            observation={key: dataset.observation[key] for key in self._sources.values()},
            action_dim=dataset.action_dim,
            control_dt=dataset.control_dt,
            chunk_length=architecture.chunk_length,
            num_executed=self.config.num_executed,
            history_length=architecture.history_length,
            action_kind=dataset.action_kind,
        )
        self._planner = Planner(self.model, self.normalizer, self.transforms, self.config, self._repeated)
        self.planned: NDArray[np.bool_] | None = None
        self._timings = _empty_timings()
        self._rows: Rows | None = None
        self._context: Any = None  # what plans are made from, of all rows; see the hooks at the end of the class
        self._state: dict[str, NDArray[np.float32]] = {}  # what chunks are relative to
        self._first_episodes: list[int] | None = None
        self._next_episode = 0

    @classmethod
    def from_parts(
        cls,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        normalizer: Normalizer,
        dataset: DatasetSpec,
        device: str | torch.device = "cpu",
        reproducible: bool = False,
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
        settings = dict(config["policy"])
        steps = overrides.pop("num_denoising_steps", None)
        if steps is not None:
            settings["sampler"] = {**settings["sampler"], "num_denoising_steps": steps}
        settings.update({name: value for name, value in overrides.items() if value is not None})
        transforms = from_json(TransformConfig, config["transforms"], "transforms")
        how = from_json(ScdPolicyConfig, settings, "policy")
        return cls(model, normalizer, dataset, how, device, transforms, reproducible)

    def reset(self, rows: Sequence[int] | None = None, episodes: Sequence[int] | None = None) -> None:
        """Begins new episodes; see `types.Policy.reset`. Without `episodes` they are counted on, from 0."""
        if rows is None:
            if self._rows is not None:
                self._next_episode = self._rows.next_episode
            self._rows, self._context, self._state = None, None, {}
            self._first_episodes = None if episodes is None else list(episodes)
            return
        if self._rows is None:
            raise ConfigError("reset(rows=...) before the first observation: the number of rows is not known yet")
        self._rows.reset(rows, episodes)

    def new_history(self, episode: int) -> Rows:
        """The memory of one row that has observed nothing yet, for `resume`; `episode` keys its noise."""
        return Rows(self.model, [episode], self.spec.action_dim)

    def resume(self, histories: Sequence[Rows]) -> None:
        """Goes on with these memories as its rows, in this order, and forgets what it had; `observe` comes next.

        They belong to the policy until `release` hands them back.

        Args:
            histories: one of each row, from `new_history` or `release`.
        """
        self._rows = histories[0] if len(histories) == 1 else Rows.join(histories)
        self._context, self._state = None, {}

    def release(self) -> list[Rows]:
        """Hands over the memory of each row, for `resume`, and forgets it: rows may come and go between control steps.

        What the encoder made of the last observation is not part of it: whoever wants a plan of it plans first.
        """
        rows, self._rows, self._context, self._state = self._rows, None, None, {}
        if rows is None or rows.batch_size == 1:
            return [] if rows is None else [rows]
        return [rows.select([row]) for row in range(rows.batch_size)]

    def observe(self, observation: Observation, executed_action: ActionArray | None = None) -> None:
        """Advances every row's history by one control step, without planning.

        Args:
            observation: arrays (B, ...), all keys of `spec.observation` (others are ignored), pictures (B, H, W, C)
                uint8. A model with a token for each key does without some of them: what is left out, or None, is absent
                in this step. Pictures may be None in any model.
            executed_action: (B, Da) what the robot did in the last step; None = what the policy asked for.

        Raises:
            ShapeError: missing keys, wrong widths, a batch size other than before, NaN or infinite values; pictures of
                another size or type, or of one colour.
        """
        may_be_absent = self.model.config.observation_tokens == "per_key"
        seen, present = model_observation(observation, self._sources, self.transforms, may_be_absent)
        batch = len(next(iter(seen.values())))
        if executed_action is not None:
            executed_action = checked_action("executed_action", executed_action, (batch, self.spec.action_dim))
        if self._rows is None:
            episodes = self._first_episodes
            if episodes is None:
                episodes = list(range(self._next_episode, self._next_episode + batch))
            if len(episodes) != batch:
                raise ShapeError(f"reset() was given {len(episodes)} episodes, the observation has {batch} rows")
            self._rows = Rows(self.model, episodes, self.spec.action_dim)
        elif batch != self._rows.batch_size:
            raise ShapeError(f"batch has {batch} rows, the policy runs {self._rows.batch_size}; call reset() first")
        rows = self._rows
        rows.record_executed(executed_action)
        encodes = rows.position % self.model.config.history_stride == 0
        if encodes.any():
            started = time.perf_counter()
            self._encode(rows, seen, present, encodes)
            self._timings["encoder_ms"].append(1e3 * (time.perf_counter() - started))
        rows.position += 1

    def _encode(
        self, rows: Rows, seen: Mapping[str, NDArray[Any]], present: Mapping[str, bool], encodes: NDArray[np.bool_]
    ) -> None:
        """One encoder step of the rows for which `encodes` (B,) is True."""
        state = {part.key: seen[part.key] for part in self.transforms.config.chunk_parts}
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
                normalised, rows.cache, active, past_action=past, past_action_valid=known, present=there or None
            )
            if active is not None and self._context is not None:
                context = self._where(active, context, self._context)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self._context = context
        for key, value in state.items():
            kept = self._state.get(key, value)
            self._state[key] = np.where(encodes[:, None], value, kept)

    def plan(
        self, prefix: ActionArray | None = None, delay_steps: int = 0, rows: Sequence[int] | None = None
    ) -> ActionArray:
        """Samples a chunk for every row, or some, from the last observation, and follows it from now on.

        Args:
            prefix: (n, d, Da) actions already committed from the current control step on; the chunk begins with them.
            delay_steps: commit so many actions of the running chunk instead (the control steps that will pass while
                this plan is computed). With `prefix`, its length must be this or `delay_steps` 0.
            rows: n numbers, ascending; None = all.

        A model trained with max_delay_steps = 0 was never shown clean actions: it sees the committed ones noised like
        the rest at every denoising step, which is less exact about how the plan goes on.

        Returns:
            (n, Ta, Da); action 0 is for the control step last observed.
        """
        everyone = self._observed("plan").batch_size
        chosen = np.arange(everyone) if rows is None else np.asarray(rows, np.int64)
        if (np.diff(chosen) < 1).any():
            raise ConfigError(f"rows must be different numbers in ascending order, got {chosen.tolist()}")
        remembered = self._plannable("plan", chosen)
        if delay_steps < 0:
            raise ConfigError(f"delay_steps must not be negative, got {delay_steps}")
        if prefix is None and delay_steps:
            prefix = remembered.upcoming(delay_steps, chosen)
        elif prefix is not None:
            count = delay_steps or (np.shape(prefix)[1] if np.ndim(prefix) == 3 else 0)
            prefix = checked_action("prefix", prefix, (len(chosen), count, self.spec.action_dim))
        chunk = self._sample_chunks(chosen, prefix)
        remembered.follow(chosen, chunk)
        return chunk

    @property
    def may_plan(self) -> bool:
        """Whether `snapshot` and `plan` are possible now: all rows were observed, and the encoder ran for them."""
        rows = self._rows
        if rows is None or self._context is None or not rows.position.all():
            return False
        return not ((rows.position - 1) % self.model.config.history_stride).any()

    @property
    def max_prefix(self) -> int:
        """Most actions that `plan_from` and `plan` take as committed."""
        return self.model.config.max_delay_steps or self.spec.chunk_length - 1

    def snapshot(self) -> PlanInput:
        """What a plan from the last observation is made from, for `plan_from`, in another thread say.

        Each snapshot has noise of its own, as each plan has.

        Raises:
            ConfigError: a plan is not due; see `may_plan`.
        """
        rows = self._plannable("snapshot")
        given = self._plan_input(np.arange(rows.batch_size))
        rows.num_plans += 1
        with inference(self.device, rows.batch_size):
            copied = self._of_rows(given.context, torch.as_tensor(given.rows, device=self.device))
        return replace(given, context=copied)

    def plan_from(self, given: PlanInput, prefix: ActionArray | None = None) -> ActionArray:
        """Samples a chunk from a snapshot; changes nothing, so that `observe` may run in another thread meanwhile.

        Args:
            given: from `snapshot`.
            prefix: (B, d, Da) actions committed from the snapshot's control step on; the chunk begins with them.

        Returns:
            (B, Ta, Da), what `plan` would have given then; action 0 is for the snapshot's control step.
        """
        if prefix is not None:
            count = np.shape(prefix)[1] if np.ndim(prefix) == 3 else 0
            prefix = checked_action("prefix", prefix, (len(given.rows), count, self.spec.action_dim))
        return self._planner.denoise(given, prefix)

    def act(self, observation: Observation, executed_action: ActionArray | None = None) -> ActionArray:
        """Observes, plans for the rows whose plan is used up, and returns each row's next action (B, Da)."""
        self.observe(observation, executed_action)
        rows = self._observed("act")
        self.planned = rows.age >= self.spec.num_executed
        due = np.flatnonzero(self.planned)
        if self.reproducible and len(due):
            rows.follow(due, self._sample_chunks(np.arange(rows.batch_size), None)[due])
        elif len(due):
            rows.follow(due, self._sample_chunks(due, None))
        return rows.current_action()

    @property
    def context(self) -> Tensor:
        """(B, K, D) what the encoder made of each row's history when it ran last; plans are made from it.

        Raises:
            ConfigError: there was no observation yet.
        """
        if self._context is None:
            raise ConfigError("there is no context before the first observation: call observe(observation)")
        return self._context

    def drain_timings(self) -> dict[str, list[float]]:
        """Wall times [ms] of encoder steps and plans since the last call, and how many rows each plan was for.

        They are {"encoder_ms", "plan_ms", "plan_rows"}, of each the latest 100,000 at most.
        """
        drained, self._timings = self._timings, _empty_timings()
        return {name: list(values) for name, values in drained.items()}

    def _sample_chunks(self, chosen: NDArray[np.int64], prefix: ActionArray | None) -> ActionArray:
        """New chunks (rows, Ta, Da) for some rows."""
        started = time.perf_counter()
        chunk = self._planner.denoise(self._plan_input(chosen), prefix)
        self._timings["plan_ms"].append(1e3 * (time.perf_counter() - started))
        self._timings["plan_rows"].append(len(chosen))
        return chunk

    def _plan_input(self, chosen: NDArray[np.int64]) -> PlanInput:
        """Of some rows; the context of all rows is not copied."""
        rows = self._observed("plan")
        guided, copies = self.config.guidance_scale != 1.0, self.config.num_samples
        noise, corruption = plan_noise(
            self.model.config, rows, chosen, seed=self.config.seed, num_samples=copies, guided=guided
        )
        context = self._context
        if len(chosen) < rows.batch_size:
            with inference(self.device, len(chosen)):
                context = self._of_rows(context, torch.as_tensor(chosen, device=self.device))
        state = {key: value[chosen] for key, value in self._state.items()}
        return PlanInput(chosen, context, state, noise, corruption, rows.past[chosen], rows.past_known[chosen])

    def _plannable(self, call: str, chosen: NDArray[np.int64] | None = None) -> Rows:
        """Raises ConfigError where a plan of the chosen rows (None = all) is not due."""
        rows = self._observed(call)
        chosen = np.arange(rows.batch_size) if chosen is None else chosen
        position = rows.position[chosen]
        late = chosen[(position - 1) % self.model.config.history_stride != 0]
        if len(late):
            raise ConfigError(
                f"{call}() of rows {late.tolist()} is due only in control steps in which the encoder runs, every "
                f"{self.model.config.history_stride} (history_stride)"
            )
        if not position.all():
            waiting = chosen[position == 0].tolist()
            raise ConfigError(f"{call}() needs an observation of rows {waiting} first, which were just reset")
        return rows

    def _observed(self, call: str) -> Rows:
        if self._rows is None or self._context is None:
            raise ConfigError(f"{call}() needs an observation first: call observe(observation)")
        return self._rows

    # A policy whose model makes something else of the history than one tensor replaces these.

    def _where(self, active: Tensor, new: Any, old: Any) -> Any:
        """The new context in the rows where `active` (B,) is True, the old one in the others."""
        return torch.where(active[:, None, None], new, old)

    def _of_rows(self, context: Any, rows: Tensor) -> Any:
        """The context of some rows (n,)."""
        return context[rows]

    def _repeated(self, context: Any, copies: int) -> Any:
        """Each row's context so many times in a row."""
        return context.repeat_interleave(copies, 0)


def _empty_timings() -> dict[str, deque[float]]:
    return {name: deque(maxlen=_MOST_TIMINGS) for name in ("encoder_ms", "plan_ms", "plan_rows")}
