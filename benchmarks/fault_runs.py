"""Real runs of the control loop in which something really breaks: the second half of `faults.py`.

A policy with random weights drives Meta-World's push-v3, which goes on by the wall clock in a process of its own.
Processes are killed and stopped, threads sleep, files do not fit.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import asyncio
import contextlib
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from websockets.sync.client import connect

from scd_robot.control import ControlLoop, LoopConfig, MonotonicClock, RecorderConfig, WatchdogConfig
from scd_robot.control.inspection import InspectedRobot
from scd_robot.control.recorder import read_record
from scd_robot.serve import RemoteStream
from scd_robot.serve.wire import pack

__all__ = ["REAL", "REAL_DT", "REAL_STEPS", "Server", "policy_with_random_weights", "run_real"]

REAL_DT = 0.05  # slow motion, so that a busy machine can follow
REAL_STEPS = 160
FAULT_AT = 50


class Broken:
    """A policy and a robot that break on demand; everything else is passed on."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.breaks = inner, {}  # by method: called first, with the method's result function

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        broken = self.breaks.get(name)
        return value if broken is None else lambda *args: broken(value, *args)


def fail(method: Callable[..., Any], *args: Any) -> Any:
    """In the place of a call."""
    raise ConnectionError("broken on purpose")


def slow(method: Callable[..., Any], *args: Any) -> Any:
    """A call that takes two seconds."""
    time.sleep(2.0)
    return method(*args)


def spoil(method: Callable[..., Any]) -> Any:
    """NaN in an observation."""
    sample = method()
    return replace(sample, observation={**sample.observation, "proprio": sample.observation["proprio"] * np.nan})


class Frozen:
    """The first observation again and again, with new stamps."""

    kept = None

    def observe(self, method: Callable[..., Any]) -> Any:
        """In the place of the robot's."""
        sample = method()
        self.kept = self.kept or sample
        return replace(sample, observation=self.kept.observation)


class Server:
    """A policy server in a process of its own, at a port that it keeps."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.address = f"ws://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        """Begins; `RemoteStream` waits until it is there."""
        self._process = subprocess.Popen([sys.executable, __file__, str(self._port)], text=True)

    @property
    def pid(self) -> int:
        """Of its process."""
        assert self._process is not None
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """To its process."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """Ends it without a farewell."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def is_left(self, patience_s: float = 10.0) -> bool:
        """Whether its metrics tell, within a while, that no connection is open any more."""
        until = time.monotonic() + patience_s
        while time.monotonic() < until:
            with urllib.request.urlopen(f"http{self.address.removeprefix('ws')}/metrics", timeout=60.0) as answer:
                if b"\nscd_connections 0\n" in answer.read():
                    return True
            time.sleep(0.1)
        return False


class Deserters:
    """Clients of a server, one after another, that ask for a plan and are gone while it is made.

    Attributes:
        gone: so many.
    """

    def __init__(self, address: str) -> None:
        from latency import observation

        self._request = pack({key: value[0] for key, value in observation(np.random.default_rng(0)).items()})
        self._address, self._over, self.gone = address, threading.Event(), 0
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        """The first one comes."""
        self._thread.start()

    def stop(self) -> None:
        """No more of them."""
        self._over.set()

    def join(self) -> None:
        """Waits for the last one."""
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            client = connect(self._address, compression=None)
            client.recv()
            client.send(self._request)
            time.sleep(0.002)  # a plan takes longer
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.socket.shutdown(socket.SHUT_RD)  # wakes the client's own thread, so that
            client.socket.close()  # the server is told by a reset, as by a process that was killed
            self.gone += 1


def policy_with_random_weights() -> Any:
    """Of the default size, in slow motion."""
    import torch
    from latency import make_policy

    torch.set_num_threads(1)
    policy = make_policy(64, 4)
    policy.spec = replace(policy.spec, control_dt=REAL_DT)
    return policy


def serve(port: int) -> None:
    """What the server's process does."""
    from scd_robot.serve.server import PolicyServer, ServerConfig

    asyncio.run(PolicyServer(policy_with_random_weights(), ServerConfig(port=port)).run())


# By name: what breaks, where, for how many control steps, the fault that must be recorded, and whether it ends the run.
REAL: dict[str, tuple[str | None, Any, int, str | None, bool]] = {
    "nothing": (None, None, 0, None, False),
    "slow plan": ("policy", {"plan_from": slow}, 12, "plan_late", False),
    "exception in a plan": ("policy", {"plan_from": fail}, 20, "plan_error", False),
    "exception in the encoder": ("policy", {"observe": fail}, 5, "encoder_error", False),
    "NaN observation": ("robot", {"observe": spoil}, 20, "bad_observation", False),
    "frozen sensor": ("robot", {"observe": Frozen}, 30, "frozen_observation", False),
    "stall of the loop": ("robot", {"observe": slow}, 1, "clock_gap", False),
    "commands get lost": ("robot", {"send": fail}, 5, "robot_send", False),
    "simulator killed": ("kill", None, 0, "robot_observe", True),
    "full disk": ("disk", {"plan_from": fail}, 10, "recorder_error", False),
    "server killed and started again": ("server killed", None, 10, "encoder_error", False),
    "server that hangs": ("server hangs", None, 40, "encoder_error", False),
    "clients gone in the middle of a plan": ("server deserted", None, 60, None, False),
}


class Stage:
    """Breaks and mends things; called in each control step."""

    def __init__(self, name: str, at: int, robot: Broken, policy: Any, kill: Callable[[], None], server: Any) -> None:
        self._where, breaks, self._steps, *_ = REAL[name]
        self._breaks = {key: value().observe if value is Frozen else value for key, value in (breaks or {}).items()}
        self._at, self._robot, self._policy, self._kill, self._server = at, robot, policy, kill, server
        self._unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        self._count = 0
        self.deserters = Deserters(server.address) if self._where == "server deserted" else None

    def __call__(self) -> bool:
        """Never stops the loop."""
        self._count += 1
        if self._count == self._at:
            self._break()
        if self._count == self._at + self._steps:
            self._mend()
        if self._count == self._at + self._steps + 25:
            self.end()
        return False

    def end(self) -> None:
        """The disk has room again, and no client leaves any more."""
        if self.deserters is not None:
            self.deserters.stop()
        resource.setrlimit(resource.RLIMIT_FSIZE, self._unlimited)

    def _break(self) -> None:
        if self._where == "kill":
            self._kill()
        elif self._where == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, self._unlimited[1]))
        elif self._where == "server killed":
            threading.Thread(target=self._server.kill).start()
        elif self._where == "server hangs":
            self._server.signal(signal.SIGSTOP)
        elif self._where == "server deserted":
            self.deserters.start()
        if self._breaks:
            (self._robot if self._where == "robot" else self._policy).breaks = self._breaks

    def _mend(self) -> None:
        if self.deserters is not None:
            self.deserters.stop()
        self._robot.breaks = {}
        if isinstance(self._policy, Broken):
            self._policy.breaks = {}
        if self._where == "server killed":
            threading.Thread(target=self._server.start).start()
        elif self._where == "server hangs":
            self._server.signal(signal.SIGCONT)


@contextlib.contextmanager
def policy_for(name: str) -> Iterator[tuple[Any, Server | None]]:
    """The policy of a run, and its server if it is behind one."""
    if not str(REAL[name][0]).startswith("server"):
        yield Broken(policy_with_random_weights()), None
        return
    server = Server()
    try:
        stream = RemoteStream.connect(server.address, connect_timeout_s=600.0, answer_timeout_s=1.0)
        stream.spec = replace(stream.spec, control_dt=REAL_DT)
        yield stream, server
    finally:
        server.kill()


def run_real(name: str, episode: int) -> dict[str, Any]:
    """Breaks one thing in the middle of a run, and tells what came of it."""
    from scd_robot.sim_eval.simulated_robot import SimulatedRobot, limits_of

    expected, ends = REAL[name][3:]
    steps = REAL_STEPS if not str(REAL[name][0]).startswith("server") else 3 * REAL_STEPS  # which takes time to start
    began_s = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        policy_for(name) as (policy, server),
        SimulatedRobot("metaworld/push-v3", episode, control_dt=REAL_DT) as simulator,
    ):
        records = Path(folder) / "records"
        robot = Broken(simulator)
        limits = limits_of(simulator.spec, velocity=10.0)
        port = InspectedRobot(robot, limits, REAL_DT, MonotonicClock())
        give_up_s = 3.0 if server is None else 60.0
        watchdog = WatchdogConfig(max_age_s=0.4, frozen_keys=("proprio",), max_frozen_s=0.5, give_up_s=give_up_s)
        config = LoopConfig(watchdog=watchdog, recorder=RecorderConfig(records, least_apart_s=1.0))
        loop = ControlLoop(port, policy, limits, config)
        process = simulator._process
        kill = lambda: os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]  # noqa: E731
        stage = Stage(name, FAULT_AT + episode % 25, robot, policy, kill, server)
        try:
            report = loop.run(steps, stage)
        finally:
            stage.end()
        gone, kept = 0, True
        if server is not None and stage.deserters is not None:
            stage.deserters.join()
            gone, kept = stage.deserters.gone, server.is_left()
        recorded: Counter[str] = Counter()
        for record in sorted(records.iterdir()) if records.exists() else []:
            recorded |= Counter(read_record(record)[1]["faults"])
    missing = Counter(report.faults) - recorded
    ended_early = report.steps < steps
    told = bool(gone) if name.startswith("clients") else expected is None or bool(report.faults.get(expected))
    return {
        "fine": not port.violations and not missing and ended_early == ends and told and kept,
        "commands": port.commands,
        "unsafe": port.violations[:5],
        "faults": report.faults,
        "unrecorded": dict(missing),
        "ended_early": ended_early,
        "clients_gone": gone,
        "plans": report.plans,
        "pacing": report.pacing,
        "times_ms": report.times_ms,
        "wall_s": time.monotonic() - began_s,
    }


if __name__ == "__main__":
    serve(int(sys.argv[1]))
