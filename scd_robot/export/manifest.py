"""The folder of an exported policy: graphs, and `manifest.json`, which says all that is needed to run them. No torch.

    exported/
        encoder_step.onnx    (.pt2 for torch-export and aoti)
        decoder_step.onnx
        plan.onnx
        manifest.json        format, specification, inputs and outputs, settings, versions, SHA-256 of the other files
        parity.json          how far the graphs are from the policy that they were made of

Shapes in it have the batch size that the graphs were made for.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from scd_robot.config import from_json, to_json
from scd_robot.errors import CheckpointError, ConfigError
from scd_robot.output import file_digest
from scd_robot.policies.rows import Architecture
from scd_robot.transforms import TransformConfig, Transforms
from scd_robot.types import ArraySpec, DatasetSpec

__all__ = ["FORMATS", "GRAPHS", "ExportedSettings", "Format", "Graph", "Manifest", "is_export", "read_manifest"]

SCHEMA = 1
_FORMAT = "scd_robot export"

Format = Literal["onnx", "torch-export", "aoti"]
FORMATS: tuple[Format, ...] = get_args(Format)
GRAPHS = ("encoder_step", "decoder_step", "plan")


@dataclass(frozen=True)
class Graph:
    """One graph.

    Attributes:
        file: in the folder.
        inputs: shape and dtype by name, in the order of the arguments.
        outputs: likewise.
    """

    file: str
    inputs: dict[str, ArraySpec]
    outputs: dict[str, ArraySpec]


@dataclass(frozen=True)
class ExportedSettings:
    """How the model is run. `num_executed` and `seed` may be others when it is loaded, the rest is part of the graphs.

    Attributes:
        num_executed: actions taken from one plan before the next.
        seed: keys the noise, together with episode and plan number.
        num_samples: plans sampled at a time, of which the most faithful one is kept.
        guidance_scale: guidance by context corruption; 1 = off.
        solver: of the sampler.
        num_denoising_steps: of the sampler.
    """

    num_executed: int
    seed: int
    num_samples: int
    guidance_scale: float
    solver: str
    num_denoising_steps: int

    def check_fits(self, architecture: Architecture) -> None:
        """Raises ConfigError where the model cannot be run so."""
        most, stride = architecture.chunk_length, architecture.history_stride
        if not 1 <= self.num_executed <= most or self.num_executed % stride:
            raise ConfigError(
                f"num_executed must be a multiple of the model's history_stride {stride}, at most its chunk_length "
                f"{most}, got {self.num_executed}"
            )
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")


@dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`.

    Attributes:
        kind: what the graphs are.
        batch_size: rows that they compute.
        dataset: what the policy was trained on, as recorded.
        transforms: what the runner does between the recording and the graphs.
        architecture: of the model.
        keys: observation keys that the graphs take.
        ranges: smallest and largest value of each vector in training, by key.
        settings: how it is run.
        graphs: by the names in `GRAPHS`.
        checkpoint: what it was made of: type, step, hash of the weights, ...
        versions: of python and packages, when it was written.
        sha256: of each other file.
    """

    kind: Format
    batch_size: int
    dataset: DatasetSpec
    transforms: TransformConfig
    architecture: Architecture
    keys: tuple[str, ...]
    settings: ExportedSettings
    graphs: dict[str, Graph]
    checkpoint: dict[str, Any]
    versions: dict[str, str]
    sha256: dict[str, str]
    ranges: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types, with what `PolicySpec` says for readers in other languages."""
        transforms = Transforms(self.transforms, self.dataset)
        sources = [transforms.sources[key] for key in self.keys if key in transforms.sources]
        spec = {
            "observation": {key: transforms.recorded.observation[key].to_json() for key in sources},
            "action_dim": self.dataset.action_dim,
            "rate_hz": 1 / self.dataset.control_dt,
            "chunk_length": self.architecture.chunk_length,
            "num_executed": self.settings.num_executed,
            "history_length": self.architecture.history_length,
            "tasks": list(self.transforms.tasks),
        }
        return {
            "format": _FORMAT,
            "schema": SCHEMA,
            "kind": self.kind,
            "batch_size": self.batch_size,
            "spec": spec,
            "graphs": {name: _graph_to_json(graph) for name, graph in self.graphs.items()},
            "keys": list(self.keys),
            "ranges": to_json(self.ranges),
            "settings": to_json(self.settings),
            "architecture": to_json(self.architecture),
            "dataset": self.dataset.to_json(),
            "transforms": to_json(self.transforms),
            "checkpoint": self.checkpoint,
            "versions": self.versions,
            "sha256": self.sha256,
        }


def is_export(path: str | Path) -> bool:
    """Whether a folder holds an exported policy (of whatever schema)."""
    file = Path(path) / "manifest.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == _FORMAT


def read_manifest(folder: str | Path) -> Manifest:
    """Reads `manifest.json` and compares the hashes of all files with it.

    Raises:
        CheckpointError: missing, foreign, truncated or changed files, or another schema.
    """
    folder = Path(folder)
    if not is_export(folder):
        raise CheckpointError(f"{folder} is not an exported policy: expected a folder that 'scd export' wrote")
    document = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if document.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{folder} has export schema {document.get('schema')}, this version of scd_robot reads {SCHEMA}; export "
            "the checkpoint again"
        )
    try:
        manifest = Manifest(
            kind=document["kind"],
            batch_size=int(document["batch_size"]),
            dataset=DatasetSpec.from_json(document["dataset"]),
            transforms=from_json(TransformConfig, document["transforms"], "transforms"),
            architecture=from_json(Architecture, document["architecture"], "architecture"),
            keys=tuple(map(str, document["keys"])),
            settings=from_json(ExportedSettings, document["settings"], "settings"),
            graphs={name: _graph_from_json(document["graphs"][name]) for name in GRAPHS},
            checkpoint=dict(document["checkpoint"]),
            versions=dict(document["versions"]),
            sha256=dict(document["sha256"]),
            ranges={  # exports of before have none
                str(key): (tuple(map(float, low)), tuple(map(float, high)))
                for key, (low, high) in document.get("ranges", {}).items()
            },
        )
        _check(manifest, document["spec"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # as ConfigError, UnknownNameError
        raise CheckpointError(
            f"{folder / 'manifest.json'} is damaged: {error!r}; export the checkpoint again"
        ) from error
    if manifest.kind not in FORMATS:
        raise CheckpointError(
            f"{folder} holds graphs of kind {manifest.kind!r}, this version runs {', '.join(FORMATS)}"
        )
    for graph in manifest.graphs.values():
        _check_digest(folder, graph.file, manifest.sha256)
    return manifest


def _check(manifest: Manifest, spec: Mapping[str, Any]) -> None:
    """Raises ConfigError where parts of a manifest contradict one another, UnknownNameError or ShapeError likewise."""
    model = manifest.architecture
    if min(manifest.batch_size, model.action_dim, model.chunk_length, model.history_length, model.history_stride) < 1:
        raise ConfigError("a size in 'batch_size' or 'architecture' is less than 1")
    manifest.settings.check_fits(model)
    derived = manifest.to_json()["spec"]
    for name, told in spec.items():
        if derived.get(name) != told:
            raise ConfigError(f"'spec' has {name} = {told!r}, but by the other parts it is {derived.get(name)!r}")
    plan = (manifest.batch_size, model.chunk_length, model.action_dim)
    shapes = [tuple(port.shape) for port in manifest.graphs["plan"].outputs.values()]
    if plan not in shapes or not manifest.graphs["plan"].inputs:
        raise ConfigError(f"the graph 'plan' gives {shapes}, none of them actions {plan}")


def _check_digest(folder: Path, name: str, digests: Mapping[str, str]) -> None:
    path = folder / name
    if Path(name).name != name:
        raise CheckpointError(f"{folder / 'manifest.json'} names the file {name!r} outside of its folder")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; take the export from its source again")
    if file_digest(path) != digests.get(name):
        raise CheckpointError(f"{path} was truncated or changed since it was written; take it from its source again")


def _graph_to_json(graph: Graph) -> dict[str, Any]:
    ports = {
        side: [{"name": name, **spec.to_json()} for name, spec in getattr(graph, side).items()]
        for side in ("inputs", "outputs")
    }
    return {"file": graph.file, **ports}


def _graph_from_json(data: Mapping[str, Any]) -> Graph:
    inputs, outputs = (
        {str(port["name"]): ArraySpec.from_json(port) for port in data[side]} for side in ("inputs", "outputs")
    )
    return Graph(str(data["file"]), inputs, outputs)
