"""Diagnosis of how a policy uses its history."""

import json

import numpy as np
import pytest

from scd_robot.analysis.history import (
    AlteredHistory,
    altered,
    attention_age,
    cache_parity,
    copycat,
    diagnose_history,
)
from scd_robot.analysis.history_report import format_history, write_history
from scd_robot.analysis.streams import Stream, StreamRecorder, plans_after
from scd_robot.cli.main import main
from scd_robot.errors import ConfigError
from scd_robot.policies import load_policy

POINT = "toy_environment:make_point"


def stream(episode, length, seed=0):
    rng = np.random.default_rng(seed + episode)
    rows = rng.standard_normal((length, 4)).astype(np.float32)
    return Stream(
        episode,
        [{"position": row[:2], "goal": row[2:]} for row in rows],
        [row[:2] for row in rows],
        [row[1:3] for row in rows],
    )


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
        for number, history in enumerate(histories):
            alone = plans_after(policy, [history], [5 + number])
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

    def test_a_policy_with_its_own_history_is_itself(self, tiny_run):
        """But for the noise, which is keyed by plan: of all plans the first has the key that the wrapper gives it."""
        policy = load_policy(tiny_run)
        wrapper = AlteredHistory(policy, "own", 0, [], policy.spec.num_executed)
        wrapper.reset(episodes=[3])
        batch = {key: value[None] for key, value in stream(3, 1).observation[0].items()}
        first = wrapper.act(batch)
        np.testing.assert_allclose(first[0], plans_after(policy, [stream(3, 1)], [3001])[0, 0], atol=1e-6)


def test_copycats_are_more_predictable_than_demonstrators():
    rng = np.random.default_rng(0)

    def walk(correlation, length=4000):
        values = np.zeros((length, 2), np.float32)
        for i in range(1, length):
            values[i] = correlation * values[i - 1] + np.sqrt(1 - correlation**2) * rng.standard_normal(2)
        return values

    repeated, free = walk(0.99), walk(0.6)
    found = copycat([Stream(0, action=list(repeated))], free, np.array([2000, 4000]))
    assert found["policy"] == pytest.approx(1 - 0.99**2, rel=0.2)
    assert found["demonstrations"] == pytest.approx(1 - 0.6**2, rel=0.1)
    assert found["ratio"] == pytest.approx(found["policy"] / found["demonstrations"])
    assert copycat([Stream(0, action=[np.ones(2)] * 9)])["policy"] is None


def test_attention_adds_up_and_contexts_agree(policy):
    layers = attention_age(policy, [stream(0, 20), stream(1, 9)])
    assert len(layers) == policy.model.config.encoder_layers
    for layer in layers:
        assert layer["present"] + sum(layer["by_age"].values()) == pytest.approx(1, abs=1e-5)
        assert layer["mean_age"] is None or 1 <= layer["mean_age"] <= 20
    assert cache_parity(policy, stream(0, 20)) < 1e-5


def test_diagnosis_from_checkpoint_to_page(tiny_run, tmp_path):
    document = diagnose_history(lambda: load_policy(tiny_run), POINT, 3, windows=(1, 1000), progress=False)
    kinds = ["own", "control", "cut to 1", "cut to 1000", "shuffled", "reversed", "swapped"]
    assert list(document["success"]) == kinds
    assert document["plan_change"]["cut to 1000"] == pytest.approx(0, abs=1e-4)
    assert document["plan_change"]["noise"] > 0.01
    assert document["cache_parity"] < 1e-5
    text = format_history(document)
    assert "cut to 1000" in text
    write_history(document, tmp_path)
    assert json.loads((tmp_path / "history.json").read_text()) == json.loads(json.dumps(document))
    assert (tmp_path / "history.html").read_text().count("<svg") == 2


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
    history = json.loads((tmp_path / "r.json").read_text())["history"]
    assert history["copycat"]["ratio"] > 0
    assert "copycat ratio" in capsys.readouterr().out
    assert (tmp_path / "out" / "history.html").is_file()
