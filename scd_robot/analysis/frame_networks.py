"""Networks of others that judge pictures, built here, with weights that the user has (docs/analysis.md).

Two measures that the literature tells of imagined pictures, and that need a network which was trained elsewhere:

    LPIPS   per frame: distance of two pictures in the features of AlexNet or VGG-16 (Zhang et al., 1801.03924)
    FVD     of all clips: Frechet distance of the features of clips in I3D (Unterthiner et al., 1812.01717)

Files hold tensors alone, whose names are those of torchvision (AlexNet, VGG-16; of timm too) and of the translation of
I3D to torch (`rgb_imagenet.pt`). TorchScript, in which I3D is passed on as well, is a program and not read.

Shapes: N pieces of recordings, Tf frames, H W C picture, F features of a clip.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from scd_robot.errors import CheckpointError, ShapeError
from scd_robot.nn import read_weights

__all__ = ["FEWEST_CLIPS", "FEWEST_FRAMES", "ClipFeatures", "Lpips", "frechet_distance"]

FEWEST_CLIPS = 2  # of which there is a covariance
FEWEST_FRAMES = 9  # I3D halves their number three times, rounding up, and wants two

Frames = NDArray[np.uint8]
Numbers = NDArray[np.float64]

_TOGETHER = 16  # pictures that go through a network at once
_CLIP_SIDE = 224  # pixels
_CLASSES = 400  # of Kinetics

_LINEAR = "lin{}.model.1.weight"  # names of LPIPS's own weights, which torchmetrics comes with
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pictures
_EPSILON = 1e-8


class Lpips:
    """Distance of two pictures in the features of a network: 0 for equal ones, larger the less alike they look.

    The network is AlexNet or VGG-16, whichever the weights are of; what weighs its channels comes with torchmetrics.

    Args:
        weights: file with the weights of its convolutions.
        device: torch device.

    Attributes:
        network: "alex" or "vgg".

    Raises:
        CheckpointError: there is no such file, or it is of neither network.
    """

    def __init__(self, weights: str | Path, device: str | torch.device = "cpu") -> None:
        given = read_weights(weights)
        first = given.get("features.0.weight")
        if first is None or tuple(first.shape) not in ((64, 3, 11, 11), (64, 3, 3, 3)):
            found = "there is none" if first is None else f"its shape is {tuple(first.shape)}"
            raise CheckpointError(
                f"the weights {weights} are neither AlexNet's nor VGG-16's, whose features.0.weight is (64, 3, 11, 11) "
                f"or (64, 3, 3, 3): {found}; take torchvision's file of one of them (or timm's of vgg16)"
            )
        self.network = "alex" if first.shape[-1] == 11 else "vgg"
        body, self._taps = _alexnet() if self.network == "alex" else _vgg16()
        _load(nn.ModuleDict({"features": body}), given, f"the weights {weights} are not those of {self.network}")
        self._body, self.device = body.to(device), torch.device(device)
        self._mean, self._std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (_MEAN, _STD))
        self._linear = _linear_weights(self.network, device)

    def check_size(self, shape: Sequence[int]) -> None:
        """Refuses pictures (H, W, C) that are too small for the network.

        Raises:
            ShapeError: says what it needs.
        """
        least = 31 if self.network == "alex" else 16
        if min(shape[:2]) < least:
            raise ShapeError(
                f"LPIPS with {self.network} needs pictures of at least {least} x {least} pixels, the model's are "
                f"{shape[0]} x {shape[1]}; leave LPIPS out, or take a model of larger ones"
            )

    def distances(self, recorded: Frames, frames: Sequence[Frames]) -> list[Numbers]:
        """Of each array of frames from the recorded ones.

        Args:
            recorded: (N, Tf, H, W, 1 or 3) uint8; grey ones have three equal channels.
            frames: such arrays.

        Returns:
            (N, Tf) of each.
        """
        self.check_size(recorded.shape[2:])
        flat = [np.reshape(x, (-1, *x.shape[2:])) for x in (recorded, *frames)]
        found: list[list[Tensor]] = [[] for _ in frames]
        for start in range(0, len(flat[0]), _TOGETHER):
            truth, *others = (self._features(x[start : start + _TOGETHER]) for x in flat)
            for distances, other in zip(found, others, strict=True):
                distances.append(self._distance(truth, other))
        return [torch.cat(x).double().cpu().numpy().reshape(recorded.shape[:2]) for x in found]

    @torch.inference_mode()
    def _features(self, pictures: Frames) -> list[Tensor]:
        """Of pictures (n, H, W, C), (n, c, h, w) at each tap, of length 1 in every place."""
        x = _channels_first(pictures, self.device) / 255
        x, found = (x - self._mean) / self._std, []
        for number, layer in enumerate(self._body):
            x = layer(x)
            if number in self._taps:
                found.append(x / torch.sqrt(x.square().sum(dim=1, keepdim=True) + _EPSILON))
        return found

    def _distance(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """(n,)."""
        weighed = zip(a, b, self._linear, strict=True)
        return torch.stack([((x - y).square() * w).sum(dim=1).mean(dim=(1, 2)) for x, y, w in weighed]).sum(dim=0)


class ClipFeatures(nn.Module):
    """I3D (Carreira and Zisserman, 1705.07750): 400 numbers of a clip, its classes' logits, as FVD takes them.

    Args:
        weights: file of them.
        device: torch device.

    Raises:
        CheckpointError: there is no such file, or it is of another network.
    """

    def __init__(self, weights: str | Path, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self._layers = list(_i3d_layers())
        for name, layer in self._layers:
            self.add_module(name, layer)
        self.logits = _Unit(1024, _CLASSES, 1, last=True)
        _load(self, read_weights(weights), f"the weights {weights} are not those of I3D with {_CLASSES} classes")
        self.requires_grad_(False).eval().to(device)
        self.device = torch.device(device)

    def forward(self, clips: Tensor) -> Tensor:
        """(B, F) of clips (B, 3, Tf, 224, 224) in -1..1, of at least 9 frames."""
        x = clips
        for _, layer in self._layers:
            x = layer(x)
        x = functional.avg_pool3d(x, (2, 7, 7), stride=1)
        return torch.as_tensor(self.logits(x).mean(dim=(2, 3, 4)))

    @torch.inference_mode()
    def of(self, clips: Frames) -> Numbers:
        """(N, F) of clips (N, Tf, H, W, 1 or 3) uint8.

        Raises:
            ShapeError: too few frames.
        """
        if clips.shape[1] < FEWEST_FRAMES:
            raise ShapeError(f"FVD needs clips of at least {FEWEST_FRAMES} frames, got {clips.shape[1]}")
        found = []
        for clip in clips:  # one at a time: at 224 x 224 pixels they are large
            frames = _channels_first(clip, self.device)
            frames = functional.interpolate(frames, (_CLIP_SIDE, _CLIP_SIDE), mode="bilinear", align_corners=False)
            found.append(self((2 * frames / 255 - 1).movedim(1, 0)[None])[0])
        return np.asarray(torch.stack(found).double().cpu().numpy())


def frechet_distance(a: Numbers, b: Numbers) -> float:
    """Of the normal distributions with the means and covariances of features (N, F) and (M, F), N and M at least 2.

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^1/2). With A and B the centred features over the root of
    their number less one, cov_a = A'A, and the trace of the root is the sum of the singular values of AB': no root of a
    matrix is taken, which for fewer clips than features is singular.

    Raises:
        ShapeError: other shapes.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < FEWEST_CLIPS:
        raise ShapeError(
            f"features must be (N, F) and (M, F) of at least {FEWEST_CLIPS} clips each, got {a.shape} and {b.shape}"
        )
    means = [x.mean(axis=0) for x in (a, b)]
    scaled = [(x - mean) / np.sqrt(len(x) - 1) for x, mean in zip((a, b), means, strict=True)]
    spreads = sum(float(np.square(x).sum()) for x in scaled)
    shared = float(np.linalg.svd(scaled[0] @ scaled[1].T, compute_uv=False).sum())
    return max(0.0, float(np.square(means[0] - means[1]).sum()) + spreads - 2 * shared)


def _channels_first(pictures: Frames, device: torch.device) -> Tensor:
    """(n, 3, H, W) float of pictures (n, H, W, 1 or 3); grey ones have three equal channels."""
    x = torch.tensor(pictures, device=device).movedim(-1, 1).float()
    return x.expand(-1, 3, -1, -1)


def _load(network: nn.Module, given: dict[str, Tensor], refusal: str) -> None:
    """Takes what the network needs and leaves the rest of the file, classifiers for instance."""
    wanted = {name: x for name, x in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    missing = sorted(wanted.keys() - given.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{refusal}: {missing[0]}{more} is missing")
    for name, own in wanted.items():
        if given[name].shape != own.shape:
            raise CheckpointError(f"{refusal}: {name} must be {tuple(own.shape)}, got {tuple(given[name].shape)}")
    network.load_state_dict({name: given[name] for name in wanted}, strict=False)
    network.requires_grad_(False)


def _linear_weights(network: str, device: str | torch.device) -> list[Tensor]:
    """(c, 1, 1) at each tap: how much each channel counts."""
    package = find_spec("torchmetrics")
    assert package is not None
    assert package.origin is not None
    given = read_weights(Path(package.origin).parent / "functional" / "image" / "lpips_models" / f"{network}.pth")
    return [given[_LINEAR.format(i)][0].float().to(device) for i in range(len(given))]


def _alexnet() -> tuple[nn.Sequential, set[int]]:
    """Its convolutions, numbered as in torchvision, and the numbers of the layers whose output is looked at."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    for before, after in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers), {1, 4, 7, 9, 11}


def _vgg16() -> tuple[nn.Sequential, set[int]]:
    """The same of VGG-16: the last layer before each pooling is looked at."""
    layers: list[nn.Module] = []
    taps, before = set(), 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers += [nn.MaxPool2d(2, 2)] if layers else []
        for _ in range(count):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
        taps.add(len(layers) - 1)
    return nn.Sequential(*layers), taps


class _Unit(nn.Module):
    """Convolution over time and space, batch statistics as trained, ReLU; the last one is a convolution with biases."""

    def __init__(self, before: int, after: int, size: int, stride: int = 1, last: bool = False) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(before, after, size, stride, bias=last)
        self.bn = nn.Identity() if last else nn.BatchNorm3d(after, eps=1e-3)
        self._size, self._last = (size,) * 3, last

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv3d(_padded(x, self._size, self.conv3d.stride)))
        return x if self._last else functional.relu(x)


class _Pool(nn.Module):
    """Largest value; zeros outside, which change nothing after a ReLU."""

    def __init__(self, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        super().__init__()
        self._size, self._stride = size, stride

    def forward(self, x: Tensor) -> Tensor:
        return functional.max_pool3d(_padded(x, self._size, self._stride), self._size, self._stride)


class _Mixed(nn.Module):
    """Four branches side by side; `widths` of their convolutions in the order of their names."""

    def __init__(self, before: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.b0 = _Unit(before, widths[0], 1)
        self.b1a, self.b1b = _Unit(before, widths[1], 1), _Unit(widths[1], widths[2], 3)
        self.b2a, self.b2b = _Unit(before, widths[3], 1), _Unit(widths[3], widths[4], 3)
        self.b3a, self.b3b = _Pool((3, 3, 3), (1, 1, 1)), _Unit(before, widths[5], 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], dim=1)


_MIXED = {  # name -> widths
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def _i3d_layers() -> Iterator[tuple[str, nn.Module]]:
    yield "Conv3d_1a_7x7", _Unit(3, 64, 7, stride=2)
    yield "MaxPool3d_2a_3x3", _Pool((1, 3, 3), (1, 2, 2))
    yield "Conv3d_2b_1x1", _Unit(64, 64, 1)
    yield "Conv3d_2c_3x3", _Unit(64, 192, 3)
    yield "MaxPool3d_3a_3x3", _Pool((1, 3, 3), (1, 2, 2))
    before = 192
    for name, widths in _MIXED.items():
        if name == "Mixed_4b":
            yield "MaxPool3d_4a_3x3", _Pool((3, 3, 3), (2, 2, 2))
        if name == "Mixed_5b":
            yield "MaxPool3d_5a_2x2", _Pool((2, 2, 2), (2, 2, 2))
        yield name, _Mixed(before, widths)
        before = widths[0] + widths[2] + widths[4] + widths[5]


def _padded(x: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """With zeros, as TensorFlow's "SAME" has it: an odd one more at the end."""
    sides: list[int] = []
    for length, kernel, step in zip(x.shape[:1:-1], size[::-1], stride[::-1], strict=True):
        total = max((-(-length // step) - 1) * step + kernel - length, 0)
        sides += [total // 2, total - total // 2]
    return functional.pad(x, sides)
