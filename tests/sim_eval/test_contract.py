"""What every environment promises, asked of one or more of each simulator that is installed.

What is cheap to ask is asked of every name there is, but for Meta-World's, which tests/sim_eval/test_metaworld.py goes
through.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scd_robot.errors import ActionError, ShapeError, SimulatorError
from scd_robot.sim_eval import evaluate, known_environments, make_environment

pytestmark = pytest.mark.sim

PACKAGES = {
    "metaworld": "metaworld",
    "pusht": "gym_pusht",
    "gymnasium": "gymnasium_robotics",
    "robosuite": "robosuite",
    "scd_memory": "mujoco",
}
SLOW = ("robosuite/Door:cameras=agentview,image_size=48", "gymnasium/FrankaKitchen-v1")
NAMES = (
    "metaworld/push-v3",
    "metaworld/assembly-v3",
    "metaworld/push-v3:observation=image,camera=corner4",
    "pusht",
    "pusht:observation=image",
    "gymnasium/FetchPush-v4",
    "gymnasium/AdroitHandDoor-v1",
    "gymnasium/FrankaKitchen-v1",
    "gymnasium/AlohaTransferCube-v0",
    "robosuite/Lift",
    "robosuite/Door:cameras=agentview,image_size=48",
    "scd_memory/cue-reach",
    "scd_memory/place-back:observation=image",
    "scd_memory/count-press",
    "scd_memory/occluded-reach",
    "scd_memory/hidden-friction",
    "scd_memory/moving-target",
    "scd_memory/tray-balance",
)
REST = [name for name in known_environments() if name not in NAMES and not name.startswith("metaworld/")]
QUICK_ROBOSUITE = ("robosuite/Stack", "robosuite/TwoArmLift")  # the others take ten seconds and more each


def slowly(name):
    slow = name in SLOW or (name in REST and name.startswith("robosuite/") and name not in QUICK_ROBOSUITE)
    return pytest.param(name, marks=[pytest.mark.slow] if slow else [])


EVERY = [slowly(name) for name in NAMES]
# How often each is reset, and by how many bytes the process may grow. A reset of robosuite builds its model anew, in a
# second or more, with which memory goes up and down by 40 MB; one that stayed behind would be 340 MB each time.
RESETS = dict.fromkeys(NAMES, (200, 20e6)) | {
    "robosuite/Lift": (60, 100e6),
    "robosuite/Door:cameras=agentview,image_size=48": (20, 150e6),
}


def needs_simulator(name):
    pytest.importorskip(PACKAGES[name.partition("/")[0].partition(":")[0]])


@pytest.fixture
def make():
    """Makes environments, if their simulator is here, and closes them."""
    made = []

    def build(name):
        needs_simulator(name)
        made.append(make_environment(name))
        return made[-1]

    yield build
    for environment in made:
        environment.close()


@pytest.fixture(scope="class")
def environment(name):
    """One for all tests of a class that ask for it, as the last one left it: some take seconds to make."""
    needs_simulator(name)
    made = make_environment(name)
    yield made
    made.close()


def simulated_time(environment):
    """Seconds of simulation since the reset; None where the simulator keeps no clock."""
    aloha = "_env.unwrapped._env.physics.data.time"
    for path in ("data.time", "_env.data.time", "_env.unwrapped.data.time", "_env.sim.data.time", aloha):
        found = environment
        for part in path.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return float(found)
    return None


def episode(environment, seed, steps=4):
    """Observation, hash and outcome of the first control steps under fixed random actions."""
    spec = environment.spec
    observations, rewards = [environment.reset(seed)], []
    hashed = environment.state_hash()
    rng = np.random.default_rng(0)
    for _ in range(steps):
        action = rng.uniform(spec.action_low, spec.action_high).astype(np.float32)
        result = environment.step(action)
        observations.append(result.observation)
        rewards.append(result.reward)
    return hashed, observations, rewards


@pytest.mark.parametrize("name", [slowly(name) for name in (*NAMES, *REST)], scope="class")
class TestEveryName:
    def test_an_episode_follows_from_its_seed_and_actions(self, environment, make, name):
        other, found, wanted = episode(environment, 6), episode(environment, 5), episode(make(name), 5)
        assert other[0] != wanted[0]
        assert found[0] == wanted[0]  # after another episode as in a fresh environment
        assert found[2] == wanted[2]
        for mine, theirs in zip(found[1], wanted[1], strict=True):
            for key in theirs:
                np.testing.assert_array_equal(mine[key], theirs[key])

    def test_observations_and_actions_are_as_specified(self, environment, name):
        spec = environment.spec
        assert len(spec.success.split()) > 3
        assert spec.max_steps > 1
        low, high = np.array(spec.action_low), np.array(spec.action_high)
        assert low.shape == high.shape == (spec.action_dim,)
        assert (low < high).all()
        first = environment.reset(1)
        held = name.startswith("scd_memory") and not environment._is_free()  # until the signal to go
        executed = environment.standstill() if held else high
        result = environment.step(np.full(spec.action_dim, 1e6, np.float32))
        np.testing.assert_allclose(result.executed_action, executed, rtol=1e-6)
        assert result.executed_action.dtype == np.float32
        for observation in (first, result.observation):
            assert observation.keys() == spec.observation.keys()
            for key, array in spec.observation.items():
                assert (observation[key].shape, str(observation[key].dtype)) == (tuple(array.shape), array.dtype)
                assert np.isfinite(observation[key]).all()
        with pytest.raises(ActionError, match="must be finite"):
            environment.step(np.full(spec.action_dim, np.nan, np.float32))
        with pytest.raises(ShapeError, match="must be"):
            environment.step(np.zeros(spec.action_dim + 1, np.float32))

    def test_pictures_stay_whole_while_environments_come_and_go(self, environment, name):
        environment.reset(1)
        wanted = environment.render(64, 96)
        assert wanted.shape == (64, 96, 3)
        assert wanted.dtype == np.uint8
        assert np.ptp(wanted) > 30
        others = [name] if name in NAMES else []  # all of one simulator draw alike
        for other in map(make_environment, [*others, "scd_memory/cue-reach"]):
            other.reset(2)
            other.render(48, 48)
            other.close()
        np.testing.assert_array_equal(environment.render(64, 96), wanted)


@pytest.mark.parametrize("name", EVERY, scope="class")
class TestContract:
    def test_an_observation_is_not_changed_later(self, environment, name):
        first = environment.reset(1)
        kept = {key: value.copy() for key, value in first.items()}
        environment.step(np.array(environment.spec.action_high, np.float32))
        environment.reset(2)
        for key, value in kept.items():
            np.testing.assert_array_equal(first[key], value)

    def test_the_hand_is_known_and_moves(self, environment, name):
        spec = environment.spec
        environment.reset(1)
        rng, path = np.random.default_rng(0), [np.array(environment.hand)]
        for _ in range(spec.max_steps if name.startswith("scd_memory") else 5):  # held still until the signal
            result = environment.step(rng.uniform(spec.action_low, spec.action_high).astype(np.float32))
            path.append(np.array(environment.hand))
            if result.terminated or result.success:
                break
        assert {place.shape for place in path} == {path[0].shape}
        assert path[0].dtype == np.float64
        assert np.isfinite(path).all()
        reach = {"m": 3.0, "px": 512.0, "rad": 0.5}[spec.hand_unit]
        moved = np.abs(np.diff(path, axis=0)).max(0)
        assert (moved > 1e-5 * reach).all()
        assert np.abs(path).max() < reach
        environment.reset(1)
        np.testing.assert_array_equal(environment.hand, path[0])

    def test_positions_are_exact_and_asking_for_them_changes_nothing(self, environment, make, name):
        if not hasattr(type(environment), "positions"):
            pytest.skip("it does not tell where things are")
        unasked = make(name)
        path, spec = [], environment.spec
        for one in (environment, unasked):
            one.reset(1)
            rng = np.random.default_rng(0)
            for _ in range(5):
                if one is environment:
                    path.append(one.positions)
                one.step(rng.uniform(spec.action_low, spec.action_high).astype(np.float32))
        assert environment.state_hash() == unasked.state_hash()
        assert len({tuple(places) for places in path}) == 1
        assert all(place.shape == (3,) and np.isfinite(place).all() for places in path for place in places.values())
        if "hand" in path[0]:
            environment.reset(1)
            np.testing.assert_allclose(path[0]["hand"], environment.hand, atol=1e-9)

    def test_the_time_limit_truncates(self, make, name):
        environment = make(f"{name}{',' if ':' in name else ':'}max_steps=3")
        assert environment.spec.max_steps == 3
        environment.reset(1)
        middle = (np.array(environment.spec.action_low) + np.array(environment.spec.action_high)) / 2
        results = [environment.step(middle.astype(np.float32)) for _ in range(3)]
        assert [result.truncated for result in results] == [False, False, True]
        assert not any(result.success or result.terminated for result in results)
        with pytest.raises(SimulatorError, match="3"):
            environment.step(middle.astype(np.float32))

    def test_a_control_step_takes_its_time(self, environment, name):
        environment.reset(1)
        before = simulated_time(environment)
        if before is None:
            pytest.skip("the simulator keeps no clock")
        environment.step(np.zeros(environment.spec.action_dim, np.float32))
        assert simulated_time(environment) - before == pytest.approx(environment.spec.control_dt, rel=1e-3)

    @pytest.mark.slow
    def test_resets_leave_nothing_behind(self, name):
        needs_simulator(name)
        times, allowed = RESETS[name]
        marks = leftovers("resets", name, times)
        early, late = marks[len(marks) // 4 : len(marks) // 2], marks[-len(marks) // 4 :]
        grown = min(memory for memory, *_ in late) - min(memory for memory, *_ in early)
        assert grown < allowed
        assert late[-1][1:] == early[0][1:]


def leftovers(kind, name, times):
    """Readings of tests/sim_eval/leftovers.py: memory in bytes, threads, open files."""
    script = Path(__file__).with_name("leftovers.py")
    command = [sys.executable, str(script), kind, name, str(times)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


class Random:
    """Moves at random."""

    def __init__(self, spec):
        self._low, self._high = (np.array(bound, np.float32) for bound in (spec.action_low, spec.action_high))
        self._rng = np.random.default_rng(0)

    def reset(self, rows=None):
        pass

    def act(self, observation):
        rows = len(next(iter(observation.values())))
        return self._rng.uniform(self._low, self._high, (rows, len(self._low))).astype(np.float32)


MEASURED = ("metaworld/push-v3", "pusht", "gymnasium/FetchReach-v4", "gymnasium/AlohaTransferCube-v0",
            "robosuite/Lift", "scd_memory/tray-balance")  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_an_evaluation_measures_how_the_hand_moves(make, name):
    environment = make(name)
    result = evaluate(Random(environment.spec), name, 1, max_steps=6, num_videos=0, progress=False)
    (episode,), document = result.episodes_detail, result.to_json()
    assert document["hand_unit"] == environment.spec.hand_unit
    environment.reset(episode.seed)
    path = [np.array(environment.hand)]
    for action in result.actions[0]:
        environment.step(action)
        path.append(np.array(environment.hand))
    steps = np.diff(np.reshape(path, (len(path), -1, path[0].shape[-1])), axis=0)  # (T, hands, n)
    assert episode.motion["path_length"] == pytest.approx(np.linalg.norm(steps, axis=2).sum())
    assert document["motion"]["jerk"] == episode.motion["jerk"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SLOW])
def test_closed_environments_leave_nothing_behind(make, name):
    needs_simulator(name)
    marks = leftovers("environments", name, 12)
    assert marks[-1][1:] == marks[4][1:]
    grown = min(memory for memory, *_ in marks[-3:]) - min(memory for memory, *_ in marks[3:6])
    large = name.startswith(("metaworld/", "robosuite/"))  # 80 MB and more each, and up and down by 50 MB
    assert grown < (120e6 if large else 60e6), "six environments later"


def physics_of(environment):
    """MuJoCo's data inside an environment."""
    kind = type(environment).__name__
    if kind == "RobosuiteEnvironment":
        return environment._env.sim.data._data
    if kind == "MetaworldEnvironment":
        return environment._env.data
    return environment._physics() if hasattr(environment, "_physics") else environment.data


@pytest.mark.parametrize("name", [one for one in EVERY if "pusht" not in str(one.values)])
def test_physics_that_explodes_is_a_crash_and_never_an_episode(make, name, tmp_path, monkeypatch):
    """MuJoCo itself resets the state, warns in a file, and goes on as if nothing had been."""
    monkeypatch.chdir(tmp_path)
    environment = make(name)
    environment.reset(3)
    start, action = environment.state_hash(), np.zeros(environment.spec.action_dim, np.float32)
    environment.step(action)
    physics_of(environment).qvel[:] = 1e12
    with pytest.raises(SimulatorError):
        environment.step(action)
    environment.reset(3)
    assert environment.state_hash() == start
    environment.step(action)
