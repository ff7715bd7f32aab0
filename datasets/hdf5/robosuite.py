"""Reads raw recordings of robosuite: states of the simulator and actions, no observations.

data                      attributes env, env_info (JSON), repository_version
data/demo_N               attribute model_file: the MuJoCo model, before 1.4 the name of a file in `models` beside
    states                (T, 1 + S) time [s], positions and velocities, before the action
    actions               (T, Da); before 1.0 instead, and not for all robots:
    joint_velocities      (T, joints) what was asked of the arm [rad/s], and
    gripper_actuations    (T, fingers) of the gripper

Observations are made by setting each state in the simulator (`EpisodeDataset.arrays["sim_state"]` and the text
"model_xml"). Until then the state itself, without the time, stands for them.
"""

from pathlib import Path
from typing import Any

import numpy as np

from scd_robot.datasets.formats import ReadOptions, measured_control_dt
from scd_robot.datasets.hdf5.action_kind import recorded_action_kind
from scd_robot.datasets.hdf5.demos import ACTIONS, Demos
from scd_robot.datasets.hdf5.files import scalar_attributes
from scd_robot.datasets.lazy import RowArray
from scd_robot.datasets.schema import ACTION, SIM_STATE, EpisodeDataset
from scd_robot.errors import DatasetError, UnknownNameError
from scd_robot.types import ArraySpec, DatasetSpec

__all__ = ["EARLY_ACTIONS", "STATE", "read_robosuite"]

STATE = "state"  # the observation: all of the simulator's state but the time
EARLY_ACTIONS = "joint_velocities+gripper_actuations"


def read_robosuite(demos: Demos, options: ReadOptions) -> EpisodeDataset:
    """Episodes whose observation "state" (N, S) is the simulator's state as float32, without the time.

    The label is `actions`; in recordings of robosuite before 1.0 it is `joint_velocities` and `gripper_actuations`
    joined, which together were the environment's action. `options.action` names another, as for robomimic. The rate is
    that of the environment's arguments, else of the times in the states.

    Raises:
        DatasetError: there are states but no actions, or demonstrations contradict each other, or are damaged.
        UnknownNameError: a key or action array that was asked for is not there.
    """
    path = demos.path
    for key in options.keys or ():
        if key != STATE:
            raise UnknownNameError(f"key of the dataset {path} (raw states, without observations)", key, [STATE])
    label = options.action or _usual_label(demos)
    action, lengths = demos.action(label)
    demos.check_counts(lengths)
    extras = demos.extras(lengths, label, needed=(SIM_STATE,))
    if SIM_STATE not in extras or extras[SIM_STATE].shape[1] < 2:
        raise DatasetError(f"'states' of {path} must be (T, 1 + S), the time and the simulator's state")
    state = extras[SIM_STATE][:, 1:].astype(np.float32)
    attributes = scalar_attributes(demos.data)
    metadata: dict[str, Any] = {"format": "robosuite", "action": label}
    metadata |= {name: attributes[name] for name in ("env", "repository_version") if name in attributes}
    metadata |= demos.json("env_info", "env_args")
    measured = measured_control_dt(extras[SIM_STATE][:, 0], np.cumsum(lengths))
    control_dt, note = demos.control_dt(options.control_dt, metadata, measured)
    maker = " ".join(
        ["robosuite", *(str(metadata[name]) for name in ("repository_version", "env") if name in metadata)]
    )
    spec = DatasetSpec(
        {STATE: ArraySpec(state.shape[1:])},
        action_dim=action.shape[1],
        control_dt=control_dt,
        source=f"{Path(path).name} ({maker}, states without observations{note})",
        action_kind=recorded_action_kind(label, metadata),
    )
    info, text = demos.notes()
    arrays: dict[str, RowArray] = {STATE: state, ACTION: action, **extras}
    return EpisodeDataset(spec, np.cumsum(lengths), arrays, metadata, info, text, numbers=demos.numbers)


def _usual_label(demos: Demos) -> str:
    labels = demos.labels()
    if ACTIONS not in labels and set(EARLY_ACTIONS.split("+")) <= set(labels):
        return EARLY_ACTIONS
    if ACTIONS not in labels:
        raise DatasetError(
            f"{demos.path} holds states but no actions (robosuite before 1.0 recorded them for some robots only): "
            "there is nothing to learn from; use another recording"
        )
    return ACTIONS
