"""The benchmark of the control step: its ratios, and misses of a paced loop, each recorded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_jobs import load
from eager_graphs import eager_export
from small_policies import small_policy

from scd_robot.control.clock import VirtualClock

control = load("control")


def seen() -> dict[str, np.ndarray]:
    return {key: np.full((1, 2), 0.5, np.float32) for key in ("position", "goal")}


def test_turns_are_as_many_as_asked_for_and_a_tick_is_encoder_and_plan() -> None:
    policy = small_policy()
    times = control.take_turns({"eager": policy, "graphs": eager_export(policy)}, seen, 10)
    for parts in times.values():
        assert [len(parts[name]) for name in control.NAMES] == [10, 10, 10]
        np.testing.assert_allclose(np.add(parts["encoder step"], parts["plan"]), parts["planning tick"])


def test_the_summary_holds_ratios_of_medians_and_of_single_turns() -> None:
    eager, fast = [2.0, 4.0, 4.0], [1.0, 2.0, 1.0]
    times = {arm: dict.fromkeys(control.NAMES, values) for arm, values in (("eager", eager), ("onnx", fast))}
    rows = control.summary(times, dict.fromkeys(control.NAMES, 0.5))
    found = rows["onnx"]["plan"]
    assert (found["p50"], found["over_floor"], found["over_eager"]["medians"]) == (1.0, 2.0, 0.25)
    assert 0.25 <= found["over_eager"]["p5"] < found["over_eager"]["p95"] <= 0.5
    assert rows["eager"]["plan"]["over_eager"]["medians"] == 1.0


def test_each_miss_of_a_paced_loop_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, clock = small_policy(), VirtualClock()
    act, calls = policy.act, []

    def slow(observation):
        calls.append(0)
        call = len(calls) - 1 - policy.spec.history_length
        clock.advance({3: 0.024, 7: 0.011}.get(call, 0.002))  # call 7 is in step 8, since step 4 is left out
        return act(observation)

    monkeypatch.setattr(policy, "act", slow)
    report = control.pace(policy, seen, 20 / 60 / control.RATE_HZ, clock)
    assert [(miss["step"], miss["left_out"]) for miss in report["misses"]] == [(3, False), (4, True), (8, False)]
    assert (report["control_steps"], report["missed"]) == (20, 3)
    assert report["misses"][0]["duration_ms"] == pytest.approx(24)
    assert report["misses"][0]["late_ms"] == pytest.approx(14)
    assert report["control_step_ms"]["worst"] == pytest.approx(24)


def test_a_faster_arm_that_computes_something_else_is_seen() -> None:
    policy = small_policy()
    other = small_policy({"width": 8})
    difference = control.worst_difference({"eager": policy, "graphs": eager_export(policy), "other": other}, seen)
    assert difference["graphs"] < 1e-4 < difference["other"]


@pytest.mark.parametrize(("code", "kept"), [("abc1234", True), ("abc1234-dirty", False), ("unknown", False)])
def test_what_was_compiled_is_used_again_by_the_same_code_only(monkeypatch, tmp_path, code: str, kept: bool) -> None:
    monkeypatch.setattr(control, "code_version", lambda: code)
    folder = control.exports_folder(tmp_path, 128)
    assert (folder is not None) == kept
    if kept:
        assert folder.parent == tmp_path
        assert folder != control.exports_folder(tmp_path, 64)
        monkeypatch.setattr(control, "code_version", lambda: "def5678")
        assert folder != control.exports_folder(tmp_path, 128)


def test_an_export_that_is_there_is_not_made_again(monkeypatch, tmp_path) -> None:
    made = []
    monkeypatch.setattr(control, "is_export", lambda folder: folder in made)
    monkeypatch.setattr(control, "export_policy", lambda policy, folder, *_, **__: made.append(folder))
    monkeypatch.setattr(control, "load_exported", lambda folder, trusted: folder)
    for _ in range(2):
        assert control._exported(small_policy(), "aoti", tmp_path / "aoti") == tmp_path / "aoti"
    assert made == [tmp_path / "aoti"]


def test_weights_are_the_same_in_every_run_since_exports_are_kept_from_one_to_the_next(tmp_path: Path) -> None:
    first, second = (control.make_arms(("eager",), 4, tmp_path)[0]["eager"].model.state_dict() for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
