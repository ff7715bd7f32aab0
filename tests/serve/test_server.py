"""What a connection is promised: the policy's plans, a history of its own, and errors that leave it as it was."""

import json
import re
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import picture_data, picture_policy
from small_policies import small_policy
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect as connect_raw

from scd_robot.errors import ActionError, ConfigError, ShapeError
from scd_robot.policies.inputs import FarInputs
from scd_robot.serve import PolicyClient, RemotePolicy, RequestRefusedError, ServerUnreachableError
from scd_robot.serve.engine import Engine, Session
from scd_robot.serve.observations import ObservationReader
from scd_robot.serve.requests import Request
from scd_robot.serve.server import PolicyServer, ServerConfig, running_server
from scd_robot.serve.wire import pack, unpack
from scd_robot.transforms import TransformConfig
from scd_robot.types import ArraySpec, RunningChunk

CLOSE = {"rtol": 0, "atol": 1e-5}


def batched(observation):
    return {key: value[None] for key, value in observation.items()}


def fetch(server, path, **headers):
    request = urllib.request.Request("http" + server.address.removeprefix("ws") + path, headers=headers)
    return urllib.request.urlopen(request, timeout=60).read().decode()


def test_metadata_comes_first_and_says_what_to_send(start, connect):
    told = connect(start()).metadata
    assert (told["protocol"], told["version"]) == ("openpi+scd", 1)
    assert (told["action_horizon"], told["action_dim"], told["num_executed"]) == (4, 2, 2)
    assert (told["control_hz"], told["history"]) == (10.0, 4)
    assert set(told["keys"]) == {"position", "goal"}
    assert told["keys"]["goal"]["shape"] == [2]
    assert "control steps" in told["positions"]


def test_plans_are_those_of_the_policy_with_every_step_observed(start, connect, stream):
    client, policy = connect(start()), small_policy()
    policy.reset(episodes=[3])
    for step, observation in enumerate(stream(11)):
        policy.observe(batched(observation))
        plans = step % 3 == 0
        begin = {"reset": True, "episode": 3} if step == 0 else {}
        answer = client.infer(observation, observe_only=not plans, **begin)
        assert answer["scd/step"] == step
        assert answer["scd/new_history"] == (step == 0)
        assert ("actions" in answer) == plans
        if plans:
            np.testing.assert_allclose(answer["actions"], policy.plan()[0], **CLOSE)
            assert answer["actions"].dtype == np.float32


def test_executed_actions_and_a_prefix_reach_the_policy(start, connect, stream):
    client, policy = connect(start()), small_policy()
    policy.reset(episodes=[0])
    actions = np.random.default_rng(1).uniform(-1, 1, (6, 2)).astype(np.float32)
    plain = []
    for step, observation in enumerate(stream(6)):
        executed = {"executed": actions[step]} if step else {"reset": True, "episode": 0}
        prefix = actions[:2] if step == 5 else None
        answer = client.infer(observation, prefix=prefix, **executed)
        policy.observe(batched(observation), actions[step][None] if step else None)
        expected = policy.plan(prefix=None if prefix is None else prefix[None])[0]
        np.testing.assert_allclose(answer["actions"], expected, **CLOSE)
        plain.append(answer["actions"])
    np.testing.assert_array_equal(plain[-1][:2], actions[:2])


@pytest.mark.parametrize("told", ["nothing", "step", "executed", "both"])
def test_control_steps_that_nobody_observed_pass_in_the_history(start, connect, stream, told):
    """A client that sends one observation per plan: the next one stands num_executed control steps later."""
    client, policy = connect(start()), small_policy()
    first, second = stream(2)
    begun = client.infer(first, reset=True, episode=0)
    options = {"step": 2} if told in ("step", "both") else {}
    if told in ("executed", "both"):
        options["executed"] = begun["actions"][:2]
    answer = client.infer(second, **options)
    assert answer["scd/step"] == 2
    history = policy.new_history(0)
    policy.resume([history])
    policy.observe(batched(first))
    chunk = policy.plan()
    (history,) = policy.release()
    history.skip(1)
    assert history.cache.position.tolist() == [2]
    policy.resume([history])
    policy.observe(batched(second))
    np.testing.assert_array_equal(history.past[0], chunk[0, :2])
    np.testing.assert_allclose(answer["actions"], policy.plan()[0], **CLOSE)
    assert abs(answer["actions"] - client.infer(second, reset=True, episode=0)["actions"]).max() > 1e-4


def test_the_server_says_once_how_it_counts(start, connect, stream, caplog):
    client = connect(start())
    with caplog.at_level("WARNING", "scd_robot.serve"):
        for observation in stream(4):
            client.infer(observation)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [warning.count("positions in the history") for warning in warnings] == [1]


@pytest.mark.parametrize(("trained", "told"), [(0, 1), (3, 0)])
def test_the_server_says_once_that_a_policy_was_not_trained_for_committed_actions(stream, caplog, trained, told):
    engine, session = Engine(small_policy({"max_delay_steps": trained})), Session()
    for observation in stream(3):
        (answer,) = engine.run([(session, Request(observation=observation, prefix=np.zeros((1, 2), np.float32)))])
        assert "actions" in answer.message
    assert caplog.text.count("was not trained for delays (model.max_delay_steps is 0)") == told


def test_a_client_of_ones_own_as_the_documentation_shows_it(start):
    """The Python of docs/serving.md, as it stands there."""
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    policy, names = small_policy(), {"address": start().address}
    exec(code, names)
    policy.reset(episodes=[0])
    nothing = {key: np.zeros((1, 2), np.float32) for key in names["seen"]}
    for step in range(10):
        policy.observe(nothing)
        if step % 2 == 0:
            chunk = policy.plan()[0]
    np.testing.assert_allclose(names["chunk"], chunk, **CLOSE)


def test_connections_have_histories_of_their_own_and_are_computed_together(start, connect, stream):
    server = start(batch_window_s=60.0)
    clients, streams = [connect(server) for _ in range(3)], [stream(5, seed) for seed in range(3)]
    alone = []
    for number, observations in enumerate(streams):
        policy = small_policy()
        policy.reset(episodes=[number])
        alone.append([policy.act(batched(observation))[0] for observation in observations])
    for step in range(5):
        for number, client in enumerate(clients):
            begin = {"reset": True, "episode": number} if step == 0 else {}
            client.send(streams[number][step], observe_only=step % 2 == 1, **begin)
        for number, client in enumerate(clients):
            answer = client.receive()
            assert answer["scd/rows"] == 3
            if step % 2 == 0:
                np.testing.assert_allclose(answer["actions"][0], alone[number][step], **CLOSE)


def test_requests_of_all_kinds_in_one_batch_do_not_disturb_each_other(stream):
    """As an engine sees them: executed told or not, prefixes, chunks to be guided towards, a reset, no plan."""
    observations = stream(3)
    prefix = np.ones((2, 2), np.float32)
    running = [RunningChunk(place * np.ones((1, 3, 2), np.float32), 1, 4.0) for place in (-1.0, 1.0)]
    last = [
        {},
        {"executed": np.full((1, 2), 0.5, np.float32)},
        {"prefix": prefix},
        {"prefix": prefix[:1], "executed": np.full((2, 2), -0.5, np.float32), "step": 3},
        {"observe_only": True},
        {"reset": True, "episode": 9},
        {"running": running[0]},
        {"running": running[1]},
        {"running": replace(running[1], delay_steps=2)},
        {"running": replace(running[1], exact=False)},
    ]

    def play(numbers):
        engine = Engine(small_policy(sampler={"solver": "euler", "num_denoising_steps": 4}))
        sessions = {number: Session() for number in numbers}
        for step, observation in enumerate(observations):
            options = [last[n] if step == 2 else {"observe_only": step == 1} for n in numbers]
            options = [{"reset": step == 0, "episode": n, **o} for n, o in zip(numbers, options, strict=True)]
            requests = [Request(observation=observation, **o) for o in options]
            results = engine.run(list(zip(sessions.values(), requests, strict=True)))
        return results

    every = play(range(len(last)))
    assert np.ptp([answer.message["actions"][0, 0] for answer in every[-4:]]) > 0.05, "guided each in its own way"
    for number, together in enumerate(every):
        (alone,) = play([number])
        assert together.message["scd/step"] == alone.message["scd/step"]
        assert ("actions" in together.message) == ("actions" in alone.message) == (number != 4)
        if number != 4:
            np.testing.assert_allclose(together.message["actions"], alone.message["actions"], rtol=0, atol=1e-4)


def test_one_row_whose_plan_fails_does_not_take_the_others_with_it(monkeypatch, stream):
    policy, observations = small_policy(), stream(3)
    engine, plan = Engine(policy), policy.plan

    def fail(rows, **how):
        if 1 in rows:
            raise ActionError("not this one")
        return plan(rows=rows, **how)

    monkeypatch.setattr(policy, "plan", fail)
    requests = [(Session(), Request(observation=observation)) for observation in observations]
    results = engine.run(requests)
    assert [isinstance(result, ActionError) for result in results] == [False, True, False]
    assert all(session.history.position == 1 for session, _ in requests)


def test_a_snapshot_is_gone_back_to(start, connect, stream):
    client, observations = connect(start()), stream(4)
    client.infer(observations[0], reset=True, episode=0)
    client.infer(observations[1], observe_only=True, snapshot="here")
    first = client.infer(observations[2])
    client.infer(observations[3])
    for _ in range(2):  # nor does going on from it change it
        again = client.infer(observations[2], restore="here")
        np.testing.assert_array_equal(again["actions"], first["actions"])
        assert again["scd/step"] == first["scd/step"] == 2
    with pytest.raises(RequestRefusedError, match="unknown snapshot 'there'"):
        client.infer(observations[2], restore="there")


def test_a_connection_cannot_keep_more_than_its_memory(start, connect, stream):
    size = small_policy().new_history(0).num_bytes
    client = connect(start(max_history_bytes=3 * size))
    (observation,) = stream(1)
    for name in ("a", "b", "a"):
        client.infer(observation, snapshot=name)
    with pytest.raises(RequestRefusedError, match="may keep 2 snapshots"):
        client.infer(observation, snapshot="c")
    with pytest.raises(ConfigError, match="one history takes"):
        PolicyServer(small_policy(), ServerConfig(max_history_bytes=size - 1))


def test_a_silent_client_loses_its_history_and_is_told(start, connect, stream):
    server = start(idle_timeout_s=0.2)
    client, (first, second) = connect(server), stream(2)
    client.infer(first)
    deadline = time.monotonic() + 30
    while not server.metrics.value("scd_evictions_total") and time.monotonic() < deadline:
        time.sleep(0.02)
    answer = client.infer(second)
    assert (answer["scd/new_history"], answer["scd/evicted"]) == (True, True)


@pytest.mark.parametrize(
    ("message", "new"),
    [
        ({"endpoint": "infer"}, False),
        ({"reset": True}, True),
        ({"session_id": "b"}, True),
        ({"session_id": "a"}, False),
        ({"prompt": "another task"}, False),
    ],
)
def test_dialects_begin_histories(start, connect, stream, message, new):
    client, (first, second) = connect(start()), stream(2)
    client.infer({**first, "session_id": "a", "prompt": "a task"})
    assert client.infer({**second, **message})["scd/new_history"] == new


def test_a_new_prompt_begins_a_history_where_asked_for(start, connect, stream):
    client, (first, second) = connect(start(prompt_resets=True)), stream(2)
    client.infer({**first, "prompt": "a task"})
    assert not client.infer({**second, "prompt": "a task"})["scd/new_history"]
    assert client.infer({**second, "prompt": "another"})["scd/new_history"]


def test_the_reset_endpoint_answers_with_its_text(start):
    with connect_raw(start().address, compression=None) as raw:
        raw.recv()
        raw.send(pack({"endpoint": "reset"}))
        assert raw.recv() == "reset successful"


@pytest.mark.parametrize(
    ("keys", "mapping", "sent"),
    [
        (("a", "b"), {"a": "observation/b"}, "observation/b"),
        (("state", "observation/state"), {}, "state"),
    ],
)
def test_one_array_is_never_two_observations(keys, mapping, sent):
    reader = ObservationReader(dict.fromkeys(keys, ArraySpec((2,))), mapping)
    with pytest.raises(ShapeError, match=f"would both be '{sent}'"):
        reader.read({sent: np.zeros(2, np.float32)})


@pytest.mark.parametrize(
    ("shape", "hint"), [((224, 224, 3), "resize it to that of the training"), ((1, 64, 48, 3), "leave the batch axis")]
)
def test_a_picture_of_another_shape_is_refused_with_what_to_do(shape, hint):
    reader = ObservationReader({"camera": ArraySpec((64, 48, 3), "uint8")})
    with pytest.raises(ShapeError, match=hint):
        reader.read({"camera": np.zeros(shape, np.uint8)})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"goal": None}, "'goal' is missing; expected goal float32 (2,), position float32 (2,); got position float32"),
        ({"goal": np.zeros(3)}, "'goal' must be (2,), got (3,)"),
        ({"goal": np.zeros((1, 2))}, "leave the batch axis out"),
        ({"goal": np.array([0, np.nan])}, "NaN"),
        ({"goal": [0.0, 1.0]}, "'goal' must be an array, got list"),
        ({"goal": None, "observation.goal": np.zeros(2), "observation": {"goal": np.zeros(2)}}, "could be any of"),
        ({"scd/stepp": 1}, "did you mean 'scd/step'"),
        ({"scd/step": -1}, "scd/step must be a whole number"),
        ({"scd/step": 0}, "later control step than 0"),
        ({"scd/step": 10**9}, "later control step than 0"),
        ({"scd/step": 3, "scd/executed": np.zeros((2, 2))}, "must hold the 3 actions"),
        ({"scd/executed": np.zeros((1, 3))}, "scd/executed must be (n, 2)"),
        ({"scd/prefix": np.zeros((4, 2))}, "commit fewer"),
        ({"scd/prefix": np.full((1, 2), np.inf)}, "NaN or infinite"),
        ({"scd/running": np.zeros((4, 2)), "scd/delay_steps": 1}, "a plan has 4; leave executed ones out"),
        ({"scd/running": np.zeros((3, 2))}, "goes with scd/delay_steps"),
        ({"scd/running": np.zeros((3, 2)), "scd/delay_steps": 4}, "0 to 3, got 4"),
        ({"scd/running": np.zeros((3, 2)), "scd/delay_steps": 1, "scd/max_gain": np.nan}, "positive finite number"),
        ({"scd/running": np.zeros((3, 2)), "scd/delay_steps": 1, "scd/max_gain": 9}, "take at least 9 denoising steps"),
        ({"scd/max_gain": 1.0}, "goes with scd/running"),
        ({"scd/reset": 1}, "must be true or false"),
        ({"scd/episode": 1}, "send scd/reset with it"),
        ({"scd/reset": True, "scd/restore": "x"}, "exclude each other"),
        ({"endpoint": "train"}, "unknown endpoint"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_and_changes_nothing(start, connect, stream, change, told):
    client, observations = connect(start()), stream(3)
    expected = small_policy()
    expected.reset(episodes=[0])
    client.infer(observations[0], reset=True, episode=0)
    expected.act(batched(observations[0]))
    with pytest.raises(RequestRefusedError) as refused:
        client.infer({key: value for key, value in {**observations[1], **change}.items() if value is not None})
    assert told in str(refused.value)
    assert "Traceback" not in str(refused.value)
    client.infer(observations[1], step=1, observe_only=True)
    expected.act(batched(observations[1]))
    actions = client.infer(observations[2], step=2)["actions"]
    np.testing.assert_allclose(actions[0], expected.act(batched(observations[2]))[0], **CLOSE)


@pytest.mark.parametrize(
    "name", ["observation/{}", "observation.{}", "nested", "mapped", "mapped and nested"], ids=lambda name: name
)
def test_keys_are_found_flat_nested_and_mapped(start, connect, stream, name):
    keys = {"position": "robot/xy", "goal": "robot/target"} if "mapped" in name else {}
    client, (observation,) = connect(start(keys=keys)), stream(1)
    expected = connect(start()).infer(observation, reset=True, episode=0)["actions"]
    if name == "nested":
        sent = {"observation": observation}
    elif name == "mapped and nested":
        sent = {"robot": {"xy": observation["position"], "target": observation["goal"]}}
    elif name == "mapped":
        sent = {keys[key]: value for key, value in observation.items()}
    else:
        sent = {name.format(key): value for key, value in observation.items()}
    sent = {**sent, "observation/wrist_image": np.zeros((4, 4, 3), np.uint8)}
    np.testing.assert_array_equal(client.infer(sent, reset=True, episode=0)["actions"], expected)


def test_a_mapping_of_unknown_keys_is_refused():
    with pytest.raises(KeyError, match="did you mean 'position'"):
        PolicyServer(small_policy(), ServerConfig(keys={"positon": "x"}))
    with pytest.raises(ConfigError, match="read from one key"):
        PolicyServer(small_policy(), ServerConfig(keys={"position": "goal"}))


def test_health_and_counters_are_told_while_a_plan_is_made(start, connect, stream, monkeypatch):
    policy, held, entered = small_policy(), threading.Event(), threading.Event()
    server, (observation,) = start(policy), stream(1)
    client, plan = connect(server), policy.plan

    def slow(**options):
        entered.set()
        held.wait(30)
        return plan(**options)

    monkeypatch.setattr(policy, "plan", slow)
    client.send(observation)
    assert entered.wait(30)
    try:
        assert fetch(server, "/healthz") == "OK\n"
        assert "scd_connections 1\n" in fetch(server, "/metrics")
    finally:
        held.set()
    client.receive()
    told = fetch(server, "/metrics")
    assert 'scd_requests_total{kind="plan"} 1\n' in told
    assert "scd_request_ms_count 1\n" in told


def test_only_who_has_the_key_comes_in(start, connect):
    server = start(api_key="secret")
    assert connect(server, api_key="secret").metadata
    for wrong in (None, "", "secre", "secret ä", "secrets"):
        headers = {} if wrong is None else {"Authorization": f"Api-Key {wrong}"}
        with pytest.raises(InvalidStatus, match="401"), connect_raw(server.address, additional_headers=headers):
            pass
    with pytest.raises(ServerUnreachableError, match="401"):
        connect(server, api_key="wrong")
    assert fetch(server, "/healthz") == "OK\n"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        fetch(server, "/metrics")
    assert "scd_refused_total" in fetch(server, "/metrics", Authorization="Bearer secret")


def test_web_pages_and_too_many_connections_are_turned_away(start, connect):
    server = start(max_connections=1)
    with pytest.raises(InvalidStatus, match="403"), connect_raw(server.address, origin="http://example.org"):
        pass
    connect(server)
    with pytest.raises(ServerUnreachableError, match="503"):
        connect(server, connect_timeout_s=60.0)


def test_frames_that_are_too_large_end_the_connection_only(start, connect, stream):
    server = start(max_frame_bytes=2000)
    good, (observation,) = connect(server), stream(1)
    with connect_raw(server.address, compression=None) as raw:
        raw.recv()
        raw.send(b"x" * 3000)
        with pytest.raises(Exception, match="1009"):
            raw.recv()
    assert good.infer(observation)["actions"].shape == (4, 2)
    with pytest.raises(ConfigError, match="allow more"):
        PolicyServer(small_policy(), ServerConfig(max_frame_bytes=1000))


def test_a_bug_of_ours_is_told_without_its_traceback(start, connect, stream, monkeypatch, caplog):
    policy = small_policy()
    server, (observation,) = start(policy), stream(1)
    good, client = connect(server), connect(server)
    good.infer(observation)
    with monkeypatch.context() as patch, caplog.at_level("CRITICAL"):
        patch.setattr(policy, "plan", lambda **_: 1 / 0)
        with pytest.raises(RequestRefusedError) as refused:
            client.infer(observation)
    assert "internal error" in str(refused.value)
    assert "division" not in str(refused.value)
    assert good.infer(observation)["actions"].shape == (4, 2)


def test_a_port_that_is_taken_is_told(start):
    server = start()
    port = int(server.address.rpartition(":")[2])
    with (
        pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1:{port}"),
        running_server(small_policy(), ServerConfig(port=port)),
    ):
        pass


def test_a_policy_that_encodes_every_second_step_says_when_it_plans(start, connect, stream):
    client = connect(start(small_policy({"history_stride": 2})))
    observations = stream(4)
    client.infer(observations[0], reset=True)
    with pytest.raises(RequestRefusedError, match="plans every 2 control steps"):
        client.infer(observations[1], step=1)
    client.infer(observations[1], step=1, observe_only=True)
    assert "actions" in client.infer(observations[2], step=2)


def test_a_policy_that_reads_the_keys_that_are_there_gets_them(start, connect, stream):
    client = connect(start(small_policy({"observation_tokens": "per_key"})))
    first, second = stream(2)
    client.infer(first)
    assert client.metadata["keys"]["position"]["optional"]
    assert client.infer({"goal": second["goal"], "position": None})["actions"].shape == (4, 2)
    for misspelt in ({"goal": second["goal"], "positoin": second["position"]}, {"goal": second["goal"]}):
        with pytest.raises(RequestRefusedError, match=r"'position' is missing; expected .*; got goal float.*send nil"):
            client.infer(misspelt)
    with pytest.raises(RequestRefusedError, match="no observation is there"):
        client.infer({"goal": None, "position": None})


def test_a_policy_with_cameras_is_served(start, connect):
    """It plans once before anybody sends a picture."""
    data = picture_data()
    client = connect(start(picture_policy("separable", data, TransformConfig())))
    assert client.infer({key: data.arrays[key][0] for key in data.spec.observation})["actions"].shape == (4, 2)


def seen_by_cameras(steps, seed=0):
    """Observations of one robot with cameras, without a batch axis."""
    data, rng = picture_data(), np.random.default_rng(seed)
    return [
        {key: data.arrays[key][index] for key in data.spec.observation}
        for index in rng.integers(0, data.num_steps, steps)
    ]


@pytest.fixture(scope="module")
def sees():
    return picture_policy("separable", picture_data(), TransformConfig())


def test_pictures_with_channels_first_are_turned_where_that_is_sure_and_it_is_told_once(sees, start, connect, caplog):
    """openpi's client of ALOHA sends images/cam_high as channels, height, width."""
    client, (observation,) = connect(start(sees, keys={"eye": "images/eye"})), seen_by_cameras(1)
    sent = {"images/eye" if key == "eye" else key: value for key, value in observation.items()}
    expected = client.infer(sent, reset=True, episode=0)["actions"]
    with caplog.at_level("WARNING", "scd_robot.serve"):
        for _ in range(2):
            turned = {**sent, "images/eye": np.ascontiguousarray(np.moveaxis(observation["eye"], -1, 0))}
            np.testing.assert_array_equal(client.infer(turned, reset=True, episode=0)["actions"], expected)
    assert caplog.text.count("pictures as channels, height, width ('images/eye')") == 1
    reader = ObservationReader({"camera": ArraySpec((8, 3, 3), "uint8")})
    with pytest.raises(ShapeError, match="'camera' must be"):  # height or channels first?
        reader.read({"camera": np.arange(72, dtype=np.uint8).reshape(3, 8, 3)})


def test_a_camera_that_sends_nothing_is_nil_on_the_wire(sees, start):
    """And acts as it does in process."""
    policy = picture_policy("separable", picture_data(), TransformConfig())
    remote, streams = RemotePolicy(start(sees).address), [seen_by_cameras(6, seed) for seed in range(2)]
    assert remote.spec.optional == policy.spec.optional == ("eye", "wrist")
    for one in (remote, policy):
        one.reset(episodes=[3, 4])
    for step in range(6):
        observation = {key: np.stack([stream[step][key] for stream in streams]) for key in streams[0][step]}
        observation |= {"eye": None} if step % 3 else {}
        np.testing.assert_allclose(remote.act(observation), policy.act(observation), rtol=0, atol=1e-4)
    remote.close()


@pytest.mark.parametrize("spoilt", ["eye", "position"])
@pytest.mark.parametrize("together", [False, True])
def test_a_picture_of_nothing_is_refused_alone_and_changes_nothing(sees, spoilt, together):
    """Straight at the engine: of two robots one shows black, or NaN, two control steps after the last observation."""
    streams = [seen_by_cameras(5, seed) for seed in range(2)]

    def play(bad):
        engine, (one, other) = Engine(sees), (Session(), Session())
        for step in range(3):
            both = zip((one, other), streams, strict=True)
            engine.run([(at, Request(seen[step], observe_only=True, step=step)) for at, seen in both])
        requests = [(one, Request(streams[0][3] | bad, step=4, prompt="a", session="b"))] if bad else []
        requests += [(other, Request(streams[1][3], step=3))] if together else []
        told = engine.run(requests)
        assert [type(answer) for answer in told[: bool(bad)]] == [ShapeError] * bool(bad)
        assert (one.step, one.planned, one.prompt, one.name) == (2, False, None, None)
        (last,) = engine.run([(one, Request(streams[0][4], step=5))])
        return [answer.message for answer in [*told[bool(bad) :], last]]

    nothing = 0 * streams[0][3][spoilt] + (0 if spoilt == "eye" else np.float32("nan"))
    spoiled, good = play({spoilt: nothing}), play({})
    assert len(spoiled) == len(good) == 1 + together
    for told, expected in zip(spoiled, good, strict=True):
        assert not told["scd/new_history"]
        assert told["scd/step"] == expected["scd/step"]
        np.testing.assert_allclose(told["actions"], expected["actions"], **CLOSE)


@pytest.mark.parametrize("together", [False, True])
def test_what_the_policy_refuses_of_several_costs_nobody_a_history(monkeypatch, stream, together):
    policy = small_policy()
    engine, observe, sessions = Engine(policy), policy.observe, [Session(), Session()]

    def refuse(observation, executed=None):
        if (observation["goal"] == 7).any():
            raise ShapeError("not this one")
        observe(observation, executed)

    monkeypatch.setattr(policy, "observe", refuse)
    first, second, third = stream(3)
    engine.run([(session, Request(first, observe_only=True)) for session in sessions])
    last = [second | {"goal": np.full(2, 7, np.float32)}, second]
    requests = [(session, Request(seen)) for session, seen in zip(sessions, last, strict=True)]
    results = engine.run(requests[: 1 + together])
    assert [isinstance(result, ShapeError) for result in results] == [True, False][: 1 + together]
    assert [session.history.position.tolist() for session in sessions] == [[1], [1 + together]]
    results = engine.run([(session, Request(third, step=5)) for session in sessions])
    assert not any(result.message["scd/new_history"] for result in results)


@pytest.mark.parametrize(("more", "told"), [({}, 1), ({"reset": True}, 0)])
def test_a_new_prompt_is_told_of_where_a_history_goes_on(stream, caplog, more, told):
    engine, session = Engine(small_policy()), Session()
    first, second = stream(2)
    engine.run([(session, Request(first, prompt="stay"))])
    engine.run([(session, Request(second, prompt="go", **more))])
    assert caplog.text.count("its history goes on") == told


def test_answers_hold_no_array_but_the_actions(start, stream):
    """openpi's ActionChunkBroker takes every array of an answer apart along its first axis."""
    with connect_raw(start().address, compression=None) as raw:
        raw.recv()
        for observation in stream(3):
            raw.send(pack(observation))
            answer = unpack(raw.recv())
            assert [key for key, value in answer.items() if isinstance(value, np.ndarray)] == ["actions"]
            json.dumps({key: value for key, value in answer.items() if key != "actions"})


def test_a_client_that_is_gone_leaves_the_others_alone(start, connect, stream):
    server = start()
    good, (observation,) = connect(server), stream(1)
    for _ in range(5):
        client = PolicyClient(server.address)
        client.send(observation)
        client.close()
        assert good.infer(observation)["actions"].shape == (4, 2)


def test_warming_up_accuses_no_sensor_and_leaves_the_watch_as_it_was(start, caplog):
    policy = small_policy()
    policy._far = FarInputs({"position": ([1.0, 1.0], [1.05, 1.05])})  # 0 is more than ten times its width away
    start(policy)
    assert "broken sensor" not in caplog.text
    assert set(policy._far._limits) == {"position"}


def test_steps_per_plan_that_the_policy_cannot_plan_in_are_refused():
    policy = small_policy({"history_stride": 2}, num_executed=2)
    with pytest.raises(ConfigError, match="steps_per_plan 3 must be a multiple of 2"):
        Engine(policy, steps_per_plan=3)
