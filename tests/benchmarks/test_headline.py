import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_jobs import load, result

from scd_robot.errors import ConfigError
from scd_robot.presets import resolve, with_settings
from scd_robot.types import ArraySpec, DatasetSpec

headline = load("headline")
TASK = headline.TASKS["assembly"]
STATES = DatasetSpec({"proprio": ArraySpec((4,)), "object": ArraySpec((14,)), "goal": ArraySpec((3,))}, 4, 0.0125)


def arm_result(arm: str, successes: int, curve: list[int], cpu_s: float | None = None, seed: int = 0) -> dict[str, Any]:
    """A finished run of 100 episodes, whose earlier checkpoints, 10 updates apart, had `curve` successes of 10."""
    document = result(headline._name("assembly", arm, seed), [True] * successes + [False] * (100 - successes))
    document["evaluation"] |= {"success_rate": successes / 100, "best_reward": 1.0, "weights": f"{arm}{seed}"}
    document["training"] |= {"cpu_s": cpu_s, "steps": 10 * (len(curve) + 1)}
    points = enumerate(curve, start=1)
    document["readings"] = [{"updates": 10 * i, "evaluation": {"success_rate": n / 10}} for i, n in points]
    return document


@pytest.fixture
def report(tmp_path: Path) -> Callable[..., str]:
    """The report of arms of which an update takes so many seconds."""
    replaced = replace(TASK, updates=40)  # as many as `arm_result` has with three readings before its last

    def make(*arms: dict[str, Any], **seconds: float) -> str:
        times = tmp_path / "updates.json"
        if seconds:
            update_ms = {TASK.preset: {arm: {"p50": 1e3 * value} for arm, value in seconds.items()}}
            about = {"command": "python updates.py", "date": "then", "code": "abc", "machine": {"cpu": "a core"}}
            times.write_text(json.dumps({**about, "update_ms": update_ms}))
        results = {arm["name"]: arm for arm in arms}
        return str(headline.make_report(results, {"assembly": replaced}, times, tmp_path / "nowhere.json"))

    return make


JOBS = [*headline.make_jobs(headline.TASKS), *headline.make_trials()]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_settings_of_every_job_fit_its_preset(job: Any) -> None:
    if not job.rival:
        experiment = with_settings(resolve(job.preset, STATES), job.settings)
        assert experiment.training.max_steps % experiment.training.validate_every == 0
    assert headline.Job.from_json(json.loads(json.dumps(asdict(job)))) == job


def test_pusht_joins_where_its_recording_is_at_hand(tmp_path: Path) -> None:
    jobs = headline.make_jobs(headline.make_tasks(tmp_path / "pusht.zarr"))
    (job,) = (job for job in jobs if job.name == "pusht_entangled_seed2")
    assert job.recording == headline.Given(str(tmp_path / "pusht.zarr"), ("state", "keypoint"), 0.1)
    assert headline.Job.from_json(json.loads(json.dumps(asdict(job)))) == job
    assert "pusht" not in headline.make_tasks(None)
    assert not any("BC-RNN" in job.name for job in jobs if job.name.startswith("pusht"))  # its writer wants a recording


def test_a_converted_arm_begins_with_the_rival_of_its_seed_and_has_a_control_from_scratch() -> None:
    jobs = {job.name: job for job in headline.make_jobs(headline.TASKS)}
    converted, control = jobs["assembly_converted_seed1"], jobs["assembly_separable-brief_seed1"]
    assert converted.begins_from == "assembly_entangled_seed1"
    assert converted.converts
    assert not control.begins_from
    assert converted.settings == control.settings  # the same updates
    with pytest.raises(ConfigError, match="begins_from"):
        headline.Job("x", TASK.recording, TASK.environment, converts=("0:5", "last:1"))


def test_both_architectures_have_as_many_trials() -> None:
    trials = [job.name for job in headline.make_trials()]
    assert len(set(trials)) == len(trials)
    ours, rivals = ([name for name in trials if f"_{arm}_" in name] for arm in (headline.OURS, headline.RIVAL))
    assert len(ours) == len(rivals) == len(headline.LEARNING_RATES) * len(headline.TUNED_ON)


def test_arms_are_timed_to_nine_tenths_of_the_rivals_final_success(report: Callable[..., str]) -> None:
    ours = arm_result("separable", 95, [2, 9, 9])
    rival = arm_result("entangled", 90, [0, 3, 8])
    text = report(ours, rival, separable=2.5, entangled=7.5)
    assert "CPU time to 81.0% success: 0.17 of the rival's; aim 0.6: reached" in text  # 50 s beside 300 s
    assert "separable beside the entangled, 1 of 3 seeds: +5.0" in text
    slow = arm_result("separable", 95, [2, 3, 4])
    assert "0.83 of the rival's; aim 0.6: NOT reached" in report(slow, rival, separable=6.25, entangled=7.5)


def test_an_arm_that_never_gets_there_has_no_time(report: Callable[..., str]) -> None:
    seconds = {"separable": 2.5, "entangled": 7.5}
    text = report(arm_result("separable", 50, [2, 3, 4]), arm_result("entangled", 90, [0, 3, 8]), **seconds)
    assert "an arm never reached it" in text
    assert "| never |" in text
    text = report(arm_result("separable", 0, [0]), arm_result("entangled", 0, [0]), **seconds)
    assert "an arm never reached it" in text


def test_arms_are_read_at_equal_cpu_time_too(report: Callable[..., str]) -> None:
    ours, rival = arm_result("separable", 95, [2, 9, 9]), arm_result("entangled", 90, [0, 3, 8])
    text = report(ours, rival, separable=3.75, entangled=7.5)
    (row,) = (line for line in text.splitlines() if line.startswith("| entangled |"))
    assert row.endswith("| 300 | 300 | 30.0% |")  # its second checkpoint, after 150 s


def test_policies_from_outside_are_timed_by_their_own_run(report: Callable[..., str]) -> None:
    outside = arm_result("Diffusion Policy, CNN", 95, [2, 9, 9], cpu_s=120.0)
    rows = report(outside, arm_result("entangled", 90, [8]), separable=1.0, entangled=7.5).splitlines()
    (row,) = (line for line in rows if line.startswith("| Diffusion Policy, CNN |"))
    assert row.endswith("| 120 | 60 | 20.0% |")  # its first checkpoint: the separable model trains for 40 s


def test_without_the_time_of_an_update_there_are_no_training_times(report: Callable[..., str]) -> None:
    text = report(arm_result("separable", 95, [9]), arm_result("entangled", 90, [8]))
    assert "Training times are missing: python benchmarks/updates.py" in text
    assert "CPU time to" not in text
    (row,) = (line for line in text.splitlines() if line.startswith("| separable |"))
    assert row.endswith("| - | - | - |")


def test_trials_tell_learning_rate_and_steps_together() -> None:
    results = {}
    for job in headline.make_trials():
        counts = {"4": 70, "8": 60, "16": 80 if "entangled_5e-4" in job.name else 50}
        found = {steps: {"successes": n, "episodes": 100, "invalid": 0} for steps, n in counts.items()}
        results[job.name] = result(job.name, [True]) | {"by_denoising_steps": found}
    report = headline.make_tuning_report(results)
    assert "- separable: most successes with 2.5e-4 and NFE 4" in report
    assert "- entangled: most successes with 5e-4 and NFE 16" in report
    assert "| 70/100, 60/100, 80/100 |" in report
