"""Imagined frames beside recorded ones, for the eye: a contact sheet, and a video.

Shapes: N pieces of recordings, Tf frames, H W C picture, C 1 or 3.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scd_robot.analysis.frame_metrics import check_frames
from scd_robot.datasets.plots import require_matplotlib
from scd_robot.datasets.video import encode_png
from scd_robot.errors import ConfigError
from scd_robot.output import check_target, write_bytes
from scd_robot.resizing import resize
from scd_robot.sim_eval.video import write_video

__all__ = ["write_sheet", "write_side_by_side"]

Pixels = NDArray[np.uint8]

_FULL_DIFFERENCE = 128  # grey levels that are shown brightest
_TILE, _VIDEO_TILE = 112, 240  # pixels that a frame's longer side has at least; at most it has twice as many
_GAP, _PIECE_GAP = 4, 18
_HEADER, _MARGIN = 26, 104  # pixels above and left of the frames, for labels
_DPI = 100
_DIFFERENCE = f"difference\n(yellow: {_FULL_DIFFERENCE}\nlevels or more)"
_PAPER = 225  # grey, as skies are white


def write_sheet(
    path: Path,
    recorded: Pixels,
    imagined: Pixels,
    every: int = 1,
    *,
    last_context: Pixels | None = None,
    name: str = "imagined",
) -> None:
    """Writes a PNG with three rows for each piece: recorded, imagined, difference.

    A difference is the largest of a pixel's channels: black = none, yellow = 128 grey levels or more. Columns are
    labelled with how many frames after the last seen one they are; the last frame is always among them.

    Args:
        path: of the file.
        recorded: (N, Tf, H, W, C) uint8.
        imagined: (N, Tf, H, W, C) uint8.
        every: shows the first frame and every so manyth from there on.
        last_context: (N, H, W, C) uint8, the last seen frames; shown in a column of their own.
        name: of the second row.

    Raises:
        ConfigError: `every` is below 1.
        ShapeError: the arrays do not belong together, or are not pictures of bytes.
        OutputError: the file cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    check_frames(recorded, imagined, recorded[:, 0] if last_context is None else last_context)
    if every < 1:
        raise ConfigError(f"every must be at least 1, got {every}")
    shown = np.unique([*range(0, recorded.shape[1], every), recorded.shape[1] - 1])
    labels = [f"+{frame + 1}" for frame in shown]
    blocks = []
    for piece in range(len(recorded)):
        rows = [recorded[piece, shown], imagined[piece, shown]]
        rows = [_coloured(row) for row in rows] + [_difference(*rows)]
        if last_context is not None:
            seen = _coloured(last_context[piece])
            beside = [seen, seen, np.full_like(seen, _PAPER)]
            rows = [np.concatenate([tile[None], row]) for tile, row in zip(beside, rows, strict=True)]
        blocks.append(_grid(rows, _TILE))
    if last_context is not None:
        labels = ["last seen", *labels]
    body = _stack(blocks, _PIECE_GAP)
    height, pitch = blocks[0].shape[0], (body.shape[1] + _GAP) / len(labels)
    header = _text(
        _HEADER, body.shape[1], [((i + 0.5) * pitch - _GAP / 2, _HEADER / 2, t) for i, t in enumerate(labels)]
    )
    names = [
        (_MARGIN - 10, piece * (height + _PIECE_GAP) + (row + 0.5) * height / 3, words)
        for piece in range(len(blocks))
        for row, words in enumerate(("recorded", name, _DIFFERENCE))
    ]
    margin = _text(body.shape[0], _MARGIN, names, align="right")
    corner = np.full((_HEADER, _MARGIN, 3), _PAPER, np.uint8)
    page = np.concatenate([np.concatenate(line, axis=1) for line in ((corner, header), (margin, body))])
    write_bytes(path, encode_png(np.pad(page, ((0, _GAP), (0, _GAP), (0, 0)), constant_values=_PAPER)))


def write_side_by_side(path: Path, recorded: Pixels, imagined: Pixels, fps: float) -> None:
    """Writes an MP4 with the recorded frames on the left and the imagined ones on the right, pieces below one another.

    Args:
        path: of the file; its folder is made where missing.
        recorded: (N, Tf, H, W, C) uint8.
        imagined: (N, Tf, H, W, C) uint8.
        fps: frames per second; 1 / `control_dt` is real time.

    Raises:
        ConfigError: `fps` is not above 0.
        ShapeError: the arrays do not belong together, or are not pictures of bytes.
        OutputError: the file cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    check_frames(recorded, imagined, recorded[:, 0])
    if not 0 < fps < np.inf:
        raise ConfigError(f"fps must be a number above 0, got {fps}")
    width = _grid([np.zeros((2, *recorded.shape[2:4], 3), np.uint8)], _VIDEO_TILE).shape[1]
    centres = (width / 4, 3 * width / 4)
    header = _text(
        _HEADER, width, [(x, _HEADER / 2, t) for x, t in zip(centres, ("recorded", "imagined"), strict=True)]
    )

    def frames() -> Iterator[Pixels]:
        for time in range(recorded.shape[1]):
            rows = [_coloured(np.stack(pair)) for pair in zip(recorded[:, time], imagined[:, time], strict=True)]
            yield _stack([header, _grid(rows, _VIDEO_TILE)], 0)

    check_target(path)
    write_video(path, frames(), Fraction(fps).limit_denominator(1000))


def _coloured(frames: Pixels) -> Pixels:
    """(..., H, W, 3)."""
    return np.broadcast_to(frames, (*frames.shape[:-1], 3))


def _difference(recorded: Pixels, imagined: Pixels) -> Pixels:
    """(n, H, W, 3) in colours."""
    import matplotlib

    difference = np.abs(recorded.astype(np.int16) - imagined).max(axis=-1)
    colours = matplotlib.colormaps["inferno"](np.minimum(difference / _FULL_DIFFERENCE, 1.0), bytes=True)
    return np.asarray(colours[..., :3], np.uint8)


def _grid(rows: Sequence[Pixels], tile: int) -> Pixels:
    """Frames (n, H, W, 3) of each row side by side, their longer side `tile` pixels to twice that.

    Small ones are enlarged by a whole number, so that their pixels can be seen.
    """
    height, width = rows[0].shape[1:3]
    factor = max(1, -(-tile // max(height, width)))
    large = [row.repeat(factor, axis=1).repeat(factor, axis=2) for row in rows]
    if (most := 2 * tile / max(height, width)) < 1:
        large = [resize(row, (max(1, round(most * height)), max(1, round(most * width)))) for row in rows]
    return _stack([_stack([frame.swapaxes(0, 1) for frame in row], _GAP).swapaxes(0, 1) for row in large], _GAP)


def _stack(parts: Sequence[Pixels], gap: int) -> Pixels:
    """Pictures (h, w, 3) of one width below one another, with paper between them."""
    paper = np.full((gap, *parts[0].shape[1:]), _PAPER, np.uint8)
    return np.concatenate([piece for part in parts for piece in (part, paper)][:-1])


def _text(height: int, width: int, labels: Sequence[tuple[float, float, str]], align: str = "center") -> Pixels:
    """Paper (height, width, 3) with words at (x, y) pixels from the upper left corner."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor=3 * (_PAPER / 255,))
    canvas = FigureCanvasAgg(figure)
    for x, y, words in labels:
        figure.text(x / width, 1 - y / height, words, ha=align, va="center", fontsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:height, :width, :3].copy()
