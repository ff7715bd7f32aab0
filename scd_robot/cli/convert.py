"""The verb `scd convert-policy`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from scd_robot.datasets.formats import ReadOptions

__all__ = ["convert_policy"]


def convert_policy(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    dataset: list[str],
    out: Path,
    read: Annotated[ReadOptions, tyro.conf.arg(name="")] = ReadOptions(),  # noqa: B008 - frozen
    encoder_layers: str,
    decoder_layers: str = "first:1,last:1",
    num_context_tokens: int = 1,
    fusion: Literal["concat", "prefix"] = "prefix",
    max_steps: int | None = None,
    seed: int | None = None,
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = (),
    env: str | None = None,
    episodes: int = 100,
    env_python: str | None = None,
    rounds: int = 50,
    accelerator: str = "auto",
    threads: int | None = None,
    json: Path | None = None,
) -> None:
    """Makes a separable policy of an entangled one: copies layers, fine-tunes briefly, compares both.

    OUT becomes a training run (OUT/checkpoints), with the weights before fine-tuning in OUT/converted and all numbers
    in OUT/conversion.json. Layers are written like 0:5 (0 to 4), first:1,last:1 or 0,3; some may be in both.

    Args:
        checkpoint: a checkpoint's folder, or a training run's (its newest checkpoint), of an entangled policy
            (--set model.architecture=entangled).
        dataset: recorded episodes to fine-tune on, best those of the source, read as for its training; several datasets
            are mixed.
        out: folder of the new run.
        read: what to read of the datasets.
        encoder_layers: layers of the source that become the encoder, which runs once per control step.
        decoder_layers: those that become the decoder, which runs once per denoising step.
        num_context_tokens: context tokens of a plan; each begins as the query of a part of the chunk.
        fusion: how the decoder reads them: "concat" in one sequence with the noisy tokens, "prefix" once per plan.
        max_steps: updates of the fine-tuning; by default 30 % of the source's, which take about 15 % of
            its computing.
        seed: of the fine-tuning; by default the source's. Another one also holds out other episodes, which the source
            has seen.
        settings: settings that replace the source's, as FIELD=VALUE: training.learning_rate=3e-4 ...; of the model only
            model.context_corruption.
        env: environment in which the success of both is compared.
        episodes: of each there.
        env_python: interpreter of another environment in which the simulator runs.
        rounds: planning ticks whose latency is measured, in turns.
        accelerator: Lightning's: auto, cpu, gpu.
        threads: CPU threads; by default all cores, at most 8.
        json: write the numbers to this file too ("-": standard output).
    """
    from scd_robot.analysis.conversion import convert_policy as convert
    from scd_robot.analysis.conversion import format_conversion, plan_conversion
    from scd_robot.cli.threads import use_training_threads
    from scd_robot.cli.train import open_datasets
    from scd_robot.output import check_target, write_json
    from scd_robot.presets import with_settings

    if json is not None:
        check_target(json)
    conversion = plan_conversion(
        checkpoint,
        encoder_layers,
        decoder_layers,
        num_context_tokens=num_context_tokens,
        fusion=fusion,
        max_steps=max_steps,
        seed=seed,
    )
    conversion = conversion.with_experiment(with_settings(conversion.experiment, settings))
    data = open_datasets(dataset, None, read)
    use_training_threads(threads)
    quiet = str(json) == "-"
    document = convert(
        conversion,
        data,
        out,
        environment=env,
        episodes=episodes,
        env_python=env_python,
        rounds=rounds,
        accelerator=accelerator,
        progress=not quiet,
    )
    if not quiet:
        print(format_conversion(document))
        print(f"policy: {document['checkpoint']}; numbers: {out / 'conversion.json'}")
    if json is not None:
        write_json(json, document)
