"""The graphs compute what the policy computes, whatever it was trained with; here as modules, before any exporter."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from eager_graphs import eager_export
from pictures import picture_data, picture_policy
from small_policies import small_policy
from tiny import tiny_data, tiny_experiment

from scd_robot.errors import ConfigError
from scd_robot.export.graphs import EncoderStep, new_cache
from scd_robot.export.parity import check_parity, compare, drawn_observations
from scd_robot.model import ScdModel
from scd_robot.normalization import Normalizer, compute_statistics
from scd_robot.policies import ScdPolicy
from scd_robot.rotations import convert_rotation
from scd_robot.training.transformed import transformed
from scd_robot.transforms import ChunkPart, GripperStep, ImageStep, RotationStep, TransformConfig
from scd_robot.types import ArraySpec

AVERAGE = {"sampler": {"solver": "average", "num_denoising_steps": 2}}
MIP = {"sampler": {"solver": "mip", "num_denoising_steps": 2}}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "concat": ({"fusion": "concat"}, {}),
    "real-time chunking": ({"max_delay_steps": 3}, {}),
    "real-time chunking, concat": ({"max_delay_steps": 2, "fusion": "concat"}, {}),
    "slots in the history": ({"context_in_history": True}, {}),
    "converted": ({"encoder_bias": True, "encoder_modulation": True}, {}),
    "several samples": ({"max_delay_steps": 2}, {"num_samples": 3}),
    "guidance": ({}, {"guidance_scale": 1.5}),
    "stride": ({"history_stride": 2, "past_action_input": "none"}, {}),
    "key by key": ({"observation_tokens": "per_key", "memory_gate": True}, {}),
    "average velocity": ({"step_end_input": True, "max_delay_steps": 2}, AVERAGE),
    "two regressions": ({}, MIP),
    "memoryless": ({"history_length": 1}, {"sampler": {"solver": "heun", "num_denoising_steps": 2}}),
}


def picture(**model: Any) -> ScdPolicy:
    config = TransformConfig(images=(ImageStep("eye", (12, 24), (8, 16)),))
    shapes = {"position": (2,), "eye": (8, 16, 3), "wrist": (8, 12, 1)}
    return picture_policy("separable", picture_data(), config, observation_shapes=shapes, **model)


def relative() -> ScdPolicy:
    policy = small_policy()
    parts = (ChunkPart(action_start=0, key="position", key_start=0, count=1),)
    config = TransformConfig(chunk="relative", chunk_parts=parts, grippers=(GripperStep("action", 1, 0.0, 1.0),))
    return ScdPolicy(policy.model, policy.normalizer, policy.transforms.dataset, policy.config, transforms=config)


def several_tasks() -> ScdPolicy:
    """Which also is shown goals."""
    experiment = tiny_experiment().with_tasks({"left": (1.0, 0.0), "right": (0.0, 1.0)}).with_goals(["position"])
    recorded = replace(tiny_data(), episode_text={"task": ["left", "right"] * 3})
    data = transformed(recorded, experiment.transforms)
    keys = [*experiment.model.observation_shapes, "action"]
    normalizer = Normalizer(
        {key: compute_statistics(data.arrays[key], key) for key in keys}, dict.fromkeys(keys, "min_max")
    )
    torch.manual_seed(0)
    model = ScdModel(experiment.model)
    return ScdPolicy(model, normalizer, recorded.spec, experiment.policy, transforms=experiment.transforms)


def turning() -> ScdPolicy:
    """Observations and actions hold rotations, as matrices and quaternions."""
    data, rng = tiny_data(), np.random.default_rng(5)
    quaternions = rng.standard_normal((data.num_steps, 4)).astype(np.float32)
    matrices = convert_rotation(quaternions, "quat_xyzw", "matrix")
    arrays = data.arrays | {
        "position": np.concatenate((data.arrays["position"], matrices), axis=1),
        "action": np.concatenate((data.arrays["action"][:, :1], matrices), axis=1),
        "goal": quaternions,
    }
    del arrays["executed_action"]
    specs = {key: ArraySpec(arrays[key].shape[1:]) for key in ("position", "goal")}
    data = replace(data, spec=replace(data.spec, observation=specs, action_dim=10), arrays=arrays)
    steps = (RotationStep("position", 2, "matrix"), RotationStep("goal", 0, "quat_xyzw"))
    config = TransformConfig(rotations=(*steps, RotationStep("action", 1, "matrix")), goals=("position",))
    shapes = {"position": (8,), "goal": (6,), "goal.position": (8,)}
    return picture_policy("separable", data, config, observation_shapes=shapes, action_dim=7)


@pytest.mark.parametrize("case", CASES)
def test_the_graphs_follow_the_policy_through_evictions_and_a_reset(case: str) -> None:
    model, settings = CASES[case]
    policy = small_policy(model, **settings)
    report = check_parity(policy, eager_export(policy, 2))
    assert report["good"]
    assert report["control_steps"] // 2 > policy.architecture.history_length * policy.architecture.history_stride
    assert report["longest_prefix"] == (model.get("max_delay_steps") or policy.spec.chunk_length - 1)


@pytest.mark.parametrize("make", [picture, relative, several_tasks, turning])
def test_the_graphs_follow_the_policy_behind_transforms(make) -> None:
    policy = make()
    assert check_parity(policy, eager_export(policy))["good"]


@pytest.mark.parametrize("spoil", ["weights", "normalisation", "eviction"])
def test_a_graph_that_computes_something_else_is_not_good(spoil: str, monkeypatch) -> None:
    policy, exported = small_policy(), eager_export(small_policy())
    encoder = exported._runtime.made["encoder_step"][0]
    if spoil == "weights":
        encoder.model.encoder.blocks[0].qkv.weight.data[0, 0] += 0.1
    elif spoil == "normalisation":
        encoder.normalizer.gain_0.mul_(1.001)
    else:  # the step that leaves the window stays visible, in a window that is one slot larger
        exported = eager_export(small_policy({"history_length": 5}))
    with pytest.raises(ConfigError, match="the graphs are not good: largest differences"):
        check_parity(policy, exported)


def act_all(policy, observations, reset_at: int = 6) -> np.ndarray:
    policy.reset(episodes=[3, 4, 5])
    actions = []
    for step, observation in enumerate(observations):
        if step == reset_at:
            policy.reset(rows=[1], episodes=[9])
        executed = None if step % 5 or not step else 0.9 * actions[-1]
        actions.append(policy.act(observation, executed))
    return np.stack(actions)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_any_number_of_rows_acts_as_the_policy_does_with_the_same_noise(batch_size: int, stride: int) -> None:
    policy = small_policy({"history_stride": stride})
    observations = drawn_observations(policy, 3)
    expected = act_all(policy, observations)
    np.testing.assert_allclose(act_all(eager_export(policy, batch_size), observations), expected, atol=1e-4)


def test_rows_that_do_not_take_a_step_see_what_they_saw_whatever_stands_in_their_observation() -> None:
    """Through more control steps than the window has, so that each slot is written while the row stands still."""
    policy = small_policy()
    graph = EncoderStep(policy.model, policy.normalizer).eval()
    window, given = policy.architecture.history_length, len(graph.inputs)
    rng = torch.Generator().manual_seed(0)
    caches = [new_cache(policy.model, 2), new_cache(policy.model, 2)]  # one meets NaN where it stands still
    for step in range(3 * window):
        arguments = graph.example(2)
        for value in arguments:
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=rng))
        arguments[-1][1] = step % 3 == 0
        contexts = []
        for index, cache in enumerate(caches):
            shown = [one.clone() for one in arguments]
            if index and step % 3:
                for value in shown:
                    if value.is_floating_point():
                        value[1] = torch.nan
            with torch.no_grad():
                context, *caches[index] = graph(*shown[:given], *cache)
            contexts.append(context if step % 3 == 0 else context[:1])
        assert contexts[0].isfinite().all()
        torch.testing.assert_close(contexts[1], contexts[0])
    assert caches[0][2].tolist() == [3 * window, window]


@pytest.mark.parametrize(
    ("make", "key"), [(lambda: small_policy({"observation_tokens": "per_key"}), "goal"), (picture, "eye")]
)
def test_keys_that_are_absent_in_a_step_are_absent_in_the_graph(make, key: str) -> None:
    policy = make()
    exported, observations = eager_export(policy), drawn_observations(policy, 1)
    for step, observation in enumerate(observations):
        seen = {**observation, key: observation[key] if step % 3 else None}
        for one in (policy, exported):
            one.observe(seen)
        np.testing.assert_allclose(exported.context, policy.context.numpy(), atol=1e-5)


def test_histories_come_and_go_between_control_steps() -> None:
    """As the policy server has them: joined, left alone, joined in another order, with gaps."""
    policy = small_policy()
    exported, observations = eager_export(policy, 2), drawn_observations(policy, 3)

    def run(one) -> np.ndarray:
        histories = [one.new_history(episode) for episode in range(3)]
        chunks = []
        for step, observation in enumerate(observations):
            rows = [(0, 1, 2), (2, 0), (1,)][step % 3]
            one.resume([histories[row] for row in rows])
            one.observe({key: value[list(rows)] for key, value in observation.items()})
            chunks.append(one.plan()[0])
            for row, history in zip(rows, one.release(), strict=True):
                if step % 4 == 3:
                    history.skip(1)
                histories[row] = history
        return np.stack(chunks)

    np.testing.assert_allclose(run(exported), run(policy), atol=1e-4)


def test_a_prefix_is_followed_exactly_and_a_longer_one_refused() -> None:
    policy = small_policy({"max_delay_steps": 2})
    exported, observation = eager_export(policy), drawn_observations(policy, 1)[0]
    exported.observe(observation)
    prefix = np.full((1, 2, 2), 0.25, np.float32)
    np.testing.assert_array_equal(exported.plan(prefix)[:, :2], prefix)
    with pytest.raises(ConfigError, match="prefix holds 3 actions; this policy takes at most 2"):
        exported.plan(np.zeros((1, 3, 2), np.float32))


def test_a_comparison_of_a_few_steps_tells_how_far_it_went(capsys) -> None:
    policy = small_policy()
    report = compare(policy, eager_export(policy), drawn_observations(policy, 1)[:6], progress=True)
    assert "comparing: 100%" in capsys.readouterr().err
    assert (report["control_steps"], report["plans"], report["reset_at"]) == (6, 6, 3)
    assert 0 <= report["action"]["rms"] <= report["action"]["max"]
