"""Our client: no torch, no history lost in silence, and a policy that acts through a server as it does in process."""

import contextlib
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
from small_policies import small_policy
from websockets.sync.server import serve as serve_raw

from scd_robot.cli.main import main
from scd_robot.errors import ConfigError, PolicyChangedError, ShapeError
from scd_robot.policies import load_policy
from scd_robot.serve import (
    HistoryLostError,
    PolicyClient,
    RemotePolicy,
    RequestRefusedError,
    ServerUnreachableError,
)
from scd_robot.serve.server import ServerConfig, running_server
from scd_robot.serve.wire import MessageError, pack, unpack
from scd_robot.sim_eval import evaluate
from scd_robot.sim_eval.output import read_actions


@pytest.fixture
def answering():
    """`answering(*messages)`: address of a server that sends these, one after each message of the client."""
    with contextlib.ExitStack() as stack:

        def begin(*messages):
            def handle(connection):
                for message in messages:
                    connection.send(message)
                    connection.recv()

            server = stack.enter_context(serve_raw(handle, "127.0.0.1", 0))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return f"ws://127.0.0.1:{server.socket.getsockname()[1]}"

        yield begin


def test_importing_the_client_loads_no_torch(tmp_path):
    heavy = ("torch", "lightning", "zarr", "mujoco", "h5py", "tyro", "scipy")
    code = (
        "import sys; from scd_robot.serve import PolicyClient, RemotePolicy\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_remote_policy_acts_as_the_policy_does(start):
    """Three rows with resets at different times, executed actions that differ from what was asked for."""
    rng = np.random.default_rng(0)
    observations = rng.uniform(-1, 1, (12, 2, 3, 2)).astype(np.float32)
    server = start()
    with contextlib.closing(RemotePolicy(server.address)) as remote:
        policies = (remote, small_policy())
        assert remote.spec == policies[1].spec
        for policy in policies:
            policy.reset(episodes=[4, 5, 6])
        executed = None
        for step, (position, goal) in enumerate(observations):
            if step == 5:
                for policy in policies:
                    policy.reset(rows=[1], episodes=[9])
            seen = {"position": position, "goal": goal}
            actions = [policy.act(seen, executed) for policy in policies]
            np.testing.assert_allclose(*actions, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(remote.planned, policies[1].planned)
            executed = np.clip(actions[1] + 0.1, -1, 1)
        assert server.metrics.value("scd_requests_total", kind="plan") < 3 * 12
        for policy in policies:  # another number of rows, and nobody numbers the episodes
            policy.reset()
            assert policy.act({"position": position[:1], "goal": goal[:1]}).shape == (1, 2)
            with pytest.raises(ShapeError, match=r"batch has 3 rows, the policy runs 1; call reset\(\)"):
                policy.act(seen)


def test_scd_eval_drives_an_environment_through_a_server(tiny_run, point, tmp_path):
    """Episode by episode the same actions as of the policy in process."""
    local, there = tmp_path / "local", tmp_path / "there"
    options = ["--env", point, "--episodes", "3", "--max-steps", "12", "--num-videos", "0", "--num-envs", "2"]
    assert main(["eval", str(tiny_run), *options, "--out", str(local)]) == 0
    with running_server(load_policy(tiny_run), ServerConfig(port=0)) as server:
        assert main(["eval", server.address, *options, "--out", str(there)]) == 0
    results = [json.loads((folder / "result.json").read_text()) for folder in (local, there)]
    hashes = [[one["initial_state_hash"] for one in result["episodes_detail"]] for result in results]
    assert hashes[0] == hashes[1]
    actions = [read_actions(folder) for folder in (local, there)]
    assert sorted(actions[0]) == sorted(actions[1]) == [0, 1, 2]
    for episode, expected in actions[0].items():
        assert len(expected) == 12
        np.testing.assert_allclose(actions[1][episode], expected, rtol=0, atol=1e-5)


def test_options_that_a_server_keeps_are_refused(point, refused):
    refused(["eval", "ws://127.0.0.1:1", "--env", point, "--num-executed", "2"], "--num-executed cannot be chosen")


def test_a_connection_that_breaks_in_an_episode_is_made_anew_and_said(connect, stream):
    observations = stream(3)
    with running_server(small_policy(), ServerConfig(port=0)) as server:
        port = int(server.address.rpartition(":")[2])
        client = connect(server)
        client.infer(observations[0], reset=True, episode=0)
    with running_server(small_policy(), ServerConfig(port=port)):
        with pytest.raises(HistoryLostError, match="its history is lost"):
            client.infer(observations[1])
        assert client.infer(observations[2])["scd/new_history"]
    with running_server(small_policy(), ServerConfig(port=port)):  # where an episode begins nothing is lost
        assert client.infer(observations[0], reset=True)["scd/new_history"]


def test_a_server_that_is_not_there_is_told():
    with pytest.raises(ServerUnreachableError, match=r"no policy server answers at ws://127.0.0.1:1 .*scd serve"):
        PolicyClient("ws://127.0.0.1:1", connect_timeout_s=0.1)
    with pytest.raises(ConfigError, match="begins with ws://"):
        PolicyClient("http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("answer", "error", "told"),
    [
        ("went wrong", RequestRefusedError, "refuses: went wrong"),
        (b"\xc1", MessageError, "no msgpack message"),
        (pack({"actions": np.full((4, 2), np.nan)}), MessageError, "finite"),
        (pack({"actions": "left"}), MessageError, "finite"),
    ],
    ids=["text", "no message", "NaN", "no array"],
)
def test_answers_that_no_robot_should_follow_are_refused(answering, answer, error, told):
    with PolicyClient(answering(pack({}), answer)) as client, pytest.raises(error, match=told):
        client.infer({"x": np.zeros(2)})


def test_a_late_answer_is_not_taken_for_the_next_one(start, connect, stream, monkeypatch):
    policy, held = small_policy(), threading.Event()
    server, observations, plan = start(policy), stream(2), policy.plan
    client = connect(server)
    client._timeouts = 10.0, 0.2
    monkeypatch.setattr(policy, "plan", lambda **options: held.wait(30) and plan(**options))
    with pytest.raises(ServerUnreachableError, match="did not answer within"):
        client.infer(observations[0])
    held.set()
    monkeypatch.undo()
    client._timeouts = 60.0, 60.0  # from here on it is not about who is too late
    assert client.infer(observations[1], reset=True)["scd/step"] == 0


def test_a_plain_openpi_server_is_no_policy_with_history(answering):
    with pytest.raises(ConfigError, match="speaks 'plain openpi'"):
        RemotePolicy(answering(pack({})))


def test_a_remote_policy_that_failed_needs_a_reset(start):
    with contextlib.closing(RemotePolicy(start().address)) as policy:
        good = {"position": np.zeros((2, 2), np.float32), "goal": np.zeros((2, 2), np.float32)}
        policy.act(good)
        with pytest.raises(RequestRefusedError, match="NaN"):
            policy.act({**good, "goal": np.array([[0, np.nan], [0, 0]])})
        with pytest.raises(ConfigError, match=r"call reset\(\)"):
            policy.act(good)
        policy.reset()
        assert policy.act(good).shape == (2, 2)


def test_tls_is_spoken_with_a_certificate_of_ones_own(tmp_path, start, connect, stream):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate),
        ],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("openssl cannot make a certificate here")
    server = start(tls_cert=certificate, tls_key=key, http_port=0)
    assert server.address.startswith("wss://")
    assert connect(server, tls_ca=certificate).infer(stream(1)[0])["actions"].shape == (4, 2)
    request = urllib.request.Request(
        server.http_address + "/act", pack(stream(1)[0]), {"Content-Type": "application/msgpack"}
    )
    context = ssl.create_default_context(cafile=certificate)
    with urllib.request.urlopen(request, timeout=60, context=context) as answer:
        assert unpack(answer.read())["actions"].shape == (4, 2)
    host, port = server.http_address.removeprefix("https://").split(":")
    with context.wrap_socket(socket.create_connection((host, int(port)), timeout=60), server_hostname=host) as client:
        client.sendall(b"POST /elsewhere HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
        told = b""
        while block := client.recv(4000):  # until the server ends the connection, as it says
            told += block
    assert b" 404 " in told
    with pytest.raises(ServerUnreachableError, match="does not let us in"):
        connect(server)
    with pytest.raises(ConfigError, match="cannot use the certificate"):
        start(tls_cert=tmp_path / "missing.pem")


def test_a_server_that_hangs_up_on_a_message_again_and_again_is_told_as_such(answering, stream):
    with (
        PolicyClient(answering(pack({}))) as client,
        pytest.raises(ServerUnreachableError, match="ends the connection when it gets this message, twice"),
    ):
        client.infer(stream(1)[0])


def of_weights(name):
    policy = small_policy()
    policy.provenance = {"weights_sha256": name}
    return policy


@pytest.fixture
def restarted():
    """`restarted(name)`: a server with weights of that name, always at the same address, the one before being gone."""
    port = 0
    with contextlib.ExitStack() as servers:

        def begin(name):
            nonlocal port
            servers.close()
            address = servers.enter_context(running_server(of_weights(name), ServerConfig(port=port))).address
            port = int(address.rpartition(":")[2])
            return address

        yield begin


def test_other_weights_after_a_restart_are_told(restarted, stream, caplog):
    seen = stream(1)[0]
    with PolicyClient(restarted("old")) as client:
        client.infer(seen, reset=True)
        restarted("old")
        client.infer(seen, reset=True)
        assert "other weights" not in caplog.text
        restarted("new")
        client.infer(seen, reset=True)
        assert "has other weights than before: new, not old" in caplog.text
        assert client.metadata["policy"]["weights_sha256"] == "new"


def test_other_weights_than_asked_for_are_refused(restarted, stream):
    seen = stream(1)[0]
    with PolicyClient(restarted("old"), weights_sha256="old") as client:
        client.infer(seen, reset=True)
        address = restarted("new")
        for _ in range(2):
            with pytest.raises(PolicyChangedError, match="new, not old"):
                client.infer(seen, reset=True)
        with pytest.raises(PolicyChangedError, match="new, not old"):
            PolicyClient(address, weights_sha256="old")


@pytest.mark.parametrize("rows", [1, 2])
def test_a_remote_policy_acts_with_one_set_of_weights(restarted, stream, rows):
    """Also where a connection is new: what is told of an evaluation is told of all of it."""
    seen = {key: np.stack([value] * rows) for key, value in stream(1)[0].items()}
    with contextlib.closing(RemotePolicy(restarted("old"))) as policy:
        assert policy.provenance["weights_sha256"] == "old"
        if rows == 1:
            policy.act(seen)
        restarted("new")
        policy.reset()
        with pytest.raises(PolicyChangedError, match="new, not old"):
            policy.act(seen)


def test_evaluate_takes_a_remote_policy(start, point):
    with (
        contextlib.closing(RemotePolicy(start().address)) as policy,
        pytest.raises(ShapeError) as error,
    ):
        evaluate(policy, point, 1, num_envs=1, num_videos=0, progress=False)
    assert "control step of 0.1 s" in str(error.value)  # its specification is that of the policy behind the server


def test_an_answer_that_nobody_waited_for_is_not_taken_for_the_next_one(start, connect, stream, monkeypatch):
    """Ctrl-C during `infer`, and a program that goes on."""
    client, observations = connect(start(small_policy())), stream(4)
    expected = connect(start(small_policy()))
    connection = client._connection

    def interrupted(timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(connection, "recv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        client.infer(observations[0], reset=True, episode=0)
    for index in (1, 2):
        found = client.infer(observations[index], reset=True, episode=index)["actions"]
        wanted = expected.infer(observations[index], reset=True, episode=index)["actions"]
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    client.send(observations[0], reset=True, episode=0)
    found = client.infer(observations[3], reset=True, episode=3)["actions"]
    np.testing.assert_allclose(found, expected.infer(observations[3], reset=True, episode=3)["actions"], atol=1e-5)
    with pytest.raises(ConfigError, match="call send"):
        client.receive()


def test_a_refused_request_leaves_the_history_as_it_was(start, connect, stream):
    client, observations = connect(start()), stream(3)
    client.infer(observations[0], reset=True, step=0)
    with pytest.raises(RequestRefusedError):
        client.infer({"position": observations[1]["position"]}, step=1)
    assert client.infer(observations[2], step=1)["scd/step"] == 1


@pytest.mark.parametrize(
    ("status", "tries", "told"),
    [
        (503, True, "connections are taken"),
        (502, True, "502"),
        (None, True, "did not receive|no close frame"),  # as it closes before or after it is spoken to
        (401, False, "Key"),
    ],
)
def test_a_server_that_is_full_or_behind_a_proxy_is_tried_again(status, tries, told):
    body = {503: b"all connections are taken; try again later", 401: b"send the header Api-Key KEY"}.get(status, b"")
    attempts = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    attempts.append(0)
                    with connection:
                        if status is not None:
                            connection.recv(4000)
                            head = f"HTTP/1.1 {status} No\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                            connection.sendall(head.encode() + body)

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ServerUnreachableError, match=told):
            PolicyClient(f"ws://127.0.0.1:{listening.getsockname()[1]}", connect_timeout_s=1.0)
    assert (len(attempts) > 1) == tries


def test_connections_that_cannot_be_made_for_all_rows_leave_none_behind(start):
    server = start(max_connections=3)
    seen = {"position": np.zeros((5, 2), np.float32), "goal": np.ones((5, 2), np.float32)}
    with contextlib.closing(RemotePolicy(server.address, connect_timeout_s=0.5)) as policy:
        policy.reset()
        with pytest.raises(ServerUnreachableError, match="all connections are taken"):
            policy.act(seen)
        policy.reset()
        two = {key: value[:2] for key, value in seen.items()}
        assert policy.act(two).shape == (2, 2)


def test_a_history_that_the_server_dropped_is_not_gone_on_with(start, stream):
    server = start(idle_timeout_s=0.2)
    first, second, third = stream(3)
    with contextlib.closing(RemotePolicy(server.address)) as policy:
        batch = [{key: value[None] for key, value in one.items()} for one in (first, second, third)]
        policy.act(batch[0])
        deadline = time.monotonic() + 30
        while not server.metrics.value("scd_evictions_total") and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(HistoryLostError, match=r"has dropped the history of row 0.*reset the episode"):
            policy.act(batch[1])
        with pytest.raises(ConfigError, match="call reset"):
            policy.act(batch[2])
        policy.reset()
        policy.act(batch[2])


def test_a_server_that_does_not_greet_is_given_up_in_time():
    ended = threading.Event()
    with serve_raw(lambda connection: ended.wait(60), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(ServerUnreachableError, match="did not answer within"):
            PolicyClient(f"ws://127.0.0.1:{server.socket.getsockname()[1]}", connect_timeout_s=0.5)
        assert time.monotonic() - began < 30, "answer_timeout_s is 60"
        ended.set()
        server.shutdown()


def test_a_port_that_is_none_is_told():
    with pytest.raises(ConfigError, match=r"no address.*[Pp]ort"):
        PolicyClient("ws://127.0.0.1:99999")
