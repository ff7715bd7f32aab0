"""The autoencoder of pictures: sizes, and what a place depends on."""

import pytest
import torch

from scd_robot.errors import ConfigError
from scd_robot.nn import Autoencoder, AutoencoderConfig


def randomised(config: AutoencoderConfig, channels: int) -> Autoencoder:
    """No weight is zero."""
    torch.manual_seed(0)
    model = Autoencoder(config, channels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_each_layer_halves_the_sides_and_decoding_gives_pictures_again(layers: int, channels: int) -> None:
    config = AutoencoderConfig((8, 16, 24)[:layers], latent_channels=5)
    model = randomised(config, channels)
    pictures = torch.randint(0, 256, (2, 16, 24, channels), dtype=torch.uint8)
    latents = model.encode(pictures)
    assert config.factor == 2**layers
    assert latents.shape == (2, 16 // config.factor, 24 // config.factor, 5)
    decoded = model.decode(latents)
    assert decoded.shape == pictures.shape
    assert decoded.dtype == torch.uint8


@torch.no_grad()
def test_what_stands_still_keeps_its_latents_whatever_moves_elsewhere() -> None:
    model = randomised(AutoencoderConfig((8, 8), 4), 3)
    still = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    moved = still.clone()
    moved[:, :8, :8] = 255 - moved[:, :8, :8]
    one, two = model.encode(still), model.encode(moved)
    assert torch.equal(one[:, 8:, 8:], two[:, 8:, 8:])
    assert (one[:, 0, 0] - two[:, 0, 0]).abs().max() > 1e-3


@torch.no_grad()
def test_latents_are_normalised_by_the_statistics_and_back() -> None:
    model = randomised(AutoencoderConfig((8,), 3), 1)
    pictures = torch.randint(0, 256, (2, 8, 8, 1), dtype=torch.uint8)
    before, decoded = model.encode(pictures), model.decode(model.encode(pictures))
    raw = model.raw_latents(pictures)
    model.mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    model.scale.copy_(torch.tensor([2.0, 0.5, 4.0]))
    torch.testing.assert_close(model.encode(pictures), (raw - model.mean) / model.scale)
    assert not torch.allclose(model.encode(pictures), before)
    assert (model.decode(model.encode(pictures)).int() - decoded.int()).abs().max() <= 1


def test_sizes_without_a_whole_number_of_places_and_alpha_are_refused_with_what_helps() -> None:
    config = AutoencoderConfig((8, 8, 8), 4)
    config.check_shape("eye", (96, 240, 3))
    with pytest.raises(ConfigError, match=r'multiples of 8, \'eye\' has 100 x 3: .*"key": "eye".*"size": \[96, 8\]'):
        config.check_shape("eye", (100, 3, 3))
    with pytest.raises(ConfigError, match=r"'eye' has 4 channels: record picture\[..., :3\]"):
        config.check_shape("eye", (96, 240, 4))
    for wrong in ({"channels": ()}, {"channels": (8, 0)}, {"latent_channels": 0}):
        with pytest.raises(ConfigError, match="must be"):
            AutoencoderConfig(**wrong)
