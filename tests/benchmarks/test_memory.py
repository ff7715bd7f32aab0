"""What the report of the memory suite concludes from results that are made up."""

from collections.abc import Sequence
from typing import Any

import pytest
from benchmark_jobs import load, result

memory = load("memory")
EPISODES = 60


def job(task: str, view: str, arm: str, seed: int, rates: Sequence[float]) -> dict[str, Any]:
    """A finished training whose first start states at each delay succeed, as many as `rates` says."""
    outcomes = [[i < rate * EPISODES for i in range(EPISODES)] for rate in rates]
    first, *others = (
        result("", o, env=f"{task} {view} {delay}")["evaluation"]
        | {"successes": sum(o), "episodes": EPISODES, "success_rate": sum(o) / EPISODES}
        for o, delay in zip(outcomes, memory.DELAYS, strict=True)
    )
    name = memory._name(task, view, arm, seed)
    return {**result(name, []), "evaluation": first, "also": dict(zip(memory.DELAYS[1:], others, strict=True))}


def verdicts(monkeypatch: pytest.MonkeyPatch, *jobs: dict[str, Any]) -> list[str]:
    monkeypatch.setattr(memory, "_floor", lambda *_, **__: "15/60")
    return memory._verdicts({one["name"]: one for one in jobs})


def test_the_jobs_are_what_is_to_be_shown() -> None:
    jobs = {job.name: job for job in memory.make_jobs()}
    assert len(jobs) == len(memory.make_jobs())
    for task in memory.MEMORY_TASKS:
        seeds = (0, 1, 2) if task in memory.SEEDS else (0,)
        for arm in ("history", "twin"):
            for seed in seeds:
                hidden, visible = (jobs.pop(memory._name(task, view, arm, seed)) for view in ("hidden", "visible"))
                assert hidden.environment.endswith("delay=10")
                assert [other.rpartition("=")[2] for other in hidden.also] == ["50", "200"]
                assert hidden.recording.environment.endswith(f"{task}:delay=mixed")
                assert visible.environment == visible.recording.environment
                assert visible.environment.endswith("delay=mixed,cue_visible=1")
    assert not jobs
    assert list(memory.SEEDS) == ["cue-reach", "place-back"]


def test_the_aim_is_that_of_the_delay_of_50(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = [job("cue-reach", "hidden", "history", seed, (0.1, rate, 0.1)) for seed, rate in enumerate((0.85, 1, 1))]
    [line] = verdicts(monkeypatch, *reached)
    assert "85 %, 100 %, 100 % by seed; aim 90 % reached" in line
    [line] = verdicts(monkeypatch, *reached[:2], job("cue-reach", "hidden", "history", 2, (1, 0.8, 1)))
    assert "NOT reached" in line
    [line] = verdicts(monkeypatch, reached[1])
    assert "reached (1 of 3 seeds)" in line


def test_the_twin_is_shown_beside_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    [line] = verdicts(monkeypatch, job("count-press", "hidden", "twin", 0, (1, 0.25, 1)))
    assert "twin 15/60" in line
    assert "guesses 15/60" in line


@pytest.mark.parametrize(("rate", "verdict"), [(1.0, ": non-inferior"), (0.9, "NOT shown to be non-inferior")])
def test_history_may_not_hurt_where_nothing_is_hidden(monkeypatch, rate: float, verdict: str) -> None:
    arms = [job("place-back", "visible", arm, 0, (r, r, r)) for arm, r in (("history", rate), ("twin", 0.95))]
    [line] = verdicts(monkeypatch, *arms)
    assert "1 seed: " in line
    assert verdict in line
    assert not verdicts(monkeypatch, *arms, job("place-back", "visible", "twin", 1, (1, 1, 1)))  # a pair is missing


def test_a_cell_pools_seeds_and_is_as_wide_as_they_differ() -> None:
    even = [job("cue-reach", "hidden", "history", seed, (0.8, 0.8, 0.8)) for seed in (0, 1)]
    uneven = [job("cue-reach", "hidden", "history", seed, (rate,) * 3) for seed, rate in enumerate((0.6, 1.0))]
    assert memory._cell(even, 0).startswith("96/120, 80.0 % [")
    assert memory._cell(uneven, 1).startswith("96/120, 80.0 % [")
    assert float(memory._cell(uneven, 0).split("[")[1].split(",")[0]) < 62
    assert float(memory._cell(even, 0).split("[")[1].split(",")[0]) > 65
    assert memory._cell([], 0) == "-"
