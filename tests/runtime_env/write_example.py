"""Writes a small policy, its export, and what it does, for check_runtime.py.

    python write_example.py OUT

Runs in the environment of scd_robot. The policy has a camera whose pictures are resized, a quaternion, rotation vectors
and relative actions, so that the robot's computer has all of that to do. OUT gets `checkpoint`, `exported` (ONNX) and
`expected.npz`: an episode of two rows, of `steps` control steps.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from tiny import LENGTHS, tiny_experiment

from scd_robot import load_policy
from scd_robot.checkpoint import write_checkpoint
from scd_robot.cli.main import main as scd
from scd_robot.config import to_json
from scd_robot.datasets import EpisodeDataset
from scd_robot.model import build_model
from scd_robot.nn import ImageConfig
from scd_robot.training.config import ExperimentConfig
from scd_robot.training.start import fit_normalizer
from scd_robot.training.transformed import transformed
from scd_robot.transforms import ChunkPart, ImageStep, RotationStep, TransformConfig, Transforms
from scd_robot.types import ArraySpec, DatasetSpec

STEPS, EPISODES = 14, (3, 4)
TRANSFORMS = TransformConfig(
    images=(ImageStep("eye", size=(8, 12)),),
    rotations=(RotationStep("pose", 3, "quat_xyzw"), RotationStep("action", 3, "axis_angle")),
    chunk="relative",
    chunk_parts=(ChunkPart(0, "pose", 0, 3), ChunkPart(3, "pose", 3, 6, rotation=True)),
)
SPEC = DatasetSpec({"pose": ArraySpec((7,)), "eye": ArraySpec((16, 24, 3), "uint8")}, 6, 0.05, "made up")


def drawn(rng: np.random.Generator, *shape: int) -> dict[str, np.ndarray]:
    """Observations (*shape, ...) and actions (*shape, 6)."""
    pose = rng.uniform(-1, 1, (*shape, 7))
    pose[..., 6] = rng.uniform(1, 2, shape)  # turns of less than 90 degrees
    return {
        "pose": pose.astype(np.float32),
        "eye": rng.integers(0, 256, (*shape, 16, 24, 3), np.uint8),
        "action": rng.uniform(-1, 1, (*shape, 6)).astype(np.float32),
    }


def write_policy(folder: Path) -> None:
    """A checkpoint with weights drawn at random."""
    data = EpisodeDataset(SPEC, np.cumsum(LENGTHS).astype(np.int64), drawn(np.random.default_rng(0), sum(LENGTHS)))
    base = tiny_experiment(
        model={
            "observation_shapes": {key: x.shape for key, x in Transforms(TRANSFORMS, SPEC).spec.observation.items()},
            "action_dim": 9,
            "images": ImageConfig(channels=(8, 8)),
            "num_past_actions": 0,
            "max_delay_steps": 2,
            "past_action_input": "full",
        }
    )
    experiment = ExperimentConfig("tiny", base.model, base.training, base.policy, TRANSFORMS)
    torch.manual_seed(0)
    model = build_model(experiment.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    write_checkpoint(
        folder,
        policy="scd",
        step=1,
        config=to_json(experiment),
        dataset=SPEC,
        normalizer=fit_normalizer(transformed(data, TRANSFORMS), experiment),
        weights=model.state_dict(),
        origin={},
        metrics={},
    )


def main(out: Path) -> None:
    """Writes all of it."""
    torch.set_num_threads(1)
    write_policy(out / "checkpoint")
    assert scd(["export", str(out / "checkpoint"), "--out", str(out / "exported")]) == 0
    policy = load_policy(out / "checkpoint")
    seen = drawn(np.random.default_rng(7), STEPS, len(EPISODES))
    executed = seen.pop("action")
    policy.reset(episodes=EPISODES)
    actions = [
        policy.act({key: x[step] for key, x in seen.items()}, executed[step - 1] if step else None)
        for step in range(STEPS)
    ]
    np.savez(out / "expected.npz", episodes=EPISODES, executed=executed, actions=np.stack(actions), **seen)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
