"""An entangled model's layers become a separable model's, without training: what `scd convert-policy` begins with.

    encoder  <- layers of the entangled model; for history tokens at flow time 1, for context slots at 0, so that their
                modulation is two sets of constants
    slots    <- embedded action queries at high noise: the mean of the noise at the positions of the chunk
    decoder  <- layers of the entangled model as they are, with their embedding, flow time, step length and head

After the post-training of Bai et al., arXiv 2602.10095: layers are copied, an encoder and a decoder may have
some in common, and the encoder is fed the current frame at high noise. Here that frame is the action chunk.

Shapes: Ta chunk length, K context tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from scd_robot.errors import ConfigError
from scd_robot.model.causal_dit import CausalDitModel
from scd_robot.model.config import ScdConfig
from scd_robot.model.scd import ScdModel
from scd_robot.nn import CausalDitBlock

__all__ = ["parse_layers", "separable_config", "separate"]


def parse_layers(text: str, depth: int) -> tuple[int, ...]:
    """Numbers of layers from what a user wrote.

    Args:
        text: parts with commas between them, in increasing order: `3` = layer 3, `0:5` = layers 0 to 4, `first:2`,
            `last:1`.
        depth: layers of the model.

    Raises:
        ConfigError: not of that form, a layer that is not there, or one that is named twice or out of order.
    """
    known = f"the model has {depth} layers, 0 to {depth - 1}"
    layers: list[int] = []
    for part in text.split(","):
        start, colon, stop = part.strip().partition(":")
        if not stop.isdecimal() if colon else not start.isdecimal():
            raise ConfigError(f"layers are written like 0:5 or first:1,last:1 or 0,3; {part.strip()!r} is not; {known}")
        if start in ("first", "last"):
            found = range(int(stop)) if start == "first" else range(depth - int(stop), depth)
        elif not start.isdecimal():
            raise ConfigError(f"layers begin with a number, first or last, {part.strip()!r} does not; {known}")
        else:
            found = range(int(start), int(stop) if colon else int(start) + 1)
        if not found or found.start < 0 or found.stop > depth:
            raise ConfigError(f"{part.strip()!r} names no layers, or some that are not there: {known}")
        layers += found
    if layers != sorted(set(layers)):
        raise ConfigError(f"{text!r} names layers {layers}: each may be named once, in increasing order; {known}")
    return tuple(layers)


def separable_config(
    source: ScdConfig,
    encoder: Sequence[int],
    decoder: Sequence[int],
    num_context_tokens: int,
    fusion: Literal["concat", "prefix"] = "prefix",
    context_corruption: float = 0.05,
) -> ScdConfig:
    """The architecture that `separate` makes of an entangled one.

    Raises:
        ConfigError: it is not entangled, an encoder layer sees no history, or there are more context tokens than
            actions in a chunk.
    """
    if source.architecture != "entangled":
        raise ConfigError("only entangled policies (model.architecture=entangled) are converted; this one is separable")
    first_local = source.depth - source.local_layers
    if max(encoder) >= first_local:
        raise ConfigError(
            f"the last {source.local_layers} of {source.depth} layers see no history (local_layers): take the "
            f"encoder's from 0:{first_local}, got {list(encoder)}"
        )
    if num_context_tokens > source.chunk_length:
        raise ConfigError(
            f"num_context_tokens {num_context_tokens} exceeds chunk_length {source.chunk_length}: context tokens begin "
            "as the queries of the chunk's actions"
        )
    return replace(
        source,
        architecture="separable",
        local_layers=0,
        encoder_layers=len(encoder),
        decoder_layers=len(decoder),
        num_context_tokens=num_context_tokens,
        context_in_history=False,
        fusion=fusion,
        context_corruption=context_corruption,
        encoder_bias=True,
        encoder_modulation=True,
    )


@torch.no_grad()
def separate(source: CausalDitModel, config: ScdConfig, encoder: Sequence[int], decoder: Sequence[int]) -> ScdModel:
    """A separable model with the weights of an entangled one's layers.

    An encoder layer does with the history exactly what the source's layer does, and with context slots what that does
    with tokens that are nothing but noise, which the history does not see.

    Args:
        source: entangled.
        config: of `separable_config`.
        encoder: numbers of the layers that become the encoder.
        decoder: numbers of those that become the decoder.
    """
    old = source.decoder
    model = ScdModel(config).to(old.position)
    blocks = [cast(CausalDitBlock, block) for block in old.blocks]
    clean, noise = (old.condition(old.position.new_full((1, 1), time)).blocks for time in (1.0, 0.0))
    state = {f"tokenizer.{name}": value for name, value in source.tokenizer.state_dict().items()}
    state["tokenizer.type_embedding"] = torch.cat((source.tokenizer.type_embedding, _queries(source, config)))
    for place, layer in enumerate(encoder):
        state |= _under(f"encoder.blocks.{place}", _encoder_layer(blocks[layer], clean[layer], noise[layer]))
    for name in ("embed", "flow_time", "step_length", "head_modulation", "head"):
        if (part := getattr(old, name)) is not None:
            state |= _under(f"decoder.{name}", part.state_dict())
    for place, layer in enumerate(decoder):
        state |= _under(f"decoder.blocks.{place}", blocks[layer].state_dict())
    state["decoder.position"] = old.position
    state["decoder.context_embed.weight"] = torch.eye(config.width)
    state["decoder.context_embed.bias"] = torch.zeros(config.width)
    state["decoder.context_position"] = torch.zeros(config.num_context_tokens, config.width)
    if model.decoder.context_add is not None:  # nothing at first, as in the source
        state["decoder.context_add.weight"] = torch.zeros(config.width, config.width)
        state["decoder.context_add.bias"] = torch.zeros(config.width)
    model.load_state_dict(state)
    return model


def _encoder_layer(block: CausalDitBlock, clean: tuple[Tensor, ...], noise: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The weights of a modulated `CausalBlock` that does what `block` does under these modulations, (1, 1, D) each."""
    state = {name: value for name, value in block.state_dict().items() if not name.startswith("modulation.")}
    ones = torch.ones_like(clean[0].flatten())
    constants = torch.stack([torch.stack([x.flatten() for x in modulation]) for modulation in (clean, noise)])
    return {**state, "attention_norm.weight": ones, "mlp_norm.weight": ones, "modulation": constants}


def _queries(source: CausalDitModel, config: ScdConfig) -> Tensor:
    """(K, D) embeddings of the mean of the noise at the chunk's positions, K groups of neighbours averaged."""
    positions = source.decoder.position[-config.chunk_length :]
    groups = nn.functional.adaptive_avg_pool1d(positions.T, config.num_context_tokens).T
    return groups + source.decoder.embed.bias


def _under(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for key, value in state.items()}
