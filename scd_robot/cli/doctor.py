"""The verb `scd doctor`: tells what works on this machine, which versions clash, and what to install."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

__all__ = ["Check", "doctor"]

_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Check:
    """What was found about one thing.

    Attributes:
        name: of it.
        state: "works", "broken" (installed, but of no use), "clash" (versions that do not want each other, whether or
            not that shows), or "missing".
        needed: without it nothing works.
        found: version, or what went wrong, in one line.
        advice: what to do; "" = nothing.
        seconds: it took.
    """

    name: str
    state: str
    needed: bool
    found: str
    advice: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class _Package:
    """A package, how it is tried, and how it is had."""

    name: str
    code: str  # run in a process of its own; prints what was found
    advice: str
    needed: bool = False


_EXTRA = "pip install 'scd_robot[{}]'"
_RESET = "from scd_robot.sim_eval import make_environment; make_environment('{}').reset(0)"
_TRY_PYTHON = """
import sys
if sys.version_info < (3, 11):
    sys.exit("it is Python %d.%d, and 3.11 or later is needed" % tuple(sys.version_info[:2]))
if sys.path[0] == "":
    del sys.path[0]
import scd_robot
import tyro  # what it needs is there as well
"""
_PACKAGES = (
    _Package("numpy", "import numpy", "pip install numpy", True),
    _Package("torch", "import torch; print(torch.__version__, 'on', torch.cuda.get_device_name(0) "
             "if torch.cuda.is_available() else 'CPU')", "pip install torch", True),
    _Package("lightning", "from scd_robot.training.compat import lightning; print(lightning.__version__)",
             "pip install lightning", True),
    _Package("zarr", "import zarr", "pip install 'zarr>=3.1.3,<4'", True),
    _Package("h5py", "import h5py", "pip install h5py", True),
    _Package("mujoco", "import mujoco; mujoco.MjModel.from_xml_string('<mujoco/>'); print(mujoco.__version__)",
             "pip install mujoco", True),
    _Package("av", "import av; av.codec.Codec('libx264', 'w'); av.codec.Codec('libdav1d', 'r'); "
             "print(av.__version__, 'with H.264 and AV1')", "pip install av", True),
    _Package("matplotlib", "import matplotlib.figure", _EXTRA.format("sim")),
    _Package("metaworld", _RESET.format("metaworld/reach-v3"), _EXTRA.format("sim")),
    _Package("gym-pusht", _RESET.format("pusht"), _EXTRA.format("sim")),
    _Package("robomimic", "import robomimic.utils.dataset; print(robomimic.__version__)", _EXTRA.format("robomimic")),
    _Package("robosuite", "import robosuite; print(robosuite.__version__)",
             "it needs an environment of its own: docs/install.md"),
    _Package("gymnasium-robotics", _RESET.format("gymnasium/FetchReach-v4"), _EXTRA.format("robotics")),
    _Package("gym-aloha", _RESET.format("gymnasium/AlohaTransferCube-v0"), _EXTRA.format("robotics")),
    _Package("timm", "import timm; print(timm.__version__)", _EXTRA.format("vision")),
    _Package("ray", "import ray; print(ray.__version__)", _EXTRA.format("ray")),
    _Package("onnxruntime", "import onnxruntime", _EXTRA.format("export")),
    _Package("onnxscript", "import onnx, onnxscript", _EXTRA.format("export")),
    _Package("websockets", "import scd_robot.serve.server", _EXTRA.format("serve")),
    _Package("msgpack", "import msgpack", _EXTRA.format("serve")),
    _Package("huggingface_hub", "import scd_robot.hub; import huggingface_hub; print(huggingface_hub.__version__)",
             _EXTRA.format("hub")),
    _Package("pyarrow", "import pyarrow.parquet", _EXTRA.format("formats")),
    _Package("fsspec", "import fsspec", _EXTRA.format("formats")),
    _Package("imagecodecs", "import imagecodecs.numcodecs", "pip install imagecodecs (JPEG 2000 in replay buffers)"),
)  # fmt: skip


def doctor(*, env_python: str | None = None, json: Path | None = None) -> int:
    """Tells what works on this machine, which versions clash, and what to install.

    Each package is tried in a process of its own; about half a minute. The exit code is 1 where something that is
    needed does not work, or something that is installed is broken.

    Args:
        env_python: look at this python of another environment instead, one for 'scd eval --env-python' for example.
        json: write what was found to this file too ("-": standard output).
    """
    from tqdm import tqdm

    from scd_robot.output import check_target, write_json

    if json is not None:
        check_target(json)
    if env_python is not None:
        return _elsewhere(env_python, json)
    backends = ("egl", "osmesa")
    checks = []
    with tqdm(total=len(_PACKAGES) + len(backends), unit="check", leave=False, disable=str(json) == "-" or None) as bar:
        for package in _PACKAGES:
            bar.set_description(package.name)
            checks.append(_try_package(package))
            bar.update()
        rendering = []
        for backend in backends:
            bar.set_description(f"OpenGL {backend}")
            rendering.append(_try_rendering(backend))
            bar.update()
    checks += [*_without_needless_advice(rendering), *_configured_rendering(rendering), _clashes()]
    machine = _machine()
    if str(json) != "-":
        for name, value in machine.items():
            print(f"{name:<28}{value}")
        print()
        for check in checks:
            print(_line(check))
    if json is not None:
        write_json(json, {"machine": machine, "checks": [asdict(check) for check in checks]})
    return int(any(check.state == "broken" or (check.needed and check.state != "works") for check in checks))


def _try_package(package: _Package) -> Check:
    try:
        version = importlib.metadata.version(package.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(package.name, "missing", package.needed, "not installed", package.advice)
    started = time.perf_counter()
    code, output, error = _run(package.code)
    seconds = time.perf_counter() - started
    if code == 0:
        return Check(package.name, "works", package.needed, output or version, seconds=seconds)
    return Check(package.name, "broken", package.needed, f"{version}: {error}", _advice(package, error), seconds)


def _advice(package: _Package, error: str) -> str:
    """Known clashes have advice of their own, often in the error itself."""
    if "pip " in error:
        return ""
    if package.name == "robomimic" and "torchvision" in error:
        return "pip uninstall torchvision, or install the one that fits this torch: docs/install.md"
    return f"{package.advice}; the versions that fit together are in constraints.txt"


def _elsewhere(python: str, json: Path | None) -> int:
    """The same under another Python, which has an installation of its own."""
    from scd_robot.errors import ConfigError

    target = [] if json is None else ["--json", str(json) if str(json) == "-" else os.path.abspath(json)]
    command = [os.path.abspath(python), "-P", "-m", "scd_robot.cli.main", "doctor", *target]
    try:  # an older Python does not know -P
        found = subprocess.run([command[0], "-c", _TRY_PYTHON], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(
            f"cannot start {python}: {error.strerror or error}; name the python of an environment"
        ) from error
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1:]
        raise ConfigError(f"{python} has no working scd_robot ({' '.join(reason)}); install it there: docs/install.md")
    return subprocess.run(command, check=False).returncode


def _clashes() -> Check:
    """Versions that packages of ours, or what they need, do not want beside each other."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    ours = {package.name for package in _PACKAGES} | {"scd-robot"}
    installed = list(importlib.metadata.distributions())
    named = {canonicalize_name(one.metadata["Name"]): one for one in installed if one.metadata["Name"]}
    versions = {name: one.version for name, one in named.items()}
    found = set()
    for name, distribution in named.items():
        for text in distribution.requires or ():
            try:
                need = Requirement(text)
            except InvalidRequirement:
                continue
            other = canonicalize_name(need.name)
            if not {name, other} & ours or (need.marker and not need.marker.evaluate({"extra": ""})):
                continue
            if other in versions and not need.specifier.contains(versions[other], prereleases=True):
                found.add(
                    f"{name} {distribution.version} wants {need.name}{need.specifier}, there is {versions[other]}"
                )
    if not found:
        return Check("versions", "works", False, "no package wants another version of one that is installed")
    return Check("versions", "clash", False, "; ".join(sorted(found)), "constraints.txt has versions that fit together")


def _try_rendering(backend: str) -> Check:
    code = (
        "from scd_robot.sim_eval.rendering import render_frame; import mujoco\n"
        'm = mujoco.MjModel.from_xml_string(\'<mujoco><worldbody><light pos="0 0 3"/>'
        '<geom type="box" size=".1 .1 .1"/></worldbody></mujoco>\')\n'
        "d = mujoco.MjData(m); mujoco.mj_forward(m, d); render_frame(m, d, 96, 96)\n"
        "import time; t = time.perf_counter(); [render_frame(m, d, 96, 96) for _ in range(20)]\n"
        "print(f'{(time.perf_counter() - t) * 50:.1f} ms per frame of 96 x 96')"
    )
    started = time.perf_counter()
    status, output, error = _run(code, {"MUJOCO_GL": backend})
    seconds = time.perf_counter() - started
    if status == 0:
        return Check(f"OpenGL {backend}", "works", False, output, seconds=seconds)
    packages = {"egl": "libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri", "osmesa": "libosmesa6"}.get(backend)
    advice = f"apt-get install {packages}" if packages else ""
    return Check(f"OpenGL {backend}", "missing", False, error, advice, seconds)


def _configured_rendering(backends: list[Check]) -> list[Check]:
    """The backend that `MUJOCO_GL` asks for, which is then the one that is used; nothing where it is not set."""
    wanted = os.environ.get("MUJOCO_GL")
    if wanted is None or not sys.platform.startswith("linux"):
        return []
    found = next((one for one in backends if one.name == f"OpenGL {wanted}"), None) or _try_rendering(wanted)
    name = f"MUJOCO_GL={wanted}"
    if found.state == "works":
        return [replace(found, name=name, seconds=0.0)]
    working = [one.name.removeprefix("OpenGL ") for one in backends if one.state == "works"]
    advice = f"unset MUJOCO_GL, or set it to {working[0]}" if working else "unset MUJOCO_GL, and install a backend"
    return [Check(name, "broken", False, found.found, advice, found.seconds)]


def _without_needless_advice(backends: list[Check]) -> list[Check]:
    """One backend is enough."""
    if not any(check.state == "works" for check in backends):
        return backends
    return [check if check.state == "works" else Check(**{**asdict(check), "advice": ""}) for check in backends]


def _run(code: str, variables: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Exit code, output and last line of the error of a Python program in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env={**os.environ, **(variables or {})},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, "", f"no answer within {_TIMEOUT_S:.0f} s"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reason = lines[-1] if lines else f"exit code {done.returncode}"
    return done.returncode, " ".join(done.stdout.split()), reason[:300]


def _machine() -> dict[str, str]:
    import scd_robot

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "scd_robot": scd_robot.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cores": str(cores),
        "MUJOCO_GL": os.environ.get("MUJOCO_GL", "not set: chosen by trying"),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
    }


def _line(check: Check) -> str:
    mark = {"works": "ok", "broken": "BROKEN", "clash": "CLASH", "missing": "MISSING" if check.needed else "-"}[
        check.state
    ]
    advice = f"\n{'':28}-> {check.advice}" if check.advice else ""
    return f"{mark:<8}{check.name:<20}{check.found}{advice}"
