"""How weights lie in memory changes nothing else."""

import torch
from torch import nn

from scd_robot.nn import lay_out_for_few_tokens


def test_weights_keep_shape_and_values_and_lie_input_by_input() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.GELU(), nn.Sequential(nn.Linear(3, 2, bias=False), nn.LayerNorm(2)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lay_out_for_few_tokens(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert after["0.weight"].t().is_contiguous()
    assert after["2.0.weight"].t().is_contiguous()
    assert not after["0.weight"].is_contiguous()
    model(torch.randn(4, 5)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
