"""Is a model of frames surprised when an object is moved by hand?

    python benchmarks/surprise.py --checkpoint runs/frames --dataset data/held_out.zarr
    python benchmarks/surprise.py --report          the table of what is done

Episodes of the task's expert, with noise on its actions, each run twice from one initial state with the same actions:
left alone, and with the object moved by some cm in a random horizontal direction after a random control step, at once,
by the simulator's own setter of states. Up to that step both see the same; it is checked. Scores are those of
`scd_robot.policies.surprise`, calibrated on a recording that the model was not trained on. Beside the model stands the
last frame repeated, calibrated alike: what could be seen without a model.

- AUROC: how often a moved frame (the largest score of --within frames from the move on) is above the same of an
  episode left alone, over all pairs of different episodes; interval by bootstrap over episodes.
- Detection rate at 1 % false alarms: moved frames above the threshold below which 99 % of all frames of the episodes
  left alone are, each with its Wilson interval; frames of an episode depend on each other, so that of false alarms is
  too narrow.
- Beside it the threshold of the calibration, which is what a robot has: detections, and the false alarms that it
  really gives.

Intervals are 95 %.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import code_version, describe_machine, read_json

from scd_robot.analysis.surprise import calibrate_surprise, watch_frames
from scd_robot.datasets import open_dataset
from scd_robot.errors import ConfigError, ScdRobotError, SimulatorError
from scd_robot.output import write_json, write_text
from scd_robot.policies import Imagination, load_imagination
from scd_robot.policies.surprise import KINDS, SurpriseCalibration, scores_of
from scd_robot.seeding import EVALUATION, derive_seed, keyed_rng
from scd_robot.sim_eval.metrics import wilson_interval
from scd_robot.sim_eval.registry import make_environment

ENVIRONMENT = "metaworld/push-v3:observation=image,camera=corner4"  # the puck has 10 pixels there, 4 in corner2
FALSE_ALARMS = 0.01
EARLIEST = 5  # control steps that are seen before a move
_KEY = 4717
_DRAWS = 2000  # of the bootstrap

Episode = dict[str, np.ndarray]


# -------------------------------------------------------------------------------------------------------- episodes


def play(
    environment: Any,
    camera: str,
    number: int,
    actions: np.ndarray | None = None,
    move: tuple[int, np.ndarray] | None = None,
    *,
    steps: int,
    noise: float,
) -> Episode:
    """What an episode shows: frames (T, H, W, C), and actions (T - 1, Da) executed in it.

    Args:
        environment: with an expert, and `move_object`.
        camera: observation key.
        number: of the episode, which decides its initial state and noise.
        actions: (T - 1, Da) to execute; None = the expert's, with noise.
        move: after which control step the object is moved, and by what (3,) [m]; None = it is left alone.
        steps: T - 1.
        noise: standard deviation.
    """
    rng = keyed_rng(_KEY, number, 0)
    frames, executed = [environment.reset(derive_seed(EVALUATION, number))[camera]], []
    for step in range(steps):
        if actions is None:
            action = environment.expert_action() + noise * rng.standard_normal(environment.spec.action_dim)
        else:
            action = actions[step]
        result = environment.step(action.astype(np.float32))
        moved = move is not None and step == move[0]
        frames.append((environment.move_object(move[1]) if moved else result.observation)[camera])
        executed.append(result.executed_action)
    return {"frames": np.stack(frames), "actions": np.stack(executed)}


def moves(number: int, steps: int, within: int, distance_cm: float) -> tuple[int, np.ndarray]:
    """When and how the object of an episode is moved."""
    rng = keyed_rng(_KEY, number, 1)
    if steps - within < EARLIEST:
        raise ConfigError(f"--steps must be at least {EARLIEST + within}, got {steps}")
    step, angle = int(rng.integers(EARLIEST, steps - within + 1)), rng.uniform(0, 2 * np.pi)
    return step, distance_cm / 100 * np.array([np.cos(angle), np.sin(angle), 0.0])


class LastFrame(Imagination):
    """Predicts that nothing changes: what is surprising without a model."""

    def ahead(self, context: Any, cache: Any, picture: torch.Tensor, action: torch.Tensor, keys: Any) -> torch.Tensor:
        """As of `Imagination`."""
        return picture[:, None].repeat(1, action.shape[1], 1, 1, 1)

    @classmethod
    def instead_of(cls, model: Imagination) -> "LastFrame":
        """For the same pictures."""
        between = model.transforms
        return cls(model.model, model.normalizer, between.recorded, model.config, model.device, between.config)


def watch(
    environment: Any, arms: Mapping[str, tuple[Imagination, SurpriseCalibration]], options: argparse.Namespace
) -> dict[str, Any]:
    """Scores by arm: `alone` by kind, T - 1 per episode; `moved` by distance and kind, (N, within); `steps` (N,)."""
    [camera] = {imagination.source for imagination, _ in arms.values()}
    noise = options.noise
    found: dict[str, Any] = {
        arm: {
            "alone": {kind: [] for kind in KINDS},
            "moved": {f"{distance:g}": {kind: [] for kind in KINDS} for distance in options.move_cm},
            "steps": [],
        }
        for arm in arms
    }

    def scores(arm: str, episode: Episode, number: int) -> dict[str, np.ndarray]:
        imagination, usual = arms[arm]
        errors, _ = watch_frames(imagination, episode["frames"], episode["actions"], number)
        return scores_of(errors, usual.usual)

    for number in range(options.episodes):
        alone = play(environment, camera, number, steps=options.steps, noise=noise)
        for arm, lists in found.items():
            for kind, values in scores(arm, alone, number).items():
                lists["alone"][kind].append(values.tolist())
        for distance in options.move_cm:
            step, offset = moves(number, options.steps, options.within, distance)
            until = step + options.within
            moved = play(environment, camera, number, alone["actions"], (step, offset), steps=until, noise=noise)
            if not np.array_equal(moved["frames"][: step + 1], alone["frames"][: step + 1]):
                raise SimulatorError(f"episode {number} differs before the move in control step {step}")
            for arm, lists in found.items():
                values_of = scores(arm, moved, number)
                for kind in KINDS:  # score i is of frame i + 1, and the move is first seen in frame step + 1
                    lists["moved"][f"{distance:g}"][kind].append(values_of[kind][step:].tolist())
        for lists in found.values():
            lists["steps"].append(step)
        print(f"episode {number + 1} of {options.episodes}", file=sys.stderr)
    return found


# ------------------------------------------------------------------------------------------------------ statistics


def auroc(positive: np.ndarray, negative: np.ndarray, counts: np.ndarray | None = None) -> float:
    """Share of pairs of different episodes in which the positive is larger; ties count half.

    Args:
        positive: (N,) of each episode, with a move.
        negative: (N,) of the same one, without: it is not paired with itself, as no robot sees the same twice.
        counts: (N,) how often each episode is there; None = once.
    """
    larger = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    counts = np.ones(len(positive)) if counts is None else counts
    weights = np.outer(counts, counts)
    np.fill_diagonal(weights, 0)
    return float((weights * larger).sum() / weights.sum())


def auroc_interval(positive: np.ndarray, negative: np.ndarray, draws: int = _DRAWS) -> list[float]:
    """95 %, by bootstrap over episodes."""
    count = len(positive)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=draws)
    usable = drawn[(drawn > 0).sum(axis=1) > 1]  # of two episodes, one alone may be drawn
    low, high = np.percentile([auroc(positive, negative, counts) for counts in usable], (2.5, 97.5))
    return [float(low), float(high)]


def share(above: np.ndarray) -> dict[str, Any]:
    """Of booleans, with its Wilson interval."""
    count, total = int(above.sum()), above.size
    return {"count": count, "of": total, "rate": count / total, "interval": list(wilson_interval(count, total))}


def summary(found: Mapping[str, Any], usual: SurpriseCalibration, within: int) -> dict[str, Any]:
    """By distance and kind, what the docstring of this file names."""
    told: dict[str, Any] = {}
    for distance, kinds in found["moved"].items():
        for kind in KINDS:
            everything = np.concatenate([np.asarray(values) for values in found["alone"][kind]])
            pairs = zip(found["alone"][kind], found["steps"], strict=True)
            negative = np.array([max(values[step : step + within]) for values, step in pairs])
            positive = np.asarray(kinds[kind]).max(axis=1)
            threshold = float(np.quantile(everything, 1 - FALSE_ALARMS, method="higher"))
            given = usual.thresholds[kind]
            told.setdefault(distance, {})[kind] = {
                "auroc": auroc(positive, negative),
                "auroc_interval": auroc_interval(positive, negative),
                "detected": share(positive > threshold),
                "false_alarms": share(everything > threshold),
                "detected_calibrated": share(positive > given),
                "false_alarms_calibrated": share(everything > given),
                "median_moved": float(np.median(positive)),
                "median_alone": float(np.median(everything)),
            }
    return told


def report(document: Mapping[str, Any]) -> str:
    """The table."""
    names = (
        "moved by",
        "prediction",
        "pixels",
        "AUROC",
        "detected at 1 % false alarms",
        "detected, calibrated threshold",
    )
    names += ("false alarms of that", "median score, moved / alone")
    lines = [
        f"{document['environment']}: {document['episodes']} episodes of {document['steps']} control steps; a move is "
        f"to be seen within {document['within']} frame(s). Intervals are 95 %.\n",
        "| " + " | ".join(names) + " |",
        "|" + "---|" * len(names),
    ]
    rows = (
        (distance, arm, kind, entry)
        for arm, distances in document["summary"].items()
        for distance, kinds in distances.items()
        for kind, entry in kinds.items()
    )
    for distance, arm, kind, entry in sorted(rows, key=lambda row: float(row[0])):
        low, high = entry["auroc_interval"]
        cells = [f"{distance} cm", arm, kind, f"{entry['auroc']:.3f} [{low:.3f}, {high:.3f}]"]
        cells += [_cell(entry[name]) for name in ("detected", "detected_calibrated", "false_alarms_calibrated")]
        cells += [f"{entry['median_moved']:.2f} / {entry['median_alone']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    made = document["provenance"]
    lines.append(f"\n- code {made['code']}, torch {made['torch']}; {made['date']}\n- command: `{made['command']}`")
    return "\n".join(lines)


def _cell(entry: Mapping[str, Any]) -> str:
    low, high = (100 * bound for bound in entry["interval"])
    return f"{entry['count']}/{entry['of']}, {100 * entry['rate']:.1f} % [{low:.1f}, {high:.1f}]"


# ---------------------------------------------------------------------------------------------------- command line


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs everything."""
    if options.checkpoint is None or options.dataset is None:
        raise ConfigError("--checkpoint (of a model of frames) and --dataset (that it was not trained on) are needed")
    if options.episodes < 2:
        raise ConfigError(f"--episodes must be at least 2, got {options.episodes}")
    imagination = load_imagination(options.checkpoint, num_denoising_steps=1, guidance_scale=1.0)
    data = open_dataset(options.dataset)
    models = {"model": imagination, "last frame repeated": LastFrame.instead_of(imagination)}
    arms = {
        arm: (model, calibrate_surprise(model, data, range(data.num_episodes), 1 - FALSE_ALARMS))
        for arm, model in models.items()
    }
    environment: Any = make_environment(options.env)
    try:
        if not hasattr(environment, "move_object"):
            raise ConfigError(f"nothing can be moved by hand in {options.env}; choose a task of Meta-World")
        if imagination.source not in environment.spec.observation:
            raise ConfigError(f"{options.env} gives no {imagination.source!r}; add observation=image to its name")
        found = watch(environment, arms, options)
    finally:
        environment.close()
    return {
        "environment": options.env,
        "checkpoint": dict(imagination.provenance),
        "calibration": {arm: usual.to_json() for arm, (_, usual) in arms.items()},
        "episodes": options.episodes,
        "steps": options.steps,
        "within": options.within,
        "noise": options.noise,
        "scores": found,
        "summary": {arm: summary(found[arm], usual, options.within) for arm, (_, usual) in arms.items()},
        "provenance": {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python", *sys.argv]),
            "code": code_version(),
            "machine": describe_machine(),
            "torch": torch.__version__,
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the command line asks for; the exit code is 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shown = "(default %(default)s)"
    parser.add_argument("--checkpoint", type=Path, help="of a model of frames")
    parser.add_argument("--dataset", type=Path, help="recording for the calibration")
    parser.add_argument("--env", default=ENVIRONMENT, help=f"with pictures {shown}")
    parser.add_argument("--episodes", type=int, default=100, help=f"pairs {shown}")
    parser.add_argument("--steps", type=int, default=80, help=f"control steps of each {shown}")
    parser.add_argument("--move-cm", type=float, nargs="+", default=[2.0, 5.0, 10.0], help=f"distances {shown}")
    parser.add_argument("--within", type=int, default=1, help=f"frames in which a move is to be seen {shown}")
    parser.add_argument("--noise", type=float, default=0.1, help=f"on the expert's actions {shown}")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/surprise"), help=f"folder {shown}")
    parser.add_argument("--report", action="store_true", help="print the table of what is done, run nothing")
    options = parser.parse_args(arguments)
    path = options.out / "surprise.json"
    torch.set_num_threads(1)
    try:
        if not options.report:
            write_json(path, measure(options))
        text = report(read_json(path)) if path.is_file() else "Nothing is done yet."
        if path.is_file():
            write_text(options.out / "report.md", text + "\n")
    except ScdRobotError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
