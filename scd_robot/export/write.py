"""From a policy to a folder of graphs: ONNX, torch.export, or compiled by AOTInductor. It is there whole or not at all.

Shapes: B rows of a graph, fixed when it is made.
"""

import logging
import platform
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scd_robot.errors import ConfigError, MissingDependencyError, OutputError
from scd_robot.export.graphs import DecoderStep, EncoderStep, Plan, cache_names, new_cache
from scd_robot.export.manifest import FORMATS, ExportedSettings, Format, Graph, Manifest, is_export
from scd_robot.export.parity import check_parity
from scd_robot.export.policy import CACHE, NEXT, load_exported
from scd_robot.model import ScdModel
from scd_robot.output import file_digest, package_versions, replace_folder, write_json
from scd_robot.policies.scd import ScdPolicy
from scd_robot.types import ArraySpec, Observation

__all__ = ["export_policy", "make_graphs", "manifest_of"]

logger = logging.getLogger(__name__)

_PACKAGES = ("scd_robot", "torch", "numpy", "onnx", "onnxscript", "onnxruntime")
_OPSET = 20

Made = tuple[nn.Module, list[str], list[Tensor], list[str]]


def export_policy(
    policy: ScdPolicy,
    out: Path,
    kind: Format = "onnx",
    *,
    batch_size: int = 1,
    observations: Sequence[Observation] | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the folder `out`, after the graphs were compared with the policy.

    Args:
        policy: a separable one, on the CPU.
        out: folder.
        kind: of graphs.
        batch_size: B.
        observations: of consecutive control steps, (B, ...) each, for the comparison; see `check_parity`, which draws
            some where there are none.
        tolerance: see `check_parity`; 0 = no comparison, None = its own.
        overwrite: replace an earlier export at `out`.
        progress: show a progress bar of the comparison.

    Returns:
        The report of the comparison; empty without one.

    Raises:
        ConfigError: the entangled architecture; the graphs are further from the policy than the tolerance: nothing is
            written then.
        OutputError: `out` exists (with `overwrite`: and is no export), or cannot be written.
        MissingDependencyError: no onnx, or no C++ compiler for aoti.
    """
    _check(policy, kind, batch_size)
    _check_target(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
            beside = Path(place) / out.name
            beside.mkdir()
            made = make_graphs(policy, batch_size)
            manifest = manifest_of(policy, made, kind, batch_size)
            for name, graph in manifest.graphs.items():
                _write_graph(made[name], beside / graph.file, kind)
            digests = {graph.file: file_digest(beside / graph.file) for graph in manifest.graphs.values()}
            manifest = replace(manifest, sha256=digests)
            write_json(beside / "manifest.json", manifest.to_json())
            report: dict[str, Any] = {}
            if tolerance != 0:
                report = check_parity(policy, load_exported(beside, trusted=True), observations, tolerance, progress)
                write_json(beside / "parity.json", report)
            replace_folder(beside, out)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error
    return report


def make_graphs(policy: ScdPolicy, batch_size: int) -> dict[str, Made]:
    """Of each graph the module, the names of its inputs, examples of them, and the names of its outputs."""
    model, normalizer = policy.model, policy.normalizer
    assert isinstance(model, ScdModel)
    encoder, decoder, plan = EncoderStep(model, normalizer), DecoderStep(model), Plan(model, normalizer, policy.config)
    cache = cache_names(model.config.encoder_layers)
    made: dict[str, Made] = {
        "encoder_step": (
            encoder,
            [*encoder.inputs, *(CACHE + name for name in cache)],
            [*encoder.example(batch_size), *new_cache(model, batch_size)],
            ["context", *(NEXT + name for name in cache)],
        ),
        "decoder_step": (decoder, decoder.inputs, decoder.example(batch_size), ["velocity"]),
        "plan": (plan, plan.inputs, plan.example(batch_size), ["actions"]),
    }
    for module, *_ in made.values():
        module.eval()
    return made


def manifest_of(policy: ScdPolicy, made: Mapping[str, Made], kind: Format, batch_size: int) -> Manifest:
    """What `manifest.json` says of graphs, but the hashes of their files."""
    config, graphs, keys = policy.config, {}, tuple(policy.model.config.observation_shapes)
    suffix = "onnx" if kind == "onnx" else "pt2"
    for name, (module, inputs, example, outputs) in made.items():
        with torch.inference_mode():
            found = module(*example)
        found = found if isinstance(found, tuple) else (found,)
        graphs[name] = Graph(f"{name}.{suffix}", _specs(inputs, example), _specs(outputs, found))
    return Manifest(
        kind=kind,
        batch_size=batch_size,
        dataset=policy.transforms.dataset,
        transforms=policy.transforms.config,
        architecture=policy.architecture,
        keys=keys,
        settings=ExportedSettings(
            num_executed=config.num_executed,
            seed=config.seed,
            num_samples=config.num_samples,
            guidance_scale=config.guidance_scale,
            solver=config.sampler.solver,
            num_denoising_steps=config.sampler.num_denoising_steps,
        ),
        graphs=graphs,
        checkpoint={
            name: value
            for name, value in getattr(policy, "provenance", {}).items()
            if name not in ("device", "settings", "reproducible")
        },
        versions={"python": platform.python_version(), **package_versions(_PACKAGES)},
        sha256={},
        ranges={key: ends for key, ends in policy.normalizer.ranges().items() if key in keys},
    )


def _check(policy: ScdPolicy, kind: str, batch_size: int) -> None:
    if not isinstance(policy.model, ScdModel):
        raise ConfigError(
            "the entangled architecture cannot be exported: it has no context, and a plan reads the whole history; "
            "'scd convert-policy' makes it separable"
        )
    if kind not in FORMATS:
        raise ConfigError(f"--format must be one of {', '.join(FORMATS)}, got {kind!r}")
    if batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {batch_size}")
    if policy.device.type != "cpu":
        raise ConfigError(f"graphs are made on the CPU, the policy is on {policy.device}; load it with device='cpu'")
    if kind == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f"exporting to ONNX needs {error.name}: pip install 'scd_robot[export]'"
            ) from error
    if kind == "aoti" and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise MissingDependencyError(
            "aoti compiles C++ and finds neither g++ nor clang++; install one, or export to ONNX"
        )


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise OutputError(f"{out} exists already; choose another --out, or --overwrite")
    if not is_export(out):
        raise OutputError(f"{out} is not an exported policy and will not be replaced; choose another --out")


def _write_graph(made: Made, path: Path, kind: Format) -> None:
    module, inputs, example, outputs = made
    logger.info("exporting %s", path.name)
    with torch.no_grad(), _quiet():
        program = torch.export.export(module, tuple(example), strict=False)
        if kind == "onnx":
            torch.onnx.export(
                program,
                f=path,
                input_names=inputs,
                output_names=outputs,
                opset_version=_OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        elif kind == "torch-export":
            torch.export.save(program, path)
        else:
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs={"cpp.threads": 1}
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters say about themselves and about packages that they find missing."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


def _specs(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, ArraySpec]:
    return {
        name: ArraySpec(tuple(tensor.shape), str(np.dtype(tensor.numpy().dtype)))
        for name, tensor in zip(names, tensors, strict=True)
    }
