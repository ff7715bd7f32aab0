"""Representations of rotations, and changes between them.

Shapes: (..., n) any batch axes; n is the width of the representation.
"""

from typing import Literal

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
_LOCKED = 1e-7  # cosine below which an angle counts as a right one
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
        matrix = _of_quaternion(np.roll(flat, -1, axis=1) if source == "quat_wxyz" else flat)
    elif source == "euler_xyz":
        matrix = _of_euler(flat)
    elif source == "axis_angle":
        matrix = _of_vector(flat)
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
        found = _euler_of(flat)
    elif target == "axis_angle":
        found = _vector_of(flat)
    else:
        found = _quaternion_of(flat)
        found = np.roll(found, 1, axis=1) if target == "quat_wxyz" else found
    return np.asarray(found).reshape(*matrix.shape[:-2], ROTATION_WIDTHS[target])


def _of_quaternion(q: Array) -> Array:
    """Matrices (n, 3, 3) of quaternions (n, 4) x y z w of any length."""
    x, y, z, w = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return _stacked(rows)


def _of_euler(angles: Array) -> Array:
    """Matrices (n, 3, 3) of angles (n, 3) about x, y, z: Rz Ry Rx."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles).T, np.sin(angles).T
    rows = (
        (cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx),
        (sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx),
        (-sy, cy * sx, cy * cx),
    )
    return _stacked(rows)


def _of_vector(vector: Array) -> Array:
    """Matrices (n, 3, 3) of rotation vectors (n, 3), by Rodrigues' formula."""
    x, y, z = vector.T
    zero = np.zeros_like(x)
    cross = _stacked(((zero, -z, y), (z, zero, -x), (-y, x, zero)))
    angle = np.linalg.norm(vector, axis=1)[:, None, None]
    sine, cosine = np.sinc(angle / np.pi), 0.5 * np.sinc(angle / (2 * np.pi)) ** 2  # sin t / t, (1 - cos t) / t^2
    return np.eye(3) + sine * cross + cosine * (cross @ cross)


def _quaternion_of(matrix: Array) -> Array:
    """Quaternions (n, 4) x y z w of matrices (n, 3, 3), with w >= 0; of those with w = 0 the first number is positive.

    Of the four numbers the largest one is found first, so that nothing small is divided by (Shepperd 1978).
    """
    m = np.moveaxis(matrix, 0, -1)
    xx, yy, zz = m[0, 0], m[1, 1], m[2, 2]
    wx, wy, wz = m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]
    xy, xz, yz = m[1, 0] + m[0, 1], m[2, 0] + m[0, 2], m[2, 1] + m[1, 2]
    # 4 q q^T: each row is a multiple of q.
    products = (
        (1 + xx - yy - zz, xy, xz, wx),
        (xy, 1 - xx + yy - zz, yz, wy),
        (xz, yz, 1 - xx - yy + zz, wz),
        (wx, wy, wz, 1 + xx + yy + zz),
    )
    table = _stacked(products)
    q = table[np.arange(len(table)), np.argmax(np.diagonal(table, axis1=1, axis2=2), axis=1)]
    q = q / np.linalg.norm(q, axis=1, keepdims=True)
    deciding = np.roll(q, 1, axis=1)  # w first
    sign = np.sign(deciding[np.arange(len(q)), np.argmax(deciding != 0, axis=1)])
    return q * sign[:, None]


def _euler_of(matrix: Array) -> Array:
    """Angles (n, 3) of matrices (n, 3, 3); where y is a right angle many mean the same rotation, and z is 0."""
    x = np.arctan2(matrix[:, 2, 1], matrix[:, 2, 2])
    y = np.arctan2(-matrix[:, 2, 0], np.hypot(matrix[:, 0, 0], matrix[:, 1, 0]))
    z = np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0])
    locked = np.hypot(matrix[:, 0, 0], matrix[:, 1, 0]) < _LOCKED
    x = np.where(locked, np.arctan2(-matrix[:, 1, 2], matrix[:, 1, 1]), x)
    return np.stack((x, y, np.where(locked, 0.0, z)), axis=1)


def _vector_of(matrix: Array) -> Array:
    """Rotation vectors (n, 3) of matrices (n, 3, 3), no longer than pi."""
    q = _quaternion_of(matrix)
    sine = np.linalg.norm(q[:, :3], axis=1)
    angle = 2 * np.arctan2(sine, q[:, 3])
    small = sine < _SMALLEST
    return q[:, :3] * np.where(small, 2.0, angle / np.where(small, 1.0, sine))[:, None]


def _stacked(rows: tuple[tuple[Array, ...], ...]) -> Array:
    """Rows of numbers (n,) each, as matrices (n, rows, columns)."""
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


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
