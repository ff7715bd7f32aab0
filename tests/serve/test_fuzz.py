"""Whatever is sent, the server goes on, undisturbed for the connection beside. More of it: benchmarks/serve_fuzz.py."""

import contextlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_policies import small_policy
from spoiled_frames import send_spoiled_frames

from scd_robot.errors import ScdRobotError
from scd_robot.serve.observations import ObservationReader
from scd_robot.serve.requests import Request, RequestReader
from scd_robot.serve.wire import MessageError, pack, unpack
from scd_robot.types import ArraySpec

READER = RequestReader(ObservationReader({"position": ArraySpec((2,)), "goal": ArraySpec((2,))}), 2, 4)

KEYS = st.sampled_from(
    [
        *("position", "goal", "observation", "prompt", "endpoint", "reset", "session_id", "scd/step", "scd/executed"),
        *("scd/prefix", "scd/reset", "scd/episode", "scd/observe_only", "scd/snapshot", "scd/restore", "scd/x", ""),
        *("scd/running", "scd/delay_steps", "scd/max_gain", "scd/identity"),
    ]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.integers(-2, 2), max_size=3),
    st.builds(
        lambda shape, dtype, fill: np.full(shape, fill).astype(dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from(["<f4", "<f8", "|u1", "<i8", "?", "<f2"]),
        st.sampled_from([0.0, 1.0, 1e300, np.nan]),
    ),
)
MESSAGES = st.dictionaries(KEYS, st.one_of(LEAVES, st.dictionaries(KEYS, LEAVES, max_size=3)), max_size=6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(MESSAGES)
def test_any_message_becomes_a_request_or_one_sentence(message):
    try:
        answer = READER.read(unpack(pack(message)))
    except ScdRobotError as error:
        answer = str(error)
    assert isinstance(answer, Request) or 0 < len(answer) < 3000


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data):
    with contextlib.suppress(MessageError):
        assert isinstance(unpack(data), dict)


def test_spoiled_frames_do_not_disturb_the_connection_beside_them(start):
    policy = small_policy()
    outcome = send_spoiled_frames(start(policy).address, small_policy(), frames=300, seed=0)
    assert outcome["sent"] == 300
    assert outcome["internal_errors"] == 0
    assert outcome["refused"] > 0 < outcome["answered"]
    assert outcome["good_requests"] >= 30  # each of them compared with the policy in process
