"""robosuite runs beside this package; `make robosuite` makes the environment that holds both."""

import numpy as np
import pytest

robosuite = pytest.importorskip("robosuite", reason="robosuite has an environment of its own: make robosuite")

pytestmark = pytest.mark.sim


def test_robosuite_steps_beside_the_package() -> None:
    import scd_robot.datasets  # noqa: F401 - zarr must be usable with the numpy that robosuite needs

    environment = robosuite.make(
        "Lift", robots="Panda", has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False
    )
    try:
        first = environment.reset()["robot0_eef_pos"].copy()
        action = np.zeros(environment.action_dim)
        action[0] = 1.0
        for _ in range(5):
            observation, _, _, _ = environment.step(action)
        assert np.linalg.norm(observation["robot0_eef_pos"] - first) > 1e-3
    finally:
        environment.close()
