"""`scd convert-policy`: an entangled run in, an ordinary separable run out, with a record of where it came from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scd_robot.analysis.conversion import plan_conversion, write_converted
from scd_robot.checkpoint import find_checkpoint, read_checkpoint
from scd_robot.cli.main import main
from scd_robot.policies import CausalDitPolicy, ScdPolicy, load_policy

STEPS = 14


@pytest.fixture(autouse=True)
def threads_as_before():
    """The verbs choose torch's threads for their process, which is this one."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def entangled_run(tiny_store, tiny_train_options, tmp_path_factory) -> Path:
    """Folder of an entangled run of three layers and some steps."""
    out = tmp_path_factory.mktemp("entangled") / "run"
    model = ["model.architecture=entangled", "model.context_corruption=0", "training.validate_every=14"]
    options = ["--dataset", str(tiny_store), "--out", str(out), "--max-steps", str(STEPS)]
    assert main(["train", "metaworld_state", *options, *tiny_train_options, *model]) == 0
    return out


@pytest.fixture
def arguments(entangled_run, tiny_store, tmp_path) -> list:
    options = ["--threads", "1", "--accelerator", "cpu", "--rounds", "3", "--encoder-layers", "0:2"]
    return ["convert-policy", entangled_run, "--dataset", tiny_store, "--out", tmp_path / "separable", *options]


def run(arguments: list, *more: str) -> int:
    return main([str(argument) for argument in (*arguments, *more)])


def test_a_conversion_is_an_ordinary_run_that_tells_where_it_came_from(
    arguments, entangled_run, tmp_path, point, capsys
) -> None:
    assert run(arguments, "--env", point, "--episodes", "3") == 0
    shown, out = capsys.readouterr().out, tmp_path / "separable"
    document = json.loads((out / "conversion.json").read_text())
    assert isinstance(load_policy(entangled_run), CausalDitPolicy)
    assert type(load_policy(out)) is ScdPolicy
    result, source = read_checkpoint(out), read_checkpoint(entangled_run)
    assert result.step == 4 == document["updates"]["fine_tuning"]  # 30 % of 14
    record = result.origin["conversion"]
    assert record == document["conversion"]
    assert record["source_weights_sha256"] == source.weights_sha256
    assert (record["encoder_layers"], record["decoder_layers"]) == ([0, 1], [0, 2])
    assert document["same_dataset"]
    assert document["success"]["episodes"] == 3
    assert document["loss"]["fine_tuned"] == pytest.approx(result.metrics["val/loss"], rel=1e-5)
    assert document["loss"]["source"] == pytest.approx(source.metrics["val/loss"], rel=1e-5)
    assert {"planning tick", "idle tick", "encoder step"} < set(document["latency_ms"]["converted"])
    assert "0-1 + 0,2" in shown
    assert run(["info", out]) == 0
    assert f"converted    from {find_checkpoint(entangled_run)}" in capsys.readouterr().out


def test_what_is_fine_tuned_are_the_copied_weights(arguments, entangled_run, tmp_path) -> None:
    settings = ["--set", "training.learning_rate=1e-12", "training.weight_decay=0"]
    assert run(arguments, "--max-steps", "1", "--fusion", "concat", "--num-context-tokens", "2", *settings) == 0
    before, after = (read_checkpoint(tmp_path / "separable" / name).weights for name in ("converted", ""))
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    source = read_checkpoint(entangled_run).weights
    assert torch.equal(before["decoder.blocks.1.mlp.0.weight"], source["decoder.blocks.2.mlp.0.weight"])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--encoder-layers", "0:7"], "the model has 3 layers, 0 to 2"),
        (["--decoder-layers", "middle"], "the model has 3 layers, 0 to 2"),
        (["--num-context-tokens", "9"], "exceeds chunk_length 4"),
        (["--set", "model.width=8"], "the rest of the model follows from the source"),
        (["--max-steps", "0"], "max_steps must be at least 1"),
        (["--rounds", "0"], "rounds and episodes must be at least 1, got 0"),
        (["--env", "nowhere/at-all"], "unknown environment"),
        (["--keys", "positon"], "did you mean 'position'"),
    ],
)
def test_what_cannot_be_converted_is_refused_at_once(more, told, arguments, tmp_path, refused) -> None:
    refused([*arguments, *more], told, unchanged=[tmp_path])


def test_separable_policies_and_used_folders_are_refused(arguments, tiny_run, tmp_path, refused) -> None:
    refused([arguments[0], tiny_run, *arguments[2:]], "only entangled policies", unchanged=[tmp_path])
    assert run(arguments, "--max-steps", "1") == 0
    refused(arguments, "exists already; choose another --out", unchanged=[tmp_path], at_once=False)


def test_where_a_backbone_came_from_is_still_told(entangled_run, tmp_path) -> None:
    planned = plan_conversion(entangled_run, "0:2", "first:1,last:1", num_context_tokens=2, fusion="prefix")
    backbone = {"name": "conv.a", "sha256": "0"}
    source = replace(planned.source, origin={**planned.source.origin, "backbone": backbone})
    write_converted(replace(planned, source=source), tmp_path / "converted")
    assert read_checkpoint(tmp_path / "converted").origin["backbone"] == backbone


def test_other_episodes_than_the_sources_are_told(arguments, tmp_path, capsys, caplog) -> None:
    assert run(arguments, "--max-steps", "1", "--only", "0-4") == 0
    assert "ANOTHER one, or read otherwise" in capsys.readouterr().out
    assert "was not trained on these episodes" in caplog.text
    assert not json.loads((tmp_path / "separable" / "conversion.json").read_text())["same_dataset"]


@pytest.mark.parametrize("how", [["--goals", "position"], ["--keys", "position"], ["--only", "0-4"]])
def test_a_source_is_converted_with_the_data_as_it_was_read(
    how, tiny_store, tiny_train_options, arguments, tmp_path
) -> None:
    model = ["model.architecture=entangled", "model.context_corruption=0", "training.validate_every=2"]
    options = ["--dataset", str(tiny_store), "--out", str(tmp_path / "source"), "--max-steps", "2", *how]
    assert main(["train", "metaworld_state", *options, *tiny_train_options, *model]) == 0
    again = [] if how[0] == "--goals" else how  # the checkpoint has them
    assert run([arguments[0], tmp_path / "source", *arguments[2:]], "--max-steps", "1", *again) == 0
    document = json.loads((tmp_path / "separable" / "conversion.json").read_text())
    assert document["same_dataset"]
    assert document["latency_ms"]["converted"]["planning tick"]["p50"] > 0
