"""Diffusion decoder: denoises tokens given the context of ONE control step; never sees history.

Shapes: B batch, L noisy tokens, Dx width of a noisy token (Da for actions), K context tokens, D width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from scd_robot.nn import AdaLNBlock, FlowTimeEmbedding, modulate

__all__ = ["Conditioning", "DiffusionDecoder", "PreparedContext"]


@dataclass(frozen=True)
class Conditioning:
    """Everything the decoder derives from flow time, all (B, L or 1, D).

    Attributes:
        blocks: `AdaLNBlock.modulate_by` of every block.
        head: shift and factor before the last layer.
    """

    blocks: list[tuple[Tensor, ...]]
    head: tuple[Tensor, ...]

    def __getitem__(self, index: int) -> "Conditioning":
        """The conditioning of one batch entry, kept as a batch of 1."""
        one = slice(index, index + 1)
        return Conditioning([tuple(x[one] for x in block) for block in self.blocks], tuple(x[one] for x in self.head))


@dataclass(frozen=True)
class PreparedContext:
    """Everything the decoder derives from the context, once per plan.

    Attributes:
        tokens: (B, K, D) embedded context, for fusion "concat".
        keys_values: per layer keys and values (2, B, N, K, Dh), for fusion "prefix".
    """

    tokens: Tensor | None
    keys_values: list[Tensor] | None


class DiffusionDecoder(nn.Module):
    """Few transformer blocks with adaLN-zero on the flow time of each token; predicts velocity.

    Args:
        token_dim: Dx.
        num_positions: L, with a learned position embedding each.
        num_hidden_positions: the first so many of them are seen by nobody but each other, so that leaving them out
            changes nothing for the rest (past actions, in past-token prediction).
        num_context_tokens: K.
        width: D.
        num_heads: attention heads.
        num_layers: blocks.
        mlp_ratio: hidden width of the MLPs in units of D.
        fusion: "concat" or "prefix", see `ScdConfig`.
    """

    def __init__(
        self,
        *,
        token_dim: int,
        num_positions: int,
        num_hidden_positions: int,
        num_context_tokens: int,
        width: int,
        num_heads: int,
        num_layers: int,
        mlp_ratio: int,
        fusion: Literal["concat", "prefix"],
    ) -> None:
        super().__init__()
        self.fusion = fusion
        self.num_hidden = num_hidden_positions
        self.num_context_tokens = num_context_tokens
        self.embed = nn.Linear(token_dim, width)
        self.position = nn.Parameter(torch.randn(num_positions, width) * 0.02)
        self.context_embed = nn.Linear(width, width)
        self.context_position = nn.Parameter(torch.randn(num_context_tokens, width) * 0.02)
        self.flow_time = FlowTimeEmbedding(width)
        self.blocks = nn.ModuleList(AdaLNBlock(width, num_heads, mlp_ratio) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, token_dim)
        for layer in (self.head_modulation, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, flow_time: Tensor, context: Tensor, token_valid: Tensor | None = None) -> Tensor:
        """Velocity (B, L, Dx) of noisy tokens.

        Args:
            x: (B, L, Dx), all positions, or all but the hidden ones.
            flow_time: (B, L), or (B, 1) for one flow time shared by all tokens.
            context: (B, K, D).
            token_valid: (B, L) bool, tokens that exist; the others are seen by nobody. None = all.
        """
        return self.velocity(x, self.condition(flow_time), self.prepare(context), token_valid)

    def condition(self, flow_time: Tensor) -> Conditioning:
        """Everything that depends on flow_time (B, L or 1) alone.

        Context tokens of fusion "concat" take the plan's flow time, which is the smallest of the tokens': committed
        tokens are clean, at flow time 1.
        """
        if self.fusion == "concat" and flow_time.shape[1] > 1:
            plan_time = flow_time.amin(dim=1, keepdim=True)
            flow_time = torch.cat((plan_time.expand(-1, self.num_context_tokens), flow_time), dim=1)
        features = torch.nn.functional.silu(self.flow_time(flow_time))
        shift, scale = self.head_modulation(features).chunk(2, dim=-1)
        return Conditioning([block.modulate_by(features) for block in self._blocks()], (shift, 1 + scale))

    def prepare(self, context: Tensor) -> PreparedContext:
        """Everything that depends on the context (B, K, D) alone."""
        tokens = self.context_embed(context) + self.context_position
        if self.fusion == "concat":
            return PreparedContext(tokens, None)
        keys_values = []
        for index, block in enumerate(self._blocks()):
            tokens, pair = block.prefix(tokens, last=index == len(self.blocks) - 1)
            keys_values.append(pair)
        return PreparedContext(None, keys_values)

    def velocity(
        self, x: Tensor, conditioning: Conditioning, context: PreparedContext, token_valid: Tensor | None = None
    ) -> Tensor:
        """As `forward`, with the parts that do not change between denoising steps computed beforehand."""
        length = x.shape[1]
        tokens = self.embed(x) + self.position[-length:]
        mask = self._mask(length, token_valid, x.device)
        if context.tokens is not None:
            tokens = torch.cat((context.tokens, tokens), dim=1)
        for index, block in enumerate(self._blocks()):
            prefix = None if context.keys_values is None else context.keys_values[index]
            tokens = block(tokens, conditioning.blocks[index], mask, prefix)
        shift, factor = (x[:, -length:] for x in conditioning.head)  # of length 1 where the tokens share it
        out: Tensor = self.head(modulate(self.norm(tokens[:, -length:]), shift, factor))
        return out

    def _blocks(self) -> Iterable[AdaLNBlock]:
        return cast(Iterable[AdaLNBlock], self.blocks)

    def _mask(self, length: int, token_valid: Tensor | None, device: torch.device) -> Tensor | None:
        """Who sees whom, (B or 1, 1, queries, K + L) bool; None = everybody sees everybody."""
        hidden = max(0, length - (self.position.shape[0] - self.num_hidden))
        if not hidden and token_valid is None:
            return None
        context = self.num_context_tokens
        column = torch.arange(context + length, device=device)
        is_hidden = (column >= context) & (column < context + hidden)
        mask = is_hidden[:, None] | ~is_hidden[None, :]
        if self.fusion == "prefix":
            mask = mask[context:]
        mask = mask[None]
        if token_valid is not None:
            seen = torch.cat((token_valid.new_ones(token_valid.shape[0], context), token_valid), dim=1)
            mask = mask & seen[:, None, :]
        return mask[:, None]
