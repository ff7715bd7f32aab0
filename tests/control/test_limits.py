"""Limits: what they promise about every command, and that they do not get in the way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scd_robot.control import Limits, Workspace
from scd_robot.control.limits import Limiter
from scd_robot.errors import ActionError, ConfigError

INF = float("inf")
DT = 0.02


def limits(**options) -> Limits:
    given = {"low": (-1.0,), "high": (2.0,), "velocity": (3.0,), "acceleration": (10.0,), "rest": (None,)}
    return Limits(**{**given, **options})


targets = st.lists(st.one_of(st.none(), st.floats(-5, 5), st.sampled_from([np.nan, np.inf, 1e300])), max_size=60)


@settings(max_examples=200, deadline=None)
@given(
    targets,
    st.floats(0.01, 100),
    st.floats(0.01, 1000),
    st.floats(-1, 2),
    st.sampled_from([None, 0.0]),
)
def test_every_command_keeps_bounds_velocity_and_acceleration(targets, velocity, acceleration, pose, rest):
    limiter = Limiter(limits(velocity=(velocity,), acceleration=(acceleration,), rest=(rest,)), DT)
    limiter.start(np.array([pose]))
    commands = [limiter.last]
    for target in targets:
        commands.append(limiter.step(None if target is None else np.array([target])))
    positions = np.concatenate(commands)
    assert ((positions >= -1) & (positions <= 2)).all()
    change = np.diff(positions, prepend=positions[0])
    assert np.abs(change).max() <= velocity * DT + 1e-9
    assert np.abs(np.diff(change, prepend=0)).max() <= acceleration * DT**2 + 1e-9


@pytest.mark.parametrize("rest", [None, 0.25])
def test_braking_ends_at_a_standstill_within_the_time_that_acceleration_needs(rest):
    limiter = Limiter(limits(rest=(rest,)), DT)
    limiter.start(np.array([-1.0]))
    for _ in range(20):
        limiter.step(np.array([2.0]))
    assert not limiter.still
    for _ in range(60):
        limiter.step(None)
    assert limiter.still
    if rest is not None:
        assert limiter.last == pytest.approx([rest])


def test_a_target_is_reached_without_overshoot_and_stays():
    limiter = Limiter(limits(), DT)
    limiter.start(np.array([0.0]))
    path = [limiter.step(np.array([1.0]))[0] for _ in range(100)]
    assert max(path) <= 1.0 + 1e-12
    assert path[-1] == pytest.approx(1.0)
    assert (np.diff(path) >= -1e-12).all()


def test_targets_within_wide_limits_pass_unchanged():
    limiter = Limiter(Limits.of_box((-1.0, -1.0), (1.0, 1.0)), DT)
    limiter.start(np.zeros(2))
    for target in np.random.default_rng(0).uniform(-1, 1, (20, 2)):
        np.testing.assert_allclose(limiter.step(target), target, atol=1e-11)


def test_the_hand_stays_in_its_workspace_also_while_braking():
    arm = Workspace((-0.5,), (0.5,), lambda command: np.sin(command[:1]))
    limiter = Limiter(limits(high=(3.0,), workspace=arm), DT)
    limiter.start(np.array([0.0]))
    hands = [np.sin(limiter.step(np.array([3.0]))[0]) for _ in range(100)]
    assert max(hands) <= 0.5
    assert max(hands) > 0.45, "it goes near the border"


@pytest.mark.parametrize("pose", [None, np.array([np.nan]), np.array([2.1]), np.zeros(2)])
def test_a_pose_from_which_no_command_is_within_limits_is_refused(pose):
    with pytest.raises(ActionError, match="robot"):
        Limiter(limits(), DT).start(pose)


@pytest.mark.parametrize(
    "wrong",
    [
        {"high": (-1.0,)},
        {"high": (INF,)},
        {"velocity": (0.0,)},
        {"velocity": (1.0, 1.0)},
        {"rest": (5.0,)},
        {"rest": (0.0,), "workspace": Workspace((0.0,), (1.0,), lambda command: command)},
    ],
)
def test_contradictory_limits_are_refused(wrong):
    with pytest.raises(ConfigError):
        limits(**wrong)
