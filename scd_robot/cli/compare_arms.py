"""The arms of `scd compare`: evaluations that are there already, and checkpoints that are evaluated now."""

import glob
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scd_robot.cli.policy_source import is_exported, is_named, read_trained
from scd_robot.errors import ConfigError

__all__ = ["ArmSource", "Settings", "evaluate_arms", "find_arm"]


@dataclass(frozen=True)
class Settings:
    """How checkpoints are evaluated.

    Attributes:
        env: environment.
        episodes: those that are wanted.
        sequential: how many at a time, until the difference is decided; 0 = all at once.
        num_envs: environments side by side.
        python: of another environment, with the simulator.
        device: torch device of the policies.
        seed: of their noise; None = the checkpoint's own.
        task: in words, for policies of several; None = the one that is called as the environment.
        goal: DATASET:EPISODE whose last observation is the goal, for policies that are shown goals.
        reproducible: see 'scd eval --help'.
        trust: likewise.
    """

    env: str
    episodes: range
    sequential: int = 0
    num_envs: int | None = None
    python: str | None = None
    device: str = "cpu"
    seed: int | None = None
    task: str | None = None
    goal: str | None = None
    reproducible: bool = False
    trust: bool = False


@dataclass
class ArmSource:
    """What an arm is made of: of the two lists one is empty until checkpoints are evaluated.

    Attributes:
        path: as it was named.
        evaluations: folder and `result.json` of each.
        checkpoints: to be evaluated, exported ones too, or the dotted name of one policy.
        actions: (steps, action width) of the first evaluation by episode, where it was made now.
    """

    path: Path
    evaluations: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    checkpoints: list[Path] = field(default_factory=list)
    actions: dict[int, Any] = field(default_factory=dict)

    @property
    def documents(self) -> list[dict[str, Any]]:
        """`result.json` of each evaluation."""
        return [document for _, document in self.evaluations]


def find_arm(path: Path, env: str | None) -> ArmSource:
    """Evaluations at a path or by a pattern, or, where there is an environment for them, checkpoints (or runs).

    Raises:
        ConfigError: neither, or both.
    """
    from scd_robot.sim_eval.saved import find_evaluations

    if is_named(path):
        if env is None:
            raise ConfigError(f"{path} is a policy to be evaluated; give --env")
        return ArmSource(path, checkpoints=[path])
    pattern = not path.exists() and glob.has_magic(str(path))
    places = [Path(one) for one in sorted(glob.glob(str(path)))] if pattern else [path]
    if not pattern and not path.exists():
        raise ConfigError(f"there is no {path}; name an evaluation, a folder of them, or a checkpoint")
    checkpoints = [place for place in places if _is_checkpoint(place)] if env is not None else []
    if checkpoints:
        if others := [str(place) for place in places if place not in checkpoints]:
            raise ConfigError(
                f"{path} matches checkpoints ({checkpoints[0]}) and what is none ({others[0]}); name a narrower pattern"
            )
        return ArmSource(path, checkpoints=checkpoints)
    if found := find_evaluations(path):
        return ArmSource(path, found)
    if env is None:
        raise ConfigError(f"{path} holds no evaluation of 'scd eval'; give --env to evaluate a checkpoint there")
    if pattern:
        raise ConfigError(f"{path} matches neither checkpoints nor evaluations; quote the pattern of one of them")
    return ArmSource(path, checkpoints=[path])  # reading it tells what is wrong


def _is_checkpoint(path: Path) -> bool:
    """Whether a checkpoint, the run of a training, or what `scd export` made of one lies there."""
    from scd_robot.checkpoint import list_checkpoints

    return (path / "model.safetensors").is_file() or bool(list_checkpoints(path)) or is_exported(path)


def evaluate_arms(arms: Sequence[ArmSource], settings: Settings, out: Path | None, named: Callable[..., Any]) -> None:
    """Evaluates the checkpoints of both arms, with --sequential block by block until the difference is decided.

    Where the other arm is evaluated already, its episodes are those that count, and no others are run. With `out` the
    evaluations are in its folders a and b (one for each checkpoint in there, if there are several), also where the
    difference was decided early. `named` makes policies by dotted name, see `policy_source.named_policies`.

    Raises:
        ConfigError: an arm does not fit --sequential, or what would be evaluated now.
        ScdRobotError: as `read_trained` and `evaluate` do.
    """
    from scd_robot.sim_eval.comparison import is_decided

    for arm in arms:
        count = len(arm.evaluations) + len(arm.checkpoints)
        if settings.sequential and count > 1:
            raise ConfigError(f"--sequential is for one evaluation of each arm, and {count} were found in {arm.path}")
    how = (settings.device, settings.trust, settings.task, settings.goal)
    loaded = [[path if is_named(path) else read_trained(path, *how) for path in arm.checkpoints] for arm in arms]
    indices = _episodes_to_run([found for arm in arms for found in arm.evaluations], settings)
    growing: list[list[_Evaluation]] = []
    for arm, checkpoints, name in zip(arms, loaded, "ab", strict=True):
        options: dict[str, Any] = {
            "environment": settings.env,
            "seed": settings.seed,
            "reproducible": settings.reproducible,
        }
        policies = [
            named(one, settings.env, settings.seed)() if isinstance(one, Path) else one.make(**options)
            for one in checkpoints
        ]
        places = _folders(arm, None if out is None else out / name, arms)
        parts = zip(policies, map(str, arm.checkpoints), places, strict=True)
        growing.append([_Evaluation(policy, path, place, settings) for policy, path, place in parts])
    block = settings.sequential or len(indices)
    for start in range(0, len(indices), block):
        for arm, evaluations in zip(arms, growing, strict=True):
            for evaluation in evaluations:
                evaluation.extend(indices[start : start + block])
            if evaluations:
                arm.evaluations = [(one.folder or arm.path, one.result.to_json()) for one in evaluations]
                arm.actions = evaluations[0].result.actions
        if settings.sequential and is_decided(arms[0].documents[0], arms[1].documents[0]):
            break
    if out is not None:
        for evaluations, name in zip(growing, "ab", strict=True):
            _remove_others(out / name, evaluations)


def _episodes_to_run(found: Sequence[tuple[Path, dict[str, Any]]], settings: Settings) -> list[int]:
    """The wanted episodes that are valid in all evaluations that are there already.

    Raises:
        ConfigError: there are none, or they were evaluated in another environment.
    """
    from scd_robot.sim_eval.comparison import outcomes
    from scd_robot.sim_eval.workers import close_workers, start_workers

    wanted = settings.episodes
    indices = set(wanted)
    if found:
        workers = start_workers(settings.env, 1, python=settings.python)
        close_workers(workers)
        name = workers[0].spec.name
    for folder, document in found:
        if document["env"] != name:
            raise ConfigError(f"{folder} is an evaluation in {document['env']}, and --env is {name}")
        if not outcomes(document).keys() & set(wanted):
            raise ConfigError(f"{folder} has none of the episodes {wanted.start} to {wanted.stop - 1}")
        indices &= outcomes(document).keys()
    if not indices:
        raise ConfigError(f"no episode from {wanted.start} to {wanted.stop - 1} is valid in all evaluations there are")
    return sorted(indices)


def _folders(arm: ArmSource, out: Path | None, arms: Sequence[ArmSource]) -> list[Path | None]:
    """Where each checkpoint's evaluation goes.

    Raises:
        ConfigError: an evaluation that is to be compared lies there.
    """
    from scd_robot.cli.sweep import short_names

    if out is None or not arm.checkpoints:
        return [None] * len(arm.checkpoints)
    for folder in (folder for other in arms for folder, _ in other.evaluations):
        if folder.resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"the evaluation {folder} would be replaced by that of {arm.path}; choose another --out")
    if len(arm.checkpoints) == 1:
        return [out]
    return [out / name for name in short_names([str(path) for path in arm.checkpoints])]


def _remove_others(folder: Path, evaluations: Sequence["_Evaluation"]) -> None:
    """Removes what an earlier comparison evaluated in an arm's folder, where this one evaluated anything."""
    from scd_robot.sim_eval.output import remove_evaluation

    made = {evaluation.folder for evaluation in evaluations}
    for other in (folder, *(file.parent for file in sorted(folder.glob("*/result.json")))):
        if made and other not in made:
            remove_evaluation(other)


class _Evaluation:
    """An evaluation that grows; its folder, if there is one, holds all of it at any time.

    Args:
        policy: to be evaluated.
        name: of it, for people.
        folder: for the outputs; None = none.
        settings: how.
    """

    def __init__(self, policy: Any, name: str, folder: Path | None, settings: Settings) -> None:
        self.folder = folder
        self.result: Any = None
        self._policy, self._name, self._settings = policy, name, settings
        self._started = time.perf_counter()

    def extend(self, indices: Iterable[int]) -> None:
        """Evaluates more episodes, of ascending numbers."""
        for run in _consecutive(indices):
            self._extend(run)

    def _extend(self, run: range) -> None:
        from scd_robot.sim_eval import evaluate
        from scd_robot.sim_eval.output import EpisodeLog, episode_origin
        from scd_robot.sim_eval.result import join_results
        from scd_robot.sim_eval.rollout import write_outputs

        begins = self.result is None
        new = evaluate(
            self._policy,
            self._settings.env,
            len(run),
            first_episode=run.start,
            num_envs=self._settings.num_envs,
            python=self._settings.python,
            out=self.folder if begins else None,
            overwrite=True,
            num_videos=0,
            policy_name=self._name,
        )
        self.result = new if begins else join_results([self.result, new], time.perf_counter() - self._started)
        if self.folder is not None and not begins:
            origin = episode_origin(new.environment.name, self._name, getattr(self._policy, "provenance", {}), None)
            log = EpisodeLog(self.folder / "episodes.jsonl", new.versions, origin)
            for record in new.episodes_detail:
                log.append(record.to_json())
            write_outputs(self.result, self.folder, None, 0)


def _consecutive(indices: Iterable[int]) -> list[range]:
    """Ascending numbers as ranges without gaps."""
    runs: list[range] = []
    for index in indices:
        if runs and runs[-1].stop == index:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs
