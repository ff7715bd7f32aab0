"""What is installed is what the checkout holds, under names that leave other packages alone."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

CHECKOUT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]


def folder_of(package: str) -> Path:
    """Where setuptools takes a package from, by the mapping in pyproject.toml."""
    parts = package.split(".")
    for depth in range(len(parts), 0, -1):
        mapped = SETUPTOOLS["package-dir"].get(".".join(parts[:depth]))
        if mapped is not None:
            return Path(mapped, *parts[depth:])
    raise AssertionError(f"no mapping for {package}")


def run_python(code: str, folder: Path, *, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter started in `folder`, with `path` (if given) last on sys.path."""
    extra = f"import sys; sys.path.append({str(path)!r})\n" if path else ""
    return subprocess.run([sys.executable, "-c", extra + code], cwd=folder, capture_output=True, text=True, check=False)


def test_package_list_equals_the_folders_with_an_init_file() -> None:
    roots = [CHECKOUT / "scd_robot", *(CHECKOUT / name for name in ("datasets", "policies", "sim_eval"))]
    present = {path.parent.relative_to(CHECKOUT) for root in roots for path in root.rglob("__init__.py")}
    assert {folder_of(package) for package in SETUPTOOLS["packages"]} == present


def test_every_folder_with_code_has_an_init_file() -> None:
    roots = [CHECKOUT / "scd_robot", *(CHECKOUT / name for name in ("datasets", "policies", "sim_eval"))]
    folders = {path.parent for root in roots for path in root.rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_other_files_in_the_package_are_declared() -> None:
    roots = [CHECKOUT / "scd_robot", *(CHECKOUT / name for name in ("datasets", "policies", "sim_eval"))]
    others = [
        path for root in roots for path in root.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert [str(path.relative_to(CHECKOUT)) for path in others] == ["scd_robot/py.typed"]


def test_the_policy_for_lerobot_has_one_name_with_underscores() -> None:
    """LeRobot imports a distribution by its name as it is written."""
    folder = CHECKOUT / "lerobot_policy_scd"
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["name"] == "lerobot_policy_scd"
    assert project["tool"]["setuptools"]["packages"] == ["lerobot_policy_scd"]
    assert [path.name for path in (folder / "src").iterdir() if path.suffix != ".egg-info"] == ["lerobot_policy_scd"]


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    """A site-packages folder with a stand-in for Hugging Face's `datasets`."""
    (tmp_path / "site" / "datasets").mkdir(parents=True)
    (tmp_path / "site" / "datasets" / "__init__.py").write_text("from datasets.arrow import OWNER\n")
    (tmp_path / "site" / "datasets" / "arrow.py").write_text("OWNER = 'hugging face'\n")
    return tmp_path / "site"


def test_python_in_the_checkout_finds_the_installed_datasets(hugging_face: Path) -> None:
    done = run_python(
        "import datasets, scd_robot.datasets; print(datasets.OWNER, scd_robot.datasets.__name__)",
        CHECKOUT,
        path=hugging_face,
    )
    assert done.stdout == "hugging face scd_robot.datasets\n", done.stderr


def test_bare_datasets_without_hugging_face_names_ours() -> None:
    done = run_python("import datasets", CHECKOUT)
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr
    assert "scd_robot.datasets" in done.stderr


def test_an_installed_datasets_that_fails_to_import_is_not_hidden(hugging_face: Path) -> None:
    (hugging_face / "datasets" / "__init__.py").write_text("raise RuntimeError('broken inside')\n")
    done = run_python("import datasets", CHECKOUT, path=hugging_face)
    assert done.stderr.endswith("RuntimeError: broken inside\n")


@pytest.mark.parametrize("name", ["policies", "sim_eval"])
def test_bare_names_of_our_folders_are_refused(name: str) -> None:
    done = run_python(f"import {name}", CHECKOUT)
    assert done.returncode == 1
    assert f"ModuleNotFoundError: no package '{name}' is installed; import 'scd_robot.{name}'" in done.stderr


def test_extras_of_the_readme_exist() -> None:
    extras = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"sim", "robomimic", "formats", "dev"} <= extras.keys()


def test_what_the_tests_beside_robosuite_leave_out_is_there() -> None:
    """pytest passes over an --ignore that names nothing: what was moved would be left out no longer, or never was."""
    lines = re.findall(r"^LEFT_OUT \S= (.+)$", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    names = " ".join(lines).split()
    assert len(names) > 5
    assert [name for name in names if not (CHECKOUT / "tests" / name).exists()] == []


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [need for extra in project["optional-dependencies"].values() for need in extra]
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    names = {need.replace("<", ">").partition(">")[0].partition("[")[0].lower().replace("_", "-") for need in wanted}
    assert names <= pinned


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_what_a_robot_needs_is_pinned_for_its_python(python: str) -> None:
    """The runtime alone runs on Python 3.10, which newer releases of what it needs do not."""
    project = tomllib.loads((CHECKOUT / "scd_robot_runtime" / "pyproject.toml").read_text())["project"]
    assert SpecifierSet(project["requires-python"]).contains(f"{python}.0")
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if "==" in line and not line.startswith("#")]
    for need in map(Requirement, project["dependencies"]):
        pinned = [
            pin
            for pin in pins
            if pin.name == need.name and (pin.marker is None or pin.marker.evaluate({"python_version": python}))
        ]
        assert len(pinned) == 1, need.name
        found = importlib.metadata.distribution(need.name)
        if pinned[0].specifier.contains(found.version):  # of the others nothing is known here
            assert SpecifierSet(found.metadata["Requires-Python"]).contains(f"{python}.0")
