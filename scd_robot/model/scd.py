"""START HERE: the whole model. Encode history once per control step, denoise an action chunk in many cheap steps.

    context = encoder(history)                       once per control step, keys and values cached
    velocity = decoder(noisy chunk, flow time, context)      once per denoising step, no attention to history

Separable Causal Diffusion (Bai et al., "Causality in Video Diffusers is Separable from Denoising", arXiv 2602.10095),
with a control step in the place of a video frame. The loop over denoising steps is `ActionModel.plan` in base.py, which
this model shares with its entangled rival (causal_dit.py). The picture that follows an action is decoded from the same
history: frames.py, and beside actions joint.py.

Shapes: B batch, T control steps, M samples per stream, K context tokens, D width.
"""

from torch import Tensor

from scd_robot.model.base import ActionModel, HistoryModel
from scd_robot.model.config import ScdConfig
from scd_robot.model.decoder import DiffusionDecoder
from scd_robot.model.encoder import CausalEncoder
from scd_robot.nn import KVCache

__all__ = ["ScdModel", "SeparableModel"]


class SeparableModel(HistoryModel[Tensor]):
    """Tokenizer, causal encoder and diffusion decoder, whatever the decoder's tokens are.

    encode        (B, T, ...) observations -> (B, T, K, D) contexts, all control steps in one pass   (training)
    encode_step   (B, ...) observation, cache -> (B, K, D) context of one more control step          (control loop)
    velocity      noisy tokens, flow time, context -> velocity                                      (training)
    """

    def __init__(self, config: ScdConfig) -> None:
        super().__init__(config)
        steps = self.tokenizer
        self.encoder = CausalEncoder(config, steps.tokens_per_step, steps.context_slots, steps.sees)
        self.decoder = DiffusionDecoder.of(config)

    def samples(self, context: Tensor, copies: int) -> Tensor:
        """Contexts (B, M, K, D) as (B * M * copies, K, D)."""
        return context.flatten(0, 1).repeat_interleave(copies, 0)

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty history for `encode_step`, on the model's device and in its dtype."""
        weight = self.tokenizer.type_embedding
        return self.encoder.new_cache(batch_size, weight.device, weight.dtype)

    def _encode(self, tokens: Tensor, valid: Tensor | None, stream: Tensor | None, first_position: int) -> Tensor:
        context: Tensor = self.encoder(tokens, valid, stream, first_position)
        return context

    def _encode_at(self, position: Tensor, tokens: Tensor, valid: Tensor | None, stream: Tensor | None) -> Tensor:
        context: Tensor = self.encoder(tokens, valid, stream, 0, position)
        return context

    def _encode_step(self, tokens: Tensor, cache: KVCache, valid: Tensor | None, active: Tensor | None) -> Tensor:
        return self.encoder.step(tokens, cache, valid, active)


class ScdModel(SeparableModel, ActionModel[Tensor]):
    """A separable model whose decoder denoises action chunks.

    plan          context -> action chunk, NFE times `decoder.velocity`                             (control loop)
    """
