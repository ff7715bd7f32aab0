"""Representations of rotations, and changes between them.

Shapes: (..., n) any batch axes; n is the width of the representation.
"""

import warnings
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ShapeError

__all__ = [
    "ROTATION_WIDTHS",
    "RotationName",
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
_CLOSE = 0.1  # largest difference of a recorded matrix's numbers from those of a rotation

Array = NDArray[np.floating]


def convert_rotation(x: Array, source: RotationName, target: RotationName, *, predicted: bool = False) -> Array:
    """Rotations (..., n) in another representation, in the dtype of `x`.

    - quat_xyzw (scipy, robosuite), quat_wxyz (MuJoCo): q and -q are the same rotation; comes out of length 1 and with
      w >= 0, also where the source is the same: that mends signs that flip.
    - euler_xyz [rad]: turns about the fixed axes x, then y, then z (roll, pitch, yaw).
    - axis_angle: rotation vector [rad], comes out no longer than pi.
    - matrix: 3x3, row by row.
    - rot6d: the matrix's first two rows, made orthonormal by Gram-Schmidt on the way in (Zhou et al., arXiv 1812.07035;
      rows as pytorch3d and diffusion_policy have them). It is continuous, so a network can learn it.

    Args:
        x: rotations.
        source: what they are.
        target: what they become.
        predicted: they are a model's, so a matrix stands for the rotation nearest to it, however far.

    Raises:
        ShapeError: another width, or numbers that are no rotation: a quaternion or row of length 0, a matrix that is
            far from a rotation (or, of predicted ones, singular).
    """
    if x.shape[-1] != ROTATION_WIDTHS[source]:
        raise ShapeError(f"rotations as {source} must be (..., {ROTATION_WIDTHS[source]}), got {x.shape}")
    if source == target and not source.startswith("quat"):
        return x
    return rotation_from_matrix(matrix_of(x, source, predicted), target).astype(x.dtype, copy=False)


def matrix_of(x: Array, source: RotationName, predicted: bool = False) -> Array:
    """Rotation matrices (..., 3, 3) in float64 of rotations (..., n); arguments and errors of `convert_rotation`."""
    flat = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    if source == "rot6d":
        matrix = _gram_schmidt(flat)
    elif source.startswith("quat"):
        if len(flat) and np.linalg.norm(flat, axis=1).min() < _SMALLEST:
            raise ShapeError(
                "a quaternion of length 0 is no rotation; is the sensor silent, or are these other numbers?"
            )
        matrix = _scipy().from_quat(flat, scalar_first=source == "quat_wxyz").as_matrix()
    elif source == "euler_xyz":
        matrix = _scipy().from_euler("xyz", flat).as_matrix()
    elif source == "axis_angle":
        matrix = _scipy().from_rotvec(flat).as_matrix()
    else:
        matrix = _nearest_rotation(flat.reshape(-1, 3, 3), np.inf if predicted else _CLOSE)
    return matrix.reshape(*x.shape[:-1], 3, 3)


def rotation_from_matrix(matrix: Array, target: RotationName) -> Array:
    """Rotations (..., n) in float64 from matrices (..., 3, 3)."""
    flat = matrix.reshape(-1, 3, 3)
    if target == "rot6d":
        found = flat[:, :2].reshape(-1, 6)
    elif target == "matrix":
        found = flat.reshape(-1, 9)
    elif target == "euler_xyz":
        with warnings.catch_warnings():
            # Where y is 90 degrees many angles mean the same rotation; scipy takes one of them and warns.
            warnings.filterwarnings("ignore", message="Gimbal lock")
            found = _scipy().from_matrix(flat).as_euler("xyz")
    elif target == "axis_angle":
        found = _scipy().from_matrix(flat).as_rotvec()
    else:
        found = _scipy().from_matrix(flat).as_quat(canonical=True, scalar_first=target == "quat_wxyz")
    return np.asarray(found).reshape(*matrix.shape[:-2], ROTATION_WIDTHS[target])


def _scipy() -> Any:
    """Loaded where it is needed: a policy that was exported does without it unless its dataset has other rotations."""
    from scipy.spatial.transform import Rotation

    return Rotation


def _nearest_rotation(matrix: Array, tolerance: float) -> Array:
    """Rotations (n, 3, 3) nearest to matrices in the sum of squares (the orthogonal Procrustes problem)."""
    if not np.isfinite(matrix).all():
        raise ShapeError("a matrix with NaN or infinite values is no rotation")
    left, sizes, right = np.linalg.svd(matrix)
    if len(matrix) and sizes[:, 1].min() < _SMALLEST:
        raise ShapeError("nine numbers whose matrix is singular are no rotation")
    left[:, :, 2] *= np.sign(np.linalg.det(left @ right))[:, None]
    rotation = left @ right
    far = np.abs(rotation - matrix).max(axis=(1, 2), initial=0) > tolerance
    if far.any():
        raise ShapeError(
            f"matrix {np.argmax(far)} of {len(matrix)} is no rotation: {np.round(matrix[np.argmax(far)], 3).tolist()}; "
            "are these other numbers, or is it a reflection?"
        )
    return rotation


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
