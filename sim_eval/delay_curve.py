"""Success against the delay of observations: one evaluation per delay, from the same start states."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from scd_robot.output import write_json, write_text
from scd_robot.sim_eval.comparison import check_same_starts
from scd_robot.sim_eval.page import html_page, html_table

__all__ = ["delay_curve", "write_delay_curve"]

SCHEMA = 1


def delay_curve(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The evaluations' JSON as one document: `schema`, `env`, `curve` (a point for each), and `evaluations`.

    Raises:
        DatasetError: they did not start from the same states.
    """
    for document in documents[1:]:
        check_same_starts(documents[0], document)
    names = ("episodes", "successes", "invalid", "success_rate", "interval", "best_reward")
    curve = [
        {
            "latency_ms": document["faults"]["latency_ms"],
            **{name: document[name] for name in names},
            "best_reward_interval": document.get("best_reward_interval"),  # older evaluations have none
        }
        for document in documents
    ]
    return {"schema": SCHEMA, "env": documents[0]["env"], "curve": curve, "evaluations": list(documents)}


def write_delay_curve(document: dict[str, Any], out: Path) -> None:
    """Writes `latency.json` and `latency.html` into a folder.

    Raises:
        OutputError: they cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    from scd_robot.sim_eval.plots import delay_plot

    write_json(out / "latency.json", document)
    rows = []
    for point in document["curve"]:
        low, high = (100 * bound for bound in point["interval"])
        rate = point["success_rate"]
        shown = "-" if rate is None else f"{100 * rate:.1f} % ({low:.1f} to {high:.1f})"
        delay = f"{point['latency_ms']:g}"
        link = f"<a href='latency_{delay}ms/report.html'>{delay} ms</a>"
        rows.append((link, f"{point['successes']} of {point['episodes'] - point['invalid']}", shown))
    title = f"{document['env']}: success against delay"
    table = html_table(rows, ("observations late by", "successes", "success, Wilson 95 %"))
    plot = f"<h2>Curve</h2><div class='card'>{delay_plot(document['curve'])}</div>"
    body = f"<header><h1>{escape(title)}</h1></header>{plot}"
    write_text(out / "latency.html", html_page(title, [body, f"<div class='card scroll'>{table}</div>"]))
