"""Numbers that are kept for reports."""

import numpy as np

from scd_robot.latest import Latest


def test_the_latest_are_kept_in_their_order() -> None:
    kept = Latest(3)
    assert kept.values().tolist() == []
    for number, expected in enumerate(([0.0], [0.0, 1.0], [0.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 4.0])):
        kept.append(number)
        assert kept.values().tolist() == expected
    values = kept.values()
    kept.append(9.0)
    np.testing.assert_array_equal(values, [2, 3, 4])
