"""robosuite itself: imported quietly, and what its environments observe, drawn by a renderer of ours."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import MissingDependencyError
from scd_robot.sim_eval.rendering import render_frame

__all__ = ["COLLISION", "WITHOUT_RENDERER", "import_robosuite", "observe"]

WITHOUT_RENDERER = {"has_renderer": False, "has_offscreen_renderer": False, "use_camera_obs": False}
COLLISION = (0,)  # group of the geoms that only collide


def import_robosuite() -> Any:
    """The module, quietly, and without its choice of an OpenGL backend.

    Raises:
        MissingDependencyError: it is not installed.
    """
    backend = os.environ.get("MUJOCO_GL")
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns about settings that nobody needs
    try:
        import robosuite
    except ImportError as error:
        raise MissingDependencyError(
            f"this needs the package robosuite ({error}), which wants numpy 1 and so has an environment of its own: "
            "make robosuite, then run this with .venv-robosuite/bin/python (or name that with --env-python, where a "
            "simulator is meant)"
        ) from error
    finally:
        logging.disable(quiet)
        if backend is None:
            os.environ.pop("MUJOCO_GL", None)
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    return robosuite


def observe(environment: Any, cameras: Mapping[str, tuple[int, int]]) -> dict[str, NDArray[Any]]:
    """All observations of a robosuite environment's state.

    robosuite would draw the same images (compared, pixel by pixel, in tests/sim_eval/test_robomimic_wrapper.py), but in
    whichever OpenGL context is current: wrong ones as soon as something else in the process draws as well.

    Args:
        environment: made with `WITHOUT_RENDERER`.
        cameras: height and width of images, by the camera.

    Returns:
        Vectors float32; "agentview_image" and so on uint8 (H, W, 3), the right way up. Where the object is drawn by lot
        (NutAssemblySingle, PickPlaceSingle), "object-state" tells it, and not keys that bear its name.

    Raises:
        RenderError: OpenGL cannot be set up here, or an image is blank.
        UnknownNameError: there is no such camera.
    """
    found: dict[str, NDArray[Any]] = {}
    by_lot = _keys_by_lot(environment)
    for key, value in environment._get_observations(force_update=True).items():
        if key in by_lot:
            continue
        array = np.atleast_1d(np.asarray(value))
        if array.ndim == 1 and array.size and array.dtype.kind in "biuf":
            found[key] = array.astype(np.float32)
    model, data = environment.sim.model._model, environment.sim.data._data
    for name, size in cameras.items():
        found[f"{name}_image"] = render_frame(model, data, *size, name, high_quality=True, hidden_groups=COLLISION)
    return found


def _keys_by_lot(environment: Any) -> set[str]:
    """Observations that some episodes have and others do not."""
    if getattr(environment, "single_object_mode", 0) != 1:
        return set()
    sensors = getattr(environment, "nut_id_to_sensors", {}) | getattr(environment, "object_id_to_sensors", {})
    return {name for names in sensors.values() for name in names}
