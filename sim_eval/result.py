"""What an evaluation found, and the JSON that other programs read."""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from scd_robot.sim_eval.faults import ObservationFaults
from scd_robot.sim_eval.metrics import bootstrap_mean_interval, mean_and_median, percentiles, wilson_interval
from scd_robot.sim_eval.motion import MOTION_NAMES, mean_motion
from scd_robot.types import ActionArray, EnvironmentSpec

__all__ = ["SCHEMA", "EpisodeRecord", "EvaluationResult", "VideoRecord", "join_results"]

logger = logging.getLogger(__name__)

SCHEMA = 1


@dataclass(frozen=True)
class EpisodeRecord:
    """Outcome of one episode.

    Attributes:
        index: number of the episode; with the seed domain it determines the start state.
        seed: what the environment was reset with.
        initial_state_hash: SHA-256 of the simulator's state after the reset; None if it never got there.
        success: the success condition held at some step (the episode ends there).
        steps: control steps taken.
        invalid: the simulator crashed twice, or did not start again; the episode counts neither as success nor as
            failure.
        total_reward: sum of the task's rewards.
        best_reward: largest of them; None without a step. PushT's score is its mean over the episodes.
        reason: why it ended: "success", "terminated", "time limit", or what crashed.
        completed: whether the manipulation was completed, rightly or not, where the environment tells.
        motion: see `motion.motion_quality`.
    """

    index: int
    seed: int
    initial_state_hash: str | None
    success: bool
    steps: int
    invalid: bool
    total_reward: float
    best_reward: float | None
    reason: str
    completed: bool | None = None
    motion: dict[str, float | None] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The record that `to_json` wrote."""
        names = ("index", "seed", "initial_state_hash", "success", "steps", "invalid", "best_reward", "reason")
        fields: dict[str, Any] = {name: data[name] for name in (*names, "completed")}
        motion = {name: data.get(name) for name in MOTION_NAMES}
        return cls(**fields, total_reward=data["return"], motion=motion)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "index": self.index,
            "seed": self.seed,
            "initial_state_hash": self.initial_state_hash,
            "success": self.success,
            "steps": self.steps,
            "invalid": self.invalid,
            "return": self.total_reward,
            "best_reward": self.best_reward,
            "reason": self.reason,
            "completed": self.completed,
            **{name: self.motion.get(name) for name in MOTION_NAMES},
        }


@dataclass(frozen=True)
class VideoRecord:
    """A replayed episode.

    Attributes:
        episode: its index.
        success: its outcome.
        file: path relative to the output folder.
    """

    episode: int
    success: bool
    file: str

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"episode": self.episode, "success": self.success, "file": self.file}


@dataclass
class EvaluationResult:
    """An evaluation.

    Attributes:
        environment: what was evaluated in.
        policy: name of the policy, for people.
        episodes_detail: one record per episode, in the order of their indices.
        timings_ms: wall milliseconds per call, without the first: "act" always, "encoder" and "plan" where the policy
            tells.
        num_envs: rows stepped side by side, which is the batch size of these calls but for plans.
        plan_batch_size: mean number of rows in a plan (those whose last one is used up); None where it does not tell.
        max_steps: control steps after which an episode was ended.
        first_episode: index of the first episode.
        seed_domain: see `scd_robot.seeding`.
        wall_s: duration of the roll-outs, without videos and report.
        versions: of the packages that matter; those of simulators under another Python as `simulator/NAME`.
        provenance: see `provenance.collect_provenance`.
        faults: what was done to the observations.
        videos: replays that were written.
        video_error: why videos are missing, in one line; None if none are.
        out: the output folder, if there is one.
        actions: (steps, Da) float32 executed in each episode, by its index; they replay it.
    """

    environment: EnvironmentSpec
    policy: str
    episodes_detail: list[EpisodeRecord]
    timings_ms: dict[str, list[float]]
    num_envs: int
    max_steps: int
    first_episode: int
    seed_domain: int
    wall_s: float
    versions: dict[str, str]
    provenance: dict[str, Any] = field(default_factory=dict)
    plan_batch_size: float | None = None
    faults: ObservationFaults = field(default_factory=ObservationFaults)
    videos: list[VideoRecord] = field(default_factory=list)
    video_error: str | None = None
    out: Path | None = None
    actions: dict[int, ActionArray] = field(default_factory=dict, repr=False)

    @property
    def valid(self) -> list[EpisodeRecord]:
        """The episodes that count."""
        return [e for e in self.episodes_detail if not e.invalid]

    @property
    def successes(self) -> int:
        """Number of successful episodes."""
        return sum(e.success for e in self.valid)

    @property
    def invalid(self) -> int:
        """Number of episodes that a crash of the simulator made invalid."""
        return len(self.episodes_detail) - len(self.valid)

    @property
    def success_rate(self) -> float | None:
        """Successes over valid episodes; None without valid episodes."""
        return self.successes / len(self.valid) if self.valid else None

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the success rate."""
        return wilson_interval(self.successes, len(self.valid))

    def to_json(self) -> dict[str, Any]:
        """The document of `result.json`, schema 1, as plain JSON types.

        `docs/evaluation.md` describes its keys.
        """
        rate = self.success_rate
        steps = mean_and_median([e.steps for e in self.valid])
        return {
            "schema": SCHEMA,
            "env": self.environment.name,
            "policy": self.policy,
            "episodes": len(self.episodes_detail),
            "successes": self.successes,
            "invalid": self.invalid,
            "success_rate": rate,
            "interval": list(self.interval),
            "encoder_ms": percentiles(self.timings_ms.get("encoder", [])),
            "plan_ms": percentiles(self.timings_ms.get("plan", [])),
            "act_ms": percentiles(self.timings_ms.get("act", [])),
            "timing_batch_size": self.num_envs,
            "plan_batch_size": self.plan_batch_size,
            "time_to_success": self._time_to_success(),
            "mean_steps": steps["mean"] if steps else None,
            "best_reward": self.mean_best_reward,
            "best_reward_interval": self.best_reward_interval,
            "terminate_on_success": True,
            "max_steps": self.max_steps,
            "control_dt": self.environment.control_dt,
            "success_definition": self.environment.success,
            "score_definition": self.environment.score,
            "seeds": {"domain": self.seed_domain, "first_episode": self.first_episode},
            "num_envs": self.num_envs,
            "wall_s": self.wall_s,
            "versions": self.versions,
            "provenance": self.provenance,
            "faults": self.faults.to_json(),
            "motion": mean_motion([e.motion for e in self.valid]),
            "hand_unit": self.environment.hand_unit,
            "contextual_success": self._contextual_success(),
            "videos": [v.to_json() for v in self.videos],
            "video_error": self.video_error,
            "episodes_detail": [e.to_json() for e in self.episodes_detail],
        }

    @property
    def mean_best_reward(self) -> float | None:
        """Mean over valid episodes of their best reward; None without one."""
        best = self._best_rewards()
        return sum(best) / len(best) if best else None

    @property
    def best_reward_interval(self) -> list[float] | None:
        """95 % bootstrap interval of that mean over episodes; None with fewer than two."""
        interval = bootstrap_mean_interval(self._best_rewards())
        return None if interval is None else list(interval)

    def _best_rewards(self) -> list[float]:
        return [e.best_reward for e in self.valid if e.best_reward is not None]

    def _contextual_success(self) -> dict[str, Any] | None:
        """Success where the manipulation was completed: memory apart from motor skill (arXiv 2606.16447)."""
        completed = [e for e in self.valid if e.completed]
        if all(e.completed is None for e in self.valid):
            return None
        if not completed:
            return {"completed": 0, "successes": 0, "rate": None, "interval": [0.0, 1.0]}
        successes = sum(e.success for e in completed)
        return {
            "completed": len(completed),
            "successes": successes,
            "rate": successes / len(completed),
            "interval": list(wilson_interval(successes, len(completed))),
        }

    def _time_to_success(self) -> dict[str, Any] | None:
        steps = mean_and_median([e.steps for e in self.valid if e.success])
        if steps is None:
            return None
        return {"steps": steps, "seconds": {k: v * self.environment.control_dt for k, v in steps.items()}}


def join_results(parts: Sequence[EvaluationResult], wall_s: float) -> EvaluationResult:
    """One result of several; `num_envs` is that of the widest.

    Args:
        parts: of different episodes, in any order; between them some may be left out.
        wall_s: of them all.
    """
    parts = sorted(parts, key=lambda part: part.first_episode)
    versions = functools.reduce(_both_versions, (part.versions for part in parts))
    times: dict[str, list[float]] = {}
    for part in parts:
        for name, values in part.timings_ms.items():
            times.setdefault(name, []).extend(values)
    return replace(
        parts[0],
        episodes_detail=[episode for part in parts for episode in part.episodes_detail],
        timings_ms=times,
        wall_s=wall_s,
        versions=versions,
        actions={index: actions for part in parts for index, actions in part.actions.items()},
        num_envs=max(part.num_envs for part in parts),
        plan_batch_size=_mean_plan_batch(parts),
    )


def _mean_plan_batch(parts: Sequence[EvaluationResult]) -> float | None:
    """Rows per plan, over all plans."""
    known = [(p.plan_batch_size, len(p.timings_ms.get("plan", ()))) for p in parts if p.plan_batch_size is not None]
    plans = sum(count for _, count in known)
    return sum(size * count for size, count in known) / plans if plans else None


def _both_versions(first: dict[str, str], second: dict[str, str]) -> dict[str, str]:
    """Versions of two nodes; where they differ, both, and a warning."""
    both = dict(first)
    for name, version in second.items():
        if both.setdefault(name, version) != version and version not in both[name].split(" and "):
            logger.warning("nodes have different versions of %s: %s and %s", name, both[name], version)
            both[name] += f" and {version}"
    return both
