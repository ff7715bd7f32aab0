"""PushT (Florence et al., arXiv 2109.00137) as Diffusion Policy evaluates it (Chi et al., arXiv 2303.04137), in pymunk.

A round pusher follows a target position, Da = 2, at 10 Hz, and is to push a T-shaped block onto its mark. gym-pusht as
it is equals diffusion_policy's own environment with `legacy=True`. Lengths are pixels of a square of 512, the y axis
points down, angles are in rad.

There are two ways to set a state, and each breaks what the other is for:

- `reset(seed)` as the benchmark does: position, then angle, then one physics step (0.01 s). The angle turns the block
  about its centre of mass, which is not its origin, so the block ends elsewhere; published scores are of these starts.
- `set_recorded_state(state)` as recordings need it: angle, then position, everything at rest, no physics step.

Options in the environment's name:

- `observation=state` gives `state`; `keypoints` (the default) gives `state` and `keypoint`; `image` adds `img`.
- `starts=benchmark` (the default): episode i of an evaluation starts as diffusion_policy's test i, from
  `RandomState(100000 + i)`. `starts=seeds`: it starts from the evaluation's own seed, drawn in the same way.
- `max_steps=N` truncates episodes after N control steps (300 as in the benchmark).
"""

import functools
import hashlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scd_robot.errors import (
    ConfigError,
    MissingDependencyError,
    ShapeError,
    SimulatorError,
    UnknownNameError,
)
from scd_robot.seeding import EVALUATION, derive_seed
from scd_robot.sim_eval.adapter import canonical_name, checked_action, read_options
from scd_robot.types import ActionArray, ArraySpec, EnvironmentSpec, StepResult

__all__ = ["TASKS", "PushtEnvironment", "PushtOptions", "block_keypoints", "make", "state_difference"]

TASKS = ("",)  # there is one, called by the prefix alone

_KEYS = {"state": ("state",), "keypoints": ("state", "keypoint"), "image": ("state", "keypoint", "img")}
_STARTS = ("benchmark", "seeds")
_SPECS = {"state": ArraySpec((5,)), "keypoint": ArraySpec((9, 2)), "img": ArraySpec((96, 96, 3), "uint8")}
_SIZE = 512.0  # [px] of the square
_FIRST_BENCHMARK_SEED = 100_000  # `test_start_seed` of diffusion_policy's published configurations
_BENCHMARK_EPISODES = 1000

# (9, 2) [px] from the block's origin, in its frame. diffusion_policy draws them once: pixels of the block that lie far
# from each other, each moved by a random part of a pixel.
_KEYPOINTS = np.asarray(
    [
        [9.269786714, 90.040973524],
        [-60.983472364, -1.186729761],
        [60.912755577, -1.393364224],
        [-0.270503439, 25.543624991],
        [-14.064927576, 122.815853554],
        [39.002738500, 32.857404277],
        [-39.966414425, 32.729655446],
        [-16.824344379, 62.863178922],
        [23.541461220, -1.700288109],
    ]
)


@dataclass(frozen=True)
class PushtOptions:
    """What may follow the colon in an environment's name; the module says what each does.

    Attributes:
        observation: "state", "keypoints" or "image".
        starts: "benchmark" or "seeds".
        max_steps: control steps after which an episode is truncated.
    """

    observation: str = "keypoints"
    starts: str = "benchmark"
    max_steps: int = 300

    def __post_init__(self) -> None:
        if self.observation not in _KEYS:
            raise UnknownNameError("observation of pusht", str(self.observation), _KEYS)
        if self.starts not in _STARTS:
            raise UnknownNameError("kind of starts of pusht", str(self.starts), _STARTS)
        if not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise ConfigError(f"max_steps must be a whole number of at least 1, got {self.max_steps}")


def make(task: str, options: Mapping[str, Any]) -> "PushtEnvironment":
    """The environment for `pusht:OPTIONS`.

    Raises:
        UnknownNameError: no such option, observation or kind of starts.
        ConfigError: an option is out of range.
        MissingDependencyError: gym-pusht is not installed.
    """
    assert task in TASKS
    return PushtEnvironment(read_options(PushtOptions, options, "pusht"))


def block_keypoints(pose: ArrayLike) -> NDArray[np.float64]:
    """The block's keypoints (..., 9, 2) [px] for its poses (..., 3): x, y [px], angle [rad]."""
    values = np.asarray(pose, np.float64)
    cos, sin = np.cos(values[..., 2]), np.sin(values[..., 2])
    rotation = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    keypoints: NDArray[np.float64] = _KEYPOINTS @ np.swapaxes(rotation, -1, -2) + values[..., None, :2]
    return keypoints


def state_difference(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """`first` - `second` of states (..., 5), the angle's in -pi..pi."""
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    difference[..., 4] = (difference[..., 4] + np.pi) % (2 * np.pi) - np.pi
    return difference


class PushtEnvironment:
    """PushT; implements `Environment`.

    Observation: `state` (5) float32, x and y of the pusher and of the block's origin [px], the block's angle in
    0..2 pi; `keypoint` (9, 2) float32, points of the block [px]; `img` (96, 96, 3) uint8. Which of them, an option
    says. Action (2): target position of the pusher [px], 0..512. The reward is the share of the mark that the block
    covers, divided by 0.95, at most 1; the benchmark's score of an episode is its best reward.
    """

    def __init__(self, options: PushtOptions | None = None) -> None:
        """Starts no window.

        Args:
            options: None = the benchmark's own.

        Raises:
            MissingDependencyError: gym-pusht is not installed, or with a version of pymunk that it cannot use.
        """
        self._options = options or PushtOptions()
        self._env = _load()
        self._running = False
        self._steps = 0
        self.spec = EnvironmentSpec(
            name=canonical_name("pusht", self._options),
            observation={key: _SPECS[key] for key in _KEYS[self._options.observation]},
            action_dim=2,
            action_low=(0.0, 0.0),
            action_high=(_SIZE, _SIZE),
            control_dt=1.0 / self._env.control_hz,
            max_steps=self._options.max_steps,
            success="the block covers more than 95 % of its mark at the end of at least one control step",
            score="PushT's score: largest share of the mark covered in an episode / 0.95, at most 1",
            hand_unit="px",
            action_kind="absolute",
        )

    def standstill(self) -> NDArray[np.float32]:
        """The action (2,) that keeps the pusher where it is [px]."""
        return np.asarray(self._env.agent.position, np.float32)

    @property
    def hand(self) -> NDArray[np.float64]:
        """(2,) position of the pusher [px]."""
        self._check_running()
        return np.asarray(self._env.agent.position, np.float64)

    def reset(self, seed: int) -> dict[str, NDArray[Any]]:
        """Starts an episode whose initial state is a function of `seed` alone; returns its first observation.

        The state is drawn from `RandomState(seed)`; but with `starts=benchmark` the seeds that an evaluation gives to
        its episodes 0 to 999 stand for 100000 to 100999. Seeds of other purposes (validation) are never among them.

        Raises:
            ConfigError: the seed is not in 0..2**32 - 1.
        """
        if not 0 <= seed < 2**32:
            raise ConfigError(f"the seed of {self.spec.name} must be in 0..{2**32 - 1}, got {seed}")
        if self._options.starts == "benchmark":
            seed = _benchmark_seeds().get(int(seed), seed)
        # gym-pusht's `_set_state` then assigns position and angle in the benchmark's order, and makes one physics step.
        self._env.reset(options={"reset_to_state": draw_start(seed)})
        return self._begin()

    def set_recorded_state(self, state: ArrayLike) -> dict[str, NDArray[Any]]:
        """Starts an episode at rest in a recorded state (5,), which the first observation repeats.

        Raises:
            ShapeError: the state is not (5,).
            ConfigError: it holds NaN or infinite values.
        """
        values = np.asarray(state, np.float64)
        if values.shape != (5,):
            raise ShapeError(f"a recorded state of {self.spec.name} must be (5,), got {values.shape}")
        if not np.isfinite(values).all():
            raise ConfigError(f"a recorded state of {self.spec.name} must be finite, got {values.tolist()}")
        self._env._setup()  # new bodies, at rest
        agent, block = self._env.agent, self._env.block
        agent.position = values[:2].tolist()
        block.angle = float(values[4])
        block.position = values[2:4].tolist()
        for body in (agent, block):
            self._env.space.reindex_shapes_for_body(body)  # or they would be drawn where they were
        return self._begin()

    def step(self, action: ActionArray) -> StepResult:
        """Applies one action (2,), clipped to 0..512.

        Raises:
            ShapeError: the action is not (2,).
            ActionError: the action holds NaN or infinite values.
            SimulatorError: the episode is over, or the physics became unstable.
        """
        self._check_running()
        executed = checked_action(action, self.spec, self._steps)
        _, reward, _, _, info = self._env.step(executed.astype(np.float64))
        if not np.isfinite(self._state()).all():
            self._running = False
            raise SimulatorError(f"the physics of {self.spec.name} became unstable in control step {self._steps}")
        self._steps += 1
        return StepResult(
            observation=self._observation(),
            reward=float(reward),
            success=bool(info["is_success"]),
            terminated=False,
            truncated=self._steps >= self.spec.max_steps,
            executed_action=executed,
            info={"coverage": float(info["coverage"])},
        )

    def state_hash(self) -> str:
        """Hexadecimal SHA-256 of poses and velocities of pusher and block, and of the mark's pose."""
        self._check_running()
        agent, block = self._env.agent, self._env.block
        parts = (
            agent.position,
            agent.velocity,
            block.position,
            [block.angle],
            block.velocity,
            [block.angular_velocity],
        )
        return hashlib.sha256(np.concatenate([*parts, self._env.goal_pose]).astype("<f8").tobytes()).hexdigest()

    def expert_action(self) -> ActionArray:
        """There is none.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.spec.name} has no scripted expert; train on recorded demonstrations instead")

    def render(self, height: int, width: int) -> NDArray[np.uint8]:
        """An RGB frame (height, width, 3) of the present state; 96 x 96 is what `img` holds."""
        self._check_running()
        self._env.observation_height, self._env.observation_width = height, width
        return np.ascontiguousarray(self._env._render(), np.uint8)

    def close(self) -> None:
        """Releases the simulator; may be called twice."""
        self._running = False
        self._env.close()

    def _begin(self) -> dict[str, NDArray[Any]]:
        self._running = True
        self._steps = 0
        return self._observation()

    def _state(self) -> NDArray[np.float64]:
        state: NDArray[np.float64] = self._env.get_obs()
        return state

    def _observation(self) -> dict[str, NDArray[Any]]:
        state = self._state()
        observation: dict[str, NDArray[Any]] = {"state": state.astype(np.float32)}
        if "keypoint" in self.spec.observation:
            observation["keypoint"] = block_keypoints(state[2:]).astype(np.float32)
        if "img" in self.spec.observation:
            observation["img"] = self.render(*_SPECS["img"].shape[:2])
        return observation

    def _check_running(self) -> None:
        if not self._running:
            raise SimulatorError(f"no episode of {self.spec.name} is running; call reset(seed) first")


def draw_start(seed: int) -> NDArray[np.float64]:
    """State (5,) that diffusion_policy's `PushTEnv.reset` draws for a seed; the angle is not confined to one turn."""
    random = np.random.RandomState(seed)  # published starts are this generator's
    position = [random.randint(50, 450), random.randint(50, 450), random.randint(100, 400), random.randint(100, 400)]
    return np.asarray([*position, random.randn() * 2 * np.pi - np.pi])


@functools.cache
def _benchmark_seeds() -> dict[int, int]:
    """The benchmark's seed by the seed that an evaluation gives to the same episode."""
    return {derive_seed(EVALUATION, i): _FIRST_BENCHMARK_SEED + i for i in range(_BENCHMARK_EPISODES)}


def _load() -> Any:
    """gym-pusht's environment, without a window."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # or it greets on standard output
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pygame's own deprecations
            import pymunk
            from gym_pusht.envs.pusht import PushTEnv
    except ImportError as error:
        raise MissingDependencyError(
            f'pusht needs the package gym-pusht ({error}); install it with: pip install "scd_robot[sim]"'
        ) from error
    if not hasattr(pymunk.Space, "add_collision_handler"):
        raise MissingDependencyError(
            f'pusht needs pymunk below 7, got {pymunk.version}; install it with: pip install "pymunk<7"'
        )
    return PushTEnv(obs_type="state")
