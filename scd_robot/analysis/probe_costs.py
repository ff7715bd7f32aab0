"""What an entangled model loses, and how much time it saves, where layers are not computed at every denoising step.

Of a policy: success in closed loop, from the same start states. Of a model of frames: PSNR and SSIM of what it imagines
of the same episodes from the same noise.

Shapes: N episodes, Tc control steps that the model sees, Tf frames that it imagines, H W C picture.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from scd_robot.analysis.frame_metrics import FrameQuality, curve
from scd_robot.analysis.imagination import imagine_episodes
from scd_robot.analysis.latency import timed
from scd_robot.analysis.probes import Shortcut, middle_layers, shortened
from scd_robot.config import to_json
from scd_robot.datasets import EpisodeDataset
from scd_robot.errors import ConfigError
from scd_robot.policies import CausalDitPolicy, Imagination
from scd_robot.policies.frame_stream import FrameStream
from scd_robot.sim_eval import evaluate
from scd_robot.sim_eval.comparison import NON_INFERIORITY_MARGIN, compare

__all__ = ["cost_in_closed_loop", "cost_in_frames", "shortcuts_of"]

_ROUNDS = 20  # in which the time of a frame is taken

Numbers = NDArray[np.float64]


def shortcuts_of(depth: int, full_steps: Sequence[int], num_denoising_steps: int) -> list[Shortcut]:
    """The middle layers in so many denoising steps only, reused later and left out; none without middle layers.

    Raises:
        ConfigError: a number of steps is out of range: with all denoising steps nothing is left out.
    """
    beyond = [steps for steps in full_steps if steps >= num_denoising_steps]
    if beyond:
        raise ConfigError(
            f"after {beyond[0]} of {num_denoising_steps} denoising steps none is left to leave layers out in; give "
            "--full-steps fewer"
        )
    layers = middle_layers(depth)
    if not layers:
        return []
    return [Shortcut(layers.start, layers.stop, steps, reuse) for reuse in (True, False) for steps in full_steps]


def cost_in_closed_loop(
    policy: CausalDitPolicy,
    environment: str,
    episodes: int,
    shortcuts: Sequence[Shortcut],
    *,
    python: str | None = None,
    progress: bool = True,
) -> Iterator[dict[str, Any]]:
    """Success in closed loop with each shortcut, from the same start states as without: a row as soon as it is known.

    Args:
        policy: entangled.
        environment: name.
        episodes: of each run.
        shortcuts: to try.
        python: see `evaluate`.
        progress: show bars.

    Yields:
        For all layers (`shortcut` None) and each shortcut: `shortcut`, `successes`, `episodes` (valid ones), `rate`,
        `interval` (Wilson 95 %), `plan_ms` (p50), and against all layers `difference`, `difference_interval` (paired
        Newcombe 95 %) and `non_inferior`.
    """

    def run() -> dict[str, Any]:
        return evaluate(policy, environment, episodes, num_videos=0, progress=progress, python=python).to_json()

    whole = run()
    yield _loop_row(whole, None, whole)
    for shortcut in shortcuts:
        with shortened(policy, shortcut):
            result = run()
        yield _loop_row(result, shortcut, whole)


def cost_in_frames(
    imagination: Imagination,
    data: EpisodeDataset,
    episodes: Sequence[int],
    shortcuts: Sequence[Shortcut],
    *,
    context: int,
    length: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """How good frames are that are imagined with each shortcut, of the same episodes and noise as without.

    Args:
        imagination: entangled.
        data: as recorded.
        episodes: N numbers.
        shortcuts: to try.
        context: Tc.
        length: Tf; None = up to the end of the shortest of the episodes.
        progress: show a bar.

    Returns:
        Plain JSON types, described in `docs/analysis.md`.

    Raises:
        ConfigError, ShapeError, UnknownNameError: see `imagine_episodes`.
    """
    numbers = np.asarray(episodes)
    whole = imagine_episodes(imagination, data, episodes, context, length).errors
    found: list[tuple[Shortcut | None, FrameQuality]] = [(None, whole.imagined)]
    for shortcut in tqdm(shortcuts, desc="imagining with shortcuts", disable=not progress):
        with shortened(imagination, shortcut):
            found.append((shortcut, imagine_episodes(imagination, data, episodes, context, length).errors.imagined))
    times = _frame_ms(imagination, data, episodes[0], context, shortcuts)
    names = [field.name for field in fields(FrameQuality)]
    settings = to_json(imagination.config)
    return {
        "context": context,
        "frames": whole.moving_share.shape[1],
        "settings": {name: settings[name] for name in ("sampler", "seed")},
        "repeated": {name: _over_frames(getattr(whole.copied, name), numbers) for name in names},
        "shortcuts": [
            {
                "shortcut": None if shortcut is None else asdict(shortcut),
                "frame_ms": ms,
                **{
                    name: _frames_row(getattr(quality, name), getattr(whole.imagined, name), numbers, shortcut is None)
                    for name in names
                },
            }
            for (shortcut, quality), ms in zip(found, times, strict=True)
        ],
    }


def _loop_row(result: dict[str, Any], shortcut: Shortcut | None, whole: dict[str, Any]) -> dict[str, Any]:
    against = None if shortcut is None else compare([result], [whole], "shortcut", "all layers")
    return {
        "shortcut": None if shortcut is None else asdict(shortcut),
        "successes": result["successes"],
        "episodes": result["episodes"] - result["invalid"],
        "rate": result["success_rate"],
        "interval": result["interval"],
        "plan_ms": result["plan_ms"] and result["plan_ms"]["p50"],
        "difference": against and against.difference,
        "difference_interval": against and list(against.interval),
        "non_inferior": against and against.interval[0] > -NON_INFERIORITY_MARGIN,
    }


def _frames_row(values: Numbers, whole: Numbers, episodes: NDArray[Any], is_whole: bool) -> dict[str, Any]:
    """Of one measure (N, Tf), with a shortcut and without."""
    against = _over_frames(values - whole, episodes)
    return {
        **_over_frames(values, episodes),
        "difference": None if is_whole else against["mean"],
        "difference_interval": None if is_whole else against["interval"],
    }


def _over_frames(values: Numbers, episodes: NDArray[Any]) -> dict[str, Any]:
    """Mean over the frames of each piece (N, Tf), then over episodes, with its interval; by frame. None = not known."""
    known = np.isfinite(values)
    total, count = np.where(known, values, 0.0).sum(axis=1), known.sum(axis=1)
    mean = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    found = curve(mean[:, None], episodes)
    return {
        "mean": found["mean"][0],
        "interval": found["interval"][0],
        "by_frame": curve(values, episodes)["mean"],
    }


def _frame_ms(
    imagination: Imagination, data: EpisodeDataset, episode: int, context: int, shortcuts: Sequence[Shortcut]
) -> list[float]:
    """Median time [ms] to denoise the frame after the context of one episode: all layers, then each shortcut.

    They take turns, so that other load on the machine meets all alike; the first round warms up.
    """
    rows, executed = data.rows(episode), np.asarray(data.executed())
    stream = FrameStream(imagination)
    for step in range(rows.start, rows.start + context):
        frame = np.asarray(data.arrays[imagination.source][step])
        stream.observe(frame[None], executed[step - 1][None] if step > rows.start else None)
    action = executed[rows.start + context - 1][None, None, None]

    def next_frame() -> None:
        stream.imagine(action)

    def with_shortcut(shortcut: Shortcut) -> Callable[[], None]:
        def call() -> None:
            with shortened(imagination, shortcut):
                next_frame()

        return call

    ways = [next_frame, *map(with_shortcut, shortcuts)]
    times = [[timed(way) for way in ways] for _ in range(_ROUNDS + 1)]
    return [float(median) for median in np.median(times[1:], axis=0)]
