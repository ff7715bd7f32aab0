"""Sensors at different rates, on explicit times."""

import numpy as np
import pytest

from scd_robot.datasets import ZarrWriter, open_dataset
from scd_robot.datasets.align import Stream, align_streams
from scd_robot.errors import ConfigError, DatasetError
from scd_robot.types import ArraySpec, DatasetSpec

FAST = Stream(np.arange(0, 1.01, 0.1), np.arange(11.0)[:, None])


def test_each_control_step_has_what_was_there_by_then() -> None:
    slow = Stream(np.array([0.05, 0.35, 0.36, 0.9]), np.array([10, 20, 30, 40]))
    arrays = align_streams({"fast": FAST, "slow": slow}, 0.25)
    # Control steps at 0.05, 0.30, 0.55, 0.80: the last one before the slow sensor ends.
    np.testing.assert_allclose(arrays["timestamp"], [0, 0.25, 0.5, 0.75])
    np.testing.assert_array_equal(arrays["slow"], [10, 10, 30, 30])
    np.testing.assert_array_equal(arrays["fast"][:, 0], [0, 3, 5, 8])
    assert set(arrays) == {"fast", "slow", "timestamp"}


def test_a_sample_at_the_very_time_counts() -> None:
    arrays = align_streams({"fast": FAST}, 0.1)
    np.testing.assert_array_equal(arrays["fast"][:, 0], np.arange(11))


def test_slow_frames_count_once_and_old_ones_not_at_all() -> None:
    slow = Stream(np.array([0.0, 0.3, 1.0]), np.array([1, 2, 3]), max_age_s=0.5)
    arrays = align_streams({"fast": FAST, "slow": slow}, 0.1)
    np.testing.assert_array_equal(arrays["slow"], [1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3])
    np.testing.assert_array_equal(arrays["present.slow"], [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1])
    new = align_streams({"fast": FAST, "slow": slow}, 0.1, mark_new=("slow",))
    np.testing.assert_array_equal(new["present.slow"], [1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1])


def test_a_sensor_that_may_be_silent_is_marked_in_every_episode(tmp_path) -> None:
    """A store wants the same arrays in all episodes, and training takes one without gaps for one without marks."""
    time = np.arange(0, 1.01, 0.1)
    spec = DatasetSpec({"state": ArraySpec((1,))}, action_dim=1, control_dt=0.1)
    for order in (("gap", "whole"), ("whole", "gap")):
        with ZarrWriter(tmp_path / f"{order[0]}.zarr", spec) as writer:
            for kind in order:
                heard = np.delete(time, slice(4, 8)) if kind == "gap" else time
                state = Stream(heard, np.zeros((len(heard), 1)), max_age_s=0.15)
                writer.append(align_streams({"state": state, "action": FAST}, 0.1))
        data = open_dataset(tmp_path / f"{order[0]}.zarr")
        gaps = {kind: data.select([number]).has_gaps("state") for number, kind in enumerate(order)}
        assert gaps == {"gap": True, "whole": False}
        assert data.has_gaps("state")
    assert not data.has_gaps("action")


def test_labels_may_be_interpolated() -> None:
    label = Stream(np.array([0.0, 1.0]), np.array([[0.0, 10.0], [1.0, 20.0]]), mode="linear")
    arrays = align_streams({"fast": FAST, "label": label}, 0.5)
    np.testing.assert_allclose(arrays["label"], [[0, 10], [0.5, 15], [1, 20]])


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ({"a": Stream(np.array([0.0, 1, 1]), np.zeros(3))}, "'a' must increase; sample 2"),
        ({"a": Stream(np.array([0.0, np.nan]), np.zeros(2))}, "'a' must increase"),
        ({"a": Stream(np.array([0.0]), np.zeros(2))}, "times for 2 samples"),
        ({"a": FAST, "b": Stream(np.array([5.0, 6.0]), np.zeros(2))}, "no time in common"),
    ],
)
def test_streams_that_do_not_fit_are_refused(streams, message) -> None:
    with pytest.raises(DatasetError, match=message):
        align_streams(streams, 0.1)
    with pytest.raises(ConfigError, match="positive"):
        align_streams({"a": FAST}, 0.0)


@pytest.mark.parametrize(
    ("mode", "max_age_s", "mark_new", "told"),
    [
        ("linear", 0.5, (), "'slow' is interpolated and never absent"),
        ("linear", np.inf, ("slow",), "'slow' is interpolated and never absent"),
        ("latest", np.inf, ("slwo",), "mark_new names slwo, but the streams are slow"),
    ],
)
def test_what_would_be_left_unheeded_is_refused(mode, max_age_s, mark_new, told):
    slow = Stream(np.array([0.0, 1.0]), np.zeros((2, 1)), mode, max_age_s)
    with pytest.raises(ConfigError, match=told):
        align_streams({"slow": slow}, 0.1, mark_new)


@pytest.mark.parametrize("begin", [0, 1_700_000_000])
def test_times_of_a_clock_that_began_long_ago_are_as_good(begin) -> None:
    """Such a time is known to a quarter of a microsecond, so that equal ones differ by it."""
    nanoseconds = begin * 10**9 + 50_000_000 * np.arange(2000)
    stream = Stream(nanoseconds / 1e9, np.arange(2000), max_age_s=0.0)
    arrays = align_streams({"a": stream, "b": Stream(nanoseconds / 1e9, np.arange(2000))}, 0.05, mark_new=("b",))
    np.testing.assert_array_equal(arrays["a"], np.arange(2000))
    np.testing.assert_allclose(arrays["timestamp"], 0.05 * np.arange(2000))
    assert arrays["present.a"].all()
    assert arrays["present.b"].all()
