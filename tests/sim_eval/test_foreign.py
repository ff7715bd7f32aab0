"""Environments under another Python behave as under this one, and their processes never stay behind."""

import os
import sys
import time

import numpy as np
import pytest

from scd_robot import __version__
from scd_robot.errors import ConfigError, SimulatorError, UnknownNameError
from scd_robot.sim_eval.rollout import evaluate
from scd_robot.sim_eval.workers import EnvironmentWorker, WorkerCrashError, start_workers

NAME = "scd_memory/cue-reach:delay=3"


class Down:
    """Goes straight down, and fails."""

    def reset(self, rows=None, episodes=None):
        pass

    def act(self, observation):
        return np.tile(np.array([0, 0, -1], np.float32), (len(observation["cue"]), 1))


def test_episodes_are_the_same():
    results = [
        evaluate(Down(), NAME, 4, num_envs=2, max_steps=20, python=python, progress=False)
        for python in (None, sys.executable)
    ]
    assert results[0].episodes_detail == results[1].episodes_detail
    assert results[0].environment == results[1].environment
    assert results[1].versions["simulator/mujoco"] == results[0].versions["mujoco"]
    assert not any(name.startswith("simulator/") for name in results[0].versions)


def test_a_dead_one_is_replaced():
    with EnvironmentWorker(NAME, python=sys.executable) as worker:
        assert worker.spec.name == NAME
        first = worker.call("reset", 3)
        worker._process.kill()
        with pytest.raises(WorkerCrashError, match="process died"):
            worker.call("step", np.zeros(3, np.float32))
        worker.restart()
        np.testing.assert_array_equal(worker.call("reset", 3)["cue"], first["cue"])
        process = worker._process
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not process.is_alive()


def test_a_relative_path_is_of_the_present_folder_whose_modules_do_not_count(tmp_path, monkeypatch):
    (tmp_path / "scd_robot.py").write_text("raise RuntimeError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    with EnvironmentWorker(NAME, python=os.path.relpath(sys.executable)) as worker:
        assert worker.spec.name == NAME


def test_errors_of_the_user_travel():
    with pytest.raises(UnknownNameError, match="did you mean 'scd_memory/cue-reach'"):
        start_workers("scd_memory/cue-rech", 1, python=sys.executable)


def test_a_python_without_the_package(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\nexec {sys.executable} -S -E -c 'raise SystemExit(1)'\n")
    bare.chmod(0o755)
    with pytest.raises(SimulatorError, match=r"is scd_robot installed for .*python\?"):
        start_workers(NAME, 1, python=str(bare))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("sys.version_info = (3, 10, 2)", r"it is Python 3\.10; .*needs Python 3\.11 or later"),
        ("import scd_robot; scd_robot.__version__ = '0.0.7'", rf"it has scd_robot 0\.0\.7; .*scd_robot {__version__}:"),
        ("sys.modules['scd_robot'] = None", r"it has no scd_robot that works \(import of scd_robot halted"),
    ],
)
def test_a_python_that_does_not_fit_is_told(tmp_path, change, told):
    other = tmp_path / "python"
    code = f"import sys; {change}; sys.argv = sys.argv[1:]; exec(sys.argv.pop(1))"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} -P -c "{code}" "$@"\n')
    other.chmod(0o755)
    with pytest.raises(ConfigError, match=f"{other} cannot run simulators.*{told}"):
        start_workers(NAME, 1, python=str(other))


@pytest.mark.parametrize(
    ("source", "python", "message"),
    [
        (NAME, "/no/such/python", "cannot start /no/such/python"),
        (Down, sys.executable, "another python needs the environment's name"),
    ],
)
def test_what_cannot_be_started(source, python, message):
    with pytest.raises(ConfigError, match=message):
        EnvironmentWorker(source, python=python)
