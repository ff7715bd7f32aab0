"""What every policy of the registry keeps to."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from eager_graphs import eager_export
from small_policies import small_policy

from scd_robot.errors import ConfigError, ShapeError, UnknownNameError
from scd_robot.policies.inputs import FarInputs
from scd_robot.policies.registry import POLICIES, policy_class
from scd_robot.types import GivenActions, Policy, PolicySpec, RunningChunk


@pytest.fixture(params=sorted(POLICIES))
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """A function that makes a small policy for the tiny dataset; each type has its fixture `NAME_policy`."""
    return request.getfixturevalue(f"{request.param}_policy")


def act_all(policy, observations, **reset):
    policy.reset(**reset)
    return np.stack([policy.act(observation) for observation in observations])


def test_it_is_a_policy(make) -> None:
    policy = make()
    assert isinstance(policy, Policy)
    assert isinstance(policy.spec, PolicySpec)
    assert 1 <= policy.spec.num_executed <= policy.spec.chunk_length
    assert all(callable(getattr(policy, name)) for name in ("observe", "plan", "drain_timings"))


def test_actions_are_float32_finite_and_one_per_row(make, stream) -> None:
    for rows in (1, 3):
        actions = act_all(make(), stream(rows, 7))
        assert (actions.shape, actions.dtype) == ((7, rows, 2), np.float32)
        assert np.isfinite(actions).all()


def test_the_same_episode_again_gives_the_same_actions(make, stream) -> None:
    policy, observations = make(), stream(2, 9)
    first = act_all(policy, observations, episodes=[4, 5])
    np.testing.assert_array_equal(act_all(policy, observations, episodes=[4, 5]), first)
    assert (act_all(policy, observations, episodes=[6, 7]) != first).any()


def test_episodes_are_counted_on_where_none_are_given(make, stream) -> None:
    """However a row is reset: a robot that begins a new episode does not repeat the noise of the last one."""
    observations = stream(1, 3)
    expected = [act_all(make(), observations, episodes=[number]) for number in range(3)]
    policy = make()
    np.testing.assert_array_equal(act_all(policy, observations), expected[0])
    np.testing.assert_array_equal(act_all(policy, observations), expected[1])
    policy.reset(rows=[0])
    np.testing.assert_array_equal([policy.act(observation) for observation in observations], expected[2])


def test_a_row_that_is_reset_forgets_and_the_others_do_not(make, stream) -> None:
    policy, observations = make(), stream(2, 12)
    whole = act_all(policy, observations, episodes=[0, 1])
    fresh = act_all(make(), [{k: v[1:] for k, v in o.items()} for o in observations[5:]], episodes=[9])
    policy.reset(episodes=[0, 1])
    for step, observation in enumerate(observations):
        if step == 5:
            policy.reset(rows=[1], episodes=[9])
        action = policy.act(observation)
        np.testing.assert_allclose(action[0], whole[step, 0], atol=1e-5)
        np.testing.assert_allclose(action[1], whole[step, 1] if step < 5 else fresh[step - 5, 0], atol=1e-5)


def test_observations_are_not_changed_and_other_keys_are_ignored(make, stream) -> None:
    observations = stream(2, 5)
    copies = [{key: value.copy() for key, value in observation.items()} for observation in observations]
    expected = act_all(make(), observations)
    for observation, copy in zip(observations, copies, strict=True):
        for key, value in copy.items():
            np.testing.assert_array_equal(observation[key], value)
    more = [{**observation, "camera": np.full((2, 4, 4, 3), 255, np.uint8)} for observation in observations]
    np.testing.assert_array_equal(act_all(make(), more), expected)


def test_float64_and_integers_are_accepted(make, stream) -> None:
    observations = stream(2, 5)
    wide = [{key: value.astype(np.float64) for key, value in observation.items()} for observation in observations]
    np.testing.assert_array_equal(act_all(make(), wide), act_all(make(), observations))
    whole = {"position": np.zeros((2, 2), np.int64), "goal": np.ones((2, 2), np.int64)}
    floats = {key: value.astype(np.float32) for key, value in whole.items()}
    np.testing.assert_array_equal(make().act(whole), make().act(floats))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"goal": None}, r"'goal' is missing; got \['position'\]"),
        ({"goal": np.zeros((3, 5))}, r"'goal' must be \(B, 2\).*got \(3, 5\)"),
        ({"goal": np.zeros((2, 2))}, r"'goal' must be \(B, 2\) with one B.*got \(2, 2\)"),
        ({"goal": np.zeros(2)}, r"'goal' must be .*got \(2,\)"),
        ({"goal": np.zeros((3, 1, 2))}, r"'goal' must be .*got \(3, 1, 2\)"),
        ({"goal": np.float32(0)}, r"'goal' must be .*got \(\)"),
        ({"goal": np.array([[0, 0], [0, np.nan], [0, 0]])}, "'goal' holds a NaN or infinite value in row 1"),
        ({"goal": np.array([[0, 0], [0, 0], [-np.inf, 0]])}, "'goal' holds a NaN or infinite value in row 2"),
        ({"goal": np.array([[1e300, 0], [0, 0], [0, 0]])}, "'goal' holds a NaN or infinite value in row 0"),
        ({"goal": np.full((3, 2), "far")}, "'goal' must hold numbers"),
        ({"goal": np.zeros((0, 2)), "position": np.zeros((0, 2))}, r"B >= 1 .*got \(0, 2\)"),
    ],
)
def test_observation_that_does_not_fit_is_refused_and_changes_nothing(make, stream, change, told) -> None:
    observations = stream(3, 4)
    expected = act_all(make(), observations)
    policy = make()
    bad = {key: value for key, value in {**observations[1], **change}.items() if value is not None}
    with pytest.raises(ShapeError, match=told):
        policy.act(bad)
    actions = []
    for observation in observations:
        actions.append(policy.act(observation))
        with pytest.raises(ShapeError, match=told):
            policy.act(bad)
    np.testing.assert_array_equal(actions, expected)


def test_another_batch_size_needs_a_reset(make, stream) -> None:
    policy = make()
    policy.act(stream(3, 1)[0])
    with pytest.raises(ShapeError, match=r"batch has 2 rows, the policy runs 3; call reset\(\)"):
        policy.act(stream(2, 1)[0])
    policy.reset()
    assert policy.act(stream(2, 1)[0]).shape == (2, 2)


@pytest.mark.parametrize(
    ("executed", "told"),
    [
        (np.zeros((2, 3)), r"executed_action must be \(2, 2\), got \(2, 3\)"),
        (np.zeros(2), r"executed_action must be \(2, 2\), got \(2,\)"),
        (np.array([[0, 0], [np.nan, 0]]), "executed_action holds a NaN or infinite value in row 1"),
    ],
)
def test_executed_action_that_does_not_fit_is_refused(make, stream, executed, told) -> None:
    policy = make()
    with pytest.raises(ShapeError, match=told):
        policy.act(stream(2, 1)[0], executed)
    assert policy.act(stream(3, 1)[0]).shape == (3, 2)  # a refused first observation does not fix the batch size


def test_resets_that_do_not_fit_are_refused(make, stream) -> None:
    policy = make()
    policy.act(stream(2, 1)[0])
    for rows in ([2], [-1], [0, 5]):
        with pytest.raises(ShapeError, match="out of range for a batch of 2"):
            policy.reset(rows=rows)
    with pytest.raises(ShapeError, match="2 rows begin new episodes, got 1"):
        policy.reset(rows=[0, 1], episodes=[3])
    policy.reset(rows=[])
    policy.reset(episodes=[1, 2, 3])
    with pytest.raises(ShapeError, match="given 3 episodes, the observation has 2 rows"):
        policy.act(stream(2, 1)[0])


@pytest.mark.parametrize("rows", [1, 40])
def test_number_of_torch_threads_is_left_alone(make, stream, rows) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        policy = make()
        policy.act(stream(rows, 1)[0])
        assert torch.get_num_threads() == 2
        with pytest.raises(ShapeError):
            policy.act({})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_timings_are_handed_over_once(make, stream) -> None:
    policy = make(num_executed=2)
    act_all(policy, stream(1, 5))
    timings = policy.drain_timings()
    assert {name: len(values) for name, values in timings.items()} == {"encoder_ms": 5, "plan_ms": 3, "plan_rows": 3}
    assert all(value > 0 for values in timings.values() for value in values)
    assert policy.drain_timings() == {"encoder_ms": [], "plan_ms": [], "plan_rows": []}


def test_unknown_type_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'scd'"):
        policy_class("sdc")


def test_a_plan_from_a_snapshot_is_the_plan_of_then(make, stream) -> None:
    """However the history goes on meanwhile: so a control loop plans beside its observations."""
    acting, beside = make(), make()
    observations = stream(2, 12)
    for step, observation in enumerate(observations):
        acting.observe(observation)
        beside.observe(observation)
        assert beside.may_plan
        if step != 5:
            continue
        prefix = np.full((2, 2, 2), 0.25, np.float32)
        for committed in (None, prefix):
            expected, given = acting.plan(committed), beside.snapshot()
            for later in observations[6:]:
                beside.observe(later)
            np.testing.assert_allclose(beside.plan_from(given, committed), expected, atol=1e-6)
            beside.reset(episodes=[0, 1])
            for earlier in observations[:6]:
                beside.observe(earlier)
            beside.snapshot()  # as acting has made a plan
        break


@pytest.mark.parametrize("exact", [True, False])
def test_a_plan_may_be_guided_towards_the_running_chunk(make, stream, exact) -> None:
    policy = make(sampler={"solver": "euler", "num_denoising_steps": 5})
    for observation in stream(2, 3):
        policy.observe(observation)
    given = policy.snapshot()
    free = policy.plan_from(given)
    goal = free[:, :3] + 3.0
    guided = policy.plan_from(given, running=RunningChunk(goal, 2, exact=exact))
    assert guided.dtype == np.float32
    assert np.square(guided[:, :2] - goal[:, :2]).mean() < np.square(free[:, :2] - goal[:, :2]).mean()
    np.testing.assert_array_equal(policy.plan_from(given), free)
    with pytest.raises(ShapeError, match="running chunk"):
        policy.plan_from(given, running=RunningChunk(goal[:1], 2))
    with pytest.raises(ConfigError, match="at least 9 denoising steps"):
        policy.check_guidance(9.0)


def test_given_numbers_are_in_the_plan_and_the_rest_knows_them(make, stream) -> None:
    policy = make()
    for observation in stream(2, 3):
        policy.observe(observation)
    given, length = policy.snapshot(), policy.spec.chunk_length
    mask = np.zeros((length, 2), bool)
    mask[:, 1] = True
    actions = np.full((2, length, 2), np.nan, np.float32)  # only what is held is read
    actions[..., 1] = 0.25
    free, fixed = policy.plan_from(given), policy.plan_from(given, fixed=GivenActions(actions, mask))
    np.testing.assert_array_equal(fixed[..., 1], 0.25)
    assert np.abs(fixed[..., 0] - free[..., 0]).max() > 1e-3
    with pytest.raises(ShapeError, match="given actions must be"):
        policy.plan_from(given, fixed=GivenActions(actions, mask[1:]))


def test_each_snapshot_has_noise_of_its_own_and_planning_changes_nothing(make, stream) -> None:
    policy = make()
    assert not policy.may_plan
    policy.observe(stream(1, 1)[0])
    first, second = policy.snapshot(), policy.snapshot()
    chunk = policy.plan_from(first)
    assert (policy.plan_from(second) != chunk).any()
    np.testing.assert_array_equal(policy.plan_from(first), chunk)
    assert 1 <= policy.max_prefix < policy.spec.chunk_length
    policy.reset()
    assert not policy.may_plan


def test_histories_that_come_and_go_act_as_rows_that_stay(make, stream) -> None:
    """Released and resumed in other batches, in another order, and with control steps that somebody else skipped."""
    policy, observations = make(), stream(3, 10)
    whole = act_all(policy, observations, episodes=[0, 1, 2])
    policy.reset()
    histories = [policy.new_history(episode) for episode in range(3)]
    for step, observation in enumerate(observations):
        for group in ([2, 0], [1]) if step % 3 else ([0, 1, 2],):
            policy.resume([histories[row] for row in group])
            actions = policy.act({key: value[group] for key, value in observation.items()})
            for row, history in zip(group, policy.release(), strict=True):
                histories[row] = history
            np.testing.assert_allclose(actions, whole[step, group], atol=1e-5)
    assert policy.release() == []
    kept = histories[0].select([0])
    histories[0].skip(3)
    assert (histories[0].position.tolist(), kept.position.tolist()) == ([13], [10])
    assert histories[0].cache.position.tolist() == [13]


def test_a_plan_for_some_rows_leaves_the_others_alone(make, stream) -> None:
    observations = stream(3, 2)
    policy, other = make(), make()
    for one in (policy, other):
        one.reset(episodes=[0, 1, 2])
        one.observe(observations[0])
    everything, some = policy.plan(), other.plan(rows=[0, 2])
    np.testing.assert_allclose(some, everything[[0, 2]], atol=1e-5)
    for rows in ([2, 0], [1, 1]):
        with pytest.raises(ConfigError, match="ascending"):
            other.plan(rows=rows)
    np.testing.assert_allclose(other.plan(rows=[1]), everything[[1]], atol=1e-5)


@pytest.mark.parametrize("exported", [False, True])
def test_what_is_far_from_the_training_is_told_once(exported, stream, caplog):
    policy = eager_export(small_policy(), 2) if exported else small_policy()
    seen = stream(2, 4)
    least, most = (np.array(end) for end in small_policy().normalizer.ranges()["position"])
    policy.act(seen[0])
    edge = {**seen[1], "position": np.stack([most + 9 * (most - least), least - 9 * (most - least)])}
    policy.act({name: np.asarray(value, np.float32) for name, value in edge.items()})
    assert "in training it was" not in caplog.text
    degrees = {**seen[2], "position": np.array([[0, 0], [0, 57]], np.float32)}
    policy.act(degrees)
    policy.act(degrees)
    assert caplog.text.count("observation 'position', dimension 1, is 57 in row 1; in training it was") == 1


def test_numbers_that_never_moved_in_training_are_told_once_where_they_are_others(caplog):
    far = FarInputs({"state": ((0.0, 1.0), (0.0, 1.0 + 1e-9))})
    far.look({"state": np.array([[0.0, 1.005]])}, {})
    assert caplog.text == ""
    for _ in range(2):
        far.look({"state": np.array([[0.0, -100.0]])}, {})
    assert caplog.text.count("dimension 1, is -100 in row 0; in training it was always 1: the model") == 1
    caplog.clear()
    far = FarInputs({"state": ((0.0, -1.0), (0.0, 1.0))})
    far.look({"state": np.array([[0.0, 100.0]])}, {"state": False})
    assert caplog.text == ""
    far.look({"state": np.array([[0.0, 100.0]])}, {})
    assert "dimension 1, is 100 in row 0; in training it was -1 to 1" in caplog.text
