"""Late, lost and frozen observations, injected between the environments and the policy.

The environments go on as ever, from the same start states; only what the policy sees changes. An observation of control
step i arrives at i * control_dt + latency + jitter; the policy is given the newest one that has arrived and was not
lost, in every control step. Draws are a function of (episode, control step) alone.

Shapes: B rows (environments).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError
from scd_robot.seeding import OBSERVATION_FAULTS, keyed_rng

__all__ = ["FaultInjector", "ObservationFaults", "describe", "injector"]

_ON_TIME_S = 1e-9

Observation = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ObservationFaults:
    """What goes wrong on the way from the sensors to the policy.

    Attributes:
        latency_ms: every observation arrives so late.
        jitter_ms: and up to so much later, evenly distributed.
        drop: share of observations that never arrive.
        freeze: share of control steps in which the sensors freeze for `freeze_steps` control steps.
        freeze_steps: see `freeze`.
    """

    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    drop: float = 0.0
    freeze: float = 0.0
    freeze_steps: int = 20

    def __post_init__(self) -> None:
        for name in ("latency_ms", "jitter_ms"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a finite time of 0 ms or more, got {getattr(self, name)}")
        for name in ("drop", "freeze"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a share in [0, 1), got {getattr(self, name)}")
        if self.freeze_steps < 1:
            raise ConfigError(f"freeze_steps must be at least 1, got {self.freeze_steps}")

    @property
    def any(self) -> bool:
        """Whether anything goes wrong."""
        return bool(self.latency_ms or self.jitter_ms or self.drop or self.freeze)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


@dataclass
class _Row:
    """What is on its way in one environment."""

    draws: np.random.Generator
    step: int
    frozen_until: int  # control step
    under_way: list[tuple[float, int, Observation]]  # arrival [s], control step, observation
    seen: tuple[int, Observation]


class FaultInjector:
    """Delivers the observations of B environments as `faults` say.

    Args:
        faults: what goes wrong.
        control_dt: seconds per control step.
    """

    def __init__(self, faults: ObservationFaults, control_dt: float) -> None:
        self._faults, self._control_dt = faults, control_dt
        self._rows: dict[int, _Row] = {}

    def begin(self, row: int, episode: int, observation: Observation) -> None:
        """Starts an episode in a row; its first observation was there before it began."""
        self._rows[row] = _Row(keyed_rng(OBSERVATION_FAULTS, episode), -1, -1, [], (-1, observation))

    def deliver(self, row: int, observation: Observation) -> Observation:
        """What the policy sees in this control step, given what the sensors measured in it."""
        state, faults = self._rows[row], self._faults
        state.step += 1
        jitter, lost, freezes = state.draws.random(3)
        now = state.step * self._control_dt
        if freezes < faults.freeze and state.step > state.frozen_until:
            state.frozen_until = state.step + faults.freeze_steps - 1
        if lost >= faults.drop and state.step > state.frozen_until:
            arrival = now + (faults.latency_ms + jitter * faults.jitter_ms) / 1e3
            state.under_way.append((arrival, state.step, dict(observation)))
        late = [item for item in state.under_way if item[0] > now + _ON_TIME_S]
        for arrival, step, measured in state.under_way:
            if arrival <= now + _ON_TIME_S and step > state.seen[0]:
                state.seen = (step, measured)
        state.under_way = [item for item in late if item[1] > state.seen[0]]  # one that was overtaken is of no use
        return state.seen[1]


def injector(faults: ObservationFaults | None, control_dt: float) -> FaultInjector | None:
    """None where nothing goes wrong."""
    return FaultInjector(faults, control_dt) if faults is not None and faults.any else None


def describe(faults: Mapping[str, Any]) -> str:
    """A few words for people, from an evaluation's JSON."""
    words = []
    if faults["latency_ms"] or faults["jitter_ms"]:
        jitter = f" + 0 to {faults['jitter_ms']:g}" if faults["jitter_ms"] else ""
        words.append(f"observations {faults['latency_ms']:g}{jitter} ms late")
    if faults["drop"]:
        words.append(f"{100 * faults['drop']:g} % lost")
    if faults["freeze"]:
        words.append(f"frozen for {faults['freeze_steps']} steps with {100 * faults['freeze']:g} % per step")
    return ", ".join(words)
