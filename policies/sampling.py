"""With what a model is run: its history cache behind numpy arrays, and as many threads as help."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scd_robot.errors import ConfigError
from scd_robot.nn import KVCache, lay_out_for_few_tokens

__all__ = ["TorchCache", "inference", "ready"]

_SMALL_BATCH = 16  # rows up to which one thread is faster than several


class TorchCache:
    """A `KVCache` as a `HistoryCache`.

    Attributes:
        tensors: the cache.
    """

    def __init__(self, tensors: KVCache) -> None:
        self.tensors = tensors

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        return self.tensors.num_bytes

    @property
    def position(self) -> Tensor:
        """(B,) index of the next encoder step of each row."""
        return self.tensors.position

    @torch.inference_mode()
    def reset(self, rows: NDArray[np.bool_]) -> None:
        """Empties the rows where `rows` (B,) is True."""
        self.tensors.reset(self._tensor(rows))

    @torch.inference_mode()
    def advance(self, steps: NDArray[np.int64]) -> None:
        """Lets encoder steps (B,) pass without an observation."""
        self.tensors.position += self._tensor(steps)

    @torch.inference_mode()
    def select(self, rows: NDArray[np.int64]) -> "TorchCache":
        """A copy of some rows (n,)."""
        return TorchCache(self.tensors.select(self._tensor(rows)))

    @torch.inference_mode()
    def join(self, others: Sequence["TorchCache"]) -> "TorchCache":
        """A copy of its rows and those of others, one after the other."""
        return TorchCache(self.tensors.join([self.tensors, *(other.tensors for other in others)]))

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.as_tensor(array, device=self.tensors.position.device)


def usable_device(device: str | torch.device) -> torch.device:
    """The device of this name; raises ConfigError where there is none, or it cannot be used."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"cannot use device {str(device)!r}: {str(error).splitlines()[0]}") from error
    return found


def ready(model: nn.Module, device: str | torch.device) -> torch.device:
    """Moves a trained model to where it is run, and readies it for that; raises ConfigError as `usable_device` does."""
    found = usable_device(device)
    model.to(found).eval()
    if found.type == "cpu":
        lay_out_for_few_tokens(model)
    return found


@contextmanager
def inference(device: torch.device, batch: int) -> Iterator[None]:
    """No gradients, and on a CPU one thread for small batches: more only wait for each other."""
    threads = torch.get_num_threads()
    single = device.type == "cpu" and batch <= _SMALL_BATCH and threads > 1
    if single:
        torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        if single:
            torch.set_num_threads(threads)
