"""The report of an evaluation: one HTML file that needs no network, with its plots and videos inside.

Failures come first everywhere: they are what one opens a report for.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from scd_robot.output import write_text
from scd_robot.sim_eval import plots
from scd_robot.sim_eval.faults import describe
from scd_robot.sim_eval.page import counted, html_page, html_table, html_video
from scd_robot.sim_eval.result import EpisodeRecord, EvaluationResult

__all__ = ["render_report", "write_report"]

_OPEN_TABLE_ROWS = 60


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
    return html_page(title, (*sections, _settings(document)))


def _headline(result: EvaluationResult) -> str:
    low, high = (100 * bound for bound in result.interval)
    rate = "no valid episode" if result.success_rate is None else f"{100 * result.success_rate:.1f} % success"
    notes = []
    if result.invalid:
        notes.append(
            f"{counted(result.invalid, 'episode')} invalid: the simulator crashed twice or did not start again. They "
            "count neither as successes nor as failures."
        )
    if result.faults.any:
        notes.append(f"Disturbed on purpose: {describe(result.faults.to_json())}.")
    if result.video_error:
        notes.append(f"Videos are missing: {result.video_error}.")
    return (
        f"<header><h1>{escape(result.policy)} <span class='muted'>in</span> {escape(result.environment.name)}</h1>"
        f"<div class='rate'>{rate}</div>"
        f"<p>{result.successes} of {counted(len(result.valid), 'episode')}; "
        f"95 % interval {low:.1f} to {high:.1f} %.</p>"
        f"<p class='muted'>Success: {escape(result.environment.success.rstrip('.'))}. "
        f"An episode ends at its first success, or after {result.max_steps} control steps.</p></header>"
        + "".join(f"<p class='note'>{escape(note)}</p>" for note in notes)
    )


def _tiles(document: dict[str, Any]) -> str:
    tiles = []
    if time := document["time_to_success"]:
        median, seconds = time["steps"]["median"], time["seconds"]["median"]
        tiles.append((f"{median:g} step{'s' * (median != 1)}", f"median to success ({seconds:.2f} s)"))
    if document["best_reward"] is not None:
        interval, name = document["best_reward_interval"], document["score_definition"] or "mean best reward"
        bounds = "" if interval is None else f" (95 %: {interval[0]:.3g} to {interval[1]:.3g})"
        tiles.append((f"{document['best_reward']:.3g}", escape(name) + bounds))
    for key, name in (("encoder_ms", "encoder step"), ("plan_ms", "plan"), ("act_ms", "policy call")):
        if found := document[key]:
            batch = document["plan_batch_size" if key == "plan_ms" else "timing_batch_size"]
            rows = "" if batch is None else f" at batch {batch:.3g}"
            tiles.append((f"{found['p50']:.3g} ms", f"{name}, median{rows} (p95 {found['p95']:.3g} ms)"))
    motion, unit = document["motion"], document["hand_unit"]
    for key, name in (("path_length", f"{unit} path of the hand"), ("jerk", f"{unit}/s³ jerk (root mean square)")):
        if motion[key] is not None:
            tiles.append((f"{motion[key]:.3g}", f"{name}, mean of episodes"))
    if motion["boundary_jump"] is not None:
        tiles.append((f"{motion['boundary_jump']:.2f}", "change of action between chunks over that within"))
    if context := document["contextual_success"]:
        words = f"of {counted(context['completed'], 'episode')} whose manipulation was completed succeeded"
        tiles.append((str(context["successes"]), words))
    tiles.append((f"{document['wall_s']:.1f} s", f"for all episodes, {counted(document['num_envs'], 'environment')}"))
    cards = (f"<div class='card tile'><b>{value}</b><span>{name}</span></div>" for value, name in tiles)
    return f"<div class='tiles'>{''.join(cards)}</div>"


def _videos(result: EvaluationResult, folder: Path) -> str:
    if not result.videos:
        return ""
    records = {e.index: e for e in result.episodes_detail}
    figures = []
    for video in sorted(result.videos, key=lambda v: (v.success, v.episode)):
        record = records[video.episode]
        caption = f"{_badge(record)} episode {record.index}, {counted(record.steps, 'step')}{_detail(record)}"
        figures.append(html_video(folder / video.file, caption))
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
    table = html_table(rows, names)
    state = " open" if len(episodes) <= _OPEN_TABLE_ROWS else ""
    summary = f"<summary class='muted'>{counted(len(episodes), 'episode')}, failures first</summary>"
    return f"<h2>Episodes</h2><details class='card'{state}>{summary}<div class='scroll'>{table}</div></details>"


def _numbers(indices: Sequence[int]) -> str:
    """Episodes as a range, and how many of it, where not all."""
    first, last = min(indices), max(indices)
    return f"{first} to {last}" + ("" if last - first + 1 == len(indices) else f", {len(indices)} of them")


def _settings(document: dict[str, Any]) -> str:
    seeds, made = document["seeds"], document["provenance"]
    settings = {
        "environment": document["env"],
        "policy": document["policy"],
        "episodes": _numbers([one["index"] for one in document["episodes_detail"]]),
        "seed domain": seeds["domain"],
        "environments side by side": document["num_envs"],
        "longest episode": f"{counted(document['max_steps'], 'control step')} of {document['control_dt']:g} s",
        **{name: made[name] for name in ("created", "commit") if made.get(name)},
        **made.get("machine", {}),
        **_flat(made.get("policy", {}), "policy"),
        **document["versions"],
    }
    rows = ((escape(str(name)), escape(str(value))) for name, value in settings.items())
    return f"<h2>Settings and versions</h2><div class='card scroll'>{html_table(rows)}</div>"


def _flat(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """A tree's leaves by their whole names."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{name} {key}") if isinstance(value, dict) else {f"{name} {key}": value}
    return leaves


def _badge(record: EpisodeRecord) -> str:
    outcome = "invalid" if record.invalid else "success" if record.success else "failure"
    return f"<span class='badge {outcome}'>{outcome}</span>"


def _detail(record: EpisodeRecord) -> str:
    return "" if record.success else f", {escape(record.reason)}"
