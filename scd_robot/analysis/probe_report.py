"""The page of a probe, and what follows from its numbers, in plain words."""

from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from scd_robot.output import write_json, write_text
from scd_robot.sim_eval.page import html_page, html_table

__all__ = ["conclusions", "format_probe", "write_probe"]

_ALIKE = 0.95  # cosine from which on features count as the same, as in arXiv 2602.10095


def conclusions(document: dict[str, Any]) -> list[str]:
    """What the numbers say about the two regularities, one sentence each."""
    steps, depth = document["num_denoising_steps"], document["layers"]
    lines = []
    alike = [_steps_alike(np.array(matrix)) for matrix in document["similarity"]]
    listed = ", ".join(f"{layer}: {count}" for layer, count in enumerate(alike))
    lines.append(
        f"Denoising steps of {steps} over which all features of a layer stay alike (any two at a cosine of {_ALIKE} "
        f"or more), by layer: {listed}."
    )
    attention = np.array(document["history_attention"])
    early, late = attention[: depth // 2].mean(), attention[depth // 2 :].mean()
    lines.append(
        f"Attention of the noisy tokens on earlier control steps: {100 * early:.1f} % in the first half of the layers, "
        f"{100 * late:.1f} % in the second; it is highest in layer {int(attention.mean(1).argmax())} "
        f"({100 * attention.mean(1).max():.1f} %) and lowest in layer {int(attention.mean(1).argmin())} "
        f"({100 * attention.mean(1).min():.1f} %)."
    )
    ratio = np.array(document["loss_without_layer"]) / document["loss"]
    order = np.argsort(-ratio)
    lines.append(
        f"Leaving out one layer multiplies the loss by {ratio.min():.2f} (layer {order[-1]}) to {ratio.max():.2f} "
        f"(layer {order[0]}); the two that matter most are layers {order[0]} and {order[1] if depth > 1 else order[0]}."
    )
    for row in document.get("closed_loop", []):
        if row["shortcut"] is not None:
            sentence = _of_shortcut(row)
            lines.append(sentence[0].upper() + sentence[1:])
    return lines


def _steps_alike(matrix: np.ndarray) -> int:
    """Most consecutive denoising steps among which any two have features alike."""
    steps, best = len(matrix), 1
    for start in range(steps):
        stop = start + 1
        while stop < steps and matrix[start : stop + 1, start : stop + 1].min() >= _ALIKE:
            stop += 1
        best = max(best, stop - start)
    return best


def _of_shortcut(row: dict[str, Any]) -> str:
    low, high = (100 * bound for bound in row["difference_interval"])
    judged = "non-inferior" if row["non_inferior"] else "not shown to be non-inferior"
    return (
        f"{_name(row['shortcut'])}: {row['successes']}/{row['episodes']} successes, {100 * row['difference']:+.1f} "
        f"points [{low:+.1f}, {high:+.1f}] against all layers, {judged}."
    )


def _name(shortcut: dict[str, Any] | None) -> str:
    if shortcut is None:
        return "all layers at every step"
    how = "reused" if shortcut["reuse"] else "left out"
    return f"layers {shortcut['first']} to {shortcut['stop'] - 1} {how} after {shortcut['full_steps']} steps"


def format_probe(document: dict[str, Any]) -> str:
    """The conclusions as text."""
    return "\n".join([f"{document['samples']} plans of {document['episodes']} episodes", *conclusions(document)])


def write_probe(document: dict[str, Any], out: Path) -> None:
    """Writes `probe.json` and `probe.html` into a folder.

    Raises:
        OutputError: they cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    from scd_robot.sim_eval.plots import layers_plot

    write_json(out / "probe.json", document)
    steps = document["num_denoising_steps"]
    times = [i / steps for i in range(steps)]
    to_last = {layer: np.array(matrix)[:, -1].tolist() for layer, matrix in enumerate(document["similarity"])}
    added = {layer: np.array(m)[:, -1].tolist() for layer, m in enumerate(document["similarity_of_additions"])}
    attention = {layer: [100 * x for x in row] for layer, row in enumerate(document["history_attention"])}
    quarters = dict(enumerate(document["similarity_by_quarter"]))
    loss = {"": [x / document["loss"] for x in document["loss_without_layer"]]}
    flow = "flow time of the denoising step"
    drawn = {
        "Features beside those of the last denoising step": layers_plot(times, to_last, flow, "cosine"),
        "What a layer adds, beside the last denoising step": layers_plot(times, added, flow, "cosine"),
        "Attention on earlier control steps": layers_plot(times, attention, flow, "attention [%]"),
        "Features beside the last step's, by quarter of the episode": layers_plot(
            [1, 2, 3, 4], quarters, "quarter of the episode", "cosine"
        ),
        "Loss with one layer left out": layers_plot(
            list(range(document["layers"])), loss, "layer", "loss / loss with all layers"
        ),
    }
    cards = "".join(f"<div class='card'><h3>{name}</h3>{svg}</div>" for name, svg in drawn.items())
    told = "".join(f"<p>{escape(sentence)}</p>" for sentence in conclusions(document))
    head = (
        f"<header><h1>What {escape(document['checkpoint'])} repeats while it denoises</h1>"
        f"<p class='muted'>{document['samples']} plans of {document['episodes']} episodes, {document['layers']} "
        f"layers, {steps} denoising steps.</p></header>"
    )
    body = [head, f"<h2>Conclusions</h2>{told}", f"<h2>Plots</h2><div class='plots'>{cards}</div>"]
    if document.get("closed_loop"):
        body.append(f"<h2>In closed loop</h2><div class='card scroll'>{_closed_loop(document['closed_loop'])}</div>")
    write_text(out / "probe.html", html_page("Probe", body))


def _closed_loop(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        low, high = (100 * bound for bound in row["interval"])
        difference = "-"
        if row["difference"] is not None:
            bounds = (100 * bound for bound in row["difference_interval"])
            difference = f"{100 * row['difference']:+.1f} ({{:+.1f}} to {{:+.1f}})".format(*bounds)
        plan = "-" if row["plan_ms"] is None else f"{row['plan_ms']:.1f}"
        cells.append(
            [_name(row["shortcut"]), f"{row['successes']}/{row['episodes']} ({low:.1f}-{high:.1f} %)", difference, plan]
        )
    return html_table(cells, ("layers", "successes", "against all layers [points]", "plan [ms]"))
