"""Diagnosis of how a policy uses its history."""

import json

import numpy as np
import pytest
from recorded import stream, untrained
from toy_environment import make_point

from scd_robot.analysis import history
from scd_robot.analysis.history import AlteredHistory, _counts, altered, diagnose_history
from scd_robot.analysis.history_report import format_history, write_history
from scd_robot.analysis.streams import StreamRecorder, plans_after
from scd_robot.cli.main import main
from scd_robot.errors import ConfigError
from scd_robot.policies import load_policy
from scd_robot.sim_eval import EpisodeRecord, EvaluationResult

POINT = "toy_environment:make_point"


@pytest.fixture(scope="module")
def policy(tiny_run):
    return load_policy(tiny_run)


class TestStreams:
    def test_a_recorded_policy_does_the_same_and_is_remembered(self, tiny_run):
        plain, recorder = load_policy(tiny_run), StreamRecorder(load_policy(tiny_run))
        seen = stream(0, 12).observation
        for each in (plain, recorder):
            each.reset(episodes=[7])
        actions = []
        for step in seen:
            batch = {key: value[None] for key, value in step.items()}
            actions.append(plain.act(batch))
            np.testing.assert_array_equal(recorder.act(batch), actions[-1])
        found = recorder.streams[7]
        assert len(found) == 12
        np.testing.assert_array_equal(np.stack(found.action), np.concatenate(actions))

    def test_plans_after_histories_of_different_lengths_are_those_after_each_alone(self, policy):
        histories = [stream(0, 9), stream(1, 4), stream(2, 1)]
        together = plans_after(policy, histories, [5, 6, 7])
        for number, each in enumerate(histories):
            alone = plans_after(policy, [each], [5 + number])
            np.testing.assert_allclose(together[number], alone[0], atol=1e-5)


class TestAltered:
    @pytest.mark.parametrize(
        ("kind", "window", "length"),
        [("own", 0, 7), ("cut", 1, 1), ("cut", 3, 3), ("cut", 99, 7), ("shuffled", 0, 7), ("reversed", 0, 7)],
    )
    def test_the_present_stays_last_and_the_rest_is_of_the_past(self, kind, window, length):
        source = stream(0, 10)
        found = altered(source, 6, kind, window, [], np.random.default_rng(0))
        assert len(found) == length
        assert found.observation[-1] is source.observation[6]
        past = [id(step) for step in source.observation[:6]]
        assert {id(step) for step in found.observation[:-1]} <= set(past)
        if kind in ("shuffled", "reversed"):
            assert [id(step) for step in found.observation[:-1]] != past

    def test_swapped_is_of_another_episode(self):
        own, other = stream(0, 10), stream(1, 4)
        found = altered(own, 6, "swapped", 0, [own, other], np.random.default_rng(0))
        assert [id(step) for step in found.observation] == [*map(id, other.observation), id(own.observation[6])]

    @pytest.mark.parametrize(
        ("kind", "window", "steps"),
        [
            ("cut", 1, [6]),
            ("cut", 4, [4, 5, 6]),  # the encoder ran in step 4 and not in step 3
            ("cut", 5, [2, 3, 4, 5, 6]),
            ("reversed", 0, [4, 5, 2, 3, 0, 1, 6]),
        ],
    )
    def test_with_a_stride_the_encoder_still_sees_the_steps_in_which_it_ran(self, kind, window, steps):
        source = stream(0, 10)
        found = altered(source, 6, kind, window, [], np.random.default_rng(0), stride=2)
        assert [id(step) for step in found.observation] == [id(source.observation[i]) for i in steps]

    def test_a_policy_with_its_own_history_is_itself(self, tiny_run):
        """But for the noise, which is keyed by plan: of all plans the first has the key that the wrapper gives it."""
        policy = load_policy(tiny_run)
        wrapper = AlteredHistory(policy, "own", 0, [])
        wrapper.reset(episodes=[3])
        batch = {key: value[None] for key, value in stream(3, 1).observation[0].items()}
        first = wrapper.act(batch)
        np.testing.assert_allclose(first[0], plans_after(policy, [stream(3, 1)], [3001])[0, 0], atol=1e-6)


def test_diagnosis_from_checkpoint_to_page(tiny_run, tmp_path):
    document = diagnose_history(lambda: load_policy(tiny_run), POINT, 3, windows=(1, 7, 1000), progress=False)
    kinds = ["own", "control", "cut to 1", "cut to 7", "cut to 1000", "shuffled", "reversed", "swapped"]
    assert list(document["success"]) == kinds
    assert [counts["window"] for counts in document["success"].values()] == [None, None, 1, 7, 1000, None, None, None]
    change = document["plan_change"]
    assert change["cut to 7"]["mean"] == pytest.approx(0, abs=1e-4)  # the receptive field of two layers that see 4
    assert change["cut to 1"]["mean"] > 10 * change["cut to 7"]["mean"]
    assert "cut to 1000" not in change  # no history was that long
    assert change["noise"]["mean"] > 0.01
    low, high = change["cut to 1"]["interval"]
    assert low <= change["cut to 1"]["mean"] <= high
    assert document["cache_parity"]["max_difference"] < 1e-4 * document["cache_parity"]["standard_deviation"]
    text = format_history(document)
    for kind in (*kinds, "other noise"):
        assert kind in text
    write_history(document, tmp_path)
    assert json.loads((tmp_path / "history.json").read_text()) == json.loads(json.dumps(document))
    page = (tmp_path / "history.html").read_text()
    assert page.count("<svg") == 3
    curve = page[page.index("Success against the length") : page.index("Success by kind of history")]
    assert all(f">{window}</text>" in curve for window in (1, 7, 1000))
    assert page.count("p = 1<") == 6  # against control, of every kind but `own` and `control`


def test_a_model_with_past_actions_and_a_stride_is_diagnosed():
    policy = untrained({"history_stride": 2})
    document = diagnose_history(lambda: policy, POINT, 2, windows=(4,), max_steps=12, progress=False)
    assert document["history_stride"] == 2
    assert list(document["success"])[2] == "cut to 4"
    assert len(document["attention_age"]) == 2
    assert document["cache_parity"]["max_difference"] < 1e-4 * document["cache_parity"]["standard_deviation"]
    assert "2 apart" in format_history(document)


def test_changes_of_plans_are_in_standard_deviations_and_vary_from_episode_to_episode(monkeypatch):
    rng = np.random.default_rng(0)
    plans = rng.standard_normal((40, 4, 2)).astype(np.float32)
    plans[..., 1] = 0.7 + 3e-8 * plans[..., 0]  # constant, up to rounding
    size = np.repeat([0.0, 0.0, 1.0, 3.0], 10)  # by how much the plans of four episodes change
    probes = []
    for number, (own, change) in enumerate(zip(plans, size, strict=True)):
        changed = own + np.float32([change, 6e-8])
        probes.append((number // 10, {"own": own, "cut to 1": changed} | ({"swapped": own} if number < 10 else {})))
    monkeypatch.setattr(history, "_probe", lambda *_: probes)
    found = history._plan_changes(None, [], [("cut", 1), ("swapped", 0)])
    scale = np.sqrt(0.5) / plans[..., 0].std()  # one of two numbers changes
    assert found["cut to 1"]["mean"] == pytest.approx(scale * size.mean(), rel=1e-4)
    assert (found["cut to 1"]["plans"], found["cut to 1"]["episodes"]) == (40, 4)
    assert found["cut to 1"]["interval"][0] < 0.1 * scale  # resampled plans would not be so uncertain
    assert found["cut to 1"]["interval"][1] > 1.9 * scale
    assert found["swapped"] == {"mean": 0.0, "interval": None, "plans": 10, "episodes": 1}


def result_of(*successes):
    """An evaluation of episodes 0, 1, ...; None is an invalid one."""
    records = [
        EpisodeRecord(index, index, str(index), bool(success), 5, success is None, 0.0, 0.0, "")
        for index, success in enumerate(successes)
    ]
    return EvaluationResult(make_point().spec, "policy", records, {"act": []}, 1, 5, 0, 3, 0.0, {})


def test_kinds_are_compared_with_control_from_the_same_start_states():
    control = result_of(True, True, True, True, False, None)
    counts = _counts(result_of(False, False, True, None, True, True), 4, control)
    assert (counts["successes"], counts["episodes"], counts["window"]) == (3, 5, 4)
    pair = counts["against_control"]  # episodes 0, 1, 2 and 4
    assert (pair["only_this"], pair["only_control"]) == (1, 2)
    assert pair["difference"] == pytest.approx(-1 / 4)
    assert pair["p_value"] == pytest.approx(1.0)
    assert pair["interval"][0] < -1 / 4 < pair["interval"][1]
    assert _counts(control)["against_control"] is None
    assert _counts(result_of(True, None), 4, result_of(None, True))["against_control"] is None


def test_too_little_to_diagnose(tiny_run):
    with pytest.raises(ConfigError, match="at least 2"):
        diagnose_history(lambda: load_policy(tiny_run), POINT, 1)


def test_a_diagnosis_with_late_observations_is_refused(tiny_run, refused):
    refused(["eval", tiny_run, "--env", POINT, "--diagnose-history", "2", "--drop", "0.5"], "prompt observations")
    refused(["eval", tiny_run, "--env", POINT, "--latency-ms", "50", "50"], "different delays")


def test_command(tiny_run, tiny_store, tmp_path, capsys):
    options = ["--episodes", "2", "--num-videos", "0", "--diagnose-history", "2", "--dataset", str(tiny_store)]
    arguments = ["eval", str(tiny_run), "--env", POINT, "--out", str(tmp_path / "out"), *options]
    assert main([*arguments, "--json", str(tmp_path / "r.json")]) == 0
    document = json.loads((tmp_path / "r.json").read_text())["history"]
    assert document["copycat"]["ratio"] > 0
    assert len(document["copycat"]["intervals"]["ratio"]) == 2
    told = capsys.readouterr().out
    assert "copycat ratio" in told
    assert max(map(len, told[told.index("toy/point: history") :].splitlines())) <= 120
    assert (tmp_path / "out" / "history.html").is_file()
