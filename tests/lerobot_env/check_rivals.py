"""Checks the rivals of benchmarks/outside against the packages they come from.

    python check_rivals.py DATASET DEMONSTRATIONS.hdf5

Runs in the environment of constraints/lerobot.txt. DATASET is what `check_lerobot.py` reads, DEMONSTRATIONS two of
its keys as robomimic HDF5. Windows are those of LeRobotDataset, and single policies in our loop act as
LeRobot's and robomimic's own loops do.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from check_lerobot import mend_torchvision

STEPS = 12
SEED, EPISODE = 3, 5
SMALL = {
    "unet": {"network": "unet", "down_dims": [8, 16]},
    "transformer": {"network": "transformer", "width": 16, "layers": 1, "heads": 2},
}


def check_windows(folder, demonstrations):
    """Windows of observations and actions, and where they may end."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.datasets.sampler import EpisodeAwareSampler
    from outside.demonstrations import Windows

    fps = LeRobotDataset("local/check", root=folder).fps
    seen, planned = np.arange(-1, 1), np.arange(-1, 7)
    times = {f"observation.{key}": [step / fps for step in seen] for key in demonstrations.widths}
    times["action"] = [step / fps for step in planned]
    dataset = LeRobotDataset("local/check", root=folder, delta_timestamps=times, video_backend="pyav")
    windows = Windows(demonstrations, len(seen), len(planned), dropped=1)
    episodes = dataset.meta.episodes
    starts, ends = episodes["dataset_from_index"], episodes["dataset_to_index"]
    sampler = EpisodeAwareSampler(starts, ends, drop_n_last_frames=1)
    assert windows.rows.tolist() == list(sampler), (windows.rows, list(sampler))
    observation, action, outside = windows.at(windows.rows)
    for number, row in enumerate(windows.rows):
        item = dataset[int(row)]
        found = np.concatenate([item[f"observation.{key}"].numpy().reshape(2, -1) for key in demonstrations.widths], 1)
        np.testing.assert_array_equal(observation[number], found, err_msg=f"observations of row {row}")
        np.testing.assert_array_equal(action[number], item["action"].numpy(), err_msg=f"actions of row {row}")
        np.testing.assert_array_equal(outside[number], item["action_is_pad"].numpy(), err_msg=f"row {row}")


def trained(arm, file, folder, model):
    """A policy after two updates, through files as in a benchmark; its configuration and weights."""
    import json

    from outside.run import list_checkpoints, load_run
    from outside.train import train
    from safetensors.torch import load_file

    train(arm, file, folder, 0, {"max_steps": 2, "batch_size": 4}, dict(model))
    [checkpoint] = list_checkpoints(folder)
    policy = load_run(str(folder), seed=SEED)
    assert policy.provenance["step"] == 2
    return policy, json.loads((checkpoint / "config.json").read_text()), load_file(checkpoint / "model.safetensors")


def observations(demonstrations):
    """By key, (1, width) in each of some control steps."""
    widths = list(demonstrations.widths.values())
    for row in range(STEPS):
        parts = np.split(demonstrations.observation[row : row + 1], np.cumsum(widths)[:-1], axis=1)
        yield dict(zip(demonstrations.widths, parts, strict=True))


def check_diffusion(demonstrations, file, folder, network):
    """Our loop acts as `select_action` does, with the same noise."""
    from outside import diffusion

    _, config, weights = trained("outside.diffusion", file, folder, SMALL[network])
    sampler = {"noise_scheduler_type": "DDIM", "num_inference_steps": 4}
    ours = diffusion.load_policy(config, weights, SEED, **sampler)
    theirs, before, after = diffusion.build(config, sampler)
    theirs.load_state_dict(weights)
    theirs.eval()
    ours.reset(episodes=[EPISODE])
    shape = theirs.config.horizon, config["action_dim"]
    for step, now in enumerate(observations(demonstrations)):
        plan = step // theirs.config.n_action_steps
        noise = np.random.default_rng((SEED, EPISODE, plan)).standard_normal(shape, np.float32)[None]
        joined = torch.from_numpy(np.concatenate(list(now.values()), 1))
        batch = before(diffusion._observation(config, joined))
        batch = {key: batch[key] for key in (diffusion.STATE, diffusion.REST)}
        action = after(theirs.select_action(batch, noise=torch.from_numpy(noise)))
        np.testing.assert_allclose(ours.act(now), action.numpy(), atol=1e-5, err_msg=f"{network}, step {step}")


def check_bc_rnn(demonstrations, file, folder):
    """Our loop acts as robomimic's RolloutPolicy does, also where its recurrent state begins anew."""
    from outside import bc_rnn
    from robomimic.algo import RolloutPolicy

    ours, config, weights = trained("outside.bc_rnn", file, folder, {"hidden_dim": 8})
    algorithm = bc_rnn._build(config)
    algorithm.nets.load_state_dict(weights)
    theirs = RolloutPolicy(algorithm)
    theirs.start_episode()
    ours.reset(episodes=[EPISODE])
    low, high = np.array(config["action_low"]), np.array(config["action_high"])
    for step, now in enumerate(observations(demonstrations)):
        torch.manual_seed(hash((SEED, EPISODE, step)))
        action = theirs({key: value[0] for key, value in now.items()})
        np.testing.assert_allclose(ours.act(now)[0], (action + 1) / 2 * (high - low) + low, atol=1e-5)


def main(dataset, file):
    """All checks."""
    from outside.demonstrations import read_demonstrations

    mend_torchvision()
    torch.set_num_threads(1)
    demonstrations = read_demonstrations(file)
    check_windows(dataset, demonstrations)
    with tempfile.TemporaryDirectory() as folder:
        for network in SMALL:
            check_diffusion(demonstrations, file, Path(folder) / network, network)
        check_bc_rnn(demonstrations, file, Path(folder) / "bc_rnn")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": home}
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    print("rivals see and act as LeRobot and robomimic do")
