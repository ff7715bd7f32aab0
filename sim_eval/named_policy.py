"""Policies by dotted name, `package.module:callable`: anything that makes an object with `reset` and `act`.

The callable (or class) gets the options as keyword arguments and, if it has a parameter `environment`, the
`EnvironmentSpec` of what it will be evaluated in. `result.json` tells under `provenance.policy.module` which name,
which options, and which code that was.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from scd_robot.dotted import import_dotted
from scd_robot.sim_eval.policy_process import PolicyProcess
from scd_robot.sim_eval.policy_server import build_policy
from scd_robot.sim_eval.workers import EnvironmentSource, close_workers, start_workers
from scd_robot.types import EnvironmentSpec

__all__ = ["make_named_policy"]


def make_named_policy(
    name: str,
    options: Mapping[str, Any],
    environment: EnvironmentSource,
    *,
    env_python: str | None = None,
    python: str | None = None,
) -> Any:
    """Makes a policy for an environment.

    Args:
        name: `package.module:callable`.
        options: its keyword arguments; plain JSON types where `python` is given.
        environment: what the policy will be evaluated in; it is started for its specification where that is asked for.
        env_python: interpreter for the environment, as for `evaluate`.
        python: interpreter of another environment for the policy, see `PolicyProcess`; None = this process.

    Raises:
        ConfigError, UnknownNameError: see `policy_server.build_policy` and `PolicyProcess`.
    """
    if python is not None:  # whether the policy wants to know the environment is known only there
        return PolicyProcess(python, name, options, _specification(environment, env_python))
    function = import_dotted(name, "policy")
    wanted = callable(function) and "environment" in _parameters(function) and "environment" not in options
    return build_policy(name, options, _specification(environment, env_python) if wanted else None)


def _parameters(function: Any) -> Mapping[str, Any]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # written in C, without a signature
        return {}


def _specification(environment: EnvironmentSource, python: str | None) -> EnvironmentSpec:
    workers = start_workers(environment, 1, python=python)
    try:
        return workers[0].spec
    finally:
        close_workers(workers)
