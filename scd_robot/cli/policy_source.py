"""What `scd eval`, `sweep`, `compare` and `serve` run: checkpoints, exported policies, or policies by dotted name."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Trained",
    "exported_instructions",
    "exported_policy",
    "goal_of",
    "instructions",
    "is_exported",
    "is_named",
    "known_task",
    "load_source",
    "make_exported",
    "named_policies",
    "note_instructions",
    "place_of_goal",
    "read_trained",
    "refuse_checkpoint_options",
]


def is_named(source: Path) -> bool:
    """Whether this is `package.module:callable` and not a path."""
    from scd_robot.dotted import is_dotted

    return is_dotted(str(source)) and not source.exists()


def is_exported(source: Path) -> bool:
    """Whether this is a folder that `scd export` wrote."""
    from scd_robot.export import is_export

    return is_export(source)


def exported_policy(folder: Path, device: str, trust: bool, **overrides: Any) -> Any:
    """The policy of an exported folder; see `scd_robot.export.load_exported`.

    Raises:
        ConfigError: another device than the CPU; an override that is part of the graphs.
    """
    from scd_robot.export import load_exported

    _check_device(device)
    return load_exported(folder, trusted=trust, **overrides)


def _check_device(device: str) -> None:
    from scd_robot.errors import ConfigError

    if device != "cpu":
        raise ConfigError(f"exported graphs run on the CPU, got --device {device}")


def load_source(source: Path, device: str = "cpu", trust: bool = False, **overrides: Any) -> Any:
    """The policy of a checkpoint, or of a folder that `scd export` wrote; of an ONNX one without torch.

    Errors are those of `load_policy` and `exported_policy`.
    """
    if is_exported(source):
        return exported_policy(source, device, trust, **overrides)
    import torch

    from scd_robot.policies import load_policy

    torch.set_num_threads(1)  # batches are small
    return load_policy(source, device, **overrides)


@dataclass(frozen=True)
class Trained:
    """A checkpoint, or a folder that `scd export` wrote, of which policies are made to be evaluated.

    Attributes:
        path: of the folder.
        make: makes a policy; takes `environment`, `seed` and `reproducible` by name.
        tasks: that it knows, by their words.
        task: what the user said; None = by the environment's name.
        identity: what `result.json` tells of the policy wherever it is this one, but for the task.
    """

    path: Path
    make: Callable[..., Any]
    tasks: Mapping[str, Any]
    task: str | None
    identity: dict[str, Any]

    def identity_in(self, environment: str) -> dict[str, Any]:
        """What `result.json` tells of the policy where it was evaluated in this environment."""
        from scd_robot.errors import ConfigError

        try:
            task = known_task(environment, self.tasks, self.task)
        except ConfigError:  # several, and none was said: nothing was evaluated there, and making it tells why
            task = None
        return {**self.identity, "task": task}


def read_trained(
    source: Path, device: str, trust: bool = False, task: str | None = None, goal: str | None = None
) -> Trained:
    """Reads a checkpoint (a run stands for its newest) or an exported folder.

    Args:
        source: its folder.
        device: of its policies, torch's.
        trust: run native or pickled code of an export.
        task: what the user said, see `known_task`.
        goal: likewise, see `goal_of`.

    Raises:
        CheckpointError: neither, or damaged.
        ConfigError: an exported folder on another device than the CPU; a task or a goal for a policy that has none.
        UnknownNameError: a task that it does not know.
        DatasetError: the goal cannot be read.
    """
    from scd_robot.checkpoint import read_checkpoint
    from scd_robot.cli import evaluate
    from scd_robot.config import to_json

    make: Callable[..., Any]
    if is_exported(source):
        from scd_robot.export import read_manifest

        _check_device(device)
        manifest = read_manifest(source)
        path, transforms = source, to_json(manifest.transforms)
        make = functools.partial(make_exported, source.resolve(), device, trust)
        identity = {"weights_sha256": manifest.checkpoint.get("weights_sha256"), "export": manifest.sha256}
    else:
        checkpoint = read_checkpoint(source)
        path, transforms = checkpoint.path, checkpoint.config["transforms"]
        make = functools.partial(evaluate.make_policy, checkpoint, device)
        identity = {"weights_sha256": checkpoint.weights_sha256, "export": None}
    if task is not None or goal is not None:  # what is wrong with them is told before anything is evaluated
        instructions(transforms, "", task or next(iter(transforms["tasks"]), None), goal)
    make = functools.partial(make, task=task, goal=goal)
    return Trained(path, make, transforms["tasks"], task, {**identity, "goal": place_of_goal(goal)})


def make_exported(
    folder: Path,
    device: str,
    trust: bool,
    *,
    environment: str,
    task: str | None = None,
    goal: str | None = None,
    **overrides: Any,
) -> Any:
    """The policy of an exported folder in an environment; arguments as those of `evaluate.make_policy`."""
    told = exported_instructions(folder, environment, task, goal)
    return note_instructions(exported_policy(folder, device, trust, **told, **overrides), told["task"], goal)


def note_instructions(policy: Any, task: str | None, goal: str | None) -> Any:
    """The policy, whose provenance tells its task and where its goal is recorded, if it has them."""
    told = {"task": task, "goal": place_of_goal(goal)}
    policy.provenance = {**policy.provenance, **{name: value for name, value in told.items() if value is not None}}
    return policy


def named_policies(
    sources: Sequence[Path], options: Sequence[str], python: str | None, env_python: str | None = None
) -> Callable[..., Any]:
    """How policies by dotted name are made: a function of the name, the environment, and the seed of the noise.

    Args:
        sources: all that is evaluated.
        options: KEY=VALUE for all named policies.
        python: interpreter for them.
        env_python: interpreter for the environments.

    Raises:
        ConfigError: options without a named policy.
    """
    from scd_robot.dotted import parse_options
    from scd_robot.errors import ConfigError

    if (options or python) and not any(map(is_named, sources)):
        raise ConfigError(
            "--policy-options and --policy-python are for policies by dotted name (package.module:callable), got "
            f"{', '.join(map(str, sources))}"
        )
    given = parse_options(options)

    def maker(name: Path, environment: str, seed: int | None = None) -> Callable[[], Any]:
        from scd_robot.sim_eval.named_policy import make_named_policy

        chosen = given if seed is None else {**given, "seed": seed}
        return functools.partial(
            make_named_policy, str(name), chosen, environment, env_python=env_python, python=python
        )

    return maker


def refuse_checkpoint_options(source: Path, options: Mapping[str, Any]) -> None:
    """Refuses options (by name; None and False = not given) that only checkpoints have.

    Raises:
        ConfigError: one is given.
    """
    from scd_robot.errors import ConfigError

    for name, value in options.items():
        if value is not None and value is not False:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for checkpoints; give {source} options of its own with --policy-options"
            )


def known_task(environment: str, tasks: Mapping[str, Any], task: str | None = None) -> str | None:
    """The task that a policy of these tasks is to do in an environment; None where it has none.

    Args:
        environment: its name is the task's where the recordings named none.
        tasks: by their words.
        task: what the user said.

    Raises:
        UnknownNameError: a task that is none of these.
        ConfigError: a task for a policy that has none; or none was said and several are possible.
    """
    from scd_robot.errors import ConfigError, UnknownNameError

    if not tasks:
        if task is not None:
            raise ConfigError("--task is for policies that were trained with --tasks, this one knows none")
        return None
    if task is None:
        task = environment if environment in tasks else next(iter(tasks)) if len(tasks) == 1 else None
    if task is None:
        raise ConfigError(f"this policy does several tasks; say which with --task: {', '.join(map(repr, tasks))}")
    if task not in tasks:
        raise UnknownNameError("task of this policy", task, tasks)
    return task


def instructions(
    transforms: Mapping[str, Any], environment: str, task: str | None = None, goal: str | None = None
) -> dict[str, Any]:
    """What a policy is told to do in an environment: the arguments `task` and `goal` of its class.

    Args:
        transforms: of the policy, as JSON.
        environment: its name.
        task: what the user said, see `known_task`.
        goal: likewise, PATH:NUMBER of a recorded episode at whose end it is; None = observations bring it.
    """
    told: dict[str, Any] = {"task": known_task(environment, transforms["tasks"], task)}
    if goal is not None:
        recorded = {ours: theirs for theirs, ours in transforms["rename"].items()}
        told["goal"] = goal_of(goal, [recorded.get(key, key) for key in transforms["goals"]])
    return told


def exported_instructions(folder: Path, environment: str, task: str | None, goal: str | None) -> dict[str, Any]:
    """`instructions` of an exported folder."""
    from scd_robot.config import to_json
    from scd_robot.export import read_manifest

    return instructions(to_json(read_manifest(folder).transforms), environment, task, goal)


def place_of_goal(source: str | None) -> str | None:
    """PATH:NUMBER with the whole path, so that it says the same from any folder; addresses stay as they are."""
    path, _, number = (source or "").rpartition(":")
    return source if not path or "://" in path else f"{Path(path).resolve()}:{number}"


def goal_of(source: str, keys: Sequence[str], option: str = "--goal") -> dict[str, Any]:
    """What was observed at the end of a recorded episode.

    Args:
        source: PATH:NUMBER of a dataset and an episode.
        keys: observation keys of the recording.
        option: that named it, for messages.

    Raises:
        ConfigError: not of this form, or there is no such episode.
        DatasetError, UnknownNameError: see `open_dataset`.
    """
    from scd_robot.datasets import open_dataset
    from scd_robot.errors import ConfigError

    path, _, number = source.rpartition(":")
    if not path or not number.isdecimal():
        raise ConfigError(f"{option} takes DATASET:EPISODE, for example data/push.zarr:0, got {source!r}")
    if not keys:
        raise ConfigError("--goal is for policies that were trained with --goals, this one is shown none")
    data = open_dataset(path, list(keys))
    if int(number) >= data.num_episodes:
        raise ConfigError(f"{path} has {data.num_episodes} episodes, from 0 on; got {number}")
    last = int(data.episode_ends[int(number)]) - 1
    return {key: data.arrays[key][last] for key in keys}
