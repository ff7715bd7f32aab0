"""What a training run begins with: normalisation, weights to fine-tune from, or the state of an interrupted run."""

import hashlib
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scd_robot.checkpoint import Checkpoint, list_checkpoints, read_checkpoint, resume_file
from scd_robot.config import from_json, to_json
from scd_robot.datasets import ACTION, PRESENT, EpisodeDataset
from scd_robot.errors import CheckpointError, ConfigError, DatasetError, ShapeError
from scd_robot.model import ScdConfig
from scd_robot.nn import HUB, OR_HUB, find_weights, import_timm
from scd_robot.normalization import FieldStatistics, Mode, Normalizer, compute_statistics, is_constant
from scd_robot.training.autoencoder_file import SavedAutoencoder, read_autoencoder
from scd_robot.training.callbacks import RESUME_FILE
from scd_robot.training.config import ExperimentConfig
from scd_robot.training.datamodule import EpisodeDataModule
from scd_robot.transforms import relative_chunk

__all__ = ["Start", "begin", "check_fits", "check_pictures", "check_weights", "fit_normalizer"]

logger = logging.getLogger(__name__)

_SAMPLED_ROWS = 4096  # of each array enter the fingerprint, fewer where they are large
_SAMPLED_BYTES = 1 << 26
_CHECKED_PICTURES = 16
_FAR = 10.0  # times the other range
_STRETCHED = 20.0  # times the range of nearly all numbers
_CHUNKS_IN_STATISTICS = 1 << 15


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        step: training steps taken already.
        normalizer: statistics of this run.
        origin: what the run is made from besides its configuration, as JSON; a resumed run must have the same.
        weights_from: checkpoint whose weights are fine-tuned; None = random weights, or those of `state`.
        autoencoder: weights of the autoencoder of frames; None = there is none, or it comes with other weights.
        state: training state to resume from.
    """

    step: int
    normalizer: Normalizer
    origin: dict[str, Any]
    weights_from: Checkpoint | None = None
    autoencoder: dict[str, Tensor] | None = None
    state: Path | None = None


def begin(
    data: EpisodeDataset,
    experiment: ExperimentConfig,
    out: Path,
    *,
    resume: bool,
    init: Path | None,
    init_statistics: str | None,
    autoencoder: Path | None = None,
) -> Start:
    """Decides where a run begins; see `training.train` for arguments and errors."""
    source = None if init is None else _read_init(init, init_statistics, experiment, data)
    coded = _read_autoencoder(autoencoder, experiment.model, source)
    origin = {
        "dataset": fingerprint(data),
        "episodes": data.num_episodes,
        "steps": data.num_steps,
        "source": data.spec.source,
        "init": None if source is None else {"step": source.step, "statistics": init_statistics},
    }
    if "shares" in data.metadata:
        origin["shares"] = data.metadata["shares"]
    if source is not None:
        _warn_of_other_split(source, origin, experiment)
        teacher = source.config.get("training", {}).get("objective", "flow_matching")
        if teacher != experiment.training.objective:
            origin["teacher"] = {"objective": teacher, "weights_sha256": source.weights_sha256}
    if source is not None and "conversion" in source.origin:  # what was fine-tuned is still what was converted
        origin["conversion"] = source.origin["conversion"]
    if source is not None and "backbone" in source.origin:
        origin["backbone"] = source.origin["backbone"]
    if coded is not None:
        origin["autoencoder"] = {"weights_sha256": coded.sha256}
    if resume:
        return _resumed(out, experiment, origin)
    weights = None if coded is None else coded.weights
    if source is not None and init_statistics == "checkpoint":
        _warn_of_other_units(source.normalizer, _statistics(data, experiment))
        return Start(0, source.normalizer, origin, source, weights)
    return Start(0, fit_normalizer(data, experiment), origin, source, weights)


def _warn_of_other_split(source: Checkpoint, origin: Mapping[str, Any], experiment: ExperimentConfig) -> None:
    """Says where episodes that a checkpoint was trained on will count as held out."""
    before = source.config.get("training", {})
    split = {name: getattr(experiment.training, name) for name in ("seed", "held_out")}
    if source.origin.get("dataset") == origin["dataset"] and any(before.get(n) != split[n] for n in split):
        logger.warning(
            "the checkpoint was trained on the same dataset with training.seed %s and held_out %s, which decide the "
            "held-out episodes: with %s and %s it has learned from many that count as held out now, and errors on them "
            "(val/...) will look too good",
            before.get("seed"), before.get("held_out"), split["seed"], split["held_out"],
        )  # fmt: skip


def fit_normalizer(data: EpisodeDataset, experiment: ExperimentConfig) -> Normalizer:
    """Statistics of the training episodes; held-out ones do not enter them."""
    modes: dict[str, Mode] = dict.fromkeys(experiment.model.vector_keys, experiment.training.observation_normalization)
    modes[ACTION] = experiment.training.action_normalization
    statistics = _statistics(data, experiment)
    for key, mode in modes.items():
        constant = np.flatnonzero(statistics[key].center_and_half(mode)[1] == 0)
        if len(constant):
            logger.info("%r is constant in dimensions %s: always 0 for the model", key, constant.tolist())
        if mode in ("min_max", "mean_std"):
            _warn_of_outliers(key, statistics[key])
    return Normalizer(statistics, modes)


def _warn_of_outliers(key: str, found: FieldStatistics) -> None:
    """Says, once per key, where few numbers stretch what a dimension is normalised by, and the rest is lost in it."""
    low, high, least, most = (np.asarray(x) for x in (found.low, found.high, found.minimum, found.maximum))
    usual = np.where(is_constant(low, high), np.inf, high - low)
    for dim in np.flatnonzero(most - least > _STRETCHED * usual)[:1]:
        logger.warning(
            "%r, dimension %d, is %.6g to %.6g, but 98 %% of it %.6g to %.6g: are the others glitches? They stretch "
            "what it is normalised by %.0f times, and the model sees little of the rest. 'scd data validate' tells "
            "where; leave those episodes out (--drop), or give --set training.%s_normalization=quantile",
            key,
            dim,
            least[dim],
            most[dim],
            low[dim],
            high[dim],
            (most[dim] - least[dim]) / usual[dim],
            "action" if key == ACTION else "observation",
        )


def _statistics(data: EpisodeDataset, experiment: ExperimentConfig) -> dict[str, FieldStatistics]:
    """Of the training episodes, by the model's vectors; the actions' are the last."""
    rows = EpisodeDataModule(data, experiment).statistics_rows()
    statistics = {
        key: compute_statistics(data.arrays[key][_rows_present(data, key, rows)], key)
        for key in experiment.model.vector_keys
    }
    return statistics | {ACTION: compute_statistics(_chunk_actions(data, experiment, np.flatnonzero(rows)), ACTION)}


def _warn_of_other_units(kept: Normalizer, found: dict[str, FieldStatistics]) -> None:
    """Says, once per key, where a dataset's range is another one by far than a checkpoint's statistics have."""
    for key, new in found.items():
        old = kept.statistics[key]
        before, now = np.subtract(old.maximum, old.minimum), np.subtract(new.maximum, new.minimum)
        far = (now > _FAR * before) | (before > _FAR * now)
        moved, moves = (one.center_and_half("min_max")[1] > 0 for one in (old, new))
        for dim in np.flatnonzero(moves & ~moved)[:1]:
            logger.warning(
                "%r, dimension %d, is %.6g to %.6g in the dataset, but always %.6g in what the checkpoint was trained "
                "on, whose statistics are kept: it stays 0 for the model. If it is to be used, give --init-statistics "
                "dataset",
                key,
                dim,
                new.minimum[dim],
                new.maximum[dim],
                old.minimum[dim],
            )
        both_move = moved & moves
        for dim in np.flatnonzero(far & both_move)[:1]:
            logger.warning(
                "%r, dimension %d, is %.6g to %.6g in the dataset, but %.6g to %.6g in what the checkpoint was trained "
                "on, whose statistics are kept: are the units the same? If not, use --init-statistics dataset",
                key,
                dim,
                new.minimum[dim],
                new.maximum[dim],
                old.minimum[dim],
                old.maximum[dim],
            )


def _rows_present(data: EpisodeDataset, key: str, rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Those of `rows` (N,) in which an observation was there; all of them where it never was."""
    if PRESENT + key not in data.arrays:
        return rows
    there = rows & (np.asarray(data.arrays[PRESENT + key][:]) != 0)
    return there if there.any() else rows


def _chunk_actions(data: EpisodeDataset, experiment: ExperimentConfig, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Actions (..., Da) as chunks have them; relative ones depend on the chunk's first control step."""
    action, transforms = data.arrays[ACTION], experiment.transforms
    if not transforms.chunk_parts:
        return np.asarray(action[rows])
    rows = rows[:: max(1, len(rows) // _CHUNKS_IN_STATISTICS)]
    ends = data.episode_ends[np.searchsorted(data.episode_ends, rows, side="right")]
    index = np.minimum(rows[:, None] + np.arange(experiment.model.chunk_length), ends[:, None] - 1)
    state = {part.key: data.arrays[part.key][rows] for part in transforms.chunk_parts}
    return relative_chunk(action[index], state, transforms, data.spec.control_dt)


def fingerprint(data: EpisodeDataset) -> str:
    """SHA-256 over episode ends, shapes, and evenly spaced rows of every array; and weights, where there are some."""
    digest = hashlib.sha256(np.asarray(data.episode_ends, np.int64).tobytes())
    if data.weights is not None:
        digest.update(np.asarray(data.weights, np.float64).tobytes())
    for key in sorted(data.arrays):
        array = data.arrays[key]
        row_bytes = max(1, array.nbytes // max(1, len(array)))
        count = min(len(array), _SAMPLED_ROWS, max(16, _SAMPLED_BYTES // row_bytes))
        rows = np.linspace(0, len(array) - 1, count).astype(np.int64)
        digest.update(f"{key} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array[rows]).tobytes())
    return digest.hexdigest()


def check_fits(data: EpisodeDataset, experiment: ExperimentConfig) -> None:
    """Raises ShapeError where the model is not one for this dataset, and says what else is worth knowing."""
    model = experiment.model
    shapes = {key: spec.shape for key, spec in data.spec.observation.items()}
    for key, shape in model.observation_shapes.items():
        if shapes.get(key) != tuple(shape):
            raise ShapeError(f"the model takes {key!r} of shape {tuple(shape)}, the dataset has {shapes.get(key)}")
    if model.action_dim != data.spec.action_dim:
        raise ShapeError(
            f"the model gives actions of width {model.action_dim}, the dataset's are {data.spec.action_dim}"
        )
    for key in model.image_keys:
        check_pictures(data, key)
    spare = model.chunk_length - experiment.policy.num_executed
    if model.max_delay_steps > spare:
        raise ConfigError(
            f"model.max_delay_steps {model.max_delay_steps} is more than model.chunk_length {model.chunk_length} less "
            f"policy.num_executed {experiment.policy.num_executed}: a plan that takes over {spare} control steps comes "
            "when the one before is used up; lower it or num_executed, or raise chunk_length"
        )
    if model.leaks_past_actions:
        logger.warning(
            "past_action_input='full' shows the encoder the very actions that num_past_actions=%d asks the decoder to "
            "predict: past-token prediction then teaches nothing; use 'noised' or 'none'",
            model.num_past_actions,
        )
    parts = experiment.transforms.chunk_parts if experiment.transforms.chunk != "absolute" else ()
    for key in dict.fromkeys(part.key for part in parts):
        if data.has_gaps(key):
            raise ConfigError(
                f"actions are relative to {key!r} (chunk_parts of --transforms), which is absent in some control "
                "steps: leave those episodes out (--drop), or let actions be absolute"
            )
    held = [key for key in model.vector_keys if data.has_gaps(key)]
    if held and model.observation_tokens == "joint":
        raise ConfigError(
            f"{', '.join(held)} are absent in some control steps: that needs model.observation_tokens=per_key"
        )
    longest = int(data.episode_lengths.max())
    if longest > experiment.training.segment_length:
        logger.info(
            "episodes of up to %d steps are cut into segments of %d (training.segment_length); each later segment "
            "starts as a virtual reset",
            longest,
            experiment.training.segment_length,
        )


def check_pictures(data: EpisodeDataset, key: str) -> None:
    """Raises DatasetError where pictures are not uint8 of 0 to 255, told from some of them."""
    array = data.arrays[key]
    if array.dtype != np.uint8:
        raise DatasetError(
            f"pictures {key!r} must be uint8 of 0 to 255, the dataset has {array.dtype}; depth and other measurements "
            "are no pictures: leave them out (keys of --transforms)"
        )
    rows = np.linspace(0, len(array) - 1, min(len(array), _CHECKED_PICTURES)).astype(np.int64)
    some = array[np.unique(rows)]
    if some.max() <= 1:
        raise DatasetError(
            f"pictures {key!r} hold nothing but {'0 and 1' if some.max() else '0'} in {len(some)} frames looked at: "
            "pictures of 0 to 1 were stored as uint8, or the camera gave none; record them as uint8 of 0 to 255"
        )
    flat = some.reshape(len(some), -1)
    if (flat.min(axis=1) == flat.max(axis=1)).any():
        logger.warning("some pictures %r are of one colour everywhere: 'scd data validate' tells which", key)


def check_weights(model: ScdConfig) -> None:
    """Raises where a backbone has nothing to begin with, as far as it can be told before weights are read."""
    images = model.images
    if images.encoder != "pretrained" or not model.image_keys:
        return
    if not images.weights:
        raise ConfigError(
            f"backbone {images.backbone} has no weights to begin with: set model.images.weights to a file or folder, "
            "or to 'hub' to have timm download them"
        )
    if images.weights != HUB:
        find_weights(images.weights, OR_HUB)
    import_timm()


def _resumed(out: Path, experiment: ExperimentConfig, origin: dict[str, Any]) -> Start:
    if (out / "checkpoints").is_dir() and not list_checkpoints(out):
        raise CheckpointError(f"there is no checkpoint in {out} to resume from; train without --resume")
    newest = read_checkpoint(out)
    if "backbone" in newest.origin:  # its weights are in the checkpoint, and are looked for nowhere else
        origin["backbone"] = newest.origin["backbone"]
    state = resume_file(newest.path, RESUME_FILE.name)
    changed = _differences(newest.config, to_json(experiment))
    if not changed:
        changed = _differences(newest.origin, origin)
    if changed:
        raise CheckpointError(f"{out} was run otherwise ({changed}); resume it with the same options, or use --init")
    try:
        torch.load(state, weights_only=True, mmap=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{state} is not a training state of plain tensors ({reason}); remove {newest.path} to resume from the "
            "checkpoint before it, or use --init"
        ) from error
    return Start(newest.step, newest.normalizer, origin, state=state)


def _differences(old: Any, new: Any, where: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [_differences(old.get(k), new.get(k), f"{where}.{k}".lstrip(".")) for k in {**old, **new}]
        return "; ".join(part for part in parts if part)
    return "" if old == new else f"{where}: {old!r} there, {new!r} here"


def _read_autoencoder(path: Path | None, model: ScdConfig, source: Checkpoint | None) -> SavedAutoencoder | None:
    """The autoencoder of a model of frames that has one, unless it comes with a checkpoint's weights."""
    comes = source is not None and source.config["model"]["frames"]["autoencoder"] is not None
    if path is None:
        if model.frames.autoencoder is not None and not comes:
            raise ConfigError(
                "this model of frames denoises latents: train an autoencoder on the pictures first, with scd "
                f"train-autoencoder --camera {model.frames.camera}, and name its folder with --autoencoder"
            )
        return None
    if comes:
        raise ConfigError("the checkpoint of --init brings its autoencoder with it; leave --autoencoder out")
    saved = read_autoencoder(path)
    saved.check_fits(model)
    return saved


def _read_init(init: Path, statistics: str | None, experiment: ExperimentConfig, data: EpisodeDataset) -> Checkpoint:
    if statistics not in ("checkpoint", "dataset"):
        raise ConfigError(
            "--init needs --init-statistics: 'checkpoint' keeps the old normalisation (same robot, same units), "
            f"'dataset' computes it anew; got {statistics!r}"
        )
    source = read_checkpoint(init)
    old = from_json(ScdConfig, source.config["model"], "model")
    # What layers see of the history may change, delays, and whether a backbone learns; the weights are the same.
    before, after = (
        to_json(replace(model, images=replace(model.images, weights="", frozen=True)))
        | {"local_layers": None, "max_delay_steps": None}
        for model in (old, experiment.model)
    )
    if experiment.model.step_end_input:  # an input that changes nothing at first
        before["step_end_input"] = True
    plans = not (old.decodes_frames or experiment.model.decodes_frames)
    if plans and old.frames.beside_actions != experiment.model.frames.beside_actions:
        before["frames"] = after["frames"]  # a decoder besides comes or goes: the rest has the same weights
    changed = _differences(before, after)
    if changed:
        raise ShapeError(f"{source.path} has another architecture ({changed}); fine-tuning needs the same")
    if source.dataset.control_dt != data.spec.control_dt:
        logger.warning(
            "%s was trained at control_dt %g s, the dataset has %g s",
            source.path,
            source.dataset.control_dt,
            data.spec.control_dt,
        )
    return source
