import subprocess
import sys

import numpy as np
import pytest

from scd_robot.datasets.open import open_dataset
from scd_robot.errors import (
    ActionError,
    ConfigError,
    MissingDependencyError,
    ShapeError,
    SimulatorError,
)
from scd_robot.seeding import EVALUATION, VALIDATION, derive_seed
from scd_robot.sim_eval.pusht import PushtEnvironment, PushtOptions, block_keypoints, draw_start, state_difference
from scd_robot.sim_eval.registry import known_environments, make_environment, parse_name
from scd_robot.sim_eval.rollout import evaluate


def roll(environment, seed, steps=30):
    """Start hash and all observations of a short episode with random targets."""
    rng = np.random.default_rng(seed)
    numbers = [values.ravel() for values in environment.reset(seed).values()]
    start = environment.state_hash()
    for _ in range(steps):
        result = environment.step(rng.uniform(0, 512, 2).astype(np.float32))
        numbers += [values.ravel() for values in result.observation.values()]
    return start, np.concatenate(numbers)


def test_names_are_checked_without_the_simulator():
    code = """
import sys
from scd_robot.errors import UnknownNameError
from scd_robot.sim_eval.registry import make_environment
wrong = {"pushd": "'pusht'", "pusht/": "'pusht'", "pusht:observatoin=image": "'observation'",
         "pusht:observation=images": "'image'", "pusht:observation=3": "observation", "pusht:starts=benchmarks": "'ben"}
for name, told in wrong.items():
    try:
        make_environment(name)
    except UnknownNameError as error:
        assert told in str(error), error
    else:
        raise AssertionError(name)
assert not {"pymunk", "pygame", "gym_pusht", "gymnasium", "cv2"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_may_be_words():
    assert "pusht" in known_environments()
    assert parse_name("pusht:observation=image,max_steps=9") == ("pusht", {"observation": "image", "max_steps": 9})


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"max_steps": "many"}])
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError, match="max_steps must be a whole number of at least 1"):
        PushtOptions(**options)


def test_missing_simulator_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gym_pusht.envs.pusht", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "scd_robot\[sim\]"'):
        make_environment("pusht")


def test_keypoints_turn_and_move_with_the_block():
    at_origin = block_keypoints([0.0, 0.0, 0.0])
    turned = block_keypoints([[10.0, 20.0, np.pi / 2], [10.0, 20.0, 0.0]])
    np.testing.assert_allclose(turned[0], np.stack([10 - at_origin[:, 1], 20 + at_origin[:, 0]], 1), atol=1e-9)
    np.testing.assert_allclose(turned[1], at_origin + np.asarray([10, 20]), atol=1e-9)


def test_angles_differ_by_less_than_half_a_turn():
    difference = state_difference([1.0, 0, 0, 0, 0.1], [0.0, 0, 0, 0, 2 * np.pi - 0.1])
    np.testing.assert_allclose(difference, [1.0, 0, 0, 0, 0.2], atol=1e-12)


def test_benchmark_starts_are_the_published_draws():
    # What diffusion_policy's PushTEnv.reset draws for its tests 0 and 7.
    assert draw_start(100_000).tolist() == [235.0, 124.0, 335.0, 128.0, -0.9049274284249247]
    assert draw_start(100_007).tolist() == [109.0, 351.0, 211.0, 210.0, 1.2439605605764488]


@pytest.mark.sim
class TestWithSimulator:
    def reference(self):
        """gym-pusht's own environment."""
        import gym_pusht.envs.pusht

        return gym_pusht.envs.pusht.PushTEnv(obs_type="state")

    def test_evaluation_episode_starts_as_the_benchmarks_test_of_that_number(self):
        environment, reference = PushtEnvironment(), self.reference()
        for episode in (0, 1, 49, 99, 999):
            state, _ = reference.reset(options={"reset_to_state": draw_start(100_000 + episode)})
            for seed in (derive_seed(EVALUATION, episode), 100_000 + episode):
                np.testing.assert_array_equal(environment.reset(seed)["state"], state.astype(np.float32))

    def test_other_seeds_are_drawn_from_themselves(self):
        reference = self.reference()
        for environment, seed in (
            (PushtEnvironment(), derive_seed(VALIDATION, 0)),
            (PushtEnvironment(PushtOptions(starts="seeds")), derive_seed(EVALUATION, 0)),
        ):
            state, _ = reference.reset(options={"reset_to_state": draw_start(seed)})
            np.testing.assert_array_equal(environment.reset(seed)["state"], state.astype(np.float32))

    def test_evaluation_uses_the_benchmark_starts(self):
        class Stay:
            def reset(self):
                pass

            def act(self, observation):
                return observation["state"][:, :2]

        result = evaluate(Stay(), "pusht", 2, max_steps=2, num_videos=0, progress=False)
        environment = PushtEnvironment()
        hashes = []
        for episode in range(2):
            environment.reset(100_000 + episode)
            hashes.append(environment.state_hash())
        assert [record.initial_state_hash for record in result.episodes_detail] == hashes

    def test_start_moves_the_block_as_the_benchmark_does(self):
        # The angle turns the block about its centre of mass, so it does not stay where it was put.
        state = PushtEnvironment().reset(100_000)["state"]
        drawn = draw_start(100_000)
        np.testing.assert_array_equal(state[:2], drawn[:2].astype(np.float32))
        np.testing.assert_allclose(state[4], drawn[4] % (2 * np.pi), rtol=1e-6)
        assert np.abs(state[2:4] - drawn[2:4]).max() > 5

    def test_recorded_start_is_the_state_that_was_asked_for(self):
        environment = PushtEnvironment()
        environment.reset(3)
        for state in ([222.0, 97.0, 223.0, 381.5, 3.0], [300.0, 200.0, 150.0, 250.0, 6.0]):
            np.testing.assert_array_equal(environment.set_recorded_state(state)["state"], np.float32(state))
            moved = environment.step(np.float32(state[:2])).observation["state"]  # all is at rest
            np.testing.assert_array_equal(moved, np.float32(state))

    def test_physics_is_gym_pushts(self):
        environment, reference = PushtEnvironment(), self.reference()
        rng = np.random.default_rng(0)
        environment.reset(100_003)
        reference.reset(options={"reset_to_state": draw_start(100_003)})
        for _ in range(100):
            action = rng.uniform(0, 512, 2).astype(np.float32)
            result = environment.step(action)
            state, reward, _, _, info = reference.step(action.astype(np.float64))
            np.testing.assert_array_equal(result.observation["state"], state.astype(np.float32))
            # The last digit depends on the order of the block's two parts, which are a set.
            assert (result.reward, result.success) == (pytest.approx(reward, rel=1e-12), info["is_success"])
            assert result.info["coverage"] == pytest.approx(info["coverage"], rel=1e-12)

    def test_episode_is_a_function_of_the_seed_alone(self):
        used, other = PushtEnvironment(PushtOptions(observation="image")), PushtEnvironment()
        roll(used, 6)
        roll(other, 7)
        start, numbers = roll(used, 5)
        other.reset(8)  # instances share nothing
        fresh_start, fresh_numbers = roll(PushtEnvironment(PushtOptions(observation="image")), 5)
        assert start == fresh_start
        np.testing.assert_array_equal(numbers, fresh_numbers)
        assert roll(used, 9)[0] != start

    @pytest.mark.parametrize(
        ("observation", "keys"),
        [("state", ["state"]), ("keypoints", ["state", "keypoint"]), ("image", ["state", "keypoint", "img"])],
    )
    def test_observations_keep_to_the_specification(self, observation, keys):
        environment = make_environment(f"pusht:observation={observation}")
        assert list(environment.spec.observation) == keys
        for values in (environment.reset(0), environment.step(np.zeros(2, np.float32)).observation):
            given = {key: (array.shape, str(array.dtype)) for key, array in values.items()}
            assert given == {key: (spec.shape, spec.dtype) for key, spec in environment.spec.observation.items()}

    def test_name_is_canonical_and_makes_the_same_environment(self):
        environment = make_environment("pusht:max_steps=300,observation=state")
        assert environment.spec.name == "pusht:observation=state"
        assert make_environment(environment.spec.name).spec == environment.spec
        assert make_environment("pusht").spec.name == "pusht"
        assert (environment.spec.control_dt, environment.spec.max_steps) == (0.1, 300)

    def test_reward_is_coverage_over_its_threshold_cut_at_one(self):
        environment = PushtEnvironment()
        goal = [256.0, 256.0, np.pi / 4]
        away = [50.0, 450.0]
        environment.set_recorded_state([*away, *goal])
        on_goal = environment.step(np.float32(away))
        assert (on_goal.reward, on_goal.success, on_goal.terminated) == (1.0, True, False)
        assert on_goal.info["coverage"] == pytest.approx(1.0)
        environment.set_recorded_state([*away, goal[0] + 20, goal[1], goal[2]])
        beside = environment.step(np.float32(away))
        assert 0 < beside.info["coverage"] < 0.95
        assert beside.reward == pytest.approx(beside.info["coverage"] / 0.95)
        assert not beside.success

    def test_actions_are_clipped_to_the_square(self):
        environment = PushtEnvironment()
        environment.reset(0)
        result = environment.step(np.asarray([-100.0, 600.0], np.float32))
        assert result.executed_action.tolist() == [0.0, 512.0]

    @pytest.mark.parametrize(
        ("action", "error", "message"),
        [
            (np.zeros(3), ShapeError, r"must be \(2,\).*got \(3,\)"),
            (np.asarray([np.nan, 0]), ActionError, "control step 0 of pusht must be finite"),
        ],
    )
    def test_bad_actions_are_refused(self, action, error, message):
        environment = PushtEnvironment()
        environment.reset(0)
        with pytest.raises(error, match=message):
            environment.step(action)

    @pytest.mark.parametrize(
        ("state", "error"), [(np.zeros(4), ShapeError), ([0, 0, np.inf, 0, 0], ConfigError)], ids=["width", "infinite"]
    )
    def test_bad_recorded_states_are_refused(self, state, error):
        with pytest.raises(error, match="a recorded state of pusht must be"):
            PushtEnvironment().set_recorded_state(state)

    @pytest.mark.parametrize("seed", [-1, 2**32])
    def test_seeds_out_of_range_are_refused(self, seed):
        with pytest.raises(ConfigError, match=r"must be in 0\.\.4294967295"):
            PushtEnvironment().reset(seed)

    def test_episode_has_a_beginning_and_an_end(self):
        environment = make_environment("pusht:max_steps=2")
        with pytest.raises(SimulatorError, match=r"call reset\(seed\) first"):
            environment.step(np.zeros(2, np.float32))
        environment.reset(0)
        assert [environment.step(np.zeros(2, np.float32)).truncated for _ in range(2)] == [False, True]
        with pytest.raises(SimulatorError, match="truncated after 2 control steps"):
            environment.step(np.zeros(2, np.float32))
        environment.close()
        environment.close()
        with pytest.raises(SimulatorError, match=r"call reset\(seed\) first"):
            environment.render(96, 96)

    def test_there_is_no_expert(self):
        with pytest.raises(ConfigError, match="no scripted expert"):
            PushtEnvironment().expert_action()

    def test_frame_shows_pusher_and_block_where_they_are(self):
        environment = PushtEnvironment()
        environment.set_recorded_state([100.0, 400.0, 400.0, 100.0, 0.0])
        frame = environment.render(128, 256)
        assert (frame.shape, frame.dtype) == ((128, 256, 3), np.uint8)
        red, _, blue = frame[100, 50].astype(int)  # the pusher: x 100 of 512 is column 50, y 400 row 100
        assert blue > 200
        assert red < 100
        assert frame[26, 200].max() < 200  # the block, not the ground

    def test_drawing_changes_nothing(self):
        drawn, blind = PushtEnvironment(PushtOptions(observation="image")), PushtEnvironment()
        rng = np.random.default_rng(1)
        drawn.reset(2)
        blind.reset(2)
        for _ in range(60):
            action = rng.uniform(0, 512, 2).astype(np.float32)
            first, second = drawn.step(action), blind.step(action)
            np.testing.assert_array_equal(first.observation["state"], second.observation["state"])

    def test_standard_output_stays_clean_and_no_window_opens(self):
        code = """
from scd_robot.sim_eval.registry import make_environment
environment = make_environment("pusht:observation=image")
environment.reset(0)
import pygame
assert not pygame.display.get_init()
environment.close()
"""
        done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("", "")


@pytest.fixture(scope="module")
def recording(recordings):
    path = recordings / "pusht_cchi_v7_zarr" / "pusht_cchi_v7_replay.zarr"
    if not path.is_dir():
        pytest.skip(f"no recording of PushT at {path}")
    return open_dataset(path, ["state", "keypoint", "img"])


@pytest.mark.sim
class TestWithHumanRecording:
    def drift(self, environment, recording, episode):
        """Largest difference of the replayed from the recorded states [px, rad]."""
        states, actions = recording.episode(episode, ["state", "action"]).values()
        reached = [environment.set_recorded_state(states[0])["state"]]
        reached += [environment.step(action).observation["state"] for action in actions]
        return np.abs(state_difference(reached[:-1], states)).max()

    @pytest.mark.parametrize("episode", [0, 1, 17, 100, 204])  # tests/recording/test_replay.py replays all
    def test_recorded_actions_replay_to_the_recorded_states(self, recording, episode):
        assert self.drift(PushtEnvironment(), recording, episode) < 0.01

    def test_benchmark_start_would_break_the_replay(self, recording):
        states = recording.episode(0, ["state"])["state"]
        environment = PushtEnvironment()
        environment._env.reset(options={"reset_to_state": states[0]})
        assert np.abs(state_difference(environment._env.get_obs(), states[0])).max() > 10

    def test_keypoints_are_the_recorded_ones(self, recording):
        """The recorded keypoints were made from the recorded states, set twice in a simulation that was never reset.

        Each time one physics step followed, which moves a block that the pusher touches, by 0.04 px at most places.
        """
        states, keypoints = recording.arrays["state"][:2000], recording.arrays["keypoint"][:2000]
        simulator = PushtEnvironment()
        simulator.set_recorded_state(states[0])
        env = simulator._env
        made = []
        for state in states.astype(float):
            for _ in range(2):
                env.agent.position = state[:2].tolist()
                env.block.angle = state[4]
                env.block.position = state[2:4].tolist()
                env.space.step(env.dt)
            made.append(block_keypoints(env.get_obs()[2:]))
        np.testing.assert_allclose(made, keypoints, atol=4e-5)  # float32 of up to 512

    def test_keypoints_of_the_recorded_states_are_the_recorded_ones_but_for_contact(self, recording):
        off = np.abs(block_keypoints(recording.arrays["state"][:, 2:]) - recording.arrays["keypoint"]).max((1, 2))
        assert np.median(off) < 2e-5
        assert np.quantile(off, 0.7) < 1e-3
        assert np.quantile(off, 0.99) < 0.05

    def test_images_are_the_recorded_ones_the_right_way_up(self, recording):
        environment = PushtEnvironment(PushtOptions(observation="image"))
        rows = np.arange(0, recording.num_steps, 1283)
        images = recording.arrays["img"][rows]
        made = np.stack([environment.set_recorded_state(s)["img"] for s in recording.arrays["state"][rows]])
        assert np.abs(made.astype(int) - images).mean() < 0.15  # 0.08 of 255: polygons are filled slightly differently
        assert np.abs(made[:, ::-1].astype(int) - images).mean() > 3
        assert np.abs(made[:, :, ::-1].astype(int) - images).mean() > 3
