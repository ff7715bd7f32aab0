from pathlib import Path

import pytest


@pytest.fixture
def toy(monkeypatch):
    """The module `toy_environment`, importable here and, through the inherited sys.path, in spawned workers."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import toy_environment

    return toy_environment
