"""The fault campaign: done in pieces, never twice, and never mixed with one of other settings."""

import json
import logging
import sys

import pytest
from benchmark_jobs import load

faults = load("faults")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """`run(*options)`: exit code of the program, in one folder."""

    def begin(*options):
        monkeypatch.setattr(sys, "argv", ["faults.py", "--out", str(tmp_path / "out"), *options])
        try:
            return faults.main()
        finally:
            logging.disable(logging.NOTSET)

    monkeypatch.setattr(faults, "PIECE", 2)
    return begin


def test_it_goes_on_where_it_was_ended(run, tmp_path, capsys):
    assert run("--only", "schedules", "--schedules", "4", "--minutes", "0") == 0
    assert "nothing is done yet" in capsys.readouterr().out
    assert run("--only", "schedules", "--schedules", "4") == 0
    files = sorted((tmp_path / "out" / "results").iterdir())
    assert [file.name for file in files] == ["schedules_000000_2.json", "schedules_000002_2.json"]
    written = [file.stat().st_mtime_ns for file in files]
    totals = json.loads(files[1].read_text())["totals"]
    assert totals["schedules"] == 2
    assert totals["behind_a_server"] == 1
    files[0].unlink()
    assert run("--only", "schedules", "--schedules", "4") == 0
    assert files[0].is_file()
    assert files[1].stat().st_mtime_ns == written[1]
    assert "| schedules | 4 |" in (tmp_path / "out" / "report.md").read_text()
    assert run("--only", "schedules", "--schedules", "4", "--seed", "1") == 2
    assert "is of other settings; choose another --out" in capsys.readouterr().err


def test_what_is_not_as_it_should_be_is_told_and_is_no_success(run, tmp_path, monkeypatch, capsys):
    rehearse = faults.fault_schedules.rehearse

    def unsafe(*arguments, **options):
        done = rehearse(*arguments, **options)
        done.violations.append("command 3, dimension 0: 7 is not within its bounds")
        return done

    monkeypatch.setattr(faults.fault_schedules, "rehearse", unsafe)
    assert run("--only", "schedules", "--schedules", "2") == 1
    out = capsys.readouterr().out
    assert "| unsafe | 2 |" in out
    assert out.count("dimension 0: 7 is not within its bounds") == 2
    assert run("--report", "--only", "schedules", "--schedules", "2") == 1, "nor later"
