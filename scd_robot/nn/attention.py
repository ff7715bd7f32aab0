"""Scaled dot-product attention over groups of tokens: sliding window, causal across control steps.

Shapes: B batch, T control steps, P tokens per control step, L = T * P tokens, N heads, Dh head width, D width,
W window in control steps.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = [
    "additive",
    "attend",
    "limit_to_group",
    "multi_head_attention",
    "never_empty",
    "take_steps",
    "window_mask",
    "window_steps",
]


def window_steps(
    num_steps: int, history_length: int, *, stream: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """Which of T consecutive control steps see which, (B or 1, T, T) bool; arguments as of `window_mask`."""
    step = torch.arange(num_steps, device=device if stream is None else stream.device)
    age = step[:, None] - step[None, :]
    mask = ((age >= 0) & (age < history_length))[None]
    return mask if stream is None else mask & (stream[:, :, None] == stream[:, None, :])


def window_mask(
    num_steps: int,
    tokens_per_step: int,
    history_length: int,
    *,
    stream: Tensor | None = None,
    token_valid: Tensor | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Which tokens of T consecutive control steps see which.

    A token sees all tokens of its own control step and of the W - 1 steps before it, in every layer.

    Args:
        num_steps: T.
        tokens_per_step: P.
        history_length: W, the current control step included.
        stream: (B, T) int; steps with different numbers do not see each other (virtual resets). None = one stream.
        token_valid: (B, T, P) bool; tokens that are absent are seen by nobody. None = all are present.
        device: where the masks are made when neither tensor is given.

    Returns:
        mask: (B or 1, 1, L, L) bool, True = may attend. No row is empty: one that sees nobody sees everybody, so that
            the softmax stays finite (its output is never used).
        own: (1, 1, L, L) bool, pairs within the same control step.
    """
    for given in (stream, token_valid):
        device = given.device if given is not None else device
    steps = window_steps(num_steps, history_length, stream=stream, device=device)
    mask = steps.repeat_interleave(tokens_per_step, 1).repeat_interleave(tokens_per_step, 2)
    if token_valid is not None:
        mask = never_empty(mask & token_valid.flatten(1)[:, None, :])
    step = torch.arange(num_steps, device=device).repeat_interleave(tokens_per_step)
    return mask[:, None], (step[:, None] == step)[None, None]


def limit_to_group(mask: Tensor, sees: Tensor) -> Tensor:
    """A mask in which tokens of a control step see some of a control step's tokens only.

    Args:
        mask: (B or 1, 1, L or 1, any control steps * P) bool, True = may attend.
        sees: (P, P) bool, which tokens of any control step a token sees.

    Returns:
        (B or 1, 1, L or P, any control steps * P) bool; again no row is empty.
    """
    group = len(sees)
    return never_empty(mask & sees.repeat(max(1, mask.shape[-2] // group), mask.shape[-1] // group))


def never_empty(mask: Tensor) -> Tensor:
    """A mask (..., keys) in which who may see nobody sees everybody, so that the softmax stays finite."""
    return mask | ~mask.any(dim=-1, keepdim=True)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what is added to scores: 0 or -inf. Attention makes this of it anew in each call."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (B, N, Lq, Dh), k and v (B, N, Lk, Dh), mask (bool or `additive`) broadcastable over them -> (B, Lq, D)."""
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, own: Tensor | None, memory_gate: Tensor | None) -> Tensor:
    """Attention over own group and history, (B, Lq, D); with `memory_gate` the masks are bool, and `own` is needed.

    Without `memory_gate` one softmax covers both. With it (N,), the own group and the earlier control steps have a
    softmax each and the latter is weighted by tanh(gate) per head: zero at initialisation, so that training starts
    from a memoryless policy and lets history in where it helps (arXiv 2604.18933).
    """
    if memory_gate is None:
        return multi_head_attention(q, k, v, mask)
    assert own is not None
    past, group = mask & ~own, mask & own
    has_past = past.any(dim=-1, keepdim=True)
    recalled = scaled_dot_product_attention(q, k, v, attn_mask=past | ~has_past)
    present = scaled_dot_product_attention(q, k, v, attn_mask=never_empty(group))
    gate = torch.tanh(memory_gate)[:, None, None] * has_past
    return (present + gate.to(q.dtype) * recalled).transpose(1, 2).flatten(2)


def take_steps(x: Tensor, position: Tensor) -> Tensor:
    """Of (B, T, ...) the control steps (B, M): (B, M, ...)."""
    index = position.view(*position.shape, *(1 for _ in x.shape[2:])).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
