import gc
import importlib
import subprocess
import sys
import threading

import mujoco
import numpy as np
import pytest

from scd_robot.errors import RenderError, UnknownNameError
from scd_robot.sim_eval import make_environment, rendering
from scd_robot.sim_eval.rendering import check_frame, close_renderer, render_frame, select_gl_backend

SCENE = """
<mujoco>
  <visual><global offwidth="64" offheight="64"/><headlight ambient="1 1 1" diffuse="0 0 0"/></visual>
  <asset><texture name="t" type="2d" builtin="checker" rgb1="{}" rgb2="0 1 0" width="64" height="64"/>
         <material name="m" texture="t"/></asset>
  <worldbody>
    <camera name="front" pos="0 -2 0" xyaxes="1 0 0 0 0 1"/>
    <camera name="away" pos="0 -2 0" xyaxes="-1 0 0 0 0 1"/>
    <geom type="box" pos="0 0 .4" size=".5 .1 .2" material="m"/>
    <geom type="box" pos="0 0 -.4" size=".5 .1 .2" rgba="0 0 1 1"/>
  </worldbody>
</mujoco>
"""


@pytest.fixture(scope="module", autouse=True)
def _backend():
    try:
        select_gl_backend()
    except RenderError as error:
        pytest.skip(str(error))


def make_scene(colour="1 0 0"):
    model = mujoco.MjModel.from_xml_string(SCENE.format(colour))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


def test_frame_shows_the_scene_the_right_way_up():
    frame = render_frame(*make_scene(), 48, 64, "front")
    assert frame.shape == (48, 64, 3)
    assert frame.dtype == np.uint8
    upper, lower = frame[:24].reshape(-1, 3).max(0), frame[24:].reshape(-1, 3).max(0)
    assert upper[0] > 100
    assert upper[2] < 50
    assert lower[2] > 100
    assert lower[0] < 100


def test_renderers_of_others_that_come_and_go_leave_our_frames_unchanged():
    ours, other = make_scene(), make_scene("1 1 1")
    before = render_frame(*ours, 48, 64, "front")
    context_class = importlib.import_module(f"mujoco.{select_gl_backend()}").GLContext
    for context_goes_first in (False, True):
        context = context_class(64, 64)
        context.make_current()
        objects = mujoco.MjrContext(other[0], mujoco.mjtFontScale.mjFONTSCALE_50.value)
        np.testing.assert_array_equal(render_frame(*ours, 48, 64, "front"), before)
        if context_goes_first:
            context.free()
        objects.free()  # deletes by number in whatever context is current: must never be ours
        np.testing.assert_array_equal(render_frame(*ours, 48, 64, "front"), before)
        context.free()


@pytest.mark.sim
def test_environments_that_come_and_go_leave_frames_unchanged():
    pytest.importorskip("metaworld")
    first = make_environment("metaworld/reach-v3")
    first.reset(1)
    before = first.render(84, 84)
    second = make_environment("metaworld/drawer-close-v3")
    second.reset(1)
    assert (second.render(84, 84) != before).any()
    np.testing.assert_array_equal(first.render(84, 84), before)
    second.close()
    del second
    gc.collect()
    np.testing.assert_array_equal(first.render(84, 84), before)
    first.close()


def test_models_and_sizes_may_alternate():
    red, white = make_scene(), make_scene("1 1 1")
    small_red = render_frame(*red, 48, 64, "front")
    small_white = render_frame(*white, 48, 64, "front")
    assert (small_red != small_white).any()
    assert render_frame(*red, 700, 900, "front").shape == (700, 900, 3)  # beyond the buffer the model asks for
    np.testing.assert_array_equal(render_frame(*red, 48, 64, "front"), small_red)
    np.testing.assert_array_equal(render_frame(*white, 48, 64, "front"), small_white)


def test_models_that_take_turns_are_uploaded_once_and_forgotten_when_they_are_gone():
    close_renderer()
    colours = [f"{0.1 * i:.1f} {1 - 0.1 * i:.1f} 0.5" for i in range(5)]
    scenes = [make_scene(colour) for colour in colours]
    first = [render_frame(*scene, 64, 64, "front") for scene in scenes]
    kept = rendering._process_renderer()._kept
    uploaded = list(kept.values())
    for _ in range(3):
        for scene, frame in zip(scenes, first, strict=True):
            np.testing.assert_array_equal(render_frame(*scene, 64, 64, "front"), frame)
    assert set(kept.values()) == set(uploaded)
    del scene, scenes[1:]
    gc.collect()
    np.testing.assert_array_equal(render_frame(*scenes[0], 64, 64, "front"), first[0])
    assert len(kept) == 1
    more = [make_scene(colours[0]) for _ in range(rendering._MAX_MODELS + 3)]
    for scene in more:
        np.testing.assert_array_equal(render_frame(*scene, 64, 64, "front"), first[0])
    assert len(kept) == rendering._MAX_MODELS


def uploads(monkeypatch):
    """How often a model is uploaded from now on."""
    counted = []
    upload = mujoco.MjrContext
    monkeypatch.setattr(mujoco, "MjrContext", lambda *args: counted.append(args) or upload(*args))
    return counted


@pytest.mark.parametrize("number", [rendering._MAX_MODELS + 1, 2 * rendering._MAX_MODELS + 3])
def test_any_number_of_models_may_take_turns(monkeypatch, number):
    close_renderer()
    scenes = [make_scene(f"{i / number:.2f} 0 1") for i in range(number)]
    first = [render_frame(*scene, 48, 64, "front") for scene in scenes]
    for scene in scenes:
        render_frame(*scene, 48, 64, "front")
    again = uploads(monkeypatch)
    for _ in range(3):
        for scene, frame in zip(scenes, first, strict=True):
            np.testing.assert_array_equal(render_frame(*scene, 48, 64, "front"), frame)
    assert again == []
    kept = rendering._process_renderer()._kept
    assert len(kept) == number
    del scenes[2:], scene
    gc.collect()
    passing = [make_scene() for _ in range(number)]  # the room is given back with the models
    for one in passing:
        render_frame(*one, 48, 64, "front")
    assert len(kept) <= rendering._MAX_MODELS + 2


def test_resets_that_leave_models_behind_fill_no_more_room():
    """As robosuite's do: a new model for every episode, the old one in a cycle that the collector has not met."""
    close_renderer()
    stays, left = [make_scene() for _ in range(3)], []
    for _ in range(200):
        left.append(make_scene())
        for scene in (*stays, left[-1], left[-1]):
            render_frame(*scene, 32, 32, "front")
    assert len(rendering._process_renderer()._kept) == rendering._MAX_MODELS


def test_renderer_can_be_closed_and_made_again():
    scene = make_scene()
    before = render_frame(*scene, 48, 64, "front")
    close_renderer()
    close_renderer()
    np.testing.assert_array_equal(render_frame(*scene, 48, 64, "front"), before)


def test_blank_frame_is_an_error():
    with pytest.raises(RenderError, match="blank"):
        render_frame(*make_scene(), 48, 64, "away")
    with pytest.raises(RenderError, match="blank"):
        check_frame(np.full((4, 4, 3), 9, np.uint8))


def test_unknown_camera_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'front'"):
        render_frame(*make_scene(), 48, 64, "fronte")
    with pytest.raises(UnknownNameError, match="camera number '2'"):
        render_frame(*make_scene(), 48, 64, 2)


def test_another_thread_is_refused():
    scene = make_scene()
    render_frame(*scene, 48, 64, "front")
    caught = []

    def draw():
        try:
            render_frame(*scene, 48, 64, "front")
        except RenderError as error:
            caught.append(str(error))

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    assert len(caught) == 1
    assert "thread" in caught[0]


OURS = f"""
import mujoco
from scd_robot.sim_eval.rendering import render_frame
model = mujoco.MjModel.from_xml_string('''{SCENE.format("1 0 0")}''')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
render_frame(model, data, 32, 32, 'front')
"""
OTHERS = f"""
import dm_control.mujoco
physics = dm_control.mujoco.Physics.from_xml_string('''{SCENE.format("1 0 0")}''')
physics.render(32, 32, 'front')
"""


@pytest.mark.parametrize("code", [OURS, OURS + OTHERS, OTHERS + OURS], ids=["alone", "first", "second"])
def test_process_that_rendered_exits_silently(code):
    """Also beside dm_control, which uses the same display and shuts it down."""
    if OTHERS in code:
        pytest.importorskip("dm_control")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def _fresh_selection():
    select_gl_backend.cache_clear()
    yield
    select_gl_backend.cache_clear()


@pytest.mark.usefixtures("_fresh_selection")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have one backend")
class TestBackendSelection:
    @pytest.mark.parametrize(("value", "backend"), [("egl", "egl"), ("OSMesa", "osmesa"), ("on", "glfw")])
    def test_mujoco_gl_is_respected_without_a_probe(self, monkeypatch, value, backend):
        monkeypatch.setenv("MUJOCO_GL", value)
        monkeypatch.setattr(rendering, "_probe", lambda name: pytest.fail("probed"))
        assert select_gl_backend() == backend

    @pytest.mark.parametrize("value", ["disable", "vulkan"])
    def test_unusable_mujoco_gl_is_an_error(self, monkeypatch, value):
        monkeypatch.setenv("MUJOCO_GL", value)
        with pytest.raises(RenderError, match=value):
            select_gl_backend()

    def test_osmesa_is_tried_after_egl_and_exported(self, monkeypatch):
        monkeypatch.setenv("MUJOCO_GL", "")  # so that monkeypatch restores it
        monkeypatch.delenv("MUJOCO_GL")
        monkeypatch.setattr(rendering, "_probe", lambda name: None if name == "osmesa" else "no device")
        assert select_gl_backend() == "osmesa"
        assert rendering.os.environ["MUJOCO_GL"] == "osmesa"

    def test_no_backend_names_what_to_install(self, monkeypatch):
        monkeypatch.delenv("MUJOCO_GL", raising=False)
        monkeypatch.setattr(rendering, "_probe", lambda name: f"{name} is missing")
        with pytest.raises(RenderError, match=r"egl is missing; osmesa: osmesa is missing.*apt-get install"):
            select_gl_backend()

    def test_probe_reports_why_a_backend_fails(self):
        assert rendering._probe("vulkan") is not None
