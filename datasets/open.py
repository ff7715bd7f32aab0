"""Opens a dataset of any format that is known."""

from pathlib import Path

from scd_robot.datasets.schema import EpisodeDataset
from scd_robot.datasets.zarr_store import is_zarr_group, open_zarr
from scd_robot.errors import DatasetError

__all__ = ["open_dataset"]


def open_dataset(path: Path | str, keys: list[str] | None = None) -> EpisodeDataset:
    """Loads the dataset at `path` and checks it; the format is told from the files.

    Args:
        path: a Zarr store, as a folder.
        keys: observation keys to load; None = all.

    Raises:
        DatasetError: nothing there, a format that is not known, or a damaged dataset.
        UnknownNameError: a key that the dataset does not have.
    """
    path = Path(path)
    if not path.exists():
        raise DatasetError(f"no dataset at {path}; check the path, or record one with: scd data record")
    if path.is_dir() and is_zarr_group(path):
        return open_zarr(path, keys)
    if path.suffix == ".zip":
        raise DatasetError(f"{path} is a zip archive; unpack it and name the Zarr folder inside")
    raise DatasetError(
        f"{path} is not a dataset in a known format; expected a Zarr folder with data/ and meta/episode_ends, "
        "as 'scd data record' and diffusion_policy write"
    )
