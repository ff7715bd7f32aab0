from pathlib import Path

import pytest


@pytest.fixture
def point(monkeypatch):
    """Name of the toy environment of the evaluation tests, importable here and in worker processes."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "sim_eval"))
    return "toy_environment:make_point"
