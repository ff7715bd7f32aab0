"""Evaluations on a local Ray cluster: bitwise those of one machine, also when a process dies amid its episodes."""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scd_robot.cli.main import main
from scd_robot.errors import SimulatorError, UnknownNameError
from scd_robot.sim_eval import evaluate
from scd_robot.sim_eval.cluster import evaluate_on_cluster
from scd_robot.sim_eval.jobs import EvaluationJob, run_jobs

ray = pytest.importorskip("ray")
ENVIRONMENT = "toy_environment:make_point"


@pytest.fixture(scope="module")
def cluster():
    """Two workers on this machine, which find the test's modules.

    Whatever else the machine does must not decide: a worker may take its time to begin, and is not ended where others
    use up the memory. Ray's own processes have 30 s to begin, which nothing changes: they are started again.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
        patch.setenv("RAY_worker_register_timeout_seconds", "600")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        for attempts_left in (2, 1, 0):
            try:
                ray.init(
                    address="local",
                    num_cpus=2,
                    include_dashboard=False,
                    log_to_driver=False,
                    object_store_memory=100 * 2**20,
                )
                break
            except Exception as error:  # Ray raises no kind of its own
                if not attempts_left or "timed out during startup" not in str(error):
                    raise
                ray.shutdown()
    yield "auto"
    ray.shutdown()


def make_policy(run):
    from scd_robot.policies import load_policy

    return load_policy(run, reproducible=True)


class Mortal:
    """A policy that ends its process, as a node that fails does, in the middle of its rows' episodes.

    Only the first process of all does so that finds the file `death`. It leaves `will`, with the control steps that
    each row's episode has had, and its children.
    """

    def __init__(self, policy, death):
        self._policy, self._death, self._calls, self._steps = policy, Path(death), 0, None

    def __getattr__(self, name):
        return getattr(self._policy, name)

    def reset(self, rows=None, episodes=None):
        self._policy.reset(rows=rows, episodes=episodes)
        if rows is None:
            self._steps = [0] * len(episodes)
        else:
            for row in rows:
                self._steps[row] = 0

    def act(self, observation, executed_action=None):
        self._calls += 1
        if self._calls > 30 and min(self._steps) > 2:
            with contextlib.suppress(FileNotFoundError):
                self._death.unlink()
                simulators = [(child.pid, started(child.pid)) for child in multiprocessing.active_children()]
                will = {"steps": self._steps, "simulators": simulators}
                self._death.with_name("will").write_text(json.dumps(will))
                os.kill(os.getpid(), signal.SIGKILL)
        self._steps = [steps + 1 for steps in self._steps]
        return self._policy.act(observation, executed_action)


def make_mortal(make, run, death):
    return Mortal(make(run), death)


def started(pid):
    """When a process began, in the system's ticks; None where it is no longer running."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


@pytest.fixture(scope="module")
def wide_run(tiny_store, tmp_path_factory):
    """A run of the preset's full width: the numbers of its matrix products depend on how many rows they have."""
    out = tmp_path_factory.mktemp("wide") / "run"
    options = ["--dataset", str(tiny_store), "--out", str(out), "--max-steps", "1", "--accelerator", "cpu"]
    assert main(["train", "metaworld_state", *options]) == 0
    return out


class Steered:
    """Goes to the goal, so that episodes end at different times, and a little where the trained policy wants to."""

    def __init__(self, policy):
        self._policy = policy
        self.reset = policy.reset

    def act(self, observation, executed_action=None):
        wanted = self._policy.act(observation, executed_action)
        return np.clip((observation["goal"] - observation["position"]) / 0.2, -1, 1) + 0.2 * wanted


def make_steered(run):
    from scd_robot.policies import load_policy

    return Steered(load_policy(run, reproducible=True, num_executed=4))


def plain(result):
    return [episode.to_json() for episode in result.episodes_detail]


def assert_bitwise(result, local):
    assert plain(result) == plain(local)
    assert result.actions.keys() == local.actions.keys()
    for index, actions in local.actions.items():
        np.testing.assert_array_equal(result.actions[index], actions)


def test_outcome_is_bitwise_that_of_one_machine(cluster, toy, tiny_run):
    local = evaluate(make_policy(tiny_run), ENVIRONMENT, 45, num_envs=3, num_videos=0, progress=False)
    jobs = [EvaluationJob(functools.partial(make_policy, tiny_run), ENVIRONMENT, 45, num_envs=3)]
    [(number, result)] = list(evaluate_on_cluster(jobs, cluster, progress=False))
    assert number == 0
    assert_bitwise(result, local)
    assert len(result.timings_ms["act"]) > 0


def test_a_wide_policy_is_reproducible_too(cluster, toy, wide_run):
    local = evaluate(make_steered(wide_run), ENVIRONMENT, 45, num_envs=3, num_videos=0, progress=False)
    assert len({episode.steps for episode in local.valid}) > 5
    jobs = [EvaluationJob(functools.partial(make_steered, wide_run), ENVIRONMENT, 45, num_envs=3)]
    [(_, result)] = list(run_jobs(jobs, ray=cluster, progress=False))
    assert_bitwise(result, local)


@pytest.mark.parametrize(("make", "run"), [(make_policy, "tiny_run"), (make_steered, "wide_run")])
def test_a_shard_that_dies_amid_its_episodes_leaves_no_trace(cluster, toy, make, run, tmp_path, request):
    run = request.getfixturevalue(run)
    (tmp_path / "death").touch()
    local = evaluate(make(run), ENVIRONMENT, 45, num_envs=3, num_videos=0, progress=False)
    policy = functools.partial(make_mortal, make, run, tmp_path / "death")
    [(_, result)] = list(run_jobs([EvaluationJob(policy, ENVIRONMENT, 45, num_envs=3)], ray=cluster, progress=False))
    will = json.loads((tmp_path / "will").read_text())
    assert len(will["steps"]) == 3
    assert min(will["steps"]) > 2
    assert_bitwise(result, local)
    [(pid, began)] = will["simulators"]
    deadline = time.monotonic() + 300
    while started(pid) == began and time.monotonic() < deadline:
        time.sleep(0.1)
    assert started(pid) != began


def test_what_the_user_can_mend_is_told_from_the_node(cluster, toy, tiny_run):
    policy = functools.partial(make_policy, tiny_run)
    jobs = [EvaluationJob(policy, "metaworld/pusch-v3", 60), EvaluationJob(policy, ENVIRONMENT, 2)]
    with pytest.raises(UnknownNameError, match="push-v3"):
        list(run_jobs(jobs, ray=cluster, progress=False))
    failed = []
    done = list(run_jobs(jobs, ray=cluster, progress=False, on_failure=lambda *one: failed.append(one)))
    assert [job for job, _ in done] == jobs[1:]
    assert [(job, type(error)) for job, error in failed] == [(jobs[0], UnknownNameError)]


def test_outputs_are_written_here(cluster, toy, tiny_run, tmp_path):
    job = EvaluationJob(functools.partial(make_policy, tiny_run), ENVIRONMENT, 4, tmp_path / "out", num_videos=1)
    [(_, result)] = list(run_jobs([job], ray=cluster, progress=False))
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    assert document["episodes"] == 4
    assert document["videos"]
    assert document["video_error"] is None
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"report.html", "actions.safetensors", "videos"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "episodes.jsonl").read_text().splitlines()]
    assert [line.pop("versions") for line in lines] == [document["versions"]] * 4
    policy = document["policy"], document["provenance"]["policy"]["settings"]["seed"]
    origin = {"env": "toy/point", "policy": policy[0], "policy_seed": policy[1], "faults": document["faults"]}
    assert [{key: line.pop(key) for key in origin} for line in lines] == [origin] * 4
    assert lines == document["episodes_detail"]
    assert result.out == tmp_path / "out"


class Impatient(Steered):
    """Waits for a file before it begins the 30th episode."""

    def __init__(self, policy, file):
        super().__init__(policy)
        self._file, self.provenance = Path(file), policy.provenance
        self.reset = self._reset

    def _reset(self, rows=None, episodes=None):
        while 30 in episodes and not self._file.exists():
            time.sleep(0.05)
        self._policy.reset(rows=rows, episodes=episodes)


def make_impatient(run, file):
    return Impatient(make_policy(run), file)


def test_episodes_of_a_shard_are_kept_as_it_ends(cluster, toy, tiny_run, tmp_path, monkeypatch):
    """The second shard waits for a file; the first one's episodes are on disk, and stay when the driver is ended."""
    log, go = tmp_path / "out" / "episodes.jsonl", tmp_path / "go"
    policy = functools.partial(make_impatient, tiny_run, go)
    job = EvaluationJob(policy, ENVIRONMENT, 40, tmp_path / "out", num_envs=3, num_videos=0)
    wait, waits = ray.wait, []

    def end(*arguments, **options):
        if log.exists():
            raise KeyboardInterrupt
        waits.append(arguments)
        if len(waits) > 1:  # the first shard has ended and was not kept: let the second one end as well
            go.touch()
        return wait(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ray, "wait", end)
        with pytest.raises(KeyboardInterrupt):
            list(run_jobs([job], ray=cluster, progress=False))
    assert [json.loads(line)["index"] for line in log.read_text().splitlines()] == list(range(20))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"episodes.jsonl", "videos"}
    go.touch()
    [_] = list(run_jobs([dataclasses.replace(job, overwrite=True)], ray=cluster, progress=False))
    assert sorted(json.loads(line)["index"] for line in log.read_text().splitlines()) == list(range(40))


def out_of_memory():
    raise RuntimeError("CUDA out of memory\nand a long explanation")


@pytest.mark.parametrize("where", ["cluster", "here"])
def test_what_nobody_foresaw_ends_one_job_only(toy, tiny_run, tmp_path, where, request):
    address = request.getfixturevalue("cluster") if where == "cluster" else None
    jobs = [
        EvaluationJob(out_of_memory, ENVIRONMENT, 2, tmp_path / "bad"),
        EvaluationJob(functools.partial(make_policy, tiny_run), ENVIRONMENT, 2, tmp_path / "good", num_videos=0),
    ]
    failed = []
    done = list(run_jobs(jobs, ray=address, progress=False, on_failure=lambda *one: failed.append(one)))
    assert [job for job, _ in done] == jobs[1:]
    assert [(job, type(error)) for job, error in failed] == [(jobs[0], RuntimeError)]
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        list(run_jobs(jobs[:1], ray=address, progress=False))


def test_a_sweep_does_what_is_missing(cluster, toy, tiny_run, tmp_path, capsys):
    arguments = ["sweep", str(tiny_run), "--env", ENVIRONMENT, "--seeds", "0", "1", "--out", str(tmp_path / "out")]
    arguments += ["--episodes", "3", "--ray", "auto"]
    assert main(arguments) == 0
    files = sorted((tmp_path / "out").glob("**/result.json"))
    assert [file.parent.name for file in files] == ["seed_0", "seed_1"]
    assert capsys.readouterr().out.count("toy/point") == 2
    before = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()
    assert main([*arguments[:-2], "--json", "-"]) == 0  # the rest on this machine
    assert len(json.loads(capsys.readouterr().out)["evaluations"]) == 2
    assert files[1].stat().st_mtime_ns == before[1]
    assert files[0].is_file()


def test_a_sweep_tells_the_interval_of_the_best_reward(toy, tiny_run, tmp_path, capsys):
    arguments = ["sweep", str(tiny_run), "--env", ENVIRONMENT, "--out", str(tmp_path / "out"), "--episodes", "3"]
    assert main(arguments) == 0
    [row] = json.loads((tmp_path / "out" / "sweep.json").read_text())["evaluations"]
    low, high = row["best_reward_interval"]
    assert low < row["best_reward"] < high
    assert f"{row['best_reward']:.3f} [{low:.3f}, {high:.3f}]" in capsys.readouterr().out
    [file] = (tmp_path / "out").glob("**/result.json")
    older = json.loads(file.read_text())
    del older["best_reward_interval"]
    file.write_text(json.dumps(older))
    assert main(arguments) == 0
    [again] = json.loads((tmp_path / "out" / "sweep.json").read_text())["evaluations"]
    assert again == {**row, "best_reward_interval": None}
    assert f"| {row['best_reward']:.3f} |" in capsys.readouterr().out


def test_a_sweep_goes_on_beside_what_fails(toy, tiny_run, tmp_path, capsys):
    arguments = ["sweep", str(tiny_run), "--env", "metaworld/pusch-v3", ENVIRONMENT, "--out", str(tmp_path / "out")]
    assert main([*arguments, "--episodes", "2"]) == 2
    assert "FAILED" in capsys.readouterr().out
    table = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["env"] for row in table["evaluations"]] == ["toy/point"]
    assert [row["env"] for row in table["failed"]] == ["metaworld/pusch-v3"]
    assert "push-v3" in table["failed"][0]["error"]


@pytest.mark.parametrize("change", [["--episodes", "3"], ["--first-episode", "1"]])
def test_a_sweep_keeps_what_is_another_evaluation(toy, tiny_run, tmp_path, refused, change):
    arguments = ["sweep", str(tiny_run), "--env", ENVIRONMENT, "--out", str(tmp_path / "out"), "--episodes", "2"]
    assert main(arguments) == 0
    refused([*arguments, *change], "holds another evaluation", "choose another --out")


def test_a_sweep_tells_checkpoints_apart_by_their_weights(toy, tiny_run, wide_run, tmp_path, refused):
    """Both folders are called `run`."""
    arguments = ["--env", ENVIRONMENT, "--out", str(tmp_path / "out"), "--episodes", "2"]
    assert main(["sweep", str(tiny_run), *arguments]) == 0
    refused(["sweep", str(wide_run), *arguments], "of other weights")


def test_no_cluster_there(refused, tiny_run, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", functools.partial(fail, ConnectionError("nobody answers\nat all")))
    refused(["eval", tiny_run, "--env", ENVIRONMENT, "--ray", "auto"], "no Ray cluster answers at 'auto'", "ray start")
    with pytest.raises(SimulatorError, match="nobody answers"):
        list(evaluate_on_cluster([], "auto"))


def fail(error, **_):
    raise error
