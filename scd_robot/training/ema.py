"""Exponential moving average of weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["Ema"]


class Ema:
    """Shadow copy of a module's parameters, shadow = decay * shadow + (1 - decay) * parameter.

    The decay grows from 2 / 11 to `max_decay` as min(max_decay, (1 + n) / (10 + n)), n = updates so far. Parameters
    that are not trained stay as they are.
    """

    def __init__(self, module: nn.Module, max_decay: float) -> None:
        self.max_decay = max_decay
        self.num_updates = 0
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}
        self._moving = [name for name, p in module.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes in the module's present parameters; those that are not trained stay as they were."""
        self.num_updates += 1
        decay = min(self.max_decay, (1 + self.num_updates) / (10 + self.num_updates))
        present = self._parameters(module)
        averaged, new = ([values[name] for name in self._moving] for values in (self.shadow, present))
        torch._foreach_lerp_(averaged, new, 1 - decay)

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Within the context the module has the averaged parameters."""
        raw = {name: p.clone() for name, p in self._parameters(module).items()}
        self._copy(module, self.shadow)
        try:
            yield
        finally:
            self._copy(module, raw)

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """What `load_state_dict` of such a module takes: the averaged parameters, and buffers as they are; see `full`.

        Statistics of BatchNorm are such buffers.
        """
        buffers = {name: value for name, value in module.state_dict().items() if name not in self.shadow}
        return {**buffers, **self.full()}

    def full(self) -> dict[str, Tensor]:
        """The averaged parameters; where they are sharded over devices, all devices have to call this together."""
        return {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in self.shadow.items()}

    def state_dict(self) -> dict[str, object]:
        """Plain types and tensors; see `full`."""
        return {"num_updates": self.num_updates, "shadow": self.full()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Inverse of `state_dict`."""
        shadow, num_updates = state["shadow"], state["num_updates"]
        assert isinstance(shadow, Mapping)
        assert isinstance(num_updates, int)
        self.num_updates = num_updates
        for name, value in self.shadow.items():
            whole = shadow[name].to(value.device)
            if isinstance(value, DTensor):
                whole = distribute_tensor(whole, value.device_mesh, value.placements)
            value.copy_(whole)

    def to(self, device: torch.device) -> None:
        """Moves the shadow."""
        self.shadow = {name: value.to(device) for name, value in self.shadow.items()}

    @staticmethod
    def _parameters(module: nn.Module) -> dict[str, Tensor]:
        if isinstance(module, FSDPModule):  # after a forward pass it may still hold gathered parameters
            cast(FSDPModule, module).reshard()
        return {name: p.detach() for name, p in module.named_parameters()}

    def _copy(self, module: nn.Module, source: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters(module).items():
            parameter.copy_(source[name])
