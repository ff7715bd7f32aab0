"""`scd sweep`: what counts as done, and what a pair that fails leaves of the others."""

import json

import pytest

from scd_robot.cli import evaluate
from scd_robot.cli.main import main
from scd_robot.sim_eval import video


@pytest.fixture
def arguments(tiny_run, point, tmp_path):
    return ["sweep", str(tiny_run), "--env", point, "--episodes", "2", "--out", str(tmp_path / "out")]


def test_an_evaluation_that_was_killed_amid_its_videos_is_done_again(arguments, tmp_path, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(video, "record_videos", kill)
        assert main([*arguments, "--num-videos", "1"]) == 130
    [file] = (tmp_path / "out").glob("**/result.json")
    assert not file.with_name("report.html").exists()
    assert main([*arguments, "--num-videos", "1"]) == 0
    assert file.with_name("report.html").is_file()
    assert json.loads(file.read_text())["videos"]
    written = file.stat().st_mtime_ns
    assert main(arguments) == 0
    assert file.stat().st_mtime_ns == written


def test_an_evaluation_without_a_valid_episode_failed_and_is_done_again(arguments, tmp_path, monkeypatch, capsys):
    arguments[arguments.index("--env") + 1] = "toy_environment:make_crashing_while_told"
    monkeypatch.setenv("TOY_CRASHES", "1")
    assert main(arguments) == 2
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "no valid episode, the first ended with: " in out
    assert "contact solver diverged" in out
    table = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert (table["evaluations"], len(table["failed"])) == ([], 1)
    monkeypatch.delenv("TOY_CRASHES")
    assert main(arguments) == 0
    table = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert ([row["valid"] for row in table["evaluations"]], table["failed"]) == ([2], [])


def test_what_was_killed_is_not_replaced_by_another_evaluation(arguments, tmp_path, refused):
    assert main(arguments) == 0
    next((tmp_path / "out").glob("**/report.html")).unlink()
    refused([*arguments, "--first-episode", "1"], "holds another evaluation", unchanged=[tmp_path])


@pytest.mark.parametrize(("first", "then"), [([], ["--reproducible"]), (["--reproducible"], [])])
def test_reproducible_evaluations_are_others(arguments, tmp_path, refused, first, then):
    assert main([*arguments, *first]) == 0
    told = "without --reproducible" if then else "with --reproducible"
    refused([*arguments, *then], f"holds another evaluation ({told})", unchanged=[tmp_path])
    assert main([*arguments, *first]) == 0


def test_memory_that_is_used_up_fails_one_pair(arguments, tmp_path, monkeypatch, capsys, caplog):
    make = evaluate.make_policy

    def make_policy(checkpoint, device, seed, **options):
        if seed == 0:
            raise RuntimeError("CUDA out of memory\nand a long explanation")
        return make(checkpoint, device, seed=seed, **options)

    monkeypatch.setattr(evaluate, "make_policy", make_policy)
    assert main([*arguments, "--seeds", "0", "1"]) == 2
    table = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["seed"] for row in table["evaluations"]] == [1]
    assert [one["error"] for one in table["failed"]] == ["RuntimeError: CUDA out of memory"]
    assert "FAILED" in capsys.readouterr().out
    [log] = [record for record in caplog.records if record.exc_info]  # where it came from is told
    assert "make_policy" in log.exc_text


def test_simulators_of_another_environment_are_used_as_in_an_evaluation(arguments, monkeypatch, capsys):
    from scd_robot.sim_eval import jobs

    asked, run = [], jobs.run_jobs

    def noted(*positional, python, **options):
        asked.append(python)
        return run(*positional, **options)

    monkeypatch.setattr(jobs, "run_jobs", noted)
    assert main([*arguments, "--env-python", "elsewhere/bin/python"]) == 0
    assert asked == ["elsewhere/bin/python"]
    assert main(["sweep", "--help"]) == 0
    assert "POLICY [POLICY ...]" in capsys.readouterr().out
