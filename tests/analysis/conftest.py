"""Makes `toy_environment` of the evaluation tests importable, here and in worker processes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "sim_eval"))
