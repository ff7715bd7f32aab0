"""Random draws are functions of their keys alone."""

import subprocess
import sys

import numpy as np
import pytest

from scd_robot.seeding import EVALUATION, RECORDING, VALIDATION, derive_seed, keyed_rng


def test_a_stream_depends_on_its_keys_alone() -> None:
    expected = keyed_rng(1, 2, 3).standard_normal(5)
    keyed_rng(9).standard_normal(100)
    np.random.seed(4)  # noqa: NPY002 - the global generator must not matter
    np.testing.assert_array_equal(keyed_rng(1, 2, 3).standard_normal(5), expected)
    np.testing.assert_array_equal(keyed_rng(*np.array([1, 2, 3])).standard_normal(5), expected)


def test_values_stay_as_they_are() -> None:
    """Published results depend on them: a change here makes every recording and evaluation another one."""
    assert derive_seed(0) == 1189033389
    assert keyed_rng(1, 2).integers(2**62) == 1792274173141832286
    assert derive_seed(3, 0) != derive_seed(3, 1)
    code = "from scd_robot.seeding import *; print(derive_seed(3, 7), keyed_rng(1, 2).integers(2**62))"
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert other == [str(derive_seed(3, 7)), str(keyed_rng(1, 2).integers(2**62))]


def test_distinct_keys_never_share_a_stream() -> None:
    keys = [
        (0,),
        (0, 0),
        (13,),
        (13, 0),
        (0, 13),
        (0, 13, 0),
        (5, 1),
        (2**32 + 5,),
        (2**32 + 5, 0),
        (2**31,),
        (2**31, 1),
    ]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize("keys", [(1,), (0, 1), (1, 0), (1, 1), (2,), (1, 2, 3), (3, 2, 1), (2**40, 1)])
def test_other_keys_give_other_streams(keys: tuple[int, ...]) -> None:
    reference = (0, 0)
    assert derive_seed(*keys) != derive_seed(*reference)
    assert (keyed_rng(*keys).random(4) != keyed_rng(*reference).random(4)).all()


def test_start_states_of_different_purposes_are_disjoint() -> None:
    domains = (RECORDING, VALIDATION, EVALUATION)
    seeds = [{derive_seed(domain, episode) for episode in range(2000)} for domain in (VALIDATION, EVALUATION)]
    seeds.append({derive_seed(RECORDING, seed, attempt) for seed in range(4) for attempt in range(500)})
    assert len(set(domains)) == 3
    assert len(set.union(*seeds)) == sum(len(group) for group in seeds) == 6000


def test_seeds_fit_libraries_that_want_32_bits() -> None:
    assert all(0 <= derive_seed(key) < 2**32 and type(derive_seed(key)) is int for key in range(100))


def test_negative_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="non-negative"):
        keyed_rng(-1)


@pytest.mark.parametrize(
    ("first", "second"), [((1,), (1, 0)), ((2**32,), (0, 1)), ((0, 0), (0,)), ((2**32 + 5,), (5, 1))]
)
def test_keys_that_only_differ_in_length_do_not_collide(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    """Numpy's SeedSequence alone takes them for the same."""
    assert derive_seed(*first) != derive_seed(*second)
