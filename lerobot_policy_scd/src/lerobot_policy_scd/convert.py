"""Makes a checkpoint of scd_robot of a policy that LeRobot trained: for `scd eval`, `scd serve` and `load_policy`.

    python -m lerobot_policy_scd.convert RUN/checkpoints/last/pretrained_model CHECKPOINT --fps 10

Observation keys stay LeRobot's, unless `--keys observation.state=proprio` names what the robot or environment calls
them. The normalisation becomes scd_robot's, which gives the same numbers but for the clamp at `observation_limit`.
"""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.types import FeatureType, NormalizationMode
from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline
from lerobot.utils.constants import ACTION, POLICY_PREPROCESSOR_DEFAULT_NAME
from numpy.typing import NDArray

from lerobot_policy_scd.configuration_scd import ScdConfig
from lerobot_policy_scd.modeling_scd import ScdPolicy
from scd_robot.checkpoint import write_checkpoint
from scd_robot.config import to_json
from scd_robot.errors import ConfigError, ScdRobotError, UnknownNameError
from scd_robot.normalization import FieldStatistics, Mode, Normalizer
from scd_robot.transforms import ImageStep, TransformConfig
from scd_robot.types import ArraySpec, DatasetSpec

__all__ = ["convert"]

logger = logging.getLogger(__name__)

_MODES: dict[NormalizationMode, Mode] = {
    NormalizationMode.MIN_MAX: "min_max",
    NormalizationMode.MEAN_STD: "mean_std",
    NormalizationMode.QUANTILES: "quantile",
    NormalizationMode.IDENTITY: "identity",
}


def convert(folder: Path, out: Path, control_dt: float, keys: Mapping[str, str] | None = None) -> None:
    """Writes the checkpoint `out`, which acts as the policy of `folder` does.

    Args:
        folder: `pretrained_model` of a training of LeRobot.
        out: must not exist.
        control_dt: [s] of the dataset it was trained on, 1 / fps.
        keys: what some of the policy's observation keys are called where the checkpoint is used.

    Raises:
        ConfigError: the normalisation has no counterpart in scd_robot.
        UnknownNameError: `keys` has one that the policy does not.
        OutputError: `out` exists or cannot be written.
    """
    policy = ScdPolicy.from_pretrained(folder)
    config = policy.config
    called = {key: key for key in config.observation_keys}
    for key, name in (keys or {}).items():
        if key not in called:
            raise UnknownNameError("observation key of the policy", key, called)
        called[key] = name
    twice = sorted({name for name in called.values() if list(called.values()).count(name) > 1})
    if twice:
        raise ConfigError(f"several observation keys of the policy would be called {', '.join(twice)}")
    step = _normalizer_step(folder)
    still = {key: policy.still[place].numpy() for key, place in policy.places.items()}
    still[ACTION] = np.zeros(config.action_feature.shape, bool)
    statistics, modes = {}, {}
    for key, held in still.items():
        mode = step.norm_map.get(step.features[key].type, NormalizationMode.IDENTITY)
        if mode not in _MODES:
            raise ConfigError(f"{key!r} is normalised by {mode.value}, which scd_robot does not have")
        modes[key], statistics[key] = _MODES[mode], _statistics(step, key, held)
    normalizer = Normalizer(statistics, modes)
    for key, held in still.items():
        _check_alike(step, normalizer, key, held)
        if key != ACTION:
            _warn_of_limit(normalizer, key, config.observation_limit)
    write_checkpoint(
        out,
        policy="scd",
        step=int(policy.num_updates),
        config=_experiment(policy, called),
        dataset=_dataset(config, control_dt, called),
        normalizer=normalizer,
        weights=policy.averaged.state_dict(),
        origin={"lerobot": str(folder)},
        metrics={},
    )


def _normalizer_step(folder: Path) -> NormalizerProcessorStep:
    pipeline = PolicyProcessorPipeline.from_pretrained(folder, f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json")
    found = [step for step in pipeline.steps if isinstance(step, NormalizerProcessorStep)]
    if len(found) != 1:
        raise ConfigError(f"the preprocessor of {folder} must have one normalizer_processor, it has {len(found)}")
    return found[0]


def _statistics(step: NormalizerProcessorStep, key: str, still: NDArray[np.bool_]) -> FieldStatistics:
    """LeRobot's statistics as ours; numbers that the policy holds at 0, `still` (Do,), are constant in them."""
    given: Mapping[str, Any] = step.stats.get(key, {})
    missing = [name for name in ("min", "max", "mean", "std") if name not in given]
    if missing:
        raise ConfigError(f"the statistics of {key!r} lack {', '.join(missing)}; train on a dataset that has them")
    names = ("min", "max", "mean", "std", "q01" if "q01" in given else "min", "q99" if "q99" in given else "max")
    columns = {name: np.asarray(given[name], np.float64).reshape(-1) for name in names}
    held = {name: 0.0 if name == "std" else columns["mean"] for name in names}
    return FieldStatistics(*(tuple(map(float, np.where(still, held[name], columns[name]))) for name in names))


def _check_alike(step: NormalizerProcessorStep, normalizer: Normalizer, key: str, still: NDArray[np.bool_]) -> None:
    """Raises ConfigError where LeRobot's numbers of `key` (for actions those that come back) are others than ours.

    Args:
        step: LeRobot's.
        normalizer: ours.
        key: observation key or "action".
        still: (Do,) numbers that the policy holds at 0.
    """
    known = normalizer.statistics[key]
    _, half = known.center_and_half(normalizer.modes[key])
    if key == ACTION:
        ends, unit = torch.tensor([[-1.0], [1.0]]).expand(2, known.width), np.ones(known.width)
        theirs, ours = step._normalize_action(ends, inverse=True), normalizer.denormalize(key, ends)
    else:
        ends, unit = torch.tensor([known.minimum, known.maximum]), np.where(half == 0, 1.0, half)
        theirs, ours = step._normalize_observation({key: ends}, inverse=False)[key], normalizer.normalize(key, ends)
        theirs = theirs.masked_fill(torch.from_numpy(still), 0.0)
    rounding = 1e-7 + 1e-6 * np.maximum(np.abs(known.minimum), np.abs(known.maximum))
    wrong = np.flatnonzero((np.abs((theirs - ours).numpy()) * unit > 1e-4 * half + rounding).any(0))
    if len(wrong):
        raise ConfigError(
            f"LeRobot and scd_robot normalise dimensions {wrong.tolist()} of {key!r} otherwise, which hardly ever "
            "move; leave them out of the dataset, or normalise by MIN_MAX, and train again"
        )


def _warn_of_limit(normalizer: Normalizer, key: str, limit: float) -> None:
    """Says where LeRobot clamps numbers that were in the training data, which scd_robot does not."""
    known = normalizer.statistics[key]
    ends = normalizer.normalize(key, torch.tensor([known.minimum, known.maximum])).abs().amax(0).numpy()
    if (beyond := np.flatnonzero(ends > limit)).size:
        logger.warning(
            "%r, dimensions %s, is up to %.3g normalised in the training data: LeRobot clamps it to %g "
            "(observation_limit), the checkpoint will not, and acts otherwise there",
            key,
            beyond.tolist(),
            ends.max(),
            limit,
        )


def _experiment(policy: ScdPolicy, called: Mapping[str, str]) -> dict[str, Any]:
    config = policy.config
    size = tuple(config.resize_images)
    images = tuple(ImageStep(key, size=size) for key in policy.model.config.image_keys if size)
    rename = {name: key for key, name in called.items() if name != key}
    transforms = TransformConfig(rename=rename, keys=tuple(called), images=images)
    parts = {"model": policy.model.config, "policy": config.policy_config(), "transforms": transforms}
    return {"preset": "lerobot", **{name: to_json(part) for name, part in parts.items()}}


def _dataset(config: ScdConfig, control_dt: float, called: Mapping[str, str]) -> DatasetSpec:
    observation = {}
    for key in config.observation_keys:
        feature = config.input_features[key]
        shape = tuple(feature.shape)
        is_picture = feature.type is FeatureType.VISUAL
        observation[called[key]] = ArraySpec((*shape[1:], shape[0]), "uint8") if is_picture else ArraySpec(shape)
    return DatasetSpec(observation, config.action_feature.shape[0], control_dt, "LeRobot")


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m lerobot_policy_scd.convert", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="pretrained_model of a training of LeRobot")
    parser.add_argument("out", type=Path, help="the checkpoint's folder, which must not exist")
    parser.add_argument("--fps", type=float, required=True, help="of the dataset: control steps per second")
    parser.add_argument(
        "--keys", nargs="*", default=[], metavar="KEY=NAME", help="what keys of the policy are called elsewhere"
    )
    given = parser.parse_args()
    if not 0 < given.fps < float("inf"):
        parser.error(f"--fps must be a positive number of control steps per second, got {given.fps}")
    if wrong := [pair for pair in given.keys if "=" not in pair]:
        parser.error(f"--keys takes KEY=NAME, got {wrong[0]!r}")
    if not (given.folder / "config.json").is_file():
        parser.error(f"{given.folder} is no pretrained_model folder of LeRobot: it holds no config.json")
    try:
        convert(given.folder, given.out, 1 / given.fps, dict(pair.split("=", 1) for pair in given.keys))
    except ScdRobotError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
