"""How a trained model is run as a policy."""

from dataclasses import dataclass, field

from scd_robot.diffusion import SamplerConfig
from scd_robot.errors import ConfigError
from scd_robot.model import ScdConfig, check_sampler

__all__ = ["ScdPolicyConfig"]


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
        for name in ("num_executed", "num_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
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
