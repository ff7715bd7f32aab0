"""Sends 100,000 spoiled frames to a policy server, beside a connection whose every answer is checked.

    python benchmarks/serve_fuzz.py --frames 100000

The server runs in a process of its own, as `scd serve` does.
"""

import argparse
import logging
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

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


def main(frames: int, seed: int) -> None:
    import psutil
    from small_policies import small_policy
    from spoiled_frames import send_spoiled_frames

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,))
    process.start()
    address = ours.recv()
    memory = psutil.Process(process.pid)
    before, started = memory.memory_info().rss, time.perf_counter()
    outcome = send_spoiled_frames(address, small_policy(), frames, seed)
    seconds, grown = time.perf_counter() - started, (memory.memory_info().rss - before) / 2**20
    alive = process.is_alive()
    ours.send("stop")
    process.join(30)
    print(f"{outcome} in {seconds:.0f} s; the server {'lives' if alive else 'DIED'}, its memory grew by {grown:.1f} MB")
    sys.exit(bool(outcome["internal_errors"]) or not alive or process.exitcode != 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.frames, options.seed)
