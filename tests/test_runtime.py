"""scd_robot_runtime: modules of scd_robot by themselves, for a robot's computer without torch.

`make runtime` installs what the checkout makes of it in an environment, names its Python by $SCD_RUNTIME_PYTHON, and
runs these tests; the last ones need that.
"""

import ast
import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(__file__).parents[1]
FOLDER = CHECKOUT / "scd_robot_runtime"
NAME = "scd_robot_runtime"
PYTHON = os.environ.get("SCD_RUNTIME_PYTHON")
NEEDS = {"msgpack", "numpy", "onnxruntime", "websockets"}
ONLY_WHEN_USED = {  # or, as torch, only where it is loaded already
    "resizing.py": {"torch"},
    "ros_node.py": {"rclpy", "sensor_msgs", "std_msgs", "trajectory_msgs"},
}
NOT_IN_IT = {f"{NAME}.export.torch_runtime"}  # asked for by exports that need torch, and refused


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    """setup.py as a module."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("runtime_setup", FOLDER / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def assembled(builder, tmp_path_factory) -> Path:
    """What setup.py makes of the checkout: the folder that holds the package."""
    target: Path = tmp_path_factory.mktemp("runtime")
    builder.assemble(CHECKOUT, target)
    return target


def project_of(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text())


def test_it_has_the_version_of_scd_robot_and_its_ranges_of_what_it_needs() -> None:
    ours, whole = project_of(FOLDER)["project"], project_of(CHECKOUT)["project"]
    assert ours["version"] == whole["version"]
    assert ours["requires-python"] == whole["requires-python"].replace(">=3.11", ">=3.10")
    extras = whole["optional-dependencies"]
    assert set(ours["dependencies"]) <= {*whole["dependencies"], *extras["serve"], *extras["export"]}
    assert {re.match(r"\w+", need)[0] for need in ours["dependencies"]} == NEEDS  # type: ignore[index]


def test_it_runs_on_the_python_of_robots_that_are_older_than_the_workstation(assembled) -> None:
    """What the language and the standard library had; nothing else is looked at."""
    checker = [sys.executable, "-m", "mypy", "--config-file=", "--cache-dir", os.devnull, "--follow-imports=skip"]
    files = map(str, sorted(assembled.rglob("*.py")))
    arguments = ["--python-version", "3.10", "--ignore-missing-imports", *files]
    done = subprocess.run([*checker, *arguments], capture_output=True, text=True, check=False)
    assert "checked " in done.stdout + done.stderr, done
    missing = re.compile(r'(Module|Module "[\w.]+"|"\w+") has no attribute|\[syntax\]|Python 3\.1\d')
    assert [line for line in done.stdout.splitlines() if missing.search(line)] == []


def test_every_folder_of_it_is_declared(assembled) -> None:
    folders = {path.parent.relative_to(assembled) for path in assembled.rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} == set(project_of(FOLDER)["tool"]["setuptools"]["packages"])
    assert all((assembled / folder / "__init__.py").is_file() for folder in folders)
    assert (assembled / "LICENSE").read_text() == (CHECKOUT / "LICENSE").read_text()


def modules(assembled: Path) -> dict[str, Path]:
    paths = {path.relative_to(assembled).with_suffix(""): path for path in assembled.rglob("*.py")}
    return {".".join(place.parts).removesuffix(".__init__"): path for place, path in paths.items()}


def test_its_modules_import_only_each_other_and_what_it_needs(assembled) -> None:
    """Also where only a type checker looks."""
    known = modules(assembled)
    for path in known.values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                top = name.partition(".")[0]
                allowed = NEEDS | sys.stdlib_module_names | ONLY_WHEN_USED.get(path.name, set())
                fine = name in known.keys() | NOT_IN_IT if top == NAME else top in allowed
                assert fine, f"{path.relative_to(assembled)}:{node.lineno} imports {name}"


def test_it_has_nothing_that_none_of_it_uses(assembled) -> None:
    """All but the control loop is there because something imports it."""
    known = modules(assembled)
    text = "\n".join(path.read_text() for path in known.values())
    asked = {"control", "serve", "export"}
    for name in known:
        part = name.split(".")[1:2]
        assert set(part) & asked or not part or f"from {name}" in text or name.endswith(".policies"), name


def test_what_was_taken_out_disappears_and_the_rest_is_left_alone(builder, tmp_path) -> None:
    builder.assemble(CHECKOUT, tmp_path)
    kept = tmp_path / NAME / "errors.py"
    before = kept.stat().st_mtime_ns
    (tmp_path / NAME / "control" / "earlier.py").write_text("")
    (tmp_path / NAME / "types.py").write_text("changed")
    builder.assemble(CHECKOUT, tmp_path)
    assert not (tmp_path / NAME / "control" / "earlier.py").exists()
    assert "class PolicySpec" in (tmp_path / NAME / "types.py").read_text()
    assert kept.stat().st_mtime_ns == before


def test_a_module_that_is_missing_is_named(builder, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"scd_robot/config\.py is missing; build scd_robot_runtime in a whole"):
        builder.contents(tmp_path)


BESIDE = f"""
import sys
sys.path.insert(0, sys.argv[1])
from {NAME} import control, export, serve
from {NAME}.control.rehearsal import Incident, rehearse
assert "scd_robot" not in sys.modules
heavy = [name for name in ("torch", "scipy", "lightning", "zarr", "mujoco", "tyro") if name in sys.modules]
from scd_robot.control import ControlLoop, Limits
assert Limits is not control.Limits
limits = Limits((-1.0, -1.0), (1.0, 1.0), (2.0, 1.0), (20.0, 5.0), (None, None))
found = rehearse([Incident("late", 5, 3)], control.LoopConfig(), limits, steps=30)
print(found.violations, found.commands > 20, heavy)
"""


def test_it_loads_nothing_of_scd_robot_and_works_beside_it(assembled, tmp_path) -> None:
    """Limits of the one do for the loop of the other."""
    done = subprocess.run(
        [sys.executable, "-c", BESIDE, str(assembled)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "[] True []\n", done.stderr


@contextlib.contextmanager
def served(checkpoint: Path) -> Iterator[str]:
    """The address of `scd serve CHECKPOINT`."""
    server = subprocess.Popen(
        [sys.executable, "-m", "scd_robot.cli.main", "serve", str(checkpoint), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    try:
        said = ""
        while (found := re.search(r"ws://[\d.:]+", said)) is None:
            line = server.stderr.readline()
            assert line, said
            said += line
        yield found[0]
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


def run_alone(*arguments: object, folder: Path) -> str:
    """Standard output of the environment's Python, which must succeed."""
    assert PYTHON is not None
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, *map(str, arguments)], cwd=folder, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_environment = pytest.mark.skipif(PYTHON is None, reason="needs an environment of its own: make runtime")


@needs_environment
def test_what_is_installed_is_what_the_checkout_holds(assembled, tmp_path) -> None:
    """Through sdist and wheel."""
    code = f"import {NAME}; print({NAME}.__path__[0], end='')"
    installed = Path(run_alone("-c", code, folder=tmp_path))
    found, wanted = (
        {path.relative_to(folder): path.read_text() for path in folder.rglob("*") if path.suffix in (".py", ".typed")}
        for folder in (installed, assembled / NAME)
    )
    assert found.keys() == wanted.keys()
    assert found == wanted
    assert list(installed.parent.glob(f"{NAME}-*.dist-info/**/LICENSE"))


@needs_environment
def test_in_an_environment_of_its_own_it_does_what_scd_robot_does(tmp_path) -> None:
    """Control loop, exported policy and client, with exactly the packages that it needs."""
    scripts = CHECKOUT / "tests" / "runtime_env"
    done = subprocess.run(
        [sys.executable, scripts / "write_example.py", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with served(tmp_path / "checkpoint") as address:
        told = run_alone(scripts / "check_runtime.py", tmp_path, address, folder=tmp_path)
        for example in ("client.py", "remote_loop.py"):
            text = (CHECKOUT / "examples" / example).read_text()
            (tmp_path / example).write_text(text.replace("from scd_robot.", f"from {NAME}."))
        assert run_alone("client.py", address, "--steps", "6", folder=tmp_path).count("planned in") == 3
        driven = run_alone("remote_loop.py", address, "--steps", "40", folder=tmp_path)
        assert "'followed': 0" not in driven
        assert "followed" in driven
    assert told.endswith("does what scd_robot does\n")
