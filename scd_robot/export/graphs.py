"""What is exported: three functions of tensors alone, with normalisation inside and the history as explicit tensors.

    EncoderStep    observation, cache, active -> context, cache        once per control step
    DecoderStep    x, flow_time, context -> velocity                   normalised; for samplers of one's own
    Plan           context, noise, prefix -> actions                   all denoising steps, unrolled

They compute what `ScdModel` does, through its own modules. The cache is a ring as in `scd_robot.nn.KVCache`, but with a
tensor each for every layer's keys and values, so that a step copies none of them more than once, and nothing is
changed in place.

Shapes: B rows, W window in control steps, P tokens per control step, N heads, Dh head width, K context tokens, D width,
Ta chunk length, k past actions, S samples, L = Ta, or k + Ta with several samples, Da action width.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from scd_robot.diffusion import corrupt, guide, sample
from scd_robot.model import Conditioning, ScdModel
from scd_robot.nn import KVCache
from scd_robot.nn.kv_cache import KeysValues
from scd_robot.normalization import Normalizer
from scd_robot.policies.scd import ScdPolicyConfig

__all__ = ["DecoderStep", "EncoderStep", "ExplicitCache", "Plan", "cache_names", "new_cache"]


def cache_names(num_layers: int) -> list[str]:
    """Of the cache's tensors, in order."""
    layers = [f"{name}_{layer}" for layer in range(num_layers) for name in ("keys", "values")]
    return ["slot_position", "token_valid", "position", *layers]


def new_cache(model: ScdModel, batch_size: int) -> list[Tensor]:
    """An empty history.

    Returns:
        slot_position (B, W) int64 of -1, token_valid (B, W, P) bool, position (B,) int64; then of each layer keys and
        values, (B, N, W, P, Dh) float32 of 0.
    """
    cache = model.new_cache(batch_size)
    pairs = [pair for layer in cache.keys_values for pair in layer.unbind(1)]
    return [cache.slot_position, cache.token_valid, cache.position, *(pair.contiguous() for pair in pairs)]


@dataclass
class ExplicitCache(KVCache):
    """A cache that replaces its tensors instead of changing them.

    Attributes:
        layers: keys and values of each layer, (B, N, W, P, Dh); `keys_values` of the base class is empty.
    """

    layers: list[KeysValues] = field(default_factory=list)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "ExplicitCache":
        """From tensors in the order of `cache_names`."""
        slot_position, token_valid, position, *pairs = tensors
        layers = list(zip(pairs[::2], pairs[1::2], strict=True))
        return cls(position.new_zeros(0), slot_position, token_valid, position, layers)

    @property
    def tensors(self) -> list[Tensor]:
        """In the order of `cache_names`."""
        return [self.slot_position, self.token_valid, self.position, *(x for pair in self.layers for x in pair)]

    def held(self) -> list[KeysValues]:
        """Keys and values of each layer, each (B, N, W * P, Dh)."""
        return [(keys.flatten(2, 3), values.flatten(2, 3)) for keys, values in self.layers]

    def append(
        self, pairs: Sequence[KeysValues], token_valid: Tensor | None = None, active: Tensor | None = None
    ) -> None:
        """One control step more; `active` (B,) bool is needed.

        Rows that do not take the step keep all that they will ever see: what is written of theirs lies in the slot that
        has left the window, and its position says so. To leave that slot alone would be two operations more per tensor.
        """
        assert active is not None
        batch, window, tokens = self.token_valid.shape
        slot = self.position % window
        claimed = (torch.arange(window, device=slot.device) == slot[:, None]) & active[:, None]
        written = claimed[:, :, None]  # ONNX Runtime has no `where` of truths
        present = self.token_valid.new_ones(batch, tokens) if token_valid is None else token_valid
        self.token_valid = (self.token_valid & ~written) | (present[:, None, :] & written)
        self.slot_position = torch.where(claimed, self.position[:, None], self.slot_position)
        rows, heads = (torch.arange(count, device=slot.device) for count in pairs[0][0].shape[:2])
        place = (rows[:, None], heads[None], slot[:, None])
        self.layers = [
            (keys.index_put(place, new_keys[:, :, :tokens]), values.index_put(place, new_values[:, :, :tokens]))
            for (keys, values), (new_keys, new_values) in zip(self.layers, pairs, strict=True)
        ]
        self.position = self.position + active


class EncoderStep(nn.Module):
    """One more control step.

    Args:
        model: trained.
        normalizer: statistics it was trained with.
    """

    def __init__(self, model: ScdModel, normalizer: Normalizer) -> None:
        super().__init__()
        self.model, self.normalizer, config = model, normalizer, model.config
        self.keys = sorted(config.observation_shapes)
        self.optional = self.keys if config.observation_tokens == "per_key" else config.image_keys
        self.reads_past_action = config.past_action_input != "none"

    @property
    def inputs(self) -> list[str]:
        """Names of the arguments before the cache's."""
        names = [f"observation.{key}" for key in self.keys] + [f"present.{key}" for key in self.optional]
        return [*names, *["past_action", "past_action_valid"] * self.reads_past_action, "active"]

    def example(self, batch_size: int) -> list[Tensor]:
        """Arguments before the cache's: zeros."""
        config, rows = self.model.config, torch.ones(batch_size, dtype=torch.bool)
        values = [
            torch.zeros(
                batch_size,
                *config.observation_shapes[key],
                dtype=torch.uint8 if key in config.image_keys else torch.float32,
            )
            for key in self.keys
        ]
        values += [rows.clone() for _ in self.optional]
        if self.reads_past_action:
            values += [torch.zeros(batch_size, config.action_dim), rows.clone()]
        return [*values, rows.clone()]

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Context, then the cache.

        Args:
            *arguments: as `inputs` names them: observation.KEY (B, Do) float32, or (B, H, W, C) uint8; present.KEY (B,)
                bool, False = absent; past_action (B, Da) executed one step before and past_action_valid (B,) whether it
                is known; active (B,), rows that take the step, the others keep what they see of their cache and their
                context means nothing; then the cache.
        """
        given = dict(zip(self.inputs, arguments, strict=False))
        cache, active = ExplicitCache.of(arguments[len(given) :]), given["active"]
        # Whatever stands in rows that do not take the step, what is written of theirs must be finite.
        given = {
            name: torch.where(active[:, None], value, 0) if value.is_floating_point() and value.ndim == 2 else value
            for name, value in given.items()
        }
        seen = {key: given[f"observation.{key}"] for key in self.keys}
        present = {key: given[f"present.{key}"] for key in self.optional}
        past = given.get("past_action")
        context = self.model.encode_step(
            self.normalizer.normalize_observation(seen),
            cache,
            active,
            past_action=None if past is None else self.normalizer.normalize("action", past),
            past_action_valid=given.get("past_action_valid"),
            present=present or None,
        )
        return context, *cache.tensors


class DecoderStep(nn.Module):
    """One evaluation of the decoder; x and velocity are normalised.

    Args:
        model: trained.
    """

    def __init__(self, model: ScdModel) -> None:
        super().__init__()
        self.model = model

    @property
    def inputs(self) -> list[str]:
        """Names of the arguments."""
        return ["x", "flow_time", "context", *["end_time"] * self.model.config.step_end_input]

    def example(self, batch_size: int) -> list[Tensor]:
        """Arguments."""
        config = self.model.config
        x = torch.zeros(batch_size, config.chunk_length, config.action_dim)
        context = torch.zeros(batch_size, config.num_context_tokens, config.width)
        times = [torch.zeros(batch_size, config.chunk_length)] * config.step_end_input
        return [x, torch.zeros(batch_size, config.chunk_length), context, *(time.clone() for time in times)]

    def forward(self, x: Tensor, flow_time: Tensor, context: Tensor, end_time: Tensor | None = None) -> Tensor:
        """Velocity (B, Ta, Da).

        Args:
            x: (B, Ta, Da) noisy actions.
            flow_time: (B, Ta) of each of them; 1 for committed ones.
            context: (B, K, D).
            end_time: (B, Ta) where the step ends, for models with `step_end_input`.
        """
        return self.model.velocity(x, flow_time, context, None, end_time)


class Plan(nn.Module):
    """A whole plan, in the units of the dataset.

    What the decoder makes of a flow time does not change from plan to plan: it is computed now and kept as constants,
    for noisy actions and for committed ones, which a model trained with `max_delay_steps` is shown at flow time 1.

    Args:
        model: trained.
        normalizer: statistics it was trained with.
        config: how it is run; sampler, guidance and number of samples become part of the graph.
    """

    def __init__(self, model: ScdModel, normalizer: Normalizer, config: ScdPolicyConfig) -> None:
        super().__init__()
        self.model, self.normalizer, self.config = model, normalizer, config
        self.guided, self.with_past = config.guidance_scale != 1.0, config.num_samples > 1
        one = torch.ones(1, 1)
        with torch.no_grad():
            conditions = model.conditioning(config.sampler)
            self._clean = _kept(model.decoder.condition(one, one))
            self._noisy = nn.ModuleList(map(_kept, conditions.values()))
        self._times = tuple(conditions)

    @property
    def inputs(self) -> list[str]:
        """Names of the arguments."""
        past = ["past", "past_known"] * self.with_past
        return ["context", "noise", "prefix", "prefix_length", *["corruption"] * self.guided, *past]

    def example(self, batch_size: int) -> list[Tensor]:
        """Arguments."""
        config, samples = self.model.config, self.config.num_samples
        length = config.chunk_length + config.num_past_actions * self.with_past
        context = torch.zeros(batch_size, config.num_context_tokens, config.width)
        values = [context, torch.zeros(batch_size, samples, length, config.action_dim)]
        values += [torch.zeros(batch_size, config.chunk_length, config.action_dim)]
        values += [torch.zeros(batch_size, dtype=torch.int64), *[context.clone()] * self.guided]
        if self.with_past:
            past = torch.zeros(batch_size, config.num_past_actions, config.action_dim)
            values += [past, torch.ones(past.shape[:2], dtype=torch.bool)]
        return values

    def forward(self, *arguments: Tensor) -> Tensor:
        """Actions (B, Ta, Da); action 0 is for the control step of the context.

        Args:
            *arguments: as `inputs` names them: context (B, K, D); noise (B, S, L, Da) standard normal; prefix (B, Ta,
                Da) committed actions of which the first prefix_length (B,) count; corruption (B, K, D) standard normal,
                for guidance; past (B, k, Da) executed actions, newest last, and past_known (B, k) bool, by which one of
                several samples is chosen.
        """
        given = dict(zip(self.inputs, arguments, strict=True))
        samples, length = given["noise"].shape[1:3]
        skipped = length - self.model.config.chunk_length
        noise = given["noise"].flatten(0, 1)
        if self.config.sampler.solver == "mip":
            noise = torch.zeros_like(noise)
        index = torch.arange(length, device=noise.device) - skipped
        committed = (index >= 0) & (index < given["prefix_length"][:, None])
        prefix = self.normalizer.normalize("action", given["prefix"])
        known = torch.nn.functional.pad(prefix, (0, 0, skipped, 0)).repeat_interleave(samples, 0)
        committed = committed.repeat_interleave(samples, 0)
        valid = None
        if self.with_past:
            there = given["past_known"].new_ones(len(given["past_known"]), self.model.config.chunk_length)
            valid = torch.cat((given["past_known"], there), dim=1).repeat_interleave(samples, 0)
        x = self._denoise(given, noise, known, committed, valid)
        actions = self._most_faithful(given, x) if self.with_past else x
        return self.normalizer.denormalize("action", actions)

    def _denoise(
        self, given: Mapping[str, Tensor], noise: Tensor, known: Tensor, committed: Tensor, valid: Tensor | None
    ) -> Tensor:
        """Normalised (B * S, L, Da); `known` and `committed` (B * S, L) hold the prefix in its places."""
        decoder, config, samples = self.model.decoder, self.model.config, self.config.num_samples
        context = given["context"].repeat_interleave(samples, 0)
        contexts = [decoder.prepare(context)]
        if self.guided:
            drawn = given["corruption"].repeat_interleave(samples, 0)
            contexts.append(decoder.prepare(corrupt(context, drawn, config.context_corruption)))
        trained = config.max_delay_steps > 0
        tokens = committed
        if config.fusion == "concat":
            tokens = torch.nn.functional.pad(committed, (config.num_context_tokens, 0), value=False)
        conditions = {
            time: _conditioning(cast(nn.ModuleList, noisy), self._clean, tokens if trained else None)
            for time, noisy in zip(self._times, self._noisy, strict=True)
        }

        def velocity(x: Tensor, time: float) -> Tensor:
            found = [decoder.velocity(x, conditions[time], prepared, valid) for prepared in contexts]
            return guide(found[0], found[1], self.config.guidance_scale) if self.guided else found[0]

        def clamp(x: Tensor, time: float) -> Tensor:
            shown = known if trained else (1 - time) * noise + time * known
            return torch.where(committed[..., None], shown, x)

        return sample(velocity, noise, self.config.sampler, clamp).x

    def _most_faithful(self, given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Of each row's samples (B * S, k + Ta, Da) the actions of that whose past is nearest to what was executed."""
        x = x.unflatten(0, (-1, self.config.num_samples))
        believed, actions = x.split((self.model.config.num_past_actions, self.model.config.chunk_length), dim=2)
        executed = self.normalizer.normalize("action", given["past"])
        error = (believed - executed[:, None]).square().sum(-1)
        best = (error * given["past_known"][:, None]).sum(-1).argmin(-1)
        return actions.gather(1, best[:, None, None, None].expand(-1, -1, *actions.shape[2:]))[:, 0]


def _kept(condition: Conditioning) -> nn.ModuleList:
    """A conditioning as constants of a graph."""
    parts = (*condition.blocks, condition.head)
    return nn.ModuleList(nn.ParameterList(nn.Parameter(x.clone(), requires_grad=False) for x in part) for part in parts)


def _tensors(kept: nn.ModuleList) -> list[tuple[Tensor, ...]]:
    """Those of each block, and last those of the head."""
    return [tuple(part) for part in cast(Iterable[Iterable[Tensor]], kept)]


def _conditioning(noisy: nn.ModuleList, clean: nn.ModuleList, committed: Tensor | None) -> Conditioning:
    """What was kept of a flow time, and for tokens where `committed` (B, tokens) is True what was kept of time 1."""
    parts = _tensors(noisy)
    if committed is not None:
        where = committed[..., None]
        pairs = zip(_tensors(clean), parts, strict=True)
        parts = [tuple(torch.where(where, a, b) for a, b in zip(*pair, strict=True)) for pair in pairs]
    return Conditioning(parts[:-1], parts[-1])
