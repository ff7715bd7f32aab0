"""Representations of rotations, and changes between them.

Shapes: (..., n) any batch axes; n is the width of the representation.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from scd_robot.errors import ShapeError

__all__ = [
    "ROTATION_WIDTHS",
    "RotationName",
    "align_quaternions",
    "convert_rotation",
    "matrix_of",
    "rotation_from_matrix",
]

RotationName = Literal["quat_xyzw", "quat_wxyz", "euler_xyz", "axis_angle", "matrix", "rot6d"]
ROTATION_WIDTHS: dict[RotationName, int] = {
    "quat_xyzw": 4,
    "quat_wxyz": 4,
    "euler_xyz": 3,
    "axis_angle": 3,
    "matrix": 9,
    "rot6d": 6,
}

_SMALLEST = 1e-6  # length below which a vector has no direction

Array = NDArray[np.floating]


def convert_rotation(x: Array, source: RotationName, target: RotationName) -> Array:
    """Rotations (..., n) in another representation, in the dtype of `x`.

    - quat_xyzw (scipy, robosuite), quat_wxyz (MuJoCo): q and -q are the same rotation; comes out with w >= 0.
    - euler_xyz [rad]: turns about the fixed axes x, then y, then z (roll, pitch, yaw).
    - axis_angle: rotation vector [rad], comes out no longer than pi.
    - matrix: 3x3, row by row.
    - rot6d: the matrix's first two rows, made orthonormal by Gram-Schmidt on the way in (Zhou et al., arXiv 1812.07035;
      rows as pytorch3d and diffusion_policy have them). It is continuous, so a network can learn it.

    Raises:
        ShapeError: another width, or numbers that are no rotation: a quaternion or row of length 0.
    """
    if x.shape[-1] != ROTATION_WIDTHS[source]:
        raise ShapeError(f"rotations as {source} must be (..., {ROTATION_WIDTHS[source]}), got {x.shape}")
    if source == target:
        return x
    return rotation_from_matrix(matrix_of(x, source), target).astype(x.dtype, copy=False)


def matrix_of(x: Array, source: RotationName) -> Array:
    """Rotation matrices (..., 3, 3) in float64 of rotations (..., n)."""
    flat = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    if source == "rot6d":
        matrix = _gram_schmidt(flat)
    elif source.startswith("quat"):
        if len(flat) and np.linalg.norm(flat, axis=1).min() < _SMALLEST:
            raise ShapeError(
                "a quaternion of length 0 is no rotation; is the sensor silent, or are these other numbers?"
            )
        matrix = Rotation.from_quat(flat, scalar_first=source == "quat_wxyz").as_matrix()
    elif source == "euler_xyz":
        matrix = Rotation.from_euler("xyz", flat).as_matrix()
    elif source == "axis_angle":
        matrix = Rotation.from_rotvec(flat).as_matrix()
    else:
        matrix = flat.reshape(-1, 3, 3)
    return matrix.reshape(*x.shape[:-1], 3, 3)


def rotation_from_matrix(matrix: Array, target: RotationName) -> Array:
    """Rotations (..., n) in float64 from matrices (..., 3, 3)."""
    flat = matrix.reshape(-1, 3, 3)
    if target == "rot6d":
        found = flat[:, :2].reshape(-1, 6)
    elif target == "matrix":
        found = flat.reshape(-1, 9)
    elif target == "euler_xyz":
        found = Rotation.from_matrix(flat).as_euler("xyz")
    elif target == "axis_angle":
        found = Rotation.from_matrix(flat).as_rotvec()
    else:
        found = Rotation.from_matrix(flat).as_quat(canonical=True, scalar_first=target == "quat_wxyz")
    return np.asarray(found).reshape(*matrix.shape[:-2], ROTATION_WIDTHS[target])


def align_quaternions(x: Array) -> Array:
    """Quaternions (T, 4) of one episode with signs such that each is on the side of the one before."""
    flips = np.sum(x[1:] * x[:-1], axis=-1) < 0
    sign = np.where(np.cumsum(flips) % 2 == 1, -1.0, 1.0)
    return np.concatenate((x[:1], x[1:] * sign[:, None])).astype(x.dtype, copy=False)


def _gram_schmidt(rows: Array) -> Array:
    first, second = rows[:, :3], rows[:, 3:]
    first = _unit(first)
    second = _unit(second - np.sum(first * second, axis=1, keepdims=True) * first)
    return np.stack((first, second, np.cross(first, second)), axis=1)


def _unit(x: Array) -> Array:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if len(length) and length.min() < _SMALLEST:
        raise ShapeError("six numbers whose two rows have length 0 or are parallel are no rotation")
    return x / length
