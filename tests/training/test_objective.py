"""The loss sees what it should: actions of the right steps, no data from outside the episode or before a reset."""

import dataclasses

import numpy as np
import pytest
import torch
from frame_models import frame_experiment
from tiny import LENGTHS, tiny_data, tiny_experiment

from scd_robot.errors import ConfigError
from scd_robot.model import ScdModel
from scd_robot.normalization import Normalizer, compute_statistics
from scd_robot.training.batches import SegmentDataset, TrainingBatch
from scd_robot.training.config import ExperimentConfig
from scd_robot.training.objective import encode_batch, loss_terms, select_samples

DATA = tiny_data()
ALL = np.arange(len(LENGTHS))


def parts(experiment: ExperimentConfig) -> tuple[ScdModel, Normalizer]:
    torch.manual_seed(0)
    keys = [*experiment.model.observation_shapes, "action"]
    normalizer = Normalizer({k: compute_statistics(DATA.arrays[k], k) for k in keys}, dict.fromkeys(keys, "identity"))
    model = ScdModel(experiment.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, normalizer


def batch_of(experiment: ExperimentConfig, step: int = 0) -> TrainingBatch:
    return SegmentDataset(DATA, experiment, ALL)[step]


def test_samples_hold_the_actions_of_their_control_steps() -> None:
    experiment = tiny_experiment(virtual_reset_probability=0.5)
    model, normalizer = parts(experiment)
    dataset = SegmentDataset(DATA, experiment, ALL)
    starts = np.r_[0, DATA.episode_ends[:-1]]
    for step in range(4):
        batch = dataset[step]
        segments = dataset._index.batch(step, range(4), 4)
        samples = select_samples(model, normalizer, batch)
        index = 0
        for b in range(4):
            episode = int(np.searchsorted(DATA.episode_ends, segments.start[b], side="right"))
            reset = int((batch.draws.stream[b] == 0).sum()) if batch.draws.stream[b].any() else 0
            for m in range(5):
                position = int(batch.draws.position[b, m])
                for _ in range(2):
                    if batch.draws.position_valid[b, m]:
                        begin = segments.start[b] + (reset if position >= reset else 0)
                        for token, offset in enumerate(range(-2, 4)):
                            at = segments.start[b] + position + offset
                            exists = starts[episode] <= at < DATA.episode_ends[episode]
                            known = exists and (offset >= 0 or at >= begin)
                            assert bool(samples.valid[index, token]) == known
                            if known:
                                source = DATA.arrays["executed_action" if offset < 0 else "action"]
                                np.testing.assert_allclose(samples.data[index, token].detach(), source[at], rtol=1e-6)
                    index += 1


def test_what_lies_outside_the_episode_is_never_learned() -> None:
    experiment = tiny_experiment()
    model, normalizer = parts(experiment)
    batch = batch_of(experiment)
    assert not batch.segments.action_valid.all(), "the batch has to reach past an episode's end"
    outside = ~batch.segments.action_valid[..., None]
    segments = batch.segments
    spoiled = {name: torch.where(outside, 1e4, getattr(segments, name)) for name in ("label", "executed")}
    poisoned = dataclasses.replace(batch, segments=dataclasses.replace(segments, **spoiled))
    clean, dirty = (loss_terms(model, normalizer, b) for b in (batch, poisoned))
    torch.testing.assert_close(clean, dirty)


def test_padding_after_a_segment_changes_nothing() -> None:
    experiment = tiny_experiment()
    model, normalizer = parts(experiment)
    batch = batch_of(experiment)
    assert not batch.segments.step_valid.all()
    padding = ~batch.segments.step_valid[..., None]
    observation = {k: torch.where(padding, 1e3, v) for k, v in batch.segments.observation.items()}
    poisoned = dataclasses.replace(batch, segments=dataclasses.replace(batch.segments, observation=observation))
    torch.testing.assert_close(loss_terms(model, normalizer, batch), loss_terms(model, normalizer, poisoned))


def test_a_virtual_reset_equals_a_new_stream() -> None:
    experiment = tiny_experiment(virtual_reset_probability=1.0)
    model, normalizer = parts(experiment)
    model.eval()
    batch = batch_of(experiment)
    context = encode_batch(model, normalizer, batch)
    for b in range(4):
        reset = int((batch.draws.stream[b] == 0).sum())
        assert 1 <= reset < batch.segments.step_valid.shape[1]
        length = int(batch.segments.step_valid[b].sum())
        observation = {k: v[b : b + 1, reset:length] for k, v in batch.segments.observation.items()}
        executed = batch.segments.past_action[b : b + 1, reset:length]
        alone = model.encode(observation, executed)
        torch.testing.assert_close(context[b : b + 1, reset:length], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("past_input", ["none", "full"])
@pytest.mark.parametrize("resets", [0.0, 1.0])
@torch.no_grad()
def test_a_sparse_history_is_that_of_a_client_that_sends_one_observation_per_plan(
    resets: float, past_input: str
) -> None:
    """Two actions of a plan are executed: every second control step is observed, and the one between only passes.

    What was executed there is known, as a server takes it from its plan.
    """
    settings = {"virtual_reset_probability": resets, "sparse_history_probability": 1.0}
    experiment = tiny_experiment(model={"past_action_input": past_input}, **settings)
    model, normalizer = parts(experiment)
    phases = set()
    for step in range(3):
        batch = batch_of(experiment, step)
        context, draws = encode_batch(model, normalizer, batch), batch.draws
        for b in range(4):
            observed = draws.stream[b] >= 0
            first = int(observed.int().argmax())
            phases.add(first)
            assert (observed == (torch.arange(len(observed)) % 2 == first)).all()
            assert observed[draws.position[b, draws.position_valid[b]]].all()
            assert draws.position_valid[b].any()
            cache, begun = model.new_cache(1), False
            past = normalizer.normalize("action", batch.segments.past_action)
            for t in range(int(batch.segments.step_valid[b].sum())):
                if t and draws.stream[b, t] == 1 and not (draws.stream[b, :t] == 1).any():
                    cache.reset()
                    begun = False
                if not observed[t]:
                    cache.position += 1
                    continue
                seen = {key: value[b : b + 1, t] for key, value in batch.segments.observation.items()}
                told = {} if past_input == "none" else {"past_action": past[b : b + 1, t]}
                told |= {"past_action_valid": torch.tensor([begun])} if told else {}
                step_context = model.encode_step(seen, cache, **told)
                torch.testing.assert_close(context[b : b + 1, t], step_context, atol=1e-5, rtol=0)
                begun = True
    assert phases == {0, 1}


def test_sparse_histories_are_as_many_as_asked_for_and_never_of_held_out_segments() -> None:
    experiment = tiny_experiment(sparse_history_probability=0.5)
    found = [bool((row < 0).any()) for step in range(50) for row in batch_of(experiment, step).draws.stream]
    assert 0.4 < np.mean(found) < 0.6
    held_out = SegmentDataset(DATA, experiment, ALL, validation=True)
    assert all((held_out[step].draws.stream >= 0).all() for step in range(len(held_out)))


def test_sparse_histories_are_refused_for_models_of_frames_and_as_shares_beyond_one() -> None:
    with pytest.raises(ConfigError, match=r"sparse_history_probability must be in \[0, 1\]"):
        tiny_experiment(sparse_history_probability=1.5)
    with pytest.raises(ConfigError, match="is for policies, which clients ask for plans"):
        frame_experiment(1, sparse_history_probability=0.5)


def test_committed_actions_are_the_executed_ones_and_carry_no_loss() -> None:
    experiment = tiny_experiment(model={"max_delay_steps": 3})
    model, normalizer = parts(experiment)
    batch = batch_of(experiment)
    samples = select_samples(model, normalizer, batch)
    delay = batch.draws.delay.flatten()
    counted_tokens = samples.committed.sum(1) <= delay
    assert counted_tokens.all()
    assert samples.committed.any()
    assert not samples.committed[:, :2].any()
    _, count = loss_terms(model, normalizer, batch)
    expected = (samples.valid & ~samples.committed & samples.counted[:, None]).sum()
    assert count == expected
    assert count < (samples.valid & samples.counted[:, None]).sum()


def test_chunks_end_after_what_nobody_could_foresee_and_answer_what_they_committed_to() -> None:
    """What is executed while a plan is made is known to it, be it disturbed: what follows is its answer."""
    experiment = tiny_experiment(model={"max_delay_steps": 3}, noise_draws=16)
    batch = batch_of(experiment)
    before = select_samples(*parts(experiment), batch)
    past = experiment.model.num_past_actions
    disturbed = torch.zeros_like(batch.segments.action_valid)
    disturbed[..., past + 1] = True  # action 1 of every chunk
    segments = dataclasses.replace(batch.segments, disturbed=disturbed)
    samples = select_samples(*parts(experiment), dataclasses.replace(batch, segments=segments))
    knows = samples.committed[:, past + 1]
    assert 0.1 < float(knows.float().mean()) < 0.9
    assert torch.equal(samples.committed, before.committed)
    assert torch.equal(samples.valid[knows], before.valid[knows])
    assert torch.equal(samples.valid[~knows, : past + 2], before.valid[~knows, : past + 2])
    assert not samples.valid[~knows, past + 2 :].any()


def test_half_of_the_plans_commit_to_nothing_and_the_rest_to_each_delay() -> None:
    """So that action 0 is learned as well as the others, however many delays there are."""
    experiment = tiny_experiment(model={"max_delay_steps": 3}, noise_draws=32)
    delay = batch_of(experiment).draws.delay.flatten()
    assert set(delay.tolist()) == {0, 1, 2, 3}
    assert 0.4 < float((delay == 0).float().mean()) < 0.6


@pytest.mark.parametrize("fusion", ["concat", "prefix"])
def test_every_parameter_gets_a_gradient(fusion: str) -> None:
    experiment = tiny_experiment(model={"fusion": fusion, "memory_gate": True, "max_delay_steps": 2})
    model, normalizer = parts(experiment)
    total, count = loss_terms(model, normalizer, batch_of(experiment))
    (total / count).backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not without


def test_draws_depend_on_seed_step_and_sample_alone() -> None:
    experiment = tiny_experiment()
    whole = SegmentDataset(DATA, experiment, ALL)[7]
    halves = [SegmentDataset(DATA, experiment, ALL, rank=rank, world_size=2)[7] for rank in (0, 1)]
    noise = torch.cat([half.draws.noise for half in halves])
    assert torch.equal(noise, whole.draws.noise)
    assert torch.equal(torch.cat([half.draws.position for half in halves]), whole.draws.position)
    other = SegmentDataset(DATA, tiny_experiment(seed=1), ALL)[7]
    assert not torch.equal(other.draws.noise, whole.draws.noise)


def test_a_memoryless_target_is_learned() -> None:
    """A constant action is denoised to itself after a few hundred steps."""
    experiment = tiny_experiment(model={"num_past_actions": 0, "past_action_input": "none"})
    data = tiny_data()
    data.arrays["action"][:] = np.float32([0.3, -0.6])
    model, normalizer = parts(experiment)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    dataset = SegmentDataset(
        data, dataclasses.replace(experiment, training=dataclasses.replace(experiment.training, max_steps=1000)), ALL
    )
    for step in range(250):
        total, count = loss_terms(model, normalizer, dataset[step])
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    with torch.no_grad():
        plan = model.plan(encode_batch(model, normalizer, dataset[999])[:, 0])
    torch.testing.assert_close(plan.actions.mean((0, 1)), torch.tensor([0.3, -0.6]), atol=0.05, rtol=0)


def test_burn_in_carries_no_loss_in_segments_that_begin_inside_an_episode() -> None:
    experiment = tiny_experiment(segment_length=6, burn_in=3, positions_per_segment=6)
    dataset, checked = SegmentDataset(DATA, experiment, ALL), 0
    for step in range(12):
        batch = dataset[step % 6]
        segments = dataset._index.batch(step % 6, range(4), 4)
        for b in range(4):
            chosen = set(batch.draws.position[b][batch.draws.position_valid[b]].tolist())
            inside = segments.start[b] > segments.episode_start[b]
            first = min(3, int(segments.lengths[b]) - 1) if inside else 0
            assert chosen == set(range(first, int(segments.lengths[b])))
            checked += inside
    assert checked > 0


def test_past_actions_are_noised_in_training_only() -> None:
    experiment = tiny_experiment()
    model, normalizer = parts(experiment)
    batch = batch_of(experiment)
    quiet = dataclasses.replace(
        batch, draws=dataclasses.replace(batch.draws, past_action_noise=torch.zeros_like(batch.draws.past_action_noise))
    )
    model.train()
    assert not torch.equal(encode_batch(model, normalizer, batch), encode_batch(model, normalizer, quiet))
    model.eval()
    assert torch.equal(encode_batch(model, normalizer, batch), encode_batch(model, normalizer, quiet))


@pytest.mark.parametrize("history_length", [1, 4])
@pytest.mark.parametrize("observation_tokens", ["joint", "per_key"])
def test_positions_have_the_contexts_of_the_whole_pass(history_length: int, observation_tokens: str) -> None:
    architecture = {"history_length": history_length, "observation_tokens": observation_tokens}
    experiment = tiny_experiment(model={**architecture, "past_action_input": "none"}, virtual_reset_probability=0.5)
    model, normalizer = parts(experiment)
    batch = batch_of(experiment)
    if observation_tokens == "per_key":
        present = {"goal": torch.rand(batch.segments.step_valid.shape) < 0.5}
        batch = dataclasses.replace(batch, segments=dataclasses.replace(batch.segments, present=present))
    whole, position = encode_batch(model, normalizer, batch), batch.draws.position
    expected = torch.stack([context[steps] for context, steps in zip(whole, position, strict=True)])
    found = select_samples(model, normalizer, batch).context[::2].unflatten(0, position.shape)  # of two noise draws one
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_without_memory_only_the_positions_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = tiny_experiment(model={"history_length": 1, "past_action_input": "none"})
    model, normalizer = parts(experiment)
    batch, shapes = batch_of(experiment), []
    encode = model.encoder.forward
    monkeypatch.setattr(model.encoder, "forward", lambda x, *rest: shapes.append(x.shape[:2]) or encode(x, *rest))
    select_samples(model, normalizer, batch)
    assert shapes == [batch.draws.position.shape]
