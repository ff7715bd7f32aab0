"""The benchmark of plans that take long: its jobs, and its report."""

from typing import Any

import pytest
from benchmark_jobs import load, result

from scd_robot.control.delay import split_chunk
from scd_robot.errors import ConfigError
from scd_robot.presets import resolve, with_settings
from scd_robot.sim_eval import make_environment
from scd_robot.types import DatasetSpec

delay = load("delay")


@pytest.mark.sim
def test_every_training_fits_its_task_and_the_longest_delay() -> None:
    for job in delay.make_jobs():
        spec = make_environment(job.environment).spec
        dataset = DatasetSpec(dict(spec.observation), spec.action_dim, spec.control_dt)
        experiment = with_settings(resolve(job.preset, dataset), job.settings)
        steps = round(1e-3 * delay.DELAYS_MS[-1] / spec.control_dt)
        split = split_chunk(experiment.model.chunk_length, experiment.policy.num_executed, steps)
        assert split.fits
        assert split.num_executed == experiment.model.max_delay_steps == steps


def cell(name: str, successes: int) -> dict[str, Any]:
    made = result(name, [i < successes for i in range(20)])
    for episode in made["evaluation"]["episodes_detail"]:
        episode["jerk"] = 2.0 if episode["success"] else 4.0
    return made


def test_the_report_compares_each_arm_with_itself_without_delay(tmp_path) -> None:
    from scd_robot.output import write_json

    for arm, ms, successes in (("trained", 0, 20), ("trained", 200, 19), ("naive", 0, 20), ("naive", 200, 10)):
        write_json(delay._cell_path(tmp_path, "push-v3", arm, ms), cell(f"{arm}_{ms}", successes))
    corrections = [{"episodes": 200, "steps": 12345, "successes": 42}]
    about = {"corrections": corrections, "num_denoising_steps": 2}
    write_json(delay._cell_path(tmp_path, "tray-balance", "naive", 0), cell("n", 3) | about)
    report = delay.make_report(tmp_path, {})
    push = report.split("### push-v3")[1]
    rows = [line for line in push.splitlines() if line.startswith("| trained")]
    assert "| 20/20, 100.0 % [83.9, 100.0] | - | - | - | 19/20, 95.0 % [76.4, 99.1] |" in rows[0]
    assert rows[1] == "| trained | 2.0 | - | - | - | 2.1 |"
    assert rows[2].startswith("| trained |  | - | - | - | -5.0 [")
    assert "trained, 200 ms: -5.0" in push
    assert "aim at most -5: reached" in push
    assert "| naive |  | - | - | - | -50.0 [" in push
    assert "Denoising steps: 2" in report.split("### tray-balance")[1].split("###")[0]
    corrected = "Corrections, round 1: 200 attempts of the policy, 12345 control steps, 42 successes"
    assert corrected in report.split("### tray-balance")[1].split("###")[0]
    assert "not measured yet" in report.split("### moving-target")[1].split("###")[0]


@pytest.mark.parametrize("other", [{"corrections": []}, {"num_denoising_steps": 8}])
def test_cells_of_another_policy_are_not_continued(tmp_path, other) -> None:
    from scd_robot.output import write_json

    about = {"corrections": [{}, {}], "num_denoising_steps": 2}
    path = delay._cell_path(tmp_path, "tray-balance", "naive", 0)
    assert delay._known_episodes(path, about) == []
    write_json(path, cell("naive", 3) | about)
    assert len(delay._known_episodes(path, about)) == 20
    with pytest.raises(ConfigError, match=f"of other {next(iter(other))}; choose another --out"):
        delay._known_episodes(path, about | other)


@pytest.mark.slow
@pytest.mark.sim
def test_a_policy_is_corrected_and_then_measured(monkeypatch, tmp_path, capsys) -> None:
    short = ["training.warmup_steps=1", "training.validate_every=3", "training.max_steps=3"]
    monkeypatch.setattr(delay, "ATTEMPTS", 2)
    monkeypatch.setattr(delay, "CORRECTING", short)
    options = (
        "--only tray-balance --arms trained --delays 0 --cell-episodes 1 --episodes 1 --demonstrations 4 --rounds 1"
    )
    arguments = ["delay.py", "--out", str(tmp_path), *options.split(), "--parallel", "1", "--set", *short]
    monkeypatch.setattr("sys.argv", arguments)
    assert delay.main() == 0
    assert "Corrections, round 1: 2 attempts of the policy" in capsys.readouterr().out
    assert (tmp_path / "corrections" / "tray-balance_1" / "run" / "checkpoints" / "step_00000003").is_dir()
    assert delay.main() == 0  # nothing is done twice
    assert "training" not in capsys.readouterr().err
