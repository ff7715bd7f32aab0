"""How surprising the real next frame is: against predictions that are known."""

import json

import numpy as np
import pytest
from known_frames import DATA, KnownFrames, known_frames, random_frames

from scd_robot.errors import ConfigError, ShapeError
from scd_robot.policies.surprise import (
    KINDS,
    Surprise,
    SurpriseCalibration,
    calibrate,
    load_calibration,
    patch_errors,
    prediction_settings,
    scores_of,
)

EYE, ACTION = DATA.arrays["eye"], DATA.arrays["action"]


def flat(imagination: KnownFrames, usual: float = 0.0, threshold: float = 0.5) -> SurpriseCalibration:
    """The same error is usual in all 4 x 4 patches of 4 x 4 pixels."""
    return SurpriseCalibration(
        {kind: np.full((4, 4), usual) for kind in KINDS},
        dict.fromkeys(KINDS, threshold),
        0.99,
        (1, 1),
        (5, 5),
        settings=prediction_settings(imagination),
    )


def picture(row: int, column: int) -> np.ndarray:
    """(1, 16, 16, 1), a bright square of 4 x 4 pixels."""
    frame = np.full((1, 16, 16, 1), 30, np.uint8)
    frame[0, row : row + 4, column : column + 4] = 220
    return frame


def test_what_was_predicted_is_no_surprise_and_what_was_moved_by_hand_is_one() -> None:
    """Predicted: the square moves by the action. A square elsewhere is wrong by 190 grey levels in two patches."""
    imagination = known_frames()
    watch, right = Surprise(imagination, flat(imagination, usual=99.0)), np.array([[0.0, 4.0]])
    first = watch.observe(picture(4, 0))
    assert all(np.isnan(first[kind]).all() for kind in KINDS), "nothing was predicted"
    assert not any(watch.alarms(first)[kind].any() for kind in KINDS)
    expected = watch.observe(picture(4, 4), right)
    np.testing.assert_array_equal(watch.predicted, picture(4, 4))
    for kind in KINDS:
        np.testing.assert_allclose(expected[kind], [-2.0])  # log10((0 + 1) / (99 + 1))
    moved = watch.observe(picture(8, 8), right)  # it should be at 4, 8
    for kind in KINDS:
        np.testing.assert_allclose(moved[kind], [np.log10((190**2 + 1) / 100)])
        assert watch.alarms(moved)[kind].tolist() == [True]
    again = watch.observe(picture(8, 12), right)  # it is known where it is now
    np.testing.assert_allclose(again["everywhere"], [-2.0])


def test_the_action_really_executed_is_what_is_predicted_from() -> None:
    imagination = known_frames()
    watch = Surprise(imagination, flat(imagination))
    watch.observe(picture(4, 4))
    scores = watch.observe(picture(4, 8), np.array([[0.0, 0.0]]))
    np.testing.assert_allclose(scores["everywhere"], [np.log10(190**2 + 1)])


def test_errors_are_means_over_patches_and_moving_ones_leave_out_what_stands_still() -> None:
    last = np.full((1, 8, 8, 3), 100, np.uint8)
    real, predicted = last.copy(), last.copy()
    real[0, 0, 0] = 120  # moves, and was not predicted
    real[0, 4, 4] = 108  # changes by no more than 8: does not move
    predicted[0, 0, 7, 0] = 130  # stands still, and was predicted to move
    errors = patch_errors(real, predicted, last, 4)
    np.testing.assert_allclose(errors["everywhere"], [[[400 / 16, 900 / 3 / 16], [0, 64 / 16]]])
    np.testing.assert_allclose(errors["moving"], [[[400 / 16, 0], [0, 0]]])


def test_the_score_is_the_largest_ratio_of_a_patch_to_what_is_usual_there() -> None:
    usual = np.array([[999.0, 0.0], [9.0, 9.0]])
    errors = np.array([[[5000.0, 0.0], [0.0, 0.0]], [[0.0, 99.0], [0.0, 0.0]]])
    found = scores_of(dict.fromkeys(KINDS, errors), dict.fromkeys(KINDS, usual))
    np.testing.assert_allclose(found["moving"], [np.log10(5.001), 2.0])


def test_half_of_the_episodes_tell_usual_errors_and_the_others_usual_scores() -> None:
    """Usual is the mean over frames, and the largest of a patch and its neighbours."""
    one = np.zeros((2, 5, 5))
    one[0, 2, 2], one[1, 2, 2] = 28.0, 10.0
    other = np.zeros((100, 5, 5))
    other[:, 0, 0] = np.arange(100)  # place 0, 0 is no neighbour of 2, 2
    other[:, 1, 1] = 19.0
    found = calibrate(known_frames(), [dict.fromkeys(KINDS, one), dict.fromkeys(KINDS, other)], 0.9)
    expected = np.zeros((5, 5))
    expected[1:4, 1:4] = 19.0
    np.testing.assert_allclose(found.usual["everywhere"], expected)
    assert found.thresholds["everywhere"] == pytest.approx(np.log10(91), abs=0.01)
    assert (scores_of({k: other for k in KINDS}, found.usual)["moving"] > found.thresholds["moving"]).mean() <= 0.1
    assert (found.episodes, found.frames) == ((1, 1), (2, 100))
    again = SurpriseCalibration.from_json(json.loads(json.dumps(found.to_json())))
    assert again.to_json() == found.to_json()


@pytest.mark.parametrize(
    ("episodes", "quantile", "told"),
    [(1, 0.9, "at least 2 episodes.*got 1"), (2, 1.0, "above 0 and below 1, got 1.0"), (0, 0.5, "got 0")],
)
def test_calibrations_of_too_little_are_refused(episodes: int, quantile: float, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        calibrate(known_frames(), episodes * [dict.fromkeys(KINDS, np.zeros((2, 4, 4)))], quantile)


def test_a_calibration_of_another_model_is_refused() -> None:
    imagination = known_frames()
    told = flat(imagination)
    with pytest.raises(ConfigError, match="the model is run with"):
        Surprise(known_frames(guidance_scale=2.0), told)
    wrong = SurpriseCalibration.from_json({**told.to_json(), "usual": {kind: [[0.0]] for kind in KINDS}})
    with pytest.raises(ShapeError, match=r"has patches \(1, 1\), the model's pictures \(4, 4\)"):
        Surprise(imagination, wrong)
    imagination.provenance = {"weights_sha256": "a" * 64}
    with pytest.raises(ConfigError, match="of other weights"):
        Surprise(imagination, SurpriseCalibration.from_json({**told.to_json(), "model": "b" * 64}))


@pytest.mark.parametrize(
    ("text", "told"),
    [("{", "is no JSON"), ("[]", "holds no calibration"), ('{"calibration": {}}', "'schema' is missing")],
)
def test_files_without_a_calibration_are_refused(text: str, told: str, tmp_path) -> None:
    (tmp_path / "surprise.json").write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_calibration(tmp_path / "surprise.json")


def test_a_row_alone_and_in_a_batch_are_equally_surprising() -> None:
    """With a real model; also where rows begin new episodes at different times."""

    def run(rows: list[int]) -> np.ndarray:
        watch = Surprise(random_frames(), flat(random_frames()))
        watch.reset(episodes=rows)
        found = []
        for step in range(8):
            for index, row in enumerate(rows):
                if step == 3 + row:
                    watch.reset(rows=[index], episodes=[row + 5])
            at = [24 * row + step for row in rows]
            found.append(watch.observe(EYE[at], ACTION[at] if step else None)["everywhere"])
        return np.stack(found)

    together = run([0, 1, 2])
    assert np.isnan(together[[3, 4, 5], [0, 1, 2]]).all()
    for row in range(3):
        alone = run([row])[:, 0]
        np.testing.assert_allclose(alone, together[:, row], atol=0.02)
        assert np.isfinite(np.delete(alone, [0, 3 + row])).all()


def test_actions_that_do_not_belong_are_refused() -> None:
    watch = Surprise(known_frames())
    watch.observe(EYE[:2])
    with pytest.raises(ShapeError, match=r"executed_action must be \(2, Da\), got \(1, 2\)"):
        watch.observe(EYE[1:3], ACTION[:1])
    with pytest.raises(ShapeError, match=r"executed_action must be \(2, 2\) after the first control step, got None"):
        watch.observe(EYE[1:3])
    with pytest.raises(ConfigError, match="no threshold without a calibration"):
        watch.alarms({})
