"""What POST /act promises: the policy's plan of one observation, nothing remembered, the websocket's refusals."""

import contextlib
import json
import queue
import socket
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from small_policies import small_policy
from websockets.sync.client import connect as connect_raw

from scd_robot.serve import one_shot
from scd_robot.serve.wire import pack, unpack

CLOSE = {"rtol": 0, "atol": 1e-5}
JSON, MSGPACK = "application/json", "application/msgpack"


@pytest.fixture
def begin(start):
    """`begin(...)`: a running server with POST /act."""
    return lambda *args, **config: start(*args, http_port=0, **config)


def post(server, body, kind=JSON, path="/act", **headers):
    """Status and body of the answer."""
    if isinstance(body, dict):
        body = json.dumps(body).encode() if kind == JSON else pack(body)
    request = urllib.request.Request(server.http_address + path, body, {"Content-Type": kind, **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.headers.get_content_type() == kind
            return answer.status, json.loads(answer.read()) if kind == JSON else unpack(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def lists(observation):
    return {key: value.tolist() for key, value in observation.items()}


def test_the_plan_is_the_policys_and_nothing_is_remembered(begin, connect, stream):
    server, policy = begin(), small_policy()
    first, second = stream(2)
    policy.reset(episodes=[3])
    policy.observe({key: value[None] for key, value in first.items()})
    expected = policy.plan()[0]
    asked = {"scd/reset": True, "scd/episode": 3}
    client = connect(server)
    for _ in range(2):
        status, answer = post(server, lists(first) | asked)
        assert (status, answer["scd/step"], answer["scd/new_history"]) == (200, 0, True)
        np.testing.assert_allclose(answer["actions"], expected, **CLOSE)
        client.infer(second)
        assert post(server, lists(second))[0] == 200
    status, answer = post(server, first | asked, MSGPACK)
    np.testing.assert_allclose(answer["actions"], expected, **CLOSE)
    assert answer["actions"].dtype == np.float32
    assert answer["server_timing"]["infer_ms"] > 0


def test_json_may_be_nested_and_whole_numbers_are_numbers(begin):
    status, answer = post(begin(), {"observation": {"position": [0, 1], "goal": [0.5, -3]}})
    assert (status, np.shape(answer["actions"])) == (200, (4, 2))


def test_many_at_a_time_get_their_own_answers(begin, stream):
    server, observations = begin(), stream(8)
    found, asked = [None] * 8, {"scd/reset": True, "scd/episode": 0}

    def ask(number):
        found[number] = post(server, lists(observations[number]) | asked)[1]["actions"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, observation in enumerate(observations):
        np.testing.assert_allclose(found[number], post(server, lists(observation) | asked)[1]["actions"], **CLOSE)


@pytest.mark.parametrize(
    "change", [{"goal": None}, {"goal": np.zeros(3, np.float32)}, {"scd/nonsense": 1}, {"scd/episode": 2}], ids=str
)
def test_refusals_have_the_websockets_texts(begin, stream, change):
    server, message = begin(), stream(1)[0] | change
    status, told = post(server, message, MSGPACK)
    assert status == 400
    with connect_raw(server.address, compression=None) as raw:
        raw.recv()
        raw.send(pack(message))
        assert raw.recv() == told


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"position": [0, 0], "goal": [0, 0], "scd/observe_only": True}, "for a history, connect to ws://"),
        ({"position": [0, 0], "goal": [0, 0], "scd/snapshot": "a"}, "for a history, connect to ws://"),
        ({"endpoint": "reset"}, "for a history, connect to ws://"),
        ({"position": [[0], [0, 1]], "goal": [0, 0]}, "lists of one length"),
        ({"position": ["a"], "goal": [0, 0]}, "must hold numbers"),
        ({"position": [10**30], "goal": [0, 0]}, "must hold numbers"),
        ({"position": [float("nan"), 0], "goal": [0, 0]}, "NaN"),
        (b"[1, 2]", "must be an object"),
        (b"{", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"a":' * 600 + b"1" + b"}" * 600, "nested 16 deep"),
        (b'{"position": ' + b"[" * 600 + b"1" + b"]" * 600 + b', "goal": [0, 0]}', "position"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_request_for_a_plan_is_refused(begin, message, told):
    status, text = post(begin(), message)
    assert (status, told in text) == (400, True), text


def test_only_who_has_the_key_is_answered(begin, stream):
    server, observation = begin(api_key="secret"), lists(stream(1)[0])
    assert post(server, observation) == (401, one_shot.NO_KEY)
    assert post(server, observation, Authorization="Api-Key wrong")[0] == 401
    assert post(server, observation, Authorization="Api-Key secret")[0] == 200
    assert server.metrics.value("scd_refused_total", reason="key") == 2


def test_pages_other_paths_and_other_kinds_are_turned_away(begin, stream):
    server, observation = begin(), lists(stream(1)[0])
    assert post(server, observation, Origin="https://example.com")[0] == 403
    assert post(server, observation, path="/infer")[0] == 404
    assert post(server, b"x", "text/html")[0] == 415


@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD"])
def test_other_methods_are_told_which_one_there_is(begin, method):
    request = urllib.request.Request(begin().http_address + "/act", method=method)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    answer = refused.value
    assert (answer.code, answer.headers["Allow"], answer.headers.get_content_type()) == (405, "POST", "text/plain")
    assert answer.read().decode() == ("" if method == "HEAD" else "there is only POST /act here\n")


def test_what_is_no_http_is_refused_as_text(begin):
    with raw_connection(begin()) as connection:
        connection.sendall(b"POST /act and more HTTP/1.1\r\n\r\n")
        answer = connection.recv(1000)
    assert b" 400 " in answer.splitlines()[0]
    assert b"text/plain" in answer
    assert b"<" not in answer


def test_large_requests_are_refused_before_they_are_read(begin, stream, monkeypatch):
    server = begin(max_frame_bytes=4000)
    status, told = post(server, b"x" * 4001, MSGPACK)
    assert (status, "may have 4000 bytes" in told) == (413, True), told
    monkeypatch.setattr(one_shot, "_LARGEST_JSON", 100)
    status, told = post(server, b"x" * 101)
    assert (status, "send msgpack" in told) == (413, True), told


def raw_connection(server):
    host, port = server.http_address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def test_a_request_without_its_length_is_refused(begin):
    with raw_connection(begin()) as connection:
        head = f"POST /act HTTP/1.1\r\nHost: a\r\nContent-Type: {JSON}\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 411")


class ByHand:
    """A `threading.Timer` whose time comes when the test says so."""

    def __init__(self, seconds, call):
        self.seconds, self.call, self.started, self.cancelled = seconds, call, False, False
        self.made.put(self)

    def start(self):
        self.started = True

    def cancel(self):
        self.cancelled = True


def test_slow_clients_are_hung_up_on_and_too_many_turned_away(begin, stream, monkeypatch):
    monkeypatch.setattr(ByHand, "made", queue.SimpleQueue(), raising=False)
    server = begin(max_connections=1)
    monkeypatch.setattr(one_shot.threading, "Timer", ByHand)
    with raw_connection(server) as slow:
        slow.sendall(b"POST /act HTTP/1.1\r\n")
        timer = ByHand.made.get(timeout=60)
        with raw_connection(server) as second:
            assert b"503" in second.recv(1000)
        assert (timer.seconds, timer.started, timer.cancelled) == (one_shot._LONGEST_READ_S, True, False)
        timer.call()
        assert slow.recv(1000) == b""
    status, deadline = None, time.monotonic() + 60
    while status != 200 and time.monotonic() < deadline:  # turned away until the slow one's place is free
        time.sleep(0.01)
        with contextlib.suppress(urllib.error.URLError):  # perhaps before all is sent
            status, _ = post(server, lists(stream(1)[0]))
    assert status == 200


def test_a_thread_that_cannot_be_started_costs_no_place(begin, stream, monkeypatch):
    server = begin(max_connections=1)
    start = threading.Thread.start

    def fail(thread):
        monkeypatch.setattr(threading.Thread, "start", start)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with raw_connection(server) as refused:
        assert refused.recv(1000) == b""
    assert post(server, lists(stream(1)[0]))[0] == 200


def test_a_bug_of_ours_is_told_without_its_traceback(begin, stream, monkeypatch):
    server = begin()

    def broken(*args, **kwargs):
        raise RuntimeError("private words")

    monkeypatch.setattr(server._engine.policy, "plan", broken)
    assert post(server, lists(stream(1)[0])) == (500, one_shot.INTERNAL)


def test_without_the_option_nothing_listens(start):
    assert start().http_address == ""


def test_what_is_refused_before_it_is_read_is_told_all_the_same(begin):
    server = begin()
    status, told = post(server, b"x" * 3 * 2**20)
    assert (status, "send msgpack" in told) == (413, True), told
