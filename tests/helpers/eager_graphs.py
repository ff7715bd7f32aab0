"""Graphs that were not exported: the modules themselves, behind the interface of a runtime."""

from typing import Any

import numpy as np
import torch

from scd_robot.export.policy import ExportedPolicy
from scd_robot.export.write import make_graphs, manifest_of
from scd_robot.policies import ScdPolicy


class EagerRuntime:
    """Computes what an exported graph would be made of."""

    def __init__(self, policy: ScdPolicy, batch_size: int) -> None:
        self.made = make_graphs(policy, batch_size)

    def run(self, graph: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; inputs must have exactly the names, shapes and types that the graph was made for."""
        module, names, example, outputs = self.made[graph]
        assert sorted(inputs) == sorted(names)
        tensors = [torch.from_numpy(np.array(inputs[name])) for name in names]
        assert [(t.shape, t.dtype) for t in tensors] == [(t.shape, t.dtype) for t in example]
        with torch.inference_mode():
            found = module(*tensors)
        return {n: t.numpy() for n, t in zip(outputs, found if isinstance(found, tuple) else (found,), strict=True)}


def eager_export(policy: ScdPolicy, batch_size: int = 1, **options: Any) -> ExportedPolicy:
    """The policy as if it had been exported and loaded."""
    runtime = EagerRuntime(policy, batch_size)
    manifest = manifest_of(policy, runtime.made, "onnx", batch_size)
    return ExportedPolicy(runtime, manifest, "nowhere", **options)
