"""Comparisons of two policies: exact tests, intervals that cover, evidence that may be looked at at any time."""

import itertools
import json

import numpy as np
import pytest

from scd_robot.cli.main import main
from scd_robot.errors import ConfigError, DatasetError
from scd_robot.sim_eval import evaluate, wilson_interval
from scd_robot.sim_eval.comparison import (
    PairedCounts,
    bootstrap_difference,
    compare,
    evidence,
    format_comparison,
    pairs_needed,
    states_needed,
)
from scd_robot.sim_eval.output import read_actions


def document(successes, env="a/b", first=0, hashes=None, invalid=()):
    detail = [
        {
            "index": first + i,
            "success": bool(success),
            "invalid": first + i in invalid,
            "initial_state_hash": (hashes or {}).get(first + i, f"h{first + i}"),
        }
        for i, success in enumerate(successes)
    ]
    return {"schema": 1, "env": env, "episodes_detail": detail, "videos": []}


class Chaser:
    """Goes straight to the goal of the toy environment, at part of its speed."""

    def __init__(self, speed):
        self._speed = speed

    def reset(self, rows=None):
        pass

    def act(self, observation):
        way = observation["goal"] - observation["position"]
        return np.clip(way / 0.2, -1, 1).astype(np.float32) * self._speed


class TestPair:
    def test_outcomes_are_paired_by_start_state(self):
        comparison = compare([document([1, 1, 0, 0, 1])], [document([1, 0, 1, 0], first=1)])
        assert comparison.indices.tolist() == [1, 2, 3, 4]
        assert comparison.pair == PairedCounts(both=1, only_a=1, only_b=1, neither=1)
        assert comparison.difference == 0

    def test_invalid_episodes_of_either_are_left_out(self):
        comparison = compare([document([1, 1, 0], invalid=(1,))], [document([1, 0, 0], invalid=(2,))])
        assert comparison.indices.tolist() == [0]

    @pytest.mark.parametrize(
        ("first", "second", "message"),
        [
            (document([1]), document([1], env="a/c"), "different environments, a/b and a/c"),
            (document([1]), document([1], first=5), "no episode in common"),
            (document([1]), document([1], hashes={0: "other"}), "episode 0 of a/b did not start from the same state"),
            (document([1, 0], invalid=(0,)), document([1, 0], invalid=(1,)), "no episode in common"),
            (document([1]) | {"faults": {"drop": 0.0}}, document([1]) | {"faults": {"drop": 0.5}}, "other conditions"),
        ],
    )
    def test_what_did_not_begin_alike_is_not_compared(self, first, second, message):
        with pytest.raises(DatasetError, match=message):
            compare([first], [second])

    def test_an_arm_without_evaluations(self):
        with pytest.raises(ConfigError, match="at least one evaluation of each arm"):
            compare([document([1])], [])


class TestVerdict:
    @pytest.mark.parametrize(
        ("a", "b", "verdict", "non_inferior"),
        [
            ([1] * 60, [1] * 40 + [0] * 20, "x is better than y", True),
            ([0] * 20 + [1] * 40, [1] * 60, "x is worse than y", False),
            ([1] * 200, [1] * 200, "equivalent within 5 points", True),
            ([1] * 10, [1] * 10, "do not tell them apart", False),
            ([1] * 200, [1] * 190 + [0] * 10, "x is better than y", True),
            ([1] * 50, [1] * 45 + [0] * 5, "not worse than y by 5 points", True),  # McNemar p = 0.06
        ],
    )
    def test_follows_from_the_interval(self, a, b, verdict, non_inferior):
        comparison = compare([document(a)], [document(b)], "x", "y")
        assert verdict in comparison.verdict
        assert comparison.to_json()["non_inferior"] is non_inferior
        assert verdict in format_comparison(comparison)
        json.dumps(comparison.to_json(), allow_nan=False)


class TestSequential:
    def test_only_the_evidence_decides(self):
        seven = compare([document([1] * 7)], [document([0] * 7)], "x", "y", sequential=True)
        six = compare([document([1] * 6)], [document([0] * 6)], "x", "y", sequential=True)
        assert "x is better than y: decided after 7 episodes" in seven.verdict
        assert "do not tell them apart" in six.verdict
        for comparison in (six, seven):
            found = comparison.to_json()
            assert (found["interval"], found["non_inferior"], found["pair"]["p_value"]) == (None, None, None)
            assert "McNemar" not in format_comparison(comparison)
            assert "evidence" in format_comparison(comparison)

    def test_checkpoints_are_evaluated_until_it_is_decided(self, toy, tiny_run, tmp_path, capsys):
        arguments = ["compare", str(tiny_run), str(tiny_run), "--env", "toy_environment:make_point"]
        options = ["--episodes", "5", "--sequential", "2", "--out", str(tmp_path / "out"), "--json", "-"]
        assert main([*arguments, *options]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["episodes"], found["sequential"], found["evidence"]) == (5, True, 1.0)
        assert (tmp_path / "out" / "comparison.html").is_file()


class TestBootstrap:
    def test_without_spread_it_is_that_of_independent_pairs(self):
        found = bootstrap_difference(np.ones((3, 20), bool), np.zeros((2, 20), bool))
        assert found.difference == 1.0
        assert found.interval == pytest.approx(PairedCounts(0, 40, 0, 0).interval)
        assert (found.rates_a, found.rates_b) == ((1.0,) * 3, (0.0,) * 2)

    @pytest.mark.parametrize(("seeds", "states", "told"), [(2, 1, False), (3, 3, False), (3, 100, True)])
    def test_few_episodes_that_are_all_alike_show_nothing(self, seeds, states, told):
        alike = np.ones((seeds, states), bool)
        low, high = bootstrap_difference(alike, alike).interval
        assert (low > -0.05) == (high < 0.05) == told

    def test_seeds_that_differ_widen_it(self):
        rng = np.random.default_rng(0)
        even = rng.random((4, 100)) < 0.5
        uneven = np.array([[True] * 100, [True] * 100, [False] * 100, [False] * 100])
        widths = [np.ptp(bootstrap_difference(a, even).interval) for a in (even, uneven)]
        assert widths[1] > 2 * widths[0]

    def test_covers_the_truth_about_as_often_as_it_says(self):
        """Rates of seeds spread about 0.7 in both arms, start states of different difficulty: no true difference."""
        rng = np.random.default_rng(1)
        covered = 0
        for trial in range(60):
            difficulty = rng.normal(size=80)
            arms = [rng.random((5, 80)) < 1 / (1 + np.exp(difficulty - 1 - rng.normal(0, 0.4, (5, 1)))) for _ in "ab"]
            low, high = bootstrap_difference(*arms, draws=400, seed=trial).interval
            covered += low <= 0 <= high
        assert covered >= 50

    def test_shapes_that_do_not_fit(self):
        with pytest.raises(ConfigError, match="as many states in both"):
            bootstrap_difference(np.ones((1, 3), bool), np.ones((1, 4), bool))


def test_evidence_is_a_martingale_of_fair_coins():
    for a, b in itertools.product(range(6), repeat=2):
        assert evidence(a, b) == pytest.approx((evidence(a + 1, b) + evidence(a, b + 1)) / 2)
    assert evidence(0, 0) == 1
    assert evidence(3000, 0) > 1e300
    assert evidence(8, 0) == pytest.approx(evidence(0, 8))


def test_evidence_rarely_misleads_whoever_looks_all_the_time():
    rng = np.random.default_rng(0)
    misled = 0
    for _ in range(400):
        heads = np.cumsum(rng.random(150) < 0.5)
        misled += any(evidence(int(h), n + 1 - int(h)) >= 20 for n, h in enumerate(heads))
    assert misled <= 0.05 * 400


def test_as_many_pairs_as_have_the_wanted_power():
    counts = PairedCounts(both=60, only_a=20, only_b=10, neither=10)
    needed = pairs_needed(counts)
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(600):
        only_a, only_b, same = rng.multinomial(needed, [0.2, 0.1, 0.7])
        hits += PairedCounts(int(same), int(only_a), int(only_b), 0).p_value < 0.05
    assert 0.72 < hits / 600 < 0.86
    assert pairs_needed(PairedCounts(5, 3, 3, 0)) is None


class TestCommand:
    @pytest.fixture
    def folders(self, tmp_path):
        rng = np.random.default_rng(0)
        for arm, rate in (("good", 0.9), ("bad", 0.4)):
            for seed in range(3):
                folder = tmp_path / arm / f"seed_{seed}"
                folder.mkdir(parents=True)
                (folder / "result.json").write_text(json.dumps(document(rng.random(60) < rate)))
        return tmp_path

    def test_one_evaluation_each(self, folders, capsys):
        arms = [folders / "good" / "seed_0", folders / "bad" / "seed_0" / "result.json"]
        assert main(["compare", *map(str, arms), "--out", str(folders / "out"), "--json", str(folders / "c.json")]) == 0
        found = json.loads((folders / "c.json").read_text())
        assert found["pair"]["only_a"] > found["pair"]["only_b"]
        assert found["interval_method"] == "paired Newcombe"
        assert "is better than" in capsys.readouterr().out
        page = (folders / "out" / "comparison.html").read_text()
        assert "is better than" in page
        assert page.count("<svg") == 2

    def test_what_only_one_solved_is_shown_side_by_side(self, toy, tmp_path, caplog):
        arms = []
        for name, reach in (("far", 1.0), ("near", 0.2)):
            evaluate(Chaser(reach), "toy_environment:make_point", 6, out=tmp_path / name, num_videos=0, progress=False)
            arms.append(str(tmp_path / name))
        out = tmp_path / "out"
        options = ["--env", "toy_environment:make_point", "--num-videos", "2", "--out", str(out)]
        assert main(["compare", *arms, *options, "--json", str(out / "c.json")]) == 0
        only = json.loads((out / "c.json").read_text())["pair"]["only_a"]
        assert only >= 2
        assert len(list((out / "videos").glob("episode_*_[ab].mp4"))) == 4
        assert (out / "comparison.html").read_text().count("<video") == 4
        caplog.clear()
        assert main(["compare", *arms, "--out", str(out), "--overwrite"]) == 0  # the name in the document is no source
        assert "no (more) videos: unknown environment 'toy/point'" in caplog.text

    def test_several_seeds_each(self, folders, capsys):
        assert main(["compare", str(folders / "good"), str(folders / "bad"), "--json", "-"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert len(found["a"]["seeds"]) == len(found["b"]["seeds"]) == 3
        assert found["interval_method"].startswith("bootstrap")
        low, high = found["a"]["interval"]
        assert low <= min(found["a"]["seeds"])  # Wilson's interval of 180 episodes would be narrower than the seeds are
        assert high - low > np.ptp(wilson_interval(found["a"]["successes"], 180)) - 1e-9
        assert found["interval"][0] > 0.2

    def test_what_is_no_evaluation(self, folders, refused):
        (folders / "empty").mkdir()
        refused(["compare", folders / "good", folders / "empty"], "no evaluation of 'scd eval'", "--env")
        refused(["compare", folders / "good", folders / "emtpy"], "there is no")
        refused(["compare", folders / "good", folders / "bad", "--episodes", "0"], "at least 1")
        refused(
            ["compare", folders / "good", folders / "bad", "--sequential", "5"], "both arms are evaluations already"
        )
        (folders / "result.json").write_text("{}")
        refused(["compare", folders / "good", folders / "result.json"], "is not the result.json of an evaluation")
        (folders / "result.json").write_text('{"episodes_detail": [], "schema": 7}')
        refused(["compare", folders / "good", folders / "result.json"], "has schema 7")
        (folders / "result.json").write_text('{"episodes_detail": [{"index": 0}], "schema": 1}')
        refused(
            ["compare", folders / "good", folders / "result.json"], "lacks env, initial_state_hash, invalid, success"
        )

    def test_seeds_by_a_pattern(self, folders, capsys):
        (folders / "good" / "seed_2" / "result.json").unlink()
        arms = [str(folders / "good" / "seed_*"), str(folders / "bad" / "seed_[01]")]
        assert main(["compare", *arms, "--json", "-"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert len(found["a"]["seeds"]) == len(found["b"]["seeds"]) == 2
        assert "fewer than 5 seeds" in found["notes"][0]

    def test_arms_that_do_not_fit_are_refused_before_anything_is_evaluated(self, toy, folders, tiny_run, refused):
        evaluated = folders / "good" / "seed_0"
        env = ["--env", "toy_environment:make_point"]
        refused(["compare", evaluated, tiny_run, *env], "is an evaluation in", "toy/point")
        document = json.loads((evaluated / "result.json").read_text())
        (evaluated / "result.json").write_text(json.dumps({**document, "env": "toy/point"}))
        refused(["compare", evaluated, tiny_run, *env, "--first-episode", "70"], "none of the episodes 70 to 169")
        refused(["compare", folders / "bad", tiny_run, *env, "--sequential", "5"], "and 3 were found")

    def test_sequential_evaluations_are_kept(self, toy, tiny_run, tmp_path):
        options = ["--env", "toy_environment:make_point", "--episodes", "6", "--sequential", "4", "--num-videos", "0"]
        assert main(["compare", str(tiny_run), str(tiny_run), *options, "--out", str(tmp_path / "out")]) == 0
        for arm in "ab":
            found = json.loads((tmp_path / "out" / arm / "result.json").read_text())
            assert [episode["index"] for episode in found["episodes_detail"]] == list(range(6))
            assert found["provenance"]["policy"]["step"] == 4
            lines = (tmp_path / "out" / arm / "episodes.jsonl").read_text().splitlines()
            assert sorted(json.loads(line)["index"] for line in lines) == list(range(6))
            assert len(read_actions(tmp_path / "out" / arm)) == 6


class TestNotes:
    def test_what_a_reader_has_to_know(self):
        def made(package, weights):
            provenance = {"policy": {"weights_sha256": weights}}
            return {**document([True, False]), "versions": {"mujoco": package}, "provenance": provenance}

        notes = compare([made("3.3.0", "x"), made("3.3.0", "x")], [made("3.4.0", "y"), made("3.4.0", "z")]).notes
        assert any("fewer than 5 seeds" in note for note in notes)
        assert any(note.startswith("A: ") and "same training" in note for note in notes)
        assert not any(note.startswith("B: ") for note in notes)
        assert any("different versions of mujoco: 3.3.0, 3.4.0" in note for note in notes)
        assert compare([made("3.3.0", "x")], [made("3.3.0", "y")]).notes == ()


def test_as_many_states_as_have_the_wanted_power_with_several_seeds():
    """Arms whose seeds do not differ but by the start states that each happens to solve."""
    rng = np.random.default_rng(0)

    def draw(states):
        chance = rng.random(states)
        return rng.random((4, states)) < np.minimum(chance + 0.1, 1), rng.random((4, states)) < chance

    needed = states_needed(*draw(2000))
    hits = 0
    for _ in range(200):
        low, high = bootstrap_difference(*draw(needed), draws=200).interval
        hits += low > 0 or high < 0
    assert 0.6 < hits / 200 < 0.97
    everything, nothing = np.ones((1, 50), bool), np.zeros((1, 50), bool)
    swinging = np.concatenate([everything, nothing, everything])
    assert states_needed(swinging, swinging[[0, 1]]) is None  # the seeds hide it
    assert states_needed(everything, everything) is None


def test_the_exact_test_needs_six_discordant_pairs():
    assert pairs_needed(PairedCounts(both=99, only_a=1, only_b=0, neither=0)) >= 600
    assert pairs_needed(PairedCounts(both=0, only_a=10, only_b=0, neither=0)) == 6
