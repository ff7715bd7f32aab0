"""Rehearsals of a control loop whose policy is behind a server: the way there, and the server, as a script has them.

    rehearse(incidents, config, limits, connect=behind_a_server)

The loop and its side of the connection (`RemoteStream`) are the real ones, in virtual time.

Shapes: Da action width.
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from scd_robot.control.clock import VirtualClock
from scd_robot.control.rehearsal import Script, ScriptedPolicy
from scd_robot.errors import ScdRobotError
from scd_robot.serve.endpoint import Served
from scd_robot.serve.link import Answered, Broken, Connected, Event
from scd_robot.serve.remote_stream import RemoteStream
from scd_robot.serve.wire import pack, unpack
from scd_robot.types import RunningChunk

__all__ = ["ScriptedLink", "behind_a_server", "metadata_of"]

_MAX_GAIN = 8.0
_ADDRESS = "ws://scripted"
_WAY_S = 0.004  # there and back
_SLOW = 30.0
_RECONNECT_S = 0.05


class ScriptedLink:
    """A connection to a server that keeps one history of a scripted policy, and refuses what does not continue it.

    Args:
        policy: of the server.
        script: what happens to the server and on the way.
        clock: the loop's.
        duration_s: how long the next plan takes [s].

    Attributes:
        refused: what the server refused though no script said so: mistakes of the client.
        connections: that were made.
    """

    def __init__(
        self, policy: ScriptedPolicy, script: Script, clock: VirtualClock, duration_s: Callable[[], float]
    ) -> None:
        self._policy, self._script, self._clock, self._duration_s = policy, script, clock, duration_s
        self._coming: deque[tuple[float, Event]] = deque()  # with the time from which on it is there
        self._up = False
        self._cut = False  # a frame got lost, hence none after it arrives through this connection
        self._next_attempt_s = 0.0
        self._step: int | None = None  # of the history; None = there is none
        self._gap = False  # the script made one in the history, of which the client may not know yet
        self.refused: list[str] = []
        self.connections = 0

    def send(self, frame: bytes) -> None:
        """Lets the server answer, if the frame reaches it."""
        self._cut = self._cut or self._script.going_on("network_cut") is not None
        if not self._up or self._cut:
            return
        slow = _SLOW if self._script.going_on("slow_network") else 1.0
        if self._script.going_on("forgotten"):
            self._step = None
        answer, took_s = self._answer(unpack(frame))
        there_s = max(self._clock.now() + took_s + slow * _WAY_S, self._coming[-1][0] if self._coming else 0.0)
        self._coming.append((there_s, Answered(answer)))
        if self._script.going_on("duplicated"):
            self._coming.append((there_s, Answered(answer)))
        if self._script.going_on("reordered") and len(self._coming) > 1:
            (one_s, one), (other_s, other) = self._coming.pop(), self._coming.pop()
            self._coming += [(other_s, one), (one_s, other)]

    def receive(self) -> Event | None:
        """What is there by now."""
        now = self._clock.now()
        if self._script.going_on("server_gone"):
            if self._up:
                self._drop()
                return Broken("no close frame received or sent")
            return None
        if self._script.going_on("network_cut"):
            return None
        if not self._up and now >= self._next_attempt_s:
            self._up, self.connections = True, self.connections + 1
            return Connected(metadata_of(self._policy))
        if self._coming and self._coming[0][0] <= now:
            return self._coming.popleft()[1]
        return None

    def restart(self) -> None:
        """Another connection, a little later."""
        self._drop()

    def close(self) -> None:
        """Nothing is to be ended."""

    def _drop(self) -> None:
        self._coming.clear()
        self._up, self._cut, self._step = False, False, None
        self._next_attempt_s = self._clock.now() + _RECONNECT_S

    def _answer(self, message: dict[str, Any]) -> tuple[str | bytes, float]:
        """What the server says, and how long that takes it [s]."""
        if self._script.going_on("refused"):
            self._gap = True
            return "ConfigError: refused by the script", 0.0
        begins = self._step is None or message.get("scd/reset", False)
        if begins:
            self._gap = False
            self._policy.reset()
        elif message["scd/step"] != (self._step or 0) + 1:
            self.refused += [] if self._gap else [f"step {message['scd/step']} after {self._step}"]
            return "ConfigError: a control step is missing", 0.0
        self._step = message["scd/step"]
        seen = {key: message[key][None] for key in self._policy.spec.observation}
        try:
            self._policy.observe(seen, None if begins else message.get("scd/executed"))
            told: dict[str, Any] = {"scd/step": self._step, "scd/new_history": begins}
            if message.get("scd/observe_only"):
                return pack(told), 0.0
            prefix = message.get("scd/prefix")
            given = self._policy.snapshot()
            committed = None if prefix is None else np.asarray(prefix)[None]
            actions = self._policy.plan_from(given, committed, _running(message))[0]
        except (ScdRobotError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}", 0.0
        return pack({**told, "actions": actions}), self._duration_s()


def _running(message: Mapping[str, Any]) -> RunningChunk | None:
    """What a plan is to be guided towards."""
    if "scd/running" not in message:
        return None
    gain, exact = message["scd/max_gain"], not message["scd/identity"]
    return RunningChunk(np.asarray(message["scd/running"])[None], message["scd/delay_steps"], gain, exact)


def metadata_of(policy: ScriptedPolicy) -> dict[str, Any]:
    """What a server says first."""
    spec = policy.spec
    return {
        "protocol": "openpi+scd",
        "version": 1,
        "server": "script",
        "policy": {},
        "action_horizon": spec.chunk_length,
        "action_dim": spec.action_dim,
        "control_dt": spec.control_dt,
        "history": spec.history_length,
        "history_stride": 1,
        "num_executed": spec.num_executed,
        "max_prefix": policy.max_prefix,
        "max_gain": _MAX_GAIN,
        "tasks": list(spec.tasks),
        "keys": {
            key: {**array.to_json(), "name": key, "optional": key in spec.optional}
            for key, array in spec.observation.items()
        },
    }


def behind_a_server(
    policy: ScriptedPolicy, script: Script, clock: VirtualClock, duration_s: Callable[[], float]
) -> RemoteStream:
    """`Connect` of `scd_robot.control.rehearsal`; a server is given up after half a second."""
    link = ScriptedLink(policy, script, clock, duration_s)
    served = Served.of(_ADDRESS, metadata_of(policy))
    return RemoteStream(link, served, answer_timeout_s=0.5, clock=clock)
