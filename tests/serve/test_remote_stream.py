"""The control loop over a policy behind a server: on the fake clock with scripted faults, and with a real server."""

import contextlib
import logging
import time
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_policies import small_policy

from scd_robot.control import (
    ControlLoop,
    DelayConfig,
    ExecutionConfig,
    Limits,
    LoopConfig,
    MonotonicClock,
    RecorderConfig,
    Sample,
    VirtualClock,
    WatchdogConfig,
)
from scd_robot.control.executor import Strategy
from scd_robot.control.inspection import InspectedRobot
from scd_robot.control.recorder import find_record, read_record
from scd_robot.control.rehearsal import (
    KINDS,
    LINK_KINDS,
    SPEC,
    Incident,
    Script,
    ScriptedPolicy,
    ScriptedRobot,
    rehearse,
)
from scd_robot.errors import ConfigError, ShapeError, UnknownNameError
from scd_robot.serve import HistoryLostError, RemoteStream, ServerUnreachableError
from scd_robot.serve.endpoint import Served
from scd_robot.serve.rehearsal import ScriptedLink, behind_a_server, metadata_of
from scd_robot.serve.server import ServerConfig, running_server
from scd_robot.serve.wire import unpack

PLACES = Limits((-1.0, -1.0), (1.0, 1.0), (2.0, 1.0), (20.0, 5.0), (None, None))
DT = SPEC.control_dt


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Kept:
    """`connect` of a rehearsal; keeps the link."""

    def __call__(self, *parts):
        stream = behind_a_server(*parts)
        self.link = stream.link
        return stream


def test_it_sends_the_commands_that_a_policy_in_process_would(monkeypatch):
    sent = []
    send = ScriptedRobot.send
    monkeypatch.setattr(ScriptedRobot, "send", lambda robot, command: sent.append(command) or send(robot, command))
    script = [Incident("reset", 20), Incident("pause", 40, 8), Incident("slow_plan", 60, 3), Incident("drop", 75, 2)]
    found = []
    for connect in (None, behind_a_server):
        done = rehearse(script, LoopConfig(servo_steps=2), PLACES, steps=100, plan_steps=1.5, connect=connect)
        found.append((np.array(sent), done.states, done.report.plans, done.report.faults))
        sent.clear()
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert len(found[0][0]) > 150
    assert found[0][1:] == found[1][1:]


FAULT_OF = {
    "server_gone": "encoder_error",
    "network_cut": "encoder_error",
    "slow_network": "plan_late",
    "duplicated": "encoder_error",
    "reordered": "encoder_error",
    "refused": "encoder_error",
    "forgotten": "encoder_error",
}


@pytest.mark.parametrize("kind", LINK_KINDS)
def test_each_fault_is_recorded_and_the_loop_recovers(kind, tmp_path):
    steps = 40 if kind == "slow_network" else 14
    config = LoopConfig(recorder=RecorderConfig(tmp_path, least_apart_s=1.0))
    if kind == "slow_network":  # 30 times 4 ms is no fault by itself; with plans of 6 control steps it is
        config = replace(config, execution=ExecutionConfig("receding", 12))
    kept = Kept()
    plan_steps = 6.0 if kind == "slow_network" else 1.5
    done = rehearse([Incident(kind, 30, steps)], config, PLACES, steps=140, plan_steps=plan_steps, connect=kept)
    assert done.report.faults[FAULT_OF[kind]] >= 1
    assert (done.violations, done.unrecorded, kept.link.refused) == ([], 0, [])
    assert done.records >= 1
    assert done.states["running"] >= 70, "it runs before and after"
    assert done.report.state == "stopped"


@pytest.mark.parametrize("resets", [False, True])
def test_a_refusal_costs_the_history_it_was_of_and_no_other(resets):
    """The way takes longer than a control step: when the next history begins, refusals of the last one are to come."""
    script = [Incident("slow_network", 0, 100), Incident("refused", 30), *([Incident("reset", 31)] if resets else [])]
    kept = Kept()
    done = rehearse(script, LoopConfig(execution=ExecutionConfig("receding")), PLACES, steps=80, connect=kept)
    assert done.report.faults.get("encoder_error", 0) == (0 if resets else 1)
    assert (done.violations, kept.link.refused) == ([], [])
    assert done.states["running"] >= 60


def test_it_stands_still_while_the_server_is_away_and_gives_up_as_configured():
    kept = Kept()
    config = LoopConfig(watchdog=WatchdogConfig(give_up_s=1.0))
    done = rehearse([Incident("server_gone", 20, 500)], config, PLACES, steps=200, connect=kept)
    assert done.report.faults["gave_up"] == 1
    assert done.report.faults["encoder_error"] == 1, "a connection that broke counts once"
    assert done.report.steps < 60
    assert done.violations == []


def test_a_policy_without_a_memory_goes_on_with_its_chunk_while_it_connects_again(monkeypatch):
    monkeypatch.setattr(ScriptedPolicy, "spec", replace(SPEC, history_length=1), raising=False)
    monkeypatch.setattr("scd_robot.control.rehearsal.SPEC", replace(SPEC, history_length=1))
    done = rehearse([Incident("server_gone", 29, 3)], LoopConfig(), PLACES, steps=80, connect=behind_a_server)
    assert "encoder_error" not in done.report.faults
    assert done.states["running"] >= 75
    assert done.violations == []


@pytest.mark.parametrize("history_length", [1, 8])
@pytest.mark.parametrize("reaction", ["hold", "stop"])
def test_a_server_that_comes_back_with_other_weights_is_a_fault(reaction, history_length, monkeypatch, tmp_path):
    monkeypatch.setattr(ScriptedPolicy, "spec", replace(SPEC, history_length=history_length), raising=False)
    monkeypatch.setattr("scd_robot.control.rehearsal.SPEC", replace(SPEC, history_length=history_length))
    told = []

    def metadata(policy):
        told.append("new" if len(told) >= 2 else "old")  # when it was asked, and in the first connection
        return {**metadata_of(policy), "policy": {"weights_sha256": told[-1]}}

    monkeypatch.setattr("scd_robot.serve.rehearsal.metadata_of", metadata)
    config = LoopConfig(watchdog=WatchdogConfig(changed_policy=reaction), recorder=RecorderConfig(tmp_path))
    script = [Incident("server_gone", 30, 4), Incident("server_gone", 60, 4)]
    done = rehearse(script, config, PLACES, steps=100, connect=behind_a_server)
    assert done.report.faults["changed_policy"] == 1, "of each change"
    assert (done.violations, done.unrecorded) == ([], 0)
    assert (done.report.steps < 50) == (reaction == "stop")
    events = read_record(find_record(tmp_path))[1]["events"]
    assert any("other weights than before: new, not old" in event["detail"] for event in events)
    if reaction == "hold":
        assert done.states["running"] >= 70


incidents = st.builds(Incident, st.sampled_from(KINDS + LINK_KINDS), st.integers(0, 50), st.integers(1, 12))
links = st.builds(Incident, st.sampled_from(LINK_KINDS), st.integers(0, 50), st.integers(1, 12))
watchdogs = st.builds(
    WatchdogConfig,
    late_plan=st.sampled_from(["hold", "slow", "stop"]),
    max_plan_age_s=st.sampled_from([0.1, 0.4, float("inf")]),
    plan_error=st.sampled_from(["retry", "stop"]),
    give_up_s=st.sampled_from([1.0, 10.0]),
)
executions = st.builds(
    ExecutionConfig,
    st.sampled_from(get_args(Strategy)),
    st.sampled_from([None, 1, 4, 16]),
    delay=st.just(DelayConfig(window=10, warm_up=1)),
)


@settings(max_examples=100, deadline=None)
@given(
    script=st.tuples(st.lists(incidents, max_size=4), st.lists(links, min_size=1, max_size=3)),
    config=st.builds(LoopConfig, st.integers(1, 3), executions, watchdogs),
    plan_steps=st.sampled_from([0.0, 0.5, 1.5, 6.0]),
    tells_executed=st.booleans(),
)
def test_no_schedule_of_faults_makes_a_command_unsafe_or_a_history_go_wrong(script, config, plan_steps, tells_executed):
    kept = Kept()
    how = {"steps": 60, "plan_steps": plan_steps, "tells_executed": tells_executed, "connect": kept}
    done = rehearse([*script[0], *script[1]], config, PLACES, **how)
    assert (done.violations, done.raised, kept.link.refused) == ([], None, [])
    assert done.report.state == "stopped"


class Alone:
    """A stream by itself, its scripted link and its clock."""

    def __init__(self, incidents=(), timeout_s=0.5, tasks=(), optional=()):
        self.clock = VirtualClock()
        script = Script(incidents, self.clock, DT)
        self.policy = ScriptedPolicy(script, 0)
        self.policy.spec = replace(SPEC, tasks=tasks, optional=optional)
        self.link = ScriptedLink(self.policy, script, self.clock, lambda: 0.06)
        served = Served.of("ws://scripted", metadata_of(self.policy))
        self.stream = RemoteStream(self.link, served, answer_timeout_s=timeout_s, clock=self.clock)
        self.seen = {"state": np.zeros((1, 2), np.float32), "camera": np.zeros((1, 4, 4), np.uint8)}


def test_what_did_not_come_goes_as_nil_where_the_policy_does_without():
    alone = Alone(optional=("camera",))
    frames = []
    alone.link.send = frames.append
    alone.stream.observe(alone.seen)
    alone.stream.observe({**alone.seen, "camera": None})
    alone.stream.skip()
    with pytest.raises(ShapeError, match=r"'state' is missing; got \['camera', 'state'\]"):
        alone.stream.observe({**alone.seen, "state": None})
    first, second = map(unpack, frames)
    assert first["camera"].shape == (4, 4)
    assert second["camera"] is None
    assert second["state"].shape == (2,)


def test_a_server_that_leaves_a_message_unanswered_is_given_up():
    alone = Alone([Incident("network_cut", 1, 4)], timeout_s=0.5)
    alone.stream.observe(alone.seen)
    alone.clock.advance(1.5 * DT)
    alone.stream.observe(alone.seen)  # sends the one before, which gets lost
    alone.clock.advance(0.5)
    alone.stream.observe(alone.seen)
    alone.clock.advance(0.01)
    with pytest.raises(HistoryLostError, match=r"lost: the server did not answer within 0\.5 s"):
        alone.stream.observe(alone.seen)
    assert not alone.stream.may_plan
    alone.clock.advance(0.1)
    alone.stream.observe(alone.seen)
    assert alone.stream.may_plan
    assert alone.link.connections == 2


def test_a_server_that_forgot_the_history_is_told_as_such():
    alone = Alone([Incident("forgotten", 2)])
    alone.stream.observe(alone.seen)
    alone.clock.advance(2 * DT)
    alone.stream.observe(alone.seen)
    alone.stream.skip()
    alone.clock.advance(DT)
    with pytest.raises(HistoryLostError, match="lost: the server had forgotten it"):
        alone.stream.observe(alone.seen)


def test_a_server_that_has_another_policy_after_it_was_gone_is_never_followed():
    alone = Alone([Incident("server_gone", 2, 2)])
    alone.stream.observe(alone.seen)
    alone.stream.skip()
    alone.clock.advance(2 * DT)
    with pytest.raises(HistoryLostError, match="no close frame"):
        alone.stream.observe(alone.seen)
    alone.policy.spec = replace(SPEC, chunk_length=8)
    for _ in range(10):
        alone.clock.advance(DT)
        alone.stream.observe(alone.seen)
        assert not alone.stream.may_plan
    assert alone.link.connections >= 3, "it tries again"


@pytest.mark.parametrize(
    "told", [{"server": None}, {"keys": None}, {"keys": {"state": {"name": "state"}}}, {"keys": 3}]
)
def test_a_server_that_does_not_say_what_it_serves_is_never_followed(told, monkeypatch):
    alone = Alone()
    metadata = {key: value for key, value in {**metadata_of(alone.policy), **told}.items() if value is not None}
    monkeypatch.setattr("scd_robot.serve.rehearsal.metadata_of", lambda policy: metadata)
    for _ in range(8):
        assert alone.stream.poll() is None
        alone.stream.observe(alone.seen)
        assert not alone.stream.may_plan
        alone.clock.advance(DT)
    assert alone.link.connections >= 3, "it tries again"


def test_what_cannot_be_done_through_a_server_is_told_at_once():
    alone = Alone()
    for gain, told in ((0.0, "cannot be guided"), (4.0, "takes at most 4")):
        alone.stream._served = replace(alone.stream._served, max_gain=gain)
        with pytest.raises(ConfigError, match=told):
            ControlLoop(Wanderer(), alone.stream, PLACES, LoopConfig(execution=ExecutionConfig("guided")))
    with pytest.raises(ConfigError, match="answer_timeout_s must be positive"):
        Alone(timeout_s=0.0)
    alone.stream.observe(alone.seen)
    with pytest.raises(ShapeError, match="'camera' must hold uint8"):
        alone.stream.observe({**alone.seen, "camera": alone.seen["state"]})
    with pytest.raises(ServerUnreachableError, match="no policy server answers"):
        RemoteStream.connect("ws://127.0.0.1:1", connect_timeout_s=0.1)


# A real server, by the wall clock.


class Wanderer:
    """A robot at its last command, which sees its own place."""

    def __init__(self):
        self.at, self.rng = np.zeros(2), np.random.default_rng(0)

    def observe(self):
        position, goal = self.at.astype(np.float32), self.rng.uniform(-1, 1, 2).astype(np.float32)
        return Sample({"position": position, "goal": goal}, time.monotonic(), self.at.copy())

    def send(self, command):
        self.at = np.array(command)

    def hold(self):
        pass


class Watched:
    """What a loop asks of a stream, kept."""

    def __init__(self, stream):
        self.stream, self.asked, self.come = stream, [], 0

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def observe(self, observation, executed_action=None):
        self.stream.observe(observation, executed_action)
        if self.stream._pending is not None:
            self.asked.append([dict(observation), executed_action, None, None])

    def submit(self, request):
        self.asked[-1][2] = request
        self.stream.submit(request)

    def poll(self):
        result = self.stream.poll()
        if result is not None:
            next(one for one in self.asked if one[2] is result.request)[3] = result.chunk
            given = result.request.prefix is not None or result.request.running is not None
            self.come += result.chunk is not None and given
        return result


def loop_of(stream, watchdog=None, strategy="prefix"):
    limits = Limits((-3.0, -3.0), (3.0, 3.0), (50.0, 50.0), (2e3, 2e3), (None, None))
    port = InspectedRobot(Wanderer(), limits, stream.spec.control_dt, MonotonicClock())
    execution = ExecutionConfig(strategy, 2, max_gain=4.0)
    return ControlLoop(
        port, stream, limits, LoopConfig(execution=execution, watchdog=watchdog or WatchdogConfig())
    ), port


def test_a_stream_is_of_one_loop_and_the_next_one_is_told_so(start):
    stream = RemoteStream.connect(start().address)
    loop_of(stream)[0].run(max_steps=2)
    loop, port = loop_of(stream)
    with pytest.raises(ConfigError, match="closed at the end of its loop; connect again"):
        loop.run(max_steps=2)
    assert loop.state == "stopped"
    assert port.violations == []


SAMPLER = {"solver": "euler", "num_denoising_steps": 5}


@pytest.mark.parametrize("strategy", ["prefix", "guided", "guided_identity"])
def test_plans_of_a_real_server_are_those_of_the_policy_in_process(start, strategy):
    """Every control step, what was executed, and the committed actions, or what is left of the chunk, arrive."""
    server = start(small_policy(sampler=SAMPLER))
    stream = Watched(RemoteStream.connect(server.address, answer_timeout_s=60.0))
    assert stream.spec == small_policy().spec
    loop, port = loop_of(stream, strategy=strategy)
    report = loop.run(max_steps=1000, until=lambda: len(stream.asked) >= 30 and stream.come >= 4)
    assert port.violations == []
    assert report.faults.get("encoder_error", 0) == 0
    local, plans, given, moved = small_policy(sampler=SAMPLER), 0, 0, 0.0
    local.reset(episodes=[0])
    for observation, executed, request, chunk in stream.asked:
        local.observe(observation, executed)
        if request is not None:
            snapshot = local.snapshot()
            expected, free = (local.plan_from(snapshot, *how) for how in ((request.prefix, request.running), ()))
            if chunk is not None:  # the last one may still be on its way
                np.testing.assert_allclose(chunk, expected[0], rtol=0, atol=1e-4)
                plans, given = plans + 1, given + (request.prefix is not None or request.running is not None)
                moved = max(moved, np.abs(expected - free).max())
    assert min(plans, given) >= 3
    assert moved > 0.01, "a plan that is made without them is another one"


def test_a_server_that_is_started_again_is_found_again_without_an_unsafe_command(start):
    with contextlib.ExitStack() as servers:
        server = servers.enter_context(running_server(small_policy(), ServerConfig(port=0)))
        port_number = int(server.address.rpartition(":")[2])
        stream = RemoteStream.connect(server.address, answer_timeout_s=60.0)
        loop, port = loop_of(stream, WatchdogConfig(give_up_s=60.0, max_age_s=5.0, max_gap_steps=1000))
        events = []

        def stage():
            followed = loop._planning.counts["followed"]
            if not events and followed >= 3:
                servers.close()
                events.append(followed)
            elif len(events) == 1 and loop._journal.faults["encoder_error"]:
                servers.enter_context(running_server(small_policy(), ServerConfig(port=port_number)))
                events.append(loop._planning.counts["followed"])
            return len(events) == 2 and followed >= events[1] + 3

        report = loop.run(max_steps=3000, until=stage)
    assert len(events) == 2
    assert report.plans["followed"] >= events[1] + 3
    assert report.faults["encoder_error"] == 1
    assert port.violations == []


def test_a_task_is_told_and_checked():
    served = Served.of("ws://scripted", {**metadata_of(ScriptedPolicy(None, 0)), "tasks": ["open", "close"]})
    with pytest.raises(UnknownNameError, match="did you mean 'open'"):
        served.check_task("opne")
    served.check_task(None)
    alone = Alone(tasks=("open", "close"))
    alone.stream.task = "open"
    with pytest.raises(UnknownNameError, match="did you mean 'close'"):
        alone.stream.task = "clsoe"
    alone.stream.observe(alone.seen)
    assert alone.stream._pending["prompt"] == "open", "as before"


def test_a_task_of_none_is_the_servers_and_is_told_as_such():
    """The server would refuse an observation without a prompt after one with it. A new server's is not taken over."""
    alone = Alone(tasks=("open", "close"))
    alone.stream._served = replace(alone.stream._served, task="close")
    told = []
    for task in ("open", None):
        alone.stream.task = task
        alone.stream._welcome({**metadata_of(alone.policy), "task": "open"})
        alone.stream.observe(alone.seen)
        told.append(alone.stream._pending["prompt"])
    assert told == ["open", "close"]
