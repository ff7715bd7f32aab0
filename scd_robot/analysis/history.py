"""Whether and how a policy uses its history: START HERE at `diagnose_history`.

A policy may ignore its history, need it, or copy the past instead of acting. What is measured:

- how much its plans change when the history is cut short, shuffled, or taken from another episode, with the same noise;
- how much success that costs in closed loop, from the same start states;
- how predictable its actions are from the last one, beside the demonstrations' (`copycat`);
- how old what it attends to is, and whether the contexts of its control loop are those of training (`encoder`).

Shapes: B rows, T control steps, Ta chunk length, Da action width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.analysis.copycat import copycat
from scd_robot.analysis.encoder import attention_age, cache_parity
from scd_robot.analysis.resampling import interval_of, resampled_sums
from scd_robot.analysis.streams import Stream, StreamRecorder, plans_after
from scd_robot.errors import ConfigError
from scd_robot.normalization import is_constant
from scd_robot.policies.scd import ScdPolicy
from scd_robot.seeding import keyed_rng
from scd_robot.sim_eval import EvaluationResult, evaluate
from scd_robot.sim_eval.comparison import compare_pair
from scd_robot.types import ActionArray, Observation

__all__ = ["ALTERATIONS", "AlteredHistory", "altered", "diagnose_history"]

SCHEMA = 2
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
        windows: control steps that a history is cut to; None = 1, 4, 16, ... below those that an encoder layer
            attends to.
        demonstrations: (N, Da) actions of the demonstrations, for the copycat ratio; None = no ratio.
        demonstration_ends: (E,) of their episodes.
        first_episode: see `evaluate`; likewise `max_steps`, `num_envs`, `python`.
        max_steps: see `evaluate`.
        num_envs: see `evaluate`.
        python: see `evaluate`.
        progress: show bars.

    Returns:
        Plain JSON types, described in `docs/evaluation.md`: `schema`, `env`, `episodes`, `history_length`,
        `history_stride`, `plan_change` and `success` by kind of history (see `altered`; `own` is the untouched run,
        `control` its own history as well, but planned as the altered ones are, with other noise), `copycat`,
        `attention_age` (by layer) and `cache_parity`.

    Raises:
        ConfigError: fewer than two episodes, or no window.
        DatasetError: an episode did not begin twice from the same state.
    """
    policy, second = load(), load()
    stride = policy.architecture.history_stride
    if windows is None:
        attended = policy.spec.history_length * stride
        windows = [4**i for i in range(10) if 4**i < max(2, attended)]
    if episodes < 2 or not windows or min(windows) < 1:
        raise ConfigError(f"episodes must be at least 2 and windows at least 1, got {episodes} and {list(windows)}")
    recorder = StreamRecorder(policy)
    options: Any = {
        "first_episode": first_episode,
        "max_steps": max_steps,
        "num_envs": num_envs,
        "num_videos": 0,
        "progress": progress,
        "python": python,
    }
    own = evaluate(recorder, environment, episodes, **options)
    lengths = {record.index: record.steps for record in own.valid}
    streams = [recorder.streams[index].cut(length) for index, length in lengths.items() if length > 1]
    if len(streams) < 2:
        raise ConfigError(f"only {len(streams)} episodes of {environment} are longer than one step; evaluate more")

    def run(kind: str, window: int) -> EvaluationResult:
        return evaluate(AlteredHistory(second, kind, window, streams), environment, episodes, **options)

    control = run("own", 0)
    kinds: list[tuple[str, int]] = [("cut", window) for window in windows]
    kinds += [(kind, 0) for kind in ALTERATIONS]
    success = {"own": _counts(own), "control": _counts(control)}
    for kind, window in kinds:
        success[_label(kind, window)] = _counts(run(kind, window), window, control)
    return {
        "schema": SCHEMA,
        "env": own.environment.name,
        "episodes": episodes,
        "history_length": policy.spec.history_length,
        "history_stride": stride,
        "plan_change": _plan_changes(policy, streams, kinds),
        "success": success,
        "copycat": copycat(streams, demonstrations, demonstration_ends),
        "attention_age": attention_age(policy, streams[:_LOOKED_AT]),
        "cache_parity": cache_parity(policy, streams[:_LOOKED_AT]),
    }


def altered(
    stream: Stream,
    step: int,
    kind: str,
    window: int,
    others: Sequence[Stream],
    rng: np.random.Generator,
    stride: int = 1,
) -> Stream:
    """The history of a control step, its own observation last, with the part before it altered.

    Args:
        stream: of the episode.
        step: the control step, one in which the encoder runs.
        kind: "own", "cut" to `window` control steps, "shuffled", "reversed", or "swapped" for that of another episode.
        window: see `kind`.
        others: episodes to swap with.
        rng: of shuffles and choices.
        stride: of the model's history. So many control steps stay together, the first of them being the one that the
            encoder sees; a cut goes to the last multiple of it inside `window`.
    """
    source, before = stream, np.arange(step).reshape(-1, stride)
    if kind == "cut":
        before = before[max(0, len(before) - (window - 1) // stride) :]
    elif kind == "shuffled":
        before = rng.permutation(before)
    elif kind == "reversed":
        before = before[::-1]
    elif kind == "swapped":
        candidates = [other for other in others if other.episode != stream.episode]
        source = candidates[stream.episode % len(candidates)]  # the same one for all of an episode
        before = before[: len(source) // stride]
    picked = [(source, int(i)) for i in before.flat] + [(stream, step)]
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
    """

    def __init__(self, policy: ScdPolicy, kind: str, window: int, others: Sequence[Stream]) -> None:
        self._policy, self._kind, self._window, self._others = policy, kind, window, others
        self._num_executed = policy.spec.num_executed
        self._streams: dict[int, Stream] = {}
        self._chunks: dict[int, ActionArray] = {}

    def reset(self, rows: Sequence[int] | None = None, episodes: Sequence[int] | None = None) -> None:
        """Begins episodes."""
        numbers = list(episodes or [])
        for row, episode in zip(range(len(numbers)) if rows is None else rows, numbers, strict=True):
            self._streams[row] = Stream(episode)

    def act(self, observation: Observation, executed_action: ActionArray | None = None) -> ActionArray:
        """Plans for the rows whose plan is used up, and returns each row's next action (B, Da)."""
        if executed_action is None:
            executed_action = np.zeros((len(self._streams), self._policy.spec.action_dim), np.float32)
        for row, stream in self._streams.items():
            stream.see(row, observation, executed_action)
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
        stride = self._policy.architecture.history_stride
        return altered(stream, step, self._kind, self._window, self._others, rng, stride)

    def _keys(self, rows: Sequence[int]) -> list[int]:
        """Numbers that key the noise of plans, other ones for each plan of an episode."""
        return [1000 * self._streams[row].episode + len(self._streams[row]) for row in rows]


def _plan_changes(
    policy: ScdPolicy, streams: Sequence[Stream], kinds: Sequence[tuple[str, int]]
) -> dict[str, dict[str, Any]]:
    """Root mean square changes of plans by kind of history, in standard deviations of all plans' actions."""
    probes = _probe(policy, streams, kinds)
    if not probes:
        return {}
    actions = np.stack([plans["own"] for _, plans in probes])
    still = is_constant(actions.min(axis=(0, 1)), actions.max(axis=(0, 1)))
    scale = np.where(still, 1.0, actions.std(axis=(0, 1)))
    changes: dict[str, dict[int, list[float]]] = {}
    for episode, plans in probes:
        for label, plan in plans.items():
            square = ((plan - plans["own"]) / scale) ** 2
            changes.setdefault(label, {}).setdefault(episode, []).append(float(np.sqrt(square.mean())))
    labels = ["noise", *(_label(kind, window) for kind, window in kinds)]
    return {label: _mean_over_plans(list(changes[label].values())) for label in labels if label in changes}


def _probe(
    policy: ScdPolicy, streams: Sequence[Stream], kinds: Sequence[tuple[str, int]]
) -> list[tuple[int, dict[str, ActionArray]]]:
    """Episode numbers and plans (Ta, Da) by kind of history ("own" among them; "noise" has other noise than the rest).

    A kind is left out where it changes nothing: a cut to 64 control steps tells nothing in the 30th.
    """
    rng, executed, stride = keyed_rng(_KEY, 0), policy.spec.num_executed, policy.architecture.history_stride
    places = [(stream, step) for stream in streams for step in range(executed, len(stream), executed)]
    chosen = [places[int(i)] for i in rng.permutation(len(places))[:_PROBES]]
    probes = []
    for number, (stream, step) in enumerate(chosen):
        own = altered(stream, step, "own", 0, streams, rng, stride)
        histories = {"own": own, "noise": own}
        for kind, window in kinds:
            other = altered(stream, step, kind, window, streams, rng, stride)
            if list(map(id, other.observation)) != list(map(id, own.observation)):
                histories[_label(kind, window)] = other
        keys = [number + len(chosen) * (label == "noise") for label in histories]
        plans = plans_after(policy, list(histories.values()), keys)
        probes.append((stream.episode, dict(zip(histories, plans, strict=True))))
    return probes


def _mean_over_plans(episodes: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Of each episode's plans."""
    parts = np.array([(sum(changes), len(changes)) for changes in episodes])
    total, plans = parts.sum(axis=0)
    drawn = resampled_sums(parts)
    interval = interval_of(drawn[:, 0] / drawn[:, 1])
    return {"mean": float(total / plans), "interval": interval, "plans": int(plans), "episodes": len(episodes)}


def _label(kind: str, window: int) -> str:
    return f"cut to {window}" if kind == "cut" else kind


def _counts(result: EvaluationResult, window: int = 0, control: EvaluationResult | None = None) -> dict[str, Any]:
    """Successes of a kind, and beside those of `control` from the same start states."""
    return {
        "successes": result.successes,
        "episodes": len(result.valid),
        "rate": result.success_rate,
        "interval": list(result.interval),
        "window": window or None,
        "against_control": None if control is None else _paired(result, control),
    }


def _paired(result: EvaluationResult, control: EvaluationResult) -> dict[str, Any] | None:
    """None where no start state is valid in both."""
    if not {record.index for record in result.valid} & {record.index for record in control.valid}:
        return None
    pair = compare_pair(result.to_json(), control.to_json())
    return {
        "difference": pair.difference,
        "interval": list(pair.interval),
        "p_value": pair.p_value,
        "only_this": pair.only_a,
        "only_control": pair.only_b,
    }
