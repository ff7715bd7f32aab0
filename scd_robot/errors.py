"""Errors a user can act on. Each message says what was expected, what came, where, and what to do.

Everything that derives from `ScdRobotError` is the user's to mend (bad input, a missing package, a full disk); the
command line prints it as one sentence and exits with 2. Any other exception is a bug of ours.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "ActionError",
    "CheckpointError",
    "ConfigError",
    "DatasetError",
    "MissingDependencyError",
    "OutputError",
    "PolicyChangedError",
    "RenderError",
    "ScdRobotError",
    "ShapeError",
    "SimulatorError",
    "TrainingDivergedError",
    "UnknownNameError",
    "nearest_names",
]


class ScdRobotError(Exception):
    """Base of all errors that a user can mend."""


class ConfigError(ScdRobotError, ValueError):
    """A setting is out of range or contradicts another one."""


class ActionError(ScdRobotError, ValueError):
    """An action is NaN or infinite; it must not reach a robot or a simulator."""


class ShapeError(ScdRobotError, ValueError):
    """An array has another shape, width or set of keys than the policy or dataset it is given to."""


class DatasetError(ScdRobotError):
    """A dataset is missing, damaged, empty or holds values that would spoil training."""


class CheckpointError(ScdRobotError):
    """A checkpoint is missing, truncated, foreign, or of a schema this version cannot read."""


class OutputError(ScdRobotError):
    """An output cannot be written: no permission, disk full, or something is there already."""


class PolicyChangedError(ScdRobotError):
    """A server has another policy than before, though it looks the same: other weights."""


class MissingDependencyError(ScdRobotError, ImportError):
    """An optional package is absent or broken; the message names the command that installs or mends it."""


class SimulatorError(ScdRobotError):
    """A simulator failed to start, crashed or stopped answering."""


class RenderError(SimulatorError):
    """No OpenGL backend works, or a rendered frame is black or corrupted."""


class TrainingDivergedError(ScdRobotError):
    """The loss or a gradient became NaN or infinite."""


class UnknownNameError(ScdRobotError, KeyError):
    """A name (preset, task, key, verb) is not known; the message suggests the nearest valid ones."""

    def __init__(self, kind: str, name: str, valid: Iterable[str], note: str = "") -> None:
        names = sorted(valid)
        near = nearest_names(name, names)
        if near:
            hint = "did you mean " + " or ".join(repr(n) for n in near) + "?"
        elif names:
            shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            hint = f"valid names: {shown}"
        else:
            hint = "there are no valid names here"
        self.message = f"unknown {kind} {name!r}; {hint}" + (f" {note}" if note else "")
        super().__init__(self.message)
        self._arguments = (kind, name, tuple(names), note)

    def __reduce__(self) -> tuple[type["UnknownNameError"], tuple[str, str, tuple[str, ...], str]]:
        """Lets the error cross a process boundary: the constructor takes other arguments than the message."""
        return type(self), self._arguments

    def __str__(self) -> str:  # KeyError would show the repr
        return self.message


def nearest_names(name: str, valid: Iterable[str], count: int = 3) -> list[str]:
    """The `count` valid names most like `name`, best first (empty when none is alike)."""
    return difflib.get_close_matches(name, list(valid), n=count, cutoff=0.5)
