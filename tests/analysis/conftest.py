"""Makes `toy_environment` of the evaluation tests importable, here and in worker processes, and `recorded`."""

import sys
from pathlib import Path

for _folder in (Path(__file__).parent, Path(__file__).parent.parent / "sim_eval"):
    sys.path.insert(0, str(_folder))
