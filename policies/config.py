"""How a trained model is run as a policy, and whether what makes up a policy is of one checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scd_robot.config import check_finite, from_json, to_json
from scd_robot.diffusion import SamplerConfig
from scd_robot.errors import ConfigError, ShapeError
from scd_robot.model import ScdConfig, check_sampler
from scd_robot.normalization import Normalizer
from scd_robot.types import DatasetSpec

__all__ = ["ScdPolicyConfig", "check_widths", "with_overrides"]


@dataclass(frozen=True)
class ScdPolicyConfig:
    """How a trained model is run.

    Attributes:
        num_executed: actions taken from one plan before the next.
        sampler: solver and denoising steps.
        guidance_scale: guidance by context corruption; 1 = off.
        num_samples: plans sampled from one context, of which the one that best agrees with the executed past is kept
            (self-verification, arXiv 2505.09561); 1 = off, more need a model with num_past_actions > 0.
        seed: keys the noise, together with episode and plan number.
    """

    num_executed: int = 8
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance_scale: float = 1.0
    num_samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("num_executed", "num_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.guidance_scale < 0:
            raise ConfigError(f"guidance_scale must not be negative, got {self.guidance_scale}; 1 = off")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")

    def check_fits(self, model: ScdConfig) -> None:
        """Raises ConfigError where a model of this architecture cannot be run so."""
        if self.num_executed > model.chunk_length:
            raise ConfigError(f"num_executed {self.num_executed} exceeds the model's chunk_length {model.chunk_length}")
        if self.num_samples > 1 and not model.num_past_actions:
            raise ConfigError("num_samples > 1 picks by agreement with the past and needs num_past_actions > 0")
        if self.num_samples > 1 and self.sampler.solver == "mip":
            raise ConfigError(
                "num_samples > 1 picks among different samples, and those of solver 'mip' are all the same"
            )
        check_sampler(model, self.sampler)
        if self.num_executed % model.history_stride:
            raise ConfigError(
                f"num_executed {self.num_executed} must be a multiple of the model's history_stride "
                f"{model.history_stride}: plans are made in control steps in which the encoder runs"
            )
        if self.guidance_scale != 1.0 and not model.context_corruption:
            raise ConfigError("guidance_scale != 1 needs a model trained with context_corruption > 0")


def with_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> ScdPolicyConfig:
    """A policy's configuration as JSON, some of whose fields are replaced.

    Args:
        config: as a checkpoint has it.
        overrides: by field, as objects or JSON, None = not replaced; and num_denoising_steps, of the sampler there is
            then.

    Raises:
        ConfigError: there is no such field, or a value does not do.
    """
    given = {name: to_json(value) for name, value in overrides.items() if value is not None}
    steps = given.pop("num_denoising_steps", None)
    settings = {**config, **given}
    if steps is not None:
        settings["sampler"] = {**settings["sampler"], "num_denoising_steps": steps}
    return from_json(ScdPolicyConfig, settings, "policy")


def check_widths(config: ScdConfig, normalizer: Normalizer, dataset: DatasetSpec) -> None:
    """Raises ShapeError where model, statistics and specification are not of one dataset."""
    specified = {key: spec.shape for key, spec in dataset.observation.items()} | {"action": (dataset.action_dim,)}
    for key in config.image_keys:
        spec, shape = dataset.observation.get(key), config.observation_shapes[key]
        if spec is None or (tuple(spec.shape), spec.dtype) != (tuple(shape), "uint8"):
            has = "none" if spec is None else f"{spec.dtype} {tuple(spec.shape)}"
            raise ShapeError(
                f"the model takes pictures {key!r} as uint8 {tuple(shape)}, the dataset's specification has {has}; "
                "they must be of one checkpoint"
            )
    vectors = {key: config.observation_shapes[key] for key in config.vector_keys}
    for key, shape in {**vectors, "action": (config.action_dim,)}.items():
        statistics = normalizer.statistics.get(key)
        found = (specified.get(key), None if statistics is None else (statistics.width,))
        if found != (tuple(shape), tuple(shape)):
            raise ShapeError(
                f"the model takes {key!r} of shape {tuple(shape)}, the dataset's specification has {found[0]} and the "
                f"normalisation {found[1]}; they must be of one checkpoint"
            )
