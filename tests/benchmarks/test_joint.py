"""The benchmark of frames beside actions: its arms are pairs, and its tables say so."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from benchmark_jobs import load, result

from scd_robot.model import FrameConfig
from scd_robot.presets import resolve, with_settings
from scd_robot.training import FrameLossConfig
from scd_robot.types import ArraySpec, DatasetSpec

joint = load("joint")
SEEN = DatasetSpec({"proprio": ArraySpec((4,)), "image": ArraySpec((64, 64, 3), "uint8")}, 4, 0.0125)
JOBS = [*joint.make_jobs([0, 1]), *joint.make_pilot_jobs([0])]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_settings_of_every_job_fit_its_preset(job: Any) -> None:
    with_settings(resolve(job.preset, SEEN), job.settings)
    assert joint.Job.from_json(json.loads(json.dumps(asdict(job)))) == job


@pytest.mark.parametrize("task", joint.TASKS)
def test_arms_differ_by_the_frame_decoder_and_its_weight_alone(task: str) -> None:
    jobs = {job.name: job for job in joint.make_jobs([1])}
    arms = [jobs[f"{task}_{arm}_seed1"] for arm in joint.ARMS]
    assert len({(job.recording, job.environment, job.seed) for job in arms}) == 1
    found = [with_settings(resolve(job.preset, SEEN), job.settings) for job in arms]
    plain = [
        replace(
            one,
            preset="",
            model=replace(one.model, frames=FrameConfig()),
            training=replace(one.training, frames=FrameLossConfig()),
        )
        for one in found
    ]
    assert all(one == plain[0] for one in plain)
    assert [f"{one.training.frames.loss_weight:g}" for one in found[1:]] == list(joint.WEIGHTS)
    assert [one.model.frames.beside_actions for one in found] == [False, True, True, True]


def arm_result(arm: str, successes: int, frame_rmse: float | None) -> dict[str, Any]:
    document = result(f"cue_{arm}_seed0", [True] * successes + [False] * (10 - successes))
    metrics = {"val/loss": 0.25, "val/chunk_rmse": 0.5}
    document["training"]["metrics"] = metrics if frame_rmse is None else {**metrics, "val/frame_rmse": frame_rmse}
    return document


def test_a_weight_is_compared_with_no_weight_and_that_with_no_frames() -> None:
    found = [arm_result("actions", 4, None), arm_result("weight-0", 5, 0.14), arm_result("weight-1", 8, 0.09)]
    text = joint.make_report({one["name"]: one for one in found}, [0])
    assert "| cue_actions_seed0 | 0.2500 | 0.5000 | - | - |" in text
    assert "| cue_weight-1_seed0 | 0.2500 | 0.5000 | 0.0900 | - |" in text
    assert "| cue_weight-1_seed0 - cue_weight-0_seed0 | 5 | 3 | 0 | 2 | +30.0 %" in text
    assert "- cue: weight-0 - actions: +10.0 % over 1 seeds (+10.0)" in text
    assert "- cue: weight-1 - weight-0: +30.0 % over 1 seeds (+30.0)" in text
    assert "- button: no two arms to compare are done yet" in text
