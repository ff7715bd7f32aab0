"""One attempt of the scripted expert, as a function of the settings and the attempt's number alone."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.schema import POSITION
from scd_robot.errors import ConfigError, ScdRobotError, SimulatorError
from scd_robot.recording.acting import ActingPolicy, ChunkingPolicy
from scd_robot.seeding import RECORDING, derive_seed, keyed_rng
from scd_robot.sim_eval.messages import checked_observation, checked_result
from scd_robot.types import Environment

__all__ = ["Attempt", "RecordingConfig", "run_attempt"]

logger = logging.getLogger(__name__)

_NOISE, _DISTURBANCE, _DELAY = 1, 2, 3  # keep their keys apart from that of the start state
_DISTURBED_STEPS = (3, 8)  # control steps of a disturbance, both included


@dataclass(frozen=True)
class RecordingConfig:
    """What every attempt shares.

    Attributes:
        environment: full name, options included.
        seed: of the recording; attempts are numbered below it.
        action_noise: standard deviation of the normal noise on executed actions, in units of the action.
        steps_after_success: control steps recorded after the first success, so that the goal is held.
        disturbances: probability that a disturbance begins in a control step: for 3 to 8 steps one random action is
            executed in the place of the expert's.
        keep_positions: keep where the hand and other things were, too, which no policy sees.
        noise_correlation: of the noise in a control step with that one before; 0 = each step has its own.
        max_delay_steps: where a policy acts, the most control steps that its plans take; each attempt draws from 0 to
            this.
    """

    environment: str
    seed: int = 0
    action_noise: float = 0.0
    steps_after_success: int = 10
    disturbances: float = 0.0
    keep_positions: bool = False
    noise_correlation: float = 0.0
    max_delay_steps: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}")
        if not 0 <= self.action_noise < np.inf:
            raise ConfigError(f"action_noise must be a finite number of 0 or more, got {self.action_noise}")
        if not 0 <= self.noise_correlation < 1:
            raise ConfigError(f"noise_correlation must be at least 0 and less than 1, got {self.noise_correlation}")
        if not 0 <= self.disturbances < 1:
            raise ConfigError(f"disturbances must be a probability of less than 1, got {self.disturbances}")
        if self.steps_after_success < 0:
            raise ConfigError(f"steps_after_success must be 0 or more, got {self.steps_after_success}")


@dataclass(frozen=True)
class Attempt:
    """What came of one attempt.

    Attributes:
        index: its number.
        start_seed: the environment was reset with.
        episode: arrays (T, ...) as they are stored; None where the attempt of an expert failed.
        success: whether it succeeded.
        crash: what the simulator said, where it crashed.
    """

    index: int
    start_seed: int
    episode: dict[str, NDArray[Any]] | None
    success: bool = False
    crash: str | None = None


def run_attempt(
    environment: Environment, config: RecordingConfig, index: int, policy: ChunkingPolicy | None = None
) -> Attempt:
    """Lets the expert try from the start state number `index`, or the policy where there is one.

    At each control step are kept: the observation, the expert's action as the label, and what was executed, which is
    the label plus noise, clipped. The noise takes the robot off the expert's path, where the labels show the way back
    (Laskey et al., "DART: noise injection for robust imitation learning", 2017). A policy's own errors last for longer
    than a control step, and so does noise with a correlation (a first-order autoregression). Disturbances undo what was
    done before: a policy that sees its history cannot go by the time that has passed, but has to look what it has
    achieved.

    What a simulator raises is told in the attempt; what the policy raises is raised.
    """
    start_seed = derive_seed(RECORDING, config.seed, index)
    noise, disturbance = (keyed_rng(RECORDING, config.seed, index, key) for key in (_NOISE, _DISTURBANCE))
    acting = None
    if policy is not None:
        delay = keyed_rng(RECORDING, config.seed, index, _DELAY).integers(config.max_delay_steps, endpoint=True)
        acting = ActingPolicy(policy, int(delay))
        acting.reset(index)
    try:
        episode, success = _run(environment, config, start_seed, noise, disturbance, acting)
    except SimulatorError as error:
        return Attempt(index, start_seed, None, crash=str(error))
    except (ScdRobotError, MemoryError):
        raise
    except Exception as error:  # a simulator may raise anything, and then is tried again from another start state
        if acting is not None and acting.error is error:
            raise
        logger.debug("attempt %d", index, exc_info=True)
        return Attempt(index, start_seed, None, crash=f"{type(error).__name__}: {error}")
    return Attempt(index, start_seed, episode, success)


def _run(
    environment: Environment,
    config: RecordingConfig,
    start_seed: int,
    noise: np.random.Generator,
    disturbance: np.random.Generator,
    acting: ActingPolicy | None,
) -> tuple[dict[str, NDArray[Any]] | None, bool]:
    rows: list[dict[str, NDArray[Any]]] = []
    observation = _kept(environment.reset(start_seed), environment)
    last_step: int | None = None  # known from the first success on
    left = 0  # control steps of the running disturbance
    kept = config.noise_correlation
    added = config.action_noise * np.sqrt(1 - kept**2)  # so that its deviation stays what it is
    deviation: NDArray[np.float64] | None = None
    while last_step is None or len(rows) <= last_step:
        positions = _positions(environment) if config.keep_positions else {}
        label = np.array(environment.expert_action())
        drawn = noise.standard_normal(label.shape)
        deviation = config.action_noise * drawn if deviation is None else kept * deviation + added * drawn
        executed = rows[-1]["executed_action"] if rows else None
        wanted = (label if acting is None else acting.act(observation, executed)) + deviation
        if left == 0 and disturbance.random() < config.disturbances:
            left = int(disturbance.integers(*_DISTURBED_STEPS, endpoint=True))
            pushed = disturbance.uniform(environment.spec.action_low, environment.spec.action_high)
        if left:
            left, wanted = left - 1, pushed
        result = checked_result(environment.step(wanted.astype(np.float32)), environment.spec)
        rows.append({**observation, "action": label, "executed_action": np.array(result.executed_action), **positions})
        observation = _kept(result.observation, environment)
        if result.success and last_step is None:
            last_step = len(rows) - 1 + config.steps_after_success
        if result.terminated or result.truncated:
            break
    success = last_step is not None
    if len(rows) < 2 or not (success or acting):
        return None, success
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}, success


def _kept(observation: dict[str, NDArray[Any]], environment: Environment) -> dict[str, NDArray[Any]]:
    """Copies of what was observed: an environment may write the next observation into the same arrays."""
    return {key: np.array(value) for key, value in checked_observation(observation, environment.spec).items()}


def _positions(environment: Environment) -> dict[str, NDArray[np.float32]]:
    """Where things are now, by the names of their arrays."""
    found = environment.positions  # type: ignore[attr-defined]  # `record_demonstrations` has looked
    return {POSITION + name: np.array(place, np.float32) for name, place in found.items()}
