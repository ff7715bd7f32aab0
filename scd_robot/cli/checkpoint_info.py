"""The verb `scd info`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from scd_robot.cli.policy_source import is_exported

__all__ = ["describe_checkpoint", "describe_export", "info"]

_COMPARED = ("context", "action", "velocity")  # in parity.json


def info(checkpoint: Annotated[Path, tyro.conf.Positional], /, *, json: Path | None = None) -> None:
    """Shows what a checkpoint holds: architecture, sizes, dataset, normalisation, metrics and versions.

    Of an exported policy: what it was made of, what it takes and gives, and how well it follows the checkpoint.

    Args:
        checkpoint: a checkpoint's folder, or a training run's (its newest checkpoint), or a folder that 'scd export'
            wrote.
        json: write the description to this file too ("-": standard output).
    """
    from scd_robot.output import write_json

    exported = is_exported(checkpoint)
    description = describe_export(checkpoint) if exported else describe_checkpoint(checkpoint)
    if json is not None:
        write_json(json, description)
    if str(json) != "-":
        print("\n".join(_export_lines(description) if exported else _lines(description)))


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint's contents without its weights, and their sizes."""
    from scd_robot.checkpoint import read_checkpoint
    from scd_robot.config import from_json
    from scd_robot.model import ScdConfig
    from scd_robot.policies import load_imagination, load_policy
    from scd_robot.policies.registry import FRAMES

    checkpoint = read_checkpoint(path)
    load = load_imagination if checkpoint.policy == FRAMES else load_policy
    load(path)  # refuses what fits its manifest and yet is no policy
    sizes: dict[str, int] = {}
    for name, tensor in checkpoint.weights.items():
        part = name.partition(".")[0]
        sizes[part] = sizes.get(part, 0) + tensor.numel()
    return {
        "checkpoint": str(checkpoint.path),
        "schema": checkpoint.schema,
        "policy": checkpoint.policy,
        "step": checkpoint.step,
        "receptive_field": from_json(ScdConfig, checkpoint.config["model"], "model").receptive_field,
        "resumable": (checkpoint.path / "resume").is_dir(),
        "parameters": {**sizes, "total": sum(sizes.values())},
        "dataset": checkpoint.dataset.to_json(),
        "origin": checkpoint.origin,
        "normalization": checkpoint.normalizer.to_json(),
        "config": checkpoint.config,
        "metrics": checkpoint.metrics,
        "versions": checkpoint.versions,
    }


def describe_export(path: Path) -> dict[str, Any]:
    """The manifest of an exported folder, whose files are compared with it, and `parity` (null where not compared)."""
    from json import loads

    from scd_robot.errors import CheckpointError
    from scd_robot.export import read_manifest

    file = path / "parity.json"
    manifest = read_manifest(path).to_json()
    try:
        parity = loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if parity is not None:
            _ = [float(parity[name]["max"]) for name in _COMPARED], float(parity["tolerance"])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}; export the checkpoint again") from error
    return {"export": str(path), **manifest, "parity": parity}


def _history(model: Mapping[str, Any]) -> str:
    """How far back each layer looks."""
    length, stride = model["history_length"], model["history_stride"]
    if stride == 1:
        return f"{length} control steps per layer"
    return f"{(length - 1) * stride + 1} control steps per layer ({length} observations, one every {stride})"


def _export_lines(description: dict[str, Any]) -> list[str]:
    spec, settings, made = description["spec"], description["settings"], description["checkpoint"]
    dataset, parity = description["dataset"], description["parity"]
    plan = f"{settings['num_denoising_steps']} {settings['solver']} steps"
    plan += f", guidance {settings['guidance_scale']:g}" if settings["guidance_scale"] != 1 else ""
    plan += f", the best of {settings['num_samples']} samples" if settings["num_samples"] != 1 else ""
    plan += f", {_delays(description['architecture']['max_delay_steps'])}"
    compared = "not compared with the checkpoint"
    if parity is not None:
        worst = (f"{name} {parity[name]['max']:.1e}" for name in _COMPARED)
        compared = f"largest differences from the checkpoint: {', '.join(worst)}; tolerance {parity['tolerance']:g}"
    return [
        f"export       {description['export']}, {description['kind']}, batches of {description['batch_size']}",
        f"made of      {made.get('checkpoint', 'a policy in memory')}"
        + (f", preset {made['preset']}, step {made['step']}" if {"preset", "step"} <= made.keys() else ""),
        f"trained on   {dataset['source'] or 'unknown source'}, control_dt {dataset['control_dt']:g} s",
        "observation  " + ", ".join(f"{key} {tuple(one['shape'])}" for key, one in spec["observation"].items()),
        f"action       ({spec['action_dim']},)" + (f", {kind}" if (kind := dataset["action_kind"]) else ""),
        *([] if not (tasks := spec["tasks"]) else [f"tasks        {', '.join(map(repr, tasks))}"]),
        f"history      {_history(description['architecture'])}",
        f"plan         chunk of {spec['chunk_length']}, {settings['num_executed']} executed, {plan}",
        f"parity       {compared}",
        "versions     " + ", ".join(f"{name} {version}" for name, version in description["versions"].items()),
        "graphs       " + ", ".join(graph["file"] for graph in description["graphs"].values()),
    ]


def _lines(description: dict[str, Any]) -> list[str]:
    dataset, config = description["dataset"], description["config"]
    model, conversion = config["model"], description["origin"].get("conversion")
    sampler = f"{config['policy']['sampler']['num_denoising_steps']} {config['policy']['sampler']['solver']} steps"
    plan = f"plan         chunk of {model['chunk_length']}, {config['policy']['num_executed']} executed, {sampler}"
    plan += f", {_delays(model['max_delay_steps'])}"
    frames = f"frames       of {model['frames']['camera']}, patches of {model['frames']['patch_size']} pixels"
    if (latents := model["frames"]["autoencoder"]) is not None:
        places = model["frames"]["patch_size"] // 2 ** len(latents["channels"])
        frames += f" as {places**2 * latents['latent_channels']} numbers of an autoencoder"
    beside = model["frames"]["beside_actions"]
    if model["frames"]["camera"] and not beside:
        plan = f"{frames}, {sampler}"
    lines = [
        f"checkpoint   {description['checkpoint']}",
        f"policy       {description['policy']}, preset {config['preset']}, step {description['step']}"
        + (", can be resumed" if description["resumable"] else ""),
        "parameters   " + ", ".join(f"{part} {count:,}" for part, count in description["parameters"].items()),
        f"trained on   {dataset['source'] or 'unknown source'}, control_dt {dataset['control_dt']:g} s",
        "observation  " + ", ".join(f"{key} {tuple(spec['shape'])}" for key, spec in dataset["observation"].items()),
        f"action       ({dataset['action_dim']},)" + (f", {kind}" if (kind := dataset["action_kind"]) else ""),
        *([] if not (tasks := config["transforms"]["tasks"]) else [f"tasks        {', '.join(map(repr, tasks))}"]),
        f"history      {_history(model)}, receptive field {description['receptive_field']}",
        plan,
        *([frames] if beside else []),
        *([] if conversion is None else [_converted(conversion)]),
        "versions     " + ", ".join(f"{name} {version}" for name, version in description["versions"].items()),
        "metrics",
        *(
            f"  {name:24} {'nan' if value is None else f'{value:.5g}'}"
            for name, value in description["metrics"].items()
        ),
        "normalisation                 mode      min ... max per dimension",
    ]
    for key, entry in description["normalization"].items():
        ranges = " ".join(
            f"[{low:.3g}, {high:.3g}]" for low, high in zip(entry["minimum"], entry["maximum"], strict=True)
        )
        lines.append(f"  {key:27} {entry['mode']:9} {ranges}")
    lines.append("settings (scd train --set FIELD=VALUE)")
    lines += [
        f"  {name} = {value}"
        for name, value in _flatten(config)
        if not name.startswith(("model.observation_shapes", "transforms.tasks"))
    ]
    return lines


def _delays(steps: int) -> str:
    """What a policy was trained for."""
    if not steps:
        return "not trained for delays"
    return f"trained for delays of up to {steps} control step{'s' if steps > 1 else ''}"


def _converted(conversion: dict[str, Any]) -> str:
    """Where the layers of a converted policy come from."""
    parts = (f"{part} {', '.join(map(str, conversion[f'{part}_layers']))}" for part in ("encoder", "decoder"))
    return f"converted    from {conversion['source']}, layers: {'; '.join(parts)}"


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    return [pair for name, value in tree.items() for pair in _flatten(value, f"{prefix}.{name}".lstrip("."))]
