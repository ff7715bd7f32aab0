"""The other half of the model: from the same history, the next frame in the place of an action chunk.

    context = encoder(pictures, actions)                     once per control step, keys and values cached
    frame   = decoder(noisy patches, flow time; context, action)      once per denoising step, no attention to history

Encoder and decoder are those that plan actions; the decoder's tokens are patches of the frame that follows, each beside
the patch that was last seen in its place, and the action executed in the present control step is one more token of its
context. Further frames follow by giving what was imagined to the encoder as the next observation. Where a model plans
actions and decodes frames (joint.py), a `FrameHead` reads what that model's encoder makes of the picture.

The decoder says what the clean patch is, not the velocity, which follows from it: a patch has more numbers than the
transformer is wide, so noise would not pass through it, but pictures do (Li & He, "Back to Basics: Let Denoising
Generative Models Denoise", arXiv 2511.13720).

Shapes: B batch, M samples per stream, R = B * M samples, H W C picture, L patches, Dx numbers in one, K context tokens,
Da action width, D width.
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
from scd_robot.nn import sine_places

__all__ = ["CausalDitFrameModel", "FrameDenoiser", "FrameHead", "FrameModel", "ScdFrameModel"]

_HALF = 127.5  # grey levels to 1
_CHANGE = 4.0  # how much larger tokens of changes are: those that an eye sees are about as large as the noise


class FrameDenoiser(Denoiser[ContextT]):
    """Denoises the next frame.

    imagine       context, action, last frame -> next frame, NFE times `decoder.velocity`
    velocity      noisy patches, flow time, `with_action(context, action)` -> velocity                 (training)
    """

    def __init__(self, config: ScdConfig) -> None:
        super().__init__(config)
        self.action = nn.Linear(config.action_dim, config.width)
        self.action_norm = nn.LayerNorm(
            config.width, eps=1e-6, elementwise_affine=False
        )  # to unit RMS, as contexts are
        # Patches know from the start where they are, as do the pictures' tokens: what comes of a place is found there.
        places = config.frames.places(config.observation_shapes[config.frames.camera])
        self.decoder.position.data.copy_(sine_places(places, config.width))

    def with_action(self, context: ContextT, action: Tensor) -> ContextT:
        """The context (R samples) of the next frame, with the action (R, Da) executed in the present control step."""
        return self._with_token(context, self._embedded(action))

    def tokens(self, frame: Tensor, last: Tensor) -> Tensor:
        """Clean tokens (R, L, Dx) of frames (R, H, W, C) uint8 that follow those in `last`."""
        values = self._scaled(frame)
        if self.config.frames.residual:
            values = _CHANGE * (values - self._scaled(last))
        return self._patches(values)

    def known(self, last: Tensor) -> Tensor:
        """What is known (R, L, Dx) of each token: the patch of the last frame."""
        return self._patches(self._scaled(last))

    def frames(self, tokens: Tensor, last: Tensor) -> Tensor:
        """Inverse of `tokens`, (R, H, W, C) uint8."""
        side, (height, width, channels) = self.config.frames.patch_size, last.shape[1:]
        grid = tokens.reshape(-1, height // side, width // side, side, side, channels)
        values = grid.transpose(2, 3).reshape(last.shape)
        if self.config.frames.residual:
            values = values / _CHANGE + self._scaled(last)
        return ((values + 1) * _HALF).round().clamp(0, 255).to(torch.uint8)

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
        last: Tensor,
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
            last: (B, H, W, C) uint8, its picture.
            sampler: solver and number of denoising steps; None = `SamplerConfig()`.
            noise: (B, L, Dx); None = drawn from torch's generator.
            guidance_scale: above 1, extrapolates away from a corrupted context, for twice the decoder calls.
            corruption_noise: (B, K + 1, D) standard normal for that; None = drawn.
            conditioning: of this sampler, from `conditioning`, where it was computed once for many frames.

        Raises:
            ConfigError: a solver that asks at flow time 1, or guidance of a model without corruption.
            ShapeError: actions, pictures or noise of another shape.
        """
        config = self.config
        shape = (len(context), *config.token_shape)
        expected = (config.action_dim,), config.observation_shapes[config.frames.camera], config.token_shape
        given = (("action", action), ("last", last), ("noise", noise))
        for (name, value), parts in zip(given, expected, strict=True):
            if value is not None and tuple(value.shape) != (len(context), *parts):
                raise ShapeError(f"{name} must be {(len(context), *parts)}, got {tuple(value.shape)}")
        if noise is None:
            weight = self.decoder.position
            noise = torch.randn(shape, device=weight.device, dtype=weight.dtype)
        sampler = sampler or SamplerConfig()
        conditioning = self.conditioning(sampler) if conditioning is None else conditioning
        full, known = self._with_token(context, self._embedded(action)), self.known(last)
        clean = self._velocity(full, conditioning, None, guidance_scale, corruption_noise)

        def velocity(x: Tensor, time: float) -> Tensor:
            return (clean(torch.cat((x, known), dim=-1), time) - x) / (1 - time)

        return sample(velocity, noise, sampler).x

    def _embedded(self, action: Tensor) -> Tensor:
        """The token (R, D) of actions (R, Da)."""
        token: Tensor = self.action_norm(self.action(action))
        return token

    def _patches(self, values: Tensor) -> Tensor:
        """(R, H, W, C) as (R, L, Dx)."""
        side, (rows, height, width, channels) = self.config.frames.patch_size, values.shape
        grid = values.reshape(rows, height // side, side, width // side, side, channels).transpose(2, 3)
        return grid.flatten(3).flatten(1, 2)

    def _scaled(self, frame: Tensor) -> Tensor:
        """Pictures (R, H, W, C) uint8 in [-1, 1]."""
        return frame.to(self.decoder.position.dtype) / _HALF - 1

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
