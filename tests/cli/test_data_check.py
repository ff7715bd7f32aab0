"""`scd data validate` and `scd data replay`: exit codes, JSON, and the page."""

import json

import numpy as np
import pytest

from scd_robot.cli.main import main
from scd_robot.datasets import ZarrWriter
from scd_robot.types import ArraySpec, DatasetSpec

SPEC = DatasetSpec({"state": ArraySpec((3,))}, 2, 0.1, "a test")


def write(path, spoil=None):
    rng = np.random.default_rng(0)
    with ZarrWriter(path, SPEC) as writer:
        for length in (20, 30, 25):
            state = np.cumsum(rng.standard_normal((length, 3)), axis=0)
            writer.append({"state": state, "action": rng.standard_normal((length, 2))})
    if spoil is not None:
        import zarr

        zarr.open_group(path, mode="r+")["data/state"][spoil, 1] = np.nan
    return path


def test_a_good_dataset_is_fit_for_training(tmp_path, capsys):
    assert main(["data", "validate", str(write(tmp_path / "a.zarr"))]) == 0
    assert "0 errors" in capsys.readouterr().out


def test_what_spoils_training_is_told_with_its_place_and_exit_code_1(tmp_path, capsys):
    page, report = tmp_path / "page.html", tmp_path / "report.json"
    path = write(tmp_path / "a.zarr", spoil=20 + 7)
    assert main(["data", "validate", str(path), "--html", str(page), "--json", str(report)]) == 1
    assert "episode 1 step 7" in capsys.readouterr().out
    document = json.loads(report.read_text())
    (finding,) = [f for f in document["findings"] if f["severity"] == "error"]
    assert (finding["key"], finding["episode"], finding["step"]) == ("state", 1, 7)
    text = page.read_text()
    assert "<html" in text
    assert "http://" not in text.replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["validate", "{a}.no"], "no dataset at"),
        (["validate", "{a}", "--json", "{a}"], "it is a folder"),
        (["replay", "{a}", "--env", "metaworld/push-v"], "did you mean 'metaworld/push-v3'"),
        (["replay", "{a}", "--env", "pusht", "--episodes", "0"], "at least 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, refused, arguments, told):
    path = write(tmp_path / "a.zarr")
    refused(["data", *(text.format(a=path) for text in arguments)], told, unchanged=[tmp_path])


@pytest.mark.sim
def test_our_own_recording_replays_and_another_simulation_does_not(tmp_path, capsys):
    out, report = tmp_path / "push.zarr", tmp_path / "replay.json"
    assert main(["data", "record", "metaworld/push-v3", "--episodes", "2", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["data", "replay", str(out), "--env", "metaworld/push-v3", "--json", str(report)]) == 0
    assert "succeeded 2 of 2" in capsys.readouterr().out
    assert json.loads(report.read_text())["reproduces"] is True
    assert main(["data", "replay", str(out), "--env", "metaworld/reach-v3"]) in (1, 2)


def test_info_writes_pictures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "pictures"
    assert main(["data", "info", str(write(tmp_path / "a.zarr")), "--plot", str(folder)]) == 0
    assert "pictures in" in capsys.readouterr().out
    pictures = list(folder.iterdir())
    assert len(pictures) >= 3
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
