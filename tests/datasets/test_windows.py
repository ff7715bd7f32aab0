"""Which steps a training sample takes: index arithmetic."""

import numpy as np
import pytest

from scd_robot.datasets.windows import SegmentBatch, SegmentIndex, group_by_length, split_episodes
from scd_robot.errors import ConfigError, DatasetError

ENDS = np.cumsum([9, 14, 5, 40, 12, 2, 13])
STARTS = np.concatenate([[0], ENDS[:-1]])


FIELDS = ("start", "stop", "episode_start", "episode_stop")


def epochs(index: SegmentIndex, count: int, batch_size: int = 4) -> SegmentBatch:
    """All segments of the first epochs, in one batch."""
    total = count * len(index)
    assert total % batch_size == 0
    parts = [index.batch(step, range(batch_size), batch_size) for step in range(total // batch_size)]
    return SegmentBatch(*(np.concatenate([getattr(part, n) for part in parts]) for n in FIELDS))


def test_number_of_segments_is_that_which_covers_each_episode() -> None:
    assert len(SegmentIndex(ENDS, 12)) == 1 + 2 + 1 + 4 + 1 + 1 + 2
    assert len(SegmentIndex(ENDS, 100)) == len(ENDS)
    assert len(SegmentIndex(ENDS, 1)) == ENDS[-1]


def test_no_step_lies_outside_its_episode_and_no_segment_is_too_long() -> None:
    segments = epochs(SegmentIndex(ENDS, 12, seed=3), 4)
    assert (segments.start >= segments.episode_start).all()
    assert (segments.stop <= segments.episode_stop).all()
    assert (segments.lengths == np.minimum(12, segments.episode_stop - segments.episode_start)).all()
    steps, real = segments.steps()
    episode = np.searchsorted(ENDS, steps, side="right")
    assert (episode == np.searchsorted(ENDS, segments.start, side="right")[:, None]).all()
    assert real.sum() == segments.lengths.sum()


def test_every_epoch_takes_every_segment_once_in_an_order_of_its_own() -> None:
    index = SegmentIndex(ENDS, 12)
    orders = [epochs(index, number + 1).episode_start[number * len(index) :] for number in range(3)]
    expected = np.repeat(STARTS, [1, 2, 1, 4, 1, 1, 2])
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), expected)
    assert (orders[0] != orders[1]).any()
    assert (orders[1] != orders[2]).any()


def test_every_step_of_every_episode_is_covered() -> None:
    """Short episodes in each epoch; long ones from their start in each, and by random starts over the epochs."""
    index = SegmentIndex(ENDS, 12)
    first = epochs(index, 1)
    steps, real = first.steps()
    whole = np.isin(np.arange(ENDS[-1]), steps[real])
    for start, end in zip(STARTS, ENDS, strict=True):
        assert whole[start : min(end, start + 12)].all()
    many = epochs(index, 300)  # the very last step of a long episode is in one random start out of 29
    steps, real = many.steps()
    assert set(steps[real]) == set(range(ENDS[-1]))


def test_long_episodes_are_cut_anew_each_epoch() -> None:
    index = SegmentIndex(ENDS, 12)
    cuts = [set(epochs(index, n + 1).start[n * len(index) :]) for n in range(3)]
    assert cuts[0] != cuts[1] != cuts[2]
    assert all(set(STARTS) <= cut for cut in cuts)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_devices_together_see_what_one_would(world_size: int) -> None:
    share = 8 // world_size
    for step in (0, 1, 7, 1000):
        whole = SegmentIndex(ENDS, 12, seed=5).batch(step, range(8), 8)
        parts = [
            SegmentIndex(ENDS, 12, seed=5).batch(step, range(rank * share, (rank + 1) * share), 8)
            for rank in range(world_size)
        ]
        for name in FIELDS:
            np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name))


def test_a_batch_does_not_depend_on_what_was_drawn_before() -> None:
    used, fresh = SegmentIndex(ENDS, 12, seed=5), SegmentIndex(ENDS, 12, seed=5)
    for step in (100, 3, 99, 0):
        used.batch(step, range(8), 8)
    np.testing.assert_array_equal(used.batch(50, range(8), 8).start, fresh.batch(50, range(8), 8).start)
    other = SegmentIndex(ENDS, 12, seed=6).batch(50, range(8), 8)
    assert (other.start != fresh.batch(50, range(8), 8).start).any()


def test_validation_takes_the_segments_in_order() -> None:
    index = SegmentIndex(ENDS, 12, episodes=np.array([1, 3]))
    ordered = index.ordered(range(len(index)))
    np.testing.assert_array_equal(ordered.episode_start, np.repeat(STARTS[[1, 3]], [2, 4]))
    np.testing.assert_array_equal(index.ordered(range(len(index))).start, ordered.start)
    assert ordered.start[0] == STARTS[1]
    assert ordered.start[2] == STARTS[3]


def test_only_the_chosen_episodes_are_used() -> None:
    segments = epochs(SegmentIndex(ENDS, 12, episodes=np.array([2, 6, 0])), 4)
    assert set(segments.episode_start) == set(STARTS[[0, 2, 6]])


def test_padding_repeats_the_last_step_and_is_marked() -> None:
    batch = SegmentBatch(*(np.array(x) for x in ([0, 9], [3, 14], [0, 9], [9, 23])))
    steps, real = batch.steps()
    np.testing.assert_array_equal(steps, [[0, 1, 2, 2, 2], [9, 10, 11, 12, 13]])
    np.testing.assert_array_equal(real, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def test_neighbours_outside_the_episode_are_marked_as_no_data() -> None:
    batch = SegmentBatch(*(np.array(x) for x in ([0, 11], [3, 14], [0, 9], [4, 15])))
    steps, inside = batch.steps_around(np.array([[0, 2], [0, 2]]), 3, 2)
    np.testing.assert_array_equal(
        steps, [[[0, 0, 0, 0, 1], [0, 0, 1, 2, 3]], [[9, 9, 10, 11, 12], [10, 11, 12, 13, 14]]]
    )
    np.testing.assert_array_equal(inside, [[[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]], [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]])
    np.testing.assert_array_equal(batch.before(np.array([[0, 1], [9, 12]])), [[0, 0], [9, 11]])


def test_a_stride_takes_every_so_many_steps() -> None:
    batch = SegmentBatch(*(np.array(x) for x in ([1, 10], [8, 13], [0, 9], [8, 13])), stride=3)
    steps, real = batch.steps()
    assert batch.lengths.tolist() == [3, 1]
    np.testing.assert_array_equal(steps, [[1, 4, 7], [10, 10, 10]])
    np.testing.assert_array_equal(real, [[1, 1, 1], [1, 0, 0]])
    around, inside = batch.steps_around(np.array([[2], [0]]), 1, 2)
    np.testing.assert_array_equal(around, [[[6, 7, 7]], [[9, 10, 11]]])
    np.testing.assert_array_equal(inside, [[[1, 1, 0]], [[1, 1, 1]]])


def test_with_a_stride_segments_begin_at_every_phase_but_validation_does_not() -> None:
    index = SegmentIndex(np.array([9]), 12, stride=4)
    starts = [int(index.batch(step, range(1), 1).start[0]) for step in range(60)]
    assert set(starts) == {0, 1, 2, 3}
    assert index.ordered(range(1)).start[0] == 0


def test_weights_set_how_often_control_steps_are_drawn() -> None:
    """Episodes of 10, 20 and 40 steps in segments of 10; steps of the first are wanted 4 times as often."""
    index = SegmentIndex(np.array([10, 30, 70]), 10, weights=np.array([4.0, 1.0, 1.0]))
    drawn = index.batch(0, range(4000), 4000)
    share = [np.mean(drawn.episode_start == start) for start in (0, 10, 30)]
    np.testing.assert_allclose(share, np.array([40, 20, 40]) / 100, atol=0.03)
    again = index.batch(0, range(4000), 4000)
    np.testing.assert_array_equal(drawn.start, again.start)
    assert len(set(drawn.start[drawn.episode_start == 30])) > 10  # other starts each time


@pytest.mark.parametrize(("held_out", "expected"), [(0.0, 0), (0.01, 1), (0.3, 3), (0.99, 9)])
def test_split_is_a_partition_of_the_wanted_size(held_out: float, expected: int) -> None:
    train, validation = split_episodes(10, held_out, seed=1)
    assert len(validation) == expected
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(10))
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()


def test_split_depends_on_its_seed_alone_and_leaves_something_to_train_on() -> None:
    np.testing.assert_array_equal(split_episodes(50, 0.2, 7)[1], split_episodes(50, 0.2, 7)[1])
    assert (split_episodes(50, 0.2, 7)[1] != split_episodes(50, 0.2, 8)[1]).any()
    assert [len(part) for part in split_episodes(1, 0.5)] == [1, 0]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        SegmentIndex(ENDS, 0)
    with pytest.raises(DatasetError, match="no episodes"):
        SegmentIndex(ENDS, 12, episodes=np.array([], np.int64))
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"in \[0, 1\)"):
            split_episodes(10, share)


def test_groups_have_like_lengths_and_lose_nothing() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 300, 1000)
    for offset in (0, 3, -5):
        order = group_by_length(lengths, 8, offset, np.random.default_rng(1))
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
        first = offset % 8
        groups = lengths[order[first : first + (1000 - first) // 8 * 8]].reshape(-1, 8)
        assert groups.max(axis=1).mean() < 1.15 * groups.mean()
        assert np.ptp(groups.mean(axis=1)[:10]) > 50, "groups come in random order"
    np.testing.assert_array_equal(group_by_length(lengths[:5], 8, 6, rng), np.arange(5))


def test_batches_of_like_lengths_hold_every_segment_once_an_epoch() -> None:
    ends = np.cumsum(np.random.default_rng(0).integers(2, 90, 101))
    plain, grouped = (SegmentIndex(ends, 64, seed=3, group_size=size) for size in (0, 8))

    def padded(index: SegmentIndex, epoch: int) -> tuple[float, list[int]]:
        """Share of padding in an epoch, and the starts that are its own."""
        steps = range(epoch * len(index) // 8, (epoch + 1) * len(index) // 8)
        batches = [index.batch(step, range(8), 8) for step in steps]
        sizes = sum(8 * b.lengths.max() for b in batches)
        return 1 - sum(b.lengths.sum() for b in batches) / sizes, np.concatenate([b.start for b in batches]).tolist()

    for epoch in (0, 1, 4):  # later ones do not begin with a batch
        assert padded(grouped, epoch)[0] < 0.15 < padded(plain, epoch)[0]
    covered = np.concatenate([grouped.batch(step, range(8), 8).start for step in range(2 * len(grouped) // 8)])
    firsts = np.concatenate([[0], ends[:-1]])
    assert set(firsts) <= set(covered)
    again = SegmentIndex(ends, 64, seed=3, group_size=8)
    np.testing.assert_array_equal(again.batch(20, range(8), 8).start, grouped.batch(20, range(8), 8).start)
