"""Replays recorded actions open loop, to tell a wrong simulator version or action convention before training.

Each episode starts from its recorded initial state; then its executed actions are applied, whatever comes of them, and
what is reached is compared with what was recorded, step by step. How an initial state is set depends on the recording:

- our own recordings tell the seed of each episode: `reset(seed)`;
- human recordings of PushT hold its whole state: `set_recorded_state`;
- recordings of robosuite hold simulator states and models: see `robosuite_states`.

Shapes: E episodes, T control steps of an episode.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from statistics import mean, median
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from scd_robot.datasets.schema import EpisodeDataset
from scd_robot.errors import ConfigError, ShapeError, SimulatorError
from scd_robot.output import package_versions, to_plain
from scd_robot.recording.robosuite_states import RobosuiteSimulator
from scd_robot.sim_eval.metrics import wilson_interval
from scd_robot.sim_eval.pusht import PushtEnvironment, state_difference
from scd_robot.sim_eval.registry import make_environment
from scd_robot.types import ActionArray, Environment, StepResult

__all__ = ["ROBOSUITE", "format_replay", "replay_dataset"]

logger = logging.getLogger(__name__)

ROBOSUITE = "robosuite"  # the name of whichever environment of robosuite a recording tells
_PACKAGES = ("robosuite", "metaworld", "mujoco", "gym-pusht", "pymunk", "numpy")
_AT_ONCE = 3  # control steps within which contacts are no excuse
_SHOWN = 5  # episodes in the text
_MANY_CLIPPED = 0.01  # share of the steps

Setter = Callable[[Any, EpisodeDataset, int], dict[str, NDArray[Any]]]


def replay_dataset(
    dataset: EpisodeDataset,
    environment_name: str,
    *,
    episodes: int | None = None,
    tolerance: float = 0.01,
    progress: bool = True,
) -> dict[str, Any]:
    """Replays the executed actions of a recording and compares what is reached with what was recorded.

    Args:
        dataset: the recording.
        environment_name: as in `sim_eval.registry`; "robosuite" = the one that the recording names.
        episodes: only the first so many; None = all.
        tolerance: largest difference, in the units of the compared arrays, of a state that counts as reproduced.
        progress: show a progress bar.

    Returns:
        Plain JSON types: `source`, `environment`, `recorded_with` and `versions` (of packages), `control_dt`
        (`recorded`, `simulated` [s]), `tolerance`, `episodes`, `successes`, `interval` (Wilson 95 %),
        `recorded_successes` (null where the recording does not tell), `repeated_successes` (of those),
        `mean_best_reward`, `within_tolerance` (episodes), `drift` (`median`, `max` over the episodes' largest
        differences), `steps_clipped`, `reproduces`, `verdict` (a sentence), and `episodes_detail`: for each `index`,
        `steps`, `success`, `recorded_success`, `best_reward`, `drift` (by array: `max`, `final`, `first_step_over` the
        tolerance or null), `max_drift`, `first_step_over`, `steps_clipped`, `error` (why it broke off, or null).

    Raises:
        ConfigError: a number is out of range, or recording and environment do not belong together.
        ShapeError: their actions have different widths.
        DatasetError, SimulatorError, MissingDependencyError, UnknownNameError: the environment cannot be made, or an
            initial state not be set.
    """
    if episodes is not None and episodes < 1:
        raise ConfigError(f"episodes must be at least 1, got {episodes}")
    if not 0 <= tolerance < math.inf:
        raise ConfigError(f"tolerance must be a finite number of 0 or more, got {tolerance}")
    count = dataset.num_episodes if episodes is None else min(episodes, dataset.num_episodes)
    details = []
    with contextlib.closing(_make_replayer(dataset, environment_name, count)) as replayer:
        if replayer.action_dim != dataset.spec.action_dim:
            raise ShapeError(
                f"the actions of {dataset.spec.source} are {dataset.spec.action_dim} wide, {replayer.name} needs "
                f"{replayer.action_dim}; was it recorded in another environment, or is another array the action?"
            )
        for index in tqdm(range(count), desc=f"replaying in {replayer.name}", unit="episode", disable=not progress):
            details.append(_replay_episode(replayer, dataset, index, tolerance))
        result = _summary(details) | {"tolerance": tolerance, "versions": package_versions(_PACKAGES)}
        result |= {
            "source": dataset.spec.source,
            "environment": replayer.name,
            "recorded_with": _recorded_with(dataset.metadata),
            "control_dt": {"recorded": dataset.spec.control_dt, "simulated": replayer.control_dt},
        }
    result |= _judge(result, details)
    plain: dict[str, Any] = to_plain({**result, "episodes_detail": details})
    return plain


def format_replay(result: dict[str, Any]) -> str:
    """`replay_dataset`'s result for a terminal: totals, the episodes that drifted most, the verdict."""
    low, high = result["interval"]
    count = result["episodes"]
    lines = [
        f"replayed  {result['source']} in {result['environment']}, {count} episodes",
        f"succeeded {result['successes']} of {count} (Wilson 95 %: {100 * low:.1f} to {100 * high:.1f} %)",
    ]
    if result["recorded_successes"] is not None:
        lines.append(
            f"recorded  {result['recorded_successes']} successes, of which {result['repeated_successes']} again"
        )
    drift = result["drift"]
    within = f"{result['within_tolerance']} episodes within {result['tolerance']:g}"
    lines.append(f"drift     median {drift['median']:.3g}, largest {drift['max']:.3g}; {within}")
    drifted = [e for e in result["episodes_detail"] if e["error"] or e["first_step_over"] is not None]
    drifted.sort(key=lambda e: (e["error"] is None, -(e["max_drift"] or 0.0)))
    for episode in drifted[:_SHOWN]:
        what = episode["error"] or f"drift {episode['max_drift']:.3g}, from step {episode['first_step_over']} on"
        lines.append(f"  episode {episode['index']}: {what}")
    if len(drifted) > _SHOWN:
        lines.append(f"  and {len(drifted) - _SHOWN} more")
    return "\n".join([*lines, "", result["verdict"]])


class _Replayer(Protocol):
    """A simulator that an episode is replayed in."""

    name: str
    action_dim: int
    control_dt: float

    def start(self, index: int) -> dict[str, NDArray[Any]]:
        """Sets an episode's initial state; returns what is compared, by key."""
        ...

    def step(self, action: ActionArray) -> StepResult:
        """Applies an action."""
        ...

    def recorded(self, index: int) -> dict[str, NDArray[Any]]:
        """What `start` and `step` give is compared with: arrays (T, ...) by key."""
        ...

    def recorded_success(self, index: int) -> bool | None:
        """Whether the recorded episode succeeded; None = not known. Called after its replay."""
        ...

    def difference(self, reached: NDArray[Any], recorded: NDArray[Any]) -> NDArray[Any]:
        """Of compared arrays (T, ...)."""
        ...

    def close(self) -> None:
        """Releases the simulator."""
        ...


def _make_replayer(dataset: EpisodeDataset, environment_name: str, count: int) -> _Replayer:
    if environment_name == ROBOSUITE:
        return _InRobosuite(dataset)
    environment = make_environment(environment_name)
    try:
        return _InEnvironment(environment, dataset, count)
    except BaseException:
        environment.close()
        raise


class _InRobosuite(RobosuiteSimulator):
    """A replay in the environment of robosuite that the recording names; compared are the positions."""

    def difference(self, reached: NDArray[Any], recorded: NDArray[Any]) -> NDArray[Any]:
        return reached - recorded


class _InEnvironment:
    """A replay in one of our environments; compared are the vectors that it and the recording both have.

    Of PushT only the state, from which all else follows: the keypoints of its human recording are a little off.
    """

    def __init__(self, environment: Environment, dataset: EpisodeDataset, count: int) -> None:
        self._environment, self._dataset = environment, dataset
        spec = environment.spec
        self.name, self.action_dim, self.control_dt = spec.name, spec.action_dim, spec.control_dt
        self._set = _choose_setter(environment, dataset)
        self._keys = [
            key
            for key, array in dataset.spec.observation.items()
            if array == spec.observation.get(key) and array.dtype != "uint8"
        ]
        if self._set is _by_pusht_state:
            self._keys = ["state"]
        if not self._keys:
            raise ConfigError(
                f"{dataset.spec.source} and {spec.name} have no observation in common that could be compared: "
                f"{', '.join(dataset.spec.observation)} there, {', '.join(spec.observation)} here"
            )
        longest = int(dataset.episode_lengths[:count].max())
        if longest > spec.max_steps:
            raise ConfigError(
                f"episodes of {dataset.spec.source} have up to {longest} steps, {spec.name} ends after "
                f"{spec.max_steps}; add the option max_steps={longest} to its name"
            )

    def start(self, index: int) -> dict[str, NDArray[Any]]:
        return self._compared(self._set(self._environment, self._dataset, index))

    def step(self, action: ActionArray) -> StepResult:
        return self._environment.step(action)

    def recorded(self, index: int) -> dict[str, NDArray[Any]]:
        return self._dataset.episode(index, self._keys)

    def recorded_success(self, index: int) -> bool | None:
        told = self._dataset.episode_info.get("success")
        if told is not None:
            return bool(told[index])
        return True if self._set is _by_seed else None  # our recorder keeps successes only

    def difference(self, reached: NDArray[Any], recorded: NDArray[Any]) -> NDArray[Any]:
        return state_difference(reached, recorded) if self._set is _by_pusht_state else reached - recorded

    def close(self) -> None:
        self._environment.close()

    def _compared(self, observation: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {key: observation[key] for key in self._keys}


def _by_seed(environment: Environment, dataset: EpisodeDataset, index: int) -> dict[str, NDArray[Any]]:
    return environment.reset(int(dataset.episode_info["seed"][index]))


def _by_pusht_state(environment: PushtEnvironment, dataset: EpisodeDataset, index: int) -> dict[str, NDArray[Any]]:
    return environment.set_recorded_state(dataset.arrays["state"][dataset.rows(index).start])


def _choose_setter(environment: Environment, dataset: EpisodeDataset) -> Setter:
    """The function that sets an episode's initial state."""
    recorded_in = dataset.metadata.get("environment")
    if isinstance(recorded_in, str) and "seed" in dataset.episode_info:
        if recorded_in.partition(":")[0] != environment.spec.name.partition(":")[0]:
            raise ConfigError(
                f"{dataset.spec.source} was recorded in {recorded_in} and cannot be replayed in {environment.spec.name}"
            )
        return _by_seed
    if isinstance(environment, PushtEnvironment) and "state" in dataset.spec.observation:
        return _by_pusht_state
    raise ConfigError(
        f"nothing in {dataset.spec.source} tells how its initial states are set in {environment.spec.name}: a replay "
        "needs a recording of this package (with the seed of each episode), PushT's 'state' in pusht, or simulator "
        f"states with their models, which are replayed in {ROBOSUITE!r}"
    )


def _replay_episode(replayer: _Replayer, dataset: EpisodeDataset, index: int, tolerance: float) -> dict[str, Any]:
    actions = np.asarray(dataset.executed()[dataset.rows(index)], np.float32)
    start = replayer.start(index)
    recorded = replayer.recorded(index)
    reached = {key: [value] for key, value in start.items()}
    success, clipped, rewards, error = False, 0, [], None
    for action in actions:
        try:
            result = replayer.step(action)
        except SimulatorError as failure:
            error = str(failure)
            break
        success |= result.success
        clipped += not np.array_equal(result.executed_action, action)
        rewards.append(result.reward)
        for key, values in reached.items():
            values.append(result.observation[key])
    drift = {key: _drift(replayer, values, recorded[key], tolerance) for key, values in reached.items()}
    over = [entry["first_step_over"] for entry in drift.values() if entry["first_step_over"] is not None]
    return {
        "index": index,
        "steps": len(actions),
        "success": success,
        "recorded_success": replayer.recorded_success(index),
        "best_reward": max(rewards, default=None),
        "drift": drift,
        "max_drift": max(entry["max"] for entry in drift.values()),
        "first_step_over": min(over, default=None),
        "steps_clipped": clipped,
        "error": error,
    }


def _drift(
    replayer: _Replayer, reached: list[NDArray[Any]], recorded: NDArray[Any], tolerance: float
) -> dict[str, Any]:
    """Largest difference over all and in the last step, and the first step whose difference is beyond `tolerance`."""
    steps = min(len(reached), len(recorded))  # what the last action led to was not recorded
    difference = replayer.difference(np.asarray(reached[:steps], np.float64), np.asarray(recorded[:steps], np.float64))
    size = np.abs(difference).reshape(steps, -1).max(axis=1)
    over = np.flatnonzero(~(size <= tolerance))
    return {
        "max": float(size.max()),
        "final": float(size[-1]),
        "first_step_over": int(over[0]) if len(over) else None,
    }


def _summary(details: list[dict[str, Any]]) -> dict[str, Any]:
    successes = sum(detail["success"] for detail in details)
    known = [detail for detail in details if detail["recorded_success"] is not None]
    drifts = [detail["max_drift"] for detail in details]
    rewards = [detail["best_reward"] for detail in details if detail["best_reward"] is not None]
    return {
        "episodes": len(details),
        "successes": successes,
        "interval": list(wilson_interval(successes, len(details))),
        "recorded_successes": sum(detail["recorded_success"] for detail in known) if known else None,
        "repeated_successes": sum(map(_repeats, details)) if known else None,
        "mean_best_reward": mean(rewards) if rewards else None,
        "within_tolerance": sum(_is_within(detail) for detail in details),
        "drift": {"median": median(drifts), "max": max(drifts)},
        "steps_clipped": sum(detail["steps_clipped"] for detail in details),
    }


def _is_within(detail: Mapping[str, Any]) -> bool:
    return detail["first_step_over"] is None and detail["error"] is None


def _repeats(detail: Mapping[str, Any]) -> bool:
    return bool(detail["recorded_success"] and detail["success"])


def _judge(result: Mapping[str, Any], details: list[dict[str, Any]]) -> dict[str, Any]:
    """`reproduces`, and the `verdict` that says so in words.

    An episode reproduces if it starts as recorded, and stays within the tolerance or repeats the recorded success.
    Contacts amplify rounding, so a recording reproduces if more than half of its episodes do.
    """
    good = [detail for detail in details if _is_within(detail) or (_repeats(detail) and detail["first_step_over"] != 0)]
    reproduces = 2 * len(good) > len(details)
    counts = f"{result['within_tolerance']} of {len(details)} episodes stay within {result['tolerance']:g}"
    if result["recorded_successes"]:
        counts += f", {result['repeated_successes']} of {result['recorded_successes']} recorded successes succeed again"
    left = [detail["first_step_over"] for detail in details if detail["first_step_over"] is not None]
    if left:
        counts += f"; the others leave the recording at step {median(left):g} (median)"
    if reproduces:
        return {"reproduces": True, "verdict": f"the recording reproduces: {counts}"}
    verdict = "; ".join([f"the recording does not reproduce: {counts}", *_reasons(result, details)])
    return {"reproduces": False, "verdict": verdict}


def _reasons(result: Mapping[str, Any], details: list[dict[str, Any]]) -> Iterable[str]:
    """What may be wrong, the likeliest first."""
    starts = sum(detail["first_step_over"] == 0 for detail in details)
    if 2 * starts > len(details):
        yield "the first states differ already: another environment, or other options than in the recording"
        return
    recorded, simulated = result["control_dt"]["recorded"], result["control_dt"]["simulated"]
    if not math.isclose(recorded, simulated, rel_tol=1e-3):
        yield f"it was recorded every {recorded:g} s but is simulated every {simulated:g} s"
    if result["steps_clipped"] > _MANY_CLIPPED * sum(detail["steps"] for detail in details):
        yield f"{result['steps_clipped']} actions lie beyond the environment's bounds: other units, or normalised"
    left = [detail["first_step_over"] for detail in details if detail["first_step_over"] is not None]
    if left and median(left) <= _AT_ONCE:
        yield "wrong action convention (frame, units, delta or absolute) or simulator version, as it leaves at once"
    else:
        yield "wrong simulator version or action convention"
    versions = ", ".join(f"{name} {version}" for name, version in result["recorded_with"].items())
    yield f"recorded with {versions or 'unknown versions'}"


def _recorded_with(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Versions that the recorder noted."""
    versions = notes.get("versions")
    found = dict(versions) if isinstance(versions, Mapping) else {}
    arguments = notes.get("env_args")
    in_arguments = arguments.get("env_version") if isinstance(arguments, Mapping) else None
    if version := notes.get("repository_version") or in_arguments:
        found[ROBOSUITE] = version
    return found
