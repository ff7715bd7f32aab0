"""Replay buffers of diffusion_policy, wherever they lie and however they are damaged."""

import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import fsspec
import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scd_robot.datasets import open_dataset
from scd_robot.datasets.lazy import LazyArray
from scd_robot.errors import DatasetError, MissingDependencyError, ScdRobotError, UnknownNameError
from scd_robot.types import ArraySpec

RNG = np.random.default_rng(0)
ENDS = np.array([4, 10])
ARRAYS = {
    "state": RNG.standard_normal((10, 2)),
    "keypoint": RNG.standard_normal((10, 9, 2)).astype(np.float32),
    "n_contacts": np.arange(10) + 1,
    "img": RNG.integers(0, 256, (10, 12, 16, 3)).astype(np.float32),
    "action": RNG.standard_normal((10, 2)).astype(np.float32),
}


def fill(group, arrays=ARRAYS, ends=ENDS, **options):
    for key, values in arrays.items():
        chunks = (3, *values.shape[1:])
        group.create_array(f"data/{key}", shape=values.shape, dtype=values.dtype, chunks=chunks, **options)[:] = values
    group.create_array("meta/episode_ends", shape=ends.shape, dtype=ends.dtype)[:] = ends


def buffer(path, format_of_zarr=2, **options):
    fill(zarr.open_group(path, mode="w", zarr_format=format_of_zarr), **options)
    return path


def zipped(folder, path, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return path


@pytest.fixture(params=["folder", "format 3", "zip", "deflated zip", "address", "cached address", "nested chunks"])
def place(request, tmp_path):
    """A replay buffer in each place and form it is read from, with the options that it takes."""
    kind = request.param
    if kind == "folder":
        return buffer(tmp_path / "a.zarr"), {}
    if kind == "format 3":
        return buffer(tmp_path / "a.zarr", 3), {}
    if kind == "nested chunks":
        return buffer(tmp_path / "a.zarr", chunk_key_encoding={"name": "v2", "separator": "/"}), {}
    if "zip" in kind:
        method = zipfile.ZIP_DEFLATED if "deflated" in kind else zipfile.ZIP_STORED
        return zipped(buffer(tmp_path / "a.zarr"), tmp_path / "a.zarr.zip", method), {}
    address = f"memory://{tmp_path.name}/a.zarr"
    fill(zarr.open_group(zarr.storage.FsspecStore.from_url(address), mode="w", zarr_format=2))
    return address, {"cache": str(tmp_path / "cache")} if "cached" in kind else {}


def test_arrays_are_those_that_were_written(place):
    path, options = place
    dataset = open_dataset(path, **options)
    assert dataset.episode_ends.tolist() == [4, 10]
    assert dataset.spec.observation == {
        "state": ArraySpec((2,)), "keypoint": ArraySpec((9, 2)), "n_contacts": ArraySpec((1,)),
        "img": ArraySpec((12, 16, 3), "uint8"),
    }  # fmt: skip
    for key, values in ARRAYS.items():
        found = dataset.arrays[key]
        assert found.dtype == (np.uint8 if key == "img" else np.float32)
        np.testing.assert_array_equal(found[:], values.reshape(found.shape).astype(found.dtype))
    image = dataset.arrays["img"]
    assert isinstance(image, LazyArray)
    rows = np.array([[9, 0, 1, 2], [5, 4, 4, 7]])
    np.testing.assert_array_equal(image[rows], ARRAYS["img"][rows].astype(np.uint8))


@pytest.mark.parametrize("format_of_zarr", [2, 3])
def test_chunks_of_zeros_between_zeros_may_be_left_out(tmp_path, caplog, format_of_zarr):
    """As zarr 3 does by default."""
    done = np.arange(10) == 9
    path = buffer(tmp_path / "a.zarr", format_of_zarr, arrays={**ARRAYS, "done": done})
    assert len([file for file in (path / "data/done").rglob("*") if file.name.isdigit()]) == 1
    np.testing.assert_array_equal(open_dataset(path).arrays["done"], done)
    assert "3 chunks are not there; taken for False" in caplog.text


def test_an_array_without_any_chunk_is_damaged(tmp_path):
    with pytest.raises(DatasetError, match="data/silent has lost its chunk"):
        open_dataset(buffer(tmp_path / "a.zarr", arrays={**ARRAYS, "silent": np.zeros((10, 2))}))


def test_what_was_read_from_an_address_is_kept_until_it_changes(tmp_path):
    address, cache = f"memory://{tmp_path.name}/kept.zarr", tmp_path / "cache"
    store = zarr.storage.FsspecStore.from_url(address)
    fill(zarr.open_group(store, mode="w", zarr_format=2))
    open_dataset(address, ["state"], cache=str(cache))
    (first,) = cache.iterdir()
    assert any(first.iterdir())
    open_dataset(address, ["state"], cache=str(cache))
    assert list(cache.iterdir()) == [first]
    fill(zarr.open_group(store, mode="w", zarr_format=2), {**ARRAYS, "state": ARRAYS["state"] + 1})
    again = open_dataset(address, ["state"], cache=str(cache)).arrays["state"]
    np.testing.assert_array_equal(again, (ARRAYS["state"] + 1).astype(np.float32))


def test_an_array_may_lie_elsewhere(tmp_path):
    path = buffer(tmp_path / "a.zarr")
    shutil.move(path / "data/img", tmp_path / "img")
    (path / "data/img").symlink_to(tmp_path / "img", target_is_directory=True)
    (tmp_path / "img/back").symlink_to(path, target_is_directory=True)  # no way to walk for ever
    np.testing.assert_array_equal(open_dataset(path).arrays["img"][:], ARRAYS["img"].astype(np.uint8))


def test_pictures_without_channels_stay_on_disk(tmp_path):
    depth = RNG.integers(0, 5000, (10, 32, 40)).astype(np.uint16)
    mask = RNG.integers(0, 2, (10, 12, 16, 1)).astype(np.float32)
    dataset = open_dataset(buffer(tmp_path / "a.zarr", arrays={**ARRAYS, "depth": depth, "mask": mask}))
    assert dataset.spec.observation["depth"] == ArraySpec((32, 40, 1))
    assert isinstance(dataset.arrays["depth"], LazyArray)
    np.testing.assert_array_equal(dataset.arrays["depth"][2:5][..., 0], depth[2:5].astype(np.float32))
    np.testing.assert_array_equal(dataset.arrays["mask"][:], mask)


def test_an_address_without_its_package_says_what_to_install(monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    monkeypatch.setattr(zarr.storage.FsspecStore, "from_url", missing)
    with pytest.raises(MissingDependencyError, match=r"needs the package s3fs: pip install"):
        open_dataset("s3://bucket/a.zarr")


def test_names_tell_what_is_no_observation(tmp_path):
    extra = {"reward": np.arange(10.0), "done": np.arange(10) == 9, "actions": ARRAYS["action"]}
    arrays = {"state": ARRAYS["state"], **extra}
    dataset = open_dataset(buffer(tmp_path / "a.zarr", arrays=arrays))
    assert list(dataset.spec.observation) == ["state"]
    np.testing.assert_array_equal(dataset.arrays["reward"], extra["reward"])
    np.testing.assert_array_equal(dataset.arrays["action"], extra["actions"])
    other = open_dataset(tmp_path / "a.zarr", action="state", keys=["actions"])
    np.testing.assert_array_equal(other.arrays["action"], ARRAYS["state"].astype(np.float32))
    with pytest.raises(UnknownNameError, match="did you mean 'actions'"):
        open_dataset(tmp_path / "a.zarr", action="action")


def test_labels_may_be_several_arrays_and_observations_as_well(tmp_path):
    """As in UMI's stores, where the poses are the labels and there is no action."""
    names = ("state", "n_contacts", "img")
    path = buffer(tmp_path / "a.zarr", arrays={name: ARRAYS[name] for name in names})
    with pytest.raises(DatasetError, match=r"no array data/action; .*--action which .*: img, n_contacts, state"):
        open_dataset(path)
    dataset = open_dataset(path, action="state+n_contacts")
    expected = np.concatenate([ARRAYS["state"], ARRAYS["n_contacts"][:, None]], axis=1).astype(np.float32)
    np.testing.assert_array_equal(dataset.arrays["action"], expected)
    assert list(dataset.spec.observation) == ["img"]
    seen = open_dataset(path, action="state+n_contacts", keys=["state", "img"])
    np.testing.assert_array_equal(seen.arrays["state"], ARRAYS["state"].astype(np.float32))
    with pytest.raises(UnknownNameError, match="stat_"):
        open_dataset(path, action="n_contacts+stat_")


def test_rate_is_measured_in_time_stamps(tmp_path):
    times = np.concatenate([5.0 + np.arange(4) / 32, 90.0 + np.arange(6) / 32])
    arrays = {"state": ARRAYS["state"], "action": ARRAYS["action"], "timestamp": times[:, None]}
    path = buffer(tmp_path / "a.zarr", arrays=arrays)
    spec = open_dataset(path).spec
    assert (spec.control_dt, "0.03125 s measured in its timestamp" in spec.source) == (0.03125, True)
    assert open_dataset(path, control_dt=0.25).spec.control_dt == 0.25


def test_an_archive_of_the_folder_says_what_to_pack(tmp_path):
    folder = tmp_path / "outer" / "a.zarr"
    buffer(folder)
    with pytest.raises(DatasetError, match=r"no Zarr group at its top, but a.zarr; pack what is in"):
        open_dataset(zipped(folder.parent, tmp_path / "a.zarr.zip"))


@pytest.mark.parametrize(
    ("images", "shape", "dtype"),
    [
        (RNG.integers(0, 256, (10, 3, 12, 16)).astype(np.uint8), (12, 16, 3), "uint8"),
        (RNG.integers(0, 256, (10, 12, 16, 3)) / 255, (12, 16, 3), "uint8"),
        (RNG.random((10, 12, 16, 1)).astype(np.float32) * 5, (12, 16, 1), "float32"),
        (RNG.integers(0, 9000, (10, 12, 16, 1)).astype(np.uint16), (12, 16, 1), "float32"),
    ],
)
def test_images_of_every_kind_lose_nothing(tmp_path, images, shape, dtype):
    dataset = open_dataset(buffer(tmp_path / "a.zarr", arrays={"cam": images, "action": ARRAYS["action"]}))
    assert dataset.spec.observation["cam"] == ArraySpec(shape, dtype)
    expected = np.moveaxis(images, 1, -1) if images.shape[1] == 3 else images
    if images.dtype == np.float64:
        expected = np.round(images * 255)
    np.testing.assert_array_equal(dataset.arrays["cam"][:], expected.astype(dtype))


def test_images_that_change_their_scale_are_refused_where_they_do(tmp_path):
    images = RNG.integers(0, 256, (100, 12, 16, 3)).astype(np.float32)
    images[57, 3] += 0.5
    arrays = {"cam": images, "action": np.ones((100, 2), np.float32)}
    dataset = open_dataset(buffer(tmp_path / "a.zarr", arrays=arrays, ends=np.array([100])))
    with pytest.raises(DatasetError, match="holds whole numbers of 0 to 255 in some rows"):
        dataset.arrays["cam"][50:60]


def jpeg2k_buffer(path):
    """With images as diffusion_policy compresses them (here without loss), its settings in the header."""
    codecs = pytest.importorskip("imagecodecs.numcodecs", reason="imagecodecs is not installed")
    buffer(path, arrays={**ARRAYS, "img": ARRAYS["img"].astype(np.uint8)})
    header = path / "data/img/.zarray"
    compressor = {
        "id": "imagecodecs_jpeg2k", "level": 0, "codecformat": 0, "colorspace": None, "tile": None, "reversible": True,
        "bitspersample": None, "resolutions": None, "numthreads": 1, "verbose": 0,
    }  # fmt: skip
    document = {**json.loads(header.read_text()), "chunks": [1, 12, 16, 3], "compressor": compressor}
    header.write_text(json.dumps(document))
    codec = codecs.Jpeg2k(level=0, reversible=True)
    for chunk in header.parent.glob("*.0.0.0"):
        chunk.unlink()
    for number, image in enumerate(ARRAYS["img"].astype(np.uint8)):
        (header.parent / f"{number}.0.0.0").write_bytes(codec.encode(image[None]))
    return path


def test_jpeg2000_images_are_read(tmp_path):
    dataset = open_dataset(jpeg2k_buffer(tmp_path / "a.zarr"))
    np.testing.assert_array_equal(dataset.arrays["img"][2:9], ARRAYS["img"][2:9].astype(np.uint8))


def test_jpeg2000_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    path = jpeg2k_buffer(tmp_path / "a.zarr")
    monkeypatch.setitem(sys.modules, "imagecodecs.numcodecs", None)
    monkeypatch.delitem(numcodecs.registry.codec_registry, "imagecodecs_jpeg2k", raising=False)
    with pytest.raises(MissingDependencyError, match="pip install imagecodecs"):
        open_dataset(path)
    assert list(open_dataset(path, ["state"]).spec.observation) == ["state"]


class TestRefused:
    def test_an_array_of_another_length(self, tmp_path):
        path = buffer(tmp_path / "a.zarr", arrays={**ARRAYS, "state": ARRAYS["state"][:9]})
        with pytest.raises(DatasetError, match=r"data/state of .* has 9 rows, but its episodes have 10 .* with --keys"):
            open_dataset(path)

    @pytest.mark.parametrize("ends", [[4, 2, 4], [0, 4, 10]])
    def test_lengths_in_the_place_of_ends(self, tmp_path, ends):
        path = buffer(tmp_path / "a.zarr")
        zarr.open_group(path, mode="r+").create_array("meta/episode_ends", data=np.asarray(ends), overwrite=True)
        with pytest.raises(DatasetError, match=r"must increase from above 0.*np\.cumsum"):
            open_dataset(path)

    @pytest.mark.parametrize("format_of_zarr", [2, 3])
    @pytest.mark.parametrize("packed", [False, True])
    def test_a_lost_chunk_unless_the_reader_says_what_it_means(self, tmp_path, format_of_zarr, packed):
        path = buffer(tmp_path / "a.zarr", format_of_zarr)
        (path / "data/state" / ("1.0" if format_of_zarr == 2 else "c/1/0")).unlink()
        if packed:
            path = zipped(path, tmp_path / "a.zip")
        with pytest.raises(DatasetError, match=r"has lost its chunk .*1.*--fill-missing"):
            open_dataset(path)
        state = open_dataset(path, fill_missing=True).arrays["state"]
        np.testing.assert_array_equal(state[3:6], 0)
        np.testing.assert_array_equal(state[6:], ARRAYS["state"][6:].astype(np.float32))

    def test_a_chunk_of_another_size(self, tmp_path):
        path = buffer(tmp_path / "a.zarr", compressors=None)
        chunk = path / "data/img/0.0.0.0"
        for change in (chunk.read_bytes()[:-4], chunk.read_bytes() + b"more"):
            chunk.write_bytes(change)
            with pytest.raises(DatasetError, match="damaged"):
                open_dataset(path).arrays["img"][:]

    def test_no_observation(self, tmp_path):
        with pytest.raises(DatasetError, match="no observations"):
            open_dataset(buffer(tmp_path / "a.zarr", arrays={"action": ARRAYS["action"]}))

    def test_a_zip_bomb(self, tmp_path):
        path = buffer(tmp_path / "a.zarr")
        (path / "data/state/0.0").write_bytes(bytes(1 << 27))
        with pytest.raises(DatasetError, match="refused as a zip bomb"):
            open_dataset(zipped(path, tmp_path / "a.zip", zipfile.ZIP_DEFLATED))

    def test_a_zip_that_leaves_its_folder(self, tmp_path):
        path = zipped(buffer(tmp_path / "a.zarr"), tmp_path / "a.zip")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("../outside", b"x")
        with pytest.raises(DatasetError, match="leaves its folder; refused"):
            open_dataset(path)

    def test_a_declared_size_without_data(self, tmp_path):
        path = buffer(tmp_path / "a.zarr")
        header = path / "data/img/.zarray"
        for change in ({"shape": [10**12, 12, 16, 3]}, {"chunks": [10**9, 12, 16, 3]}):
            text = header.read_text()
            header.write_text(json.dumps({**json.loads(text), **change}))
            with pytest.raises(DatasetError):
                open_dataset(path)
            header.write_text(text)

    def test_pickled_objects(self, tmp_path):
        path = buffer(tmp_path / "a.zarr")
        header = path / "data/state/.zarray"
        document = json.loads(header.read_text())
        header.write_text(json.dumps({**document, "dtype": "|O", "filters": [{"id": "pickle", "protocol": 5}]}))
        with pytest.raises(DatasetError, match="data/state"):
            open_dataset(path)


@pytest.fixture(scope="module", params=["format 2", "format 3", "zlib", "deflated zip"])
def small(request, tmp_path_factory):
    """A replay buffer, and the files that it consists of."""
    folder = tmp_path_factory.mktemp("fuzz")
    options = {"compressors": numcodecs.Zlib()} if request.param == "zlib" else {}
    path = buffer(folder / "a.zarr", 3 if request.param == "format 3" else 2, **options)
    if "zip" in request.param:
        path = zipped(path, folder / "a.zip", zipfile.ZIP_DEFLATED)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return path, {file: file.read_bytes() for file in files}


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_flipped_and_missing_bytes_are_told_or_harmless(small, data):
    """Not every byte has a checksum of its own: what cannot be told is read, as so many rows as there are."""
    path, contents = small
    file = data.draw(st.sampled_from(sorted(contents)))
    spoiled = bytearray(contents[file])
    if data.draw(st.booleans()) or not spoiled:
        spoiled = spoiled[: data.draw(st.integers(0, max(0, len(spoiled) - 1)))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            spoiled[data.draw(st.integers(0, len(spoiled) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(bytes(spoiled))
    try:
        dataset = open_dataset(path, check=False)
        found = {key: np.asarray(array[:]) for key, array in dataset.arrays.items()}
    except ScdRobotError:
        return
    finally:
        file.write_bytes(contents[file])
    for key, values in found.items():
        assert len(values) == dataset.num_steps, key


def test_human_pusht_recording_byte_flips(recordings, tmp_path):
    source = recordings / "pusht_cchi_v7_zarr" / "pusht_cchi_v7_replay.zarr"
    if not source.is_dir():
        pytest.skip(f"no recording of PushT at {source}")
    path = tmp_path / "a.zarr"
    for part in ("data/state", "data/action", "meta", ".zgroup", "data/.zgroup", ".zattrs", "data/.zattrs"):
        if (source / part).is_dir():
            shutil.copytree(source / part, path / part)
        elif (source / part).is_file():
            (path / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / part, path / part)
    os.chmod(path, 0o755)
    expected = open_dataset(path)
    rng = np.random.default_rng(0)
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    told = 0
    for _ in range(60):
        file = Path(files[rng.integers(len(files))])
        content = file.read_bytes()
        spoiled = bytearray(content)
        spoiled[rng.integers(len(spoiled))] ^= 1 << rng.integers(8)
        file.write_bytes(bytes(spoiled))
        try:
            found = open_dataset(path, check=False)
            assert found.arrays["state"].shape[1:] == expected.arrays["state"].shape[1:]
        except ScdRobotError:
            told += 1
        finally:
            file.write_bytes(content)
    assert told > 0


class TestSomeOfTheEpisodes:
    """Where some episodes are left out, messages still count all, as `only` and `drop` do."""

    ENDS = np.array([4, 8, 9, 13, 14])
    STATE = np.arange(28.0).reshape(14, 2)

    @pytest.fixture
    def damaged(self, tmp_path):
        """Of five episodes 2 and 4 have one step, and 3 holds NaN."""
        state = self.STATE.copy()
        state[10, 1] = np.nan
        arrays = {"state": state, "action": self.STATE}
        fill(zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2), arrays, self.ENDS)
        return tmp_path / "a.zarr"

    def test_short_ones_are_named_all_at_once(self, damaged):
        with pytest.raises(DatasetError, match=r"but episode 2 has 1; leave out with --drop: 2 4$"):
            open_dataset(damaged, drop=["0"])

    def test_a_bad_number_is_in_the_episode_that_drop_takes(self, damaged):
        with pytest.raises(DatasetError, match=r"first in episode 3 at step 1; .*--drop 3$"):
            open_dataset(damaged, drop=["0", "2", "4"])
        assert open_dataset(damaged, drop=["2-"]).num_episodes == 2

    def test_numbers_follow_every_choice(self, damaged):
        dataset = open_dataset(damaged, only=["1-3"], check=False).select([2, 0])
        assert [dataset.number(i) for i in range(2)] == [3, 1]


class TestNumbersTooLargeForFloat32:
    @pytest.mark.parametrize(
        ("values", "told"),
        [
            (1.7e9 + 0.1 * np.arange(10), "1.7e+09 to 1.7e+09, only every 128 is kept"),
            (2**24 + np.arange(10, dtype=np.int64), "16777216 to 16777225, only every 2 is kept"),
            (1e9 * np.arange(10), None),
            (np.full(10, 1.7e9), None),
            (1e-9 * np.arange(10) + 1, None),
            ((np.arange(10) + 2**24).astype(np.float32), None),
        ],
    )
    def test_what_becomes_indistinguishable_is_told(self, tmp_path, caplog, values, told):
        buffer(tmp_path / "a.zarr", arrays=ARRAYS | {"time": values})
        open_dataset(tmp_path / "a.zarr", control_dt=0.1)
        warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert [("data/time of" in text, told in text) for text in warned] == [(True, True)] * (told is not None)

    @pytest.mark.filterwarnings("error")
    def test_what_becomes_infinite_is_refused_without_noise(self, tmp_path):
        buffer(tmp_path / "a.zarr", arrays=ARRAYS | {"state": np.where(np.arange(20).reshape(10, 2) == 9, 1e300, 0.0)})
        with pytest.raises(DatasetError, match=r"too large for float32.*first in episode 1 at step 0"):
            open_dataset(tmp_path / "a.zarr")


def test_a_buffer_before_its_first_episode_is_told_as_such(tmp_path):
    empty = {key: values[:0] for key, values in ARRAYS.items()}
    with pytest.raises(DatasetError, match="holds no finished episode; record some first"):
        open_dataset(buffer(tmp_path / "a.zarr", arrays=empty, ends=np.zeros(0, np.int64)))


def test_what_holds_no_numbers_is_left_out(tmp_path):
    arrays = {**ARRAYS, "nothing": np.zeros((10, 0))}
    assert "nothing" not in open_dataset(buffer(tmp_path / "a.zarr", arrays=arrays)).spec.observation


def test_numbers_of_objects_are_no_pictures_where_they_exceed_a_byte_anywhere(tmp_path):
    """Whole numbers are looked at in all frames: what the first ones hold says little of the others."""
    objects = np.zeros((400, 30, 30, 1), np.int32)
    objects[33, 2, 3] = 300
    arrays = {"objects": objects, "action": np.ones((400, 2), np.float32)}
    dataset = open_dataset(buffer(tmp_path / "a.zarr", arrays=arrays, ends=np.array([400])))
    assert dataset.spec.observation["objects"].dtype == "float32"
    assert dataset.arrays["objects"][33].max() == 300


def test_several_cameras_in_one_array_are_refused(tmp_path):
    arrays = {"cams": RNG.integers(1, 256, (10, 2, 48, 64, 3)).astype(np.uint8), "action": ARRAYS["action"]}
    path = buffer(tmp_path / "a.zarr", arrays=arrays)
    with pytest.raises(DatasetError, match=r"\(10, 2, 48, 64, 3\) of several cameras in one array.* --keys"):
        open_dataset(path)
