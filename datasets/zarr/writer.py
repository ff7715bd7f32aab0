"""Writes episodes into a Zarr store (Zarr format 2, so zarr 2 and diffusion_policy read it as well).

    data/KEY                 (N, ...) all episodes one after the other: observation keys, `action`, and what else was
                             recorded
    meta/episode_ends        (E,) int64, cumulative
    meta/episode_NAME        (E,) float64, number noted about each episode
    meta/text_NAME           bytes (UTF-8) of the texts noted about the episodes, one after the other
    meta/text_NAME_ends      (E,) int64, cumulative
    attribute `scd_robot`    schema number, specification, metadata

Chunks are compressed by blosc's zstd, but for images that do not shrink to a quarter or less.

An episode exists once its end stands in `episode_ends`, which is written last; each file is written beside and renamed
(by zarr, since 3.1.3). So whatever kills a recording, the store opens and holds the finished episodes.
"""

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zarr
from numcodecs import Blosc
from numpy.typing import NDArray
from zarr.core.sync import sync

from scd_robot.datasets.float32 import as_float32
from scd_robot.datasets.schema import ACTION, EXECUTED_ACTION, REWARD, EpisodeDataset
from scd_robot.datasets.zarr.files import ATTRIBUTE, ENDS, UNWRITTEN, is_zarr_group
from scd_robot.errors import ConfigError, OutputError, ShapeError
from scd_robot.output import check_local, dataset_output, replace_folder
from scd_robot.types import ArraySpec, DatasetSpec

__all__ = ["SCHEMA", "ZarrWriter"]

logger = logging.getLogger(__name__)

SCHEMA = 1

_CHUNK_BYTES = 1 << 20
_CHUNK_ROWS = 4096
_WORTHWHILE = 4  # times that images must shrink to be compressed
_EXACT = 1 << 53  # whole numbers below this are exact in float64


class ZarrWriter:
    """Writes a store episode by episode; a context manager.

    Without `overwrite` the store grows at `path` itself. With it the new store grows beside and takes the place of the
    old one when the block ends without an exception. If the block ends by an exception, the finished episodes are kept
    (a new store without any is removed), unless `whole` is set.
    """

    def __init__(
        self,
        path: Path | str,
        spec: DatasetSpec,
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        whole: bool = False,
    ) -> None:
        """Touches nothing yet.

        Args:
            path: of the new store, a folder.
            spec: of the episodes to come.
            metadata: about the whole, plain JSON types; `update_metadata` adds to it.
            overwrite: replace a store at `path`.
            whole: all or nothing: the store grows beside, and is removed if the block ends by an exception. For copies,
                which can be made again; a recording is worth keeping as far as it got.

        Raises:
            ConfigError: a key cannot be the name of an array, or its dtype is not stored.
        """
        self.path = Path(path)
        self.spec = spec
        self.metadata = dict(metadata or {})
        self.num_episodes = 0
        self.num_steps = 0
        self._overwrite, self._whole = overwrite, whole
        self._folder = self.path  # where the store grows
        self._group: zarr.Group | None = None
        self._extras: dict[str, ArraySpec] | None = None  # arrays that are no observations, known by the first episode
        self._notes: dict[str, list[str]] | None = None  # names of `info` and `text`, known by the first episode
        self._text_ends: dict[str, list[int]] = {}
        self._arrays: dict[str, Any] = {}  # opened anew they would forget to write chunks of zeros
        for key, array in spec.observation.items():
            if key in (ACTION, EXECUTED_ACTION):
                raise ConfigError(f"{key!r} cannot be an observation key in a Zarr store; rename it")
            _check_name(key)
            if array.dtype != "float32" and not (array.dtype == "uint8" and len(array.shape) > 1):
                raise ConfigError(f"{key!r} must be float32, or uint8 for an image, got {array.dtype} {array.shape}")

    def __enter__(self) -> Self:
        """Creates the empty store.

        Raises:
            OutputError: something is at `path` already, or it cannot be written.
        """
        with dataset_output(self.path):
            self._make_folder()
            try:
                self._group = zarr.open_group(self._folder, mode="w", zarr_format=2)
                self._group.create_group("data")
                self._write_attributes()
                self._group.create_group("meta")
                self._write(f"meta/{ENDS}", 0, np.empty(0, "<i8"), UNWRITTEN)
            except BaseException:
                _remove(self._folder)
                raise
        return self

    def append(
        self,
        episode: Mapping[str, NDArray[Any]],
        info: Mapping[str, int | float] | None = None,
        text: Mapping[str, str] | None = None,
        number: int | None = None,
    ) -> None:
        """Adds one episode.

        Args:
            episode: (T, ...) by key with T >= 2: the observation keys, `action` (T, Da), and other arrays of numbers,
                the same ones in all episodes (`executed_action` (T, Da), `sim_state`, `reward`, ...). The first episode
                decides the type of these; whole numbers in a `reward` or a list are stored as float64.
            info: numbers about this episode, the same names in all of them; they become `meta/episode_NAME`.
            text: texts about this episode, the same names in all of them; they become `meta/text_NAME`.
            number: what messages call the episode, where it comes from another recording; None = as the store counts.

        Raises:
            ShapeError: keys, shapes or notes are not those of the specification and of the first episode, or numbers
                are not what their type can hold; nothing of the episode is written.
            DatasetError: the episode is too short, or holds NaN or infinite values.
            OutputError: the disk is full or refuses; the earlier episodes are kept.
        """
        if self._group is None:
            raise OutputError(f"the store {self.path} is not open for writing; use it in a `with` statement")
        numbers, texts = self._checked_info(info or {}), _checked_text(text or {}, self._next)
        names = {kind: self._check_names(kind, notes) for kind, notes in (("info", numbers), ("text", texts))}
        arrays = self._checked(episode, self.num_episodes if number is None else number)
        self._notes = names
        length = len(arrays[ACTION])
        with dataset_output(self.path, self.num_episodes):
            for key, array in arrays.items():
                self._write(f"data/{key}", self.num_steps, array, np.nan if array.dtype.kind == "f" else 0)
            for name, value in numbers.items():
                self._write(f"meta/episode_{name}", self.num_episodes, value, 0)
            for name, encoded in texts.items():
                self._write_text(name, encoded)
            self._write(f"meta/{ENDS}", self.num_episodes, np.asarray([self.num_steps + length]), UNWRITTEN)
        self.num_episodes += 1
        self.num_steps += length

    def update_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Adds to the metadata; written at once.

        Raises:
            OutputError: the disk is full or refuses.
        """
        self.metadata.update(metadata)
        with dataset_output(self.path, self.num_episodes):
            self._write_attributes()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keeps the finished episodes; after a block without exception a replaced store is swapped in."""
        self._group = None
        if self.num_episodes == 0 or (self._whole and error is not None):
            _remove(self._folder)
            return
        try:
            self._trim()
        except OSError as failure:  # a full disk, most likely, and why the block ended; readers trim by themselves
            logger.warning("the end of %s could not be trimmed: %s", self._folder, failure)
        if self._folder != self.path:
            if error is None:
                with dataset_output(self.path):
                    replace_folder(self._folder, self.path)
            else:
                logger.warning("%s is as it was; %d new episodes are in %s", self.path, self.num_episodes, self._folder)

    @property
    def _next(self) -> str:
        """The episode to come, in messages."""
        return f"episode {self.num_episodes} for {self.path}"

    def _make_folder(self) -> None:
        check_local(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        exists = self.path.exists() or self.path.is_symlink()
        if exists and not self._overwrite:
            raise OutputError(f"{self.path} exists already; choose another path, or overwrite it with --overwrite")
        if exists and not is_zarr_group(self.path):
            raise OutputError(f"{self.path} is not a Zarr store and will not be replaced; choose another path")
        if not exists and not self._whole:
            self.path.mkdir()
            return
        self._folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        self._folder.chmod(0o755)

    def _write_attributes(self) -> None:
        assert self._group is not None
        self._group.attrs[ATTRIBUTE] = {"schema": SCHEMA, "spec": self.spec.to_json(), "metadata": self.metadata}

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
                compressors=_choose_codec(rows),
                fill_value=fill,
                config={"write_empty_chunks": True},
            )
        array = self._arrays[name]
        array.resize((start + len(rows), *rows.shape[1:]))
        array[start:] = rows

    def _write_text(self, name: str, encoded: NDArray[np.uint8]) -> None:
        """Adds one episode's text, behind those of the episodes that exist."""
        begin = self._text_ends.get(name, [0] * (self.num_episodes + 1))[: self.num_episodes + 1]
        self._write(f"meta/text_{name}", begin[-1], encoded, 0)
        self._text_ends[name] = [*begin, begin[-1] + len(encoded)]
        self._write(f"meta/text_{name}_ends", self.num_episodes, np.asarray(self._text_ends[name][-1:]), UNWRITTEN)

    def _checked_info(self, info: Mapping[str, int | float]) -> dict[str, NDArray[Any]]:
        """The numbers (1,) by name: float64, or whole where the first one is too large to be exact in that."""
        numbers = {}
        for name, value in info.items():
            _check_name(name)
            if f"episode_{name}" == ENDS:
                raise ConfigError(f"{name!r} cannot be the name of a note in a Zarr store; rename it")
            number, array = np.asarray(value), self._arrays.get(f"meta/episode_{name}")
            if number.ndim or number.dtype.kind not in "biuf":
                raise ShapeError(f"{name!r} of {self._next} must be a number, got {value!r}; note it in `text`")
            dtype = number.dtype if number.dtype.kind in "iu" and abs(int(number)) >= _EXACT else np.dtype(np.float64)
            with np.errstate(invalid="ignore"):
                stored = number.astype(dtype if array is None else array.dtype)
            if stored.item() != number.item() and not np.isnan(stored):
                raise ShapeError(
                    f"{name!r} of {self._next} must be a number that {stored.dtype} holds, as in the first episode, "
                    f"got {value!r}; note it in `text`"
                )
            numbers[name] = stored[None]
        return numbers

    def _check_names(self, kind: str, notes: Mapping[str, Any]) -> list[str]:
        """The names of an episode's notes; raises ShapeError where the first one's are others."""
        names = sorted(notes)
        if self._notes is not None and names != self._notes[kind]:
            raise ShapeError(
                f"`{kind}` of {self._next} must have the names {self._notes[kind]} of the first episode, got {names}; "
                "note the same about all"
            )
        return names

    def _checked(self, episode: Mapping[str, NDArray[Any]], number: int) -> dict[str, NDArray[Any]]:
        """The arrays in the dtypes of the specification, after the checks that a reader makes."""
        specs = {**self.spec.observation, ACTION: ArraySpec((self.spec.action_dim,))}
        if self._extras is None:
            specs |= {key: _extra_spec(key, array) for key, array in episode.items() if key not in specs}
        else:
            specs |= self._extras
        if EXECUTED_ACTION in specs:
            specs[EXECUTED_ACTION] = specs[ACTION]
        if set(episode) != set(specs):
            raise ShapeError(f"an episode for {self.path} must have the keys {sorted(specs)}, got {sorted(episode)}")
        arrays = {key: _as_stored(f"{key!r} of {self._next}", episode[key], spec) for key, spec in specs.items()}
        length = len(arrays[ACTION])
        for key, spec in specs.items():
            if arrays[key].shape != (length, *spec.shape):
                raise ShapeError(f"{key!r} must be {(length, *spec.shape)}, got {arrays[key].shape}")
        EpisodeDataset(self.spec, np.asarray([length]), arrays, numbers=np.asarray([number])).check(
            f"what is written to {self.path}"
        )
        self._extras = {key: spec for key, spec in specs.items() if key not in self.spec.observation and key != ACTION}
        return arrays

    def _trim(self) -> None:
        """Cuts off what an unfinished `append` left, since diffusion_policy wants all lengths to agree."""
        for name, array in self._arrays.items():
            rows = self.num_steps if name.startswith("data/") else self.num_episodes
            if name.startswith("meta/text_") and not name.endswith("_ends"):
                rows = self._text_ends[name.removeprefix("meta/text_")][self.num_episodes]
            if array.shape[0] > rows:
                array.resize((rows, *array.shape[1:]))


def _choose_codec(rows: NDArray[Any]) -> Blosc | None:
    """None for images that hardly shrink: a camera's would be read several times as slowly, to save little."""
    codec = Blosc(cname="zstd", clevel=5, shuffle=Blosc.SHUFFLE)
    if rows.dtype != np.uint8 or rows.ndim < 3 or not rows.size:
        return codec
    some = np.ascontiguousarray(rows[: max(1, _CHUNK_BYTES * len(rows) // rows.nbytes)])
    return codec if _WORTHWHILE * len(codec.encode(some)) <= some.nbytes else None


def _check_name(key: str) -> None:
    if not key or "/" in key or "\\" in key or key.startswith("."):
        raise ConfigError(f"{key!r} cannot be the name of an array in a Zarr store; rename it")


def _checked_text(text: Mapping[str, str], episode: str) -> dict[str, NDArray[np.uint8]]:
    """The texts by name, in UTF-8."""
    for name, words in text.items():
        _check_name(name)
        if not isinstance(words, str):
            raise ShapeError(f"{name!r} of {episode} must be a text, got {words!r}; note numbers in `info`")
        if f"{name}_ends" in text:
            raise ConfigError(f"{name + '_ends'!r} cannot be the name of a text beside {name!r}; rename it")
    # Halves of a character, which some JSON holds, have no UTF-8: they become question marks.
    return {name: np.frombuffer(words.encode(errors="replace"), np.uint8) for name, words in text.items()}


def _extra_spec(key: str, values: Any) -> ArraySpec:
    """Of an array that is no observation: stored as it comes.

    But whole numbers that a later episode may well have fractions of become float64, where they are exact.
    """
    _check_name(key)
    array = np.asarray(values)
    if array.dtype.kind not in "biuf" or array.ndim == 0:
        raise ShapeError(f"{key!r} must hold numbers, one row per control step, got {array.dtype} {array.shape}")
    dtype = str(array.dtype)
    if array.dtype.kind in "iu" and (key == REWARD or not isinstance(values, np.ndarray)):
        dtype = "float64" if np.abs(array.astype(np.float64)).max(initial=0) < _EXACT else dtype
    return ArraySpec(array.shape[1:], dtype)


def _as_stored(name: str, values: Any, spec: ArraySpec) -> NDArray[Any]:
    """The numbers in the type that the store has for them; raises ShapeError where more than rounding is lost."""
    array, dtype = np.asarray(values), np.dtype(spec.dtype)
    if array.dtype == dtype:
        return array
    if array.dtype.kind not in "biuf":
        raise ShapeError(f"{name} must hold numbers, got {array.dtype} {array.shape}")
    with np.errstate(over="ignore", invalid="ignore"):  # what gets infinite is refused later, what gets another is here
        stored = as_float32(array, name) if dtype == np.float32 else array.astype(dtype)
    rounds = dtype.kind == "f" and dtype.itemsize >= 4
    if rounds or np.array_equal(stored, array):
        return stored
    low, high = array.min(), array.max()
    mend = f"give it as {array.dtype} from the first episode on"
    if dtype == np.uint8 and len(spec.shape) > 1:
        whole = f"give np.round({'255 * ' if high <= 1 else ''}picture).astype(np.uint8)"
        mend = whole if low >= 0 and high <= 255 else "bring pictures to 0 to 255"
    raise ShapeError(
        f"{name} must be {dtype}, got {array.dtype} of {low:g} to {high:g}, which that cannot hold: {mend}"
    )


def _remove(folder: Path) -> None:
    """Removes a store that zarr may still be writing to.

    Zarr writes several files at once and gives up at the first that fails, so the others can appear later.
    """

    async def others() -> None:
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

    sync(others())
    shutil.rmtree(folder, ignore_errors=True)
