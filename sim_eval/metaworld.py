"""The 50 manipulation tasks of Meta-World 3 (Yu et al., arXiv 1910.10897) with the experts that come with them.

A Sawyer arm is moved by offsets of its hand and an effort of its gripper, Da = 4, at 80 Hz. The observation is the
present part of the benchmark's vector of 39 numbers: the previous frame, which it repeats, would smuggle history into
policies that are meant to have none.

    raw [39] = proprio (4) | object (14) | previous proprio and object (18) | goal (3)

Options in the environment's name: `goal_steps=K` shows the goal in the first K control steps of an episode and zeros
afterwards (0 = never); `max_steps=N` truncates episodes after N control steps (500 as in the benchmark);
`observation=image` gives a picture in the place of object and goal, from `camera=NAME` in `image_size=N` pixels.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import (
    ConfigError,
    MissingDependencyError,
    SimulatorError,
    UnknownNameError,
)
from scd_robot.sim_eval.adapter import canonical_name, check_physics, checked_action, digest, read_options
from scd_robot.types import ActionArray, ArraySpec, EnvironmentSpec, StepResult

__all__ = ["TASKS", "MetaworldEnvironment", "MetaworldOptions", "make"]

# Spelled out, so that a name can be checked before the simulator is imported (or where it is not installed).
TASKS = (
    "assembly-v3",
    "basketball-v3",
    "bin-picking-v3",
    "box-close-v3",
    "button-press-topdown-v3",
    "button-press-topdown-wall-v3",
    "button-press-v3",
    "button-press-wall-v3",
    "coffee-button-v3",
    "coffee-pull-v3",
    "coffee-push-v3",
    "dial-turn-v3",
    "disassemble-v3",
    "door-close-v3",
    "door-lock-v3",
    "door-open-v3",
    "door-unlock-v3",
    "drawer-close-v3",
    "drawer-open-v3",
    "faucet-close-v3",
    "faucet-open-v3",
    "hammer-v3",
    "hand-insert-v3",
    "handle-press-side-v3",
    "handle-press-v3",
    "handle-pull-side-v3",
    "handle-pull-v3",
    "lever-pull-v3",
    "peg-insert-side-v3",
    "peg-unplug-side-v3",
    "pick-out-of-hole-v3",
    "pick-place-v3",
    "pick-place-wall-v3",
    "plate-slide-back-side-v3",
    "plate-slide-back-v3",
    "plate-slide-side-v3",
    "plate-slide-v3",
    "push-back-v3",
    "push-v3",
    "push-wall-v3",
    "reach-v3",
    "reach-wall-v3",
    "shelf-place-v3",
    "soccer-v3",
    "stick-pull-v3",
    "stick-push-v3",
    "sweep-into-v3",
    "sweep-v3",
    "window-close-v3",
    "window-open-v3",
)

_ACTION_DIM = 4
_PROPRIO, _OBJECT, _GOAL = slice(0, 4), slice(4, 18), slice(36, 39)
_UPSIDE_DOWN = ("corner", "corner2", "corner3", "corner4")  # so are these cameras mounted
_CAMERAS = (*_UPSIDE_DOWN, "behindGripper", "gripperPOV", "topview")
_VIDEO_CAMERA = "corner2"
_OUT_OF_SIGHT = (0.0, 0.0, -10.0)  # below the floor


@dataclass(frozen=True)
class MetaworldOptions:
    """What may follow the colon in an environment's name.

    Attributes:
        goal_steps: control steps of an episode in which the goal is shown; afterwards `goal` is zero. None = always.
        max_steps: control steps after which an episode is truncated.
        observation: "state", or "image" for a picture in the place of everything but `proprio`.
        camera: that takes the picture, one of the benchmark's; corner4 is closer than corner2.
        image_size: height and width of the picture [pixel].
    """

    goal_steps: int | None = None
    max_steps: int = 500
    observation: str = "state"
    camera: str = "corner2"
    image_size: int = 64

    def __post_init__(self) -> None:
        for name, lowest in (("goal_steps", 0), ("max_steps", 1), ("image_size", 16)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < lowest):
                raise ConfigError(f"{name} must be a whole number of at least {lowest}, got {value}")
        if self.observation not in ("state", "image"):
            raise UnknownNameError("observation of Meta-World", str(self.observation), ("state", "image"))
        if self.camera not in _CAMERAS:
            raise UnknownNameError("camera of Meta-World", str(self.camera), _CAMERAS)
        if self.observation == "state" and (self.camera, self.image_size) != ("corner2", 64):
            raise ConfigError("camera and image_size are for observation=image; add that, or leave them out")


def make(task: str, options: Mapping[str, Any]) -> "MetaworldEnvironment":
    """The environment for `metaworld/TASK:OPTIONS`.

    Raises:
        UnknownNameError: no such task or option.
        ConfigError: an option is out of range.
        MissingDependencyError: Meta-World is not installed.
    """
    return MetaworldEnvironment(task, read_options(MetaworldOptions, options, "Meta-World"))


class MetaworldEnvironment:
    """One Meta-World task with the goal in view; implements `Environment`.

    Observation, all float32: `proprio` (4) hand position x, y, z [m] and gripper opening in 0..1; `object` (14)
    position [m] and quaternion of the object, then of a second one where the task has it, padded with zeros; `goal`
    (3) target position [m]. With `observation=image` there are `proprio` and `image` (S, S, 3) uint8, in which object
    and goal can be seen: a ball marks the goal in many tasks, in others a thing does.

    Action (4) in -1..1: offset of the hand in x, y, z (1 = 1 cm per control step in most tasks) and gripper effort (1 =
    close).
    """

    def __init__(self, task: str, options: MetaworldOptions | None = None) -> None:
        """Loads the task's model (about 1 s).

        Args:
            task: one of `TASKS`.
            options: None = the benchmark's own.

        Raises:
            UnknownNameError: no such task.
            MissingDependencyError: Meta-World is not installed, or does not import.
        """
        if task not in TASKS:
            raise UnknownNameError("task of Meta-World", task, TASKS)
        self._options = options or MetaworldOptions()
        self._env, self._expert = _load(task)
        self._env.max_path_length = self._options.max_steps
        self._raw: NDArray[np.float64] | None = None  # None = no episode is running
        self._steps = 0
        keys = {"proprio": ArraySpec((4,)), "object": ArraySpec((14,)), "goal": ArraySpec((3,))}
        if self._options.observation == "image":
            size = self._options.image_size
            keys = {"proprio": keys["proprio"], "image": ArraySpec((size, size, 3), "uint8")}
        self.spec = EnvironmentSpec(
            name=canonical_name(f"metaworld/{task}", self._options),
            observation=keys,
            action_dim=_ACTION_DIM,
            action_low=(-1.0,) * _ACTION_DIM,
            action_high=(1.0,) * _ACTION_DIM,
            control_dt=float(self._env.dt),
            max_steps=self._options.max_steps,
            success=f"Meta-World's own success flag of {task} is set in at least one control step",
            action_kind="delta",
        )

    @property
    def raw_observation(self) -> NDArray[np.float64]:
        """(39,) copy of the benchmark's own vector for the present state, goal always included."""
        return self._present().copy()

    @property
    def hand(self) -> NDArray[np.float64]:
        """(3,) position of the hand [m]."""
        return self._present()[:3].copy()

    @property
    def positions(self) -> dict[str, NDArray[np.float64]]:
        """(3,) exact position of the hand, the object and the goal [m]."""
        raw = self._present()
        return {"hand": raw[:3].copy(), "object": raw[4:7].copy(), "goal": raw[_GOAL].copy()}

    def reset(self, seed: int) -> dict[str, NDArray[Any]]:
        """Starts an episode whose initial state is a function of `seed` alone; returns its first observation.

        Raises:
            SimulatorError: the physics became unstable.
        """
        import mujoco

        self._raw = None
        mujoco.mj_resetData(self._env.model, self._env.data)  # the benchmark begins its reset from the present state
        self._env.seed(int(seed))
        try:
            raw, _ = self._env.reset()
        except mujoco.FatalError as error:
            raise SimulatorError(f"{self.spec.name} crashed in reset({seed}): {error}") from error
        self._check_physics(f"in reset({seed})")
        # The benchmark clips the vector in every step but not here; with this a policy sees one and the same range.
        space = self._env.sawyer_observation_space
        self._raw = np.clip(raw, space.low, space.high)
        self._steps = 0
        return self._observation()

    def step(self, action: ActionArray) -> StepResult:
        """Applies one action (4,), clipped to -1..1.

        Raises:
            ShapeError: the action is not (4,).
            ScdRobotError: the action holds NaN or infinite values.
            SimulatorError: the physics became unstable, or the episode is over.
        """
        import mujoco

        self._present()
        executed = checked_action(action, self.spec, self._steps)
        try:
            raw, reward, terminated, truncated, info = self._env.step(executed)
        except mujoco.FatalError as error:
            raise SimulatorError(f"{self.spec.name} crashed in control step {self._steps}: {error}") from error
        self._check_physics(f"in control step {self._steps}")
        self._raw = raw
        self._steps += 1
        return StepResult(
            observation=self._observation(),
            reward=float(reward),
            success=bool(info["success"]),
            terminated=bool(terminated),
            truncated=bool(truncated),
            executed_action=executed,
            info=dict(info),
        )

    def move_object(self, offset: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Moves the object at once, as if by hand, and brings it to rest there; nothing else changes.

        Args:
            offset: (3,) of its position [m].

        Returns:
            The observation after the move.

        Raises:
            ConfigError: the task's object is part of a mechanism and cannot be moved so.
        """
        import mujoco

        before, model, data = self._present(), self._env.model, self._env.data
        qpos, qvel = data.qpos.copy(), data.qvel.copy()
        moved, still = qpos.copy(), qvel.copy()
        for joint in np.flatnonzero(model.jnt_type == mujoco.mjtJoint.mjJNT_FREE)[:1]:
            place, speed = model.jnt_qposadr[joint], model.jnt_dofadr[joint]
            moved[place : place + 3] += offset
            still[speed : speed + 6] = 0
        self._env.set_state(moved, still)
        after = before.copy()
        after[: _OBJECT.stop] = self._env._get_curr_obs_combined_no_goal()
        if not np.allclose(after[4:7] - before[4:7], offset, atol=1e-6):
            self._env.set_state(qpos, qvel)
            raise ConfigError(f"the object of {self.spec.name} cannot be moved by hand: it is part of a mechanism")
        self._raw = after
        return self._observation()

    def state_hash(self) -> str:
        """Hexadecimal SHA-256 of joint positions and velocities, motion target of the hand, and goal."""
        goal = self._present()[_GOAL]
        data = self._env.data
        return digest((data.qpos, data.qvel, data.mocap_pos, data.mocap_quat, goal))

    def expert_action(self) -> ActionArray:
        """The benchmark's scripted action (4,) for the present state, clipped; it sees the goal at all times."""
        with warnings.catch_warnings():  # says at nearly every step that its actions will be clipped
            warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high")
            action = self._expert.get_action(self._present())
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def render(self, height: int, width: int) -> NDArray[np.uint8]:
        """An RGB frame (height, width, 3) of the present state from the benchmark's camera, the right way up."""
        return self._picture(height, width, _VIDEO_CAMERA, goal_shown=True)

    def close(self) -> None:
        """Releases the simulator; may be called twice."""
        self._raw = None
        self._env.close()

    def _present(self) -> NDArray[np.float64]:
        if self._raw is None:
            raise SimulatorError(f"no episode of {self.spec.name} is running; call reset(seed) first")
        return self._raw

    def _observation(self) -> dict[str, NDArray[Any]]:
        raw = self._present().astype(np.float32)
        shown = self._options.goal_steps is None or self._steps < self._options.goal_steps
        if self._options.observation == "image":
            size = self._options.image_size
            return {"proprio": raw[_PROPRIO], "image": self._picture(size, size, self._options.camera, shown)}
        goal = raw[_GOAL] if shown else np.zeros(3, np.float32)
        return {"proprio": raw[_PROPRIO], "object": raw[_OBJECT], "goal": goal}

    def _picture(self, height: int, width: int, camera: str, goal_shown: bool) -> NDArray[np.uint8]:
        """(height, width, 3), the right way up."""
        from scd_robot.sim_eval.rendering import render_frame

        self._present()
        with self._goal_marked(goal_shown):
            frame = render_frame(self._env.model, self._env.data, height, width, camera=camera)
        return np.ascontiguousarray(frame[::-1, ::-1]) if camera in _UPSIDE_DOWN else frame

    @contextlib.contextmanager
    def _goal_marked(self, shown: bool) -> Iterator[None]:
        """Puts the marks of the goal where it is, or out of sight.

        The simulator has them in the places of its model, which the benchmark corrects too early in a control step, in
        many tasks for the next one only: after a reset they would be where the last episode had its goal.
        """
        marks = [(self._env.data.site(name), place) for name, place in self._env._target_site_config]
        before = [mark.xpos.copy() for mark, _ in marks]
        try:
            for mark, place in marks:
                mark.xpos[:] = place[:3] if shown else _OUT_OF_SIGHT
            yield
        finally:
            for (mark, _), place in zip(marks, before, strict=True):
                mark.xpos[:] = place

    def _check_physics(self, where: str) -> None:
        try:
            check_physics(self._env.data, self.spec.name, where)
        except SimulatorError:
            self._raw = None
            raise


def _load(task: str) -> tuple[Any, Any]:
    """The benchmark's task object, with its goal in view and start states drawn from its seed, and its expert."""
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
    except ImportError as error:
        raise MissingDependencyError(
            f'metaworld/{task} needs the package metaworld ({error}); install it with: pip install "scd_robot[sim]"'
        ) from error
    env: Any = ALL_V3_ENVIRONMENTS[task]()
    expert: Any = ENV_POLICY_MAP[task]
    env._partially_observable = False
    del env.sawyer_observation_space  # cached for a hidden goal, and used to clip the observation
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env._set_task_called = True
    return env, expert()
