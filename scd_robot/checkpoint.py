"""Checkpoint folders: written beside and renamed, read strictly, no pickle.

    step_00002000/
        manifest.json        format, schema, policy type, step, versions, SHA-256 of all other files
        model.safetensors    weights (exponential moving average)
        config.json          resolved experiment, can be run again
        dataset.json         observation keys and shapes, action width, control rate
        normalization.json   statistics and mode per key
        origin.json          what it was trained from: fingerprint of the dataset, weights it started from
        metrics.json         validation and training metrics at this step
        resume/              what only training needs (absent in a published checkpoint)

A training run keeps its checkpoints in RUN/checkpoints; wherever a checkpoint is expected, the run's folder does as
well and stands for the newest one.
"""

import json
import logging
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scd_robot.errors import CheckpointError, OutputError
from scd_robot.normalization import Normalizer
from scd_robot.output import file_digest, package_versions, to_plain
from scd_robot.types import DatasetSpec

__all__ = [
    "PUBLISHED_FILES",
    "SCHEMA",
    "Checkpoint",
    "find_checkpoint",
    "list_checkpoints",
    "read_checkpoint",
    "read_step",
    "resume_file",
    "write_checkpoint",
]

logger = logging.getLogger(__name__)

SCHEMA = 9
_FORMAT = "scd_robot checkpoint"
_JSON_FILES = ("config", "dataset", "normalization", "origin", "metrics")
PUBLISHED_FILES = ("manifest.json", "model.safetensors", *(f"{name}.json" for name in _JSON_FILES))
_PACKAGES = ("scd_robot", "torch", "lightning", "numpy", "zarr", "safetensors", "timm")


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a checkpoint folder.

    Attributes:
        path: the folder.
        policy: policy type, a name of the policy registry.
        step: training steps taken.
        config: resolved experiment, as JSON.
        dataset: what the policy was trained on.
        normalizer: statistics and modes.
        weights: tensors by name, on the CPU.
        origin: what it was trained from.
        metrics: numbers by name.
        versions: of python and packages, when it was written.
        weights_sha256: of the file of the weights; tells checkpoints apart.
        schema: of the files as they are; `config` has the fields of the newest.
    """

    path: Path
    policy: str
    step: int
    config: dict[str, Any]
    dataset: DatasetSpec
    normalizer: Normalizer
    weights: dict[str, Tensor]
    origin: dict[str, Any]
    metrics: dict[str, Any]
    versions: dict[str, str]
    weights_sha256: str
    schema: int


def write_checkpoint(
    folder: Path,
    *,
    policy: str,
    step: int,
    config: Mapping[str, Any],
    dataset: DatasetSpec,
    normalizer: Normalizer,
    weights: Mapping[str, Tensor],
    origin: Mapping[str, Any],
    metrics: Mapping[str, Any],
    write_resume: Callable[[Path], None] | None = None,
) -> None:
    """Writes `folder` in one piece: it is there complete or not at all.

    Args:
        folder: must not exist.
        policy: policy type.
        step: training steps taken.
        config: resolved experiment.
        dataset: what the policy was trained on.
        normalizer: statistics and modes.
        weights: tensors by name.
        origin: what it was trained from, as JSON.
        metrics: numbers by name; NaN and infinite ones become null.
        write_resume: called with the folder `resume` to fill it.

    Raises:
        OutputError: the folder exists or cannot be written; what was there before is untouched.
    """
    if folder.exists():
        raise OutputError(f"checkpoint {folder} exists already; choose another --out")
    beside = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        contents = {
            "config": dict(config),
            "dataset": dataset.to_json(),
            "normalization": normalizer.to_json(),
            "origin": dict(origin),
            "metrics": to_plain(metrics),
        }
        for name in _JSON_FILES:
            (beside / f"{name}.json").write_text(json.dumps(contents[name], indent=1, allow_nan=False))
        if write_resume is not None:
            (beside / "resume").mkdir()
            write_resume(beside / "resume")
        save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, beside / "model.safetensors")
        # safetensors lets nobody but the owner read it; others may read it as they may read the rest.
        (beside / "model.safetensors").chmod((beside / "config.json").stat().st_mode)
        manifest = {
            "format": _FORMAT,
            "schema": SCHEMA,
            "policy": policy,
            "step": step,
            "versions": {"python": platform.python_version(), **package_versions(_PACKAGES)},
            "sha256": {str(p.relative_to(beside)): file_digest(p) for p in sorted(beside.rglob("*")) if p.is_file()},
        }
        (beside / "manifest.json").write_text(json.dumps(manifest, indent=1))
        _sync(beside)
        beside.rename(folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        if type(error) is RuntimeError and not _is_full_disk(error):
            raise
        raise OutputError(f"cannot write checkpoint {folder}: {error}; earlier checkpoints are untouched") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _is_full_disk(error: RuntimeError) -> bool:
    """Whether torch.save ran out of space: it says so by a RuntimeError of its zip writer."""
    return "PytorchStreamWriter" in str(error) or "inline_container" in str(error)


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a training run's folder, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step_*") if p.is_dir())


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest of a training run.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / "manifest.json").is_file():
        return path
    found = list_checkpoints(path)
    if found:
        return found[-1]
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: there is no such folder")
    raise CheckpointError(
        f"{path} is not a checkpoint of scd_robot: expected a folder with manifest.json, or a training run with "
        "checkpoints/step_*/manifest.json"
    )


def read_step(path: str | Path) -> int:
    """Training steps of a checkpoint, without reading its weights."""
    folder = find_checkpoint(path)
    manifest = folder / "manifest.json"
    step: int = _field(_read_object(manifest), "step", int, manifest)
    return step


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads and checks a checkpoint folder (or the newest one of a training run).

    Raises:
        CheckpointError: missing, foreign, truncated or changed files, or a schema this version cannot read.
    """
    folder = find_checkpoint(path)
    manifest = _read_object(folder / "manifest.json")
    if manifest.get("format") != _FORMAT:
        other = f", but of {what!r}" if isinstance(what := manifest.get("format"), str) else ""
        raise CheckpointError(f"{folder / 'manifest.json'} is not of an scd_robot checkpoint{other}")
    if manifest.get("schema") not in range(1, SCHEMA + 1):
        raise CheckpointError(
            f"{folder} has checkpoint schema {manifest.get('schema')}, this version of scd_robot reads 1 to {SCHEMA}"
        )
    for name in PUBLISHED_FILES[1:]:
        _check_digest(folder, name, manifest)
    config, dataset, normalization, origin, metrics = (_read_object(folder / f"{name}.json") for name in _JSON_FILES)
    for name, kind in (("preset", str), ("model", dict), ("policy", dict)):
        _field(config, name, kind, folder / "config.json")
    config = _with_later_fields(config, manifest["schema"])
    try:
        weights = load_file(folder / "model.safetensors")
        return Checkpoint(
            path=folder,
            policy=_field(manifest, "policy", str, folder / "manifest.json"),
            step=_field(manifest, "step", int, folder / "manifest.json"),
            config=config,
            dataset=DatasetSpec.from_json(dataset),
            normalizer=Normalizer.from_json(normalization),
            weights=weights,
            origin=origin,
            metrics=metrics,
            versions=_field(manifest, "versions", dict, folder / "manifest.json"),
            weights_sha256=manifest["sha256"]["model.safetensors"],
            schema=manifest["schema"],
        )
    except (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} is damaged or foreign: {error}") from error


def _with_later_fields(config: dict[str, Any], schema: int) -> dict[str, Any]:
    """The configuration with fields that came after `schema`, at values that change nothing."""
    if schema < 2:
        transforms: dict[str, Any] = {
            name: [] for name in ("keys", "flatten", "images", "rotations", "grippers", "chunk_parts")
        }
        transforms |= {"rename": {}, "chunk": "absolute"}
        config = {**config, "model": {"history_stride": 1, **config["model"]}, "transforms": transforms}
    if schema < 3:
        config = {**config, "model": {"architecture": "separable", "local_layers": 0, **config["model"]}}
    if schema < 3 and "training" in config:
        later = {"group_by_length": False, "idle_weight": 1.0, "disturbance_threshold": 0.0}
        config = {**config, "training": {**later, **config["training"]}}
    if schema < 4:
        parts = {"encoder_bias": False, "step_end_input": False}
        images = {"encoder": "convolutional", "channels": [16, 32, 64], "patch_size": 8, "tokens_per_image": 2}
        config = {**config, "model": {**parts, "images": images, **config["model"]}}
    if schema < 4 and "training" in config:
        objective = {"objective": "flow_matching", "trained": "all"}
        augmentation = {"shift": 0.03, "brightness": 0.1, "contrast": 0.1, "saturation": 0.1}
        pictures = {"augmentation": augmentation, "images_in_memory_gb": 2.0}
        config = {**config, "training": {**objective, **pictures, **config["training"]}}
    if schema < 5:
        config = {**config, "transforms": {"tasks": {}, "goals": [], **config["transforms"]}}
        frames = {"camera": "", "patch_size": 8, "residual": True}
        config = {**config, "model": {"frames": frames, "add_context": False, **config["model"]}}
    if schema < 6:
        frames = {"beside_actions": False, "decoder_layers": 2, **config["model"]["frames"]}
        config = {**config, "model": {**config["model"], "frames": frames}}
    if schema < 6 and "training" in config:
        flow_time = {"distribution": "logit_normal", "mean": -2.0, "std": 1.2}
        loss = {"loss_weight": 1.0, "positions_per_segment": 8, "flow_time": flow_time}
        config = {**config, "training": {"frames": loss, **config["training"]}}
    if schema < 7:
        images = {"backbone": "", "weights": "", "frozen": True, **config["model"]["images"]}
        frames = {"autoencoder": None, **config["model"]["frames"]}
        config = {**config, "model": {**config["model"], "images": images, "frames": frames}}
    if schema < 7 and "training" in config:
        forcing = {"probability": 0.0, "frames": 8, "num_denoising_steps": 4}
        cached = {"backbone_learning_rate_factor": 0.1, "cache_features": False}
        config = {**config, "training": {**cached, "self_forcing": forcing, **config["training"]}}
    if schema < 8:
        config = {**config, "model": {"context_in_history": True, "encoder_modulation": False, **config["model"]}}
    if schema < 9:
        config = {**config, "transforms": {"select": [], **config["transforms"]}}
    if schema < 9 and "training" in config:
        config = {**config, "training": {"sparse_history_probability": 0.0, **config["training"]}}
    return config


def resume_file(path: str | Path, name: str) -> Path:
    """The file `name` of a checkpoint's folder `resume`, as it was written.

    Raises:
        CheckpointError: there is none, or it was truncated or changed.
    """
    folder = find_checkpoint(path)
    if not (folder / "resume" / name).is_file():
        raise CheckpointError(f"{folder} holds no training state to resume from (resume/{name}); use --init")
    _check_digest(folder, f"resume/{name}", _read_object(folder / "manifest.json"))
    return folder / "resume" / name


def _check_digest(folder: Path, name: str, manifest: dict[str, Any]) -> None:
    """Compares a file with the SHA-256 that the manifest holds for it."""
    file = folder / name
    digest = _field(manifest, "sha256", dict, folder / "manifest.json").get(name)
    state = "is missing" if not file.is_file() else "is not listed in manifest.json" if digest is None else ""
    try:
        if not state and file_digest(file) != digest:
            state = "was truncated or changed since it was written"
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    if state:
        raise CheckpointError(f"{file} {state}; take the checkpoint from its source again")


def _field(document: dict[str, Any], name: str, kind: type, path: Path) -> Any:
    if not isinstance(document.get(name), kind):
        raise CheckpointError(f"{path} lacks {name!r} or holds no {kind.__name__} there; it is damaged or foreign")
    return document[name]


def _read_object(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; take the checkpoint from its source again") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); it is damaged or foreign") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} holds a {type(document).__name__}, not an object; it is damaged or foreign")
    return document


def _sync(folder: Path) -> None:
    """Flushes a folder's files to disk, so that the rename that follows never shows an empty file after a power cut."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
