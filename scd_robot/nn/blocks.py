"""Transformer blocks: `CausalBlock` for the encoder, `AdaLNBlock` for the diffusion decoder, `CausalDitBlock` for both.

Shapes: B batch, L tokens, K context tokens, P tokens per control step, N heads, Dh head width, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from scd_robot.nn.attention import attend, multi_head_attention
from scd_robot.nn.embeddings import apply_rotary
from scd_robot.nn.kv_cache import KeysValues

__all__ = ["AdaLNBlock", "CausalBlock", "CausalDitBlock", "modulated_norm"]

Rotary = tuple[Tensor, Tensor]

_EPS = 1e-6  # of layer norms


def _mlp(width: int, ratio: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(approximate="tanh"), nn.Linear(ratio * width, width))


class CausalBlock(nn.Module):
    """Pre-norm transformer block over the token groups of a stream; the same weights run a whole segment or one step.

    Args:
        width: D.
        num_heads: N.
        mlp_ratio: hidden width of the MLP, in units of D.
        memory_gate: adds a zero-initialised gate per head on attention to earlier control steps.
        bias: queries, keys and values have a bias.
        modulated: by constants like those that an `AdaLNBlock` makes of a flow time, one set for the history and one
            for context slots that only read.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: int = 4,
        *,
        memory_gate: bool = False,
        bias: bool = False,
        modulated: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width, eps=_EPS, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=_EPS, bias=False)
        self.mlp = _mlp(width, mlp_ratio)
        self.memory_gate = nn.Parameter(torch.zeros(num_heads)) if memory_gate else None
        shifts_and_others = torch.tensor([0.0, 1.0, 1.0] * 2)[:, None].expand(2, -1, width)
        self.modulation = nn.Parameter(shifts_and_others.clone()) if modulated else None

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor, own: Tensor, slots: int = 0, *, last: bool = False
    ) -> Tensor:
        """All tokens (B, L, D) of a segment at once, the last `slots` of which are context slots that only read.

        `mask` and `own` are as `window_mask` makes them. In the `last` layer only the slots (B, slots, D) go on.
        """
        modulation = self.modulate(x.shape[1], slots)
        q, k, v = self.queries_keys_values(x, rotary, modulation)
        return self._finish(x, q, k, v, mask, own, modulation, slots if last else x.shape[1])

    def step(
        self,
        x: Tensor,
        rotary: Rotary,
        held: KeysValues,
        mask: Tensor,
        own: Tensor | None,
        slots: int,
        *,
        last: bool = False,
    ) -> tuple[Tensor, KeysValues]:
        """The tokens (B, P, D) of one more control step, and their keys and values, each (B, N, P, Dh).

        Those of earlier ones are `held`, each (B, N, S, Dh); masks have a key for each of these and then of x. In the
        `last` layer nothing but the last `slots` of x goes on, which only read.
        """
        modulation = self.modulate(x.shape[1], slots)
        q, *new = self.queries_keys_values(x, rotary, modulation)
        k, v = (torch.cat(both, dim=2) for both in zip(held, new, strict=True))
        x = self._finish(x, q, k, v, mask, own, modulation, slots if last else x.shape[1])
        return x, (new[0], new[1])

    def queries_keys_values(
        self, x: Tensor, rotary: Rotary, modulation: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each (B, N, L, Dh)."""
        x = self.attention_norm(x)
        x = x if modulation is None else torch.addcmul(modulation[0], x, modulation[1])
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3)
        q, k = apply_rotary(qkv[:, :, :2], *rotary).unbind(2)
        return q, k, qkv[:, :, 2]

    def _finish(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        own: Tensor | None,
        modulation: tuple[Tensor, ...] | None,
        count: int,
    ) -> Tensor:
        """What becomes of the last `count` tokens."""
        if count < x.shape[1]:
            x, q, mask = x[:, -count:], q[:, :, -count:], mask[..., -count:, :]
            own = None if own is None else own[..., -count:, :]
            modulation = None if modulation is None else tuple(one[-count:] for one in modulation)
        attended = attend(q, k, v, mask, own, self.memory_gate)
        if modulation is None:
            x = x + self.out(attended)
            return x + self.mlp(self.mlp_norm(x))
        _, _, gate_a, shift_m, factor_m, gate_m = modulation
        x = torch.addcmul(x, gate_a, self.out(attended))
        return torch.addcmul(x, gate_m, self.mlp(torch.addcmul(shift_m, self.mlp_norm(x), factor_m)))

    def modulate(self, length: int, slots: int) -> tuple[Tensor, ...] | None:
        """Shift, factor and gate of attention, then of the MLP, each (L, D); None = there is none."""
        if self.modulation is None:
            return None
        of_slots = torch.arange(length, device=self.modulation.device) >= length - slots
        return self.modulation[of_slots.long()].unbind(1)


def modulated_norm(x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """Adaptive layer norm of x (B, L, D); shift and factor are (D,), or broadcast over x."""
    if shift.ndim == 1 and shift.dtype == x.dtype:  # not so under autocast
        return layer_norm(x, x.shape[-1:], factor, shift, _EPS)
    return torch.addcmul(shift, _norm(x), factor)


def _norm(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=_EPS)


class AdaLNBlock(nn.Module):
    """Transformer block modulated by flow time, adaLN-zero (Peebles & Xie, arXiv 2212.09748).

    `forward` denoises tokens, `prefix` advances context tokens that no flow time touches.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = _mlp(width, mlp_ratio)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def modulate_by(self, features: Tensor) -> tuple[Tensor, ...]:
        """Shift, factor and gate of attention, then of the MLP, each (B, L or 1, D), of flow-time features like them.

        They do not change while a plan is denoised with the same flow times, so they are not part of `forward`.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(features).chunk(6, dim=-1)
        return shift_a, 1 + scale_a, gate_a, shift_m, 1 + scale_m, gate_m

    def forward(
        self, x: Tensor, modulation: tuple[Tensor, ...], mask: Tensor | None = None, prefix: Tensor | None = None
    ) -> Tensor:
        """One denoising layer.

        Args:
            x: (B, L, D) noisy tokens (with the context tokens in front of them for fusion "concat").
            modulation: this block's `modulate_by` of the flow-time features, or each (D,) where all share them.
            mask: broadcastable to (B, N, L, K + L), True = may attend; None = all.
            prefix: keys and values (2, B, N, K, Dh) of context tokens to attend to besides x.
        """
        q, keys_values = self._project(modulated_norm(x, modulation[0], modulation[1]))
        if prefix is not None:
            keys_values = torch.cat((prefix, keys_values), dim=3)
        k, v = keys_values
        return self._finish(x, multi_head_attention(q, k, v, mask), modulation)

    def _finish(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        _, _, gate_a, shift_m, factor_m, gate_m = modulation
        x = torch.addcmul(x, gate_a, self.out(attended))
        return torch.addcmul(x, gate_m, self.mlp(modulated_norm(x, shift_m, factor_m)))

    def prefix(self, context: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """Context tokens (B, K, D) attending to themselves alone; in the `last` layer only keys and values are due."""
        q, keys_values = self._project(_norm(context))
        if not last:
            context = context + self.out(multi_head_attention(q, *keys_values))
            context = context + self.mlp(_norm(context))
        return context, keys_values

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, N, L, Dh), and keys and values (2, B, N, L, Dh)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return qkv[0], qkv[1:]


class CausalDitBlock(AdaLNBlock):
    """The same layer for clean history tokens and for noisy ones, which attend to the history's keys and values.

    Rotary positions are those of control steps; the noisy tokens of a plan share the current one's.
    """

    def history(
        self, x: Tensor, modulation: tuple[Tensor, ...], rotary: Rotary, mask: Tensor
    ) -> tuple[Tensor, KeysValues]:
        """Tokens (B, L, D) of a whole segment, and their keys and values, each (B, N, L, Dh)."""
        q, k, v = self.queries_keys_values(x, modulation, rotary)
        return self._finish(x, multi_head_attention(q, k, v, mask), modulation), (k, v)

    def step(
        self, x: Tensor, modulation: tuple[Tensor, ...], rotary: Rotary, held: KeysValues, mask: Tensor
    ) -> tuple[Tensor, KeysValues]:
        """The tokens (B, P, D) of one more control step, and their keys and values, each (B, N, P, Dh).

        They see what `mask` (B, 1, 1, S + P) says of what is `held` of earlier ones, each (B, N, S, Dh), and of each
        other.
        """
        q, *new = self.queries_keys_values(x, modulation, rotary)
        k, v = (torch.cat(both, dim=2) for both in zip(held, new, strict=True))
        return self._finish(x, multi_head_attention(q, k, v, mask), modulation), (new[0], new[1])

    def denoise(
        self,
        x: Tensor,
        modulation: tuple[Tensor, ...],
        rotary: Rotary | None,
        pair: KeysValues | Tensor,
        history: int,
        mask: Tensor,
    ) -> Tensor:
        """Noisy tokens.

        Args:
            x: (B, L, D).
            modulation: of their flow time.
            rotary: of the current control step.
            pair: the history's keys and values, each (B, N, S, Dh); or in one, keys relative to the current control
                step, with room behind them, (2, B, N, at least S + L, Dh), into which the tokens' own are written.
            history: S.
            mask: broadcastable to (B, N, L, S + L).
        """
        if isinstance(pair, Tensor):
            q, keys_values = self._project(modulated_norm(x, modulation[0], modulation[1]))
            end = history + x.shape[1]
            pair[:, :, :, history:end] = keys_values
            k, v = pair[:, :, :, :end]
        else:
            q, *own = self.queries_keys_values(x, modulation, rotary)
            k, v = (torch.cat(both, dim=2) for both in zip(pair, own, strict=True))
        return self._finish(x, multi_head_attention(q, k, v, mask), modulation)

    def queries_keys_values(
        self, x: Tensor, modulation: tuple[Tensor, ...], rotary: Rotary | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, N, L, Dh); without `rotary` relative to the tokens' control step."""
        x = modulated_norm(x, modulation[0], modulation[1])
        if rotary is None:
            q, (k, v) = self._project(x)
            return q, k, v
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3)
        q, k = apply_rotary(qkv[:, :, :2], *rotary).unbind(2)
        return q, k, qkv[:, :, 2]
