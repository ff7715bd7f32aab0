"""Tasks of robosuite 1.5: `robosuite/Lift`, also as a dataset's `env_args` say they were recorded.

Observations have robosuite's names, and "object" as robomimic calls "object-state"; vectors float32, images uint8
(H, W, 3), the right way up: what our readers give of recordings. Options in the environment's name:

- `robots=Panda` (two arms: `robots=Panda+Panda`, of `TwoArm...` the default), `control_freq=20` (a divisor of 500),
  `max_steps` (robomimic's: 400, and 700 of ToolHang and TwoArmTransport);
- `actions=absolute`: arms take absolute poses, for a policy that was trained on robomimic's `actions_abs` of a
  recording whose own controller takes changes. A recording with absolute controllers needs no telling;
- `cameras=agentview+robot0_eye_in_hand`, `image_size=84`: images are slow, 20 to 100 ms each;
- `recorded=FILE.json`: robots, controller, rate and cameras as the `env_args` of a recording tell them, older
  controllers in today's form. Other robots, rates or sizes of images are then refused; `cameras` chooses among those
  of the recording (`none`: no images, for a policy that takes none), or names them where the recording has no images.

robomimic's own wrapper of robosuite is not used, even where robomimic is installed: it gives the same observations,
rewards and successes (tests/sim_eval/test_robomimic_wrapper.py compares them), but needs mujoco_py, refuses
controllers from before robosuite 1.5 (and, given them in today's form, does not hold the orientation as they did), and
draws the start states of a process in one sequence, not from seeds.

robosuite needs an environment of its own (docs/install.md): `scd eval ... --env-python .venv-robosuite/bin/python`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError, DatasetError, SimulatorError, UnknownNameError
from scd_robot.sim_eval.adapter import canonical_name, check_physics, checked_action, digest, read_options
from scd_robot.sim_eval.rendering import render_frame
from scd_robot.sim_eval.robosuite_arguments import (
    action_bounds,
    action_kind,
    arguments_before_1_5,
    hold_orientation,
    is_before_1_5,
    recorded_cameras,
    take_absolute_actions,
    with_input_types,
)
from scd_robot.sim_eval.robosuite_simulator import COLLISION, WITHOUT_RENDERER, import_robosuite, observe
from scd_robot.types import ActionArray, ArraySpec, EnvironmentSpec, StepResult

__all__ = [
    "TASKS",
    "RobosuiteEnvironment",
    "RobosuiteOptions",
    "make",
    "recorded_env_args",
    "refuse_unknown",
]

TASKS = (
    "Door",
    "Lift",
    "NutAssembly",
    "NutAssemblyRound",
    "NutAssemblySingle",
    "NutAssemblySquare",
    "PickPlace",
    "PickPlaceBread",
    "PickPlaceCan",
    "PickPlaceCereal",
    "PickPlaceMilk",
    "PickPlaceSingle",
    "Stack",
    "ToolHang",
    "TwoArmHandover",
    "TwoArmLift",
    "TwoArmPegInHole",
    "TwoArmTransport",
    "Wipe",
)

_MAX_STEPS, _LONG_STEPS = 400, {"ToolHang": 700, "TwoArmTransport": 700}  # robomimic's roll-outs
_ELSEWHERE = (
    "none of robosuite's own environments: import the package that registers it with robosuite (of MimicGen's, which "
    "end in _D0 and so on, mimicgen) in a module of your own, and name a function of that with --env my_env:make; "
    "docs/evaluation.md shows one"
)
_VIDEO_CAMERA = "frontview"
_PHYSICS_RATE = 500  # [Hz] of robosuite


@dataclass(frozen=True)
class RobosuiteOptions:
    """What may follow the colon in an environment's name; the module says what each does."""

    robots: str = ""
    control_freq: int = 20
    max_steps: int | None = None
    cameras: str = ""
    image_size: int = 84
    actions: str = ""
    recorded: str = ""

    def __post_init__(self) -> None:
        words = {
            "robots": "Panda or Panda+Sawyer",
            "cameras": "agentview or agentview+frontview",
            "recorded": "env.json",
        }
        for name, example in words.items():
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be words such as {example}, got {getattr(self, name)}")
        if self.actions not in ("", "absolute"):
            raise ConfigError(f"actions must be absolute, or be left out, got {self.actions}")
        for name in ("control_freq", "max_steps", "image_size"):
            value = getattr(self, name)
            if name == "max_steps" and value is None:  # the task's own
                continue
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value}")
        if _PHYSICS_RATE % self.control_freq:
            raise ConfigError(
                f"control_freq must divide {_PHYSICS_RATE} [Hz], the rate of robosuite's physics, got "
                f"{self.control_freq}: control steps would be shorter than asked for"
            )


def make(task: str, options: Mapping[str, Any]) -> "RobosuiteEnvironment":
    """The environment for `robosuite/TASK:OPTIONS`.

    Raises:
        UnknownNameError: no such option, or no such camera in the recording.
        ConfigError: an option is out of range or contradicts the recording, or the recording is of another task.
        DatasetError: the recording cannot be read, or does not tell its environment.
        MissingDependencyError: robosuite is not installed.
    """
    read = read_options(RobosuiteOptions, options, "robosuite")
    if read.recorded:
        fixed = {"robots", "control_freq"}
        if recorded_cameras(recorded_env_args(read.recorded)):
            fixed.add("image_size")
        if given := sorted(fixed & options.keys()):
            raise ConfigError(f"{read.recorded} tells {' and '.join(given)}; leave that out beside recorded=")
    return RobosuiteEnvironment(task, read)


def refuse_unknown(task: str, options: Mapping[str, Any]) -> None:
    """Called where a task is not in `TASKS`: tells of those that other packages register with robosuite.

    Raises:
        ConfigError: the recording is of such a one.
        DatasetError: it cannot be read.
    """
    recorded = options.get("recorded")
    if isinstance(recorded, str) and recorded_env_args(recorded)["env_name"] == task:
        raise ConfigError(f"{recorded} was recorded in {task}, {_ELSEWHERE}")


def recorded_env_args(path: str) -> dict[str, Any]:
    """What `robosuite.make` was called with for a recording, `env_name` among it, and `env_version`.

    Args:
        path: JSON file with the `env_args` of a robomimic dataset, or with robosuite's own `env`, `env_info` and
            `repository_version`.

    Raises:
        DatasetError: no such file, or it does not tell.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        arguments = document.get("env_kwargs", document.get("env_info", {}))
        arguments = {**(json.loads(arguments) if isinstance(arguments, str) else arguments)}
        name = document.get("env_name", document.get("env"))
        version = document.get("env_version") or document.get("repository_version") or ""
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DatasetError(f"cannot read the environment of {path} ({type(error).__name__}: {error})") from error
    if not isinstance(name, str):
        raise DatasetError(f"{path} does not tell its environment: neither 'env_name' nor 'env' is there")
    return {**arguments, "env_name": name, "env_version": str(version)}


class RobosuiteEnvironment:
    """One robosuite task; implements `Environment`."""

    def __init__(self, task: str, options: RobosuiteOptions | None = None) -> None:
        """Loads the task; a few seconds.

        Args:
            task: one of `TASKS`, or one that another package has registered with robosuite.
            options: None = the defaults.

        Raises:
            ConfigError, DatasetError, UnknownNameError: the recording is not one of this task, see `make`.
            MissingDependencyError: robosuite is not installed.
            SimulatorError: robosuite cannot make this environment.
        """
        self._options, short = _settled(task, options or RobosuiteOptions())
        told = self._told(task)
        robosuite = import_robosuite()
        name = canonical_name(f"robosuite/{task}", short)
        self._before_1_5 = is_before_1_5(told.pop("env_version", ""), told)
        told = with_input_types(told)
        try:
            self._env = robosuite.make(**(arguments_before_1_5(told) if self._before_1_5 else told))
        except Exception as error:  # robosuite raises many kinds
            raise SimulatorError(f"robosuite {robosuite.__version__} cannot make {name}: {error}") from error
        self._running, self._steps = False, 0
        first = self._begun()  # it was just reset
        low, high = action_bounds(self._env)
        self.spec = EnvironmentSpec(
            name=name,
            observation={key: ArraySpec(value.shape, str(value.dtype)) for key, value in first.items()},
            action_dim=len(low),
            action_low=tuple(map(float, low)),
            action_high=tuple(map(float, high)),
            control_dt=1.0 / float(self._env.control_freq),
            max_steps=self._options.max_steps or _MAX_STEPS,
            success=f"robosuite's own check of {task} is met at the end of at least one control step",
            action_kind=action_kind(self._env),
        )

    @property
    def hand(self) -> NDArray[np.float64]:
        """(3,) position of the hand [m]; (hands, 3) of two arms, the right one of a robot first."""
        self._check_running()
        places = self._env.sim.data.site_xpos
        hands = [places[robot.eef_site_id[arm]] for robot in self._env.robots for arm in robot.arms]
        return np.array(hands[0] if len(hands) == 1 else hands)

    def reset(self, seed: int) -> dict[str, NDArray[Any]]:
        """Starts an episode whose initial state is a function of `seed` alone; returns its first observation.

        Raises:
            SimulatorError: robosuite crashed.
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
            SimulatorError: the episode is over, or the physics became unstable.
        """
        self._check_running()
        executed = checked_action(action, self.spec, self._steps)
        try:
            _, reward, done, _ = self._env.step(executed.astype(np.float64))
        except Exception as error:  # robosuite and MuJoCo raise many kinds
            self._running = False
            raise SimulatorError(f"{self.spec.name} crashed in control step {self._steps}: {error}") from error
        try:
            check_physics(self._env.sim.data._data, self.spec.name, f"in control step {self._steps}")
        except SimulatorError:
            self._running = False
            raise
        self._steps += 1
        success = bool(self._env._check_success())
        return StepResult(
            observation=self._observation(),
            reward=float(reward),
            success=success,
            terminated=bool(done) and not success,  # Wipe ends when the arm collides or reaches a joint's limit
            truncated=self._steps >= self.spec.max_steps,
            executed_action=executed,
        )

    def state_hash(self) -> str:
        """Hexadecimal SHA-256 of joint positions and velocities, and of the bodies' places in the model."""
        self._check_running()
        sim = self._env.sim
        return digest((sim.data.qpos, sim.data.qvel, sim.model.body_pos, sim.model.body_quat))

    def expert_action(self) -> ActionArray:
        """There is none.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.spec.name} has no scripted expert; train on recorded demonstrations instead")

    def render(self, height: int, width: int) -> NDArray[np.uint8]:
        """An RGB frame (height, width, 3) of the present state."""
        self._check_running()
        model, data = self._env.sim.model._model, self._env.sim.data._data
        names = [model.camera(i).name for i in range(model.ncam)]
        camera = _VIDEO_CAMERA if _VIDEO_CAMERA in names else -1
        return render_frame(model, data, height, width, camera, hidden_groups=COLLISION)

    def close(self) -> None:
        """Releases the simulator; may be called twice."""
        self._running = False
        if self._env is not None:
            self._env.close()
            self._env = None

    def _told(self, task: str) -> dict[str, Any]:
        """What `robosuite.make` is to be called with, and a recording's `env_version`; notes the cameras."""
        options = self._options
        wanted = [name for name in options.cameras.split("+") if name not in ("", "none")]
        if options.recorded:
            told = recorded_env_args(options.recorded)
            if told["env_name"] != task:
                where = f"{options.recorded} was recorded in {told['env_name']}"
                raise ConfigError(where + (f", not in {task}" if told["env_name"] in TASKS else f", {_ELSEWHERE}"))
        else:
            robots = options.robots.split("+")
            told = {
                "env_name": task,
                "robots": robots[0] if len(robots) == 1 else robots,
                "control_freq": options.control_freq,
            }
        self._cameras = recorded_cameras(told)
        for name in wanted if self._cameras else ():
            if name not in self._cameras:
                raise UnknownNameError(f"camera of {options.recorded}", name, self._cameras)
        if options.cameras:
            size = options.image_size, options.image_size
            self._cameras = {name: self._cameras.get(name, size) for name in wanted}
        return told | WITHOUT_RENDERER | {"use_object_obs": True, "ignore_done": True, "seed": 0}

    def _reset(self, seed: int) -> dict[str, NDArray[Any]]:
        # Samplers of objects hold this generator itself: its state is set, not another one put in its place.
        self._env.rng.bit_generator.state = np.random.default_rng(int(seed)).bit_generator.state
        np.random.seed(int(seed))  # noqa: NPY002 - what is left of robosuite's older draws
        try:
            self._env.reset()
        except Exception as error:  # robosuite and MuJoCo raise many kinds
            raise SimulatorError(f"robosuite crashed in reset({seed}): {error}") from error
        return self._begun()

    def _begun(self) -> dict[str, NDArray[Any]]:
        """The first observation after a reset, with controllers as they are asked for: robosuite makes them anew."""
        if self._before_1_5:
            for robot in self._env.robots:
                for controller in robot.part_controllers.values():
                    hold_orientation(controller)
        if self._options.actions == "absolute":
            take_absolute_actions(self._env, self._env.__class__.__name__)
        return self._observation()

    def _observation(self) -> dict[str, NDArray[Any]]:
        found = observe(self._env, self._cameras)
        return found | ({"object": found["object-state"]} if "object-state" in found else {})

    def _check_running(self) -> None:
        if not self._running:
            raise SimulatorError(f"no episode of {self.spec.name} is running; call reset(seed) first")


def _settled(task: str, options: RobosuiteOptions) -> tuple[RobosuiteOptions, RobosuiteOptions]:
    """The options with the task's defaults filled in, and, for its name, without them."""
    robots = "Panda+Panda" if task.startswith("TwoArm") else "Panda"
    filled = replace(
        options, robots=options.robots or robots, max_steps=options.max_steps or _LONG_STEPS.get(task, _MAX_STEPS)
    )
    short = replace(
        options,
        robots="" if filled.robots == robots else filled.robots,
        max_steps=None if filled.max_steps == _LONG_STEPS.get(task, _MAX_STEPS) else filled.max_steps,
    )
    return filled, short
