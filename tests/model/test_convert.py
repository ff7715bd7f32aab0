"""Conversion of an entangled model: what is copied computes the same, and what cannot be is refused."""

import dataclasses

import pytest
import torch
from model_streams import ENTANGLED, randomised, stream_of

from scd_robot.errors import ConfigError
from scd_robot.model import CausalDitModel
from scd_robot.model.convert import parse_layers, separable_config, separate

SOURCE = dataclasses.replace(ENTANGLED, encoder_layers=3)


def converted(encoder=(0, 1, 2), decoder=(0, 3), tokens=2, **changes) -> tuple:
    source = randomised(dataclasses.replace(SOURCE, **changes))
    config = separable_config(source.config, encoder, decoder, tokens)
    return source, separate(source, config, encoder, decoder).eval()


@pytest.mark.parametrize("changes", [{}, {"observation_tokens": "joint"}, {"past_action_input": "full"}])
@torch.no_grad()
def test_the_encoder_makes_of_history_what_the_entangled_layers_do(changes) -> None:
    """Over a whole stream and three layers; the context slots, which the source has not, are seen by none of it."""
    source, model = converted(**changes)
    observation, past = stream_of(source.config, 2, 23, torch.float64)
    past_action = past if source.config.past_action_input != "none" else None
    tokens, _ = source.tokenizer(observation, past_action)
    shallow = CausalDitModel(dataclasses.replace(source.config, encoder_layers=2)).double()  # the first three layers
    shallow.load_state_dict({k: v for k, v in source.state_dict().items() if not k.startswith("decoder.blocks.3")})
    found = model.encoder.outputs(*model.tokenizer(observation, past_action))[:, :, : tokens.shape[2]]
    expected = shallow.decoder.history(tokens, None, None, 0).features
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_slots_are_what_the_entangled_layers_make_of_noise() -> None:
    """Of its mean, at flow time 0, where there is a slot for each action; through all layers."""
    source, model = converted(encoder=(0, 1, 2, 3), tokens=SOURCE.chunk_length)
    observation, _ = stream_of(source.config, 2, 23, torch.float64)
    at = torch.tensor([[0, 7, 22], [3, 11, 12]])
    context = source.decoder.prepare(source.samples(source.encode_at(at, observation), 1))
    conditioning = source.decoder.condition(torch.zeros(6, 1, dtype=torch.float64))
    noisy = source.decoder.embed_noisy(torch.zeros(6, SOURCE.chunk_length, 2, dtype=torch.float64))
    masks = source.decoder.masks(noisy, context, None)
    for layer in range(4):
        noisy = source.decoder.layer(layer, noisy, conditioning, context, masks)
    found = model.encoder.outputs(*model.tokenizer(observation), at=at)[:, :, -SOURCE.chunk_length :]
    torch.testing.assert_close(found.flatten(0, 1), noisy, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_slots_begin_as_action_queries_and_decoder_layers_are_copies() -> None:
    source, model = converted(tokens=4)
    past = source.config.num_past_actions
    queries = source.decoder.embed(torch.zeros(4, 2, dtype=torch.float64)) + source.decoder.position[past:]
    torch.testing.assert_close(model.tokenizer.type_embedding[-4:], queries)
    for place, layer in enumerate((0, 3)):
        copied, original = model.decoder.blocks[place].state_dict(), source.decoder.blocks[layer].state_dict()
        assert all(torch.equal(copied[name], value) for name, value in original.items())
    for name in ("embed.weight", "head.bias", "position", "flow_time.mlp.0.weight", "head_modulation.weight"):
        assert torch.equal(model.decoder.state_dict()[name], source.decoder.state_dict()[name])


@torch.no_grad()
def test_a_decoder_that_is_told_where_its_steps_end_still_is() -> None:
    source, model = converted(step_end_input=True)
    found, expected = model.decoder.step_length.state_dict(), source.decoder.step_length.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0:5", (0, 1, 2, 3, 4)), ("first:1,last:1", (0, 5)), ("0, 3,5", (0, 3, 5)), ("last:2", (4, 5)), ("2:3", (2,))],
)
def test_layers_are_read(text, layers) -> None:
    assert parse_layers(text, 6) == layers


@pytest.mark.parametrize(
    "text",
    ["", "a", "0:7", "6", "-1", "first", "last:7", "first:0", "3:3", "5:2", "1,1", "3,0", "first:4,last:4", ":2"],
)
def test_layers_that_are_not_there_are_refused_with_their_number(text) -> None:
    with pytest.raises(ConfigError, match="the model has 6 layers, 0 to 5"):
        parse_layers(text, 6)


def test_what_cannot_be_converted_is_refused() -> None:
    separable = dataclasses.replace(SOURCE, architecture="separable")
    with pytest.raises(ConfigError, match="only entangled"):
        separable_config(separable, (0,), (1,), 1)
    with pytest.raises(ConfigError, match="encoder_modulation needs context_in_history=false"):
        dataclasses.replace(separable, encoder_modulation=True, context_in_history=True)
    with pytest.raises(ConfigError, match="exceeds chunk_length 4"):
        separable_config(SOURCE, (0,), (1,), 5)
    with pytest.raises(ConfigError, match=r"local_layers.*0:3.*\[0, 3\]"):
        separable_config(dataclasses.replace(SOURCE, local_layers=1), (0, 3), (1,), 1)
