"""Arrays on disk are indexed as numpy arrays are."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scd_robot.datasets.lazy import ConcatenatedArray, LazyArray, MappedArray, SelectedArray
from scd_robot.errors import ShapeError

BASE = np.arange(60).reshape(20, 3)


class Counted(LazyArray):
    """Rows of BASE; remembers what was read."""

    def __init__(self):
        super().__init__(BASE.shape, BASE.dtype)
        self.reads = []

    def read(self, start, stop):
        assert 0 <= start < stop <= len(self)
        self.reads.append((start, stop))
        return BASE[start:stop]


def double(rows):
    return 2 * rows


KINDS = {
    "plain": (Counted, BASE),
    "concatenated": (lambda: ConcatenatedArray([BASE[:4], Counted(), BASE[7:8]]), BASE[[*range(4), *range(20), 7]]),
    "selected": (lambda: SelectedArray(Counted(), np.array([3, 4, 5, 0, 19])), BASE[[3, 4, 5, 0, 19]]),
    "mapped": (lambda: MappedArray(Counted(), double, (3,), BASE.dtype), 2 * BASE),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_indexing_is_that_of_numpy(kind, data):
    make, expected = KINDS[kind]
    array, count = make(), len(expected)
    bound = st.none() | st.integers(-count - 2, count + 2)
    index = data.draw(
        st.builds(slice, bound, bound, st.sampled_from([None, 1, 2, -1]))
        | st.integers(-count, count - 1)
        | st.lists(st.integers(-count, count - 1), max_size=30).map(lambda rows: np.array(rows, np.int64))
        | st.lists(st.integers(-count, count - 1), min_size=6, max_size=6).map(lambda rows: np.reshape(rows, (2, 3)))
        | st.lists(st.booleans(), min_size=count, max_size=count).map(np.array)
    )
    found = array[index]
    np.testing.assert_array_equal(found, expected[index])
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(array), expected)
    assert (array.shape, array.ndim, array.nbytes, len(array)) == (expected.shape, 2, expected.nbytes, count)


def test_rows_asked_for_twice_are_read_once_and_neighbours_together():
    array = Counted()
    array[np.array([[5, 6, 7, 7], [2, 3, 6, 8]])]
    assert array.reads == [(2, 4), (5, 9)]


def test_bad_indices_are_refused():
    for rows in (20, -21, [0, 20]):
        with pytest.raises(IndexError, match="of an array with 20 rows"):
            Counted()[np.asarray(rows)]
    with pytest.raises(ShapeError, match="a mask must be"):
        Counted()[np.ones(3, bool)]
    with pytest.raises(IndexError, match="got float64"):
        Counted()[np.array([0.5])]


def test_joined_arrays_must_agree():
    with pytest.raises(ShapeError, match="one shape and dtype"):
        ConcatenatedArray([BASE, BASE[:, :2]])
    with pytest.raises(ShapeError, match="one shape and dtype"):
        ConcatenatedArray([BASE, BASE.astype(np.float32)])


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_reach_worker_processes(kind):
    make, expected = KINDS[kind]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(make()))[:], expected)
