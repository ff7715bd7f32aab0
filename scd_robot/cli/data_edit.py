"""The verbs `scd data convert`, `merge`, `split` and `filter`: they write new datasets and never change old ones."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from scd_robot.datasets.formats import ReadOptions

__all__ = ["convert", "filter_episodes", "merge", "split"]

Options = Annotated[ReadOptions, tyro.conf.arg(name="")]
OutputFormat = Literal["zarr", "robomimic", "lerobot"]


def convert(
    source: Annotated[str, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    to: OutputFormat | None = None,
    read: Options = ReadOptions(),  # noqa: B008 - frozen
    cameras: list[str] | None = None,
    image_size: tuple[int, int] = (84, 84),
    overwrite: bool = False,
    json: Path | None = None,
) -> None:
    """Copies a dataset into another format: a Zarr store of ours, robomimic HDF5, or LeRobot v3.0.

    Numbers are copied exactly (as float32), images too, except that LeRobot's are compressed as video. A raw robosuite
    recording holds simulator states only: give --cameras to set each of them in robosuite and record observations and
    images.

    Args:
        source: dataset of any known format.
        target: the new dataset; its name tells the format: NAME.zarr, NAME.hdf5, or a folder with --to lerobot.
        to: format of the target, where its name does not tell.
        read: what to read of the source.
        cameras: of robosuite, for a raw robosuite recording ("agentview", "robot0_eye_in_hand", or "none").
        image_size: height and width of those images [pixel].
        overwrite: replace a dataset at TARGET, once the new one is complete.
        json: write the summary to this file too ("-": standard output).
    """
    from scd_robot.datasets import open_dataset

    begin(json)
    format_name = to or format_of(target)
    dataset = open_dataset(source, **vars(read))
    if cameras is None:
        finish(write(dataset, target, format_name, overwrite), json)
        return
    from scd_robot.errors import ConfigError
    from scd_robot.recording import write_observations

    if format_name != "zarr":
        raise ConfigError(
            f"observations made with --cameras go into a Zarr store first, got {target}; convert that then"
        )
    wanted = [name for name in cameras if name != "none"]
    height, width = image_size
    finish(write_observations(dataset, target, cameras=wanted, height=height, width=width, overwrite=overwrite), json)


def merge(
    sources: Annotated[list[str], tyro.conf.Positional],
    /,
    *,
    out: Path,
    read: Options = ReadOptions(),  # noqa: B008 - frozen
    overwrite: bool = False,
    json: Path | None = None,
) -> None:
    """Writes the episodes of several datasets, one after the other, into one Zarr store.

    Observation keys that not all of them have are left out, and the log says which.

    Args:
        sources: datasets of any known formats, of one robot and one rate.
        out: the new store.
        read: what to read of each source.
        overwrite: replace a store at OUT, once the new one is complete.
        json: write the summary to this file too ("-": standard output).
    """
    from scd_robot.datasets import open_dataset
    from scd_robot.datasets.combine import join_datasets

    begin(json)
    joined = join_datasets([open_dataset(source, **vars(read)) for source in sources], sources)
    finish(write(joined, out, "zarr", overwrite), json)


def split(
    source: Annotated[str, tyro.conf.Positional],
    /,
    *,
    out: list[Path],
    shares: list[float],
    seed: int = 0,
    read: Options = ReadOptions(),  # noqa: B008 - frozen
    overwrite: bool = False,
    json: Path | None = None,
) -> None:
    """Deals the episodes of a dataset out to several Zarr stores, at random.

    Args:
        source: dataset of any known format.
        out: the new stores.
        shares: of the episodes, one per store; they need not sum to 1.
        seed: of the dealing.
        read: what to read of the source.
        overwrite: replace stores at OUT, each once the new one is complete.
        json: write the summaries to this file too ("-": standard output).
    """
    from scd_robot.datasets import open_dataset
    from scd_robot.datasets.convert import deal_episodes
    from scd_robot.errors import ConfigError, OutputError

    begin(json)
    dataset = open_dataset(source, **vars(read))
    parts = deal_episodes(dataset.num_episodes, shares, len(out), seed)
    if len({path.resolve() for path in (Path(source), *out)}) <= len(out):
        raise ConfigError(f"the source and the new stores must all differ, got {source} and {', '.join(map(str, out))}")
    if there := [path for path in out if path.exists() and not overwrite]:  # rather than after the first is written
        raise OutputError(f"{there[0]} exists already; choose another path, or overwrite it with --overwrite")
    finish([write(dataset.select(part), path, "zarr", overwrite) for part, path in zip(parts, out, strict=True)], json)


def filter_episodes(
    source: Annotated[str, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    success: bool = False,
    min_length: int = 2,
    max_length: int | None = None,
    read: Options = ReadOptions(),  # noqa: B008 - frozen
    overwrite: bool = False,
    json: Path | None = None,
) -> None:
    """Copies some episodes of a dataset into a Zarr store: those that meet all conditions given.

    Args:
        source: dataset of any known format.
        target: the new store.
        success: only those that succeeded, by what the recording says of it.
        min_length: fewest control steps.
        max_length: most control steps.
        read: what to read of the source; --only, --drop and --mask choose among its episodes.
        overwrite: replace a store at TARGET, once the new one is complete.
        json: write the summary to this file too ("-": standard output).
    """
    from dataclasses import replace

    from scd_robot.datasets import open_dataset
    from scd_robot.datasets.convert import episode_success

    begin(json)
    dataset = open_dataset(source, **vars(replace(read, check=False)))  # what is left is checked
    lengths = dataset.episode_lengths
    keep = (lengths >= min_length) & (lengths <= (lengths.max(initial=0) if max_length is None else max_length))
    if success:
        keep &= episode_success(dataset)
    chosen = dataset.select(keep)
    if read.check:
        chosen.check(source)
    finish(write(chosen, target, "zarr", overwrite), json)


def begin(json: Path | None) -> None:
    """Refuses a file for the summary that cannot be written, before the work is done."""
    from scd_robot.output import check_target

    if json is not None:
        check_target(json)


def format_of(target: Path) -> OutputFormat:
    """The format that a path's ending tells.

    Raises:
        ConfigError: none.
    """
    from scd_robot.errors import ConfigError

    endings: dict[str, OutputFormat] = {".zarr": "zarr", ".hdf5": "robomimic", ".h5": "robomimic"}
    if target.suffix not in endings:
        raise ConfigError(f"the name {target.name!r} does not tell a format; end it in .zarr or .hdf5, or give --to")
    return endings[target.suffix]


def write(dataset: Any, target: Path, format_name: OutputFormat, overwrite: bool) -> dict[str, Any]:
    """Writes an `EpisodeDataset` and returns the writer's summary."""
    from scd_robot.cli.termination import unfinished_removed

    if format_name == "zarr":
        from scd_robot.datasets.convert import write_zarr as write_it
    elif format_name == "robomimic":
        from scd_robot.datasets.hdf5.robomimic_writer import write_robomimic as write_it
    else:
        from scd_robot.datasets.lerobot.writer import write_lerobot as write_it
    with unfinished_removed():
        summary: dict[str, Any] = write_it(dataset, target, overwrite=overwrite)
    return summary


def finish(summary: dict[str, Any] | list[dict[str, Any]], json: Path | None) -> None:
    """Tells what was written, a line for each dataset."""
    from scd_robot.output import write_json

    if json is not None:
        write_json(json, summary)
    if str(json) != "-":
        for one in summary if isinstance(summary, list) else [summary]:
            print(f"{one['path']}: {one['episodes']} episodes, {one['steps']} steps")
