"""Contexts of the control loop and of training, and how old what the encoder attends to is."""

import numpy as np
import pytest
import torch
from recorded import recorded, untrained

from scd_robot.analysis.encoder import attention_age, cache_parity
from scd_robot.nn import KVCache
from scd_robot.policies.rows import Rows
from scd_robot.transforms import ChunkPart, TransformConfig

RELATIVE = TransformConfig(chunk="relative", chunk_parts=(ChunkPart(0, "position", 0, 2),))


def relative_difference(policy, streams):
    parity = cache_parity(policy, streams)
    assert parity["standard_deviation"] > 0.1
    return parity["max_difference"] / parity["standard_deviation"]


@pytest.mark.parametrize(
    ("model", "transforms"),
    [
        ({"past_action_input": "none"}, None),
        ({"past_action_input": "noised"}, None),
        ({"past_action_input": "full", "memory_gate": True}, None),
        ({"past_action_input": "noised", "history_stride": 2}, None),
        ({"past_action_input": "noised"}, RELATIVE),
        ({"observation_tokens": "per_key"}, TransformConfig(rename={"position": "hand"}, keys=("hand", "goal"))),
    ],
)
def test_contexts_of_the_control_loop_are_those_of_training(model, transforms):
    if transforms is not None and transforms.rename:
        model = model | {"observation_shapes": {"hand": (2,), "goal": (2,)}}
    policy = untrained(model, transforms)
    streams = recorded(policy)
    assert relative_difference(policy, streams) < 1e-4
    streams[2].context[6] = streams[2].context[6] + 0.1
    assert relative_difference(policy, streams) > 0.01


class TestADeviationOfTheControlLoopIsSeen:
    def test_another_normalisation(self, monkeypatch):
        policy = untrained()
        with monkeypatch.context() as patch:
            normalize = policy.normalizer.normalize
            patch.setattr(policy.normalizer, "normalize", lambda key, x: normalize(key, x) * 1.1)
            streams = recorded(policy)
        assert relative_difference(policy, streams) > 0.01

    def test_observations_that_come_one_control_step_late(self, monkeypatch):
        policy = untrained()
        with monkeypatch.context() as patch:
            observe, last = policy.observe, []

            def late(observation, executed_action=None):
                last.append(observation)
                observe(last[max(0, len(last) - 2)], executed_action)

            patch.setattr(policy, "observe", late)
            streams = recorded(policy)
        assert relative_difference(policy, streams) > 0.1

    def test_past_actions_that_are_one_control_step_old(self, monkeypatch):
        policy = untrained()
        with monkeypatch.context() as patch:
            record = Rows.record_executed

            def older(self, executed):
                before = self.past.copy()
                record(self, executed)
                self.past[:] = before

            patch.setattr(Rows, "record_executed", older)
            streams = recorded(policy)
        assert relative_difference(policy, streams) > 0.1

    def test_a_row_that_remembers_the_episode_before(self, monkeypatch):
        policy = untrained()
        with monkeypatch.context() as patch:
            patch.setattr(KVCache, "reset", lambda self, rows: None)
            streams = recorded(policy)
        assert relative_difference(policy, streams) > 0.1
        assert relative_difference(policy, streams[1:2]) < 1e-4  # its row was not reset


@pytest.mark.parametrize(("stride", "ages"), [(1, {"1": 1, "2": 2}), (2, {"1": 0, "2": 1, "4": 2})])
@pytest.mark.parametrize("past_action_input", ["none", "full"])
@pytest.mark.parametrize("in_history", [True, False])
def test_attention_that_makes_no_difference_is_spread_over_the_window(stride, ages, past_action_input, in_history):
    """Of 4 control steps, each with as many tokens as are kept of it, and with two slots beside the present one's."""
    model = {"history_stride": stride, "past_action_input": past_action_input, "context_in_history": in_history}
    policy = untrained(model)
    kept = 1 + (past_action_input == "full")
    slots = 0 if in_history else 2
    kept += 2 - slots
    for block in policy.model.encoder.blocks:
        torch.nn.init.zeros_(block.qkv.weight)
    for layer in attention_age(policy, recorded(policy)[1:2]):
        assert layer["present"] == pytest.approx((kept + slots) / (4 * kept + slots))
        assert layer["mean_age"] == pytest.approx(2 * stride)
        found = {age: share for age, share in layer["by_age"].items() if share > 0 or age in ages}
        assert found == pytest.approx({age: count * kept / (4 * kept + slots) for age, count in ages.items()})


def test_a_closed_gate_attends_to_the_present_alone():
    policy = untrained({"memory_gate": True})
    assert not policy.model.config.context_in_history  # slots are told apart from the history behind them
    for layer in attention_age(policy, recorded(policy)):
        assert layer["present"] == pytest.approx(1)
        assert layer["mean_age"] is None
    policy.model.encoder.blocks[1].memory_gate.data += 9.0  # now the past counts as much
    first, second = attention_age(policy, recorded(policy))
    assert first["present"] == pytest.approx(1)
    assert second["present"] == pytest.approx(0.5, abs=1e-3)


def test_attention_is_that_of_the_whole_episode_and_leaves_no_hooks():
    policy = untrained()
    streams = recorded(policy)
    for layer in attention_age(policy, streams):
        assert layer["present"] + sum(layer["by_age"].values()) == pytest.approx(1, abs=1e-5)
        assert 1 <= layer["mean_age"] <= 3
    assert not any(block._forward_pre_hooks for block in policy.model.encoder.blocks)
    assert np.isfinite(streams[0].context).all()
