"""How many robots does one core, or one GPU, serve within their deadlines?

    python benchmarks/capacity.py                          1, 2, 4, ... robots at 20 Hz, until deadlines are missed
    python benchmarks/capacity.py --hz 50 --seconds 30 --robots 8 16
    python benchmarks/capacity.py --device cuda            the model on a GPU, the rest of the server on one core

A server (`scd serve`'s, the preset metaworld_state with random weights, one thread) runs in a process of its own on one
core. The robots are asynchronous clients in this process, on the other cores. Each sends every observation by its own
clock, with phases spread evenly, and wants a plan `num_executed` control steps after the last one; requests that wait
together are computed together. An answer is late when it comes after the next observation is due. Clients do not pile
up work: a robot whose answer is late sends its next observation when it has come, and the control steps between count
as missed. A number of robots is served when at most one answer in a thousand is late.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import asyncio
import datetime
import multiprocessing
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from job import code_version, describe_machine, result_file
from latency import make_policy, observation
from websockets.asyncio.client import connect

from scd_robot.output import write_json
from scd_robot.serve.wire import pack, unpack

ROBOTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
MOST_LATE = 1e-3


@dataclass
class Counts:
    """What became of one number of robots.

    Attributes:
        delays_ms: from sending to the answer, of every request.
        late: requests whose answer came after the next observation was due.
        missed: control steps in which nothing could be sent, because the last answer was not there yet.
    """

    delays_ms: list[float] = field(default_factory=list)
    late: int = 0
    missed: int = 0


def serve(pipe: Connection, core: int, history: int, nfe: int, device: str) -> None:
    """The server's process; sends its address, and its CPU time whenever it is asked."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    from scd_robot.serve.server import PolicyServer, ServerConfig, running_server

    policy = make_policy(history, nfe, device)
    with running_server(policy, ServerConfig(port=0, max_connections=1024)) as server:
        assert isinstance(server, PolicyServer)
        pipe.send(server.address)
        while pipe.recv():
            pipe.send(time.process_time())


async def drive(address: str, number: int, robots: int, hz: float, seconds: float, counts: Counts) -> None:
    """One robot for so many seconds; the first second warms up."""
    rng = np.random.default_rng(number)
    async with connect(address, compression=None, max_size=None) as connection:
        executed = unpack(await connection.recv())["num_executed"]
        dt, step, plan_due = 1 / hz, 0, 0
        begin = time.monotonic() + 0.5 + dt * number / robots
        due = begin
        while due < begin + 1 + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            seen = {key: value[0] for key, value in observation(rng).items()}
            plans = step >= plan_due
            plan_due = step + executed if plans else plan_due
            message = {**seen, "scd/step": step, "scd/reset": step == 0, "scd/observe_only": not plans}
            sent = time.monotonic()
            await connection.send(pack(message))
            answer = unpack(await connection.recv())
            assert "error" not in answer, answer
            now = time.monotonic()
            skipped = max(0, int((now - due) / dt))
            if due >= begin + 1:
                counts.delays_ms.append(1e3 * (now - sent))
                counts.late += now > due + dt
                counts.missed += skipped
            step += 1 + skipped
            due += dt * (1 + skipped)


async def drive_all(address: str, robots: int, hz: float, seconds: float) -> Counts:
    """All robots side by side."""
    counts = Counts()
    await asyncio.gather(*(drive(address, i, robots, hz, seconds, counts) for i in range(robots)))
    return counts


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robots", type=int, nargs="+", default=list(ROBOTS))
    parser.add_argument("--hz", type=float, default=20.0, help="control steps per second (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each number of robots (default %(default)s)")
    parser.add_argument("--history", type=int, default=64, help="control steps (default %(default)s)")
    parser.add_argument("--nfe", type=int, default=8, help="denoising steps (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="of the model, such as cuda (default %(default)s)")
    parser.add_argument("--out", type=result_file, default="runs/benchmarks/capacity.json")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("capacity.py needs two cores: one for the server, one for the robots")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(
        target=serve, args=(there, cores[0], options.history, options.nfe, options.device), daemon=True
    )
    server.start()
    os.sched_setaffinity(0, set(cores[1:]))
    address = here.recv()
    print(f"load average at the start: {os.getloadavg()[0]:.2f}; history {options.history}, NFE {options.nfe}\n")
    print(f"| robots at {options.hz:g} Hz | answer, p50 / p99 / p99.9 [ms] | late | missed steps | core busy |")
    print("|" + "---|" * 5)
    rows: list[dict[str, Any]] = []
    for robots in options.robots:
        here.send(True)
        cpu, wall = here.recv(), time.monotonic()
        counts = asyncio.run(drive_all(address, robots, options.hz, options.seconds))
        here.send(True)
        busy = (here.recv() - cpu) / (time.monotonic() - wall)
        p50, p99, p999 = np.percentile(counts.delays_ms, (50, 99, 99.9))
        requests = len(counts.delays_ms)
        rows.append(
            {
                "robots": robots,
                "requests": requests,
                "late": counts.late,
                "missed": counts.missed,
                "busy": busy,
                "p50_ms": p50,
                "p99_ms": p99,
                "p99.9_ms": p999,
            }
        )
        print(
            f"| {robots} | {p50:.1f} / {p99:.1f} / {p999:.1f} | {counts.late} of {requests} | {counts.missed} | "
            f"{busy:.0%} |",
            flush=True,
        )
        if counts.late > 10 * MOST_LATE * requests:
            break
    here.send(False)
    served = [row["robots"] for row in rows if row["late"] <= MOST_LATE * row["requests"]]
    print(
        f"\n- served within deadlines (at most {MOST_LATE:.1%} late): {max(served, default=0)} robots on one core"
        + ("" if options.device == "cpu" else f" and {options.device}")
    )
    document = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "code": code_version(),
        "machine": describe_machine(),
        "torch": torch.__version__,
        "settings": {name: getattr(options, name) for name in ("hz", "seconds", "history", "nfe", "device")},
        "rows": rows,
        "served": max(served, default=0),
    }
    write_json(options.out, document)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
