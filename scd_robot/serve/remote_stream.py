"""A policy behind a server, for the control loop: every observation goes there, plans come when they come.

The loop's thread never waits for the network. What is late is late as a plan of this machine would be; what is lost
makes the history begin anew, with the robot holding until there is a plan of the new one.

Shapes: Ta chunk length, Da action width, d committed actions.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.control.clock import Clock, MonotonicClock
from scd_robot.control.planner import PlanRequest, PlanResult, checked_plan
from scd_robot.errors import ConfigError, PolicyChangedError, ScdRobotError, ShapeError
from scd_robot.serve.client import PolicyClient
from scd_robot.serve.endpoint import (
    Endpoint,
    HistoryLostError,
    RequestRefusedError,
    Served,
    check_weights,
    read_answer,
    running_keys,
)
from scd_robot.serve.link import Answered, Broken, Link, SocketLink
from scd_robot.serve.wire import pack
from scd_robot.types import ActionArray, Observation
from scd_robot.usable import missing

__all__ = ["RemoteStream"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Sent:
    history: int
    step: int
    begins: bool
    request: PlanRequest | None
    sent_s: float


class RemoteStream:
    """Gives a control loop the policy of a server: `ControlLoop(robot, RemoteStream.connect(address), limits).run()`.

    It is the policy and its planner (`scd_robot.control.planner.PlanningPolicy`), for one loop. Each control step's
    observation is sent with what was executed before it, and with the wish for a plan where the loop has one.

    Args:
        link: to the server.
        served: what it said about its policy.
        task: in words, for a policy of several; None = the server's.
        answer_timeout_s: a server that leaves a message unanswered for so long is given up, and connected to again.
        clock: the loop's.

    Attributes:
        spec: of the policy.
        link: as given.

    Raises:
        ConfigError: the timeout is not positive.
        UnknownNameError: the policy does not know the task.
    """

    def __init__(
        self,
        link: Link,
        served: Served,
        *,
        task: str | None = None,
        answer_timeout_s: float = 5.0,
        clock: Clock | None = None,
    ) -> None:
        if not answer_timeout_s > 0:
            raise ConfigError(f"answer_timeout_s must be positive [s], got {answer_timeout_s}")
        self.spec = served.spec
        self.link, self._served, self._timeout_s = link, served, answer_timeout_s
        self.task = task
        self._clock: Clock = clock or MonotonicClock()
        self._connected = False
        self._closed = False
        self._begins = True  # the next observation begins a history
        self._history = 0  # counts them; answers to what was sent of another say nothing about the present one
        self._step = 0  # of the newest observation, in its history
        self._pending: dict[str, Any] | None = None  # it, until it is known whether a plan of it is wanted
        self._unanswered: deque[_Sent] = deque()
        self._flying: PlanRequest | None = None
        self._result: PlanResult | None = None
        self._lost: str | None = None  # why the history is gone; the loop was not told yet
        self._changed: PolicyChangedError | None = None  # likewise, other weights

    @classmethod
    def connect(
        cls,
        address: str,
        *,
        task: str | None = None,
        answer_timeout_s: float = 5.0,
        connect_timeout_s: float = 10.0,
        **options: Any,
    ) -> "RemoteStream":
        """Of the server at an address.

        Args:
            address: see `Endpoint`.
            task: see above.
            answer_timeout_s: likewise.
            connect_timeout_s: for so long it tries to reach the server at first; later it never gives up.
            **options: of `Endpoint`.

        Raises:
            ServerUnreachableError: nobody answers there, or it does not let us in.
            ConfigError: it is no server of this project.
            UnknownNameError: its policy does not know the task.
        """
        with PolicyClient(address, connect_timeout_s=connect_timeout_s, **options) as client:
            served = Served.of(address, client.metadata)
        served.check_task(task)
        return cls(SocketLink(Endpoint(address, **options)), served, task=task, answer_timeout_s=answer_timeout_s)

    # What the loop asks of its policy.

    @property
    def task(self) -> str | None:
        """What it does, in words; one of `spec.tasks`, or None = the server's. May be changed at any time.

        Raises:
            UnknownNameError: the policy does not know it.
        """
        return self._task

    @task.setter
    def task(self, text: str | None) -> None:
        self._served.check_task(text)
        self._task = text

    @property
    def may_plan(self) -> bool:
        """Whether the newest observation can be sent with the wish for a plan."""
        return self._pending is not None and self._step % self._served.history_stride == 0

    @property
    def max_prefix(self) -> int:
        """Most committed actions that a plan begins with."""
        return self._served.max_prefix

    def check_guidance(self, max_gain: float) -> None:
        """Raises ConfigError where the server's plans cannot be guided towards a running chunk with this gain."""
        greatest = self._served.max_gain
        if not greatest:
            raise ConfigError(
                f"plans of {self._served.address} cannot be guided: its policy is an export or has a sampler of few "
                "steps, or it is an earlier scd serve; choose another strategy"
            )
        if max_gain > greatest:
            raise ConfigError(
                f"a gain of up to {max_gain:g} overshoots at {self._served.address}, whose policy takes at most "
                f"{greatest:g} (its denoising steps): choose a smaller max_gain, or serve it with more of them"
            )

    def reset(self, rows: Sequence[int] | None = None, episodes: Sequence[int] | None = None) -> None:
        """The next observation begins a history.

        Raises:
            ConfigError: the stream was closed, as a loop does at its end.
        """
        if self._closed:
            raise ConfigError(
                f"the stream from {self._served.address} was closed at the end of its loop; connect again"
            )
        self._history += 1
        self._begins, self._pending, self._lost = True, None, None

    def observe(self, observation: Observation, executed_action: ActionArray | None = None) -> None:
        """Takes in one control step; while there is no connection it is left out, and nothing can be planned.

        Args:
            observation: arrays (1, ...), all keys of `spec.observation`; None for those of `spec.optional` that did not
                come.
            executed_action: (1, Da) what was done in the step before; None = not known.

        Raises:
            HistoryLostError: the server has forgotten the history, once for each time.
            PolicyChangedError: it has other weights than before, likewise; nothing was sent to it yet.
            ShapeError: a picture that is not one of bytes, or a key is None that may not be.
        """
        self._take_in()
        self.skip()
        if (reason := self._lost) is not None:
            self.reset()
            raise HistoryLostError(f"the history at {self._served.address} is lost: {reason}")
        if (changed := self._changed) is not None:
            self._changed = None
            raise changed
        if not self._connected:
            return
        message: dict[str, Any] = {
            self._served.keys[key]: self._as_told(key, observation) for key in self.spec.observation
        }
        self._step = 0 if self._begins else self._step + 1
        message["scd/step"] = self._step
        if self._begins:
            message["scd/reset"] = True
        elif executed_action is not None:
            message["scd/executed"] = np.asarray(executed_action, np.float32)
        if (said := self._served.prompt(self.task)) is not None:
            message["prompt"] = said
        self._pending = message

    def snapshot(self) -> None:
        """A plan is made of what the server has: nothing is handed over."""

    # What the loop asks of its planner.

    @property
    def busy(self) -> bool:
        """Whether a plan is waited for."""
        return self._flying is not None

    def submit(self, request: PlanRequest) -> None:
        """Sends the newest observation with the wish for a plan."""
        assert self._flying is None, "one plan at a time"
        assert self._pending is not None, "may_plan"
        if request.prefix is not None:
            self._pending["scd/prefix"] = np.asarray(request.prefix[0], np.float32)
        if request.running is not None:
            self._pending |= running_keys(request.running)
        self._post(request)
        self._flying = request

    def skip(self) -> None:
        """Sends the newest observation, if it was not yet, for the history alone."""
        if self._pending is not None:
            self._pending["scd/observe_only"] = True
            self._post(None)

    def poll(self) -> PlanResult | None:
        """The plan, if it is there."""
        self._take_in()
        result, self._result = self._result, None
        if result is not None:
            self._flying = None
        return result

    def close(self) -> None:
        """Ends the connection, for good."""
        self._closed = True
        self.link.close()

    # The connection.

    def _as_told(self, key: str, observation: Observation) -> NDArray[Any] | None:
        """What is sent of one key of an observation (1, ...); None = nothing came."""
        spec, value = self.spec.observation[key], observation.get(key)
        if value is None:
            if key not in self.spec.optional:
                raise ShapeError(f"observation {key!r} {missing(observation, False)}")
            return None
        array = np.asarray(value[0])
        if spec.dtype == "uint8" and array.dtype != np.uint8:
            raise ShapeError(f"observation {key!r} must hold uint8 from 0 to 255, got {array.dtype}")
        return array.astype(spec.dtype, copy=False)

    def _post(self, request: PlanRequest | None) -> None:
        message, self._pending = self._pending, None
        assert message is not None
        sent = _Sent(self._history, self._step, self._begins, request, self._clock.now())
        self.link.send(pack(message))
        self._unanswered.append(sent)
        self._begins = False

    def _take_in(self) -> None:
        """All that happened since the last call."""
        while (event := self.link.receive()) is not None:
            if isinstance(event, Answered):
                self._take(event.frame)
            elif isinstance(event, Broken):
                self._break(f"the connection broke ({event.reason})")
            else:
                self._welcome(event.metadata)
        if self._unanswered and self._clock.now() - self._unanswered[0].sent_s > self._timeout_s:
            self._give_up(f"the server did not answer within {self._timeout_s:g} s")

    def _welcome(self, metadata: dict[str, Any]) -> None:
        try:
            again = Served.of(self._served.address, metadata)
        except ScdRobotError as error:
            self._give_up(str(error))
            return
        if again.spec != self._served.spec:
            self._give_up("the server has another policy now, with other observations or actions")
            return
        before, now = (served.provenance.get("weights_sha256") for served in (self._served, again))
        try:
            check_weights(again.address, before, now)
        except PolicyChangedError as error:
            self._changed = error
        if again.task != self._served.task:
            logger.warning(
                "%s does %r of itself now; this goes on with %r", again.address, again.task, self._served.task
            )
        self._served, self._connected = replace(again, task=self._served.task), True
        logger.info("connected to %s", self._served.address)

    def _take(self, frame: str | bytes) -> None:
        """An answer: they come in the order of what was sent."""
        if not self._unanswered:
            self._give_up("the server answers more often than it was asked")
            return
        sent = self._unanswered.popleft()
        try:
            answer = read_answer(self._served.address, frame)
        except RequestRefusedError as error:
            self._fail(sent, str(error))
            if sent.history == self._history:  # nobody knows whether the observation is part of it
                self._lose(str(error))
            return
        except ScdRobotError as error:
            self._fail(sent, str(error))
            self._give_up(str(error))
            return
        told = answer.get("scd/step"), answer.get("scd/new_history")
        if told != (sent.step, sent.begins):
            self._fail(sent, "the answer is to something else")
            forgot = told == (sent.step, True)
            answered = f"the server answered for control step {told[0]}, asked was {sent.step}"
            self._give_up("the server had forgotten it, and began another" if forgot else answered)
        elif sent.request is not None:
            actions = np.asarray(answer.get("actions", np.zeros(0)))
            self._result = checked_plan(self.spec, sent.request, actions[None])

    def _give_up(self, reason: str) -> None:
        self.link.restart()
        self._break(reason)

    def _break(self, reason: str) -> None:
        logger.warning("%s: %s; connecting again", self._served.address, reason)
        for sent in self._unanswered:
            self._fail(sent, reason)
        self._unanswered.clear()
        self._connected, self._pending = False, None
        self._lose(reason)

    def _fail(self, sent: _Sent, reason: str) -> None:
        if sent.request is not None:
            self._result = PlanResult(sent.request, None, reason)

    def _lose(self, reason: str) -> None:
        """The next observation begins a history; which is a loss where one had begun, of a policy that has any."""
        if not self._begins and self.spec.history_length > 1:
            self._lost = reason
        self._history += 1
        self._begins, self._pending = True, None
