"""Configurations to JSON and back, strictly."""

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from scd_robot.config import from_json, to_json
from scd_robot.errors import ConfigError
from scd_robot.transforms import ChunkPart, ImageStep, TransformConfig


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    mode: Literal["slow", "fast"] = "slow"


@dataclass(frozen=True)
class Outer:
    name: str
    steps: int = 3
    flag: bool = False
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"a": (2, 3)})
    limit: float | None = None
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")


@pytest.mark.parametrize("config", [Outer("x"), Outer("y", 7, True, {}, 2.5, Inner(1.0, "fast"))])
def test_what_is_written_is_read_back_equal(config: Outer) -> None:
    assert from_json(Outer, json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"stepz": 3}, "experiment has no field 'stepz'; did you mean 'steps'"),
        ({"inner": {"rate": 1.0}}, "experiment.inner lacks mode"),
        ({"inner": {"rate": 1.0, "mode": "slow", "more": 1}}, "experiment.inner has no field 'more'"),
        (
            {"inner": {"rate": 1.0, "mode": "fastest"}},
            "experiment.inner.mode must be one of 'slow', 'fast', got 'fastest'",
        ),
        ({"inner": [1.0, "slow"]}, "experiment.inner must be an object with the fields of Inner, got list"),
        ({"steps": 3.0}, "experiment.steps must be int, got 3.0"),
        ({"steps": True}, "experiment.steps must be int, got True"),
        ({"steps": "3"}, "experiment.steps must be int, got '3'"),
        ({"steps": None}, "experiment.steps must be int, got None"),
        ({"flag": 1}, "experiment.flag must be bool, got 1"),
        ({"name": 5}, "experiment.name must be str, got 5"),
        ({"limit": "high"}, "experiment.limit must be float, got 'high'"),
        ({"limit": float("nan")}, "experiment.limit must be finite, got nan"),
        ({"inner": {"rate": float("inf"), "mode": "slow"}}, "experiment.inner.rate must be finite, got inf"),
        ({"shapes": [2, 3]}, "experiment.shapes must be an object, got list"),
        ({"shapes": {"a": 2}}, "experiment.shapes.a must be a list, got int"),
        ({"shapes": {"a": [2, 0.5]}}, r"experiment.shapes.a\[1\] must be int, got 0.5"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_anything_else_is_refused_with_its_place(change: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        from_json(Outer, {**to_json(Outer("x")), **change}, "experiment")


@pytest.mark.parametrize("name", ["name", "steps", "inner"])
def test_a_missing_field_is_not_guessed_even_if_it_has_a_default(name: str) -> None:
    data = to_json(Outer("x"))
    del data[name]
    with pytest.raises(ConfigError, match=f"Outer lacks {name}"):
        from_json(Outer, data)


def test_a_whole_number_stands_for_a_float() -> None:
    limit = from_json(Outer, {**to_json(Outer("x")), "limit": 2}).limit
    assert (limit, type(limit)) == (2.0, float)


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot write a set"):
        to_json({"a": {1, 2}})


def test_what_somebody_wrote_may_leave_out_what_has_a_default() -> None:
    given = {"images": [{"key": "eye", "size": [8, 8]}], "chunk": "relative", "chunk_parts": [
        {"action_start": 0, "key": "pose", "key_start": 0, "count": 3}
    ]}  # fmt: skip
    found = from_json(TransformConfig, given, "--transforms", partial=True)
    assert found == TransformConfig(
        images=(ImageStep("eye", size=(8, 8)),), chunk="relative", chunk_parts=(ChunkPart(0, "pose", 0, 3),)
    )
    with pytest.raises(ConfigError, match=r"--transforms.images\[0\] lacks key"):
        from_json(TransformConfig, {"images": [{"size": [8, 8]}]}, "--transforms", partial=True)
    with pytest.raises(ConfigError, match="lacks"):
        from_json(TransformConfig, given, "config")
