"""`scd replay-log`: what a flight record says, as text and as a page."""

import json
import re

import numpy as np
import pytest

from scd_robot.cli.main import main
from scd_robot.control import Limits, LoopConfig, RecorderConfig, WatchdogConfig
from scd_robot.control.rehearsal import Incident, rehearse


@pytest.fixture
def record(tmp_path):
    config = LoopConfig(recorder=RecorderConfig(tmp_path / "records", least_apart_s=1.0))
    script = [Incident("drop", 20, 10), Incident("plan_crash", 50, 10)]
    rehearse(script, config, Limits.of_box((-1.0, -1.0), (1.0, 1.0)), steps=80)
    return tmp_path / "records"


def test_it_tells_the_faults_of_the_last_record(record, capsys):
    assert main(["replay-log", str(record)]) == 0
    told = capsys.readouterr().out
    assert "stale_observation 1" in told
    assert "plan_error: RuntimeError: CUDA error" in told
    assert "running" in told


def test_plans_that_were_too_old_are_told(tmp_path, capsys):
    watchdog = WatchdogConfig(max_plan_age_s=0.4)
    config = LoopConfig(watchdog=watchdog, recorder=RecorderConfig(tmp_path / "records", least_apart_s=1.0))
    limits = Limits.of_box((-1.0, -1.0), (1.0, 1.0))
    rehearse([Incident("slow_plan", 30, 5)], config, limits, plan_steps=0.5, steps=80)
    assert main(["replay-log", str(tmp_path / "records")]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^plans: .*stale 1", told, re.MULTILINE)
    assert "stale_plan: of an observation 0.500 s ago" in told


def test_the_page_shows_commands_and_events(record, tmp_path, capsys):
    assert main(["replay-log", str(record), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 4
    assert "the newest good observation is too old" in page


def test_the_document_is_json(record, capsys):
    assert main(["replay-log", str(record), "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {event["kind"] for event in document["events"] if event["fault"]} >= {"stale_observation", "plan_error"}


def test_what_is_no_record_is_refused(record, tmp_path, refused):
    refused(["replay-log", tmp_path / "nothing"], "holds no flight record")
    newest = sorted(record.iterdir())[-1]
    (newest / "steps.npz").write_bytes(b"PK\x03\x04 cut short")
    refused(["replay-log", newest], "damaged")
    document = json.loads((newest / "record.json").read_text())
    (newest / "record.json").write_text(json.dumps({**document, "schema": 99}))
    np.savez(newest / "steps.npz", step=np.zeros(1))
    refused(["replay-log", newest], "schema 99")


@pytest.mark.parametrize(
    ("document", "arrays", "told"),
    [
        ([], {}, "has schema None"),
        (None, {}, "has schema None"),
        ({"schema": 1}, {}, "it lacks 'steps', 'state'"),
        ({"events": None}, {}, "it lacks 'events'"),
        ({}, {"late_ms": None}, "it lacks the array 'late_ms'"),
        ({}, {"late_ms": np.zeros(3)}, "its arrays have [3, "),
    ],
)
def test_a_record_that_lacks_something_is_refused(record, refused, document, arrays, told):
    """None takes a part away; what else is given replaces it."""
    newest = sorted(record.iterdir())[-1]
    whole = json.loads((newest / "record.json").read_text())
    changed = document
    if isinstance(document, dict) and "schema" not in document:
        changed = {name: value for name, value in (whole | document).items() if value is not None}
    (newest / "record.json").write_text(json.dumps(changed))
    with np.load(newest / "steps.npz") as stored:
        named = {name: value for name, value in (dict(stored) | arrays).items() if value is not None}
    np.savez(newest / "steps.npz", **named)
    refused(["replay-log", newest], told)
