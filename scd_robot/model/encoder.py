"""Causal encoder: the only part that sees history, run once per control step.

The context is read from slots, the last tokens of a control step's group. Unless `context_in_history`, they are
readers: they see the history and their own group, and nobody else sees them.

    whole segment   [tokens of step 0, 1, ..., T - 1 | readers of M of these steps]      one sequence, one pass
    one step more   [tokens | readers], of which the cache keeps the tokens

Shapes: B batch, T control steps, M of them whose context is asked for, P tokens per control step, K of them context
slots, D width, S tokens of a whole segment.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from scd_robot.model.config import ScdConfig
from scd_robot.nn import (
    CausalBlock,
    KVCache,
    RotaryEmbedding,
    additive,
    limit_to_group,
    never_empty,
    take_steps,
    window_mask,
    window_steps,
)

__all__ = ["CausalEncoder"]


class CausalEncoder(nn.Module):
    """Transformer over token groups: bidirectional inside a control step, causal and windowed across them.

    Args:
        config: architecture.
        tokens_per_step: P.
        context_slots: the tokens of a group that the context is read from.
        sees: (P, P) bool, which tokens of any group a token sees; None = all.

    Attributes:
        num_readers: K where slots only read, else 0.
        sees: of the tokens that are no readers; these see all.
    """

    sees: Tensor | None

    def __init__(
        self, config: ScdConfig, tokens_per_step: int, context_slots: slice, sees: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.tokens_per_step = tokens_per_step
        self.context_slots = context_slots
        self.num_readers = 0 if config.context_in_history else config.num_context_tokens
        self.rotary = RotaryEmbedding(config.width // config.num_heads)
        self.blocks = nn.ModuleList(
            CausalBlock(
                config.width,
                config.num_heads,
                config.mlp_ratio,
                memory_gate=config.memory_gate,
                bias=config.encoder_bias,
                modulated=config.encoder_modulation,
            )
            for _ in range(config.encoder_layers)
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)  # to unit RMS
        remembered = tokens_per_step - self.num_readers
        sees = None if sees is None else sees[:remembered, :remembered]
        self.register_buffer("sees", sees, persistent=False)

    def forward(
        self,
        tokens: Tensor,
        token_valid: Tensor | None = None,
        stream: Tensor | None = None,
        first_position: int = 0,
        at: Tensor | None = None,
    ) -> Tensor:
        """Contexts of control steps of a stream in one pass.

        Args:
            tokens: (B, T, P, D).
            token_valid: (B, T, P) bool, False = absent; None = all present.
            stream: (B, T) int, changes where history is forgotten (virtual resets); None = nowhere.
            first_position: control-step index of step 0.
            at: (B, M) control steps whose context is asked for; None = all.

        Returns:
            (B, M or T, K, D) with unit RMS over D.
        """
        outputs = self.outputs(tokens, token_valid, stream, first_position, at, slots_only=True)
        context: Tensor = self.norm(outputs)
        return context

    def outputs(
        self,
        tokens: Tensor,
        token_valid: Tensor | None = None,
        stream: Tensor | None = None,
        first_position: int = 0,
        at: Tensor | None = None,
        *,
        slots_only: bool = False,
    ) -> Tensor:
        """As `forward`, what becomes of all tokens, (B, M or T, P, D), before they are normalised by `norm`.

        With `slots_only` of the context slots, (B, M or T, K, D); of readers the last layer computes no others then.
        """
        batch, steps, group, width = tokens.shape
        kept = group - self.num_readers
        tokens, readers = tokens[:, :, :kept], tokens[:, :, kept:]
        token_valid = None if token_valid is None else token_valid[:, :, :kept]
        mask, own = window_mask(
            steps, kept, self.config.history_length, stream=stream, token_valid=token_valid, device=tokens.device
        )
        step = torch.arange(steps, device=tokens.device)
        position, x = step.repeat_interleave(kept)[None], tokens.flatten(1, 2)
        seen = mask if self.sees is None else limit_to_group(mask, self.sees)
        if self.num_readers:
            place = step.expand(batch, -1) if at is None else at
            readers = readers if at is None else take_steps(readers, at)
            x = torch.cat((x, readers.flatten(1, 2)), dim=1)
            window = window_steps(steps, self.config.history_length, stream=stream, device=tokens.device)
            there = take_steps(window.expand(batch, -1, -1), place).repeat_interleave(kept, 2)
            there = there if token_valid is None else there & token_valid.flatten(1)[:, None]
            seen = self._with_readers(seen, there)
            own = self._with_readers(own, position == place[..., None]) if self.config.memory_gate else own
            position = torch.cat((position.expand(batch, -1), place.repeat_interleave(self.num_readers, 1)), dim=1)
        rotary = self.rotary(position + first_position, tokens.dtype)
        slots = x.shape[1] - steps * kept
        alone = slots_only and slots > 0
        for block in self.blocks:
            x = block(x, rotary, seen, own, slots, last=alone and block is self.blocks[-1])
        if alone:
            return x.view(batch, -1, self.num_readers, width)
        x, read = x[:, : steps * kept].view(batch, steps, kept, width), x[:, steps * kept :]
        x = x if at is None else take_steps(x, at)
        x = torch.cat((x, read.view(batch, x.shape[1], -1, width)), dim=2) if slots else x
        return x[..., self.context_slots, :] if slots_only else x

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
        readers = self.num_readers
        kept = tokens.shape[1] - readers
        valid = None if token_valid is None else token_valid[:, :kept]
        there, own = cache.seen_next(valid), cache.own_next() if self.config.memory_gate else None
        mask = there if valid is None else never_empty(there)
        mask = mask if self.sees is None else limit_to_group(mask, self.sees)
        if readers:
            mask = self._with_group_of_readers(mask.expand(-1, -1, kept, -1), there)
            own = None if own is None else self._with_group_of_readers(own.expand(-1, -1, kept, -1), own)
        mask = mask if self.config.memory_gate else additive(mask, tokens.dtype)
        rotary = self.rotary(cache.position[:, None], tokens.dtype)
        x, pairs = tokens, []
        for block, held in zip(cast(Iterable[CausalBlock], self.blocks), cache.held(), strict=True):
            last = readers > 0 and block is self.blocks[-1]
            x, pair = block.step(x, rotary, held, mask, own, readers, last=last)
            pairs.append(pair)
        cache.append(pairs, valid, active)
        context: Tensor = self.norm(x if self.num_readers else x[..., self.context_slots, :])
        return context

    def _with_readers(self, mask: Tensor, seen: Tensor) -> Tensor:
        """A mask (B or 1, 1, S, S') between tokens of the history with that of M groups of readers behind them.

        Nobody sees the readers but those of their own group, (B, 1, S + M * K, S' + M * K) bool.

        Args:
            mask: True = may attend.
            seen: (B, M, S') what each group of readers sees.
        """
        batch, groups, _ = seen.shape
        seen = seen.repeat_interleave(self.num_readers, 1)[:, None]
        group = torch.arange(groups, device=seen.device).repeat_interleave(self.num_readers)
        among = (group[:, None] == group).expand(batch, 1, -1, -1)
        above = pad(mask.expand(batch, -1, -1, -1), (0, len(group)), value=False)
        return torch.cat((above, torch.cat((seen, among), dim=3)), dim=2)

    def _with_group_of_readers(self, mask: Tensor, seen: Tensor) -> Tensor:
        """As `_with_readers` for one group, of masks (B, 1, P or 1, S')."""
        behind = (0, self.num_readers)
        above, below = pad(mask, behind, value=False), pad(seen, behind, value=True)
        return torch.cat((above, below.expand(-1, -1, self.num_readers, -1)), dim=2)

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
            tokens_per_step=self.tokens_per_step - self.num_readers,
            head_dim=config.width // config.num_heads,
            device=device,
            dtype=dtype,
        )
