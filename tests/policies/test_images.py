"""Policies that see: streaming equals the full pass, rows are independent, and pictures that are none are refused."""

import numpy as np
import pytest
import torch
from pictures import ARCHITECTURES, SHAPES, picture_data, picture_policy

from scd_robot.errors import ShapeError
from scd_robot.policies import ScdPolicy
from scd_robot.policies.config import check_widths
from scd_robot.transforms import ImageStep, TransformConfig

DATA = picture_data()


@pytest.fixture(params=sorted(ARCHITECTURES))
def make(request: pytest.FixtureRequest):
    def policy(transforms: TransformConfig | None = None, **model) -> ScdPolicy:
        return picture_policy(request.param, DATA, transforms or TransformConfig(), **model)

    return policy


def stream(rows: int, steps: int) -> list[dict[str, np.ndarray]]:
    """Observations of the tiny dataset, other ones for each row."""
    return [{key: DATA.arrays[key][step :: steps + 1][:rows] for key in SHAPES} for step in range(steps)]


def full_pass(policy: ScdPolicy, observations: list[dict], present: dict | None = None) -> torch.Tensor:
    """(B, K or P, D) of the last control step, in one pass over all of them."""
    seen = {key: torch.from_numpy(np.stack([o[key] for o in observations], 1)) for key in SHAPES}
    with torch.no_grad():
        return policy.model.encode(policy.normalizer.normalize_observation(seen), present=present)[:, -1]


def test_the_context_is_that_of_a_full_pass_over_the_pictures(make) -> None:
    policy, observations = make(), stream(3, 12)
    for observation in observations:
        policy.observe(observation)
    torch.testing.assert_close(policy.context, full_pass(policy, observations), atol=1e-4, rtol=1e-4)


def test_a_row_alone_acts_as_in_a_batch(make) -> None:
    observations = stream(3, 7)

    def run(rows: list[int]) -> np.ndarray:
        policy = make()
        policy.reset(episodes=rows)
        return np.stack([policy.act({key: value[rows] for key, value in o.items()}) for o in observations])

    together = run([0, 1, 2])
    for row in range(3):
        np.testing.assert_allclose(run([row])[:, 0], together[:, row], atol=1e-4)


@pytest.mark.parametrize("tokens", ["joint", "per_key"])
def test_a_camera_that_sends_nothing_is_absent_in_that_step(make, tokens: str) -> None:
    policy, observations = make(observation_tokens=tokens), stream(2, 6)
    for step, observation in enumerate(observations):
        policy.observe({**observation, "eye": None} if step % 2 else observation)
    there = torch.tensor([[True, False] * 3] * 2)
    expected = full_pass(policy, observations, {"eye": there})
    torch.testing.assert_close(policy.context, expected, atol=1e-4, rtol=1e-4)
    assert (policy.context - full_pass(policy, observations)).abs().max() > 1e-3


def test_what_may_be_none_is_told(make) -> None:
    assert make().spec.optional == ("eye", "wrist")
    assert make(observation_tokens="per_key").spec.optional == ("eye", "position", "wrist")


def test_pictures_are_cropped_and_resized_as_in_training(make) -> None:
    smaller = {"observation_shapes": {**SHAPES, "eye": (8, 16, 3)}}
    policy = make(TransformConfig(images=(ImageStep("eye", (12, 24), (8, 16)),)), **smaller)
    assert policy.spec.observation["eye"].shape == (16, 24, 3)
    policy.observe(stream(2, 1)[0])
    with pytest.raises(ShapeError, match=r"\(B, 16, 24, 3\) uint8 of 0 to 255, got \(2, 8, 16, 3\)"):
        policy.observe({**stream(2, 1)[0], "eye": np.zeros((2, 8, 16, 3), np.uint8)})


GOOD = stream(2, 1)[0]["eye"]


@pytest.mark.parametrize(
    ("eye", "told"),
    [
        (
            GOOD / 255.0,
            r"uint8 of 0 to 255, got \(2, 16, 24, 3\) float64 of 0 to 1: give np.round\(255 \* picture\).astype",
        ),
        (GOOD / 127.5 - 1, r"float64 of -1 to 1: give np.round\(127.5 \* \(picture \+ 1\)\).astype\(np.uint8\)"),
        (
            GOOD.astype(np.float32),
            r"got \(2, 16, 24, 3\) float32 of 0 to 255: give np.round\(picture\).astype\(np.uint8\)",
        ),
        (GOOD.astype(np.uint16) * 257, r"uint16 of \d+ to 65535: bring pictures to 0 to 255, then give np.round\("),
        (GOOD.astype(np.int64), r"int64 of 0 to 255: give np.round\(picture\).astype\(np.uint8\)"),
        ((GOOD > 99).astype(np.uint8), "nothing but 0 and 1 in row 0: a picture of 0 to 1 was converted to uint8"),
        (np.concatenate((GOOD[:1], 0 * GOOD[1:])), "is 0 everywhere in row 1: the camera gave no picture"),
        (np.moveaxis(GOOD, -1, 1), r"channels come last; give np.moveaxis\(picture, 1, -1\)"),
        (GOOD[0], r"there is no batch axis; give picture\[None\]"),
        (GOOD[..., :1], r"this is grey, the policy was trained with 3 channels"),
        (GOOD[..., 0], r"this is grey, the policy was trained with 3 channels"),
        (
            np.repeat(GOOD, 2, axis=3)[..., :4],
            r"trained with 3 channels: the fourth \(alpha\) .*give picture\[..., :3\]",
        ),
        (GOOD[:, :8], r"got \(2, 8, 24, 3\) uint8: a picture of another size; resize it"),
        (GOOD[:, :8, :, :2], "is it another camera"),
        (GOOD[:1].repeat(3, axis=0), r"with one B >= 1 for all keys"),
    ],
)
def test_pictures_that_are_none_are_refused_and_change_nothing(make, eye: np.ndarray, told: str) -> None:
    policy, observations = make(), stream(2, 3)
    expected = [policy.act(observation) for observation in observations]
    policy.reset(episodes=[0, 1])
    for observation, action in zip(observations, expected, strict=True):
        with pytest.raises(ShapeError, match=told):
            policy.act({"position": observation["position"], "wrist": observation["wrist"], "eye": eye})
        np.testing.assert_array_equal(policy.act(observation), action)


def test_a_camera_that_is_left_out_is_refused(make) -> None:
    observation = stream(2, 1)[0]
    with pytest.raises(ShapeError, match=r"'eye' is missing; got \['position', 'wrist'\]; give None where the camera"):
        make().act({key: value for key, value in observation.items() if key != "eye"})


def test_cameras_of_another_checkpoint_are_refused(make) -> None:
    policy = make()
    other = picture_data(eye=DATA.arrays["eye"][:, :8])
    with pytest.raises(ShapeError, match=r"takes pictures 'eye' as uint8 \(16, 24, 3\), .* has uint8 \(8, 24, 3\)"):
        check_widths(policy.model.config, policy.normalizer, other.spec)
