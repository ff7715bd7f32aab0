"""scd doctor tells works from broken from missing, and what to do."""

import json
import sys

import pytest

from scd_robot.cli import doctor
from scd_robot.cli.main import main

WORKS = doctor._Package("numpy", "import numpy; print('found', numpy.__version__)", "pip install numpy", True)
BROKEN = doctor._Package("h5py", "raise RuntimeError('built for another numpy')", "pip install h5py")
CLASH = doctor._Package("h5py", "raise RuntimeError('wrong torchvision; run pip uninstall torchvision')", "-")
MISSING = doctor._Package("no-such-package", "import nothing", "pip install no-such-package")
NEEDED = doctor._Package("no-such-package", "import nothing", "pip install no-such-package", True)


@pytest.fixture
def quick(monkeypatch):
    def set_up(*packages, rendering="works"):
        monkeypatch.setattr(doctor, "_PACKAGES", packages)
        found = doctor.Check("OpenGL egl", rendering, False, "1 ms", "apt-get install libegl1")
        monkeypatch.setattr(doctor, "_try_rendering", lambda backend: found)

    return set_up


@pytest.mark.parametrize(
    ("packages", "code", "told"),
    [
        ((WORKS, MISSING), 0, "pip install no-such-package"),
        ((WORKS, BROKEN), 1, "RuntimeError: built for another numpy"),
        ((WORKS, NEEDED), 1, "MISSING"),
    ],
)
def test_exit_code_and_advice(quick, capsys, packages, code, told):
    quick(*packages)
    assert main(["doctor"]) == code
    out, err = capsys.readouterr()
    assert told in out
    assert "ok      numpy               found" in out
    assert err == ""  # no bar, where nobody sees one move


def test_advice_is_not_given_twice_nor_needlessly(quick, tmp_path):
    quick(CLASH)
    assert main(["doctor", "--json", str(tmp_path / "d.json")]) == 1
    checks = json.loads((tmp_path / "d.json").read_text())["checks"]
    assert checks[0]["state"] == "broken"
    assert checks[0]["advice"] == ""  # the error itself says what to do
    assert {check["advice"] for check in checks if check["name"].startswith("OpenGL")} == {"apt-get install libegl1"}
    missing = doctor.Check("OpenGL osmesa", "missing", False, "no library", "apt-get install libosmesa6")
    works = doctor.Check("OpenGL egl", "works", False, "1 ms")
    assert [check.advice for check in doctor._without_needless_advice([works, missing])] == ["", ""]
    assert [check.advice for check in doctor._without_needless_advice([missing])] == ["apt-get install libosmesa6"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have one backend")
class TestConfiguredBackend:
    @pytest.mark.parametrize(
        ("value", "working", "state", "advice"),
        [
            ("glfw", "egl", "broken", "unset MUJOCO_GL, or set it to egl"),
            ("osmesa", "egl", "broken", "unset MUJOCO_GL, or set it to egl"),
            ("", "osmesa", "broken", "unset MUJOCO_GL, or set it to osmesa"),
            ("glfw", "none", "broken", "unset MUJOCO_GL, and install a backend"),
            ("egl", "egl", "works", ""),
            ("glfw", "glfw", "works", ""),
        ],
    )
    def test_the_backend_that_would_be_used_is_tried(self, monkeypatch, capsys, value, working, state, advice):
        def render(backend):
            found = "works" if backend == working else "missing"
            return doctor.Check(f"OpenGL {backend}", found, False, f"{backend} was tried")

        monkeypatch.setattr(doctor, "_PACKAGES", (WORKS,))
        monkeypatch.setattr(doctor, "_try_rendering", render)
        monkeypatch.setenv("MUJOCO_GL", value)
        assert main(["doctor"]) == int(state == "broken")
        lines = capsys.readouterr().out.splitlines()
        [number] = [i for i, line in enumerate(lines) if f"MUJOCO_GL={value} " in line]
        assert lines[number].split()[0] == {"broken": "BROKEN", "works": "ok"}[state]
        assert f"{value} was tried" in lines[number]
        assert (f"-> {advice}" in lines[number + 1]) == bool(advice)

    def test_a_display_that_is_not_there_is_told(self, monkeypatch):
        for name in ("DISPLAY", "WAYLAND_DISPLAY"):
            monkeypatch.delenv(name, raising=False)
        found = doctor._try_rendering("glfw")
        assert found.state == "missing"
        assert "RenderError: OpenGL backend 'glfw' does not work here" in found.found

    def test_nothing_is_said_where_nothing_is_configured(self, quick, monkeypatch, capsys):
        quick(WORKS)
        monkeypatch.delenv("MUJOCO_GL", raising=False)
        assert main(["doctor"]) == 0
        assert "MUJOCO_GL=" not in capsys.readouterr().out


def test_versions_that_clash_are_told(quick, tmp_path, monkeypatch, capsys):
    quick(WORKS)
    folder = tmp_path / "tool-1.0.dist-info"
    folder.mkdir()
    needs = ("numpy<1", "no-such-package>3", "numpy>=1; extra == 'more'", "tqdm<0")  # tqdm is none of our business
    lines = "".join(f"Requires-Dist: {need}\n" for need in needs)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tool\nVersion: 1.0\n{lines}")
    (tmp_path / "ghost-1.0.dist-info").mkdir()  # what an installation leaves that was broken off
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["doctor"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("CLASH")]
    assert "tool 1.0 wants numpy<1, there is" in line
    assert line.count("wants") == 1


def test_json_goes_to_standard_output_alone(quick, capsys):
    quick(WORKS)
    assert main(["doctor", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["checks"][0]["state"] == "works"


@pytest.mark.slow
def test_this_machine_as_another_python_sees_it(tmp_path):
    """The same checks as without --env-python, in a process of that Python."""
    assert main(["doctor", "--env-python", sys.executable, "--json", str(tmp_path / "d.json")]) == 0
    document = json.loads((tmp_path / "d.json").read_text())
    assert sys.executable in document["machine"]["python"]
    states = {check["name"]: check["state"] for check in document["checks"]}
    assert all(states[name] == "works" for name in ("numpy", "torch", "lightning", "zarr", "h5py", "mujoco", "av"))


def test_what_cannot_be_another_python_is_told(tmp_path, refused):
    refused(["doctor", "--env-python", tmp_path / "python"], "cannot start", "No such file")
    bare = tmp_path / "bare"
    bare.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'raise SystemExit(1)'\n")
    bare.chmod(0o755)
    refused(["doctor", "--env-python", bare], "no working scd_robot", "docs/install.md")
    code = "import sys; sys.version_info = (3, 10, 2); exec(sys.argv[2])"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -P -c "{code}" "$@"\n')
    refused(["doctor", "--env-python", bare], "it is Python 3.10, and 3.11 or later is needed")
