import json
from dataclasses import asdict
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


def arm_result(arm: str, successes: int, curve: list[int], cpu_s: float | None, seed: int = 0) -> dict[str, Any]:
    """A finished run of 100 episodes, whose earlier checkpoints had `curve` successes of 10."""
    document = result(headline._name("assembly", arm, seed), [True] * successes + [False] * (100 - successes))
    document["evaluation"] |= {"success_rate": successes / 100, "best_reward": 1.0, "weights": f"{arm}{seed}"}
    document["training"] |= {"cpu_s": cpu_s, "steps": 10 * (len(curve) + 1)}
    points = enumerate(curve, start=1)
    document["readings"] = [{"updates": 10 * i, "evaluation": {"success_rate": n / 10}} for i, n in points]
    return document


def report(*arms: dict[str, Any]) -> str:
    return headline.make_report({arm["name"]: arm for arm in arms}, {"assembly": TASK}, Path("nowhere.json"))


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


def test_arms_are_timed_to_nine_tenths_of_the_rivals_final_success() -> None:
    ours = arm_result("separable", 95, [2, 9, 9], 100.0)
    rival = arm_result("entangled", 90, [0, 3, 8], 300.0)
    text = report(ours, rival)
    assert "CPU time to 81.0% success: 0.17 of the rival's; aim 0.6: reached" in text  # 50 s beside 300 s
    assert "separable beside the entangled, 1 of 3 seeds: +5.0" in text
    slow = arm_result("separable", 95, [2, 3, 4], 250.0)
    assert "0.83 of the rival's; aim 0.6: NOT reached" in report(slow, rival)


def test_an_arm_that_never_gets_there_has_no_time() -> None:
    text = report(arm_result("separable", 50, [2, 3, 4], 100.0), arm_result("entangled", 90, [0, 3, 8], 300.0))
    assert "an arm never reached it" in text
    assert "| never |" in text
    text = report(arm_result("separable", 0, [0], 100.0), arm_result("entangled", 0, [0], 300.0))
    assert "an arm never reached it" in text


def test_arms_are_read_at_equal_cpu_time_too() -> None:
    ours, rival = arm_result("separable", 95, [2, 9, 9], 150.0), arm_result("entangled", 90, [0, 3, 8], 300.0)
    (row,) = (line for line in report(ours, rival).splitlines() if line.startswith("| entangled |"))
    assert row.endswith("| 30.0% |")  # its second checkpoint, after 150 s


def test_a_training_that_was_interrupted_has_no_cpu_time() -> None:
    text = report(arm_result("separable", 95, [9], None), arm_result("entangled", 90, [8], 300.0))
    assert "an arm never reached it" in text


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
