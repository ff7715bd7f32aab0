"""The published openpi-client, unmodified, drives a simulated task through the server. It runs under another Python.

`make openpi` makes that environment (openpi-client wants numpy 1) and runs this; $SCD_OPENPI_PYTHON names another one.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from small_policies import small_policy

CHECKOUT = Path(__file__).parents[2]
GIVEN = os.environ.get("SCD_OPENPI_PYTHON")
PYTHON = Path(GIVEN or CHECKOUT / ".venv-openpi" / "bin" / "python")
MADE = PYTHON if GIVEN else CHECKOUT / ".venv-openpi" / ".made"  # it may be in the making


@pytest.mark.skipif(not MADE.exists(), reason="no environment with openpi-client: make openpi")
def test_the_published_client_drives_an_environment_as_the_policy_itself_would(start):
    """Two actions of each plan are executed, so that each observation stands two control steps after the last."""
    script, steps = CHECKOUT / "tests" / "openpi_env" / "drive.py", 20
    done = subprocess.run(
        [PYTHON, script, start().address, "2", str(steps)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    policy = small_policy()
    history = policy.new_history(0)
    for step in range(0, steps, 2):
        if step:
            history.skip(1)
        policy.resume([history])
        policy.observe({key: np.array([value], np.float32) for key, value in told["seen"][step].items()})
        chunk = policy.plan()[0]
        (history,) = policy.release()
        np.testing.assert_allclose(told["done"][step : step + 2], chunk[:2], rtol=0, atol=1e-5)
    assert told["metadata"]["action_horizon"] == 4
    assert "expected goal float32 (2,), position float32 (2,); got observation/state float64 (7,)" in told["refusal"]
    assert "Traceback" not in told["refusal"]
