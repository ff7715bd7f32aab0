"""Demonstrations of scripted experts, from start states that no evaluation uses."""

import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

import scd_robot
from scd_robot.datasets.zarr.writer import ZarrWriter
from scd_robot.errors import ConfigError, SimulatorError
from scd_robot.recording.acting import ActingPolicy, ChunkingPolicy
from scd_robot.recording.attempt import Attempt, RecordingConfig
from scd_robot.recording.workers import available_cpus, run_attempts
from scd_robot.seeding import RECORDING, derive_seed
from scd_robot.sim_eval.policy_adapter import check_policy_spec
from scd_robot.sim_eval.registry import make_environment
from scd_robot.types import DatasetSpec, Environment, EnvironmentSpec

__all__ = ["record_demonstrations"]

logger = logging.getLogger(__name__)

_EPISODES_PER_WORKER = 10  # fewer do not pay for the start of a process
_CRASHES_IN_A_ROW = 10  # of the simulator, after which there is no hope


def record_demonstrations(
    environment: str,
    episodes: int,
    out: Path,
    *,
    seed: int = 0,
    action_noise: float = 0.0,
    steps_after_success: int = 10,
    disturbances: float = 0.0,
    keep_positions: bool = False,
    noise_correlation: float = 0.0,
    policy: ChunkingPolicy | None = None,
    max_delay_steps: int = 0,
    told: Mapping[str, Any] | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Records the expert's first `episodes` successes into a Zarr store.

    With a policy it is the policy that acts, in every attempt from the first one on, whether it succeeds or not; the
    labels remain the expert's (DAgger, see `acting`). Which ones succeeded, "success" of the episodes tells.

    Attempt i starts from a state that is a function of (seed, i), and failures are dropped and counted: the store is
    the same, bit by bit, for any number of workers.

    Args:
        environment: for example "metaworld/push-v3" or "my_env:make"; see `scd_robot.sim_eval.registry`.
        episodes: demonstrations wanted.
        out: path of the new store.
        seed: of the recording.
        action_noise: standard deviation of the noise on executed actions; the labels stay clean.
        steps_after_success: control steps recorded after the first success.
        disturbances: probability that in a control step a disturbance begins, see `RecordingConfig`.
        keep_positions: keep where the hand and other things were in arrays "position.NAME" (N, 3) [m], which are no
            observations.
        noise_correlation: of the noise in a control step with that one before, see `RecordingConfig`.
        policy: that acts in the expert's place, of this environment's observations and actions; None = the expert.
        max_delay_steps: the most control steps that its plans take, in which it carries out what it has committed to;
            each attempt draws from 0 to this.
        told: of the policy, kept in the store's attributes.
        workers: processes; None = one per CPU, but no more than pay; a policy acts in this one.
        overwrite: replace a store at `out`.
        progress: show a progress bar.

    Returns:
        environment, episodes, attempts, successes, failures, steps, mean_length [steps], seconds, path, seed,
        action_noise, noise_correlation, disturbances; plain JSON types.

    Raises:
        ConfigError: a number is out of range, or the environment has no expert, or no positions to keep; a delay
            without a policy, or more than its chunks allow; a policy whose actions are of another kind.
        ShapeError: the policy is one for another environment. Whatever else it raises is raised, too.
        UnknownNameError, MissingDependencyError: the environment cannot be made.
        SimulatorError: the expert fails far too often (10 attempts per episode and 20 more), the simulator crashes in
            10 attempts in a row, or a process died.
        OutputError: `out` exists or cannot be written; the finished episodes are kept.
    """
    start = time.perf_counter()
    if episodes < 1:
        raise ConfigError(f"episodes must be at least 1, got {episodes}")
    if policy is None and (max_delay_steps or told):
        raise ConfigError("max_delay_steps is of a policy's plans; name the policy that acts, or leave it out")
    if policy is not None:
        ActingPolicy(policy, max_delay_steps)
    workers = _num_workers(workers, episodes, policy)
    config = RecordingConfig(
        environment,
        seed,
        action_noise,
        steps_after_success,
        disturbances,
        keep_positions,
        noise_correlation,
        max_delay_steps,
    )
    with contextlib.closing(make_environment(environment)) as simulator:
        spec = simulator.spec
        check_policy_spec(policy, spec)
        _check_expert(simulator, seed)
        if keep_positions and not hasattr(type(simulator), "positions"):
            raise ConfigError(f"{spec.name} does not tell where things are; record it without keep_positions")
        limit = 10 * episodes + 20
        with (
            ZarrWriter(out, _dataset_spec(spec), _metadata(spec, config, policy, told), overwrite) as writer,
            tqdm(total=episodes, desc=f"recording {spec.name}", unit="episode", disable=not progress) as bar,
            contextlib.closing(run_attempts(simulator, config, limit, workers, policy)) as results,
        ):
            attempts, successes = _write(results, writer, bar)
            writer.update_metadata({"attempts": attempts, "failures": attempts - successes})
            if writer.num_episodes < episodes:
                raise SimulatorError(
                    f"the expert of {spec.name} succeeded in {writer.num_episodes} of {attempts} attempts, {episodes} "
                    f"were wanted; lower action_noise ({action_noise}) and disturbances ({disturbances}), or raise "
                    f"max_steps ({spec.max_steps})"
                )
    return {
        "environment": spec.name,
        "episodes": writer.num_episodes,
        "attempts": attempts,
        "successes": successes,
        "failures": attempts - successes,
        "steps": writer.num_steps,
        "mean_length": writer.num_steps / writer.num_episodes,
        "seconds": time.perf_counter() - start,
        "path": str(out),
        "seed": seed,
        "action_noise": action_noise,
        "noise_correlation": noise_correlation,
        "disturbances": disturbances,
    }


def _num_workers(workers: int | None, episodes: int, policy: ChunkingPolicy | None) -> int:
    """How many processes there are to be."""
    if policy is not None and workers not in (None, 1):
        raise ConfigError(f"a policy acts in one process, got {workers} workers; leave them out")
    if policy is not None:
        return 1
    if workers is None:
        return max(1, min(available_cpus(), episodes // _EPISODES_PER_WORKER))
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    return workers


def _write(results: Iterable[Attempt], writer: ZarrWriter, bar: Any) -> tuple[int, int]:
    """Writes episodes until the bar's total is there or no attempt is left; how many were made, and succeeded."""
    attempts = crashes = successes = 0
    for attempt in results:
        attempts += 1
        if attempt.crash is not None:
            logger.warning("attempt %d was dropped: %s", attempt.index, attempt.crash)
        crashes = 0 if attempt.crash is None else crashes + 1
        if crashes == _CRASHES_IN_A_ROW:
            raise SimulatorError(
                f"{writer.spec.source} crashed in {crashes} attempts in a row, the last with: {attempt.crash}; "
                f"{writer.num_episodes} episodes were recorded"
            )
        if attempt.episode is not None:
            about = {"seed": attempt.start_seed, "attempt": attempt.index, "success": int(attempt.success)}
            writer.append(attempt.episode, about)
            bar.update()
        successes += attempt.success
        bar.set_postfix(failures=attempts - successes, refresh=False)
        if writer.num_episodes == bar.total:
            break
    return attempts, successes


def _check_expert(environment: Environment, seed: int) -> None:
    """Raises ConfigError where there is no expert; whatever else goes wrong here is for the attempts to tell."""
    if not callable(getattr(environment, "expert_action", None)):
        raise ConfigError(f"{environment.spec.name} has no scripted expert: its class needs a method expert_action()")
    try:
        environment.reset(derive_seed(RECORDING, seed, 0))
        environment.expert_action()
    except ConfigError:
        raise
    except Exception:
        logger.debug("the first start state of %s", environment.spec.name, exc_info=True)


def _dataset_spec(spec: EnvironmentSpec) -> DatasetSpec:
    return DatasetSpec(
        spec.observation, spec.action_dim, spec.control_dt, source=spec.name, action_kind=spec.action_kind
    )


def _metadata(
    spec: EnvironmentSpec, config: RecordingConfig, policy: ChunkingPolicy | None, told: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What makes the recording repeatable; nothing that differs between two runs of it."""
    versions = {"scd_robot": scd_robot.__version__}
    for package in ("metaworld", "mujoco", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "environment": spec.name,
        "success": spec.success,
        "seed": config.seed,
        "action_noise": config.action_noise,
        "noise_correlation": config.noise_correlation,
        "disturbances": config.disturbances,
        "steps_after_success": config.steps_after_success,
        "versions": versions,
        **({} if policy is None else {"policy": dict(told or {}), "max_delay_steps": config.max_delay_steps}),
    }
