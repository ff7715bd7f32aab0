"""A robot of LeRobot (0.4.4) under the control loop. LeRobot itself is not imported: whoever has a robot of it has it.

LeRobot reads motors and cameras in one call that may block, and a bus of motors takes one call at a time. So a thread
reads when `observe` asks for it, and no command is sent meanwhile. `observe` waits for a short time only: what is not
there by then is there the next time, and until then the loop sees the age of what it has.

Shapes: Da action width.
"""

import logging
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from scd_robot.control.clock import Clock, MonotonicClock
from scd_robot.control.interfaces import Command, Sample
from scd_robot.control.names import PRESENT_STEPS, NameMap, Rest
from scd_robot.errors import ActionError, ConfigError, ShapeError, UnknownNameError
from scd_robot.types import ActionArray, PolicySpec

__all__ = ["LeRobotDevice", "LeRobotRobot", "names_of_robot"]

logger = logging.getLogger(__name__)

_PATIENCE = 0.25  # of a control step: how long observe() waits for a reading; send() waits twice as long for its end
_CLOSE_TIMEOUT_S = 5.0


class LeRobotDevice(Protocol):
    """What is used of `lerobot.robots.Robot`."""

    @property
    def observation_features(self) -> dict[str, Any]:
        """By name, `float` for a number, and the shape of a camera's picture."""
        ...

    @property
    def action_features(self) -> dict[str, Any]:
        """By name, `float`."""
        ...

    @property
    def is_connected(self) -> bool:
        """Whether it is connected."""
        ...

    @property
    def is_calibrated(self) -> bool:
        """Whether its motors are."""
        ...

    def connect(self, calibrate: bool = True) -> None:
        """Connects; `calibrate` may ask questions at the terminal."""
        ...

    def get_observation(self) -> dict[str, Any]:
        """Reads everything."""
        ...

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Commands, and tells what was really sent."""
        ...

    def disconnect(self) -> None:
        """Disconnects."""
        ...


def names_of_robot(device: LeRobotDevice) -> NameMap:
    """The names under which LeRobot would record this robot; those of a dataset are `NameMap.of_dataset`."""
    features = device.observation_features
    vectors = {"observation.state": tuple(name for name, kind in features.items() if not isinstance(kind, tuple))}
    cameras = {f"observation.images.{name}": name for name, kind in features.items() if isinstance(kind, tuple)}
    return NameMap(vectors, cameras, tuple(device.action_features))


class LeRobotRobot:
    """A `scd_robot.control.Robot` of one of LeRobot; `with` connects and disconnects it.

    Args:
        device: `lerobot.robots.Robot`.
        spec: of the policy.
        names: of its observations and actions on the robot.
        rest: (Da,) see `Limits`; None = all actions name places, as `<motor>.pos` does.
        patience_s: how long `observe` waits for a reading; None = a quarter of a control step.
        clock: of the loop; None = the machine's.

    Raises:
        UnknownNameError: a name that the robot does not have.
        ShapeError: a camera of another size than the policy's.
        ConfigError: more or fewer names than the policy has numbers; an action whose place the robot does not tell.
    """

    def __init__(
        self,
        device: LeRobotDevice,
        spec: PolicySpec,
        names: NameMap,
        *,
        rest: Rest | None = None,
        patience_s: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        names.check(spec)
        _check_features(device, spec, names, rest)
        self._device, self._spec, self._names, self._rest = device, spec, names, rest
        self._present_s = PRESENT_STEPS * spec.control_dt
        self._patience_s = _PATIENCE * spec.control_dt if patience_s is None else patience_s
        self._clock: Clock = clock or MonotonicClock()
        self._bus = threading.Lock()
        self._told = threading.Condition()  # guards the next four
        self._wanted = self._closed = False
        self._outcome: Sample | Exception = ConnectionError("the robot is not connected: call connect(), or use 'with'")
        self._failed_at: TracebackType | None = None
        self._place: tuple[Command, float] | None = None  # the last finite pose, and when it was read
        self._executed: ActionArray | None = None
        self._sent: Command | None = None
        self._thread: threading.Thread | None = None

    def connect(self) -> None:
        """Connects where that is not done, reads once, and begins to read.

        Raises:
            ConfigError: it is not calibrated, or tells numbers of other units than the data's.
            ShapeError: it does not tell what its features promise.
        """
        self._wanted = self._closed = False
        self._place = self._executed = self._sent = None
        if not self._device.is_connected:
            self._device.connect(calibrate=False)
        try:
            if not self._device.is_calibrated:
                raise ConfigError(f"{self._device} is not calibrated; run lerobot-calibrate first")
            outcome = self._read()
            if isinstance(outcome, Exception):
                raise outcome
            self._names.check_start(outcome.observation, self._spec.observation)
        except BaseException:
            self._device.disconnect()
            raise
        self._outcome = outcome
        self._thread = threading.Thread(target=self._live, name="lerobot reader", daemon=True)
        self._thread.start()

    def observe(self) -> Sample:
        """The newest sample; its stamp is when reading it began. Raises what the last reading raised."""
        with self._told:
            if self._thread is not None and not self._wanted and not self._closed:
                self._wanted = True
                self._told.notify_all()
                self._told.wait_for(lambda: not self._wanted, self._patience_s)
            outcome = self._outcome
            failed_at = self._failed_at
        if isinstance(outcome, Exception):
            raise outcome.with_traceback(failed_at)  # where reading failed; it would grow each time that it is raised
        return outcome

    def send(self, command: Command) -> None:
        """Commands the motors.

        Raises:
            TimeoutError: a reading goes on for too long; the command is not sent.
        """
        if not np.isfinite(command).all():
            raise ActionError(f"a command must be finite, got {command}")
        if not self._bus.acquire(timeout=2 * self._patience_s):
            raise TimeoutError("the command was not sent: get_observation() has not come back")
        try:
            self._executed, self._sent = None, np.array(command)
            told = self._device.send_action(self._names.named(command))
            self._executed = self._as_sent(told)
        finally:
            self._bus.release()

    def hold(self) -> None:
        """Commands the present position, and rest where commands name none.

        Raises:
            TimeoutError: the position was not read in the last two control steps: an old one would be a jump back.
                Motors are told to stay at what they were commanded last, and what is a velocity to rest.
        """
        resting = self._names.resting(self._sent, self._rest)
        if resting is not None and None not in (self._rest or ()):  # which needs no reading
            self.send(resting)
            return
        cause: Exception | None = None
        try:
            self.observe()
        except Exception as error:
            cause = error
        age = float("inf") if self._place is None else self._clock.now() - self._place[1]
        if self._place is None or age > self._present_s:
            if resting is not None:
                self.send(resting)
            raise TimeoutError(f"cannot hold the present position, which was read {age:.3f} s ago") from cause
        self.send(self._place[0])

    def close(self) -> None:
        """Ends reading and disconnects, with which many robots let their motors go; may be called twice."""
        with self._told:
            if not self._closed:
                self._closed = True
                self._outcome, self._failed_at = ConnectionError("the robot was disconnected"), None
            self._told.notify_all()
        if self._thread is not None:
            self._thread.join(_CLOSE_TIMEOUT_S)
            if self._thread.is_alive():
                logger.warning("get_observation() has not come back; the robot is disconnected all the same")
            self._thread = None
        if self._device.is_connected:
            self._device.disconnect()

    def __enter__(self) -> "LeRobotRobot":
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _live(self) -> None:
        """The thread: a reading whenever one is wanted."""
        while self._is_asked():
            self._tell(self._read())

    def _is_asked(self) -> bool:
        """Waits until a reading is wanted; False at the end."""
        with self._told:
            self._told.wait_for(lambda: self._wanted or self._closed)
            return not self._closed

    def _tell(self, outcome: Sample | Exception) -> None:
        with self._told:
            if not self._closed:
                self._outcome, self._wanted = outcome, False
                self._failed_at = outcome.__traceback__ if isinstance(outcome, Exception) else None
                self._told.notify_all()

    def _read(self) -> Sample | Exception:
        try:
            with self._bus:
                stamp_s, executed = self._clock.now(), self._executed
                values = self._device.get_observation()
            observation = self._names.observation(values, self._spec.observation)
            pose = self._names.pose(values, self._rest)
        except Exception as error:
            return error
        if np.isfinite(pose).all():
            self._place = (pose, stamp_s)
        return Sample(observation, stamp_s, pose, executed)

    def _as_sent(self, told: Mapping[str, Any] | None) -> ActionArray | None:
        """(Da,) what LeRobot made of a command; None where it does not tell."""
        if not told or not set(self._names.action) <= told.keys():
            return None
        return np.array([told[name] for name in self._names.action], np.float32)


def _check_features(device: LeRobotDevice, spec: PolicySpec, names: NameMap, rest: Rest | None) -> None:
    """Raises where names, policy and robot do not go together."""
    features = device.observation_features
    numbers = [name for name, kind in features.items() if not isinstance(kind, tuple)]
    pictures = {name: kind for name, kind in features.items() if isinstance(kind, tuple)}
    for key, array in spec.observation.items():
        if key in names.cameras:
            camera = names.cameras[key]
            if camera not in pictures:
                raise UnknownNameError("camera of the robot", camera, pictures)
            if tuple(pictures[camera]) != array.shape:
                raise ShapeError(
                    f"the camera {camera!r} gives {tuple(pictures[camera])}, and the policy's {key!r} is "
                    f"{array.shape}; set its height and width to those of the data"
                )
        else:
            for name in names.vectors[key]:
                if name not in numbers:
                    raise UnknownNameError(f"number of the robot, wanted for {key!r},", name, numbers)
    for name in names.action:
        if name not in device.action_features:
            raise UnknownNameError("action of the robot", name, device.action_features)
    left = [name for name in device.action_features if name not in names.action]
    if left:
        raise ConfigError(f"the robot wants an action for {left[0]!r}, which the policy does not have")
    if rest is not None and len(rest) != len(names.action):
        raise ConfigError(f"the policy has {len(names.action)} actions, rest is for {len(rest)}")
    still = rest or (None,) * len(names.action)
    blind = [name for name, at in zip(names.action, still, strict=True) if at is None and name not in numbers]
    if blind:
        raise ConfigError(
            f"the robot does not tell where {blind[0]!r} is, so nobody knows what holds it there; if it is no place "
            "but a velocity, give `rest`"
        )
