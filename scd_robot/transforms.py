"""Changes between what was recorded and what the model sees, each with its inverse. They are part of a checkpoint.

Order: keys are renamed and chosen, small arrays flattened, images cropped and resized, rotations converted, grippers
mapped, numbers of vectors selected; then actions are expressed relative to the present state, chunk by chunk; then
everything is normalised. The policy undoes the steps on actions in reverse, so that a robot gets actions as they were
recorded.

Two observations are not of a control step but of its episode: the vector of its task, and what it is to lead to.

Shapes: (..., Do) and (..., Da) any batch axes; L actions of a chunk; H W C image.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError, ShapeError, UnknownNameError
from scd_robot.resizing import crop_and_resize
from scd_robot.rotations import ROTATION_WIDTHS, RotationName, convert_rotation, matrix_of, rotation_from_matrix
from scd_robot.transform_config import ChunkPart, GripperStep, ImageStep, RotationStep, SelectStep, TransformConfig
from scd_robot.types import ArraySpec, DatasetSpec

__all__ = [
    "GOAL",
    "TASK",
    "ChunkPart",
    "GripperStep",
    "ImageStep",
    "RotationStep",
    "SelectStep",
    "TransformConfig",
    "Transforms",
    "relative_chunk",
    "undo_relative_chunk",
]

ACTION = "action"
TASK = "task"  # the model's key of the task's vector
GOAL = "goal."  # begins the keys of goals

Array = NDArray[Any]


class Transforms:
    """A `TransformConfig` for one kind of recording.

    Args:
        config: what to do.
        recorded: specification of the recording.

    Attributes:
        config: as given.
        dataset: `recorded` as given.
        recorded: the same with the keys of goals.
        spec: what comes out.

    Raises:
        UnknownNameError: a key that the recording does not have.
        ShapeError: a step that does not fit the width of its key.
        ConfigError: two keys renamed to one.
    """

    def __init__(self, config: TransformConfig, recorded: DatasetSpec) -> None:
        self.config, self.dataset = config, recorded
        for key in config.rename:
            if key not in recorded.observation:
                raise UnknownNameError("key to rename", key, recorded.observation)
        names = {config.rename.get(key, key): key for key in recorded.observation}
        if len(names) != len(recorded.observation):
            raise ConfigError(f"rename gives two observation keys one name: {sorted(names)}")
        for key in config.keys:
            if key not in names:
                raise UnknownNameError("observation key", key, names)
        self._sources = {key: names[key] for key in config.keys or names}
        for key in config.goals:
            if key not in names:
                raise UnknownNameError("observation key of a goal", key, names)
        self._sources |= {GOAL + key: GOAL + names[key] for key in config.goals}
        taken = sorted(({GOAL + key for key in config.goals} | ({TASK} if config.tasks else set())) & set(names))
        if taken:
            raise ConfigError(f"the recording has observations {', '.join(taken)} already; rename them")
        goals = {GOAL + names[key]: recorded.observation[names[key]] for key in config.goals}
        self.recorded = recorded = replace(recorded, observation={**recorded.observation, **goals})
        used = [*config.flatten, *(step.key for step in config.images), *(step.key for step in config.rotations)]
        used += [*(step.key for step in config.grippers), *(step.key for step in config.select)]
        used += [part.key for part in config.chunk_parts]
        for key in used:
            if key not in self._sources and key != ACTION:
                raise UnknownNameError("key of a transform", key, [*self._sources, ACTION])
        if ACTION in config.flatten:
            raise ConfigError("flatten takes observation keys; actions are vectors already")
        if ACTION in (step.key for step in config.select):
            raise ConfigError("select takes observation keys: a robot needs all the numbers of an action")
        specs = {key: recorded.observation[source] for key, source in self._sources.items()}
        observation = {key: self._spec_after(self._step_key(key), spec) for key, spec in specs.items()}
        if config.tasks:
            observation[TASK] = ArraySpec((len(next(iter(config.tasks.values()))),))
        self.spec = replace(
            recorded,
            observation=observation,
            action_dim=self._spec_after(ACTION, ArraySpec((recorded.action_dim,))).shape[0],
        )
        self._check_parts()

    @property
    def sources(self) -> dict[str, str]:
        """By key of the model the recording's key; the task's vector has none."""
        return dict(self._sources)

    def stand_in(self) -> dict[str, Array]:
        """An observation as recorded that nothing is wrong with: zeros, rotations by nothing, pictures of a ramp."""
        found = {}
        for source in self._sources.values():
            spec = self.recorded.observation[source]
            x = np.zeros(spec.shape, spec.dtype)
            if spec.dtype == "uint8" and x.ndim == 3:
                x = (np.arange(x.size) % 256).astype(np.uint8).reshape(x.shape)
            found[source] = x
        return self.with_rotations(found, np.eye(3))

    def with_rotations(self, observation: Mapping[str, Array], matrix: Array) -> dict[str, Array]:
        """Observations (..., Do) as recorded, all of whose rotations are `matrix` (..., 3, 3)."""
        found = {source: np.array(x, order="C") for source, x in observation.items()}
        for key, source in self._sources.items():
            x = found[source]
            x = x.reshape(*x.shape[: x.ndim - len(self.recorded.observation[source].shape)], -1)  # the same memory
            self._set_rotations(self._step_key(key), x, matrix)
        return found

    def unknown_action(self) -> Array:
        """(Da,) float32, an action as recorded in the place of one that nobody told: zeros, rotations by nothing."""
        action = np.zeros(self.recorded.action_dim)
        self._set_rotations(ACTION, action, np.eye(3))
        action = self.action(action)
        for part in self.config.chunk_parts:
            if part.rotation:
                action[part.action_start : part.action_start + part.count] = rotation_from_matrix(np.eye(3), "rot6d")
        return np.asarray(self.undo_action(action), np.float32)

    def _set_rotations(self, key: str, x: Array, matrix: Array) -> None:
        """Makes all rotations in vectors (..., n) of a key, as recorded, `matrix` (..., 3, 3)."""
        steps = [step for step in self.config.rotations if step.key == key]
        for count, step in enumerate(steps):
            start = step.start
            for earlier in reversed(steps[:count]):  # which `start` is counted after
                wider = ROTATION_WIDTHS[earlier.target] - ROTATION_WIDTHS[earlier.source]
                start -= wider if start > earlier.start else 0
            x[..., start : start + ROTATION_WIDTHS[step.source]] = rotation_from_matrix(matrix, step.source)

    def observation(self, observation: Mapping[str, Array]) -> dict[str, Array]:
        """Observations (..., Do) or (..., H, W, C) as recorded, to those of the model."""
        return {key: self.convert(key, observation[source]) for key, source in self._sources.items()}

    def convert(self, key: str, x: Array) -> Array:
        """One array (..., Do) or (..., H, W, C), `key` as the model calls it or "action"; vectors become float."""
        is_vector = key == ACTION or len(self.spec.observation[key].shape) == 1
        source, key = self._sources.get(key, key), self._step_key(key)
        if key in self.config.flatten:
            x = x.reshape(*x.shape[: x.ndim - len(self.recorded.observation[source].shape)], -1)
        for image in self.config.images:
            if image.key == key:
                x = crop_and_resize(x, image.crop, image.size)
        for step in self.config.rotations:
            if step.key == key:
                try:
                    x = _replace(x, step.start, ROTATION_WIDTHS[step.source], step.source, step.target)
                except ShapeError as error:
                    raise ShapeError(f"numbers of {key!r} from {step.start} on: {error}") from error
        for gripper in self.config.grippers:
            if gripper.key == key:
                x = _map_number(x, gripper.index, (gripper.closed, gripper.open), (-1.0, 1.0))
        for select in self.config.select:
            if select.key == key:
                x = x[..., list(select.indices)]
        return x.astype(np.float32) if is_vector and x.dtype not in (np.float32, np.float64) else x

    def _step_key(self, key: str) -> str:
        """What the steps call it: goals are treated like what is observed."""
        goal = key.removeprefix(GOAL)
        return goal if key != goal and goal in self.config.goals else key

    def action(self, action: Array) -> Array:
        """Actions (..., Da) as recorded, to those of the model, still absolute."""
        return self.convert(ACTION, action)

    def undo_action(self, action: Array) -> Array:
        """Inverse of `action`."""
        for gripper in reversed(self.config.grippers):
            if gripper.key == ACTION:
                action = _map_number(action, gripper.index, (-1.0, 1.0), (gripper.closed, gripper.open))
        for step in reversed(self.config.rotations):
            if step.key == ACTION:
                action = _replace(action, step.start, ROTATION_WIDTHS[step.target], step.target, step.source, True)
        return action

    def chunk(self, actions: Array, state: Mapping[str, Array]) -> Array:
        """Actions (..., L, Da) of the model, expressed as `config.chunk` says.

        Args:
            actions: absolute, from the control step of `state` on.
            state: observations (..., Do) of the model at the chunk's first control step.
        """
        return relative_chunk(actions, state, self.config, self.spec.control_dt)

    def undo_chunk(self, actions: Array, state: Mapping[str, Array]) -> Array:
        """Inverse of `chunk`."""
        return undo_relative_chunk(actions, state, self.config, self.spec.control_dt)

    def _spec_after(self, key: str, spec: ArraySpec) -> ArraySpec:
        shape = spec.shape if key not in self.config.flatten else (int(np.prod(spec.shape)),)
        for image in self.config.images:
            if image.key == key:
                if len(shape) != 3:
                    raise ShapeError(f"{key!r} is to be cropped or resized, but has shape {shape}, not (H, W, C)")
                if image.crop and (image.crop[0] > shape[0] or image.crop[1] > shape[1]):
                    raise ShapeError(f"a crop of {image.crop} does not fit {key!r} of shape {shape}")
                shape = (*(image.size or image.crop or shape[:2]), shape[2])
        for step in self.config.rotations:
            if step.key == key:
                width = ROTATION_WIDTHS[step.source]
                _check_range(f"the rotation {step.source} of {key!r}", shape, step.start, width)
                shape = (shape[0] - width + ROTATION_WIDTHS[step.target],)
        for gripper in self.config.grippers:
            if gripper.key == key:
                _check_range(f"the gripper of {key!r}", shape, gripper.index, 1)
        for select in self.config.select:
            if select.key == key:
                _check_range(f"select of {key!r}", shape, max(select.indices), 1)
                shape = (len(select.indices),)
        return replace(spec, shape=shape, dtype="float32" if len(shape) == 1 else spec.dtype)

    def _check_parts(self) -> None:
        for part in self.config.chunk_parts:
            _check_range("a chunk part of the action", (self.spec.action_dim,), part.action_start, part.count)
            shape = self.spec.observation[part.key].shape if part.key != ACTION else ()
            _check_range(f"a chunk part's state {part.key!r}", shape, part.key_start, part.count)


def relative_chunk(actions: Array, state: Mapping[str, Array], config: TransformConfig, control_dt: float) -> Array:
    """Absolute actions (..., L, Da) relative to a state, see `TransformConfig.chunk`; `control_dt` [s]."""
    out = np.array(actions)
    for part in config.chunk_parts:
        chosen = slice(part.action_start, part.action_start + part.count)
        now = state[part.key][..., None, part.key_start : part.key_start + part.count]
        target = actions[..., chosen]
        before = np.broadcast_to(now, target.shape)
        if config.chunk != "relative":
            before = np.concatenate((before[..., :1, :], target[..., :-1, :]), axis=-2)
        if part.rotation:  # R = R_before^T R_target
            turn = np.swapaxes(matrix_of(before, "rot6d"), -1, -2) @ matrix_of(target, "rot6d")
            out[..., chosen] = rotation_from_matrix(turn, "rot6d")
        else:
            out[..., chosen] = (target - before) / (control_dt if config.chunk == "velocity" else 1.0)
    return out


def undo_relative_chunk(
    actions: Array, state: Mapping[str, Array], config: TransformConfig, control_dt: float
) -> Array:
    """Inverse of `relative_chunk`."""
    out = np.array(actions)
    for part in config.chunk_parts:
        chosen = slice(part.action_start, part.action_start + part.count)
        now = state[part.key][..., None, part.key_start : part.key_start + part.count]
        change = actions[..., chosen]
        if part.rotation:
            absolute = matrix_of(now, "rot6d")
            turns = matrix_of(change, "rot6d")
            if config.chunk == "relative":
                found = absolute @ turns
            else:
                found = np.empty(turns.shape)
                for i in range(turns.shape[-3]):
                    absolute = absolute[..., :1, :, :] @ turns[..., i : i + 1, :, :]
                    found[..., i : i + 1, :, :] = absolute
            out[..., chosen] = rotation_from_matrix(found, "rot6d")
        elif config.chunk == "relative":
            out[..., chosen] = now + change
        else:
            out[..., chosen] = now + np.cumsum(change, axis=-2) * (control_dt if config.chunk == "velocity" else 1.0)
    return out


def _replace(
    x: Array, start: int, width: int, source: RotationName, target: RotationName, predicted: bool = False
) -> Array:
    rotation = convert_rotation(x[..., start : start + width], source, target, predicted=predicted)
    return np.concatenate((x[..., :start], rotation, x[..., start + width :]), axis=-1)


def _map_number(x: Array, index: int, source: tuple[float, float], target: tuple[float, float]) -> Array:
    """The number at `index` of (..., n), mapped linearly so that the two of `source` become those of `target`."""
    out = np.array(x)
    gain = (target[1] - target[0]) / (source[1] - source[0])
    out[..., index] = (x[..., index] - source[0]) * gain + target[0]
    return out


def _check_range(what: str, shape: tuple[int, ...], start: int, count: int) -> None:
    if len(shape) != 1 or not 0 <= start <= shape[0] - count:
        raise ShapeError(f"{what} takes {count} numbers from {start} on, which shape {shape} does not have")
