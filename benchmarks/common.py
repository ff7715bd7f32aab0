"""A resumable queue of success benchmarks: record once, train each arm in its own process, evaluate, keep one JSON.

A benchmark is a list of `Job`s and a function that turns results into tables; `run_benchmark` is its command line.
Everything lies in one folder:

    OUT/recordings/NAME.zarr, NAME.json   demonstrations, shared by all jobs on them
    OUT/work/JOB/                         the training run, its log, and what is needed to continue it
    OUT/results/JOB.json                  the result, or the error, of one job
    OUT/report.md                         the tables

A queue that was killed continues when it is started again: finished jobs are skipped, a training that was cut off is
resumed, failed jobs are tried once more. Each child process ends when the queue does, however that happens.
"""

import argparse
import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from job import SCHEMA, Given, Job, Recording, Result, failure, read_json

from scd_robot.errors import ConfigError, OutputError, ScdRobotError, UnknownNameError
from scd_robot.output import write_json, write_text

__all__ = ["Given", "Job", "Recording", "benchmark_parser", "run_benchmark"]

POLL_S = 0.5
RIVAL_PYTHON = Path(__file__).parents[1] / ".venv-lerobot" / "bin" / "python"

logger = logging.getLogger("benchmarks")

Report = Callable[[Mapping[str, Result]], str]


# ---------------------------------------------------------------------------------------------------- command line


def benchmark_parser(description: str, name: str) -> argparse.ArgumentParser:
    """The options all success benchmarks share; a benchmark may add its own.

    Args:
        description: what it measures.
        name: its default output folder is runs/benchmarks/NAME.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks") / name, help="folder (default %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these jobs only")
    parser.add_argument("--list", action="store_true", help="show the jobs and whether they are done, run nothing")
    parser.add_argument("--report", action="store_true", help="print the tables of what is done, run nothing")
    parser.add_argument("--parallel", type=int, default=2, help="jobs side by side (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each training (default %(default)s)")
    parser.add_argument(
        "--rival-python", default=str(RIVAL_PYTHON), help="of the environment of rivals, if there are any"
    )
    shrink = parser.add_argument_group("to try the plumbing, into another --out; such numbers mean nothing")
    shrink.add_argument("--episodes", type=int, help="episodes of each evaluation")
    shrink.add_argument("--max-steps", type=int, help="optimiser steps of each training")
    shrink.add_argument("--demonstrations", type=int, help="episodes of each recording")
    shrink.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="more settings for all jobs")
    return parser


def run_benchmark(options: argparse.Namespace, jobs: Sequence[Job], report: Report) -> int:
    """Does what the command line asks for and returns the exit code: 1 if a job failed, 2 for bad input."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        jobs = [_shrunk(job, options) for job in jobs]
        chosen = select_jobs(jobs, options.only)
        failed = 0
        if options.list:
            for job in chosen:
                print(f"{_status(options.out, job):8} {job.name}  {' '.join(job.settings)}")
            return 0
        if not options.report:
            failed = run_queue(options.out, chosen, options.parallel, options.threads, options.rival_python)
        text = report(read_results(options.out, jobs))
        if (options.out / "results").is_dir():
            write_text(options.out / "report.md", text + "\n")
        print(f"\n{text}")
    except ScdRobotError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 1 if failed else 0


def select_jobs(jobs: Sequence[Job], names: Sequence[str] | None) -> list[Job]:
    """The jobs of these names (None = all), in their own order."""
    known = {job.name for job in jobs}
    assert len(known) == len(jobs), "two jobs share a name"
    for name in names or ():
        if name not in known:
            raise UnknownNameError("job", name, known)
    return [job for job in jobs if names is None or job.name in names]


def _shrunk(job: Job, options: argparse.Namespace) -> Job:
    for name in ("parallel", "threads", "episodes", "max_steps", "demonstrations"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    settings = [*job.settings, *options.set]
    if options.max_steps is not None:
        settings.append(f"training.max_steps={options.max_steps}")
    recording = job.recording
    if options.demonstrations and isinstance(recording, Recording):
        recording = replace(recording, episodes=options.demonstrations)
    episodes = options.episodes or job.episodes
    return replace(job, recording=recording, settings=tuple(settings), episodes=episodes)


# ----------------------------------------------------------------------------------------------------------- queue


def read_results(out: Path, jobs: Sequence[Job]) -> dict[str, Result]:
    """What is known about the jobs, by name; jobs that have not ended are missing."""
    paths = {job.name: out / "results" / f"{job.name}.json" for job in jobs}
    results = {name: read_json(path) for name, path in paths.items() if path.is_file()}
    for name, result in results.items():
        if result.get("schema") != SCHEMA:
            raise OutputError(f"{paths[name]} has schema {result.get('schema')}, expected {SCHEMA}; remove it")
    return results


def _status(out: Path, job: Job) -> str:
    """Whether the job is "done", "failed" or "waiting".

    Raises:
        OutputError: there is a result of another job under this name.
    """
    result = read_results(out, [job]).get(job.name)
    if result is None:
        return "waiting"
    stored = Job.from_json(result["job"])
    if result["status"] == "done" and stored != job:
        changed = ", ".join(key for key, value in asdict(job).items() if asdict(stored)[key] != value)
        raise OutputError(f"{out} holds a result of {job.name} with other {changed}; choose another --out")
    return str(result["status"])


def run_queue(
    out: Path, jobs: Sequence[Job], parallel: int, threads: int, rival_python: str = str(RIVAL_PYTHON)
) -> int:
    """Runs what is not done yet, and returns the number of jobs that failed.

    Raises:
        ConfigError: there are rivals, and no environment for them.
        OutputError: another queue works in `out`, it cannot be written, or holds results of other jobs.
    """
    if any(job.rival for job in jobs) and not Path(rival_python).is_file():
        raise ConfigError(
            f"rivals need an environment of their own, and {rival_python} is not there; run 'make rivals'"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise OutputError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"another queue works in {out}; wait for it, or choose another --out") from error
        waiting = [job for job in jobs if _status(out, job) != "done"]
        logger.info("%d jobs, %d of them done; %d at once", len(jobs), len(jobs) - len(waiting), parallel)
        ready = _record_all(out, waiting)
        return len(waiting) - len(ready) + _run_all(out, ready, len(jobs), parallel, threads, rival_python)


def _record_all(out: Path, jobs: Sequence[Job]) -> list[Job]:
    """Makes the missing recordings one after the other; returns the jobs that can run."""
    recordings = {job.recording for job in jobs if isinstance(job.recording, Recording)}
    errors: dict[Recording | Given, str] = {}
    for recording in sorted(recordings, key=lambda r: r.name):
        if (out / "recordings" / f"{recording.name}.json").is_file():
            continue
        logger.info("recording %d demonstrations of %s", recording.episodes, recording.environment)
        order = out / "work" / f"record_{recording.name}" / "order.json"
        write_json(order, {"recording": asdict(recording), "out": out.resolve()})
        code = _end(_start("record", order, threads=1))
        if code:
            errors[recording] = f"the recording of {recording.environment} failed; see {order.with_name('log.txt')}"
            logger.info(errors[recording])
    for job in jobs:
        if job.recording in errors:
            write_json(out / "results" / f"{job.name}.json", failure(job, errors[job.recording]))
    return [job for job in jobs if job.recording not in errors]


def _run_all(out: Path, jobs: Sequence[Job], total: int, parallel: int, threads: int, rival_python: str) -> int:
    waiting, failed, durations = list(jobs), 0, []
    running: dict[str, tuple[Job, subprocess.Popen[bytes], float]] = {}
    number = total - len(jobs)
    try:
        while waiting or running:
            while len(running) < parallel and (job := _next(waiting, running)):
                number += 1
                if job.begins_from and not _is_done(out, job.begins_from):
                    missing = f"{job.begins_from}, whose weights it begins with, is not done"
                    write_json(out / "results" / f"{job.name}.json", failure(job, missing))
                    logger.info(_line(out, job))
                    failed += 1
                    continue
                logger.info("[%d/%d] start %s", number, total, job.name)
                order = out / "work" / job.name / "order.json"
                command = " ".join(["python", *sys.argv])
                about = {"threads": threads, "rival_python": rival_python, "command": command}
                write_json(order, {"job": asdict(job), "out": out.resolve(), **about})
                (out / "results" / f"{job.name}.json").unlink(missing_ok=True)
                running[job.name] = (job, _start("job", order, threads), time.monotonic())
            time.sleep(POLL_S)
            for name in [name for name, (_, process, _) in running.items() if process.poll() is not None]:
                job, process, started = running.pop(name)
                durations.append(time.monotonic() - started)
                done = _finish(out, job, _end(process))
                failed += not done
                left = (len(waiting) + len(running)) * sum(durations) / len(durations) / parallel
                logger.info("[%s] %s; about %.0f min left", time.strftime("%H:%M"), _line(out, job), left / 60)
    finally:
        for _, process, _ in running.values():
            _end(process, stop=True)
    return failed


def _next(waiting: list[Job], running: Mapping[str, object]) -> Job | None:
    """Takes out the first job that need not wait for another one's weights; None while all of them do."""
    unfinished = {*running, *(job.name for job in waiting)}
    for index, job in enumerate(waiting):
        if job.begins_from not in unfinished:
            return waiting.pop(index)
    return None


def _is_done(out: Path, name: str) -> bool:
    path = out / "results" / f"{name}.json"
    return path.is_file() and read_json(path)["status"] == "done"


def _finish(out: Path, job: Job, code: int) -> bool:
    """Whether the job has a result; one whose process died without a word is recorded as failed."""
    if job.name not in read_results(out, [job]):
        log = out / "work" / job.name / "log.txt"
        write_json(out / "results" / f"{job.name}.json", failure(job, f"the process ended with code {code}; see {log}"))
    return _status(out, job) == "done"


def _line(out: Path, job: Job) -> str:
    result = read_results(out, [job])[job.name]
    if result["status"] != "done":
        return f"failed {job.name}: {result['error']}"
    evaluation, minutes = result["evaluation"], result["training"]["wall_s"] / 60
    valid = evaluation["episodes"] - evaluation["invalid"]
    return f"done {job.name}: {evaluation['successes']}/{valid} successes, trained in {minutes:.1f} min"


def _start(task: str, order: Path, threads: int) -> "subprocess.Popen[bytes]":
    """A child process that writes to log.txt beside its order and ends when its standard input does."""
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    with order.with_name("log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("run_job.py")), task, str(order)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # an interrupt from the keyboard is for the queue alone
        )


def _end(process: "subprocess.Popen[bytes]", stop: bool = False) -> int:
    """Waits for the child's end; `stop` asks for it."""
    assert process.stdin is not None
    if stop:
        process.stdin.close()
    code = process.wait()
    process.stdin.close()
    return code
