"""Random faults against the whole loop in virtual time; every command is checked at the robot's port."""

import logging
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scd_robot.control import (
    DelayConfig,
    ExecutionConfig,
    Limits,
    LoopConfig,
    RecorderConfig,
    StartGuard,
    WatchdogConfig,
    Workspace,
)
from scd_robot.control.executor import Strategy
from scd_robot.control.recorder import find_record, read_record
from scd_robot.control.rehearsal import KINDS, Incident, rehearse
from scd_robot.control.watchdog import FAULTS
from scd_robot.serve.rehearsal import behind_a_server

STEPS = 60
INF = float("inf")
BOX = Workspace((-0.9,), (0.9,), lambda command: command[:1] + 0.3 * np.sin(3 * command[1:]))
LIMITS = {
    "places": Limits((-1.0, -1.0), (1.0, 1.0), (2.0, 1.0), (20.0, 5.0), (None, None)),
    "workspace": Limits((-1.0, -1.0), (1.0, 1.0), (2.0, 3.0), (10.0, 5.0), (None, None), BOX),
    "velocities": Limits((-1.0, -2.0), (1.0, 1.0), (4.0, INF), (20.0, 50.0), (0.0, 0.0)),
    "place and gripper": Limits((-1.0, 0.0), (1.0, 1.0), (INF, INF), (INF, INF), (None, 0.5)),
}


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


incidents = st.builds(Incident, st.sampled_from(KINDS), st.integers(0, STEPS - 10), st.integers(1, 12))
reactions = st.sampled_from(["hold", "slow", "stop"])
watchdogs = st.builds(
    WatchdogConfig,
    stale_observation=reactions,
    frozen_keys=st.just(("camera",)),
    max_frozen_s=st.just(0.2),
    frozen_observation=reactions,
    late_plan=reactions,
    max_plan_age_s=st.sampled_from([0.1, 0.4, INF]),
    plan_error=st.sampled_from(["retry", "stop"]),
    robot_error=st.sampled_from(["hold", "stop"]),
    give_up_s=st.sampled_from([1.0, 10.0]),
)
guards = st.builds(
    StartGuard, st.sampled_from([None, (0.1, 0.1)]), st.sampled_from(["blend", "refuse"]), st.sampled_from([0.3, 1.0])
)
executions = st.builds(
    ExecutionConfig,
    st.sampled_from(get_args(Strategy)),
    st.sampled_from([None, 1, 4, 12, 16]),
    delay=st.just(DelayConfig(window=10, warm_up=1)),
)
configs = st.builds(LoopConfig, st.integers(1, 4), executions, watchdogs, guards)


@settings(max_examples=200, deadline=None)
@given(
    script=st.lists(incidents, max_size=6),
    config=configs,
    limits=st.sampled_from(list(LIMITS.values())),
    plan_steps=st.sampled_from([0.0, 0.5, 1.5, 6.0, 14.0]),
    seed=st.integers(0, 9),
    tells_executed=st.booleans(),
)
def test_no_schedule_of_faults_makes_a_command_unsafe(script, config, limits, plan_steps, seed, tells_executed):
    done = rehearse(
        script, config, limits, steps=STEPS, seed=seed, plan_steps=plan_steps, tells_executed=tells_executed
    )
    assert done.violations == []
    assert done.raised is None, "no scripted fault ends the loop by an exception"
    assert done.report.state == "stopped"
    assert done.report.faults.keys() <= FAULTS.keys()


@pytest.mark.parametrize("name", LIMITS)
def test_without_faults_it_runs_and_reports_none(name):
    done = rehearse([], LoopConfig(servo_steps=2), LIMITS[name], steps=STEPS)
    assert done.violations == []
    assert done.report.faults == {}
    assert done.states["running"] >= STEPS - 5


FAULT_OF = {
    "drop": "stale_observation",
    "delay": "stale_observation",
    "nan": "bad_observation",
    "shape": "bad_observation",
    "freeze": "frozen_observation",
    "future": "bad_observation",
    "observe_crash": "robot_observe",
    "send_crash": "robot_send",
    "send_lost": "robot_send",
    "stall": "clock_gap",
    "slow_plan": "plan_late",
    "plan_crash": "plan_error",
    "plan_nan": "plan_error",
    "plan_shape": "plan_error",
    "encoder_crash": "encoder_error",
}


@pytest.mark.parametrize("kind", FAULT_OF)
def test_each_fault_is_recorded_and_the_loop_recovers(kind: str, tmp_path: Path):
    watchdog = WatchdogConfig(frozen_keys=("camera",), max_frozen_s=0.3)
    config = LoopConfig(watchdog=watchdog, recorder=RecorderConfig(tmp_path, least_apart_s=1.0))
    done = rehearse([Incident(kind, 30, 12)], config, LIMITS["places"], steps=100)
    assert done.report.faults[FAULT_OF[kind]] >= 1
    assert (done.violations, done.unrecorded) == ([], 0)
    assert done.records >= 1
    assert done.states["running"] >= 60, "it runs before and after"


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("drop", "stale_observation"),
        ("freeze", "frozen_observation"),
        ("slow_plan", "late_plan"),
        ("plan_crash", "plan_error"),
        ("send_crash", "robot_error"),
    ],
)
def test_a_fault_that_is_to_stop_the_loop_does(kind, option):
    watchdog = WatchdogConfig(frozen_keys=("camera",), max_frozen_s=0.3, **{option: "stop"})
    done = rehearse([Incident(kind, 30, 12)], LoopConfig(watchdog=watchdog), LIMITS["places"], steps=100)
    assert 30 <= done.report.steps < 60
    assert done.report.state == "stopped"


@pytest.mark.parametrize(("kind", "option"), [("drop", "stale_observation"), ("slow_plan", "late_plan")])
def test_a_fault_that_is_to_slow_the_loop_down_does(kind, option):
    watchdog = WatchdogConfig(**{option: "slow"})
    done = rehearse([Incident(kind, 30, 12)], LoopConfig(watchdog=watchdog), LIMITS["places"], steps=100)
    assert done.states["slow"] > 0
    assert done.states["running"] > 50


@pytest.mark.parametrize("connect", [None, behind_a_server])
@pytest.mark.parametrize("reaction", ["hold", "slow", "stop"])
def test_a_stale_plan_is_not_followed_and_is_answered_as_a_late_one(reaction, connect, tmp_path):
    """A plan takes 10 control steps, 0.5 s, while there are 12 actions to go on with."""
    config = LoopConfig(
        execution=ExecutionConfig("receding", 4),
        watchdog=WatchdogConfig(late_plan=reaction, max_plan_age_s=0.4),
        recorder=RecorderConfig(tmp_path),
    )
    done = rehearse([Incident("slow_plan", 30, 5)], config, LIMITS["places"], plan_steps=0.5, steps=80, connect=connect)
    assert (done.report.faults["stale_plan"], done.report.faults.get("plan_late", 0)) == (1, 0)
    assert (done.report.plans["stale"], done.violations, done.unrecorded) == (1, [], 0)
    assert read_record(find_record(tmp_path))[1]["plans"]["stale"] == 1
    assert (done.report.steps < 60) == (reaction == "stop")
    assert (done.states["slow"] > 0) == (reaction == "slow")
    if reaction != "stop":
        assert done.states["running"] >= 60, "before and after"


def test_a_full_disk_is_a_fault_and_its_record_is_written_later(tmp_path: Path):
    config = LoopConfig(recorder=RecorderConfig(tmp_path, least_apart_s=1.0))
    script = [Incident("plan_crash", 20, 10), Incident("disk_full", 15, 40)]
    done = rehearse(script, config, LIMITS["places"], steps=120)
    assert done.report.faults["recorder_error"] >= 1
    assert (done.unrecorded, done.violations) == (0, [])
    assert not list(tmp_path.glob(".*.part"))


def test_holding_for_too_long_gives_up():
    script = [Incident("drop", 20, 200)]
    config = LoopConfig(watchdog=WatchdogConfig(give_up_s=1.0))
    done = rehearse(script, config, LIMITS["places"], steps=200)
    assert done.report.faults["gave_up"] == 1
    assert done.report.steps < 60


def test_what_was_seen_while_a_human_moved_the_robot_is_not_where_it_is():
    script = [Incident("pause", 20, 12), Incident("drop", 31, 3)]
    done = rehearse(script, LoopConfig(), LIMITS["places"], steps=80)
    assert done.violations == []
    assert done.states["paused"] >= 5
    assert done.states["running"] >= 50


def test_a_sample_of_before_a_lost_command_is_not_where_the_robot_is():
    """Not even one of the same instant: nobody knows whether the command was followed."""
    script = [Incident("stall", 48, 12), Incident("send_lost", 60, 8)]
    for seed in range(5):
        done = rehearse(script, LoopConfig(servo_steps=4), LIMITS["places"], steps=80, seed=seed)
        assert done.violations == []
