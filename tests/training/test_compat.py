"""The broken torchvision is told from other failures, and explained."""

import sys
from pathlib import Path

import pytest

from scd_robot.errors import MissingDependencyError
from scd_robot.training.compat import import_lightning


@pytest.fixture
def broken_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a stand-in for lightning that is found before the installed one."""
    monkeypatch.delitem(sys.modules, "lightning", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "lightning.py"


def test_torchvision_for_another_torch_is_named_with_its_remedy(broken_lightning: Path) -> None:
    broken_lightning.write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(MissingDependencyError, match=r"built for another torch.*pip uninstall torchvision"):
        import_lightning()


def test_other_failures_of_lightning_pass_through(broken_lightning: Path) -> None:
    broken_lightning.write_text("raise RuntimeError('something else')")
    with pytest.raises(RuntimeError, match="something else"):
        import_lightning()
    broken_lightning.write_text("import a_package_that_lightning_lacks")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_lightning_lacks"):
        import_lightning()


def test_absent_lightning_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(MissingDependencyError, match="pip install lightning"):
        import_lightning()
