"""Environments by name: `metaworld/push-v3`; options follow a colon: `metaworld/push-v3:goal_steps=5,max_steps=200`.

A new environment is one module and one line in `_FACTORIES`. The module holds `TASKS`, the names after the slash (a
single empty one where the name has no slash), and the function named here: it takes the task and the options, integers
or words, which it checks, and returns an `Environment`. It must import its simulator inside functions only, so that
names can be listed and checked without one. Where it has a function `refuse_unknown(task, options)`, that may say more
about a name that is not in `TASKS`.

An environment that is not registered is named `module:callable`; its module may lie in the current folder.
"""

import importlib
from types import ModuleType
from typing import cast

from scd_robot.dotted import call_with_options, import_dotted, is_dotted
from scd_robot.errors import ConfigError, UnknownNameError
from scd_robot.types import ArraySpec, Environment, EnvironmentSpec

__all__ = ["known_environments", "make_environment", "parse_name"]

_FACTORIES = {
    "metaworld": "scd_robot.sim_eval.metaworld:make",
    "pusht": "scd_robot.sim_eval.pusht:make",
    "gymnasium": "scd_robot.sim_eval.gymnasium_tasks:make",
    "robosuite": "scd_robot.sim_eval.robosuite:make",
    "scd_memory": "scd_robot.sim_eval.memory:make",
}

_OWN = "One of your own is named module:callable, without options (docs/evaluation.md#a-new-environment)"
_METHODS = ("reset", "step", "state_hash", "close")  # what nothing can do without


def make_environment(name: str) -> Environment:
    """Makes an environment; `spec.name` of the result is the canonical spelling of `name`.

    Args:
        name: `PREFIX/TASK` or `PREFIX/TASK:OPTION=VALUE,...`; `known_environments()` lists what may stand before the
            colon, the environment's module describes its options.
            Or `package.module:callable`, something of the user's own that makes an environment.

    Raises:
        UnknownNameError: no such environment, option or callable; names the nearest ones.
        ConfigError: an option is malformed or out of range, or there is no such module.
        MissingDependencyError: the simulator is not installed; names the command that installs it.
    """
    known = known_environments()
    if is_dotted(name) and name.partition(":")[0] not in known:
        return _own(name)
    base, options = parse_name(name)
    prefix, _, task = base.partition("/")
    if base not in known:
        if prefix in _FACTORIES and hasattr(_module(prefix), "refuse_unknown"):
            _module(prefix).refuse_unknown(task, options)
        raise UnknownNameError("environment", base, known, _OWN)
    module, function = _module(prefix), _FACTORIES[prefix].partition(":")[2]
    return cast(Environment, getattr(module, function)(task, options))


def _own(name: str) -> Environment:
    """An environment of the user's own; errors inside of its callable are left as they are.

    Raises:
        UnknownNameError, ConfigError: there is no such callable, it cannot be called without arguments, or what it
            makes is no environment.
    """
    made = call_with_options(import_dotted(name, "environment"), name, {})
    lacks = [method for method in _METHODS if not callable(getattr(made, method, None))]
    if not isinstance(getattr(made, "spec", None), EnvironmentSpec):
        lacks.insert(0, "spec (an EnvironmentSpec)")
    if lacks:
        raise ConfigError(
            f"{name!r} made a {type(made).__name__}, which is no environment: it lacks {', '.join(lacks)}. An "
            "environment of another kind (gymnasium's, say) is wrapped in a class of yours that has what "
            "scd_robot.types.Environment lists (docs/evaluation.md#a-new-environment)"
        )
    _check_spec(made.spec, name)
    return cast(Environment, made)


def _check_spec(spec: EnvironmentSpec, name: str) -> None:
    """Raises ConfigError where the specification of an environment of the user's own contradicts itself."""
    arrays = spec.observation if isinstance(spec.observation, dict) else {}
    if not arrays or not all(isinstance(array, ArraySpec) for array in arrays.values()):
        raise ConfigError(
            f"spec.observation of {name!r} must be a dictionary of ArraySpec by key, got {spec.observation!r:.200}"
        )
    if not len(spec.action_low) == len(spec.action_high) == spec.action_dim:
        raise ConfigError(
            f"spec.action_low and spec.action_high of {name!r} must have action_dim = {spec.action_dim} numbers each, "
            f"got {len(spec.action_low)} and {len(spec.action_high)}"
        )


def known_environments() -> list[str]:
    """All environment names, sorted, without options. Imports no simulator."""
    return sorted(f"{prefix}/{task}" if task else prefix for prefix in _FACTORIES for task in _module(prefix).TASKS)


def parse_name(name: str) -> tuple[str, dict[str, int | str]]:
    """Splits `metaworld/push-v3:goal_steps=5` into `metaworld/push-v3` and `{"goal_steps": 5}`.

    Raises:
        ConfigError: what follows the colon is not a list of OPTION=INTEGER or OPTION=WORD, or an option is given twice.
    """
    base, colon, text = name.partition(":")
    options: dict[str, int | str] = {}
    for item in text.split(",") if colon else []:
        key, _, value = item.partition("=")
        if not (key and value):
            raise ConfigError(
                f"options of an environment are written NAME:OPTION=INTEGER or NAME:OPTION=WORD, with commas between, "
                f"got {item!r} in {name!r}"
            )
        if key in options:
            raise ConfigError(f"option {key!r} is given twice in {name!r}; keep one")
        try:
            options[key] = int(value)
        except ValueError:
            options[key] = value
    return base, options


def _module(prefix: str) -> ModuleType:
    return importlib.import_module(_FACTORIES[prefix].partition(":")[0])
