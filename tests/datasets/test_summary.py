import json

import numpy as np
import pytest

from scd_robot.datasets import schema
from scd_robot.datasets.schema import EpisodeDataset
from scd_robot.datasets.summary import describe, format_description
from scd_robot.types import ArraySpec, DatasetSpec


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    spec = DatasetSpec({"state": ArraySpec((2,)), "camera": ArraySpec((5, 6, 3), "uint8")}, 1, 0.1, "a test")
    arrays = {
        "state": (1e3 + rng.normal(size=(9, 2))).astype(np.float32),
        "camera": rng.integers(0, 256, (9, 5, 6, 3), np.uint8),
        "action": np.zeros((9, 1), np.float32),
    }
    return EpisodeDataset(spec, np.asarray([3, 9]), arrays, {"seed": 4})


def test_description_is_json_with_the_right_numbers(dataset):
    description = json.loads(json.dumps(describe(dataset), allow_nan=False))
    assert (description["episodes"], description["steps"]) == (2, 9)
    assert description["length"] == {"min": 3, "mean": 4.5, "max": 6}
    assert description["duration_s"] == pytest.approx(0.9)
    assert description["bytes"] == 9 * (2 * 4 + 90 + 4)
    assert description["metadata"] == {"seed": 4}
    for key, axes in (("state", 0), ("camera", (0, 1, 2)), ("action", 0)):  # images by channel
        array = dataset.arrays[key].astype(np.float64)
        for name in ("min", "max", "mean", "std"):
            np.testing.assert_allclose(description["keys"][key][name], getattr(array, name)(axis=axes), rtol=1e-9)


def test_statistics_do_not_depend_on_the_block_size(dataset, monkeypatch):
    whole = describe(dataset)
    monkeypatch.setattr(schema, "_BLOCK_BYTES", 16)
    blocks = describe(dataset)
    for key in dataset.arrays:
        for name in ("mean", "std"):
            np.testing.assert_allclose(blocks["keys"][key][name], whole["keys"][key][name], rtol=1e-12)


def test_table_has_a_line_per_dimension(dataset):
    lines = format_description(describe(dataset)).splitlines()
    assert lines[1] == "episodes  2"
    table = lines[lines.index("") + 1 :]
    assert table[0].split() == ["key", "shape", "dtype", "dim", "min", "max", "mean", "std"]
    assert [line.split()[:4] for line in table if not line.startswith(" ")][1:] == [
        ["state", "2", "float32", "0"], ["camera", "5x6x3", "uint8", "0"], ["action", "1", "float32", "0"],
    ]  # fmt: skip
    assert len(table) == 1 + 2 + 3 + 1
