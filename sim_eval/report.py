"""The report of an evaluation: one HTML file that needs no network, with its plots and videos inside.

Failures come first everywhere: they are what one opens a report for.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from scd_robot.errors import OutputError
from scd_robot.output import write_text
from scd_robot.sim_eval import plots
from scd_robot.sim_eval.result import EpisodeRecord, EvaluationResult

__all__ = ["render_report", "write_report"]

_OPEN_TABLE_ROWS = 60

_CSS = """
:root { color-scheme: light dark; --ink: #1c2430; --muted: #5d6878; --line: #d9dee6; --page: #f5f7fa; --card: #ffffff;
  --success: #1f8a70; --failure: #d1603d; --invalid: #8a92a0; --accent: #3b6fb6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ecf2; --muted: #9aa5b5; --line: #323b48; --page: #12161c;
  --card: #1b2129; --success: #3fb594; --failure: #e5805f; --invalid: #7b8595; --accent: #6d9fe3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { margin: 0; font-size: 1.05rem; font-weight: 600; overflow-wrap: anywhere; }
h2 { margin: 40px 0 12px; font-size: 1.2rem; }
h3 { margin: 0 0 8px; font-size: .95rem; }
p { margin: 4px 0; }
.muted { color: var(--muted); }
.rate { font-size: 3.2rem; font-weight: 700; line-height: 1.15; letter-spacing: -.02em; margin-top: 12px; }
.note { border-left: 4px solid var(--failure); padding: 8px 14px; background: var(--card); border-radius: 4px;
  margin-top: 16px; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 24px; }
.plots, .videos { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
.videos { grid-template-columns: repeat(auto-fill, minmax(min(100%, 280px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px; min-width: 0; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: .85rem; }
svg { display: block; width: 100%; height: auto; }
video { display: block; width: 100%; border-radius: 6px; background: #000; }
figure { margin: 0; }
figcaption { margin-top: 8px; font-size: .9rem; overflow-wrap: anywhere; }
.badge { display: inline-block; padding: 0 8px; border: 1px solid; border-radius: 99px; font-size: .8rem;
  font-weight: 600; }
.success { color: var(--success); } .failure { color: var(--failure); } .invalid { color: var(--invalid); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 500; }
td.wrap { overflow-wrap: anywhere; min-width: 12ch; }
summary { cursor: pointer; margin-bottom: 8px; }
code { font-size: .85em; }
"""


def write_report(result: EvaluationResult, path: Path) -> None:
    """Writes the report; the videos are read from the result's output folder.

    Raises:
        OutputError: it cannot be written, or a video cannot be read.
        MissingDependencyError: matplotlib is not installed.
    """
    write_text(path, render_report(result, path.parent))


def render_report(result: EvaluationResult, folder: Path) -> str:
    """The report as one HTML document.

    Args:
        result: what to report.
        folder: what the paths of its videos are relative to.

    Raises:
        OutputError: a video cannot be read.
        MissingDependencyError: matplotlib is not installed.
    """
    plots.require_matplotlib()
    document = result.to_json()
    title = f"{result.environment.name}: {result.successes} of {len(result.valid)} succeeded"
    sections = (_headline(result), _tiles(document), _videos(result, folder), _plots(result), _episodes(result))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + _settings(document)
        + "\n</main>\n</body>\n</html>\n"
    )


def _headline(result: EvaluationResult) -> str:
    low, high = (100 * bound for bound in result.interval)
    rate = "no valid episode" if result.success_rate is None else f"{100 * result.success_rate:.1f} % success"
    notes = []
    if result.invalid:
        notes.append(
            f"{_count(result.invalid, 'episode')} invalid: the simulator crashed twice. They count neither as "
            "successes nor as failures."
        )
    if result.video_error:
        notes.append(f"Videos are missing: {result.video_error}.")
    return (
        f"<header><h1>{escape(result.policy)} <span class='muted'>in</span> {escape(result.environment.name)}</h1>"
        f"<div class='rate'>{rate}</div>"
        f"<p>{result.successes} of {_count(len(result.valid), 'episode')}; 95 % interval {low:.1f} to {high:.1f} %.</p>"
        f"<p class='muted'>Success: {escape(result.environment.success.rstrip('.'))}. "
        f"An episode ends at its first success, or after {result.max_steps} control steps.</p></header>"
        + "".join(f"<p class='note'>{escape(note)}</p>" for note in notes)
    )


def _tiles(document: dict[str, Any]) -> str:
    tiles = []
    if time := document["time_to_success"]:
        tiles.append((f"{time['steps']['median']:g} steps", f"median to success ({time['seconds']['median']:.2f} s)"))
    for key, name in (("encoder_ms", "encoder step"), ("plan_ms", "plan"), ("act_ms", "policy call")):
        if found := document[key]:
            batch = document["timing_batch_size"]
            tiles.append((f"{found['p50']:.3g} ms", f"{name}, median at batch {batch} (p95 {found['p95']:.3g} ms)"))
    tiles.append((f"{document['wall_s']:.1f} s", f"for all episodes, {_count(document['num_envs'], 'environment')}"))
    cards = (f"<div class='card tile'><b>{value}</b><span>{name}</span></div>" for value, name in tiles)
    return f"<div class='tiles'>{''.join(cards)}</div>"


def _videos(result: EvaluationResult, folder: Path) -> str:
    if not result.videos:
        return ""
    records = {e.index: e for e in result.episodes_detail}
    figures = []
    for video in sorted(result.videos, key=lambda v: (v.success, v.episode)):
        try:
            data = base64.b64encode((folder / video.file).read_bytes()).decode("ascii")
        except OSError as error:
            raise OutputError(f"cannot read the video {folder / video.file}: {error.strerror or error}") from error
        record = records[video.episode]
        figures.append(
            f"<figure class='card'><video controls muted loop playsinline preload='auto' "
            f"src='data:video/mp4;base64,{data}'></video><figcaption>{_badge(record)} episode {record.index}, "
            f"{_count(record.steps, 'step')}{_detail(record)}</figcaption></figure>"
        )
    return f"<h2>Videos</h2><div class='videos'>{''.join(figures)}</div>"


def _plots(result: EvaluationResult) -> str:
    drawn = (
        ("Success", plots.success_plot(result)),
        ("Time to success", plots.steps_plot(result)),
        ("Latency", plots.latency_plot(result)),
        ("Episodes", plots.timeline_plot(result)),
    )
    cards = (f"<div class='card'><h3>{name}</h3>{svg}</div>" for name, svg in drawn)
    return f"<h2>Plots</h2><div class='plots'>{''.join(cards)}</div>"


def _episodes(result: EvaluationResult) -> str:
    episodes = sorted(result.episodes_detail, key=lambda e: (e.success, e.invalid, e.index))
    rows = (
        (
            str(e.index),
            _badge(e),
            str(e.steps),
            f"{e.steps * result.environment.control_dt:.2f}",
            f"{e.total_reward:.4g}",
            "-" if e.best_reward is None else f"{e.best_reward:.4g}",
            escape(e.reason),
            str(e.seed),
            f"<code>{escape((e.initial_state_hash or '-')[:12])}</code>",
        )
        for e in episodes
    )
    names = ("episode", "outcome", "steps", "seconds", "return", "best reward", "ended by", "seed", "start state")
    table = _table(rows, names)
    state = " open" if len(episodes) <= _OPEN_TABLE_ROWS else ""
    summary = f"<summary class='muted'>{_count(len(episodes), 'episode')}, failures first</summary>"
    return f"<h2>Episodes</h2><details class='card'{state}>{summary}<div class='scroll'>{table}</div></details>"


def _settings(document: dict[str, Any]) -> str:
    seeds = document["seeds"]
    settings = {
        "environment": document["env"],
        "policy": document["policy"],
        "episodes": f"{seeds['first_episode']} to {seeds['first_episode'] + document['episodes'] - 1}",
        "seed domain": seeds["domain"],
        "environments side by side": document["num_envs"],
        "longest episode": f"{_count(document['max_steps'], 'control step')} of {document['control_dt']:g} s",
        **document["versions"],
    }
    rows = ((escape(str(name)), escape(str(value))) for name, value in settings.items())
    return f"<h2>Settings and versions</h2><div class='card scroll'>{_table(rows)}</div>"


def _table(rows: Iterable[Sequence[str]], names: Sequence[str] = ()) -> str:
    """A table of cells that are HTML already; without `names` the first column is the heading."""
    head = f"<thead><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr></thead>" if names else ""
    first = "td" if names else "th"
    body = "".join(
        f"<tr><{first}>{row[0]}</{first}>" + "".join(f"<td class='wrap'>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _badge(record: EpisodeRecord) -> str:
    outcome = "invalid" if record.invalid else "success" if record.success else "failure"
    return f"<span class='badge {outcome}'>{outcome}</span>"


def _detail(record: EpisodeRecord) -> str:
    return "" if record.success else f", {escape(record.reason)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
