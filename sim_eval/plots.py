"""Plots of an evaluation as inline SVG that takes its colours from the page, so that light and dark both fit.

matplotlib is needed here only. It draws with placeholder colours, which are then replaced by CSS variables.
"""

import importlib.util
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scd_robot.errors import MissingDependencyError
from scd_robot.sim_eval.comparison import Comparison
from scd_robot.sim_eval.result import EvaluationResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "age_plot",
    "arms_plot",
    "bars_plot",
    "cuts_plot",
    "delay_plot",
    "flight_plot",
    "latency_plot",
    "layers_plot",
    "pairs_plot",
    "require_matplotlib",
    "steps_plot",
    "success_plot",
    "timeline_plot",
]

# What matplotlib draws with, and the CSS variable that takes its place; no two are alike, and none occurs by itself.
_COLOURS = {
    "ink": "#010203",
    "muted": "#020304",
    "line": "#030405",
    "success": "#040506",
    "failure": "#050607",
    "invalid": "#060708",
    "accent": "#070809",
}
_SCALE = ("accent", "success", "failure")  # of what has an order: first, in the middle, last
_BLEND = "#0809"  # begins the placeholder of a colour on that scale, whose last byte is where: 0 to 254
_WIDTH_IN = 4.4
_MOST_TICKS = 10
_COMPACT = {"handlelength": 1.0, "columnspacing": 1.2}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9.0,
    "text.color": _COLOURS["ink"],
    "axes.edgecolor": _COLOURS["line"],
    "axes.labelcolor": _COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": _COLOURS["line"],
    "grid.linewidth": 0.6,
    "xtick.color": _COLOURS["line"],
    "ytick.color": _COLOURS["line"],
    "xtick.labelcolor": _COLOURS["muted"],
    "ytick.labelcolor": _COLOURS["muted"],
    "legend.frameon": False,
}


def require_matplotlib() -> None:
    """Checks that plots can be drawn.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError('the report needs matplotlib; run pip install "scd_robot[sim]"')


def success_plot(result: EvaluationResult) -> str:
    """SVG of the success rate with its 95 % interval."""
    figure = _Figure(2.2)
    axes = figure.axes
    low, high = (100 * bound for bound in result.interval)
    axes.barh(0, 100, height=0.4, color=_COLOURS["line"], alpha=0.5)
    if result.success_rate is not None:
        axes.barh(0, 100 * result.success_rate, height=0.4, color=_COLOURS["success"])
    axes.errorbar((low + high) / 2, 0, xerr=(high - low) / 2, color=_COLOURS["ink"], capsize=7, linewidth=1.6)
    for bound, alignment in ((low, "right"), (high, "left")):
        axes.text(min(max(bound, 9), 91), 0.3, f"{bound:.1f}", ha=alignment, color=_COLOURS["ink"])
    axes.set_xlim(0, 100.5)
    axes.set_ylim(-0.6, 0.6)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("success [%], with 95 % interval")
    return figure.svg(f"Success rate between {low:.1f} and {high:.1f} percent")


def steps_plot(result: EvaluationResult) -> str:
    """SVG of the histogram of control steps to success."""
    figure = _Figure(2.2)
    steps = [e.steps for e in result.valid if e.success]
    if steps:
        bars = min(24, max(6, len(steps) // 2))
        width = (max(steps) - min(steps)) // bars + 1  # whole steps, so that no bar stays empty by rounding
        edges = np.arange(min(steps), max(steps) + width + 1, width) - 0.5
        figure.axes.hist(steps, bins=edges.tolist(), color=_COLOURS["success"], rwidth=0.92)
        median = float(np.median(steps))
        figure.axes.axvline(median, color=_COLOURS["ink"], linewidth=1.2, linestyle="--")
        figure.mark(median, f"median {median:g}")
    else:
        figure.say("no successes")
    figure.whole_number_ticks()
    figure.label("control steps to success", "episodes")
    return figure.svg("Histogram of control steps to success")


def latency_plot(result: EvaluationResult) -> str:
    """SVG of the histograms of encoder and plan latency; of whole calls where the policy does not tell them apart."""
    figure = _Figure(2.2)
    timings = {name: result.timings_ms.get(name, []) for name in ("encoder", "plan")}
    shown = {name: values for name, values in timings.items() if values} or {"act": result.timings_ms["act"]}
    if not any(shown.values()):
        figure.say("no calls")
        return figure.svg("No calls of the policy")
    longest = max(float(np.percentile(values, 99.5)) for values in shown.values())
    shortest = max(1e-3, min(float(np.min(values)) for values in shown.values()))
    edges = np.geomspace(shortest, max(longest, 1.2 * shortest), 40)
    colours = {"encoder": _COLOURS["accent"], "plan": _COLOURS["failure"], "act": _COLOURS["accent"]}
    batches = {"encoder": result.num_envs, "plan": result.plan_batch_size, "act": result.num_envs}
    for name, values in shown.items():
        rows = "" if batches[name] is None else f", batch {batches[name]:.3g}"
        label = f"{name}{rows} (median {np.median(values):.3g} ms)"
        weights = np.full(len(values), 100 / len(values))
        clipped = np.clip(values, edges[0], edges[-1])
        figure.axes.hist(clipped, bins=edges.tolist(), weights=weights, color=colours[name], alpha=0.75, label=label)
    figure.axes.set_xscale("log")
    figure.plain_log_ticks()
    figure.legend(columns=1)
    figure.label("wall time per call [ms]", "calls [%]")
    return figure.svg("Histogram of latencies")


def timeline_plot(result: EvaluationResult) -> str:
    """SVG with one bar per episode: its length, coloured by its outcome."""
    figure = _Figure(2.2)
    groups = {
        "success": [e for e in result.valid if e.success],
        "failure": [e for e in result.valid if not e.success],
        "invalid": [e for e in result.episodes_detail if e.invalid],
    }
    for outcome, episodes in groups.items():
        if episodes:
            colour = _COLOURS[outcome]
            figure.axes.bar([e.index for e in episodes], [e.steps for e in episodes], color=colour, label=outcome)
    figure.whole_number_ticks()
    figure.legend()
    figure.label("episode", "control steps")
    return figure.svg("Length and outcome of every episode")


def arms_plot(comparison: Comparison) -> str:
    """SVG of the success rates of two arms with their 95 % intervals, and a dot for each seed."""
    figure = _Figure(2.2)
    axes = figure.axes
    for row, arm in enumerate((comparison.a, comparison.b)):
        low, high = (100 * bound for bound in arm.interval)
        axes.barh(row, 100 * arm.rate, height=0.45, color=_COLOURS["accent"], alpha=0.75)
        axes.errorbar((low + high) / 2, row, xerr=(high - low) / 2, color=_COLOURS["ink"], capsize=6, linewidth=1.4)
        if len(arm.rates) > 1:
            axes.scatter(
                100 * arm.rates.mean(axis=1), [row] * len(arm.rates), s=18, color=_COLOURS["failure"], zorder=3
            )
    axes.set_xlim(0, 100.5)
    axes.set_ylim(1.6, -0.6)
    axes.set_yticks([0, 1], ["A", "B"])
    figure.label("success [%], with 95 % interval", "")
    return figure.svg("Success rates of both arms")


def age_plot(layers: Sequence[Mapping[str, Any]]) -> str:
    """SVG of the share of attention by the age of what is attended to, a line per layer, coloured in their order."""
    figure = _Figure(2.4)
    for number, layer in enumerate(layers):
        ages = [0, *map(int, layer["by_age"])]
        shares = [100 * layer["present"], *(100 * share for share in layer["by_age"].values())]
        colour = _blend(number, len(layers))
        figure.axes.plot(range(len(ages)), shares, marker="o", markersize=3, color=colour, label=str(number))
        figure.axes.set_xticks(range(len(ages)), [str(age) for age in ages])
    figure.axes.set_ylim(bottom=0)
    figure.legend_beside("layer")
    figure.label("age from ... on [control steps]", "attention [%]")
    return figure.svg("Attention by age")


def layers_plot(
    x: Sequence[float],
    lines: Mapping[Any, Sequence[float | None]],
    x_label: str,
    y_label: str,
    legend: str = "layer",
) -> str:
    """SVG of a number for each layer, a line per layer, coloured in their order; a single line has no name."""
    figure = _Figure(2.4)
    for number, (layer, values) in enumerate(lines.items()):
        known = [(at, value) for at, value in zip(x, values, strict=True) if value is not None]
        colour = _blend(number, len(lines))
        figure.axes.plot(*zip(*known, strict=True), marker="o", markersize=3, color=colour, label=str(layer))
    if len(lines) > 1:
        figure.legend_beside(legend)
    if all(float(at).is_integer() for at in x):
        figure.axes.set_xticks(list(x)[:: -(-len(x) // _MOST_TICKS)])
    figure.label(x_label, y_label)
    return figure.svg(f"{y_label} by {x_label}")


def flight_plot(times: Sequence[float], lines: Mapping[str, Sequence[float]], marks: Sequence[float], y: str) -> str:
    """SVG of numbers over time [s], the first line the strongest, with dashes where faults began; NaN leaves gaps."""
    figure = _Figure(2.2)
    for number, (name, values) in enumerate(lines.items()):
        colour = _COLOURS["accent" if number == 0 else "muted"]
        figure.axes.plot(times, values, color=colour, linewidth=1.2 if number == 0 else 0.8, label=name)
    for at in marks:
        figure.axes.axvline(at, color=_COLOURS["failure"], linewidth=0.8, linestyle="--")
    if len(lines) > 1:
        figure.legend()
    figure.label("time before the end of the record [s]", y)
    return figure.svg(f"{y} over time")


def bars_plot(rates: Mapping[str, tuple[float | None, Sequence[float]]]) -> str:
    """SVG of success rates with their intervals, by name."""
    figure = _Figure(0.9 + 0.22 * len(rates))
    for row, (rate, interval) in enumerate(rates.values()):
        low, high = (100 * bound for bound in interval)
        if rate is not None:
            figure.axes.barh(row, 100 * rate, height=0.55, color=_COLOURS["success"], alpha=0.75)
        figure.axes.errorbar((low + high) / 2, row, xerr=(high - low) / 2, color=_COLOURS["ink"], capsize=4)
    figure.axes.set_yticks(range(len(rates)), list(rates))
    figure.axes.tick_params(axis="y", labelcolor=_COLOURS["ink"])
    figure.axes.set_ylim(len(rates) - 0.4, -0.6)
    figure.axes.set_xlim(0, 100.5)
    figure.label("success [%], with 95 % interval", "")
    return figure.svg("Success by kind")


def cuts_plot(cuts: Sequence[Mapping[str, Any]], whole: Mapping[str, Any]) -> str:
    """SVG of success against the control steps of history that a policy plans with.

    Args:
        cuts: evaluations with a history cut to `window` control steps, each with `rate` and `interval`.
        whole: the same of the evaluation with all of its history, for a line with its interval as a band.
    """
    figure = _Figure(2.4)
    axes = figure.axes
    known = sorted((cut for cut in cuts if cut["rate"] is not None), key=lambda cut: cut["window"])
    steps = [cut["window"] for cut in known]
    rates = np.array([100 * cut["rate"] for cut in known])
    spread = np.abs(100 * np.array([cut["interval"] for cut in known]).reshape(-1, 2).T - rates)
    axes.errorbar(
        steps, rates, yerr=spread, color=_COLOURS["accent"], marker="o", capsize=4, linewidth=1.6, label="cut"
    )
    if whole["rate"] is not None:
        low, high = (100 * bound for bound in whole["interval"])
        axes.axhspan(low, high, color=_COLOURS["success"], alpha=0.18, linewidth=0)
        axes.axhline(100 * whole["rate"], color=_COLOURS["success"], linewidth=1.6, linestyle="--", label="whole")
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(count) for count in steps])
    axes.set_xticks([], minor=True)
    axes.set_ylim(-3, 103)
    figure.legend()
    figure.label("control steps of history", "success [%], with 95 % interval")
    return figure.svg("Success against the length of the history")


def delay_plot(curve: Sequence[Mapping[str, Any]]) -> str:
    """SVG of success against the delay of observations; `curve` as in `delay_curve`."""
    figure = _Figure(2.4)
    known = sorted((point for point in curve if point["success_rate"] is not None), key=lambda p: p["latency_ms"])
    delays = [point["latency_ms"] for point in known]
    rates = np.array([100 * point["success_rate"] for point in known])
    bounds = 100 * np.array([point["interval"] for point in known]).reshape(-1, 2).T
    spread = np.abs(bounds - rates)
    figure.axes.errorbar(delays, rates, yerr=spread, color=_COLOURS["accent"], marker="o", capsize=4, linewidth=1.6)
    figure.axes.set_ylim(-3, 103)
    figure.label("observations late by [ms]", "success [%], with 95 % interval")
    return figure.svg("Success against the delay of observations")


def pairs_plot(comparison: Comparison) -> str:
    """SVG with one bar per start state: how much more often A solves it than B."""
    figure = _Figure(2.2)
    gap = 100 * (comparison.a.rates.mean(axis=0) - comparison.b.rates.mean(axis=0))
    for sign, name, label in ((1, "success", "A more often"), (-1, "failure", "B more often")):
        chosen = sign * gap > 0
        if chosen.any():
            figure.axes.bar(comparison.indices[chosen], gap[chosen], color=_COLOURS[name], label=label)
    figure.axes.set_ylim(-105, 105)
    if gap.any():
        figure.axes.axhline(0, color=_COLOURS["line"], linewidth=0.8)
        figure.legend()
    else:
        figure.say("no start state told them apart", height=0.62)
    figure.label("episode", "A minus B [points]")
    return figure.svg("Start states that one arm solves more often than the other")


class _Figure:
    """A small figure with one pair of axes, in the house style."""

    def __init__(self, height_in: float) -> None:
        import matplotlib
        from matplotlib.figure import Figure

        self._context = matplotlib.rc_context
        with self._context(_STYLE):
            self._figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
            self.axes: Axes = self._figure.add_subplot()

    def label(self, x: str, y: str) -> None:
        with self._context(_STYLE):
            self.axes.set_xlabel(x)
            self.axes.set_ylabel(y)
            self.axes.grid(axis="y")

    def legend(self, columns: int = 3) -> None:
        style: Any = {"borderaxespad": 0, "fontsize": 8, **_COMPACT}
        with self._context(_STYLE):
            self.axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, **style)

    def legend_beside(self, title: str) -> None:
        """In the order of the lines, to the right of the axes; long ones in two columns."""
        columns = 1 + (len(self.axes.lines) > 10)
        with self._context(_STYLE):
            self.axes.legend(
                loc="center left", bbox_to_anchor=(1.0, 0.5), title=title, ncols=columns, fontsize=8, title_fontsize=8,
                labelspacing=0.3, **_COMPACT,
            )  # fmt: skip

    def mark(self, x: float, text: str) -> None:
        transform = self.axes.get_xaxis_transform()
        self.axes.text(x, 1.02, text, transform=transform, ha="center", color=_COLOURS["ink"])

    def say(self, text: str, height: float = 0.5) -> None:
        style: Any = {"ha": "center", "va": "center", "color": _COLOURS["muted"]}
        self.axes.text(0.5, height, text, transform=self.axes.transAxes, **style)

    def whole_number_ticks(self) -> None:
        from matplotlib.ticker import MaxNLocator

        self.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        self.axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))

    def plain_log_ticks(self) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        self.axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        self.axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        self.axes.xaxis.set_minor_formatter(NullFormatter())

    def svg(self, description: str) -> str:
        """The figure as an `<svg>` element that fills the width it is given."""
        buffer = io.StringIO()
        with self._context({**_STYLE, "svg.hashsalt": description}):
            self._figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r' width="[\d.]+pt"| height="[\d.]+pt"', "", text, count=2)
        text = text.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
        text = text.replace("'DejaVu Sans'", "system-ui")
        for name, placeholder in _COLOURS.items():
            text = text.replace(placeholder, f"var(--{name})")
        return re.sub(rf"{_BLEND}([0-9a-f]{{2}})", _blended, text)


def _blend(number: int, count: int) -> str:
    """Colour of one of several things in order."""
    return f"{_BLEND}{round(254 * number / max(1, count - 1)):02x}"


def _blended(placeholder: re.Match[str]) -> str:
    """The same as CSS."""
    at = int(placeholder[1], 16) / 127  # 0 to 2
    first, second = _SCALE[int(at > 1) :][:2]
    return f"color-mix(in oklch, var(--{second}) {100 * (at - (at > 1)):.0f}%, var(--{first}))"
