"""Sends 100,000 spoiled frames to a policy server, beside a connection whose every answer is checked.

    python benchmarks/serve_fuzz.py --frames 100000 --json fuzz.json

The server runs in a process of its own, as `scd serve` does. Its memory (resident set) is looked at after each tenth of
the frames; what it grew by is counted from the end of the second one on.

Exits with 1 where the server died or had an internal error, or its memory grew by 2 % (of 20,000 frames and more).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import logging
import multiprocessing
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from job import code_version, describe_machine, now, result_file

from scd_robot.output import write_json

PARTS, WARM = 10, 2
MOST_GROWTH, FEWEST_FRAMES = 0.02, 20_000  # from which on growth is judged

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / name) for name in ("helpers", "training")]


def serve(pipe: Connection) -> None:
    import torch
    from small_policies import small_policy

    from scd_robot.serve.server import ServerConfig, running_server

    torch.set_num_threads(1)
    logging.getLogger("websockets").setLevel(logging.CRITICAL)
    with running_server(small_policy(), ServerConfig(port=0)) as server:
        pipe.send(server.address)
        pipe.recv()


def measure(frames: int, seed: int) -> dict[str, Any]:
    """Sends the frames, and tells what became of them and of the server."""
    import psutil
    from small_policies import small_policy
    from spoiled_frames import send_spoiled_frames

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,))
    process.start()
    address = ours.recv()
    memory = psutil.Process(process.pid)
    started, outcome, seen = time.perf_counter(), Counter[str](), []
    for part in range(PARTS):
        count = frames * (part + 1) // PARTS - frames * part // PARTS
        outcome.update(send_spoiled_frames(address, small_policy(), count, seed + part))
        seen.append(memory.memory_info().rss / 2**20)
    seconds, alive = time.perf_counter() - started, process.is_alive()
    ours.send("stop")
    process.join(30)
    growth = seen[-1] / seen[WARM - 1] - 1
    judged = frames >= FEWEST_FRAMES
    good = alive and process.exitcode == 0 and not outcome["internal_errors"] and not (judged and growth >= MOST_GROWTH)
    return {
        "frames": frames,
        "seed": seed,
        "outcome": dict(outcome),
        "seconds": seconds,
        "server_lived": alive and process.exitcode == 0,
        "memory_mb": seen,
        "growth": growth,
        "good": good,
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000, help="to spoil and send (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the spoiling")
    parser.add_argument("--json", type=result_file, help="write the result to this file as well")
    options = parser.parse_args()
    if options.frames < PARTS:
        parser.error(f"--frames must be at least {PARTS}")
    found = measure(options.frames, options.seed)
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in found["outcome"].items())
    print(f"{counts}; {found['seconds']:.0f} s")
    print(
        f"the server {'lives' if found['server_lived'] else 'DIED'}; its memory after each tenth: "
        f"{', '.join(f'{size:.1f}' for size in found['memory_mb'])} MB, {found['growth']:+.2%} from the second one on"
    )
    if options.json is not None:
        about = {"date": now(), "command": " ".join(["python", *sys.argv]), "code": code_version()}
        write_json(options.json, found | about | {"machine": describe_machine()})
    return int(not found["good"])


if __name__ == "__main__":
    sys.exit(main())
