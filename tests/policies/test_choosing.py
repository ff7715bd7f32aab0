"""Choosing among sampled chunks by what a model of frames imagines of each."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from frame_models import ARCHITECTURES
from known_frames import DATA, SHAPE, known_frames, random_frames

from scd_robot.errors import ConfigError, ShapeError
from scd_robot.policies import ChoosingPolicy, GoalPicture, Imagination
from scd_robot.policies.frame_stream import FrameStream
from scd_robot.types import Policy

EYE = DATA.arrays["eye"]


def to_the_right(frames: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    """A score of the chunks alone."""
    return chunks[:, :, 1].sum(axis=1)


@pytest.fixture
def seen(stream: Callable[..., Any]) -> Callable[..., list[dict[str, np.ndarray]]]:
    """As `stream`, and row i sees episode i of the moving square."""

    def make(rows: int, steps: int) -> list[dict[str, np.ndarray]]:
        observations = stream(rows, steps)
        return [
            {**one, "eye": np.stack([EYE[24 * row + step] for row in range(rows)])}
            for step, one in enumerate(observations)
        ]

    return make


def act_all(policy: Any, observations: list[dict[str, np.ndarray]], episodes: list[int]) -> np.ndarray:
    policy.reset(episodes=episodes)
    return np.stack([policy.act(observation) for observation in observations])


@pytest.mark.parametrize("candidates", [1, 4])
@pytest.mark.parametrize("kind", ["scd_policy", "causal_dit_policy"])
def test_the_first_candidate_is_the_action_policy_by_itself(kind, candidates, seen, request) -> None:
    """And of equal scores the first counts: a score that says nothing changes nothing."""
    make, observations = request.getfixturevalue(kind), seen(2, 7)
    alone = act_all(make(), observations, [3, 4])
    policy = ChoosingPolicy(make(), random_frames(), lambda frames, chunks: np.zeros(len(frames)), candidates, 1)
    assert isinstance(policy, Policy)
    np.testing.assert_allclose(act_all(policy, observations, [3, 4]), alone, atol=1e-5)


def test_a_snapshot_does_not_leave_the_choice_out_silently(scd_policy, seen) -> None:
    inner, [observation] = scd_policy(), seen(1, 1)
    inner.observe(observation)
    inner.snapshot()
    ChoosingPolicy(inner, random_frames(), to_the_right, 2)
    inner.reset()
    inner.observe(observation)
    with pytest.raises(ConfigError, match="choose among no candidates"):
        inner.snapshot()


def test_the_chunk_that_scores_best_is_followed_and_the_scores_are_kept(scd_policy, seen) -> None:
    given = []

    def score(frames: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        given.append(chunks)
        assert (frames.shape, frames.dtype) == ((5, 4, *SHAPE), np.uint8)
        return to_the_right(frames, chunks)

    policy, observations = ChoosingPolicy(scd_policy(num_executed=2), random_frames(), score, 5), seen(1, 3)
    policy.reset(episodes=[0])
    first = policy.act(observations[0])
    scores = to_the_right(given[0], given[0])
    np.testing.assert_allclose(policy.scores, [scores], rtol=1e-6)
    assert len(np.unique(scores)) == 5, "candidates have noise of their own"
    np.testing.assert_array_equal(first[0], given[0][scores.argmax(), 0])
    np.testing.assert_array_equal(policy.act(observations[1])[0], given[0][scores.argmax(), 1])
    assert np.isnan(policy.scores).all(), "nothing was planned in this control step"
    policy.act(observations[2])
    assert len(given) == 2


def test_a_goal_picture_leads_to_the_candidate_that_reaches_it(scd_policy, seen) -> None:
    """Each candidate's frames are known: the picture, moved by the sum of its rounded actions."""
    spread = known_frames()
    policy, observation = scd_policy(num_executed=2), seen(1, 1)[0]
    kept: list[np.ndarray] = []

    def remember(frames: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        kept.extend((frames, chunks))
        return np.zeros(len(frames))

    ChoosingPolicy(policy, spread, remember, 12).act(observation)
    frames, chunks = kept
    moves = np.rint(chunks).astype(int)
    for candidate in range(12):
        expected = observation["eye"][0]
        for step, move in enumerate(moves[candidate]):
            expected = np.roll(expected, tuple(move), axis=(0, 1))
            np.testing.assert_array_equal(frames[candidate, step], expected)
    different = [c for c in range(12) if moves[c].sum(axis=0).any()]
    wanted = different[-1]
    policy.reset(episodes=[0])
    chosen = ChoosingPolicy(policy, spread, GoalPicture(frames[wanted, -1]), 12).act(observation)
    same = [c for c in range(12) if (frames[c, -1] == frames[wanted, -1]).all()]
    assert same[0] > 0, "the action policy alone would not have done it"
    np.testing.assert_array_equal(chosen[0], chunks[same[0], 0])


def test_the_goal_score_is_the_negative_mean_squared_difference_of_the_last_frame() -> None:
    frames = np.zeros((2, 3, 4, 4, 1), np.uint8)
    frames[1, -1, 0, 0] = 200
    goal = np.zeros((4, 4, 1), np.uint8)
    goal[:2] = 10
    scores = GoalPicture(goal)(frames, np.zeros((2, 3, 2)))
    np.testing.assert_allclose(scores, [-50.0, -(7 * 100 + 190**2) / 16])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_alone_and_in_a_batch_choose_alike(architecture, scd_policy, seen) -> None:
    """Also where rows begin new episodes at different times."""

    def run(rows: list[int], reset_at: dict[int, int]) -> np.ndarray:
        policy = ChoosingPolicy(scd_policy(num_executed=2), random_frames(architecture), bright_low, 4, 3)
        policy.reset(episodes=rows)
        acted = []
        for step, observation in enumerate(seen(3, 9)):
            for index, row in enumerate(rows):
                if reset_at.get(row) == step:
                    policy.reset(rows=[index], episodes=[row + 10])
            executed = None if not acted else acted[-1] * np.float32(0.9)
            acted.append(policy.act({key: value[rows] for key, value in observation.items()}, executed))
        return np.stack(acted)

    times = {0: 5, 2: 3}
    together = run([0, 1, 2], times)
    for row in range(3):
        np.testing.assert_allclose(run([row], times)[:, 0], together[:, row], atol=1e-4)


def bright_low(frames: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    """A score that reads the pictures: how bright the lower half of the last is."""
    return frames[:, -1, 8:].astype(np.float64).mean(axis=(1, 2, 3))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_live_frames_are_those_that_are_imagined_of_the_recording(architecture, monkeypatch) -> None:
    """One history, read step by step and used for several futures, against whole recordings, one for each."""
    shape = random_frames(architecture).model.config.token_shape
    zeros = lambda self, keys, number: (torch.zeros(len(keys), *shape), None)  # noqa: E731
    monkeypatch.setattr(Imagination, "_noise", zeros)
    imagination, actions = random_frames(architecture), DATA.arrays["action"]
    stream = FrameStream(imagination)
    for step in range(6):  # longer than the window of 4
        stream.observe(EYE[None, step], actions[None, step - 1] if step else None)
    futures = np.stack([actions[5:9], -actions[5:9], actions[30:34]])
    live = stream.imagine(futures[None])[0].astype(int)
    for future, frames in zip(futures, live, strict=True):
        recorded = imagination.imagine(EYE[None, :6], np.concatenate([actions[:5], future])[None])
        assert np.abs(recorded[0] - frames).max() <= 1
    assert np.abs(live[0] - live[1]).max() > 1
    again = stream.imagine(futures[None])[0]
    np.testing.assert_array_equal(again, live, err_msg="imagining must not change what was seen")


def test_futures_with_equal_actions_are_equal_and_new_control_steps_have_other_noise() -> None:
    stream = FrameStream(random_frames())
    stream.observe(EYE[:1])
    same = np.zeros((1, 3, 2, 2), np.float32)
    frames = stream.imagine(same)[0]
    assert np.abs(frames - frames[:1].astype(int)).max() <= 1
    other = FrameStream(random_frames())
    other.reset(episodes=[7])
    other.observe(EYE[:1])
    assert np.abs(other.imagine(same)[0].astype(int) - frames).max() > 1


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (lambda n: np.zeros(n - 1), r"must give \(3,\) finite numbers, one for each candidate, got float64 \(2,\)"),
        (lambda n: np.full(n, np.nan), r"finite numbers.*nan"),
        (lambda n: 1.0, r"got float64 \(\)"),
    ],
)
def test_scores_that_are_none_are_refused(found, told, scd_policy, seen) -> None:
    policy = ChoosingPolicy(scd_policy(), random_frames(), lambda frames, chunks: found(len(frames)), 3)
    with pytest.raises(ShapeError, match=told):
        policy.act(seen(1, 1)[0])


def test_what_does_not_fit_together_is_refused(scd_policy, seen) -> None:
    policy = ChoosingPolicy(scd_policy(), random_frames(), to_the_right)
    observation = seen(1, 1)[0]
    with pytest.raises(ShapeError, match="observation 'eye' is missing, which is imagined; got"):
        policy.act({key: value for key, value in observation.items() if key != "eye"})
    with pytest.raises(ShapeError, match="camera 'eye' gave no picture"):
        policy.act({**observation, "eye": None})
    for changes, told in (({"action_dim": 3}, "2 wide, those of the model"), ({"control_dt": 0.02}, "0.02 s")):
        other = random_frames()
        other.transforms.recorded = replace(other.transforms.recorded, **changes)
        with pytest.raises(ShapeError, match=told):
            ChoosingPolicy(scd_policy(), other, to_the_right)
    for settings, told in (({"num_candidates": 0}, "got 0 and 4"), ({"num_frames": 5}, "1 to 4 frames")):
        with pytest.raises(ConfigError, match=told):
            ChoosingPolicy(scd_policy(), random_frames(), to_the_right, **settings)
    assert policy.spec.observation["eye"].shape == SHAPE
    assert set(policy.spec.observation) == {"eye", "position", "goal"}
    inner = scd_policy()
    inner.spec = replace(inner.spec, optional=("eye", "goal"))
    assert ChoosingPolicy(inner, random_frames(), to_the_right).spec.optional == ("goal",)


def test_what_is_refused_leaves_neither_history_a_step_ahead(scd_policy, seen) -> None:
    observations = seen(2, 4)
    policy = ChoosingPolicy(scd_policy(), random_frames(), bright_low, 3)
    expected = act_all(policy, observations, [0, 1])
    policy.reset(episodes=[0, 1])
    bad = [{"position": np.full((2, 2), np.nan)}, {"eye": np.zeros((2, 3, 3, 1), np.uint8)}]
    actions = []
    for observation in observations:
        for change in bad:
            with pytest.raises(ShapeError):
                policy.act({**observation, **change})
        actions.append(policy.act(observation))
    np.testing.assert_array_equal(actions, expected)


def test_rows_may_be_given_as_a_mask(scd_policy, seen) -> None:
    policy = ChoosingPolicy(scd_policy(), random_frames(), bright_low, 2)
    policy.act(seen(3, 1)[0])
    policy.reset(rows=np.array([False, False, True]))
    assert policy._stream.position is not None
    assert policy._stream.position.tolist() == [1, 1, 0]
    for rows in ([3], [-1], [True, False]):
        with pytest.raises(ShapeError, match="rows"):
            policy._stream.reset(rows)
