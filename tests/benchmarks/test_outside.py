"""Rivals from outside: how they see the demonstrations, begin episodes, and take part in a queue."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_jobs import FOLDER, load

from scd_robot.datasets import ZarrWriter, open_dataset
from scd_robot.datasets.hdf5.robomimic_writer import write_robomimic
from scd_robot.types import ArraySpec, DatasetSpec

common, reporting, run_job = map(load, ("common", "reporting", "run_job"))
sys.path.append(str(FOLDER))
from outside.demonstrations import Windows, read_demonstrations  # noqa: E402
from outside.rows import ChunkPolicy  # noqa: E402
from outside.train import read_settings  # noqa: E402
from outside.transformer import ActionTransformer  # noqa: E402

LENGTHS = (5, 2, 9)
RECORDING = common.Recording("point")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three episodes; the first number of a position is its row in the whole."""
    spec = DatasetSpec({"position": ArraySpec((2,)), "goal": ArraySpec((2,))}, 2, 0.05)
    path, row = tmp_path / "recordings" / f"{RECORDING.name}.zarr", 0
    with ZarrWriter(path, spec) as writer:
        for length in LENGTHS:
            rows = np.arange(row, row + length, dtype=np.float32)[:, None] * np.ones(2, np.float32)
            row += length
            writer.append({"position": rows, "goal": -rows, "action": rows})
    return path


# ----- demonstrations


def test_windows_hold_one_episode_with_its_ends_repeated(store: Path, tmp_path: Path) -> None:
    write_robomimic(open_dataset(store), tmp_path / "point.hdf5", progress=False)
    data = read_demonstrations(tmp_path / "point.hdf5")
    assert data.widths == {"goal": 2, "position": 2}
    assert data.ends.tolist() == [5, 7, 16]
    windows = Windows(data, num_observations=2, horizon=4, dropped=2)
    assert windows.rows.tolist() == [0, 1, 2, 5, 7, 8, 9, 10, 11, 12, 13]  # of a short episode the first step is left
    observation, action, outside = windows.at(np.array([0, 4, 5, 14]))
    assert observation[..., 2].tolist() == [[0, 0], [3, 4], [5, 5], [13, 14]]
    assert action[..., 0].tolist() == [[0, 0, 1, 2], [3, 4, 4, 4], [5, 5, 6, 6], [13, 14, 15, 15]]
    assert outside.tolist() == [[1, 0, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 1]]


# ----- policies


def noise_as_action(observation: Any, noise: Any) -> Any:
    return noise + observation.sum(axis=(1, 2))[:, None, None]


def chunk_policy() -> ChunkPolicy:
    return ChunkPolicy(noise_as_action, ["x"], 2, (3, 1), seed=4)


def observe(*values: float) -> dict[str, Any]:
    return {"x": np.array(values, np.float32)[:, None]}


def test_a_row_does_the_same_alone_and_in_a_batch() -> None:
    alone, batch = chunk_policy(), chunk_policy()
    alone.reset(episodes=[7])
    batch.reset(episodes=[1, 2])
    for step in range(5):
        batch.act(observe(9, step))
    batch.reset(rows=[0], episodes=[7])
    for step in range(7):
        together = batch.act(observe(step, 5))
        np.testing.assert_array_equal(alone.act(observe(step)), together[:1])
        assert alone.planned is not None
        assert batch.planned is not None
        assert alone.planned[0] == batch.planned[0] == (step % 3 == 0)
    assert batch.drain_timings()["plan_rows"][0] == 2
    assert batch.drain_timings() == {"plan_ms": [], "plan_rows": []}


def test_history_begins_with_the_first_observation_repeated() -> None:
    seen = []
    policy = ChunkPolicy(lambda o, n: seen.append(o[0, :, 0].tolist()) or n, ["x"], 3, (2, 1), seed=0)
    policy.reset(episodes=[0])
    for step in range(5):
        policy.act(observe(step))
    assert seen == [[0, 0, 0], [0, 1, 2], [2, 3, 4]]


def test_actions_see_no_later_action_and_no_later_observation() -> None:
    torch.manual_seed(0)
    model = ActionTransformer(2, 3, horizon=5, num_observations=2, width=16, layers=2, heads=2).eval()
    sample, seen, step = torch.randn(1, 5, 2), torch.randn(1, 6), torch.tensor([3])
    before = model(sample, step, seen)
    changed = sample.clone()
    changed[:, 3] += 1
    assert torch.equal((model(changed, step, seen) == before).all(-1)[0], torch.tensor([True] * 3 + [False] * 2))
    later = seen.clone()
    later[:, 3:] += 1  # the second observation, which is of the second action's control step
    assert torch.equal((model(sample, step, later) == before).all(-1)[0], torch.tensor([True] + [False] * 4))
    assert not torch.equal(model(sample, step + 1, seen), before)


# ----- jobs


def test_settings_are_json_by_group() -> None:
    groups = read_settings(["training.batch_size=8", "model.down_dims=[8,16]", "model.network=unet"])
    assert groups == {"training": {"batch_size": 8}, "model": {"down_dims": [8, 16], "network": "unet"}}
    with pytest.raises(SystemExit, match=r"policy\.x=1"):
        read_settings(["policy.x=1"])


def test_checkpoints_are_read_at_even_intervals_and_at_the_end() -> None:
    assert run_job.evenly_spaced([1, 2, 3, 4, 5, 6, 7], 3) == [3, 5, 7]
    assert run_job.evenly_spaced([1, 2, 3, 4], 1) == [4]
    assert run_job.evenly_spaced([1, 2], 3) == [1, 2]


@pytest.fixture
def order(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of a queue whose rivals run under this Python, which there finds `toy_arm`."""
    folders = [Path(__file__).parent, Path(__file__).parents[1] / "sim_eval"]
    monkeypatch.syspath_prepend(str(folders[1]))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folders[0]} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    store.with_suffix(".json").write_text("{}")
    return {"out": str(tmp_path), "threads": 1, "rival_python": str(python), "command": "test"}


def rival_job(*settings: str) -> Any:
    return common.Job("arm", RECORDING, "toy_environment:make_point", settings, episodes=3, rival="toy_arm", readings=2)


def test_a_rival_is_trained_read_twice_and_evaluated_by_ours(order: dict[str, Any], tmp_path: Path) -> None:
    job = rival_job("training.max_steps=4", "training.validate_every=1", "policy.scale=0.9")
    result = run_job._run_job(job, tmp_path, order)
    assert [(r["updates"], r["evaluation"]["successes"]) for r in result["readings"]] == [(2, 3)]
    assert (result["training"]["steps"], result["training"]["parameters"]) == (4, 2)
    assert result["training"]["config"]["steps"] == sum(LENGTHS)
    assert result["versions"]["rival/torch"] == torch.__version__
    told = result["evaluation"]["provenance"]["policy"]
    assert (told["step"], told["settings"]) == (4, {"seed": 0, "scale": 0.9})
    assert told["checkpoint"].endswith("step_00000004")
    assert result["evaluation"]["plan_ms"]["count"] > 3
    table = reporting.readings_table({"arm": {**result, "name": "arm"}}, ["arm"])
    assert "2, 0.0: 3/3; 4, 0.0: 3/3" in table
    files = {path.name for path in (tmp_path / "work" / "arm" / "run" / "checkpoints" / "step_00000004").iterdir()}
    assert files == {"model.safetensors", "config.json", "progress.json"}
    assert run_job._train_rival(job, tmp_path, {}) == json.loads((tmp_path / "work/arm/training.json").read_text())


def test_a_rival_that_cannot_be_trained_fails_alone(order: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(run_job.ConfigError, match="training of toy_arm ended with code 1"):
        run_job._run_job(rival_job("bogus=1"), tmp_path, order)


def test_a_queue_with_rivals_needs_their_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = common.benchmark_parser("", "test").parse_args(["--out", str(tmp_path), "--rival-python", "/no/python"])
    assert common.run_benchmark(given, [rival_job()], lambda results: "") == 2
    assert "/no/python is not there; run 'make rivals'" in capsys.readouterr().err
