"""What an entangled model repeats while it denoises: the two regularities that separation rests on.

After Bai et al., arXiv 2602.10095, section 3, on the noisy tokens of an `EntangledModel`, which are actions or patches
of the next frame: (1) how alike the features of a layer are at different denoising steps, (2) how much attention goes
to earlier control steps, by layer and denoising step, and what a layer is worth. Whatever is denoised, the layers are
looked into where `CausalDitTransformer.layer` is called; `probe_costs.py` tells what leaving them out costs in use.

Shapes: R samples, N denoising steps, L noisy tokens, D width, S history tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from scd_robot.analysis.imagination import check_recording
from scd_robot.checkpoint import Checkpoint
from scd_robot.config import from_json
from scd_robot.datasets import EpisodeDataset, split_episodes
from scd_robot.diffusion import FlowTimeConfig, SamplerConfig
from scd_robot.errors import ConfigError
from scd_robot.model import Conditioning
from scd_robot.model.causal_dit import CausalDitTransformer, EntangledModel, PreparedHistory
from scd_robot.nn import CausalDitBlock
from scd_robot.policies import CausalDitPolicy, Imagination
from scd_robot.training import ExperimentConfig, SegmentDataset, TrainingConfig
from scd_robot.training.batches import Draws
from scd_robot.training.objective import DecoderSamples, sampled_errors, select_samples, velocity_error
from scd_robot.training.start import check_fits, fingerprint
from scd_robot.training.transformed import transformed

__all__ = [
    "SCHEMA",
    "Probed",
    "Shortcut",
    "as_seen",
    "check_entangled",
    "choose_episodes",
    "held_out_episodes",
    "middle_layers",
    "probe",
    "shortened",
]

SCHEMA = 1  # of the JSON
_QUARTERS = 4  # of an episode, by which similarity is told as well

Probed = CausalDitPolicy | Imagination
Layer = Callable[[int, Tensor, Conditioning, PreparedHistory, tuple[Tensor, Tensor]], Tensor]


@dataclass(frozen=True)
class Shortcut:
    """Layers that are not computed at every denoising step.

    Attributes:
        first: number of the first of them.
        stop: one past the last.
        full_steps: denoising steps at the beginning in which they are.
        reuse: add what they added in the last full step; else leave them out.
    """

    first: int
    stop: int
    full_steps: int
    reuse: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.stop:
            raise ConfigError(
                f"a shortcut needs layers first < stop, both at least 0, got {self.first} and {self.stop}"
            )
        if self.full_steps < int(self.reuse):
            raise ConfigError(f"full_steps must be at least {int(self.reuse)}, got {self.full_steps}")


@contextmanager
def shortened(policy: Probed, shortcut: Shortcut) -> Iterator[None]:
    """Within it whatever the policy denoises is denoised with the shortcut."""
    decoder = check_entangled(policy).decoder
    if shortcut.stop > len(decoder.blocks):
        raise ConfigError(f"the model has {len(decoder.blocks)} layers, the shortcut goes to {shortcut.stop}")
    sampler = policy.config.sampler
    full_calls = shortcut.full_steps * (sampler.num_evaluations // sampler.num_denoising_steps)
    compute, calls, before = decoder.layer, 0, torch.empty(0)
    added, denoised = before, cast(PreparedHistory | None, None)

    def layer(
        number: int,
        tokens: Tensor,
        conditioning: Conditioning,
        context: PreparedHistory,
        masks: tuple[Tensor, Tensor],
    ) -> Tensor:
        nonlocal calls, before, added, denoised
        if context is not denoised:  # each plan, and each frame, prepares its own
            denoised, calls = context, 0
        calls += number == 0
        if number == shortcut.first:
            before = tokens
        if calls > full_calls and shortcut.first <= number < shortcut.stop:
            return tokens + added if shortcut.reuse and number == shortcut.first else tokens
        tokens = compute(number, tokens, conditioning, context, masks)
        if number == shortcut.stop - 1:
            added = tokens - before
        return tokens

    with _in_place_of_layers(decoder, layer):
        yield


@contextmanager
def _in_place_of_layers(decoder: CausalDitTransformer, layer: Layer) -> Iterator[None]:
    """Within it `layer` is called in the place of the decoder's."""
    decoder.layer = layer  # type: ignore[method-assign, assignment]  # of this object, in the place of its class's
    try:
        yield
    finally:
        del decoder.layer


def check_entangled(policy: Probed) -> EntangledModel:
    """The model.

    Raises:
        ConfigError: it is not entangled.
    """
    if not isinstance(policy.model, EntangledModel):
        raise ConfigError(
            "probes look into the layers of an entangled model (scd train with model.architecture=entangled); this one "
            "is separable: its decoder never sees the history"
        )
    return policy.model


def held_out_episodes(checkpoint: Checkpoint, policy: Probed, data: EpisodeDataset) -> list[int] | None:
    """Numbers of the episodes that the training held out; None where the recording is not the training's.

    Args:
        checkpoint: that the policy is of.
        policy: the policy.
        data: as recorded.

    Raises:
        UnknownNameError, ShapeError: see `probe`.
    """
    if fingerprint(_as_seen(policy, data)) != checkpoint.origin.get("dataset"):
        return None
    training = from_json(ExperimentConfig, checkpoint.config, "config").training
    _, held_out = split_episodes(data.num_episodes, training.held_out, training.seed, data.parts)
    return held_out.tolist()


def choose_episodes(data: EpisodeDataset, known: Sequence[int] | None, most: int, least_steps: int = 1) -> list[int]:
    """Numbers of episodes, evenly spaced over those that are long enough.

    Args:
        data: recorded.
        known: numbers to choose from; none, or None = all.
        most: how many.
        least_steps: control steps that an episode must have.

    Raises:
        ConfigError: none is long enough, or `most` is out of range.
    """
    if most < 1:
        raise ConfigError(f"episodes must be at least 1, got {most}")
    candidates = np.asarray(known or range(data.num_episodes))
    long_enough = candidates[data.episode_lengths[candidates] >= least_steps]
    if not len(long_enough):
        held = "held-out episodes" if known else "episodes"
        raise ConfigError(
            f"none of the {len(candidates)} {held} has the {least_steps} control steps that context and length need "
            f"together; the longest has {data.episode_lengths[candidates].max()}: choose a smaller one, or name others "
            "with --episode"
        )
    chosen = np.linspace(0, len(long_enough) - 1, min(most, len(long_enough))).astype(np.int64)
    return [int(number) for number in long_enough[np.unique(chosen)]]


def probe(
    policy: Probed,
    data: EpisodeDataset,
    episodes: Sequence[int],
    *,
    positions: int = 16,
    num_denoising_steps: int = 16,
    flow_time: FlowTimeConfig | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures both regularities and what each layer is worth, on recorded episodes.

    Args:
        policy: entangled; a policy, or a model of frames.
        data: as recorded.
        episodes: numbers of those to look at; held-out ones say more.
        positions: control steps of each whose plans, or next frames, are looked into.
        num_denoising_steps: N, of Euler's method.
        flow_time: of the loss, best the training's; None = the default.
        seed: of noise and positions.
        progress: show a bar.

    Returns:
        Plain JSON types, described in `docs/analysis.md`.

    Raises:
        ConfigError: the model is not entangled, a number is out of range, or there is no such episode.
        UnknownNameError, ShapeError: the recording is not one for this model.
    """
    model = check_entangled(policy)
    if positions < 1 or num_denoising_steps < 2 or not len(episodes):
        raise ConfigError("positions and episodes must be at least 1, num_denoising_steps at least 2")
    for number in episodes:
        if not 0 <= number < data.num_episodes:
            raise ConfigError(f"there is no episode {number}: the recording has {data.num_episodes}, from 0 on")
    training = TrainingConfig(
        batch_size=1,
        segment_length=int(data.episode_lengths.max()),
        positions_per_segment=positions,
        flow_time=flow_time or FlowTimeConfig(),
        seed=seed,
    )
    how = replace(policy.config, sampler=SamplerConfig())  # which the default objective goes with
    experiment = ExperimentConfig("", model.config, training, how, policy.transforms.config)
    ready = _as_seen(policy, data)
    check_fits(ready, experiment)
    found = _Sums(len(model.decoder.blocks), num_denoising_steps)
    with torch.inference_mode():
        for number in tqdm(episodes, desc="probing", disable=not progress):
            batch = SegmentDataset(ready, experiment, np.array([number]), validation=True)[0]  # a seed decides it
            samples = select_samples(model, policy.normalizer, batch)
            length = int(batch.segments.step_valid.sum())
            _look(model, samples, batch.draws, length, num_denoising_steps, found)
            _leave_out(policy, samples, batch.draws, found)
    return {
        "schema": SCHEMA,
        "denoises": "frames" if model.config.decodes_frames else "actions",
        "episodes": len(episodes),
        "episode_numbers": list(episodes),
        "samples": int(found.samples),
        "layers": len(model.decoder.blocks),
        "num_denoising_steps": num_denoising_steps,
        **found.to_json(),
    }


def _as_seen(policy: Probed, data: EpisodeDataset) -> EpisodeDataset:
    """A recording as the model sees it, without observations that the training's did not have."""
    if isinstance(policy, Imagination):
        check_recording(policy, data)
    return transformed(as_seen(policy, data), policy.transforms.config)


def as_seen(policy: Probed, data: EpisodeDataset) -> EpisodeDataset:
    """A recording without observations that the training's did not have.

    Raises:
        UnknownNameError: it has none of those.
    """
    trained = list(policy.transforms.dataset.observation)
    return data.with_keys([key for key in trained if key in data.spec.observation] or trained)


class _Sums:
    """Sums over samples, which become means."""

    def __init__(self, depth: int, steps: int) -> None:
        self.samples = 0.0
        self.similarity = torch.zeros(2, depth, steps, steps, dtype=torch.float64)  # of features, of what layers add
        self.by_quarter = torch.zeros(depth, _QUARTERS, dtype=torch.float64)
        self.of_quarter = torch.zeros(_QUARTERS, dtype=torch.float64)
        self.attention = torch.zeros(depth, steps, dtype=torch.float64)
        self.error = torch.zeros(depth + 1, dtype=torch.float64)  # with a layer left out; last: with all of them
        self.tokens = 0.0

    def to_json(self) -> dict[str, Any]:
        features, added = (self.similarity / self.samples).tolist()
        quarters = [
            [float(value / count) if count else None for value, count in zip(row, self.of_quarter, strict=True)]
            for row in self.by_quarter
        ]
        loss = self.error / self.tokens
        return {
            "similarity": features,
            "similarity_of_additions": added,
            "similarity_by_quarter": quarters,
            "history_attention": (self.attention / self.samples).tolist(),
            "loss": float(loss[-1]),
            "loss_without_layer": loss[:-1].tolist(),
        }


def _look(model: EntangledModel, samples: DecoderSamples, draws: Draws, length: int, steps: int, found: _Sums) -> None:
    """Denoises from the drawn noise, as in use, and adds up similarities and attention.

    Args:
        model: the model.
        samples: of one episode.
        draws: of these samples.
        length: of the episode [control steps].
        steps: N.
        found: to which it is added.
    """
    decoder, keep = model.decoder, torch.nonzero(samples.counted)[:, 0]  # (R',) samples that are no padding
    compute = decoder.layer
    before: list[Tensor] = []
    after: list[Tensor] = []
    shares: list[Tensor] = []

    def layer(
        number: int,
        tokens: Tensor,
        conditioning: Conditioning,
        context: PreparedHistory,
        masks: tuple[Tensor, Tensor],
    ) -> Tensor:
        noisy = slice(int(context.extra is not None), None)  # behind the action that a frame follows from
        share = _share_of_history(decoder, number, tokens, conditioning, context, masks)
        out = compute(number, tokens, conditioning, context, masks)
        before.append(tokens[keep, noisy])
        after.append(out[keep, noisy])
        shares.append(share[keep, noisy].mean(1).sum())
        return out

    with _in_place_of_layers(decoder, layer):
        sampled_errors(model, samples, draws, SamplerConfig("euler", steps))
    entered, left = (torch.stack(x).unflatten(0, (steps, -1)) for x in (before, after))  # (N, layers, R', L, D)
    alike = torch.stack([_similarity(x) for x in (left, left - entered)])  # (2, layers, N, N, R')
    found.similarity += alike.sum(-1)
    found.attention += torch.stack(shares).view(steps, -1).T
    found.samples += len(keep)
    quarter = (_QUARTERS * draws.position.flatten()[keep] // length).clamp(max=_QUARTERS - 1)
    to_last = alike[0, :, :-1, -1].mean(1)  # (layers, R')
    found.by_quarter.index_add_(1, quarter, to_last.double())
    found.of_quarter.index_add_(0, quarter, torch.ones(len(quarter), dtype=torch.float64))


def _similarity(features: Tensor) -> Tensor:
    """Cosine (layers, N, N, R) between denoising steps of features (N, layers, R, L, D), the mean over tokens."""
    unit = normalize(features, dim=-1).permute(1, 2, 3, 0, 4)
    return (unit @ unit.mT).mean(2).permute(0, 2, 3, 1)


def _share_of_history(
    decoder: CausalDitTransformer,
    number: int,
    tokens: Tensor,
    conditioning: Conditioning,
    context: PreparedHistory,
    masks: tuple[Tensor, Tensor],
) -> Tensor:
    """(R, L) attention of a layer's tokens (R, L, D) on earlier control steps, the mean over heads."""
    block, history = cast(CausalDitBlock, decoder.blocks[number]), context.history
    q, k, _ = block.queries_keys_values(tokens, conditioning.blocks[number], context.rotary)
    keys = torch.cat((context.keys_values[number][0][:, :, :history], k), dim=2)
    scores = (q @ keys.transpose(-1, -2)) / q.shape[-1] ** 0.5
    weights = (scores + masks[decoder.is_local(number)]).softmax(-1)[..., :history]
    return (weights * context.own[..., :history].isinf()).sum(-1).mean(1)


def _leave_out(policy: Probed, samples: DecoderSamples, draws: Draws, found: _Sums) -> None:
    """Adds up the squared velocity errors of what is to come with each layer left out, and with all."""
    model = check_entangled(policy)
    future, depth = slice(model.config.num_past_actions, None), len(found.error) - 1
    parts = {name: getattr(samples, name) for name in ("data", "valid", "committed")}
    chunk: dict[str, Any] = {name: part if part is None else part[:, future] for name, part in parts.items()}
    samples = replace(samples, **chunk)
    draws = replace(draws, noise=draws.noise[..., future, :])
    for number in range(depth + 1):
        left_out: AbstractContextManager[None] = nullcontext()
        if number < depth:
            left_out = shortened(policy, Shortcut(number, number + 1, full_steps=0, reuse=False))
        with left_out:
            error, tokens = velocity_error(model, samples, draws)
        found.error[number] += float(error)
    found.tokens += float(tokens)


def middle_layers(depth: int) -> range:
    """Numbers of the layers that the paper's operation skips: all but the first and the last quarter."""
    edge = max(1, depth // 4)
    return range(edge, depth - edge)
