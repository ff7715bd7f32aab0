"""Chunks of a Zarr array that are read without zarr: each is one file, decoded straight to where its rows belong."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.metadata import ArrayV2Metadata

from scd_robot.errors import DatasetError

__all__ = ["PlainChunks"]


@dataclass(frozen=True)
class PlainChunks:
    """Rows of an array of format 2 in a folder, whose chunks are cut along the first axis only.

    Such an array is read several times as fast without zarr's scheduling of requests: a chunk is one file, decoded
    straight to where its rows belong.
    """

    folder: Path
    chunk_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    codec: Any

    @classmethod
    def of(cls, folder: Path, array: zarr.Array) -> "PlainChunks | None":
        """None where the array is of another kind, which zarr has to read."""
        metadata = array.metadata
        if not isinstance(metadata, ArrayV2Metadata) or not folder.is_dir():
            return None
        plain = metadata.order == "C" and not metadata.filters and metadata.dimension_separator == "."
        if not plain or array.chunks[1:] != array.shape[1:] or array.dtype.byteorder == ">":
            return None
        return cls(folder, array.chunks, array.dtype, metadata.compressor)

    def read_into(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Rows `start` up to `stop` into `out` (stop - start, ...)."""
        size = self.chunk_shape[0]
        for number in range(start // size, -(-stop // size)):
            first = number * size
            low, high = max(start, first), min(stop, first + size)
            file = self.folder / ".".join([str(number)] + ["0"] * (len(self.chunk_shape) - 1))
            self._read(file, low - first, out[low - start : high - start])

    def _read(self, file: Path, skipped: int, out: NDArray[Any]) -> None:
        """Rows of a chunk into `out`, but for the first `skipped`; a file that holds too little is damaged."""
        row_bytes = out.nbytes // len(out)
        expected = self.chunk_shape[0] * row_bytes
        if self.codec is None:
            with file.open("rb", buffering=0) as raw:
                found = os.fstat(raw.fileno()).st_size
                raw.seek(skipped * row_bytes)
                found -= out.nbytes - raw.readinto(out.data.cast("B"))
        else:
            decoded = np.frombuffer(self.codec.decode(file.read_bytes()), np.uint8)
            found = decoded.size
            if found == expected:
                out[:] = decoded.view(self.dtype).reshape(self.chunk_shape)[skipped : skipped + len(out)]
        if found != expected:
            raise DatasetError(f"{file} holds {found} bytes, its chunk has {expected}; damaged")
