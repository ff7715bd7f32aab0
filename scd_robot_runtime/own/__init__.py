"""What a robot's computer runs of scd_robot: `control`, `export` (the runner) and `serve` (the client); no torch.

Modules are those of scd_robot, under the same names below this one. Their classes are not the same objects: where both
packages are installed, import all of a program from one of them.
"""

from importlib import metadata as _metadata

try:
    __version__ = _metadata.version("scd_robot_runtime")
except _metadata.PackageNotFoundError:  # a folder on sys.path that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
