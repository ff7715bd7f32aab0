"""Control steps survive their way to a worker and back, bit by bit."""

import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from scd_robot.sim_eval.messages import StepCodec, receive_message
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


def assert_equal(ours, theirs):
    assert list(ours.observation) == list(KEYS)
    for key, array in theirs.observation.items():
        assert (ours.observation[key].shape, ours.observation[key].dtype) == (array.shape, array.dtype)
        assert ours.observation[key].tobytes() == array.tobytes()
    assert ours.executed_action.tobytes() == theirs.executed_action.tobytes()
    for name in ("reward", "success", "terminated", "truncated"):
        np.testing.assert_equal(getattr(ours, name), getattr(theirs, name))
    np.testing.assert_equal(ours.info, theirs.info)


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
    message = CODEC.pack_result(sent)
    found = CODEC.unpack_result(message)
    assert_equal(found, sent)
    found.observation["state"][:] = 0  # they may be written to


def test_actions_arrive_as_they_were():
    action = np.array([0.5, np.nan], np.float32)
    np.testing.assert_array_equal(CODEC.unpack_action(CODEC.pack_action(action)), action)


@pytest.mark.parametrize(
    "result",
    [
        replace(RESULT, observation={**RESULT.observation, "state": np.ones(3)}),
        replace(RESULT, observation={**RESULT.observation, "state": np.ones(4, np.float32)}),
        replace(RESULT, observation={**RESULT.observation, "state": [1.0, 1.0, 1.0]}),
        replace(RESULT, observation={**RESULT.observation, "more": np.ones(3)}),
        replace(RESULT, observation={"state": RESULT.observation["state"]}),
        replace(RESULT, executed_action=np.zeros(2)),
    ],
    ids=["dtype", "shape", "list", "another key", "a key less", "action"],
)
def test_what_does_not_keep_to_the_specification_is_left_to_pickle(result):
    assert CODEC.pack_result(RESULT) is not None
    assert CODEC.pack_result(result) is None


@pytest.mark.parametrize("action", [np.zeros(3, np.float32), np.zeros(2), [0.0, 0.0]])
def test_other_actions_are_left_to_pickle(action):
    assert CODEC.pack_action(action) is None


def test_packed_and_pickled_messages_are_told_apart():
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        theirs.send(("ok", [1, 2]))
        assert receive_message(ours) == ("ok", [1, 2])
        theirs.send_bytes(CODEC.pack_result(RESULT))
        assert_equal(CODEC.unpack_result(receive_message(ours)), RESULT)
