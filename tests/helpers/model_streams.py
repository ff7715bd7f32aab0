"""Models with random weights, and streams of observations, vectors and pictures, to run them on."""

import torch

from scd_robot.model import ScdConfig, ScdModel, build_model

ENTANGLED = ScdConfig(
    observation_shapes={"a": (3,), "b": (2,)},
    action_dim=2,
    architecture="entangled",
    width=32,
    num_heads=2,
    encoder_layers=2,
    decoder_layers=1,
    history_length=5,
    observation_tokens="per_key",
    chunk_length=4,
    num_past_actions=3,
    context_corruption=0,
)


def randomised(config: ScdConfig, dtype: torch.dtype = torch.float64) -> ScdModel:
    """A model with every parameter drawn at random, so that no zero-initialised gate hides a path."""
    torch.manual_seed(0)
    model = build_model(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.5)
            )
    return model


def stream_of(config: ScdConfig, batch: int, steps: int, dtype: torch.dtype) -> tuple[dict, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    observation = {
        key: torch.randn(batch, steps, *shape, generator=generator, dtype=dtype)
        if len(shape) == 1
        else torch.randint(0, 256, (batch, steps, *shape), generator=generator, dtype=torch.uint8)
        for key, shape in config.observation_shapes.items()
    }
    return observation, torch.randn(batch, steps, config.action_dim, generator=generator, dtype=dtype)
