"""Drives the toy environment through a server with the published openpi-client, unmodified, in its own environment.

    python drive.py ADDRESS NUM_EXECUTED STEPS

Prints what was seen and done as JSON. It also compares the bytes of messages, ours and theirs.
"""

import json
import logging
import sys
from pathlib import Path

import numpy as np
from openpi_client import msgpack_numpy
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "sim_eval")]

from toy_environment import PointEnvironment  # noqa: E402

from scd_robot.serve.wire import pack, unpack  # noqa: E402


def compare_bytes() -> None:
    """Ours are theirs, both ways."""
    for dtype in ("?", "i1", "<i2", "<i8", "u1", "<f2", "<f4", ">f8"):
        message = {"x": np.ones((2, 3), dtype), "inner": {"y": np.dtype(dtype).type(1)}, "prompt": "go", "n": 1}
        ours, theirs = pack(message), msgpack_numpy.packb(message)
        assert ours == theirs, dtype
        for back in (unpack(theirs), msgpack_numpy.unpackb(ours)):
            np.testing.assert_array_equal(back["x"], message["x"])
            assert back["x"].dtype == dtype
            assert back["inner"]["y"] == 1


def main() -> None:
    """Runs an episode and prints it."""
    address, num_executed, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    compare_bytes()
    client = WebsocketClientPolicy(address)
    policy = ActionChunkBroker(client, num_executed)
    environment = PointEnvironment()
    observation = environment.reset(0)
    seen, done = [], []
    for _ in range(steps):
        sent = {f"observation/{key}": value.astype(np.float32) for key, value in observation.items()}
        action = policy.infer({**sent, "prompt": "reach the goal"})["actions"]
        seen.append({key: value.tolist() for key, value in observation.items()})
        done.append(action.tolist())
        observation = environment.step(action).observation
    refusal = ""
    try:
        client.infer({"observation/state": np.zeros(7)})
    except RuntimeError as error:
        refusal = str(error)
    print(json.dumps({"metadata": client.get_server_metadata(), "seen": seen, "done": done, "refusal": refusal}))


if __name__ == "__main__":
    logging.disable()
    main()
