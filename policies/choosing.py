"""A policy that imagines what each of several chunks leads to, and follows the best.

In every control step the action policy and the model of frames each read one step into their history. When a plan is
due, N chunks are denoised from one context with different noise, a model of frames imagines from one history what the
camera would show after each of their actions, and a score that the user gives says which is followed.

Shapes: B rows, n rows that plan, N candidates, Ta chunk length, Tf frames imagined, Da action width, H W C picture.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scd_robot.errors import ConfigError, ShapeError
from scd_robot.policies.chunked import ChunkPolicy
from scd_robot.policies.frame_stream import FrameStream
from scd_robot.policies.imagination import Imagination
from scd_robot.types import ActionArray, ArraySpec, Observation

__all__ = ["ChoosingPolicy", "GoalPicture", "Score"]

Frames = NDArray[np.uint8]
Score = Callable[[Frames, ActionArray], ArrayLike]
"""Of frames (N, Tf, H, W, C) uint8 imagined of one row, as the model of frames sees pictures, and the chunks (N, Ta,
Da) they are of, as recorded; it gives (N,) numbers, of which higher is better."""


class GoalPicture:
    """A `Score`: how near the last imagined frame is to a picture of the goal.

    It is the negative mean over pixels and channels of the squared difference [grey levels²].

    Args:
        picture: (H, W, C) uint8, as the model of frames sees it, see `Imagination.pictures`.
    """

    def __init__(self, picture: Frames) -> None:
        self.picture = picture

    def __call__(self, frames: Frames, chunks: ActionArray) -> NDArray[np.float64]:
        """(N,) of frames (N, Tf, H, W, C); the chunks are not looked at."""
        difference = frames[:, -1].astype(np.float64) - self.picture
        return -np.square(difference).mean(axis=(1, 2, 3))


class ChoosingPolicy:
    """Samples `num_candidates` chunks for each plan and follows the one whose imagined frames score best.

    To its users it is as the action policy is: `reset` and `act`, rows independent of the batch. Noise of chunks is
    keyed by (seed, episode, plan, candidate); candidate 0 is what the action policy would have done by itself, so that
    one candidate is the action policy. The frames of all candidates of a row are imagined from the same noise, and of
    equal scores the first counts.

    Args:
        policy: samples the chunks; belongs to this from now on.
        imagination: model of frames of one of the environment's cameras, trained on actions of the same kind.
        score: what is best.
        num_candidates: N, chunks for each plan.
        num_frames: Tf, the first actions of each chunk whose frames are imagined; None = all. Each frame costs a
            control step and a plan of the model of frames.

    Attributes:
        spec: of the action policy, and the camera.
        scores: (B, N) of the last `act`, NaN in rows that did not plan; None before.
        provenance: of the action policy, and under "imagination" how it chooses.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        imagination: Imagination,
        score: Score,
        num_candidates: int = 8,
        num_frames: int | None = None,
    ) -> None:
        _check_fits(policy, imagination)
        most = policy.spec.chunk_length
        self.num_frames = most if num_frames is None else num_frames
        if num_candidates < 1 or not 1 <= self.num_frames <= most:
            raise ConfigError(
                f"a choice needs at least 1 candidate, and 1 to {most} frames (the policy's chunk_length), got "
                f"{num_candidates} and {self.num_frames}"
            )
        sampler = getattr(policy.config, "sampler", None)
        if num_candidates > 1 and sampler is not None and sampler.solver == "mip":
            raise ConfigError("chunks of solver 'mip' are all the same: there is nothing to choose among")
        self.policy, self.num_candidates, self._score = policy, num_candidates, score
        self._stream = FrameStream(imagination)
        camera = imagination.transforms.recorded.observation[imagination.source]
        optional = tuple(key for key in policy.spec.optional if key != imagination.source)  # it is imagined
        seen = _with_camera(policy, imagination.source, camera)
        self.spec = replace(policy.spec, observation=seen, optional=optional)
        self.scores: NDArray[np.float64] | None = None
        self.provenance: dict[str, Any] = {
            **getattr(policy, "provenance", {}),
            "imagination": {
                **imagination.provenance,
                "candidates": num_candidates,
                "frames": self.num_frames,
                "camera": imagination.source,
            },
        }
        self._asked: ActionArray | None = None
        policy.choice = self

    @property
    def planned(self) -> NDArray[np.bool_] | None:
        """(B,) which rows the last `act` planned for; None before."""
        return self.policy.planned

    def reset(self, rows: Sequence[int] | None = None, episodes: Sequence[int] | None = None) -> None:
        """Begins new episodes; see `types.Policy.reset`."""
        self.policy.reset(rows, episodes)
        self._stream.reset(rows, episodes)
        if rows is None:
            self._asked = None

    def act(self, observation: Observation, executed_action: ActionArray | None = None) -> ActionArray:
        """One control step (B, Da), see `types.Policy.act`; the observation holds the camera's pictures as well.

        Raises:
            ShapeError: as of the action policy, of `FrameStream.observe`, and of `best`.
        """
        camera = self._stream.imagination.source
        if camera not in observation:
            raise ShapeError(f"observation {camera!r} is missing, which is imagined; got {sorted(observation)}")
        last = self._asked if executed_action is None else executed_action
        seen, executed = self._stream.prepare(observation[camera], last)  # what is refused must change neither of them
        self.policy.observe(observation, executed_action)
        self._stream.take(seen, executed)
        self.scores = np.full((len(seen), self.num_candidates), np.nan)
        self._asked = self.policy.next_action()
        self.scores[~np.asarray(self.planned)] = np.nan  # of a reproducible policy, which computes more than it needs
        return self._asked

    def best(self, chunks: ActionArray, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) which of the chunks (n, N, Ta, Da) of some rows (n,) scores best.

        Raises:
            ShapeError: the score gave no (N,) finite numbers.
        """
        frames = self._stream.imagine(chunks[:, :, : self.num_frames], rows)
        found = np.stack([self._scored(*pair) for pair in zip(frames, chunks, strict=True)])
        if self.scores is not None:
            self.scores[rows] = found
        return found.argmax(axis=1)

    def drain_timings(self) -> Mapping[str, Sequence[float]]:
        """Of the action policy; plans include imagination and score, encoder steps are its own alone."""
        return self.policy.drain_timings()

    def _scored(self, frames: Frames, chunks: ActionArray) -> NDArray[np.float64]:
        scores = np.asarray(self._score(frames, chunks.copy()))
        if scores.shape != (self.num_candidates,) or scores.dtype.kind not in "biuf" or not np.isfinite(scores).all():
            raise ShapeError(
                f"the score must give ({self.num_candidates},) finite numbers, one for each candidate, got "
                f"{scores.dtype} {scores.shape}: {scores.ravel()[:8].tolist()}"
            )
        return scores.astype(np.float64)


def _check_fits(policy: ChunkPolicy, imagination: Imagination) -> None:
    """Raises ShapeError or ConfigError where policy and model of frames are of different robots."""
    spec, trained = policy.spec, imagination.transforms.recorded
    if spec.action_dim != trained.action_dim:
        raise ShapeError(
            f"the policy's actions are {spec.action_dim} wide, those of the model of frames {trained.action_dim}; "
            "train it on recordings of the same robot"
        )
    if not math.isclose(spec.control_dt, trained.control_dt, rel_tol=1e-3):
        raise ShapeError(
            f"the policy's control step is {spec.control_dt:g} s, the model of frames has {trained.control_dt:g} s; "
            "train it on recordings of this rate"
        )
    if spec.action_kind and trained.action_kind and spec.action_kind != trained.action_kind:
        raise ConfigError(
            f"the policy's actions are {spec.action_kind}, the model of frames was trained on {trained.action_kind} "
            "ones; train it on recordings with the same actions"
        )


def _with_camera(policy: ChunkPolicy, key: str, camera: ArraySpec) -> dict[str, ArraySpec]:
    """What is observed by policy and model of frames together."""
    own = policy.spec.observation.get(key, camera)
    if own != camera:
        raise ShapeError(
            f"the policy sees {key!r} as {own.dtype} {own.shape}, the model of frames {camera.dtype} {camera.shape}; "
            "train both on pictures of one size"
        )
    return {**policy.spec.observation, key: camera}
