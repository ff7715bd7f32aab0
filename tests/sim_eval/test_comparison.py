"""Comparisons of two policies: what is compared, what is said about it, and the verb."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from scd_robot.checkpoint import list_checkpoints
from scd_robot.cli.main import main
from scd_robot.errors import ConfigError, DatasetError
from scd_robot.sim_eval import evaluate, wilson_interval
from scd_robot.sim_eval.comparison import PairedCounts, compare, format_comparison, is_decided
from scd_robot.sim_eval.comparison_report import write_comparison
from scd_robot.sim_eval.output import read_actions
from scd_robot.sim_eval.plots import pairs_plot
from scd_robot.sim_eval.report import _settings
from scd_robot.sim_eval.result import join_results
from scd_robot.sim_eval.saved import find_evaluations


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
        (out / "videos" / "episode_00007_failure.mp4").write_text("of others")
        caplog.clear()
        assert main(["compare", *arms, "--out", str(out), "--overwrite"]) == 0  # the name in the document is no source
        assert "no (more) videos: unknown environment 'toy/point'" in caplog.text
        assert "tell with --env how it is made" in caplog.text
        assert [path.name for path in (out / "videos").iterdir()] == ["episode_00007_failure.mp4"]

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
            assert len({tuple(json.loads(line)) for line in lines}) == 1, "all lines have the same keys"
            assert {"env", "policy", "policy_seed", "faults"} <= set(json.loads(lines[-1]))
            assert sorted(json.loads(line)["index"] for line in lines) == list(range(6))
            assert len(read_actions(tmp_path / "out" / arm)) == 6


class TestCheckpoints:
    """Arms that are evaluated now."""

    ENV = ("--env", "toy_environment:make_point", "--num-videos", "0")

    def test_only_the_episodes_of_the_saved_arm_are_run(self, toy, tiny_run, tmp_path):
        saved = tmp_path / "saved"
        evaluate(Chaser(1.0), "toy_environment:make_point", 6, first_episode=6, out=saved, num_videos=0)
        for sequential in ("4", "0"):
            out = tmp_path / sequential
            options = [*self.ENV, "--sequential", sequential, "--out", str(out)]
            assert main(["compare", str(saved), str(tiny_run), *options]) == 0
            found = json.loads((out / "b" / "result.json").read_text())
            assert [episode["index"] for episode in found["episodes_detail"]] == list(range(6, 12))
            assert json.loads((out / "comparison.json").read_text())["episodes"] == 6

    def test_gaps_in_the_saved_arm(self, toy, tiny_run, tmp_path):
        saved = tmp_path / "saved"
        evaluate(Chaser(1.0), "toy_environment:make_point", 5, out=saved, num_videos=0)
        told = json.loads((saved / "result.json").read_text())
        told["episodes_detail"][1]["invalid"] = True
        (saved / "result.json").write_text(json.dumps(told))
        out = tmp_path / "out"
        assert main(["compare", str(tiny_run), str(saved), *self.ENV, "--out", str(out)]) == 0
        assert sorted(read_actions(out / "a")) == [0, 2, 3, 4]
        assert json.loads((out / "comparison.json").read_text())["left_out"] == 1

    def test_a_block_that_is_invalid_decides_nothing(self, toy, tiny_run, capsys):
        options = ["--env", "toy_environment:make_crashing_at_first", "--num-videos", "0", "--json", "-"]
        options += ["--episodes", "8", "--sequential", "3"]
        assert main(["compare", str(tiny_run), str(tiny_run), *options]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["episodes"], found["left_out"]) == (4, 4)

    @pytest.fixture
    def runs(self, tiny_run, tmp_path):
        """A run and its earlier checkpoint, as if they were two trainings."""
        (tmp_path / "runs").mkdir()
        for name, checkpoint in zip(("x_seed0", "x_seed1"), list_checkpoints(tiny_run), strict=True):
            shutil.copytree(checkpoint, tmp_path / "runs" / name)
        return tmp_path / "runs"

    def test_several_checkpoints_by_a_pattern(self, toy, runs, tmp_path):
        pattern, out = str(runs / "x_seed*"), tmp_path / "out"
        options = [*self.ENV, "--episodes", "3", "--seed", "7", "--reproducible", "--out", str(out)]
        assert main(["compare", pattern, str(runs / "x_seed0"), *options]) == 0
        found = json.loads((out / "comparison.json").read_text())
        assert (len(found["a"]["seeds"]), found["about"]) == (2, "checkpoints")
        for folder in (out / "a" / "x_seed0", out / "a" / "x_seed1", out / "b"):
            policy = json.loads((folder / "result.json").read_text())["provenance"]["policy"]
            assert (policy["settings"]["seed"], policy["reproducible"], policy["device"]) == (7, True, "cpu")
        again = ["compare", str(runs / "x_seed1"), pattern, *options, "--overwrite"]
        assert main(again) == 0
        assert [folder for folder, _ in find_evaluations(out / "a")] == [out / "a"]
        assert [folder.name for folder, _ in find_evaluations(out / "b")] == ["x_seed0", "x_seed1"]
        assert not list((out / "a").glob("*/result.json"))
        with pytest.raises(DatasetError, match="is a comparison of several arms; name the folder of one"):
            find_evaluations(out)  # its two arms are no two trainings of one

    def test_arms_that_cannot_be(self, toy, runs, tmp_path, refused):
        pattern, checkpoint = runs / "x_seed*", runs / "x_seed0"
        refused(["compare", pattern, checkpoint, *self.ENV, "--sequential", "2"], "one evaluation of each arm, and 2")
        refused(["compare", pattern, checkpoint], "give --env")
        refused(["compare", runs / "z*", checkpoint, *self.ENV], "matches neither checkpoints nor evaluations")
        refused(["compare", checkpoint, checkpoint, *self.ENV, "--device", "abacus"], "abacus")
        (runs / "x_seed2").mkdir()
        refused(["compare", pattern, checkpoint, *self.ENV], "and what is none", "x_seed2")

    def test_an_evaluation_that_is_compared_is_not_replaced(self, toy, runs, tmp_path, refused):
        out = tmp_path / "out"
        evaluate(Chaser(1.0), "toy_environment:make_point", 2, out=out / "a", num_videos=0)
        options = [*self.ENV, "--out", out, "--overwrite"]
        refused(["compare", runs / "x_seed0", out / "a", *options], "would be replaced", unchanged=[out])


def made(successes, weights, package="3.3.0"):
    """An evaluation of these weights."""
    provenance = {"policy": {"weights_sha256": weights}}
    return {**document(successes), "versions": {"mujoco": package}, "provenance": provenance}


class TestTrainings:
    """Evaluations of the same weights are one training."""

    GOOD, BAD = [True] * 50, [True] * 20 + [False] * 30

    def test_noise_seeds_of_one_checkpoint_say_nothing_about_recipes(self):
        arms = [made(self.GOOD, "x") for _ in range(3)], [made(self.BAD, "y") for _ in range(3)]
        comparison = compare(*arms, "x", "y")
        assert comparison.verdict.startswith("x is better than y. This is about these checkpoints")
        found = comparison.to_json()
        assert (found["about"], found["pair"], found["episodes_not_inferior"]) == ("checkpoints", None, None)
        assert (found["a"]["seeds"], found["b"]["seeds"]) == ([1.0], [0.4])
        assert (found["a"]["evaluations"], found["a"]["successes"], found["a"]["episodes"]) == (3, 150, 150)
        assert "checkpoints" in found["interval_method"]
        assert any("non-inferiority are about these checkpoints" in note for note in found["notes"])

    def test_one_training_against_several(self):
        comparison = compare([made(self.GOOD, "x")], [made(self.BAD, str(seed)) for seed in range(3)], "x", "y")
        assert comparison.about == "checkpoints"
        assert "about these checkpoints" in comparison.verdict
        assert any("only one training of x, so" in note for note in comparison.notes)
        assert "non-inferior" not in format_comparison(comparison).lower().replace("non-inferiority", "")

    def test_several_trainings_are_about_recipes(self):
        arms = [[made(self.GOOD[seed:] + [False] * seed, f"{name}{seed}") for seed in range(3)] for name in "xy"]
        comparison = compare(*arms)
        assert comparison.about == "recipes"
        assert "checkpoints" not in format_comparison(comparison)

    def test_noise_seeds_are_averaged_before_trainings_are_drawn(self):
        arm = [made(self.GOOD, "x"), made(self.BAD, "x"), made(self.BAD, "z")]
        comparison = compare(arm, [made(self.BAD, "y"), made(self.BAD, "w")], "x", "y")
        assert comparison.a.rates.mean(axis=1).tolist() == pytest.approx([0.7, 0.4])
        assert comparison.difference == pytest.approx(0.15)
        assert comparison.about == "recipes"

    def test_evaluations_that_do_not_tell_their_weights_are_trainings(self):
        comparison = compare([document(self.GOOD)] * 2, [document(self.BAD)] * 2)
        assert [len(arm.rates) for arm in (comparison.a, comparison.b)] == [2, 2]

    def test_the_report_says_so_too(self, tmp_path):
        comparison = compare([made(self.GOOD, "x"), made(self.BAD, "x")], [made(self.BAD, "y")], "x", "y")
        write_comparison(comparison, tmp_path / "comparison.html")
        page = (tmp_path / "comparison.html").read_text()
        assert "Non-inferior (lower end above -5 points, of these checkpoints, not of the recipes" in page
        assert "1 of 2" in page  # start states that noise decides


class TestNumbersOfEpisodes:
    OUTCOMES = ([1] * 98 + [0] * 2, [1] * 96 + [0] * 2 + [1] * 2)

    def test_how_many_more_show_non_inferiority(self, tmp_path):
        comparison = compare(*([document(arm)] for arm in self.OUTCOMES), "x", "y")
        found = comparison.to_json()
        assert found["non_inferior"] is False
        assert found["episodes_not_inferior"] == 107
        assert "7 more episodes like these would show that A is not worse by 5 points" in format_comparison(comparison)
        write_comparison(comparison, tmp_path / "comparison.html")
        assert "107 start states with the same shares of outcomes" in (tmp_path / "comparison.html").read_text()
        twice = compare(*([document(arm * 2)] for arm in self.OUTCOMES), "x", "y")
        assert twice.to_json()["non_inferior"] is True
        assert "would show that A is not worse" not in format_comparison(twice)

    def test_none_is_told_where_outcomes_decide_when_to_stop(self, tmp_path):
        arms = [document([1] * 20 + [0] * 4)], [document([1] * 16 + [0] * 8)]
        open_still = compare(*arms, "x", "y", sequential=True)
        found = open_still.to_json()
        assert (found["episodes_needed"], found["episodes_not_inferior"]) == (None, None)
        assert compare(*arms, "x", "y").to_json()["episodes_needed"] > 24
        assert "mislead" in format_comparison(open_still)
        assert "more episode" not in format_comparison(open_still).replace("How many more episodes", "")
        write_comparison(open_still, tmp_path / "comparison.html")
        assert "mislead" in (tmp_path / "comparison.html").read_text()
        decided = compare([document([1] * 7)], [document([0] * 7)], sequential=True)
        assert "mislead" not in format_comparison(decided)


def test_nothing_in_common_is_not_decided_yet():
    assert not is_decided(document([1] * 9), document([0] * 9, first=20))
    assert not is_decided(document([1] * 9, invalid=range(9)), document([0] * 9))
    assert is_decided(document([1] * 9), document([0] * 9))


class TestNotes:
    def test_what_a_reader_has_to_know(self):
        def both(weights, package):
            return [made([True, False], one, package) for one in weights]

        notes = compare(both("xx", "3.3.0"), both("yz", "3.4.0")).notes
        assert any("only one training of A" in note for note in notes)
        assert any(note.startswith("A: ") and "same training" in note for note in notes)
        assert not any(note.startswith("B: ") for note in notes)
        assert any("different versions of mujoco: 3.3.0, 3.4.0" in note for note in notes)
        assert any("fewer than 5 seeds" in note for note in compare(both("wx", "3.3.0"), both("yz", "3.3.0")).notes)
        assert compare(both("x", "3.3.0"), both("y", "3.3.0")).notes == ()


def test_no_line_goes_through_the_words_where_nothing_differs():
    svg = pairs_plot(compare([document([1, 0])], [document([1, 0])]))
    across = [float(y) for y in re.findall(r'd="M 4[\d.]+ ([\d.]+) \nL 30[\d.]+ \1 \n"', svg)]
    assert len(across) >= 5
    baseline = float(re.search(r'y="([\d.]+)"[^>]*>no start state told them apart', svg)[1])
    assert not [y for y in across if baseline - 10 < y < baseline + 5]


def test_a_result_of_parts_with_gaps_tells_which_episodes_and_how_many_at_once(toy) -> None:
    options = {"num_videos": 0, "progress": False}
    one = evaluate(toy.GoToGoal(), toy.PointEnvironment, 1, num_envs=1, **options)
    many = evaluate(toy.GoToGoal(), toy.PointEnvironment, 8, first_episode=20, num_envs=4, **options)
    parts = [replace(one, plan_batch_size=1.0, timings_ms={"plan": [1.0]})]
    parts += [replace(many, plan_batch_size=4.0, timings_ms={"plan": [1.0] * 5})]
    joined = join_results(parts, 1.0)
    assert (joined.num_envs, joined.plan_batch_size) == (4, 3.5)
    assert ">0 to 27, 9 of them</td>" in _settings(joined.to_json())
    assert ">20 to 27</td>" in _settings(many.to_json())


def test_an_environment_does_not_go_on_beyond_its_own_limit(toy) -> None:
    with pytest.raises(ConfigError, match=r"toy/point does, after 40 control steps, not later; got 41"):
        evaluate(toy.GoToGoal(), toy.PointEnvironment, 1, max_steps=41, progress=False)
    assert evaluate(toy.GoToGoal(), toy.PointEnvironment, 1, max_steps=40, progress=False).max_steps == 40
