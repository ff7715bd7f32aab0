"""Checkpoints that earlier versions wrote act as they did then. `earlier_schemas/write.py` tells how they were made."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from scd_robot.checkpoint import SCHEMA
from scd_robot.policies import load_policy

FOLDER = Path(__file__).parent / "earlier_schemas"


def episode(schema):
    text = (FOLDER / f"schema_{schema}" / "episode.json").read_text()
    return {name: np.array(values, np.float32) for name, values in json.loads(text).items()}


def act(schema, change=None):
    """Actions (steps, rows, 2) over the recorded episode; `change` spoils the model first."""
    policy, told = load_policy(FOLDER / f"schema_{schema}" / "checkpoint"), episode(schema)
    if change is not None:
        change(policy.model)
    policy.reset(episodes=[3, 4])
    steps = range(len(told["actions"]))
    seen = [{key: told[key][step] for key in ("position", "goal")} for step in steps]
    return np.stack([policy.act(seen[step], told["executed"][step - 1] if step else None) for step in steps])


@pytest.mark.parametrize("schema", range(1, SCHEMA + 1))
def test_a_checkpoint_of_each_schema_acts_as_it_did(schema):
    manifest = json.loads((FOLDER / f"schema_{schema}" / "checkpoint" / "manifest.json").read_text())
    assert manifest["schema"] == schema
    # Other processors round otherwise.
    np.testing.assert_allclose(act(schema), episode(schema)["actions"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("part", ["tokenizer", "encoder", "decoder"])
def test_every_part_of_the_model_matters_to_these_actions(part):
    """Otherwise they would not tell whether a schema is still read as it was meant."""

    def spoil(model):
        for parameter in getattr(model, part).parameters():
            parameter.data *= 0.9

    assert abs(act(SCHEMA, spoil) - episode(SCHEMA)["actions"]).max() > 1e-3


def test_they_are_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 300_000
    weights = load_file(FOLDER / "schema_1" / "checkpoint" / "model.safetensors")
    assert any(name.endswith("gate") for name in weights)
