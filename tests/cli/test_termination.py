"""Verbs that write beside their target, told to end while they do: nothing half done stays, and the exit code tells."""

import signal

import pytest

from scd_robot.cli.main import main
from scd_robot.datasets import ZarrWriter
from scd_robot.export import write


@pytest.fixture
def ignored():
    """Without the verb's own handler the signal does nothing, where it would end the tests."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


def told_to_end(*_, **__):
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.usefixtures("ignored")
def test_export_leaves_nothing(tiny_run, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(write, "_write_graph", told_to_end)
    handler = signal.getsignal(signal.SIGTERM)
    assert main(["export", str(tiny_run), "--out", str(tmp_path / "out")]) == 143
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.usefixtures("ignored")
def test_a_copy_of_a_dataset_leaves_nothing(tiny_store, tmp_path, monkeypatch):
    monkeypatch.setattr(ZarrWriter, "append", told_to_end)
    assert main(["data", "convert", str(tiny_store), str(tmp_path / "copy.zarr")]) == 143
    assert list(tmp_path.iterdir()) == []
