"""Settings of the changes between what was recorded and what the model sees; `scd_robot.transforms` makes them.

They are part of a checkpoint.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from scd_robot.errors import ConfigError
from scd_robot.rotations import RotationName

__all__ = ["ChunkKind", "ChunkPart", "GripperStep", "ImageStep", "RotationStep", "SelectStep", "TransformConfig"]

ChunkKind = Literal["absolute", "relative", "delta", "velocity"]


@dataclass(frozen=True)
class RotationStep:
    """Some numbers of a vector are a rotation, to be had in another representation.

    Attributes:
        key: observation key (after renaming), or "action".
        start: first of the numbers, counted after earlier steps on the same key.
        source: representation in the recording.
        target: representation for the model.
    """

    key: str
    start: int
    source: RotationName
    target: RotationName = "rot6d"


@dataclass(frozen=True)
class GripperStep:
    """One number of a vector is a gripper's opening or command; it becomes -1 closed, 1 open, and linear between.

    Attributes:
        key: observation key (after renaming), or "action".
        index: of the number, counted after the rotation steps.
        closed: what the recording has for closed: 1 in robosuite's actions, 0 [m] for a width, ...
        open: what it has for open.
    """

    key: str
    index: int
    closed: float
    open: float

    def __post_init__(self) -> None:
        if self.closed == self.open:
            raise ConfigError(f"the gripper of {self.key!r} has {self.closed} for closed and for open")


@dataclass(frozen=True)
class ImageStep:
    """Images of one key are cropped about their centre, then resized.

    Attributes:
        key: observation key (after renaming).
        crop: height and width kept [pixel]; empty = all.
        size: height and width of the result [pixel]; empty = as cropped.
    """

    key: str
    crop: tuple[int, ...] = ()
    size: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("crop", "size"):
            pair = getattr(self, name)
            if pair and (len(pair) != 2 or min(pair) < 1):
                raise ConfigError(f"{name} of images {self.key!r} must be height and width, got {pair}")


@dataclass(frozen=True)
class SelectStep:
    """The model sees some numbers of a vector only: joints without their velocities, say.

    Attributes:
        key: observation key (after renaming).
        indices: of the numbers that stay, in the order the model has them, counted after the steps before.
    """

    key: str
    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.indices or min(self.indices) < 0 or len(set(self.indices)) != len(self.indices):
            raise ConfigError(
                f"select of {self.key!r} needs the indices of the numbers that stay, each once and 0 or more; got "
                f"{list(self.indices)}"
            )


@dataclass(frozen=True)
class ChunkPart:
    """Numbers of the action that are targets of numbers of the observed state, in the same units.

    Attributes:
        action_start: first of them in the action, after rotation and gripper steps.
        key: observation key (after renaming) that holds the state.
        key_start: first of them there, as the model has it.
        count: how many.
        rotation: they are one rotation as rot6d in both; relative is then a rotation as well.
    """

    action_start: int
    key: str
    key_start: int
    count: int
    rotation: bool = False

    def __post_init__(self) -> None:
        if min(self.action_start, self.key_start) < 0 or self.count < 1:
            raise ConfigError(f"a part of the action must be numbers from 0 on, at least one; got {self}")
        if self.rotation and self.count != 6:
            raise ConfigError(f"a rotation in a chunk must be rot6d, 6 numbers, got {self.count}; add a RotationStep")


@dataclass(frozen=True)
class TransformConfig:
    """What is done between recording and model; the default does nothing.

    Attributes:
        rename: the recording's observation key -> the model's.
        keys: observation keys (after renaming) for the model; empty = what the preset takes.
        flatten: keys (after renaming) of small arrays, key points (9, 2) for example, that become vectors.
        images: on images.
        rotations: on observations and actions.
        grippers: on observations and actions.
        select: the numbers of observed vectors that the model sees.
        chunk: how the actions of a chunk are expressed: "absolute" as recorded; "relative" to the state at the chunk's
            first control step; "delta" to the action before, the first one to that state; "velocity" is delta divided
            by `control_dt`.
        chunk_parts: numbers of the action this applies to; the others stay absolute.
        tasks: vector of each task in words, all of one width: one-hot, or given embeddings of the words. The model
            then has the observation "task".
        goals: keys (after renaming) whose observation at the end of the episode is known from the beginning, as
            "goal.KEY".
    """

    rename: dict[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    flatten: tuple[str, ...] = ()
    images: tuple[ImageStep, ...] = ()
    rotations: tuple[RotationStep, ...] = ()
    grippers: tuple[GripperStep, ...] = ()
    select: tuple[SelectStep, ...] = ()
    chunk: ChunkKind = "absolute"
    chunk_parts: tuple[ChunkPart, ...] = ()
    tasks: dict[str, tuple[float, ...]] = field(default_factory=dict)
    goals: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.chunk == "absolute") != (not self.chunk_parts):
            raise ConfigError(
                f"chunk {self.chunk!r} with {len(self.chunk_parts)} chunk_parts: absolute actions have none, others "
                "need at least one"
            )
        taken = [i for part in self.chunk_parts for i in range(part.action_start, part.action_start + part.count)]
        if len(taken) != len(set(taken)):
            raise ConfigError("chunk_parts overlap: each number of the action may be in one of them only")
        for name in ("keys", "flatten", "goals"):
            twice = [key for key, count in Counter(getattr(self, name)).items() if count > 1]
            if twice:
                raise ConfigError(f"{name} names {twice[0]!r} twice; once is enough")
        widths = {len(vector) for vector in self.tasks.values()}
        if len(widths) > 1 or 0 in widths:
            raise ConfigError(f"the vectors of tasks must have one width of at least 1, got {sorted(widths)}")
