"""The verb `scd probe`."""

from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["probe"]


def probe(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    dataset: Path,
    out: Path | None = None,
    episodes: int = 16,
    positions: int = 16,
    num_denoising_steps: int = 16,
    seed: int = 0,
    env: str | None = None,
    env_episodes: int = 50,
    full_steps: tuple[int, ...] = (1, 2, 4),
    env_python: str | None = None,
    overwrite: bool = False,
    json: Path | None = None,
) -> None:
    """Looks into the layers of an entangled policy while it denoises: what it repeats, and what needs the history.

    Similarity of features across denoising steps, attention on earlier control steps, and the loss with one layer left
    out; with --env also success in closed loop when the middle layers are not computed at every denoising step. OUT
    gets probe.json and probe.html.

    Args:
        checkpoint: a checkpoint's folder, or a training run's (its newest checkpoint), of an entangled policy
            (--set model.architecture=entangled).
        dataset: recorded episodes to look at.
        out: folder for the report; by default nothing is written.
        episodes: how many, evenly spaced over the dataset.
        positions: control steps of each whose plans are looked into.
        num_denoising_steps: of Euler's method.
        seed: of noise and positions.
        env: environment for the shortcuts' success.
        env_episodes: of each run there.
        full_steps: denoising steps at the beginning in which all layers are computed, one shortcut each.
        env_python: interpreter of another environment in which the simulator runs.
        overwrite: replace a report in OUT.
        json: write the numbers to this file too ("-": standard output).
    """
    import torch

    from scd_robot.analysis.probe_report import format_probe, write_probe
    from scd_robot.analysis.probes import Shortcut, cost_of_shortcuts, middle_layers
    from scd_robot.analysis.probes import probe as look
    from scd_robot.datasets import open_dataset
    from scd_robot.errors import OutputError
    from scd_robot.output import check_target, write_json
    from scd_robot.policies import load_policy

    if out is not None and (out / "probe.json").exists() and not overwrite:
        raise OutputError(f"{out} already holds a probe; choose another --out, or --overwrite it")
    if json is not None:
        check_target(json)
    torch.set_num_threads(1)
    policy, quiet = load_policy(checkpoint), str(json) == "-"
    document = look(
        policy,
        open_dataset(dataset),
        episodes=episodes,
        positions=positions,
        num_denoising_steps=num_denoising_steps,
        seed=seed,
        progress=not quiet,
    )
    document["checkpoint"] = str(checkpoint)
    if env is not None:
        layers = middle_layers(document["layers"])
        shortcuts = [
            Shortcut(layers.start, layers.stop, steps, reuse) for reuse in (True, False) for steps in full_steps
        ]
        document["env"] = env
        document["closed_loop"] = cost_of_shortcuts(
            policy, env, env_episodes, shortcuts, python=env_python, progress=not quiet
        )
    if out is not None:
        write_probe(document, out)
    if not quiet:
        print(format_probe(document))
        if out is not None:
            print(f"report: {out / 'probe.html'}")
    if json is not None:
        write_json(json, document)
