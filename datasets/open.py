"""Opens a dataset of any known format; the format is told from the files."""

import contextlib
import importlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scd_robot.datasets.formats import ReadOptions
from scd_robot.datasets.schema import MASK, EpisodeDataset
from scd_robot.datasets.zarr.files import ATTRIBUTE, ZarrFiles, is_address, is_zarr_group
from scd_robot.errors import DatasetError, UnknownNameError

__all__ = ["FORMATS", "Format", "detect_format", "open_dataset"]

_MOST_LOOKED_AT, _MOST_NAMED = 1000, 4  # files in a folder that is no dataset, to find some in it
_MOST_ABOVE = 4  # folders, from videos/chunk-000/CAMERA/episode_000000.mp4 to the dataset


@dataclass(frozen=True)
class Format:
    """One kind of recording.

    Attributes:
        description: for people.
        module: of `scd_robot.datasets` with the reader, imported only when it is needed.
        function: the reader, called with the path or address as text, and `ReadOptions`.
        is_at: whether what lies at a path or address is such a recording, told from names and headers.
    """

    description: str
    module: str
    function: str
    is_at: Callable[[str], bool]


def _is_zarr(path: str) -> bool:
    return is_address(path) or is_zarr_group(Path(path)) or (Path(path).is_file() and path.endswith(".zip"))


def _is_own_store(path: str) -> bool:
    return _is_zarr(path) and ATTRIBUTE in ZarrFiles(path).attributes()


def _is_lerobot(path: str) -> bool:
    return any(
        (Path(path) / folder / "info.json").is_file() for folder in ("meta", "meta_data")
    )  # v1 is refused by name


def _is_hdf5(path: str) -> bool:
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n" or path.endswith((".hdf5", ".h5"))


def _is_aloha(path: str) -> bool:
    return any(Path(path).glob("episode_[0-9]*.hdf5"))


FORMATS: dict[str, Format] = {
    "scd_robot": Format("Zarr store of scd_robot", "zarr.store", "open_store", _is_own_store),
    "diffusion_policy": Format(
        "Zarr replay buffer of diffusion_policy (folder or .zip)", "zarr.replay_buffer", "open_replay_buffer", _is_zarr
    ),
    "lerobot": Format("LeRobot dataset v2.0, v2.1 or v3.0 (folder)", "lerobot.reader", "open_lerobot", _is_lerobot),
    "hdf5": Format("HDF5 file of robomimic, robosuite or ALOHA", "hdf5.reader", "open_hdf5", _is_hdf5),
    "aloha": Format("folder of ALOHA's files episode_N.hdf5", "hdf5.aloha", "open_aloha", _is_aloha),
}


def detect_format(path: Path | str) -> str:
    """The key in `FORMATS` of what lies at `path`.

    Raises:
        DatasetError: nothing there, or none of the known formats.
    """
    if not is_address(path) and not Path(path).exists():
        raise DatasetError(f"no dataset at {path}; check the path, or record one with: scd data record")
    for name, known in FORMATS.items():
        if known.is_at(str(path)):
            return name
    if inside := _datasets_inside(Path(path)):
        together = ""
        if ".hdf5" in inside or ".h5" in inside:
            together = (
                "; several go together with scd data merge, or, files of one episode each as ALOHA's tools write them, "
                "under the names episode_0.hdf5, episode_1.hdf5, ..."
            )
        raise DatasetError(
            f"{path} is a folder with datasets in it, not one itself; give one of them: {inside}{together}"
        )
    for folder in Path(path).absolute().parents[:_MOST_ABOVE]:
        if _is_lerobot(str(folder)):
            raise DatasetError(f"{path} is a part of a LeRobot dataset, not one itself; give its folder: {folder}")
    known_ones = "; ".join(known.description for known in FORMATS.values())
    raise DatasetError(
        f"{path} is not a dataset in a known format; expected one of: {known_ones}. Write what is in another one with "
        "scd_robot.datasets.ZarrWriter (docs/data.md)"
    )


def _datasets_inside(folder: Path) -> str:
    """The paths of some datasets below a folder, comma-separated; empty where there are none nearby."""
    found: list[str] = []
    waiting, looked_at = [folder] if folder.is_dir() else [], 0
    while waiting and looked_at < _MOST_LOOKED_AT:
        with contextlib.suppress(OSError):  # what may not be read is none
            for entry in sorted(itertools.islice(waiting.pop(0).iterdir(), _MOST_LOOKED_AT - looked_at)):
                looked_at += 1
                if any(known.is_at(str(entry)) for known in FORMATS.values()):
                    found.append(str(entry))
                elif entry.is_dir():
                    waiting.append(entry)
    return ", ".join(found[:_MOST_NAMED]) + (", ..." if len(found) > _MOST_NAMED else "")


def open_dataset(path: Path | str, keys: Sequence[str] | None = None, **options: Any) -> EpisodeDataset:
    """Opens the dataset at `path` and checks it; vectors are loaded, images read when they are indexed.

    Args:
        path: of the files, or an address of a Zarr store for fsspec (s3://bucket/name.zarr).
        keys: observation keys; None = all.
        **options: the other fields of `ReadOptions`: `action`, `control_dt`, `mask`, `only`, `drop`, ...

    Raises:
        DatasetError: nothing there, a format that is not known, or a damaged dataset.
        UnknownNameError: a key, action array or mask that the dataset does not have.
        ConfigError: `only` or `drop` name episodes that there are not.
        MissingDependencyError: a package that this format needs is not installed.
    """
    chosen = ReadOptions(keys=keys, **options)
    known = FORMATS[detect_format(path)]
    reader = getattr(importlib.import_module(f"scd_robot.datasets.{known.module}"), known.function)
    dataset: EpisodeDataset = reader(str(path), chosen)
    if chosen.mask is not None:
        dataset = _in_mask(dataset, chosen.mask, path)
    if chosen.check:
        dataset.check(str(path))
    return dataset


def _in_mask(dataset: EpisodeDataset, name: str, path: Path | str) -> EpisodeDataset:
    masks = {key.removeprefix(MASK): value for key, value in dataset.episode_info.items() if key.startswith(MASK)}
    if name not in masks:
        raise UnknownNameError(f"mask of {path}", name, masks)
    return dataset.select(masks[name] != 0)
