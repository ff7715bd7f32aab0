"""One job of a success benchmark, and what the records of benchmarks have in common; `run_job.py` carries jobs out."""

import argparse
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scd_robot.errors import ConfigError, OutputError
from scd_robot.output import check_target
from scd_robot.sim_eval import provenance

__all__ = [
    "SCHEMA",
    "Given",
    "Job",
    "Recording",
    "Result",
    "code_version",
    "describe_machine",
    "failure",
    "now",
    "read_json",
    "result_file",
]

SCHEMA = 1

Result = dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """Demonstrations of an environment's expert; the arguments of `record_demonstrations`."""

    environment: str
    episodes: int = 100
    seed: int = 0
    action_noise: float = 0.1
    disturbances: float = 0.0
    noise_correlation: float = 0.0

    @property
    def name(self) -> str:
        """As the name of a file."""
        environment = re.sub(r"[^A-Za-z0-9.-]+", "_", self.environment)
        disturbed = f"_disturbed{self.disturbances:g}" if self.disturbances else ""
        lasting = f"_correlation{self.noise_correlation:g}" if self.noise_correlation else ""
        return f"{environment}_{self.episodes}_noise{self.action_noise:g}{lasting}{disturbed}_seed{self.seed}"


@dataclass(frozen=True)
class Given:
    """Demonstrations that are there already; the arguments of `open_dataset`."""

    path: str
    keys: tuple[str, ...] = ()
    control_dt: float | None = None


@dataclass(frozen=True)
class Job:
    """One arm: train on a recording, evaluate from start states 0 .. episodes - 1.

    Attributes:
        name: letters, digits and . _ = + - only.
        recording: what it learns from: recorded by the queue, or given.
        environment: what it is evaluated in.
        also: other environments that it is evaluated in as well.
        settings: replaces the preset's, FIELD=VALUE.
        seed: of the training.
        preset: named experiment.
        episodes: of the evaluation.
        begins_from: name of another job, on the same recording, whose weights and normalisation this one begins with.
        converts: layers of that job's entangled model that become encoder and decoder, as `scd convert-policy` takes
            them; the model is then what follows from it, and settings are of the training.
        denoising_steps: evaluated again in `environment` with these numbers of them.
        rival: module of a rival in the place of our preset, "outside.diffusion" for one; it is trained and run in an
            environment of its own, with settings training.*, model.* and policy.*.
        readings: so many checkpoints, evenly spaced and the last among them, are evaluated in `environment`.
    """

    name: str
    recording: Recording | Given
    environment: str
    settings: tuple[str, ...] = ()
    seed: int = 0
    preset: str = "metaworld_state"
    episodes: int = 100
    also: tuple[str, ...] = ()
    begins_from: str = ""
    converts: tuple[str, ...] = ()
    denoising_steps: tuple[int, ...] = ()
    rival: str = ""
    readings: int = 1

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._=+-]+", self.name):
            raise ConfigError(f"a job's name may hold letters, digits and . _ = + - only, got {self.name!r}")
        if self.converts and (len(self.converts) != 2 or not self.begins_from):
            raise ConfigError(f"{self.name}: converts is (encoder layers, decoder layers) of the job in begins_from")
        if self.rival and (self.begins_from or self.denoising_steps):
            raise ConfigError(f"{self.name}: begins_from and denoising_steps are for our own policies, not for rivals")

    def training_identity(self) -> dict[str, Any]:
        """What the trained weights depend on, as plain JSON types."""
        settings = list(self.settings)
        begins: dict[str, Any] = {"begins_from": self.begins_from} if self.begins_from else {}
        begins |= {"converts": list(self.converts)} if self.converts else {}
        learner = {"rival": self.rival} if self.rival else {"preset": self.preset}
        return {"recording": asdict(self.recording), **learner, "settings": settings, "seed": self.seed, **begins}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Job":
        """Inverse of `dataclasses.asdict`, also after JSON made the tuple a list."""
        lists = {name: tuple(data.get(name, ())) for name in ("settings", "also", "converts", "denoising_steps")}
        recording: Recording | Given
        if "path" in data["recording"]:
            recording = Given(**{**data["recording"], "keys": tuple(data["recording"]["keys"])})
        else:
            recording = Recording(**data["recording"])
        return cls(**{**data, "recording": recording, **lists})


def describe_machine() -> dict[str, Any]:
    """Processor, cores this process may use, and the load beside it."""
    return {**provenance.describe_machine(), "load_1min": round(os.getloadavg()[0], 2)}


def code_version() -> str:
    """The commit of this checkout, "-dirty" with changes since; "unknown" outside of git."""
    return provenance.code_version(Path(__file__).parents[1]) or "unknown"


def result_file(path: str) -> Path:
    """Type of the option of a file that is written at the end: one that cannot be is refused at the start."""
    try:
        check_target(path)
    except OutputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(path)


def now() -> str:
    """The date and time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def failure(job: Job, error: str) -> Result:
    return {"schema": SCHEMA, "name": job.name, "status": "failed", "error": error, "job": asdict(job), "date": now()}


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot read {path}: {error}; remove it to do that part again") from error
