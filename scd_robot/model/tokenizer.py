"""One control step becomes a group of tokens.

Shapes: B batch, T control steps, P tokens per group, K context tokens, Da action width, D width; H W C picture, h w F
its feature map.
"""

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from scd_robot.errors import ShapeError, UnknownNameError
from scd_robot.model.config import ScdConfig
from scd_robot.nn import Backbone, ImageEncoder

__all__ = ["StepTokenizer"]


class StepTokenizer(nn.Module):
    """Embeds normalised observations (and the previous action) and appends the context slots.

    A group is [vector tokens, image tokens camera by camera, previous-action token (where the configuration has one), K
    context slots]. Every slot has a name and a type embedding of its own; the context slots hold nothing else. The
    entangled architecture has no context slots.
    """

    def __init__(self, config: ScdConfig) -> None:
        super().__init__()
        self.config = config
        self.keys, self.image_keys = config.vector_keys, config.image_keys
        widths = {key: config.observation_shapes[key][0] for key in self.keys}
        if config.observation_tokens == "joint" and widths:
            widths = {"observation": sum(widths.values())}
        self.observation = nn.ModuleList(nn.Linear(n, config.width) for n in widths.values())
        shapes = {key: config.observation_shapes[key] for key in self.image_keys}
        pretrained = config.images.encoder == "pretrained" and bool(shapes)
        self.backbone = Backbone(config.images, shapes) if pretrained else None  # one for all cameras
        maps = {} if self.backbone is None else self.backbone.map_shapes
        self.images = nn.ModuleList(
            ImageEncoder(config.images, key, shape, config.width, config.num_heads, maps.get(key))
            for key, shape in shapes.items()
        )
        self.has_past_action = config.past_action_input != "none"
        self.past_action = nn.Linear(config.action_dim, config.width) if self.has_past_action else None
        pictures = [(key, config.images.num_tokens(key, config.observation_shapes[key])) for key in self.image_keys]
        groups = [(name, 1) for name in widths] + pictures
        groups += [("past_action", 1)] * self.has_past_action
        ends = itertools.accumulate(count for _, count in groups)
        self._slots = {name: slice(end - count, end) for (name, count), end in zip(groups, ends, strict=True)}
        self.num_slots = config.num_context_tokens if config.architecture == "separable" else 0
        self.slot_names = [name for name, count in groups for _ in range(count)]
        self.slot_names += [f"context_{i}" for i in range(self.num_slots)]
        self.type_embedding = nn.Parameter(torch.randn(len(self.slot_names), config.width) * 0.02)

    @property
    def context_slots(self) -> slice:
        """Which tokens of a group the context is read from."""
        if not self.num_slots:
            return self.frame_slots
        return slice(self.tokens_per_step - self.num_slots, self.tokens_per_step)

    @property
    def frame_slots(self) -> slice:
        """Which tokens of a group are of the picture that frames are imagined of."""
        return self._slots[self.config.frames.camera]

    @property
    def sees(self) -> Tensor | None:
        """(P, P) bool, which tokens of any group a token sees; None = all.

        Where frames are decoded beside actions, tokens of the picture see those of pictures alone: what follows a
        picture is then told by pictures and actions, and can be imagined on where nothing else is known.
        """
        if not self.config.frames.beside_actions:
            return None
        sees = torch.ones(self.tokens_per_step, self.tokens_per_step, dtype=torch.bool)
        sees[self.frame_slots] = False
        sees[self.frame_slots, self.frame_slots] = True
        return sees

    @property
    def tokens_per_step(self) -> int:
        """P."""
        return len(self.slot_names)

    def forward(
        self,
        observation: Mapping[str, Tensor],
        past_action: Tensor | None = None,
        past_action_valid: Tensor | None = None,
        present: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Builds the groups.

        Args:
            observation: by key (B, T, Do), normalised, or (B, T, H, W, C) uint8; where these are encoded by a frozen
                backbone, its feature maps (B, T, h, w, F) float16 do as well.
            past_action: (B, T, Da) executed in the step before, normalised; needed where the configuration
                has past_action_input.
            past_action_valid: (B, T) bool, False where no step came before; None = valid everywhere.
            present: (B, T) bool by key, for keys that are absent in some steps: pictures, and with "per_key" tokens
                vectors.

        Returns:
            tokens (B, T, P, D), and which of them are present, (B, T, P) bool or None = all.
        """
        present = dict(present or {})
        for key in present:
            if key not in self.config.observation_shapes:
                raise UnknownNameError("observation key", key, self.config.observation_shapes)
        vectors = [self._vector(observation, key) for key in self.keys]
        if self.config.observation_tokens == "joint" and vectors:
            if not present.keys() <= set(self.image_keys):
                raise ShapeError("absent vectors need observation_tokens='per_key', this model has 'joint'")
            vectors = [torch.cat(vectors, dim=-1)]
        tokens = [embed(x)[:, :, None] for embed, x in zip(self.observation, vectors, strict=True)]
        for encoder, key in zip(self.images, self.image_keys, strict=True):
            tokens.append(self._image_tokens(encoder, self._images(observation, key), present.get(key)))
        if self.past_action is not None:
            if past_action is None:
                raise ShapeError(f"this model reads the previous action, (B, T, {self.config.action_dim}); got None")
            tokens.append(self.past_action(past_action)[:, :, None])
        batch, steps = tokens[0].shape[:2]
        slots = tokens[0].new_zeros(self.num_slots, self.config.width)
        content = torch.cat((*tokens, slots.expand(batch, steps, -1, -1)), dim=2)
        return content + self.type_embedding, self._valid(batch, steps, past_action_valid, present)

    def _vector(self, observation: Mapping[str, Tensor], key: str) -> Tensor:
        x = self._given(observation, key)
        if x.ndim != 3 or x.shape[-1] != self.config.observation_shapes[key][0]:
            raise ShapeError(
                f"observation {key!r} must be (B, T, {self.config.observation_shapes[key][0]}), got {tuple(x.shape)}"
            )
        return x

    def _images(self, observation: Mapping[str, Tensor], key: str) -> Tensor:
        x, shape = self._given(observation, key), tuple(self.config.observation_shapes[key])
        if self.backbone is not None and self.backbone.frozen and x.dtype == torch.float16:
            shape = self.backbone.map_shapes[key]
            if tuple(x.shape[2:]) != shape:
                raise ShapeError(f"feature maps of {key!r} must be (B, T, *{shape}), got {tuple(x.shape)}")
            return x
        if x.ndim != 5 or tuple(x.shape[2:]) != shape or x.dtype != torch.uint8:
            raise ShapeError(
                f"pictures {key!r} must be (B, T, {', '.join(map(str, shape))}) uint8, got {tuple(x.shape)} {x.dtype}"
            )
        return x

    def _given(self, observation: Mapping[str, Tensor], key: str) -> Tensor:
        if key not in observation:
            needed = [*self.keys, *self.image_keys]
            raise ShapeError(f"observation {key!r} is missing; got {sorted(observation)}, need {needed}")
        return observation[key]

    def _image_tokens(self, encoder: nn.Module, images: Tensor, present: Tensor | None) -> Tensor:
        """Tokens (B, T, tokens_per_image, D) of pictures (B, T, H, W, C) or their features, zeros where absent.

        In whole passes nothing is encoded but what is there; a single step does not wait for the device to tell.
        """
        batch, steps = images.shape[:2]
        flat = images.flatten(0, 1)
        if present is None or steps == 1:
            tokens = self._encoded(encoder, flat)
            tokens = tokens if present is None else torch.where(present.view(-1, 1, 1), tokens, 0.0)
        else:
            there = present.flatten().nonzero()[:, 0]
            encoded = self._encoded(encoder, flat[there])
            tokens = encoded.new_zeros(len(flat), *encoded.shape[1:]).index_copy(0, there, encoded)
        return tokens.reshape(batch, steps, *tokens.shape[1:])

    def _encoded(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """Tokens (N, tokens_per_image, D) of pictures (N, H, W, C), or of the features that a backbone made of them."""
        if self.backbone is not None and images.dtype != torch.float16:
            images = self.backbone(images)
        tokens: Tensor = encoder(images)
        return tokens

    def _valid(
        self, batch: int, steps: int, past_action_valid: Tensor | None, present: Mapping[str, Tensor]
    ) -> Tensor | None:
        given = dict(present)
        if self.has_past_action and past_action_valid is not None:
            given["past_action"] = past_action_valid
        if not given:
            return None
        device = next(iter(given.values())).device
        valid = torch.ones(batch, steps, self.tokens_per_step, dtype=torch.bool, device=device)
        for name, mask in given.items():
            valid[:, :, self._slots[name]] = mask[:, :, None]
        return valid
