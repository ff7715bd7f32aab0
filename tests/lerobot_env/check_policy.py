"""Trains, resumes, evaluates and converts `lerobot_policy_scd` by LeRobot's own commands, and compares its histories.

    python check_policy.py DATASET

Runs in the environment of constraints/lerobot.txt, with scd_robot and the plugin. DATASET is what `check_lerobot.py`
reads; beside it lies DATASET.pusht.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from check_lerobot import mend_torchvision
from safetensors.torch import load_file, save_file

SMALL = {
    "n_obs_steps": 6,
    "history_length": 4,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "width": 32,
    "num_heads": 2,
    "chunk_size": 8,
    "n_action_steps": 4,
    "num_past_actions": 2,
    "num_denoising_steps": 2,
    "device": "cpu",
    "push_to_hub": "false",
}
CLOSE = {"rtol": 0, "atol": 2e-5}


@contextlib.contextmanager
def refused(kind, told):
    """Asserts that what is done inside raises such an error."""
    found = None
    try:
        yield
    except kind as error:
        found = str(error)
    assert told in (found or ""), f"expected a {kind.__name__} with {told!r}, got {found}"


def command(main, *arguments):
    """One of LeRobot's programs, in this process."""
    sys.argv = ["lerobot", *arguments]
    main()


def check_plugin_is_found():
    """LeRobot logs and swallows what goes wrong when it imports a plugin."""
    names = {found.metadata["Name"] for found in importlib.metadata.distributions()}
    assert "lerobot_policy_scd" in names, names
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    assert "scd" in PreTrainedConfig.get_known_choices()


def train(dataset, out, steps, *more, **policy):
    """`lerobot-train`; the folder of the last checkpoint."""
    from lerobot.scripts.lerobot_train import main

    settings = [f"--policy.{name}={value}" for name, value in {**SMALL, **policy}.items()]
    run = [f"--output_dir={out}", f"--steps={steps}", "--batch_size=4", "--num_workers=0", "--eval_freq=0"]
    data = ["--dataset.repo_id=local/check", f"--dataset.root={dataset}", "--dataset.video_backend=pyav"]
    command(main, "--policy.type=scd", *settings, *data, *run, *more)
    return out / "checkpoints" / "last" / "pretrained_model"


def check_training(dataset, out):
    """Updates, a moving average of them, a checkpoint, and a resumed run that goes on from it; the folder."""
    from lerobot.scripts.lerobot_train import main

    folder = train(dataset, out, 3, "--save_freq=2")
    before = load_file(out / "checkpoints" / "000002" / "pretrained_model" / "model.safetensors")
    third = load_file(folder / "model.safetensors")
    assert int(third["num_updates"]) == 3
    config = json.loads((folder / "train_config.json").read_text())
    decays = [(1 + n) / (10 + n) for n in (3,)]
    for name in [name for name in third if name.startswith("model.")]:
        averaged = name.replace("model.", "averaged.", 1)
        wanted = before[averaged] + (1 - decays[0]) * (third[name] - before[averaged])
        torch.testing.assert_close(third[averaged], wanted, msg=f"moving average of {name}")
    assert any((third[name] != before[name]).any() for name in third if name.startswith("model."))
    assert config["scheduler"]["type"] == "cosine_decay_with_warmup"
    command(main, f"--config_path={folder / 'train_config.json'}", "--resume=true", "--steps=5")
    resumed = out / "checkpoints" / "last" / "pretrained_model"
    assert resumed.resolve().parent.name == "000005"
    weights = load_file(resumed / "model.safetensors")
    assert int(weights["num_updates"]) == 5
    assert weights["still"].nonzero().flatten().tolist() == [3, 5]
    return resumed


def check_weights_are_complete(folder, out):
    """LeRobot would load what is there and say nothing."""
    from lerobot_policy_scd import ScdPolicy

    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["averaged.decoder.position"]
    save_file(weights, out / "model.safetensors")
    with refused(RuntimeError, "averaged.decoder.position"):
        ScdPolicy.from_pretrained(out)


def check_statistics(folder):
    """What is held at 0 is that of the statistics LeRobot normalises with: the folder's, in training the data's."""
    from lerobot_policy_scd import ScdPolicy

    own = ScdPolicy.from_pretrained(folder).still
    others = {
        key: {"min": torch.zeros(count), "max": torch.zeros(count)}
        for key, count in (("observation.state", 2), ("observation.environment_state", 16))
    }
    policy = ScdPolicy.from_pretrained(folder, dataset_stats=others)
    assert (policy.still == own).all(), "lerobot-record gives the statistics of what is being recorded"
    batch = training_batch(policy)
    policy.forward(batch)
    assert policy.still.all()


def training_batch(policy, rows=2):
    """Windows as LeRobot's datasets cut them, the first two steps of which lie before the episode."""
    config = policy.config
    steps, length = config.n_obs_steps, len(config.action_delta_indices)
    batch = {key: torch.rand(rows, steps, *config.input_features[key].shape) for key in config.observation_keys}
    outside = (torch.arange(steps) < 2).expand(rows, steps)
    batch |= {f"{key}_is_pad": outside for key in config.observation_keys}
    action = torch.rand(rows, length, *config.action_feature.shape)
    return {**batch, "action": action, "action_is_pad": torch.zeros(rows, length, dtype=torch.bool)}


def check_padding(folder):
    """Renamed observations leave the names of their padding behind; without any, all would count as history."""
    from lerobot_policy_scd import ScdPolicy
    from scd_robot.errors import ShapeError

    policy = ScdPolicy.from_pretrained(folder)
    batch = training_batch(policy)
    renamed = {key.replace("state_is_pad", "other_is_pad"): value for key, value in batch.items()}
    for one in (batch, renamed):
        assert (~policy._windows(one).step_valid).sum(1).tolist() == [2, 2]
    with refused(ShapeError, "observation.KEY_is_pad"):
        policy.forward({key: value for key, value in batch.items() if "state_is_pad" not in key})


def check_settings(folder):
    """Errors have the names that settings have in LeRobot, and what is not normalised is said."""
    from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature

    from lerobot_policy_scd import ScdPolicy
    from scd_robot.errors import ConfigError

    config = ScdPolicy.from_pretrained(folder).config
    camera = PolicyFeature(FeatureType.VISUAL, (3, 480, 640))
    for change, told in (
        ({"n_action_steps": 10}, "n_action_steps 10 exceeds the model's chunk_size 8"),
        ({"input_features": {**config.input_features, "observation.images.front": camera}}, "--policy.resize_images="),
        ({"normalization_mapping": {"STATE": NormalizationMode.MEAN_STD}}, "names nothing for ACTION, ENV"),
    ):
        with refused(ConfigError, told):
            dataclasses.replace(config, **change).policy_config()


def observations(policy, steps, rows, seed=0):
    """Normalised batches as LeRobot's loop gives them, one for each control step."""
    torch.manual_seed(seed)
    for _ in range(steps):
        batch = {"task": ["push"] * rows}
        for key, feature in policy.config.input_features.items():
            noise = torch.rand(rows, *feature.shape)
            batch[key] = noise if feature.type.value == "VISUAL" else 2 * noise - 1
        yield batch


def context_of(policy, batch):
    """What the encoder makes of a single observation."""
    policy.reset()
    policy.select_action(batch)
    return policy.context


def check_streaming(policy):
    """An episode with history, step by step: contexts are those of one pass over it, actions those of its plans."""
    config, rows, steps = policy.config, 3, 11
    seen = list(observations(policy, steps, rows))
    policy.reset()
    contexts, actions, plans = [], [], []
    for step, batch in enumerate(seen):
        noise = torch.randn(rows, config.chunk_size, policy.model.config.action_dim)
        actions.append(policy.select_action(batch, noise=noise))
        contexts.append(policy.context)
        if step % config.n_action_steps == 0:
            plans.append(policy.averaged.plan(policy.context, sampler=policy._how.sampler, noise=noise).actions)
    stacked = {
        key: torch.stack([policy._observed(batch, key) for batch in seen], dim=1) for key in config.observation_keys
    }
    encoded = {key: value[:, :: config.history_stride] for key, value in stacked.items()}
    with torch.inference_mode():
        whole = policy.averaged.encode(encoded)
    for step in range(steps):
        torch.testing.assert_close(contexts[step], whole[:, step // config.history_stride], **CLOSE)
        plan = plans[step // config.n_action_steps]
        torch.testing.assert_close(actions[step], plan[:, step % config.n_action_steps], **CLOSE)
    assert (contexts[-1] - contexts[-1 - config.history_stride]).abs().max() > 1e-3
    alone = context_of(policy, seen[-1])
    assert (alone - contexts[-1]).abs().max() > 1e-3, "the history before the last observation changes nothing"
    for key in policy.model.config.vector_keys:
        seen[-1][key] = torch.where(policy.still[policy.places[key]], 1e6, seen[-1][key])
    torch.testing.assert_close(context_of(policy, seen[-1]), alone)
    seen[-1][policy.model.config.vector_keys[0]][:, 0] *= 0.9
    assert (context_of(policy, seen[-1]) - alone).abs().max() > 1e-4
    from scd_robot.errors import ConfigError, ShapeError

    with refused(ShapeError, "call reset()"):
        policy.select_action({key: value[:1] for key, value in seen[0].items()})
    with refused(ShapeError, "is missing"):
        policy.select_action({})
    with refused(ConfigError, "inference_delay, prev_chunk_left_over"):
        policy.predict_action_chunk(seen[0], inference_delay=2, prev_chunk_left_over=torch.zeros(1, 4, 2))


def check_evaluation(folder, out):
    """`lerobot-eval` in gym-pusht."""
    from lerobot.scripts.lerobot_eval import main

    environment = ["--env.type=pusht", "--env.obs_type=environment_state_agent_pos", "--env.episode_length=12"]
    how = ["--eval.n_episodes=2", "--eval.batch_size=2", "--eval.use_async_envs=false", "--policy.device=cpu"]
    command(main, f"--policy.path={folder}", f"--output_dir={out}", *environment, *how)
    told = json.loads((out / "eval_info.json").read_text())
    assert told["overall"]["n_episodes"] == 2, told


def check_pictures(dataset, out):
    """Two updates on some features of a dataset with pictures, one of them resized; then an episode."""
    from lerobot_policy_scd import ScdPolicy

    features = {
        "observation.state": {"type": "STATE", "shape": [6]},
        "observation.gripper": {"type": "STATE", "shape": [1]},  # which LeRobot's windows have as numbers
        "observation.images.front": {"type": "VISUAL", "shape": [3, 64, 96]},
        "observation.images.gray": {"type": "VISUAL", "shape": [1, 16, 20]},
    }
    folder = train(dataset, out, 2, input_features=json.dumps(features), resize_images="[16, 24]", history_stride=2)
    policy = ScdPolicy.from_pretrained(folder)
    assert policy.model.config.observation_shapes["observation.images.front"] == (16, 24, 3)
    check_streaming(policy)


def check_conversion(folder, out):
    """A checkpoint of scd_robot that is made of the policy's folder acts as it does, in LeRobot's units."""
    from lerobot.policies.factory import make_pre_post_processors

    from lerobot_policy_scd import ScdPolicy
    from lerobot_policy_scd.convert import main
    from scd_robot.policies import load_policy
    from scd_robot.seeding import POLICY_NOISE, keyed_rng

    for wrong in (["--fps=0"], ["--fps=10", "--keys", "agent"], ["--fps=10", "--keys", "state=agent"]):
        with refused(SystemExit, "2"):
            command(main, str(folder), str(out), *wrong)
    both = ["observation.state=agent", "observation.environment_state=agent"]
    with refused(SystemExit, "2"):
        command(main, str(folder), str(out), "--fps=10", "--keys", *both)
    assert not out.exists()
    command(main, str(folder), str(out), "--fps=10", "--keys", "observation.state=agent")
    theirs, ours = ScdPolicy.from_pretrained(folder), load_policy(out)
    assert (ours.spec.control_dt, ours.spec.num_executed) == (0.1, SMALL["n_action_steps"])
    before, after = make_pre_post_processors(theirs.config, pretrained_path=folder)
    rng = np.random.default_rng(0)
    ours.reset(episodes=[5])
    shape = (theirs.config.chunk_size, 2)
    for step in range(9):
        state = rng.uniform(100, 400, (1, 2)).astype(np.float32)
        rest = rng.uniform(50, 450, (1, 16)).astype(np.float32)
        rest[:, 3], rest[:, 5] = 250.1 + 40 * (step % 2), 1.0 + step  # which never moved in the dataset
        observation = {"observation.state": state, "observation.environment_state": rest}
        noise = keyed_rng(POLICY_NOISE, 0, 5, step // SMALL["n_action_steps"]).standard_normal(shape, np.float32)
        batch = before({key: torch.from_numpy(value) for key, value in observation.items()})
        action = after(theirs.select_action(batch, noise=torch.from_numpy(noise)[None])).numpy()
        found = ours.act({"agent": state, "observation.environment_state": rest})
        torch.testing.assert_close(ours.context, theirs.context, **CLOSE)
        np.testing.assert_allclose(found, action, rtol=0, atol=0.01)  # of 300 pixels


def main(dataset, home):
    """All checks."""
    mend_torchvision()
    torch.set_num_threads(1)
    check_plugin_is_found()
    from lerobot_policy_scd import ScdPolicy

    folder = check_training(f"{dataset}.pusht", home / "run")
    check_weights_are_complete(folder, home / "incomplete")
    check_statistics(folder)
    check_padding(folder)
    check_settings(folder)
    check_streaming(ScdPolicy.from_pretrained(folder))
    check_evaluation(folder, home / "evaluation")
    check_conversion(folder, home / "converted")
    check_pictures(dataset, home / "pictures")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": home, "SDL_VIDEODRIVER": "dummy"}
        main(sys.argv[1], Path(home))
    print("the policy trains, resumes, acts and converts in LeRobot")
