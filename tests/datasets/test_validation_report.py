"""The findings reach the reader: as text, and as a page that needs nothing but itself."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from scd_robot.datasets import plots
from scd_robot.datasets.schema import EpisodeDataset
from scd_robot.datasets.validation.findings import Finding
from scd_robot.datasets.validation.pictures import finding_picture
from scd_robot.datasets.validation.report import format_validation, render_validation_page, write_validation_page
from scd_robot.datasets.validation.run import Validation, check_dataset
from scd_robot.errors import MissingDependencyError, OutputError
from scd_robot.types import ArraySpec, DatasetSpec

LENGTHS = (30, 40, 50)
ENDS = np.cumsum(LENGTHS)


@pytest.fixture
def validation():
    """A NaN at (1, 7), a camera that hangs in all of episode 2, and an action that never changes."""
    rng = np.random.default_rng(0)
    steps = int(ENDS[-1])
    arrays = {
        "state": np.cumsum(rng.normal(size=(steps, 3)), axis=0).astype(np.float32),
        "camera": rng.integers(0, 256, (steps, 9, 12, 3), np.uint8),
        "action": np.stack([np.full(steps, 3.0), rng.normal(size=steps)], axis=1).astype(np.float32),
        "timestamp": np.concatenate([np.arange(n) * 0.1 for n in LENGTHS]),
    }
    arrays["state"][37, 1] = np.nan
    arrays["camera"][70:] = 9
    arrays["timestamp"][70 + 5] += 0.2
    spec = DatasetSpec({"state": ArraySpec((3,)), "camera": ArraySpec((9, 12, 3), "uint8")}, 2, 0.1, "a <test> & more")
    text = {"name": ["demo_1", "demo_12", "demo_<b>"]}
    dataset = EpisodeDataset(spec, ENDS.astype(np.int64), arrays, episode_text=text)
    findings, keys = check_dataset(dataset)
    return Validation("data/a.zarr", 16, tuple(findings), keys, dataset)


@pytest.fixture
def unopened():
    return Validation("data/b.zarr", 16, (Finding("open", "error", "", 1, "chunk 0.0 of <state> is lost"),))


class Page(HTMLParser):
    """Words, pictures, and whatever an HTML file refers to."""

    def __init__(self, text):
        super().__init__()
        self.words, self.sources, self.rows, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.tags.append(tag)
        self.sources += [known[name] for name in ("src", "href") if name in known]
        if tag == "tbody" and "data-severity" in known:
            self.rows.append(known["data-severity"])

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


class TestText:
    def test_errors_come_first_and_the_verdict_last(self, validation):
        lines = format_validation(validation).splitlines()
        heads = [line.split()[0] for line in lines if line.startswith(("error", "warning", "note"))]
        assert heads == [finding.severity for finding in validation.findings]
        assert heads[0] == "error"
        assert "note" not in heads[: heads.index("warning")]
        assert lines[0] == "data/a.zarr: 3 episodes, 120 control steps"
        assert re.fullmatch(r"Would spoil training: \d+ errors, \d+ warnings?, \d+ notes?", lines[-1])
        assert max(map(len, lines)) <= 120

    def test_places_have_the_names_of_the_file(self, validation):
        text = format_validation(validation)
        assert re.search(r"error +not finite +state +episode 1 \(demo_12\) step 7\n", text)
        assert re.search(r"error +frozen +camera +episode 2 \(demo_<b>\)\n", text)

    def test_without_findings_or_dataset(self, validation, unopened):
        clean = Validation("c.zarr", 1, (), validation.keys, validation.dataset)
        assert format_validation(clean).splitlines()[-1] == "Fit for training: 0 errors, 0 warnings, 0 notes"
        assert "    chunk 0.0 of <state> is lost" in format_validation(unopened).splitlines()


class TestPage:
    def test_page_needs_nothing_but_itself(self, validation):
        text = render_validation_page(validation)
        page = Page(text)
        assert page.sources
        assert all(source.startswith("data:image/png;base64,") for source in page.sources)
        assert "link" not in page.tags
        assert "url(" not in text

    def test_every_finding_is_a_row_with_its_message(self, validation):
        page = Page(render_validation_page(validation))
        assert page.rows == [finding.severity for finding in validation.findings]
        for finding in validation.findings:
            assert " ".join(finding.message.split()) in page.text
        assert "Would spoil training" in page.text
        assert "episode 1 (demo_12) step 7" in page.text

    def test_names_from_files_are_text_not_markup(self, validation, unopened):
        text = render_validation_page(validation)
        assert "demo_<b>" in Page(text).text
        assert "b" not in Page(text).tags[Page(text).tags.index("table") :]
        assert "chunk 0.0 of <state> is lost" in Page(render_validation_page(unopened)).text

    def test_pictures_are_png_files(self, validation):
        pictures = [
            base64.b64decode(source.split(",")[1]) for source in Page(render_validation_page(validation)).sources
        ]
        assert len(pictures) == sum(finding.episode is not None for finding in validation.findings)
        assert all(picture.startswith(b"\x89PNG\r\n") for picture in pictures)

    def test_all_places_are_listed_once_there_are_several(self, validation):
        finding = Finding("jump", "warning", "state", 25, "m", tuple((2, step) for step in range(20)))
        page = Page(render_validation_page(Validation("x", 1, (finding,), {}, validation.dataset)))
        assert "episode 2 (demo_<b>) step 0; " in page.text
        assert "episode 2 (demo_<b>) step 19 and more" in page.text

    def test_written_whole_or_not_at_all(self, validation, tmp_path):
        write_validation_page(validation, tmp_path / "new" / "page.html")
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
        assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == render_validation_page(validation)
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="choose another path"):
            write_validation_page(validation, tmp_path / "file" / "page.html")

    def test_without_matplotlib_the_command_is_named(self, validation, tmp_path, monkeypatch):
        monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MissingDependencyError, match=r"pip install .*formats"):
            write_validation_page(validation, tmp_path / "page.html")
        assert list(tmp_path.iterdir()) == []


class TestPictures:
    @pytest.fixture
    def drawn(self, monkeypatch):
        """Figures instead of PNG files."""
        monkeypatch.setattr("scd_robot.datasets.validation.pictures.png", lambda figure: figure)

    def picture(self, validation, check, key, places, dimensions=()):
        return finding_picture(validation.dataset, Finding(check, "error", key, 1, "m", places, dimensions))

    def test_trace_shows_the_steps_around_the_place(self, validation, drawn):
        validation.dataset.arrays["state"][37, 1] = 0
        figure = self.picture(validation, "jump", "state", ((2, 45), (2, 46), (1, 3)), (0, 2))
        assert [axes.get_title(loc="left") for axes in figure.axes] == ["state[0]", "state[2]"]
        *marks, trace = figure.axes[1].lines
        assert [mark.get_xdata()[0] for mark in marks] == [45, 46]
        np.testing.assert_array_equal(trace.get_xdata(), np.arange(5, 50))
        np.testing.assert_array_equal(trace.get_ydata(), validation.dataset.arrays["state"][75:120, 2])

    def test_a_clock_is_shown_by_its_steps(self, validation, drawn):
        figure = self.picture(validation, "time_gap", "timestamp", ((2, 5),))
        np.testing.assert_allclose(figure.axes[0].lines[-1].get_ydata()[3:8], [0.1, 0.1, 0.3, -0.1, 0.1])

    @pytest.mark.parametrize(("step", "first"), [(0, 0), (20, 18), (39, 32), (None, None)])
    def test_frames_around_the_place_are_shown(self, validation, drawn, step, first):
        figure = self.picture(validation, "frozen", "camera", ((1, step),))
        steps = [0, 6, 11, 17, 22, 28, 33, 39] if first is None else range(first, first + 8)
        for axes, shown in zip(figure.axes, steps, strict=True):
            assert axes.get_title() == f"step {shown}"
            np.testing.assert_array_equal(axes.images[0].get_array(), validation.dataset.arrays["camera"][30 + shown])

    def test_units_are_shown_beside_other_episodes(self, validation, drawn):
        figure = self.picture(validation, "unit", "state", ((1, None),), (2,))
        assert [len(line.get_ydata()) for line in figure.axes[0].lines] == [30, 50, 40]

    def test_what_has_no_place_or_array_has_no_picture(self, validation):
        assert self.picture(validation, "constant", "action", ()) is None
        assert self.picture(validation, "short_episode", "", ((1, None),)) is None
        assert self.picture(validation, "unreadable", "camera", ((1, 3),)) is None
