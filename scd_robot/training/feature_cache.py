"""Feature maps of a frozen backbone, computed once in a run instead of in every training step.

They lie beside the run's checkpoints, in a file for each camera that numpy maps into memory; an interrupted run that is
resumed finds them there. Only training reads them: a policy is shown pictures, and its backbone runs.

Shapes: N control steps of the dataset, H W C picture, h w F its feature map.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from scd_robot.datasets import EpisodeDataset
from scd_robot.datasets.lazy import RowArray
from scd_robot.errors import ConfigError, OutputError
from scd_robot.nn import Backbone

__all__ = ["with_cached_features"]

logger = logging.getLogger(__name__)

_BATCH = 64  # pictures encoded at once


def with_cached_features(
    data: EpisodeDataset,
    backbone: Backbone,
    folder: Path,
    fingerprint: str,
    *,
    most_gb: float,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> EpisodeDataset:
    """The dataset with its pictures (N, H, W, C) replaced by feature maps (N, h, w, F) float16; each is encoded once.

    Args:
        data: the episodes, after the transforms of single control steps.
        backbone: frozen, with the weights that it will have.
        folder: of the files; what was computed there from the same data by the same weights is used again.
        fingerprint: of the data.
        most_gb: maps that together take no more than this are kept in memory.
        device: that encodes; the backbone comes back from it.
        progress: show a bar.

    Raises:
        ConfigError: features are too large for float16.
        OutputError: the files cannot be written.
    """
    made_of, came_from = {"dataset": fingerprint, "backbone": backbone.digest()}, backbone.mean.device
    arrays: dict[str, RowArray] = dict(data.arrays)
    backbone.to(device)
    try:
        for key, map_shape in backbone.map_shapes.items():
            file = folder / f"{quote(key, safe='')}.npy"
            wanted = {**made_of, "shape": [data.num_steps, *map_shape]}
            if not _is_there(file, wanted):
                logger.info("features of %r are computed once, into %s", key, file)
                _write(file, data.arrays[key], key, backbone, wanted, progress)
            arrays[key] = np.load(file, mmap_mode="r")
    finally:
        backbone.to(came_from)
    if sum(arrays[key].nbytes for key in backbone.map_shapes) / 1e9 <= most_gb:
        arrays |= {key: np.array(arrays[key]) for key in backbone.map_shapes}
    return replace(data, arrays=arrays)


def _is_there(file: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a file was finished, and is of these pictures and weights."""
    told = file.with_suffix(".json")
    if not (file.is_file() and told.is_file()):
        return False
    found: bool = json.loads(told.read_text()) == wanted
    return found


def _write(
    file: Path, pictures: RowArray, key: str, backbone: Backbone, wanted: Mapping[str, Any], progress: bool
) -> None:
    """Encodes all pictures of a camera; what makes the file valid is written last."""
    beside = file.with_name(f".{file.name}.{os.getpid()}.partial")  # several processes may train together
    told = beside.with_suffix(".json")
    header = {"descr": "<f2", "fortran_order": False, "shape": tuple(wanted["shape"])}
    with _writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = beside.open("wb")  # not mapped: a full disk would kill the process
    try:
        with stream:
            with _writing(file.parent):
                np.lib.format.write_array_header_1_0(stream, header)
            for start in tqdm(range(0, len(pictures), _BATCH), desc=f"features of {key}", disable=not progress):
                features = _encoded(pictures[start : start + _BATCH], key, backbone)
                with _writing(file.parent):
                    stream.write(features.astype("<f2").tobytes())
                    stream.flush()
        with _writing(file.parent):
            told.write_text(json.dumps(wanted))
            file.with_suffix(".json").unlink(missing_ok=True)  # or, killed here, it would vouch for the new file
            beside.replace(file)
            told.replace(file.with_suffix(".json"))
    finally:
        beside.unlink(missing_ok=True)
        told.unlink(missing_ok=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What fails within was to be written there."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write features to {folder}: {error.strerror or error}; choose another --out, or set "
            "training.cache_features=false"
        ) from error


def _encoded(pictures: NDArray[Any], key: str, backbone: Backbone) -> NDArray[np.float16]:
    with torch.inference_mode():
        features = backbone(torch.from_numpy(np.ascontiguousarray(pictures)).to(backbone.mean.device))
        found: NDArray[np.float16] = features.half().cpu().numpy()
    if not np.isfinite(found).all():
        raise ConfigError(
            f"features that backbone {backbone.name} makes of {key!r} do not fit float16; set "
            "training.cache_features=false"
        )
    return found
