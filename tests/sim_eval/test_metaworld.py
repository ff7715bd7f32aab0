import subprocess
import sys

import numpy as np
import pytest

from scd_robot.errors import (
    ConfigError,
    MissingDependencyError,
    ScdRobotError,
    ShapeError,
    SimulatorError,
    UnknownNameError,
)
from scd_robot.seeding import EVALUATION, RECORDING, VALIDATION, derive_seed
from scd_robot.sim_eval.metaworld import TASKS, MetaworldEnvironment, MetaworldOptions
from scd_robot.sim_eval.registry import known_environments, make_environment, parse_name

SOME_TASKS = ["push-v3", "door-open-v3", "peg-insert-side-v3", "assembly-v3", "coffee-pull-v3"]


def roll(environment, seed, steps=20):
    """Start hash and all numbers of a short episode with random actions."""
    rng = np.random.default_rng(seed)
    numbers = list(environment.reset(seed).values())
    start = environment.state_hash()
    for _ in range(steps):
        result = environment.step(rng.uniform(-1, 1, 4).astype(np.float32))
        numbers += [*result.observation.values(), [result.reward, result.success]]
    return start, np.concatenate(numbers)


def run_expert(environment, seed):
    environment.reset(seed)
    steps = range(environment.spec.max_steps)
    return any(environment.step(environment.expert_action()).success for _ in steps)


@pytest.fixture(scope="module")
def push():
    environment = MetaworldEnvironment("push-v3")
    yield environment
    environment.close()


def test_names_are_checked_without_the_simulator():
    code = """
import sys
from scd_robot.errors import UnknownNameError
from scd_robot.sim_eval.registry import make_environment
for name in ("metawrold/push-v3", "push-v3", "metaworld/pusj-v3", "metaworld/push-v3/x"):
    try:
        make_environment(name)
    except UnknownNameError as error:
        assert "'metaworld/push-v3'" in str(error), error
    else:
        raise AssertionError(name)
assert not {"mujoco", "metaworld", "gymnasium"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_fifty_tasks_are_known():
    assert len(TASKS) == len(set(TASKS)) == 50
    assert {f"metaworld/{task}" for task in TASKS} <= set(known_environments())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("metaworld/push-v3:", "OPTION=INTEGER"),
        ("metaworld/push-v3:goal_steps", "OPTION=INTEGER"),
        ("metaworld/push-v3:goal_steps=few", "goal_steps must be a whole number of at least 0, got few"),
        ("metaworld/push-v3:goal_steps=-1", "goal_steps must be a whole number of at least 0, got -1"),
        ("metaworld/push-v3:camera=corner4", "are for observation=image"),
        ("metaworld/push-v3:observation=image,image_size=8", "image_size must be a whole number of at least 16, got 8"),
        ("metaworld/push-v3:max_steps=0", "max_steps must be a whole number of at least 1, got 0"),
        ("metaworld/push-v3:max_steps=9,max_steps=8", "given twice"),
    ],
)
def test_bad_options_are_named(name, message):
    with pytest.raises(ConfigError, match=message):
        make_environment(name)


@pytest.mark.parametrize(
    ("options", "nearest"),
    [("goal_stps=5", "goal_steps"), ("observation=images", "image"), ("observation=image,camera=corner5", "corner4")],
)
def test_unknown_options_and_words_suggest_the_nearest(options, nearest):
    with pytest.raises(UnknownNameError, match=f"did you mean.*'{nearest}'"):
        make_environment(f"metaworld/push-v3:{options}")


def test_name_is_split_into_base_and_options():
    assert parse_name("a/b") == ("a/b", {})
    assert parse_name("a/b:x=1,y=-2") == ("a/b", {"x": 1, "y": -2})


def test_missing_simulator_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "scd_robot\[sim\]"'):
        make_environment("metaworld/push-v3")


@pytest.mark.sim
class TestWithSimulator:
    def test_task_list_is_the_benchmarks(self):
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        assert sorted(ALL_V3_ENVIRONMENTS) == list(TASKS)

    @pytest.mark.parametrize("task", SOME_TASKS)
    def test_episode_is_a_function_of_the_seed_alone(self, task):
        used = MetaworldEnvironment(task)
        roll(used, 6, steps=50)
        start, numbers = roll(used, 5)
        fresh_start, fresh_numbers = roll(MetaworldEnvironment(task), 5)
        assert start == fresh_start
        np.testing.assert_array_equal(numbers, fresh_numbers)
        assert roll(used, 7)[0] != start

    def test_another_process_starts_from_the_same_state(self, push):
        code = (
            "from scd_robot.sim_eval.registry import make_environment\n"
            "environment = make_environment('metaworld/push-v3')\n"
            "environment.reset(11)\n"
            "print(environment.state_hash())"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        push.reset(11)
        assert done.stdout.strip() == push.state_hash()

    def test_start_states_of_recording_validation_and_evaluation_differ(self, push):
        hashes = []
        for domain in (RECORDING, VALIDATION, EVALUATION):
            for index in range(20):
                push.reset(derive_seed(domain, 0, index))
                hashes.append(push.state_hash())
        assert len(set(hashes)) == 60

    def test_observation_is_the_present_part_of_the_benchmarks_vector(self, push):
        push.reset(0)
        result = push.step(np.asarray([1, 0, 0, 1], np.float32))
        raw = push.raw_observation
        assert raw.shape == (39,)
        for key, part in (("proprio", raw[:4]), ("object", raw[4:18]), ("goal", raw[36:])):
            np.testing.assert_array_equal(result.observation[key], part.astype(np.float32))
            assert result.observation[key].dtype == np.float32
            assert result.observation[key].shape == push.spec.observation[key].shape
        assert not np.array_equal(raw[:4], raw[18:22])  # the previous frame is another one, and is left out

    @pytest.mark.parametrize("task", SOME_TASKS)
    def test_goal_is_visible_constant_and_different_between_seeds(self, task):
        environment = MetaworldEnvironment(task)
        first = environment.reset(1)["goal"]
        second = environment.reset(2)["goal"]
        after = environment.step(np.zeros(4, np.float32)).observation["goal"]
        assert np.abs(first).max() > 0.01
        assert not np.array_equal(first, second)
        np.testing.assert_array_equal(second, after)

    def test_goal_is_hidden_after_the_given_steps_and_shown_again_in_the_next_episode(self):
        environment = make_environment("metaworld/push-v3:goal_steps=2")
        for seed in (3, 4):
            goals = [environment.reset(seed)["goal"]]
            for _ in range(3):
                goals.append(environment.step(environment.expert_action()).observation["goal"])
            assert [bool(goal.any()) for goal in goals] == [True, True, False, False]
            assert environment.raw_observation[36:].any()

    def test_hiding_the_goal_changes_neither_physics_nor_expert(self, push):
        hidden = MetaworldEnvironment("push-v3", MetaworldOptions(goal_steps=0))
        push.reset(8)
        hidden.reset(8)
        for _ in range(30):
            action = push.expert_action()
            np.testing.assert_array_equal(action, hidden.expert_action())
            push.step(action)
            hidden.step(action)
        assert push.state_hash() == hidden.state_hash()

    def test_spec_states_canonical_name_rate_and_limits(self):
        environment = make_environment("metaworld/push-v3:max_steps=500,goal_steps=5")
        assert environment.spec.name == "metaworld/push-v3:goal_steps=5"
        assert make_environment("metaworld/push-v3:max_steps=500").spec.name == "metaworld/push-v3"
        assert environment.spec.control_dt == pytest.approx(1 / 80)
        assert environment.spec.max_steps == 500

    def test_episode_is_truncated_at_max_steps_and_not_stepped_further(self):
        environment = make_environment("metaworld/reach-v3:max_steps=3")
        environment.reset(0)
        action = np.zeros(4, np.float32)
        assert [environment.step(action).truncated for _ in range(3)] == [False, False, True]
        with pytest.raises(SimulatorError, match="truncated after 3 control steps"):
            environment.step(action)

    @pytest.mark.parametrize("task", ["push-v3", "door-open-v3", "assembly-v3"])
    def test_expert_succeeds(self, task):
        environment = MetaworldEnvironment(task)
        successes = [run_expert(environment, derive_seed(EVALUATION, 0, index)) for index in range(4)]
        assert sum(successes) >= 3

    def test_actions_are_clipped_and_reported_as_executed(self, push):
        push.reset(0)
        executed = push.step(np.asarray([3, -3, 0.5, 9], np.float32)).executed_action
        np.testing.assert_array_equal(executed, np.asarray([1, -1, 0.5, 1], np.float32))
        clipped_hash = push.state_hash()
        push.reset(0)
        push.step(executed)
        assert push.state_hash() == clipped_hash

    def test_bad_actions_are_refused_before_the_physics(self, push):
        push.reset(0)
        before = push.state_hash()
        with pytest.raises(ShapeError, match=r"must be \(4,\).*got \(3,\)"):
            push.step(np.zeros(3, np.float32))
        with pytest.raises(ScdRobotError, match="must be finite"):
            push.step(np.asarray([0, np.nan, 0, 0], np.float32))
        assert push.state_hash() == before

    def test_unstable_physics_is_an_error_and_the_next_reset_recovers(self, push, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # MuJoCo notes it in a file in the current folder
        push.reset(0)
        start = push.state_hash()
        push._env.data.qvel[:] = np.nan
        with pytest.raises(SimulatorError, match="became unstable in control step 0"):
            push.step(np.zeros(4, np.float32))
        with pytest.raises(SimulatorError, match=r"call reset\(seed\)"):
            push.step(np.zeros(4, np.float32))
        push.reset(0)
        assert push.state_hash() == start

    @pytest.mark.parametrize("task", ["push-v3", "peg-insert-side-v3"])
    def test_an_object_moved_by_hand_is_elsewhere_at_rest_and_nothing_else_has_changed(self, task):
        environment, offset = make_environment(f"metaworld/{task}"), np.array([0.05, -0.02, 0.0])
        environment.reset(3)
        before, hand = environment.positions["object"], environment.hand
        observation = environment.move_object(offset)
        np.testing.assert_allclose(environment.positions["object"], before + offset, atol=1e-9)
        np.testing.assert_allclose(observation["object"][:3], before + offset, atol=1e-6)
        np.testing.assert_array_equal(environment.hand, hand)
        after = environment.step(np.zeros(4, np.float32)).observation["object"][:3]
        np.testing.assert_allclose(after, before + offset, atol=1e-3)
        environment.close()

    def test_a_part_of_a_mechanism_is_not_moved_by_hand(self):
        environment = make_environment("metaworld/door-open-v3")
        environment.reset(3)
        state = environment.state_hash()
        with pytest.raises(ConfigError, match="cannot be moved by hand"):
            environment.move_object(np.array([0.05, 0.0, 0.0]))
        assert environment.state_hash() == state
        environment.close()

    def test_closing_twice_is_allowed(self):
        environment = MetaworldEnvironment("reach-v3")
        environment.reset(0)
        environment.close()
        environment.close()
        with pytest.raises(SimulatorError, match="no episode"):
            environment.expert_action()

    def test_frame_is_upright_and_drawing_it_changes_nothing(self, push):
        push.reset(0)
        before = push.state_hash()
        try:
            frame = push.render(64, 96)
        except ScdRobotError as error:
            pytest.skip(str(error))
        assert frame.shape == (64, 96, 3)
        assert frame.dtype == np.uint8
        assert push.state_hash() == before
        # The wooden table stands on the floor, so brown (red well above blue) lies in the lower half.
        brown = frame[..., 0].astype(int) - frame[..., 2] > 25
        rows, _ = np.nonzero(brown)
        assert rows.mean() > 32

    def test_with_pictures_the_only_vector_is_the_robots_own(self):
        environment = make_environment("metaworld/push-v3:observation=image,camera=corner4,image_size=48")
        assert environment.spec.name == "metaworld/push-v3:observation=image,camera=corner4,image_size=48"
        observation = environment.reset(3)
        assert {key: value.shape for key, value in observation.items()} == {"proprio": (4,), "image": (48, 48, 3)}
        state = make_environment("metaworld/push-v3")
        np.testing.assert_array_equal(observation["proprio"], state.reset(3)["proprio"])
        assert environment.state_hash() == state.state_hash()

    @pytest.mark.parametrize("task", ["push-v3", "sweep-v3", "reach-v3"])
    def test_a_picture_shows_the_goal_of_its_own_episode_from_the_first_one_on(self, task):
        used, fresh = (make_environment(f"metaworld/{task}:observation=image") for _ in range(2))
        used.reset(4)
        used.step(np.ones(4, np.float32))
        np.testing.assert_array_equal(used.reset(3)["image"], fresh.reset(3)["image"])
        sites = [fresh._env.data.site(name).xpos.copy() for name, _ in fresh._env._target_site_config]
        with fresh._goal_marked(True):
            for name, place in fresh._env._target_site_config:
                np.testing.assert_array_equal(fresh._env.data.site(name).xpos, place)
        for before, (name, _) in zip(sites, fresh._env._target_site_config, strict=True):
            np.testing.assert_array_equal(fresh._env.data.site(name).xpos, before)

    def test_a_hidden_goal_is_in_no_picture(self):
        shown, hidden = (make_environment(f"metaworld/push-v3:observation=image{end}") for end in ("", ",goal_steps=1"))
        green = []
        for environment in (shown, hidden):
            first = environment.reset(3)["image"]
            later = environment.step(np.zeros(4, np.float32)).observation["image"]
            green.append([bool((p[..., 1] > 60 + p[..., [0, 2]].max(-1).astype(int)).any()) for p in (first, later)])
        assert green == [[True, True], [True, False]]
        assert shown.state_hash() == hidden.state_hash()

    @pytest.mark.slow
    @pytest.mark.parametrize("task", TASKS)
    def test_every_task_is_repeatable_and_its_expert_knows_it(self, task):
        used = MetaworldEnvironment(task)
        roll(used, 6, steps=50)
        again = roll(used, 5)
        fresh = roll(MetaworldEnvironment(task), 5)
        assert again[0] == fresh[0]
        np.testing.assert_array_equal(again[1], fresh[1])
        assert any(run_expert(used, derive_seed(EVALUATION, 0, index)) for index in range(5))
