"""Videos of an evaluation, replayed after it: rendering never slows a roll-out down or changes it.

Shapes: H height, W width in pixels.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import OutputError, ScdRobotError, SimulatorError
from scd_robot.output import beside
from scd_robot.sim_eval.rendering import check_frame
from scd_robot.sim_eval.result import EpisodeRecord, EvaluationResult, VideoRecord
from scd_robot.sim_eval.workers import EnvironmentWorker
from scd_robot.types import ActionArray, StepResult

__all__ = ["ReplayError", "film", "frame_stride", "record_videos", "write_video"]

logger = logging.getLogger(__name__)

_MAX_FPS = 30.0
_HOLD_S = 0.7  # the end stays in view, as players loop


class ReplayError(SimulatorError):
    """A replay went another way than the episode: the simulator is not deterministic."""


def record_videos(
    worker: EnvironmentWorker,
    result: EvaluationResult,
    out: Path,
    num_videos: int,
    size: tuple[int, int] = (256, 256),
) -> tuple[list[VideoRecord], str | None]:
    """Replays the first failures and the first successes with their executed actions, and films them in real time.

    Args:
        worker: an environment like those of the evaluation.
        result: whose episodes are replayed.
        out: the videos go into its folder `videos`.
        num_videos: of failures, and as many of successes.
        size: height and width.

    Returns:
        The videos that were written, failures first, and why others are missing (None if none are).
    """
    failures = [e for e in result.valid if not e.success][:num_videos]
    successes = [e for e in result.valid if e.success][:num_videos]
    videos: list[VideoRecord] = []
    problems: list[str] = []
    for episode in failures + successes:
        file = f"videos/episode_{episode.index:05d}_{'success' if episode.success else 'failure'}.mp4"
        try:
            film(worker, episode, result.actions[episode.index], out / file, size)
        except ReplayError as error:
            problems.append(f"episode {episode.index} has no video: {error}")
        except ScdRobotError as error:  # will not be better for the next episode
            problems.append(f"rendering episode {episode.index} failed: {error}")
            break
        else:
            videos.append(VideoRecord(episode.index, episode.success, file))
    for problem in problems:
        logger.warning(problem)
    return videos, "; ".join(problems) or None


def film(
    worker: EnvironmentWorker, episode: EpisodeRecord, actions: ActionArray, path: Path, size: tuple[int, int]
) -> None:
    """Replays an episode into a video in real time.

    Args:
        worker: an environment like the episode's.
        episode: which.
        actions: (steps, Da) that were executed.
        path: of the MP4.
        size: height and width of the frames.

    Raises:
        ReplayError: it went another way this time.
        RenderError: a frame is blank, or rendering does not work.
        OutputError: the file cannot be written.
    """
    control_dt = worker.spec.control_dt
    stride = frame_stride(control_dt)
    fps = Fraction(1 / (control_dt * stride)).limit_denominator(1000)
    frames = _replay(worker, episode, actions, stride, size)
    write_video(path, _hold_last(frames, round(_HOLD_S * fps)), fps)


def frame_stride(control_dt: float) -> int:
    """Control steps per frame that keep a real-time video at or under 30 frames a second.

    Args:
        control_dt: seconds per control step.
    """
    return max(1, math.ceil(1 / (control_dt * _MAX_FPS) - 1e-9))


def write_video(path: Path, frames: Iterable[NDArray[np.uint8]], fps: Fraction) -> None:
    """Writes an H.264 MP4 that browsers play while it loads.

    Args:
        path: of the file; it appears only when it is complete.
        frames: RGB frames (H, W, 3) of one size; an odd last row or column is cut off, as the format wants it even.
        fps: frames per second.

    Raises:
        OutputError: no permission, the disk is full, or this build of FFmpeg has no H.264 encoder.
    """
    import av
    from av.codec.codec import UnknownCodecError

    part = beside(path)
    try:
        try:
            with av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as container:
                stream = container.add_stream("libx264", rate=fps, options={"crf": "20", "preset": "veryfast"})
                stream.pix_fmt = "yuv420p"
                stream.height = stream.width = 0
                for pixels in frames:
                    height, width = (n - n % 2 for n in pixels.shape[:2])
                    if not stream.width:
                        stream.height, stream.width = height, width
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, av.FFmpegError, UnknownCodecError) as error:
        raise OutputError(f"cannot write the video {path}: {error}") from error


def _replay(
    worker: EnvironmentWorker,
    episode: EpisodeRecord,
    actions: ActionArray,
    stride: int,
    size: tuple[int, int],
) -> Iterator[NDArray[np.uint8]]:
    """Frames (H, W, 3) of an episode: its start, every `stride`-th step, and its end.

    Raises:
        ReplayError: start state or outcome differ from the episode's.
        RenderError: a frame is blank, or rendering does not work.
    """
    worker.call("reset", episode.seed)
    if worker.call("state_hash") != episode.initial_state_hash:
        raise ReplayError(
            f"its replay began in another state: reset({episode.seed}) of this environment does not follow from its "
            "seed alone, so that no episode can be repeated, and arms of a comparison differ by their start states"
        )
    yield _render(worker, size)
    for step, action in enumerate(actions, 1):
        result: StepResult = worker.call("step", action)
        if result.success != (episode.success and step == len(actions)):
            raise ReplayError(f"its replay had another outcome, at control step {step}")
        if step % stride == 0 or step == len(actions):
            yield _render(worker, size)


def _hold_last(frames: Iterable[NDArray[np.uint8]], count: int) -> Iterator[NDArray[np.uint8]]:
    """The frames (H, W, 3), with the last one `count` times more."""
    for frame in frames:
        yield frame
    yield from [frame] * count


def _render(worker: EnvironmentWorker, size: tuple[int, int]) -> NDArray[np.uint8]:
    frame: NDArray[np.uint8] = worker.call("render", *size)
    check_frame(frame)
    return frame
