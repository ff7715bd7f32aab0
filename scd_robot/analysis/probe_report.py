"""The page of a probe, and what follows from its numbers, in plain words."""

from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from scd_robot.output import write_json, write_text
from scd_robot.sim_eval.page import counted, html_page, html_table

__all__ = ["conclusions", "format_probe", "write_probe"]

_ALIKE = 0.95  # cosine from which on features count as the same, as in arXiv 2602.10095
_MOVING = {"psnr_moving": 2, "ssim_moving": 3}  # what is told of imagined frames, and digits
_SAMPLES = {"actions": "plans", "frames": "frames"}  # by what is denoised


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
    told = [_of_success(row) for row in document.get("closed_loop", []) if row["shortcut"] is not None]
    if "imagined" in document:
        told += _of_frames(document["imagined"])
    return lines + [sentence[0].upper() + sentence[1:] for sentence in told]


def _steps_alike(matrix: np.ndarray) -> int:
    """Most consecutive denoising steps among which any two have features alike."""
    steps, best = len(matrix), 1
    for start in range(steps):
        stop = start + 1
        while stop < steps and matrix[start : stop + 1, start : stop + 1].min() >= _ALIKE:
            stop += 1
        best = max(best, stop - start)
    return best


def _of_success(row: dict[str, Any]) -> str:
    low, high = (100 * bound for bound in row["difference_interval"])
    judged = "non-inferior" if row["non_inferior"] else "not shown to be non-inferior"
    return (
        f"{_name(row['shortcut'])}: {row['successes']}/{row['episodes']} successes, {100 * row['difference']:+.1f} "
        f"points [{low:+.1f}, {high:+.1f}] against all layers, {judged}."
    )


def _of_frames(imagined: dict[str, Any]) -> list[str]:
    """What imagined frames cost with all layers, and with each shortcut."""
    whole, *rows = imagined["shortcuts"]
    psnr, ssim = (_number(whole[name]["mean"], digits) for name, digits in _MOVING.items())
    repeated = _number(imagined["repeated"]["psnr_moving"]["mean"], 2)
    if whole["psnr_moving"]["mean"] is None:
        return [f"No pixel moves in the {counted(imagined['frames'], 'frame')} that are imagined: choose others."]
    lines = [
        f"With {_name(None)} moving pixels of {counted(imagined['frames'], 'imagined frame')} have a PSNR of {psnr} dB "
        f"and an SSIM of {ssim}, with the last seen frame repeated {repeated} dB; a frame takes "
        f"{whole['frame_ms']:.1f} ms."
    ]
    for row in rows:
        psnr, ssim = (_difference(row[name], digits) for name, digits in _MOVING.items())
        lines.append(
            f"{_name(row['shortcut'])}: PSNR of moving pixels {psnr} dB against all layers"
            f"{_judged(row['psnr_moving'])}, SSIM {ssim}, in {row['frame_ms'] / whole['frame_ms']:.2f} of the time."
        )
    return lines


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _judged(measure: dict[str, Any]) -> str:
    """In words, where there is an interval."""
    if measure["difference_interval"] is None:
        return ""
    low, high = measure["difference_interval"]
    return " (worse)" if high < 0 else " (better)" if low > 0 else " (no difference shown)"


def _difference(measure: dict[str, Any], digits: int) -> str:
    """A difference with its interval, where they are known."""
    if measure["difference"] is None:
        return "-"
    bounds = measure["difference_interval"]
    interval = "" if bounds is None else f" [{bounds[0]:+.{digits}f}, {bounds[1]:+.{digits}f}]"
    return f"{measure['difference']:+.{digits}f}{interval}"


def _name(shortcut: dict[str, Any] | None) -> str:
    if shortcut is None:
        return "all layers at every step"
    first, last = shortcut["first"], shortcut["stop"] - 1
    layers = f"layers {first} to {last}" if last > first else f"layer {first}"
    how = "reused" if shortcut["reuse"] else "left out"
    return f"{layers} {how} after {counted(shortcut['full_steps'], 'step')}"


def format_probe(document: dict[str, Any]) -> str:
    """The conclusions as text."""
    return "\n".join([_looked_into(document), *conclusions(document)])


def _looked_into(document: dict[str, Any]) -> str:
    held_out = {True: ", held out from the training", False: " of the training's own, not all held out", None: ""}
    episodes = counted(document["episodes"], "episode") + held_out[document.get("held_out")]
    return f"{document['samples']} {_SAMPLES[document['denoises']]} of {episodes}"


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
    if "imagined" in document:
        drawn["Imagined frames, by full denoising steps and what then becomes of the middle layers"] = _frames_plot(
            document["imagined"]
        )
    cards = "".join(f"<div class='card'><h3>{name}</h3>{svg}</div>" for name, svg in drawn.items())
    told = "".join(f"<p>{escape(sentence)}</p>" for sentence in conclusions(document))
    head = (
        f"<header><h1>What {escape(document['checkpoint'])} repeats while it denoises</h1>"
        f"<p class='muted'>{_looked_into(document)}; {document['layers']} layers, {steps} denoising steps.</p></header>"
    )
    body = [head, f"<h2>Conclusions</h2>{told}", f"<h2>Plots</h2><div class='plots'>{cards}</div>"]
    if "closed_loop" in document:
        body.append(f"<h2>In closed loop</h2><div class='card scroll'>{_closed_loop(document['closed_loop'])}</div>")
    if "imagined" in document:
        body.append(f"<h2>Imagined frames</h2>{_imagined(document['imagined'])}")
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


def _imagined(imagined: dict[str, Any]) -> str:
    cells = []
    for row in imagined["shortcuts"]:
        columns = [
            [_number(row[name]["mean"], digits), _difference(row[name], digits)] for name, digits in _MOVING.items()
        ]
        cells.append([_name(row["shortcut"]), *columns[0], *columns[1], f"{row['frame_ms']:.1f}"])
    floor = [_number(imagined["repeated"][name]["mean"], digits) for name, digits in _MOVING.items()]
    cells.append(["last seen frame repeated", floor[0], "-", floor[1], "-", "-"])
    names = ("layers", "PSNR [dB]", "against all layers", "SSIM", "against all layers", "frame [ms]")
    told = (
        f"Moving pixels of {counted(imagined['frames'], 'frame')} that follow "
        f"{counted(imagined['context'], 'control step')} of each episode, in "
        f"{counted(imagined['settings']['sampler']['num_denoising_steps'], 'denoising step')}: the mean over frames, "
        "then over episodes. Differences are of the same episodes and noise, with 95 % intervals over episodes. A "
        "frame's time is that of denoising it, with the history read already."
    )
    return f"<p class='muted'>{told}</p><div class='card scroll'>{html_table(cells, names)}</div>"


def _frames_plot(imagined: dict[str, Any]) -> str:
    from scd_robot.sim_eval.plots import layers_plot

    lines = {_short_name(row["shortcut"]): row["psnr_moving"]["by_frame"] for row in imagined["shortcuts"]}
    lines["no model"] = imagined["repeated"]["psnr_moving"]["by_frame"]
    ahead = list(range(1, imagined["frames"] + 1))
    if not any(value is not None for values in lines.values() for value in values):
        return ""
    return layers_plot(ahead, lines, "frames ahead", "PSNR of moving pixels [dB]", "full steps")


def _short_name(shortcut: dict[str, Any] | None) -> str:
    if shortcut is None:
        return "all"
    return f"{shortcut['full_steps']}, {'reused' if shortcut['reuse'] else 'left out'}"
