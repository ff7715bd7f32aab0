"""What can be told apart in a plot."""

import re

import pytest

from scd_robot.sim_eval.plots import age_plot, layers_plot

_STROKE = re.compile(r"stroke: ([^;]+?); stroke-width: 1\.5")


@pytest.mark.parametrize("count", [2, 8, 13])
def test_each_layer_has_a_colour_and_a_number(count):
    lines = {layer: [0.1 * layer, 0.2] for layer in range(count)}
    ages = [{"present": 0.5, "by_age": {"1": 0.3, "2": 0.2}}] * count
    for svg in (layers_plot([0, 0.5], lines, "x", "y"), age_plot(ages)):
        strokes = _STROKE.findall(svg)
        assert len(strokes) == 2 * count, "lines, and the same in the legend"
        assert len(set(strokes)) == count
        assert (strokes[0], strokes[-1]) == (
            "color-mix(in oklch, var(--success) 0%, var(--accent))",
            "color-mix(in oklch, var(--failure) 100%, var(--success))",
        )
        assert "#0" not in svg.replace('href="#', ""), "a placeholder is left"
        legend = svg[svg.index('id="legend_1"') :]
        assert re.findall(r">(\w+)</text>", legend)[: count + 1] == ["layer", *map(str, range(count))]


def test_a_single_line_needs_no_legend():
    assert "legend" not in layers_plot([0, 1], {"": [1, 2]}, "x", "y")


def test_numbers_of_many_frames_are_not_written_over_each_other():
    told = [layers_plot(range(1, count + 1), {"": [1.0] * count}, "x", "y") for count in (5, 64)]
    ticks = [re.findall(r'id="xtick_\d+".*?>(\d+)</text>', svg, re.DOTALL) for svg in told]
    assert ticks[0] == ["1", "2", "3", "4", "5"]
    assert 5 <= len(ticks[1]) <= 10
