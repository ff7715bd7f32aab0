"""The entangled rival in a control loop: as `ScdPolicy`, but a plan reads the keys and values of the whole history.

Keys and values of all layers are cached across control steps and denoising steps, in a ring of `history_length` steps.
"""

from typing import Any

from torch import Tensor

from scd_robot.errors import ConfigError
from scd_robot.model import HistoryContext
from scd_robot.policies.scd import ScdPolicy

__all__ = ["CausalDitPolicy"]


class CausalDitPolicy(ScdPolicy):
    """A trained `CausalDitModel`; arguments and methods are those of `ScdPolicy`."""

    @property
    def context(self) -> Tensor:
        """(B, P, D) the last layer's tokens of each row's latest control step.

        Raises:
            ConfigError: there was no observation yet.
        """
        if self._context is None:
            raise ConfigError("there is no context before the first observation: call observe(observation)")
        features: Tensor = self._context.features[:, 0]
        return features

    def _where(self, active: Tensor, new: HistoryContext, old: HistoryContext) -> HistoryContext:
        """Keys and values are the cache's, which leaves the other rows as they are."""
        return new.where(active, old)

    def _chosen(self, context: HistoryContext, rows: Tensor) -> HistoryContext:
        return context.rows(rows)

    def _repeated(self, context: HistoryContext, copies: int) -> Any:
        return context.repeat(copies)
