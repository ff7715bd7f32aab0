"""Episodes in a Zarr store, laid out as diffusion_policy's replay buffer (Zarr format 2, so zarr 2 reads it as well).

    data/KEY                 (N, ...) all episodes one after the other: observation keys, `action`, `executed_action`
    meta/episode_ends        (E,) int64, cumulative
    meta/episode_NAME        (E,) what was noted about each episode
    attribute `scd_robot`    schema number, specification, metadata

An episode exists once its end stands in `episode_ends`, which is written last; each file is written beside and renamed
(by zarr, since 3.1.3). So whatever kills a recording, the store opens and holds the finished episodes.
"""

import asyncio
import contextlib
import errno
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zarr
from numcodecs import Blosc
from numpy.typing import NDArray
from zarr.core.sync import sync

from scd_robot.datasets.schema import ACTION, EXECUTED_ACTION, EpisodeDataset
from scd_robot.errors import ConfigError, DatasetError, OutputError, ShapeError, UnknownNameError
from scd_robot.types import ArraySpec, DatasetSpec

__all__ = ["SCHEMA", "ZarrWriter", "is_zarr_group", "open_zarr"]

logger = logging.getLogger(__name__)

SCHEMA = 1
FOREIGN_CONTROL_DT = 0.1

_ATTRIBUTE = "scd_robot"
_ENDS = "episode_ends"
_UNWRITTEN = -1  # stands in episode_ends between its growth and the writing of the value
_CHUNK_BYTES = 1 << 20
_CHUNK_ROWS = 4096
# What zarr, numcodecs and json raise on damaged files.
_READ_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError)


class ZarrWriter:
    """Writes a store episode by episode; a context manager.

    Without `overwrite` the store grows at `path` itself. With it the new store grows beside and takes the place of the
    old one when the block ends without an exception. If the block ends by an exception, the finished episodes are kept
    (a new store without any is removed).
    """

    def __init__(
        self, path: Path | str, spec: DatasetSpec, metadata: Mapping[str, Any] | None = None, overwrite: bool = False
    ) -> None:
        """Touches nothing yet.

        Args:
            path: of the new store, a folder.
            spec: of the episodes to come.
            metadata: about the whole, plain JSON types; `update_metadata` adds to it.
            overwrite: replace a store at `path`.

        Raises:
            ConfigError: a key cannot be the name of an array, or its dtype is not stored.
        """
        self.path = Path(path)
        self.spec = spec
        self.metadata = dict(metadata or {})
        self.num_episodes = 0
        self.num_steps = 0
        self._overwrite = overwrite
        self._folder = self.path  # where the store grows
        self._group: zarr.Group | None = None
        self._arrays: dict[str, Any] = {}  # opened anew they would forget to write chunks of zeros
        for key, array in spec.observation.items():
            if "/" in key or key.startswith(".") or key in ("", ACTION, EXECUTED_ACTION):
                raise ConfigError(f"{key!r} cannot be an observation key in a Zarr store; rename it")
            if array.dtype != "float32" and not (array.dtype == "uint8" and len(array.shape) > 1):
                raise ConfigError(f"{key!r} must be float32, or uint8 for an image, got {array.dtype} {array.shape}")

    def __enter__(self) -> Self:
        """Creates the empty store.

        Raises:
            OutputError: something is at `path` already, or it cannot be written.
        """
        with _output_errors(self.path):
            self._make_folder()
            try:
                self._group = zarr.open_group(self._folder, mode="w", zarr_format=2)
                self._group.create_group("data")
                self._write_attributes()
                self._group.create_group("meta")
                self._write(f"meta/{_ENDS}", 0, np.empty(0, "<i8"), _UNWRITTEN)
            except BaseException:
                _remove(self._folder)
                raise
        return self

    def append(self, episode: Mapping[str, NDArray[Any]], info: Mapping[str, int | float] | None = None) -> None:
        """Adds one episode.

        Args:
            episode: (T, ...) by key with T >= 2: the observation keys, `action` (T, Da), and `executed_action` (T, Da)
                in all episodes or in none.
            info: numbers about this episode, the same names in all of them; they become `meta/episode_NAME`.

        Raises:
            ShapeError: keys or shapes are not those of the specification.
            DatasetError: the episode is too short, or holds NaN or infinite values.
            OutputError: the disk is full or refuses; the earlier episodes are kept.
        """
        if self._group is None:
            raise OutputError(f"the store {self.path} is not open for writing; use it in a `with` statement")
        arrays = self._checked(episode)
        length = len(arrays[ACTION])
        with _output_errors(self.path, self.num_episodes):
            for key, array in arrays.items():
                self._write(f"data/{key}", self.num_steps, array, 0 if array.dtype == np.uint8 else np.nan)
            for name, value in (info or {}).items():
                self._write(f"meta/episode_{name}", self.num_episodes, np.asarray([value]), 0)
            self._write(f"meta/{_ENDS}", self.num_episodes, np.asarray([self.num_steps + length]), _UNWRITTEN)
        self.num_episodes += 1
        self.num_steps += length

    def update_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Adds to the metadata; written at once.

        Raises:
            OutputError: the disk is full or refuses.
        """
        self.metadata.update(metadata)
        with _output_errors(self.path, self.num_episodes):
            self._write_attributes()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keeps the finished episodes; after a block without exception a replaced store is swapped in."""
        self._group = None
        if self.num_episodes == 0:
            _remove(self._folder)
            return
        try:
            self._trim()
        except OSError as failure:  # a full disk, most likely, and why the block ended; readers trim by themselves
            logger.warning("the end of %s could not be trimmed: %s", self._folder, failure)
        if self._folder != self.path:
            if error is None:
                with _output_errors(self.path):
                    _swap(self._folder, self.path)
            else:
                logger.warning("%s is as it was; %d new episodes are in %s", self.path, self.num_episodes, self._folder)

    def _make_folder(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists() and not self.path.is_symlink():
            self.path.mkdir()
            return
        if not self._overwrite:
            raise OutputError(f"{self.path} exists already; choose another path, or overwrite it with --overwrite")
        if not is_zarr_group(self.path):
            raise OutputError(f"{self.path} is not a Zarr store and will not be replaced; choose another path")
        self._folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        self._folder.chmod(0o755)

    def _write_attributes(self) -> None:
        assert self._group is not None
        self._group.attrs[_ATTRIBUTE] = {"schema": SCHEMA, "spec": self.spec.to_json(), "metadata": self.metadata}

    def _write(self, name: str, start: int, rows: NDArray[Any], fill: float) -> None:
        """Makes `rows` the end of an array, created if need be, whatever an earlier attempt left behind `start`.

        Every chunk gets written, zeros too, and vectors are filled with NaN: so a lost chunk shows when it is read.
        """
        assert self._group is not None
        if name not in self._arrays:
            row_bytes = max(1, rows.dtype.itemsize * int(np.prod(rows.shape[1:])))
            self._arrays[name] = self._group.create_array(
                name,
                shape=(0, *rows.shape[1:]),
                chunks=(max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // row_bytes)), *rows.shape[1:]),
                dtype=rows.dtype,
                compressors=Blosc(cname="zstd", clevel=5, shuffle=Blosc.SHUFFLE),
                fill_value=fill,
                config={"write_empty_chunks": True},
            )
        array = self._arrays[name]
        array.resize((start + len(rows), *rows.shape[1:]))
        array[start:] = rows

    def _checked(self, episode: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The arrays in the dtypes of the specification, after the checks that a reader makes."""
        specs = dict(self.spec.observation)
        specs[ACTION] = ArraySpec((self.spec.action_dim,))
        recorded = self._group is not None and f"data/{EXECUTED_ACTION}" in self._group
        if recorded or (self.num_episodes == 0 and EXECUTED_ACTION in episode):
            specs[EXECUTED_ACTION] = specs[ACTION]
        if set(episode) != set(specs):
            raise ShapeError(f"an episode for {self.path} must have the keys {sorted(specs)}, got {sorted(episode)}")
        arrays = {key: np.asarray(episode[key]).astype(spec.dtype, copy=False) for key, spec in specs.items()}
        length = len(arrays[ACTION])
        for key, spec in specs.items():
            if arrays[key].shape != (length, *spec.shape):
                raise ShapeError(f"{key!r} must be {(length, *spec.shape)}, got {arrays[key].shape}")
        EpisodeDataset(self.spec, np.asarray([length]), arrays).check(f"episode {self.num_episodes} for {self.path}")
        return arrays

    def _trim(self) -> None:
        """Cuts off what an unfinished `append` left, since diffusion_policy wants all lengths to agree."""
        for name, array in self._arrays.items():
            rows = self.num_steps if name.startswith("data/") else self.num_episodes
            if array.shape[0] > rows:
                array.resize((rows, *array.shape[1:]))


def is_zarr_group(path: Path) -> bool:
    """Whether the folder `path` is the root of a Zarr group, of format 2 or 3."""
    return (path / ".zgroup").is_file() or (path / "zarr.json").is_file()


def open_zarr(path: Path | str, keys: list[str] | None = None, control_dt: float | None = None) -> EpisodeDataset:
    """Loads a store into memory, checked.

    Vectors become float32, images (uint8) stay as they are. A store of diffusion_policy, without our attribute, is read
    with every array but `action` as an observation.

    Args:
        path: the folder.
        keys: observation keys to load; None = all.
        control_dt: seconds between control steps; None = what the store says (0.1 where it says nothing, which
            `spec.source` then states).

    Raises:
        DatasetError: not a store, arrays missing, damaged, or of a kind that is not read.
        UnknownNameError: a key that the store does not have.
    """
    path = Path(path)
    if not path.is_dir() or not is_zarr_group(path):
        raise DatasetError(f"{path} is not a Zarr store; expected a folder with data/ and meta/{_ENDS}")
    with _read_errors(path):
        group = zarr.open_group(path, mode="r")
        header: Any = group.attrs.asdict().get(_ATTRIBUTE)
        names = {folder: _array_names(path / folder) for folder in ("data", "meta")}
    for folder, name in (("meta", _ENDS), ("data", ACTION)):
        if name not in names[folder]:
            raise DatasetError(
                f"the store {path} has no array {folder}/{name}; it is not a recording, or a damaged one"
            )
    ends = _read_ends(path, group, own=header is not None)
    rows = int(ends[-1]) if len(ends) else 0
    spec = _header_spec(path, header) if header is not None else None
    available = [key for key in names["data"] if key not in (ACTION, EXECUTED_ACTION)]
    wanted = keys if keys is not None else list(spec.observation) if spec else available
    for key in wanted:
        if key not in available:
            raise UnknownNameError(f"key of the dataset {path}", key, available)
    extra = [EXECUTED_ACTION] if EXECUTED_ACTION in names["data"] else []
    arrays = {key: _read(path, group, f"data/{key}", rows, spec is not None) for key in [*wanted, ACTION, *extra]}
    if spec is None:
        spec = _foreign_spec(path, arrays, wanted, control_dt)
    else:
        spec = replace(
            spec,
            observation={key: spec.observation[key] for key in wanted},
            control_dt=control_dt if control_dt is not None else spec.control_dt,
        )
    info_names = [name for name in names["meta"] if name.startswith("episode_") and name != _ENDS]
    info = {n.removeprefix("episode_"): _read(path, group, f"meta/{n}", len(ends), False, False) for n in info_names}
    dataset = EpisodeDataset(spec, ends, arrays, (header or {}).get("metadata", {}), info)
    dataset.check(str(path))
    return dataset


def _remove(folder: Path) -> None:
    """Removes a store that zarr may still be writing to.

    Zarr writes several files at once and gives up at the first that fails, so the others can appear later.
    """

    async def others() -> None:
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

    sync(others())
    shutil.rmtree(folder, ignore_errors=True)


def _swap(new: Path, old: Path) -> None:
    """Puts the folder `new` in the place of `old`."""
    retired = Path(tempfile.mkdtemp(prefix=f".{old.name}.", dir=old.parent))
    old.rename(retired / old.name)
    try:
        new.rename(old)
    except OSError:
        (retired / old.name).rename(old)
        retired.rmdir()
        raise
    shutil.rmtree(retired)


@contextlib.contextmanager
def _output_errors(path: Path, kept: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = {
            errno.ENOSPC: "the disk is full; free some space",
            errno.EDQUOT: "the disk quota is used up; free some space",
            errno.EACCES: "no write permission; choose another path",
            errno.EPERM: "no write permission; choose another path",
            errno.EROFS: "the file system is read-only; choose another path",
        }.get(error.errno or 0, f"{(error.strerror or str(error)).lower()}; choose another path")
        finished = f" ({kept} finished episodes are kept)" if kept else ""
        raise OutputError(f"cannot write the dataset {path}: {reason}{finished}") from error


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except _READ_ERRORS as error:
        raise DatasetError(
            f"{path} cannot be read ({type(error).__name__}: {error}); it is damaged, or of a kind that is not read"
        ) from error


def _array_names(folder: Path) -> list[str]:
    """Names of the arrays in a group, none of them opened: zarr gives up on all if it cannot read one."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if (p / ".zarray").is_file() or (p / "zarr.json").is_file())


def _read_ends(path: Path, group: zarr.Group, own: bool) -> NDArray[np.int64]:
    """(E,) ends of the finished episodes."""
    ends = _read(path, group, f"meta/{_ENDS}", None, False, False)
    if ends.ndim != 1 or ends.dtype.kind not in "iu":
        raise DatasetError(f"meta/{_ENDS} of {path} must be a vector of integers, got {ends.dtype} {ends.shape}")
    ends = ends.astype(np.int64)
    if own and len(ends) and ends[-1] == _UNWRITTEN:  # killed between the growth of episode_ends and its value
        ends = ends[:-1]
    if (np.diff(ends, prepend=0) <= 0).any():
        raise DatasetError(f"meta/{_ENDS} of {path} must increase from above 0, got {ends[:8].tolist()}...; damaged")
    return ends


def _read(path: Path, group: zarr.Group, name: str, rows: int | None, own: bool, convert: bool = True) -> NDArray[Any]:
    """The first `rows` rows of an array (None = all)."""
    with _read_errors(path / name):
        array = group[name]
        if not isinstance(array, zarr.Array):
            raise DatasetError(f"{name} of {path} is a group; expected an array")
        codecs = [*(array.filters or ()), *(array.compressors or ())]
        # Zarr 2 could pickle objects; unpickling a file runs whatever code is in it.
        if array.dtype.kind not in "biuf" or any(getattr(codec, "codec_id", "") == "pickle" for codec in codecs):
            raise DatasetError(f"{name} of {path} holds {array.dtype} objects, which are not read; store numbers")
        if array.ndim == 0 or (rows is not None and array.shape[0] < rows):
            raise DatasetError(f"{name} of {path} has shape {array.shape}, but meta/{_ENDS} asks for {rows} rows")
        if own:
            _check_chunks(path / name, array, rows)
        values = np.asarray(array[:rows])
    if not convert:
        return values
    if values.ndim == 1:
        values = values[:, None]
    is_image = values.dtype == np.uint8 and values.ndim >= 3
    return values if is_image else values.astype(np.float32, copy=False)


def _check_chunks(folder: Path, array: Any, rows: int | None) -> None:
    """Zarr reads a chunk that is not there as fill values; `_create` has all of them written, so it was lost."""
    for index in range(-(-(rows or 0) // array.chunks[0])):
        name = ".".join([str(index)] + ["0"] * (array.ndim - 1))
        if not (folder / name).is_file():
            raise DatasetError(f"{folder} has lost its chunk {name}; the dataset is damaged, copy or record it again")


def _header_spec(path: Path, header: Any) -> DatasetSpec:
    with _read_errors(path):
        if header["schema"] != SCHEMA:
            raise DatasetError(
                f"{path} has schema {header['schema']}, this version reads {SCHEMA}; update scd_robot or record again"
            )
        return DatasetSpec.from_json(header["spec"])


def _foreign_spec(
    path: Path, arrays: Mapping[str, NDArray[Any]], keys: list[str], control_dt: float | None
) -> DatasetSpec:
    if not keys:
        raise DatasetError(f"the store {path} has no observations: data/ holds no array but {ACTION}")
    note = "" if control_dt is not None else f", control_dt {FOREIGN_CONTROL_DT} s assumed"
    return DatasetSpec(
        {key: ArraySpec(arrays[key].shape[1:], str(arrays[key].dtype)) for key in keys},
        action_dim=int(np.prod(arrays[ACTION].shape[1:])),
        control_dt=control_dt if control_dt is not None else FOREIGN_CONTROL_DT,
        source=f"{path.name} (replay buffer of diffusion_policy{note})",
    )
