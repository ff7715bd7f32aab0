"""Whether and how a policy uses its history: START HERE at `diagnose_history`.

A policy may ignore its history, need it, or copy the past instead of acting. What is measured:

- how much its plans change when the history is cut short, shuffled, or taken from another episode, with the same noise;
- how much success that costs in closed loop;
- how predictable its actions are from the last one, beside the demonstrations' (the copycat ratio, arXiv 2505.09561);
- how old what it attends to is;
- whether contexts from the cache equal those of one pass over the whole episode, as in training.

Shapes: T control steps, Ta chunk length, Da action width, W history length.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scd_robot.analysis.streams import Stream, StreamRecorder, plans_after
from scd_robot.errors import ConfigError
from scd_robot.nn import window_mask
from scd_robot.policies.scd import ScdPolicy
from scd_robot.seeding import keyed_rng
from scd_robot.sim_eval import evaluate
from scd_robot.types import ActionArray, Observation

__all__ = ["ALTERATIONS", "AlteredHistory", "altered", "attention_age", "cache_parity", "copycat", "diagnose_history"]

SCHEMA = 1
ALTERATIONS = ("shuffled", "reversed", "swapped")
_KEY = 4711  # of shuffles
_PROBES = 60  # plans that are compared
_BATCH = 16
_LOOKED_AT = 5  # episodes whose attention and contexts are looked at


def diagnose_history(
    load: Callable[[], ScdPolicy],
    environment: str,
    episodes: int = 20,
    *,
    windows: Sequence[int] | None = None,
    demonstrations: NDArray[np.float32] | None = None,
    demonstration_ends: NDArray[np.int64] | None = None,
    first_episode: int = 0,
    max_steps: int | None = None,
    num_envs: int | None = None,
    python: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs a policy, then again with histories that are not its own.

    Args:
        load: loads the policy; called twice.
        environment: name.
        episodes: of each closed-loop run, from the start states of `scd eval`.
        windows: control steps that a history is cut to; None = 1, 4, 16, ... below the model's history length.
        demonstrations: (N, Da) actions of the demonstrations, for the copycat ratio; None = no ratio.
        demonstration_ends: (E,) of their episodes.
        first_episode: see `evaluate`; likewise `max_steps`, `num_envs`, `python`.
        max_steps: see `evaluate`.
        num_envs: see `evaluate`.
        python: see `evaluate`.
        progress: show bars.

    Returns:
        Plain JSON types: `schema`, `env`, `episodes`, `history_length`, `plan_change` (by kind of history: mean over
        plans of the root mean square change, in standard deviations of the actions; `noise` is the change that other
        noise makes), `success` (by kind, counts and Wilson intervals; `own` is the untouched one, `control` its own
        history as well, but planned as the altered ones are, with other noise), `copycat`, and `attention_age` (by
        layer) and `cache_parity`, both None for models that read past actions.

    Raises:
        ConfigError: fewer than two episodes, no window, or a model with a history stride.
    """
    policy, second = load(), load()
    if windows is None:
        windows = [4**i for i in range(10) if 4**i < max(2, policy.spec.history_length)]
    if episodes < 2 or not windows or min(windows) < 1:
        raise ConfigError(f"episodes must be at least 2 and windows at least 1, got {episodes} and {list(windows)}")
    if policy.model.config.history_stride != 1:
        raise ConfigError("the history of a model with a history stride cannot be diagnosed")
    reads_past = policy.model.config.past_action_input != "none"
    recorder = StreamRecorder(policy)
    options: Any = {
        "first_episode": first_episode,
        "max_steps": max_steps,
        "num_envs": num_envs,
        "num_videos": 0,
        "progress": progress,
        "python": python,
    }
    results = {"own": evaluate(recorder, environment, episodes, **options)}
    lengths = {record.index: record.steps for record in results["own"].valid}
    streams = [recorder.streams[index].cut(length) for index, length in lengths.items() if length > 1]
    if len(streams) < 2:
        raise ConfigError(f"only {len(streams)} episodes of {environment} are longer than one step; evaluate more")
    kinds: list[tuple[str, int]] = [("cut", window) for window in windows]
    kinds += [(kind, 0) for kind in ALTERATIONS]
    for kind, window in [("own", 0), *kinds]:
        changed = AlteredHistory(second, kind, window, streams, policy.spec.num_executed)
        label = "control" if kind == "own" else _label(kind, window)
        results[label] = evaluate(changed, environment, episodes, **options)
    return {
        "schema": SCHEMA,
        "env": results["own"].environment.name,
        "episodes": episodes,
        "history_length": policy.spec.history_length,
        "plan_change": _plan_changes(policy, streams, kinds),
        "success": {name: _counts(result) for name, result in results.items()},
        "copycat": copycat(streams, demonstrations, demonstration_ends),
        "attention_age": None if reads_past else attention_age(policy, streams[:_LOOKED_AT]),
        "cache_parity": None if reads_past else max(cache_parity(policy, stream) for stream in streams[:_LOOKED_AT]),
    }


def altered(
    stream: Stream, step: int, kind: str, window: int, others: Sequence[Stream], rng: np.random.Generator
) -> Stream:
    """The history of a control step, its own observation last, with the part before it altered.

    Args:
        stream: of the episode.
        step: the control step.
        kind: "own", "cut" to `window` control steps, "shuffled", "reversed", or "swapped" for that of another episode.
        window: see `kind`.
        others: episodes to swap with.
        rng: of shuffles and choices.
    """
    source, before = stream, np.arange(step)
    if kind == "cut":
        before = before[max(0, step + 1 - window) :]
    elif kind == "shuffled":
        before = rng.permutation(before)
    elif kind == "reversed":
        before = before[::-1]
    elif kind == "swapped":
        candidates = [other for other in others if other.episode != stream.episode]
        source = candidates[stream.episode % len(candidates)]  # the same one for all of an episode
        before = before[: len(source)]
    picked = [(source, int(i)) for i in before] + [(stream, step)]
    return Stream(
        stream.episode,
        [part.observation[i] for part, i in picked],
        [part.action[i] for part, i in picked if i < len(part.action)],
        [part.executed[i] for part, i in picked],
    )


class AlteredHistory:
    """A policy that plans after a history that is not its own, and acts as usual otherwise.

    Args:
        policy: makes the plans; is reset all the time.
        kind: see `altered`.
        window: see `altered`.
        others: episodes to swap with.
        num_executed: actions taken from one plan before the next.
    """

    def __init__(self, policy: ScdPolicy, kind: str, window: int, others: Sequence[Stream], num_executed: int) -> None:
        self._policy, self._kind, self._window = policy, kind, window
        self._others, self._num_executed = others, num_executed
        self._streams: dict[int, Stream] = {}
        self._chunks: dict[int, ActionArray] = {}

    def reset(self, rows: Sequence[int] | None = None, episodes: Sequence[int] | None = None) -> None:
        """Begins episodes."""
        numbers = list(episodes or [])
        for row, episode in zip(range(len(numbers)) if rows is None else rows, numbers, strict=True):
            self._streams[row] = Stream(episode)

    def act(self, observation: Observation, executed_action: ActionArray | None = None) -> ActionArray:
        """Plans for the rows whose plan is used up, and returns each row's next action (B, Da)."""
        for row, stream in self._streams.items():
            stream.observation.append({key: np.array(value[row]) for key, value in observation.items()})
            zeros = np.zeros(self._policy.spec.action_dim, np.float32)
            stream.executed.append(zeros if executed_action is None else executed_action[row].copy())
        due = [row for row, stream in self._streams.items() if (len(stream) - 1) % self._num_executed == 0]
        for start in range(0, len(due), _BATCH):
            rows = due[start : start + _BATCH]
            plans = plans_after(self._policy, [self._history(row) for row in rows], self._keys(rows))
            self._chunks.update(zip(rows, plans, strict=True))
        steps = {row: (len(stream) - 1) % self._num_executed for row, stream in self._streams.items()}
        return np.stack([self._chunks[row][steps[row]] for row in sorted(self._streams)])

    def _history(self, row: int) -> Stream:
        stream = self._streams[row]
        step = len(stream) - 1
        rng = keyed_rng(_KEY, stream.episode, step)
        return altered(stream, step, self._kind, self._window, self._others, rng)

    def _keys(self, rows: Sequence[int]) -> list[int]:
        """Numbers that key the noise of plans, other ones for each plan of an episode."""
        return [1000 * self._streams[row].episode + len(self._streams[row]) for row in rows]


def _plan_changes(policy: ScdPolicy, streams: Sequence[Stream], kinds: Sequence[tuple[str, int]]) -> dict[str, float]:
    """Mean root mean square change of plans by kind of history, in standard deviations of all plans' actions."""
    rng = keyed_rng(_KEY, 0)
    places = [(stream, step) for stream in streams for step in range(4, len(stream), policy.spec.num_executed)]
    chosen = [places[int(i)] for i in rng.permutation(len(places))[:_PROBES]]
    changes: dict[str, list[NDArray[np.float32]]] = {}
    own = []
    for number, (stream, step) in enumerate(chosen):
        labels = ["own", "noise", *(_label(kind, window) for kind, window in kinds)]
        histories = [altered(stream, step, "own", 0, streams, rng)] * 2
        histories += [altered(stream, step, kind, window, streams, rng) for kind, window in kinds]
        plans = plans_after(policy, histories, [number, number + len(chosen), *([number] * len(kinds))])
        own.append(plans[0])
        for label, plan in zip(labels[1:], plans[1:], strict=True):
            changes.setdefault(label, []).append(plan - plans[0])
    if not own:
        return {}
    scale = np.stack(own).std(axis=(0, 1))
    scale = np.where(scale > 0, scale, 1.0)
    return {
        label: float(np.mean([np.sqrt(((change / scale) ** 2).mean()) for change in values]))
        for label, values in changes.items()
    }


def copycat(
    streams: Sequence[Stream],
    demonstrations: NDArray[np.float32] | None = None,
    demonstration_ends: NDArray[np.int64] | None = None,
) -> dict[str, float | None]:
    """How well the last action predicts the next, linearly: unexplained share of the variance.

    Returns:
        `policy`, `demonstrations` (None without), and `ratio`, the first over the second: far below 1 the policy
        repeats itself where the demonstrator did not.
    """
    actions = np.concatenate([np.stack(stream.action) for stream in streams])
    ends = np.cumsum([len(stream.action) for stream in streams])
    own = _unexplained(actions, ends)
    expert = None
    if demonstrations is not None and demonstration_ends is not None:
        expert = _unexplained(demonstrations, demonstration_ends)
    return {"policy": own, "demonstrations": expert, "ratio": own / expert if own is not None and expert else None}


def _unexplained(actions: NDArray[np.float32], ends: NDArray[np.int64]) -> float | None:
    inside = np.ones(len(actions), bool)
    inside[0] = False
    inside[ends[:-1]] = False
    now, last = actions[inside].astype(np.float64), actions[np.flatnonzero(inside) - 1].astype(np.float64)
    moving = now.std(axis=0) > 0
    if len(now) < 3 or not moving.any():
        return None
    design = np.concatenate([last, np.ones((len(last), 1))], axis=1)
    rest = now - design @ np.linalg.lstsq(design, now, rcond=None)[0]
    return float((rest[:, moving].var(axis=0) / now[:, moving].var(axis=0)).mean())


def attention_age(policy: ScdPolicy, streams: Sequence[Stream]) -> list[dict[str, Any]]:
    """How old what the last context token attends to is, by layer, over the second halves of episodes.

    With a memory gate the present has weight 1 and the past tanh(gate), as in `nn.attention.attend`.

    Returns:
        For each layer `present` (share of attention on the control step itself), `mean_age` of the rest [control
        steps], and `by_age`: shares at ages 1, 2-3, 4-7, 8-15, ... (by their first age).
    """
    shares: list[list[torch.Tensor]] = [[] for _ in policy.model.encoder.blocks]
    ages = []
    for stream in streams:
        ages.append(_attended(policy, stream, shares))
    age = torch.cat(ages)
    return [_ages(torch.cat(layer), age) for layer in shares]


def _attended(policy: ScdPolicy, stream: Stream, shares: list[list[torch.Tensor]]) -> torch.Tensor:
    """Adds to `shares` of each layer those (n * T,) of attention of an episode; returns their ages (n * T,)."""
    model = policy.model
    tokens = _tokens(policy, stream)
    steps, group = tokens.shape[1:3]
    mask, own = window_mask(steps, group, model.config.history_length, device=tokens.device)
    encoder = model.encoder
    positions = torch.arange(steps, device=tokens.device)
    rotary = encoder.rotary(positions.repeat_interleave(group)[None], tokens.dtype)
    x = tokens.flatten(1, 2)
    age = positions[:, None] - positions[None, :]
    with torch.inference_mode():
        for layer, block in enumerate(encoder.blocks):
            q, k, _ = block._project(x, rotary)  # type: ignore[operator,union-attr]
            scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
            weights = _weights(scores, mask, own, block.memory_gate).mean(dim=(0, 1))  # type: ignore[arg-type]
            last = weights[group - 1 :: group]  # of each control step's last token
            shares[layer].append(last.unflatten(-1, (steps, group)).sum(-1)[steps // 2 :].flatten())
            x = block(x, rotary, mask, own)
    return age[steps // 2 :].flatten()


def _weights(scores: torch.Tensor, mask: torch.Tensor, own: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """(B, N, L, L) that sum to 1 over the last axis."""
    if gate is None:
        return scores.masked_fill(~mask, -torch.inf).softmax(-1)
    present = scores.masked_fill(~(mask & own), -torch.inf).softmax(-1)
    past = scores.masked_fill(~(mask & ~own), -torch.inf).softmax(-1).nan_to_num(0.0)
    weights = present + torch.tanh(gate).abs()[:, None, None] * past
    return weights / weights.sum(-1, keepdim=True)


def _ages(shares: torch.Tensor, age: torch.Tensor) -> dict[str, Any]:
    """Of shares of attention (n,) at ages (n,)."""
    total = float(shares[age >= 0].sum())
    by_age, first = {}, 1
    while first <= int(age.max()):
        by_age[str(first)] = float(shares[(age >= first) & (age < 2 * first)].sum()) / total
        first *= 2
    past = shares[age > 0]
    weight = float(past.sum())
    mean = float((past * age[age > 0]).sum() / weight) if weight > 0 else None
    return {"present": float(shares[age == 0].sum()) / total, "mean_age": mean, "by_age": by_age}


def cache_parity(policy: ScdPolicy, stream: Stream) -> float:
    """Largest difference between contexts from the cache and of one pass over the episode, as in training."""
    model = policy.model
    tokens = _tokens(policy, stream)
    with torch.inference_mode():
        whole = model.encoder(tokens)
        cache = model.new_cache(1)
        steps = [model.encoder.step(tokens[:, i], cache) for i in range(tokens.shape[1])]
    return float((torch.stack(steps, dim=1) - whole).abs().max())


def _tokens(policy: ScdPolicy, stream: Stream) -> torch.Tensor:
    """(1, T, P, D) tokens of an episode."""
    config = policy.model.config
    assert config.past_action_input == "none", "these models have no tokens without past actions"
    observed = {key: np.stack([step[key] for step in stream.observation])[None] for key in stream.observation[0]}
    converted = policy.transforms.observation(observed)
    with torch.inference_mode():
        normalised = {
            key: policy.normalizer.normalize(key, torch.as_tensor(converted[key], device=policy.device))
            for key in config.observation_shapes
        }
        tokens, _ = policy.model.tokenizer(normalised, None, None, None)
    return tokens


def _label(kind: str, window: int) -> str:
    return f"cut to {window}" if kind == "cut" else kind


def _counts(result: Any) -> dict[str, Any]:
    return {
        "successes": result.successes,
        "episodes": len(result.valid),
        "rate": result.success_rate,
        "interval": list(result.interval),
    }
