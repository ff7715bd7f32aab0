"""Reads a dataset that scd_robot wrote with LeRobot itself, and compares all of it with what it was written from.

    python check_lerobot.py DATASET EXPECTED.npz

Runs in an environment with lerobot 0.4.4 and without scd_robot (constraints/lerobot.txt). EXPECTED holds by LeRobot's
names the arrays (N, ...) of all features, images as uint8 (N, H, W, C), and "task" (E,).
"""

import os
import sys
import tempfile
from pathlib import Path

import av
import numpy as np

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

MIN_PSNR_DB = 35.0


class VideoReader:
    """What LeRobot uses of the class of this name that torchvision has no more."""

    def __init__(self, path, stream):
        self.container = av.open(path)
        self._stream = self.container.streams.video[0]

    def seek(self, time_s, keyframes_only):
        self.container.seek(int(time_s / self._stream.time_base), stream=self._stream)

    def __iter__(self):
        import torch

        for frame in self.container.decode(self._stream):
            pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
            yield {"pts": float(frame.pts * frame.time_base), "data": pixels}


def mend_torchvision():
    """Lets torchvision be imported beside a torch it was not built for; LeRobot uses its transforms only."""
    from outside import shim

    shim.mend_torchvision()
    import torchvision

    torchvision.io.VideoReader = VideoReader


def check(folder, expected):
    """Raises AssertionError where LeRobot reads anything else than what is expected; returns the PSNR of cameras."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/check", root=folder, video_backend="pyav")
    tasks = expected.pop("task")
    episode_index = expected["episode_index"]
    assert len(dataset) == len(episode_index), (len(dataset), len(episode_index))
    assert dataset.num_episodes == len(tasks), (dataset.num_episodes, len(tasks))
    assert set(dataset.features) == set(expected), set(dataset.features) ^ set(expected)
    worst = dict.fromkeys(dataset.meta.camera_keys, np.inf)
    for row in range(len(dataset)):
        item = dataset[row]
        assert item["task"] == tasks[episode_index[row]], (row, item["task"])
        for key, values in expected.items():
            found = item[key].numpy()
            if key in worst:
                worst[key] = min(worst[key], psnr(np.moveaxis(found, 0, -1), values[row]))
            else:
                value = values[row].reshape(found.shape).astype(found.dtype)  # LeRobot makes float64 float32
                np.testing.assert_array_equal(found, value, err_msg=f"{key} in row {row}")
    for key, decibels in worst.items():
        least = np.inf if key in dataset.meta.image_keys else MIN_PSNR_DB
        assert decibels >= least, f"{key} has {decibels:.1f} dB, expected {least}"
    check_chunks(folder, dataset.fps, expected)
    check_statistics(folder, dataset.meta, expected)
    return worst


def psnr(found, image):
    """Peak signal-to-noise ratio [dB] of an image of 0 to 1 against one of 0 to 255."""
    assert found.shape == image.shape, (found.shape, image.shape)
    error = np.mean((np.round(found * 255.0) - image) ** 2)
    return 10 * np.log10(255**2 / error) if error else np.inf


def check_chunks(folder, fps, expected):
    """Pieces that LeRobot cuts out by the table of episodes do not reach into the next one."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    around = np.array([-1, 0, 2])
    dataset = LeRobotDataset(
        "local/check", root=folder, delta_timestamps={"action": [step / fps for step in around]}, video_backend="pyav"
    )
    first_end = int(np.argmax(expected["episode_index"] > 0))
    for row in (0, 1, first_end - 2, first_end - 1, first_end, first_end + 1):
        same = np.flatnonzero(expected["episode_index"] == expected["episode_index"][row])
        actions = expected["action"][np.clip(row + around, same[0], same[-1])]
        np.testing.assert_array_equal(dataset[row]["action"].numpy(), actions, err_msg=f"row {row}")


def check_statistics(folder, meta, expected):
    """Statistics are those of the numbers, and those of the episodes join to those of the whole by LeRobot's rule."""
    from lerobot.datasets.compute_stats import aggregate_stats
    from lerobot.datasets.utils import cast_stats_to_numpy, load_nested_dataset, unflatten_dict

    for key in set(expected) - set(meta.camera_keys):
        values = expected[key].astype(np.float64)
        for name in ("min", "max", "mean", "std"):
            found, value = meta.stats[key][name], getattr(values, name)(0)
            np.testing.assert_allclose(found, value.reshape(found.shape), atol=1e-9, rtol=1e-6, err_msg=f"{key} {name}")
        assert meta.stats[key]["count"].tolist() == [len(values)], (key, meta.stats[key]["count"])
    joinable = [key for key in expected if expected[key].shape[-1] == 3 or key not in meta.camera_keys]
    episodes = []
    for row in load_nested_dataset(Path(folder) / "meta" / "episodes"):
        flat = {name.removeprefix("stats/"): value for name, value in row.items() if name.startswith("stats/")}
        stats = cast_stats_to_numpy(unflatten_dict(flat))
        episodes.append({key: stats[key] for key in joinable})
    for key, stats in aggregate_stats(episodes).items():
        for name, value in stats.items():
            np.testing.assert_allclose(meta.stats[key][name], value, atol=1e-9, err_msg=f"{key} {name}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": home}
        mend_torchvision()
        decibels = check(sys.argv[1], dict(np.load(sys.argv[2])))
    print("LeRobot reads the same:", {key: f"{value:.1f} dB" for key, value in decibels.items()})
