"""Does any fault make the control loop send an unsafe command?

    python benchmarks/faults.py                              10,000 random schedules in virtual time, 100 real runs
    python benchmarks/faults.py --only schedules --minutes 10    so much of it as fits; started again, it goes on
    python benchmarks/faults.py --report

Every command is checked at the robot's port, by `scd_robot.control.inspection`: bounds, velocity, acceleration,
workspace, spacing in time, NaN. `fault_schedules.py` and `fault_runs.py` have what is done.

OUT/results holds a file for each 250 schedules and for each real run; what is there is not done again. OUT/report.md
has the counts. Exits with 1 where a command was unsafe, a fault was not recorded, or a loop did not end as it should.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import datetime
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fault_runs
import fault_schedules
from job import code_version

from scd_robot.errors import ConfigError
from scd_robot.output import write_json

PIECE = 250
Result = dict[str, Any]


def pieces(options: argparse.Namespace) -> Iterator[tuple[Path, Result, Callable[[], Result]]]:
    """All that is to be done: where its result lies, its settings, and what makes it."""
    folder = options.out / "results"
    if "schedules" in options.only:
        for first in range(0, options.schedules, PIECE):
            count = min(PIECE, options.schedules - first)
            what = {**fault_schedules.settings(options.seed), "first": first, "count": count}
            place = folder / f"schedules_{first:06d}_{count}.json"
            yield place, what, lambda first=first, count=count: fault_schedules.run_piece(first, count, options.seed)
    if "real" in options.only:
        names = list(fault_runs.REAL)
        for run in range(options.real):
            what = {"fault": names[run % len(names)], "run": run, "control_dt": fault_runs.REAL_DT}
            place = folder / f"real_{run:03d}.json"
            yield place, what, lambda name=what["fault"], run=run: fault_runs.run_real(name, run)


def finished(place: Path, what: Result) -> Result | None:
    """The result that lies there already.

    Raises:
        ConfigError: it is of something else.
    """
    if not place.is_file():
        return None
    result: Result = json.loads(place.read_text())
    if result["settings"] != what:
        raise ConfigError(f"{place} is of other settings; choose another --out, or remove it")
    return result


def make(place: Path, what: Result, work: Callable[[], Result]) -> Result:
    """Does it, and keeps it."""
    load = os.getloadavg()[0]
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {"settings": what, "code": code_version(), "date": date, "load_1min": load, **work()}
    place.parent.mkdir(parents=True, exist_ok=True)
    write_json(place, result)
    return result


def report_of(results: Sequence[Result]) -> str:
    """Counts, as Markdown."""
    lines = ["## Faults of the control loop", ""]
    virtual = [result for result in results if "totals" in result]
    real = [result for result in results if "fine" in result]
    if virtual:
        totals, faults = Counter[str](), Counter[str]()
        for result in virtual:
            totals.update(result["totals"])
            faults.update(result["faults"])
        cpu_s = sum(result["cpu_s"] for result in virtual)
        lines += ["### Random schedules in virtual time", "", "| what | number |", "|---|---|"]
        lines += [f"| {name.replace('_', ' ')} | {value:,} |" for name, value in totals.items()]
        lines += [f"| CPU ms per schedule | {1e3 * cpu_s / totals['schedules']:.1f} |", ""]
        lines += [f"Faults: {sum(faults.values()):,}, of them {told(faults)}.", ""]
        for one in (one for result in virtual for one in result["not_as_it_should"]):
            lines += [f"- NOT AS IT SHOULD BE: {json.dumps(one)}"]
    if real:
        lines += ["### Real runs", ""]
        lines += ["| what breaks | runs | as they should | commands | unsafe | faults | missed control steps |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for name in dict.fromkeys(result["settings"]["fault"] for result in real):
            runs = [result for result in real if result["settings"]["fault"] == name]
            seen = Counter[str]()
            for result in runs:
                seen.update(result["faults"])
            ticks = sum(result["pacing"]["ticks"] + result["pacing"]["missed"] for result in runs)
            cells = (
                len(runs),
                sum(result["fine"] for result in runs),
                f"{sum(result['commands'] for result in runs):,}",
                sum(len(result["unsafe"]) for result in runs),
                told(seen) or "none",
                f"{sum(result['pacing']['missed'] for result in runs)} of {ticks:,}",
            )
            lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
        for result in real:
            if not result["fine"]:
                lines.append(f"- NOT AS IT SHOULD BE: run {result['settings']['run']}, {json.dumps(result)[:1000]}")
    codes = sorted({result["code"] for result in results})
    return "\n".join([*lines, "", f"Code: {', '.join(codes)}.", ""])


def told(counts: Counter[str]) -> str:
    """As words."""
    return ", ".join(f"{name} {value:,}" for name, value in counts.most_common())


def main() -> int:
    """Does what is missing, and prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--real", type=int, default=100, help="real runs; every kind of fault in turn")
    parser.add_argument("--only", nargs="+", choices=("schedules", "real"), default=["schedules", "real"])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of this process's wall clock")
    parser.add_argument("--seed", type=int, default=0, help="of the schedules")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/faults"))
    options = parser.parse_args()
    logging.disable(logging.ERROR)
    until_s = time.monotonic() + 60 * options.minutes
    results = []
    try:
        for place, what, work in pieces(options):
            result = finished(place, what)
            if result is None and not options.report and time.monotonic() < until_s:
                result = make(place, what, work)
                print(f"{place.name}: {'fine' if is_fine(result) else 'NOT AS IT SHOULD BE'}", flush=True)
            results += [] if result is None else [result]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if not results:
        print("nothing is done yet")
        return 0
    text = report_of(results)
    print(text)
    (options.out / "report.md").write_text(text)
    return 0 if all(map(is_fine, results)) else 1


def is_fine(result: Result) -> bool:
    """Whether nothing was unsafe, unrecorded, or otherwise than it should be."""
    return not result["not_as_it_should"] if "totals" in result else bool(result["fine"])


if __name__ == "__main__":
    sys.exit(main())
