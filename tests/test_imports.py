"""Imports: what the package loads, and what it can be imported beside."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "lightning", "zarr", "mujoco", "h5py")


def run_python(*arguments: str, folder: Path) -> str:
    """Standard output of a new interpreter, which must succeed."""
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import scd_robot, scd_robot.types, scd_robot.errors, scd_robot.seeding",
        "import scd_robot.control, scd_robot.control.rehearsal",
        "import scd_robot.export, scd_robot.policies",
        "from scd_robot.cli.main import main; main(['--help'])",
        "from scd_robot.cli.main import main; main(['trian'])",
    ],
)
def test_light_imports_load_nothing_heavy(code: str, tmp_path: Path) -> None:
    report = f"import sys; print('loaded', [name for name in {HEAVY} if name in sys.modules])"
    assert run_python("-c", f"{code}\n{report}", folder=tmp_path).endswith("loaded []\n")


def test_every_module_imports_and_every_exported_name_exists(tmp_path: Path) -> None:
    assert "all there" in run_python(str(Path(__file__).parent / "wheel_smoke.py"), folder=tmp_path)


def test_lightning_imports_beside_robomimic(tmp_path: Path) -> None:
    pytest.importorskip("robomimic")
    code = (
        "from scd_robot.training.compat import import_lightning\n"
        "import robomimic.utils.dataset, robomimic.config\n"
        "print(import_lightning().__name__, robomimic.utils.dataset.SequenceDataset.__name__)"
    )
    assert run_python("-c", code, folder=tmp_path).splitlines()[-1] == "lightning SequenceDataset"
