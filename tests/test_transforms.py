"""Transforms on explicit numbers, and there and back."""

import numpy as np
import pytest

from scd_robot.config import from_json, to_json
from scd_robot.errors import ConfigError, ShapeError, UnknownNameError
from scd_robot.resizing import crop_and_resize, resize
from scd_robot.rotations import ROTATION_WIDTHS, matrix_of
from scd_robot.transforms import (
    ChunkPart,
    GripperStep,
    ImageStep,
    RotationStep,
    SelectStep,
    TransformConfig,
    Transforms,
)
from scd_robot.types import ArraySpec, DatasetSpec

SPEC = DatasetSpec(
    {"pose": ArraySpec((8,)), "camera": ArraySpec((6, 8, 3), "uint8"), "object": ArraySpec((3,))},
    action_dim=7,
    control_dt=0.5,
)


def test_nothing_is_done_by_default():
    transforms = Transforms(TransformConfig(), SPEC)
    assert transforms.spec == SPEC
    x = np.arange(7.0)
    assert transforms.undo_action(transforms.action(x)) is x


def test_keys_are_renamed_and_chosen():
    transforms = Transforms(TransformConfig(rename={"pose": "proprio"}, keys=("proprio",)), SPEC)
    assert transforms.spec.observation == {"proprio": ArraySpec((8,))}
    assert transforms.sources == {"proprio": "pose"}
    x = np.arange(8.0)
    np.testing.assert_array_equal(transforms.observation({"pose": x, "other": x})["proprio"], x)


def test_small_arrays_become_vectors():
    spec = DatasetSpec({"keypoint": ArraySpec((9, 2))}, action_dim=2, control_dt=0.1)
    transforms = Transforms(TransformConfig(flatten=("keypoint",)), spec)
    assert transforms.spec.observation == {"keypoint": ArraySpec((18,))}
    x = np.arange(36.0).reshape(2, 9, 2)
    np.testing.assert_array_equal(transforms.observation({"keypoint": x})["keypoint"], np.arange(36).reshape(2, 18))
    np.testing.assert_array_equal(transforms.observation({"keypoint": x[1]})["keypoint"], np.arange(18, 36))


def test_rotation_and_gripper_on_explicit_numbers():
    config = TransformConfig(
        rotations=(RotationStep("pose", 3, "quat_xyzw"), RotationStep("action", 3, "axis_angle")),
        grippers=(GripperStep("pose", 9, closed=0.0, open=0.08), GripperStep("action", 9, closed=1.0, open=-1.0)),
    )
    transforms = Transforms(config, SPEC)
    assert transforms.spec.observation["pose"] == ArraySpec((10,))
    assert transforms.spec.action_dim == 10
    half, rest = np.sqrt(0.5), {"camera": np.zeros((6, 8, 3), np.uint8), "object": np.zeros(3)}
    pose = transforms.observation({"pose": np.array([1, 2, 3, 0, 0, half, half, 0.06]), **rest})
    np.testing.assert_allclose(pose["pose"], [1, 2, 3, 0, -1, 0, 1, 0, 0, 0.5], atol=1e-12)
    action = np.array([1, 2, 3, 0, 0, np.pi / 2, 1.0])
    seen = transforms.action(action)
    np.testing.assert_allclose(seen, [1, 2, 3, 0, -1, 0, 1, 0, 0, -1], atol=1e-12)
    np.testing.assert_allclose(transforms.undo_action(seen), action, atol=1e-12)


def moving(kind):
    """A chunk of two actions: numbers 0 and 1 follow numbers 6 and 7 of the pose, number 2 is left alone."""
    config = TransformConfig(chunk=kind, chunk_parts=(ChunkPart(0, "pose", 6, 2),))
    spec = DatasetSpec({"pose": ArraySpec((8,))}, action_dim=3, control_dt=0.5)
    state = {"pose": np.array([0, 0, 0, 0, 0, 0, 10.0, 20.0])}
    return Transforms(config, spec), np.array([[11.0, 21, 5], [13, 20, 6], [13, 20, 7]]), state


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("relative", [[1.0, 1, 5], [3, 0, 6], [3, 0, 7]]),
        ("delta", [[1.0, 1, 5], [2, -1, 6], [0, 0, 7]]),
        ("velocity", [[2.0, 2, 5], [4, -2, 6], [0, 0, 7]]),
    ],
)
def test_chunks_relative_to_the_present_state(kind, expected):
    transforms, actions, state = moving(kind)
    np.testing.assert_allclose(transforms.chunk(actions, state), expected)
    np.testing.assert_allclose(transforms.undo_chunk(np.array(expected), state), actions)


def test_selected_numbers_are_those_the_model_and_chunks_count():
    config = TransformConfig(
        rotations=(RotationStep("pose", 3, "quat_xyzw"),),
        select=(SelectStep("pose", (9, 2)), SelectStep("object", (1,))),
        chunk="relative",
        chunk_parts=(ChunkPart(4, "pose", 1, 1),),
    )
    transforms = Transforms(config, SPEC)
    assert transforms.spec.observation["pose"] == ArraySpec((2,))
    assert transforms.spec.observation["object"] == ArraySpec((1,))
    seen = np.array([[1, 2, 3, 0, 0, 0, 1, 0.5], [1, 2, 4, 0, 0, 0, 1, 0.6]])
    state = {"pose": transforms.convert("pose", seen)}
    np.testing.assert_allclose(state["pose"], [[0.5, 3], [0.6, 4]])
    actions = np.arange(2 * 3 * 7.0).reshape(2, 3, 7)
    chunk = transforms.chunk(actions, state)
    np.testing.assert_allclose(chunk[..., 4], actions[..., 4] - [[3], [4]])
    np.testing.assert_allclose(transforms.undo_chunk(chunk, state), actions)
    assert {key: x.shape for key, x in transforms.stand_in().items()} == {
        "pose": (8,),
        "object": (3,),
        "camera": (6, 8, 3),
    }


@pytest.mark.parametrize("kind", ["relative", "delta", "velocity"])
def test_rotations_of_a_chunk_are_relative_as_rotations(kind):
    config = TransformConfig(chunk=kind, chunk_parts=(ChunkPart(0, "pose", 0, 6, rotation=True),))
    spec = DatasetSpec({"pose": ArraySpec((6,))}, action_dim=6, control_dt=0.5)
    transforms = Transforms(config, spec)
    rng = np.random.default_rng(0)
    orthonormal = matrix_of(rng.normal(size=(2, 5, 6)), "rot6d")[..., :2, :].reshape(2, 5, 6)
    state = {"pose": matrix_of(rng.normal(size=(2, 6)), "rot6d")[..., :2, :].reshape(2, 6)}
    seen = transforms.chunk(orthonormal, state)
    now = matrix_of(state["pose"], "rot6d")
    first = np.swapaxes(now, -1, -2) @ matrix_of(orthonormal[:, 0], "rot6d")
    np.testing.assert_allclose(matrix_of(seen[:, 0], "rot6d"), first, atol=1e-9)
    np.testing.assert_allclose(transforms.undo_chunk(seen, state), orthonormal, atol=1e-9)


def test_an_unmoved_pose_is_the_identity():
    config = TransformConfig(chunk="relative", chunk_parts=(ChunkPart(0, "pose", 0, 6, rotation=True),))
    transforms = Transforms(config, DatasetSpec({"pose": ArraySpec((6,))}, action_dim=6, control_dt=0.5))
    pose = np.array([0.0, -1, 0, 1, 0, 0])
    np.testing.assert_allclose(transforms.chunk(pose[None], {"pose": pose}), [[1, 0, 0, 0, 1, 0]], atol=1e-12)


def test_images_are_cropped_about_their_centre():
    images = np.arange(2 * 6 * 8 * 3, dtype=np.uint8).reshape(2, 6, 8, 3)
    np.testing.assert_array_equal(crop_and_resize(images, (2, 4)), images[:, 2:4, 2:6])


def test_images_are_resized_by_averaging():
    images = np.zeros((1, 4, 4, 3), np.uint8)
    images[:, :, 2:] = 200
    found = crop_and_resize(images, size=(2, 2))
    assert (found.shape, found.dtype) == ((1, 2, 2, 3), np.uint8)
    np.testing.assert_allclose(found[0, 0, :, 0], [28, 172], atol=4)  # the filter of half-size reaches over the edge
    flat = np.full((4, 4, 1), 77, np.uint8)
    np.testing.assert_array_equal(crop_and_resize(flat, size=(3, 2)), np.full((3, 2, 1), 77))


def test_image_steps_change_the_specification():
    transforms = Transforms(TransformConfig(images=(ImageStep("camera", (4, 4), (2, 2)),)), SPEC)
    assert transforms.spec.observation["camera"] == ArraySpec((2, 2, 3), "uint8")
    assert transforms.convert("camera", np.zeros((5, 6, 8, 3), np.uint8)).shape == (5, 2, 2, 3)


def test_configuration_survives_json():
    config = TransformConfig(
        rename={"a": "b"},
        keys=("b",),
        images=(ImageStep("b", (1, 2), (3, 4)),),
        rotations=(RotationStep("b", 1, "matrix"),),
        grippers=(GripperStep("b", 0, 0.0, 1.0),),
        select=(SelectStep("b", (2, 0)),),
        chunk="delta",
        chunk_parts=(ChunkPart(0, "b", 1, 6, True),),
    )
    assert from_json(TransformConfig, to_json(config)) == config


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TransformConfig(rename={"poze": "x"}), UnknownNameError, "did you mean 'pose'"),
        (lambda: TransformConfig(rename={"pose": "object"}), ConfigError, "one name"),
        (lambda: TransformConfig(keys=("pose", "pose")), ConfigError, "keys names 'pose' twice"),
        (lambda: TransformConfig(goals=("pose", "object", "pose")), ConfigError, "goals names 'pose' twice"),
        (lambda: TransformConfig(keys=("propio",)), UnknownNameError, "unknown observation key 'propio'"),
        (lambda: TransformConfig(rotations=(RotationStep("pose", 5, "quat_xyzw"),)), ShapeError, "4 numbers from 5 on"),
        (lambda: TransformConfig(rotations=(RotationStep("hand", 0, "matrix"),)), UnknownNameError, "'hand'"),
        (lambda: TransformConfig(grippers=(GripperStep("action", 7, 0, 1),)), ShapeError, "1 numbers from 7 on"),
        (lambda: TransformConfig(grippers=(GripperStep("action", 6, 1, 1),)), ConfigError, "for closed and for open"),
        (lambda: TransformConfig(select=(SelectStep("pose", (0, 8)),)), ShapeError, "1 numbers from 8 on"),
        (lambda: TransformConfig(select=(SelectStep("camera", (0,)),)), ShapeError, r"shape \(6, 8, 3\)"),
        (lambda: TransformConfig(select=(SelectStep("action", (0,)),)), ConfigError, "all the numbers of an action"),
        (lambda: TransformConfig(select=(SelectStep("pose", (0, 0)),)), ConfigError, r"each once .* \[0, 0\]"),
        (lambda: TransformConfig(select=(SelectStep("pose", ()),)), ConfigError, "each once"),
        (lambda: TransformConfig(images=(ImageStep("pose", (2, 2)),)), ShapeError, "not \\(H, W, C\\)"),
        (lambda: TransformConfig(images=(ImageStep("camera", (7, 7)),)), ShapeError, "crop of \\(7, 7\\) does not fit"),
        (lambda: TransformConfig(images=(ImageStep("camera", (7,)),)), ConfigError, "height and width"),
        (lambda: TransformConfig(chunk="relative"), ConfigError, "need at least one"),
        (lambda: TransformConfig(chunk_parts=(ChunkPart(0, "pose", 0, 3),)), ConfigError, "absolute actions have none"),
        (
            lambda: TransformConfig(
                chunk="delta", chunk_parts=(ChunkPart(0, "pose", 0, 3), ChunkPart(2, "pose", 0, 1))
            ),
            ConfigError,
            "overlap",
        ),
        (
            lambda: TransformConfig(chunk="delta", chunk_parts=(ChunkPart(5, "pose", 0, 3),)),
            ShapeError,
            "3 numbers from 5",
        ),
        (
            lambda: TransformConfig(chunk="delta", chunk_parts=(ChunkPart(0, "pose", 6, 3),)),
            ShapeError,
            "3 numbers from 6",
        ),
        (lambda: ChunkPart(0, "pose", 0, 4, rotation=True), ConfigError, "must be rot6d"),
    ],
)
def test_steps_that_do_not_fit_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        Transforms(make(), SPEC)


def test_pictures_are_resized_without_torch_as_with_it() -> None:
    import torch  # noqa: F401 - `crop_and_resize` takes it where it is loaded

    rng = np.random.default_rng(0)
    for _ in range(60):
        *shape, height, width = rng.integers(2, 130, 4)
        pictures = rng.integers(0, 256, (2, *shape, rng.choice([1, 3, 4])), np.uint8)
        np.testing.assert_array_equal(resize(pictures, (height, width)), crop_and_resize(pictures, (), (height, width)))


def test_a_stand_in_is_an_observation_that_every_step_takes():
    """Two rotations in one key, the second one counted after the first one became wider."""
    spec = DatasetSpec(
        {"hands": ArraySpec((2, 8)), "matrix": ArraySpec((9,)), "camera": ArraySpec((6, 8, 3), "uint8")}, 7, 0.5
    )
    config = TransformConfig(
        rename={"matrix": "turn"},
        flatten=("hands",),
        images=(ImageStep("camera", size=(3, 4)),),
        rotations=(
            RotationStep("hands", 1, "quat_wxyz"),
            RotationStep("hands", 12, "quat_xyzw", "axis_angle"),
            RotationStep("turn", 0, "matrix"),
        ),
        goals=("turn",),
    )
    transforms = Transforms(config, spec)
    found = transforms.stand_in()
    assert {key: ArraySpec(x.shape, str(x.dtype)) for key, x in found.items()} == transforms.recorded.observation
    assert np.argwhere(found["hands"]).tolist() == [[0, 1], [1, 5]]  # w, first and last
    assert found["camera"].min() < found["camera"].max()
    seen = transforms.observation(found)
    np.testing.assert_allclose(seen["hands"][1:7], [1, 0, 0, 0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(seen["goal.turn"], [1, 0, 0, 0, 1, 0], atol=1e-12)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "int32", "bool"])
def test_vectors_are_float32_whatever_was_recorded(dtype):
    spec = DatasetSpec({"touch": ArraySpec((2, 2), dtype), "picture": ArraySpec((2, 2, 3), "uint8")}, 1, 0.1)
    transforms = Transforms(TransformConfig(flatten=("touch",)), spec)
    assert transforms.spec.observation == {"touch": ArraySpec((4,)), "picture": ArraySpec((2, 2, 3), "uint8")}
    x = np.ones((5, 2, 2), dtype)
    assert transforms.convert("touch", x).dtype == np.float32
    assert transforms.convert("picture", np.ones((5, 2, 2, 3), np.uint8)).dtype == np.uint8


@pytest.mark.parametrize("source", ["quat_xyzw", "quat_wxyz", "matrix", "axis_angle"])
@pytest.mark.parametrize("chunk", ["absolute", "relative"])
def test_an_action_that_nobody_told_has_rotations_that_can_be_converted(source, chunk):
    width = ROTATION_WIDTHS[source]
    spec = DatasetSpec({"pose": ArraySpec((3 + width,))}, 4 + width, 0.1)
    rotations = (RotationStep("pose", 3, source), RotationStep("action", 3, source))
    parts = (ChunkPart(0, "pose", 0, 3), ChunkPart(3, "pose", 3, 6, True)) if chunk == "relative" else ()
    transforms = Transforms(TransformConfig(rotations=rotations, chunk=chunk, chunk_parts=parts), spec)
    action = transforms.unknown_action()
    assert action.shape == (4 + width,)
    assert action.dtype == np.float32
    state = {"pose": transforms.convert("pose", transforms.stand_in()["pose"])}
    seen = transforms.chunk(transforms.action(action[None]), state)[0]
    np.testing.assert_allclose(matrix_of(seen[3:9], "rot6d"), np.eye(3), atol=1e-6)
    np.testing.assert_array_equal(np.delete(seen, range(3, 9)), 0)


def test_an_action_of_six_numbers_that_nobody_told_is_a_rotation_too():
    """Where actions were recorded so, no step converts them."""
    spec = DatasetSpec({"pose": ArraySpec((6,))}, 6, 0.1)
    config = TransformConfig(chunk="relative", chunk_parts=(ChunkPart(0, "pose", 0, 6, True),))
    np.testing.assert_allclose(matrix_of(Transforms(config, spec).unknown_action(), "rot6d"), np.eye(3), atol=1e-6)
