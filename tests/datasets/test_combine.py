"""Datasets joined and mixed."""

from dataclasses import replace

import numpy as np
import pytest

from scd_robot.datasets.combine import join_datasets, mix_datasets, shares_among
from scd_robot.datasets.lazy import LazyArray, MappedArray
from scd_robot.datasets.schema import EpisodeDataset
from scd_robot.datasets.windows import SegmentIndex, split_episodes
from scd_robot.errors import ConfigError, ShapeError
from scd_robot.types import ArraySpec, DatasetSpec


def same(x):
    return x


def dataset(lengths, value, keys=("state",), width=3, action_dim=2, control_dt=0.1, **extra):
    ends = np.cumsum(lengths)
    arrays = {key: np.full((ends[-1], width), value, np.float32) for key in keys}
    arrays["action"] = np.full((ends[-1], action_dim), value, np.float32)
    spec = DatasetSpec({key: ArraySpec((width,)) for key in keys}, action_dim, control_dt, f"set {value}")
    info = {"seed": np.arange(len(lengths)) + 10 * value}
    text = {"task": [f"task {value}.{i}" for i in range(len(lengths))]}
    return EpisodeDataset(spec, ends, {**arrays, **extra}, {"note": value}, info, text)


def test_joined_episodes_are_all_there_in_order() -> None:
    joined = join_datasets([dataset((3, 4), 1), dataset((5,), 2, keys=("other", "state"))])
    joined.check()
    assert joined.episode_lengths.tolist() == [3, 4, 5]
    assert joined.arrays["state"][:, 0].tolist() == [1] * 7 + [2] * 5
    assert list(joined.spec.observation) == ["state"]
    assert joined.episode_info["seed"].tolist() == [10, 11, 20]
    assert list(joined.episode_text["task"]) == ["task 1.0", "task 1.1", "task 2.0"]
    assert joined.spec.source == "set 1 + set 2"
    assert [part["note"] for part in joined.metadata["joined"]] == [1, 2]


def test_arrays_on_disk_stay_there() -> None:
    second = dataset((5,), 2)
    second.arrays["state"] = MappedArray(second.arrays["state"], same, (3,), np.float32)
    joined = join_datasets([dataset((3, 4), 1), second])
    assert isinstance(joined.arrays["state"], LazyArray)
    assert joined.arrays["state"][:][:, 0].tolist() == [1] * 7 + [2] * 5


def test_executed_actions_of_those_without_are_their_actions() -> None:
    executed = np.full((5, 2), 9, np.float32)
    joined = join_datasets([dataset((3,), 1), dataset((5,), 2, executed_action=executed)])
    assert joined.arrays["executed_action"][:, 0].tolist() == [1] * 3 + [9] * 5


def test_an_observation_is_present_where_nothing_marks_it_as_absent() -> None:
    marked = dataset((5,), 2, **{"present.state": np.array([1, 0, 0, 1, 0], np.uint8)})
    for parts, expected in (((dataset((3,), 1), marked), [1, 1, 1, 1, 0, 0, 1, 0]), ((marked, dataset((3,), 1)), None)):
        joined = join_datasets(parts)
        expected = expected or [1, 0, 0, 1, 0, 1, 1, 1]
        np.testing.assert_array_equal(joined.arrays["present.state"] != 0, np.array(expected, bool))


def test_states_of_different_simulators_are_left_out(caplog) -> None:
    caplog.set_level("INFO")
    first = dataset((3,), 1, sim_state=np.zeros((3, 4)), reward=np.ones(3, np.float32))
    joined = join_datasets([first, dataset((5,), 2, sim_state=np.zeros((5, 9)), reward=np.ones(5, np.float32))])
    assert set(joined.arrays) == {"state", "action", "reward"}
    assert "not all datasets have it alike: sim_state" in caplog.text


def test_what_the_metadata_say_alike_stays() -> None:
    parts = [dataset((3,), 1), dataset((5,), 2)]
    for part in parts:
        part.metadata["environment"] = "metaworld/push-v3"
    joined = join_datasets(parts)
    assert joined.metadata["environment"] == "metaworld/push-v3"
    assert "note" not in joined.metadata


def test_kinds_of_actions_are_not_joined() -> None:
    def of_kind(kind: str) -> EpisodeDataset:
        data = dataset((3,), 1)
        return replace(data, spec=replace(data.spec, action_kind=kind))

    for kinds, joined in ((("delta", "delta"), "delta"), (("", "absolute"), ""), (("absolute", ""), "")):
        assert join_datasets([of_kind(kind) for kind in kinds]).spec.action_kind == joined
    with pytest.raises(ConfigError, match="actions are absolute in b, delta in a"):
        join_datasets([of_kind("delta"), of_kind("absolute")], ["a", "b"])


def test_weights_are_shares_of_control_steps() -> None:
    mixed = mix_datasets([dataset((100, 100), 1), dataset((50,), 2)], (1, 3))
    index = SegmentIndex(mixed.episode_ends, 10, weights=mixed.weights)
    drawn = index.batch(0, range(4000), 4000)
    assert np.mean(drawn.start >= 200) == pytest.approx(0.75, abs=0.03)
    chosen = mixed.select([2, 0])
    np.testing.assert_allclose(chosen.weights, mixed.weights[[2, 0]])


def test_weights_of_a_mix_share_out_what_it_supplies() -> None:
    inner = mix_datasets([dataset((100,), 1), dataset((50, 50), 2)], (1, 9))
    mixed = mix_datasets([inner, dataset((20,), 3)], (3, 1))
    share = mixed.weights * mixed.episode_lengths
    np.testing.assert_allclose(share, [0.75 * 0.1, 0.75 * 0.45, 0.75 * 0.45, 0.25])
    np.testing.assert_allclose(mix_datasets([inner], [1]).weights, inner.weights)
    with pytest.raises(ConfigError, match=r"episodes of mix have weights.*mix_datasets"):
        join_datasets([dataset((20,), 3), inner], ["c", "mix"])


@pytest.mark.parametrize(
    ("second", "error", "message"),
    [
        (dataset((5,), 2, keys=("other",)), ShapeError, "no observation key in common"),
        (dataset((5,), 2, width=4), ShapeError, r"'state' is float32 \(4,\) in b, float32 \(3,\) in a"),
        (dataset((5,), 2, action_dim=3), ShapeError, "width 3 in b, 2 in a"),
        (dataset((5,), 2, control_dt=0.05), ConfigError, r"0.05 s, a 0.1 s; .* one rate"),
    ],
)
def test_datasets_that_do_not_fit_together_are_refused(second, error, message) -> None:
    with pytest.raises(error, match=message):
        join_datasets([dataset((3,), 1), second], ["a", "b"])


@pytest.mark.parametrize("weights", [(1,), (1, 0), (1, -1), (1, float("nan"))])
def test_weights_must_be_positive_numbers(weights) -> None:
    with pytest.raises(ConfigError, match="positive weights"):
        mix_datasets([dataset((3,), 1), dataset((3,), 2)], weights)


def test_the_log_names_notes_that_are_lost_and_numbers_of_other_dtypes_are_kept(caplog) -> None:
    first = dataset((3, 4), 1, reward=np.zeros(7, np.float64))
    first = replace(first, episode_info={**first.episode_info, "success": np.ones(2)})
    second = dataset((5,), 2, reward=np.ones(5, np.float32))
    with caplog.at_level("INFO"):
        joined = join_datasets([first, second], ["A", "B"])
    assert "A: left out, because not all datasets have it alike: success" in caplog.text
    assert joined.arrays["reward"].tolist() == [0] * 7 + [1] * 5


def test_shares_are_those_of_the_episodes_that_are_trained_on() -> None:
    mixed = mix_datasets([dataset((20,) * 20, 1), dataset((20,) * 2, 2)], [1, 1])
    assert mixed.metadata["shares"] == [0.5, 0.5]
    for seed in range(20):
        train, held_out = split_episodes(mixed.num_episodes, 0.2, seed, mixed.parts)
        assert np.bincount(mixed.parts[train]).tolist() == [16, 1]
        assert np.bincount(mixed.parts[held_out]).tolist() == [4, 1]
        index = SegmentIndex(mixed.episode_ends, 20, train, seed, weights=shares_among(mixed, train))
        drawn = np.concatenate([index.batch(step, range(100), 100).start for step in range(50)])
        assert np.mean(drawn >= 400) == pytest.approx(0.5, abs=0.03)
    alone = dataset((20,) * 20, 1)
    assert shares_among(alone, np.arange(3)) is None


def test_a_single_episode_of_a_dataset_is_never_held_out() -> None:
    mixed = join_datasets([dataset((20,) * 20, 1), dataset((20,), 2)])
    assert all(20 in split_episodes(21, 0.05, seed, mixed.parts)[0] for seed in range(60))
    assert mixed.select([3, 20]).parts.tolist() == [0, 1]
