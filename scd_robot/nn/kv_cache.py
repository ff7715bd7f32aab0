"""Ring cache of keys and values for streaming a sliding-window causal transformer, one control step at a time.

All tensors have a static shape and every row of the batch keeps its own position, so rows can reset and advance at
different times, nothing is reallocated while a robot runs, and no operation waits for the device.

Shapes: B batch rows, W window in control steps (`history_length`), P tokens per control step, N heads, Dh head width.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from scd_robot.nn.memory import room_for

__all__ = ["KVCache", "KeysValues"]

KeysValues = tuple[Tensor, Tensor]


@dataclass
class KVCache:
    """Keys and values of the last W control steps of every row.

    Control step p is written to slot p % W, over the step that just left the window. A slot counts while its position
    is within the window of the current one, so control steps that were never written (dropped observations) need no
    clean-up.

    Attributes:
        keys_values: (layers, B, 2, N, W, P, Dh); index 0 of axis 2 holds keys, 1 values.
        slot_position: (B, W) control-step index held in each slot, -1 = empty.
        token_valid: (B, W, P) False for tokens that were absent (a camera that sent nothing).
        position: (B,) index of the next control step of each row.
    """

    keys_values: Tensor
    slot_position: Tensor
    token_valid: Tensor
    position: Tensor

    @classmethod
    def create(
        cls,
        *,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        history_length: int,
        tokens_per_step: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "KVCache":
        """An empty cache.

        Raises:
            ConfigError: there is no room for it; the message has the sum.
        """
        shape = (num_layers, batch_size, 2, num_heads, history_length, tokens_per_step, head_dim)
        with _room(shape, device, dtype or torch.get_default_dtype()):
            keys_values = torch.zeros(shape, device=device, dtype=dtype)
        return cls(
            keys_values=keys_values,
            slot_position=torch.full((batch_size, history_length), -1, device=device, dtype=torch.int64),
            token_valid=torch.zeros((batch_size, history_length, tokens_per_step), device=device, dtype=torch.bool),
            position=torch.zeros(batch_size, device=device, dtype=torch.int64),
        )

    @property
    def batch_size(self) -> int:
        """B."""
        return self.position.shape[0]

    @property
    def history_length(self) -> int:
        """W."""
        return self.slot_position.shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        tensors = (self.keys_values, self.slot_position, self.token_valid, self.position)
        return sum(t.numel() * t.element_size() for t in tensors)

    def reset(self, rows: Tensor | None = None) -> None:
        """Empties the rows where `rows` (B,) bool is True; None = all.

        Keys and values are zeroed as well: masked ones have weight 0, but 0 times an infinite value is not 0.
        """
        if rows is None:
            self.keys_values.zero_()
            self.slot_position.fill_(-1)
            self.position.zero_()
        else:
            self.keys_values.masked_fill_(rows[None, :, None, None, None, None, None], 0)
            self.slot_position.masked_fill_(rows[:, None], -1)
            self.position.masked_fill_(rows, 0)

    def clone(self) -> "KVCache":
        """A snapshot that later steps do not change."""
        return KVCache(
            self.keys_values.clone(), self.slot_position.clone(), self.token_valid.clone(), self.position.clone()
        )

    def select(self, rows: Tensor) -> "KVCache":
        """A copy of some rows (n,).

        Raises:
            ConfigError: there is no room for it; the message has the sum.
        """
        store = self.keys_values
        with _room((store.shape[0], len(rows), *store.shape[2:]), store.device, store.dtype):
            keys_values = store[:, rows]
        return KVCache(keys_values, self.slot_position[rows], self.token_valid[rows], self.position[rows])

    @classmethod
    def join(cls, caches: Sequence["KVCache"]) -> "KVCache":
        """A copy of the rows of several caches, one after the other."""
        return cls(
            torch.cat([cache.keys_values for cache in caches], dim=1),
            torch.cat([cache.slot_position for cache in caches]),
            torch.cat([cache.token_valid for cache in caches]),
            torch.cat([cache.position for cache in caches]),
        )

    def held(self) -> list[KeysValues]:
        """Keys and values of each layer, each (B, N, W * P, Dh): views."""
        keys, values = self.keys_values.flatten(4, 5).unbind(2)
        return list(zip(keys.unbind(), values.unbind(), strict=True))

    def seen_from(self, position: Tensor) -> Tensor:
        """Which of the tokens that are held are in the window of control step `position` (B,), (B, W * P) bool.

        The slot that the step itself will be written to has left its window by then.
        """
        age = position[:, None] - self.slot_position
        in_window = (self.slot_position >= 0) & (age < self.history_length)
        return (in_window[:, :, None] & self.token_valid).flatten(1)

    def seen_next(self, token_valid: Tensor | None = None) -> Tensor:
        """What the tokens of the next control step may see: of all that is held, then of each other.

        Args:
            token_valid: (B, P) bool, which tokens of the group are present; None = all.

        Returns:
            (B, 1, 1, W * P + P) bool, those in the window that are present.
        """
        earlier = self.seen_from(self.position)
        group = earlier.new_ones(self.batch_size, self.token_valid.shape[2]) if token_valid is None else token_valid
        return torch.cat((earlier, group), dim=1)[:, None, None]

    def own_next(self) -> Tensor:
        """Which of the same keys are the group's own, (B, 1, 1, W * P + P) bool."""
        batch, window, tokens = self.token_valid.shape
        own = torch.arange((window + 1) * tokens, device=self.position.device) >= window * tokens
        return own.expand(batch, 1, 1, -1)

    def append(
        self, pairs: Sequence[KeysValues], token_valid: Tensor | None = None, active: Tensor | None = None
    ) -> None:
        """One control step more. Nothing of the cache changes before, so that a step that fails leaves it as it was.

        Args:
            pairs: keys and values of the step's group in each layer, each (B, N, at least P, Dh); what is behind the
                first P is left out.
            token_valid: (B, P) bool, which tokens of the group are present; None = all.
            active: (B,) bool; rows that are False are left exactly as they are.
        """
        batch, window, tokens = self.token_valid.shape
        rows, slot = torch.arange(batch, device=self.position.device), self.position % window
        present = torch.ones((), device=rows.device, dtype=torch.bool) if token_valid is None else token_valid
        stamp, step = self.position, torch.ones((), device=rows.device, dtype=torch.int64)
        new = torch.stack([one for pair in pairs for one in pair], dim=1)[..., :tokens, :]
        new = new.unflatten(1, (-1, 2)).to(self.keys_values.dtype)
        if active is not None:
            kept = self.keys_values[:, rows, :, :, slot]  # (B, layers, 2, N, P, Dh): what is indexed comes first
            new = torch.where(active.view(-1, *(1,) * (new.ndim - 1)), new, kept)
            present = torch.where(active[:, None], present, self.token_valid[rows, slot])
            stamp = torch.where(active, stamp, self.slot_position[rows, slot])
            step = active.long()
        self.keys_values[:, rows, :, :, slot] = new
        self.token_valid[rows, slot] = present.expand(batch, tokens)
        self.slot_position[rows, slot] = stamp
        self.position += step


def _room(
    shape: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype
) -> AbstractContextManager[None]:
    """For keys and values (layers, B, 2, N, W, P, Dh)."""
    names = ("layers", "rows", "(keys, values)", "heads", "control steps of history", "tokens each", "numbers")
    terms = " x ".join(f"{count} {name}" for count, name in zip(shape, names, strict=True))
    told = f"for the history = {terms} x {dtype.itemsize} bytes"
    hint = "take fewer rows at once (episodes, candidates), or train with a shorter history_length"
    return room_for(math.prod(shape) * dtype.itemsize, device, f"{told}; {hint}")
