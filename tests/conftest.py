"""Skips what this machine cannot run: `gpu` tests without a CUDA device, `sim` tests without the [sim] extra."""

from importlib.util import find_spec

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that cannot run here."""
    missing = [name for name in ("metaworld", "gym_pusht") if find_spec(name) is None]
    if missing:
        no_simulator = pytest.mark.skip(reason=f"{' and '.join(missing)} not installed: pip install -e '.[sim]'")
        for item in items:
            if item.get_closest_marker("sim"):
                item.add_marker(no_simulator)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
