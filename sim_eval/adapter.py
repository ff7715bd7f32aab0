"""What adapters of simulators share: options in an environment's name, checked actions, hashes of states."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from scd_robot.errors import ActionError, ShapeError, SimulatorError, UnknownNameError
from scd_robot.types import ActionArray, EnvironmentSpec

__all__ = ["canonical_name", "check_physics", "checked_action", "digest", "read_options"]

Options = TypeVar("Options")


def read_options(kind: type[Options], given: Mapping[str, Any], simulator: str) -> Options:
    """The options after the colon of an environment's name, as their dataclass.

    Raises:
        UnknownNameError: there is no such option; names the nearest ones.
        ConfigError: one is out of range.
    """
    valid = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in given:
        if key not in valid:
            raise UnknownNameError(f"option of {simulator}", key, valid)
    return kind(**given)


def canonical_name(base: str, options: Any) -> str:
    """The environment's name with those options that are not the defaults, in their own order."""
    default = asdict(type(options)())
    changed = [f"{key}={value}" for key, value in asdict(options).items() if value != default[key]]
    return base + (":" + ",".join(changed) if changed else "")


def checked_action(action: ArrayLike, spec: EnvironmentSpec, step: int) -> ActionArray:
    """An action (Da,) clipped to the bounds.

    Args:
        action: as the policy gave it.
        spec: of the environment.
        step: the control step for which it is, from 0 on.

    Raises:
        SimulatorError: the episode is over.
        ShapeError: the action is not (Da,).
        ActionError: it holds NaN or infinite values.
    """
    if step >= spec.max_steps:
        raise SimulatorError(f"the episode of {spec.name} was truncated after {step} control steps; call reset(seed)")
    values = np.asarray(action, dtype=np.float32)
    if values.shape != (spec.action_dim,):
        raise ShapeError(f"the action must be ({spec.action_dim},) for {spec.name}, got {values.shape}")
    if not np.isfinite(values).all():
        raise ActionError(
            f"the action in control step {step} of {spec.name} must be finite, got {values.tolist()}; check the policy "
            "that made it"
        )
    low, high = (np.asarray(bound, np.float32) for bound in (spec.action_low, spec.action_high))
    return np.clip(values, low, high)


def check_physics(data: Any, name: str, where: str) -> None:
    """Makes errors of NaN and huge values, which MuJoCo meets by a warning and a silent reset of the state.

    Args:
        data: of MuJoCo; its warnings are cleared when they are told.
        name: of the environment.
        where: words for the message.

    Raises:
        SimulatorError: the physics became unstable.
    """
    import mujoco

    kinds = mujoco.mjtWarning
    bad = [
        kind for kind in (kinds.mjWARN_BADQPOS, kinds.mjWARN_BADQVEL, kinds.mjWARN_BADQACC) if data.warning[kind].number
    ]
    if bad or not (np.isfinite(data.qpos).all() and np.isfinite(data.qvel).all()):
        for kind in bad:
            data.warning[kind].number = 0
        names = ", ".join(kind.name for kind in bad) or "a state that is not finite"
        raise SimulatorError(f"the physics of {name} became unstable {where} ({names})")


def digest(parts: Iterable[ArrayLike]) -> str:
    """Hexadecimal SHA-256 of numbers, as float64 in this order."""
    found = hashlib.sha256()
    for part in parts:
        found.update(np.ascontiguousarray(part, dtype="<f8").tobytes())
    return found.hexdigest()
