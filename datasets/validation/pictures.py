"""A small picture of the first place of a finding: the trace around it, or the frames."""

from typing import TYPE_CHECKING

import numpy as np

from scd_robot.datasets.images import is_image
from scd_robot.datasets.plots import name_of, new_figure, png, show_frame, style
from scd_robot.datasets.schema import TIMESTAMP, EpisodeDataset
from scd_robot.datasets.validation.findings import Finding
from scd_robot.errors import DatasetError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["finding_picture"]

_AROUND = 40  # control steps on either side of the place
_FRAMES_BEFORE, _FRAMES = 2, 8
_MAX_DIMENSIONS = 4
_MAX_OTHERS = 5
_WIDTH_IN = 7.6
_NO_TRACE = {"structure", "unreadable"}


def finding_picture(dataset: EpisodeDataset, finding: Finding) -> bytes | None:
    """PNG of what a finding is about, or None where a picture tells nothing.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    array = dataset.arrays.get(finding.key)
    if finding.episode is None or array is None or finding.check in _NO_TRACE or len(array) != dataset.num_steps:
        return None
    with style():
        if is_image(array.shape, array.dtype):
            figure = _frames(dataset, finding)
        elif finding.check == "unit":
            figure = _compared(dataset, finding)
        else:
            figure = _trace(dataset, finding)
        return None if figure is None else png(figure)


def _frames(dataset: EpisodeDataset, finding: Finding) -> "Figure | None":
    assert finding.episode is not None
    rows = dataset.rows(finding.episode)
    length = rows.stop - rows.start
    if finding.step is None:
        steps = np.unique(np.linspace(0, length - 1, _FRAMES).round().astype(int))
    else:
        first = max(0, min(finding.step - _FRAMES_BEFORE, length - _FRAMES))
        steps = np.arange(first, min(first + _FRAMES, length))
    try:
        frames = dataset.arrays[finding.key][rows.start + steps]
    except DatasetError:
        return None
    height, width = frames.shape[1:3]
    figure, grid = new_figure(1, len(steps), _WIDTH_IN, 0.3 + _WIDTH_IN / _FRAMES * min(2.0, height / width))
    for axes, step, frame in zip(grid[0], steps, frames, strict=True):
        show_frame(axes, frame, f"step {step}", highlight=int(step) == finding.step)
    return figure


def _trace(dataset: EpisodeDataset, finding: Finding) -> "Figure":
    assert finding.episode is not None
    shape = dataset.arrays[finding.key].shape[1:]
    values = dataset.episode(finding.episode, [finding.key])[finding.key]
    values = values.reshape(len(values), -1).astype(np.float64)
    names = {d: name_of(finding.key, d, shape) for d in range(values.shape[1])}
    if finding.key == TIMESTAMP:
        values, names = np.diff(values, axis=0, prepend=np.nan), {0: "time since the step before [s]"}
    step = finding.step
    start, stop = (0, len(values)) if step is None else (max(0, step - _AROUND), min(len(values), step + _AROUND + 1))
    dimensions = _shown(finding, values.shape[1])
    figure, grid = new_figure(len(dimensions), 1, _WIDTH_IN, 0.45 + 1.05 * len(dimensions), sharex=True)
    marked = [s for episode, s in finding.places if episode == finding.episode and s is not None and start <= s < stop]
    for axes, dimension in zip(grid[:, 0], dimensions, strict=True):
        for place in marked:
            axes.axvline(place, color="#d1603d", linewidth=1.0, alpha=0.7)
        axes.plot(np.arange(start, stop), values[start:stop, dimension], color="#3b6fb6", marker=".", markersize=3)
        _label(axes, names[dimension])
    grid[-1, 0].set_xlabel(f"control step of episode {dataset.number(finding.episode)}")
    grid[-1, 0].locator_params(axis="x", integer=True)
    return figure


def _compared(dataset: EpisodeDataset, finding: Finding) -> "Figure":
    """The episode beside some others."""
    assert finding.episode is not None
    array = dataset.arrays[finding.key]
    found = {episode for episode, _ in finding.places}
    others = [episode for episode in range(dataset.num_episodes) if episode not in found][:_MAX_OTHERS]
    dimensions = _shown(finding, int(np.prod(array.shape[1:])))
    figure, grid = new_figure(len(dimensions), 1, _WIDTH_IN, 0.45 + 1.05 * len(dimensions), sharex=True)
    for episode in (*others, finding.episode):
        values = dataset.episode(episode, [finding.key])[finding.key]
        values = values.reshape(len(values), -1)
        colour = "#d1603d" if episode == finding.episode else "#8a92a0"
        for axes, dimension in zip(grid[:, 0], dimensions, strict=True):
            axes.plot(values[:, dimension], color=colour, label=f"episode {dataset.number(episode)}")
            _label(axes, name_of(finding.key, dimension, array.shape[1:]))
    shown = dataset.number(finding.episode)
    grid[-1, 0].set_xlabel(f"control step of episode {shown} (red) and of some others (grey)")
    return figure


def _shown(finding: Finding, total: int) -> list[int]:
    return list(finding.dimensions or range(total))[:_MAX_DIMENSIONS]


def _label(axes: "Axes", name: str) -> None:
    axes.set_title(name)
    axes.locator_params(axis="y", nbins=4)
    axes.grid(axis="y")
