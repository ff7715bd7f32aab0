"""The entangled rival: one causal diffusion transformer, whose every layer attends to history at every denoising step.

    keys, values = layers(history)                    once per control step, cached
    velocity     = layers(noisy chunk, flow time; keys, values)     once per denoising step, through all layers

Today's causal diffusion models in their strongest honest form, for comparison with `ScdModel` at the same tokens, depth
and width: history tokens are clean (flow time 1) and never attend to noisy ones, so that their keys and values can be
cached across denoising steps and control steps alike.

Shapes: B streams, T control steps, P tokens per control step, S = T * P history tokens, M samples per stream,
R = B * M samples, L noisy tokens, Da action width, N heads, Dh head width, D width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from scd_robot.model.base import ActionModel, HistoryModel
from scd_robot.model.config import ScdConfig
from scd_robot.model.decoder import Conditioning, FlowTransformer
from scd_robot.nn import (
    CausalDitBlock,
    KVCache,
    RotaryEmbedding,
    additive,
    apply_rotary,
    never_empty,
    take_steps,
    window_mask,
    window_steps,
)

__all__ = ["CausalDitModel", "EntangledModel", "HistoryContext"]

Rotary = tuple[Tensor, Tensor]

_BY_SAMPLE = ("seen", "own", "position", "features", "extra")


@dataclass(frozen=True)
class HistoryContext:
    """What the noisy tokens of R = B * M samples see of the history; takes the place of the encoder's contexts.

    Attributes:
        keys_values: per layer keys and values, each (B, N, S, Dh), which the M samples of a stream share.
        seen: (B, M, S) bool, the history tokens in each sample's window that are there; none, where nothing is.
        own: (B, M, S) bool, those of the sample's own control step.
        position: (B, M) control step of each sample.
        features: (B, M, P, D) the last layer's tokens of that control step.
        extra: (B, M, D) one token more that the noisy ones see, which shares their flow time: the action, in models of
            frames. None = there is none.
    """

    keys_values: tuple[tuple[Tensor, Tensor], ...]
    seen: Tensor
    own: Tensor
    position: Tensor
    features: Tensor
    extra: Tensor | None = None

    def __len__(self) -> int:
        """R."""
        return self.position.numel()

    def repeat(self, copies: int) -> "HistoryContext":
        """Each sample so many times in a row."""
        return self._each(lambda x: x.repeat_interleave(copies, 1))

    def at(self, position: Tensor) -> "HistoryContext":
        """The samples at `position` (B, M'), where there was one for every control step of the stream."""
        return self._each(lambda x: take_steps(x, position))

    def clone(self) -> "HistoryContext":
        """A copy."""
        pairs = tuple((keys.clone(), values.clone()) for keys, values in self.keys_values)
        return replace(self._each(Tensor.clone), keys_values=pairs)

    def rows(self, index: Tensor) -> "HistoryContext":
        """Some streams (n,) of it."""
        pairs = tuple((keys[index], values[index]) for keys, values in self.keys_values)
        return replace(self._each(lambda x: x[index]), keys_values=pairs)

    def where(self, active: Tensor, other: "HistoryContext") -> "HistoryContext":
        """This one in the streams where `active` (B,) is True, else the other; keys and values are this one's."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in _BY_SAMPLE)
        fields: dict[str, Any] = {
            name: torch.where(active.view(-1, *(1 for _ in x.shape[1:])), x, y) for name, x, y in pairs if x is not None
        }
        return replace(self, **fields)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "HistoryContext":
        """With every field of the samples changed."""
        given = ((name, getattr(self, name)) for name in _BY_SAMPLE)
        fields: dict[str, Any] = {name: change(x) for name, x in given if x is not None}
        return replace(self, **fields)


@dataclass(frozen=True)
class PreparedHistory:
    """What one plan reads at every denoising step.

    Attributes:
        keys_values: per layer keys and values, each (R, N, S, Dh); without gradients in one, with room for the noisy
            tokens' behind them, (2, R, N, S + all L, Dh), so that nothing is copied again while a plan is denoised.
        seen: (R, 1, 1, S + all L), 0 where noisy tokens see a token, else -inf; they see each other.
        own: like seen, in layers without history.
        rotary: of the samples' control steps; None without gradients: keys are relative to these, so that the noisy
            tokens, which are all of one control step, need not be rotated at every denoising step.
        history: S.
        extra: (R, 1, D) `HistoryContext.extra`.
    """

    keys_values: list[tuple[Tensor, Tensor] | Tensor]
    seen: Tensor
    own: Tensor
    rotary: Rotary | None
    history: int
    extra: Tensor | None


class CausalDitTransformer(FlowTransformer):
    """The layers, for history and noisy tokens alike.

    Args:
        config: architecture; depth is encoder_layers + decoder_layers.
        tokens_per_step: P.
    """

    def __init__(self, config: ScdConfig, tokens_per_step: int) -> None:
        depth = config.encoder_layers + config.decoder_layers
        num_tokens, token_dim = config.token_shape
        super().__init__(
            token_dim=token_dim,
            known_dim=token_dim if config.decodes_frames else 0,
            num_positions=num_tokens,
            num_hidden_positions=config.num_past_actions,
            width=config.width,
            blocks=(CausalDitBlock(config.width, config.num_heads, config.mlp_ratio) for _ in range(depth)),
            step_end_input=config.step_end_input,
        )
        self.config = config
        self.tokens_per_step = tokens_per_step
        self.rotary = RotaryEmbedding(config.width // config.num_heads)

    def history(
        self, tokens: Tensor, token_valid: Tensor | None, stream: Tensor | None, first_position: int
    ) -> HistoryContext:
        """All control steps (B, T, P, D) of a stream in one pass, as the context of T samples each."""
        batch, steps, group, _ = tokens.shape
        mask, own = window_mask(
            steps, group, self.config.history_length, stream=stream, token_valid=token_valid, device=tokens.device
        )
        positions = torch.arange(first_position, first_position + steps, device=tokens.device)
        rotary = self.rotary(positions.repeat_interleave(group)[None], tokens.dtype)
        local = never_empty(mask & own)
        x, pairs = tokens.flatten(1, 2), []
        for layer, (block, modulation) in enumerate(zip(self._blocks(), self.clean().blocks, strict=True)):
            x, pair = block.history(x, modulation, rotary, local if self.is_local(layer) else mask)
            pairs.append(pair)
        # A noisy token sees what its own group sees; where nothing is there, the other noisy ones alone.
        window = window_steps(steps, self.config.history_length, stream=stream, device=tokens.device)
        seen = window.repeat_interleave(group, 2).expand(batch, -1, -1)
        seen = seen if token_valid is None else seen & token_valid.flatten(1)[:, None]
        same = seen & own[:, 0, ::group]
        features = x.view(batch, steps, group, -1)
        return HistoryContext(tuple(pairs), seen, same, positions.expand(batch, -1), features)

    def step(
        self,
        tokens: Tensor,
        cache: KVCache,
        token_valid: Tensor | None,
        active: Tensor | None,
        clean: Conditioning,
    ) -> HistoryContext:
        """One more control step (B, P, D); the context's keys and values are the cache's own, not copies.

        What follows from flow time 1 alone, `clean`, is given, since it is the same in every control step.
        """
        position = cache.position.clone()
        rotary = self.rotary(position[:, None], tokens.dtype)
        there = cache.seen_next(token_valid)
        masks = [additive(never_empty(mask), tokens.dtype) for mask in (there, there & cache.own_next())]
        x, pairs = tokens, []
        layers = zip(self._blocks(), clean.blocks, cache.held(), strict=True)
        for layer, (block, modulation, held) in enumerate(layers):
            x, pair = block.step(x, modulation, rotary, held, masks[self.is_local(layer)])
            pairs.append(pair)
        cache.append(pairs, token_valid, active)
        seen = cache.seen_from(position)
        own = seen & (cache.slot_position == position[:, None]).repeat_interleave(self.tokens_per_step, 1)
        return HistoryContext(tuple(cache.held()), seen[:, None], own[:, None], position[:, None], x[:, None])

    def prepare(self, context: HistoryContext) -> PreparedHistory:
        """Everything that depends on the history alone."""
        extra = None if context.extra is None else context.extra.flatten(0, 1)[:, None]
        samples, behind = context.position.shape[1], self.position.shape[0] + (extra is not None)
        cos, sin = self.rotary(context.position.flatten()[:, None], self.position.dtype)
        with_gradients = torch.is_grad_enabled()
        pairs: list[tuple[Tensor, Tensor] | Tensor] = []
        for pair in context.keys_values:
            keys, values = (x if samples == 1 else x.repeat_interleave(samples, 0) for x in pair)
            if with_gradients:
                pairs.append((keys, values))
            else:
                relative = apply_rotary(keys[:, :, None], cos, -sin)[:, :, 0]
                pairs.append(nn.functional.pad(torch.stack((relative, values)), (0, 0, 0, behind)))
        seen, own = (
            additive(nn.functional.pad(x.flatten(0, 1)[:, None, None], (0, behind), value=True), self.position.dtype)
            for x in (context.seen, context.own)
        )
        rotary = (cos, sin) if with_gradients else None
        return PreparedHistory(pairs, seen, own, rotary, context.seen.shape[-1], extra)

    def velocity(
        self, x: Tensor, conditioning: Conditioning, context: PreparedHistory, token_valid: Tensor | None = None
    ) -> Tensor:
        """Velocity (R, L, Da) of noisy tokens x (R, L, Da), through all layers."""
        tokens = self.embed_noisy(x)
        if context.extra is not None:
            tokens = torch.cat((context.extra, tokens), dim=1)
        masks = self.masks(tokens, context, token_valid)
        for layer in range(len(self.blocks)):
            tokens = self.layer(layer, tokens, conditioning, context, masks)
        return self.read_out(tokens[:, -x.shape[1] :], conditioning)

    def layer(
        self,
        layer: int,
        tokens: Tensor,
        conditioning: Conditioning,
        context: PreparedHistory,
        masks: tuple[Tensor, Tensor],
    ) -> Tensor:
        """One layer of `velocity`: noisy tokens (R, L, D) to the next layer's."""
        block, mask = cast(CausalDitBlock, self.blocks[layer]), masks[self.is_local(layer)]
        pair = context.keys_values[layer]
        return block.denoise(tokens, conditioning.blocks[layer], context.rotary, pair, context.history, mask)

    def masks(self, x: Tensor, context: PreparedHistory, token_valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """What noisy tokens (R, L, any) see of history and each other, (R, 1, 1 or L, S + L); and in local layers.

        Masks are `additive`. An extra token counts among the noisy ones, and sees and is seen by all.
        """
        length, extra = x.shape[1], int(context.extra is not None)
        among = self._sees(length - extra, token_valid, x.device)
        end = context.history + length
        seen, own = context.seen[..., :end], context.own[..., :end]
        if among is None:
            return seen, own
        among = nn.functional.pad(among, (extra, 0, extra, 0), value=True)
        noisy = nn.functional.pad(additive(among[:, None], seen.dtype), (context.history, 0))
        return seen + noisy, own + noisy

    def is_local(self, layer: int) -> bool:
        """Whether this layer sees no earlier control steps."""
        return layer >= len(self.blocks) - self.config.local_layers

    def clean(self) -> Conditioning:
        """The conditioning of clean tokens, flow time 1."""
        return self.condition(self.position.new_ones(1, 1))

    def _blocks(self) -> Iterable[CausalDitBlock]:
        return cast(Iterable[CausalDitBlock], self.blocks)


class EntangledModel(HistoryModel[HistoryContext]):
    """As `SeparableModel` to its users, but encoder and decoder are the same layers.

    `encode_step` computes keys and values of one more control step in all layers; noisy tokens go through all of them
    at every denoising step. What takes the place of the context is a `HistoryContext`.
    """

    decoder: CausalDitTransformer

    def __init__(self, config: ScdConfig) -> None:
        super().__init__(config)
        self.decoder = CausalDitTransformer(config, self.tokenizer.tokens_per_step)
        self._clean = self._clean_conditioning()  # made anew with every cache, from the weights of then

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty history for `encode_step`: keys and values of all layers."""
        config, weight = self.config, self.decoder.position
        self._clean = self._clean_conditioning()
        return KVCache.create(
            num_layers=len(self.decoder.blocks),
            batch_size=batch_size,
            num_heads=config.num_heads,
            history_length=config.history_length,
            tokens_per_step=self.tokenizer.tokens_per_step,
            head_dim=config.width // config.num_heads,
            device=weight.device,
            dtype=weight.dtype,
        )

    @torch.no_grad()  # a tensor with a graph could not be copied with the model
    def _clean_conditioning(self) -> Conditioning:
        return self.decoder.clean()

    def samples(self, context: HistoryContext, copies: int) -> HistoryContext:
        """What `encode_at` gave, for so many samples of each position."""
        return context.repeat(copies)

    def _encode(self, tokens: Tensor, valid: Tensor | None, stream: Tensor | None, first_position: int) -> Tensor:
        return self.decoder.history(tokens, valid, stream, first_position).features

    def _encode_at(
        self, position: Tensor, tokens: Tensor, valid: Tensor | None, stream: Tensor | None
    ) -> HistoryContext:
        return self.decoder.history(tokens, valid, stream, 0).at(position)

    def _encode_step(
        self, tokens: Tensor, cache: KVCache, valid: Tensor | None, active: Tensor | None
    ) -> HistoryContext:
        return self.decoder.step(tokens, cache, valid, active, self._clean)


class CausalDitModel(EntangledModel, ActionModel[HistoryContext]):
    """An entangled model that denoises action chunks: as `ScdModel` to its users."""
