"""An exported policy in a control loop; `OnnxPolicy` needs numpy and onnxruntime, no torch.

It has the methods of `scd_robot.policies.ScdPolicy` and the same noise, keyed by (seed, episode, plan), so that an
episode gives the same actions up to float32 rounding.

Shapes: B rows, Ta chunk length, Da action width, d committed actions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.config import to_json
from scd_robot.errors import ConfigError
from scd_robot.export.manifest import Manifest, read_manifest
from scd_robot.export.runtimes import Arrays, Runtime, open_runtime
from scd_robot.policies.chunked import ChunkPolicy, recorded_chunk
from scd_robot.policies.rows import PlanInput, Rows
from scd_robot.transforms import Transforms
from scd_robot.types import ActionArray, GivenActions, Observation, RunningChunk

__all__ = ["ArrayCache", "ExportedPolicy", "OnnxPolicy", "load_exported"]

CACHE = "cache."  # begins the names of the cache's tensors among a graph's inputs
NEXT = "next."  # and among its outputs


class ArrayCache:
    """The history that the graph `encoder_step` takes and gives, as arrays: a `HistoryCache`.

    Attributes:
        arrays: by name, (B, ...) each; see `scd_robot.export.graphs.new_cache`.
    """

    def __init__(self, arrays: dict[str, NDArray[Any]]) -> None:
        self.arrays = arrays

    @classmethod
    def empty(cls, manifest: Manifest, batch_size: int) -> "ArrayCache":
        """Of rows that have observed nothing."""
        specs = {
            name.removeprefix(CACHE): spec
            for name, spec in manifest.graphs["encoder_step"].inputs.items()
            if name.startswith(CACHE)
        }
        arrays = {name: np.zeros((batch_size, *spec.shape[1:]), spec.dtype) for name, spec in specs.items()}
        arrays["slot_position"][:] = -1
        return cls(arrays)

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def position(self) -> NDArray[np.int64]:
        """(B,) index of the next encoder step of each row."""
        return self.arrays["position"]

    def reset(self, rows: NDArray[np.bool_]) -> None:
        """Empties the rows where `rows` (B,) is True."""
        for name, array in self.arrays.items():
            array[rows] = -1 if name == "slot_position" else 0

    def advance(self, steps: NDArray[np.int64]) -> None:
        """Lets encoder steps (B,) pass without an observation."""
        self.arrays["position"] = self.position + steps

    def select(self, rows: NDArray[np.int64]) -> "ArrayCache":
        """A copy of some rows (n,)."""
        return ArrayCache({name: array[rows] for name, array in self.arrays.items()})

    def join(self, others: Sequence["ArrayCache"]) -> "ArrayCache":
        """A copy of its rows and those of others, one after the other."""
        every = (self, *others)
        return ArrayCache({name: np.concatenate([one.arrays[name] for one in every]) for name in self.arrays})


class ExportedPolicy(ChunkPolicy):
    """Exported graphs in a control loop; see `ChunkPolicy` for what it does when.

    Graphs have a fixed batch size. Other numbers of rows are computed in groups of it, the last one filled up.

    Args:
        runtime: computes the graphs.
        manifest: of their folder.
        folder: for messages and provenance.
        reproducible: see `ChunkPolicy`, likewise `task` and `goal`.
        task: of several.
        goal: by observation key.
    """

    def __init__(
        self,
        runtime: Runtime,
        manifest: Manifest,
        folder: str | Path,
        reproducible: bool = False,
        task: str | None = None,
        goal: Observation | None = None,
    ) -> None:
        manifest.settings.check_fits(manifest.architecture)
        between = Transforms(manifest.transforms, manifest.dataset)
        how = manifest.settings, reproducible, task, goal
        super().__init__(manifest.architecture, manifest.keys, manifest.dataset, manifest.ranges, between, *how)
        self.manifest, self._runtime = manifest, runtime
        self.provenance = {
            **manifest.checkpoint,
            "device": "cpu",
            "settings": to_json(manifest.settings),
            "reproducible": reproducible,
            "export": {
                "folder": str(folder),
                "kind": manifest.kind,
                "batch_size": manifest.batch_size,
                "versions": manifest.versions,
                "sha256": manifest.sha256,
            },
        }

    def decoder_step(self, inputs: Arrays) -> NDArray[np.float32]:
        """Velocity (B, Ta, Da) of the graph `decoder_step`; `inputs` by its names, (B, ...)."""
        return self._run("decoder_step", inputs)["velocity"]

    def _new_cache(self, batch_size: int) -> ArrayCache:
        return ArrayCache.empty(self.manifest, batch_size)

    def _encode(
        self,
        rows: Rows,
        seen: Mapping[str, NDArray[Any]],
        present: Mapping[str, bool],
        encodes: NDArray[np.bool_],
        state: Mapping[str, NDArray[Any]],
    ) -> NDArray[np.float32]:
        assert isinstance(rows.cache, ArrayCache)
        inputs: dict[str, NDArray[Any]] = {f"observation.{key}": value for key, value in seen.items()}
        inputs |= {
            name: np.full(rows.batch_size, present.get(name.removeprefix("present."), True))
            for name in self.manifest.graphs["encoder_step"].inputs
            if name.startswith("present.")
        }
        if self.architecture.past_action_input != "none":
            inputs["past_action"] = self._as_model_has_them(rows.past[:, -1:], state)[:, 0]
            inputs["past_action_valid"] = rows.past_known[:, -1]
        inputs["active"] = encodes
        inputs |= {CACHE + name: array for name, array in rows.cache.arrays.items()}
        found = self._run("encoder_step", inputs)
        rows.cache.arrays = {name: found[NEXT + name] for name in rows.cache.arrays}
        context = found["context"]
        if not encodes.all() and self._context is not None:
            context = np.where(encodes[:, None, None], context, self._context)
        return context

    @property
    def max_gain(self) -> float:
        """0: exported plans are not differentiated."""
        return 0.0

    def check_guidance(self, max_gain: float) -> None:
        """Raises ConfigError: exported plans are not differentiated."""
        raise ConfigError(
            "exported plans cannot be guided towards a running chunk: use another strategy (real-time chunking that is "
            "trained, model.max_delay_steps), or the checkpoint"
        )

    def _denoise(
        self,
        given: PlanInput,
        prefix: ActionArray | None,
        running: RunningChunk | None = None,
        fixed: GivenActions | None = None,
    ) -> ActionArray:
        if fixed is not None:
            raise ConfigError("exported plans cannot hold single numbers of actions; use the checkpoint")
        count, shape = len(given.rows), (self.architecture.chunk_length, self.architecture.action_dim)
        length = 0 if prefix is None else prefix.shape[1]
        if length > self.max_prefix:
            raise ConfigError(f"prefix holds {length} actions; this policy takes at most {self.max_prefix}")
        committed = np.zeros((count, *shape), np.float32)
        if prefix is not None:
            committed[:, :length] = self._as_model_has_them(prefix, given.state)
        inputs = {
            "context": given.context,
            "noise": given.noise,
            "prefix": committed,
            "prefix_length": np.full(count, length, np.int64),
        }
        if self.config.guidance_scale != 1.0:
            inputs["corruption"] = given.corruption
        if self.config.num_samples > 1:
            inputs |= {"past": self._as_model_has_them(given.past, given.state), "past_known": given.past_known}
        return recorded_chunk(self._run("plan", inputs)["actions"], given, prefix, self.transforms)

    def _of_rows(self, context: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return context[rows]

    def _as_model_has_them(self, actions: ActionArray, state: Mapping[str, NDArray[Any]]) -> ActionArray:
        """Actions (n, L, Da) as recorded, to those of the graphs."""
        return self.transforms.chunk(self.transforms.action(actions), state).astype(np.float32, copy=False)

    def _run(self, graph: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs (B, ...) of inputs (B, ...), in groups of the graphs' batch size."""
        size, count = self.manifest.batch_size, len(next(iter(inputs.values())))
        if count == size:
            return self._runtime.run(graph, inputs)
        groups = []
        for start in range(0, count, size):
            chosen = np.minimum(np.arange(start, start + size), count - 1)
            groups.append(self._runtime.run(graph, {name: array[chosen] for name, array in inputs.items()}))
        return {name: np.concatenate([group[name] for group in groups])[:count] for name in groups[0]}


class OnnxPolicy(ExportedPolicy):
    """A policy that was exported to ONNX, by ONNX Runtime.

    Args:
        folder: that `scd export` wrote.
        threads: of ONNX Runtime; small graphs are fastest with one.
        num_executed: actions taken from one plan before the next; None = as exported. Likewise the seed.
        seed: of the noise.
        reproducible: see `ChunkPolicy`, likewise `task` and `goal`.
        task: of several.
        goal: by observation key.

    Raises:
        CheckpointError: missing, foreign or changed files.
        ConfigError: graphs of another kind, or a setting out of range.
        MissingDependencyError: there is no onnxruntime.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        threads: int = 1,
        num_executed: int | None = None,
        seed: int | None = None,
        reproducible: bool = False,
        task: str | None = None,
        goal: Observation | None = None,
    ) -> None:
        manifest = _with_settings(read_manifest(folder), num_executed=num_executed, seed=seed)
        if manifest.kind != "onnx":
            raise ConfigError(f"{folder} holds graphs of kind {manifest.kind}, not ONNX; use load_exported")
        runtime = open_runtime(Path(folder), manifest, threads=threads)
        super().__init__(runtime, manifest, folder, reproducible, task, goal)


def load_exported(
    folder: str | Path,
    *,
    trusted: bool = False,
    threads: int = 1,
    reproducible: bool = False,
    task: str | None = None,
    goal: Observation | None = None,
    **overrides: Any,
) -> ExportedPolicy:
    """The policy in an exported folder, of any kind.

    Args:
        folder: that `scd export` wrote.
        trusted: the word that graphs of torch-export and aoti need, see `TorchRuntime`.
        threads: of ONNX Runtime.
        reproducible: see `ChunkPolicy`, likewise `task` and `goal`.
        task: of several.
        goal: by observation key.
        **overrides: `num_executed` and `seed`; None leaves what was exported. What is part of the graphs
            (`num_denoising_steps`, `guidance_scale`, `num_samples`) may be given as it is there.

    Raises:
        CheckpointError, ConfigError, MissingDependencyError: see `read_manifest`, `open_runtime`; an override that the
            graphs do not have.
    """
    manifest = _with_settings(read_manifest(folder), **overrides)
    if manifest.kind == "onnx":
        return OnnxPolicy(
            folder,
            threads=threads,
            num_executed=manifest.settings.num_executed,
            seed=manifest.settings.seed,
            reproducible=reproducible,
            task=task,
            goal=goal,
        )
    runtime = open_runtime(Path(folder), manifest, trusted=trusted)
    return ExportedPolicy(runtime, manifest, folder, reproducible, task, goal)


def _with_settings(manifest: Manifest, **overrides: Any) -> Manifest:
    given = {name: value for name, value in overrides.items() if value is not None}
    for name in set(given) - {"num_executed", "seed"}:
        fixed = getattr(manifest.settings, name, None)
        if given.pop(name) != fixed:
            raise ConfigError(f"{name} is part of the exported graphs, {fixed} here; give it to 'scd export' instead")
    return replace(manifest, settings=replace(manifest.settings, **given))
