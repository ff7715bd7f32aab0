"""The page of a history diagnosis, and its lines for people."""

from html import escape
from pathlib import Path
from typing import Any

from scd_robot.output import write_json, write_text
from scd_robot.sim_eval.page import html_page, html_table

__all__ = ["format_history", "write_history"]

_COLUMNS = ("history", "successes", "against control [points]", "change of plans [std]")
_LEGEND = (
    "Intervals are 95 %: Wilson's of successes; the paired one (Newcombe) of the difference to control from the same "
    "start states, with the exact McNemar p; bootstrap over episodes of changes of plans and of the copycat ratio."
)


def format_history(document: dict[str, Any]) -> str:
    """A few lines: what each kind of history does to success and to plans."""
    rows = [_COLUMNS, *_rows(document)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{document['env']}: {_length(document)}, {document['episodes']} episodes",
        *("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows),
        *(f"  {line}" for line in _sentences(document)),
        "  intervals: 95 %, of successes Wilson, of differences paired Newcombe (p: exact McNemar), else bootstrap",
    ]
    return "\n".join(lines)


def write_history(document: dict[str, Any], out: Path) -> None:
    """Writes `history.json` and `history.html` into a folder.

    Raises:
        OutputError: they cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    from scd_robot.sim_eval.plots import age_plot, bars_plot, cuts_plot

    write_json(out / "history.json", document)
    success = document["success"]
    cuts = [counts for counts in success.values() if counts["window"] is not None]
    others = {name: (c["rate"], c["interval"]) for name, c in success.items() if c["window"] is None}
    drawn = {
        "Success by length of the history": cuts_plot(cuts, success["control"]),
        "Success by kind of history": bars_plot(others),
    }
    if document["attention_age"]:
        drawn["Age of what is attended to"] = age_plot(document["attention_age"])
    cards = "".join(f"<div class='card'><h3>{name}</h3>{svg}</div>" for name, svg in drawn.items())
    told = "".join(f"<p>{sentence[0].upper() + sentence[1:]}.</p>" for sentence in _sentences(document))
    head = (
        f"<header><h1>History of the policy in {escape(document['env'])}</h1>"
        f"<p class='muted'>{_length(document).capitalize()}, {document['episodes']} episodes.</p>{told}</header>"
    )
    table = html_table([[escape(cell) for cell in row] for row in _rows(document)], _COLUMNS)
    numbers = f"<h2>Numbers</h2><div class='card scroll'>{table}<p class='muted'>{_LEGEND}</p></div>"
    body = [head, f"<h2>Plots</h2><div class='plots'>{cards}</div>", numbers]
    write_text(out / "history.html", html_page(f"History in {document['env']}", body))


def _rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """A cell for each of `_COLUMNS`, for each kind of history, and for other noise."""
    changes = document["plan_change"]
    rows = [
        (
            kind,
            f"{counts['successes']}/{counts['episodes']} ({_percent(counts['interval'])})",
            _paired(counts["against_control"]),
            _change(changes.get(kind)),
        )
        for kind, counts in document["success"].items()
    ]
    return [*rows, ("other noise", "-", "-", _change(changes.get("noise")))]


def _length(document: dict[str, Any]) -> str:
    stride = document["history_stride"]
    seen = "control steps" if stride == 1 else f"control steps, each {stride} apart,"
    return f"history of {document['history_length']} {seen} per layer"


def _percent(interval: list[float]) -> str:
    return f"{100 * interval[0]:.1f}-{100 * interval[1]:.1f} %"


def _paired(pair: dict[str, Any] | None) -> str:
    if pair is None:
        return "-"
    low, high = pair["interval"]
    return f"{100 * pair['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}), p = {pair['p_value']:.2g}"


def _change(found: dict[str, Any] | None) -> str:
    """In standard deviations; of no plan where the kind changed no history."""
    if found is None:
        return "-"
    bounds = "" if found["interval"] is None else " ({:.2f}-{:.2f})".format(*found["interval"])
    return f"{found['mean']:.2f}{bounds}, {found['plans']} plans"


def _sentences(document: dict[str, Any]) -> list[str]:
    parity = document["cache_parity"]
    return [
        *_copycat(document["copycat"]),
        f"contexts of the control loop differ from those of training by at most {parity['max_difference']:.1e}; "
        f"they vary by {parity['standard_deviation']:.1e}",
    ]


def _copycat(found: dict[str, Any]) -> list[str]:
    if found["policy"] is None:
        return ["the actions never change: no copycat ratio"]
    bounds = {name: "" if given is None else f" ({_percent(given)})" for name, given in found["intervals"].items()}
    own = f"of an action the last one leaves {100 * found['policy']:.1f} %{bounds['policy']} unexplained"
    if found["ratio"] is None:
        return [own]
    given = found["intervals"]["ratio"]
    around = "" if given is None else " ({:.2f}-{:.2f})".format(*given)
    expert = f"{100 * found['demonstrations']:.1f} %{bounds['demonstrations']} in demonstrations"
    return [f"{own}, {expert}", f"copycat ratio {found['ratio']:.2f}{around}"]
