"""What both architectures share: control steps become tokens, and what is known of the history a plan.

Shapes: B batch, T control steps, P tokens per control step, Ta chunk length, k past actions, L = k + Ta, Da action
width, M samples per stream, R = B * M, K context tokens, D width.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from scd_robot.diffusion import SamplerConfig, TowardsActions, guided_velocity, overlap_weights, sample
from scd_robot.errors import ConfigError, ShapeError
from scd_robot.model.config import ScdConfig
from scd_robot.model.decoder import Conditioning
from scd_robot.model.denoiser import ContextT, Denoiser
from scd_robot.model.held import FixedActions, hold
from scd_robot.model.tokenizer import StepTokenizer
from scd_robot.nn import KVCache, take_steps

__all__ = ["ActionModel", "ActionPlan", "HistoryModel", "check_guidance", "greatest_gain"]


@dataclass(frozen=True)
class ActionPlan:
    """A sampled action chunk, normalised.

    Attributes:
        actions: (B, Ta, Da); action 0 is for the control step whose context was given.
        past: (B, k, Da) what the decoder believes was executed in the k steps before; None unless asked for.
        num_evaluations: NFE, decoder calls.
    """

    actions: Tensor
    past: Tensor | None
    num_evaluations: int


class HistoryModel(Denoiser[ContextT]):
    """Tokenizer, what is made of the history, and the decoder to which that is the context."""

    def __init__(self, config: ScdConfig) -> None:
        super().__init__(config)
        self.tokenizer = StepTokenizer(config)

    def encode(
        self,
        observation: Mapping[str, Tensor],
        past_action: Tensor | None = None,
        *,
        past_action_valid: Tensor | None = None,
        present: Mapping[str, Tensor] | None = None,
        stream: Tensor | None = None,
        first_position: int = 0,
    ) -> Tensor:
        """Contexts (B, T, K, D) of all control steps of a stream, in one pass.

        Args:
            observation: by key (B, T, Do), or pictures (B, T, H, W, C) uint8.
            past_action: (B, T, Da) executed one step before, where the configuration reads it.
            past_action_valid: (B, T) bool; None = all but step 0 of each stream.
            present: (B, T) bool by key, for keys absent in some steps.
            stream: (B, T) int; history is forgotten where it rises. -1 = a step that no step of another number sees.
            first_position: control-step index of step 0 of the stream.
        """
        tokens, valid = self._tokenize(observation, past_action, past_action_valid, present, stream)
        return self._encode(tokens, valid, stream, first_position)

    def encode_at(
        self,
        position: Tensor,
        observation: Mapping[str, Tensor],
        past_action: Tensor | None = None,
        *,
        present: Mapping[str, Tensor] | None = None,
        stream: Tensor | None = None,
    ) -> ContextT:
        """What plans at the control steps `position` (B, M) of a stream are made from; other arguments as of `encode`.

        `samples` makes of it what `velocity` and `plan` take. A model without memory encodes these control steps only,
        since it sees no others.
        """
        if self.config.history_length == 1 and past_action is None:
            observation, present = (
                {key: take_steps(value, position) for key, value in given.items()}
                for given in (observation, present or {})
            )
            position, stream = torch.arange(position.shape[1], device=position.device).expand_as(position), None
        tokens, valid = self._tokenize(observation, past_action, None, present or None, stream)
        return self._encode_at(position, tokens, valid, stream)

    def encode_step(
        self,
        observation: Mapping[str, Tensor],
        cache: KVCache,
        active: Tensor | None = None,
        *,
        past_action: Tensor | None = None,
        past_action_valid: Tensor | None = None,
        present: Mapping[str, Tensor] | None = None,
    ) -> ContextT:
        """The context of one more control step (B, K, D); equal to `encode` over the whole stream at that step.

        Args:
            observation: by key (B, Do), or pictures (B, H, W, C) uint8.
            cache: from `new_cache`; advanced in place.
            active: (B,) bool, rows that take the step; the others stay as they are and their context means nothing.
            past_action: (B, Da) executed one step before, where the configuration reads it; ignored in the first
                step of a row.
            past_action_valid: (B,) bool, False where it is not known; None = known.
            present: (B,) bool by key, for keys absent in this step.
        """
        known = None
        if past_action is not None:
            known = cache.position > 0 if past_action_valid is None else past_action_valid & (cache.position > 0)
        tokens, valid = self.tokenizer(
            {key: value[:, None] for key, value in observation.items()},
            None if past_action is None else past_action[:, None],
            None if known is None else known[:, None],
            None if present is None else {key: value[:, None] for key, value in present.items()},
        )
        return self._encode_step(tokens[:, 0], cache, None if valid is None else valid[:, 0], active)

    @abstractmethod
    def new_cache(self, batch_size: int) -> KVCache:
        """An empty history for `encode_step`, on the model's device and in its dtype."""

    @abstractmethod
    def samples(self, context: ContextT, copies: int) -> ContextT:
        """Of what `encode_at` gave, the context of so many samples of each position, R = B * M * copies in a row."""

    def _tokenize(
        self,
        observation: Mapping[str, Tensor],
        past_action: Tensor | None,
        past_action_valid: Tensor | None,
        present: Mapping[str, Tensor] | None,
        stream: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T, P, D) of a stream, and which are there."""
        if past_action is not None and past_action_valid is None:
            past_action_valid = torch.ones(past_action.shape[:2], dtype=torch.bool, device=past_action.device)
            past_action_valid[:, 0] = False
            if stream is not None:
                newest = stream.cummax(dim=1).values  # over steps that are left out, which are -1
                past_action_valid[:, 1:] = stream[:, 1:] == newest[:, :-1]
        tokens, valid = self.tokenizer(observation, past_action, past_action_valid, present)
        return tokens, valid

    @abstractmethod
    def _encode(self, tokens: Tensor, valid: Tensor | None, stream: Tensor | None, first_position: int) -> Tensor:
        """Contexts (B, T, K, D) of tokens (B, T, P, D)."""

    @abstractmethod
    def _encode_at(self, position: Tensor, tokens: Tensor, valid: Tensor | None, stream: Tensor | None) -> ContextT:
        """`encode_at` of tokens (B, T, P, D)."""

    @abstractmethod
    def _encode_step(self, tokens: Tensor, cache: KVCache, valid: Tensor | None, active: Tensor | None) -> ContextT:
        """The context of one more control step's tokens (B, P, D)."""


class ActionModel(HistoryModel[ContextT]):
    """A model of history that denoises action chunks."""

    def plan(
        self,
        context: ContextT,
        *,
        sampler: SamplerConfig | None = None,
        noise: Tensor | None = None,
        prefix: Tensor | None = None,
        guidance_scale: float = 1.0,
        corruption_noise: Tensor | None = None,
        with_past: bool = False,
        past_valid: Tensor | None = None,
        conditioning: Mapping[float, Conditioning] | None = None,
        towards: TowardsActions | None = None,
        fixed: FixedActions | None = None,
    ) -> ActionPlan:
        """Denoises one action chunk per row.

        Args:
            context: (B, K, D) of the current control step.
            sampler: solver and number of denoising steps; None = `SamplerConfig()`.
            noise: (B, Ta, Da), or (B, k + Ta, Da) with `with_past`; None = drawn from torch's generator.
            prefix: (B, d, Da) actions already committed, d < Ta: the chunk begins with exactly these. A model trained
                with max_delay_steps sees them clean at flow time 1 (arXiv 2512.05964); another one sees them noised
                like the rest at every denoising step.
            guidance_scale: above 1, extrapolates away from a corrupted context, for twice the decoder calls.
            corruption_noise: (B, K, D) standard normal for that; None = drawn.
            with_past: also denoise the k past actions.
            past_valid: (B, k) bool with that, False for control steps before the history began; None = all.
            conditioning: of this sampler, from `conditioning`, where it was computed once for many plans.
            towards: the running chunk, whose remaining actions this one is guided towards (arXiv 2506.07339). With the
                exact Jacobian each decoder call is differentiated, also for callers without gradients.
            fixed: numbers of the chunk that are given.

        Raises:
            ConfigError: a solver or model that cannot do what is asked for.
            ShapeError: noise, fixed or remaining actions that are not for this chunk.
        """
        config, sampler = self.config, sampler or SamplerConfig()
        length = config.chunk_length + (config.num_past_actions if with_past else 0)
        shape = (len(context), length, config.action_dim)
        if noise is None:
            weight = self.decoder.position
            noise = torch.randn(shape, device=weight.device, dtype=weight.dtype)
        elif tuple(noise.shape) != shape:
            raise ShapeError(f"noise must be {shape}, got {tuple(noise.shape)}")
        if sampler.solver == "mip":
            noise = torch.zeros_like(noise)
        token_valid = None
        if with_past and past_valid is not None:
            token_valid = torch.cat((past_valid, past_valid.new_ones(len(past_valid), config.chunk_length)), dim=1)
        clamp, committed = hold(config, prefix, fixed, noise)
        exact = towards is not None and towards.jacobian == "exact"
        with _gradients() if exact else nullcontext():
            if exact:  # what was made in inference mode cannot be differentiated through
                context = context.clone()
                token_valid = None if token_valid is None else token_valid.clone()
            if conditioning is None or committed is not None or exact:
                conditioning = self.conditioning(sampler, committed)
            velocity = self._velocity(context, conditioning, token_valid, guidance_scale, corruption_noise)
            if towards is not None:
                velocity = self._guided(velocity, towards, sampler, noise)
            result = sample(velocity, noise, sampler, clamp)
        past, actions = result.x.split((length - config.chunk_length, config.chunk_length), dim=1)
        evaluations = result.num_evaluations * (1 if guidance_scale == 1.0 else 2)
        return ActionPlan(actions, past if with_past else None, evaluations)

    def _guided(
        self, velocity: Callable[[Tensor, float], Tensor], towards: TowardsActions, sampler: SamplerConfig, x: Tensor
    ) -> Callable[[Tensor, float], Tensor]:
        """The velocity (B, L, Da) at x that leads towards the running chunk; past actions are not guided."""
        config, given = self.config, towards.actions
        check_guidance(sampler, towards.max_gain)
        batch, remaining, width = given.shape
        if batch != len(x) or width != config.action_dim or not 1 <= remaining < config.chunk_length:
            raise ShapeError(
                f"the remaining actions must be ({len(x)}, 1 to {config.chunk_length - 1}, {config.action_dim}), got "
                f"{tuple(given.shape)}"
            )
        weights = overlap_weights(config.chunk_length, config.chunk_length - remaining, towards.delay_steps).to(x)
        past = x.shape[1] - config.chunk_length
        target = pad(given.to(x), (0, 0, past, config.chunk_length - remaining))
        return guided_velocity(velocity, target, pad(weights, (past, 0))[:, None], towards.max_gain, towards.jacobian)


def check_guidance(sampler: SamplerConfig, max_gain: float) -> None:
    """Raises ConfigError where chunks that this sampler makes cannot be guided towards others."""
    greatest = greatest_gain(sampler)
    if not greatest:
        raise ConfigError(
            f"a guided chunk needs the velocity at each flow time, which solver {sampler.solver!r} does not ask for; "
            "use a policy of solver 'euler', 'heun' or 'midpoint', or another strategy"
        )
    if max_gain > greatest:
        raise ConfigError(
            f"a gain of up to {max_gain:g} overshoots in steps of 1/{sampler.num_denoising_steps}: take at least "
            f"{math.ceil(max_gain)} denoising steps, or a smaller max_gain"
        )


def greatest_gain(sampler: SamplerConfig) -> int:
    """The largest gain with which this sampler's chunks can be guided towards others; 0 = they cannot."""
    return 0 if sampler.solver in ("average", "mip") else sampler.num_denoising_steps


@contextmanager
def _gradients() -> Iterator[None]:
    """Gradients, whatever the caller switched off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
