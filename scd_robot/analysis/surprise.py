"""Surprise over recorded episodes (`scd_robot.policies.surprise` says what it is): calibration, scores and a plot.

Shapes: T control steps, h w patches, H W C picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from scd_robot.analysis.imagination import check_gaps, check_recording
from scd_robot.datasets import EpisodeDataset
from scd_robot.datasets.plots import new_figure, png, require_matplotlib, show_frame, style
from scd_robot.errors import ConfigError
from scd_robot.output import write_bytes, write_json
from scd_robot.policies import Imagination
from scd_robot.policies.surprise import KINDS, Surprise, SurpriseCalibration, calibrate, scores_of

__all__ = [
    "EpisodeSurprise",
    "calibrate_surprise",
    "describe_surprise",
    "episode_surprise",
    "watch_frames",
    "write_surprise",
]

Numbers = NDArray[np.float64]

_WIDTH_IN, _ROW_IN = 9.0, 2.6
_LINES: dict[str, Any] = {
    "everywhere": {"color": "#3b6fb6", "linewidth": 2.4},
    "moving": {"color": "#d1603d", "linewidth": 1.0},
}


@dataclass(frozen=True, eq=False)
class EpisodeSurprise:
    """Of one episode.

    Attributes:
        episode: its number.
        scores: by kind (T,), NaN in control step 0, where nothing was predicted.
        frames: (2, H, W, C) uint8 of the control step with the largest score everywhere: real and predicted.
        largest: that control step.
    """

    episode: int
    scores: dict[str, Numbers]
    frames: NDArray[np.uint8]
    largest: int


def watch_frames(
    imagination: Imagination, frames: NDArray[Any], actions: NDArray[Any], episode: int = 0
) -> tuple[dict[str, Numbers], NDArray[np.uint8]]:
    """What a robot that sees and does this would have been told.

    Args:
        imagination: the model.
        frames: (T, H, W, C) as recorded, at least 2.
        actions: (T - 1 or more, Da), action t executed after frame t.
        episode: its number, which keys the noise.

    Returns:
        Errors of patches by kind (T - 1, h, w) [grey levels²], and predicted frames (T - 1, H, W, C) uint8, of all
        frames but the first.
    """
    watch = Surprise(imagination)
    watch.reset(episodes=[episode])
    errors: list[dict[str, Numbers]] = []
    predicted = []
    for step, frame in enumerate(frames):
        watch.observe(frame[None], actions[step - 1][None] if step else None)
        if step:
            assert watch.predicted is not None
            errors.append(watch.errors)
            predicted.append(watch.predicted[0])
    return {kind: np.concatenate([e[kind] for e in errors]) for kind in KINDS}, np.stack(predicted)


def calibrate_surprise(
    imagination: Imagination,
    data: EpisodeDataset,
    episodes: Sequence[int],
    quantile: float = 0.99,
    progress: bool = False,
) -> SurpriseCalibration:
    """What is usual in recorded episodes, which should be none that the model was trained on.

    Args:
        imagination: the model.
        data: recorded.
        episodes: their numbers, at least two.
        quantile: see `calibrate`.
        progress: show a bar.

    Raises:
        ConfigError: too few, no such episode, one of a single control step, or without some of the pictures.
        ShapeError, UnknownNameError: see `check_recording`.
    """
    check_recording(imagination, data)
    shown = tqdm(episodes, desc="calibrating", unit="episode", disable=not progress)
    errors = [watch_frames(imagination, *_recorded(imagination, data, episode), episode)[0] for episode in shown]
    return calibrate(imagination, errors, quantile)


def episode_surprise(
    imagination: Imagination, calibration: SurpriseCalibration, data: EpisodeDataset, episode: int
) -> EpisodeSurprise:
    """Scores of a recorded episode; errors as of `calibrate_surprise`."""
    check_recording(imagination, data)
    Surprise(imagination, calibration)  # refuses one of another model
    frames, actions = _recorded(imagination, data, episode)
    errors, predicted = watch_frames(imagination, frames, actions, episode)
    scores = {kind: np.r_[np.nan, values] for kind, values in scores_of(errors, calibration.usual).items()}
    largest = int(np.nanargmax(scores["everywhere"]))
    real = imagination.pictures(frames[None, largest : largest + 1])[0, 0]
    return EpisodeSurprise(episode, scores, np.stack([real, predicted[largest - 1]]), largest)


def describe_surprise(found: Sequence[EpisodeSurprise], calibration: SurpriseCalibration) -> dict[str, Any]:
    """As plain JSON types, described in `docs/frames.md`."""
    return {
        "calibration": calibration.to_json(),
        "episodes": [
            {
                "episode": one.episode,
                "scores": {kind: one.scores[kind].tolist() for kind in KINDS},
                "alarms": {
                    kind: np.flatnonzero(one.scores[kind] > calibration.thresholds[kind]).tolist() for kind in KINDS
                },
            }
            for one in found
        ],
    }


def write_surprise(
    found: Sequence[EpisodeSurprise], calibration: SurpriseCalibration, out: Path, document: dict[str, Any]
) -> None:
    """Writes out/surprise.json, and out/surprise.png: scores over each episode, and its most surprising frame.

    Raises:
        OutputError: a file cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    with style():
        figure, axes = new_figure(len(found), 3, _WIDTH_IN, _ROW_IN * len(found), width_ratios=(4, 1, 1))
        for row, one in zip(axes, found, strict=True):
            for kind in KINDS:
                row[0].plot(one.scores[kind], label=kind, **_LINES[kind])
                row[0].axhline(calibration.thresholds[kind], **_LINES[kind], linestyle=":")
            row[0].set(title=f"episode {one.episode}; dotted: thresholds", xlabel="control step", ylabel="surprise")
            row[0].legend(loc="upper left")
            for axis, frame, name in zip(row[1:], one.frames, ("real", "predicted"), strict=True):
                show_frame(axis, frame, f"{name}, step {one.largest}")
        picture = png(figure)
    write_bytes(out / "surprise.png", picture)
    write_json(out / "surprise.json", document)


def _recorded(imagination: Imagination, data: EpisodeDataset, episode: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Frames (T, H, W, C) and executed actions (T, Da) of an episode, T at least 2."""
    if not 0 <= episode < data.num_episodes:
        raise ConfigError(f"there is no episode {episode}: the recording has {data.num_episodes}, from 0 on")
    rows = data.rows(episode)
    check_gaps(data, imagination.source, episode, rows.stop - rows.start)
    frames = np.asarray(data.arrays[imagination.source][rows.start : rows.stop])
    if len(frames) < 2:
        raise ConfigError(f"episode {episode} has 1 control step; a frame is predicted from those before it")
    return frames, np.asarray(data.executed()[rows.start : rows.stop])
