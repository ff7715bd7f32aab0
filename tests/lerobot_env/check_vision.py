"""Compares backbones with the timm that is installed: features, weights, training, checkpoints, and what is refused.

    python check_vision.py

Runs in the environment of constraints/lerobot.txt, with scd_robot. Nothing is downloaded: networks get random weights,
which are written to files as if somebody had trained them.
"""

import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from check_lerobot import mend_torchvision
from safetensors.torch import save_file

SIZE = (112, 84)  # divided by 14 and 4
SHAPES = {"front": (*SIZE, 3), "wrist": (*SIZE, 1)}
NETWORKS = (
    "resnet18.a1_in1k",
    "convnext_atto.d2_in1k",
    "efficientnet_b0.ra_in1k",
    "swin_tiny_patch4_window7_224.ms_in1k",
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_small_patch14_dinov2.lvd142m",
    "vit_small_patch14_reg4_dinov2.lvd142m",
)


@contextlib.contextmanager
def refused(kind, *told):
    """Asserts that what is done inside raises such an error."""
    found = None
    try:
        yield
    except kind as error:
        found = str(error)
    assert all(words in (found or "") for words in told), f"expected a {kind.__name__} with {told}, got {found}"


def written(name, folder, seed=0):
    """A file of weights as somebody else has it: of the size that the network is trained with, with its classifier."""
    import timm

    torch.manual_seed(seed)
    network = timm.create_model(name, pretrained=False)
    for part in network.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)
            part.weight.data.uniform_(0.5, 1.5)  # 0 would hide what is before it
    file = folder / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, file)
    return file


def settings(name, frozen=True, weights=""):
    """How such a backbone is configured."""
    from scd_robot.nn import ImageConfig

    return ImageConfig("pretrained", tokens_per_image=2, backbone=name, weights=str(weights), frozen=frozen)


def size_for(name):
    """(H, W) that the patches of a network divide."""
    return (112, 80) if "patch16" in name else SIZE


@torch.no_grad()
def check_features(name, file):
    """A backbone's maps are what timm itself makes of the file and of normalised pictures."""
    import timm

    from scd_robot.nn import Backbone

    height, width = size_for(name)
    backbone = Backbone(settings(name), {"eye": (height, width, 3)})
    backbone.load_pretrained(str(file))
    cfg = timm.get_pretrained_cfg(name)
    sized = {"img_size": (height, width)} if cfg.fixed_input_size else {}
    network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **sized).eval()
    images = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (cfg.mean, cfg.std))
    x = (images.movedim(-1, 1) / 255 - mean) / std
    wanted = network.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0].movedim(1, -1)
    found = backbone.train()(images)
    if name.startswith("swin"):  # timm leaves the norm of a map out there
        wanted = network.norm(wanted)
    if name.startswith("efficientnet"):  # and the last convolution here
        wanted = network.bn2(network.conv_head(wanted.movedim(-1, 1))).movedim(1, -1)
    assert found.shape[1:] == backbone.map_shapes["eye"], (name, found.shape)
    assert wanted.std() > 1e-3, name
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}: {text}")
    torch.testing.assert_close(backbone(images[1:]), found[1:], rtol=1e-4, atol=1e-4)


def small_model(name, frozen, file=None):
    """An `ScdModel` with two cameras."""
    from scd_robot.model import ScdConfig, build_model

    torch.manual_seed(1)
    config = ScdConfig(
        observation_shapes={"state": (2,), **SHAPES},
        action_dim=2,
        width=16,
        num_heads=2,
        encoder_layers=1,
        history_length=4,
        chunk_length=4,
        num_past_actions=0,
        images=settings(name, frozen),
    )
    model = build_model(config)
    if file is not None:
        model.tokenizer.backbone.load_pretrained(str(file))
    return model


def observations(steps=3):
    """Control steps of one row."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        seen = {key: rng.integers(0, 256, (1, *shape), np.uint8) for key, shape in SHAPES.items()}
        yield {"state": rng.uniform(-1, 1, (1, 2)).astype(np.float32), **seen}


def check_updates(name, file):
    """An update of all that learns: what is frozen stays, what is fine-tuned moves, statistics stay."""
    for frozen in (True, False):
        model = small_model(name, frozen, file).train()
        backbone = model.tokenizer.backbone
        before = {key: value.clone() for key, value in backbone.state_dict().items()}
        learns = [p for p in model.parameters() if p.requires_grad]
        seen = {key: torch.from_numpy(value)[:, None] for key, value in next(observations()).items()}
        context = model.encode(seen)
        (context * torch.randn(context.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        torch.optim.AdamW(learns, 0.01, weight_decay=0).step()
        moved = {key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
        assert moved == (set() if frozen else {key for key, _ in backbone.named_parameters()}), (
            name,
            frozen,
            moved ^ before.keys(),
        )


def policy_of(model):
    """A policy with plain normalisation."""
    from scd_robot.normalization import FieldStatistics, Normalizer
    from scd_robot.policies import ScdPolicy
    from scd_robot.policies.config import ScdPolicyConfig
    from scd_robot.types import ArraySpec, DatasetSpec

    one, two = (1.0, 1.0), (0.5, 0.5)
    statistics = FieldStatistics((-1.0, -1.0), one, (0.0, 0.0), two, (-1.0, -1.0), one)
    normalizer = Normalizer(
        dict.fromkeys(("state", "action"), statistics), dict.fromkeys(("state", "action"), "min_max")
    )
    specs = {"state": ArraySpec((2,)), **{key: ArraySpec(shape, "uint8") for key, shape in SHAPES.items()}}
    return ScdPolicy(model, normalizer, DatasetSpec(specs, 2, 0.1, "check"), ScdPolicyConfig(num_executed=2))


def act(policy):
    """Actions over a few control steps."""
    policy.reset(episodes=[4])
    return np.stack([policy.act(seen) for seen in observations()])


def check_round_trip(name, file, folder):
    """A checkpoint acts as the policy that was written, without the file; the backbone is in it once."""
    from safetensors.torch import load_file

    from scd_robot.checkpoint import write_checkpoint
    from scd_robot.config import to_json
    from scd_robot.policies import load_policy
    from scd_robot.transforms import TransformConfig

    policy = policy_of(small_model(name, True, file))
    file.unlink()
    parts = {"model": policy.model.config, "policy": policy.config, "transforms": TransformConfig()}
    config = {"preset": "check", **{key: to_json(value) for key, value in parts.items()}}
    write_checkpoint(
        folder / name,
        policy="scd",
        step=0,
        config=config,
        dataset=policy.transforms.dataset,
        normalizer=policy.normalizer,
        weights=policy.model.state_dict(),
        origin={},
        metrics={},
    )
    np.testing.assert_array_equal(act(load_policy(folder / name)), act(policy))
    stored = load_file(folder / name / "model.safetensors")
    own = sum(value.numel() for value in policy.model.tokenizer.backbone.state_dict().values())
    assert sum(v.numel() for k, v in stored.items() if k.startswith("tokenizer.backbone.")) == own


def check_refusals(folder):
    """Weights of another network, or none; networks that give no map of such pictures."""
    from scd_robot.errors import CheckpointError, ConfigError, UnknownNameError
    from scd_robot.nn import Backbone

    eye = {"eye": (*SIZE, 3)}
    file = written("resnet10t.c3_in1k", folder)
    with refused(CheckpointError, "are not those of resnet18.a1_in1k", "lacks", "has"):
        Backbone(settings("resnet18.a1_in1k"), eye).load_pretrained(str(file))
    with refused(CheckpointError, "could not be had from the hub"):
        Backbone(settings("resnet10t.c3_in1k"), eye).load_pretrained("hub")
    with refused(UnknownNameError, "did you mean"):
        Backbone(settings("resnet81"), eye)
    with refused(ConfigError, "timm has no backbone resnet18.none"):
        Backbone(settings("resnet18.none"), eye)
    with refused(ConfigError, "14 x 14, must divide the sides of 'eye', 96 x 96"):
        Backbone(settings("vit_small_patch14_dinov2.lvd142m"), {"eye": (96, 96, 3)})
    with refused(ConfigError, "one size of pictures"):
        Backbone(settings("vit_tiny_patch16_224"), {"a": (96, 96, 3), "b": (64, 96, 3)})
    with refused(ConfigError, "gives no map of the picture"):
        Backbone(settings("hiera_tiny_224.mae"), {"eye": (224, 224, 3)})


def main(folder):
    """All checks."""
    mend_torchvision()
    torch.set_num_threads(1)
    files = {name: written(name, folder) for name in NETWORKS}
    for name, file in files.items():
        check_features(name, file)
    for name in ("resnet18.a1_in1k", "vit_small_patch14_dinov2.lvd142m"):
        check_updates(name, files[name])
        check_round_trip(name, files[name], folder / "checkpoints")
    check_refusals(folder)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as home:
        os.environ["HF_HOME"] = home
        main(Path(home))
    print("backbones give timm's features, keep and store its weights")
