"""Building blocks: windowed causal attention, its ring cache, transformer blocks, embeddings, pictures to numbers."""

from scd_robot.nn.attention import (
    additive,
    attend,
    limit_to_group,
    multi_head_attention,
    never_empty,
    take_steps,
    window_mask,
    window_steps,
)
from scd_robot.nn.autoencoder import Autoencoder, AutoencoderConfig
from scd_robot.nn.backbone import Backbone, import_timm
from scd_robot.nn.blocks import AdaLNBlock, CausalBlock, CausalDitBlock, modulated_norm
from scd_robot.nn.embeddings import FlowTimeEmbedding, RotaryEmbedding, apply_rotary
from scd_robot.nn.images import ImageConfig, ImageEncoder, sine_places
from scd_robot.nn.kv_cache import KVCache
from scd_robot.nn.layout import lay_out_for_few_tokens
from scd_robot.nn.memory import room_for
from scd_robot.nn.weight_files import HUB, OR_HUB, find_weights, read_weights

__all__ = [
    "HUB",
    "OR_HUB",
    "AdaLNBlock",
    "Autoencoder",
    "AutoencoderConfig",
    "Backbone",
    "CausalBlock",
    "CausalDitBlock",
    "FlowTimeEmbedding",
    "ImageConfig",
    "ImageEncoder",
    "KVCache",
    "RotaryEmbedding",
    "additive",
    "apply_rotary",
    "attend",
    "find_weights",
    "import_timm",
    "lay_out_for_few_tokens",
    "limit_to_group",
    "modulated_norm",
    "multi_head_attention",
    "never_empty",
    "read_weights",
    "room_for",
    "sine_places",
    "take_steps",
    "window_mask",
    "window_steps",
]
