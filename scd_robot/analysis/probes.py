"""What an entangled policy repeats while it denoises: the two regularities that separation rests on, and their price.

After Bai et al., arXiv 2602.10095, section 3, on the noisy action tokens of a `CausalDitModel`: (1) how alike the
features of a layer are at different denoising steps, (2) how much attention goes to earlier control steps, by layer and
denoising step, and what leaving a layer out costs.

Shapes: R samples, N denoising steps, L action tokens, D width, S history tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from scd_robot.datasets import EpisodeDataset
from scd_robot.diffusion import SamplerConfig, interpolate, sample
from scd_robot.errors import ConfigError
from scd_robot.model import CausalDitModel, Conditioning
from scd_robot.model.causal_dit import CausalDitTransformer, PreparedHistory
from scd_robot.nn import CausalDitBlock
from scd_robot.policies.causal_dit import CausalDitPolicy
from scd_robot.sim_eval import evaluate
from scd_robot.sim_eval.comparison import NON_INFERIORITY_MARGIN, compare
from scd_robot.training import ExperimentConfig, SegmentDataset, TrainingConfig
from scd_robot.training.batches import TrainingBatch
from scd_robot.training.objective import DecoderSamples, select_samples
from scd_robot.training.transformed import transformed

__all__ = ["SCHEMA", "Shortcut", "cost_of_shortcuts", "middle_layers", "probe", "shortened"]

SCHEMA = 1  # of the JSON
_QUARTERS = 4  # of an episode, by which similarity is told as well


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
def shortened(policy: CausalDitPolicy, shortcut: Shortcut) -> Iterator[None]:
    """Within it the policy makes its plans with the shortcut."""
    decoder = policy.model.decoder
    if shortcut.stop > len(decoder.blocks):
        raise ConfigError(f"the model has {len(decoder.blocks)} layers, the shortcut goes to {shortcut.stop}")
    prepare, steps, added = decoder.prepare, 0, torch.empty(0)

    def prepare_plan(context: Any) -> PreparedHistory:
        nonlocal steps
        steps = 0
        prepared: PreparedHistory = prepare(context)
        return prepared

    def velocity(
        x: Tensor, conditioning: Conditioning, context: PreparedHistory, token_valid: Tensor | None = None
    ) -> Tensor:
        nonlocal steps, added
        masks, tokens = decoder.masks(x, context, token_valid), decoder.embed_noisy(x)
        full = steps < shortcut.full_steps
        for layer in range(len(decoder.blocks)):
            if layer == shortcut.first:
                before = tokens
                if not full and shortcut.reuse:
                    tokens = tokens + added
            if full or not shortcut.first <= layer < shortcut.stop:
                tokens = decoder.layer(layer, tokens, conditioning, context, masks)
            if full and layer == shortcut.stop - 1:
                added = tokens - before
        steps += 1
        return decoder.read_out(tokens, conditioning)

    decoder.prepare, decoder.velocity = prepare_plan, velocity  # of this object, in the place of its class's
    try:
        yield
    finally:
        del decoder.prepare, decoder.velocity


def probe(
    policy: CausalDitPolicy,
    data: EpisodeDataset,
    *,
    episodes: int = 16,
    positions: int = 16,
    num_denoising_steps: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures both regularities and what each layer is worth, on recorded episodes.

    Args:
        policy: entangled.
        data: episodes, as recorded; those of the training's held-out share say more.
        episodes: how many, evenly spaced over the dataset.
        positions: control steps of each whose plans are looked into.
        num_denoising_steps: N, of Euler's method.
        seed: of noise and positions.
        progress: show a bar.

    Returns:
        Plain JSON types, described in `docs/analysis.md`.

    Raises:
        ConfigError: the policy is not entangled, or a number is out of range.
    """
    if not isinstance(policy.model, CausalDitModel):
        raise ConfigError("probes look into the layers of an entangled policy (model.architecture=entangled)")
    if min(episodes, positions) < 1 or num_denoising_steps < 2:
        raise ConfigError("episodes and positions must be at least 1, num_denoising_steps at least 2")
    depth = len(policy.model.decoder.blocks)
    found = _Sums(depth, num_denoising_steps)
    chosen = np.unique(np.linspace(0, data.num_episodes - 1, min(episodes, data.num_episodes)).astype(np.int64))
    ready = transformed(data, policy.transforms.config)
    with torch.inference_mode():
        for episode in tqdm(chosen, desc="probing", disable=not progress):
            batch = _batch(policy, ready, int(episode), positions, seed)
            _look(policy, batch, num_denoising_steps, found)
            _leave_out(policy, batch, found)
    return {
        "schema": SCHEMA,
        "episodes": len(chosen),
        "samples": int(found.samples),
        "layers": depth,
        "num_denoising_steps": num_denoising_steps,
        **found.to_json(),
    }


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


def _batch(policy: CausalDitPolicy, data: EpisodeDataset, episode: int, positions: int, seed: int) -> TrainingBatch:
    """One episode with its draws, which a seed decides."""
    length = int(data.episode_lengths[episode])
    training = TrainingConfig(batch_size=1, segment_length=length, positions_per_segment=positions, seed=seed)
    how = replace(policy.config, sampler=SamplerConfig())
    experiment = ExperimentConfig("", policy.model.config, training, how, policy.transforms.config)
    return SegmentDataset(data, experiment, np.array([episode]), validation=True)[0]


def _counted(samples: DecoderSamples) -> Tensor:
    """Numbers (R',) of the samples that are no padding."""
    return torch.nonzero(samples.counted)[:, 0]


def _look(policy: CausalDitPolicy, batch: TrainingBatch, steps: int, found: _Sums) -> None:
    """Denoises chunks and adds up similarities and attention."""
    model, decoder = policy.model, policy.model.decoder
    samples = select_samples(model, policy.normalizer, batch)
    keep, sampler = _counted(samples), SamplerConfig("euler", steps)
    context, past = decoder.prepare(samples.context), model.config.num_past_actions
    conditioning, features, added, attention = model.conditioning(sampler), [], [], []

    def velocity(x: Tensor, time: float) -> Tensor:
        trace = list(_layers(decoder, x, conditioning[time], context))
        tokens = torch.stack([tokens[keep] for tokens, _ in trace])  # (1 + layers, R', L, D)
        features.append(tokens[1:])
        added.append(tokens[1:] - tokens[:-1])
        attention.append(torch.stack([share[keep].sum() for _, share in trace[1:]]))
        return decoder.read_out(trace[-1][0], conditioning[time])

    sample(velocity, batch.draws.noise.flatten(0, 2)[:, past:], sampler)
    alike = torch.stack([_similarity(torch.stack(parts)) for parts in (features, added)])  # (2, layers, N, N, R')
    found.similarity += alike.sum(-1)
    found.attention += torch.stack(attention, dim=1)
    found.samples += len(keep)
    length = batch.segments.step_valid.sum(1)
    quarter = (_QUARTERS * batch.draws.position.flatten()[keep] // length).clamp(max=_QUARTERS - 1)
    to_last = alike[0, :, :-1, -1].mean(1)  # (layers, R')
    found.by_quarter.index_add_(1, quarter, to_last.double())
    found.of_quarter.index_add_(0, quarter, torch.ones(len(quarter), dtype=torch.float64))


def _similarity(features: Tensor) -> Tensor:
    """Cosine (layers, N, N, R) between denoising steps of features (N, layers, R, L, D), the mean over tokens."""
    features = features.transpose(0, 1)
    return cosine_similarity(features[:, :, None], features[:, None], dim=-1).mean(-1)


def _layers(
    decoder: CausalDitTransformer, x: Tensor, conditioning: Conditioning, context: PreparedHistory
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens (R, L, D) before the first layer and after each, and how much of it (R,) attended to earlier steps."""
    masks, tokens = decoder.masks(x, context, None), decoder.embed_noisy(x)
    yield tokens, tokens.new_zeros(len(tokens))
    for layer, block in enumerate(decoder.blocks):
        assert isinstance(block, CausalDitBlock)
        share = _share_of_history(
            block, tokens, conditioning.blocks[layer], context, layer, masks[decoder.is_local(layer)]
        )
        tokens = decoder.layer(layer, tokens, conditioning, context, masks)
        yield tokens, share


def _share_of_history(
    block: CausalDitBlock,
    tokens: Tensor,
    modulation: tuple[Tensor, ...],
    context: PreparedHistory,
    layer: int,
    mask: Tensor,
) -> Tensor:
    """(R,) attention of noisy tokens on earlier control steps, the mean over heads and tokens."""
    history = context.history
    q, k, _ = block.queries_keys_values(tokens, modulation, context.rotary)
    keys = torch.cat((context.keys_values[layer][0][:, :, :history], k), dim=2)
    scores = (q @ keys.transpose(-1, -2)) / q.shape[-1] ** 0.5
    weights = (scores + mask).softmax(-1)[..., :history]
    return (weights * context.own[..., :history].isinf()).sum(-1).mean((1, 2))


def _leave_out(policy: CausalDitPolicy, batch: TrainingBatch, found: _Sums) -> None:
    """Adds up the squared velocity errors of the chunk's tokens with each layer left out, and with all."""
    model, decoder = policy.model, policy.model.decoder
    samples = select_samples(model, policy.normalizer, batch)
    past = model.config.num_past_actions
    flow_time = batch.draws.flow_time.flatten()[:, None]
    path = interpolate(batch.draws.noise.flatten(0, 2)[:, past:], samples.data[:, past:], flow_time)
    context, conditioning = decoder.prepare(samples.context), decoder.condition(flow_time)
    assert samples.valid is not None
    counted = samples.valid[:, past:] & samples.counted[:, None]
    for left_out in range(len(decoder.blocks) + 1):
        masks, tokens = decoder.masks(path.x_t, context, None), decoder.embed_noisy(path.x_t)
        for layer in range(len(decoder.blocks)):
            if layer != left_out:
                tokens = decoder.layer(layer, tokens, conditioning, context, masks)
        error = (decoder.read_out(tokens, conditioning) - path.velocity).square().mean(-1)
        found.error[left_out] += float(error[counted].sum())
    found.tokens += float(counted.sum())


def middle_layers(depth: int) -> range:
    """Numbers of the layers that the paper's operation skips: all but the first and the last quarter."""
    edge = max(1, depth // 4)
    return range(edge, depth - edge)


def cost_of_shortcuts(
    policy: CausalDitPolicy,
    environment: str,
    episodes: int,
    shortcuts: Sequence[Shortcut],
    *,
    python: str | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Success in closed loop with each shortcut, from the same start states as without.

    Args:
        policy: entangled.
        environment: name.
        episodes: of each run.
        shortcuts: to try.
        python: see `evaluate`.
        progress: show bars.

    Returns:
        For all layers (`shortcut` None) and each shortcut: `shortcut`, `successes`, `episodes` (valid ones), `rate`,
        `interval` (Wilson 95 %), `plan_ms` (p50), and against all layers `difference`, `difference_interval` (paired
        Newcombe 95 %) and `non_inferior`.
    """
    whole = evaluate(policy, environment, episodes, num_videos=0, progress=progress, python=python).to_json()
    rows = [_row(whole, None, whole)]
    for shortcut in shortcuts:
        with shortened(policy, shortcut):
            result = evaluate(policy, environment, episodes, num_videos=0, progress=progress, python=python).to_json()
        rows.append(_row(result, shortcut, whole))
    return rows


def _row(result: dict[str, Any], shortcut: Shortcut | None, whole: dict[str, Any]) -> dict[str, Any]:
    against = None if shortcut is None else compare([result], [whole], "shortcut", "all layers")
    return {
        "shortcut": None if shortcut is None else asdict(shortcut),
        "successes": result["successes"],
        "episodes": result["episodes"] - result["invalid"],
        "rate": result["success_rate"],
        "interval": result["interval"],
        "plan_ms": result["plan_ms"] and result["plan_ms"]["p50"],
        "difference": against and against.difference,
        "difference_interval": against and list(against.interval),
        "non_inferior": against and against.interval[0] > -NON_INFERIORITY_MARGIN,
    }
