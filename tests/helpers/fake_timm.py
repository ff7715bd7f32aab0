"""A stand-in for timm with small networks: what scd_robot uses of it, as tests/lerobot_env/check_vision.py finds it.

conv.a, conv.b    convolutions with BatchNorm; channels first
last              the same, channels last
vit               patches of 4 x 4, two tokens before them, built for one size of pictures
flat              gives no map
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

NAMES = ("conv.a", "conv.b", "last", "vit", "flat")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Conv(nn.Module):
    """(N, 3, H, W) to (N, 8, H / 4, W / 4), rounded up."""

    def __init__(self, kind: str, num_classes: int) -> None:
        super().__init__()
        self.kind, self.num_features = kind, 8
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        if self.kind == "flat":
            return x.mean((2, 3))
        return x.movedim(1, -1) if self.kind == "last" else x


class Vit(nn.Module):
    """(N, 3, H, W) to (N, 2 + h * w, 12)."""

    def __init__(self, num_classes: int, img_size: tuple[int, int]) -> None:
        super().__init__()
        self.num_features, self.num_prefix_tokens = 12, 2
        self.patch_embed = nn.Conv2d(3, 12, 4, 4)
        self.patch_embed.grid_size = tuple(side // 4 for side in img_size)
        self.patch_embed.patch_size = (4, 4)
        places = self.patch_embed.grid_size[0] * self.patch_embed.grid_size[1]
        self.prefix = nn.Parameter(torch.randn(1, 2, 12))
        self.pos_embed = nn.Parameter(torch.randn(1, places, 12))
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        return self.norm(torch.cat((self.prefix.expand(len(x), -1, -1), x), 1))


def get_pretrained_cfg(name: str) -> Any:
    """As timm's, for the fields that are used."""
    if name not in NAMES:
        raise RuntimeError(f"Invalid pretrained tag for {name}.")
    return SimpleNamespace(fixed_input_size=name == "vit")


class FakeTimm(ModuleType):
    """Records how networks were asked for in `asked`."""

    def __init__(self) -> None:
        super().__init__("timm")
        self.asked: list[dict[str, Any]] = []
        self.hub: dict[str, Tensor] | None = None  # what a download would give; None = no connection
        self.get_pretrained_cfg = get_pretrained_cfg

    def is_model(self, name: str) -> bool:
        return name in {known.partition(".")[0] for known in NAMES}

    def list_models(self) -> list[str]:
        return sorted({known.partition(".")[0] for known in NAMES})

    def create_model(
        self,
        name: str,
        pretrained: bool = False,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        num_classes: int = 10,
        img_size: tuple[int, int] = (32, 32),
    ) -> nn.Module:
        given = (pretrained_cfg_overlay or {}).get("state_dict")
        self.asked.append({"name": name, "pretrained": pretrained, "given": given is not None})
        is_vit = name == "vit"
        network: nn.Module = Vit(num_classes, img_size) if is_vit else Conv(name.partition(".")[0], num_classes)
        network.pretrained_cfg = {"mean": MEAN, "std": STD, "classifier": "head" if is_vit else "fc"}
        if pretrained:
            given = self.hub if given is None else given
            if given is None:
                raise OSError("no connection")
            given = {key: value for key, value in given.items() if not key.startswith(("head.", "fc."))}
            if is_vit:  # as timm adapts embeddings of places
                count = network.pos_embed.shape[1]
                resized = nn.functional.interpolate(given["pos_embed"].transpose(1, 2), count)
                given["pos_embed"] = resized.transpose(1, 2)
            network.load_state_dict(given, strict=False)
        return network


def install(monkeypatch: pytest.MonkeyPatch) -> FakeTimm:
    """Puts it in the place of timm."""
    fake = FakeTimm()
    monkeypatch.setitem(sys.modules, "timm", fake)
    return fake


def pretrained_network(name: str, seed: int = 7, **options: Any) -> nn.Module:
    """A network as somebody else trained it, with a classifier, and statistics that are not those of a new one."""
    torch.manual_seed(seed)
    network = FakeTimm().create_model(name, **options).eval()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            part.num_batches_tracked.fill_(99)
    return network
