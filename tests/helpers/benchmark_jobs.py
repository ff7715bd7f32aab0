"""Modules of the benchmarks, and results of their jobs that are made up."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    """A module of the benchmarks, which are scripts."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(FOLDER))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


def result(
    name: str, outcomes: Sequence[bool | None], hashes: str = "", wall_s: float = 60.0, env: str = "toy"
) -> dict[str, Any]:
    """A finished job; None is an invalid episode."""
    details = [
        {
            "index": i,
            "success": bool(o),
            "invalid": o is None,
            "initial_state_hash": None if o is None else f"{hashes}{i}",
        }
        for i, o in enumerate(outcomes)
    ]
    return {
        "schema": 1,
        "name": name,
        "status": "done",
        "error": None,
        "job": {"seed": 0},
        "training": {"wall_s": wall_s, "cpu_s": None, "steps": 7, "parameters": 11, "threads": 1},
        "evaluation": {
            "env": env,
            "invalid": outcomes.count(None),
            "mean_steps": 12.0,
            "plan_ms": None,
            "timing_batch_size": 4,
            "episodes_detail": details,
        },
        "versions": {"numpy": "1"},
        "machine": {"cpu": "some", "cores": 2, "load_1min": 0.0},
        "code": "abc",
        "command": "python this",
        "date": "2026-01-01T00:00:00+00:00",
    }


# ----- statistics
