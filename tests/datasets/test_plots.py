"""Pictures of a dataset show what it holds."""

import numpy as np
import pytest

from scd_robot.datasets import plots
from scd_robot.datasets.plots import name_of, plot_dataset
from scd_robot.datasets.schema import EpisodeDataset
from scd_robot.errors import MissingDependencyError, OutputError
from scd_robot.types import ArraySpec, DatasetSpec

LENGTHS = (20, 30, 25, 2)
ENDS = np.cumsum(LENGTHS)
STEPS = int(ENDS[-1])


def make_dataset(**observations):
    rng = np.random.default_rng(0)
    arrays = {"state": rng.normal(size=(STEPS, 3)).astype(np.float32), **observations}
    spec = DatasetSpec({k: ArraySpec(a.shape[1:], str(a.dtype)) for k, a in arrays.items()}, 2, 0.1, "a test")
    return EpisodeDataset(
        spec, ENDS.astype(np.int64), {**arrays, "action": rng.normal(size=(STEPS, 2)).astype(np.float32)}
    )


def images(channels=3, dtype=np.uint8):
    return np.random.default_rng(1).integers(0, 256, (STEPS, 8, 10, channels)).astype(dtype)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a dataset, and gives the figures by file name."""
    figures = {}

    def keep(figure, path):
        figures[path.name] = figure
        return path

    monkeypatch.setattr(plots, "_save", keep)
    return lambda dataset: (plot_dataset(dataset, tmp_path), figures)[1]


def test_files_are_complete_pictures(tmp_path):
    written = plot_dataset(make_dataset(camera=images()), tmp_path / "new")
    assert [path.name for path in written] == [
        "episode_lengths.png", "traces_action.png", "histograms_action.png", "traces_state.png",
        "histograms_state.png", "frames_camera.png",
    ]  # fmt: skip
    assert sorted((tmp_path / "new").iterdir()) == sorted(written)
    for path in written:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n")
        assert content.endswith(b"IEND\xaeB`\x82")


def test_lengths_are_counted(drawn):
    (axes,) = drawn(make_dataset())["episode_lengths.png"].axes
    assert sum(bar.get_height() for bar in axes.patches) == len(LENGTHS)
    for bar in axes.patches:
        low, high = bar.get_x(), bar.get_x() + bar.get_width()
        assert bar.get_height() == sum(low < length < high for length in LENGTHS)
    assert axes.lines[0].get_xdata()[0] == 22.5  # the median
    assert "4 episodes, 77 control steps of 0.1 s; median length 22.5 (2.2 s)" in axes.get_title(loc="left")


def test_traces_are_the_values_over_seconds(drawn):
    dataset = make_dataset()
    figure = drawn(dataset)["traces_state.png"]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["state[0]", "state[1]", "state[2]"]
    assert figure.axes[-1].get_xlabel() == "time [s]"
    for dimension, axes in enumerate(figure.axes):
        assert [line.get_label() for line in axes.lines] == [f"episode {index}" for index in range(4)]
        for index, line in enumerate(axes.lines):
            np.testing.assert_allclose(line.get_xdata(), 0.1 * np.arange(LENGTHS[index]))
            np.testing.assert_array_equal(line.get_ydata(), dataset.episode(index)["state"][:, dimension])


def test_histograms_count_every_finite_value(drawn):
    dataset = make_dataset()
    dataset.arrays["state"][[3, 9], 1] = np.nan, np.inf
    figure = drawn(dataset)["histograms_state.png"]
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [sum(bar.get_height() for bar in axes.patches) for axes in shown] == [STEPS, STEPS - 2, STEPS]
    assert shown[1].get_title(loc="left") == "state[1] (2 not finite)"


def test_contact_sheet_shows_frames_from_the_first_to_the_last(drawn):
    dataset = make_dataset(camera=images())
    figure = drawn(dataset)["frames_camera.png"]
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 8 + 8 + 8 + 2  # the last episode has two steps
    camera = dataset.arrays["camera"]
    np.testing.assert_array_equal(shown[0].images[0].get_array(), camera[0])
    np.testing.assert_array_equal(shown[7].images[0].get_array(), camera[19])
    np.testing.assert_array_equal(shown[8].images[0].get_array(), camera[20])
    assert [axes.get_title() for axes in shown[-2:]] == ["0.0 s", "0.1 s"]
    assert shown[8].get_ylabel() == "episode 1"


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (4, np.uint8), (1, np.float32), (3, np.float32)])
def test_grey_and_depth_images_are_drawn(tmp_path, channels, dtype):
    assert plot_dataset(make_dataset(camera=images(channels, dtype)), tmp_path)[-1].name == "frames_camera.png"


def test_wide_arrays_are_cut_and_say_so(drawn):
    figures = drawn(
        make_dataset(object=np.zeros((STEPS, 9, 2), np.float32), cloud=np.zeros((STEPS, 200, 3), np.float32))
    )
    figure = figures["traces_object.png"]
    assert figure.get_suptitle() == "object over time (first 16 of 18 dimensions)"
    assert figure.axes[3].get_title(loc="left") == "object[1, 1]"
    assert not [name for name in figures if "cloud" in name]


def test_keys_become_file_names_that_differ(tmp_path):
    written = plot_dataset(
        make_dataset(**{"robot0/eef pos": np.zeros((STEPS, 1)), "robot0_eef_pos": np.zeros((STEPS, 1))}), tmp_path
    )
    assert len({path.name for path in written}) == len(written) == 1 + 2 * 4
    assert all(path.parent == tmp_path and path.is_file() for path in written)


@pytest.mark.parametrize(("dimension", "shape", "expected"), [(4, (5,), "k[4]"), (5, (3, 2), "k[2, 1]"), (0, (), "k")])
def test_dimensions_are_named_as_in_the_array(dimension, shape, expected):
    assert name_of("k", dimension, shape) == expected


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another path"):
        plot_dataset(make_dataset(), tmp_path / "file")


def test_a_disk_that_fills_leaves_no_half_picture(tmp_path, monkeypatch):
    def full(self, data):
        self.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OutputError, match="no space left"):
        plot_dataset(make_dataset(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*formats"):
        plot_dataset(make_dataset(), tmp_path / "plots")
    assert not (tmp_path / "plots").exists()
