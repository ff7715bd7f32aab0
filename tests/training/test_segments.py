"""What is read of a dataset for training: silent sensors, arrays on disk, cached features."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import LENGTHS, tiny_data, tiny_experiment

from scd_robot.datasets import PRESENT
from scd_robot.datasets.combine import join_datasets
from scd_robot.datasets.lazy import MappedArray
from scd_robot.datasets.windows import SegmentIndex
from scd_robot.errors import ConfigError, ShapeError, UnknownNameError
from scd_robot.training import train
from scd_robot.training.batches import SegmentDataset
from scd_robot.training.datamodule import EpisodeDataModule
from scd_robot.training.features import replace_pictures
from scd_robot.training.segments import SegmentReader
from scd_robot.training.start import fit_normalizer
from scd_robot.types import ArraySpec


def same(x):
    return x


def on_disk(array):
    return MappedArray(array, same, array.shape[1:], array.dtype)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("lazy", [False, True])
def test_windows_are_the_rows_of_their_segments(stride, lazy):
    data = tiny_data()
    if lazy:
        data = replace(data, arrays={**data.arrays, "position": on_disk(data.arrays["position"])})
    index = SegmentIndex(data.episode_ends, 12, stride=stride)
    reader = SegmentReader(data, ["position", "goal"], 2, 4, reads_past_action=True)
    for step in range(20):  # among them are segments at both ends of the dataset
        segments = index.batch(step, range(4), 4)
        position = np.stack([np.zeros(4, np.int64), segments.lengths - 1], axis=1)
        read = reader.read(segments, position)
        steps, real = segments.steps()
        around, inside = segments.steps_around(position, 2, 4)
        np.testing.assert_array_equal(read.step_valid, real)
        np.testing.assert_array_equal(read.action_valid, inside)
        for key in ("position", "goal"):
            np.testing.assert_array_equal(
                read.observation[key].numpy()[real], np.asarray(data.arrays[key])[steps][real]
            )
        np.testing.assert_array_equal(read.label.numpy()[inside], data.arrays["action"][around][inside])
        np.testing.assert_array_equal(read.executed.numpy()[inside], data.arrays["executed_action"][around][inside])
        before = np.maximum(steps - 1, segments.episode_start[:, None])
        np.testing.assert_array_equal(read.past_action, data.arrays["executed_action"][before])


def test_disturbed_actions_are_those_executed_in_place_of_others():
    data = tiny_data()
    executed = data.arrays["action"].copy()
    executed[5, 1] += 0.4
    executed[20] += 0.2  # less than the threshold
    data = replace(data, arrays={**data.arrays, "executed_action": executed})
    index = SegmentIndex(data.episode_ends, 12)
    reader = SegmentReader(data, ["position"], 2, 4, disturbance_threshold=0.3)
    undisturbed = SegmentReader(data, ["position"], 2, 4)
    found = 0
    for step in range(20):
        segments = index.batch(step, range(4), 4)
        position = np.tile(np.arange(segments.lengths.min()), (4, 1))
        read = reader.read(segments, position)
        around, inside = segments.steps_around(position, 2, 4)
        of_chunk = np.arange(-2, 4) >= 0
        np.testing.assert_array_equal(read.disturbed.numpy() & inside, (around == 5) & of_chunk & inside)
        np.testing.assert_array_equal(read.action_valid, inside)
        assert undisturbed.read(segments, position).disturbed is None
        found += int((read.disturbed.numpy() & inside).sum())
    assert found


def silent_goal():
    """The goal is there in every third control step only; elsewhere the array holds rubbish."""
    data = tiny_data()
    there = np.arange(data.num_steps) % 3 == 0
    goal = np.where(there[:, None], data.arrays["goal"], np.float32(0))
    return replace(data, arrays={**data.arrays, "goal": goal, PRESENT + "goal": there})


def test_a_silent_sensor_changes_nothing_that_is_learned():
    from scd_robot.model import ScdModel
    from scd_robot.normalization import Normalizer, compute_statistics
    from scd_robot.training.batches import SegmentDataset
    from scd_robot.training.objective import loss_terms

    experiment = tiny_experiment(model={"observation_tokens": "per_key"})
    data = silent_goal()
    spoiled = np.where(data.arrays[PRESENT + "goal"][:, None], data.arrays["goal"], np.float32(77))
    torch.manual_seed(0)
    model = ScdModel(experiment.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    keys = ["position", "goal", "action"]
    normalizer = Normalizer({k: compute_statistics(data.arrays[k], k) for k in keys}, dict.fromkeys(keys, "identity"))
    every = np.arange(data.num_episodes)
    losses = [
        loss_terms(model, normalizer, SegmentDataset(d, experiment, every)[0])[0]
        for d in (data, replace(data, arrays={**data.arrays, "goal": spoiled}))
    ]
    assert torch.equal(*losses)
    heard = {key: array for key, array in data.arrays.items() if not key.startswith(PRESENT)}
    other = loss_terms(model, normalizer, SegmentDataset(replace(data, arrays=heard), experiment, every)[0])[0]
    assert other != losses[0]


def test_a_silent_sensor_needs_a_token_of_its_own(tmp_path):
    options = {"accelerator": "cpu", "progress": False}
    with pytest.raises(ConfigError, match=r"goal are absent .*observation_tokens=per_key"):
        train(silent_goal(), tiny_experiment(1), tmp_path / "joint", **options)
    experiment = tiny_experiment(1, model={"observation_tokens": "per_key"}, validate_every=1)
    assert train(silent_goal(), experiment, tmp_path / "per_key", **options)["steps"] == 1
    data = silent_goal()
    heard = replace(data, arrays={**data.arrays, PRESENT + "goal": np.ones(data.num_steps, bool)})
    assert train(heard, tiny_experiment(1), tmp_path / "heard", **options)["steps"] == 1


def images(count=25):
    data = tiny_data().select([0, 1])
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (data.num_steps, 4, 6, 3), np.uint8)
    spec = replace(data.spec, observation={**data.spec.observation, "camera": ArraySpec((4, 6, 3), "uint8")})
    return replace(data, spec=spec, arrays={**data.arrays, "camera": on_disk(frames)}), frames


def test_features_are_those_of_each_frame_and_each_is_encoded_once():
    data, frames = images()
    seen = []

    def encoder(x):
        seen.append(len(x))
        return x.mean(dim=(2, 3))

    there = np.arange(data.num_steps) % 3 > 0
    data = replace(data, arrays={**data.arrays, PRESENT + "camera": there})
    cached = replace_pictures(data, "camera", encoder, name="eye", batch_size=10, progress=False)
    cached.check()
    assert cached.spec.observation["eye"] == ArraySpec((3,))
    assert not {"camera", PRESENT + "camera"} & set(cached.arrays)
    np.testing.assert_array_equal(cached.arrays[PRESENT + "eye"], there)  # or what is absent would be learned from
    np.testing.assert_allclose(cached.arrays["eye"], frames.mean(axis=(1, 2)) / 255, rtol=1e-5)
    assert sum(seen) == data.num_steps


def test_encoders_and_keys_that_do_not_fit_are_refused():
    data, _ = images()
    with pytest.raises(ShapeError, match=r"must return \(23, D\)"):
        replace_pictures(data, "camera", lambda x: x, progress=False)
    with pytest.raises(ShapeError, match=r"made of images"):
        replace_pictures(data, "goal", lambda x: x, progress=False)
    with pytest.raises(UnknownNameError, match="did you mean 'camera'"):
        replace_pictures(data, "camra", lambda x: x, progress=False)


def test_validation_looks_everywhere_in_the_dataset() -> None:
    """Not at its first episodes only: those of a second dataset come last."""
    joined = join_datasets([tiny_data()] * 20)
    experiment = tiny_experiment(validation_segments=10, held_out=0.5)
    held_out = EpisodeDataModule(joined, experiment).held_out_episodes
    batches = SegmentDataset(joined, experiment, held_out, validation=True)
    assert len(batches) == 3
    assert sum(len(batches[step].draws.position) for step in range(3)) == 10
    shown = batches._index.ordered(batches._shown)
    parts = np.searchsorted(joined.episode_ends, shown.start, side="right") // len(LENGTHS)
    assert (np.diff(parts) >= 0).all()
    assert parts[0] == 0
    assert parts[-1] == 19
    assert len(set(parts)) >= 9


@pytest.mark.parametrize("mode", ["min_max", "quantile"])
def test_one_glitch_that_stretches_the_normalisation_is_told(mode, caplog) -> None:
    once, times = tiny_data(), 10  # of a hundred steps one is more than a hundredth
    ends = np.concatenate([once.episode_ends + i * once.num_steps for i in range(times)])
    arrays = {key: np.concatenate([array] * times) for key, array in once.arrays.items()}
    data = replace(once, episode_ends=ends, arrays=arrays)
    experiment = tiny_experiment(held_out=0.0, action_normalization=mode)
    fit_normalizer(data, experiment)
    assert caplog.text == ""
    action = data.arrays["action"].copy()
    action[10, 1] = 50.0
    fit_normalizer(replace(data, arrays={**data.arrays, "action": action}), experiment)
    told = "'action', dimension 1, is" in caplog.text and "training.action_normalization=quantile" in caplog.text
    assert told == (mode == "min_max")
