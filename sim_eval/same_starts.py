"""Evaluations from the same start states: whether two are, and how their outcomes pair up."""

from collections.abc import Mapping
from typing import Any

from scd_robot.errors import DatasetError
from scd_robot.sim_eval.paired import DECIDED, PairedCounts, evidence

__all__ = ["Document", "check_same_conditions", "check_same_starts", "compare_pair", "is_decided", "outcomes"]

Document = Mapping[str, Any]
"""An evaluation's `result.json`."""


def outcomes(document: Document) -> dict[int, bool]:
    """Success by episode index of an evaluation's JSON; episodes that a crash made invalid are left out."""
    return {e["index"]: bool(e["success"]) for e in document["episodes_detail"] if not e["invalid"]}


def check_same_starts(first: Document, second: Document) -> None:
    """Refuses to compare evaluations that did not begin alike.

    Raises:
        DatasetError: other environments, or the hash of a common episode's start state differs, or none is common.
    """
    if first["env"] != second["env"]:
        raise DatasetError(f"these evaluations are of different environments, {first['env']} and {second['env']}")
    hashes = {e["index"]: e["initial_state_hash"] for e in second["episodes_detail"] if not e["invalid"]}
    common = [e for e in first["episodes_detail"] if not e["invalid"] and e["index"] in hashes]
    if not common:
        raise DatasetError(f"these evaluations of {first['env']} have no episode in common; evaluate the same numbers")
    for episode in common:
        if episode["initial_state_hash"] != hashes[episode["index"]]:
            raise DatasetError(
                f"episode {episode['index']} of {first['env']} did not start from the same state in both evaluations: "
                "another version of the simulator, or of this package; evaluate both anew"
            )


def check_same_conditions(first: Document, second: Document) -> None:
    """Raises DatasetError where two evaluations differ in more than the policy."""
    for name in ("max_steps", "faults", "success_definition"):
        if name in first and name in second and first[name] != second[name]:
            raise DatasetError(
                f"these evaluations of {first['env']} were made under other conditions ({name}: {first[name]} and "
                f"{second[name]}): the policies cannot be told apart by them"
            )


def compare_pair(first: Document, second: Document) -> PairedCounts:
    """Compares two evaluations start state by start state.

    Raises:
        DatasetError: they did not start from the same states.
    """
    check_same_starts(first, second)
    a, b = outcomes(first), outcomes(second)
    counts = {(x, y): 0 for x in (True, False) for y in (True, False)}
    for index in a.keys() & b.keys():
        counts[a[index], b[index]] += 1
    return PairedCounts(counts[True, True], counts[True, False], counts[False, True], counts[False, False])


def is_decided(first: Document, second: Document) -> bool:
    """Whether two evaluations hold enough evidence to stop; not yet where they have no valid episode in common.

    Raises:
        DatasetError: they did not start from the same states.
    """
    if not outcomes(first).keys() & outcomes(second).keys():
        return False
    counts = compare_pair(first, second)
    return evidence(counts.only_a, counts.only_b) >= DECIDED
