"""Probes of the entangled policy, on models whose numbers are known beforehand."""

import numpy as np
import pytest
import torch
from small_policies import small_policy
from tiny import tiny_data

from scd_robot.analysis.probe_report import conclusions, write_probe
from scd_robot.analysis.probes import Shortcut, probe, shortened
from scd_robot.errors import ConfigError

ENTANGLED = {
    "architecture": "entangled",
    "context_corruption": 0.0,
    "num_context_tokens": 1,
    "past_action_input": "none",
    "encoder_layers": 3,
}
STEPS = 4


def make_policy(**model):
    """Four layers."""
    return small_policy({**ENTANGLED, **model})


def numbers(policy):
    return probe(policy, tiny_data(), episodes=4, positions=6, num_denoising_steps=STEPS, progress=False)


def silence(policy, layer):
    """Makes a layer add nothing."""
    block = policy.model.decoder.blocks[layer]
    with torch.no_grad():
        block.modulation.weight.zero_()
        block.modulation.bias.zero_()


def plan(policy, steps=7):
    rng = np.random.default_rng(0)
    policy.reset(episodes=[0, 1])
    for _ in range(steps):
        policy.observe({key: rng.uniform(-1, 1, (2, 2)).astype(np.float32) for key in ("position", "goal")})
    return policy.plan()


def test_similarity_is_a_cosine_and_one_with_itself() -> None:
    document = numbers(make_policy())
    assert document["samples"] <= 24
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


def test_features_that_never_change_are_alike() -> None:
    """Nothing of the noise and of flow time enters: the layers see the same at every denoising step."""
    policy = make_policy()
    with torch.no_grad():
        policy.model.decoder.embed.weight.zero_()
        for parameter in policy.model.decoder.flow_time.parameters():
            parameter.zero_()
    np.testing.assert_allclose(numbers(policy)["similarity"], 1, atol=1e-5)


def test_attention_that_is_even_falls_on_history_by_its_share_of_tokens() -> None:
    policy = make_policy(history_length=64, observation_tokens="joint")
    with torch.no_grad():
        for block in policy.model.decoder.blocks:
            block.qkv.weight.zero_()
            block.qkv.bias.zero_()
    document = probe(policy, tiny_data(), episodes=6, positions=64, num_denoising_steps=2, progress=False)
    chunk = policy.spec.chunk_length
    lengths = np.diff(np.r_[0, tiny_data().episode_ends])
    shares = [t / (t + 1 + chunk) for length in lengths for t in range(length)]
    assert document["samples"] == len(shares)
    np.testing.assert_allclose(document["history_attention"], np.mean(shares), atol=1e-5)


@pytest.mark.parametrize(("model", "layers"), [({"history_length": 1}, range(4)), ({"local_layers": 2}, (2, 3))])
def test_without_history_none_is_attended_to(model, layers) -> None:
    attention = np.array(numbers(make_policy(**model))["history_attention"])
    assert (attention[list(layers)] == 0).all()
    assert (np.delete(attention, list(layers), axis=0) > 0).all()


def test_a_layer_that_adds_nothing_is_worth_nothing() -> None:
    policy = make_policy()
    silence(policy, 2)
    document = numbers(policy)
    ratio = np.array(document["loss_without_layer"]) / document["loss"]
    assert ratio[2] == pytest.approx(1, abs=1e-6)
    assert (abs(np.delete(ratio, 2) - 1) > 1e-3).all()


@pytest.mark.parametrize("reuse", [True, False])
def test_a_shortcut_around_nothing_changes_nothing(reuse) -> None:
    policy = make_policy()
    whole = plan(policy)
    for shortcut in (Shortcut(1, 3, full_steps=64, reuse=reuse), Shortcut(1, 3, full_steps=2, reuse=reuse)):
        with shortened(policy, shortcut):
            found = plan(policy)
        assert np.allclose(found, whole, atol=1e-5) == (shortcut.full_steps == 64)
    np.testing.assert_array_equal(plan(policy), whole)
    policy = make_policy()  # a policy keeps what follows from its weights
    silence(policy, 1)
    whole = plan(policy)
    with shortened(policy, Shortcut(1, 2, full_steps=1, reuse=reuse)):
        np.testing.assert_allclose(plan(policy), whole, atol=1e-5)


def test_what_is_reused_is_what_the_last_full_step_added() -> None:
    """With all layers but the last, whose additions depend on nothing that changes."""
    policy = make_policy()
    with torch.no_grad():
        policy.model.decoder.embed.weight.zero_()
        for parameter in policy.model.decoder.flow_time.parameters():
            parameter.zero_()
    whole = plan(policy)
    with shortened(policy, Shortcut(0, 3, full_steps=1, reuse=True)):
        np.testing.assert_allclose(plan(policy), whole, atol=1e-5)
    with shortened(policy, Shortcut(0, 3, full_steps=1, reuse=False)):
        assert not np.allclose(plan(policy), whole, atol=1e-3)


def test_what_cannot_be_is_refused() -> None:
    separable = make_policy(architecture="separable")
    with pytest.raises(ConfigError, match="of an entangled policy"):
        numbers(separable)
    for arguments in ((2, 2, 1), (-1, 2, 1), (0, 2, 0)):
        with pytest.raises(ConfigError, match=r"shortcut|full_steps"):
            Shortcut(*arguments)
    with pytest.raises(ConfigError, match="has 4 layers"), shortened(make_policy(), Shortcut(1, 9, 1)):
        pass


def test_the_page_says_what_the_numbers_say(tmp_path) -> None:
    document = {**numbers(make_policy()), "checkpoint": "runs/<rival>"}
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
