"""Control steps survive their way to a worker and back, bit by bit."""

import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from scd_robot.errors import ConfigError, ScdRobotError, ShapeError
from scd_robot.sim_eval.messages import StepCodec, checked_observation, checked_result, receive_message
from scd_robot.types import ArraySpec, EnvironmentSpec, StepResult

KEYS = {
    "state": ArraySpec((3,)),
    "exact": ArraySpec((2, 2), "float64"),
    "image": ArraySpec((4, 5, 3), "uint8"),
    "number": ArraySpec((), "float32"),
}
SPEC = EnvironmentSpec("toy", KEYS, 2, (-1.0, -1.0), (1.0, 1.0), 0.05, 10, "never")
CODEC = StepCodec(SPEC)
RESULT = StepResult(
    observation={key: np.ones(spec.shape, spec.dtype) for key, spec in KEYS.items()},
    reward=0.25,
    success=False,
    terminated=False,
    truncated=False,
    executed_action=np.zeros(2, np.float32),
)


def assert_equal(steps, i, sent):
    assert list(steps.observation) == list(KEYS)
    for key, array in sent.observation.items():
        found = steps.observation[key][i]
        assert (found.shape, found.dtype) == (array.shape, array.dtype)
        assert found.tobytes() == array.tobytes()
    assert steps.executed_action[i].tobytes() == sent.executed_action.tobytes()
    for name in ("reward", "success", "terminated", "truncated"):
        np.testing.assert_equal(getattr(steps, name)[i], getattr(sent, name))
    np.testing.assert_equal(steps.info[i], sent.info)


@given(st.data())
def test_results_arrive_as_they_were(data):
    values = {key: data.draw(arrays.arrays(spec.dtype, spec.shape)) for key, spec in KEYS.items()}
    shuffled = {key: values[key] for key in data.draw(st.permutations(list(values)))}
    sent = StepResult(
        observation=shuffled,
        reward=data.draw(st.floats()),
        success=data.draw(st.booleans()),
        terminated=np.bool_(data.draw(st.booleans())),
        truncated=data.draw(st.booleans()),
        executed_action=data.draw(arrays.arrays(np.float32, (2,))),
        info=data.draw(st.sampled_from([{}, {"hand": np.arange(3.0), "completed": True}])),
    )
    steps = CODEC.unpack_results(CODEC.pack_results([RESULT, sent, RESULT]))
    for i, result in enumerate([RESULT, sent, RESULT]):
        assert_equal(steps, i, result)


def test_information_travels_without_arrays():
    """A pickled array of numpy 1 warns, or fails, where numpy 2 reads it; workers may have either."""
    told = {"hand": np.array([0.1, -1e300]), "completed": np.True_, "note": "near"}
    message = CODEC.pack_results([replace(RESULT, info=told)])
    assert b"numpy" not in message
    assert CODEC.unpack_results(message).info == [{"hand": [0.1, -1e300], "completed": True, "note": "near"}]


def test_actions_arrive_as_they_were():
    actions = np.array([[0.5, np.nan], [1.0, -np.inf]], np.float32)
    slots, found = CODEC.unpack_actions(CODEC.pack_actions([2, 300], actions))
    assert slots == [2, 300]
    np.testing.assert_array_equal(found, actions)


@pytest.mark.parametrize(
    ("observation", "got"),
    [
        ({**RESULT.observation, "state": np.ones(4, np.float32)}, r"'state' as float32 \(3,\) but gave float32 \(4,\)"),
        ({**RESULT.observation, "image": np.ones((4, 5, 3))}, r"'image' as uint8 \(4, 5, 3\) but gave float64"),
        ({"state": RESULT.observation["state"]}, "'exact' as float64 .* but gave only state"),
    ],
    ids=["shape", "kind", "key"],
)
def test_what_does_not_keep_to_the_specification_is_refused(observation, got):
    with pytest.raises(ShapeError, match=got):
        CODEC.pack_results([RESULT, replace(RESULT, observation=observation)])


def test_gymnasiums_pair_is_no_observation():
    with pytest.raises(ConfigError, match=r"as a dictionary of arrays, got tuple; .*without gymnasium's info"):
        checked_observation((RESULT.observation, {}), SPEC)


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ((RESULT.observation, 0.0, False, False, {}), "must return a scd_robot.types.StepResult, got tuple"),
        (replace(RESULT, success=None), "success .* must be True or False, got None"),
        (replace(RESULT, reward=np.array([0.5])), r"reward .* must be a number, got array\(\[0.5\]\)"),
        (replace(RESULT, executed_action=None), r"must be the \(2,\) action that was applied .*, got object \(\)"),
        (replace(RESULT, executed_action=np.zeros(3)), r"must be the \(2,\) action .*, got float64 \(3,\)"),
    ],
    ids=["tuple", "success", "reward", "no action", "width"],
)
def test_what_is_no_result_of_a_step_is_refused(result, told):
    with pytest.raises(ScdRobotError, match=told):
        checked_result(result, SPEC)


def test_numbers_and_lists_will_do_in_a_result():
    told = replace(RESULT, reward=np.float32(1), success=np.float64(1), truncated=0, executed_action=[0.0, 1.0])
    assert checked_result(told, SPEC) is told


def test_numbers_of_another_precision_are_converted():
    exact = {**RESULT.observation, "state": np.array([0.1, 0.2, 0.3])}
    steps = CODEC.unpack_results(CODEC.pack_results([replace(RESULT, observation=exact)]))
    np.testing.assert_array_equal(steps.observation["state"][0], np.array([0.1, 0.2, 0.3], np.float32))


def test_packed_and_pickled_messages_are_told_apart():
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        theirs.send(("ok", [1, 2]))
        assert receive_message(ours) == ("ok", [1, 2])
        theirs.send_bytes(CODEC.pack_results([RESULT]))
        assert_equal(CODEC.unpack_results(receive_message(ours)), 0, RESULT)
