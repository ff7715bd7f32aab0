"""Pretrained backbones: features are the network's own, statistics stay, weights are looked for only where asked to."""

import pickle
import sys
from pathlib import Path

import fake_timm
import pytest
import torch
from fake_timm import MEAN, STD, FakeTimm, pretrained_network
from safetensors.torch import save_file

from scd_robot.errors import CheckpointError, ConfigError, MissingDependencyError, ScdRobotError, UnknownNameError
from scd_robot.model import ScdConfig
from scd_robot.nn import Backbone, ImageConfig

EYE = {"eye": (16, 24, 3)}


@pytest.fixture(autouse=True)
def timm(monkeypatch: pytest.MonkeyPatch) -> FakeTimm:
    return fake_timm.install(monkeypatch)


def make(name: str = "conv.a", shapes=EYE, frozen: bool = True) -> Backbone:
    return Backbone(ImageConfig("pretrained", backbone=name, frozen=frozen), shapes)


def pictures(count: int = 3, shape=EYE["eye"]) -> torch.Tensor:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def written(network, path: Path, **changes) -> str:
    tensors = {**network.state_dict(), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    return str(path)


@pytest.mark.parametrize("name", ["conv.a", "last", "vit"])
@pytest.mark.parametrize("frozen", [True, False])
def test_features_are_those_of_the_network_in_evaluation(name: str, frozen: bool, tmp_path: Path) -> None:
    sized = {"img_size": (16, 24)} if name == "vit" else {}
    network = pretrained_network(name, **sized)
    backbone = make(name, frozen=frozen)
    backbone.load_pretrained(written(network, tmp_path / "weights.safetensors"))
    backbone.train()
    images = pictures()
    normalised = (images / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    wanted = network.forward_features(normalised.movedim(-1, 1))
    if name == "vit":
        wanted = wanted[:, 2:].reshape(3, 4, 6, 12)
    elif name == "conv.a":
        wanted = wanted.movedim(1, -1)
    found = backbone(images)
    assert found.shape[1:] == backbone.map_shapes["eye"]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backbone(images[1:2]), found[1:2], atol=1e-5, rtol=1e-5)  # each by itself
    assert found.requires_grad is not frozen


def test_statistics_do_not_move_and_frozen_weights_get_no_gradient() -> None:
    backbone = make(frozen=False).train()
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    backbone(pictures()).square().sum().backward()
    assert any(name.endswith("running_mean") for name in before)
    assert all(torch.equal(before[name], value) for name, value in backbone.named_buffers())
    assert not [name for name, p in backbone.named_parameters() if p.grad is None]
    assert not any(p.requires_grad for p in make().parameters())


def test_cameras_of_several_sizes_and_grey_ones_share_a_convolutional_network() -> None:
    backbone = make(shapes={"eye": (16, 24, 3), "wrist": (9, 12, 1)})
    assert backbone.map_shapes == {"eye": (4, 6, 8), "wrist": (3, 3, 8)}
    grey = pictures(2, (9, 12, 1))
    torch.testing.assert_close(backbone(grey), backbone(grey.expand(-1, -1, -1, 3)))


def test_building_reads_and_downloads_nothing(timm: FakeTimm) -> None:
    make()
    make("vit")
    assert [asked["pretrained"] for asked in timm.asked] == [False, False]


def test_embeddings_of_places_are_fitted_to_the_pictures(tmp_path: Path) -> None:
    backbone = make("vit")
    backbone.load_pretrained(written(pretrained_network("vit", img_size=(32, 32)), tmp_path / "w.safetensors"))
    assert backbone.network.pos_embed.shape == (1, 24, 12)


def test_weights_come_from_a_file_a_folder_or_the_hub_when_asked(timm: FakeTimm, tmp_path: Path) -> None:
    network = pretrained_network("conv.a")
    state = network.state_dict()
    (tmp_path / "folder").mkdir()
    sources = [written(network, tmp_path / "a.safetensors"), str(tmp_path / "folder"), str(tmp_path / "c.pth")]
    written(network, tmp_path / "folder" / "model.safetensors")
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "c.pth")
    found = []
    for source in sources:
        backbone = make()
        backbone.load_pretrained(source)
        found.append(backbone.state_dict())
    timm.hub = state
    backbone = make()
    backbone.load_pretrained("hub")
    for other in (*found, backbone.state_dict()):
        for name, value in other.items():
            if name.startswith("network."):
                assert torch.equal(value, state[name.removeprefix("network.")]), name
    downloads = [asked for asked in timm.asked if asked["pretrained"] and not asked["given"]]
    assert len(downloads) == 1


def test_a_hub_without_connection_is_told(timm: FakeTimm) -> None:
    with pytest.raises(CheckpointError, match=r"of conv.a could not be had from the hub: no connection; take its"):
        make().load_pretrained("hub")


class TestWrongWeights:
    def refused(self, source: Path | str, *told: str) -> None:
        backbone = make()
        before = backbone.digest()
        with pytest.raises(CheckpointError) as caught:
            backbone.load_pretrained(str(source))
        assert all(words in str(caught.value) for words in told), caught.value
        assert backbone.digest() == before

    def test_of_another_network(self, tmp_path: Path) -> None:
        source = written(pretrained_network("vit"), tmp_path / "w.safetensors")
        self.refused(source, "are not those of conv.a", "lacks bn1.bias, bn1.running_mean, bn1.running_var and", "has")

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"bn2.running_var": None}, "lacks bn2.running_var; set"),
            ({"extra.weight": torch.ones(2)}, "the file has extra.weight; set"),
            ({"conv1.weight": torch.ones(8, 3, 5, 5)}, "size mismatch for conv1.weight"),
        ],
    )
    def test_missing_more_or_other_ones(self, changes, told: str, tmp_path: Path) -> None:
        self.refused(written(pretrained_network("conv.a"), tmp_path / "w.safetensors", **changes), told)

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "none.safetensors", "there are no weights at", "or 'hub'")
        self.refused(tmp_path, "must hold one file of weights *.safetensors, found none")
        (tmp_path / "torn.safetensors").write_bytes(b"12345678")
        self.refused(tmp_path / "torn.safetensors", "cannot be read as weights")
        (tmp_path / "w.npz").write_bytes(b"")
        self.refused(tmp_path / "w.npz", "weights are read from .safetensors, .pth")
        torch.save([torch.ones(1)], tmp_path / "list.pt")
        self.refused(tmp_path / "list.pt", "must hold tensors by name")

    def test_nothing_is_unpickled(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self):
                return Path.touch, (tmp_path / "executed",)

        torch.save({"state_dict": Trap()}, tmp_path / "trap.pth")
        (tmp_path / "bare.pth").write_bytes(pickle.dumps(Trap(), 2))
        for name in ("trap.pth", "bare.pth"):
            self.refused(tmp_path / name, "cannot be read as weights of plain tensors")
        assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "shapes", "error", "told"),
    [
        ("covn", EYE, UnknownNameError, "did you mean 'conv'"),
        ("conv.c", EYE, ConfigError, "timm has no backbone conv.c: Invalid pretrained tag"),
        ("flat", EYE, ConfigError, r"flat gives no map of the picture but \(8,\)"),
        (
            "vit",
            {"eye": (16, 22, 3)},
            ConfigError,
            "patches of backbone vit, 4 x 4, must divide the sides of 'eye', 16",
        ),
        ("vit", {"a": (8, 8, 3), "b": (8, 16, 3)}, ConfigError, "one size of pictures, got 'a' 8 x 8, 'b' 8 x 16"),
    ],
)
def test_networks_that_do_not_fit_are_refused(name: str, shapes, error: type[ScdRobotError], told: str) -> None:
    with pytest.raises(error, match=told):
        make(name, shapes)


def test_a_missing_or_broken_timm_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingDependencyError, match=r"pip install 'scd_robot\[vision\]'"):
        make()
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(MissingDependencyError, match=r"cannot be imported \(operator torchvision::nms"):
        make()
    (tmp_path / "timm.py").write_text("import torchvisionn")
    with pytest.raises(MissingDependencyError, match=r"installed but cannot be imported.*torchvisionn"):
        make()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"encoder": "pretrained"}, "must be the name of a model of timm, such as 'resnet18.a1_in1k', got ''"),
        ({"encoder": "pretrained", "backbone": "hf-hub:a/b"}, "must be the name of a model of timm"),
        ({"encoder": "pretrained", "backbone": "conv.a", "tokens_per_image": 0}, "of 1 to 16, got 0"),
        ({"backbone": "conv.a"}, "are for images.encoder 'pretrained', got 'convolutional'"),
        ({"weights": "hub"}, "are for images.encoder 'pretrained'"),
        ({"encoder": "pretraind"}, "must be convolutional, patch or pretrained"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ImageConfig(**settings)


def test_a_configuration_needs_no_timm_and_refuses_what_backbones_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    images = ImageConfig("pretrained", backbone="conv.a")
    ScdConfig(observation_shapes=EYE, action_dim=2, images=images)
    with pytest.raises(ConfigError, match="'eye' has 4 channels"):
        ScdConfig(observation_shapes={"eye": (16, 24, 4)}, action_dim=2, images=images)
    from scd_robot.model import FrameConfig

    with pytest.raises(ConfigError, match=r"frames.camera needs images.encoder convolutional or patch"):
        ScdConfig(observation_shapes=EYE, action_dim=2, images=images, frames=FrameConfig("eye", beside_actions=True))
