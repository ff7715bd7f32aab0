"""Writes the checkpoint of one schema, and what its policy does, with the code of a checkout of that time.

    git archive COMMIT | tar -x -C OLD && cd OLD && PYTHONPATH=. python .../tests/earlier_schemas/write.py OUT

The folders beside this file were made so at 456e006 (schema 1), 70f173f (2), a615475 (3), a422549 (4), a0684d3 (5),
08f998f (6), 8bff2f5 (7) and be8ffc8 (8), the last commits before the next schema; only `write.py` is newer. That of
schema 9, the present one, is made again whenever a field changes before it is published.
`tests/test_earlier_schemas.py` reads them.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path.cwd() / "tests" / "training"))

STEPS, UPDATES = 9, 300


def main(out: Path) -> None:
    """A tiny model, trained for a few seconds, and an episode of two rows in which executed actions are told."""
    from tiny import tiny_data, tiny_experiment

    from scd_robot.policies import load_policy
    from scd_robot.training import train

    model = {"width": 8, "memory_gate": True, "max_delay_steps": 1}
    settings = {"validate_every": UPDATES, "learning_rate": 3e-3, "ema_decay": 0.9}  # enough for all parts to matter
    train(tiny_data(), tiny_experiment(UPDATES, model, **settings), out / "run", accelerator="cpu", progress=False)
    [checkpoint] = (out / "run" / "checkpoints").iterdir()
    shutil.rmtree(checkpoint / "resume")
    checkpoint.rename(out / "checkpoint")
    shutil.rmtree(out / "run")
    policy = load_policy(out / "checkpoint")
    rng = np.random.default_rng(7)
    policy.reset(episodes=[3, 4])
    seen = {key: rng.uniform(-1, 1, (STEPS, 2, 2)).astype(np.float32) for key in ("position", "goal")}
    executed = rng.uniform(-1, 1, (STEPS, 2, 2)).astype(np.float32)
    actions = [
        policy.act({key: value[step] for key, value in seen.items()}, executed[step - 1] if step else None)
        for step in range(STEPS)
    ]
    told = {**seen, "executed": executed, "actions": np.stack(actions)}
    text = json.dumps({name: np.round(value.astype(float), 7).tolist() for name, value in told.items()})
    (out / "episode.json").write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
