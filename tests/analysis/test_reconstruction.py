"""What is told of an autoencoder on held-out episodes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from frame_models import SHAPE, moving_square
from torch import Tensor

from scd_robot.analysis.frame_metrics import HIGHEST_PSNR
from scd_robot.analysis.reconstruction import describe_reconstruction, reconstruct
from scd_robot.datasets import EpisodeDataset
from scd_robot.errors import ConfigError
from scd_robot.nn import Autoencoder, AutoencoderConfig

DATA = moving_square(5, steps=20)


class Shifted(Autoencoder):
    """Its pictures are brighter by some grey levels than those it was given."""

    def __init__(self, levels: int) -> None:
        super().__init__(AutoencoderConfig((8,), 1), 1)
        self.levels = levels

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures.float()

    def decode(self, latents: Tensor) -> Tensor:
        return (latents + self.levels).to(torch.uint8)


def test_pieces_are_of_the_given_episodes_and_what_is_kept_is_told() -> None:
    found = reconstruct(Shifted(0), DATA, "eye", [1, 3])
    assert found.recorded.shape == found.frames.shape == (24, 8, *SHAPE)  # all 12 starts in each
    assert set(found.errors.episodes) == {1, 3}
    np.testing.assert_array_equal(found.before[0], DATA.arrays["eye"][20])
    np.testing.assert_array_equal(found.recorded[-1, -1], DATA.arrays["eye"][79])
    told = describe_reconstruction(found)
    assert (told["episodes"], told["frames"]) == (2, 24 * 8)
    assert told["psnr"]["reconstructed"] == told["psnr_moving"]["reconstructed"] == pytest.approx(HIGHEST_PSNR)
    assert told["psnr_moving"]["repeated"] < told["psnr"]["repeated"] < 30
    assert 0 < told["moving_share"] < 1


def test_what_is_lost_is_told() -> None:
    told = describe_reconstruction(reconstruct(Shifted(10), DATA, "eye", [2]))
    assert told["psnr"]["reconstructed"] == pytest.approx(10 * np.log10(255**2 / 100))


def test_short_episodes_give_shorter_pieces_and_still_ones_no_moving_pixels() -> None:
    still = np.full_like(DATA.arrays["eye"], 80)
    ends = np.array([1, 4, 100])
    data: EpisodeDataset = replace(DATA, episode_ends=ends, arrays={**DATA.arrays, "eye": still})
    found = reconstruct(Shifted(1), data, "eye", [0, 1, 2])
    assert found.recorded.shape[1] == 2
    told = describe_reconstruction(found)
    assert told["psnr_moving"] == {"reconstructed": None, "repeated": None}
    with pytest.raises(ConfigError, match="no held-out episode has two control steps"):
        reconstruct(Shifted(1), data, "eye", [0])
