"""What `lerobot-train --policy.type=scd` can be told; names are LeRobot's where it has one, else scd_robot's.

LeRobot finds `ScdPolicy` and `make_scd_pre_post_processors` by the names of this module and class.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, NormalizationMode
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import CosineDecayWithWarmupSchedulerConfig

from scd_robot.diffusion import SamplerConfig
from scd_robot.errors import ConfigError
from scd_robot.model import ScdConfig as ModelConfig
from scd_robot.nn import ImageConfig
from scd_robot.policies.config import ScdPolicyConfig

__all__ = ["ScdConfig"]

_OBSERVATIONS = (FeatureType.STATE, FeatureType.ENV, FeatureType.VISUAL)


def _normalization() -> dict[str, NormalizationMode]:
    bounds = dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MIN_MAX)
    return {"VISUAL": NormalizationMode.IDENTITY, **bounds}


# What messages of scd_robot call it, and what it is here.
_NAMES = {
    "images.channels": "--policy.image_channels",
    " (or patch_size a larger one)": "",
    "resize the pictures": "resize the pictures, say --policy.resize_images='[96, 128]'",
    "num_executed": "n_action_steps",
    "chunk_length": "chunk_size",
}


@contextlib.contextmanager
def _lerobots_names() -> Iterator[None]:
    """Errors within are told by the names that settings have here."""
    try:
        yield
    except ConfigError as error:
        told = str(error)
        for ours, here in _NAMES.items():
            told = told.replace(ours, here)
        raise ConfigError(told) from error


@PreTrainedConfig.register_subclass("scd")
@dataclass
class ScdConfig(PreTrainedConfig):
    """Architecture, training and use of one policy.

    Attributes:
        n_obs_steps: encoder steps in a window that is trained on; LeRobot reads each camera so often per sample. At
            inference the history is in the encoder's cache, and single observations arrive.
        chunk_size: actions in one plan; action 0 is for the current control step.
        n_action_steps: actions taken from one plan before the next.
        normalization_mapping: done by LeRobot's processors. Pictures stay as they are, their encoder knows their range.
        observation_limit: normalised vectors are clamped to plus and minus this: LeRobot divides by 1e-8 where
            quantiles coincide. What never moved in the dataset is 0 for the model, see `ScdPolicy.still`.
        resize_images: height and width of the pictures for the model; empty = as they come.
        width: this and what follows is as in `scd_robot.model.ScdConfig`, and `scd_robot.nn.ImageConfig` for pictures.
        positions_per_window: control steps of each window whose chunks are denoised in training.
        num_denoising_steps: Euler steps per plan.
        ema_decay: largest decay of the weights' moving average, which acts; at update n min(this, (1 + n) / (10 + n)).
        optimizer_lr: peak, of the encoder.
        optimizer_decoder_lr_factor: the decoder's peak in units of it.
        optimizer_weight_decay: on matrices only.
        optimizer_betas: AdamW's.
        optimizer_grad_clip_norm: largest norm of the gradient.
        scheduler_warmup_steps: of a training of scheduler_decay_steps; LeRobot shortens both for a shorter one.
        scheduler_decay_steps: the cosine ends here.
        scheduler_decay_lr: at its end.
    """

    n_obs_steps: int = 8
    chunk_size: int = 16
    n_action_steps: int = 8
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=_normalization)
    observation_limit: float = 5.0
    resize_images: tuple[int, ...] = ()

    width: int = 128
    num_heads: int = 4
    encoder_layers: int = 5
    decoder_layers: int = 1
    mlp_ratio: int = 4
    history_length: int = 8
    history_stride: int = 1
    num_context_tokens: int = 1
    num_past_actions: int = 8
    context_corruption: float = 0.05
    memory_gate: bool = False
    image_channels: tuple[int, ...] = (16, 32, 64)
    tokens_per_image: int = 2

    positions_per_window: int = 8
    num_denoising_steps: int = 8
    ema_decay: float = 0.9999

    optimizer_lr: float = 1e-3
    optimizer_decoder_lr_factor: float = 2.0
    optimizer_weight_decay: float = 1e-4
    optimizer_betas: tuple[float, float] = (0.9, 0.95)
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 1000
    scheduler_decay_steps: int = 100_000
    scheduler_decay_lr: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_obs_steps", "history_stride", "positions_per_window", "num_past_actions", "observation_limit"):
            least = 0 if name == "num_past_actions" else 1
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.resize_images and len(self.resize_images) != 2:
            raise ConfigError(f"resize_images must be height and width, got {self.resize_images}")

    @property
    def observation_delta_indices(self) -> list[int]:
        """Control steps of a window, the present one last; they may lie before the episode, and are then padding."""
        return [self.history_stride * step for step in range(1 - self.n_obs_steps, 1)]

    @property
    def action_delta_indices(self) -> list[int]:
        """Actions around every control step of a window, so that a chunk can be learned at each."""
        first = self.observation_delta_indices[0] - self.num_past_actions
        return list(range(first, self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """Rewards are not read."""
        return None

    @property
    def observation_keys(self) -> list[str]:
        """Those of the input features that the model sees; others, like language, it does not."""
        return [key for key, feature in (self.input_features or {}).items() if feature.type in _OBSERVATIONS]

    def model_config(self) -> ModelConfig:
        """The architecture for the features of the dataset.

        Raises:
            ConfigError: a feature is none for this model, or the settings contradict each other.
        """
        with _lerobots_names():
            return self._model_config()

    def _model_config(self) -> ModelConfig:
        self.validate_features()
        shapes: dict[str, tuple[int, ...]] = {}
        for key in self.observation_keys:
            feature = self.input_features[key]
            shapes[key] = tuple(feature.shape)
            if feature.type is FeatureType.VISUAL:
                channels, *sides = feature.shape
                shapes[key] = (*(self.resize_images or sides), channels)
        return ModelConfig(
            observation_shapes=shapes,
            action_dim=self.action_feature.shape[0],
            width=self.width,
            num_heads=self.num_heads,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
            mlp_ratio=self.mlp_ratio,
            history_length=self.history_length,
            history_stride=self.history_stride,
            num_context_tokens=self.num_context_tokens,
            chunk_length=self.chunk_size,
            num_past_actions=self.num_past_actions,
            context_corruption=self.context_corruption,
            memory_gate=self.memory_gate,
            images=ImageConfig(channels=tuple(self.image_channels), tokens_per_image=self.tokens_per_image),
        )

    def policy_config(self) -> ScdPolicyConfig:
        """How the model is run.

        Raises:
            ConfigError: the settings contradict each other.
        """
        sampler = SamplerConfig(num_denoising_steps=self.num_denoising_steps)
        with _lerobots_names():
            config = ScdPolicyConfig(num_executed=self.n_action_steps, sampler=sampler)
            config.check_fits(self._model_config())
        return config

    def validate_features(self) -> None:
        """Raises ConfigError where the features of the dataset, or their normalisation, are not for this policy."""
        if self.action_feature is None:
            raise ConfigError(f"the dataset has no feature 'action'; it has {sorted(self.output_features or {})}")
        if not self.observation_keys:
            raise ConfigError(
                "the dataset has no observation.state, observation.environment_state or pictures; it has "
                f"{sorted(self.input_features or {})}"
            )
        used = [self.input_features[key] for key in self.observation_keys] + [self.action_feature]
        kinds = {feature.type.value for feature in used if feature.type is not FeatureType.VISUAL}
        if unnamed := sorted(kinds - set(self.normalization_mapping)):
            raise ConfigError(
                f"normalization_mapping names nothing for {', '.join(unnamed)}; say how each is normalised, IDENTITY "
                f"where it is not: got { ({kind: mode.value for kind, mode in self.normalization_mapping.items()}) }"
            )
        mode = self.normalization_mapping.get("VISUAL", NormalizationMode.IDENTITY)
        if mode is not NormalizationMode.IDENTITY:
            raise ConfigError(f"normalization_mapping of VISUAL must be IDENTITY for this policy, got {mode.value}")

    def get_optimizer_preset(self) -> AdamWConfig:
        """AdamW; `ScdPolicy.get_optim_params` gives the decoder a rate of its own."""
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=self.optimizer_betas,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        """Linear warm-up, then a cosine."""
        return CosineDecayWithWarmupSchedulerConfig(
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
            peak_lr=self.optimizer_lr,
            decay_lr=self.scheduler_decay_lr,
        )
