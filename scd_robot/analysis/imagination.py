"""Recorded episodes imagined on from some control step: what a model of frames says would be seen, beside what was.

Shapes: N episodes, Tc control steps that the model sees, Tf frames that it imagines, H W C picture.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.analysis.frame_metrics import FrameErrors, curve, frame_errors
from scd_robot.analysis.frame_networks import FEWEST_CLIPS, FEWEST_FRAMES, ClipFeatures, Lpips, frechet_distance
from scd_robot.analysis.frame_sheet import write_sheet, write_side_by_side
from scd_robot.config import to_json
from scd_robot.datasets import PRESENT, EpisodeDataset
from scd_robot.errors import ConfigError, ShapeError, UnknownNameError
from scd_robot.nn import room_for
from scd_robot.output import write_json
from scd_robot.policies import Imagination
from scd_robot.usable import as_bytes

__all__ = [
    "Imagined",
    "check_gaps",
    "check_recording",
    "describe",
    "format_errors",
    "imagine_episodes",
    "write_imagined",
]

Frames = NDArray[np.uint8]

_MOST_COLUMNS = 10  # of the sheet
_MOST_ON_SHEET = 4


@dataclass(frozen=True, eq=False)
class Imagined:
    """What `imagine_episodes` found.

    Attributes:
        recorded: (N, Tf, H, W, C) uint8, as the model sees pictures.
        imagined: (N, Tf, H, W, C) uint8.
        last_context: (N, H, W, C) uint8, the last frame that the model saw.
        episodes: their numbers.
        context: Tc.
        errors: of the imagined frames, and of the last one repeated.
        learned: "lpips" and "fvd" of both where weights were given, as plain JSON types (docs/analysis.md).
    """

    recorded: Frames
    imagined: Frames
    last_context: Frames
    episodes: list[int]
    context: int
    errors: FrameErrors
    learned: dict[str, Any] = field(default_factory=dict)


def imagine_episodes(
    imagination: Imagination,
    data: EpisodeDataset,
    episodes: Sequence[int],
    context: int,
    length: int | None = None,
    *,
    lpips_weights: str | Path | None = None,
    fvd_weights: str | Path | None = None,
) -> Imagined:
    """Lets a model see the beginning of each episode, and imagine what follows its executed actions.

    Args:
        imagination: the model.
        data: recorded episodes, as recorded.
        episodes: N numbers.
        context: Tc, control steps that it sees from the episode's first on, at least one.
        length: Tf, frames that it imagines; None = up to the end of the shortest of the episodes.
        lpips_weights: file of AlexNet's or VGG-16's weights, to tell LPIPS; None = it is not told.
        fvd_weights: file of I3D's weights, to tell FVD; None = it is not told.

    Raises:
        ConfigError: no such episode, one that is too short, or one without some of the pictures; too few episodes or
            frames for FVD; no room for them.
        ShapeError, UnknownNameError: the recording is not one for this model, see `check_recording`; its pictures are
            too small for LPIPS.
        CheckpointError: no such weights, or they are of another network.
    """
    check_recording(imagination, data)
    length = _length(data, episodes, context, length)
    if fvd_weights is not None:
        _check_clips(episodes, length)
    lpips = None if lpips_weights is None else Lpips(lpips_weights, imagination.device)
    features = None if fvd_weights is None else ClipFeatures(fvd_weights, imagination.device)
    if lpips is not None:
        lpips.check_size(imagination.pictures_shape)
    seen, pictures, actions = _read(imagination, data, episodes, context, length)
    imagined = imagination.imagine(seen, actions, list(episodes))
    recorded, last = pictures[:, context:], pictures[:, context - 1]
    errors = frame_errors(recorded, imagined, last, episodes=np.asarray(episodes))
    learned = _learned(recorded, imagined, last, np.asarray(episodes), lpips, features)
    return Imagined(recorded, imagined, last, list(episodes), context, errors, learned)


def check_recording(imagination: Imagination, data: EpisodeDataset) -> None:
    """Refuses recordings that are not like those the model was trained on.

    Raises:
        UnknownNameError: there is no such camera; the message has those there are.
        ShapeError: its pictures have another size, number of channels or type; or actions another width or rate.
    """
    trained, recording, key = imagination.transforms.recorded, data.spec, imagination.source
    cameras = {k: spec for k, spec in recording.observation.items() if len(spec.shape) == 3}
    if key not in cameras:
        raise UnknownNameError("camera (the model was trained on it, the recording has others)", key, cameras)
    expected, found = trained.observation[key], cameras[key]
    if found.dtype != expected.dtype:
        raise ShapeError(
            f"pictures {key!r} must be {expected.dtype} of 0 to 255, the recording has {found.dtype}"
            f"{as_bytes(np.asarray(data.arrays[key][0]), 'record')}"
        )
    if found.shape != expected.shape:
        raise ShapeError(
            f"pictures {key!r} must be {expected.shape} as in training, the recording has {found.shape}"
            + _shape_hint(found.shape, expected.shape)
        )
    if recording.action_dim != trained.action_dim:
        raise ShapeError(
            f"actions must be of width {trained.action_dim} as in training, the recording's are {recording.action_dim}"
        )
    if not math.isclose(recording.control_dt, trained.control_dt, rel_tol=1e-3):
        raise ShapeError(
            f"a control step must be of {trained.control_dt:g} s as in training, the recording's are of "
            f"{recording.control_dt:g} s; take recordings of this rate, or say it with --control-dt where the file "
            "does not tell"
        )


def check_gaps(data: EpisodeDataset, camera: str, episode: int, steps: int) -> None:
    """Raises ConfigError where a picture is marked as absent (`present.KEY`) in the first control steps of an episode.

    What lies in its place, such as the picture before it, would be read as seen, and be judged by.
    """
    if PRESENT + camera not in data.arrays:
        return
    start = data.rows(episode).start
    absent = np.flatnonzero(np.asarray(data.arrays[PRESENT + camera][start : start + steps]) == 0)
    if len(absent):
        raise ConfigError(
            f"episode {episode} has no picture {camera!r} in {len(absent)} of {steps} control steps, first in step "
            f"{absent[0]} ({PRESENT}{camera} is 0 there), and frames need one in each: choose other episodes or fewer "
            "control steps, or record at the camera's rate"
        )


def describe(found: Imagined, imagination: Imagination) -> dict[str, Any]:
    """How frames were imagined and how far off they are, as plain JSON types; see `FrameErrors.to_json`."""
    how = to_json(imagination.config)
    return {
        "episode_numbers": found.episodes,
        "context": found.context,
        "settings": {name: how[name] for name in ("sampler", "guidance_scale", "seed")},
        **found.errors.to_json(),
        **found.learned,
    }


def write_imagined(found: Imagined, out: Path, fps: float, document: dict[str, Any]) -> None:
    """Writes out/frames.json, and of the first episodes out/frames.png and out/frames.mp4.

    Args:
        found: of `imagine_episodes`.
        out: folder, made where missing.
        fps: of the video [1/s].
        document: `describe`, and what else is to stand in the JSON.
    """
    shown = slice(0, _MOST_ON_SHEET)
    pair, last = (found.recorded[shown], found.imagined[shown]), found.last_context[shown]
    every = -(-found.recorded.shape[1] // _MOST_COLUMNS)
    write_sheet(out / "frames.png", *pair, every, last_context=last)
    write_side_by_side(out / "frames.mp4", *pair, fps)
    write_json(out / "frames.json", document)


def format_errors(document: dict[str, Any]) -> str:
    """A table for people: PSNR against the number of frames ahead."""
    ahead = [2**i for i in range(document["frames"].bit_length()) if 2**i < document["frames"]]
    lines = ["PSNR [dB]      on moving pixels              on all pixels"]
    lines += ["frames ahead   imagined   repeated       imagined   repeated"]
    for number in [*ahead, document["frames"]]:
        curves = [document[name][who] for name in ("psnr_moving", "psnr") for who in ("imagined", "copied")]
        values = [curve["mean"][number - 1] for curve in curves]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"{number:12}   {cells[0]:>8}   {cells[1]:>8}       {cells[2]:>8}   {cells[3]:>8}")
    for name in ("lpips", "fvd"):
        if name in document:
            told = document[name]
            numbers = [np.mean(told[who]["mean"] if name == "lpips" else told[who]) for who in ("imagined", "copied")]
            of = f"{told['network']}, mean" if name == "lpips" else f"{told['clips']} clips"
            lines.append(f"{name.upper()} ({of}): {numbers[0]:.4g} imagined, {numbers[1]:.4g} repeated; less is better")
    return "\n".join(lines)


def _read(
    imagination: Imagination, data: EpisodeDataset, episodes: Sequence[int], context: int, length: int
) -> tuple[Frames, Frames, NDArray[np.float32]]:
    """Of each episode the frames of the context as recorded, all of them as the model sees them, and executed actions.

    Recorded frames, which may be much larger, are read one episode after the other.
    """
    executed, steps = np.asarray(data.executed()), context + length
    for episode in episodes:
        check_gaps(data, imagination.source, episode, steps)
    array = data.arrays[imagination.source]
    bytes_each = array.nbytes // len(array)
    told = (
        f"for recorded frames = ({len(episodes)} episodes x {context} control steps of context + {steps} of one "
        f"episode) x {bytes_each} bytes; take fewer episodes, or a smaller context or length"
    )
    seen, pictures, actions = [], [], []
    with room_for((len(episodes) * context + steps) * bytes_each, None, told):
        for episode in episodes:
            start = data.rows(episode).start
            frames = np.asarray(array[start : start + steps])
            seen.append(frames[:context].copy())
            pictures.append(imagination.pictures(frames[None])[0])
            actions.append(executed[start : start + steps - 1])
        return np.stack(seen), np.stack(pictures), np.stack(actions)


def _check_clips(episodes: Sequence[int], length: int) -> None:
    if len(set(episodes)) < FEWEST_CLIPS:
        raise ConfigError(
            f"FVD compares distributions of clips: choose at least {FEWEST_CLIPS} episodes, better hundreds, "
            f"got {len(set(episodes))}"
        )
    if length < FEWEST_FRAMES:
        raise ConfigError(f"FVD needs clips of at least {FEWEST_FRAMES} frames: make length as much, got {length}")


def _learned(
    recorded: Frames,
    imagined: Frames,
    last: Frames,
    episodes: NDArray[np.int64],
    lpips: Lpips | None,
    features: ClipFeatures | None,
) -> dict[str, Any]:
    """What networks of others say of imagined frames, and of the last one repeated."""
    found: dict[str, Any] = {}
    copied = np.broadcast_to(last[:, None], recorded.shape)
    if lpips is not None:
        own, floor = lpips.distances(recorded, (imagined, copied))
        curves = {"imagined": own, "copied": floor, "better_by": floor - own}
        found["lpips"] = {"network": lpips.network, **{name: curve(x, episodes) for name, x in curves.items()}}
    if features is not None:
        real, own, floor = (features.of(clips) for clips in (recorded, imagined, copied))
        found["fvd"] = {
            "clips": len(real),
            "imagined": frechet_distance(real, own),
            "copied": frechet_distance(real, floor),
        }
    return found


def _length(data: EpisodeDataset, episodes: Sequence[int], context: int, length: int | None) -> int:
    """Frames to imagine; raises ConfigError where an episode is not there, or too short."""
    if not len(episodes):
        raise ConfigError("no episode is chosen: name at least one")
    for episode in episodes:
        if not 0 <= episode < data.num_episodes:
            raise ConfigError(f"there is no episode {episode}: the recording has {data.num_episodes}, from 0 on")
    steps, which = min((int(data.episode_lengths[episode]), episode) for episode in episodes)
    if not 1 <= context < steps:
        raise ConfigError(
            f"context must be 1 to {steps - 1}, since episode {which} has {steps} control steps and one at least is to "
            f"be imagined; got {context}"
        )
    if length is not None and not 1 <= length <= steps - context:
        raise ConfigError(
            f"length must be 1 to {steps - context}, since episode {which} has {steps} control steps, {context} of "
            f"them context, and after them there are neither actions nor pictures to compare with; got {length}"
        )
    return steps - context if length is None else length


def _shape_hint(found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """What to do about pictures of another shape."""
    if found[2:] == expected[2:]:
        return ": they have another size; resize the recording, or use the camera's settings of the training"
    if (found[2], expected[2]) == (4, 3):
        return ": the fourth channel (alpha) is not known to the model; record picture[..., :3]"
    if found[2] == 1:
        return f": they are grey, the model was trained with {expected[2]} channels"
    return f": the model was trained with {expected[2]} channels"
