"""Bad input through the program: exit code 2, one sentence, nothing lost, nothing half-written."""

import errno
import json
import os
import pkgutil
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import zarr
from safetensors import SafetensorError

from scd_robot.checkpoint import list_checkpoints
from scd_robot.cli.main import main
from scd_robot.datasets import open_dataset
from scd_robot.sim_eval import registry

Refused = Callable[..., None]


@pytest.fixture(autouse=True)
def threads_as_before():
    """The verbs choose torch's threads for their process, which is this one."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def store(tiny_store: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(tiny_store, tmp_path / "store" / "point.zarr")


@pytest.fixture
def run_folder(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(tiny_run, tmp_path / "finished" / "run")


@pytest.fixture
def point_world(monkeypatch: pytest.MonkeyPatch) -> str:
    """The toy environment as `module:callable`, importable in worker processes too, and as point/reach."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "sim_eval"))
    import toy_environment

    module = ModuleType("point_world")
    module.TASKS = ("reach",)  # type: ignore[attr-defined]
    module.make = lambda task, options: toy_environment.make_point()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "point_world", module)
    monkeypatch.setitem(registry._FACTORIES, "point", "point_world:make")
    return "toy_environment:make_point"


@pytest.fixture
def train(tiny_train_options: list[str]) -> Callable[..., list[object]]:
    """Arguments of a short training run."""

    def arguments(store: Path, out: Path, *more: object, max_steps: int = 4) -> list[object]:
        options = ["--dataset", store, "--out", out, "--max-steps", max_steps, *tiny_train_options]
        return ["train", "metaworld_state", *options, *more]

    return arguments


def fail_in(monkeypatch: pytest.MonkeyPatch, method: str, code: int, concerns: Callable[[Path], bool]) -> None:
    """Lets a method of Path fail as the operating system would, for the paths that `concerns` picks."""
    original = getattr(Path, method)

    def failing(self: Path, *args: object, **kwargs: object) -> object:
        if concerns(self):
            raise OSError(code, os.strerror(code), str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, method, failing)


class TestUnknownNames:
    def test_verb(self, refused: Refused) -> None:
        refused(["trian"], "unknown verb 'trian'", "'train'")

    def test_preset(self, store: Path, tmp_path: Path, refused: Refused) -> None:
        arguments = ["train", "metaworld_stat", "--dataset", store, "--out", tmp_path / "run"]
        refused(arguments, "unknown preset 'metaworld_stat'", "'metaworld_state'", unchanged=[tmp_path])

    @pytest.mark.parametrize("place", ["", "checkpoints/step_00000004"])
    def test_a_run_in_the_place_of_a_preset(self, store: Path, tiny_run: Path, refused: Refused, place: str) -> None:
        run, config = tiny_run / place, tiny_run / "checkpoints" / "step_00000004" / "config.json"
        arguments = ["train", run, "--dataset", store, "--out", tiny_run.parent / "new"]
        told = ("with --resume", f"a preset and --init {run}", f"anew with its settings, give {config}")
        refused(arguments, *told, unchanged=[tiny_run.parent])

    @pytest.mark.parametrize(
        ("setting", "told"),
        [
            ("training.learning_rat=1", "did you mean 'learning_rate'"),
            ("trainin.learning_rate=1", "did you mean 'training'"),
            ("max_steps=3", "unknown setting 'max_steps'; did you mean 'training.max_steps'"),
            ("model.observation_shapes.gaol=2", "did you mean 'goal'"),
            ("training.learning_rate.peak=1", "no valid names here"),
            ("training.max_steps=many", "must be a whole number, got 'many'"),
            ("training.learning_rate=nan", "must be finite"),
            ("training.weight_decay=nan", "must be finite"),
            ("policy.sampler=euler", "policy.sampler is a group of settings; set one of them: policy.sampler.solver"),
            ("policy.sampler.solver=rk4", "one of 'euler', 'heun', 'midpoint', 'average', 'mip', got 'rk4'"),
            ("model.memory_gate=perhaps", "must be true or false, got 'perhaps'"),
            ("training.betas=0.9,high", "got 'high' in '0.9,high'"),
            ("model.width=17", "must be a multiple of"),
            ("training.seed=4294967296", "below 2**32"),
            ("model.width", "FIELD=VALUE"),
        ],
    )
    def test_setting(self, setting: str, told: str, store: Path, tmp_path: Path, refused: Refused) -> None:
        arguments = ["train", "metaworld_state", "--dataset", store, "--out", tmp_path / "run", "--set", setting]
        refused(arguments, told, unchanged=[tmp_path])

    @pytest.mark.parametrize("before", ["--dataset", "--out"])
    def test_a_setting_outside_of_set(self, store: Path, tmp_path: Path, refused: Refused, before: str) -> None:
        given = {"--dataset": [store], "--out": [tmp_path / "run"]}
        given[before].append("training.max_steps=3")
        arguments = ["train", "metaworld_state", *(each for option in given for each in (option, *given[option]))]
        refused(arguments, "settings stand after --set; write: --set training.max_steps=3", unchanged=[tmp_path])

    def test_observation_key(self, store: Path, refused: Refused) -> None:
        refused(["data", "info", store, "--keys", "gaol"], "unknown key", "'goal'", unchanged=[store])

    def test_task_for_recording(self, tmp_path: Path, refused: Refused) -> None:
        arguments = ["data", "record", "metaworld/psh-v3", "--episodes", 1, "--out", tmp_path / "a.zarr"]
        refused(arguments, "unknown environment 'metaworld/psh-v3'", "'metaworld/push-v3'", unchanged=[tmp_path])

    def test_task_for_evaluation(self, tiny_run: Path, tmp_path: Path, refused: Refused) -> None:
        arguments = ["eval", tiny_run, "--env", "metaworld/psh-v3", "--episodes", 1, "--out", tmp_path / "out"]
        refused(arguments, "unknown environment 'metaworld/psh-v3'", "'metaworld/push-v3'", unchanged=[tmp_path])

    def test_task_for_evaluation_while_training(self, store: Path, tmp_path: Path, train, refused: Refused) -> None:
        """At once, not at the first evaluation."""
        arguments = train(store, tmp_path / "run", "--eval-env", "metaworld/psh-v3", "--eval-every", 2)
        refused(arguments, "'metaworld/push-v3'", unchanged=[tmp_path])

    def test_a_task_for_evaluation_while_training_that_the_policy_will_not_fit(
        self, store: Path, tmp_path: Path, train, refused: Refused, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(str(Path(__file__).parent / "sim_eval"))
        arguments = ["--eval-env", "toy_environment:make_taking_poses", "--eval-every", 2]
        dataset = zarr.open_group(store, mode="r+").attrs["scd_robot"]
        spec = {**dataset["spec"], "action_kind": "delta"}
        zarr.open_group(store, mode="r+").attrs["scd_robot"] = {**dataset, "spec": spec}
        told = "trained on actions that are changes (deltas)"
        refused(train(store, tmp_path / "run", *arguments), told, unchanged=[tmp_path], at_once=False)

    def test_accelerator(self, store: Path, tmp_path: Path, train, refused: Refused) -> None:
        refused(train(store, tmp_path / "run", "--accelerator", "abacus"), "accelerator 'abacus'")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("option", "value", "told"),
        [
            ("--threads", 0, "--threads must be at least 1, got 0"),
            ("--threads", -1, "--threads must be at least 1, got -1"),
            ("--devices", -1, "-1 devices"),
            ("--eval-episodes", 0, "--eval-episodes must be at least 1, got 0"),
            (
                "--tasks",
                "onehot",
                "--tasks takes one-hot, or a JSON file with a vector for each task; there is no onehot",
            ),
        ],
    )
    def test_training_option(self, option, value, told, store: Path, tmp_path: Path, train, refused: Refused) -> None:
        refused(train(store, tmp_path / "run", option, value), told, at_once=False)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(("option", "size"), [("--max-frame-mb", "nan"), ("--max-history-mb", "inf")])
    def test_bound_of_the_server(self, option, size, tiny_run: Path, refused: Refused) -> None:
        refused(["serve", tiny_run, option, size], f"{option} must be a positive finite number, got {size}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "convert", "no.zarr", "new.zarr"],
        ["data", "merge", "no.zarr", "nor.zarr", "--out", "new.zarr"],
        ["data", "split", "no.zarr", "--out", "new.zarr", "other.zarr", "--shares", "1", "1"],
        ["data", "filter", "no.zarr", "new.zarr"],
        ["data", "info", "no.zarr"],
        ["probe", "no run", "--dataset", "no.zarr"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_summary_that_cannot_be_written_is_told_before_the_work(arguments, tmp_path, refused, monkeypatch) -> None:
    """Which would end, here, for want of a dataset."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    refused([*arguments, "--json", "folder"], "cannot write 'folder'", "it is a folder", unchanged=[tmp_path])


class TestDatasets:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("key", ["goal", "action", "executed_action"])
    def test_value_that_is_not_finite(self, value, key, store: Path, tmp_path: Path, train, refused: Refused) -> None:
        zarr.open_group(store, mode="r+")[f"data/{key}"][10, 1] = value
        told = (f"'{key}'", "NaN or infinite", "episode 1 at step 1")
        refused(train(store, tmp_path / "run"), *told, unchanged=[tmp_path])
        refused(["data", "info", store], *told, unchanged=[tmp_path])

    def test_one_step_episode(self, store: Path, tmp_path: Path, train, refused: Refused) -> None:
        zarr.open_group(store, mode="r+")["meta/episode_ends"][0] = 1
        refused(train(store, tmp_path / "run"), "at least 2 steps", "episode 0 has 1", unchanged=[tmp_path])

    def test_empty_episode(self, store: Path, tmp_path: Path, train, refused: Refused) -> None:
        ends = zarr.open_group(store, mode="r+")["meta/episode_ends"]
        ends[1] = ends[0]
        refused(train(store, tmp_path / "run"), "must increase", unchanged=[tmp_path])

    def test_no_episode(self, store: Path, tmp_path: Path, train, refused: Refused) -> None:
        zarr.open_group(store, mode="r+")["meta/episode_ends"].resize((0,))
        refused(train(store, tmp_path / "run"), "no finished episode", unchanged=[tmp_path])

    def test_store_of_a_killed_recording_trains(self, store: Path, tmp_path: Path, train) -> None:
        """Killed while the last episode was written: some of its arrays are there, its end is not."""
        group = zarr.open_group(store, mode="r+")
        ends = group["meta/episode_ends"]
        ends.resize((ends.shape[0] + 1,))
        ends[-1] = -1
        for key in ("position", "goal"):
            array = group[f"data/{key}"]
            array.resize((array.shape[0] + 5, 2))
        assert main([str(argument) for argument in train(store, tmp_path / "run", max_steps=2)]) == 0
        assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step_00000002"]

    def test_widths_that_do_not_fit_the_checkpoint(
        self, store: Path, run_folder: Path, tmp_path: Path, train, refused: Refused
    ) -> None:
        group = zarr.open_group(store, mode="r+")
        goal = group["data/goal"][:]
        del group["data/goal"]
        group.create_array("data/goal", data=np.concatenate([goal, goal[:, :1]], axis=1))
        header = group.attrs["scd_robot"]
        header["spec"]["observation"]["goal"]["shape"] = [3]
        group.attrs["scd_robot"] = header
        arguments = train(store, tmp_path / "run", "--init", run_folder, "--init-statistics", "dataset")
        refused(arguments, "observation_shapes.goal: [2] there, [3] here", unchanged=[tmp_path])
        refused([*train(store, run_folder), "--resume"], "was run otherwise", unchanged=[tmp_path])


class TestEnvironments:
    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ("observation={**spec.observation, 'goal': ArraySpec((3,))}", "needs 'goal' as float32 (2,)"),
            ("observation={'position': ArraySpec((2,))}", "needs the observation 'goal'"),
            ("action_dim=3, action_low=(-1.0,) * 3, action_high=(1.0,) * 3", "actions are 2 wide"),
            ("control_dt=0.5", "control step of 0.05 s"),
        ],
    )
    def test_environment_that_does_not_fit_the_checkpoint(
        self, change, told, point_world, tiny_run, tmp_path, monkeypatch, refused: Refused
    ) -> None:
        (tmp_path / "modules").mkdir()
        (tmp_path / "modules" / "other_world.py").write_text(
            "import dataclasses, toy_environment\n"
            "from scd_robot.types import ArraySpec\n"
            "def make():\n"
            "    world = toy_environment.PointEnvironment()\n"
            "    spec = world.spec\n"
            f"    world.spec = dataclasses.replace(spec, {change})\n"
            "    return world\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path / "modules"))
        monkeypatch.setattr(sys, "dont_write_bytecode", True)  # nothing comes beside the module, in workers neither
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        arguments = ["eval", tiny_run, "--env", "other_world:make", "--episodes", 1, "--out", tmp_path / "out"]
        refused(arguments, told, "was the policy trained" if "0.05" not in told else "rate", unchanged=[tmp_path])

    @pytest.mark.sim
    def test_task_that_does_not_fit_the_checkpoint(self, tiny_run: Path, tmp_path: Path, refused: Refused) -> None:
        arguments = ["eval", tiny_run, "--env", "metaworld/push-v3", "--episodes", 1, "--out", tmp_path / "out"]
        refused(arguments, "needs the observation 'position'", "goal, object, proprio", unchanged=[tmp_path])

    def test_missing_simulator_names_the_command(
        self, tiny_run: Path, tmp_path: Path, monkeypatch, refused: Refused
    ) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "metaworld"]:
            monkeypatch.delitem(sys.modules, name)
        (tmp_path / "modules" / "metaworld").mkdir(parents=True)
        (tmp_path / "modules" / "metaworld" / "__init__.py").write_text(
            "raise ModuleNotFoundError(\"No module named 'metaworld'\", name='metaworld')\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path / "modules"))
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        command = 'pip install "scd_robot[sim]"'
        record = ["data", "record", "metaworld/push-v3", "--episodes", 1, "--out", tmp_path / "a.zarr"]
        refused(record, "needs the package metaworld", command, unchanged=[tmp_path])
        evaluate = ["eval", tiny_run, "--env", "metaworld/push-v3", "--episodes", 1]
        refused(evaluate, "needs the package metaworld", command)


def record_arguments(out: Path, episodes: int = 4) -> list[object]:
    return ["data", "record", "point/reach", "--episodes", episodes, "--out", out, "--workers", 1]


def evaluate_arguments(run: Path, out: Path, *more: object) -> list[object]:
    options = ["--episodes", 2, "--num-envs", 1, "--max-steps", 3, "--num-videos", 0, "--out", out]
    return ["eval", run, "--env", "toy_environment:make_point", *options, *more]


class TestNoWritePermission:
    """Simulated, since nothing stops a superuser."""

    @pytest.fixture(autouse=True)
    def locked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "locked"
        folder.mkdir()
        for method in ("mkdir", "touch", "write_bytes", "write_text", "open"):
            fail_in(monkeypatch, method, errno.EACCES, lambda path: folder in path.parents)
        return folder

    def test_recording(self, locked: Path, point_world, refused: Refused) -> None:
        refused(record_arguments(locked / "a.zarr"), "no write permission", str(locked), unchanged=[locked])

    def test_training(self, locked: Path, store: Path, train, refused: Refused) -> None:
        refused(train(store, locked / "run"), "Permission denied", str(locked), unchanged=[locked])

    def test_evaluation(self, locked: Path, tiny_run: Path, point_world, refused: Refused) -> None:
        told = ("ermission denied", str(locked))
        refused(evaluate_arguments(tiny_run, locked / "out"), *told, unchanged=[locked], at_once=False)

    def test_json_is_tried_before_the_work(
        self, locked: Path, store, tiny_run, tmp_path, train, point_world, refused: Refused
    ) -> None:
        for arguments in (
            record_arguments(tmp_path / "a.zarr"),
            train(store, tmp_path / "run"),
            evaluate_arguments(tiny_run, tmp_path / "out"),
            ["data", "info", store],
            ["info", tiny_run],
            ["demo", "--out", tmp_path / "demo"],
        ):
            refused([*arguments, "--json", locked / "x.json"], "permission denied", unchanged=[tmp_path])


class TestFullDisk:
    def test_recording_keeps_finished_episodes(
        self, tmp_path: Path, point_world, monkeypatch: pytest.MonkeyPatch, refused: Refused
    ) -> None:
        path = tmp_path / "a.zarr"

        def two_episodes_are_there(target: Path) -> bool:
            ends = path / "meta" / "episode_ends" / ".zarray"
            return path in target.parents and ends.is_file() and json.loads(ends.read_bytes())["shape"] == [3]

        fail_in(monkeypatch, "replace", errno.ENOSPC, two_episodes_are_there)
        refused(record_arguments(path), "disk is full", "2 finished episodes are kept", at_once=False)
        assert open_dataset(path).num_episodes == 2

    @pytest.mark.parametrize(
        ("function", "error"),
        [
            ("scd_robot.checkpoint.save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
            ("scd_robot.checkpoint._sync", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
            ("torch.save", RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")),
        ],
    )
    def test_training_keeps_earlier_checkpoints(
        self, function: str, error: Exception, store, run_folder, tmp_path: Path, train, monkeypatch, refused: Refused
    ) -> None:
        out = tmp_path / "run"
        original = pkgutil.resolve_name(function)

        def fail_the_second_time(*args: object, **kwargs: object) -> object:
            if list_checkpoints(out):
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(function, fail_the_second_time)
        arguments = train(store, out)
        refused(arguments, "step_00000004", "earlier checkpoints are untouched", at_once=False)
        monkeypatch.undo()
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000002"]
        assert main([str(argument) for argument in [*arguments, "--resume"]]) == 0
        uninterrupted, resumed = (list_checkpoints(folder)[-1] / "model.safetensors" for folder in (run_folder, out))
        assert uninterrupted.read_bytes() == resumed.read_bytes()

    def test_logs_of_training(self, store: Path, tmp_path: Path, train, monkeypatch, refused: Refused) -> None:
        from lightning.fabric.loggers.csv_logs import _ExperimentWriter

        def no_space(self: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.csv")

        monkeypatch.setattr(_ExperimentWriter, "save", no_space)
        out = tmp_path / "run"
        refused(train(store, out), f"cannot write to {out}", "no space left on device", at_once=False)

    def test_logs_that_a_thread_writes(self, store: Path, tmp_path: Path, train, monkeypatch, refused: Refused) -> None:
        """TensorBoard's thread would print a traceback of its own."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        def no_space(self: object, data: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(RecordWriter, "write", no_space)
        before = threading.excepthook
        out = tmp_path / "run"
        refused(train(store, out), f"cannot write to {out}", "no space left on device", at_once=False)
        assert threading.excepthook is before

    @pytest.mark.parametrize(("method", "name"), [("open", "episodes.jsonl"), ("write_bytes", "result.json")])
    def test_evaluation(self, method, name, tiny_run, tmp_path, point_world, monkeypatch, refused: Refused) -> None:
        fail_in(monkeypatch, method, errno.ENOSPC, lambda path: path.name.lstrip(".").startswith(name))
        refused(evaluate_arguments(tiny_run, tmp_path / "out"), name, "o space left on device", at_once=False)
        left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
        assert left == (set() if name == "episodes.jsonl" else {"episodes.jsonl"})

    def test_line_of_the_log_that_fits_in_part_is_taken_back(self, tmp_path: Path, monkeypatch) -> None:
        from scd_robot.errors import OutputError
        from scd_robot.sim_eval.output import EpisodeLog

        log = EpisodeLog(tmp_path / "episodes.jsonl", {"numpy": "2"}, {})
        log.append({"index": 0})
        original = Path.open

        def half(self: Path, *args: object, **kwargs: object):
            file = original(self, *args, **kwargs)
            write = file.write

            def write_half(text: str) -> None:
                write(text[: len(text) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            file.write = write_half
            return file

        monkeypatch.setattr(Path, "open", half)
        with pytest.raises(OutputError, match="No space left"):
            log.append({"index": 1})
        assert (tmp_path / "episodes.jsonl").read_bytes() == b'{"index": 0, "versions": {"numpy": "2"}}\n'

    def test_json_of_a_finished_evaluation_does_not_take_the_result_with_it(
        self, tiny_run, tmp_path, point_world, monkeypatch, capsys
    ) -> None:
        (tmp_path / "x.json").write_text("{}")
        fail_in(monkeypatch, "write_bytes", errno.ENOSPC, lambda path: path.name.startswith(".x.json"))
        arguments = evaluate_arguments(tiny_run, tmp_path / "out", "--json", tmp_path / "x.json")
        assert main([str(argument) for argument in arguments]) == 2
        shown = capsys.readouterr()
        assert "toy/point: 0/2 successes" in shown.out
        assert "no space left on device" in shown.err.splitlines()[-1]
        assert (tmp_path / "x.json").read_text() == "{}"
        assert json.loads((tmp_path / "out" / "result.json").read_text())["episodes"] == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.json"]
