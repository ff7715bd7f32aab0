"""One job of a success benchmark, and the program of the process that carries it out.

The queue starts it as `python -P job.py TASK ORDER`, with what to do as JSON in the file ORDER; `-P` keeps the modules
of this folder from hiding packages of their names. The process ends when its standard input does, so that nothing goes
on when the queue is killed.
"""

import json
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scd_robot.errors import ConfigError, OutputError
from scd_robot.output import write_json
from scd_robot.sim_eval import provenance

__all__ = ["SCHEMA", "Job", "Recording", "Result", "failure", "read_json"]

SCHEMA = 1

logger = logging.getLogger("benchmarks.job")

Result = dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """Demonstrations of an environment's expert; the arguments of `record_demonstrations`."""

    environment: str
    episodes: int = 100
    seed: int = 0
    action_noise: float = 0.1
    disturbances: float = 0.0

    @property
    def name(self) -> str:
        """As the name of a file."""
        environment = re.sub(r"[^A-Za-z0-9.-]+", "_", self.environment)
        disturbed = f"_disturbed{self.disturbances:g}" if self.disturbances else ""
        return f"{environment}_{self.episodes}_noise{self.action_noise:g}{disturbed}_seed{self.seed}"


@dataclass(frozen=True)
class Job:
    """One arm: train on a recording, evaluate from start states 0 .. episodes - 1.

    Attributes:
        name: letters, digits and . _ = + - only.
        recording: what it learns from.
        environment: what it is evaluated in.
        also: other environments that it is evaluated in as well.
        settings: replaces the preset's, FIELD=VALUE.
        seed: of the training.
        preset: named experiment.
        episodes: of the evaluation.
        begins_from: name of another job, on the same recording, whose weights and normalisation this one begins with.
        denoising_steps: evaluated again in `environment` with these numbers of them.
    """

    name: str
    recording: Recording
    environment: str
    settings: tuple[str, ...] = ()
    seed: int = 0
    preset: str = "metaworld_state"
    episodes: int = 100
    also: tuple[str, ...] = ()
    begins_from: str = ""
    denoising_steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._=+-]+", self.name):
            raise ConfigError(f"a job's name may hold letters, digits and . _ = + - only, got {self.name!r}")

    def training_identity(self) -> dict[str, Any]:
        """What the trained weights depend on, as plain JSON types."""
        settings = list(self.settings)
        begins = {"begins_from": self.begins_from} if self.begins_from else {}
        trained = {"recording": asdict(self.recording), "preset": self.preset, "settings": settings, "seed": self.seed}
        return {**trained, **begins}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Job":
        """Inverse of `dataclasses.asdict`, also after JSON made the tuple a list."""
        lists = {name: tuple(data.get(name, ())) for name in ("settings", "also", "denoising_steps")}
        return cls(**{**data, "recording": Recording(**data["recording"]), **lists})


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
    training = _train_once(job, out, order["threads"])
    import torch

    from scd_robot.policies import load_policy
    from scd_robot.sim_eval import evaluate

    torch.set_num_threads(1)  # small batches; the simulators have the rest
    run = out / "work" / job.name / "run"

    def evaluated(environment: str, steps: int | None = None) -> Any:
        policy = load_policy(run, num_denoising_steps=steps)
        return evaluate(policy, environment, job.episodes, policy_name=job.name, progress=False)

    evaluation = evaluated(job.environment)
    usual = training["config"]["policy"]["sampler"]["num_denoising_steps"]
    by_steps = {
        str(steps): (evaluation if steps == usual else evaluated(job.environment, steps)).to_json()
        for steps in job.denoising_steps
    }
    others = [evaluated(environment) for environment in job.also]
    return {
        "schema": SCHEMA,
        "name": job.name,
        "status": "done",
        "error": None,
        "job": asdict(job),
        "recording": read_json(out / "recordings" / f"{job.recording.name}.json"),
        "training": training,
        "evaluation": evaluation.to_json(),
        "by_denoising_steps": by_steps,
        "also": {other.environment.name: other.to_json() for other in others},
        "versions": {**training["versions"], **evaluation.versions},
        "machine": describe_machine(),
        "code": code_version(),
        "command": order["command"],
        **_when(),
    }


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
    from scd_robot.datasets import open_dataset
    from scd_robot.presets import resolve, with_settings
    from scd_robot.training import train

    torch.set_num_threads(threads)
    run = folder / "run"
    written = [(path / "manifest.json").stat().st_mtime for path in list_checkpoints(run)]
    earlier_s = useful_seconds(sessions, written)
    data = open_dataset(out / "recordings" / f"{job.recording.name}.zarr")
    experiment = with_settings(resolve(job.preset, data.spec), [*job.settings, f"training.seed={job.seed}"])
    write_json(folder / "sessions.json", {"trained": job.training_identity(), "starts": [*sessions, time.time()]})
    wall, cpu = time.monotonic(), time.process_time()
    init = out / "work" / job.begins_from / "run" if job.begins_from else None
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


def describe_machine() -> dict[str, Any]:
    """Processor, cores this process may use, and the load beside it."""
    return {**provenance.describe_machine(), "load_1min": round(os.getloadavg()[0], 2)}


def code_version() -> str:
    """The commit of this checkout, "-dirty" with changes since; "unknown" outside of git."""
    return provenance.code_version(Path(__file__).parents[1]) or "unknown"


def _when() -> dict[str, str]:
    return {"date": datetime.now(UTC).isoformat(timespec="seconds")}


def failure(job: Job, error: str) -> Result:
    return {"schema": SCHEMA, "name": job.name, "status": "failed", "error": error, "job": asdict(job), **_when()}


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot read {path}: {error}; remove it to do that part again") from error


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1], Path(sys.argv[2])))
