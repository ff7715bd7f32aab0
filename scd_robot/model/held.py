"""Parts of a chunk that are known before it is planned, and are held on their value while the rest is denoised.

Shapes: B batch, Ta chunk length, k past actions, L = k + Ta (or Ta), Da action width, d committed actions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scd_robot.errors import ConfigError, ShapeError
from scd_robot.model.config import ScdConfig

__all__ = ["FixedActions", "hold"]

Clamp = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class FixedActions:
    """Numbers of a chunk that are given: a gripper that stays closed, or a joint that is locked.

    Attributes:
        values: (B, Ta, Da), normalised; read where `mask` is True.
        mask: (Ta, Da) bool.
    """

    values: Tensor
    mask: Tensor


def hold(
    config: ScdConfig, prefix: Tensor | None, fixed: FixedActions | None, noise: Tensor
) -> tuple[Clamp | None, Tensor | None]:
    """The sampler's clamp, and the tokens (1, L) that the decoder is shown at flow time 1; None = none.

    What is held is shown noised like the rest, and exact in the result; but a prefix is shown clean to a model that was
    trained with `max_delay_steps`.

    Args:
        config: of the model.
        prefix: (B, d, Da) the chunk's first actions; None = none.
        fixed: None = nothing.
        noise: (B, L, Da) at flow time 0.

    Raises:
        ConfigError: the prefix is as long as the chunk, or longer than the model was trained for.
        ShapeError: `fixed` is not for this chunk.
    """
    past = noise.shape[1] - config.chunk_length
    held = torch.zeros(noise.shape[1:], dtype=torch.bool, device=noise.device)
    known, committed = torch.zeros_like(noise), None
    if fixed is not None:
        shape = (len(noise), config.chunk_length, config.action_dim)
        if tuple(fixed.values.shape) != shape or tuple(fixed.mask.shape) != shape[1:]:
            raise ShapeError(
                f"fixed actions must be values {shape} with a mask {shape[1:]}, got {tuple(fixed.values.shape)} and "
                f"{tuple(fixed.mask.shape)}"
            )
        held[past:] = fixed.mask
        known[:, past:] = fixed.values.to(noise.dtype)
    if prefix is not None and prefix.shape[1]:
        delay = prefix.shape[1]
        _check_prefix(config, delay)
        held[past : past + delay] = True
        known[:, past : past + delay] = prefix.to(noise.dtype)
        if config.max_delay_steps:
            index = torch.arange(noise.shape[1], device=noise.device) - past
            committed = ((index >= 0) & (index < delay))[None]
    if not held.any():
        return None, None

    def clamp(x: Tensor, time: float) -> Tensor:
        shown = (1 - time) * noise + time * known
        if committed is not None:
            shown = torch.where(committed[..., None], known, shown)
        return torch.where(held, shown, x)

    return clamp, committed


def _check_prefix(config: ScdConfig, delay: int) -> None:
    if delay >= config.chunk_length:
        raise ConfigError(f"prefix holds {delay} actions; it must be shorter than chunk_length {config.chunk_length}")
    if 0 < config.max_delay_steps < delay:
        raise ConfigError(f"prefix holds {delay} actions; this model was trained for at most {config.max_delay_steps}")
