"""Options of `scd eval` with which a policy chooses among chunks by what it imagines of each."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ImaginingOptions", "choosing", "make_score"]


@dataclass(frozen=True)
class ImaginingOptions:
    """How a policy chooses among chunks.

    Attributes:
        imagine: checkpoint of a model of frames (scd train frames_64), or of a policy that has one, which may be the
            one that acts (scd train image_frames): each plan then samples several chunks and follows the one whose
            imagined frames score best.
        candidates: chunks sampled for each plan; by default 8.
        imagined_frames: actions of each chunk whose frames are imagined; by default all.
        frame_denoising_steps: of each imagined frame; by default the checkpoint's.
        score: what is best, package.module:callable, of frames (N, T, H, W, C) uint8 and chunks (N, Ta, Da) to (N,)
            numbers, higher is better; or a class that makes one (docs/frames.md).
        score_options: KEY=VALUE for that class, or for a function that makes the score.
        goal_picture: DATASET:EPISODE whose last picture is the goal, in the place of a score: nearer to it is better.
    """

    imagine: Path | None = None
    candidates: int | None = None
    imagined_frames: int | None = None
    frame_denoising_steps: int | None = None
    score: str | None = None
    score_options: tuple[str, ...] = ()
    goal_picture: str | None = None


def choosing(
    load: Callable[[], Any], options: ImaginingOptions, device: str, seed: int | None, own: bool
) -> Callable[[], Any]:
    """Makes what `load` makes, and lets it choose; where nothing is to be imagined, `load` itself.

    Args:
        load: makes the action policy.
        options: of the command line.
        device: torch's, of the model of frames.
        seed: of its noise; None = the checkpoint's.
        own: whether the policy is one of ours, in this process, which samples chunks.

    Raises:
        ConfigError: options that contradict each other; no callable of that name.
        CheckpointError: there is no model of frames.
    """
    from scd_robot.checkpoint import read_checkpoint
    from scd_robot.dotted import import_dotted
    from scd_robot.errors import ConfigError

    if options.imagine is None:
        given = [f"--{name.replace('_', '-')}" for name, value in vars(options).items() if value not in (None, ())]
        if given:
            raise ConfigError(f"{', '.join(given)} is for a choice by imagined frames; name a model with --imagine")
        return load
    if not own:
        raise ConfigError("--imagine is for checkpoints and exported policies, which sample chunks in this process")
    if (options.score is None) == (options.goal_picture is None):
        raise ConfigError("--imagine needs a --score (package.module:callable) or a --goal-picture, and not both")
    if options.score is None and options.score_options:
        raise ConfigError("--score-options are for --score; leave them out")
    if options.score is not None:
        import_dotted(options.score, "score")  # now, rather than after the simulators have started
    checkpoint = read_checkpoint(options.imagine)
    overrides = {"num_denoising_steps": options.frame_denoising_steps, "seed": seed}
    _imagination(checkpoint, device, overrides)  # likewise
    return functools.partial(_choosing_policy, load, checkpoint, options, device, overrides)


def _choosing_policy(
    load: Callable[[], Any], checkpoint: Any, options: ImaginingOptions, device: str, overrides: dict[str, Any]
) -> Any:
    from scd_robot.policies.choosing import ChoosingPolicy

    imagination = _imagination(checkpoint, device, overrides)
    score, described = make_score(options, imagination)
    count = 8 if options.candidates is None else options.candidates
    policy = ChoosingPolicy(load(), imagination, score, count, options.imagined_frames)
    policy.provenance["imagination"]["score"] = described
    return policy


def make_score(options: ImaginingOptions, imagination: Any) -> tuple[Any, dict[str, Any]]:
    """The score, and what it is, as plain JSON types.

    A class, or with options a function, is called with the options, and with the model of frames where it has a
    parameter `imagination`; what comes of it is the score.
    """
    import inspect

    from scd_robot.cli.policy_source import goal_of
    from scd_robot.dotted import call_with_options, describe_module, import_dotted, parse_options
    from scd_robot.policies.choosing import GoalPicture

    if options.goal_picture is not None:
        goal = goal_of(options.goal_picture, [imagination.source], "--goal-picture")[imagination.source]
        return GoalPicture(imagination.pictures(goal[None, None])[0, 0]), {"goal_picture": options.goal_picture}
    assert options.score is not None
    function, given = import_dotted(options.score, "score"), parse_options(options.score_options)
    if inspect.isclass(function) or given:
        function = call_with_options(function, options.score, given, imagination=imagination)
    return function, {"name": options.score, "options": given, **describe_module(options.score)}


def _imagination(checkpoint: Any, device: str, overrides: dict[str, Any]) -> Any:
    from scd_robot.policies.imagination import imagination_of

    return imagination_of(checkpoint, device, **overrides)
