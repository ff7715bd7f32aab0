"""Everything a training run depends on besides the data; resolved and stored in the checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from scd_robot.config import check_finite
from scd_robot.diffusion import FlowTimeConfig, SamplerConfig
from scd_robot.errors import ConfigError, UnknownNameError
from scd_robot.model import ScdConfig
from scd_robot.nn import AutoencoderConfig
from scd_robot.normalization import Mode
from scd_robot.policies.scd import ScdPolicyConfig
from scd_robot.training.augmentation import AugmentationConfig
from scd_robot.training.self_forcing import SelfForcingConfig
from scd_robot.transforms import GOAL, TASK, TransformConfig

__all__ = ["OBJECTIVES", "ExperimentConfig", "FrameLossConfig", "Objective", "TrainingConfig"]

Objective = Literal["flow_matching", "mean_flow", "shortcut", "mip"]

# Each objective with the sampler that its policies use unless they are told otherwise.
OBJECTIVES: dict[Objective, SamplerConfig] = {
    "flow_matching": SamplerConfig(),
    "mean_flow": SamplerConfig("average", 1),
    "shortcut": SamplerConfig("average", 1),
    "mip": SamplerConfig("mip", 2),
}
_AVERAGES = ("mean_flow", "shortcut")


@dataclass(frozen=True)
class FrameLossConfig:
    """How a frame decoder beside actions (`model.frames.beside_actions`) is trained with them; always flow matching.

    Attributes:
        loss_weight: of the frames' loss, in units of the actions'; with 0 the frame decoder learns nothing, and encoder
            and action decoder learn as without it.
        positions_per_segment: the first so many of the control steps whose chunks are denoised, whose next frames are
            as well.
        flow_time: distribution of the frames' flow time; near to noise, since changes are seen through much of it.
    """

    loss_weight: float = 1.0
    positions_per_segment: int = 8
    flow_time: FlowTimeConfig = field(default_factory=lambda: FlowTimeConfig("logit_normal", mean=-2.0, std=1.2))

    def __post_init__(self) -> None:
        check_finite(self)
        if not self.loss_weight >= 0:
            raise ConfigError(f"frames.loss_weight must not be negative, got {self.loss_weight}")
        if self.positions_per_segment < 1:
            raise ConfigError(f"frames.positions_per_segment must be at least 1, got {self.positions_per_segment}")


@dataclass(frozen=True)
class TrainingConfig:
    """Data, objective and optimisation.

    Attributes:
        objective: what the decoder learns: "flow_matching", its velocity; "mean_flow" (arXiv 2505.13447) or "shortcut"
            (arXiv 2410.12557), its average velocity over steps of any length; "mip" (arXiv 2512.01809), two regressions
            in the place of a flow. `ExperimentConfig.with_objective` sets what goes with it.
        trained: "all", or "decoder": tokenizer and encoder keep the weights that they begin with, and are not changed.
        max_steps: optimiser steps.
        seed: keys every draw together with step and sample.
        batch_size: episode segments per step, over all devices.
        segment_length: most control steps in a segment; episodes up to this length are used whole.
        group_by_length: batches hold segments of like length, so that less is spent on padding; for episodes whose
            lengths differ much.
        burn_in: control steps at the start of a segment that begins inside an episode which carry no loss; 0 treats
            the start of the segment as a virtual reset instead, which is trained as a cold start.
        positions_per_segment: control steps of each encoded segment whose chunks are denoised.
        idle_weight: how often control steps are chosen whose whole chunk is one action that does not change (a robot
            that waits), in units of the others'. They still are history; in validation all count alike.
        disturbance_threshold: where the executed action differs from its label by more than this in any dimension, in
            units of the action, the rest of a chunk carries no loss: it answers a disturbance that no one could
            foresee. What a committed prefix holds (model.max_delay_steps) is known, and answers to it are learned:
            without disturbances in demonstrations a plan does not mend what was executed while it was made. 0 = off.
        noise_draws: (noise, flow time) draws for each of them; the encoder's cost is shared by all.
        virtual_reset_probability: share of segments whose history is cut at a random step, in all layers (variable
            history, arXiv 2606.16447).
        sparse_history_probability: share of segments whose history holds every `policy.num_executed`-th control step
            only: those that a client tells of which sends one observation per plan (docs/serving.md). Plans are learned
            in these steps then.
        flow_time: distribution of the flow time.
        learning_rate: peak, of the encoder.
        decoder_learning_rate_factor: the decoder's peak in units of it.
        backbone_learning_rate_factor: likewise of a pretrained backbone that is fine-tuned.
        final_learning_rate: at the end of the cosine, in units of the peak.
        warmup_steps: linear warm-up.
        weight_decay: AdamW's, on matrices only.
        betas: AdamW's.
        gradient_clip: largest norm of the gradient; 0 = off.
        ema_decay: largest decay of the weights' moving average; at step n it is min(ema_decay, (1 + n) / (10 + n)).
        observation_normalization: mode for all observation vectors, see `normalization.MODES`.
        action_normalization: mode for actions.
        held_out: share of episodes kept for validation.
        validate_every: steps between validations; a checkpoint is written after each.
        validation_segments: most held-out segments per validation.
        precision: "32-true", or "bf16-mixed" where the device is fast at it.
        num_workers: processes that prepare batches; 0 = the training process itself, best for vectors.
        augmentation: of pictures.
        images_in_memory_gb: pictures that take no more than this are read once and kept, others in every batch.
        cache_features: a frozen backbone encodes each picture once in a run, not in every batch; without augmentation.
        frames: of a frame decoder beside actions.
        self_forcing: of models that decode frames alone.
    """

    objective: Objective = "flow_matching"
    trained: Literal["all", "decoder"] = "all"
    max_steps: int = 2000
    seed: int = 0
    batch_size: int = 8
    segment_length: int = 128
    group_by_length: bool = False
    burn_in: int = 0
    positions_per_segment: int = 16
    idle_weight: float = 1.0
    disturbance_threshold: float = 0.0
    noise_draws: int = 1
    virtual_reset_probability: float = 0.2
    sparse_history_probability: float = 0.0
    flow_time: FlowTimeConfig = field(default_factory=FlowTimeConfig)
    learning_rate: float = 1e-3
    decoder_learning_rate_factor: float = 2.0
    backbone_learning_rate_factor: float = 0.1
    final_learning_rate: float = 0.01
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.95)
    gradient_clip: float = 1.0
    ema_decay: float = 0.9999
    observation_normalization: Mode = "min_max"
    action_normalization: Mode = "min_max"
    held_out: float = 0.05
    validate_every: int = 500
    validation_segments: int = 32
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    num_workers: int = 0
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    images_in_memory_gb: float = 2.0
    cache_features: bool = False
    frames: FrameLossConfig = field(default_factory=FrameLossConfig)
    self_forcing: SelfForcingConfig = field(default_factory=SelfForcingConfig)

    def __post_init__(self) -> None:
        check_finite(self)
        for value, choices in ((self.objective, tuple(OBJECTIVES)), (self.trained, ("all", "decoder"))):
            if value not in choices:
                raise UnknownNameError("training objective or part", value, choices)
        positive = ("max_steps", "batch_size", "segment_length", "positions_per_segment", "noise_draws")
        for name in (*positive, "validate_every", "validation_segments"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        not_negative = ("seed", "burn_in", "warmup_steps", "weight_decay", "gradient_clip", "num_workers")
        for name in (*not_negative, "disturbance_threshold", "images_in_memory_gb"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("learning_rate", "decoder_learning_rate_factor", "backbone_learning_rate_factor"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.idle_weight <= 1:
            raise ConfigError(f"idle_weight must be in (0, 1], got {self.idle_weight}")
        shares = ("virtual_reset_probability", "sparse_history_probability", "ema_decay", "final_learning_rate")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.seed >= 2**32:
            raise ConfigError(f"seed must be below 2**32, got {self.seed}")
        if self.burn_in >= self.segment_length:
            raise ConfigError(f"burn_in {self.burn_in} leaves nothing of segment_length {self.segment_length}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out must be in [0, 1), got {self.held_out}")


@dataclass(frozen=True)
class ExperimentConfig:
    """A training run that can be repeated: what a preset resolves to for a dataset.

    Attributes:
        preset: name of the preset it came from.
        model: architecture.
        training: data, objective, optimisation.
        policy: how the trained model is run.
        transforms: what is done between the recording and the model.
    """

    preset: str
    model: ScdConfig
    training: TrainingConfig
    policy: ScdPolicyConfig
    transforms: TransformConfig = field(default_factory=TransformConfig)

    def __post_init__(self) -> None:
        self.policy.check_fits(self.model)
        self._check_objective()
        reads_past = self.model.num_past_actions or self.model.past_action_input != "none"
        if self.transforms.chunk in ("delta", "velocity") and reads_past:
            raise ConfigError(
                f"chunk {self.transforms.chunk!r} has no meaning for past actions; use --set model.num_past_actions=0 "
                "model.past_action_input=none, or chunk 'relative'"
            )

    def _check_objective(self) -> None:
        """Raises ConfigError where the model, or how it is run, is not what the objective trains."""
        objective, solver = self.training.objective, self.policy.sampler.solver
        if self.model.frames.camera and self.training.segment_length < 2:
            raise ConfigError(
                f"a model of frames learns what comes next: training.segment_length must be at least 2, got "
                f"{self.training.segment_length}"
            )
        if self.model.frames.camera and self.transforms.chunk != "absolute":
            raise ConfigError(
                f"a model of frames is told actions as they are: transforms.chunk must be 'absolute', got "
                f"{self.transforms.chunk!r}"
            )
        if self.training.self_forcing.probability and not self.model.decodes_frames:
            beside = "one with frames beside actions" if self.model.frames.beside_actions else "one that plans actions"
            raise ConfigError(
                "training.self_forcing is for models that decode frames alone (scd train frames_64): what else a "
                f"policy observes cannot be imagined; this is {beside}, set training.self_forcing.probability=0"
            )
        if self.training.sparse_history_probability and self.model.decodes_frames:
            raise ConfigError(
                "training.sparse_history_probability is for policies, which clients ask for plans; this model decodes "
                "frames: set it to 0"
            )
        if objective == "mean_flow" and self.training.precision != "32-true":
            raise ConfigError(
                "training.objective=mean_flow learns from small differences of two predictions, of which 16 bits keep "
                f"little: set training.precision=32-true, got {self.training.precision!r}"
            )
        self._check_cache()
        usual, averages = OBJECTIVES[objective].solver, objective in _AVERAGES
        if averages and not self.model.step_end_input:
            raise ConfigError(
                f"objective {objective!r} needs model.step_end_input=true; as a setting, training.objective sets it too"
            )
        if (solver == "mip") != (objective == "mip") or (solver == "average" and not averages):
            raise ConfigError(f"policy.sampler.solver {solver!r} is not for objective {objective!r}; use {usual!r}")
        if self.training.trained == "decoder" and self.model.architecture == "entangled":
            raise ConfigError(
                "training.trained='decoder' leaves the encoder as it is, and the entangled architecture has no encoder "
                "apart from its decoder; use trained='all'"
            )

    def _check_cache(self) -> None:
        """Raises ConfigError where features of pictures are not the same in every batch."""
        images = self.model.images
        if not self.training.cache_features:
            return
        if images.encoder != "pretrained" or not images.frozen:
            raise ConfigError(
                "training.cache_features keeps what a frozen backbone makes of pictures: it needs "
                f"model.images.encoder=pretrained and model.images.frozen=true, got {images.encoder!r} and "
                f"{str(images.frozen).lower()}"
            )
        if self.training.augmentation.is_on:
            raise ConfigError(
                "training.cache_features and augmentation exclude each other, since augmented pictures are others in "
                "every batch: set training.augmentation.shift, brightness, contrast and saturation to 0, or leave "
                "cache_features off"
            )

    def with_tasks(self, vectors: Mapping[str, Sequence[float]]) -> "ExperimentConfig":
        """The same experiment, with the vector of each episode's task (by its words) as an observation."""
        tasks = {text: tuple(vector) for text, vector in vectors.items()}
        width = len(next(iter(tasks.values())))
        shapes = {**self.model.observation_shapes, TASK: (width,)}
        return replace(
            self,
            transforms=replace(self.transforms, tasks=tasks),
            model=replace(self.model, observation_shapes=shapes),
        )

    def with_goals(self, keys: Sequence[str]) -> "ExperimentConfig":
        """The same experiment, with what was observed under these keys at an episode's end as observations.

        Raises:
            UnknownNameError: the model does not observe a key.
        """
        shapes = dict(self.model.observation_shapes)
        for key in keys:
            if key not in shapes:
                raise UnknownNameError("observation key of a goal", key, shapes)
        shapes |= {GOAL + key: shapes[key] for key in keys}
        return replace(
            self,
            transforms=replace(self.transforms, goals=tuple(keys)),
            model=replace(self.model, observation_shapes=shapes),
        )

    def with_autoencoder(self, autoencoder: AutoencoderConfig) -> "ExperimentConfig":
        """The same experiment with frames decoded as its latents; patches are at least as large as its places."""
        frames = self.model.frames
        size = max(frames.patch_size, autoencoder.factor)
        frames = replace(frames, autoencoder=autoencoder, patch_size=size)
        return replace(self, model=replace(self.model, frames=frames))

    def with_objective(self, objective: Objective) -> "ExperimentConfig":
        """The same experiment with another objective, and with the decoder's inputs and the sampler that go with it."""
        if objective not in OBJECTIVES:
            raise UnknownNameError("training objective", objective, OBJECTIVES)
        return replace(
            self,
            model=replace(self.model, step_end_input=objective in _AVERAGES),
            training=replace(self.training, objective=objective),
            policy=replace(self.policy, sampler=OBJECTIVES[objective]),
        )
