"""An entangled policy becomes a separable one: its layers are copied, a brief fine-tuning follows, both are compared.

    source checkpoint -> OUT/converted (weights as copied) -> fine-tuning as by 'scd train' -> OUT/checkpoints
                                                                                            -> OUT/conversion.json

The weights are those of `scd_robot.model.convert`; the training is that of `scd_robot.training`, so that the result is
a checkpoint like any other.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from scd_robot.analysis.latency import take_turns, timed
from scd_robot.analysis.probes import as_seen
from scd_robot.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from scd_robot.config import from_json, to_json
from scd_robot.datasets import EpisodeDataset
from scd_robot.errors import ConfigError
from scd_robot.model import ActionModel, CausalDitModel, ScdModel, build_model
from scd_robot.model.convert import parse_layers, separable_config, separate
from scd_robot.output import write_json
from scd_robot.policies.loading import policy_of
from scd_robot.policies.scd import ScdPolicy
from scd_robot.sim_eval import evaluate, make_environment
from scd_robot.sim_eval.comparison import compare
from scd_robot.sim_eval.metrics import percentiles
from scd_robot.training import EpisodeDataModule, ExperimentConfig, SegmentDataset, loss_terms, train
from scd_robot.training.start import check_fits, fingerprint
from scd_robot.training.transformed import transformed
from scd_robot.transforms import GOAL

__all__ = [
    "SCHEMA",
    "SHARE_OF_UPDATES",
    "Conversion",
    "convert_policy",
    "format_conversion",
    "plan_conversion",
    "write_converted",
]

logger = logging.getLogger(__name__)

SCHEMA = 1  # of the JSON
SHARE_OF_UPDATES = 0.3  # of the source's, each at half its cost, unless it is told otherwise
_TIMED_UPDATES = 3
_SIDES = ("source", "converted")


@dataclass(frozen=True)
class Conversion:
    """What is to be done.

    Attributes:
        source: checkpoint of the entangled policy.
        encoder: numbers of its layers that become the encoder.
        decoder: numbers of those that become the decoder.
        experiment: the separable model and its fine-tuning.
    """

    source: Checkpoint
    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    experiment: ExperimentConfig

    def with_experiment(self, experiment: ExperimentConfig) -> "Conversion":
        """With other settings of training and policy.

        Raises:
            ConfigError: the model would not be the one that the source's weights fit.
        """
        planned = self.experiment.model
        if replace(experiment.model, context_corruption=planned.context_corruption) != planned:
            raise ConfigError(
                "--set may change training.*, policy.* and model.context_corruption of a conversion: the rest of the "
                "model follows from the source, its layers, and the number and fusion of context tokens"
            )
        return replace(self, experiment=experiment)

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint's origin tells of it."""
        return {
            "source": str(self.source.path),
            "source_step": self.source.step,
            "source_weights_sha256": self.source.weights_sha256,
            "source_layers": from_json(ExperimentConfig, self.source.config, "source").model.depth,
            "encoder_layers": list(self.encoder),
            "decoder_layers": list(self.decoder),
        }


def plan_conversion(
    checkpoint: Path,
    encoder_layers: str,
    decoder_layers: str,
    *,
    num_context_tokens: int,
    fusion: Literal["concat", "prefix"],
    max_steps: int | None = None,
    seed: int | None = None,
) -> Conversion:
    """Reads the source and decides what becomes of it.

    Args:
        checkpoint: of the entangled policy.
        encoder_layers: see `parse_layers`.
        decoder_layers: likewise; layers may be in both.
        num_context_tokens: K.
        fusion: see `ScdConfig`.
        max_steps: updates of the fine-tuning; None = `SHARE_OF_UPDATES` of the source's.
        seed: of the fine-tuning; None = the source's. The held-out episodes follow from it.

    Raises:
        CheckpointError: the source cannot be read.
        ConfigError: it is not entangled, or layers, numbers and source do not fit.
    """
    source = read_checkpoint(checkpoint)
    experiment = from_json(ExperimentConfig, source.config, "config")
    depth, training = experiment.model.depth, experiment.training
    encoder, decoder = (parse_layers(text, depth) for text in (encoder_layers, decoder_layers))
    updates = max(1, int(SHARE_OF_UPDATES * source.step)) if max_steps is None else max_steps
    brief = replace(
        training,
        max_steps=updates,
        seed=training.seed if seed is None else seed,
        warmup_steps=min(training.warmup_steps, updates // 10),
        validate_every=min(training.validate_every, updates),
    )
    model = separable_config(experiment.model, encoder, decoder, num_context_tokens, fusion)
    return Conversion(source, encoder, decoder, replace(experiment, model=model, training=brief))


def write_converted(conversion: Conversion, path: Path) -> ScdModel:
    """The checkpoint that a fine-tuning begins with: the source's layers copied, nothing trained.

    Args:
        conversion: of `plan_conversion`.
        path: folder that is written.

    Returns:
        Its model.

    Raises:
        OutputError: `path` is there already, or cannot be written.
    """
    source, experiment = conversion.source, conversion.experiment
    entangled = policy_of(source).model
    assert isinstance(entangled, CausalDitModel)
    model = separate(entangled, experiment.model, conversion.encoder, conversion.decoder)
    write_checkpoint(
        path,
        policy="scd",
        step=0,
        config=to_json(experiment),
        dataset=source.dataset,
        normalizer=source.normalizer,
        weights=model.state_dict(),
        origin={name: source.origin[name] for name in ("backbone",) if name in source.origin}
        | {"conversion": conversion.to_json()},
        metrics={},
    )
    return model


def convert_policy(
    conversion: Conversion,
    data: EpisodeDataset,
    out: Path,
    *,
    environment: str | None = None,
    episodes: int = 100,
    env_python: str | None = None,
    rounds: int = 50,
    accelerator: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Converts, fine-tunes and compares.

    Args:
        conversion: of `plan_conversion`.
        data: episodes as recorded, best those that the source was trained on.
        out: folder of the run.
        environment: name; None = success is not compared.
        episodes: of each policy there.
        env_python: see `evaluate`.
        rounds: planning ticks whose latency is measured.
        accelerator: Lightning's.
        progress: show bars.

    Returns:
        What `out/conversion.json` holds, described in `docs/analysis.md`.

    Raises:
        OutputError: `out` holds a conversion already, or cannot be written.
        ConfigError, DatasetError, ShapeError: data, source and settings do not fit.
        UnknownNameError: there is no such environment.
        TrainingDivergedError: see `train`.
    """
    source, experiment = conversion.source, conversion.experiment
    before, start = policy_of(source), out / "converted"
    if rounds < 1 or episodes < 1:
        raise ConfigError(f"rounds and episodes must be at least 1, got {rounds} and {episodes}")
    if environment is not None and env_python is None:
        make_environment(environment).close()  # what is wrong with it is told before anything is trained
    data = as_seen(before, data)
    data.check("the training dataset")
    ready = transformed(data, experiment.transforms)
    check_fits(ready, experiment)
    model = write_converted(conversion, start)
    document: dict[str, Any] = {"schema": SCHEMA, "conversion": conversion.to_json()}
    document["same_dataset"] = fingerprint(ready) == source.origin.get("dataset")
    if not document["same_dataset"]:
        logger.warning(
            "%s was not trained on these episodes, or not as they are read here (--action, --keys, --only, --drop, "
            "--control-dt): it is fine-tuned on what is read now, in the units of before",
            source.path,
        )
    document["loss"] = {
        "source": _held_out_loss(before, ready, experiment),
        "converted": _held_out_loss(policy_of(read_checkpoint(start)), ready, experiment),
    }
    trained = build_model(before.model.config)  # its weights as they lie in training, not as policies have them
    trained.load_state_dict(before.model.state_dict())
    models: dict[str, ActionModel[Any]] = {"source": cast(CausalDitModel, trained), "converted": model}
    document["update_ms"] = _update_ms(models, before, ready, experiment)
    summary = train(
        data, experiment, out, init=start, init_statistics="checkpoint", accelerator=accelerator, progress=progress
    )
    assert summary is not None  # one process
    document |= _cost(document["update_ms"], source.step, summary)
    after = policy_of(read_checkpoint(out))
    document["loss"]["fine_tuned"] = _held_out_loss(after, ready, experiment)
    document["parameters"] = {
        name: sum(p.numel() for p in policy.model.parameters())
        for name, policy in zip(_SIDES, (before, after), strict=True)
    }
    document["success"] = None
    write_json(out / "conversion.json", document)  # what is measured below takes minutes, and can fail
    for policy in (before, after):
        _tell_task(policy, environment)
    document["latency_ms"] = _latency(before, after, data, rounds)
    if environment is not None:
        document["success"] = _success(after, before, environment, episodes, out, env_python, progress)
    write_json(out / "conversion.json", document)
    return document


def _of(policy_model: ActionModel[Any], experiment: ExperimentConfig) -> ExperimentConfig:
    """The experiment with another model: the same draws of data, noise and flow times for it."""
    return replace(experiment, model=policy_model.config)


@torch.inference_mode()
def _held_out_loss(policy: ScdPolicy, data: EpisodeDataset, experiment: ExperimentConfig) -> float | None:
    """As training's val/loss: mean squared velocity error over held-out tokens; None where no episode is held out."""
    total, count = 0.0, 0.0
    for batch in EpisodeDataModule(data, _of(policy.model, experiment)).val_dataloader():
        error, tokens = loss_terms(policy.model, policy.normalizer, cast(Any, batch), experiment.training.objective)
        total, count = total + float(error), count + float(tokens)
    return total / count if count else None


def _update_ms(
    models: dict[str, ActionModel[Any]], policy: ScdPolicy, data: EpisodeDataset, experiment: ExperimentConfig
) -> dict[str, float]:
    """Median time [ms] of the loss and its gradient in one update of each model, in turns, on the same segments."""
    episodes = EpisodeDataModule(data, experiment).train_episodes
    readers = {name: SegmentDataset(data, _of(model, experiment), episodes) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    objective = experiment.training.objective
    for index in range(min(_TIMED_UPDATES, experiment.training.max_steps)):
        for name, model in models.items():
            batch = readers[name][index]
            times[name].append(
                timed(lambda m=model, b=batch: loss_terms(m, policy.normalizer, b, objective)[0].backward())  # type: ignore[misc]
            )
            model.zero_grad(set_to_none=True)
    return {name: float(np.median(values)) for name, values in times.items()}


def _cost(update_ms: dict[str, float], source_updates: int, summary: dict[str, Any]) -> dict[str, Any]:
    """What the fine-tuning cost, in units of the source's training."""
    share = summary["steps"] / source_updates
    return {
        "checkpoint": summary["checkpoint"],
        "updates": {"source": source_updates, "fine_tuning": summary["steps"], "share": share},
        "seconds": summary["seconds"],
        "compute_share": share * update_ms["converted"] / update_ms["source"],
    }


def _latency(before: ScdPolicy, after: ScdPolicy, data: EpisodeDataset, rounds: int) -> dict[str, Any]:
    """Percentiles by side and kind of control step, on recorded observations, one thread; see `take_turns`."""
    rng = np.random.default_rng(0)

    def observe() -> dict[str, Any]:
        row = int(rng.integers(len(data.arrays["action"])))
        keys = {key: key.removeprefix(GOAL) if key not in data.arrays else key for key in before.spec.observation}
        return {key: np.asarray(data.arrays[recorded][row : row + 1]) for key, recorded in keys.items()}

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = take_turns(dict(zip(_SIDES, (before, after), strict=True)), observe, rounds)
    finally:
        torch.set_num_threads(threads)
    return {side: {name: percentiles(values) for name, values in found.items()} for side, found in times.items()}


def _tell_task(policy: ScdPolicy, environment: str | None) -> None:
    """One of several tasks: the environment's, or, where only times are measured, the first."""
    if policy.spec.tasks and policy.task is None:
        policy.task = environment if environment in policy.spec.tasks else policy.spec.tasks[0]


def _success(
    after: ScdPolicy, before: ScdPolicy, environment: str, episodes: int, out: Path, python: str | None, progress: bool
) -> dict[str, Any]:
    """The comparison of both over the same start states; their evaluations stay in `out`/evaluations."""
    results = []
    for name, policy in zip(("converted", "source"), (after, before), strict=True):
        result = evaluate(
            policy,
            environment,
            episodes,
            out=out / "evaluations" / name,
            num_videos=0,
            policy_name=name,
            python=python,
            progress=progress,
        )
        results.append(result.to_json())
    return compare([results[0]], [results[1]], "converted", "source").to_json()


def format_conversion(document: dict[str, Any]) -> str:
    """A short table for people."""
    how, updates, loss = document["conversion"], document["updates"], document["loss"]
    rows: list[Sequence[str]] = [("", *_SIDES)]
    layers = f"{_listed(how['encoder_layers'])} + {_listed(how['decoder_layers'])}"
    rows.append(("layers", str(how["source_layers"]), f"{layers} (encoder + decoder)"))
    rows.append(("dataset", "", "the source's" if document["same_dataset"] else "ANOTHER one, or read otherwise"))
    rows.append(("parameters", *(f"{document['parameters'][side]:,}" for side in _SIDES)))
    rows.append(("updates", str(updates["source"]), f"{updates['fine_tuning']} ({100 * updates['share']:.1f} %)"))
    rows.append(("computing", "100 %", f"{100 * document['compute_share']:.1f} %"))
    if loss["source"] is not None:
        tuned = f"{loss['fine_tuned']:.4f} (before fine-tuning {loss['converted']:.4f})"
        rows.append(("held-out loss", f"{loss['source']:.4f}", tuned))
    for name in ("planning tick", "idle tick", "encoder step"):
        cells = [document["latency_ms"][side][name] for side in _SIDES]
        rows.append((f"{name} [ms]", *("-" if cell is None else f"{cell['p50']:.2f}" for cell in cells)))
    success = document["success"]
    if success is not None:
        shares = [f"{success[arm]['successes']}/{success[arm]['episodes']}" for arm in ("b", "a")]
        low, high = (100 * bound for bound in success["interval"])
        difference = f" ({100 * success['difference']:+.1f} points [{low:+.1f}, {high:+.1f}])"
        rows.append(("success", shares[0], shares[1] + difference))
    lines = [f"{row[0]:18}{row[1]:>14}  {row[2]}" for row in rows]
    return "\n".join([*lines, *([success["verdict"]] if success else [])])


def _listed(layers: Sequence[int]) -> str:
    """Layers 0, 1, 2, 5 as "0-2,5"."""
    parts, start = [], 0
    for stop in range(1, len(layers) + 1):
        if stop == len(layers) or layers[stop] != layers[stop - 1] + 1:
            first, last = layers[start], layers[stop - 1]
            parts.append(str(first) if first == last else f"{first}-{last}")
            start = stop
    return ",".join(parts)
