"""Pictures of a dataset: traces, histograms, episode lengths, frames. matplotlib is needed here only."""

import importlib.util
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.images import is_image
from scd_robot.datasets.lazy import RowArray
from scd_robot.datasets.schema import ACTION, EXECUTED_ACTION, EpisodeDataset
from scd_robot.errors import MissingDependencyError
from scd_robot.output import check_target, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["name_of", "new_figure", "plot_dataset", "png", "require_matplotlib", "show_frame", "style"]

_STYLE: Any = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": "#8a92a0",
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "grid.color": "#d9dee6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
}
_ACCENT = "#3b6fb6"
_EPISODE_COLOURS = ("#3b6fb6", "#d1603d", "#1f8a70", "#8a5fb0", "#b08a1f")
_DPI = 110
_WIDTH_IN = 10.0
_MAX_DIMENSIONS = 16
_MAX_NUMBERS = 256  # per step, above which an array is no vector
_SHEET_EPISODES, _SHEET_FRAMES = 6, 8


def require_matplotlib() -> None:
    """Checks that pictures can be drawn.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError('pictures need matplotlib; run pip install "scd_robot[formats]"')


def plot_dataset(dataset: EpisodeDataset, folder: Path | str) -> list[Path]:
    """Writes PNG files into a folder, which is made where missing; files of the same names are replaced.

    `episode_lengths`, and for the action and each observation `traces_KEY` and `histograms_KEY` (up to 16 dimensions),
    or `frames_KEY` where it is of images. Of a few episodes, evenly chosen.

    Returns:
        The files.

    Raises:
        DatasetError: frames cannot be read.
        OutputError: a file cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    folder = Path(folder)
    check_target(folder / "episode_lengths.png")
    with style():
        return [_save(figure, folder / f"{name}.png") for name, figure in _figures(dataset)]


def _figures(dataset: EpisodeDataset) -> "Iterator[tuple[str, Figure]]":
    yield "episode_lengths", _lengths(dataset)
    shown = [key for key in (ACTION, EXECUTED_ACTION, *dataset.spec.observation) if key in dataset.arrays]
    for key, name in zip(shown, _file_names(shown), strict=True):
        array = dataset.arrays[key]
        if is_image(array.shape, array.dtype):
            yield f"frames_{name}", _contact_sheet(dataset, key)
        elif 0 < int(np.prod(array.shape[1:])) <= _MAX_NUMBERS:
            yield f"traces_{name}", _traces(dataset, key)
            yield f"histograms_{name}", _histograms(key, array)


def style() -> AbstractContextManager[None]:
    """In which figures are drawn."""
    import matplotlib

    context: AbstractContextManager[None] = matplotlib.rc_context(_STYLE)
    return context


def new_figure(rows: int, columns: int, width_in: float, height_in: float, **options: Any) -> "tuple[Figure, Any]":
    """A figure and its axes (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained", dpi=_DPI)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def png(figure: "Figure") -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def show_frame(axes: "Axes", frame: NDArray[Any], title: str, highlight: bool = False) -> None:
    """One image (H, W, C); those that are not uint8, depth for example, from their lowest to their highest number."""
    if frame.dtype == np.uint8 and frame.shape[2] in (3, 4):
        axes.imshow(frame)
    else:
        one_channel = frame[:, :, 0] if frame.shape[2] in (1, 3, 4) else frame[:, :, :1].squeeze(2)
        low, high = (0, 255) if frame.dtype == np.uint8 else (None, None)
        axes.imshow(one_channel, cmap="gray", vmin=low, vmax=high)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8, loc="center")
    for spine in axes.spines.values():
        spine.set_visible(highlight)
        spine.set(color="#d1603d", linewidth=2.5)


def name_of(key: str, dimension: int, shape: Sequence[int]) -> str:
    """A dimension of a flat array as it is written in the array of this shape (without time): keypoint[2, 1]."""
    if not shape:
        return key
    index = np.unravel_index(dimension, tuple(shape))
    return f"{key}[{', '.join(str(int(number)) for number in index)}]"


def _save(figure: "Figure", path: Path) -> Path:
    write_bytes(path, png(figure))
    return path


def _file_names(keys: Sequence[str]) -> list[str]:
    """Names for files, all different."""
    names: list[str] = []
    for key in keys:
        plain = re.sub(r"[^\w.-]+", "_", key)
        names.append(plain if plain not in names else f"{plain}_{len(names)}")
    return names


def _some_episodes(dataset: EpisodeDataset, count: int) -> list[int]:
    return np.unique(np.linspace(0, dataset.num_episodes - 1, count).round().astype(int)).tolist()


def _lengths(dataset: EpisodeDataset) -> "Figure":
    figure, grid = new_figure(1, 1, 7.0, 3.4)
    axes, lengths = grid[0, 0], dataset.episode_lengths
    extent = int(np.ptp(lengths))
    width = extent // 40 + 1  # whole steps
    edges = np.arange(lengths.min(), lengths.max() + width + 1, width) - 0.5
    axes.hist(lengths, bins=edges.tolist(), color=_ACCENT, rwidth=0.92)
    median = float(np.median(lengths))
    axes.axvline(median, color="#1c2430", linewidth=1.2, linestyle="--")
    seconds = dataset.spec.control_dt
    axes.set_title(
        f"{dataset.num_episodes} episodes, {dataset.num_steps} control steps of {seconds:.4g} s; "
        f"median length {median:g} ({median * seconds:.1f} s)"
    )
    axes.set_xlabel("episode length [control steps]")
    axes.set_ylabel("episodes")
    axes.locator_params(axis="both", integer=True)
    axes.grid(axis="y")
    return figure


def _traces(dataset: EpisodeDataset, key: str) -> "Figure":
    shape = dataset.arrays[key].shape[1:]
    total = int(np.prod(shape))
    shown = min(total, _MAX_DIMENSIONS)
    columns = 1 if shown <= 6 else 2
    rows = -(-shown // columns)
    figure, grid = new_figure(rows, columns, _WIDTH_IN, 1.0 + 1.35 * rows, sharex=True)
    episodes = _some_episodes(dataset, len(_EPISODE_COLOURS))
    for episode, colour in zip(episodes, _EPISODE_COLOURS, strict=False):
        values = dataset.episode(episode, [key])[key].reshape(-1, total)
        times = np.arange(len(values)) * dataset.spec.control_dt
        for dimension in range(shown):
            axes = grid[dimension // columns, dimension % columns]
            axes.plot(times, values[:, dimension], color=colour, label=f"episode {dataset.number(episode)}")
            axes.set_title(name_of(key, dimension, shape))
            axes.grid(axis="y")
    for axes in grid.flat[shown:]:
        axes.set_visible(False)
    for axes in (grid[(shown - 1 - column) // columns, (shown - 1 - column) % columns] for column in range(columns)):
        axes.set_xlabel("time [s]")
        axes.tick_params(labelbottom=True)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(episodes))
    figure.suptitle(_title(key, "over time", shown, total), x=0.01, ha="left", fontsize=11)
    return figure


def _histograms(key: str, array: RowArray) -> "Figure":
    total = int(np.prod(array.shape[1:]))
    values = np.asarray(array[:]).reshape(-1, total)
    shown = min(total, _MAX_DIMENSIONS)
    columns = min(4, shown)
    rows = -(-shown // columns)
    figure, grid = new_figure(rows, columns, max(5.0, _WIDTH_IN * columns / 4), 0.8 + 1.9 * rows)
    for dimension, axes in enumerate(grid.flat):
        if dimension >= shown:
            axes.set_visible(False)
            continue
        column = values[:, dimension]
        column = column[np.isfinite(column)].astype(np.float64)
        if len(column):
            axes.hist(column, bins=40, color=_ACCENT)
        left_out = f" ({len(values) - len(column)} not finite)" if len(column) < len(values) else ""
        axes.set_title(name_of(key, dimension, array.shape[1:]) + left_out)
        axes.locator_params(axis="x", nbins=3)
        axes.grid(axis="y")
        if dimension % columns == 0:
            axes.set_ylabel("control steps")
    figure.suptitle(_title(key, "in all control steps", shown, total), x=0.01, ha="left", fontsize=11)
    return figure


def _title(key: str, what: str, shown: int, total: int) -> str:
    return f"{key} {what}" + (f" (first {shown} of {total} dimensions)" if shown < total else "")


def _contact_sheet(dataset: EpisodeDataset, key: str) -> "Figure":
    episodes = _some_episodes(dataset, _SHEET_EPISODES)
    height, width = dataset.arrays[key].shape[1:3]
    tile = (_WIDTH_IN - 0.6) / _SHEET_FRAMES
    row_height = tile * min(2.0, height / width) + 0.25
    figure, grid = new_figure(len(episodes), _SHEET_FRAMES, _WIDTH_IN, 0.5 + row_height * len(episodes))
    for line, episode in zip(grid, episodes, strict=True):
        rows = dataset.rows(episode)
        steps = np.unique(np.linspace(0, rows.stop - rows.start - 1, _SHEET_FRAMES).round().astype(int))
        frames = dataset.arrays[key][rows.start + steps]
        for axes in line:
            axes.set_visible(False)
        for axes, step, frame in zip(line, steps, frames, strict=False):
            axes.set_visible(True)
            show_frame(axes, frame, f"{step * dataset.spec.control_dt:.1f} s")
        line[0].set_ylabel(f"episode {dataset.number(episode)}")
    figure.suptitle(f"{key} of {len(episodes)} of {dataset.num_episodes} episodes", x=0.01, ha="left", fontsize=11)
    return figure
