"""Which task a policy of several does for a client: what its prompt says, with every observation."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_data, tiny_experiment

from scd_robot.policies import load_policy
from scd_robot.serve import RemotePolicy, RequestRefusedError
from scd_robot.training import train

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory):
    """A policy of the tasks 'left' and 'right'."""
    folder = tmp_path_factory.mktemp("tasks") / "run"
    experiment = tiny_experiment(1).with_tasks({"left": (1.0, 0.0), "right": (0.0, 1.0)})
    data = replace(tiny_data(), episode_text={"task": ["left", "right"] * 3})
    train(data, experiment, folder, accelerator="cpu", progress=False)
    return folder


def batched(observation):
    return {key: value[None] for key, value in observation.items()}


def test_a_prompt_names_the_task(two_tasks, start, connect, stream):
    server = start(load_policy(two_tasks), batch_window_s=0.05)
    observation = stream(1)[0]
    plans = {}
    for task in ("left", "right"):
        client = connect(server)
        assert (client.metadata["tasks"], client.metadata["task"]) == (["left", "right"], None)
        plans[task] = client.infer(observation, prompt=task, reset=True, episode=0)["actions"]
        alone = load_policy(two_tasks, task=task)
        alone.reset(episodes=[0])
        alone.observe(batched(observation))
        np.testing.assert_allclose(plans[task], alone.plan()[0], **CLOSE)
    client = connect(server)
    for wrong, reason in ((None, "'left', 'right'"), ("rihgt", "did you mean 'right'")):
        with pytest.raises(RequestRefusedError, match=reason):
            client.infer(observation, prompt=wrong)
    assert client.infer(observation, prompt="left")["scd/new_history"]


@pytest.mark.parametrize("own", [None, "right"])
def test_a_prompt_that_is_missing_after_another_is_refused(two_tasks, own, start, connect, stream):
    """Neither the last task nor the server's is what the client said."""
    client = connect(start(load_policy(two_tasks, task=own)))
    first, second, third = stream(3)
    client.infer(first, prompt="left")
    for forgotten in ({}, {"observe_only": True}, {"prompt": ""}, {"reset": True}):
        with pytest.raises(RequestRefusedError, match="has no prompt, those before it had 'left'"):
            client.infer(second, **forgotten)
    answer = client.infer(second, prompt="left", step=1)
    assert not answer["scd/new_history"], "what was refused changed nothing"
    client.reset()
    assert client.infer(third, prompt="right")["scd/new_history"]


def test_a_client_without_prompts_has_the_servers_task(two_tasks, start, connect, stream):
    server = start(load_policy(two_tasks, task="right"))
    observation = stream(1)[0]
    told, plain = (connect(server).infer(observation, reset=True, episode=0, prompt=task) for task in ("right", None))
    np.testing.assert_allclose(plain["actions"], told["actions"], **CLOSE)
    assert connect(server).metadata["task"] == "right"


def test_a_remote_policy_goes_back_to_the_servers_task(two_tasks, start, stream):
    remote = RemotePolicy(start(load_policy(two_tasks, task="right")).address)
    acted = {}
    for task in ("left", None, "right"):  # with one connection
        remote.task = task
        remote.reset(episodes=[0])
        acted[task] = remote.act(batched(stream(1)[0]))
    remote.close()
    np.testing.assert_allclose(acted[None], acted["right"], **CLOSE)
    assert np.abs(acted["left"] - acted["right"]).max() > 1e-4
