"""Context corruption and the guidance that uses it (Bai et al., arXiv 2602.10095).

Shapes: B batch, K context tokens, D width, L tokens, Da action width.
"""

from torch import Tensor

__all__ = ["corrupt", "guide"]


def corrupt(context: Tensor, noise: Tensor, eta: float) -> Tensor:
    """context (B, K, D) + eta * noise; eta is in units of the context's RMS, which is 1 after normalisation."""
    return context + eta * noise


def guide(velocity: Tensor, velocity_corrupted: Tensor, scale: float) -> Tensor:
    """Extrapolates velocities (B, L, Da) away from those of a corrupted context; scale 1 leaves `velocity` as it is."""
    return velocity_corrupted + scale * (velocity - velocity_corrupted)
