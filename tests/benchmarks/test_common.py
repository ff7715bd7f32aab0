import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_jobs import load, result

from scd_robot.config import to_json
from scd_robot.errors import ConfigError, DatasetError, OutputError, UnknownNameError
from scd_robot.presets import resolve, with_settings
from scd_robot.types import ArraySpec, DatasetSpec

common, reporting, five_tasks, history, ablations, run_job = map(
    load, ("common", "reporting", "five_tasks", "history", "ablations", "run_job")
)
Job, Recording = common.Job, common.Recording


@pytest.mark.parametrize(
    ("only_a", "only_b", "expected"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (0, 6, 2 / 64), (1, 7, 2 * 9 / 256), (4, 4, 1.0)],
)
def test_mcnemar_p_is_the_two_sided_binomial_tail(only_a: int, only_b: int, expected: float) -> None:
    assert reporting.PairedCounts(10, only_a, only_b, 3).p_value == pytest.approx(expected)


def test_paired_interval_reproduces_the_worked_example_of_altman() -> None:
    # Altman et al., Statistics with Confidence (2000), table 6.2: 14, 5, 0, 22 pairs.
    low, high = reporting.PairedCounts(14, 5, 0, 22).interval
    assert (round(low, 3), round(high, 3)) == (0.011, 0.226)


def test_paired_interval_is_antisymmetric_and_stays_a_difference_of_rates() -> None:
    for counts in [(0, 0, 0, 9), (9, 0, 0, 0), (0, 9, 0, 0), (3, 1, 2, 4), (50, 20, 5, 25), (1, 8, 7, 1)]:
        both, a, b, neither = counts
        low, high = reporting.PairedCounts(both, a, b, neither).interval
        swapped = reporting.PairedCounts(both, b, a, neither).interval
        assert (low, high) == pytest.approx((-swapped[1], -swapped[0]))
        assert -1 <= low <= (a - b) / sum(counts) <= high <= 1


def test_paired_interval_is_narrower_when_outcomes_agree() -> None:
    agreeing = reporting.PairedCounts(45, 5, 0, 50).interval
    independent = reporting.PairedCounts(25, 25, 20, 30).interval
    assert agreeing[1] - agreeing[0] < independent[1] - independent[0]


def test_pairs_are_counted_by_start_state_without_invalid_episodes() -> None:
    a = result("a", [True, True, False, False, None, True])
    b = result("b", [True, False, True, False, True, None])
    assert reporting.pair(a, b) == reporting.PairedCounts(1, 1, 1, 1)


def test_arms_with_other_start_states_are_never_compared() -> None:
    a, b, fewer = result("a", [True, True]), result("b", [True, True], hashes="x"), result("c", [True])
    for other in (b, fewer):
        with pytest.raises(DatasetError, match="same states"):
            reporting.pair(a, other)
    assert "NOT the same start states" in reporting.start_state_line([a, b])
    assert "toy: the same start states in all 2 results" in reporting.start_state_line([a, result("d", [False, True])])


# ----- tables


def test_table_shows_counts_interval_and_what_is_missing_or_failed() -> None:
    results = {"a": result("a", [True] * 45 + [False] * 5), "b": {"status": "failed", "error": "no | disk"}}
    rows = reporting.arms_table(results, ["a", "b", "c"]).splitlines()
    assert "45/50 | 90.0 % [78.6, 95.7]" in rows[2]
    assert "failed: no / disk" in rows[3]
    assert "not run" in rows[4]
    assert len({row.count("|") for row in rows}) == 1


def test_comparison_needs_both_arms() -> None:
    results = {"a": result("a", [True] * 6), "b": result("b", [False] * 6)}
    assert "| a - b | 0 | 6 | 0 | 0 | +100.0 %" in reporting.comparison_table(results, [("a", "b"), ("a", "c")])
    assert "No two arms" in reporting.comparison_table(results, [("a", "c")])


def metaworld_results(failures: int, wall_s: float = 60.0) -> dict[str, dict[str, Any]]:
    outcomes = [False] * failures + [True] * (100 - failures)
    return {task: result(task, outcomes, wall_s=wall_s, env=task) for task in five_tasks.TASKS}


def test_metaworld_reports_the_mean_only_of_all_tasks() -> None:
    results = metaworld_results(5)
    report = five_tasks.make_report(results)
    assert "Mean over tasks 95.0 %" in report
    assert "500 episodes" in report
    assert ": reached" in report
    del results["push-v3"]
    report = five_tasks.make_report(results)
    assert "INCOMPLETE: 4 of 5" in report
    assert "Mean over" not in report


def test_metaworld_misses_its_aim_when_one_task_is_low() -> None:
    results = metaworld_results(0)
    results["push-v3"] = result("push-v3", [True] * 74 + [False] * 26, env="push-v3")
    assert "NOT reached" in five_tasks.make_report(results)


def test_metaworld_with_a_long_training_is_not_valid() -> None:
    results = metaworld_results(0)
    assert "Valid: every training" in five_tasks.make_report(results)
    results["push-v3"] = result("push-v3", [True] * 100, wall_s=901, env="push-v3")
    assert "NOT VALID: the training of push-v3" in five_tasks.make_report(results)


def test_history_reports_the_ratio_and_unequal_controls() -> None:
    names = [f"push-v3_{view}_history_seed0" for view in ("hidden", "full")]
    results = {names[0]: result(names[0], [True] * 9 + [False]), names[1]: result(names[1], [True] * 10)}
    report = history.make_report(results, [0])
    assert "push-v3, history, seed 0: 9/10 hidden, 10/10 full, ratio 0.900 (aim 0.90: reached)" in report
    assert "are the same in all arms" in report
    results[names[0]]["training"]["parameters"] = 12
    assert "are NOT the same in all arms" in history.make_report(results, [0])


def test_ablations_compare_each_seed_with_its_own_reference() -> None:
    names = [f"assembly_{arm}_seed{seed}" for arm in ("reference", "fusion-concat") for seed in (0, 1)]
    results = {name: result(name, [True, i % 2 == 0]) for i, name in enumerate(names)}
    report = ablations.make_report(results, [0, 1])
    for seed in (0, 1):
        assert f"| assembly_fusion-concat_seed{seed} - assembly_reference_seed{seed} |" in report
    assert "| assembly_reference | 75.0 % | 2/2, 1/2 |" in report


# ----- jobs


def all_jobs() -> list[Any]:
    return [
        *five_tasks.make_jobs(),
        *history.make_jobs([0, 1]),
        *ablations.make_jobs([0, 1]),
        *ablations.make_pilot_jobs([0]),
    ]


@pytest.mark.parametrize("job", all_jobs(), ids=lambda job: job.name)
def test_settings_of_every_job_fit_its_preset(job: Any) -> None:
    dataset = DatasetSpec({"proprio": ArraySpec((4,)), "object": ArraySpec((14,)), "goal": ArraySpec((3,))}, 4, 0.0125)
    experiment = to_json(with_settings(resolve(job.preset, dataset), job.settings))
    for setting in job.settings:
        path, _, text = setting.partition("=")
        part, field = path.split(".")
        assert str(experiment[part][field]).lower() in (text.lower(), f"{text}.0")
    assert Job.from_json(json.loads(json.dumps(to_plain(job)))) == job


def to_plain(job: Any) -> dict[str, Any]:
    return {**vars(job), "recording": vars(job.recording)}


def test_history_arms_differ_in_history_length_alone() -> None:
    jobs = {job.name: job for job in history.make_jobs([0])}
    ours, twin = (jobs[f"push-v3_hidden_{arm}_seed0"] for arm in ("history", "twin"))
    assert ours.recording == twin.recording
    assert {s.split("=")[0] for s in set(ours.settings) ^ set(twin.settings)} == {"model.history_length"}


def fields(factor: str) -> set[str]:
    return {setting.partition("=")[0] for setting in ablations.FACTORS[factor][ablations.REFERENCE[factor]]}


def test_every_ablation_differs_from_the_reference_in_one_factor() -> None:
    arms = ablations.arms()
    levels = sum(len(choices) for choices in ablations.FACTORS.values())
    assert len(arms) == 1 + levels - len(ablations.FACTORS)
    reference = set(arms.pop("reference"))
    for arm, settings in arms.items():
        changed = {setting.partition("=")[0] for setting in set(settings) - reference}
        factors = [factor for factor in ablations.FACTORS if changed & fields(factor)]
        assert len(factors) == 1, arm
        assert arm.startswith(factors[0])


def test_jobs_are_selected_by_name_and_a_misspelt_one_is_suggested() -> None:
    jobs = five_tasks.make_jobs()
    assert [job.name for job in common.select_jobs(jobs, ["door-open-v3", "push-v3"])] == ["push-v3", "door-open-v3"]
    assert common.select_jobs(jobs, None) == jobs
    with pytest.raises(UnknownNameError, match="push-v3"):
        common.select_jobs(jobs, ["pusch-v3"])


def test_a_name_that_is_no_file_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="a/b"):
        Job("a/b", Recording("metaworld/push-v3"), "metaworld/push-v3")


# ----- queue


def options(out: Path, *arguments: str) -> Any:
    return common.benchmark_parser("", "test").parse_args(["--out", str(out), *arguments])


def store_result(out: Path, job: Any) -> None:
    document = {**result(job.name, [True]), "job": to_plain(job)}
    (out / "results").mkdir(parents=True, exist_ok=True)
    (out / "results" / f"{job.name}.json").write_text(json.dumps(document))


def test_finished_jobs_are_skipped_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = five_tasks.make_jobs()[0]
    store_result(tmp_path, job)
    assert common.run_benchmark(options(tmp_path), [job], lambda results: f"{len(results)} results") == 0
    assert "1 results" in capsys.readouterr().out
    assert (tmp_path / "report.md").read_text() == "1 results\n"


def test_a_result_with_other_settings_is_not_mixed_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = five_tasks.make_jobs()[0]
    store_result(tmp_path, job)
    assert common.run_benchmark(options(tmp_path, "--max-steps", "3"), [job], lambda results: "") == 2
    assert "with other settings; choose another --out" in capsys.readouterr().err


def test_two_queues_never_share_a_folder(tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another queue works"):
            common.run_queue(tmp_path, five_tasks.make_jobs(), 1, 1)


def test_numbers_below_one_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert common.run_benchmark(options(tmp_path, "--parallel", "0"), five_tasks.make_jobs(), lambda results: "") == 2
    assert "--parallel must be at least 1, got 0" in capsys.readouterr().err


def test_shrunk_jobs_record_train_and_evaluate_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = five_tasks.make_jobs()[0]
    given = options(tmp_path, "--max-steps", "3", "--set", "model.width=8", "--episodes", "2", "--demonstrations", "4")
    small = common._shrunk(job, given)
    assert (small.episodes, small.recording.episodes) == (2, 4)
    assert small.settings == ("model.width=8", "training.max_steps=3")


def test_training_time_of_killed_sessions_counts_up_to_their_last_checkpoint() -> None:
    useful = run_job.useful_seconds
    assert useful([], []) == 0
    assert useful([100.0], []) == 0
    assert useful([100.0], [110.0, 130.0]) == 30
    assert useful([100.0, 200.0, 300.0], [110.0, 130.0, 305.0]) == 35


def test_a_training_of_something_else_is_never_continued(tmp_path: Path) -> None:
    job = five_tasks.make_jobs()[0]
    path = tmp_path / "sessions.json"
    assert run_job._sessions(job, path) == []
    path.write_text(json.dumps({"trained": job.training_identity(), "starts": [1.5]}))
    assert run_job._sessions(job, path) == [1.5]
    other = Job(job.name, job.recording, job.environment, ("model.width=8",))
    with pytest.raises(OutputError, match="another training"):
        run_job._sessions(other, path)
