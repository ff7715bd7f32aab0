import dataclasses
import json
import sys

import numpy as np
import pytest

from scd_robot.datasets.open import open_dataset
from scd_robot.datasets.schema import EpisodeDataset
from scd_robot.errors import ConfigError, DatasetError, MissingDependencyError, ShapeError, SimulatorError
from scd_robot.recording import record_demonstrations, replay_dataset
from scd_robot.sim_eval.pusht import PushtEnvironment
from scd_robot.types import ArraySpec, DatasetSpec, EnvironmentSpec, StepResult

START = np.asarray([1.0, -1.0], np.float32)


class PointEnvironment:
    """A point moved by its actions; success where its first coordinate is beyond 3; the start is the seed's."""

    spec = EnvironmentSpec(
        "point", {"x": ArraySpec((2,))}, 2, (-1.0, -1.0), (1.0, 1.0), 0.1, max_steps=20, success="x beyond 3"
    )

    def reset(self, seed):
        self.x, self.seed, self.steps = START * seed, seed, 0
        return {"x": self.x}

    def step(self, action):
        executed = np.clip(action, -1, 1).astype(np.float32)
        self.x, self.steps = self.x + executed, self.steps + 1
        if self.seed == 13 and self.steps == 3:
            raise SimulatorError("it crashed")
        return StepResult({"x": self.x}, float(self.x[0]), bool(self.x[0] > 3), False, False, executed)

    def close(self):
        pass


def recording(actions, seeds, **changes):
    """What `PointEnvironment` gives for actions (E, T, 2), as `record_demonstrations` stores it."""
    actions = np.asarray(actions, np.float32)
    states = []
    for seed, episode in zip(seeds, actions, strict=True):
        environment = PointEnvironment()
        states.append(environment.reset(seed)["x"])
        for action in episode[:-1]:
            environment.x = environment.x + np.clip(action, -1, 1)
            states.append(environment.x)
    dataset = EpisodeDataset(
        DatasetSpec({"x": ArraySpec((2,))}, 2, 0.1, source="points.zarr"),
        np.cumsum([len(episode) for episode in actions]),
        {"x": np.asarray(states, np.float32), "action": actions.reshape(-1, 2)},
        {"environment": "point", "versions": {"point": "1.0"}},
        {"seed": np.asarray(seeds)},
    )
    return dataclasses.replace(dataset, **changes)


@pytest.fixture(autouse=True)
def point(monkeypatch):
    from scd_robot.sim_eval.registry import make_environment

    monkeypatch.setattr(
        "scd_robot.recording.replay.make_environment",
        lambda name: PointEnvironment() if name.startswith("point") else make_environment(name),
    )


def replay(dataset, name="point", **options):
    result = replay_dataset(dataset, name, progress=False, **options)
    assert json.loads(json.dumps(result)) == result
    return result


RIGHT = np.tile([0.5, 0.0], (3, 8, 1))


def test_own_recording_reproduces():
    result = replay(recording(RIGHT, [1, 2, 0]))
    assert (result["episodes"], result["successes"], result["recorded_successes"]) == (3, 3, 3)
    assert (result["within_tolerance"], result["steps_clipped"]) == (3, 0)
    assert result["drift"] == {"median": 0.0, "max": 0.0}
    assert [detail["best_reward"] for detail in result["episodes_detail"]] == [5.0, 6.0, 4.0]
    assert result["mean_best_reward"] == 5.0
    assert result["interval"][1] == 1.0
    assert result["reproduces"]
    assert result["verdict"].startswith("the recording reproduces: 3 of 3 episodes stay within 0.01")
    assert result["recorded_with"] == {"point": "1.0"}


def test_drift_is_the_largest_and_the_last_difference_and_its_first_step():
    dataset = recording(RIGHT, [1, 1, 1])
    dataset.arrays["x"][11:16, 1] += [0.5, -0.75, 0.25, 0.125, 0.0625]  # episode 1 from its step 3 on
    result = replay(dataset)
    drift = result["episodes_detail"][1]["drift"]["x"]
    assert drift == {"max": 0.75, "final": 0.0625, "first_step_over": 3}
    assert [detail["first_step_over"] for detail in result["episodes_detail"]] == [None, 3, None]
    assert result["drift"] == {"median": 0.0, "max": 0.75}
    assert replay(dataset, tolerance=0.5)["episodes_detail"][1]["first_step_over"] == 4


def test_executed_actions_are_replayed_rather_than_labels():
    dataset = recording(RIGHT, [1, 2, 3])
    dataset.arrays["executed_action"] = dataset.arrays["action"].copy()
    dataset.arrays["action"][:] = -1
    assert replay(dataset)["drift"]["max"] == 0


def test_wrong_action_convention_is_told():
    dataset = recording(RIGHT, [0, 0, 0])
    dataset.arrays["action"][:] *= -1
    result = replay(dataset)
    assert not result["reproduces"]
    assert (result["successes"], result["repeated_successes"], result["recorded_successes"]) == (0, 0, 3)
    for part in ("0 of 3 recorded successes succeed again", "wrong action convention", "recorded with point 1.0"):
        assert part in result["verdict"]


def test_actions_beyond_the_bounds_are_counted_and_told():
    dataset = recording(RIGHT, [0, 0, 0])
    dataset.arrays["action"][:] *= 100
    result = replay(dataset)
    assert result["steps_clipped"] == 24
    assert result["episodes_detail"][0]["steps_clipped"] == 8
    assert not result["within_tolerance"]
    dataset.arrays["action"][:] *= -1
    assert "24 actions lie beyond the environment's bounds" in replay(dataset)["verdict"]


def test_another_rate_is_told_where_a_recording_does_not_reproduce():
    dataset = recording(RIGHT, [0, 0, 0])
    dataset.arrays["action"][:] *= -1
    slower = dataclasses.replace(dataset, spec=dataclasses.replace(dataset.spec, control_dt=0.2))
    assert "recorded every 0.2 s but is simulated every 0.1 s" in replay(slower)["verdict"]


def test_other_initial_states_are_told_even_if_the_actions_succeed():
    result = replay(recording(RIGHT, [1, 2, 3], episode_info={"seed": np.asarray([4, 5, 6])}))
    assert [detail["first_step_over"] for detail in result["episodes_detail"]] == [0, 0, 0]
    assert result["successes"] == 3
    assert not result["reproduces"]
    assert "the first states differ already" in result["verdict"]


def test_successes_that_the_recording_tells_are_compared():
    info = {"seed": np.asarray([0, 0, 0]), "success": np.asarray([1, 0, 1])}
    result = replay(recording(RIGHT, [0, 0, 0], episode_info=info))
    assert [detail["recorded_success"] for detail in result["episodes_detail"]] == [True, False, True]
    assert (result["successes"], result["recorded_successes"], result["repeated_successes"]) == (3, 2, 2)


def test_crash_ends_one_episode_only():
    result = replay(recording(RIGHT, [13, 2, 3]))
    assert [detail["error"] for detail in result["episodes_detail"]] == ["it crashed", None, None]
    assert result["within_tolerance"] == 2


def test_only_the_first_episodes_are_replayed():
    assert [detail["index"] for detail in replay(recording(RIGHT, [1, 2, 3]), episodes=2)["episodes_detail"]] == [0, 1]
    assert replay(recording(RIGHT, [1, 2, 3]), episodes=9)["episodes"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"tolerance": -1.0}, "tolerance must be a finite number"),
        ({"tolerance": float("nan")}, "tolerance must be a finite number"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        replay(recording(RIGHT, [1, 2, 3]), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"environment": "line"}}, "recorded in line and cannot be replayed in point"),
        ({"metadata": {}}, "nothing in points.zarr tells how its initial states are set in point"),
        ({"episode_info": {}}, "nothing in points.zarr tells how"),
        (
            {"spec": DatasetSpec({"y": ArraySpec((2,))}, 2, 0.1, "points.zarr")},
            "no observation in common that could be compared: y there, x here",
        ),
    ],
)
def test_recording_of_something_else_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replay(recording(RIGHT, [1, 2, 3], **changes))


def test_longer_episodes_than_the_environment_allows_are_refused():
    with pytest.raises(ConfigError, match=r"up to 21 steps, point ends after 20; add the option max_steps=21"):
        replay(recording(np.zeros((1, 21, 2)), [1]))


def test_other_action_widths_are_refused():
    dataset = recording(RIGHT, [1, 2, 3])
    arrays = {**dataset.arrays, "action": np.zeros((24, 3), np.float32)}
    wide = dataclasses.replace(dataset, spec=dataclasses.replace(dataset.spec, action_dim=3), arrays=arrays)
    with pytest.raises(ShapeError, match="are 3 wide, point needs 2"):
        replay(wide)


def test_robosuite_needs_states_and_its_package(monkeypatch):
    dataset = recording(RIGHT, [1, 2, 3])
    with pytest.raises(DatasetError, match="holds no simulator states with their models"):
        replay(dataset, "robosuite")
    monkeypatch.setitem(sys.modules, "robosuite", None)
    states = {**dataset.arrays, "sim_state": np.zeros((24, 5))}
    raw = dataclasses.replace(
        dataset, arrays=states, episode_text={"model_xml": ["<mujoco/>"] * 3}, metadata={"env": "Lift"}
    )
    with pytest.raises(MissingDependencyError, match="make robosuite"):
        replay(raw, "robosuite")


@pytest.mark.sim
class TestWithSimulators:
    def test_metaworld_recording_reproduces_exactly(self, tmp_path):
        path = tmp_path / "a.zarr"
        record_demonstrations("metaworld/reach-v3:max_steps=200", 2, path, action_noise=0.3, progress=False, workers=1)
        result = replay(open_dataset(path), "metaworld/reach-v3")
        assert (result["drift"]["max"], result["within_tolerance"], result["repeated_successes"]) == (0.0, 2, 2)
        with pytest.raises(ConfigError, match="cannot be replayed in metaworld/push-v3"):
            replay(open_dataset(path), "metaworld/push-v3")

    def test_pusht_angle_may_cross_a_full_turn(self):
        states, actions = self.pusht_episode([150.0, 256.0, 256.0, 256.0, 2 * np.pi - 0.05], [350.0, 256.0])
        assert np.ptp(states[:, 4]) > 6  # it jumps from 2 pi to 0
        result = replay(self.pusht_recording(states, actions), "pusht")
        assert result["drift"]["max"] < 1e-4
        # A turn more or less is the same angle.
        turned = self.pusht_recording(states + np.float32([0, 0, 0, 0, 2 * np.pi]), actions)
        assert replay(turned, "pusht")["drift"]["max"] < 1e-4

    def test_pusht_in_other_units_does_not_reproduce(self):
        states, actions = self.pusht_episode([150.0, 256.0, 256.0, 256.0, 1.0], [350.0, 256.0])
        result = replay(self.pusht_recording(states, actions / 512), "pusht")
        assert not result["reproduces"]
        assert "wrong action convention" in result["verdict"]

    def pusht_episode(self, start, target):
        environment = PushtEnvironment()
        states, actions = [environment.set_recorded_state(start)["state"]], np.tile(np.float32(target), (20, 1))
        states += [environment.step(action).observation["state"] for action in actions]
        return np.stack(states[:-1]), actions

    def pusht_recording(self, states, actions):
        spec = DatasetSpec({"state": ArraySpec((5,))}, 2, 0.1, source="pushes")
        return EpisodeDataset(spec, np.asarray([len(states)]), {"state": states, "action": actions})


@pytest.fixture(scope="module")
def pusht(recordings):
    path = recordings / "pusht_cchi_v7_zarr" / "pusht_cchi_v7_replay.zarr"
    if not path.is_dir():
        pytest.skip(f"no recording of PushT at {path}")
    return open_dataset(path, ["state", "keypoint"])


@pytest.mark.sim
def test_human_pusht_recording_reproduces(pusht):
    result = replay(pusht, "pusht", episodes=5)
    assert (result["within_tolerance"], result["reproduces"], result["recorded_successes"]) == (5, True, None)
    assert result["drift"]["max"] < 0.01
    assert list(result["episodes_detail"][0]["drift"]) == ["state"]


@pytest.mark.slow
@pytest.mark.sim
def test_human_pusht_recording_reproduces_in_183_of_206_episodes(pusht):
    result = replay(pusht, "pusht")
    assert (result["episodes"], result["within_tolerance"], result["successes"]) == (206, 183, 7)
    assert result["mean_best_reward"] == pytest.approx(0.947, abs=1e-3)
