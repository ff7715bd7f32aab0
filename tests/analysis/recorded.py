"""Streams as an evaluation records them, of policies whose models nobody trained."""

from dataclasses import replace

import numpy as np
import torch
from tiny import tiny_data, tiny_experiment

from scd_robot.analysis.streams import Stream, StreamRecorder
from scd_robot.model import ScdModel
from scd_robot.policies import ScdPolicy
from scd_robot.training.start import fit_normalizer
from scd_robot.training.transformed import transformed
from scd_robot.transforms import TransformConfig


def stream(episode, length, seed=0):
    """Random observations and actions of the toy environment."""
    rng = np.random.default_rng(seed + episode)
    rows = rng.standard_normal((length, 4)).astype(np.float32)
    return Stream(
        episode,
        [{"position": row[:2], "goal": row[2:]} for row in rows],
        [row[:2] for row in rows],
        [row[1:3] for row in rows],
    )


def untrained(model=None, transforms=None):
    """A policy with random weights for the toy environment; `model` replaces fields of the architecture."""
    torch.manual_seed(0)
    data = tiny_data()
    data = replace(data, spec=replace(data.spec, control_dt=0.05))
    experiment = replace(tiny_experiment(model=model), transforms=transforms or TransformConfig())
    normalizer = fit_normalizer(transformed(data, experiment.transforms), experiment)
    network = ScdModel(experiment.model)
    return ScdPolicy(network, normalizer, data.spec, experiment.policy, transforms=experiment.transforms)


def recorded(policy):
    """Three episodes that a policy ran: 0 and 1 side by side, and then 2 in the row of 0."""
    recorder = StreamRecorder(policy)
    recorder.reset(episodes=[0, 1])
    running, at = [stream(0, 7), stream(1, 16)], [0, 0]
    for step in range(16):
        if step == 7:
            recorder.reset([0], [2])
            running[0], at[0] = stream(2, 9), 0
        now = [source.observation[i] for source, i in zip(running, at, strict=True)]
        executed = np.stack([source.executed[i] for source, i in zip(running, at, strict=True)])
        recorder.act({key: np.stack([seen[key] for seen in now]) for key in now[0]}, executed if step else None)
        at = [i + 1 for i in at]
    return [recorder.streams[episode] for episode in range(3)]
