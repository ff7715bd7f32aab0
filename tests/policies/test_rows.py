"""Rows that reset, pause or never planned: nothing of an old episode, and nothing invented, reaches the model."""

import copy

import numpy as np
import pytest
import torch

from scd_robot.errors import ActionError, ConfigError, ShapeError

READS_PAST = {"model": {"past_action_input": "full", "num_past_actions": 0}}


def contexts_of(policy, observations, **options) -> list[torch.Tensor]:
    seen = []
    for observation in observations:
        policy.observe(observation, **options)
        seen.append(policy._context.clone())
    return seen


def test_an_unknown_past_action_is_absent_and_not_zero(scd_policy, stream) -> None:
    observations = stream(2, 3)
    silent = contexts_of(scd_policy(**READS_PAST), observations)
    told = contexts_of(scd_policy(**READS_PAST), observations, executed_action=np.zeros((2, 2), np.float32))
    assert torch.equal(silent[0], told[0]), "the first step has no action before it"
    assert (silent[1] - told[1]).abs().max() > 1e-3
    model = scd_policy(**READS_PAST)
    normalised = {
        key: model.normalizer.normalize(key, torch.as_tensor(np.stack([o[key] for o in observations], 1)))
        for key in model.spec.observation
    }
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    with torch.no_grad():
        expected = model.model.encode(normalised, torch.zeros(2, 3, 2), past_action_valid=nothing)
    torch.testing.assert_close(torch.stack(silent, 1), expected, atol=1e-5, rtol=0)


def test_a_reset_row_knows_nothing_of_its_old_episode(scd_policy, stream) -> None:
    observations = stream(2, 6)
    used = scd_policy(**READS_PAST)
    for observation in observations[:3]:
        used.act(observation)
    used.reset(rows=[1], episodes=[7])
    fresh = scd_policy(**READS_PAST)
    fresh.reset(episodes=[0, 7])
    for old, new in zip(contexts_of(used, observations[3:]), contexts_of(fresh, observations[3:]), strict=True):
        torch.testing.assert_close(old[1], new[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_plan_for_a_row_that_has_not_observed_since_its_reset_is_refused(scd_policy, stream, stride) -> None:
    policy = scd_policy({"history_stride": stride}, num_executed=2)
    first, second = stream(2, 2)
    policy.observe(first)
    policy.reset(rows=[1])
    with pytest.raises(ConfigError, match=r"observation of rows \[1\] first"):
        policy.plan()
    policy.observe(second)
    assert policy.plan(rows=[1]).shape == (1, 4, 2)


def test_rows_may_be_given_as_a_mask(scd_policy, stream) -> None:
    policy = scd_policy()
    policy.act(stream(3, 1)[0])
    policy.reset(rows=np.array([False, True, False]))
    assert policy._rows.position.tolist() == [1, 0, 1]
    with pytest.raises(ShapeError, match=r"numbers or a mask \(3,\)"):
        policy.reset(rows=np.array([False, True]))
    with pytest.raises(ConfigError, match="must not be negative"):
        policy.reset(rows=[0], episodes=[-1])


def test_a_reset_cures_a_row_whose_history_overflowed(scd_policy, stream) -> None:
    policy = scd_policy()
    observation = stream(2, 1)[0]
    huge = {key: np.where([[False], [True]], np.float32(1e30), value) for key, value in observation.items()}
    with pytest.raises(ActionError, match="row 1"):
        policy.act(huge)
    policy.reset(rows=[1], episodes=[5])
    fresh = scd_policy()
    fresh.reset(episodes=[5])
    for _ in range(6):
        action = policy.act(observation)
        expected = fresh.act({key: value[1:] for key, value in observation.items()})
        np.testing.assert_allclose(action[1:], expected, atol=1e-5)


def test_guidance_draws_its_corruption_once_per_plan(scd_policy, stream) -> None:
    policy = scd_policy(guidance_scale=1.5, model={"context_corruption": 0.1})
    prepared = []
    prepare = policy.model.decoder.prepare
    policy.model.decoder.prepare = lambda context: prepared.append(context.clone()) or prepare(context)
    policy.act(stream(2, 1)[0])
    clean, corrupted = prepared
    assert (corrupted - clean).square().mean().sqrt().item() == pytest.approx(0.1, rel=0.3)


def test_plans_take_rows_as_numbers_or_as_a_mask(scd_policy, stream) -> None:
    first, second = scd_policy(), scd_policy()
    for policy in (first, second):
        policy.observe(stream(3, 1)[0])
    np.testing.assert_array_equal(first.plan(rows=[1, 2]), second.plan(rows=np.array([False, True, True])))
    for rows in ([3], [-1], [True]):
        with pytest.raises(ShapeError, match="rows"):
            first.plan(rows=rows)


def test_a_step_that_fails_has_not_been(scd_policy, stream, monkeypatch) -> None:
    expected, policy = scd_policy(), scd_policy()
    observations, executed = stream(2, 4), np.random.default_rng(0).uniform(-1, 1, (4, 2, 2)).astype(np.float32)
    for step, observation in enumerate(observations):
        action = expected.act(observation, executed[step])
        with monkeypatch.context() as patch:
            patch.setattr(policy, "_encode", lambda *arguments: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                policy.act(observation, executed[step])
        np.testing.assert_array_equal(policy.act(observation, executed[step]), action)


def test_a_plan_between_encoder_steps_is_one_of_the_earlier_step(scd_policy, stream) -> None:
    """Its second action is for the second control step, and the next plan comes with the encoder again."""
    [first, second, third] = stream(1, 3)
    model = {"history_stride": 2}
    policy = scd_policy(model)
    policy.observe(first)
    chunk = policy.plan()
    policy = scd_policy(model)
    policy.observe(first)
    np.testing.assert_array_equal(policy.act(second), chunk[:, 1])
    policy.act(third)
    assert policy.planned.all()


@pytest.mark.parametrize("kind", ["scd_policy", "causal_dit_policy"])
def test_a_policy_that_has_acted_can_be_copied(kind, stream, request) -> None:
    policy = request.getfixturevalue(kind)()
    [first, second] = stream(1, 2)
    policy.act(first)
    np.testing.assert_array_equal(copy.deepcopy(policy).act(second), policy.act(second))
