"""The report of a comparison: one HTML file; start states on which the arms differ come first, side by side."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from scd_robot.output import write_text
from scd_robot.sim_eval.comparison import NO_COUNT, Comparison
from scd_robot.sim_eval.page import counted, html_page, html_table, html_video

__all__ = ["Videos", "write_comparison"]

Videos = Mapping[int, Path]  # by episode


def write_comparison(comparison: Comparison, path: Path, videos_a: Videos = {}, videos_b: Videos = {}) -> None:  # noqa: B006
    """Writes the report.

    Args:
        comparison: what to report.
        path: of the HTML file.
        videos_a: of arm A, by episode.
        videos_b: of arm B; the discordant start states are shown where both have one.

    Raises:
        OutputError: it cannot be written, or a video cannot be read.
        MissingDependencyError: matplotlib is not installed.
    """
    title = f"{comparison.a.name} against {comparison.b.name} in {comparison.environment}"
    sections = [_headline(comparison), _numbers(comparison), _plots(comparison)]
    sections += [_videos(comparison, videos_a, videos_b), _episodes(comparison)]
    write_text(path, html_page(title, [section for section in sections if section]))


def _headline(comparison: Comparison) -> str:
    low, high = (100 * bound for bound in comparison.interval)
    bounds = "" if comparison.sequential else f"; 95 % interval {low:+.1f} to {high:+.1f} points"
    a, b = escape(comparison.a.name), escape(comparison.b.name)
    return (
        f"<header><h1>A: {a} <span class='muted'>against</span> B: {b} <span class='muted'>in</span> "
        f"{escape(comparison.environment)}</h1><div class='rate'>{100 * comparison.difference:+.1f} points</div>"
        f"<p>A minus B over {counted(len(comparison.indices), 'start state')}{bounds}.</p>"
        f"<p>{escape(comparison.verdict)}</p></header>"
        + "".join(f"<p class='note'>{escape(note)}</p>" for note in comparison.notes)
    )


def _numbers(comparison: Comparison) -> str:
    document = comparison.to_json()
    rows = []
    for key in ("a", "b"):
        arm = document[key]
        low, high = (100 * bound for bound in arm["interval"])
        rates = ", ".join(f"{100 * rate:.1f} %" for rate in arm["seeds"])
        rows.append(
            (
                key.upper(),
                escape(arm["name"]),
                f"{arm['successes']} of {arm['episodes']}",
                f"{100 * arm['success_rate']:.1f} % ({low:.1f} to {high:.1f})",
                rates,
            )
        )
    table = html_table(rows, ("arm", "policy", "successes", "success, 95 %", "by seed"))
    lines = []
    if not comparison.sequential:
        lines.append(f"Interval of the difference: {document['interval_method']}.")
        lines.append(_non_inferiority(document))
    if comparison.left_out:
        lines.append(f"{counted(comparison.left_out, 'other episode')} not valid in all evaluations, and left out.")
    if pair := document["pair"]:
        test = "" if pair["p_value"] is None else f"exact McNemar p = {pair['p_value']:.3g}; "
        lines.append(
            f"Both solved {pair['both']}, only A {pair['only_a']}, only B {pair['only_b']}, none {pair['neither']}; "
            f"{test}evidence {document['evidence']:.3g}."
        )
    if comparison.sequential and not comparison.decided:
        lines.append(NO_COUNT)
    if document["episodes_needed"] is not None:
        lines.append(
            f"About {document['episodes_needed']} start states tell a difference like this one in four of five cases."
        )
    text = "".join(f"<p class='muted'>{line}</p>" for line in lines)
    return f"<h2>Numbers</h2><div class='card scroll'>{table}{text}</div>"


def _non_inferiority(document: Mapping[str, Any]) -> str:
    """Whether A is shown non-inferior, of what, and by how many start states it would be."""
    narrow = document["pair"] is None and document["about"] == "checkpoints"
    of_what = ", of these checkpoints, not of the recipes behind them" if narrow else ""
    answer = "yes" if document["non_inferior"] else "no"
    text = f"Non-inferior (lower end above -{100 * document['margin']:g} points{of_what}): {answer}."
    if not document["non_inferior"] and document["episodes_not_inferior"] is not None:
        text += f" {document['episodes_not_inferior']} start states with the same shares of outcomes would show it."
    return text


def _plots(comparison: Comparison) -> str:
    from scd_robot.sim_eval import plots

    plots.require_matplotlib()
    drawn = (
        ("Success by arm and seed", plots.arms_plot(comparison)),
        ("Start states", plots.pairs_plot(comparison)),
    )
    cards = (f"<div class='card'><h3>{name}</h3>{svg}</div>" for name, svg in drawn)
    return f"<h2>Plots</h2><div class='plots'>{''.join(cards)}</div>"


def _order(comparison: Comparison) -> list[int]:
    """Columns, those first that A solves least often compared with B."""
    a, b = comparison.a.rates.mean(axis=0), comparison.b.rates.mean(axis=0)
    return [int(i) for i in np.lexsort((comparison.indices, a, a - b))]


def _videos(comparison: Comparison, videos_a: Videos, videos_b: Videos) -> str:
    figures: list[str] = []
    for column in comparison.discordant(len(comparison.indices)):
        episode = int(comparison.indices[column])
        if episode not in videos_a or episode not in videos_b:
            continue
        for name, videos, success in (
            ("A", videos_a, comparison.a.success),
            ("B", videos_b, comparison.b.success),
        ):
            caption = f"{_badge(bool(success[0, column]))} {name}, episode {episode}"
            figures.append(html_video(videos[episode], caption))
    return f"<h2>Where only one succeeds</h2><div class='videos pairs'>{''.join(figures)}</div>" if figures else ""


def _episodes(comparison: Comparison) -> str:
    rows = []
    for column in _order(comparison):
        cells = [str(int(comparison.indices[column]))]
        for success in (comparison.a.success[:, column], comparison.b.success[:, column]):
            cells.append(_badge(bool(success[0])) if len(success) == 1 else f"{int(success.sum())} of {len(success)}")
        rows.append(tuple(cells))
    table = html_table(rows, ("episode", "A", "B"))
    summary = f"<summary class='muted'>{counted(len(rows), 'start state')}, A's losses first</summary>"
    return f"<h2>Start states</h2><details class='card'>{summary}<div class='scroll'>{table}</div></details>"


def _badge(success: bool) -> str:
    outcome = "success" if success else "failure"
    return f"<span class='badge {outcome}'>{outcome}</span>"
