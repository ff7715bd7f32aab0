"""A validation for people: as text for a terminal, and as one HTML file that needs no network."""

import base64
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from scd_robot.datasets import plots
from scd_robot.datasets.validation.findings import Finding, Place, counted
from scd_robot.datasets.validation.pictures import finding_picture
from scd_robot.datasets.validation.run import Validation
from scd_robot.output import write_text

__all__ = ["format_validation", "render_validation_page", "write_validation_page"]

_WIDTH = 120
_PLACES_IN_TEXT = 4

_CSS = """
:root { color-scheme: light dark; --ink: #1c2430; --muted: #5d6878; --line: #d9dee6; --page: #f5f7fa; --card: #ffffff;
  --good: #1f8a70; --error: #c2452d; --warning: #b3700d; --note: #3b6fb6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ecf2; --muted: #9aa5b5; --line: #323b48; --page: #12161c;
  --card: #1b2129; --good: #3fb594; --error: #ec7a61; --warning: #e0a44a; --note: #6d9fe3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { margin: 0; font-size: 1rem; font-weight: 500; color: var(--muted); overflow-wrap: anywhere; }
h2 { margin: 40px 0 12px; font-size: 1.2rem; }
.verdict { font-size: 2.3rem; font-weight: 700; line-height: 1.2; letter-spacing: -.02em; margin: 8px 0 4px; }
.muted { color: var(--muted); } .good { color: var(--good); } .error { color: var(--error); }
.warning { color: var(--warning); } .note { color: var(--note); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px; margin-top: 20px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px; min-width: 0; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 8px 14px 8px 0; vertical-align: top; }
th { color: var(--muted); font-weight: 500; }
tbody.row td, .keys td, thead th { border-top: 1px solid var(--line); }
thead th { border-top: 0; }
tbody.row tr + tr td { border-top: 0; padding-top: 0; }
.number { text-align: right; }
td.message { overflow-wrap: anywhere; min-width: 24ch; width: 60%; }
.badge { display: inline-block; padding: 0 8px; border: 1px solid; border-radius: 99px; font-size: .8rem;
  font-weight: 600; }
.filters { display: flex; gap: 8px; flex-wrap: wrap; margin-bottom: 8px; }
.filters label { border: 1px solid var(--line); border-radius: 99px; padding: 2px 12px; cursor: pointer;
  background: var(--card); font-size: .9rem; }
img { display: block; max-width: 100%; background: #fff; border-radius: 6px; border: 1px solid var(--line); }
summary { cursor: pointer; color: var(--muted); font-size: .85rem; }
code { font-size: .92em; }
"""

_SCRIPT = """
for (const box of document.querySelectorAll(".filters input")) {
  box.addEventListener("change", () => {
    for (const row of document.querySelectorAll(`tbody[data-severity="${box.value}"]`)) row.hidden = !box.checked;
  });
}
"""


def format_validation(validation: Validation) -> str:
    """The findings as text of at most 120 columns, errors first."""
    lines = [validation.path]
    if validation.dataset is not None:
        lines[0] += f": {validation.dataset.num_episodes:,} episodes, {validation.dataset.num_steps:,} control steps"
    columns = [(f.severity, f.check.replace("_", " "), _text_where(f, validation)) for f in validation.findings]
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    for finding, cells in zip(validation.findings, columns, strict=True):
        head = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        message = textwrap.wrap(finding.message, _WIDTH - 4)
        lines += ["", head, *(f"    {line}" for line in message)]
    numbers = ", ".join(counted(number, severity) for severity, number in validation.counts.items())
    return "\n".join([*lines, "", f"{_verdict(validation)}: {numbers}"])


def write_validation_page(validation: Validation, path: Path | str) -> None:
    """Writes the findings as a page with pictures.

    Raises:
        OutputError: it cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    plots.require_matplotlib()
    write_text(Path(path), render_validation_page(validation))


def render_validation_page(validation: Validation) -> str:
    """The page as one HTML document.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    title = f"{_verdict(validation)}: {validation.path}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join((_headline(validation), _findings(validation), _keys(validation)))
        + f"\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _verdict(validation: Validation) -> str:
    if validation.spoils_training:
        return "Would spoil training"
    return "Fit for training, with warnings" if validation.counts["warning"] else "Fit for training"


def _headline(validation: Validation) -> str:
    worst = "error" if validation.spoils_training else "warning" if validation.counts["warning"] else "good"
    tiles = [
        (f"<b class='{severity if number else 'muted'}'>{number}</b>", f"{severity}{'' if number == 1 else 's'}")
        for severity, number in validation.counts.items()
    ]
    dataset = validation.dataset
    source = ""
    if dataset is not None:
        seconds = dataset.num_steps * dataset.spec.control_dt
        tiles += [
            (f"<b>{dataset.num_episodes:,}</b>", "episodes"),
            (f"<b>{dataset.num_steps:,}</b>", "control steps"),
            (f"<b>{seconds / 60:,.1f} min</b>", f"at {1 / dataset.spec.control_dt:.4g} Hz"),
        ]
        source = f"<p class='muted'>{escape(dataset.spec.source)}</p>"
    cards = "".join(f"<div class='card tile'>{value}<span>{name}</span></div>" for value, name in tiles)
    return (
        f"<header><h1>{escape(validation.path)}</h1><div class='verdict {worst}'>{_verdict(validation)}</div>{source}"
        f"</header><div class='tiles'>{cards}</div>"
    )


def _findings(validation: Validation) -> str:
    if not validation.findings:
        return "<h2>Findings</h2><p class='card'>All checks passed, and nothing is worth a note.</p>"
    filters = "".join(
        f"<label><input type='checkbox' value='{severity}' checked> "
        f"<span class='{severity}'>{counted(number, severity)}</span></label>"
        for severity, number in validation.counts.items()
        if number
    )
    head = "".join(f"<th>{name}</th>" for name in ("severity", "check", "array", "first place", "finding"))
    rows = "".join(_finding(finding, validation) for finding in validation.findings)
    return (
        f"<h2>Findings</h2><div class='filters'>{filters}</div>"
        f"<div class='card scroll'><table><thead><tr>{head}</tr></thead>{rows}</table></div>"
    )


def _finding(finding: Finding, validation: Validation) -> str:
    first = _place(finding.places[0], validation) if finding.places else ""
    more = ""
    if len(finding.places) > 1:
        places = "; ".join(_place(place, validation) for place in finding.places)
        left_out = " and more" if finding.count > len(finding.places) else ""
        more = f"<details><summary>all places</summary>{escape(places)}{left_out}</details>"
    cells = (
        f"<td><span class='badge {finding.severity}'>{finding.severity}</span></td>"
        f"<td>{escape(finding.check.replace('_', ' '))}</td><td><code>{escape(finding.key)}</code></td>"
        f"<td>{escape(first)}</td><td class='message'>{escape(finding.message)}{more}</td>"
    )
    picture = finding_picture(validation.dataset, finding) if validation.dataset is not None else None
    shown = ""
    if picture is not None:
        data = base64.b64encode(picture).decode("ascii")
        shown = (
            f"<tr><td></td><td colspan='4'><details{' open' if finding.severity != 'note' else ''}>"
            f"<summary>picture</summary><img alt='{escape(finding.check)} in {escape(finding.key)}, {escape(first)}' "
            f"src='data:image/png;base64,{data}'></details></td></tr>"
        )
    return f"<tbody class='row' data-severity='{finding.severity}'><tr>{cells}</tr>{shown}</tbody>"


def _keys(validation: Validation) -> str:
    if not validation.keys:
        return ""
    worst = {f.key: f.severity for f in reversed(validation.findings)}
    rows = []
    for key, entry in validation.keys.items():
        severity = worst.get(key)
        state = f"<span class='{severity}'>{severity}</span>" if severity else "<span class='good'>none</span>"
        number = ["" if entry.get(name) is None else f"{entry[name]:.6g}" for name in ("min", "max")]
        rows.append(
            (
                f"<code>{escape(key)}</code>",
                " x ".join(map(str, entry["shape"])) or "1",
                escape(entry["dtype"]),
                *number,
                state,
            )
        )
    return f"<h2>Arrays</h2><div class='card scroll'>{_table(rows)}</div>"


def _table(rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("array", "shape", "dtype", "lowest", "highest", "worst finding"))
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table class='keys'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text_where(finding: Finding, validation: Validation) -> str:
    places = "; ".join(_place(place, validation) for place in finding.places[:_PLACES_IN_TEXT])
    more = "; ..." if len(finding.places) > _PLACES_IN_TEXT else ""
    return f"{finding.key}  {places}{more}".strip()


def _place(place: Place, validation: Validation) -> str:
    """Episode and step, with the number and the name that the episode has in the file."""
    episode, step = place
    if validation.dataset is None:
        text = f"episode {episode}"
    else:
        names = validation.dataset.episode_text.get("name")
        text = f"episode {validation.dataset.number(episode)}" + (f" ({names[episode]})" if names is not None else "")
    return text if step is None else f"{text} step {step}"
