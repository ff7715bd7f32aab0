"""Environments by name: `metaworld/push-v3`; options follow a colon: `metaworld/push-v3:goal_steps=5,max_steps=200`.

A new environment is one module and one line in `_FACTORIES`. The module holds `TASKS`, the names after the slash, and
the function named here: it takes the task and the options and returns an `Environment`. It must import its simulator
inside functions only, so that names can be listed and checked without one.
"""

import importlib
from types import ModuleType
from typing import cast

from scd_robot.errors import ConfigError, UnknownNameError
from scd_robot.types import Environment

__all__ = ["known_environments", "make_environment", "parse_name"]

_FACTORIES = {
    "metaworld": "scd_robot.sim_eval.metaworld:make",
}


def make_environment(name: str) -> Environment:
    """Makes an environment; `spec.name` of the result is the canonical spelling of `name`.

    Args:
        name: `PREFIX/TASK` or `PREFIX/TASK:OPTION=INTEGER,...`; `known_environments()` lists what may stand before the
            colon, the environment's module describes its options.

    Raises:
        UnknownNameError: no such environment or option; names the nearest ones.
        ConfigError: an option is malformed or out of range.
        MissingDependencyError: the simulator is not installed; names the command that installs it.
    """
    base, options = parse_name(name)
    if base not in (known := known_environments()):
        raise UnknownNameError("environment", base, known)
    prefix, _, task = base.partition("/")
    function = _FACTORIES[prefix].partition(":")[2]
    return cast(Environment, getattr(_module(prefix), function)(task, options))


def known_environments() -> list[str]:
    """All environment names, sorted, without options. Imports no simulator."""
    return sorted(f"{prefix}/{task}" for prefix in _FACTORIES for task in _module(prefix).TASKS)


def parse_name(name: str) -> tuple[str, dict[str, int]]:
    """Splits `metaworld/push-v3:goal_steps=5` into `metaworld/push-v3` and `{"goal_steps": 5}`.

    Raises:
        ConfigError: what follows the colon is not a list of OPTION=INTEGER, or an option is given twice.
    """
    base, colon, text = name.partition(":")
    options: dict[str, int] = {}
    for item in text.split(",") if colon else []:
        key, _, value = item.partition("=")
        try:
            number = int(value)
        except ValueError:
            raise ConfigError(
                f"options of an environment are written PREFIX/TASK:OPTION=INTEGER,..., got {item!r} in {name!r}"
            ) from None
        if key in options:
            raise ConfigError(f"option {key!r} is given twice in {name!r}; keep one")
        options[key] = number
    return base, options


def _module(prefix: str) -> ModuleType:
    return importlib.import_module(_FACTORIES[prefix].partition(":")[0])
