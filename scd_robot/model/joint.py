"""Actions and frames from one encoder: `ScdModel`, whose history a frame decoder reads as well.

    outputs = encoder(history)                                          one pass, one cache
    action decoder <- the context slots                                 which see everything, as ever
    frame decoder  <- the tokens of one camera's picture, and the action executed now

The tokens of that picture see pictures of that camera alone (`StepTokenizer.sees`). So the actions to be executed reach
the frame decoder and no context, and the part that imagines frames is a model of frames like any other: it goes on from
pictures that it imagined, where nobody knows what else would have been observed.

Shapes: B batch, T control steps, M positions per stream, K context tokens, Kf tokens of the picture, D width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from scd_robot.model.config import ScdConfig
from scd_robot.model.frames import FrameHead, ScdFrameModel
from scd_robot.model.scd import ScdModel

__all__ = ["JointModel"]


class JointModel(ScdModel):
    """An `ScdModel` in all that concerns actions; `frame_head` decodes frames, `frame_model` imagines them."""

    def __init__(self, config: ScdConfig) -> None:
        super().__init__(config)
        self.frame_head = FrameHead(config.frames_alone)  # last, so that the rest begins as without it

    def encode_both_at(
        self,
        position: Tensor,
        observation: Mapping[str, Tensor],
        past_action: Tensor | None = None,
        *,
        present: Mapping[str, Tensor] | None = None,
        stream: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """In one pass the contexts (B, M, K, D) of `encode_at`, and those (B, M, Kf, D) that frames follow from."""
        tokens, valid = self._tokenize(observation, past_action, None, present, stream)
        outputs = self.encoder.norm(self.encoder.outputs(tokens, valid, stream, at=position))
        return outputs[:, :, self.tokenizer.context_slots], outputs[:, :, self.tokenizer.frame_slots]

    def frame_model(self) -> ScdFrameModel:
        """The model of frames that is part of this one; it shares the weights, but for the embeddings of its tokens."""
        tokenizer, head = self.tokenizer, self.frame_head
        model = ScdFrameModel(head.config)
        model.tokenizer.images[0] = tokenizer.images[tokenizer.image_keys.index(self.config.frames.camera)]
        with torch.no_grad():
            model.tokenizer.type_embedding = nn.Parameter(tokenizer.type_embedding[tokenizer.frame_slots].clone())
        model.encoder.blocks = self.encoder.blocks
        model.decoder, model.action, model.autoencoder = head.decoder, head.action, head.autoencoder
        return model
