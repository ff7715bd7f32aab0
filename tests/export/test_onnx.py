"""`scd export` to ONNX: what is in the folder, what runs it, and what is refused."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fake_timm
import numpy as np
import pytest
from pictures import picture_data, picture_policy
from small_policies import small_policy

from scd_robot import load_policy
from scd_robot.checkpoint import find_checkpoint
from scd_robot.cli.export import _recorded
from scd_robot.cli.main import main
from scd_robot.datasets import open_dataset
from scd_robot.errors import CheckpointError, ConfigError
from scd_robot.export import OnnxPolicy, is_export, load_exported, read_manifest
from scd_robot.nn import ImageConfig
from scd_robot.policies import ScdPolicy
from scd_robot.transforms import TransformConfig
from scd_robot.types import Policy


def observations(rows: int, steps: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {key: rng.uniform(-1, 1, (rows, 2)).astype(np.float32) for key in ("position", "goal")} for _ in range(steps)
    ]


def test_the_manifest_says_all_that_a_reader_in_another_language_needs(exported, tiny_run) -> None:
    document = json.loads((exported / "manifest.json").read_text())
    policy = load_policy(tiny_run)
    spec = {"chunk_length": 4, "num_executed": 2, "history_length": 4, "rate_hz": pytest.approx(20), "action_dim": 2}
    spec |= {"observation": {key: array.to_json() for key, array in policy.spec.observation.items()}, "tasks": []}
    assert document["spec"] == spec
    assert document["checkpoint"]["weights_sha256"] == policy.provenance["weights_sha256"]
    assert {"onnx", "torch", "scd_robot"} <= document["versions"].keys()
    for name, graph in document["graphs"].items():
        digest = hashlib.sha256((exported / graph["file"]).read_bytes()).hexdigest()
        assert document["sha256"][graph["file"]] == digest, name
    import onnxruntime

    for graph in document["graphs"].values():
        session = onnxruntime.InferenceSession(exported / graph["file"])
        for side, ports in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            assert [(port["name"], port["shape"]) for port in graph[side]] == [(p.name, p.shape) for p in ports]
    inputs = [port["name"] for port in document["graphs"]["encoder_step"]["inputs"]]
    assert inputs[:3] == ["observation.goal", "observation.position", "active"]
    assert inputs[3:7] == ["cache.slot_position", "cache.token_valid", "cache.position", "cache.keys_0"]
    names = ["context", "noise", "prefix", "prefix_length"]
    assert [port["name"] for port in document["graphs"]["plan"]["inputs"]] == names


def test_the_report_is_beside_the_graphs_and_they_are_good(exported) -> None:
    report = json.loads((exported / "parity.json").read_text())
    assert report == json.loads(exported.with_suffix(".json").read_text())
    assert report["good"]
    assert report["control_steps"] == 24
    assert max(report[name]["max"] for name in ("context", "action", "velocity")) < 1e-4
    assert sorted(path.name for path in exported.parent.iterdir()) == ["tiny", "tiny.json"]  # nothing half done


def test_an_episode_gives_the_actions_of_the_checkpoint(exported, tiny_run) -> None:
    policy, runner, actions = load_policy(tiny_run, seed=7), OnnxPolicy(exported, seed=7), []
    assert isinstance(runner, Policy)
    assert runner.spec == policy.spec
    for one in (policy, runner):
        one.reset(episodes=[5, 8])
        actions.append(np.stack([one.act(observation) for observation in observations(2, 20)]))
    np.testing.assert_allclose(actions[1], actions[0], atol=1e-5)
    other = OnnxPolicy(exported, seed=8)
    other.reset(episodes=[5, 8])
    assert np.abs(other.act(observations(2, 1)[0]) - actions[0][0]).max() > 1e-3


RUN_WITHOUT_TORCH = """
import sys
for name in ("torch", "scipy", "onnx", "lightning", "tyro", "zarr"):
    sys.modules[name] = None  # importing it fails
import numpy as np
from scd_robot.export import OnnxPolicy
policy = OnnxPolicy({folder!r})
policy.reset(episodes=[5])
rng = np.random.default_rng(0)
for _ in range(6):
    seen = {{key: rng.uniform(-1, 1, (1, 2)).astype(np.float32) for key in ("position", "goal")}}
    action = policy.act(seen)
heavy = [name for name in sys.modules if name.split(".")[0] in ("torch", "scipy") and sys.modules[name]]
print(action.tolist(), heavy)
"""


def test_running_it_needs_numpy_and_onnxruntime_only(exported, tiny_run) -> None:
    code = RUN_WITHOUT_TORCH.format(folder=str(exported))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    policy = load_policy(tiny_run)
    policy.reset(episodes=[5])
    for observation in observations(1, 6):
        expected = policy.act(observation)
    found, loaded = re.fullmatch(r"(\[\[.*\]\]) (\[.*\])\n", done.stdout).groups()  # type: ignore[union-attr]
    np.testing.assert_allclose(json.loads(found), expected, atol=1e-5)
    assert loaded == "[]"


def test_scd_eval_of_the_folder_executes_the_actions_of_the_checkpoint(exported, tiny_run, point, tmp_path) -> None:
    from safetensors.numpy import load_file

    found = []
    for name, source in (("checkpoint", tiny_run), ("export", exported)):
        options = ["--env", point, "--episodes", "3", "--max-steps", "9", "--num-videos", "0", "--num-envs", "2"]
        assert main(["eval", str(source), *options, "--out", str(tmp_path / name)]) == 0
        found.append(load_file(tmp_path / name / "actions.safetensors"))
    assert found[0].keys() == found[1].keys() == {"0", "1", "2"}
    for episode, actions in found[0].items():
        np.testing.assert_allclose(found[1][episode], actions, atol=1e-4)
    made = json.loads((tmp_path / "export" / "result.json").read_text())["provenance"]["policy"]
    assert made["export"]["kind"] == "onnx"
    assert made["settings"]["num_denoising_steps"] == 2


def test_it_is_swept_and_compared_like_the_checkpoint(exported, tiny_run, point, tmp_path, refused) -> None:
    few = ["--env", point, "--episodes", "2", "--num-videos", "0", "--num-envs", "2"]
    sweep = ["sweep", str(exported), str(tiny_run), *few, "--out", str(tmp_path / "sweep")]
    assert main(sweep) == 0
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["evaluations"]
    assert rows[0]["policy"] == str(exported)
    assert rows[0]["successes"] == rows[1]["successes"]
    written = Path(rows[0]["folder"]) / "result.json"
    before = written.stat().st_mtime_ns
    assert main(sweep) == 0
    assert written.stat().st_mtime_ns == before
    other = shutil.copytree(exported, tmp_path / "other" / exported.name)
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    compare = ["compare", str(other), str(tiny_run), *few, "--json", str(tmp_path / "comparison.json")]
    assert main(compare) == 0
    arms = json.loads((tmp_path / "comparison.json").read_text())
    assert arms["a"]["episodes"] == arms["b"]["episodes"] == 2


def test_scd_info_tells_what_it_was_made_of_and_how_good_it_is(exported, tiny_run, tmp_path, capsys, refused) -> None:
    assert main(["info", str(exported), "--json", str(tmp_path / "info.json")]) == 0
    out = capsys.readouterr().out
    assert f"made of      {find_checkpoint(tiny_run)}, preset metaworld_state, step 4" in out
    assert "observation  position (2,), goal (2,)" in out or "observation  goal (2,), position (2,)" in out
    assert "largest differences from the checkpoint: context " in out
    description = json.loads((tmp_path / "info.json").read_text())
    assert description["parity"]["good"]
    spoiled = shutil.copytree(exported, tmp_path / "spoiled")
    (spoiled / "plan.onnx").write_bytes(b"x")
    refused(["info", spoiled], "plan.onnx was truncated or changed")
    (spoiled / "plan.onnx").write_bytes((exported / "plan.onnx").read_bytes())
    for text in ("{}", "[]", '{"context": 1}'):
        (spoiled / "parity.json").write_text(text)
        refused(["info", spoiled], "parity.json is damaged")
    (spoiled / "parity.json").unlink()
    assert main(["info", str(spoiled)]) == 0
    assert "not compared with the checkpoint" in capsys.readouterr().out


def test_an_episode_with_its_goal_is_compared(tiny_store, tiny_train_options, tmp_path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    told = ["--dataset", str(tiny_store), "--out", str(run), "--goals", "position", "--max-steps", "2"]
    assert main(["train", "metaworld_state", *told, *tiny_train_options]) == 0
    data, policy = open_dataset(tiny_store), load_policy(run)
    steps = _recorded(policy, tiny_store, 1, 2)
    last = data.episode(1)["position"][-1]
    assert all(np.array_equal(step["goal.position"], [last, last]) for step in steps)
    np.testing.assert_array_equal(steps[1]["position"], data.episode(1)["position"][1:3])
    options = ["--out", str(out), "--format", "torch-export", "--dataset", str(tiny_store), "--batch-size", "2"]
    assert main(["export", str(run), *options]) == 0
    assert json.loads((out / "parity.json").read_text())["observations"] == "recorded"


def test_the_policy_server_serves_it_like_the_checkpoint(exported, tiny_run) -> None:
    pytest.importorskip("websockets")
    from scd_robot.serve.engine import Engine, Session
    from scd_robot.serve.requests import Request

    chunks = []
    for policy in (load_policy(tiny_run), OnnxPolicy(exported)):
        engine, sessions = Engine(policy), [Session(), Session()]
        for step in range(6):
            seen = observations(2, 6)[step]
            answers = engine.run(
                [
                    (session, Request(observation={key: value[row] for key, value in seen.items()}))
                    for row, session in enumerate(sessions)
                ]
            )
        chunks.append([answer.message["actions"] for answer in answers])
    np.testing.assert_allclose(chunks[1], chunks[0], atol=1e-5)


def test_the_control_loop_is_driven_by_it(exported) -> None:
    from scd_robot.control import ControlLoop, ExecutionConfig, Limits, LoopConfig
    from scd_robot.control.interfaces import Sample

    class Robot:
        def observe(self) -> Sample:
            seen = {key: value[0] for key, value in observations(1, 1)[0].items()}
            return Sample(seen, loop_time(), pose=np.zeros(2))

        def send(self, command: np.ndarray) -> None:
            assert np.isfinite(command).all()

        def hold(self) -> None: ...

    import time

    loop_time = time.monotonic
    limits = Limits((-1.0, -1.0), (1.0, 1.0), (100.0, 100.0), (1e4, 1e4), rest=(None, None))
    policy = OnnxPolicy(exported)
    loop = ControlLoop(Robot(), policy, limits, LoopConfig(execution=ExecutionConfig("prefix")))
    # On a busy machine the first plans come too late.
    report = loop.run(1000, until=lambda: loop._journal.steps >= 30 and loop._planning.counts["followed"] >= 1)
    assert report.plans["followed"] >= 1
    assert "encoder_error" not in report.faults
    assert "plan_error" not in report.faults


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "plan.onnx").write_bytes(b"x"), r"plan\.onnx was truncated or changed"),
        (lambda folder: (folder / "plan.onnx").unlink(), r"plan\.onnx is missing"),
        (lambda folder: edit(folder, schema=99), "has export schema 99, this version of scd_robot reads 1"),
        (lambda folder: edit(folder, settings={}), r"manifest\.json is damaged"),
        (lambda folder: edit(folder, batch_size=0), r"manifest\.json is damaged: .* less than 1"),
        (lambda folder: edit(folder, batch_size=2), r"manifest\.json is damaged: .* none of them actions \(2, 4, 2\)"),
        (lambda folder: edit(folder, keys=["nope"]), r"manifest\.json is damaged: .*'spec' has observation"),
        (
            lambda folder: edit_part(folder, "architecture", history_stride=0),
            r"manifest\.json is damaged: .* less than 1",
        ),
        (
            lambda folder: edit_part(folder, "architecture", chunk_length=3),
            r"manifest\.json is damaged: .*'spec' has chunk",
        ),
        (lambda folder: edit_part(folder, "spec", rate_hz=3), r"manifest\.json is damaged: .*'spec' has rate_hz = 3"),
        (lambda folder: edit_part(folder, "transforms", rename={"nope": "x"}), r"manifest\.json is damaged: .*nope"),
        (lambda folder: edit(folder, kind="tflite"), "holds graphs of kind 'tflite'"),
        (lambda folder: (folder / "manifest.json").unlink(), "is not an exported policy"),
    ],
)
def test_a_folder_that_was_changed_is_refused(exported, tmp_path, spoil, told) -> None:
    shutil.copytree(exported, tmp_path / "copy")
    spoil(tmp_path / "copy")
    with pytest.raises(CheckpointError, match=told):
        load_exported(tmp_path / "copy")


def edit(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_part(folder: Path, part: str, **changes: object) -> None:
    edit(folder, **{part: json.loads((folder / "manifest.json").read_text())[part] | changes})


def test_settings_that_are_part_of_the_graphs_are_refused(exported) -> None:
    assert load_exported(exported, num_executed=3, seed=4, num_denoising_steps=2).spec.num_executed == 3
    with pytest.raises(ConfigError, match="num_denoising_steps is part of the exported graphs, 2 here"):
        load_exported(exported, num_denoising_steps=4)
    with pytest.raises(ConfigError, match=r"num_executed must be .* at most its chunk_length 4, got 5"):
        OnnxPolicy(exported, num_executed=5)


def test_what_cannot_be_exported_or_run_is_refused_and_nothing_written(exported, tiny_run, refused, tmp_path) -> None:
    out = ["--out", tmp_path / "new"]
    refused(["export", tiny_run, "--out", exported], "exists already", unchanged=[exported])
    refused(["export", tiny_run, *out, "--batch-size", "0"], "--batch-size must be at least 1")
    refused(["export", tiny_run, *out, "--tolerance", "0"], "--tolerance must be positive")
    refused(["export", exported, *out], "is not of an scd_robot checkpoint, but of 'scd_robot export'")
    refused(["sweep", exported, "--env", "x", *out, "--device", "cuda"], "exported graphs run on the CPU")
    refused(["eval", exported, "--env", "x", "--device", "cuda"], "exported graphs run on the CPU")
    refused(["eval", exported, "--env", "x", "--diagnose-history", "2"], "are for checkpoints")
    refused(["serve", exported, "--num-denoising-steps", "9"], "is part of the exported graphs")
    assert list(tmp_path.iterdir()) == []
    assert not is_export(tiny_run)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["pictures", "backbone", "real-time chunking", "concat"])
def test_onnx_follows_the_policy_through_evictions(case: str, tmp_path, monkeypatch) -> None:
    pytest.importorskip("onnxscript")
    from scd_robot.export.write import export_policy

    fake_timm.install(monkeypatch)
    images = ImageConfig("pretrained", backbone="conv.a") if case == "backbone" else ImageConfig(channels=(8, 8))
    models = {"real-time chunking": {"max_delay_steps": 3}, "concat": {"fusion": "concat", "max_delay_steps": 2}}
    policy: ScdPolicy = (
        picture_policy("separable", picture_data(), TransformConfig(), observation_tokens="per_key", images=images)
        if case in ("pictures", "backbone")
        else small_policy(models[case], guidance_scale=1.5 if case == "concat" else 1.0)
    )
    report = export_policy(policy, tmp_path / "out", batch_size=2)
    assert report["good"]
    assert read_manifest(tmp_path / "out").batch_size == 2
