"""`ScdPolicy`: when it plans, what reaches the model, committed actions, self-verification, overrides."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_data

from scd_robot.checkpoint import write_checkpoint
from scd_robot.config import to_json
from scd_robot.diffusion import SamplerConfig
from scd_robot.errors import ConfigError, ShapeError
from scd_robot.model import ActionPlan
from scd_robot.policies import ScdPolicy, load_policy
from scd_robot.seeding import POLICY_NOISE, keyed_rng
from scd_robot.types import DatasetSpec

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "memoryless": {"model": {"history_length": 1}},
    "concat": {"model": {"fusion": "concat"}},
    "guided": {"guidance_scale": 1.5, "model": {"context_corruption": 0.1}},
    "verified": {"num_samples": 3},
    "heun": {"sampler": {"solver": "heun", "num_denoising_steps": 3}},
    "average": {"sampler": {"solver": "average", "num_denoising_steps": 2}, "model": {"step_end_input": True}},
    "mip": {"sampler": {"solver": "mip", "num_denoising_steps": 2}},
}


def watch(policy: ScdPolicy) -> SimpleNamespace:
    """Notes what the policy hands to its model and gets from it."""
    seen = SimpleNamespace(plans=[], past_actions=[], contexts=[])
    plan, encode_step = policy.model.plan, policy.model.encode_step

    def watched_plan(context, **options):
        seen.plans.append({"context": context.clone(), **options})
        return plan(context, **options)

    def watched_encode_step(observation, cache, *args, past_action=None, **options):
        seen.past_actions.append(None if past_action is None else past_action.clone())
        context = encode_step(observation, cache, *args, past_action=past_action, **options)
        seen.contexts.append(context.clone())
        return context

    policy.model.plan, policy.model.encode_step = watched_plan, watched_encode_step
    return seen


def full_contexts(policy: ScdPolicy, observations, past: np.ndarray | None) -> torch.Tensor:
    """(B, T, K, D) contexts of an episode in one pass over it; `past` (T, B, Da) executed one step before."""
    with torch.no_grad():
        normalised = {
            key: policy.normalizer.normalize(key, torch.as_tensor(np.stack([o[key] for o in observations], 1)))
            for key in policy.spec.observation
        }
        if past is None:
            return policy.model.encode(normalised)
        actions = policy.normalizer.normalize("action", torch.as_tensor(past).transpose(0, 1))
        return policy.model.encode(normalised, actions)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_alone_acts_as_in_a_batch_and_gets_the_same_noise(scd_policy, stream, variant: str) -> None:
    steps, rows, resets = 14, 5, {4: [1, 3], 5: [3], 9: [0, 1, 4]}
    observations = stream(rows, steps)

    def run(chosen: list[int]) -> tuple[np.ndarray, list[dict]]:
        policy = scd_policy(**VARIANTS[variant])
        seen = watch(policy)
        policy.reset(episodes=[100 * row for row in chosen])
        actions = []
        for step, observation in enumerate(observations):
            again = [row for row in resets.get(step, []) if row in chosen]
            if again:
                policy.reset(rows=[chosen.index(row) for row in again], episodes=[100 * row + step for row in again])
            actions.append(policy.act({key: value[chosen] for key, value in observation.items()}))
        return np.stack(actions), seen.plans

    together, plans = run(list(range(rows)))
    noise_together = {array.numpy().tobytes() for plan in plans for array in plan["noise"]}
    for row in range(rows):
        alone, own_plans = run([row])
        np.testing.assert_allclose(alone[:, 0], together[:, row], atol=1e-4)
        noise_alone = {array.numpy().tobytes() for plan in own_plans for array in plan["noise"]}
        assert noise_alone <= noise_together
        assert len(noise_alone) == sum(len(plan["noise"]) for plan in own_plans), "no two plans share their noise"


def test_noise_is_keyed_by_seed_episode_and_plan(scd_policy, stream) -> None:
    policy = scd_policy(seed=3)
    seen = watch(policy)
    policy.reset(episodes=[7, 8])
    for observation in stream(2, 5):
        policy.act(observation)
    for number, plan in enumerate(seen.plans):
        for row, episode in enumerate((7, 8)):
            expected = keyed_rng(POLICY_NOISE, 3, episode, number).standard_normal((4, 2), dtype=np.float32)
            np.testing.assert_array_equal(plan["noise"][row].numpy(), expected)


@pytest.mark.parametrize("num_executed", [1, 2, 3, 4])
def test_act_is_observe_and_a_plan_every_num_executed_steps(scd_policy, stream, num_executed: int) -> None:
    acting, planning = (scd_policy(num_executed=num_executed) for _ in range(2))
    chunk = np.empty(0)
    for step, observation in enumerate(stream(3, 11)):
        action = acting.act(observation)
        planning.observe(observation)
        if step % num_executed == 0:
            chunk = planning.plan()
        np.testing.assert_array_equal(action, chunk[:, step % num_executed])


def test_every_row_has_its_own_planning_phase(scd_policy, stream) -> None:
    policy = scd_policy(num_executed=2)
    seen = watch(policy)
    planned = []
    for step, observation in enumerate(stream(2, 8)):
        if step == 3:
            policy.reset(rows=[1])
        policy.act(observation)
        planned.append(sum(len(plan["context"]) for plan in seen.plans))
        seen.plans.clear()
    assert planned == [2, 0, 2, 1, 1, 1, 1, 1]


def test_observing_only_advances_history_and_the_running_chunk(scd_policy, stream) -> None:
    observations = stream(2, 8)
    policy = scd_policy(num_executed=3)
    seen = watch(policy)
    for observation in observations[:3]:
        policy.observe(observation)
    assert not seen.plans
    first = policy.act(observations[3])
    assert len(seen.plans) == 1
    torch.testing.assert_close(seen.plans[0]["context"], seen.contexts[3])
    chunk = policy._rows.chunk.copy()
    np.testing.assert_array_equal(first, chunk[:, 0])
    policy.observe(observations[4])
    np.testing.assert_array_equal(policy.act(observations[5]), chunk[:, 2])
    assert len(seen.plans) == 1
    policy.observe(observations[6])  # the plan is used up now; the next action needs a new one
    policy.act(observations[7])
    assert len(seen.plans) == 2


@pytest.mark.parametrize("reported", [False, True])
def test_context_is_that_of_the_encoder_over_the_whole_episode(scd_policy, stream, reported: bool) -> None:
    """The previous action that it reads is the executed one: as reported, else as the policy asked for."""
    policy, observations = scd_policy(model={"past_action_input": "noised"}), stream(3, 20)
    seen = watch(policy)
    rng = np.random.default_rng(0)
    past = [np.zeros((3, 2), np.float32)]
    for observation in observations:
        executed = past[-1] if reported else None
        action = policy.act(observation, executed)
        past.append(rng.uniform(-1, 1, (3, 2)).astype(np.float32) if reported else action)
    expected = full_contexts(policy, observations, np.stack(past[:-1]))
    torch.testing.assert_close(torch.stack(seen.contexts, 1), expected, atol=1e-5, rtol=0)
    if reported:
        asked = full_contexts(policy, observations, np.stack(past[:-1]) * 0)
        assert (asked - expected).abs().max() > 1e-2, "the context does not depend on the previous action"


class TestCommittedActions:
    def test_prefix_begins_the_chunk_exactly(self, scd_policy, stream) -> None:
        policy = scd_policy()
        policy.observe(stream(3, 1)[0])
        prefix = np.random.default_rng(1).uniform(-2, 2, (3, 3, 2)).astype(np.float32)
        chunk = policy.plan(prefix=prefix)
        assert chunk.shape == (3, 4, 2)
        np.testing.assert_array_equal(chunk[:, :3], prefix)
        np.testing.assert_array_equal(policy.plan(prefix=prefix.astype(np.float64), delay_steps=3)[:, :3], prefix)

    def test_prefix_changes_what_follows(self, scd_policy, stream) -> None:
        chunks = []
        for value in (-1, 1):
            policy = scd_policy()
            policy.observe(stream(1, 1)[0])
            chunks.append(policy.plan(prefix=np.full((1, 2, 2), value)))
        assert np.abs(chunks[0][:, 2:] - chunks[1][:, 2:]).max() > 1e-3

    def test_delay_commits_the_running_chunk_from_the_present_step_on(self, scd_policy, stream) -> None:
        policy, observations = scd_policy(num_executed=2), stream(2, 4)
        policy.observe(observations[0])
        first = policy.plan()
        policy.observe(observations[1])
        second = policy.plan(delay_steps=2)
        np.testing.assert_array_equal(second[:, :2], first[:, 1:3])
        assert (second[:, 2:3] != first[:, 3:]).any()
        np.testing.assert_array_equal(policy.act(observations[2]), second[:, 1])

    def test_index_0_is_the_control_step_last_observed(self, scd_policy, stream) -> None:
        policy, observations = scd_policy(num_executed=4), stream(1, 4)
        policy.observe(observations[0])
        policy.observe(observations[1])
        chunk = policy.plan()
        for step in (2, 3):
            np.testing.assert_array_equal(policy.act(observations[step]), chunk[:, step - 1])

    @pytest.mark.parametrize(
        ("options", "error", "told"),
        [
            ({"prefix": np.zeros((2, 1, 3))}, ShapeError, r"prefix must be \(2, 1, 2\), got \(2, 1, 3\)"),
            ({"prefix": np.zeros((3, 1, 2))}, ShapeError, r"prefix must be \(2, 1, 2\)"),
            ({"prefix": np.zeros((2, 2))}, ShapeError, "prefix must be"),
            ({"prefix": np.zeros((2, 2, 2)), "delay_steps": 1}, ShapeError, r"prefix must be \(2, 1, 2\)"),
            ({"prefix": np.full((2, 1, 2), np.nan)}, ShapeError, "prefix holds a NaN"),
            ({"prefix": np.zeros((2, 4, 2))}, ConfigError, "shorter than chunk_length 4"),
            ({"delay_steps": -1}, ConfigError, "must not be negative, got -1"),
            ({"delay_steps": 1}, ConfigError, "what is left of the running chunk, 0"),
        ],
    )
    def test_what_cannot_be_committed_is_refused(self, scd_policy, stream, options, error, told) -> None:
        policy = scd_policy()
        policy.observe(stream(2, 1)[0])
        with pytest.raises(error, match=told):
            policy.plan(**options)

    def test_planning_needs_an_observation(self, scd_policy, stream) -> None:
        policy = scd_policy()
        with pytest.raises(ConfigError, match="needs an observation first"):
            policy.plan()
        policy.act(stream(1, 1)[0])
        policy.reset()
        with pytest.raises(ConfigError, match="needs an observation first"):
            policy.plan()
        with pytest.raises(ConfigError, match="before the first observation"):
            policy.context  # noqa: B018
        with pytest.raises(ConfigError, match="before the first observation"):
            policy.reset(rows=[0])


class TestSelfVerification:
    """Sample i of a row has actions of value i; which past it believes in is set here."""

    @pytest.fixture
    def policy(self, scd_policy):
        return scd_policy(num_samples=3, num_executed=1)

    def believe(self, policy: ScdPolicy, past: np.ndarray) -> None:
        """Lets plans have the past (rows, N, k, Da), in the dataset's units."""
        rows, count = past.shape[:2]
        normalised = policy.normalizer.normalize("action", torch.as_tensor(past, dtype=torch.float32)).flatten(0, 1)
        actions = torch.arange(count).float().repeat(rows)[:, None, None].expand(-1, 4, 2)
        chunks = policy.normalizer.normalize("action", actions)
        policy.model.plan = lambda context, **options: ActionPlan(chunks, normalised, 1)

    def test_the_sample_nearest_to_the_executed_past_is_followed(self, policy, stream) -> None:
        executed = np.array([[[0.5, -0.5], [0.1, 0.2]], [[-0.3, 0.3], [0.0, 0.9]]], np.float32)  # (k, rows, Da)
        observations = stream(2, 3)
        policy.observe(observations[0])
        policy.observe(observations[1], executed[0])
        far = np.full((2, 3, 2, 2), 5.0)
        far[0, 2] = executed[:, 0] + 0.01
        far[0, 1] = executed[:, 0] + 0.02
        far[1, 1] = executed[:, 1] - 0.01
        self.believe(policy, far)
        np.testing.assert_allclose(policy.act(observations[2], executed[1]), [[2, 2], [1, 1]], atol=1e-5)

    def test_only_steps_that_were_taken_count(self, policy, stream) -> None:
        executed = np.array([[0.5, -0.5]], np.float32)
        observations = stream(1, 2)
        policy.observe(observations[0])
        believed = np.zeros((1, 3, 2, 2))
        believed[0, :, 0] = [[9, 9], [0, 0], [0, 0]]  # before the episode: sample 0 is far off, which must not matter
        believed[0, :, 1] = [[0.5, -0.5], [0.4, -0.5], [0.3, -0.5]]
        self.believe(policy, believed)
        np.testing.assert_allclose(policy.act(observations[1], executed), [[0, 0]], atol=1e-5)

    def test_without_a_past_the_first_sample_is_followed(self, policy, stream) -> None:
        self.believe(policy, np.random.default_rng(0).normal(size=(2, 3, 2, 2)))
        np.testing.assert_allclose(policy.act(stream(2, 1)[0]), np.zeros((2, 2)), atol=1e-5)

    def test_all_samples_come_from_one_context_with_noise_of_their_own(self, policy, stream) -> None:
        seen = watch(policy)
        policy.act(stream(2, 1)[0])
        (plan,) = seen.plans
        assert plan["with_past"]
        context = plan["context"].view(2, 3, *plan["context"].shape[1:])
        assert torch.equal(context, context[:, :1].expand_as(context))
        assert not torch.equal(context[0], context[1])
        assert len({noise.numpy().tobytes() for noise in plan["noise"]}) == 6


class TestSettings:
    def test_overrides_replace_those_of_the_checkpoint(self, tiny_run) -> None:
        plain = load_policy(tiny_run)
        assert (plain.config.num_executed, plain.config.sampler.num_denoising_steps, plain.config.seed) == (2, 2, 0)
        policy = load_policy(tiny_run, num_denoising_steps=5, num_executed=4, seed=9)
        assert (policy.config.num_executed, policy.config.sampler.num_denoising_steps) == (4, 5)
        assert (policy.config.sampler.solver, policy.config.seed) == (plain.config.sampler.solver, 9)
        assert (policy.spec.num_executed, plain.spec.num_executed) == (4, 2)
        assert load_policy(tiny_run, num_denoising_steps=None, seed=None).config == plain.config

    def test_overrides_may_be_objects_and_numbers_of_numpy(self, tiny_run) -> None:
        midpoint = SamplerConfig("midpoint", 2)
        assert load_policy(tiny_run, sampler=midpoint).config.sampler == midpoint
        assert load_policy(tiny_run, sampler=midpoint, num_denoising_steps=np.int64(4)).config.sampler == replace(
            midpoint, num_denoising_steps=4
        )

    def test_each_override_has_an_effect(self, tiny_run, stream) -> None:
        plain = load_policy(tiny_run).act(stream(1, 1)[0])
        for override in ({"seed": 1}, {"num_denoising_steps": 1}):
            assert (load_policy(tiny_run, **override).act(stream(1, 1)[0]) != plain).any()

    @pytest.mark.parametrize(
        ("overrides", "told"),
        [
            ({"num_denoising_step": 4}, "no field 'num_denoising_step'"),
            ({"num_exectued": 4}, "did you mean 'num_executed'"),
            ({"num_executed": 5}, "num_executed 5 exceeds the model's chunk_length 4"),
            ({"num_executed": 0}, "num_executed must be at least 1, got 0"),
            ({"num_executed": "two"}, "num_executed must be int, got 'two'"),
            ({"num_denoising_steps": 0}, "num_denoising_steps must be at least 1, got 0"),
            ({"seed": -1}, "seed must not be negative"),
            ({"guidance_scale": -1.0}, "guidance_scale must not be negative"),
            ({"guidance_scale": float("nan")}, "guidance_scale must be finite"),
            ({"num_samples": 2}, "num_past_actions > 0"),
        ],
    )
    def test_override_that_is_unknown_or_out_of_range_is_refused(self, tiny_run, overrides, told) -> None:
        with pytest.raises(ConfigError, match=told):
            load_policy(tiny_run, **overrides)

    @pytest.mark.parametrize("device", ["abacus", "cuda:99"])
    def test_device_that_is_not_there_is_refused(self, tiny_run, device) -> None:
        with pytest.raises(ConfigError, match=f"cannot use device '{device}'"):
            load_policy(tiny_run, device=device)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_gives_the_same_actions_bit_by_bit(scd_policy, stream, tmp_path, variant: str) -> None:
    policy = scd_policy(**VARIANTS[variant])
    write_checkpoint(
        tmp_path / "saved",
        policy="scd",
        step=1,
        config={
            "preset": "tiny",
            "model": to_json(policy.model.config),
            "policy": to_json(policy.config),
            "transforms": to_json(policy.transforms.config),
        },
        dataset=DatasetSpec(policy.spec.observation, policy.spec.action_dim, policy.spec.control_dt),
        normalizer=policy.normalizer,
        weights=policy.model.state_dict(),
        origin={},
        metrics={},
    )
    loaded = load_policy(tmp_path / "saved")
    assert loaded.spec == policy.spec
    for observation in stream(3, 9):
        np.testing.assert_array_equal(loaded.act(observation), policy.act(observation))


def test_keys_that_the_model_does_not_read_are_not_asked_for(scd_policy, stream) -> None:
    """A dataset may hold more than a preset uses."""
    policy = scd_policy(model={"observation_shapes": {"goal": (2,)}})
    assert set(policy.spec.observation) == {"goal"}
    assert policy.act({"goal": stream(2, 1)[0]["goal"]}).shape == (2, 2)


def test_parts_of_different_checkpoints_are_refused(scd_policy) -> None:
    whole, part = scd_policy(), scd_policy(model={"observation_shapes": {"goal": (2,)}})
    with pytest.raises(ShapeError, match=r"'position' of shape .* the normalisation None; they must be of one"):
        ScdPolicy(whole.model, part.normalizer, tiny_data().spec)
