"""Diffusion decoder: denoises tokens given the context of ONE control step; never sees history.

Shapes: B batch, L noisy tokens, Dx width of a noisy token (Da for actions), K context tokens, D width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from scd_robot.model.config import ScdConfig
from scd_robot.nn import AdaLNBlock, FlowTimeEmbedding, modulated_norm

__all__ = ["Conditioning", "DiffusionDecoder", "PreparedContext"]

_STEP_LENGTH_SCALE = 10.0  # highest frequency of a step's length [rad]; objectives differentiate by it


@dataclass(frozen=True)
class Conditioning:
    """Everything the decoder derives from flow time, all (B, L or 1, D), or (D,) where all tokens share it.

    Attributes:
        blocks: `AdaLNBlock.modulate_by` of every block.
        head: shift and factor before the last layer.
    """

    blocks: list[tuple[Tensor, ...]]
    head: tuple[Tensor, ...]

    def __getitem__(self, index: int) -> "Conditioning":
        """The conditioning of one batch entry for all, as (L, D), or (D,) where its tokens share one."""
        one = (index, 0) if self.head[0].shape[1] == 1 else index
        return Conditioning([tuple(x[one] for x in block) for block in self.blocks], tuple(x[one] for x in self.head))


@dataclass(frozen=True)
class PreparedContext:
    """Everything the decoder derives from the context, once per plan.

    Attributes:
        tokens: (B, K, D) embedded context, for fusion "concat".
        keys_values: per layer keys and values (2, B, N, K, Dh), for fusion "prefix".
        offset: (B, all L, D) or (all L, D) what every noisy token begins with besides its own: its position, and with
            `add_context` what the context adds.
    """

    tokens: Tensor | None
    keys_values: list[Tensor] | None
    offset: Tensor


class FlowTransformer(nn.Module):
    """What denoising transformers share: noisy tokens in, blocks conditioned on their flow time, velocity out.

    Args:
        token_dim: Dx.
        num_positions: L, with a learned position embedding each.
        num_hidden_positions: the first so many of them are seen by nobody but each other, so that leaving them out
            changes nothing for the rest (past actions, in past-token prediction).
        width: D.
        blocks: modulated by flow time.
        known_dim: numbers of each token that are known and not denoised; they stand behind the Dx noisy ones.
        step_end_input: the output is the average velocity over a step, whose length is embedded like flow time. The
            embedding is zero at first, so that weights trained without it say what they said.
    """

    def __init__(
        self,
        *,
        token_dim: int,
        num_positions: int,
        num_hidden_positions: int,
        width: int,
        blocks: Iterable[AdaLNBlock],
        known_dim: int = 0,
        step_end_input: bool = False,
    ) -> None:
        super().__init__()
        self.num_hidden = num_hidden_positions
        self.embed = nn.Linear(token_dim + known_dim, width)
        self.position = nn.Parameter(torch.randn(num_positions, width) * 0.02)
        self.flow_time = FlowTimeEmbedding(width)
        self.blocks = nn.ModuleList(blocks)
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, token_dim)
        zero = [self.head_modulation, self.head]
        self.step_length = FlowTimeEmbedding(width, scale=_STEP_LENGTH_SCALE) if step_end_input else None
        if self.step_length is not None:
            zero.append(cast(nn.Linear, self.step_length.mlp[-1]))
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def condition(self, flow_time: Tensor, end_time: Tensor | None = None) -> Conditioning:
        """Everything that depends on flow_time (B, L or 1) alone.

        Args:
            flow_time: (B, L), or (B, 1) for one flow time shared by all tokens.
            end_time: like flow_time, where the step ends; for decoders with `step_end_input`. None = it has no length,
                and the average velocity is the velocity.
        """
        features = self.flow_time(flow_time)
        if self.step_length is not None:
            features = features + self.step_length((flow_time if end_time is None else end_time) - flow_time)
        features = torch.nn.functional.silu(features)
        shift, scale = self.head_modulation(features).chunk(2, dim=-1)
        blocks = cast(Iterable[AdaLNBlock], self.blocks)
        return Conditioning([block.modulate_by(features) for block in blocks], (shift, 1 + scale))

    def embed_noisy(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        """Noisy tokens (B, L, D) of x (B, L, Dx and known_dim): of all positions, or all but the hidden ones.

        `offset` (all L, D) or (B, all L, D) is added to them; None = their positions.
        """
        tokens: Tensor = self.embed(x) + _last(self.position if offset is None else offset, x.shape[1])
        return tokens

    def read_out(self, tokens: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity (B, L, Dx) of the last layer's noisy tokens (B, L, D)."""
        shift, factor = conditioning.head
        if shift.ndim > 1:  # those of context tokens stand in front
            shift, factor = (_last(x, tokens.shape[1]) for x in conditioning.head)
        out: Tensor = self.head(modulated_norm(tokens, shift, factor))
        return out

    def _sees(self, length: int, token_valid: Tensor | None, device: torch.device) -> Tensor | None:
        """Which noisy tokens see which, (B or 1, L, L) bool; None = everybody sees everybody."""
        hidden = max(0, length - (self.position.shape[0] - self.num_hidden))
        if not hidden and token_valid is None:
            return None
        is_hidden = torch.arange(length, device=device) < hidden
        mask = (is_hidden[:, None] | ~is_hidden)[None]
        return mask if token_valid is None else mask & token_valid[:, None, :]


class DiffusionDecoder(FlowTransformer):
    """Few transformer blocks with adaLN-zero on the flow time of each token; predicts velocity.

    Args:
        num_context_tokens: K.
        width: D.
        num_heads: attention heads.
        num_layers: blocks.
        mlp_ratio: hidden width of the MLPs in units of D.
        fusion: "concat" or "prefix", see `ScdConfig`.
        add_context: see `ScdConfig`.
        **tokens: of `FlowTransformer`.
    """

    def __init__(
        self,
        *,
        num_context_tokens: int,
        width: int,
        num_heads: int,
        num_layers: int,
        mlp_ratio: int,
        fusion: Literal["concat", "prefix"],
        add_context: bool,
        **tokens: Any,
    ) -> None:
        blocks = (AdaLNBlock(width, num_heads, mlp_ratio) for _ in range(num_layers))
        super().__init__(width=width, blocks=blocks, **tokens)
        self.fusion = fusion
        self.num_context_tokens = num_context_tokens
        self.context_embed = nn.Linear(width, width)
        self.context_position = nn.Parameter(torch.randn(num_context_tokens, width) * 0.02)
        self.context_add = nn.Linear(width, width) if add_context else None

    @classmethod
    def of(cls, config: ScdConfig) -> Self:
        """That of a separable model."""
        num_tokens, token_dim = config.token_shape
        return cls(
            token_dim=token_dim,
            known_dim=token_dim if config.decodes_frames else 0,
            num_positions=num_tokens,
            num_hidden_positions=config.num_past_actions,
            num_context_tokens=config.num_decoder_context,
            width=config.width,
            num_heads=config.num_heads,
            num_layers=config.decoder_layers,
            mlp_ratio=config.mlp_ratio,
            fusion=config.fusion,
            add_context=config.add_context,
            step_end_input=config.step_end_input,
        )

    def forward(self, x: Tensor, flow_time: Tensor, context: Tensor, token_valid: Tensor | None = None) -> Tensor:
        """Velocity (B, L, Dx) of noisy tokens.

        Args:
            x: (B, L, Dx), all positions, or all but the hidden ones.
            flow_time: (B, L), or (B, 1) for one flow time shared by all tokens.
            context: (B, K, D).
            token_valid: (B, L) bool, tokens that exist; the others are seen by nobody. None = all.
        """
        return self.velocity(x, self.condition(flow_time), self.prepare(context), token_valid)

    def condition(self, flow_time: Tensor, end_time: Tensor | None = None) -> Conditioning:
        """Everything that depends on flow_time (B, L or 1) and where the step ends alone; see `FlowTransformer`.

        Context tokens of fusion "concat" take the plan's times, which are the smallest of the tokens': committed tokens
        are clean, at flow time 1.
        """
        if self.fusion == "concat" and flow_time.shape[1] > 1:
            flow_time = self._with_context(flow_time)
            end_time = None if end_time is None else self._with_context(end_time)
        return super().condition(flow_time, end_time)

    def prepare(self, context: Tensor) -> PreparedContext:
        """Everything that depends on the context (B, K, D) alone."""
        tokens = self.context_embed(context) + self.context_position
        offset = self.position
        if self.context_add is not None:
            offset = offset + self.context_add(tokens.mean(1, keepdim=True))
        if self.fusion == "concat":
            return PreparedContext(tokens, None, offset)
        keys_values = []
        for index, block in enumerate(self._blocks()):
            tokens, pair = block.prefix(tokens, last=index == len(self.blocks) - 1)
            keys_values.append(pair)
        return PreparedContext(None, keys_values, offset)

    def velocity(
        self, x: Tensor, conditioning: Conditioning, context: PreparedContext, token_valid: Tensor | None = None
    ) -> Tensor:
        """As `forward`, with the parts that do not change between denoising steps computed beforehand."""
        length, tokens = x.shape[1], self.embed_noisy(x, context.offset)
        mask = self._mask(length, token_valid, x.device)
        if context.tokens is not None:
            tokens = torch.cat((context.tokens, tokens), dim=1)
        for index, block in enumerate(self._blocks()):
            prefix = None if context.keys_values is None else context.keys_values[index]
            tokens = block(tokens, conditioning.blocks[index], mask, prefix)
        return self.read_out(_last(tokens, length), conditioning)

    def _with_context(self, time: Tensor) -> Tensor:
        """Times (B, L) of the tokens with those of the context tokens in front, (B, K + L)."""
        plan_time = time.amin(dim=1, keepdim=True)
        return torch.cat((plan_time.expand(-1, self.num_context_tokens), time), dim=1)

    def _blocks(self) -> Iterable[AdaLNBlock]:
        return cast(Iterable[AdaLNBlock], self.blocks)

    def _mask(self, length: int, token_valid: Tensor | None, device: torch.device) -> Tensor | None:
        """Who sees whom, (B or 1, 1, queries, K + L) bool: all see the context; None = everybody sees everybody."""
        mask = self._sees(length, token_valid, device)
        if mask is None:
            return None
        context = self.num_context_tokens
        mask = torch.nn.functional.pad(mask, (context, 0), value=True)
        if self.fusion == "concat":  # context tokens do not see the hidden ones, like the last noisy token
            mask = torch.cat((mask[:, -1:].expand(-1, context, -1), mask), dim=1)
        return mask[:, None]


def _last(x: Tensor, count: int) -> Tensor:
    """The last so many tokens of x (..., tokens, D): itself where it has no more, as in every step of a plan."""
    return x if x.shape[-2] == count else x[..., -count:, :]
