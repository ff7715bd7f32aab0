"""The page of a history diagnosis, and its lines for people."""

from html import escape
from pathlib import Path
from typing import Any

from scd_robot.output import write_json, write_text
from scd_robot.sim_eval.page import html_page, html_table

__all__ = ["format_history", "write_history"]


def format_history(document: dict[str, Any]) -> str:
    """A few lines: what each kind of history does to plans and to success."""
    lines = [
        f"{document['env']}: history of {document['history_length']} control steps, {document['episodes']} episodes"
    ]
    width = max(map(len, document["success"]))
    for kind, counts in document["success"].items():
        change = document["plan_change"].get(kind)
        shown = "" if change is None else f", plans change by {change:.2f} standard deviations"
        lines.append(f"  {kind:<{width}}  {counts['successes']}/{counts['episodes']}{shown}")
    noise = document["plan_change"].get("noise")
    if noise is not None:
        lines.append(f"  (other noise alone changes plans by {noise:.2f})")
    lines.append(f"  {_copycat(document['copycat'])}")
    if document["cache_parity"] is not None:
        lines.append(f"  contexts from the cache differ from one pass by at most {document['cache_parity']:.1e}")
    return "\n".join(lines)


def write_history(document: dict[str, Any], out: Path) -> None:
    """Writes `history.json` and `history.html` into a folder.

    Raises:
        OutputError: they cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    from scd_robot.sim_eval.plots import age_plot, bars_plot

    write_json(out / "history.json", document)
    success = {name: (counts["rate"], counts["interval"]) for name, counts in document["success"].items()}
    rows = [
        (
            kind,
            f"{counts['successes']} of {counts['episodes']}",
            "-" if kind not in document["plan_change"] else f"{document['plan_change'][kind]:.2f}",
        )
        for kind, counts in document["success"].items()
    ]
    table = html_table(rows, ("history", "successes", "change of plans [standard deviations]"))
    drawn = [("Success with this history", bars_plot(success))]
    parity = ""
    if document["attention_age"] is not None:
        drawn.append(("Age of what is attended to", age_plot(document["attention_age"])))
        parity = (
            "<p class='muted'>Contexts from the cache differ from one pass over the episode by at most "
            f"{document['cache_parity']:.1e}.</p>"
        )
    copycat = _copycat(document["copycat"])
    cards = "".join(f"<div class='card'><h3>{name}</h3>{svg}</div>" for name, svg in drawn)
    head = (
        f"<header><h1>History of the policy in {escape(document['env'])}</h1>"
        f"<p>{copycat[0].upper() + copycat[1:]}.</p>{parity}</header>"
    )
    numbers = f"<h2>Numbers</h2><div class='card scroll'>{table}</div>"
    body = [head, f"<h2>Plots</h2><div class='plots'>{cards}</div>", numbers]
    write_text(out / "history.html", html_page(f"History in {document['env']}", body))


def _copycat(found: dict[str, float | None]) -> str:
    if found["policy"] is None:
        return "the actions never change: no copycat ratio"
    own = f"the last action leaves {100 * found['policy']:.1f} % of the next unexplained"
    if found["ratio"] is None:
        return own
    demonstrations = 100 * (found["demonstrations"] or 0)
    return f"{own}, {demonstrations:.1f} % in the demonstrations (copycat ratio {found['ratio']:.2f})"
