"""gymnasium-robotics and gym-aloha behind the door of evaluation."""

import numpy as np
import pytest

from scd_robot.errors import ActionError, ConfigError, ShapeError, SimulatorError, UnknownNameError
from scd_robot.sim_eval import make_environment
from scd_robot.sim_eval.gymnasium_tasks import TASKS, _succeeded

pytestmark = pytest.mark.sim
QUICK = [task for task in TASKS if not task.startswith("Aloha")]


@pytest.fixture(autouse=True)
def _needs_the_packages():
    pytest.importorskip("gymnasium_robotics", reason='pip install "scd_robot[robotics]"')
    pytest.importorskip("gym_aloha", reason='pip install "scd_robot[robotics]"')


@pytest.mark.parametrize("task", [*QUICK, "AlohaTransferCube-v0"])
def test_an_episode_follows_from_its_seed(task):
    environment = make_environment(f"gymnasium/{task}:max_steps=3")
    found = []
    for seed in (3, 4, 3):
        observation = environment.reset(seed)
        hashed = environment.state_hash()
        action = np.full(environment.spec.action_dim, 9, np.float32)
        results = [environment.step(action) for _ in range(3)]
        found.append((hashed, observation, results[-1].observation))
        assert [result.truncated for result in results] == [False, False, True]
        np.testing.assert_array_equal(results[0].executed_action, np.float32(environment.spec.action_high))
    assert found[0][0] == found[2][0] != found[1][0]
    for key, spec in environment.spec.observation.items():
        for i in (1, 2):
            assert (found[0][i][key].shape, str(found[0][i][key].dtype)) == (spec.shape, spec.dtype)
            np.testing.assert_array_equal(found[0][i][key], found[2][i][key])
    assert environment.render(48, 64).shape == (48, 64, 3)
    with pytest.raises(SimulatorError, match="truncated after 3"):
        environment.step(action)
    with pytest.raises(ConfigError, match="no scripted expert"):
        environment.expert_action()
    environment.close()


def test_aloha_has_a_picture_where_it_is_asked_for():
    environment = make_environment("gymnasium/AlohaInsertion-v0:observation=image")
    assert environment.reset(0)["pixels.top"].shape == (480, 640, 3)
    assert environment.spec.observation["pixels.top"].dtype == "uint8"


@pytest.mark.parametrize("task", ["AlohaInsertion-v0", "AlohaTransferCube-v0"])
def test_aloha_can_be_held_where_episodes_begin_and_moved_as_in_demonstrations(task):
    environment = make_environment(f"gymnasium/{task}")
    start = environment.reset(0)["agent_pos"]
    results = [environment.step(start) for _ in range(50)]
    np.testing.assert_array_equal(results[-1].executed_action, start)
    np.testing.assert_allclose(results[-1].observation["agent_pos"], start, atol=0.02)
    low, high = np.array(environment.spec.action_low), np.array(environment.spec.action_high)
    elbows, grippers = [2, 9], [6, 13]
    assert (high[elbows] > 1.18).all()  # a human's, in the published demonstrations
    assert np.column_stack([low, high])[grippers].tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("task", "key", "place"),
    [("FetchReach-v4", "achieved_goal", slice(0, 3)), ("AdroitHandDoor-v1", "state", slice(29, 32))],
)
def test_the_hand_is_where_the_benchmark_sees_it(task, key, place):
    environment = make_environment(f"gymnasium/{task}")
    first = environment.reset(0)
    np.testing.assert_allclose(environment.hand, first[key][place], atol=1e-6)
    for _ in range(3):
        result = environment.step(np.array(environment.spec.action_high, np.float32))
        np.testing.assert_allclose(environment.hand, result.observation[key][place], atol=1e-6)


def test_bad_actions_and_options():
    environment = make_environment("gymnasium/FetchReach-v4")
    with pytest.raises(SimulatorError, match=r"call reset\(seed\) first"):
        environment.step(np.zeros(4, np.float32))
    environment.reset(0)
    with pytest.raises(ShapeError, match=r"must be \(4,\)"):
        environment.step(np.zeros(3, np.float32))
    with pytest.raises(ActionError, match="must be finite"):
        environment.step(np.full(4, np.nan, np.float32))
    for options, error, message in (
        ("max_step=3", UnknownNameError, "did you mean 'max_steps'"),
        ("max_steps=x", ConfigError, "whole number"),
        ("observation=image", ConfigError, "its state only"),
        ("observation=pixels", UnknownNameError, "'pixels'"),
    ):
        with pytest.raises(error, match=message):
            make_environment(f"gymnasium/FetchReach-v4:{options}")


@pytest.mark.parametrize(
    ("task", "info", "expected"),
    [
        ("FetchPush-v4", {"is_success": 1.0}, True),
        ("FetchPush-v4", {"is_success": 0.0}, False),
        ("AdroitHandDoor-v1", {"success": True}, True),
        ("FrankaKitchen-v1", {"episode_task_completions": ["microwave", "kettle", "light switch"]}, False),
        (
            "FrankaKitchen-v1",
            {"episode_task_completions": ["slide cabinet", "microwave", "kettle", "light switch"]},
            True,
        ),
    ],
)
def test_success_is_the_benchmarks_own(task, info, expected):
    assert _succeeded(task, info) is expected
