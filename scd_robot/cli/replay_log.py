"""The verb `scd replay-log`."""

from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["replay_log"]


def replay_log(
    record: Annotated[Path, tyro.conf.Positional], /, *, out: Path | None = None, json: Path | None = None
) -> None:
    """Shows what a control loop's flight recorder kept: faults and states, and a page with plots.

    Args:
        record: a record's folder (flight-001-...), or the folder that holds a run's records (its last one).
        out: write the page to this file; by default nothing is written.
        json: write the record's document, without the steps, to this file too ("-": standard output).
    """
    from scd_robot.analysis.flight_report import flight_page, format_flight
    from scd_robot.control.recorder import find_record, read_record
    from scd_robot.output import write_json, write_text

    folder = find_record(record)
    arrays, document = read_record(folder)
    if out is not None:
        write_text(out, flight_page(folder.name, arrays, document))
    if json is not None:
        write_json(json, document)
    if str(json) != "-":
        print(format_flight(folder.name, arrays, document))
        if out is not None:
            print(f"page: {out}")
