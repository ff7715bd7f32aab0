"""The other half of the model: from the same history, the next frame in the place of an action chunk.

    context = encoder(pictures, actions)                     once per control step, keys and values cached
    frame   = decoder(noisy patches, flow time; context, action)      once per denoising step, no attention to history

Encoder and decoder are those that plan actions; the decoder's tokens are patches of the frame that follows, each beside
the patch that was last seen in its place, and the action executed in the present control step is one more token of its
context. Further frames follow by giving what was imagined to the encoder as the next observation. Where a model plans
actions and decodes frames (joint.py), a `FrameHead` reads what that model's encoder makes of the picture.

With an autoencoder, patches are of its latents (Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion
Models", arXiv 2112.10752), and the history encoder sees pictures as ever. What is imagined on from is then two things:
the encoder is given the picture, and beside the tokens of the next frame stand the latents that were denoised, not
those of the picture encoded again, so that nothing of a still place is lost from frame to frame.

The decoder says what the clean patch is, not the velocity, which follows from it: a patch has more numbers than the
transformer is wide, so noise would not pass through it, but pictures do (Li & He, "Back to Basics: Let Denoising
Generative Models Denoise", arXiv 2511.13720).

Shapes: B batch, M samples per stream, R = B * M samples, H W C picture, h w F latents, L patches, Dx numbers in one, K
context tokens, Da action width, D width.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from scd_robot.diffusion import SamplerConfig, sample
from scd_robot.errors import ShapeError
from scd_robot.model.base import HistoryModel
from scd_robot.model.causal_dit import EntangledModel, HistoryContext
from scd_robot.model.config import ScdConfig
from scd_robot.model.decoder import Conditioning, DiffusionDecoder
from scd_robot.model.denoiser import ContextT, Denoiser
from scd_robot.model.scd import SeparableModel
from scd_robot.nn import Autoencoder, sine_places

__all__ = ["CausalDitFrameModel", "FrameDenoiser", "FrameHead", "FrameModel", "ScdFrameModel"]

_HALF = 127.5  # grey levels to 1
_CHANGE = 4.0  # how much larger changes of pixels are as tokens: those that an eye sees are as large as the noise


class FrameDenoiser(Denoiser[ContextT]):
    """Denoises the next frame.

    imagine       context, action, `known(last frame)` -> next frame, NFE times `decoder.velocity`
    velocity      noisy patches, flow time, `with_action(context, action)` -> velocity                 (training)

    Attributes:
        autoencoder: makes latents of pictures; not trained here. None = patches are of pixels.
    """

    autoencoder: Autoencoder | None

    def __init__(self, config: ScdConfig) -> None:
        super().__init__(config)
        self.action = nn.Linear(config.action_dim, config.width)
        self.action_norm = nn.LayerNorm(
            config.width, eps=1e-6, elementwise_affine=False
        )  # to unit RMS, as contexts are
        # Patches know from the start where they are, as do the pictures' tokens: what comes of a place is found there.
        places = config.frames.places(config.observation_shapes[config.frames.camera])
        self.decoder.position.data.copy_(sine_places(places, config.width))
        self.autoencoder, self._change = None, _CHANGE
        if config.frames.autoencoder is not None:
            channels = config.observation_shapes[config.frames.camera][2]
            self.autoencoder = Autoencoder(config.frames.autoencoder, channels).requires_grad_(False)
            self._change = 1.0  # those of normalised latents are so as they are

    def with_action(self, context: ContextT, action: Tensor) -> ContextT:
        """The context (R samples) of the next frame, with the action (R, Da) executed in the present control step."""
        return self._with_token(context, self._embedded(action))

    def known(self, last: Tensor) -> Tensor:
        """What is known (R, L, Dx) of the tokens that follow frames (R, H, W, C) uint8: their patches."""
        if self.autoencoder is not None:
            return self._patches(self.autoencoder.encode(last))
        return self._patches(last.to(self.decoder.position.dtype) / _HALF - 1)

    def tokens(self, frame: Tensor, known: Tensor) -> Tensor:
        """Clean tokens (R, L, Dx) of frames (R, H, W, C) uint8 that follow those of which `known` (R, L, Dx) is."""
        return self.leading(self.known(frame), known)

    def leading(self, patches: Tensor, known: Tensor) -> Tensor:
        """Clean tokens (R, L, Dx) that lead from what is known to these patches (R, L, Dx)."""
        return self._change * (patches - known) if self.config.frames.residual else patches

    def frames(self, tokens: Tensor, known: Tensor) -> Tensor:
        """Inverse of `tokens`, (R, H, W, C) uint8; with an autoencoder as far as that is one."""
        return self.following(tokens, known)[0]

    def following(self, tokens: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """The frames (R, H, W, C) uint8 of tokens, and what is known (R, L, Dx) when those after them are denoised."""
        patches = tokens / self._change + known if self.config.frames.residual else tokens
        if self.autoencoder is not None:
            return self.autoencoder.decode(self._places(patches)), patches
        frame = ((self._places(patches) + 1) * _HALF).round().clamp(0, 255).to(torch.uint8)
        return frame, self.known(frame)

    def velocity(
        self,
        x: Tensor,
        flow_time: Tensor,
        context: ContextT,
        token_valid: Tensor | None = None,
        end_time: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """As of `Denoiser`, at flow times below 1, from the clean tokens that the decoder says."""
        said = super().velocity(x, flow_time, context, token_valid, end_time, known)
        return (said - x) / (1 - flow_time)[..., None]

    def imagine(
        self,
        context: ContextT,
        action: Tensor,
        known: Tensor,
        *,
        sampler: SamplerConfig | None = None,
        noise: Tensor | None = None,
        guidance_scale: float = 1.0,
        corruption_noise: Tensor | None = None,
        conditioning: Mapping[float, Conditioning] | None = None,
    ) -> Tensor:
        """Denoises the tokens (B, L, Dx) of the next frame of each row; `frames` makes a picture of them.

        Args:
            context: of the present control step, B rows.
            action: (B, Da) executed in it.
            known: (B, L, Dx) what is known of its picture.
            sampler: solver and number of denoising steps; None = `SamplerConfig()`.
            noise: (B, L, Dx); None = drawn from torch's generator.
            guidance_scale: above 1, extrapolates away from a corrupted context, for twice the decoder calls.
            corruption_noise: (B, K + 1, D) standard normal for that; None = drawn.
            conditioning: of this sampler, from `conditioning`, where it was computed once for many frames.

        Raises:
            ConfigError: a solver that asks at flow time 1, or guidance of a model without corruption.
            ShapeError: actions, what is known, or noise of another shape.
        """
        config = self.config
        shape = (len(context), *config.token_shape)
        expected = (config.action_dim,), config.token_shape, config.token_shape
        given = (("action", action), ("known", known), ("noise", noise))
        for (name, value), parts in zip(given, expected, strict=True):
            if value is not None and tuple(value.shape) != (len(context), *parts):
                raise ShapeError(f"{name} must be {(len(context), *parts)}, got {tuple(value.shape)}")
        if noise is None:
            weight = self.decoder.position
            noise = torch.randn(shape, device=weight.device, dtype=weight.dtype)
        sampler = sampler or SamplerConfig()
        conditioning = self.conditioning(sampler) if conditioning is None else conditioning
        full = self._with_token(context, self._embedded(action))
        clean = self._velocity(full, conditioning, None, guidance_scale, corruption_noise)

        def velocity(x: Tensor, time: float) -> Tensor:
            return (clean(torch.cat((x, known), dim=-1), time) - x) / (1 - time)

        return sample(velocity, noise, sampler).x

    def _embedded(self, action: Tensor) -> Tensor:
        """The token (R, D) of actions (R, Da)."""
        token: Tensor = self.action_norm(self.action(action))
        return token

    def _patches(self, values: Tensor) -> Tensor:
        """Pixels (R, H, W, C), or latents (R, h, w, F), as (R, L, Dx)."""
        rows, columns = self._grid
        grid = values.reshape(len(values), rows, values.shape[1] // rows, columns, -1, values.shape[-1])
        return grid.transpose(2, 3).flatten(3).flatten(1, 2)

    def _places(self, patches: Tensor) -> Tensor:
        """Inverse of `_patches`."""
        frames = self.config.frames
        side = frames.patch_size if frames.autoencoder is None else frames.patch_size // frames.autoencoder.factor
        rows, columns = self._grid
        grid = patches.reshape(len(patches), rows, columns, side, side, -1).transpose(2, 3)
        return grid.reshape(len(patches), rows * side, columns * side, -1)

    @property
    def _grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        frames = self.config.frames
        return frames.places(self.config.observation_shapes[frames.camera])

    @abstractmethod
    def _with_token(self, context: ContextT, token: Tensor) -> ContextT:
        """The context of R samples with one more token (R, D)."""


class FrameModel(FrameDenoiser[ContextT], HistoryModel[ContextT]):
    """A model of history that denoises the next frame, and nothing else.

    encode_step   (B, ...) picture, cache -> context of one more control step
    """


class SeparableFrames(FrameDenoiser[Tensor]):
    """The decoder reads the context of one control step, and the action, and never sees history."""

    def __init__(self, config: ScdConfig) -> None:
        super().__init__(config)
        count = self.config.num_decoder_context - 1
        camera = config.frames.camera
        places = config.images.places(camera, config.observation_shapes[camera])
        if count == math.prod(places):  # the picture's own tokens
            self.decoder.context_position.data[:count].copy_(sine_places(places, config.width))

    def _with_token(self, context: Tensor, token: Tensor) -> Tensor:
        return torch.cat((context, token[:, None]), dim=1)


class ScdFrameModel(SeparableFrames, FrameModel[Tensor], SeparableModel):
    """A separable model of frames."""


class _ScdDecoder(Denoiser[Tensor]):
    """The decoder of a separable model alone."""

    def __init__(self, config: ScdConfig) -> None:
        super().__init__(config)
        self.decoder = DiffusionDecoder.of(config)


class FrameHead(SeparableFrames, _ScdDecoder):
    """All of a separable model of frames but what reads the history: that is another model's, which has this one.

    Args:
        config: of the model of frames, see `ScdConfig.frames_alone`.
    """


class CausalDitFrameModel(FrameModel[HistoryContext], EntangledModel):
    """The entangled rival: the same tokens, through layers that all read the history at every denoising step.

    Keys and values of the history are cached across denoising steps and control steps.
    """

    def _with_token(self, context: HistoryContext, token: Tensor) -> HistoryContext:
        return replace(context, extra=token.view(*context.position.shape, -1))
