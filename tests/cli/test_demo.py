"""The demo: the whole path with tiny numbers, and folders that are not its own."""

import json
from pathlib import Path

import pytest

from scd_robot.cli.main import main

TINY = ["--demonstrations", "3", "--max-steps", "4", "--episodes", "2"]


@pytest.mark.sim
@pytest.mark.slow
def test_demo_records_trains_evaluates_reports_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), *TINY, "--json", str(tmp_path / "summary.json")]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    result = json.loads(Path(summary["result"]).read_text())
    assert result["episodes"] == 2
    assert result["env"] == "metaworld/push-v3"
    assert "<html" in Path(summary["report"]).read_text()
    assert list((out / "evaluation" / "videos").glob("*.mp4"))
    assert str(out / "evaluation" / "report.html") in capsys.readouterr().out

    # Again: the finished stages are kept, the evaluation gives the same episodes.
    before = [p.stat().st_mtime_ns for p in sorted((out / "run" / "checkpoints").rglob("*"))]
    assert main(["demo", "--out", str(out), *TINY]) == 0
    assert [p.stat().st_mtime_ns for p in sorted((out / "run" / "checkpoints").rglob("*"))] == before
    again = json.loads(Path(summary["result"]).read_text())
    assert again["episodes_detail"] == result["episodes_detail"]

    # Other options never mix with what is there.
    assert main(["demo", "--out", str(out), *TINY, "--seed", "1"]) == 2
    assert "seed 0 there, 1 here" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_demo_leaves_a_folder_of_somebody_else_alone(tmp_path: Path, options: list[str], capsys) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path), *options]) == 2
    assert "holds no demo" in capsys.readouterr().err
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
