"""What an evaluation was made with: versions, commit, machine, and the policy's checkpoint and settings."""

import logging
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import scd_robot
from scd_robot.output import package_versions

__all__ = ["code_version", "collect_provenance", "collect_versions", "describe_machine", "usable_cores"]

logger = logging.getLogger(__name__)

_PACKAGES = (
    "numpy",
    "mujoco",
    "metaworld",
    "gymnasium",
    "gymnasium-robotics",
    "gym-aloha",
    "dm-control",
    "gym-pusht",
    "pymunk",
    "robosuite",
)


def collect_versions() -> dict[str, str]:
    """Versions of Python, this package, torch if loaded, and of the simulators that are installed."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "scd_robot": scd_robot.__version__,
        **package_versions(_PACKAGES + (("torch",) if "torch" in sys.modules else ())),
    }


def collect_provenance(policy: Any) -> dict[str, Any]:
    """Where and when an evaluation is made, and of what.

    Args:
        policy: whose `provenance`, if it has one, tells what it is (see `policies.policy_of`).

    Returns:
        `created` (UTC, ISO 8601), `commit` of the checkout this package runs from (None for an installed one),
        `machine` and `policy`, as plain JSON types.
    """
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": code_version(Path(scd_robot.__file__).parents[1]),
        "machine": describe_machine(),
        "policy": dict(getattr(policy, "provenance", {})),
    }


def describe_machine() -> dict[str, Any]:
    """Processor, and how many cores this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": len(usable_cores()),
    }


def usable_cores() -> list[int]:
    """Numbers of the processor cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def code_version(checkout: Path) -> str | None:
    """The commit of a checkout, "-dirty" with changes since; None where a folder is none."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        logger.debug("the commit is unknown: %s", error)
        return None
