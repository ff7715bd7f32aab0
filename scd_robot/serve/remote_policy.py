"""A policy behind a server, as an object with `reset` and `act`: what evaluates a policy in process evaluates it too.

Shapes: B rows, Ta chunk length, Da action width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError, ShapeError
from scd_robot.serve.client import PolicyClient
from scd_robot.serve.endpoint import HistoryLostError, Served, weights_of
from scd_robot.types import ActionArray, Observation

__all__ = ["RemotePolicy"]


class RemotePolicy:
    """Sends every observation to a server and follows its chunks; acts as the policy itself would.

    Each row has a connection, hence a history, of its own, and all rows of a control step are sent before the first
    answer is waited for, so that the server computes them together. All its actions are of the weights that the server
    named at first, or there are none.

    Args:
        address: of a server of this project, see `PolicyClient`.
        **options: of `PolicyClient`.

    Attributes:
        spec: what the server said about its policy.
        provenance: where actions came from, as plain JSON types.
        planned: (B,) which rows the last `act` planned for; None before.
        task: in words, one of `spec.tasks`; None = the server's.

    Raises:
        ConfigError: the server does not keep histories as ours do.
        ServerUnreachableError: nobody answers there.
    """

    def __init__(self, address: str, **options: Any) -> None:
        first = PolicyClient(address, **options)
        first.weights_sha256 = first.weights_sha256 or weights_of(first.metadata)
        self._options = (address, {**options, "weights_sha256": first.weights_sha256})
        self._clients = [first]
        try:
            served = Served.of(address, first.metadata)
        except BaseException:
            first.close()
            raise
        self._served, self._names, self.spec = served, served.keys, served.spec
        self.task: str | None = None
        self.provenance = served.provenance
        self.planned: NDArray[np.bool_] | None = None
        self._episodes: list[int] | None = None  # of the rows that begin with the next observation
        self._new: dict[int, dict[str, Any]] = {}  # what goes with the next observation of rows that begin
        self._age: NDArray[np.int64] | None = None  # (B,) of each row's chunk; None = B is not known yet
        self._step = np.zeros(0, np.int64)  # (B,) control step of each row
        self._chunks = np.zeros((0, self.spec.chunk_length, self.spec.action_dim), np.float32)
        self._broken = False

    @property
    def prompt(self) -> str | None:
        """The task that the server is told, or that it has of itself; None = it has one task only."""
        return self._served.prompt(self.task)

    def reset(self, rows: Sequence[int] | None = None, episodes: Sequence[int] | None = None) -> None:
        """Begins new episodes; see `types.Policy.reset`."""
        if rows is None:
            self._begin(None if episodes is None else list(episodes))
            return
        if self._age is None:
            raise ConfigError("reset(rows=...) before the first observation: the number of rows is not known yet")
        if episodes is not None and len(episodes) != len(rows):
            raise ShapeError(f"{len(rows)} rows begin new episodes, got {len(episodes)} episode numbers")
        for index, row in enumerate(rows):
            self._new[row] = {"reset": True, "episode": None if episodes is None else int(episodes[index])}

    def act(self, observation: Observation, executed_action: ActionArray | None = None) -> ActionArray:
        """One control step: each row's observation goes to the server, with the wish for a plan where it is due.

        Args:
            observation: arrays (B, ...), all keys of `spec.observation`; None for those of `spec.optional` that did not
                come.
            executed_action: (B, Da) what was done in the last step; None = what was asked for.

        Returns:
            (B, Da).

        Raises:
            ShapeError: keys are missing, or the number of rows changed without a reset.
            ConfigError: the last control step failed, and there was no reset since.
            PolicyChangedError: the server was started again with other weights.
            HistoryLostError: it has dropped the history within an episode.
            ScdRobotError: see `PolicyClient.infer`.
        """
        rows = self._rows(observation)
        assert self._age is not None
        self._age += 1
        self._age[list(self._new)] = self.spec.num_executed
        self._step += 1
        self._step[list(self._new)] = 0
        self.planned = self._age >= self.spec.num_executed
        new, self._new = self._new, {}
        self._broken = True  # until all answers are here
        for row in range(rows):
            options: dict[str, Any] = {**new.get(row, {}), "step": int(self._step[row])}
            if executed_action is not None and row not in new:
                options["executed"] = np.asarray(executed_action[row], np.float32)
            seen = {
                self._names[key]: None if observation[key] is None else observation[key][row]
                for key in self.spec.observation
            }
            self._clients[row].send(seen, observe_only=not self.planned[row], prompt=self.prompt, **options)
        for row in range(rows):
            answer = self._clients[row].receive()
            if answer.get("scd/new_history", row in new) != (row in new):
                raise HistoryLostError(
                    f"{self._options[0]} has dropped the history of row {row}, which was silent for longer than it "
                    "keeps one (scd serve --idle-timeout-s), or was started again: reset the episode"
                )
            if self.planned[row]:
                self._chunks[row] = answer["actions"]
                self._age[row] = 0
        self._broken = False
        return self._chunks[np.arange(rows), np.minimum(self._age, self.spec.chunk_length - 1)].copy()

    def close(self) -> None:
        """Ends the connections."""
        for client in self._clients:
            client.close()

    def _begin(self, episodes: list[int] | None) -> None:
        if self._broken:  # answers may be on their way that nobody waits for any more
            self.close()
            self._clients = []
        self._broken = False
        self._episodes, self._age, self._new = episodes, None, {}

    def _rows(self, observation: Observation) -> int:
        """B; at the first observation after a reset it is fixed, and connections are made."""
        if self._broken:
            raise ConfigError("the last control step failed, and histories differ from row to row; call reset()")
        for key in self.spec.observation:
            if key not in observation:
                raise ShapeError(f"observation {key!r} is missing; got {sorted(observation)}")
        there = [observation[key] for key in self.spec.observation if observation[key] is not None]
        sizes = {len(value) if np.ndim(value) else 0 for value in there}
        if len(sizes) != 1 or not min(sizes):
            raise ShapeError(f"observations must have one batch axis of B >= 1 rows, got {sorted(sizes)}")
        rows = sizes.pop()
        if self._age is None:
            if self._episodes is not None and len(self._episodes) != rows:
                raise ShapeError(f"reset() was given {len(self._episodes)} episodes, the observation has {rows} rows")
            address, options = self._options
            for client in self._clients[rows:]:
                client.close()
            self._clients = self._clients[:rows]
            while len(self._clients) < rows:  # one by one: those that were made are closed where another cannot be
                self._clients.append(PolicyClient(address, **options))
            numbers = self._episodes
            self._new = {row: {"reset": True, "episode": numbers and numbers[row]} for row in range(rows)}
            self._age, self._step = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
            self._chunks = np.zeros((rows, self.spec.chunk_length, self.spec.action_dim), np.float32)
        elif rows != len(self._age):
            raise ShapeError(f"batch has {rows} rows, the policy runs {len(self._age)}; call reset() first")
        return rows
