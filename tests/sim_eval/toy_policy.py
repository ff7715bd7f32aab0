"""Policies of a user, as `package.module:callable` names them; numpy only, so that any Python runs them."""

import os

import numpy as np


class GoToGoal:
    """Goes straight to the goal, or stands still if the environment has another action width than it was told."""

    def __init__(self, environment, gain=5.0, seed=0):
        self.gain = gain if environment.action_dim == 2 and environment.name == "toy/point" else 0.0
        self.provenance = {"weights_sha256": f"{seed:064x}"}
        self.planned = None
        self._steps = None

    def reset(self, rows=None, episodes=None):
        if rows is None:
            self._steps = np.zeros(len(episodes))
        else:
            self._steps[rows] = 0

    def act(self, observation, executed_action=None):
        self.planned = self._steps % 2 == 0
        self._steps += 1
        return (observation["goal"] - observation["position"]) * self.gain

    def drain_timings(self):
        return {"plan_ms": [1.0, 2.0]}


class OneByOne:
    """Its reset takes no rows, so it runs in one environment at a time."""

    def reset(self):
        pass

    def act(self, observation):
        return np.zeros((len(observation["goal"]), 2), np.float32)


class Failing(OneByOne):
    def __init__(self, how="raise"):
        self.how = how

    def act(self, observation):
        if self.how == "die":
            os._exit(7)
        raise ZeroDivisionError("no plan")


class Sealed(OneByOne):
    __slots__ = ()

    def __setattr__(self, name, value):
        raise AttributeError(f"{name} is read-only")


def make_nothing():
    return {"reset": None}


class Whole(GoToGoal):
    """Its reset takes anything, and begins all rows anew: it says that it cannot begin some alone."""

    takes_rows = False

    def reset(self, **options):
        super().reset(episodes=options["episodes"])
