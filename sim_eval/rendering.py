"""MuJoCo frames that can be trusted: one renderer per process, cheap settings, content checked.

Why not `mujoco.Renderer`: it frees its OpenGL context first and its OpenGL objects afterwards, so the objects (plain
numbers) are deleted in whichever context happens to be current; a second renderer in the process then silently
returns black or half-drawn frames. Gymnasium's viewers do the same. Here

- the process has one OpenGL context of ours for its whole life; the objects of the models drawn last stay in it (of as
  many as take turns, and 16 more), and are made and freed while it is current;
- outside of a draw an empty second context is current (`parking`), so that whatever another library deletes at any
  other moment hits nothing of ours; the garbage collector rests during a draw.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import logging
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import RenderError, UnknownNameError

if TYPE_CHECKING:
    import mujoco

__all__ = ["check_frame", "close_renderer", "render_frame", "select_gl_backend"]

logger = logging.getLogger(__name__)

_MAX_GEOMS = 10_000
_MAX_MODELS = 16  # and one more for each that was drawn again after it had to go
_PROBE_TIMEOUT_S = 20.0  # two probes fit into the time a worker has for a command
_WINDOW_BACKENDS = ("", "1", "enable", "enabled", "on", "true", "glfw", "glx", "wgl")
_NO_BACKEND = ("0", "disable", "disabled", "off", "false")
_INSTALL_HINT = "install one (Debian, Ubuntu: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri, or libosmesa6)"
_TRY_ANOTHER = f"{_INSTALL_HINT}, or unset MUJOCO_GL to have another one tried"
_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 0 3'/><geom type='box' size='.1 .1 .1' rgba='1 0 0 1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    frame = renderer.render()
raise SystemExit(0 if frame.min() < frame.max() else "the frame is blank")
"""


@functools.cache
def select_gl_backend() -> str:
    """Chooses MuJoCo's OpenGL backend once per process and exports it as `MUJOCO_GL` to this process and its children.

    `MUJOCO_GL` is respected where it is set. Otherwise (on Linux) egl and then osmesa are tried in a subprocess, about
    one second each. MuJoCo reads the variable when it is imported, so call this before a third-party simulator that
    renders by itself is imported; `render_frame` works in either order.

    Returns:
        "egl", "osmesa", "cgl" (macOS) or "glfw" (needs a display).

    Raises:
        RenderError: `MUJOCO_GL` switches rendering off or is not a backend, or none of the backends works.
    """
    if not sys.platform.startswith("linux"):
        return "cgl" if sys.platform == "darwin" else "glfw"
    wanted = os.environ.get("MUJOCO_GL")
    if wanted is not None:
        return _parse_backend(wanted)
    failures = []
    for backend in ("egl", "osmesa"):
        reason = _probe(backend)
        if reason is None:
            os.environ["MUJOCO_GL"] = backend
            logger.info("OpenGL backend: %s", backend)
            return backend
        failures.append(f"{backend}: {reason}")
    raise RenderError(f"no headless OpenGL backend works here ({'; '.join(failures)}); {_INSTALL_HINT}")


def render_frame(
    model: "mujoco.MjModel",
    data: "mujoco.MjData",
    height: int,
    width: int,
    camera: "int | str | mujoco.MjvCamera" = -1,
    *,
    high_quality: bool = False,
    hidden_groups: Sequence[int] = (),
) -> NDArray[np.uint8]:
    """Draws the present state.

    `model.vis` is adapted (buffer size, samples, shadow size). Positions, colours and sizes may change between frames;
    meshes and textures are uploaded when a model is first seen. To be called from one thread.

    Args:
        model: the model; a process should stay with one, a change costs about 0.3 s.
        data: its state; `mj_forward` has been run.
        height: of the frame, in pixels.
        width: of the frame, in pixels.
        camera: name or number of a camera of the model, -1 for the free camera, or an `MjvCamera`.
        high_quality: shadows, reflections and 4 samples per pixel; 10 to 100 times slower in software.
        hidden_groups: groups of geoms that are left out, beside those from 3 on.

    Returns:
        (height, width, 3) RGB frame.

    Raises:
        RenderError: OpenGL cannot be set up here, or the frame is blank.
        UnknownNameError: the model has no such camera.
    """
    frame = _process_renderer().render(model, data, (height, width), camera, high_quality, hidden_groups)
    check_frame(frame)
    return frame


def check_frame(frame: NDArray[np.uint8]) -> None:
    """Refuses a frame (H, W, 3) without content.

    Raises:
        RenderError: all pixels are the same: nothing was drawn, or the OpenGL objects were lost.
    """
    if (frame == frame[0, 0]).all():
        raise RenderError(
            f"the rendered {frame.shape[0]}x{frame.shape[1]} frame is blank (every pixel is {frame[0, 0].tolist()}); "
            "check the camera and the OpenGL driver, or try another backend with MUJOCO_GL=egl or MUJOCO_GL=osmesa"
        )


def close_renderer() -> None:
    """Releases this process's renderer, if it has one; called at exit by itself. Afterwards a new one may be made."""
    if _process_renderer.cache_info().currsize:
        _process_renderer().close()
        _process_renderer.cache_clear()


def _close_at_exit() -> None:
    with contextlib.suppress(Exception):  # another library has shut the display down already
        close_renderer()


def _parse_backend(value: str) -> str:
    name = value.lower().strip()
    if name in ("egl", "osmesa"):
        return name
    if name in _WINDOW_BACKENDS:
        return "glfw"
    if name in _NO_BACKEND:
        raise RenderError(f"MUJOCO_GL={value} switches rendering off; unset it, or set it to egl or osmesa")
    raise RenderError(f"MUJOCO_GL must be egl, osmesa or glfw, got {value!r}; unset it to have one chosen")


def _probe(backend: str) -> str | None:
    """Draws a box in a subprocess; returns None if that works, else the reason in one line."""
    environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no frame within {_PROBE_TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {done.returncode}"


@functools.cache
def _process_renderer() -> "_ProcessRenderer":
    renderer = _ProcessRenderer(select_gl_backend())
    atexit.register(_close_at_exit)  # runs before the display itself is shut down, so exits stay silent
    return renderer


@dataclass(frozen=True, eq=False)
class _Uploaded:
    """What draws a model, which may be gone by now."""

    model: "weakref.ref[mujoco.MjModel]"
    objects: "mujoco.MjrContext"
    scene: "mujoco.MjvScene"
    returned: bool  # it had to go once, and was drawn again: it takes turns with many, and has room of its own


class _ProcessRenderer:
    """The renderer of this process: one OpenGL context, and the objects of the models drawn last in it."""

    def __init__(self, backend: str) -> None:
        try:
            context_class = _context_class(backend)
            self._context = context_class(64, 64)
            self._parking = context_class(64, 64)
            if backend == "egl":  # others use MuJoCo's display too; at exit it is not shut down before they are done
                atexit.unregister(importlib.import_module("OpenGL.EGL").eglTerminate)
        except Exception as error:  # the bindings raise ImportError, RuntimeError, AttributeError and GLError alike
            raise RenderError(
                f"OpenGL backend {backend!r} does not work here ({type(error).__name__}: {error}); {_TRY_ANOTHER}"
            ) from error
        self._backend = backend
        self._owner = (os.getpid(), threading.get_ident())
        self._kept: dict[tuple[int, bool], _Uploaded] = {}  # by the model's identity and the quality, oldest first
        # What an environment's reset leaves is never drawn again; what takes turns is, and gets room of its own.
        self._evicted: weakref.WeakValueDictionary[tuple[int, bool], mujoco.MjModel] = weakref.WeakValueDictionary()

    def render(
        self,
        model: "mujoco.MjModel",
        data: "mujoco.MjData",
        size: tuple[int, int],
        camera: "int | str | mujoco.MjvCamera",
        high_quality: bool,
        hidden_groups: Sequence[int],
    ) -> NDArray[np.uint8]:
        """One frame (H, W, 3), unchecked."""
        import mujoco

        if self._owner != (os.getpid(), threading.get_ident()):
            raise RenderError("frames must all be rendered in the process and thread that rendered the first one")
        view = _find_camera(model, camera)
        shown = mujoco.MjvOption()
        shown.geomgroup[list(hidden_groups)] = 0
        height, width = size
        frame = np.empty((height, width, 3), np.uint8)
        with self._current():
            uploaded = self._prepare(model, height, width, high_quality)
            scene, objects = uploaded.scene, uploaded.objects
            everything = mujoco.mjtCatBit.mjCAT_ALL.value
            mujoco.mjv_updateScene(model, data, shown, None, view, everything, scene)
            viewport = mujoco.MjrRect(0, 0, width, height)
            mujoco.mjr_render(viewport, scene, objects)
            mujoco.mjr_readPixels(frame, None, viewport, objects)
        return np.ascontiguousarray(frame[::-1])  # OpenGL's first row is the lowest

    def close(self) -> None:
        """Frees the objects while their context is current, then both contexts."""
        if self._kept:
            with self._current():
                for uploaded in self._kept.values():
                    uploaded.objects.free()
        self._kept.clear()
        self._context.free()
        self._parking.free()

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Makes our context current for the duration of a draw, without collections of other libraries' leftovers."""
        collecting = gc.isenabled()
        gc.disable()
        try:
            self._context.make_current()
            yield
        finally:
            self._parking.make_current()
            if collecting:
                gc.enable()

    def _prepare(self, model: "mujoco.MjModel", height: int, width: int, high_quality: bool) -> "_Uploaded":
        """Uploads the model unless it is there already, at this quality and in a large enough buffer; binds that."""
        import mujoco

        offscreen = mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value
        for key in [key for key, uploaded in self._kept.items() if uploaded.model() is None]:
            self._kept.pop(key).objects.free()
        key = (id(model), high_quality)
        uploaded = self._kept.pop(key, None)
        returned = self._evicted.pop(key, None) is not None
        if uploaded is not None:
            if uploaded.objects.offHeight >= height and uploaded.objects.offWidth >= width:
                self._kept[key] = uploaded
                mujoco.mjr_setBuffer(offscreen, uploaded.objects)
                return uploaded
            returned = uploaded.returned
            uploaded.objects.free()
        while len(self._kept) >= _MAX_MODELS + returned + sum(one.returned for one in self._kept.values()):
            self._evict(next(iter(self._kept)))
        model.vis.quality.offsamples = 4 if high_quality else 0
        model.vis.quality.shadowsize = 4096 if high_quality else 0
        model.vis.global_.offheight = max(height, model.vis.global_.offheight)
        model.vis.global_.offwidth = max(width, model.vis.global_.offwidth)
        try:
            objects = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50.value)
        except mujoco.FatalError as error:  # glfw without a display makes its context without a word
            message = f"OpenGL backend {self._backend!r} does not work here ({error}); {_TRY_ANOTHER}"
            raise RenderError(message) from error
        mujoco.mjr_setBuffer(offscreen, objects)
        if objects.currentBuffer != offscreen:
            raise RenderError(f"the OpenGL driver offers no {height}x{width} offscreen buffer; ask for smaller frames")
        scene = mujoco.MjvScene(model, maxgeom=_MAX_GEOMS)
        scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = high_quality
        scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = high_quality
        self._kept[key] = _Uploaded(weakref.ref(model), objects, scene, returned)
        return self._kept[key]

    def _evict(self, key: tuple[int, bool]) -> None:
        uploaded = self._kept.pop(key)
        uploaded.objects.free()
        model = uploaded.model()
        if model is not None:
            self._evicted[key] = model


def _context_class(backend: str) -> Any:
    """MuJoCo's, but silent at exit: another library (dm_control) may have shut the common display down by then."""
    made: Any = importlib.import_module(f"mujoco.{backend}").GLContext

    def free_silently(self: Any) -> None:
        with contextlib.suppress(Exception):
            self.free()

    return type("GLContext", (made,), {"__del__": free_silently})


def _find_camera(model: "mujoco.MjModel", camera: "int | str | mujoco.MjvCamera") -> "mujoco.MjvCamera":
    import mujoco

    if isinstance(camera, mujoco.MjvCamera):
        return camera
    view = mujoco.MjvCamera()
    if camera == -1:
        mujoco.mjv_defaultFreeCamera(model, view)
        return view
    names = [model.camera(i).name for i in range(model.ncam)]
    if isinstance(camera, str):
        if camera not in names:
            raise UnknownNameError("camera", camera, names)
        camera = names.index(camera)
    elif not 0 <= camera < model.ncam:
        raise UnknownNameError("camera number", str(camera), [str(i) for i in range(-1, model.ncam)])
    view.type = mujoco.mjtCamera.mjCAMERA_FIXED
    view.fixedcamid = camera
    return view
