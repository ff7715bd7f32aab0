"""Statistics and Markdown tables for success benchmarks; every claim carries counts, an interval and its seeds.

All arms of a benchmark start from the same states, so two of them are compared episode by episode: what counts are the
start states that one solves and the other does not.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scd_robot.errors import DatasetError
from scd_robot.sim_eval.comparison import PairedCounts
from scd_robot.sim_eval.metrics import wilson_interval

__all__ = [
    "PairedCounts",
    "arms_table",
    "comparison_table",
    "pair",
    "percent",
    "provenance",
    "readings_table",
    "start_state_line",
    "success_counts",
]

Result = Mapping[str, Any]


def pair(a: Result, b: Result) -> PairedCounts:
    """Compares two results start state by start state; episodes that a crash made invalid in either are left out.

    Raises:
        DatasetError: they did not start from the same states.
    """
    if not _same_starts(a, b):
        raise DatasetError(f"{a['name']} and {b['name']} did not start from the same states: nothing to compare")
    outcomes = {episode["index"]: episode["success"] for episode in _valid(b)}
    counts = {(x, y): 0 for x in (True, False) for y in (True, False)}
    for episode in _valid(a):
        if episode["index"] in outcomes:
            counts[episode["success"], outcomes[episode["index"]]] += 1
    return PairedCounts(counts[True, True], counts[True, False], counts[False, True], counts[False, False])


def success_counts(result: Result) -> tuple[int, int]:
    """Successes and valid episodes."""
    valid = _valid(result)
    return sum(episode["success"] for episode in valid), len(valid)


def percent(rate: float, interval: tuple[float, float]) -> str:
    """A rate with its interval."""
    return f"{100 * rate:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def start_state_line(results: Iterable[Result]) -> str:
    """Says for each evaluation environment whether all its arms began alike, by the hashes of their start states."""
    groups: dict[str, list[Result]] = {}
    for result in _done(results):
        groups.setdefault(result["evaluation"]["env"], []).append(result)
    lines = []
    for environment, group in groups.items():
        same = all(_same_starts(group[0], other) for other in group)
        lines.append(
            f"- {environment}: {'the same' if same else 'NOT the same'} start states in all {len(group)} results"
        )
    return "\n".join(lines)


def arms_table(results: Mapping[str, Result], names: Sequence[str]) -> str:
    """One row per job."""
    head = "arm | successes | success, Wilson 95 % | mean steps | updates | training min | CPU min | plan ms p50 | seed"
    rows = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for name in names:
        result = results.get(name)
        if result is None or result["status"] != "done":
            text = "not run" if result is None else " ".join(f"failed: {result['error']}".split())
            rows.append(f"| {name} | {text.replace('|', '/')} |" + " |" * (head.count("|") - 1))
            continue
        training, evaluation = result["training"], result["evaluation"]
        successes, valid = success_counts(result)
        invalid = f" ({evaluation['invalid']} invalid)" if evaluation["invalid"] else ""
        rate = percent(successes / valid, wilson_interval(successes, valid)) if valid else "-"
        steps = "-" if evaluation["mean_steps"] is None else f"{evaluation['mean_steps']:.0f}"
        cpu = "-" if training["cpu_s"] is None else f"{training['cpu_s'] / 60:.1f}"
        plan = evaluation["plan_ms"]
        cells = (
            name,
            f"{successes}/{valid}{invalid}",
            rate,
            steps,
            str(training["steps"]),
            f"{training['wall_s'] / 60:.1f}",
            cpu,
            "-" if plan is None else f"{plan['p50']:.1f} (batch {evaluation['plan_batch_size']:.3g})",
            str(result["job"]["seed"]),
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def readings_table(results: Mapping[str, Result], names: Sequence[str]) -> str:
    """One row per job: success after so many updates and minutes of training."""
    rows = ["| arm | updates, training min: successes |", "|---|---|"]
    for name in names:
        result = results.get(name)
        if result is None or result["status"] != "done":
            continue
        last = {"updates": result["training"]["steps"], "wall_s": result["training"]["wall_s"]}
        cells = []
        for reading in (*result.get("readings", ()), {**last, "evaluation": result["evaluation"]}):
            successes, valid = success_counts(reading)
            cells.append(f"{reading['updates']}, {reading['wall_s'] / 60:.1f}: {successes}/{valid}")
        rows.append(f"| {name} | {'; '.join(cells)} |")
    return "\n".join(rows)


def comparison_table(results: Mapping[str, Result], pairs: Sequence[tuple[str, str]]) -> str:
    """One row per (arm, reference) of which both are done, from the same start states.

    Raises:
        DatasetError: two of them did not start from the same states.
    """
    head = "arm - reference | both | only arm | only reference | neither | difference, 95 % paired Newcombe | McNemar p"
    rows = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for arm, reference in pairs:
        if any(name not in results or results[name]["status"] != "done" for name in (arm, reference)):
            continue
        counts = pair(results[arm], results[reference])
        if not counts.total:
            continue
        low, high = counts.interval
        cells = (
            f"{arm} - {reference}",
            *(str(count) for count in (counts.both, counts.only_a, counts.only_b, counts.neither)),
            f"{100 * counts.difference:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]",
            f"{counts.p_value:.3g}",
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) if len(rows) > 2 else "No two arms to compare are done yet."


def provenance(results: Mapping[str, Result]) -> str:
    """Where, when and with what the numbers came about."""
    done = _done(results.values())
    if not done:
        return "Nothing is done yet."
    machines = sorted({f"{r['machine']['cpu']}, {r['machine']['cores']} cores" for r in done})
    threads = sorted({r["training"]["threads"] for r in done})
    packages = ("scd_robot", "python", "torch", "lightning", "mujoco", "metaworld", "numpy")
    packages += tuple(f"rival/{name}" for name in ("lerobot", "robomimic", "diffusers", "torch"))
    versions = sorted(
        {", ".join(f"{name} {r['versions'][name]}" for name in packages if name in r["versions"]) for r in done}
    )
    dates = sorted(r["date"] for r in done)
    lines = [
        f"- machine: {'; '.join(machines)}; threads per training: {', '.join(map(str, threads))}; "
        f"load while evaluating {min(r['machine']['load_1min'] for r in done)} to "
        f"{max(r['machine']['load_1min'] for r in done)}",
        f"- versions: {'; '.join(versions)}; code {', '.join(sorted({r['code'] for r in done}))}",
        f"- dates: {dates[0]} to {dates[-1]}",
        *(f"- command: `{command}`" for command in sorted({r["command"] for r in done})),
    ]
    return "\n".join(lines)


def _done(results: Iterable[Result]) -> list[Result]:
    return [result for result in results if result["status"] == "done"]


def _valid(result: Result) -> list[dict[str, Any]]:
    return [episode for episode in result["evaluation"]["episodes_detail"] if not episode["invalid"]]


def _same_starts(a: Result, b: Result) -> bool:
    """Whether the episodes have the same indices and, where a simulator got so far, the same state hashes."""
    first, second = ({e["index"]: e["initial_state_hash"] for e in r["evaluation"]["episodes_detail"]} for r in (a, b))
    known = [index for index in first if first[index] is not None and second.get(index) is not None]
    return first.keys() == second.keys() and all(first[index] == second[index] for index in known)
