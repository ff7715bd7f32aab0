"""What a control step of several policies costs, measured in turns, so that other load on the machine meets all alike.

Batch 1, through the policies with numpy in and out: checks, normalisation and copies are included. Times are of the
wall clock (time.perf_counter).
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from scd_robot.policies.scd import ScdPolicy
from scd_robot.types import Observation

__all__ = ["TIMES", "take_turns", "timed"]

TIMES = ("encoder step", "plan", "planning tick", "idle tick")

Key = TypeVar("Key")


def take_turns(
    policies: Mapping[Key, ScdPolicy], observe: Callable[[], Observation], rounds: int
) -> dict[Key, dict[str, list[float]]]:
    """Milliseconds of every policy, by the names in `TIMES`; the first tenth of the rounds warms up and is dropped.

    - encoder step: `observe`; plan: `plan`; planning tick: both;
    - idle tick: each control step that follows, until the next plan is due.

    Args:
        policies: all of the same observations; they are reset, and their windows filled first, as in a long-running
            loop.
        observe: makes an observation of one row.
        rounds: planning ticks of each policy.
    """
    for policy in policies.values():
        policy.reset()
        for _ in range(policy.spec.history_length * policy.model.config.history_stride):
            policy.observe(observe())
    times: dict[Key, dict[str, list[float]]] = {}
    for index in range(rounds + rounds // 10):
        if index == rounds // 10:
            times = {key: {name: [] for name in TIMES} for key in policies}
        for key, policy in policies.items():
            found = _until_the_next_plan(policy, observe)
            for name, values in times.get(key, {}).items():
                values += found[name]
    return times


def _until_the_next_plan(policy: ScdPolicy, observe: Callable[[], Observation]) -> dict[str, list[float]]:
    seen = observe()
    encoder, plan = timed(lambda: policy.observe(seen)), timed(policy.plan)
    idle = []
    for _ in range(policy.spec.num_executed - 1):
        now = observe()
        idle.append(timed(lambda now=now: policy.act(now)))  # type: ignore[misc]
    return {"encoder step": [encoder], "plan": [plan], "planning tick": [encoder + plan], "idle tick": idle}


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)
