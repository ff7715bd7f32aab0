"""The verb `scd probe`."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from scd_robot.datasets.formats import ReadOptions

__all__ = ["probe"]

_FULL_STEPS = (1, 2, 4)
_FRAMES = 16  # of the context, and imagined after it, unless told otherwise


def probe(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    dataset: Path,
    out: Path | None = None,
    episode: tuple[int, ...] = (),
    episodes: int = 16,
    read: Annotated[ReadOptions, tyro.conf.arg(name="")] = ReadOptions(),  # noqa: B008 - frozen
    positions: int = 16,
    num_denoising_steps: int = 16,
    seed: int = 0,
    full_steps: tuple[int, ...] = (),
    env: str | None = None,
    env_episodes: int = 50,
    env_python: str | None = None,
    context: int | None = None,
    length: int | None = None,
    overwrite: bool = False,
    json: Path | None = None,
) -> None:
    """Looks into the layers of an entangled model while it denoises: what it repeats, and what needs the history.

    Similarity of features across denoising steps, attention on earlier control steps, and the loss with one layer left
    out. Then what it costs not to compute the middle layers at every denoising step: of a policy in success, with
    --env; of a model of frames in what it imagines of the episodes. OUT gets probe.json and probe.html.

    Args:
        checkpoint: a checkpoint's folder, or a training run's (its newest checkpoint), of an entangled policy or model
            of frames (--set model.architecture=entangled).
        dataset: recorded episodes to look at.
        out: folder for the report; by default nothing is written.
        episode: numbers of the episodes; by default --episodes of those that the training held out, or of all where the
            dataset is another.
        episodes: how many, evenly spaced, where none is named.
        read: what to read of the dataset.
        positions: control steps of each whose plans, or next frames, are looked into.
        num_denoising_steps: of Euler's method; a policy has as many in ENV, too.
        seed: of noise and positions.
        full_steps: denoising steps at the beginning in which all layers are computed, one shortcut each; fewer than
            there are. By default 1, 2 and 4.
        env: environment for the shortcuts' success; of policies.
        env_episodes: of each run there.
        env_python: interpreter of another environment in which the simulator runs.
        context: control steps that a model of frames sees of each episode before it imagines; by default 16.
        length: frames that it imagines then; by default 16.
        overwrite: replace a report in OUT.
        json: write the numbers to this file too ("-": standard output).
    """
    import torch

    from scd_robot.analysis.probe_costs import cost_in_closed_loop, cost_in_frames, shortcuts_of
    from scd_robot.analysis.probe_report import format_probe, write_probe
    from scd_robot.analysis.probes import check_entangled, choose_episodes, held_out_episodes
    from scd_robot.analysis.probes import probe as look
    from scd_robot.checkpoint import read_checkpoint
    from scd_robot.config import from_json
    from scd_robot.datasets import open_dataset
    from scd_robot.errors import OutputError
    from scd_robot.output import check_target, write_json
    from scd_robot.policies import Imagination
    from scd_robot.policies.imagination import imagination_of
    from scd_robot.policies.loading import policy_of
    from scd_robot.policies.registry import FRAMES
    from scd_robot.training import TrainingConfig

    if out is not None and (out / "probe.json").exists() and not overwrite:
        raise OutputError(f"{out} already holds a probe; choose another --out, or --overwrite it")
    if json is not None:
        check_target(json)
    torch.set_num_threads(1)
    source, quiet = read_checkpoint(checkpoint), str(json) == "-"
    is_of_frames = source.policy == FRAMES
    policy: Any = imagination_of(source) if is_of_frames else policy_of(source, num_denoising_steps=num_denoising_steps)
    steps = policy.config.sampler.num_denoising_steps
    full_steps = full_steps or tuple(few for few in _FULL_STEPS if few < steps)
    shortcuts = shortcuts_of(check_entangled(policy).config.depth, full_steps, steps)
    imagines = isinstance(policy, Imagination)
    _refuse_what_is_for_others(imagines, env, {"context": context, "length": length})
    seen, ahead = (_FRAMES if given is None else given for given in (context, length))
    data = open_dataset(dataset, **vars(read))
    held_out = held_out_episodes(source, policy, data)
    numbers = list(episode) or choose_episodes(data, held_out, episodes, seen + ahead if imagines else 1)
    imagined = None
    if imagines:  # first, since episodes that are too short are refused there
        imagined = cost_in_frames(policy, data, numbers, shortcuts, context=seen, length=ahead, progress=not quiet)
    document: dict[str, Any] = look(
        policy,
        data,
        numbers,
        positions=positions,
        num_denoising_steps=num_denoising_steps,
        flow_time=from_json(TrainingConfig, source.config["training"], "training").flow_time,
        seed=seed,
        progress=not quiet,
    )
    document["checkpoint"] = str(checkpoint)
    document["held_out"] = None if held_out is None else set(numbers) <= set(held_out)
    if imagined is not None:
        document["imagined"] = imagined
    elif env is not None:
        document |= {"env": env, "closed_loop": []}
        for row in cost_in_closed_loop(policy, env, env_episodes, shortcuts, python=env_python, progress=not quiet):
            document["closed_loop"].append(row)
            if out is not None:  # each row takes minutes
                write_probe(document, out)
    if out is not None:
        write_probe(document, out)
    if not quiet:
        print(format_probe(document))
        if out is not None:
            print(f"report: {out / 'probe.html'}")
    if json is not None:
        write_json(json, document)


def _refuse_what_is_for_others(imagines: bool, env: str | None, of_frames: dict[str, int | None]) -> None:
    from scd_robot.errors import ConfigError

    if imagines and env is not None:
        raise ConfigError(
            "--env is for policies: a model of frames plans no actions, and what its shortcuts cost is told of the "
            "frames that it imagines (--context, --length); leave it out"
        )
    given = [f"--{name}" for name, value in of_frames.items() if value is not None]
    if given and not imagines:
        raise ConfigError(
            f"{', '.join(given)} is for models of frames; what shortcuts cost a policy is told with --env"
        )
