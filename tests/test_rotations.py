"""Rotations on explicit numbers, and there and back."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from scd_robot.errors import ShapeError
from scd_robot.rotations import ROTATION_WIDTHS, convert_rotation, matrix_of, rotation_from_matrix

ROOT = np.sqrt(0.5)
# A quarter turn about z: x -> y.
QUARTER = {
    "quat_xyzw": [0, 0, ROOT, ROOT],
    "quat_wxyz": [ROOT, 0, 0, ROOT],
    "euler_xyz": [0, 0, np.pi / 2],
    "axis_angle": [0, 0, np.pi / 2],
    "matrix": [0, -1, 0, 1, 0, 0, 0, 0, 1],
    "rot6d": [0, -1, 0, 1, 0, 0],
}


@pytest.mark.parametrize(("source", "target"), list(itertools.product(QUARTER, QUARTER)))
def test_a_quarter_turn_about_z(source, target):
    found = convert_rotation(np.array(QUARTER[source], np.float64), source, target)
    np.testing.assert_allclose(found, QUARTER[target], atol=1e-12)


def test_euler_angles_turn_about_fixed_axes_x_first():
    matrix = matrix_of(np.array([np.pi / 2, 0, np.pi / 2]), "euler_xyz")
    # x: y -> z, then z: x -> y. So y goes to z and stays there; x goes to y; z goes to -y, then to x.
    np.testing.assert_allclose(matrix, [[0, 0, 1], [1, 0, 0], [0, 1, 0]], atol=1e-12)


@given(
    st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1),
    st.sampled_from(sorted(ROTATION_WIDTHS)),
)
def test_every_representation_leads_back(quaternion, through):
    x = np.array(quaternion) / np.linalg.norm(quaternion)
    there = convert_rotation(x, "quat_xyzw", through)
    assert there.shape == (ROTATION_WIDTHS[through],)
    np.testing.assert_allclose(matrix_of(there, through), matrix_of(x, "quat_xyzw"), atol=1e-6)


def test_the_two_signs_of_a_quaternion_give_one():
    x = np.array([0.5, -0.5, 0.5, -0.5])
    for target in ROTATION_WIDTHS:
        if target != "quat_xyzw":
            np.testing.assert_allclose(
                convert_rotation(x, "quat_xyzw", target), convert_rotation(-x, "quat_xyzw", target), atol=1e-12
            )
    assert convert_rotation(x, "quat_xyzw", "quat_wxyz")[0] > 0


def test_six_numbers_of_a_network_become_a_rotation():
    matrix = matrix_of(np.array([2.0, 0, 0, 1.0, 3.0, 0]), "rot6d")
    np.testing.assert_allclose(matrix, np.eye(3), atol=1e-12)


def test_batch_axes_and_dtype_stay():
    x = np.zeros((5, 2, 4), np.float32)
    x[..., 3] = 1
    found = convert_rotation(x, "quat_xyzw", "rot6d")
    assert (found.shape, found.dtype) == ((5, 2, 6), np.float32)
    assert convert_rotation(x[:0], "quat_xyzw", "axis_angle").shape == (0, 2, 3)


def scipy_of(name: str, x: np.ndarray) -> Rotation:
    if name.startswith("quat"):
        return Rotation.from_quat(x, scalar_first=name == "quat_wxyz")
    return Rotation.from_euler("xyz", x) if name == "euler_xyz" else Rotation.from_rotvec(x)


def in_scipy(name: str, rotation: Rotation) -> np.ndarray:
    if name.startswith("quat"):
        return rotation.as_quat(canonical=True, scalar_first=name == "quat_wxyz")
    return rotation.as_euler("xyz") if name == "euler_xyz" else rotation.as_rotvec()


@pytest.mark.filterwarnings("ignore:Gimbal lock")
@pytest.mark.parametrize("name", ["quat_xyzw", "quat_wxyz", "euler_xyz", "axis_angle"])
def test_they_are_those_of_scipy(name: str) -> None:
    """Among them turns by nothing, by next to nothing, by half a turn, and with an angle of 90 degrees."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 2, (500, ROTATION_WIDTHS[name]))
    if name == "axis_angle":
        x = np.concatenate([x, np.zeros((1, 3)), 1e-9 * x[:5], np.pi * np.eye(3)])
    elif name == "euler_xyz":
        x[:20, 1] = np.pi / 2 * rng.choice([-1, 1], 20)
        x = np.concatenate([x, np.zeros((1, 3)), np.pi * np.eye(3)])
    else:
        x = np.concatenate([x, np.eye(4), -np.eye(4)])
    matrix = matrix_of(x, name)
    np.testing.assert_allclose(matrix, scipy_of(name, x).as_matrix(), atol=1e-14)
    for other in ("quat_xyzw", "quat_wxyz", "euler_xyz", "axis_angle"):
        found = rotation_from_matrix(matrix, other)
        np.testing.assert_allclose(scipy_of(other, found).as_matrix(), matrix, atol=1e-7)
        plain = slice(20, 500)  # further ones may be half turns, of which two vectors and quaternions are equally good
        np.testing.assert_allclose(found[plain], in_scipy(other, Rotation.from_matrix(matrix[plain])), atol=1e-9)
        np.testing.assert_allclose(
            found[:20], in_scipy(other, Rotation.from_matrix(matrix[:20])), atol=1e-7 if other == "euler_xyz" else 1e-9
        )


@pytest.mark.parametrize(
    ("x", "source", "message"),
    [
        (np.zeros(4), "quat_xyzw", "length 0"),
        (np.zeros(3), "quat_xyzw", r"\(\.\.\., 4\), got \(3,\)"),
        (np.array([1.0, 0, 0, 2, 0, 0]), "rot6d", "parallel"),
        (-np.eye(3).reshape(9), "matrix", "no rotation.*reflection"),
        (2 * np.eye(3).reshape(9), "matrix", "no rotation"),
        (np.zeros(9), "matrix", "singular"),
        (np.full(9, np.nan), "matrix", "NaN"),
    ],
)
def test_numbers_that_are_no_rotation_are_refused(x, source, message):
    with pytest.raises(ShapeError, match=message):
        convert_rotation(x, source, "rot6d" if source == "matrix" else "matrix")


def test_signs_that_flip_are_mended_by_the_same_representation() -> None:
    q = np.array([[0, 0, 0, 1], [0, 0, -0.6, -0.8], [0, 0, 1.2, -1.6]])
    np.testing.assert_allclose(
        convert_rotation(q, "quat_xyzw", "quat_xyzw"), [[0, 0, 0, 1], [0, 0, 0.6, 0.8], [0, 0, -0.6, 0.8]]
    )


def test_a_predicted_matrix_stands_for_the_nearest_rotation() -> None:
    quarter = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    found = convert_rotation((3 * quarter).reshape(9), "matrix", "quat_xyzw", predicted=True)
    np.testing.assert_allclose(found, [0, 0, np.sqrt(0.5), np.sqrt(0.5)], atol=1e-12)
    reflected = matrix_of(-np.eye(3).reshape(9), "matrix", predicted=True)
    np.testing.assert_allclose(np.linalg.det(reflected), 1.0)


def test_angles_where_many_mean_the_same_rotation_are_silent_and_right() -> None:
    up = np.array([0.3, np.pi / 2, 0.1])
    found = convert_rotation(matrix_of(up, "euler_xyz").reshape(9), "matrix", "euler_xyz")
    np.testing.assert_allclose(matrix_of(found, "euler_xyz"), matrix_of(up, "euler_xyz"), atol=1e-6)
