"""Observations for raw robosuite recordings, made by setting each recorded state in the simulator.

robosuite 1.5 changed what earlier recordings rely on. Four things bring them back, each told from the recording alone:

- the model gets today's names and files (`robosuite_models.upgraded`);
- delta actions are meant in the world's frame, not in that of the robot's base;
- `lite_physics` is off;
- an action without rotation holds the orientation that was asked for last, and does not take over the present one.

With these the demonstrations of robosuite 1.4 replay. Those of 1.0 and before name their bodies otherwise: refused.

Shapes: T control steps of an episode, S numbers of the simulator's state (positions, then velocities).
"""

import contextlib
import logging
import xml.etree.ElementTree as ElementTree
from collections.abc import Generator, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from scd_robot.datasets.schema import SIM_STATE, EpisodeDataset
from scd_robot.datasets.zarr.writer import ZarrWriter
from scd_robot.errors import DatasetError, SimulatorError, UnknownNameError
from scd_robot.recording.robosuite_models import recorded_arguments, recorded_version, upgraded
from scd_robot.sim_eval.robosuite_arguments import arguments_before_1_5, hold_orientation, is_before_1_5
from scd_robot.sim_eval.robosuite_simulator import WITHOUT_RENDERER, import_robosuite, observe
from scd_robot.types import ActionArray, ArraySpec, DatasetSpec, StepResult

__all__ = ["MODEL", "RobosuiteSimulator", "observe_states", "write_observations"]

logger = logging.getLogger(__name__)

MODEL = "model_xml"  # the text of an episode that holds its MuJoCo model
POSITIONS = "qpos"  # observation that a replay compares


class RobosuiteSimulator:
    """The robosuite environment that a recording names, in which its states are set or its actions replayed.

    Attributes:
        name: of the environment, for people.
        version: of robosuite here.
        recorded_version: of robosuite that recorded, "of an unknown version" where the file does not tell.
        before_1_5: whether the environment was set up as before robosuite 1.5.
        action_dim: Da.
        control_dt: seconds per control step.
    """

    def __init__(self, dataset: EpisodeDataset, cameras: Sequence[str] = (), height: int = 84, width: int = 84) -> None:
        """Makes the environment; a few seconds.

        Args:
            dataset: with `sim_state` and the text "model_xml".
            cameras: of which images are made, by their names in the model.
            height: of the images, in pixels.
            width: of the images, in pixels.

        Raises:
            DatasetError: the recording holds no states or models, damaged ones, or does not tell its environment.
            UnknownNameError: the recorded model has no such camera.
            MissingDependencyError: robosuite is not installed.
            SimulatorError: the installed robosuite cannot make this environment.
        """
        if SIM_STATE not in dataset.arrays or MODEL not in dataset.episode_text:
            raise DatasetError(
                f"{dataset.spec.source} holds no simulator states with their models (robosuite's 'states' and "
                "'model_file'), which its observations or a replay need"
            )
        arguments = recorded_arguments(dataset)
        self._dataset = dataset
        self._cameras = dict.fromkeys(cameras, (height, width))
        self._check_model(0)
        robosuite = import_robosuite()
        self.version = str(robosuite.__version__)
        self.name = f"robosuite/{arguments['env_name']}"
        self.recorded_version = recorded_version(dataset.metadata)
        self.before_1_5 = is_before_1_5(self.recorded_version, arguments) and not is_before_1_5(self.version, {})
        ours = {**WITHOUT_RENDERER, "ignore_done": True}
        with self._loading(f"make the environment {arguments['env_name']}"):
            if self.before_1_5:
                arguments = arguments_before_1_5(arguments)
            rate = {"control_freq": round(1 / dataset.spec.control_dt)}
            self._env: Any = robosuite.make(**{**rate, **arguments, **ours})
            self._installed_model: str = self._env.sim.model.get_xml()
        self.action_dim = int(self._env.action_dim)
        self.control_dt = 1.0 / float(self._env.control_freq)

    def load(self, index: int) -> None:
        """Loads the model of an episode.

        Raises:
            DatasetError: the text is not a MuJoCo model, or the states have another width than it needs.
            SimulatorError: the installed robosuite cannot use it; names both versions.
            UnknownNameError: the model has no such camera.
        """
        self._check_model(index)
        with self._loading(f"use the model of {self._episode(index)}"):
            model_xml = self._env.edit_model_xml(self._dataset.episode_text[MODEL][index])
            if self.before_1_5:
                model_xml = upgraded(model_xml, self._installed_model)
            self._env.reset_from_xml_string(model_xml)
            self._env.sim.reset()
        model = self._env.sim.model
        width = self._dataset.arrays[SIM_STATE].shape[1]
        if width != 1 + model.nq + model.nv:
            raise DatasetError(
                f"the states of {self._episode(index)} must be {1 + model.nq + model.nv} wide by its model (time, "
                f"{model.nq} positions, {model.nv} velocities), got {width}"
            )
        if self.before_1_5:
            for robot in self._env.robots:
                for controller in robot.part_controllers.values():
                    hold_orientation(controller)

    def set_state(self, state: NDArray[np.float64]) -> None:
        """Sets a recorded state (1 + S,): time, positions, velocities."""
        self._env.sim.data.ctrl[:] = 0
        self._env.sim.set_state_from_flattened(np.asarray(state, np.float64))
        self._env.sim.forward()

    def observe(self) -> dict[str, NDArray[Any]]:
        """All observations of the present state: vectors float32, images uint8 (H, W, 3) the right way up.

        Raises:
            RenderError: an image is blank.
        """
        return observe(self._env, self._cameras)

    def template(self) -> dict[str, NDArray[Any]]:
        """Observations of the first recorded state, without those that depend on the controls as well."""
        self.load(0)
        self.set_state(self._states(0)[0])
        first = self.observe()
        data = self._env.sim.data
        data.ctrl[:] = np.linspace(1.0, 2.0, len(data.ctrl))
        self._env.sim.forward()
        other = self.observe()
        vectors = [key for key, value in first.items() if value.ndim == 1]
        left_out = [key for key in vectors if not np.array_equal(first[key], other[key])]
        logger.info("left out, since they depend on controls that were not recorded: %s", ", ".join(left_out))
        return {key: value for key, value in first.items() if key not in left_out}

    def observe_episode(self, index: int, keys: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Observations (T, ...) by key of all states of an episode."""
        self.load(index)
        rows = []
        for state in self._states(index):
            self.set_state(state)
            rows.append(self.observe())
        return {key: np.stack([row[key] for row in rows]) for key in keys}

    def start(self, index: int) -> dict[str, NDArray[Any]]:
        """Loads an episode's model and sets its first state, for a replay; returns the positions as "qpos" (nq,)."""
        self.load(index)
        self.set_state(self._states(index)[0])
        return self._positions()

    def step(self, action: ActionArray) -> StepResult:
        """Applies one action (Da,), as it is: the controllers clip.

        Raises:
            SimulatorError: the physics became unstable.
        """
        try:
            _, reward, _, _ = self._env.step(np.asarray(action, np.float64))
        except Exception as error:  # robosuite and MuJoCo raise many kinds
            raise SimulatorError(f"{self.name} crashed: {_shortened(error)}") from error
        positions = self._positions()
        if not np.isfinite(positions[POSITIONS]).all():
            raise SimulatorError(f"the physics of {self.name} became unstable")
        success = bool(self._env._check_success())
        return StepResult(positions, float(reward), success, False, False, np.asarray(action, np.float32))

    def recorded(self, index: int) -> dict[str, NDArray[np.float64]]:
        """What `start` and `step` are compared with: the recorded positions "qpos" (T, nq). After `start`."""
        return {POSITIONS: self._states(index)[:, 1 : 1 + self._env.sim.model.nq]}

    def recorded_success(self, index: int) -> bool:
        """Whether the task is done in one of the recorded states. After `start`; leaves another state."""
        for state in self._states(index):
            self.set_state(state)
            if self._env._check_success():
                return True
        return False

    def close(self) -> None:
        """Releases the simulator."""
        self._env.close()

    def _check_model(self, index: int) -> None:
        try:
            model = ElementTree.fromstring(self._dataset.episode_text[MODEL][index])
        except ElementTree.ParseError as error:
            raise DatasetError(f"the model of {self._episode(index)} is not XML ({error}); it is damaged") from error
        cameras = [camera.get("name", "") for camera in model.iter("camera")]
        for name in self._cameras:
            if name not in cameras:
                raise UnknownNameError(f"camera of {self._episode(index)}", name, cameras)

    def _positions(self) -> dict[str, NDArray[Any]]:
        return {POSITIONS: np.array(self._env.sim.data.qpos, np.float64)}

    def _states(self, index: int) -> NDArray[np.float64]:
        return np.asarray(self._dataset.arrays[SIM_STATE][self._dataset.rows(index)], np.float64)

    def _episode(self, index: int) -> str:
        return f"episode {index} of {self._dataset.spec.source.partition(' (')[0]}"

    @contextlib.contextmanager
    def _loading(self, what: str) -> Iterator[None]:
        """Turns what robosuite raises, which is of many kinds, into one that names the versions."""
        try:
            yield
        except Exception as error:
            raise SimulatorError(
                f"robosuite {self.version}, which is installed, cannot {what}, recorded with robosuite "
                f"{self.recorded_version}: {_shortened(error)}; use an environment with that version"
            ) from error


def observe_states(
    dataset: EpisodeDataset, *, cameras: Sequence[str] = (), height: int = 84, width: int = 84
) -> Generator[dict[str, NDArray[Any]], None, None]:
    """Makes the observations of every recorded state.

    Velocities and poses follow from a state alone. What depends on the controls as well (accelerations) is left out,
    since they were not recorded.

    Args:
        dataset: with `sim_state` and the text "model_xml", as raw recordings of robosuite are read.
        cameras: of which images are made ("agentview_image"), by their names in the model.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Yields:
        For each episode the arrays (T, ...): robosuite's observations in the place of the raw state, the action, and
        what else was recorded.

    Raises:
        DatasetError, MissingDependencyError, SimulatorError, UnknownNameError: see `RobosuiteSimulator`.
    """
    with contextlib.closing(RobosuiteSimulator(dataset, cameras, height, width)) as simulator:
        keys = list(simulator.template())
        for index in range(dataset.num_episodes):
            yield _observed_episode(simulator, dataset, index, keys)


def write_observations(
    dataset: EpisodeDataset,
    out: Path,
    *,
    cameras: Sequence[str] = (),
    height: int = 84,
    width: int = 84,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes a Zarr store with the observations of every recorded state, see `observe_states`.

    Args:
        dataset: the raw recording.
        out: path of the new store.
        cameras: of which images are made.
        height: of the images, in pixels.
        width: of the images, in pixels.
        overwrite: replace a store at `out`.
        progress: show a progress bar.

    Returns:
        path, episodes, steps, keys; plain JSON types.

    Raises:
        OutputError: `out` exists or cannot be written; nothing is left of it.
        DatasetError, MissingDependencyError, SimulatorError, UnknownNameError: see `RobosuiteSimulator`.
    """
    with contextlib.closing(RobosuiteSimulator(dataset, cameras, height, width)) as simulator:
        template = simulator.template()
        versions = {name: metadata.version(name) for name in ("robosuite", "mujoco")}
        spec = DatasetSpec(
            {key: ArraySpec(value.shape, str(value.dtype)) for key, value in template.items()},
            dataset.spec.action_dim,
            dataset.spec.control_dt,
            source=f"{dataset.spec.source}, observed by robosuite {versions['robosuite']}",
            action_kind=dataset.spec.action_kind,
        )
        with ZarrWriter(out, spec, {**dataset.metadata, "observed_with": versions}, overwrite, whole=True) as writer:
            for index in tqdm(range(dataset.num_episodes), desc="observing", unit="episode", disable=not progress):
                info = {name: values[index].item() for name, values in dataset.episode_info.items()}
                text = {name: texts[index] for name, texts in dataset.episode_text.items()}
                writer.append(_observed_episode(simulator, dataset, index, template), info, text, dataset.number(index))
    return {"path": str(out), "episodes": writer.num_episodes, "steps": writer.num_steps, "keys": list(template)}


def _observed_episode(
    simulator: RobosuiteSimulator, dataset: EpisodeDataset, index: int, keys: Iterable[str]
) -> dict[str, NDArray[Any]]:
    kept = [key for key in dataset.arrays if key not in dataset.spec.observation]
    return {**simulator.observe_episode(index, keys), **dataset.episode(index, kept)}


def _shortened(error: BaseException) -> str:
    """A message that may go on for pages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."
