"""Writes a dataset for check_lerobot.py, and what LeRobot must read in it.

    python write_example.py DATASET EXPECTED.npz [RECORDING]

Runs in the environment of scd_robot. Without a RECORDING, a dataset that scd_robot opens, everything the writer can
write is made up: several files, tasks, lists, tables and single numbers, gray and odd images; and DATASET.hdf5 gets two
lists of it as robomimic reads them, for check_rivals.py, and DATASET.pusht gets numbers of the shapes of gym-pusht, for
check_policy.py.
"""

import sys

import numpy as np

from scd_robot.datasets import open_dataset
from scd_robot.datasets.hdf5.robomimic_writer import write_robomimic
from scd_robot.datasets.lerobot import writer as lerobot_writer
from scd_robot.datasets.schema import DONE, EXECUTED_ACTION, REWARD, SIM_STATE, EpisodeDataset
from scd_robot.types import ArraySpec, DatasetSpec

LENGTHS = (7, 12, 2, 9)
NAMES = {REWARD: "next.reward", DONE: "next.done"}


def made_up():
    """Four episodes with one array of each kind."""
    rng = np.random.default_rng(0)
    count = sum(LENGTHS)
    y, x = np.mgrid[:64, :96]
    waves = [128 + 60 * np.sin(x / 9 + i / 3) + 50 * np.cos(y / 7 - i / 5) for i in range(count)]
    arrays = {
        "state": rng.normal(size=(count, 6)).astype(np.float32),
        "keypoint": rng.normal(size=(count, 9, 2)).astype(np.float32),
        "gripper": rng.normal(size=(count, 1)).astype(np.float32),
        "front": np.stack([np.stack([wave, 40 + wave / 2, 90 + wave / 3], -1) for wave in waves]).astype(np.uint8),
        "odd": rng.integers(0, 256, (count, 15, 21, 3), dtype=np.uint8),
        "gray": rng.integers(0, 256, (count, 16, 20, 1), dtype=np.uint8),
    }
    observation = {key: ArraySpec(array.shape[1:], str(array.dtype)) for key, array in arrays.items()}
    arrays |= {
        "action": rng.normal(size=(count, 4)).astype(np.float32),
        EXECUTED_ACTION: rng.normal(size=(count, 4)).astype(np.float32),
        SIM_STATE: rng.normal(size=(count, 11)),
        REWARD: rng.normal(size=count).astype(np.float32),
        DONE: rng.integers(0, 2, count).astype(bool),
    }
    return EpisodeDataset(
        DatasetSpec(observation, 4, 0.05, "made up"),
        np.cumsum(LENGTHS),
        arrays,
        episode_info={"success": np.array([True, False, True, False])},
        episode_text={"task": ["push", "lift", "push", ""]},
    )


def pusht_shaped():
    """Three episodes of what LeRobot's PushT shows; two numbers of it never change, but for rounding."""
    rng = np.random.default_rng(1)
    lengths = (9, 14, 21)
    count = sum(lengths)
    arrays = {
        "observation.state": rng.uniform(100, 400, (count, 2)).astype(np.float32),
        "observation.environment_state": rng.uniform(50, 450, (count, 16)).astype(np.float32),
    }
    arrays["observation.environment_state"][:, 3] = 250.1
    arrays["observation.environment_state"][:, 5] = 1 + 2e-6 * (np.arange(count) % 2)  # rounding
    observation = {key: ArraySpec(array.shape[1:]) for key, array in arrays.items()}
    arrays["action"] = (512 - arrays["observation.state"]).astype(np.float32)
    return EpisodeDataset(
        DatasetSpec(observation, 2, 0.1, "made up"),
        np.cumsum(lengths),
        arrays,
        episode_text={"task": ["push"] * len(lengths)},
    )


def expected_arrays(dataset):
    """All features by LeRobot's names."""
    lengths = dataset.episode_lengths
    steps = np.concatenate([np.arange(length) for length in lengths])
    arrays = {}
    for key, array in dataset.arrays.items():
        visual = array.dtype == np.uint8
        prefix = "observation." + ("images." if visual else "") if key in dataset.spec.observation else ""
        name = NAMES.get(key, key if key.startswith("observation.") else prefix + key)
        arrays[name] = array[:]
    arrays["timestamp"] = (steps * dataset.spec.control_dt).astype(np.float32)
    arrays["frame_index"], arrays["index"] = steps, np.arange(len(steps))
    arrays["episode_index"] = np.repeat(np.arange(len(lengths)), lengths)
    texts = list(dataset.episode_text["task"])
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    arrays["task_index"] = np.repeat([numbers[text] for text in texts], lengths)
    if "success" in dataset.episode_info:
        arrays["next.success"] = np.repeat(dataset.episode_info["success"], lengths) & (
            steps == np.repeat(lengths - 1, lengths)
        )
    return arrays | {"task": np.array(texts)}


if __name__ == "__main__":
    if len(sys.argv) > 3:
        dataset = open_dataset(sys.argv[3])
    else:
        dataset = made_up()
        lerobot_writer.DATA_BYTES = 1  # a data file for each episode
        write_robomimic(dataset.with_keys(["state", "gripper"]), f"{sys.argv[1]}.hdf5", progress=False)
        lerobot_writer.write_lerobot(pusht_shaped(), f"{sys.argv[1]}.pusht", overwrite=True, progress=False)
    lerobot_writer.write_lerobot(dataset, sys.argv[1], overwrite=True, progress=False)
    np.savez(sys.argv[2], **expected_arrays(dataset))
