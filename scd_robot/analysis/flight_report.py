"""A flight record in words and as a page.

Shapes: N control steps, Da action width.
"""

from collections import Counter
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.control.watchdog import FAULTS
from scd_robot.sim_eval.page import counted, html_page, html_table

__all__ = ["flight_page", "format_flight"]

_MOST_DIMENSIONS = 16
Arrays = Mapping[str, NDArray[Any]]


def format_flight(name: str, arrays: Arrays, document: Mapping[str, Any]) -> str:
    """The record as text: what it spans, states, plans, lateness, and every fault."""
    return "\n".join([f"{name}: {line}" if i == 0 else line for i, line in enumerate(_summary(arrays, document))])


def flight_page(name: str, arrays: Arrays, document: Mapping[str, Any]) -> str:
    """The record as an HTML page with plots of commands, lateness and the age of observations.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    from scd_robot.sim_eval.plots import flight_plot, require_matplotlib

    require_matplotlib()
    end = _end(arrays)
    times = (arrays["time_s"] - end).tolist()
    marks = [event["time_s"] - end for event in document["events"] if event["fault"]]
    marks = [at for at in marks if times and times[0] <= at]
    drawn = {}
    for i in range(min(arrays["command"].shape[1], _MOST_DIMENSIONS)):
        lines = {label: arrays[label][:, i].tolist() for label in ("command", "target", "executed", "pose")}
        known = {label: values for label, values in lines.items() if np.isfinite(values).any()}
        drawn[f"Dimension {i}"] = flight_plot(times, known, marks, "action")
    drawn["Lateness"] = flight_plot(times, {"late": arrays["late_ms"].tolist()}, marks, "late [ms]")
    drawn["Age of the observation"] = flight_plot(times, {"age": (1e3 * arrays["age_s"]).tolist()}, marks, "age [ms]")
    cards = "".join(f"<div class='card'><h3>{title}</h3>{svg}</div>" for title, svg in drawn.items())
    rows = [
        [
            f"{event['time_s'] - end:.2f}",
            str(event["step"]),
            f"<b class='failure'>{escape(event['kind'])}</b>" if event["fault"] else escape(event["kind"]),
            escape(f"{FAULTS.get(event['kind'], '')} ({event['detail']})" if event["fault"] else event["detail"]),
        ]
        for event in document["events"]
    ]
    head = f"<header><h1>{escape(name)}</h1></header>"
    told = "".join(f"<p>{escape(line)}</p>" for line in _summary(arrays, document, faults=False))
    table = html_table(rows, ("time [s]", "control step", "what", "detail"))
    body = [
        head + told,
        f"<h2>Plots</h2><div class='plots'>{cards}</div>",
        f"<h2>Events</h2><div class='card scroll'>{table}</div>",
    ]
    return html_page(name, body)


def _summary(arrays: Arrays, document: Mapping[str, Any], faults: bool = True) -> list[str]:
    steps, end = len(arrays["step"]), _end(arrays)
    seconds = end - float(arrays["time_s"][0]) if steps else 0.0
    states = Counter(arrays["state"].tolist())
    lines = [
        f"the last {counted(steps, 'control step')} ({seconds:.1f} s) of {document['steps']}; then {document['state']}",
        "states: " + ", ".join(f"{state} {count}" for state, count in states.items()),
        "plans: " + (", ".join(f"{kind} {count}" for kind, count in document["plans"].items()) or "none"),
    ]
    if steps:
        late, age = arrays["late_ms"], 1e3 * arrays["age_s"]
        known = age[np.isfinite(age)]
        oldest = f", observations up to {known.max():.1f} ms old" if len(known) else ""
        lines.append(f"late by {np.median(late):.2f} ms (median), {late.max():.2f} ms (worst){oldest}")
    counts = ", ".join(f"{kind} {count}" for kind, count in document["faults"].items())
    lines.append(f"faults of the whole run: {counts or 'none'}")
    if faults:
        lines += [
            f"  {event['time_s'] - end:+8.2f} s  step {event['step']:6d}  {event['kind']}: {event['detail']}"
            for event in document["events"]
            if event["fault"]
        ]
    return lines


def _end(arrays: Arrays) -> float:
    return float(arrays["time_s"][-1]) if len(arrays["time_s"]) else 0.0
