"""Builds scd_robot_runtime out of modules of scd_robot: they are copied to src/, and their imports renamed.

git holds each module once, in scd_robot. The copy has an import name of its own because two distributions that own the
same files under scd_robot/ break each other: pip lets the second one overwrite them, and takes them away when either is
removed. An sdist holds the copy, and is built without a checkout around it.
"""

import re
import shutil
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
NAME = "scd_robot_runtime"

# By their places in the checkout. Whatever one of them imports of scd_robot must be among them; the package's own
# __init__.py, and that of policies, are in own/.
MODULES = (
    "scd_robot/config.py",
    "scd_robot/errors.py",
    "scd_robot/latest.py",
    "scd_robot/output.py",
    "scd_robot/py.typed",
    "scd_robot/resizing.py",
    "scd_robot/rotations.py",
    "scd_robot/seeding.py",
    "scd_robot/transform_config.py",
    "scd_robot/transforms.py",
    "scd_robot/types.py",
    "scd_robot/usable.py",
    "scd_robot/control/*.py",
    "scd_robot/export/__init__.py",
    "scd_robot/export/manifest.py",
    "scd_robot/export/policy.py",
    "scd_robot/export/runtimes.py",
    "scd_robot/serve/__init__.py",
    "scd_robot/serve/client.py",
    "scd_robot/serve/endpoint.py",
    "scd_robot/serve/link.py",
    "scd_robot/serve/rehearsal.py",
    "scd_robot/serve/remote_policy.py",
    "scd_robot/serve/remote_stream.py",
    "scd_robot/serve/wire.py",
    "policies/chunked.py",
    "policies/inputs.py",
    "policies/instructions.py",
    "policies/observing.py",
    "policies/rows.py",
)

_IMPORT = re.compile(r"^(\s*(?:from|import) )scd_robot\b", re.MULTILINE)


def contents(checkout: Path) -> dict[str, str]:
    """Text of every file of the package, by its path below src/."""
    found = {path.relative_to(HERE / "own"): path.read_text(encoding="utf-8") for path in (HERE / "own").rglob("*.py")}
    for pattern in MODULES:
        paths = sorted(checkout.glob(pattern))
        if not paths:
            raise FileNotFoundError(f"{checkout / pattern} is missing; build {NAME} in a whole checkout of scd_robot")
        for path in paths:
            place = path.relative_to(checkout)
            place = place.relative_to("scd_robot") if place.parts[0] == "scd_robot" else place
            found[place] = _IMPORT.sub(rf"\1{NAME}", path.read_text(encoding="utf-8"))
    return {f"{NAME}/{place.as_posix()}": text for place, text in found.items()}


def assemble(checkout: Path, target: Path) -> None:
    """Makes the folder `target` hold the package as it is in the checkout, and the license; writes what differs."""
    files = {**contents(checkout), "LICENSE": (checkout / "LICENSE").read_text(encoding="utf-8")}
    for place, text in files.items():
        path = target / place
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for path in (target / NAME).rglob("*.py"):
        if path.relative_to(target).as_posix() not in files:
            path.unlink()


if __name__ == "__main__":
    if not (HERE / "PKG-INFO").is_file():  # which an sdist has
        assemble(HERE.parent, HERE / "src")
        shutil.rmtree(HERE / "build" / "lib", ignore_errors=True)  # modules of an earlier build would go into the wheel
    setup()
