"""The Separable Causal Diffusion policy: hides caches, normalisation and chunking behind `act`.

Per control step it runs one cached encoder step; every `num_executed` steps it denoises a new chunk.

Shapes: B rows, Ta chunk length, k past actions, Da action width, d committed actions.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scd_robot.config import from_json
from scd_robot.diffusion import SamplerConfig
from scd_robot.errors import CheckpointError, ConfigError, ShapeError
from scd_robot.model import Conditioning, ScdConfig, ScdModel
from scd_robot.normalization import Normalizer
from scd_robot.seeding import keyed_rng
from scd_robot.types import ActionArray, DatasetSpec, Observation, PolicySpec

__all__ = ["ScdPolicy", "ScdPolicyConfig"]

_SMALL_BATCH = 16  # rows up to which one thread is faster than several
_MOST_TIMINGS = 100_000  # a robot that runs for days and never asks for them must not run out of memory


@dataclass(frozen=True)
class ScdPolicyConfig:
    """How a trained model is run.

    Attributes:
        num_executed: actions taken from one plan before the next.
        sampler: solver and denoising steps.
        guidance_scale: guidance by context corruption; 1 = off.
        num_samples: plans sampled from one context, of which the one that best agrees with the executed past is kept
            (self-verification, arXiv 2505.09561); 1 = off, more need a model with num_past_actions > 0.
        seed: keys the noise, together with episode and plan number.
    """

    num_executed: int = 8
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance_scale: float = 1.0
    num_samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_executed", "num_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")


class ScdPolicy:
    """A trained model in a control loop; numpy in and out, in the units and keys of the dataset.

    Rows are independent: each has its own history, position in its chunk, and noise keyed by (seed, episode, plan), so
    that a row does the same alone and in a batch.

    Args:
        model: trained model; moved to `device` and put into evaluation mode.
        normalizer: statistics it was trained with.
        dataset: specification of its training data.
        config: how to run it.
        device: torch device.
    """

    def __init__(
        self,
        model: ScdModel,
        normalizer: Normalizer,
        dataset: DatasetSpec,
        config: ScdPolicyConfig | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config = config or ScdPolicyConfig()
        self.model = model.to(device).eval()
        self.normalizer = normalizer.to(device)
        self.device = torch.device(device)
        architecture = model.config
        _check_widths(architecture, normalizer, dataset)
        if self.config.num_executed > architecture.chunk_length:
            raise ConfigError(
                f"num_executed {self.config.num_executed} exceeds the model's chunk_length {architecture.chunk_length}"
            )
        if self.config.num_samples > 1 and not architecture.num_past_actions:
            raise ConfigError("num_samples > 1 picks by agreement with the past and needs num_past_actions > 0")
        self.spec = PolicySpec(
            observation={key: dataset.observation[key] for key in architecture.observation_shapes},
            action_dim=dataset.action_dim,
            control_dt=dataset.control_dt,
            chunk_length=architecture.chunk_length,
            num_executed=self.config.num_executed,
            history_length=architecture.history_length,
        )
        self._timings = _empty_timings()
        self._rows: _Rows | None = None
        self._context: Tensor | None = None
        self._conditioning: dict[float, Conditioning] | None = None  # of weights and sampler, which never change
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
        **overrides: Any,
    ) -> "ScdPolicy":
        """Builds a policy from a checkpoint's contents; `overrides` replace fields of `ScdPolicyConfig`.

        Raises:
            CheckpointError: the weights are not those of the configuration.
        """
        model = ScdModel(from_json(ScdConfig, config["model"], "model"))
        try:
            model.load_state_dict(dict(weights), strict=True)
        except RuntimeError as error:
            raise CheckpointError(f"the weights do not fit the configuration: {str(error).splitlines()[-1]}") from error
        settings = dict(config["policy"])
        steps = overrides.pop("num_denoising_steps", None)
        if steps is not None:
            settings["sampler"] = {**settings["sampler"], "num_denoising_steps": steps}
        settings.update({name: value for name, value in overrides.items() if value is not None})
        return cls(model, normalizer, dataset, from_json(ScdPolicyConfig, settings, "policy"), device)

    def reset(self, rows: Sequence[int] | None = None, episodes: Sequence[int] | None = None) -> None:
        """Begins new episodes; see `types.Policy.reset`. Without `episodes` they are counted on, from 0."""
        if rows is None:
            if self._rows is not None:
                self._next_episode = self._rows.next_episode
            self._rows, self._context = None, None
            self._first_episodes = None if episodes is None else list(episodes)
            return
        if self._rows is None:
            raise ConfigError("reset(rows=...) before the first observation: the number of rows is not known yet")
        chosen = np.asarray(rows, np.int64)
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < self._rows.batch_size):
            raise ShapeError(f"rows {list(rows)} are out of range for a batch of {self._rows.batch_size}")
        self._rows.reset(chosen, episodes)

    def observe(self, observation: Observation, executed_action: ActionArray | None = None) -> None:
        """Advances every row's history by one control step, without planning.

        Args:
            observation: arrays (B, ...), all keys of `spec.observation` (others are ignored).
            executed_action: (B, Da) what the robot did in the last step; None = what the policy asked for.

        Raises:
            ShapeError: missing keys, wrong widths, a batch size other than before, NaN or infinite values.
        """
        arrays = self._checked(observation)
        batch = len(next(iter(arrays.values())))
        if executed_action is not None:
            executed_action = self._checked_action("executed_action", executed_action, (batch, self.spec.action_dim))
        if self._rows is None:
            episodes = self._first_episodes
            if episodes is None:
                episodes = list(range(self._next_episode, self._next_episode + batch))
            self._rows = _Rows(self.model, batch, episodes)
        elif batch != self._rows.batch_size:
            raise ShapeError(f"batch has {batch} rows, the policy runs {self._rows.batch_size}; call reset() first")
        rows = self._rows
        rows.record_executed(executed_action)
        started = time.perf_counter()
        with self._inference(batch):
            normalised = {
                key: self.normalizer.normalize(key, torch.as_tensor(value, device=self.device))
                for key, value in arrays.items()
            }
            past = None
            if self.model.config.past_action_input != "none":
                past = self.normalizer.normalize("action", torch.as_tensor(rows.past[:, -1], device=self.device))
            self._context = self.model.encode_step(normalised, rows.cache, past_action=past)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self._timings["encoder_ms"].append(1e3 * (time.perf_counter() - started))
        rows.position += 1

    def plan(self, prefix: ActionArray | None = None, delay_steps: int = 0) -> ActionArray:
        """Samples a chunk for every row from the last observation, and follows it from now on.

        Args:
            prefix: (B, d, Da) actions already committed from the current control step on; the chunk begins with them.
            delay_steps: commit so many actions of the running chunk instead (the control steps that will pass while
                this plan is computed). With `prefix`, its length must be this or `delay_steps` 0.

        Returns:
            (B, Ta, Da); action 0 is for the control step last observed.
        """
        rows = self._observed("plan")
        if delay_steps < 0:
            raise ConfigError(f"delay_steps must not be negative, got {delay_steps}")
        if prefix is None and delay_steps:
            prefix = rows.upcoming(delay_steps)
        elif prefix is not None:
            count = delay_steps or (np.shape(prefix)[1] if np.ndim(prefix) == 3 else 0)
            prefix = self._checked_action("prefix", prefix, (rows.batch_size, count, self.spec.action_dim))
        return self._plan_rows(np.arange(rows.batch_size), prefix)

    def act(self, observation: Observation, executed_action: ActionArray | None = None) -> ActionArray:
        """Observes, plans for the rows whose plan is used up, and returns each row's next action (B, Da)."""
        self.observe(observation, executed_action)
        rows = self._observed("act")
        due = np.flatnonzero(rows.age >= self.spec.num_executed)
        if len(due):
            self._plan_rows(due, None)
        return rows.current_action()

    def drain_timings(self) -> dict[str, list[float]]:
        """Wall times [ms] of encoder steps and plans since the last call, as {"encoder_ms", "plan_ms"}.

        No more than the latest 100,000 of each are kept.
        """
        drained, self._timings = self._timings, _empty_timings()
        return {name: list(values) for name, values in drained.items()}

    def _plan_rows(self, chosen: NDArray[np.int64], prefix: ActionArray | None) -> ActionArray:
        rows, config = self._observed("plan"), self.config
        architecture = self.model.config
        with_past = config.num_samples > 1
        length = architecture.chunk_length + (architecture.num_past_actions if with_past else 0)
        started = time.perf_counter()
        guided = config.guidance_scale != 1.0
        noise = np.empty((len(chosen), config.num_samples, length, architecture.action_dim), np.float32)
        corruption = np.empty((len(chosen) * guided, architecture.num_context_tokens, architecture.width), np.float32)
        for i, row in enumerate(chosen):
            rng = keyed_rng(config.seed, rows.episode[row], rows.num_plans[row])
            rng.standard_normal(dtype=np.float32, out=noise[i])
            if guided:
                rng.standard_normal(dtype=np.float32, out=corruption[i])
        with self._inference(len(chosen)):
            assert self._context is not None
            copies = config.num_samples
            context, committed = self._context, None
            if len(chosen) < rows.batch_size:
                context = context[torch.as_tensor(chosen, device=self.device)]
            if prefix is not None:
                committed = self.normalizer.normalize("action", torch.as_tensor(prefix, device=self.device))
                committed = committed.repeat_interleave(copies, 0)
            if self._conditioning is None:
                self._conditioning = self.model.conditioning(config.sampler)
            plan = self.model.plan(
                context.repeat_interleave(copies, 0) if copies > 1 else context,
                sampler=config.sampler,
                noise=torch.as_tensor(noise, device=self.device).flatten(0, 1),
                prefix=committed,
                guidance_scale=config.guidance_scale,
                corruption_noise=torch.as_tensor(corruption, device=self.device).repeat_interleave(copies, 0),
                with_past=with_past,
                conditioning=self._conditioning,
            )
            chunk = self.normalizer.denormalize("action", plan.actions).cpu().numpy()
            if plan.past is not None:
                believed = self.normalizer.denormalize("action", plan.past).cpu().numpy()
                chunk = chunk[rows.best_sample(chosen, believed.reshape(len(chosen), copies, *believed.shape[1:]))]
        if prefix is not None:
            chunk[:, : prefix.shape[1]] = prefix
        self._timings["plan_ms"].append(1e3 * (time.perf_counter() - started))
        rows.follow(chosen, chunk)
        return chunk

    def _observed(self, call: str) -> "_Rows":
        if self._rows is None or self._context is None:
            raise ConfigError(f"{call}() needs an observation first: call observe(observation)")
        return self._rows

    def _checked(self, observation: Observation) -> dict[str, NDArray[Any]]:
        arrays = {}
        batch = None
        for key, spec in self.spec.observation.items():
            if key not in observation:
                raise ShapeError(f"observation {key!r} is missing; got {sorted(observation)}")
            value = _as_float32(observation[key], f"observation {key!r}")
            batch = len(value) if batch is None and value.ndim else batch
            if value.shape != (batch, *spec.shape) or not batch:
                expected = ", ".join(map(str, ("B", *spec.shape)))
                raise ShapeError(
                    f"observation {key!r} must be ({expected}) with one B >= 1 for all keys, got {value.shape}"
                )
            if not np.isfinite(value).all():
                row = int(np.argwhere(~np.isfinite(value))[0][0])
                raise ShapeError(f"observation {key!r} holds a NaN or infinite value in row {row}")
            arrays[key] = value
        return arrays

    def _checked_action(self, name: str, action: ActionArray, shape: tuple[int, ...]) -> ActionArray:
        value = _as_float32(action, name)
        if value.shape != shape:
            raise ShapeError(f"{name} must be {shape}, got {value.shape}")
        if not np.isfinite(value).all():
            row = int(np.argwhere(~np.isfinite(value))[0][0])
            raise ShapeError(f"{name} holds a NaN or infinite value in row {row}")
        return value

    @contextmanager
    def _inference(self, batch: int) -> Iterator[None]:
        """No gradients, and one thread for small batches: more only wait for each other."""
        threads = torch.get_num_threads()
        single = self.device.type == "cpu" and batch <= _SMALL_BATCH and threads > 1
        if single:
            torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                yield
        finally:
            if single:
                torch.set_num_threads(threads)


def _check_widths(config: ScdConfig, normalizer: Normalizer, dataset: DatasetSpec) -> None:
    """Raises ShapeError where model, statistics and specification are not of one dataset."""
    specified = {key: spec.shape for key, spec in dataset.observation.items()} | {"action": (dataset.action_dim,)}
    for key, shape in {**config.observation_shapes, "action": (config.action_dim,)}.items():
        statistics = normalizer.statistics.get(key)
        found = (specified.get(key), None if statistics is None else (statistics.width,))
        if found != (tuple(shape), tuple(shape)):
            raise ShapeError(
                f"the model takes {key!r} of shape {tuple(shape)}, the dataset's specification has {found[0]} and the "
                f"normalisation {found[1]}; they must be of one checkpoint"
            )


def _empty_timings() -> dict[str, deque[float]]:
    return {name: deque(maxlen=_MOST_TIMINGS) for name in ("encoder_ms", "plan_ms")}


def _as_float32(values: Any, name: str) -> ActionArray:
    """The values in float32, those that are too large as infinite."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ShapeError(f"{name} must hold numbers, got an array of {array.dtype}")
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


class _Rows:
    """State of the B rows: history cache, chunks being followed, executed actions."""

    def __init__(self, model: ScdModel, batch_size: int, episodes: Sequence[int]) -> None:
        config = model.config
        if len(episodes) != batch_size:
            raise ShapeError(f"reset() was given {len(episodes)} episodes, the observation has {batch_size} rows")
        self.batch_size = batch_size
        self.cache = model.new_cache(batch_size)
        self.position = np.zeros(batch_size, np.int64)  # control steps observed
        self.origin = np.full(batch_size, -1, np.int64)  # control step of the chunk's action 0, -1 = no chunk
        self.chunk = np.zeros((batch_size, config.chunk_length, config.action_dim), np.float32)
        self.past = np.zeros((batch_size, max(1, config.num_past_actions), config.action_dim), np.float32)
        self.num_plans = np.zeros(batch_size, np.int64)
        self.episode = np.asarray(episodes, np.int64)
        self.next_episode = int(self.episode.max()) + 1

    @property
    def age(self) -> NDArray[np.int64]:
        """(B,) index into the chunk for the control step last observed; very large where there is no chunk."""
        return np.where(self.origin < 0, np.iinfo(np.int64).max, self.position - 1 - self.origin)

    def reset(self, chosen: NDArray[np.int64], episodes: Sequence[int] | None) -> None:
        mask = torch.zeros(self.batch_size, dtype=torch.bool, device=self.cache.position.device)
        mask[torch.as_tensor(chosen, device=mask.device)] = True
        with torch.inference_mode():
            self.cache.reset(mask)
        if episodes is None:
            episodes = range(self.next_episode, self.next_episode + len(chosen))
        elif len(episodes) != len(chosen):
            raise ShapeError(f"{len(chosen)} rows reset with {len(episodes)} episodes")
        self.episode[chosen] = np.asarray(episodes, np.int64)
        self.next_episode = max(self.next_episode, int(self.episode.max()) + 1)
        self.position[chosen], self.origin[chosen], self.num_plans[chosen], self.past[chosen] = 0, -1, 0, 0

    def record_executed(self, executed: ActionArray | None) -> None:
        """Appends the last step's action, as reported or as the chunk said, to the rows that have begun."""
        begun = np.flatnonzero(self.position > 0)
        if not len(begun):
            return
        last = executed if executed is not None else self.current_action()
        self.past[begun, :-1] = self.past[begun, 1:]
        self.past[begun, -1] = last[begun]

    def current_action(self) -> ActionArray:
        """(B, Da) the chunk's action for the control step last observed; its last one once it is used up."""
        index = np.clip(self.position - 1 - self.origin, 0, self.chunk.shape[1] - 1)
        return self.chunk[np.arange(self.batch_size), index].copy()

    def upcoming(self, count: int) -> ActionArray:
        """(B, count, Da) the running chunks' actions from the current control step on."""
        left = self.chunk.shape[1] - self.age
        if (left < count).any():
            raise ConfigError(
                f"delay_steps {count} exceeds what is left of the running chunk, {max(0, int(left.min()))}"
            )
        index = self.age[:, None] + np.arange(count)
        return self.chunk[np.arange(self.batch_size)[:, None], index]

    def follow(self, chosen: NDArray[np.int64], chunk: ActionArray) -> None:
        self.chunk[chosen] = chunk
        self.origin[chosen] = self.position[chosen] - 1
        self.num_plans[chosen] += 1

    def best_sample(self, chosen: NDArray[np.int64], believed: ActionArray) -> NDArray[np.int64]:
        """Flat indices of the samples whose believed past (rows, N, k, Da) is nearest to what was executed."""
        count = believed.shape[2]
        known = np.arange(count)[None, :] >= count - np.minimum(count, self.position[chosen] - 1)[:, None]
        error = np.square(believed - self.past[chosen][:, None]).sum(-1)
        best = (error * known[:, None]).sum(-1).argmin(-1)
        return np.arange(len(chosen)) * believed.shape[1] + best
