"""What the encoder makes of recorded episodes, by the code that training encodes its segments with.

Shapes: T control steps of an episode, T' of them in which the encoder runs (each `history_stride`-th), P tokens per
control step, L = T' * P, K context tokens, D width.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from scd_robot.analysis.streams import Stream
from scd_robot.datasets import ACTION, EXECUTED_ACTION, EpisodeDataset
from scd_robot.model import ScdModel
from scd_robot.nn import CausalBlock
from scd_robot.policies.scd import ScdPolicy
from scd_robot.training import ExperimentConfig, SegmentDataset, TrainingConfig
from scd_robot.training.objective import encode_batch
from scd_robot.transforms import TASK

__all__ = ["attention_age", "cache_parity", "contexts_of_training"]


def contexts_of_training(policy: ScdPolicy, stream: Stream) -> Tensor:
    """Contexts (T', K, D) of an episode, as training computes them: teacher forcing, in one pass over all of it.

    The episode becomes a dataset, which `SegmentDataset` reads and `encode_batch` normalises and encodes.
    """
    model, transforms = policy.model.config, policy.transforms
    seen = {
        key: np.stack([{**policy.instructions.goal, **step}[source] for step in stream.observation])
        for key, source in transforms.sources.items()
        if key in model.observation_shapes
    }
    observation = {key: transforms.convert(key, values) for key, values in seen.items()}
    if transforms.config.tasks:
        observation[TASK] = np.tile(policy.task_vector(), (len(stream), 1))
    executed = [*stream.executed[1:], stream.action[-1]]  # in each control step; nothing reads the last one
    actions = {ACTION: stream.action, EXECUTED_ACTION: executed}
    arrays = observation | {key: transforms.action(np.stack(values)) for key, values in actions.items()}
    data = EpisodeDataset(transforms.spec, np.array([len(stream)]), arrays)
    training = TrainingConfig(batch_size=1, segment_length=len(stream))
    experiment = ExperimentConfig("", model, training, policy.config, transforms.config)
    batch = SegmentDataset(data, experiment, np.arange(1), validation=True)[0]
    segments = replace(
        batch.segments,
        observation={key: value.to(policy.device) for key, value in batch.segments.observation.items()},
        past_action=batch.segments.past_action.to(policy.device),
    )
    draws = replace(batch.draws, stream=batch.draws.stream.to(policy.device))
    with torch.inference_mode():
        return encode_batch(policy.model, policy.normalizer, replace(batch, segments=segments, draws=draws))[0]


def cache_parity(policy: ScdPolicy, streams: Sequence[Stream]) -> dict[str, float]:
    """How far the contexts that a policy had in its control loop are from those of training.

    The first come from observations in the recording's units, one by one, through everything the policy does with them
    (transforms, normalisation, cache, past actions, history stride, resets of rows); the second from
    `contexts_of_training`.

    Args:
        policy: as it ran.
        streams: of `StreamRecorder`.

    Returns:
        `max_difference` over all numbers of all contexts, and for scale `standard_deviation`: that of a number of the
        context over control steps (root of the mean variance).
    """
    stride = policy.model.config.history_stride
    trained = [contexts_of_training(policy, stream).cpu() for stream in streams]
    looped = [torch.from_numpy(np.stack(stream.context[::stride])) for stream in streams]
    together = torch.cat(trained)
    return {
        "max_difference": float((torch.cat(looped) - together).abs().max()),
        "standard_deviation": float(together.var(dim=0, correction=0).mean().sqrt()),
    }


def attention_age(policy: ScdPolicy, streams: Sequence[Stream]) -> list[dict[str, Any]]:
    """How old what the last context token attends to is, by layer, over the second halves of episodes.

    With a memory gate the present has weight 1 and the past that of tanh(gate), as in `nn.attention.attend`.

    Returns:
        For each layer of the encoder (the entangled architecture has none) `present` (share of attention on the control
        step itself), `mean_age` of the rest [control steps], and `by_age`: shares at ages 1, 2-3, 4-7, 8-15, ... (by
        their first age).
    """
    if not isinstance(policy.model, ScdModel):
        return []
    blocks = cast(Sequence[CausalBlock], policy.model.encoder.blocks)
    shares: list[list[Tensor]] = [[] for _ in blocks]
    ages = []
    for stream in streams:
        with ExitStack() as hooks:
            for block, found in zip(blocks, shares, strict=True):
                hooks.enter_context(block.register_forward_pre_hook(partial(_note_shares, found)))
            step = torch.arange(len(contexts_of_training(policy, stream)))
        ages.append((step[:, None] - step)[len(step) // 2 :].flatten() * policy.model.config.history_stride)
    age = torch.cat(ages)
    return [_by_age(torch.cat(found), age) for found in shares]


def _note_shares(found: list[Tensor], block: CausalBlock, inputs: tuple[Any, ...]) -> None:
    """Adds to `found` the attention (n * T',) of the last n control steps' last tokens to all control steps."""
    x, rotary, mask, own, slots = inputs
    length, group = x.shape[1], int(own[0, 0, 0].sum())
    steps = torch.arange((length - slots) // group, device=x.device)
    behind = slots // len(steps)  # context slots that only read stand behind the history, those of each step together
    step = torch.cat((steps.repeat_interleave(group), steps.repeat_interleave(behind)))
    q, k, _ = block.queries_keys_values(x, rotary, block.modulate(length, slots))
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    weights = _weights(scores, mask, own, block.memory_gate).mean(dim=(0, 1))  # (L, L)
    last = weights[length - slots + behind - 1 :: behind] if slots else weights[group - 1 :: group]
    by_step = last.new_zeros(len(steps), len(steps)).index_add_(1, step, last)
    found.append(by_step[len(steps) // 2 :].flatten().cpu())


def _weights(scores: Tensor, mask: Tensor, own: Tensor, gate: Tensor | None) -> Tensor:
    """(B, N, L, L) that sum to 1 over the last axis."""
    if gate is None:
        return scores.masked_fill(~mask, -torch.inf).softmax(-1)
    present = scores.masked_fill(~(mask & own), -torch.inf).softmax(-1)
    past = scores.masked_fill(~(mask & ~own), -torch.inf).softmax(-1).nan_to_num(0.0)
    weights = present + torch.tanh(gate).abs()[:, None, None] * past
    return weights / weights.sum(-1, keepdim=True)


def _by_age(shares: Tensor, age: Tensor) -> dict[str, Any]:
    """Of shares of attention (n,) at ages (n,)."""
    total = float(shares.sum())
    by_age, first = {}, 1
    while first <= int(age.max()):
        by_age[str(first)] = float(shares[(age >= first) & (age < 2 * first)].sum()) / total
        first *= 2
    past = shares[age > 0]
    weight = float(past.sum())
    mean = float((past * age[age > 0]).sum() / weight) if weight > 0 else None
    return {"present": float(shares[age == 0].sum()) / total, "mean_age": mean, "by_age": by_age}
