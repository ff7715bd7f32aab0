"""MJCF of what the tasks share: table, light, camera, and a hand that moves along three axes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["COLOURS", "GREY", "HOME", "hand_scene", "lamp", "marker", "world"]

HOME = (0.0, 0.0, 0.2)  # where the hand starts, about [m]
GREY = (0.35, 0.35, 0.35)
COLOURS = (
    (0.9, 0.15, 0.15),
    (0.15, 0.7, 0.2),
    (0.2, 0.35, 0.95),
    (0.95, 0.85, 0.1),
    (0.8, 0.2, 0.85),
    (0.1, 0.8, 0.85),
    (1.0, 0.5, 0.1),
    (0.95, 0.95, 0.95),
)

_HAND = """
    <body name="hand" gravcomp="1">
      <joint name="hand_x" type="slide" axis="1 0 0"/>
      <joint name="hand_y" type="slide" axis="0 1 0"/>
      <joint name="hand_z" type="slide" axis="0 0 1"/>
      <geom name="tip" type="capsule" fromto="0 0 0.015 0 0 0.06" size="0.015" mass="0.3" rgba="0.85 0.85 0.9 1"
            contype="3" conaffinity="3"/>
      <geom name="wrist" type="cylinder" fromto="0 0 0.075 0 0 0.12" size="0.03" mass="0.2" rgba="0.3 0.3 0.35 1"
            contype="0" conaffinity="0"/>
    </body>"""
# Critically damped at 60 rad/s for the hand's 0.5 kg.
_HAND_ACTUATORS = "".join(
    f'<position name="{axis}" joint="hand_{axis}" kp="1800" kv="60" forcerange="-60 60"/>' for axis in "xyz"
)


def world(body: str, extra: str = "") -> str:
    """A model with a table whose top is z = 0, a light, the camera `view`, and `body` in its world.

    Args:
        body: elements of the worldbody.
        extra: other elements of the model: actuators, equalities.
    """
    return f"""
<mujoco>
  <option integrator="implicitfast"/>
  <visual><headlight ambient="0.35 0.35 0.35" diffuse="0.2 0.2 0.2" specular="0 0 0"/></visual>
  <asset><texture type="skybox" builtin="flat" rgb1="0.45 0.5 0.56" rgb2="0.45 0.5 0.56" width="8" height="8"/></asset>
  <worldbody>
    <light pos="0 -0.5 1.5" dir="0 0.3 -1" diffuse="0.45 0.45 0.45" specular="0 0 0" castshadow="false"/>
    <camera name="view" pos="0 -0.5 0.74" xyaxes="1 0 0 0 0.78 0.625" fovy="52"/>
    <geom name="table" type="box" pos="0 0 -0.02" size="0.45 0.45 0.02" rgba="0.75 0.7 0.62 1"/>
    {body}
  </worldbody>
  {extra}
</mujoco>"""


def hand_scene(body: str = "", equality: str = "") -> str:
    """`world` with the hand, whose three joints come first, and its three actuators."""
    extra = f"<actuator>{_HAND_ACTUATORS}</actuator>" + (f"<equality>{equality}</equality>" if equality else "")
    return world(_HAND + body, extra)


def marker(name: str, place: ArrayLike, radius: float, colour: Sequence[float] = GREY) -> str:
    """A flat disc on the table that nothing touches."""
    x, y = np.asarray(place)[:2]
    rgba = " ".join(str(value) for value in (*colour, 1)[:4])
    return (
        f'<geom name="{name}" type="cylinder" pos="{x} {y} 0.001" size="{radius} 0.001" rgba="{rgba}" contype="0" '
        'conaffinity="0"/>'
    )


def lamp(name: str, place: Sequence[float], radius: float = 0.03) -> str:
    """A ball that shows a colour."""
    x, y, z = place
    return (
        f'<geom name="{name}" type="sphere" pos="{x} {y} {z}" size="{radius}" rgba="0.35 0.35 0.35 1" contype="0" '
        'conaffinity="0"/>'
    )
