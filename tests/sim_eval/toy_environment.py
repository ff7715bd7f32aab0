"""A point in the plane that must reach a goal; it can be told to crash, hang, die or return NaN."""

import dataclasses
import functools
import hashlib
import os
import threading
from pathlib import Path

import numpy as np

from scd_robot.errors import MissingDependencyError, RenderError
from scd_robot.seeding import EVALUATION, derive_seed
from scd_robot.types import ArraySpec, EnvironmentSpec, StepResult

CONTROL_DT = 0.05
FAULT_STEP = 3


class PointEnvironment:
    """Moves by 0.2 per step at most; `faults` maps the seed of an episode to what goes wrong in its fourth step."""

    def __init__(self, faults=None, fault_once=None, max_steps=40, render="good"):
        self.spec = EnvironmentSpec(
            name="toy/point",
            observation={"position": ArraySpec((2,)), "goal": ArraySpec((2,))},
            action_dim=2,
            action_low=(-1.0, -1.0),
            action_high=(1.0, 1.0),
            control_dt=CONTROL_DT,
            max_steps=max_steps,
            success="The point is within 0.15 of the goal.",
        )
        self._faults = faults or {}
        self._fault_once = fault_once  # a file that remembers across processes that the fault has happened
        self._render = render

    def reset(self, seed):
        rng = np.random.default_rng(seed)
        self._seed = seed
        self._steps = 0
        self._bonus = 0.0
        self._position = rng.uniform(-2, 2, 2)
        self._goal = rng.uniform(-2, 2, 2)
        return self._observe()

    def step(self, action):
        if self._steps == FAULT_STEP and self._seed in self._faults:
            self._fail(self._faults[self._seed])
        executed = np.clip(action, -1, 1).astype(np.float32)
        self._steps += 1
        self._position = self._position + 0.2 * executed
        distance = float(np.linalg.norm(self._position - self._goal))
        truncated = self._steps >= self.spec.max_steps
        return StepResult(self._observe(), self._bonus - distance, distance < 0.15, False, truncated, executed)

    def state_hash(self):
        return hashlib.sha256(np.concatenate([self._position, self._goal]).tobytes()).hexdigest()

    def render(self, height, width):
        if self._render == "missing":
            raise NotImplementedError("no camera here")
        frame = np.full((height, width, 3), 235, np.uint8)
        if self._render == "blank":
            return frame
        for place, colour in ((self._goal, (40, 160, 90)), (self._position, (200, 60, 60))):
            column, row = np.clip((place / 3 + 1) / 2, 0.05, 0.95) * (width, height)
            frame[int(row) - 6 : int(row) + 6, int(column) - 6 : int(column) + 6] = colour
        return frame

    def expert_action(self):
        return np.clip((self._goal - self._position) / 0.2, -1, 1).astype(np.float32)

    def close(self):
        pass

    def _observe(self):
        return {"position": self._position.astype(np.float32), "goal": self._goal.astype(np.float32)}

    def _fail(self, fault):
        if self._fault_once is not None:
            if Path(self._fault_once).exists():
                return
            Path(self._fault_once).touch()
        if fault == "hang":
            threading.Event().wait()
        elif fault == "die":
            os._exit(3)
        elif fault == "blank":
            raise RenderError("the frame of the camera is blank")
        elif fault == "nan":
            self._position = self._position * np.nan
        elif fault == "nan reward":
            self._bonus = np.nan
        else:
            raise ValueError("contact solver diverged")


def make_point():
    return PointEnvironment()


def make_taking(kind, name="toy/point"):
    """Says that it takes actions of a kind."""
    environment = PointEnvironment()
    environment.spec = dataclasses.replace(environment.spec, name=name, action_kind=kind)
    return environment


make_taking_poses = functools.partial(make_taking, "absolute")


def make_crashing_at_first():
    """Crashes in the first four episodes of an evaluation."""
    return PointEnvironment(faults={derive_seed(EVALUATION, episode): "raise" for episode in range(4)})


def make_crashing_while_told():
    """Crashes in the first four episodes while TOY_CRASHES stands in the process's environment."""
    return make_crashing_at_first() if "TOY_CRASHES" in os.environ else PointEnvironment()


class TellingEnvironment(PointEnvironment):
    """Tells where its hand is, and whether it came near the goal."""

    @property
    def hand(self):
        return np.array([*self._position, 0.0])

    def step(self, action):
        result = super().step(action)
        return dataclasses.replace(result, info={"completed": result.reward > -1})


make_telling = TellingEnvironment


class SeeingEnvironment(PointEnvironment):
    """Has a camera as well, which sees the point as a bright square of 4 x 4 pixels."""

    def __init__(self):
        super().__init__()
        keys = {**self.spec.observation, "eye": ArraySpec((16, 16, 1), "uint8")}
        self.spec = dataclasses.replace(self.spec, observation=keys)

    def _observe(self):
        eye = np.full((16, 16, 1), 30, np.uint8)
        row, column = np.clip(6 + 2 * self._position, 0, 12).astype(int)
        eye[row : row + 4, column : column + 4] = 220
        return {**super()._observe(), "eye": eye}


make_seeing = SeeingEnvironment


def most_to_the_right(frames, chunks):
    """A score of imagined frames that reads the first action of each chunk only."""
    return chunks[:, 0, 1]


class LateEnvironment(PointEnvironment):
    """Cannot be made `failures` times after the first `free`; `counter` is a file in which attempts are counted."""

    def __init__(self, counter, failures, free=1, **options):
        with Path(counter).open("a") as file:
            file.write(".")
        attempts = len(Path(counter).read_text())
        if free < attempts <= free + failures:
            raise ValueError("the licence server is busy")
        super().__init__(**options)


class NeverBegins(PointEnvironment):
    """Raises in every reset."""

    def reset(self, seed):
        raise ValueError("no collision-free start state")


class NeverBeginsAgain(LateEnvironment):
    """Raises in resets (those to `seeds`; None = all), and cannot be made again."""

    def __init__(self, counter, free=1, seeds=None):
        super().__init__(counter, 99, free)
        self._never = seeds

    def reset(self, seed):
        if self._never is None or seed in self._never:
            raise ValueError("no collision-free start state")
        return super().reset(seed)


def make_without_simulator():
    raise MissingDependencyError('toy simulator is missing; run pip install "scd_robot[sim]"')


def make_broken():
    raise ZeroDivisionError("bad asset")


def make_telling_threads():
    environment = PointEnvironment()
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    told = " ".join(os.environ[name] for name in names)
    environment.spec = dataclasses.replace(environment.spec, success=told)
    return environment


class ForgetfulEnvironment(PointEnvironment):
    """Its start state depends on how often it was reset."""

    count = 0

    def reset(self, seed):
        self.count += 1
        return super().reset(seed + self.count)


make_forgetful = ForgetfulEnvironment
make_hanging_at_start = functools.partial(threading.Event().wait)


class GoToGoal:
    """A deterministic policy that remembers, per row, the steps since its reset: slow at first, then fast."""

    def __init__(self):
        self.resets = []
        self.executed = []
        self._steps = None

    def reset(self, rows=None, episodes=None):
        self.resets.append((rows, episodes))
        if rows is None:
            self._steps = None
        else:
            self._steps[rows] = 0

    def act(self, observation, executed_action=None):
        self.executed.append(executed_action)
        if self._steps is None:
            self._steps = np.zeros(len(observation["goal"]))
        self._steps += 1
        gain = np.minimum(self._steps / 5, 1)[:, None]
        return (observation["goal"] - observation["position"]) * 5 * gain
