"""One control step becomes a group of tokens.

Shapes: B batch, T control steps, P tokens per group, K context tokens, Da action width, D width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from scd_robot.errors import ShapeError, UnknownNameError
from scd_robot.model.config import ScdConfig

__all__ = ["StepTokenizer"]


class StepTokenizer(nn.Module):
    """Embeds normalised observations (and the previous action) and appends the context slots.

    A group is [observation tokens, previous-action token (where the configuration has one), K context slots]. Every
    slot has a name and a type embedding of its own; the context slots hold nothing else. The entangled architecture has
    no context slots.
    """

    def __init__(self, config: ScdConfig) -> None:
        super().__init__()
        self.config = config
        self.keys = sorted(config.observation_shapes)
        widths = {key: config.observation_shapes[key][0] for key in self.keys}
        if config.observation_tokens == "joint":
            widths = {"observation": sum(widths.values())}
        self.observation = nn.ModuleList(nn.Linear(n, config.width) for n in widths.values())
        self.has_past_action = config.past_action_input != "none"
        self.past_action = nn.Linear(config.action_dim, config.width) if self.has_past_action else None
        self.slot_names = [*widths] + ["past_action"] * self.has_past_action
        self.num_slots = config.num_context_tokens if config.architecture == "separable" else 0
        self.slot_names += [f"context_{i}" for i in range(self.num_slots)]
        self.type_embedding = nn.Parameter(torch.randn(len(self.slot_names), config.width) * 0.02)

    @property
    def tokens_per_step(self) -> int:
        """P."""
        return len(self.slot_names)

    def forward(
        self,
        observation: Mapping[str, Tensor],
        past_action: Tensor | None = None,
        past_action_valid: Tensor | None = None,
        present: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Builds the groups.

        Args:
            observation: (B, T, Do) by key, normalised.
            past_action: (B, T, Da) action executed in the step before, normalised; needed where the configuration
                has past_action_input.
            past_action_valid: (B, T) bool, False where no step came before; None = valid everywhere.
            present: (B, T) bool by key, for keys that are absent in some steps ("per_key" tokens only).

        Returns:
            tokens (B, T, P, D), and which of them are present, (B, T, P) bool or None = all.
        """
        vectors = [self._vector(observation, key) for key in self.keys]
        batch, steps = vectors[0].shape[:2]
        if self.config.observation_tokens == "joint":
            if present:
                raise ShapeError("absent observation keys need observation_tokens='per_key', this model has 'joint'")
            vectors = [torch.cat(vectors, dim=-1)]
        tokens = [embed(x) for embed, x in zip(self.observation, vectors, strict=True)]
        if self.past_action is not None:
            if past_action is None:
                raise ShapeError(f"this model reads the previous action, (B, T, {self.config.action_dim}); got None")
            tokens.append(self.past_action(past_action))
        slots = tokens[0].new_zeros(self.num_slots, self.config.width)
        content = torch.cat((torch.stack(tokens, dim=2), slots.expand(batch, steps, -1, -1)), dim=2)
        return content + self.type_embedding, self._valid(batch, steps, past_action_valid, present)

    def _vector(self, observation: Mapping[str, Tensor], key: str) -> Tensor:
        if key not in observation:
            raise ShapeError(f"observation {key!r} is missing; got {sorted(observation)}, need {self.keys}")
        x = observation[key]
        if x.ndim != 3 or x.shape[-1] != self.config.observation_shapes[key][0]:
            raise ShapeError(
                f"observation {key!r} must be (B, T, {self.config.observation_shapes[key][0]}), got {tuple(x.shape)}"
            )
        return x

    def _valid(
        self, batch: int, steps: int, past_action_valid: Tensor | None, present: Mapping[str, Tensor] | None
    ) -> Tensor | None:
        given = dict(present or {})
        for key in given:
            if key not in self.keys:
                raise UnknownNameError("observation key", key, self.keys)
        if self.has_past_action and past_action_valid is not None:
            given["past_action"] = past_action_valid
        if not given:
            return None
        device = next(iter(given.values())).device
        valid = torch.ones(batch, steps, self.tokens_per_step, dtype=torch.bool, device=device)
        for name, mask in given.items():
            valid[:, :, self.slot_names.index(name)] = mask
        return valid
