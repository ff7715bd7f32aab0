"""Before and after the policy: LeRobot's own steps, which normalise; the policy does not do it again."""

from typing import Any

from lerobot.configs.types import NormalizationMode
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME

from lerobot_policy_scd.configuration_scd import ScdConfig
from scd_robot.errors import ConfigError

__all__ = ["make_scd_pre_post_processors"]

Pipeline = PolicyProcessorPipeline[dict[str, Any], dict[str, Any]]
ActionPipeline = PolicyProcessorPipeline[PolicyAction, PolicyAction]


def make_scd_pre_post_processors(
    config: ScdConfig, dataset_stats: dict[str, dict[str, Any]] | None = None, dataset_meta: Any = None
) -> tuple[Pipeline, ActionPipeline]:
    """The pipelines of a new policy; those of a trained one are read from its folder.

    Args:
        config: the policy's.
        dataset_stats: LeRobot's statistics by key and name.
        dataset_meta: not used; later versions of LeRobot give it.

    Raises:
        ConfigError: there are no statistics of something that is to be normalised, which LeRobot would leave as it is.
    """
    features = {key: config.input_features[key] for key in config.observation_keys} | config.output_features
    for key, feature in features.items():
        mode = config.normalization_mapping.get(feature.type.value, NormalizationMode.IDENTITY)
        if mode is not NormalizationMode.IDENTITY and key not in (dataset_stats or {}):
            raise ConfigError(
                f"{key!r} is to be normalised by {mode.value}, and there are no statistics of it; train on a dataset "
                "that has them (meta/stats.json), or load the processors of a trained policy"
            )
    norm_map = config.normalization_mapping
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device=config.device),
        NormalizerProcessorStep(features=features, norm_map=norm_map, stats=dataset_stats),
    ]
    after = [
        UnnormalizerProcessorStep(features=config.output_features, norm_map=norm_map, stats=dataset_stats),
        DeviceProcessorStep(device="cpu"),
    ]
    return (
        PolicyProcessorPipeline(steps=before, name=POLICY_PREPROCESSOR_DEFAULT_NAME),
        PolicyProcessorPipeline(
            steps=after,
            name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        ),
    )
