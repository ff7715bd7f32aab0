"""The tiny run, exported once."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `scd export` makes of the tiny run; copy it before spoiling it."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} not installed: pip install -e '.[export]'")
    from scd_robot.cli.main import main

    out = tmp_path_factory.mktemp("export") / "tiny"
    assert main(["export", str(tiny_run), "--out", str(out), "--json", str(out.with_suffix(".json"))]) == 0
    return out


@pytest.fixture
def point(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the toy environment of the evaluation tests, importable here and in worker processes."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "sim_eval"))
    return "toy_environment:make_point"
