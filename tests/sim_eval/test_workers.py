import functools
import multiprocessing
import os
import signal
import sys

import numpy as np
import pytest

from scd_robot.errors import ConfigError, MissingDependencyError, RenderError, SimulatorError, UnknownNameError
from scd_robot.sim_eval import serving
from scd_robot.sim_eval.registry import make_environment
from scd_robot.sim_eval.workers import (
    EnvironmentWorker,
    WorkerCrashError,
    close_workers,
    load_environment,
    start_workers,
    usable_cores,
)
from scd_robot.types import ArraySpec

POINT = "toy_environment:make_point"


def test_worker_answers_as_the_environment_itself_would(toy):
    local = toy.make_point()
    with EnvironmentWorker(POINT) as worker:
        assert worker.spec == local.spec
        for key, value in worker.call("reset", 5).items():
            np.testing.assert_array_equal(value, local.reset(5)[key])
        assert worker.call("state_hash") == local.state_hash()
        action = np.array([3.0, 0.5], np.float32)
        theirs, ours = worker.call("step", action), local.step(action)
        np.testing.assert_array_equal(theirs.executed_action, [1.0, 0.5])
        np.testing.assert_array_equal(theirs.observation["position"], ours.observation["position"])
        np.testing.assert_array_equal(worker.call("render", 32, 48), local.render(32, 48))


def test_environments_of_a_worker_are_separate(toy):
    local = [toy.make_point() for _ in range(3)]
    actions = np.array([[0.1, 0.2], [-0.3, 2.0]], np.float32)
    with EnvironmentWorker(POINT, 3) as worker:
        _ = worker.spec
        for slot, environment in enumerate(local):
            observation, digest, hand = worker.call("begin", 5 + slot, slot=slot)
            assert hand is None
            np.testing.assert_array_equal(observation["goal"], environment.reset(5 + slot)["goal"])
            assert digest == environment.state_hash()
        worker.send_steps([2, 0], actions)
        steps = worker.receive_steps()
        for i, slot in enumerate([2, 0]):
            expected = local[slot].step(actions[i])
            np.testing.assert_array_equal(steps.observation["position"][i], expected.observation["position"])
            np.testing.assert_array_equal(steps.executed_action[i], expected.executed_action)
        assert [worker.call("state_hash", slot=slot) for slot in range(3)] == [one.state_hash() for one in local]


@pytest.mark.parametrize("fault", ["raise", "die", "hang"])
def test_crash_tells_which_environment_was_at_work(toy, fault):
    source = functools.partial(toy.PointEnvironment, faults={5: fault})
    with EnvironmentWorker(source, 3) as worker:
        _ = worker.spec
        for slot, seed in enumerate((4, 5, 6)):
            worker.call("begin", seed, slot=slot)
        for _ in range(toy.FAULT_STEP):
            worker.send_steps([0, 1, 2], np.zeros((3, 2), np.float32))
            worker.receive_steps()
        worker._timeout_s = 2.0 if fault == "hang" else 60.0  # for each of the three
        worker.send_steps([0, 1, 2], np.zeros((3, 2), np.float32))
        with pytest.raises(WorkerCrashError) as crash:
            worker.receive_steps()
        assert crash.value.slot == 1


@pytest.mark.parametrize(("count", "processes", "slots"), [(5, 2, [3, 2]), (3, None, [1, 1, 1]), (4, 4, [1, 1, 1, 1])])
def test_environments_are_divided_among_processes(toy, count, processes, slots):
    workers = start_workers(POINT, count, processes=processes)
    close_workers(workers)
    assert [worker.count for worker in workers] == slots


def test_a_worker_for_every_core_stays_there(toy):
    cores = usable_cores()
    workers = start_workers(POINT, len(cores), processes=len(cores))
    places = [os.sched_getaffinity(worker._process.pid) for worker in workers]
    close_workers(workers)
    assert places == [{core} for core in cores]
    workers = start_workers(POINT, len(cores) + 1, processes=len(cores) + 1)
    places = [os.sched_getaffinity(worker._process.pid) for worker in workers]
    close_workers(workers)
    assert places == [set(cores)] * (len(cores) + 1)


def test_numerical_libraries_get_one_thread_in_the_worker_only(toy, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with EnvironmentWorker("toy_environment:make_telling_threads") as worker:
        assert worker.spec.success == "1 1 1"
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(
    ("fault", "message"),
    [("raise", "ValueError at toy_environment.py:.*contact solver"), ("die", "exit code 3"), ("hang", "within 1 s")],
)
def test_faults_are_crashes_and_a_restart_mends_them(toy, fault, message):
    source = functools.partial(toy.PointEnvironment, faults={5: fault})
    action = np.zeros(2, np.float32)
    with EnvironmentWorker(source) as worker:
        _ = worker.spec
        worker.call("reset", 5)
        for _ in range(toy.FAULT_STEP):
            worker.call("step", action)
        worker._timeout_s = 1.0 if fault == "hang" else 60.0
        with pytest.raises(WorkerCrashError, match=message):
            worker.call("step", action)
        worker._timeout_s = 60.0
        worker.restart()
        worker.call("reset", 6)
        for _ in range(toy.FAULT_STEP + 1):
            worker.call("step", action)


@pytest.mark.parametrize("error", [OSError("no process to be had"), ConfigError("cannot start python")])
def test_a_worker_that_cannot_be_restarted_is_closed(toy, monkeypatch, error):
    with EnvironmentWorker(POINT) as worker:
        _ = worker.spec

        def refuse():
            raise error

        monkeypatch.setattr(worker, "_start_process", refuse)
        with pytest.raises(SimulatorError, match=f"did not start again in 3 attempts: {error}"):
            worker.restart()
        assert worker.closed
        worker.close()
    assert multiprocessing.active_children() == []


def test_no_process_is_left_behind(toy):
    before = multiprocessing.active_children()
    workers = start_workers(POINT, 2)
    assert len(multiprocessing.active_children()) == len(before) + 2
    for worker in workers:
        worker.close()
        worker.close()
    assert multiprocessing.active_children() == before
    with pytest.raises(SimulatorError):
        start_workers("toy_environment:make_broken", 2)
    assert multiprocessing.active_children() == before


def test_worker_ignores_ctrl_c(toy):
    with EnvironmentWorker(POINT) as worker:
        _ = worker.spec
        child = next(p for p in multiprocessing.active_children())
        os.kill(child.pid, signal.SIGINT)
        assert len(worker.call("reset", 1)) == 2


def test_worker_exits_silently(toy, capfd):
    with EnvironmentWorker(POINT) as worker:
        _ = worker.spec
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("toy_environment:make_without_simulator", MissingDependencyError, 'pip install "scd_robot'),
        ("toy_environment:make_pint", UnknownNameError, "did you mean 'make_point'"),
        ("toy_environment:make_broken", SimulatorError, "ZeroDivisionError.*bad asset"),
        ("no_such_module:make", ConfigError, "No module named 'no_such_module'.*PYTHONPATH"),
        ("nosuch/task", UnknownNameError, "nosuch/task.*your own is named module:callable"),
    ],
)
def test_environment_that_cannot_be_made_says_why(toy, source, kind, message):
    with EnvironmentWorker(source) as worker, pytest.raises(kind, match=message):
        _ = worker.spec


def test_environment_that_hangs_at_the_start_is_given_up(toy):
    source = "toy_environment:make_hanging_at_start"
    with (
        EnvironmentWorker(source, startup_timeout_s=2.0) as worker,
        pytest.raises(SimulatorError, match="not answer within 2 s"),
    ):
        _ = worker.spec


def test_callable_that_cannot_travel_is_refused(toy):
    with pytest.raises(ConfigError, match="picklable"):
        EnvironmentWorker(lambda: toy.make_point())


def test_environment_is_made_from_a_name_or_a_callable(toy):
    assert load_environment(POINT).spec.name == "toy/point"
    assert load_environment(toy.make_point).spec.name == "toy/point"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with an environment of the user's own, current here and, as for the program `scd`, not on sys.path."""
    (tmp_path / "own_env.py").write_text("from toy_environment import PointEnvironment as make\n")
    (tmp_path / "own_broken.py").write_text("import no_such_simulator\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", ".")])
    for name in ("own_env", "own_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_an_environment_of_ones_own_is_found_in_the_current_folder(toy, own):
    assert make_environment("own_env:make").spec.name == "toy/point"
    with EnvironmentWorker("own_env:make") as worker:
        assert worker.spec.name == "toy/point"
    assert sys.path[-1] == str(own)  # behind what is installed


def test_what_is_no_environment_is_refused_with_what_it_lacks(toy, own):
    (own / "own_gym.py").write_text(
        "import types\n"
        "class Gym:\n"
        "    spec = types.SimpleNamespace(id='Gym-v0')\n"  # as gymnasium's have
        "    def reset(self, *, seed=None): ...\n"
        "    def step(self, action): ...\n"
        "    def close(self): ...\n"
        "def sized(size): return Gym()\n"
        "number = 3\n"
    )
    for name, told in (
        ("Gym", r"made a Gym, .*lacks spec \(an EnvironmentSpec\), state_hash\. .*scd_robot\.types\.Environment"),
        ("sized", "cannot be called without options: missing a required argument: 'size'"),
        ("number", "must be a callable or a class, got int"),
    ):
        with pytest.raises(ConfigError, match=told):
            make_environment(f"own_gym:{name}")


def test_what_an_environment_of_ones_own_gets_wrong_is_named(toy, own):
    (own / "own_wrong.py").write_text(
        "import dataclasses\n"
        "import numpy as np\n"
        "from toy_environment import PointEnvironment\n"
        "class Wrong(PointEnvironment):\n"
        "    def state_hash(self): return b'ab'\n"
        "    def render(self, height, width): return np.zeros((height, width, 3))\n"
        "class Wide(PointEnvironment):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.spec = dataclasses.replace(self.spec, action_dim=3)\n"
        "class Spaces(PointEnvironment):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.spec = dataclasses.replace(self.spec, observation={'position': (2,)})\n"
    )
    with EnvironmentWorker("own_wrong:Wrong") as worker:
        _ = worker.spec
        with pytest.raises(ConfigError, match="hexadecimal digits as a str, got bytes"):
            worker.call("begin", 1)
        with pytest.raises(RenderError, match=r"uint8 \(32, 48, 3\), got float64 \(32, 48, 3\)"):
            worker.call("render", 32, 48)
    with pytest.raises(ConfigError, match="must have action_dim = 3 numbers each, got 2 and 2"):
        make_environment("own_wrong:Wide")
    with pytest.raises(ConfigError, match=r"must be a dictionary of ArraySpec by key, got {'position'"):
        make_environment("own_wrong:Spaces")


def test_an_environment_of_ones_own_that_cannot_be_imported_says_what_to_do(toy, own):
    with pytest.raises(ConfigError, match=rf"no_such.*in {own}; start this where no_such lies, .*PYTHONPATH"):
        make_environment("no_such.module:make")
    with pytest.raises(ModuleNotFoundError, match="no_such_simulator"):  # its own affair, with its own traceback
        make_environment("own_broken:make")
    with pytest.raises(ConfigError, match=r"OPTION=WORD, .*got 'image'"):  # of ours, not a module called pusht
        make_environment("pusht:image")


def test_an_environment_that_is_made_already_is_refused_with_what_to_give(toy):
    with pytest.raises(ConfigError, match=r"PointEnvironment: give the class, or a function"):
        load_environment(toy.make_point())


def test_an_environment_without_pictures_is_told_what_it_lacks(toy, monkeypatch):
    monkeypatch.delattr(toy.PointEnvironment, "render")
    with pytest.raises(RenderError, match=r"has no render\(height, width\)"):
        serving._frame(toy.make_point(), 8, 8)


@pytest.mark.parametrize("shape", [7, [7], "7"])
def test_the_shape_of_an_array_is_a_tuple(shape):
    with pytest.raises(ConfigError, match="is a tuple such as"):
        ArraySpec(shape)
