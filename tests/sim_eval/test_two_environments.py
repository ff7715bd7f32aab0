"""robosuite under its own constraints, evaluated from here; needs the environment that `make robosuite` makes."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from scd_robot.sim_eval import evaluate

GIVEN = os.environ.get("SCD_ROBOT_ROBOSUITE_PYTHON")
ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-robosuite"
PYTHON = Path(GIVEN or ENVIRONMENT / "bin" / "python")
MADE = PYTHON if GIVEN else ENVIRONMENT / ".made"  # it may be in the making


class Lower:
    """Moves the hand down."""

    def reset(self, rows=None):
        pass

    def act(self, observation):
        return np.tile(np.array([0, 0, -1, 0, 0, 0, -1], np.float32), (len(observation["object"]), 1))


@pytest.mark.skipif(not MADE.is_file(), reason="make robosuite makes the other environment")
@pytest.mark.skipif(PYTHON.parents[1] == Path(sys.prefix), reason="these tests run in the other environment themselves")
def test_robosuite_beside_another_numpy(tmp_path):
    options = {"num_videos": 1, "python": str(PYTHON), "progress": False}
    result = evaluate(Lower(), "robosuite/Lift:max_steps=8", 2, num_envs=2, out=tmp_path / "out", **options)
    assert result.invalid == 0
    assert [episode.steps for episode in result.episodes_detail] == [8, 8]
    assert len({episode.initial_state_hash for episode in result.episodes_detail}) == 2
    assert result.versions["simulator/robosuite"].startswith("1.")
    assert result.versions["simulator/numpy"] != result.versions["numpy"]
    assert (result.video_error, len(result.videos)) == (None, 1)
