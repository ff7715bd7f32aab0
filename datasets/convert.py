"""Writes any dataset into our Zarr store, episode by episode; and chooses episodes by what is known of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from scd_robot.datasets.schema import DONE, REWARD, EpisodeDataset
from scd_robot.datasets.zarr.writer import ZarrWriter
from scd_robot.errors import ConfigError, DatasetError
from scd_robot.seeding import EPISODE_SPLIT, keyed_rng

__all__ = ["deal_episodes", "episode_success", "write_zarr"]


def write_zarr(
    dataset: EpisodeDataset, path: Path | str, *, overwrite: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Copies all episodes, with one of them in memory at a time.

    Args:
        dataset: what to write.
        path: of the new store, a folder.
        overwrite: replace a store at `path`, once the new one is complete.
        progress: show a bar.

    Returns:
        JSON-able summary: path, episodes, steps, keys.

    Raises:
        OutputError: something is at `path`, or it cannot be written; nothing half-written is left under that name.
        DatasetError: the dataset is damaged; the message says where.
    """
    metadata = {**dataset.metadata, "converted_from": dataset.spec.source}
    with ZarrWriter(path, dataset.spec, metadata, overwrite, whole=True) as writer:
        for index in tqdm(range(dataset.num_episodes), desc="writing", unit="episode", disable=not progress):
            info = {name: values[index].item() for name, values in dataset.episode_info.items()}
            text = {name: values[index] for name, values in dataset.episode_text.items()}
            writer.append(dataset.episode(index), info, text, dataset.number(index))
    return {
        "path": str(path),
        "episodes": writer.num_episodes,
        "steps": writer.num_steps,
        "keys": sorted(dataset.arrays),
    }


def episode_success(dataset: EpisodeDataset) -> NDArray[np.bool_]:
    """(E,) which episodes succeeded: by a note on the episode, else a reward of 1 or more in it, else a `done`.

    Raises:
        DatasetError: the recording says nothing about success; a `done` in the last step of every episode says only
            that it ended there.
    """
    if "success" in dataset.episode_info:
        return np.asarray(dataset.episode_info["success"] > 0)
    lengths = dataset.episode_lengths
    starts = (dataset.episode_ends - lengths)[lengths > 0]
    for key, reached in ((REWARD, 1.0), (DONE, 0.5)):
        if key in dataset.arrays:
            values = np.asarray(dataset.arrays[key][:], np.float64).reshape(dataset.num_steps, -1).max(axis=1)
            only_ends = np.array_equal(np.flatnonzero(values >= reached), dataset.episode_ends - 1)
            if key == REWARD or not only_ends:
                success = np.zeros(dataset.num_episodes, bool)  # an empty one has not succeeded
                success[lengths > 0] = np.maximum.reduceat(values, starts) >= reached
                return success
    raise DatasetError(
        f"{dataset.spec.source} says nothing about success: no note on its episodes, no reward, and no done but at "
        "their ends"
    )


def deal_episodes(count: int, shares: Sequence[float], parts: int, seed: int) -> list[NDArray[np.int64]]:
    """Disjoint episode numbers for each part, ascending, drawn at random; the sizes are `shares`, rounded.

    Raises:
        ConfigError: other shares than one positive number per part, or a part would be empty.
    """
    share = np.asarray(shares, np.float64)
    if share.shape != (parts,) or not (np.isfinite(share) & (share > 0)).all():
        raise ConfigError(f"{parts} outputs need as many positive shares, got {list(shares)}")
    ends = np.round(np.cumsum(share) / share.sum() * count).astype(np.int64)
    if (np.diff(ends, prepend=0) < 1).any():
        raise ConfigError(f"{count} episodes cannot be dealt out in shares of {list(shares)}: a part would be empty")
    order = keyed_rng(EPISODE_SPLIT, seed).permutation(count)
    return [np.sort(part) for part in np.split(order, ends[:-1])]
