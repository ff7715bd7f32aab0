"""Robot trajectory generation with Separable Causal Diffusion.

A causal transformer encoder models the observation history once per control step; a small diffusion decoder denoises
action chunks in many cheap steps. Importing this package loads nothing heavy: torch, lightning, zarr and mujoco come in
with the sub-packages that need them.
"""

import os as _os
from importlib import metadata as _metadata
from pathlib import Path as _Path
from typing import TYPE_CHECKING

# GNU OpenMP threads spin at barriers by default: with any other load on the machine that makes torch up to 30 times
# slower. The variable is read when torch loads its OpenMP runtime, so it has to be set before.
_os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# In a checkout the folders datasets/, policies/ and sim_eval/ lie beside this one; installed, they lie inside it.
if not (_Path(__file__).parent / "datasets").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

if TYPE_CHECKING:
    from scd_robot.policies import load_policy

try:
    __version__ = _metadata.version("scd_robot")
except _metadata.PackageNotFoundError:  # a checkout on sys.path that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__", "load_policy"]


def __getattr__(name: str) -> object:
    if name == "load_policy":
        from scd_robot.policies import load_policy

        return load_policy
    raise AttributeError(f"module 'scd_robot' has no attribute {name!r}")
