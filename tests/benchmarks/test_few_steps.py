"""The few-step benchmark: its jobs, its report, and the order of jobs that begin from another one's weights."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_jobs import load, result

from scd_robot.presets import resolve, with_settings
from scd_robot.sim_eval.metrics import wilson_interval
from scd_robot.types import ArraySpec, DatasetSpec

few_steps = load("few_steps")
common = sys.modules["common"]
JOBS = {job.name: job for job in few_steps.make_jobs(["push-v3"])}


def test_every_job_fits_its_preset_and_takes_the_denoising_steps_it_is_given() -> None:
    dataset = DatasetSpec({"proprio": ArraySpec((4,)), "object": ArraySpec((14,)), "goal": ArraySpec((3,))}, 4, 0.0125)
    assert len(JOBS) == 7
    for job in JOBS.values():
        settings = [f"policy.sampler.num_denoising_steps={max(job.denoising_steps)}"]
        with_settings(resolve(job.preset, dataset), [*job.settings, *settings])
        assert common.Job.from_json(json.loads(json.dumps({**vars(job), "recording": vars(job.recording)}))) == job


def evaluated(name: str, rates: dict[int, int]) -> dict[str, Any]:
    """A result with so many successes of 100 by number of denoising steps."""
    found = {}
    for steps, successes in rates.items():
        evaluation = result(name, [i < successes for i in range(100)])["evaluation"]
        counts = {"episodes": 100, "successes": successes, "success_rate": successes / 100}
        counts["interval"] = wilson_interval(successes, 100)
        found[str(steps)] = {**evaluation, **counts}
    return {**result(name, [True]), "by_denoising_steps": found}


def test_the_report_has_the_curves_and_compares_with_the_teacher_at_its_best() -> None:
    teacher, student = "push-v3_flow_matching", "push-v3_mip-distilled"
    results = {
        teacher: evaluated(teacher, {1: 60, 2: 90, 4: 98, 8: 99, 16: 99}),
        student: evaluated(student, {1: 97, 2: 99}),
    }
    report = few_steps.make_report(results, ["push-v3"])
    assert "| push-v3_flow_matching | 60/100, 60.0 % [50.2, 69.1] | 90/100" in report
    assert "| 97/100, 97.0 % [91.5, 99.0] | 99/100, 99.0 % [94.6, 99.8] | - | - | - |" in report
    lines = {line.split("|")[1].strip(): line for line in report.splitlines() if line.startswith("| push")}
    assert lines[f"{teacher}, 1"].endswith("| NOT shown |")
    assert lines[f"{student}, 1"].endswith("| NOT shown |")  # 2 of 100 lost: the interval reaches below -5
    assert lines[f"{student}, 2"].endswith("| shown |")


def test_a_job_waits_for_the_weights_it_begins_with() -> None:
    teacher, student, other = (JOBS[f"push-v3_{name}"] for name in ("flow_matching", "mip-distilled", "mip-scratch"))
    waiting = [student, teacher, other]
    assert common._next(waiting, {}) is teacher
    assert common._next(waiting, {teacher.name: None}) is other
    assert common._next(waiting, {teacher.name: None}) is None
    assert common._next(waiting, {}) is student
    assert common._next([], {}) is None


def test_a_job_whose_teacher_failed_fails_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = JOBS["push-v3_mip-distilled"]
    monkeypatch.setattr(common, "_start", lambda *_: pytest.fail("nothing may be started"))
    assert common._run_all(tmp_path, [student], total=1, parallel=1, threads=1, rival_python="unused") == 1
    told = common.read_results(tmp_path, [student])[student.name]["error"]
    assert told == "push-v3_flow_matching, whose weights it begins with, is not done"
