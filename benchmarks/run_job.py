"""The program of the process that carries out one job of a success benchmark.

The queue starts it as `python -P run_job.py TASK ORDER`, with what to do as JSON in the file ORDER; `-P` keeps the
modules of this folder from hiding packages of their names. The process ends when its standard input does, so that
nothing goes on when the queue is killed.
"""

import logging
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scd_robot.dotted import parse_options
from scd_robot.errors import ConfigError, OutputError
from scd_robot.output import write_json

sys.path.append(str(Path(__file__).parent))  # at the end, where it hides nothing

from job import SCHEMA, Given, Job, Recording, Result, code_version, describe_machine, failure, now, read_json

__all__ = ["evenly_spaced", "useful_seconds"]

_POLICY = "policy."

logger = logging.getLogger("benchmarks.run_job")


def _child(task: str, order_file: Path) -> int:
    """Carries out one order of the queue; the exit code is 1 when it failed."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    order = read_json(order_file)
    out = Path(order["out"])
    if task == "record":
        _record(Recording(**order["recording"]), out)
        return 0
    job = Job.from_json(order["job"])
    try:
        result = _run_job(job, out, order)
    except Exception as error:  # the queue goes on; the record says what happened
        logger.exception("job %s failed", job.name)
        result = failure(job, f"{type(error).__name__}: {error}")
    write_json(out / "results" / f"{job.name}.json", result)
    return int(result["status"] != "done")


def _end_with_parent() -> None:
    """Ends this process when the other end of its standard input is closed; nothing is ever written to it."""
    os.read(0, 1)
    os._exit(3)


def _record(recording: Recording, out: Path) -> None:
    from scd_robot.recording import record_demonstrations

    store = out / "recordings" / f"{recording.name}.zarr"
    store.parent.mkdir(exist_ok=True)
    arguments = asdict(recording)
    # Without its summary a store is the rest of a recording that was killed.
    summary = record_demonstrations(**arguments, out=store, overwrite=True, progress=False)
    write_json(store.with_suffix(".json"), {**summary, "path": store.name})


def _run_job(job: Job, out: Path, order: Mapping[str, Any]) -> Result:
    """Trains and evaluates."""
    from scd_robot.sim_eval import evaluate

    training = _train_rival(job, out, order) if job.rival else _train_once(job, out, order["threads"])
    load, checkpoints = _rival_checkpoints(job, out, order) if job.rival else _own_checkpoints(job, out)
    readings, wanted = [], evenly_spaced(checkpoints, job.readings)
    for checkpoint in wanted:
        policy = load(checkpoint["path"])
        environments = (job.environment, *job.also) if checkpoint is wanted[-1] else (job.environment,)
        found = [evaluate(policy, name, job.episodes, policy_name=job.name, progress=False) for name in environments]
        told = {"updates": checkpoint["updates"], "wall_s": checkpoint["wall_s"]}
        readings.append({**told, "evaluation": found[0].to_json()})
    evaluation, *others = found
    usual = 0 if job.rival else training["config"]["policy"]["sampler"]["num_denoising_steps"]
    by_steps = {
        str(steps): (
            evaluation
            if steps == usual
            else evaluate(
                load(checkpoints[-1]["path"], num_denoising_steps=steps),
                job.environment,
                job.episodes,
                policy_name=job.name,
                progress=False,
            )
        ).to_json()
        for steps in job.denoising_steps
    }
    return {
        "schema": SCHEMA,
        "name": job.name,
        "status": "done",
        "error": None,
        "job": asdict(job),
        "recording": _summary(job.recording, out),
        "training": training,
        "evaluation": evaluation.to_json(),
        "by_denoising_steps": by_steps,
        "also": {other.environment.name: other.to_json() for other in others},
        "readings": readings[:-1],
        "versions": {**training["versions"], **evaluation.versions},
        "machine": describe_machine(),
        "code": code_version(),
        "command": order["command"],
        "date": now(),
    }


def _summary(recording: Recording | Given, out: Path) -> dict[str, Any]:
    """What the queue, or the caller, says about the demonstrations."""
    if isinstance(recording, Given):
        return asdict(recording)
    return dict(read_json(out / "recordings" / f"{recording.name}.json"))


def _open(recording: Recording | Given, out: Path) -> Any:
    from scd_robot.datasets import open_dataset

    if isinstance(recording, Given):
        return open_dataset(recording.path, list(recording.keys) or None, control_dt=recording.control_dt)
    return open_dataset(out / "recordings" / f"{recording.name}.zarr")


def _train_once(job: Job, out: Path, threads: int) -> dict[str, Any]:
    """The summary of the training, which is done, continued, or only looked up.

    `wall_s` adds up over interruptions, from the start of each session to its last checkpoint (later steps were lost
    and taken again); `cpu_s` is null then, because nobody measured the sessions that were killed.
    """
    folder = out / "work" / job.name
    sessions = _sessions(job, folder / "sessions.json")
    if (folder / "training.json").is_file():
        return dict(read_json(folder / "training.json"))
    import torch

    from scd_robot.checkpoint import list_checkpoints, read_checkpoint
    from scd_robot.presets import resolve, with_settings
    from scd_robot.training import train

    torch.set_num_threads(threads)
    run = folder / "run"
    written = [(path / "manifest.json").stat().st_mtime for path in list_checkpoints(run)]
    earlier_s = useful_seconds(sessions, written)
    data = _open(job.recording, out)
    init = out / "work" / job.begins_from / "run" if job.begins_from else None
    settings = [*job.settings, f"training.seed={job.seed}"]
    if job.converts:
        assert init is not None
        experiment, init = _converted(job.converts, init, settings, folder / "converted")
    else:
        experiment = with_settings(resolve(job.preset, data.spec), settings)
    write_json(folder / "sessions.json", {"trained": job.training_identity(), "starts": [*sessions, time.time()]})
    wall, cpu = time.monotonic(), time.process_time()
    begins: dict[str, Any] = {"init": init, "init_statistics": "checkpoint" if init else None}
    summary = train(data, experiment, run, resume=bool(written), **begins, accelerator="cpu", progress=False)
    checkpoint = read_checkpoint(run)
    summary |= {
        "checkpoint": str(Path(summary["checkpoint"]).relative_to(out)),
        "wall_s": time.monotonic() - wall + earlier_s,
        "cpu_s": None if written else time.process_time() - cpu,
        "threads": threads,
        "sessions": len(sessions) + 1,
        "config": checkpoint.config,
        "versions": checkpoint.versions,
    }
    del summary["seconds"]  # of the last session only
    write_json(folder / "training.json", summary)
    return dict(summary)


def _converted(layers: Sequence[str], source: Path, settings: Sequence[str], path: Path) -> tuple[Any, Path]:
    """The fine-tuning of an entangled run's layers, and the checkpoint in `path` that it begins with."""
    from scd_robot.analysis.conversion import plan_conversion, write_converted
    from scd_robot.presets import with_settings

    conversion = plan_conversion(source, layers[0], layers[1], num_context_tokens=1, fusion="prefix")
    conversion = conversion.with_experiment(with_settings(conversion.experiment, settings))
    if not path.exists():
        write_converted(conversion, path)
    return conversion.experiment, path


def _own_checkpoints(job: Job, out: Path) -> tuple[Callable[[Path], Any], list[dict[str, Any]]]:
    """How a checkpoint of ours becomes a policy, and all of them: `path`, `updates`, `wall_s`, oldest first."""
    import torch

    from scd_robot.checkpoint import list_checkpoints, read_step
    from scd_robot.policies import load_policy

    torch.set_num_threads(1)  # small batches; the simulators have the rest
    folder = out / "work" / job.name
    sessions, found, written = _sessions(job, folder / "sessions.json"), [], []
    for path in list_checkpoints(folder / "run"):
        written.append((path / "manifest.json").stat().st_mtime)
        found.append({"path": path, "updates": read_step(path), "wall_s": useful_seconds(sessions, written)})
    return load_policy, found


def _train_rival(job: Job, out: Path, order: Mapping[str, Any]) -> dict[str, Any]:
    """As `_train_once`, of a rival in its own environment; a training that was cut off begins again."""
    folder = out / "work" / job.name
    sessions = _sessions(job, folder / "sessions.json")
    if (folder / "training.json").is_file():
        return dict(read_json(folder / "training.json"))
    from scd_robot.datasets.hdf5.robomimic_writer import write_robomimic

    write_json(folder / "sessions.json", {"trained": job.training_identity(), "starts": [*sessions, time.time()]})
    shutil.rmtree(folder / "run", ignore_errors=True)
    data = _open(job.recording, out)
    write_robomimic(data, folder / "demonstrations.hdf5", overwrite=True, progress=False)
    settings = [setting for setting in job.settings if not setting.startswith(_POLICY)]
    arguments = {"dataset": folder / "demonstrations.hdf5", "out": folder / "run", "seed": job.seed}
    arguments["threads"] = order["threads"]
    command = [order["rival_python"], "-P", Path(__file__).parent / "outside" / "train.py", job.rival]
    command += [word for name, value in arguments.items() for word in (f"--{name}", value)]
    command += ["--set", *settings] if settings else []
    # It ends when its standard input does, and with it when this process does.
    with subprocess.Popen([str(word) for word in command], stdin=subprocess.PIPE) as process:
        if code := process.wait():
            raise ConfigError(f"the training of {job.rival} ended with code {code}; see {folder / 'log.txt'}")
    newest = _rival_checkpoints(job, out, order)[1][-1]
    config = read_json(newest["path"] / "config.json")
    summary = {
        "checkpoint": str(newest["path"].relative_to(out)),
        "steps": newest["updates"],
        "parameters": config["parameters"],
        "wall_s": newest["wall_s"],
        "cpu_s": newest["cpu_s"],
        "threads": order["threads"],
        "sessions": len(sessions) + 1,
        "config": config,
        "versions": {f"rival/{name}": version for name, version in config["versions"].items()},
    }
    write_json(folder / "training.json", summary)
    return summary


def _rival_checkpoints(
    job: Job, out: Path, order: Mapping[str, Any]
) -> tuple[Callable[[Path], Any], list[dict[str, Any]]]:
    """As `_own_checkpoints`."""
    from scd_robot.sim_eval.policy_process import PolicyProcess

    options = parse_options([setting.removeprefix(_POLICY) for setting in job.settings if setting.startswith(_POLICY)])

    def load(path: Path) -> Any:
        named = "outside.run:load_run", {"run": str(path), **options}
        return PolicyProcess(order["rival_python"], *named, folder=Path(__file__).parent)

    paths = sorted((out / "work" / job.name / "run" / "checkpoints").glob("step_*"))
    return load, [{"path": path, **read_json(path / "progress.json")} for path in paths]


def evenly_spaced(checkpoints: Sequence[Any], count: int) -> list[Any]:
    """So many of them, the last among them; all where there are fewer."""
    total = len(checkpoints)
    return [checkpoints[-(-total * (i + 1) // count) - 1] for i in range(count)] if total > count else [*checkpoints]


def _sessions(job: Job, path: Path) -> list[float]:
    """When the earlier sessions of this training began [s].

    Raises:
        OutputError: they trained something else under this job's name.
    """
    if not path.is_file():
        return []
    document = read_json(path)
    if document["trained"] != job.training_identity():
        raise OutputError(f"{path.parent} holds another training under this name; remove it or choose another --out")
    return list(document["starts"])


def useful_seconds(sessions: Sequence[float], checkpoints: Sequence[float]) -> float:
    """Training time that was not lost: from the start of each session to the last checkpoint written in it.

    Args:
        sessions: times at which sessions began [s], ascending.
        checkpoints: times at which checkpoints were written [s].
    """
    total = 0.0
    for start, end in zip(sessions, [*sessions, math.inf][1:], strict=True):
        total += max((written - start for written in checkpoints if start <= written < end), default=0.0)
    return total


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1], Path(sys.argv[2])))
