"""What `scd eval`, `sweep`, `compare` and `serve` run: checkpoints, exported policies, or policies by dotted name."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["exported_policy", "is_exported", "is_named", "load_source", "named_policies", "refuse_checkpoint_options"]


def is_named(source: Path) -> bool:
    """Whether this is `package.module:callable` and not a path."""
    from scd_robot.dotted import is_dotted

    return is_dotted(str(source)) and not source.exists()


def is_exported(source: Path) -> bool:
    """Whether this is a folder that `scd export` wrote."""
    from scd_robot.export import is_export

    return is_export(source)


def exported_policy(folder: Path, device: str, trust: bool, **overrides: Any) -> Any:
    """The policy of an exported folder; see `scd_robot.export.load_exported`.

    Raises:
        ConfigError: another device than the CPU; an override that is part of the graphs.
    """
    from scd_robot.errors import ConfigError
    from scd_robot.export import load_exported

    if device != "cpu":
        raise ConfigError(f"exported graphs run on the CPU, got --device {device}")
    return load_exported(folder, trusted=trust, **overrides)


def load_source(source: Path, device: str = "cpu", trust: bool = False, **overrides: Any) -> Any:
    """The policy of a checkpoint, or of a folder that `scd export` wrote; of an ONNX one without torch.

    Errors are those of `load_policy` and `exported_policy`.
    """
    if is_exported(source):
        return exported_policy(source, device, trust, **overrides)
    import torch

    from scd_robot.policies import load_policy

    torch.set_num_threads(1)  # batches are small
    return load_policy(source, device, **overrides)


def named_policies(
    sources: Sequence[Path], options: Sequence[str], python: str | None, env_python: str | None = None
) -> Callable[..., Any]:
    """How policies by dotted name are made: a function of the name, the environment, and the seed of the noise.

    Args:
        sources: all that is evaluated.
        options: KEY=VALUE for all named policies.
        python: interpreter for them.
        env_python: interpreter for the environments.

    Raises:
        ConfigError: options without a named policy.
    """
    from scd_robot.dotted import parse_options
    from scd_robot.errors import ConfigError

    if (options or python) and not any(map(is_named, sources)):
        raise ConfigError(
            "--policy-options and --policy-python are for policies by dotted name (package.module:callable), got "
            f"{', '.join(map(str, sources))}"
        )
    given = parse_options(options)

    def maker(name: Path, environment: str, seed: int | None = None) -> Callable[[], Any]:
        from scd_robot.sim_eval.named_policy import make_named_policy

        chosen = given if seed is None else {**given, "seed": seed}
        return functools.partial(
            make_named_policy, str(name), chosen, environment, env_python=env_python, python=python
        )

    return maker


def refuse_checkpoint_options(source: Path, options: Mapping[str, Any]) -> None:
    """Refuses options (by name; None and False = not given) that only checkpoints have.

    Raises:
        ConfigError: one is given.
    """
    from scd_robot.errors import ConfigError

    for name, value in options.items():
        if value not in (None, False, 0):
            raise ConfigError(
                f"--{name.replace('_', '-')} is for checkpoints; give {source} options of its own with --policy-options"
            )
