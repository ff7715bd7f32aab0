import functools
import json
import logging
import multiprocessing

import numpy as np
import pytest

from scd_robot import seeding
from scd_robot.errors import ConfigError, MissingDependencyError, OutputError, ShapeError
from scd_robot.sim_eval.policy_adapter import PolicyError
from scd_robot.sim_eval.rollout import evaluate
from scd_robot.types import ArraySpec, PolicySpec

POINT = "toy_environment:make_point"


def seed_of(episode):
    return seeding.derive_seed(seeding.EVALUATION, episode)


def run(policy, environment=POINT, episodes=6, **options):
    return evaluate(policy, environment, episodes, **{"progress": False, "num_envs": 1, **options})


class Still:
    """Takes no rows, no episodes, no executed action."""

    def __init__(self, action=(0.0, 0.0)):
        self.action = np.array(action)
        self.calls = 0

    def reset(self):
        self.calls += 1

    def act(self, observation):
        return np.tile(self.action, (len(observation["goal"]), 1))


def test_outcomes_do_not_depend_on_the_number_of_environments(toy):
    alone, together = (run(toy.GoToGoal(), num_envs=n).episodes_detail for n in (1, 4))
    assert alone == together
    assert all(e.success and e.reason == "success" for e in alone)
    assert len({e.steps for e in alone}) > 1  # rows really end at different times
    assert len({e.initial_state_hash for e in alone}) == 6


def test_initial_state_is_a_function_of_the_episode_index(toy):
    first = run(toy.GoToGoal(), num_envs=3).episodes_detail
    later = run(toy.GoToGoal(), episodes=3, first_episode=3).episodes_detail
    assert later == first[3:]
    assert later[0].seed == seed_of(3)
    other = run(toy.GoToGoal(), episodes=3, seed_domain=seeding.VALIDATION).episodes_detail
    assert {e.initial_state_hash for e in first}.isdisjoint(e.initial_state_hash for e in other)


def test_policy_is_told_which_rows_begin_which_episodes(toy):
    policy = toy.GoToGoal()
    result = run(policy, episodes=5, num_envs=2)
    assert policy.resets[0] == (None, [0, 1])  # the whole batch first: a policy does not know its size before
    assert all(len(rows) == len(episodes) for rows, episodes in policy.resets[1:])
    assert sorted(e for _, episodes in policy.resets for e in episodes) == [0, 1, 2, 3, 4]
    assert len(policy.executed) - 1 == result.to_json()["act_ms"]["count"]  # the first is not counted
    assert result.to_json()["timing_batch_size"] == 2


def test_policy_that_takes_rows_but_no_episodes_is_fine(toy):
    class Uncounted(toy.GoToGoal):
        def reset(self, rows=None):
            super().reset(rows)

    policy = Uncounted()
    assert run(policy, num_envs=2).episodes_detail == run(toy.GoToGoal()).episodes_detail
    assert policy.resets[0] == (None, None)


def test_policy_gets_the_action_that_was_executed(toy):
    policy = toy.GoToGoal()
    run(policy, episodes=1)
    assert policy.executed[0] is None
    assert all(action.shape == (1, 2) and np.abs(action).max() <= 1 for action in policy.executed[1:])
    assert max(np.abs(action).max() for action in policy.executed[1:]) == 1.0  # the policy asked for more


def test_policy_without_rows_runs_in_one_environment(toy):
    policy = Still()
    result = run(policy, episodes=3, num_envs=None, max_steps=7)
    assert policy.calls == 3
    assert result.num_envs == 1
    assert [(e.success, e.steps, e.reason) for e in result.episodes_detail] == [(False, 7, "time limit")] * 3
    with pytest.raises(ConfigError, match="takes no rows"):
        run(policy, num_envs=2)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("fault", ["raise", "die", "hang", "nan", "nan reward", "blank"])
def test_crash_is_invalid_and_never_failed(toy, fault, processes, caplog):
    source = functools.partial(toy.PointEnvironment, faults={seed_of(1): fault})
    patience = 5.0 if fault == "hang" else 60.0  # the other environments answer within it on a busy machine too
    options = {"num_envs": processes + 1, "processes": processes, "timeout_s": patience}
    with caplog.at_level(logging.ERROR):
        result = run(toy.GoToGoal(), source, episodes=4, **options)
    crashed = result.episodes_detail[1]
    assert crashed.invalid
    assert not crashed.success
    assert crashed.steps == toy.FAULT_STEP
    assert crashed.reason.startswith("crash: ")
    assert crashed.initial_state_hash is not None
    assert (result.successes, result.invalid, result.success_rate) == (3, 1, 1.0)
    healthy = run(toy.GoToGoal(), episodes=4).episodes_detail
    assert [e for e in result.episodes_detail if not e.invalid] == [healthy[i] for i in (0, 2, 3)]


@pytest.mark.parametrize("processes", [1, 2])
def test_crash_that_does_not_repeat_costs_nothing(toy, tmp_path, processes):
    source = functools.partial(toy.PointEnvironment, faults={seed_of(1): "raise"}, fault_once=tmp_path / "happened")
    result = run(toy.GoToGoal(), source, episodes=3, num_envs=2, processes=processes)
    assert (tmp_path / "happened").exists()
    assert result.episodes_detail == run(toy.GoToGoal(), episodes=3).episodes_detail


def test_a_simulator_that_does_not_start_again_at_once_is_given_time(toy, tmp_path):
    def late(failures):
        counter = tmp_path / str(failures)
        return functools.partial(toy.LateEnvironment, counter, failures, faults={seed_of(1): "die"})

    result = run(toy.GoToGoal(), late(2), episodes=3)
    assert [e.invalid for e in result.episodes_detail] == [False, True, False]
    lost = run(toy.GoToGoal(), late(3), episodes=3)
    assert [e.invalid for e in lost.episodes_detail] == [False, True, True]


def test_a_simulator_that_never_starts_again_ends_with_what_was_measured(toy, tmp_path, caplog):
    source = functools.partial(toy.LateEnvironment, tmp_path / "count", 99, faults={seed_of(2): "die"})
    result = run(toy.GoToGoal(), source, episodes=5, out=tmp_path / "out", num_videos=1)
    healthy = run(toy.GoToGoal(), episodes=5).episodes_detail
    assert result.episodes_detail[:2] == healthy[:2]
    for record, other in zip(result.episodes_detail[2:], healthy[2:], strict=True):
        assert (record.invalid, record.success, record.seed) == (True, False, other.seed)
        assert "exit code 3" in record.reason
        assert "did not start again in 3 attempts" in record.reason
        assert "licence server" in record.reason
    assert [record.steps for record in result.episodes_detail[2:]] == [toy.FAULT_STEP, 0, 0]
    assert "the last 2 episodes were not run" in caplog.text
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (document["successes"], document["invalid"], document["success_rate"]) == (2, 3, 1.0)
    assert "no simulator was left" in document["video_error"]
    assert len((tmp_path / "out" / "episodes.jsonl").read_text().splitlines()) == 5
    assert "did not start again" in (tmp_path / "out" / "report.html").read_text()
    assert multiprocessing.active_children() == []


def test_the_other_simulators_go_on_when_one_is_lost(toy, tmp_path):
    """Four environments in two processes, the first of which is lost in its first episode."""
    counter = tmp_path / "count"
    source = functools.partial(toy.LateEnvironment, counter, 99, free=4, faults={seed_of(0): "die"})
    result = run(toy.GoToGoal(), source, episodes=9, num_envs=4, processes=2, out=tmp_path / "out", num_videos=1)
    assert [e.index for e in result.episodes_detail if e.invalid] == [0, 2]  # with its neighbour
    healthy = run(toy.GoToGoal(), episodes=9).episodes_detail
    assert [e for e in result.episodes_detail if not e.invalid] == [healthy[i] for i in (1, 3, 4, 5, 6, 7, 8)]
    assert [video.episode for video in result.videos] == [1]  # of a process that is left


def test_a_simulator_that_is_lost_while_episodes_begin(toy, tmp_path):
    source = functools.partial(toy.NeverBeginsAgain, tmp_path / "count")
    result = run(toy.GoToGoal(), source, episodes=3)
    assert [(e.invalid, e.initial_state_hash) for e in result.episodes_detail] == [(True, None)] * 3
    assert "no collision-free start state" in result.episodes_detail[0].reason


def test_a_policy_begins_no_episode_of_a_simulator_that_is_lost(toy, tmp_path):
    source = functools.partial(toy.NeverBeginsAgain, tmp_path / "count", free=2, seeds={seed_of(3)})
    policy = toy.GoToGoal()
    result = run(policy, source, episodes=6, num_envs=2, processes=2)
    assert [e.index for e in result.episodes_detail if e.invalid] == [3]
    assert all(len(rows) == len(episodes) >= 1 for rows, episodes in policy.resets[1:])
    assert sorted(e for _, episodes in policy.resets for e in episodes) == [0, 1, 2, 4, 5]


def test_the_report_of_episodes_that_never_began(toy, tmp_path):
    result = run(toy.GoToGoal(), toy.NeverBegins, episodes=2, out=tmp_path / "out", num_videos=1)
    assert result.invalid == 2
    assert "no calls" in (tmp_path / "out" / "report.html").read_text()


def test_bystanders_of_crashes_are_never_blamed(toy):
    """Three of eight episodes crash twice each, and all share a process."""
    source = functools.partial(toy.PointEnvironment, faults={seed_of(e): "die" for e in (0, 3, 5)})
    policy = toy.GoToGoal()
    result = run(policy, source, episodes=8, num_envs=4, processes=1)
    assert [e.index for e in result.episodes_detail if e.invalid] == [0, 3, 5]
    healthy = run(toy.GoToGoal(), episodes=8).episodes_detail
    assert [e for e in result.episodes_detail if not e.invalid] == [healthy[i] for i in (1, 2, 4, 6, 7)]
    for _, episodes in policy.resets[1:]:
        assert len(set(episodes)) == len(episodes)
    begun = [e for _, episodes in policy.resets for e in episodes]
    assert begun.count(0) == 2
    assert begun.count(1) >= 2  # with it


def test_all_episodes_invalid_leaves_no_rate(toy):
    source = functools.partial(toy.PointEnvironment, faults={seed_of(e): "raise" for e in range(2)})
    document = run(toy.GoToGoal(), source, episodes=2, num_envs=1).to_json()
    assert (document["success_rate"], document["interval"], document["invalid"]) == (None, [0.0, 1.0], 2)
    assert document["time_to_success"] is None


def test_policy_that_raises_ends_the_evaluation_and_leaves_no_process(toy, tmp_path):
    class Failing(toy.GoToGoal):
        def act(self, observation, executed_action=None):
            if len(self.executed) == 30:
                raise RuntimeError("out of memory")
            return super().act(observation, executed_action)

    with pytest.raises(RuntimeError, match="out of memory"):
        run(Failing(), out=tmp_path / "out")
    assert multiprocessing.active_children() == []
    lines = (tmp_path / "out/episodes.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(len(lines)))
    assert len(lines) >= 1  # what was finished is kept
    assert not (tmp_path / "out/result.json").exists()


def test_action_that_is_not_finite_names_row_and_step(toy):
    with pytest.raises(PolicyError, match=r"nan.* in row 0 \(episode 0\) at control step 0"):
        run(Still((np.nan, 0)))


@pytest.mark.parametrize("width", [1, 3])
def test_action_of_another_width_is_refused(toy, width):
    with pytest.raises(ShapeError, match=rf"\(1, 2\) .*got \(1, {width}\)"):
        run(Still((0.0,) * width))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observation": {"camera": ArraySpec((8, 8, 3), "uint8")}}, "'camera'.*gives goal, position"),
        ({"observation": {"goal": ArraySpec((3,))}}, r"'goal' as float32 \(3,\).*gives float32 \(2,\)"),
        ({"observation": {"goal": ArraySpec((2,), "uint8")}}, "'goal' as uint8"),
        ({"action_dim": 4}, "4 wide, environment 'toy/point' needs 2"),
        ({"control_dt": 0.1}, "0.1 s, environment 'toy/point' steps 0.05 s"),
    ],
)
def test_policy_of_another_task_is_refused_before_it_is_run(toy, changes, message, tmp_path):
    policy = toy.GoToGoal()
    fitting = {"observation": {"goal": ArraySpec((2,))}, "action_dim": 2, "control_dt": toy.CONTROL_DT}
    policy.spec = PolicySpec(**{**fitting, **changes}, chunk_length=1, num_executed=1, history_length=1)
    with pytest.raises(ShapeError, match=message):
        run(policy, out=tmp_path / "out")
    assert policy.resets == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("trained", "taken", "option", "message"),
    [
        ("absolute", "delta", "", "absolute poses, .*for changes.*; add the option actions=absolute"),
        ("delta", "absolute", ",actions=absolute", "changes .*for absolute poses; leave actions=absolute out"),
        ("delta", "absolute", "", "train it on such actions"),
    ],
)
def test_absolute_actions_are_not_taken_for_changes_nor_the_reverse(toy, trained, taken, option, message):
    name = f"robosuite/Lift:recorded=env.json{option}"
    policy = toy.GoToGoal()
    policy.spec = PolicySpec({"goal": ArraySpec((2,))}, 2, toy.CONTROL_DT, 1, 1, 1, action_kind=trained)
    with pytest.raises(ConfigError, match=message):
        run(policy, functools.partial(toy.make_taking, taken, name))
    assert policy.resets == []


@pytest.mark.parametrize(
    ("trained", "taken", "warns"),
    [("", "delta", True), ("", "absolute", True), ("absolute", "", False), ("", "", False), ("delta", "delta", False)],
)
def test_where_nobody_tells_what_actions_ask_for_a_warning_says_so(toy, trained, taken, warns, caplog):
    policy = toy.GoToGoal()
    policy.spec = PolicySpec({"goal": ArraySpec((2,))}, 2, toy.CONTROL_DT, 1, 1, 1, action_kind=trained)
    assert run(policy, functools.partial(toy.make_taking, taken), episodes=1).valid
    assert ("nothing tells whether" in caplog.text) == warns


def test_timings_of_the_policy_are_summarised(toy):
    class Timed(toy.GoToGoal):
        def drain_timings(self):
            count = len(self.executed)
            rows = {"plan_rows": [2, 1]} if count else {}
            return {"encoder_ms": [1.0] * count, "plan_ms": [99.0, 4.0, 6.0] if count else [], **rows}

    document = run(Timed(), episodes=2).to_json()
    assert document["plan_ms"] == {"p50": 5.0, "p95": 5.9, "p99": 5.98, "count": 2}  # the first warms up
    assert document["plan_batch_size"] == 1.5
    assert document["encoder_ms"]["p99"] == 1.0
    assert run(toy.GoToGoal(), episodes=1).to_json()["plan_ms"] is None


def test_output_folder_holds_the_whole_evaluation(toy, tmp_path):
    result = run(toy.GoToGoal(), episodes=4, out=tmp_path / "out", num_videos=1, video_size=(64, 64))
    document = json.loads((tmp_path / "out/result.json").read_text())
    assert document == json.loads(json.dumps(result.to_json()))
    assert document["schema"] == 1
    assert (document["env"], document["episodes"], document["successes"]) == ("toy/point", 4, 4)
    assert document["interval"] == pytest.approx([0.51, 1.0], abs=1e-3)
    assert document["terminate_on_success"] is True
    assert document["time_to_success"]["seconds"]["mean"] == pytest.approx(document["mean_steps"] * toy.CONTROL_DT)
    lines = [json.loads(line) for line in (tmp_path / "out/episodes.jsonl").read_text().splitlines()]
    assert [line.pop("versions") for line in lines] == [document["versions"]] * 4
    origin = {"env": "toy/point", "policy": "GoToGoal", "policy_seed": None, "faults": document["faults"]}
    assert [{key: line.pop(key) for key in origin} for line in lines] == [origin] * 4
    assert sorted(lines, key=lambda line: line["index"]) == document["episodes_detail"]
    assert document["provenance"]["machine"]["cores"] >= 1
    assert document["videos"] == [{"episode": 0, "success": True, "file": "videos/episode_00000_success.mp4"}]
    assert (tmp_path / "out" / document["videos"][0]["file"]).stat().st_size > 500
    assert document["video_error"] is None
    assert "<html" in (tmp_path / "out/report.html").read_text()


def test_only_our_own_files_are_overwritten(toy, tmp_path):
    (tmp_path / "videos").mkdir()
    ours = ("episodes.jsonl", ".result.json.42.part", "videos/episode_00007_failure.mp4")
    for name in (*ours, "notes.txt", "videos/mine.mp4"):
        (tmp_path / name).write_text("old\n")
    with pytest.raises(OutputError, match="not empty"):
        run(toy.GoToGoal(), out=tmp_path)
    assert (tmp_path / "episodes.jsonl").read_text() == "old\n"
    run(toy.GoToGoal(), episodes=2, out=tmp_path, overwrite=True, num_videos=0)
    assert len((tmp_path / "episodes.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "notes.txt").read_text() == "old\n"
    assert sorted(p.name for p in (tmp_path / "videos").iterdir()) == ["mine.mp4"]
    assert not (tmp_path / ".result.json.42.part").exists()


def test_output_folder_that_is_a_file_is_refused_at_once(toy, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        run(toy.GoToGoal(), out=tmp_path / "out")


def test_missing_simulator_says_how_to_install_it(toy):
    with pytest.raises(MissingDependencyError, match="pip install"):
        run(toy.GoToGoal(), "toy_environment:make_without_simulator")


@pytest.mark.parametrize(
    "options", [{"episodes": 0}, {"num_envs": 0}, {"max_steps": 0}, {"num_videos": -1}, {"first_episode": -1}]
)
def test_numbers_out_of_range_are_refused(toy, options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))} must be at least"):
        run(toy.GoToGoal(), **options)


def test_object_that_is_no_policy_is_refused():
    with pytest.raises(ConfigError, match="has no act"):
        run(type("Half", (), {"reset": lambda self, rows=None: None})())
