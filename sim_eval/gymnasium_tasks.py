"""Tasks of gymnasium-robotics (Fetch, Adroit hand, Franka kitchen) and gym-aloha, as gymnasium makes them.

`gymnasium/FetchPush-v4`, `gymnasium/AdroitHandDoor-v1`, `gymnasium/FrankaKitchen-v1`, `gymnasium/AlohaTransferCube-v0`.

Observations are flattened: a dictionary's arrays keep their names, joined by dots ("desired_goal",
"achieved_goal.kettle"); a single array is called `state`. Actions are clipped to the environment's bounds. Options in
the name: `max_steps=N` truncates episodes after N control steps (the benchmark's own number otherwise). gym-aloha draws
its picture in every control step (about 0.3 s on a CPU) and offers no state of the objects: with `observation=image`
there is "pixels.top" (480, 640, 3) beside "agent_pos". Its actions are joint angles [rad] and openings of the grippers
(0..1): their bounds are those of the actuators, since the -1..1 that gym-aloha claims (and does not apply) would keep
the arms out of poses that demonstrations use, and that episodes begin in.
"""

import importlib
import warnings
from collections.abc import Container, Mapping
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

__all__ = ["TASKS", "GymnasiumEnvironment", "GymnasiumOptions", "make"]

_FETCH = ("FetchPickAndPlace-v4", "FetchPush-v4", "FetchReach-v4", "FetchSlide-v4")
_ADROIT = ("AdroitHandDoor-v1", "AdroitHandHammer-v1", "AdroitHandPen-v1", "AdroitHandRelocate-v1")
_KITCHEN = ("FrankaKitchen-v1",)
_ALOHA = ("AlohaInsertion-v0", "AlohaTransferCube-v0")
_ALOHA_CAMERA = "top"
TASKS = (*_FETCH, *_ADROIT, *_KITCHEN, *_ALOHA)

_LIMITS = {**dict.fromkeys(_FETCH, 50), **dict.fromkeys(_ADROIT, 200), "FrankaKitchen-v1": 280,
           **dict.fromkeys(_ALOHA, 300)}  # fmt: skip
_SUCCESS = {
    **dict.fromkeys(_FETCH, "the achieved goal is within 5 cm of the desired one (info['is_success'])"),
    **dict.fromkeys(_ADROIT, "the benchmark's own flag is set (info['success'])"),
    "FrankaKitchen-v1": "all four default subtasks are completed: microwave, kettle, light switch, slide cabinet",
    **dict.fromkeys(_ALOHA, "the reward reaches its largest value, 4 (info['is_success'])"),
}
_HANDS = {
    **dict.fromkeys(_FETCH, "robot0:grip"),
    **dict.fromkeys(_ADROIT, "S_grasp"),
    "FrankaKitchen-v1": "end_effector",
}  # names of sites
_ALOHA_HANDS = ("vx300s_left/gripper_link", "vx300s_right/gripper_link")  # names of bodies
_KITCHEN_TASKS = ("microwave", "kettle", "light switch", "slide cabinet")


@dataclass(frozen=True)
class GymnasiumOptions:
    """What may follow the colon in an environment's name.

    Attributes:
        max_steps: control steps after which an episode is truncated; 0 = the benchmark's own number.
        observation: "state", or for aloha "image" for its camera as well.
    """

    max_steps: int = 0
    observation: str = "state"

    def __post_init__(self) -> None:
        if not isinstance(self.max_steps, int) or self.max_steps < 0:
            raise ConfigError(f"max_steps must be a whole number of 0 or more, got {self.max_steps}")
        if self.observation not in ("state", "image"):
            raise UnknownNameError("observation", str(self.observation), ("state", "image"))


def make(task: str, options: Mapping[str, Any]) -> "GymnasiumEnvironment":
    """The environment for `gymnasium/TASK:OPTIONS`.

    Raises:
        UnknownNameError: no such option.
        ConfigError: an option is out of range.
        MissingDependencyError: gymnasium-robotics or gym-aloha is not installed.
    """
    return GymnasiumEnvironment(task, read_options(GymnasiumOptions, options, f"gymnasium/{task}"))


class GymnasiumEnvironment:
    """One gymnasium task; implements `Environment`."""

    def __init__(self, task: str, options: GymnasiumOptions | None = None) -> None:
        """Loads the task.

        Args:
            task: one of `TASKS`.
            options: None = the benchmark's own.

        Raises:
            MissingDependencyError: the package is not installed, or does not import.
        """
        self._task, self._options = task, options or GymnasiumOptions()
        if self._options.observation == "image" and task not in _ALOHA:
            raise ConfigError(f"gymnasium/{task} observes its state only; leave out observation=image")
        self._env = _load(task)
        if task in _ALOHA:
            self._draw_only({_ALOHA_CAMERA} if self._options.observation == "image" else set())
        self._running, self._steps = False, 0
        low, high = self._action_bounds()
        first = self._reset(0)
        self.spec = EnvironmentSpec(
            name=canonical_name(f"gymnasium/{task}", self._options),
            observation={key: ArraySpec(value.shape, str(value.dtype)) for key, value in first.items()},
            action_dim=len(low),
            action_low=tuple(map(float, low)),
            action_high=tuple(map(float, high)),
            control_dt=self._control_dt(),
            max_steps=self._options.max_steps or _LIMITS[task],
            success=_SUCCESS[task],
        )

    @property
    def hand(self) -> NDArray[np.float64]:
        """(3,) position of the hand, (2, 3) of aloha's two grippers [m], as the last physics step placed them."""
        self._check_running()
        data = self._physics()  # which is only looked at: Fetch begins its next step from the bodies' places
        if self._task in _ALOHA:
            return np.stack([data.body(name).xpos for name in _ALOHA_HANDS])
        return np.array(data.site(_HANDS[self._task]).xpos)

    def reset(self, seed: int) -> dict[str, NDArray[Any]]:
        """Starts an episode whose initial state is a function of `seed` alone; returns its first observation.

        Raises:
            SimulatorError: the simulator crashed.
        """
        self._running = False
        observation = self._reset(seed)
        self._running, self._steps = True, 0
        return observation

    def step(self, action: ActionArray) -> StepResult:
        """Applies one action (Da,), clipped to the bounds.

        Raises:
            ShapeError: the action is not (Da,).
            ActionError: the action holds NaN or infinite values.
            SimulatorError: the episode is over, or the simulator crashed.
        """
        self._check_running()
        executed = checked_action(action, self.spec, self._steps)
        try:
            observation, reward, terminated, _, info = self._env.step(executed)
        except Exception as error:  # simulators raise many kinds
            self._running = False
            raise SimulatorError(f"{self.spec.name} crashed in control step {self._steps}: {error}") from error
        if self._task not in _ALOHA:  # dm_control looks by itself
            try:
                check_physics(self._physics(), self.spec.name, f"in control step {self._steps}")
            except SimulatorError:
                self._running = False
                raise
        self._steps += 1
        success = _succeeded(self._task, info)
        return StepResult(
            observation=self._observed(observation),
            reward=float(reward),
            success=success,
            terminated=bool(terminated) and not success,
            truncated=self._steps >= self.spec.max_steps,
            executed_action=executed,
        )

    def state_hash(self) -> str:
        """Hexadecimal SHA-256 of joint positions and velocities, and of the first observation, which holds the goal."""
        self._check_running()
        data = self._physics()
        parts = [data.qpos, data.qvel, data.mocap_pos, *(self._first[key] for key in sorted(self._first))]
        return digest(parts)

    def expert_action(self) -> ActionArray:
        """There is none.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.spec.name} has no scripted expert; train on recorded demonstrations instead")

    def render(self, height: int, width: int) -> NDArray[np.uint8]:
        """An RGB frame (height, width, 3) of the present state."""
        self._check_running()
        if self._task in _ALOHA:
            frame: NDArray[np.uint8] = self._draw(height=height, width=width, camera_id=_ALOHA_CAMERA)
            return np.ascontiguousarray(frame)
        from scd_robot.sim_eval.rendering import render_frame

        return render_frame(self._model(), self._physics(), height, width)

    def close(self) -> None:
        """Releases the simulator; may be called twice."""
        self._running = False
        self._env.close()

    def _observed(self, observation: Any) -> dict[str, NDArray[Any]]:
        found = _flat(observation)
        if self._options.observation == "state":
            return {key: value for key, value in found.items() if value.dtype != np.uint8}
        return found

    def _reset(self, seed: int) -> dict[str, NDArray[Any]]:
        try:
            observation, _ = self._env.reset(seed=int(seed))
        except Exception as error:  # simulators raise many kinds
            raise SimulatorError(f"gymnasium/{self._task} crashed in reset({seed}): {error}") from error
        self._first = self._observed(observation)
        return self._first

    def _simulator(self) -> Any:
        """What holds MuJoCo's model and data, somewhere inside the task."""
        simulator = self._env.unwrapped
        while not hasattr(simulator, "model"):
            simulator = simulator._env.physics if self._task in _ALOHA else simulator.robot_env
        return simulator

    def _model(self) -> Any:
        model = self._simulator().model
        return model.ptr if self._task in _ALOHA else model  # dm_control's is wrapped

    def _physics(self) -> Any:
        data = self._simulator().data
        return data.ptr if self._task in _ALOHA else data

    def _action_bounds(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Lowest and highest action, each (Da,)."""
        if self._task not in _ALOHA:
            return self._env.action_space.low, self._env.action_space.high
        ranges = self._model().actuator_ctrlrange.reshape(2, 8, 2)  # arms; 6 joints and 2 fingers; low and high
        arms = np.concatenate([ranges[:, :6], np.broadcast_to([[0.0, 1.0]], (2, 1, 2))], axis=1).reshape(-1, 2)
        return arms[:, 0], arms[:, 1]

    def _draw_only(self, cameras: Container[str]) -> None:
        """gym-aloha draws three cameras in each control step, whatever it is to observe: most of its time."""
        physics = self._env.unwrapped._env.physics
        draw = physics.render

        def draw_anew(height: int, width: int, camera_id: str) -> Any:
            _forget_current_context()
            return draw(height=height, width=width, camera_id=camera_id)

        self._draw = draw_anew

        def render(height: int, width: int, camera_id: str) -> Any:
            if camera_id in cameras:
                return self._draw(height=height, width=width, camera_id=camera_id)
            return np.zeros((height, width, 3), np.uint8)

        physics.render = render

    def _control_dt(self) -> float:
        simulator = self._env.unwrapped
        if self._task in _ALOHA:
            return float(simulator._env.control_timestep())
        while not hasattr(simulator, "dt"):
            simulator = simulator.robot_env
        return float(simulator.dt)

    def _check_running(self) -> None:
        if not self._running:
            raise SimulatorError(f"no episode of {self.spec.name} is running; call reset(seed) first")


def _forget_current_context() -> None:
    """Lets dm_control make its OpenGL context current: it goes by a note of its own, which others' drawing outdates."""
    base = importlib.import_module("dm_control._render.base")
    for name in ("_CURRENT_CONTEXT_FOR_THREAD", "_CURRENT_THREAD_FOR_CONTEXT"):
        getattr(base, name, {}).clear()


def _succeeded(task: str, info: Mapping[str, Any]) -> bool:
    if task in _KITCHEN:
        return set(_KITCHEN_TASKS) <= set(info.get("episode_task_completions", ()))
    return bool(info.get("is_success", info.get("success", False)))


def _flat(observation: Any, prefix: str = "") -> dict[str, NDArray[Any]]:
    """Arrays by name; numbers float32, pictures uint8."""
    if not isinstance(observation, Mapping):
        values = np.asarray(observation)
        return {prefix or "state": values.astype(np.uint8 if values.dtype == np.uint8 else np.float32)}  # a copy
    found: dict[str, NDArray[Any]] = {}
    for key, value in observation.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _load(task: str) -> Any:
    package = "gym-aloha" if task in _ALOHA else "gymnasium-robotics"
    if task in _ALOHA:
        from scd_robot.sim_eval.rendering import select_gl_backend

        select_gl_backend()  # dm_control draws by itself
    options: dict[str, Any] = {"max_episode_steps": -1, "disable_env_checker": True}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other packages' own deprecations
            import gymnasium

            if task in _ALOHA:
                import gym_aloha  # noqa: F401 - registers its tasks

                return gymnasium.make(f"gym_aloha/{task}", obs_type="pixels_agent_pos", **options)
            import gymnasium_robotics

            gymnasium.register_envs(gymnasium_robotics)
            if task in _KITCHEN:
                options["tasks_to_complete"] = list(_KITCHEN_TASKS)
            return gymnasium.make(task, **options)
    except ImportError as error:
        raise MissingDependencyError(
            f"gymnasium/{task} needs the package {package} ({error}); install it with: "
            'pip install "scd_robot[robotics]"'
        ) from error
