"""`scd data convert|merge|split|filter` write whole new datasets, and training takes several."""

import json

import numpy as np
import pytest
import zarr

from scd_robot.cli.main import main
from scd_robot.datasets import ZarrWriter, open_dataset
from scd_robot.datasets.zarr.writer import ZarrWriter as Writer
from scd_robot.policies import load_policy
from scd_robot.types import ArraySpec, DatasetSpec

SPEC = DatasetSpec({"state": ArraySpec((3,)), "camera": ArraySpec((6, 8, 3), "uint8")}, 2, 0.1, "a test")


def write(path, lengths, first=0):
    rng = np.random.default_rng(first)
    with ZarrWriter(path, SPEC) as writer:
        for number, length in enumerate(lengths, first):
            episode = {
                "state": rng.standard_normal((length, 3), np.float32),
                "camera": rng.integers(0, 256, (length, 6, 8, 3), np.uint8),
                "action": rng.standard_normal((length, 2), np.float32),
                "sim_state": rng.standard_normal((length, 5)),
                "reward": np.float32(np.arange(length) == length - 1) * (number % 2),
            }
            writer.append(episode, {"seed": number, "mask_train": number % 2}, {"task": f"näht {number}"})
    return path


@pytest.fixture
def store(tmp_path):
    return write(tmp_path / "a.zarr", (5, 2, 7, 9))


def same_episode(first, i, second, j):
    one, other = first.episode(i), second.episode(j)
    assert set(one) == set(other)
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])
        assert one[key].dtype == other[key].dtype
    for name in first.episode_info:
        assert first.episode_info[name][i] == second.episode_info[name][j]
    for name in first.episode_text:
        assert first.episode_text[name][i] == second.episode_text[name][j]


def test_a_converted_store_is_the_same(store, tmp_path, capsys):
    assert main(["data", "convert", str(store), str(tmp_path / "b.zarr"), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 4
    before, after = open_dataset(store), open_dataset(tmp_path / "b.zarr")
    assert (after.spec, after.episode_lengths.tolist()) == (before.spec, [5, 2, 7, 9])
    assert after.metadata["converted_from"] == "a test"
    for i in range(4):
        same_episode(before, i, after, i)


def test_keys_and_mask_choose_what_is_converted(store, tmp_path):
    options = ["--keys", "state", "--mask", "train"]
    assert main(["data", "convert", str(store), str(tmp_path / "b.zarr"), *options]) == 0
    after = open_dataset(tmp_path / "b.zarr")
    assert list(after.spec.observation) == ["state"]
    assert after.episode_info["seed"].tolist() == [1, 3]


def test_merged_stores_are_there_one_after_the_other(store, tmp_path):
    other = write(tmp_path / "b.zarr", (4, 6), first=10)
    assert main(["data", "merge", str(store), str(other), "--out", str(tmp_path / "c.zarr")]) == 0
    first, second, merged = (open_dataset(path) for path in (store, other, tmp_path / "c.zarr"))
    assert merged.episode_lengths.tolist() == [5, 2, 7, 9, 4, 6]
    same_episode(first, 3, merged, 3)
    same_episode(second, 1, merged, 5)


def test_split_deals_out_every_episode_once(store, tmp_path):
    outs = [str(tmp_path / f"part{i}.zarr") for i in range(2)]
    assert main(["data", "split", str(store), "--out", *outs, "--shares", "3", "1"]) == 0
    before, parts = open_dataset(store), [open_dataset(path) for path in outs]
    assert [part.num_episodes for part in parts] == [3, 1]
    seeds = [int(seed) for part in parts for seed in part.episode_info["seed"]]
    assert sorted(seeds) == [0, 1, 2, 3]
    same_episode(before, seeds[3], parts[1], 0)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--only", "0", "2-"], [0, 2, 3]),
        (["--drop", "1-2"], [0, 3]),
        (["--success"], [1, 3]),
        (["--min-length", "5", "--max-length", "7"], [0, 2]),
        (["--mask", "train", "--min-length", "3"], [3]),
    ],
)
def test_filter_keeps_what_meets_all_conditions(store, tmp_path, options, kept):
    assert main(["data", "filter", str(store), str(tmp_path / "b.zarr"), *options]) == 0
    after = open_dataset(tmp_path / "b.zarr")
    assert after.episode_info["seed"].tolist() == kept
    same_episode(open_dataset(store), kept[-1], after, len(kept) - 1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["convert", "{a}", "{new}"], "does not tell a format"),
        (["convert", "{a}", "{a}"], "exists already"),
        (["convert", "{a}", "{new}.zarr", "--keys", "stat"], "did you mean 'state'"),
        (["convert", "{a}", "{new}.zarr", "--mask", "trian"], "did you mean 'train'"),
        (["convert", "{a}", "{new}.zarr", "--action", "actions"], "did you mean 'action'"),
        (["convert", "{a}", "{new}.zarr", "--control-dt", "0"], "positive time"),
        (["merge", "{a}", "{a}", "--out", "{a}"], "exists already"),
        (["split", "{a}", "--out", "{new}.zarr", "--shares", "1", "1"], "1 outputs need as many positive shares"),
        (["split", "{a}", "--out", "{new}.zarr", "{new}2.zarr", "--shares", "1", "100"], "a part would be empty"),
        (["split", "{a}", "--out", "{new}.zarr", "{new}.zarr", "--shares", "1", "1"], "must all differ"),
        (["split", "{a}", "--out", "{new}.zarr", "{a}", "--shares", "1", "1", "--overwrite"], "must all differ"),
        (["split", "{a}", "--out", "{new}.zarr", "{there}", "--shares", "1", "1"], "exists already"),
        (["filter", "{a}", "{new}.zarr", "--max-length", "0"], "no episode is left"),
        (["filter", "{a}", "{new}.zarr", "--only", "4"], "does not name episodes of 0 to 3"),
        (["filter", "{a}", "{new}.zarr", "--only", "x"], "FIRST-LAST"),
        (["filter", "{a}", "{new}.zarr", "--min-length", "99"], "no episode is left"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(store, tmp_path, refused, arguments, told):
    there = tmp_path / "there.zarr"
    there.mkdir()
    names = {"a": store, "new": tmp_path / "new", "there": there}
    refused(["data", *(text.format(**names) for text in arguments)], told, unchanged=[tmp_path])


def test_a_conversion_that_fails_leaves_nothing(store, tmp_path, refused, monkeypatch):
    """The third episode cannot be read; the two before it would pass for a whole dataset."""
    written = []
    append = Writer.append

    def fail_late(self, *args, **kwargs):
        written.append(1)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return append(self, *args, **kwargs)

    monkeypatch.setattr(Writer, "append", fail_late)
    refused(["data", "convert", store, tmp_path / "b.zarr"], "space", unchanged=[tmp_path], at_once=False)


def test_training_takes_several_datasets_and_transforms(tmp_path, tiny_store, tiny_train_options):
    other = tmp_path / "other.zarr"
    assert main(["data", "filter", str(tiny_store), str(other), "--only", "0-2"]) == 0
    transforms = tmp_path / "transforms.json"
    transforms.write_text('{"rename": {"position": "place"}, "chunk": "relative", "chunk_parts": [{"action_start": 0, '
                          '"key": "place", "key_start": 0, "count": 2, "rotation": false}]}')  # fmt: skip
    out = tmp_path / "run"
    arguments = ["--dataset", str(tiny_store), str(other), "--weights", "1", "3", "--transforms", str(transforms)]
    options = [*arguments, "--out", str(out), "--max-steps", "2", *tiny_train_options]
    assert main(["train", "metaworld_state", *options]) == 0
    from scd_robot import load_policy

    policy = load_policy(out)
    assert set(policy.spec.observation) == {"position", "goal"}
    observation = {key: np.zeros((1, 2), np.float32) for key in policy.spec.observation}
    assert policy.act(observation).shape == (1, 2)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot read the transforms"),
        ('{"renam": {}}', "did you mean 'rename'"),
        ('{"rename": {"positon": "x"}}', "did you mean 'position'"),
        ("[]", "must be an object"),
    ],
)
def test_transforms_that_cannot_be_are_refused(tmp_path, tiny_store, tiny_train_options, refused, text, told):
    (tmp_path / "t.json").write_text(text)
    for given in (tmp_path / "t.json", *([text] if text.startswith("{") else [])):  # a file, or the words themselves
        options = ["--dataset", tiny_store, "--out", tmp_path / "run", "--transforms", given]
        refused(["train", "metaworld_state", *options, *tiny_train_options], told, unchanged=[tmp_path])


@pytest.mark.parametrize("target", ["s3://bucket/b.zarr", "s3://bucket/b.hdf5"])
def test_an_address_is_no_place_to_write_to(store, tmp_path, refused, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    refused(["data", "convert", str(store), target], "is an address", "local folders", unchanged=[tmp_path])


def test_a_spoilt_episode_can_be_left_out(tmp_path, refused):
    with Writer(tmp_path / "a.zarr", DatasetSpec({"state": ArraySpec((3,))}, 2, 0.1, "a test")) as writer:
        for length in (3, 4, 5):
            writer.append({"state": np.ones((length, 3), np.float32), "action": np.ones((length, 2), np.float32)})
    zarr.open_group(tmp_path / "a.zarr", mode="r+")["data/state"][4, 1] = np.nan
    refused(["data", "filter", str(tmp_path / "a.zarr"), str(tmp_path / "b.zarr")], "NaN", "episode 1")
    assert main(["data", "filter", str(tmp_path / "a.zarr"), str(tmp_path / "b.zarr"), "--drop", "1"]) == 0
    assert open_dataset(tmp_path / "b.zarr").episode_lengths.tolist() == [3, 5]


def test_ends_of_episodes_are_no_successes(tmp_path, refused):
    ends = np.zeros(4, np.uint8)
    ends[-1] = 1
    for name, second in (("a.zarr", ends), ("b.zarr", 0 * ends)):
        with Writer(tmp_path / name, DatasetSpec({"state": ArraySpec((1,))}, 1, 0.1, "a test")) as writer:
            for done in (ends, second):
                zeros = np.zeros((4, 1), np.float32)
                writer.append({"state": zeros, "action": zeros, "done": done})
    arguments = ["--success", "--min-length", "1"]
    refused(["data", "filter", str(tmp_path / "a.zarr"), str(tmp_path / "c.zarr"), *arguments], "nothing about success")
    assert main(["data", "filter", str(tmp_path / "b.zarr"), str(tmp_path / "c.zarr"), *arguments]) == 0
    assert open_dataset(tmp_path / "c.zarr").num_episodes == 1


@pytest.mark.parametrize(("target", "options"), [("b.hdf5", []), ("b", ["--to", "lerobot"])])
def test_training_takes_what_was_converted_to_other_formats(tmp_path, tiny_store, tiny_train_options, target, options):
    assert main(["data", "convert", str(tiny_store), str(tmp_path / target), *options]) == 0
    arguments = ["--dataset", str(tmp_path / target), "--out", str(tmp_path / "run"), "--max-steps", "2"]
    assert main(["train", "metaworld_state", *arguments, *tiny_train_options]) == 0
    policy = load_policy(tmp_path / "run")
    assert policy.spec.action_dim == open_dataset(tiny_store).spec.action_dim
