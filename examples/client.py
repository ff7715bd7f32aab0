"""A control loop with the policy on another machine: every control step is observed, plans are asked for when due.

Needs the extra [serve] only; on a robot's computer scd_robot_runtime, which then is imported in the place of scd_robot.
The robot here is a stand-in that sends noise and does what it is told.

    scd serve runs/example/run
    python examples/client.py ws://127.0.0.1:8000
"""

import argparse

import numpy as np

from scd_robot.serve import PolicyClient


def main(address: str, steps: int, api_key: str | None) -> None:
    rng = np.random.default_rng(0)
    with PolicyClient(address, api_key=api_key) as client:
        told = client.metadata
        print(f"{address}: chunks of {told['action_horizon']} actions at {told['control_hz']:g} Hz, {told['keys']}")
        executed, actions, age = None, None, 0
        for step in range(steps):
            observation = {
                key: rng.uniform(0, 256 if array["dtype"] == "uint8" else 1, array["shape"]).astype(array["dtype"])
                for key, array in told["keys"].items()
            }
            due = actions is None or age >= told["num_executed"]
            # The server keeps the history: it wants every observation, and what was really executed since the last one.
            answer = client.infer(observation, reset=step == 0, step=step, executed=executed, observe_only=not due)
            if due:
                actions, age = answer["actions"], 0
                print(f"{step:4d}  planned in {answer['server_timing']['infer_ms']:.1f} ms")
            executed = actions[age]  # send it to the robot here, and take what its limits made of it
            age += 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--api-key")
    options = parser.parse_args()
    main(options.address, options.steps, options.api_key)
