"""A policy undoes what was done to its training data, skips control steps, and does without silent sensors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_data, tiny_experiment

from scd_robot.datasets import EpisodeDataset
from scd_robot.errors import ConfigError, ShapeError
from scd_robot.model import ScdModel
from scd_robot.normalization import Normalizer, compute_statistics
from scd_robot.policies.scd import ScdPolicy, ScdPolicyConfig
from scd_robot.training.batches import SegmentDataset
from scd_robot.training.config import ExperimentConfig
from scd_robot.training.start import check_fits, fit_normalizer
from scd_robot.training.transformed import transformed
from scd_robot.transforms import ChunkPart, GripperStep, RotationStep, TransformConfig, Transforms
from scd_robot.types import ArraySpec, DatasetSpec

RELATIVE = TransformConfig(
    rename={"position": "place"}, chunk="relative", chunk_parts=(ChunkPart(0, "place", 1, 1),),
    grippers=(GripperStep("action", 1, closed=4.0, open=2.0),),
)  # fmt: skip


def make(transforms: TransformConfig, model: dict | None = None, num_executed: int = 2) -> ScdPolicy:
    data = tiny_data()
    spec = Transforms(transforms, data.spec).spec
    shapes = {key: array.shape for key, array in spec.observation.items()}
    experiment = tiny_experiment(model={"observation_shapes": shapes, "num_past_actions": 0, **(model or {})})
    torch.manual_seed(0)
    network = ScdModel(experiment.model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    normalizer = fit_normalizer(
        transformed(data, transforms),
        ExperimentConfig("tiny", experiment.model, experiment.training, experiment.policy, transforms),
    )
    return ScdPolicy(network, normalizer, data.spec, ScdPolicyConfig(num_executed), transforms=transforms)


def test_training_sees_relative_actions_and_mapped_grippers() -> None:
    data = tiny_data()
    base = tiny_experiment(model={"observation_shapes": {"place": (2,), "goal": (2,)}})
    experiment = ExperimentConfig("tiny", base.model, base.training, base.policy, RELATIVE)
    dataset = SegmentDataset(transformed(data, RELATIVE), experiment, np.arange(data.num_episodes))
    batch, segments = dataset[0], dataset._index.batch(0, range(4), 4)
    read = batch.segments
    raw = data.arrays
    for b in range(4):
        for m in range(5):
            at = segments.start[b] + int(batch.draws.position[b, m])
            for token, offset in enumerate(range(-2, 4)):
                if read.action_valid[b, m, token]:
                    for seen, key in ((read.label, "action"), (read.executed, "executed_action")):
                        action = raw[key][at + offset]
                        expected = [action[0] - raw["position"][at, 1], (action[1] - 4) / (2 - 4) * 2 - 1]
                        np.testing.assert_allclose(seen[b, m, token], expected, rtol=1e-5, atol=1e-6)
        at = segments.start[b] + 1
        expected = [raw["executed_action"][at - 1, 0] - raw["position"][at, 1], 3 - raw["executed_action"][at - 1, 1]]
        np.testing.assert_allclose(read.past_action[b, 1], expected, rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_relative_actions() -> None:
    policy, data = make(RELATIVE), tiny_data()
    from scd_robot.datasets import split_episodes

    train, _ = split_episodes(data.num_episodes, 0.2, 0)
    seen = []
    for episode in map(data.episode, train):
        for t in range(len(episode["action"])):
            later = np.minimum(t + np.arange(4), len(episode["action"]) - 1)
            seen.append(episode["action"][later, 0] - episode["position"][t, 1])
    expected = compute_statistics(np.stack(seen)[..., None], "action")
    found = policy.normalizer.statistics["action"]
    np.testing.assert_allclose((found.minimum[0], found.maximum[0], found.mean[0]),
                               (expected.minimum[0], expected.maximum[0], expected.mean[0]), rtol=1e-5)  # fmt: skip


def test_a_robot_gets_absolute_actions_in_recorded_units() -> None:
    """The model is blind here, so that its relative chunk is the same wherever the robot is."""
    policy = make(RELATIVE, model={"past_action_input": "none"})
    with torch.no_grad():
        for layer in policy.model.tokenizer.observation:
            layer.weight.zero_()
    position = np.array([[0.3, -0.5], [10.3, 7.0]], np.float32)
    policy.reset(episodes=[0, 0])
    policy.observe({"position": position, "goal": np.zeros((2, 2), np.float32)})
    chunk = policy.plan()
    np.testing.assert_allclose(chunk[1, :, 0] - chunk[0, :, 0], 7.5, atol=1e-5)
    np.testing.assert_allclose(chunk[1, :, 1], chunk[0, :, 1], atol=1e-6)
    with torch.no_grad():
        from scd_robot.seeding import POLICY_NOISE, keyed_rng

        noise = torch.from_numpy(keyed_rng(POLICY_NOISE, 0, 0, 0).standard_normal((1, 4, 2), np.float32))
        raw = policy.model.plan(policy._context[:1], sampler=policy.config.sampler, noise=noise).actions
        seen = policy.normalizer.denormalize("action", raw)[0].numpy()
    np.testing.assert_allclose(chunk[0], np.stack([seen[:, 0] - 0.5, 3 - seen[:, 1]], -1), atol=1e-5)


def test_committed_actions_reach_the_model_as_it_was_trained() -> None:
    policy = make(RELATIVE, model={"max_delay_steps": 2})
    handed = []
    plan = policy.model.plan
    policy.model.plan = lambda context, **options: handed.append(options["prefix"]) or plan(context, **options)
    observation = {"position": np.array([[0.0, 0.25]], np.float32), "goal": np.zeros((1, 2), np.float32)}
    policy.observe(observation)
    prefix = np.array([[[0.75, 3.0]]], np.float32)
    chunk = policy.plan(prefix)
    np.testing.assert_array_equal(chunk[:, :1], prefix)
    np.testing.assert_allclose(policy.normalizer.denormalize("action", handed[0]), [[[0.5, 0.0]]], atol=1e-5)


def test_with_a_stride_the_encoder_sees_every_so_many_control_steps(stream) -> None:
    policy = make(TransformConfig(), model={"history_stride": 2, "past_action_input": "none"}, num_executed=2)
    observations = stream(2, 7)
    for step, observation in enumerate(observations):
        if step == 3:
            policy.reset(rows=[1])  # at an odd step: the rows' phases differ from here on
        policy.act(observation)
    expected = []
    for row, seen in ((0, observations[::2]), (1, observations[3::2])):
        normalised = {
            key: policy.normalizer.normalize(key, torch.from_numpy(np.stack([o[key][row] for o in seen])[None]))
            for key in ("position", "goal")
        }
        with torch.no_grad():
            expected.append(policy.model.encode(normalised)[0, -1])
    torch.testing.assert_close(policy._context, torch.stack(expected), atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"rows \[1\] is due only"):
        policy.plan()


def test_plans_come_in_steps_in_which_the_encoder_runs() -> None:
    with pytest.raises(ConfigError, match="multiple of the model's history_stride 2"):
        make(TransformConfig(), model={"history_stride": 2}, num_executed=3)


def test_a_sensor_may_be_silent_where_each_has_a_token(stream) -> None:
    policy = make(TransformConfig(), model={"observation_tokens": "per_key", "past_action_input": "none"})
    observations = stream(1, 4)
    for step, observation in enumerate(observations):
        policy.observe({**observation, "goal": None} if step % 2 else observation)
    normalised = {
        key: policy.normalizer.normalize(key, torch.from_numpy(np.stack([o[key] for o in observations], 1)))
        for key in ("position", "goal")
    }
    present = {"goal": torch.tensor([[True, False, True, False]])}
    with torch.no_grad():
        expected = policy.model.encode(normalised, present=present)[:, -1]
    torch.testing.assert_close(policy._context, expected, atol=1e-5, rtol=1e-4)


def test_a_sensor_may_not_be_silent_otherwise(stream) -> None:
    observation = stream(1, 1)[0]
    with pytest.raises(ShapeError, match="'goal' is missing"):
        make(TransformConfig()).observe({"position": observation["position"]})
    relative = make(RELATIVE, model={"observation_tokens": "per_key"})
    assert relative.spec.optional == ("goal",)
    with pytest.raises(ShapeError, match="actions are relative to it"):
        relative.observe({"goal": observation["goal"]})
    with pytest.raises(ShapeError, match="no observation key is there"):
        relative.observe({})


def test_normalizer_of_other_keys_is_refused() -> None:
    policy = make(RELATIVE)
    keys = {"position": "min_max", "goal": "min_max", "action": "min_max"}
    data = tiny_data()
    plain = Normalizer({key: compute_statistics(data.arrays[key], key) for key in keys}, keys)
    with pytest.raises(ShapeError, match="'place'"):
        ScdPolicy(policy.model, plain, data.spec, transforms=RELATIVE)


def quaternions(silent: bool = False) -> EpisodeDataset:
    """The tiny dataset with poses, and actions that are the next pose; absent poses are zeros."""
    data, rng = tiny_data(), np.random.default_rng(0)
    turns = rng.standard_normal((len(data.arrays["action"]), 4)).astype(np.float32)
    pose = np.hstack((data.arrays["position"], turns / np.linalg.norm(turns, axis=1, keepdims=True)))
    arrays = {"goal": data.arrays["goal"], "pose": pose, "action": np.roll(pose, -1, axis=0)}
    if silent:
        there = np.arange(len(pose)) % 3 > 0
        arrays |= {"present.pose": there, "pose": np.where(there[:, None], pose, 0).astype(np.float32)}
    spec = DatasetSpec({"goal": ArraySpec((2,)), "pose": ArraySpec((6,))}, 6, data.spec.control_dt)
    return EpisodeDataset(spec, data.episode_ends, arrays)


ROTATED = TransformConfig(rotations=tuple(RotationStep(key, 2, "quat_xyzw") for key in ("pose", "action")))


def rotated(chunk: str = "absolute", **model: object) -> ExperimentConfig:
    parts = (ChunkPart(0, "pose", 0, 2), ChunkPart(2, "pose", 2, 6, True)) if chunk == "relative" else ()
    shapes = {"goal": (2,), "pose": (8,)}
    base = tiny_experiment(model={"observation_shapes": shapes, "action_dim": 8, **model})
    return replace(base, transforms=replace(ROTATED, chunk=chunk, chunk_parts=parts))


@pytest.mark.parametrize("chunk", ["absolute", "relative"])
@pytest.mark.parametrize(("shown", "samples"), [("full", 1), ("none", 3)])
def test_unknown_past_actions_are_no_rotations_of_length_0(chunk, shown, samples) -> None:
    data, experiment = quaternions(), rotated(chunk, past_action_input=shown)
    normalizer = fit_normalizer(transformed(data, experiment.transforms), experiment)
    how = replace(experiment.policy, num_samples=samples)
    policy = ScdPolicy(ScdModel(experiment.model), normalizer, data.spec, how, transforms=experiment.transforms)
    steps = [{key: data.arrays[key][row : row + 2] for key in ("goal", "pose")} for row in range(4)]
    policy.observe(steps[0])
    policy.observe(steps[1])  # nothing was planned: what was done is not known
    for step in steps[2:]:
        assert np.isfinite(policy.act(step)).all()
    policy.reset(rows=[0])
    assert np.isfinite(policy.act(steps[0])).all()


def test_rotations_that_are_absent_are_not_converted() -> None:
    data = transformed(quaternions(silent=True), ROTATED)
    whole = transformed(quaternions(), ROTATED)
    there = data.arrays["present.pose"]
    np.testing.assert_array_equal(data.arrays["pose"][there], whole.arrays["pose"][there])


def test_actions_are_relative_to_what_is_always_there() -> None:
    experiment = rotated("relative", observation_tokens="per_key")
    with pytest.raises(ConfigError, match=r"actions are relative to 'pose'.*absent in some control steps"):
        check_fits(transformed(quaternions(silent=True), experiment.transforms), experiment)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16])
def test_small_integers_are_the_same_numbers_in_training_and_in_use(dtype) -> None:
    """They are no pictures, and no features of pictures."""
    data = tiny_data()
    touch = (100 * data.arrays["position"] + 100).astype(dtype).reshape(-1, 1, 2)
    spec = replace(data.spec, observation={"touch": ArraySpec((1, 2), np.dtype(dtype).name)})
    data = EpisodeDataset(spec, data.episode_ends, {"touch": touch, "action": data.arrays["action"]})
    transforms = TransformConfig(flatten=("touch",))
    experiment = replace(tiny_experiment(model={"observation_shapes": {"touch": (2,)}}), transforms=transforms)
    ready = transformed(data, transforms)
    normalizer = fit_normalizer(ready, experiment)
    model, batch = (
        ScdModel(experiment.model).eval(),
        SegmentDataset(ready, experiment, np.arange(1), validation=True)[0],
    )
    shown = normalizer.normalize_observation(batch.segments.observation)["touch"][0]
    assert shown.dtype == torch.float32
    assert shown.abs().max() <= 1
    policy = ScdPolicy(model, normalizer, data.spec, experiment.policy, transforms=transforms)
    seen = []
    encode_step = model.encode_step
    policy.model.encode_step = lambda observation, *rest, **more: (
        seen.append(observation["touch"]),
        encode_step(observation, *rest, **more),
    )[1]
    for row in range(data.episode_ends[0]):
        policy.observe({"touch": touch[row : row + 1]})
    np.testing.assert_array_equal(torch.cat(seen), shown[: len(seen)])
