"""Image encoders: any size, every parameter learns, tokens tell where something is; settings that do not fit."""

import pytest
import torch

from scd_robot.errors import ConfigError
from scd_robot.model import ScdConfig
from scd_robot.nn import ImageConfig, ImageEncoder


def make(shape=(16, 24, 3), width=16, **settings) -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(ImageConfig(**{"channels": (8, 16), **settings}), "eye", shape, width, 2)


@pytest.mark.parametrize("encoder", ["convolutional", "patch"])
@pytest.mark.parametrize("shape", [(16, 24, 3), (8, 8, 1), (40, 16, 4)])
def test_pictures_of_any_size_become_as_many_tokens_as_asked_for(encoder, shape) -> None:
    for tokens in (1, 5):
        network = make(shape, encoder=encoder, tokens_per_image=tokens)
        pictures = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
        out = network(pictures)
        assert out.shape == (3, tokens, 16)
        torch.testing.assert_close(network(pictures[1:2]), out[1:2], atol=1e-5, rtol=0)  # each by itself


@pytest.mark.parametrize("encoder", ["convolutional", "patch"])
def test_every_parameter_gets_a_gradient(encoder) -> None:
    network = make(encoder=encoder)
    network(torch.randint(0, 256, (3, 16, 24, 3), dtype=torch.uint8)).square().sum().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]


def test_where_a_spot_is_can_be_learned_in_a_few_steps() -> None:
    network, read_out = make((32, 32, 3)), torch.nn.Linear(16, 2)
    optimizer = torch.optim.Adam([*network.parameters(), *read_out.parameters()], 1e-2)
    generator = torch.Generator().manual_seed(1)
    errors = []
    for _ in range(150):
        place = torch.randint(0, 28, (32, 2), generator=generator)
        pictures = torch.full((32, 32, 32, 3), 90, dtype=torch.uint8)
        for picture, (row, column) in zip(pictures, place.tolist(), strict=True):
            picture[row : row + 4, column : column + 4, 0] = 250
        error = (read_out(network(pictures).mean(1)) - (place / 14 - 1)).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert sum(errors[-10:]) / 10 < 0.1 * sum(errors[:3]) / 3


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tokens_per_image": -1}, "tokens_per_image must be in 0..16, got -1"),
        ({"tokens_per_image": 17}, "in 0..16, got 17"),
        ({"channels": (16, 20)}, "multiples of 8"),
        ({"channels": ()}, "multiples of 8"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, told) -> None:
    with pytest.raises(ConfigError, match=told):
        ImageConfig(**settings)


@pytest.mark.parametrize(
    ("shape", "settings", "told"),
    [
        ((10, 16, 3), {"encoder": "patch"}, r"patch_size 8 must divide the sides of 'eye', 10 x 16"),
        ((4, 64, 3), {}, "4 x 64 are too small to be halved 3 times"),
        ((480, 640, 3), {}, "would be 60 x 80, over 1024 places"),
        ((480, 640), {}, r"takes vectors \(n,\) with n >= 1, and pictures \(H, W, C\) with 1, 3 or 4 channels"),
        ((64, 64, 2), {}, "with 1, 3 or 4 channels"),
    ],
)
def test_pictures_that_do_not_fit_the_encoder_are_refused(shape, settings, told) -> None:
    with pytest.raises(ConfigError, match=told):
        ScdConfig(observation_shapes={"eye": shape}, action_dim=2, images=ImageConfig(**settings))
