import json
import sys
from pathlib import Path

import numpy as np
import pytest

from scd_robot.cli.main import main
from scd_robot.datasets.zarr.writer import ZarrWriter
from scd_robot.types import ArraySpec, DatasetSpec


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "a.zarr"
    with ZarrWriter(path, DatasetSpec({"state": ArraySpec((3,))}, 2, 0.1, "a test")) as writer:
        writer.append({"state": np.ones((4, 3)), "action": np.zeros((4, 2))})
    return path


def test_info_prints_a_table_and_writes_json(store, tmp_path, capsys):
    assert main(["data", "info", str(store), "--json", str(tmp_path / "info.json")]) == 0
    assert "episodes  1" in capsys.readouterr().out
    description = json.loads((tmp_path / "info.json").read_text())
    assert (description["steps"], description["keys"]["state"]["shape"]) == (4, [3])


def test_json_to_standard_output_is_all_that_stands_there(store, capsys):
    assert main(["data", "info", str(store), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "{store}", "--keys", "stata"], "did you mean 'state'"),
        (["info", "{store}.no"], "no dataset at"),
        (["record", "metaworld/push-v", "--episodes", "1", "--out", "{store}.new"], "did you mean 'metaworld/push-v3'"),
        (["record", "metaworld/push-v3", "--episodes", "0", "--out", "{store}.new"], "at least 1, got 0"),
        (["record", "metaworld/push-v3", "--episodes", "few", "--out", "{store}.new"], "few"),
        (["record", "metaworld/push-v3", "--out", "{store}.new"], "episodes"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(store, capsys, arguments, message):
    assert main(["data", *(text.format(store=store) for text in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in store.parent.iterdir()] == [store.name]


def test_record_in_an_environment_of_ones_own(tmp_path, monkeypatch, capsys):
    toys = str(Path(__file__).parents[1] / "sim_eval")
    (tmp_path / "own_point.py").write_text("from toy_environment import make_point as make\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [toys, *(folder for folder in sys.path if folder not in ("", "."))])
    assert main(["data", "record", "own_point:make", "--episodes", "3", "--workers", "2", "--out", "own.zarr"]) == 0
    assert "3 episodes" in capsys.readouterr().out
    assert main(["data", "replay", "own.zarr", "--env", "own_point:make"]) == 0


@pytest.mark.sim
def test_record_then_info(tmp_path, capsys):
    out, summary = tmp_path / "reach.zarr", tmp_path / "summary.json"
    arguments = ["data", "record", "metaworld/reach-v3", "--episodes", "2", "--out", str(out), "--seed", "1"]
    assert main([*arguments, "--json", str(summary)]) == 0
    assert "2 episodes" in capsys.readouterr().out
    assert main(["data", "info", str(out), "--json", str(tmp_path / "info.json")]) == 0
    assert json.loads(summary.read_text())["steps"] == json.loads((tmp_path / "info.json").read_text())["steps"]
    before = sorted(out.rglob("*"))
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert sorted(out.rglob("*")) == before


def test_the_environment_of_a_recording_is_written_for_evaluations(store, recordings, tmp_path, refused):
    from scd_robot.sim_eval.robosuite import recorded_env_args

    file = next((recordings / "robosuite_human" / "v1.4.1").rglob("*.hdf5"))
    assert main(["data", "info", str(file), "--env-args", str(tmp_path / "env.json")]) == 0
    found = recorded_env_args(str(tmp_path / "env.json"))
    assert found["env_name"]
    assert "controller_configs" in found
    refused(["data", "info", store, "--env-args", tmp_path / "no.json"], "does not tell a robosuite environment")
    assert not (tmp_path / "no.json").exists()
