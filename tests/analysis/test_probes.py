"""Probes of entangled policies and models of frames, on models whose numbers are known beforehand."""

from functools import partial

import numpy as np
import pytest
import torch
from frame_models import frame_config, frame_experiment, moving_square
from small_policies import small_policy
from tiny import tiny_data

from scd_robot.analysis.imagination import imagine_episodes
from scd_robot.analysis.probe_costs import cost_in_frames, shortcuts_of
from scd_robot.analysis.probe_report import conclusions, write_probe
from scd_robot.analysis.probes import Shortcut, choose_episodes, probe, shortened
from scd_robot.diffusion import SamplerConfig
from scd_robot.errors import ConfigError, ShapeError, UnknownNameError
from scd_robot.model import build_model
from scd_robot.policies import Imagination
from scd_robot.policies.scd import ScdPolicyConfig
from scd_robot.training.objective import loss_terms
from scd_robot.training.start import fit_normalizer

ENTANGLED = {
    "architecture": "entangled",
    "context_corruption": 0.0,
    "num_context_tokens": 1,
    "past_action_input": "none",
    "encoder_layers": 3,
}
STEPS = 4
SQUARE = moving_square(6)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch) -> None:
    monkeypatch.setattr("scd_robot.analysis.probe_costs._ROUNDS", 1)


def make_policy(sampler=None, **model):
    """Four layers."""
    return small_policy({**ENTANGLED, **model}, **({} if sampler is None else {"sampler": sampler}))


def make_frames(sampler=None, **model):
    """Four layers, weights all drawn at random."""
    config = frame_config(**{**ENTANGLED, **model})
    torch.manual_seed(0)
    network = build_model(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    normalizer = fit_normalizer(SQUARE, frame_experiment())
    how = ScdPolicyConfig(num_executed=1, **({} if sampler is None else {"sampler": SamplerConfig(**sampler)}))
    return Imagination(network, normalizer, SQUARE.spec, how)


def numbers(policy, episodes=(0, 2, 3, 5), positions=6, steps=STEPS):
    data = SQUARE if isinstance(policy, Imagination) else tiny_data()
    return probe(policy, data, episodes, positions=positions, num_denoising_steps=steps, progress=False)


def silence(policy, layer):
    """Makes a layer add nothing."""
    block = policy.model.decoder.blocks[layer]
    with torch.no_grad():
        block.modulation.weight.zero_()
        block.modulation.bias.zero_()


def see_nothing(policy):
    """Nothing of the noise and of flow time enters: the layers see the same at every denoising step."""
    with torch.no_grad():
        policy.model.decoder.embed.weight.zero_()
        for parameter in policy.model.decoder.flow_time.parameters():
            parameter.zero_()


def denoised(policy, steps=7):
    """A plan, or two frames."""
    if isinstance(policy, Imagination):
        rows = slice(0, steps + 1)
        return policy.imagine(SQUARE.arrays["eye"][None, :steps], SQUARE.arrays["action"][None, rows]).astype(int)
    rng = np.random.default_rng(0)
    policy.reset(episodes=[0, 1])
    for _ in range(steps):
        policy.observe({key: rng.uniform(-1, 1, (2, 2)).astype(np.float32) for key in ("position", "goal")})
    return policy.plan()


both = pytest.mark.parametrize("make", [make_policy, make_frames])


@both
def test_similarity_is_a_cosine_and_one_with_itself(make) -> None:
    document = numbers(make())
    assert document["denoises"] == ("frames" if make is make_frames else "actions")
    assert document["samples"] == (24 if make is make_frames else 23)
    for name in ("similarity", "similarity_of_additions"):
        matrices = np.array(document[name])
        assert matrices.shape == (4, STEPS, STEPS)
        np.testing.assert_allclose(np.diagonal(matrices, axis1=1, axis2=2), 1, atol=1e-5)
        np.testing.assert_allclose(matrices, matrices.swapaxes(1, 2), atol=1e-5)
        assert matrices.min() < 0.999
    by_quarter = np.array(document["similarity_by_quarter"], float)
    assert by_quarter.shape == (4, 4)
    means = np.array(document["similarity"])[:, :-1, -1].mean(axis=1)
    assert (np.nanmin(by_quarter, axis=1) <= means + 1e-6).all()
    assert (np.nanmax(by_quarter, axis=1) >= means - 1e-6).all()


@both
def test_features_that_never_change_are_alike(make) -> None:
    policy = make()
    see_nothing(policy)
    np.testing.assert_allclose(numbers(policy)["similarity"], 1, atol=1e-5)


def test_similarity_is_that_of_features_at_two_denoising_steps() -> None:
    """The first two of a sampler of as many steps, worked out here by hand."""
    policy = make_frames()
    decoder, seen = policy.model.decoder, []
    compute = decoder.layer

    def layer(number, tokens, *given):
        seen.append(compute(number, tokens, *given))
        return seen[-1]

    decoder.layer = layer
    document = numbers(policy, episodes=[0], positions=1, steps=2)
    first, second = (seen[layer][0, 1:].numpy() for layer in (2, 2 + 4))  # of layer 2, without the action's token
    cosine = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    assert document["similarity"][2][0][1] == pytest.approx(cosine.mean(), abs=1e-5)


@both
def test_attention_that_is_even_falls_on_history_by_its_share_of_tokens(make) -> None:
    policy = make(history_length=64, observation_tokens="joint")
    with torch.no_grad():
        for block in policy.model.decoder.blocks:
            block.qkv.weight.zero_()
            block.qkv.bias.zero_()
    data = SQUARE if make is make_frames else tiny_data()
    document = numbers(policy, range(6), positions=64, steps=2)
    each = policy.model.tokenizer.tokens_per_step
    noisy = 16 + 1 if make is make_frames else policy.spec.chunk_length  # the action is one more
    lengths = np.diff(np.r_[0, data.episode_ends]) - (make is make_frames)  # nothing follows the last frame
    shares = [each * t / (each * (t + 1) + noisy) for length in lengths for t in range(length)]
    assert document["samples"] == len(shares)
    np.testing.assert_allclose(document["history_attention"], np.mean(shares), atol=1e-5)


@both
@pytest.mark.parametrize(("model", "layers"), [({"history_length": 1}, range(4)), ({"local_layers": 2}, (2, 3))])
def test_without_history_none_is_attended_to(make, model, layers) -> None:
    attention = np.array(numbers(make(**model))["history_attention"])
    assert (attention[list(layers)] == 0).all()
    assert (np.delete(attention, list(layers), axis=0) > 0).all()


@both
def test_a_layer_that_adds_nothing_is_worth_nothing(make) -> None:
    policy = make()
    silence(policy, 2)
    document = numbers(policy)
    ratio = np.array(document["loss_without_layer"]) / document["loss"]
    assert ratio[2] == pytest.approx(1, abs=1e-6)
    assert (abs(np.delete(ratio, 2) - 1) > 1e-3).all()


def test_the_loss_is_the_trainings_on_the_same_draws(monkeypatch) -> None:
    from scd_robot.analysis import probes

    policy, batches = make_frames(), []
    select = probes.select_samples
    monkeypatch.setattr(probes, "select_samples", lambda *a: batches.append(a[2]) or select(*a))
    document = numbers(policy)
    with torch.no_grad():
        sums = [loss_terms(policy.model, policy.normalizer, batch) for batch in batches]
    assert document["loss"] == pytest.approx(float(sum(e for e, _ in sums) / sum(n for _, n in sums)), rel=1e-5)


@both
@pytest.mark.parametrize("reuse", [True, False])
def test_a_shortcut_around_nothing_changes_nothing(make, reuse) -> None:
    policy = make()
    whole = denoised(policy)
    for shortcut in (Shortcut(1, 3, full_steps=64, reuse=reuse), Shortcut(1, 3, full_steps=2, reuse=reuse)):
        with shortened(policy, shortcut):
            found = denoised(policy)
        assert np.allclose(found, whole, atol=1e-5) == (shortcut.full_steps == 64)
    np.testing.assert_array_equal(denoised(policy), whole)
    policy = make()  # a policy keeps what follows from its weights
    silence(policy, 1)
    whole = denoised(policy)
    with shortened(policy, Shortcut(1, 2, full_steps=1, reuse=reuse)):
        np.testing.assert_allclose(denoised(policy), whole, atol=1e-5)


@both
def test_what_is_reused_is_what_the_last_full_step_added(make) -> None:
    """With all layers but the last, whose additions depend on nothing that changes."""
    policy = make()
    see_nothing(policy)
    whole = denoised(policy)
    with shortened(policy, Shortcut(0, 3, full_steps=1, reuse=True)):
        np.testing.assert_allclose(denoised(policy), whole, atol=1e-5)
    with shortened(policy, Shortcut(0, 3, full_steps=1, reuse=False)):
        assert not np.allclose(denoised(policy), whole, atol=1e-3)


@both
def test_a_solver_that_asks_twice_in_a_step_has_all_layers_twice(make) -> None:
    policy = make({"solver": "midpoint", "num_denoising_steps": 2})
    whole = denoised(policy)
    for full_steps in (1, 2):
        with shortened(policy, Shortcut(1, 3, full_steps, reuse=False)):
            assert np.array_equal(denoised(policy), whole) == (full_steps == 2)


def test_what_shortcuts_cost_in_frames_is_told_of_the_same_episodes_and_noise() -> None:
    policy, episodes = make_frames(), [1, 4, 5]
    shortcuts = shortcuts_of(4, [2], 8)
    assert [(s.first, s.stop, s.full_steps, s.reuse) for s in shortcuts] == [(1, 3, 2, True), (1, 3, 2, False)]
    cost = partial(cost_in_frames, policy, SQUARE, episodes, context=4, length=3, progress=False)
    found = cost(shortcuts)
    whole, reused, left_out = found["shortcuts"]
    assert (found["context"], found["frames"]) == (4, 3)
    assert (whole["shortcut"], whole["psnr"]["difference"]) == (None, None)
    for row, shortcut in ((reused, shortcuts[0]), (left_out, shortcuts[1])):
        with shortened(policy, shortcut):
            short = imagine_episodes(policy, SQUARE, episodes, 4, 3).errors
        full = imagine_episodes(policy, SQUARE, episodes, 4, 3).errors
        for name in ("psnr", "psnr_moving", "ssim", "ssim_moving"):
            of_short, of_full = (np.nanmean(getattr(x.imagined, name), axis=1) for x in (short, full))
            assert row[name]["mean"] == pytest.approx(np.nanmean(of_short))
            assert row[name]["difference"] == pytest.approx(np.nanmean(of_short - of_full))
            assert row[name]["difference"] != 0
            low, high = row[name]["difference_interval"]
            assert low <= row[name]["difference"] <= high
            assert (of_short - of_full).min() - 1e-9 <= low < high <= (of_short - of_full).max() + 1e-9
            assert found["repeated"][name]["mean"] == pytest.approx(
                np.nanmean(np.nanmean(getattr(full.copied, name), axis=1))
            )
            assert row[name]["by_frame"] == pytest.approx(np.nanmean(getattr(short.imagined, name), axis=0).tolist())
    for layer in (1, 2):
        silence(policy, layer)
    for row in cost(shortcuts)["shortcuts"][1:]:
        assert (row["psnr_moving"]["difference"], row["psnr_moving"]["difference_interval"]) == (0, [0, 0])


def test_episodes_are_evenly_spaced_over_those_that_are_long_enough() -> None:
    data = tiny_data()  # of 9, 14, 5, 21, 17 and 8 control steps
    assert choose_episodes(data, None, 3) == [0, 2, 5]
    assert choose_episodes(data, [1, 2, 4], 16) == [1, 2, 4]
    assert choose_episodes(data, [1, 2, 4], 16, least_steps=14) == [1, 4]
    assert choose_episodes(data, [], 16, least_steps=20) == [3]
    with pytest.raises(
        ConfigError, match=r"none of the 2 held-out episodes has the 20 control steps .* longest has 17"
    ):
        choose_episodes(data, [1, 4], 16, least_steps=20)
    with pytest.raises(ConfigError, match="episodes must be at least 1, got 0"):
        choose_episodes(data, None, 0)


def test_what_cannot_be_is_refused() -> None:
    for separable in (make_policy(architecture="separable"), make_frames(architecture="separable")):
        with pytest.raises(ConfigError, match=r"of an entangled model .* this one is separable"):
            numbers(separable)
    for arguments in ((2, 2, 1), (-1, 2, 1), (0, 2, 0)):
        with pytest.raises(ConfigError, match=r"shortcut|full_steps"):
            Shortcut(*arguments)
    with pytest.raises(ConfigError, match="has 4 layers"), shortened(make_policy(), Shortcut(1, 9, 1)):
        pass
    with pytest.raises(ConfigError, match="there is no episode 6: the recording has 6, from 0 on"):
        numbers(make_frames(), episodes=[2, 6])
    with pytest.raises(UnknownNameError, match="unknown camera"):
        probe(make_frames(), tiny_data(), [0])
    with pytest.raises(UnknownNameError, match="unknown observation key"):
        probe(make_policy(), SQUARE, [0])
    with pytest.raises(ShapeError, match=r"the model takes 'goal' of shape \(2,\), the dataset has None"):
        probe(make_policy(), tiny_data().with_keys(["position"]), [0])
    assert shortcuts_of(2, [1, 2], 8) == []


def test_the_page_says_what_the_numbers_say(tmp_path) -> None:
    document = {**numbers(make_policy()), "checkpoint": "runs/<rival>", "held_out": None}
    document["history_attention"] = [[0.5] * STEPS, [0.3] * STEPS, [0.1] * STEPS, [0.02] * STEPS]
    document["similarity"] = [np.ones((STEPS, STEPS)).tolist()] * 3 + [np.eye(STEPS).tolist()]
    document["loss_without_layer"] = [document["loss"] * factor for factor in (4, 1.5, 1.25, 3)]
    told = " ".join(conclusions(document))
    assert "0: 4, 1: 4, 2: 4, 3: 1" in told
    assert "40.0 % in the first half of the layers, 6.0 % in the second" in told
    assert "1.25 (layer 2) to 4.00 (layer 0); the two that matter most are layers 0 and 3" in told
    write_probe(document, tmp_path)
    page = (tmp_path / "probe.html").read_text()
    assert page.count("<svg") == 5
    assert "runs/&lt;rival&gt;" in page


def test_the_page_of_frames_says_what_they_cost(tmp_path) -> None:
    policy = make_frames()
    document = {**numbers(policy), "checkpoint": "runs/frames", "held_out": True}
    costs = cost_in_frames(policy, SQUARE, [1, 4], shortcuts_of(4, [1], 8), context=4, length=3, progress=False)
    whole, reused, left_out = costs["shortcuts"]
    whole["psnr_moving"]["mean"], whole["ssim_moving"]["mean"], whole["frame_ms"] = 21.0, 0.7, 8.0
    costs["repeated"]["psnr_moving"]["mean"] = 16.5
    for row, difference, interval in ((reused, -0.25, [-0.5, 0.125]), (left_out, -4.0, [-5.0, -3.5])):
        row["psnr_moving"] |= {"difference": difference, "difference_interval": interval}
        row["ssim_moving"] |= {"difference": 0.01, "difference_interval": None}
        row["frame_ms"] = 5.0
    document["imagined"] = costs
    told = " ".join(conclusions(document))
    assert "moving pixels of 3 imagined frames have a PSNR of 21.00 dB and an SSIM of 0.700" in told
    assert "repeated 16.50 dB; a frame takes 8.0 ms" in told
    reused_told = "Layers 1 to 2 reused after 1 step: PSNR of moving pixels -0.25 [-0.50, +0.12] dB against all layers"
    assert reused_told + " (no difference shown), SSIM +0.010, in 0.62 of the time" in told
    assert "left out after 1 step: PSNR of moving pixels -4.00 [-5.00, -3.50] dB against all layers (worse)" in told
    assert "plans" not in told
    write_probe(document, tmp_path)
    page = (tmp_path / "probe.html").read_text()
    assert page.count("<svg") == 6
    assert "24 frames of 4 episodes, held out from the training" in page
    for row in document["imagined"]["shortcuts"]:  # where nothing moves, nothing is known
        row["psnr_moving"] |= {"mean": None, "by_frame": [None] * 3, "difference": None, "difference_interval": None}
    costs["repeated"]["psnr_moving"] = {"mean": None, "interval": None, "by_frame": [None] * 3}
    write_probe(document, tmp_path)
    assert "No pixel moves in the 3 frames that are imagined" in " ".join(conclusions(document))
    assert (tmp_path / "probe.html").read_text().count("<svg") == 5
