"""The loss of the LeRobot policy, which is learned from windows, is the trainer's."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from scd_robot.model import ScdConfig, ScdModel
from scd_robot.normalization import FieldStatistics, Normalizer
from scd_robot.training import TrainingBatch, loss_terms
from scd_robot.training.batches import Draws
from scd_robot.training.segments import Segments

FILE = Path(__file__).parents[2] / "lerobot_policy_scd" / "src" / "lerobot_policy_scd" / "windows.py"
B, T, M, K, CHUNK, STRIDE, DA = 3, 5, 3, 2, 4, 2, 2
EMPTY = torch.zeros(0)


@pytest.fixture(scope="module")
def windows_module():
    """The file alone: its package imports lerobot, which is not here."""
    spec = importlib.util.spec_from_file_location("lerobot_windows", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    yield spec.loader.exec_module(module) or module
    del sys.modules[spec.name]


def model():
    torch.manual_seed(0)
    config = ScdConfig(
        {"state": (3,), "front": (8, 8, 3)},
        DA,
        width=16,
        num_heads=2,
        encoder_layers=2,
        decoder_layers=1,
        history_length=3,
        history_stride=STRIDE,
        num_context_tokens=2,
        chunk_length=CHUNK,
        num_past_actions=K,
    )
    made = ScdModel(config)
    with torch.no_grad():  # the last layer begins at zero, and would hide what the others do
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def windows(module):
    """Three windows: whole, one that begins two steps late, and one with a single step; two end behind the episode."""
    torch.manual_seed(1)
    step_valid = torch.arange(T) >= torch.tensor([[0], [2], [T - 1]])
    length = STRIDE * (T - 1) + K + CHUNK
    action_valid = torch.arange(length) >= torch.tensor([[0], [2 * STRIDE], [STRIDE * (T - 1)]])
    action_valid &= torch.arange(length) < torch.tensor([[length], [length - 2], [length - 3]])
    observation = {
        "state": torch.randn(B, T, 3),
        "front": torch.randint(0, 256, (B, T, 8, 8, 3), dtype=torch.uint8),
    }
    return module.Windows(observation, step_valid, torch.randn(B, length, DA), action_valid)


def identity():
    numbers = dict.fromkeys(FieldStatistics.__dataclass_fields__)
    keys = {"state": 3, "action": DA}
    return Normalizer(
        {key: FieldStatistics(**dict.fromkeys(numbers, (0.0,) * width)) for key, width in keys.items()},
        dict.fromkeys(keys, "identity"),
    )


def test_loss_is_that_of_the_trainer(windows_module):
    given, network = windows(windows_module), model()
    draws = windows_module.WindowDraws.random(network, given, M)
    total, count = windows_module.window_loss(network, given, draws)
    index = STRIDE * draws.position[..., None] + torch.arange(K + CHUNK)
    rows = torch.arange(B)[:, None, None]
    label = given.action[rows, index]
    batch = TrainingBatch(
        Segments(
            observation=dict(given.observation),
            present={"front": given.step_valid},
            step_valid=torch.ones_like(given.step_valid),
            label=label,
            executed=label,
            action_valid=given.action_valid[rows, index],
            disturbed=None,
            past_action=torch.zeros(0, T, DA),
        ),
        Draws(
            stream=given.step_valid.long(),
            position=draws.position,
            position_valid=draws.position_valid,
            flow_time=draws.flow_time[..., None],
            noise=draws.noise[:, :, None],
            corruption=draws.corruption.unflatten(0, (B, M))[:, :, None],
            past_action_noise=EMPTY,
            delay=torch.zeros(B, M, 1, dtype=torch.int64),
            end_time=EMPTY,
            image_shift=torch.zeros(0, 1, 2),
            image_colour=torch.zeros(0, 1, 3),
        ),
    )
    wanted, counted = loss_terms(network, identity(), batch)
    assert 0 < int(count.sum()) < M * B * (K + CHUNK)
    assert int(count.sum()) == int(counted)
    torch.testing.assert_close(total.sum(), wanted)


def test_positions_lie_inside_the_episode_and_none_is_drawn_twice(windows_module):
    given, network = windows(windows_module), model()
    drawn = windows_module.WindowDraws.random(network, given, T)
    for row, (positions, chosen) in enumerate(zip(drawn.position, drawn.position_valid, strict=True)):
        assert sorted(positions[chosen].tolist()) == given.step_valid[row].nonzero()[:, 0].tolist()


def test_what_lies_before_the_episode_and_behind_it_changes_nothing(windows_module):
    given, network = windows(windows_module), model()
    draws = windows_module.WindowDraws.random(network, given, M)
    total, _ = windows_module.window_loss(network, given, draws)
    given.observation["state"][~given.step_valid] = 100.0
    given.observation["front"][~given.step_valid] = 7
    given.action[~given.action_valid] = -100.0
    again, _ = windows_module.window_loss(network, given, draws)
    torch.testing.assert_close(again, total)
    given.observation["state"][1, 2] += 1.0  # the first that is valid
    moved, _ = windows_module.window_loss(network, given, draws)
    assert moved[1] != total[1]
