"""Arrays of a Zarr group, wherever it lies: in a folder, in a zip archive, or at an address that fsspec knows.

Zarr takes a chunk that is not there for one of nothing but fill values. Here a lost chunk is an error.
"""

import contextlib
import hashlib
import logging
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import zarr
from numcodecs.errors import UnknownCodecError
from numpy.typing import NDArray
from zarr.storage import FsspecStore, ZipStore

from scd_robot.datasets.formats import ReadOptions
from scd_robot.datasets.lazy import LazyArray
from scd_robot.datasets.zarr.plain_chunks import PlainChunks
from scd_robot.errors import DatasetError, MissingDependencyError

__all__ = [
    "ATTRIBUTE",
    "ENDS",
    "UNWRITTEN",
    "ZarrFiles",
    "ZarrRows",
    "is_address",
    "is_zarr_group",
    "read_ends",
    "read_errors",
]

logger = logging.getLogger(__name__)

ATTRIBUTE = "scd_robot"  # of the group, in stores of ours
ENDS = "episode_ends"
UNWRITTEN = -1  # stands in episode_ends of ours between its growth and the writing of the value

MAX_CHUNK_BYTES = 1 << 30
MAX_RATIO = 1000  # of the sizes of a zip archive's member before and after: more is a bomb, and so is more than a chunk
_PLAIN_BYTES = 1 << 26  # members up to this size may shrink as they like

# What zarr, numcodecs, zipfile and json raise on damaged files.
_READ_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    SystemError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
)


def is_address(path: Path | str) -> bool:
    """Whether `path` is for fsspec (s3://bucket/x.zarr), not for the file system."""
    return isinstance(path, str) and "://" in path


def is_zarr_group(path: Path) -> bool:
    """Whether the folder `path` is the root of a Zarr group, of format 2 or 3."""
    return (path / ".zgroup").is_file() or (path / "zarr.json").is_file()


@contextlib.contextmanager
def read_errors(what: Path | str) -> Iterator[None]:
    """Turns whatever a library raises on damaged files into a `DatasetError` about `what`."""
    try:
        yield
    except _READ_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise DatasetError(
            f"{what} cannot be read ({type(error).__name__}: {reason}); it is damaged, or of a kind that is not read"
        ) from error


@dataclass(frozen=True)
class ZarrFiles:
    """A group that is opened whenever it is needed: it may have grown.

    Attributes:
        address: folder, zip archive, or fsspec address.
        cache: folder that keeps what was read from an address; None = nothing is kept.
        fill_missing: take chunks that are not there for fill values, as zarr does.
    """

    address: str
    cache: str | None = None
    fill_missing: bool = False

    @classmethod
    def at(cls, address: str, options: ReadOptions) -> "ZarrFiles":
        """As the options say; what is kept of an address is of its files as they are now, and of no earlier ones."""
        cache = options.cache
        if cache is not None and is_address(address):
            with read_errors(address):
                cache = str(Path(cache) / _remote_fingerprint(address))
        return cls(address, cache, options.fill_missing)

    @property
    def name(self) -> str:
        """Last part of the address."""
        return PurePosixPath(self.address.split("://")[-1]).name

    def attributes(self) -> dict[str, Any]:
        """Of the group.

        Raises:
            DatasetError: not a Zarr group, or damaged.
        """
        with read_errors(self.address):
            return dict(_open(self).attrs.asdict())

    def names(self, folder: str) -> list[str]:
        """Names of the arrays in a subgroup, none of them opened: zarr gives up on all if it cannot read one."""
        headers = (".zarray", "zarr.json")
        below = (name.removeprefix(f"{folder}/") for name in self._listing(folder))
        found = {parts[0] for name in below if len(parts := name.split("/")) == 2 and parts[1] in headers}
        return sorted(found)

    def array(self, name: str) -> zarr.Array:
        """An array of numbers.

        Raises:
            DatasetError: not there, a group, or of anything but numbers.
        """
        with read_errors(f"{self.address}/{name}"):
            try:
                array = _open(self)[name]
            except UnknownCodecError as error:
                _register_image_codecs(f"{self.address}/{name}", error)
                array = _open(self)[name]
            if not isinstance(array, zarr.Array):
                raise DatasetError(f"{name} of {self.address} is a group; expected an array")
            codecs = [*(array.filters or ()), *(array.compressors or ())]
        # Zarr 2 could pickle objects; unpickling a file runs whatever code is in it.
        if array.dtype.kind not in "biuf" or any(getattr(codec, "codec_id", "") == "pickle" for codec in codecs):
            raise DatasetError(
                f"{name} of {self.address} holds {array.dtype} objects, which are not read; store numbers, or name "
                "other keys with --keys"
            )
        if array.ndim == 0:
            raise DatasetError(f"{name} of {self.address} is a single number; expected one row per control step")
        chunk = array.shards or array.chunks
        if int(np.prod(chunk, dtype=object)) * array.dtype.itemsize > MAX_CHUNK_BYTES:
            raise DatasetError(
                f"{name} of {self.address} has chunks {chunk} of over {MAX_CHUNK_BYTES >> 30} GiB; damaged"
            )
        return array

    def rows(self, name: str, count: int | None = None, exact: bool = False) -> "ZarrRows":
        """The first `count` rows of an array (None = all), read when they are indexed.

        Args:
            name: of the array.
            count: rows wanted.
            exact: the array must have so many, no more.

        Raises:
            DatasetError: not an array of numbers, other rows than wanted, or chunks are missing.
        """
        array = self.array(name)
        length = array.shape[0] if count is None else count
        if array.shape[0] < length or (exact and array.shape[0] != length):
            raise DatasetError(
                f"{name} of {self.address} has {array.shape[0]} rows, but its episodes have {length} by meta/{ENDS}: "
                "one of the two is damaged; where other arrays fit, name those with --keys"
            )
        whole = not self.fill_missing and self._check_chunks(name, array, length)
        return ZarrRows(self, name, (length, *array.shape[1:]), array.dtype, whole)

    def _check_chunks(self, name: str, array: zarr.Array, rows: int) -> bool:
        """Refuses lost chunks; True where all are there.

        Writers may leave out chunks of nothing but fill values. That is believed of a chunk if the row before it or the
        row after it is such, and some chunk is there.
        """
        chunk = array.shards or array.chunks
        others = [-(-size // step) for size, step in zip(array.shape[1:], chunk[1:], strict=True)]
        there = self._listing(name)
        indices = list(np.ndindex(-(-rows // chunk[0]), *others)) if 0 not in array.shape else []
        missing = [index for index in indices if f"{name}/{array.metadata.encode_chunk_key(index)}" not in there]
        for index in missing:
            begin, end = index[0] * chunk[0], min(rows, (index[0] + 1) * chunk[0])
            beside = [row for row in (begin - 1, end) if 0 <= row < rows]
            with read_errors(f"{self.address}/{name}"):
                filled = any((np.asarray(array[row]) == array.fill_value).all() for row in beside)
            if not filled or len(missing) == len(indices):
                raise DatasetError(
                    f"{self.address}/{name} has lost its chunk {array.metadata.encode_chunk_key(index)}: the dataset "
                    "is damaged, copy or record it again (if its writer leaves out chunks of nothing but "
                    f"{array.fill_value}, open it with --fill-missing)"
                )
        if missing:
            taken = f"{len(missing)} chunks are not there; taken for {array.fill_value}, as rows beside them are"
            logger.warning("%s/%s: %s", self.address, name, taken)
        return not missing

    def _listing(self, folder: str) -> set[str]:
        """Names of all files below a subgroup, relative to the group."""
        with read_errors(self.address):
            if is_address(self.address):
                return _remote_listing(self.address, folder)
            if Path(self.address).is_file():
                with zipfile.ZipFile(self.address) as archive:
                    return {name for name in archive.namelist() if name.startswith(f"{folder}/")}
            return _local_listing(Path(self.address), folder)


class ZarrRows(LazyArray):
    """Rows of an array in `files`; opened anew in each process."""

    def __init__(
        self, files: ZarrFiles, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], whole: bool = False
    ) -> None:
        super().__init__(shape, dtype)
        self._files, self._name, self._whole = files, name, whole
        self._opened: tuple[int, Any] | None = None  # by which process, and what

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """See `LazyArray.read`; raises DatasetError where the files are damaged."""
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        self.read_into(start, stop, out)
        return out

    def read_into(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """See `LazyArray.read_into`."""
        with read_errors(f"{self._files.address}/{self._name}"):
            if self._opened is None or self._opened[0] != os.getpid():
                array = self._files.array(self._name)
                folder = Path(self._files.address) / self._name
                plain = PlainChunks.of(folder, array) if self._whole else None
                self._opened = (os.getpid(), plain or array)
            opened = self._opened[1]
            if isinstance(opened, PlainChunks):
                opened.read_into(start, stop, out)
            else:
                out[:] = opened[start:stop]


def read_ends(files: ZarrFiles, unfinished: bool) -> NDArray[np.int64]:
    """(E,) ends of the finished episodes; `unfinished` allows the mark of an episode that was being written."""
    if ENDS not in files.names("meta"):
        raise DatasetError(f"{files.address} has no array meta/{ENDS}; it is not a recording, or a damaged one")
    ends = files.rows(f"meta/{ENDS}")[:]
    if ends.ndim != 1 or ends.dtype.kind not in "iu":
        raise DatasetError(f"meta/{ENDS} of {files.address} must be integers (E,), got {ends.dtype} {ends.shape}")
    ends = ends.astype(np.int64)
    if unfinished and len(ends) and ends[-1] == UNWRITTEN:  # killed between the growth of episode_ends and its value
        ends = ends[:-1]
    if (np.diff(ends, prepend=0) <= 0).any():
        raise DatasetError(
            f"meta/{ENDS} of {files.address} must increase from above 0, got {ends[:8].tolist()}...: they are ends of "
            "episodes, counted over all rows; of lengths np.cumsum makes them, and a 0 at the beginning is left out"
        )
    return ends


def _register_image_codecs(what: str, error: UnknownCodecError) -> None:
    """Makes the codecs of imagecodecs known to numcodecs; diffusion_policy stores images as JPEG 2000 by them."""
    if "imagecodecs" not in str(error):
        raise error
    try:
        from imagecodecs.numcodecs import register_codecs
    except ImportError as missing:
        raise MissingDependencyError(
            f"{what} holds images in the codec {str(error).split()[-1]}; to read them: pip install imagecodecs"
        ) from missing
    register_codecs(verbose=False)


def _open(files: ZarrFiles) -> zarr.Group:
    if is_address(files.address):
        return zarr.open_group(_remote_store(files), mode="r")
    path = Path(files.address)
    if path.is_file():
        _check_archive(path)
        return zarr.open_group(ZipStore(path, mode="r"), mode="r")
    return zarr.open_group(path, mode="r")


def _remote_store(files: ZarrFiles) -> FsspecStore:
    try:
        if files.cache is None:
            return FsspecStore.from_url(files.address, read_only=True)
        options = {"simplecache": {"cache_storage": files.cache}}
        return FsspecStore.from_url(f"simplecache::{files.address}", storage_options=options, read_only=True)
    except ImportError as error:
        protocol = files.address.split("://")[0]
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}.get(protocol, "fsspec")
        raise MissingDependencyError(
            f"{files.address} needs the package {package}: pip install 'scd_robot[formats]' {package}"
        ) from error


def _remote_fingerprint(address: str) -> str:
    """Changes with the names, sizes, times and checksums that the address tells of its files."""
    import fsspec

    filesystem, root = fsspec.url_to_fs(address)
    filesystem.invalidate_cache()
    found = sorted(filesystem.find(root, detail=True).items())
    return hashlib.sha256(repr([(name, sorted(info.items())) for name, info in found]).encode()).hexdigest()[:16]


def _local_listing(root: Path, folder: str) -> set[str]:
    """Follows links to folders: a large array may lie on another disk."""
    found, walked = set(), set()
    for place, folders, files in os.walk(root / folder, followlinks=True):
        real = os.path.realpath(place)
        if real in walked:  # a link that leads back
            folders.clear()
            continue
        walked.add(real)
        found |= {(Path(place) / name).relative_to(root).as_posix() for name in files}
    return found


def _remote_listing(address: str, folder: str) -> set[str]:
    import fsspec

    filesystem, root = fsspec.url_to_fs(address)
    found = filesystem.find(f"{root.rstrip('/')}/{folder}")
    prefix = root.strip("/") + "/"
    return {name.strip("/").removeprefix(prefix) for name in found}


def _check_archive(path: Path) -> None:
    """Refuses archives without a group, members that would leave the folder, and bombs."""
    with zipfile.ZipFile(path) as archive:
        if not {".zgroup", "zarr.json"} & set(archive.namelist()):
            tops = sorted({name.split("/")[0] for name in archive.namelist()})
            raise DatasetError(
                f"{path} holds no Zarr group at its top, but {', '.join(tops[:4]) or 'nothing'}; pack what is in the "
                "group's folder, not the folder itself"
            )
        for member in archive.infolist():
            parts = PurePosixPath(member.filename)
            if parts.is_absolute() or ".." in parts.parts:
                raise DatasetError(f"{path} holds a member {member.filename!r} that leaves its folder; refused")
            shrunk = member.file_size > MAX_RATIO * max(1, member.compress_size)
            if member.file_size > (_PLAIN_BYTES if shrunk else MAX_CHUNK_BYTES + _PLAIN_BYTES):
                raise DatasetError(
                    f"{path} holds a member {member.filename!r} of {member.file_size} bytes packed into "
                    f"{member.compress_size}; refused as a zip bomb"
                )
