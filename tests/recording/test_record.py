import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from scd_robot.datasets import POSITION
from scd_robot.datasets.convert import episode_success
from scd_robot.datasets.open import open_dataset
from scd_robot.errors import ConfigError, DatasetError, OutputError, SimulatorError, UnknownNameError
from scd_robot.recording import record_demonstrations
from scd_robot.recording import workers as workers_module
from scd_robot.recording.attempt import Attempt, RecordingConfig, run_attempt
from scd_robot.recording.workers import _in_order, run_attempts
from scd_robot.seeding import EVALUATION, RECORDING, derive_seed
from scd_robot.sim_eval.registry import make_environment
from scd_robot.types import ArraySpec, EnvironmentSpec, StepResult

ENV = "metaworld/reach-v3"


class ToyEnvironment:
    """Success at step 3 where the seed is even; seeds divisible by 3 crash."""

    spec = EnvironmentSpec("toy", {"x": ArraySpec((1,))}, 1, (-1.0,), (1.0,), 0.1, max_steps=6, success="three steps")

    def reset(self, seed):
        self.seed, self.steps = seed, 0
        return {"x": np.zeros(1, np.float32)}

    def step(self, action):
        if self.seed % 3 == 0:
            raise SimulatorError("it crashed")
        self.steps += 1
        return StepResult(
            {"x": np.full(1, self.steps, np.float32)},
            reward=0.0,
            success=self.steps == 3 and self.seed % 2 == 0,
            terminated=False,
            truncated=self.steps == self.spec.max_steps,
            executed_action=np.clip(action, -1, 1),
        )

    def expert_action(self):
        return np.asarray([0.9], np.float32)

    def close(self):
        pass


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr("scd_robot.recording.record.make_environment", lambda name: ToyEnvironment())


def test_an_environment_with_gymnasiums_interface_is_told_what_is_wanted(monkeypatch, tmp_path):
    class Gym(ToyEnvironment):
        def reset(self, seed):
            return super().reset(seed), {}

    monkeypatch.setattr("scd_robot.recording.record.make_environment", lambda name: Gym())
    with pytest.raises(ConfigError, match="a dictionary of arrays, got tuple"):
        record_demonstrations("toy", 1, tmp_path / "a.zarr", progress=False)


def files(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def start_seeds(count):
    return [derive_seed(RECORDING, 0, index) for index in range(count)]


def test_demonstrations_are_the_first_successes_and_failures_are_counted(toy, tmp_path, caplog):
    summary = record_demonstrations("toy", 4, tmp_path / "a.zarr", progress=False, workers=1)
    seeds = start_seeds(100)
    good = [index for index, seed in enumerate(seeds) if seed % 2 == 0 and seed % 3 != 0][:4]
    crashed = [index for index in range(good[-1]) if seeds[index] % 3 == 0]
    assert crashed, "the seeds no longer cover a crash"
    assert caplog.text.count("it crashed") == len(crashed)
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["attempts"], summary["failures"]) == (good[-1] + 1, good[-1] - 3)
    dataset = open_dataset(tmp_path / "a.zarr")
    assert dataset.episode_info["attempt"].tolist() == good
    assert episode_success(dataset).all()  # so that `scd data filter --success` keeps them
    assert dataset.episode_info["seed"].tolist() == [seeds[index] for index in good]
    assert (dataset.metadata["attempts"], dataset.metadata["failures"]) == (summary["attempts"], summary["failures"])


class Unled(ToyEnvironment):
    def expert_action(self):
        raise ConfigError("toy has no scripted expert")


class Bare(ToyEnvironment):
    expert_action = None


@pytest.mark.parametrize("kind", [Unled, Bare])
def test_without_an_expert_nothing_is_tried(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("scd_robot.recording.record.make_environment", lambda name: kind())
    with pytest.raises(ConfigError, match="toy has no scripted expert"):
        record_demonstrations("toy", 4, tmp_path / "a.zarr", progress=False)
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize(("steps_after_success", "length"), [(0, 3), (2, 5), (10, 6)])
def test_episode_ends_some_steps_after_success_or_with_the_environment(steps_after_success, length):
    config = RecordingConfig("toy", steps_after_success=steps_after_success)
    index = next(i for i, seed in enumerate(start_seeds(100)) if seed % 2 == 0 and seed % 3 != 0)
    episode = run_attempt(ToyEnvironment(), config, index).episode
    assert episode["x"][:, 0].tolist() == list(range(length))  # what was seen before each action


def test_labels_are_clean_and_executed_actions_are_noisy_and_clipped():
    index = next(i for i, seed in enumerate(start_seeds(100)) if seed % 2 == 0 and seed % 3 != 0)
    clean = run_attempt(ToyEnvironment(), RecordingConfig("toy"), index).episode
    noisy = run_attempt(ToyEnvironment(), RecordingConfig("toy", action_noise=0.5), index).episode
    np.testing.assert_array_equal(clean["executed_action"], clean["action"])
    np.testing.assert_array_equal(noisy["action"], clean["action"])
    assert np.ptp(noisy["executed_action"]) > 0.01
    assert noisy["executed_action"].max() <= 1
    again = run_attempt(ToyEnvironment(), RecordingConfig("toy", action_noise=0.5), index).episode
    np.testing.assert_array_equal(noisy["executed_action"], again["executed_action"])


@pytest.mark.sim
def test_positions_are_kept_beside_pictures_and_are_no_observations(tmp_path):
    pytest.importorskip("mujoco")
    name = "scd_memory/occluded-reach:delay=2,observation=image"
    record_demonstrations(name, 2, tmp_path / "a.zarr", keep_positions=True, progress=False, workers=1)
    record_demonstrations(name, 2, tmp_path / "b.zarr", progress=False, workers=1)
    kept, plain = open_dataset(tmp_path / "a.zarr"), open_dataset(tmp_path / "b.zarr")
    assert set(kept.arrays) - set(plain.arrays) == {POSITION + "hand", POSITION + "puck"}
    assert kept.spec == plain.spec, "what a policy sees"
    assert kept.arrays[POSITION + "hand"].shape == (kept.num_steps, 3)
    np.testing.assert_allclose(kept.arrays[POSITION + "hand"], kept.arrays["proprio"], atol=0.01)  # measured with noise
    for key in plain.arrays:
        np.testing.assert_array_equal(kept.arrays[key][:], plain.arrays[key][:])


def test_where_an_environment_has_no_positions_none_can_be_kept(toy, tmp_path):
    with pytest.raises(ConfigError, match="toy does not tell where things are"):
        record_demonstrations("toy", 4, tmp_path / "a.zarr", keep_positions=True, progress=False, workers=1)
    assert not (tmp_path / "a.zarr").exists()


class Reusing(ToyEnvironment):
    """Writes what is seen and what the expert does into the same arrays, step after step."""

    def __init__(self):
        self.x, self.label, self.place = (np.zeros(1, np.float32) for _ in range(3))

    @property
    def positions(self):
        return {"hand": self.place}

    def reset(self, seed):
        self.seed, self.steps = 2, 0
        self.x[:] = self.place[:] = 0
        return {"x": self.x}

    def step(self, action):
        result = super().step(action)
        self.x[:] = self.place[:] = self.steps
        return dataclasses.replace(result, observation={"x": self.x})

    def expert_action(self):
        self.label[:] = self.steps / 10
        return self.label


def test_an_environment_may_reuse_its_arrays():
    found = run_attempt(Reusing(), RecordingConfig("toy", steps_after_success=0, keep_positions=True), 0).episode
    assert found["x"][:, 0].tolist() == found[f"{POSITION}hand"][:, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(found["action"][:, 0], [0, 0.1, 0.2])


class Endless(ToyEnvironment):
    def __init__(self, success_after):
        self.success_after = success_after

    def step(self, action):
        result = super().step(action)
        return dataclasses.replace(result, success=self.steps > self.success_after, truncated=False)


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_noise_is_as_large_as_asked_for_whatever_its_correlation(correlation):
    config = RecordingConfig("toy", steps_after_success=4000, action_noise=0.02, noise_correlation=correlation)
    index = next(i for i, seed in enumerate(start_seeds(100)) if seed % 3 != 0)
    episode = run_attempt(Endless(0), config, index).episode
    assert episode["executed_action"].max() < 1  # nothing is clipped
    noise = (episode["executed_action"] - episode["action"])[:, 0]
    assert noise.std() == pytest.approx(0.02, rel=0.2)
    assert np.corrcoef(noise[1:], noise[:-1])[0, 1] == pytest.approx(correlation, abs=0.05)


def test_disturbances_replace_whole_stretches_of_the_expert():
    config = RecordingConfig("toy", steps_after_success=60, disturbances=0.3)

    index = next(i for i, seed in enumerate(start_seeds(100)) if seed % 3 != 0)
    episode = run_attempt(Endless(60), config, index).episode
    replaced = (episode["executed_action"] != episode["action"]).any(axis=1)
    assert 0.3 < replaced.mean() < 0.95
    changes = np.flatnonzero((np.diff(episode["executed_action"], axis=0) != 0).any(axis=1))
    stretches = np.diff(changes)[replaced[changes[:-1] + 1]]
    assert len(stretches) > 3
    assert stretches.min() >= 3
    assert stretches.max() <= 8
    plain = run_attempt(Endless(60), dataclasses.replace(config, disturbances=0.0), index).episode
    np.testing.assert_array_equal(plain["executed_action"], plain["action"])


def test_hopeless_expert_is_given_up_and_leaves_nothing(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("scd_robot.recording.attempt.derive_seed", lambda *keys: 1)
    with pytest.raises(SimulatorError, match="succeeded in 0 of 40 attempts, 2 were wanted"):
        record_demonstrations("toy", 2, tmp_path / "a.zarr", progress=False, workers=1)
    assert list(tmp_path.iterdir()) == []


class Foreign(ToyEnvironment):
    """Raises what it likes: at its first start, in every third step, or always."""

    def __init__(self, always=False):
        self.always, self.starts = always, 0

    def reset(self, seed):
        self.starts += 1
        if self.always or self.starts == 1:
            raise OSError("the motor board says no")
        return super().reset(2)

    def step(self, action):
        if self.starts % 3 == 0:
            raise ZeroDivisionError("the solver gave up")
        return super().step(action)


def test_a_simulator_that_raises_something_of_its_own_costs_an_attempt(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("scd_robot.recording.record.make_environment", lambda name: Foreign())
    summary = record_demonstrations("toy", 4, tmp_path / "a.zarr", progress=False, workers=1)
    assert (summary["episodes"], summary["failures"]) == (4, 2)
    assert caplog.text.count("was dropped: ZeroDivisionError: the solver gave up") == 2


def test_a_simulator_that_always_crashes_is_given_up_early(tmp_path, monkeypatch):
    monkeypatch.setattr("scd_robot.recording.record.make_environment", lambda name: Foreign(always=True))
    with pytest.raises(SimulatorError, match=r"crashed in 10 attempts in a row, .*OSError: the motor board says no"):
        record_demonstrations("toy", 4, tmp_path / "a.zarr", progress=False, workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"action_noise": float("nan")}, "action_noise must be a finite number"),
        ({"noise_correlation": 1.0}, "noise_correlation must be at least 0 and less than 1, got 1.0"),
        ({"disturbances": 1.0}, "disturbances must be a probability"),
        ({"steps_after_success": -1}, "steps_after_success must be 0 or more"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_written(toy, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        record_demonstrations("toy", **{"episodes": 1, "out": tmp_path / "a.zarr", "progress": False, **options})
    assert list(tmp_path.iterdir()) == []


def test_unknown_environment_is_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="metaworld/reach-v3"):
        record_demonstrations("metaworld/reech-v3", 1, tmp_path / "a.zarr")


def test_start_states_are_none_of_those_of_evaluations():
    assert not set(start_seeds(5000)) & {derive_seed(EVALUATION, 0, index) for index in range(1000)}


def test_attempts_come_in_their_order_whoever_is_done_first():
    others_done = threading.Semaphore(0)

    def work(connection):
        with contextlib.suppress(EOFError, OSError):
            while True:
                index = connection.recv()
                if index == 0:  # answered after three later ones
                    for _ in range(3):
                        assert others_done.acquire(timeout=30)
                connection.send(Attempt(index, 0, None))
                others_done.release()

    pool = {}
    for _ in range(2):
        ours, theirs = multiprocessing.Pipe()
        pool[ours] = threading.Thread(target=work, args=(theirs,), daemon=True)
        pool[ours].start()
    assert [attempt.index for attempt in _in_order(pool, limit=20)] == list(range(20))
    for connection, thread in pool.items():
        connection.close()
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.sim
class TestWithSimulator:
    def test_store_is_the_same_for_any_number_of_workers(self, tmp_path):
        for workers in (1, 2):
            record_demonstrations(
                ENV, 5, tmp_path / f"{workers}.zarr", seed=3, action_noise=0.3, workers=workers, progress=False
            )
        one, two = files(tmp_path / "1.zarr"), files(tmp_path / "2.zarr")
        assert set(one) == set(two)
        assert one == two

    def test_store_holds_what_a_policy_needs(self, tmp_path):
        name = f"{ENV}:goal_steps=2"
        summary = record_demonstrations(name, 2, tmp_path / "a.zarr", progress=False, action_noise=0.1)
        dataset = open_dataset(tmp_path / "a.zarr")
        spec = make_environment(name).spec
        assert dataset.spec.observation == spec.observation
        assert (dataset.spec.action_dim, dataset.spec.control_dt) == (4, spec.control_dt)
        assert summary["environment"] == dataset.spec.source == dataset.metadata["environment"] == name
        assert (summary["steps"], summary["episodes"]) == (dataset.num_steps, dataset.num_episodes)
        assert {"mujoco", "metaworld", "numpy", "scd_robot"} == set(dataset.metadata["versions"])
        goal = dataset.episode(1)["goal"]
        assert goal[:2].all()
        assert not goal[2:].any()

    def test_recorded_actions_replay_to_the_recorded_observations(self, tmp_path):
        record_demonstrations(ENV, 1, tmp_path / "a.zarr", progress=False, action_noise=0.2)
        dataset = open_dataset(tmp_path / "a.zarr")
        episode = dataset.episode(0)
        environment = make_environment(ENV)
        observation = environment.reset(int(dataset.episode_info["seed"][0]))
        for step, action in enumerate(episode["executed_action"]):
            np.testing.assert_array_equal(environment.expert_action(), episode["action"][step])
            for key, values in observation.items():
                np.testing.assert_array_equal(values, episode[key][step])
            observation = environment.step(action).observation

    def test_worker_that_finds_no_simulator_says_why(self):
        config = RecordingConfig("metaworld/nothing-v3")
        with pytest.raises(SimulatorError, match="unknown environment 'metaworld/nothing-v3'"):
            list(run_attempts(make_environment(ENV), config, limit=4, workers=2))
        assert not multiprocessing.active_children()

    def test_last_words_of_a_worker_that_has_ended_are_heard(self, monkeypatch):
        start = workers_module._start

        def start_and_wait(config, count):
            pool = start(config, count)
            for process in pool.values():
                process.join(60)
            return pool

        monkeypatch.setattr(workers_module, "_start", start_and_wait)
        with pytest.raises(SimulatorError, match="unknown environment 'metaworld/nothing-v3'"):
            list(run_attempts(make_environment(ENV), RecordingConfig("metaworld/nothing-v3"), limit=4, workers=2))

    def test_killed_worker_is_an_error_and_the_others_end(self):
        attempts = run_attempts(make_environment(ENV), RecordingConfig(ENV), limit=10000, workers=2)
        assert next(attempts).index == 0
        multiprocessing.active_children()[0].kill()
        with pytest.raises(SimulatorError, match="died with exit code -9"):
            list(attempts)
        assert not multiprocessing.active_children()

    def test_existing_store_is_kept(self, tmp_path):
        (tmp_path / "a.zarr").mkdir()
        with pytest.raises(OutputError, match="exists already"):
            record_demonstrations(ENV, 1, tmp_path / "a.zarr", progress=False)

    def test_interrupt_keeps_finished_episodes_and_ends_the_workers(self, tmp_path):
        path = tmp_path / "a.zarr"
        code = (
            "import signal, sys\nfrom pathlib import Path\nfrom scd_robot.recording import record_demonstrations\n"
            "if __name__ == '__main__':\n"
            "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs of a shell ignore it
            f"    record_demonstrations('{ENV}', 10000, Path(sys.argv[1]), workers=2, progress=False)\n"
        )
        script = tmp_path / "script.py"
        script.write_text(code)
        with subprocess.Popen(
            [sys.executable, str(script), str(path)], stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            try:
                wait_for_episodes(path, 3)
            finally:
                os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal: to all processes
            # Ends when nobody holds the pipe any more, that is, with the last worker. Python loses an interrupt that
            # arrives in a destructor; then one presses Ctrl-C again.
            try:
                _, messages = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGINT)
                _, messages = process.communicate(timeout=120)
        assert process.returncode != 0
        assert messages.count("Traceback") == 1, messages
        assert "KeyboardInterrupt" in messages
        assert open_dataset(path).num_episodes >= 3


def wait_for_episodes(path: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            if open_dataset(path).num_episodes >= count:
                return
        except (DatasetError, UnknownNameError):
            pass  # not begun yet
        time.sleep(0.05)
    raise AssertionError("too little was recorded within five minutes")
