"""Checkpoints that are damaged, foreign or hostile are refused by every verb that reads them; good ones come back."""

import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scd_robot.checkpoint import SCHEMA, find_checkpoint, list_checkpoints, read_checkpoint, write_checkpoint
from scd_robot.config import from_json
from scd_robot.errors import CheckpointError, OutputError
from scd_robot.normalization import FieldStatistics, Normalizer
from scd_robot.policies import load_policy
from scd_robot.training import ExperimentConfig
from scd_robot.types import ArraySpec, DatasetSpec

FILES = ("manifest.json", "model.safetensors", "config.json", "dataset.json", "normalization.json", "metrics.json")
STATE = "resume/training_state.ckpt"


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """The verbs choose torch's threads for their process, which is this one."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_folder(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(tiny_run, tmp_path / "finished" / "run")


@pytest.fixture
def readers(tiny_store: Path, tiny_train_options: list[str], tmp_path: Path) -> Callable[[Path], dict[str, list]]:
    """The verbs that read a checkpoint; none of them gets as far as writing or starting an environment."""

    def arguments(run: Path) -> dict[str, list]:
        checkpoint = list_checkpoints(run)[-1] if list_checkpoints(run) else run
        train = ["train", "metaworld_state", "--dataset", tiny_store, *tiny_train_options, "--max-steps", 4]
        return {
            "info": ["info", checkpoint],
            "eval": ["eval", checkpoint, "--env", "nowhere:make", "--out", tmp_path / "evaluation"],
            "init": [*train, "--out", tmp_path / "new", "--init", checkpoint, "--init-statistics", "dataset"],
            "resume": [*train, "--out", run, "--resume"],
        }

    return arguments


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def sign_again(checkpoint: Path) -> None:
    """Makes the manifest agree with the files, as somebody with bad intentions would."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in manifest["sha256"]:
        manifest["sha256"][name] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_refused_by_every_reader(name, damage, run_folder, readers, tmp_path, refused) -> None:
    arguments = readers(run_folder)
    damage(find_checkpoint(run_folder) / name)
    for reader in arguments.values():
        refused(reader, "scd: error: ", unchanged=[tmp_path])


@pytest.mark.parametrize("position", np.linspace(0, 0.999, 40))
def test_manifest_damaged_anywhere_never_ends_in_a_traceback(position, run_folder, capsys) -> None:
    from scd_robot.cli.main import main

    manifest = find_checkpoint(run_folder) / "manifest.json"
    data = bytearray(manifest.read_bytes())
    data[int(position * len(data))] ^= 0x15
    manifest.write_bytes(data)
    assert main(["info", str(manifest.parent)]) in (0, 2)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_damaged_training_state_is_refused_and_the_policy_still_loads(
    damage, run_folder, readers, tmp_path, refused
) -> None:
    damage(find_checkpoint(run_folder) / STATE)
    refused(readers(run_folder)["resume"], "training_state.ckpt", unchanged=[tmp_path])
    assert load_policy(run_folder).spec.action_dim == 2


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_training_state_is_not_executed(legacy, run_folder, readers, tmp_path, refused) -> None:
    state = find_checkpoint(run_folder) / STATE
    contents = torch.load(state, weights_only=True)
    trace = tmp_path / "was_executed"
    torch.save({**contents, "loops": Payload(trace)}, state, _use_new_zipfile_serialization=not legacy)
    sign_again(state.parents[1])
    refused(readers(run_folder)["resume"], "training_state.ckpt", "not a training state of plain tensors")
    assert not trace.exists()


@pytest.mark.parametrize("signed", [False, True])
def test_pickle_under_the_name_of_the_weights_is_not_executed(signed, run_folder, readers, tmp_path, refused) -> None:
    weights = find_checkpoint(run_folder) / "model.safetensors"
    trace = tmp_path / "was_executed"
    buffer = io.BytesIO()
    torch.save({"a": Payload(trace)}, buffer)
    for data in (pickle.dumps(Payload(trace)), buffer.getvalue()):
        weights.write_bytes(data)
        if signed:
            sign_again(weights.parent)
        for reader in readers(run_folder).values():
            refused(reader, "damaged or foreign" if signed else "changed since it was written", unchanged=[tmp_path])
    assert not trace.exists()


def test_folder_of_something_else_is_refused(tmp_path, readers, refused) -> None:
    foreign = tmp_path / "papers"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    for reader in readers(foreign).values():
        refused(reader, "not a checkpoint of scd_robot", unchanged=[tmp_path])
        missing = [str(part).replace("papers", "nowhere") for part in reader]
        refused(missing, "no checkpoint at", unchanged=[tmp_path])


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"format": "another"}', "not json", "\udcff"])
def test_manifest_of_something_else_is_refused(text, run_folder, readers, tmp_path, refused) -> None:
    arguments = readers(run_folder)
    (find_checkpoint(run_folder) / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    for reader in arguments.values():
        refused(reader, "manifest.json", unchanged=[tmp_path])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda d: d.pop("model")),
        ("config.json", lambda d: d["model"].pop("width")),
        ("config.json", lambda d: d["model"].update(width="wide")),
        ("config.json", lambda d: d["model"].update(colour="red")),
        ("config.json", lambda d: d["policy"].clear()),
        ("config.json", lambda d: d["policy"]["sampler"].update(solver="rk4")),
        ("dataset.json", lambda d: d.clear()),
        ("dataset.json", lambda d: d.update(action_dim="two")),
        ("dataset.json", lambda d: d.update(observation=[])),
        ("normalization.json", lambda d: d["goal"].pop("mean")),
        ("normalization.json", lambda d: d["goal"].update(mode="guess")),
        ("normalization.json", lambda d: d["goal"].update(mean=None)),
        ("normalization.json", lambda d: d["goal"].update(mean=[0.0])),
        ("normalization.json", lambda d: d.update(goal=[1])),
        ("normalization.json", lambda d: d.pop("goal")),
        ("normalization.json", lambda d: d.pop("action")),
    ],
)
def test_other_json_is_refused_even_if_signed(name, change, run_folder, readers, tmp_path, refused) -> None:
    checkpoint = find_checkpoint(run_folder)
    document = json.loads((checkpoint / name).read_text())
    change(document)
    (checkpoint / name).write_text(json.dumps(document))
    sign_again(checkpoint)
    arguments = readers(run_folder)
    for reader in ("info", "eval"):
        refused(arguments[reader], "scd: error: ", unchanged=[tmp_path])


def test_weights_of_another_model_are_refused(run_folder, readers, tmp_path, refused) -> None:
    weights = find_checkpoint(run_folder) / "model.safetensors"
    save_file({**load_file(weights), "another.weight": torch.zeros(3)}, weights)
    sign_again(weights.parent)
    arguments = readers(run_folder)
    for reader in ("eval", "init"):
        refused(arguments[reader], "do not fit", "another.weight", unchanged=[tmp_path])


def test_schema_and_policy_of_the_future_are_refused(run_folder, readers, tmp_path, refused) -> None:
    manifest = find_checkpoint(run_folder) / "manifest.json"
    document = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**document, "schema": SCHEMA + 1}))
    for reader in readers(run_folder).values():
        refused(reader, f"schema {SCHEMA + 1}", f"reads 1 to {SCHEMA}", unchanged=[tmp_path])
    manifest.write_text(json.dumps({**document, "policy": "sdc"}))
    refused(readers(run_folder)["eval"], "unknown policy type 'sdc'; did you mean 'scd'", unchanged=[tmp_path])


@pytest.mark.parametrize("schema", [1, 2, 3, 4, 5, 6, 7])
def test_checkpoints_of_earlier_schemas_are_read(schema, run_folder) -> None:
    checkpoint = find_checkpoint(run_folder)
    now = read_checkpoint(run_folder).config
    old = json.loads(json.dumps(now))
    assert now["model"]["context_in_history"] is False
    now["model"]["context_in_history"] = True
    del old["model"]["context_in_history"], old["model"]["encoder_modulation"]
    del old["training"]["sparse_history_probability"]
    for name in ("self_forcing", "backbone_learning_rate_factor", "cache_features") if schema < 7 else ():
        del old["training"][name]
    for name in ("backbone", "weights", "frozen") if schema < 7 else ():
        del old["model"]["images"][name]
    if schema < 7:
        del old["model"]["frames"]["autoencoder"]
    if schema < 6:
        del old["training"]["frames"]
        for name in ("beside_actions", "decoder_layers"):
            del old["model"]["frames"][name]
    if schema < 5:
        del old["transforms"]["tasks"], old["transforms"]["goals"], old["model"]["frames"]
    for name in ("encoder_bias", "step_end_input", "images") if schema < 4 else ():
        del old["model"][name]
    for name in ("objective", "trained", "augmentation", "images_in_memory_gb") if schema < 4 else ():
        del old["training"][name]
    if schema < 3:
        del old["model"]["architecture"], old["model"]["local_layers"]
        for name in ("group_by_length", "idle_weight", "disturbance_threshold"):
            del old["training"][name]
    if schema < 2:
        del old["model"]["history_stride"], old["transforms"]
    (checkpoint / "config.json").write_text(json.dumps(old))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "schema": schema}))
    sign_again(checkpoint)
    assert from_json(ExperimentConfig, read_checkpoint(run_folder).config, "config") == from_json(
        ExperimentConfig, now, "config"
    )
    assert load_policy(run_folder).spec.chunk_length == 4


def test_what_actions_ask_for_comes_with_the_policy(run_folder) -> None:
    """Checkpoints from before it was noted do not tell."""
    checkpoint = find_checkpoint(run_folder)
    dataset = json.loads((checkpoint / "dataset.json").read_text())
    assert dataset.pop("action_kind") == ""
    for kind in ({}, {"action_kind": "absolute"}):
        (checkpoint / "dataset.json").write_text(json.dumps({**dataset, **kind}))
        sign_again(checkpoint)
        assert load_policy(run_folder).spec.action_kind == kind.get("action_kind", "")


def test_new_fields_come_with_a_new_schema(tiny_run) -> None:
    """Other fields need another schema, and values for the checkpoints of this one (`_with_later_fields`)."""

    def names(tree, prefix=""):
        return sorted(
            name
            for key, value in tree.items()
            for name in (names(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"])
        )

    fields = [n for n in names(read_checkpoint(tiny_run).config) if "observation_shapes" not in n]
    assert (SCHEMA, hashlib.sha256(" ".join(fields).encode()).hexdigest()[:12]) == (9, "d8ccc1df0f33"), fields


def test_who_may_read_a_checkpoint_may_read_its_weights(tiny_run) -> None:
    """safetensors makes files that only their owner may read."""
    modes = {path.name: path.stat().st_mode for path in find_checkpoint(tiny_run).iterdir() if path.is_file()}
    assert "model.safetensors" in modes
    assert len(set(modes.values())) == 1, modes


def test_published_checkpoint_needs_no_training_state(run_folder, readers, tmp_path, refused) -> None:
    shutil.rmtree(find_checkpoint(run_folder) / "resume")
    assert load_policy(run_folder).spec.chunk_length == 4
    refused(readers(run_folder)["resume"], "no training state", "--init", unchanged=[tmp_path])


def write(folder: Path, **changes) -> dict:
    statistics = FieldStatistics((0.0,), (2.0,), (1.0,), (0.5,), (0.1,), (1.9,))
    contents = {
        "policy": "scd",
        "step": 3,
        "config": {"preset": "p", "model": {}, "policy": {}},
        "dataset": DatasetSpec({"a": ArraySpec((1,))}, 1, 0.1, "x"),
        "normalizer": Normalizer({"a": statistics}, {"a": "min_max"}),
        "weights": {"w": torch.arange(6.0).view(2, 3).T},
        "origin": {"dataset": "abc"},
        "metrics": {"loss": 0.5},
        **changes,
    }
    write_checkpoint(folder, **contents)
    return contents


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    contents = write(tmp_path / "step_00000003", metrics={"loss": 0.5, "gone": float("nan")})
    back = read_checkpoint(tmp_path / "step_00000003")
    assert (back.policy, back.step, back.config, back.dataset) == ("scd", 3, contents["config"], contents["dataset"])
    assert back.normalizer.to_json() == contents["normalizer"].to_json()
    assert torch.equal(back.weights["w"], contents["weights"]["w"])
    assert back.metrics == {"loss": 0.5, "gone": None}
    assert "torch" in back.versions


def test_run_folder_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write(tmp_path / "checkpoints" / f"step_{step:08d}", step=step)
    (tmp_path / "checkpoints" / ".step_00000200.partial").mkdir()
    assert read_checkpoint(tmp_path).step == 100
    assert [read_checkpoint(folder).step for folder in list_checkpoints(tmp_path)] == [9, 10, 100]


def test_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with pytest.raises(OutputError, match="exists already"):
        write(tmp_path / "a", step=4)
    assert read_checkpoint(tmp_path / "a").step == 3


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_any_end_of_writing_leaves_no_remains(error: BaseException, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("...")
        raise error

    with pytest.raises(type(error)):
        write(tmp_path / "a", write_resume=fail)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_file_is_named(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.open

    def refuse(self: Path, *args, **kwargs):
        if self.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: Permission denied"):
        read_checkpoint(run_folder)


def test_info_tells_what_delays_a_policy_was_trained_for(capsys) -> None:
    from scd_robot.cli.main import main

    tests = Path(__file__).parent
    for checkpoint, told in (
        (tests / "earlier_schemas" / "schema_7" / "checkpoint", ", trained for delays of up to 1 control step"),
        (tests.parent / "examples" / "checkpoints" / "push", ", not trained for delays"),
    ):
        assert main(["info", str(checkpoint)]) == 0
        assert told in capsys.readouterr().out


def test_info_tells_the_schema_of_the_files_and_the_history_in_control_steps(tmp_path, capsys) -> None:
    from scd_robot.cli.main import main

    tests = Path(__file__).parent
    assert main(["info", str(tests / "earlier_schemas" / "schema_3" / "checkpoint"), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == 3
    assert main(["info", str(tests.parent / "examples" / "checkpoints" / "cue_reach")]) == 0
    assert "history      511 control steps per layer (256 observations, one every 2)" in capsys.readouterr().out
