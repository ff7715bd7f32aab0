"""Architecture of one Separable Causal Diffusion model.

Shapes: H W C picture, L tokens that are denoised, Dx width of one, K context tokens.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from scd_robot.config import check_finite
from scd_robot.errors import ConfigError, UnknownNameError
from scd_robot.nn import AutoencoderConfig, ImageConfig

__all__ = ["FrameConfig", "ScdConfig"]


@dataclass(frozen=True)
class FrameConfig:
    """How frames are decoded: the next picture of one camera, a token for each patch.

    Attributes:
        camera: observation key of the pictures; empty = the model plans actions and imagines no frames.
        patch_size: side of a square patch [pixel]; must divide height and width.
        residual: tokens hold the change since the last frame, so that a decoder that knows nothing yet repeats it;
            otherwise they hold the frame itself.
        beside_actions: the model plans actions, and on the same encoder has a frame decoder besides; otherwise frames
            are all that it decodes.
        decoder_layers: of that frame decoder besides; not read where frames are all that it decodes.
        autoencoder: tokens are patches of the latents that this one makes of a picture, and patch_size must be a
            multiple of its factor; it is trained apart, and stays as it is. None = of the pixels themselves.
    """

    camera: str = ""
    patch_size: int = 8
    residual: bool = True
    beside_actions: bool = False
    decoder_layers: int = 2
    autoencoder: AutoencoderConfig | None = None

    def __post_init__(self) -> None:
        for name in ("patch_size", "decoder_layers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"frames.{name} must be at least 1, got {getattr(self, name)}")
        if self.beside_actions and not self.camera:
            raise ConfigError("frames.beside_actions needs frames.camera, the key of the pictures to imagine")
        if self.autoencoder is not None and self.patch_size % self.autoencoder.factor:
            raise ConfigError(
                f"frames.patch_size {self.patch_size} must be a multiple of {self.autoencoder.factor}, the pixels on "
                "each side of what the autoencoder makes one place"
            )

    def places(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of patches of pictures (H, W, C).

        Raises:
            ConfigError: they cannot be cut so, or have a channel that is not shown.
        """
        height, width = shape[:2]
        if shape[2] == 4:
            raise ConfigError(
                f"frames are grey or of three colours, {self.camera!r} has 4 channels: record picture[..., :3]"
            )
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"frames.patch_size {self.patch_size} must divide the sides of {self.camera!r}, {height} x {width}; "
                "choose another one, or resize the pictures (images of --transforms)"
            )
        return height // self.patch_size, width // self.patch_size

    def numbers(self, channels: int) -> int:
        """Dx, numbers in one patch of pictures of so many channels."""
        if self.autoencoder is None:
            return self.patch_size**2 * channels
        return (self.patch_size // self.autoencoder.factor) ** 2 * self.autoencoder.latent_channels


@dataclass(frozen=True)
class ScdConfig:
    """Architecture; widths of observations and actions come from the dataset.

    Attributes:
        observation_shapes: shape by observation key, without batch and time axes: vectors (n,), and pictures (H, W, C),
            which are uint8.
        action_dim: Da, width of one action.
        architecture: "separable", or "entangled": the rival `CausalDitModel` of the same width and of encoder_layers +
            decoder_layers layers, all of which see the history at every denoising step. It has no context:
            fusion, add_context and context_in_history change nothing, num_context_tokens must be 1, context_corruption
            0, and memory_gate, encoder_bias and encoder_modulation off.
        local_layers: entangled only: in the last so many layers nothing attends to earlier control steps.
        width: D, of encoder and decoder tokens.
        num_heads: N; must divide `width` into an even head width.
        encoder_layers: run once per control step; a deeper encoder costs little.
        decoder_layers: run once per denoising step.
        mlp_ratio: hidden width of the MLPs in units of `width`.
        history_length: W, control steps each encoder layer attends to, the current one included; 1 = memoryless.
            The receptive field is encoder_layers * (W - 1) + 1 control steps (times history_stride).
        history_stride: the encoder runs in every so many control steps only; W counts these.
        observation_tokens: "joint" gives all vectors of a control step one token; "per_key" one token per key, of
            which any may be absent. Pictures always have tokens of their own and may be absent.
        num_context_tokens: K, context tokens a plan reads, each from a slot of its own in the step's group. With 0,
            which models of frames may have, they are the picture's own tokens, as in arXiv 2602.10095.
        chunk_length: Ta, future actions in one plan; action 0 is for the current control step.
        num_past_actions: k, executed actions that the decoder learns to denoise as well (past-token prediction, arXiv
            2505.09561); 0 = off. They are left out when a plan is made, so they cost nothing then.
        fusion: "concat" puts context and noisy tokens in one sequence that shares the flow time (arXiv 2602.10095);
            "prefix" lets the context attend to itself only, so that its keys and values are computed once per plan.
        add_context: the mean of the context tokens, through a layer, is also added to every noisy token, so that the
            decoder's few layers need not find it by attention first. Costs one addition per denoising step.
        past_action_input: whether the previous executed action is a token of the group: "none", "noised" (noise of
            `past_action_noise` in training) or "full".
        past_action_noise: standard deviation in normalised units.
        context_in_history: whether later control steps, and the other tokens of the same one, see the context slots.
            Otherwise these only read: training computes them for the control steps that plans are made in, and the
            cache holds none.
        context_corruption: eta, noise added to the RMS-normalised context in training.
        memory_gate: zero-initialised gate per head on attention to earlier control steps (arXiv 2604.18933).
        encoder_bias: the encoder's queries, keys and values have a bias, as converted layers need (convert.py).
        encoder_modulation: likewise its layers are modulated, history and context slots by constants of their own.
        max_delay_steps: largest prefix of committed actions that training shows to the decoder as clean
            (training-time real-time chunking, arXiv 2512.05964), in half of the plans it learns from; 0 = off.
        step_end_input: the decoder is told where its denoising step ends and gives the average velocity until there;
            for the objectives mean_flow and shortcut.
        images: how pictures become tokens; nothing where there are none.
        frames: makes it a model of frames, which reads the pictures of one camera and past actions, and decodes the
            picture that follows the action of the present control step. It has one action per context (chunk_length
            1), and none of num_past_actions, max_delay_steps, step_end_input and history_stride. With
            `frames.beside_actions` it plans actions as well, whatever else it observes; see `frames_alone`.
    """

    observation_shapes: dict[str, tuple[int, ...]]
    action_dim: int
    architecture: Literal["separable", "entangled"] = "separable"
    local_layers: int = 0
    width: int = 128
    num_heads: int = 4
    encoder_layers: int = 5
    decoder_layers: int = 1
    mlp_ratio: int = 4
    history_length: int = 128
    history_stride: int = 1
    observation_tokens: Literal["joint", "per_key"] = "joint"
    num_context_tokens: int = 1
    chunk_length: int = 16
    num_past_actions: int = 8
    fusion: Literal["concat", "prefix"] = "prefix"
    add_context: bool = True
    past_action_input: Literal["none", "noised", "full"] = "none"
    past_action_noise: float = 0.3
    context_in_history: bool = False
    context_corruption: float = 0.05
    memory_gate: bool = False
    encoder_bias: bool = False
    encoder_modulation: bool = False
    max_delay_steps: int = 0
    step_end_input: bool = False
    images: ImageConfig = field(default_factory=ImageConfig)
    frames: FrameConfig = field(default_factory=FrameConfig)

    def __post_init__(self) -> None:
        check_finite(self)
        if not self.observation_shapes:
            raise ConfigError("observation_shapes is empty: a model needs at least one observation key")
        for key, shape in self.observation_shapes.items():
            if key in ("action", "past_action"):
                raise ConfigError(f"an observation key must not be called {key!r}, the name of what the policy gives")
            if len(shape) == 3 and shape[2] in (1, 3, 4):
                self.images.check(key, shape)
            elif len(shape) != 1 or shape[0] < 1:
                raise ConfigError(
                    f"observation {key!r} has shape {tuple(shape)}; this model takes vectors (n,) with n >= 1, and "
                    "pictures (H, W, C) with 1, 3 or 4 channels"
                )
        positive = ("action_dim", "width", "num_heads", "encoder_layers", "decoder_layers", "mlp_ratio")
        self._check_frames()
        for name in (*positive, "history_length", "history_stride", "chunk_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_past_actions", "past_action_noise", "context_corruption", "max_delay_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.width % (2 * self.num_heads):
            raise ConfigError(f"width {self.width} must be a multiple of 2 * num_heads = {2 * self.num_heads}")
        for name, choices in (
            ("architecture", ("separable", "entangled")),
            ("observation_tokens", ("joint", "per_key")),
            ("fusion", ("concat", "prefix")),
            ("past_action_input", ("none", "noised", "full")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.encoder_modulation and self.context_in_history:
            raise ConfigError("encoder_modulation needs context_in_history=false: the slots' constants are their own")
        if self.max_delay_steps >= self.chunk_length:
            raise ConfigError(f"max_delay_steps {self.max_delay_steps} must be below chunk_length {self.chunk_length}")

        most = self.depth if self.architecture == "entangled" else 0
        if not 0 <= self.local_layers <= most:
            raise ConfigError(f"local_layers must be in 0..{most}, got {self.local_layers}")
        needed = {
            "context_corruption": 0,
            "num_context_tokens": 1,
            "memory_gate": False,
            "encoder_bias": False,
            "encoder_modulation": False,
        }
        if self.architecture == "entangled" and any(getattr(self, name) != value for name, value in needed.items()):
            found = ", ".join(f"{name} {getattr(self, name)}" for name in needed)
            raise ConfigError(
                "the entangled architecture has no context: it needs "
                + ", ".join(f"{name} {value}" for name, value in needed.items())
                + f"; got {found}"
            )

    def _check_frames(self) -> None:
        """Raises ConfigError where a model of frames cannot be one, or one of actions has what only those have."""
        camera, least = self.frames.camera, 0 if self.decodes_frames else 1
        if self.num_context_tokens < least:
            raise ConfigError(f"num_context_tokens must be at least {least}, got {self.num_context_tokens}")
        if camera and self.images.encoder == "pretrained":
            raise ConfigError(
                "models that imagine frames learn from pixels: frames.camera needs images.encoder convolutional or "
                "patch, got 'pretrained'"
            )
        if self.frames.beside_actions:
            self._check_frames_beside()
        if not self.decodes_frames:
            return
        if set(self.observation_shapes) != {camera} or len(self.observation_shapes[camera]) != 3:
            raise ConfigError(
                f"a model of frames reads the pictures of its camera {camera!r} and nothing else, got observations "
                f"{ {key: tuple(shape) for key, shape in self.observation_shapes.items()} }"
            )
        self.frames.places(self.observation_shapes[camera])
        needed = {
            "chunk_length": 1,
            "num_past_actions": 0,
            "max_delay_steps": 0,
            "step_end_input": False,
            "history_stride": 1,
        }
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise ConfigError(f"a model of frames needs {name} {value}, got {getattr(self, name)}")

    def _check_frames_beside(self) -> None:
        """Raises ConfigError where a model that plans actions cannot have a frame decoder besides."""
        camera = self.frames.camera
        if camera not in self.image_keys:
            raise UnknownNameError("camera (model.frames.camera)", camera, self.image_keys)
        self.frames.places(self.observation_shapes[camera])
        for name, value in {"architecture": "separable", "history_stride": 1}.items():
            if getattr(self, name) != value:
                raise ConfigError(f"frames beside actions need {name} {value}, got {getattr(self, name)}")

    @property
    def decodes_frames(self) -> bool:
        """Whether frames are all that is decoded; else the decoder's tokens are actions."""
        return bool(self.frames.camera) and not self.frames.beside_actions

    @property
    def frames_alone(self) -> "ScdConfig":
        """Of a model with frames beside actions, the model of frames that is part of it.

        The pictures' own tokens are its context, and nothing else that is observed reaches them.
        """
        camera = self.frames.camera
        return replace(
            self,
            observation_shapes={camera: self.observation_shapes[camera]},
            decoder_layers=self.frames.decoder_layers,
            num_context_tokens=0,
            add_context=False,
            chunk_length=1,
            num_past_actions=0,
            past_action_input="none",
            max_delay_steps=0,
            step_end_input=False,
            frames=replace(self.frames, beside_actions=False),
        )

    @property
    def token_shape(self) -> tuple[int, int]:
        """(L, Dx) of what the decoder denoises."""
        if not self.decodes_frames:
            return self.num_past_actions + self.chunk_length, self.action_dim
        shape = self.observation_shapes[self.frames.camera]
        return math.prod(self.frames.places(shape)), self.frames.numbers(shape[2])

    @property
    def num_decoder_context(self) -> int:
        """Context tokens that the decoder reads: K, and for frames one more, the action."""
        if not self.decodes_frames:
            return self.num_context_tokens
        shape = self.observation_shapes[self.frames.camera]
        return 1 + (self.num_context_tokens or self.images.num_tokens(self.frames.camera, shape))

    @property
    def vector_keys(self) -> list[str]:
        """Observation keys of vectors, sorted."""
        return sorted(key for key, shape in self.observation_shapes.items() if len(shape) == 1)

    @property
    def image_keys(self) -> list[str]:
        """Observation keys of pictures, sorted."""
        return sorted(key for key, shape in self.observation_shapes.items() if len(shape) == 3)

    @property
    def depth(self) -> int:
        """Layers through which history reaches a plan."""
        return self.encoder_layers + (self.decoder_layers if self.architecture == "entangled" else 0)

    @property
    def leaks_past_actions(self) -> bool:
        """The encoder is shown the very actions that past-token prediction asks the decoder for."""
        return self.past_action_input == "full" and self.num_past_actions > 0

    @property
    def receptive_field(self) -> int:
        """Control steps that can influence one context, the current one included."""
        return self.history_stride * (self.depth - self.local_layers) * (self.history_length - 1) + 1
