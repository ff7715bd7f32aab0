"""The benchmark of evaluation beside bare stepping: what it measures, and that it measures what is documented."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from benchmark_jobs import FOLDER, load

from scd_robot.sim_eval.memory import TASKS

sim = load("sim")
RESULTS = (FOLDER.parent / "docs" / "results.md").read_text()


def test_the_command_in_the_docs_prints_the_table_in_the_docs() -> None:
    section = re.search(r"\n## What an evaluation costs beside the simulator\n(.*?)\n## ", RESULTS, re.DOTALL)
    assert section is not None
    assert section[1].lstrip().startswith("`python benchmarks/sim.py`:")
    table = section[1].split("`python benchmarks/sim.py --native")[0]
    assert re.findall(r"^\| (\S+/?\S*) \| [\d,]+/s", table, re.MULTILINE) == list(sim.ENVIRONMENTS)


def test_a_policy_counts_the_seconds_of_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=0.25)
    monkeypatch.setattr(sim.time, "perf_counter", lambda: next(clock))
    actions = np.arange(20, dtype=np.float32).reshape(10, 2)
    policy = sim.RandomActions(actions)
    for _ in range(4):
        assert policy.act({"x": np.zeros((3, 5))}).shape == (3, 2)
    assert policy.seconds == 4 * 0.25


def test_the_rate_is_without_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(policy: sim.RandomActions, *_: object, **__: object) -> SimpleNamespace:
        policy.seconds = 0.5
        return SimpleNamespace(wall_s=2.5, episodes_detail=[SimpleNamespace(steps=60), SimpleNamespace(steps=40)])

    monkeypatch.setattr(sim, "evaluate", evaluate)
    assert sim.evaluation_rate("scd_memory/cue-reach", 1, 2, 10) == pytest.approx((100 / 2.0, 1e6 * 0.5 / 100))


def test_both_arms_run_and_are_told_apart(tmp_path: Path) -> None:
    name, out = "scd_memory/cue-reach", tmp_path / "sim.json"
    options = ["--env", name, "--workers", "1", "--num-envs", "2", "--steps", "20", "--rounds", "2", "--out", str(out)]
    done = subprocess.run([sys.executable, FOLDER / "sim.py", *options], capture_output=True, text=True, check=True)
    assert f"\n| {name} | " in done.stdout
    found = json.loads(out.read_text())[name]
    assert set(found) == {"bare", "evaluation", "policy_us", "ratio"}
    assert min(found["bare"], found["evaluation"], found["policy_us"], *found["ratio"]) > 0
    assert len(found["ratio"]) == 2


def test_native_stepping_is_measured_in_all_tasks_of_the_suite() -> None:
    found = sim.native_stepping(1)
    assert set(found) == set(TASKS) >= {"cue-reach", "moving-target", "tray-balance"}
    assert all(value > 0 for arms in found.values() for value in arms.values())
