"""Causal encoder: the only part that sees history, run once per control step.

Shapes: B batch, T control steps, P tokens per control step, K context tokens, D width.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from scd_robot.model.config import ScdConfig
from scd_robot.nn import CausalBlock, KVCache, RotaryEmbedding, additive, limit_to_group, window_mask

__all__ = ["CausalEncoder"]


class CausalEncoder(nn.Module):
    """Transformer over token groups: bidirectional inside a control step, causal and windowed across them.

    Args:
        config: architecture.
        tokens_per_step: P.
        context_slots: the tokens of a group that the context is read from.
        sees: (P, P) bool, which tokens of any group a token sees; None = all.
    """

    sees: Tensor | None

    def __init__(
        self, config: ScdConfig, tokens_per_step: int, context_slots: slice, sees: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.tokens_per_step = tokens_per_step
        self.context_slots = context_slots
        self.rotary = RotaryEmbedding(config.width // config.num_heads)
        self.blocks = nn.ModuleList(
            CausalBlock(config.width, config.num_heads, config.mlp_ratio, config.memory_gate, config.encoder_bias)
            for _ in range(config.encoder_layers)
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)  # to unit RMS
        self.register_buffer("sees", sees, persistent=False)

    def forward(
        self,
        tokens: Tensor,
        token_valid: Tensor | None = None,
        stream: Tensor | None = None,
        first_position: int = 0,
    ) -> Tensor:
        """Contexts of all control steps of a stream in one pass.

        Args:
            tokens: (B, T, P, D).
            token_valid: (B, T, P) bool, False = absent; None = all present.
            stream: (B, T) int, changes where history is forgotten (virtual resets); None = nowhere.
            first_position: control-step index of step 0.

        Returns:
            (B, T, K, D) with unit RMS over D.
        """
        outputs = self.outputs(tokens, token_valid, stream, first_position)
        context: Tensor = self.norm(outputs[..., self.context_slots, :])
        return context

    def outputs(
        self,
        tokens: Tensor,
        token_valid: Tensor | None = None,
        stream: Tensor | None = None,
        first_position: int = 0,
    ) -> Tensor:
        """As `forward`, what becomes of all tokens, (B, T, P, D), before they are normalised by `norm`."""
        batch, steps, group, width = tokens.shape
        mask, own = window_mask(
            steps, group, self.config.history_length, stream=stream, token_valid=token_valid, device=tokens.device
        )
        mask = mask if self.sees is None else limit_to_group(mask, self.sees)
        positions = torch.arange(first_position, first_position + steps, device=tokens.device)
        rotary = self.rotary(positions.repeat_interleave(group)[None], tokens.dtype)
        x = tokens.flatten(1, 2)
        for block in self.blocks:
            x = block(x, rotary, mask, own)
        return x.view(batch, steps, group, width)

    def step(
        self, tokens: Tensor, cache: KVCache, token_valid: Tensor | None = None, active: Tensor | None = None
    ) -> Tensor:
        """Context (B, K, D) of one more control step, equal to `forward` over the stream from its start.

        Args:
            tokens: (B, P, D).
            cache: advanced in place by one control step.
            token_valid: (B, P) bool; None = all present.
            active: (B,) bool, rows that take the step; None = all.
        """
        plan = cache.begin_step(token_valid, active)
        mask = plan.mask if self.sees is None else limit_to_group(plan.mask, self.sees)
        plan = replace(plan, mask=mask if self.config.memory_gate else additive(mask, tokens.dtype))
        rotary = self.rotary(plan.position[:, None], tokens.dtype)
        x = tokens
        for layer, block in enumerate(cast(Iterable[CausalBlock], self.blocks)):
            x = block.step(x, rotary, layer, cache, plan)
        cache.end_step(plan)
        context: Tensor = self.norm(x[..., self.context_slots, :])
        return context

    def new_cache(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache for `step`."""
        config = self.config
        return KVCache.create(
            num_layers=config.encoder_layers,
            batch_size=batch_size,
            num_heads=config.num_heads,
            history_length=config.history_length,
            tokens_per_step=self.tokens_per_step,
            head_dim=config.width // config.num_heads,
            device=device,
            dtype=dtype,
        )
