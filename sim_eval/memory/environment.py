"""What all tasks of the memory suite share: options, phases, the hand, sensor noise, pictures, judgement.

A task is a subclass with the hooks at the end of `MemoryEnvironment`; everything a user of an environment calls is
here. Lengths in m, angles in rad, times in s; the table's top is z = 0.
"""

import abc
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scd_robot.errors import ConfigError, SimulatorError, UnknownNameError
from scd_robot.sim_eval.adapter import canonical_name, check_physics, checked_action, digest
from scd_robot.types import ActionArray, ArraySpec, EnvironmentSpec, StepResult

__all__ = ["MemoryEnvironment", "MemoryOptions", "Verdict"]

# "wrong": the manipulation was completed, but not as what was hidden asked for; "failure": it went wrong itself.
Verdict = Literal["success", "wrong", "failure"] | None
Vector = NDArray[np.float64]

SENSOR_NOISE = 0.001  # standard deviation of every measured length [m], angle [rad]
MIXED, MIXED_DELAYS = "mixed", (10, 50, 200)
_IMAGE = 64  # pixels


@dataclass(frozen=True)
class MemoryOptions:
    """What may follow the colon in an environment's name.

    Attributes:
        delay: control steps between the end of the cue and the signal to act; "mixed" = 10, 50 or 200, drawn for each
            episode.
        cue_visible: 1 = the twin in which nothing has to be remembered: the cue stays in view.
        choices: how many different cues there are, in tasks with discrete ones.
        observation: "state", or "image" for a picture in the place of everything but `proprio`.
        expert: "privileged" knows the cue; "memoryless" guesses it once per episode.
        max_steps: control steps after which an episode is truncated; 0 = as many as the task needs at this delay.
    """

    delay: int | str = 50
    cue_visible: int = 0
    choices: int = 4
    observation: str = "state"
    expert: str = "privileged"
    max_steps: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("delay", 0), ("max_steps", 0), ("choices", 2)):
            value = 0 if (name, self.delay) == ("delay", MIXED) else getattr(self, name)
            if not isinstance(value, int) or value < lowest:
                raise ConfigError(f"{name} must be a whole number of at least {lowest}, got {value}")
        if self.choices > 8:
            raise ConfigError(f"choices must be at most 8, got {self.choices}")
        if self.cue_visible not in (0, 1):
            raise ConfigError(f"cue_visible must be 0 or 1, got {self.cue_visible}")
        if self.observation not in ("state", "image"):
            raise UnknownNameError("observation of scd_memory", str(self.observation), ("state", "image"))
        if self.expert not in ("privileged", "memoryless"):
            raise UnknownNameError("expert of scd_memory", str(self.expert), ("privileged", "memoryless"))


class MemoryEnvironment(abc.ABC):
    """One task; implements `Environment`.

    Every task observes `proprio`, the position of the robot's joints, and `signal` (1): 1 from the moment on at which
    it is to act, 0 before. What else there is, the task says. Measured lengths and angles carry normal noise of 1 mm
    or mrad, so that a cue cannot survive in the last digits of a position. With `observation=image` there are
    `proprio` and `image` (64, 64, 3) uint8, in which everything else can be seen.

    An action has a number in -1..1 for each joint. With `control` "position" it is where the joint's target is to go,
    -1 and 1 being `target_low` and `target_high`; the targets move there together, in a straight line, by at most
    `reach_per_step` in a control step. With "velocity" it is how far the joint's target moves in one control step, 1
    being `reach_per_step`. While a cue is shown and in the wait the robot holds still, whatever it is asked for, and
    where it has moved before, the wait begins with the same pose in all episodes: it cannot keep the cue in its pose.
    """

    task: ClassVar[str]
    success: ClassVar[str]
    action_dim: ClassVar[int] = 3
    has_choices: ClassVar[bool] = False  # whether the option `choices` means anything
    control: ClassVar[Literal["position", "velocity"]] = "position"
    control_dt: ClassVar[float] = 0.05
    sim_dt: ClassVar[float] = 0.005
    reach_per_step: ClassVar[float] = 0.025  # [m]
    hand_unit: ClassVar[str] = "m"
    target_low: ClassVar[tuple[float, ...]] = (-0.35, -0.35, 0.015)
    target_high: ClassVar[tuple[float, ...]] = (0.35, 0.35, 0.35)
    steps_to_act: int = 80  # control steps an episode needs beside the delay, with a good margin

    def __init__(self, options: MemoryOptions | None = None) -> None:
        """Compiles the task's model (a few ms).

        Args:
            options: None = the defaults.
        """
        import mujoco

        self.options = options or MemoryOptions()
        if self.options.choices != MemoryOptions().choices and not self.has_choices:
            raise ConfigError(f"scd_memory/{self.task} has no choices: leave them out")
        self.model = mujoco.MjModel.from_xml_string(self._scene())
        self.model.opt.timestep = self.sim_dt
        self.data = mujoco.MjData(self.model)
        self._running = False
        self._delays = MIXED_DELAYS if self.options.delay == MIXED else (int(self.options.delay),)
        self.delay = self._delays[0]  # of the present episode
        self.steps = 0
        self.target = np.zeros(self.model.nu)
        keys = {"proprio": ArraySpec((self.model.nu,)), "signal": ArraySpec((1,)), **self._keys()}
        if self.options.observation == "image":
            keys = {"proprio": keys["proprio"], "image": ArraySpec((_IMAGE, _IMAGE, 3), "uint8")}
        self.spec = EnvironmentSpec(
            name=canonical_name(f"scd_memory/{self.task}", self.options),
            observation=keys,
            action_dim=self.action_dim,
            action_low=(-1.0,) * self.action_dim,
            action_high=(1.0,) * self.action_dim,
            control_dt=self.control_dt,
            max_steps=self.options.max_steps or max(self._delays) + self.steps_to_act,
            success=self.success,
            hand_unit=self.hand_unit,
            action_kind="absolute" if self.control == "position" else "delta",
        )

    def reset(self, seed: int) -> dict[str, NDArray[Any]]:
        """Starts an episode whose initial state is a function of `seed` alone; returns its first observation."""
        import mujoco

        if not 0 <= seed < 2**32:
            raise ConfigError(f"the seed of {self.spec.name} must be in 0..{2**32 - 1}, got {seed}")
        start, sensors, guess, delay = np.random.SeedSequence(int(seed)).spawn(4)
        self.delay = int(np.random.default_rng(delay).choice(self._delays))
        self._sensors = np.random.default_rng(sensors)
        mujoco.mj_resetData(self.model, self.data)
        self.steps = 0
        self._begin(np.random.default_rng(start))
        if self.options.expert == "memoryless" and not self.options.cue_visible:
            self._guess(np.random.default_rng(guess))
        self.data.qpos[: self.model.nu] = self.target
        self.data.ctrl[:] = self.target
        mujoco.mj_forward(self.model, self.data)
        self._running = True
        return self._observation()

    def step(self, action: ActionArray) -> StepResult:
        """Applies one action (Da,), clipped to -1..1.

        Raises:
            ShapeError: the action is not (Da,).
            ActionError: the action holds NaN or infinite values.
            SimulatorError: the episode is over, or the physics became unstable.
        """
        self._check_running()
        executed = checked_action(action, self.spec, self.steps)
        if not self._is_free():
            executed = self.standstill()
        self._move(executed)
        self.steps += 1
        verdict = self._judge()
        return StepResult(
            observation=self._observation(),
            reward=float(verdict == "success"),
            success=verdict == "success",
            terminated=verdict in ("wrong", "failure"),
            truncated=self.steps >= self.spec.max_steps,
            executed_action=executed,
            info=self._completion(verdict),
        )

    def state_hash(self) -> str:
        """Hexadecimal SHA-256 of joint positions and velocities, target, and everything hidden."""
        self._check_running()
        return digest((self.data.qpos, self.data.qvel, self.target, [self.delay], self._hidden()))

    def expert_action(self) -> ActionArray:
        """The scripted expert's action (Da,) for the present state; which expert, the option `expert` says.

        While the robot holds still anyway, that is what it asks for.
        """
        self._check_running()
        if not self._is_free():
            return self.standstill()
        return np.clip(self._expert(), -1.0, 1.0).astype(np.float32)

    def render(self, height: int, width: int) -> NDArray[np.uint8]:
        """An RGB frame (height, width, 3) of the present state."""
        import mujoco

        from scd_robot.sim_eval.rendering import render_frame

        self._check_running()
        self._paint()
        mujoco.mj_kinematics(self.model, self.data)  # what was moved since the last physics step
        return render_frame(self.model, self.data, height, width, camera="view")

    def close(self) -> None:
        """Releases the simulator; may be called twice."""
        self._running = False

    @property
    def hand(self) -> Vector:
        """(nu,) position of the robot's joints."""
        position: Vector = self.data.qpos[: self.model.nu]
        return position

    @property
    def positions(self) -> dict[str, Vector]:
        """(3,) exact position of each body [m], the hand among them."""
        import mujoco

        self._check_running()
        mujoco.mj_kinematics(self.model, self.data)  # what was moved since the last physics step
        return {body.name: body.xpos.copy() for body in map(self.data.body, range(1, self.model.nbody))}

    def towards(self, place: ArrayLike) -> Vector:
        """Action (3,) that moves the target of the hand to a place in a straight line.

        With `control` "position" it asks for the next point of that line, not for its end: what is asked for then
        changes little from one control step to the next, so that a mistake about where to go is a small one.
        """
        offset = (np.asarray(place, np.float64) - self.target[:3]) / self.reach_per_step
        offset /= max(1.0, float(np.linalg.norm(offset)))
        if self.control == "velocity":
            return offset
        return self.asking_for(self.target[:3] + self.reach_per_step * offset)

    def asking_for(self, place: ArrayLike) -> Vector:
        """Action (3,), with `control` "position", that asks for a place."""
        low, high = np.array(self.target_low), np.array(self.target_high)
        return np.asarray(2 * (np.asarray(place, np.float64) - low) / (high - low) - 1)

    def put_hand(self, place: ArrayLike) -> None:
        """Puts the hand (3,) somewhere, at rest: at the beginning of a wait, so that its pose keeps nothing."""
        self.target[:3] = place
        self.data.qpos[:3], self.data.qvel[:3], self.data.ctrl[:3] = self.target[:3], 0.0, self.target[:3]

    def standstill(self) -> ActionArray:
        """The action (Da,) that moves nothing now."""
        action = np.zeros(self.action_dim, np.float32)
        if self.control == "position":
            action[:3] = self.towards(self.target)
        return action

    def paint(self, geom: str, colour: ArrayLike) -> None:
        """Gives a geom a colour (3,) or (4,)."""
        rgba = np.ones(4)
        rgba[: len(np.asarray(colour))] = colour
        self.model.geom(geom).rgba = rgba

    def _move(self, action: ActionArray) -> None:
        """One control step of physics, the joints' targets moving evenly."""
        import mujoco

        self._before_physics(action)
        motion = np.zeros_like(self.target)
        joints = min(self.action_dim, self.model.nu)
        low, high = (np.array(bound[: self.model.nu]) for bound in (self.target_low, self.target_high))
        if self.control == "velocity":
            motion[:joints] = self.reach_per_step * action[:joints]
        elif self._is_free():  # else it would go where rounding puts its target
            motion = low + (high - low) * (action[:joints].astype(np.float64) + 1) / 2 - self.target
            motion *= min(1.0, self.reach_per_step / max(float(np.linalg.norm(motion)), 1e-12))
        physics_steps = round(self.control_dt / self.sim_dt)
        for i in range(physics_steps):  # at full speed up to where it stops
            self.data.ctrl[:] = np.clip(self.target + motion * (i + 1) / physics_steps, low, high)
            mujoco.mj_step(self.model, self.data)
        self.target = np.array(self.data.ctrl)
        try:
            check_physics(self.data, self.spec.name, f"in control step {self.steps}")
        except SimulatorError:
            self._running = False
            raise

    def _observation(self) -> dict[str, NDArray[Any]]:
        proprio = self.hand + SENSOR_NOISE * self._sensors.standard_normal(self.model.nu)
        observation: dict[str, NDArray[Any]] = {"proprio": proprio.astype(np.float32)}
        if self.options.observation == "image":
            return observation | {"image": self.render(_IMAGE, _IMAGE)}
        observation["signal"] = np.array([float(self._signal())], np.float32)
        for key, value in self._sense().items():
            observation[key] = np.asarray(value, np.float32)
        return observation

    def measured(self, x: ArrayLike) -> Vector:
        """A length as a sensor gives it."""
        exact = np.asarray(x, np.float64)
        return exact + SENSOR_NOISE * self._sensors.standard_normal(exact.shape)

    def _check_running(self) -> None:
        if not self._running:
            raise SimulatorError(f"no episode of {self.spec.name} is running; call reset(seed) first")

    # Hooks.

    @abc.abstractmethod
    def _scene(self) -> str:
        """MJCF whose first joints are the robot's, one actuator each, and which has a camera `view`."""

    @abc.abstractmethod
    def _keys(self) -> dict[str, ArraySpec]:
        """Observation keys beside `proprio` and `signal`."""

    @abc.abstractmethod
    def _begin(self, rng: np.random.Generator) -> None:
        """Draws an episode: sets `target` to the joints' start, other bodies' positions, and what is hidden."""

    def _guess(self, rng: np.random.Generator) -> None:  # noqa: B027 - tasks without a cue have nothing to guess
        """Replaces what the expert believes by a guess."""

    @abc.abstractmethod
    def _hidden(self) -> Vector:
        """Everything an episode draws that positions do not tell, for the hash."""

    @abc.abstractmethod
    def _signal(self) -> bool:
        """Whether the robot is to act now."""

    @abc.abstractmethod
    def _sense(self) -> dict[str, ArrayLike]:
        """The task's observation keys for the present state."""

    @abc.abstractmethod
    def _judge(self) -> Verdict:
        """What the present state means."""

    @abc.abstractmethod
    def _expert(self) -> Vector:
        """The expert's action, not yet clipped."""

    def _is_free(self) -> bool:
        """Whether the robot does what it is asked for in this control step."""
        return self._signal()

    def _completion(self, verdict: Verdict) -> dict[str, bool]:
        """Whether the manipulation was completed, rightly or not."""
        return {"completed": verdict in ("success", "wrong")}

    def _before_physics(self, action: ActionArray) -> None:  # noqa: B027 - most tasks have nothing to do here
        """Does what an action asks for besides moving joints."""

    def _paint(self) -> None:  # noqa: B027
        """Gives geoms the colours that show what is visible now."""
