"""Contact sheets and videos of imagined frames."""

import av
import numpy as np
import pytest

from scd_robot.analysis.frame_sheet import write_sheet, write_side_by_side
from scd_robot.datasets.video import decode_image
from scd_robot.errors import ConfigError, OutputError, ShapeError

YELLOW, BLACK = (252, 254, 164), (0, 0, 3)  # ends of the colours of differences


def flat(levels, channels=3):
    """(1, Tf, 16, 16, C) frames of one grey level each."""
    return np.broadcast_to(np.array(levels, np.uint8)[None, :, None, None, None], (1, len(levels), 16, 16, channels))


def tiles(page, colour):
    """How many whole tiles of 112 x 112 have this colour."""
    return (page == colour).all(axis=2).sum() // 112**2


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_shows_the_chosen_frames_the_last_one_and_their_differences(tmp_path, channels):
    recorded, imagined = flat([10, 20, 30, 40, 50, 60], channels), flat([10, 20, 60, 40, 190, 200], channels)
    write_sheet(tmp_path / "new" / "sheet.png", recorded, imagined, 3)
    page = decode_image((tmp_path / "new" / "sheet.png").read_bytes(), 3, "the sheet")
    for level in (10, 40):
        assert tiles(page, (level,) * 3) == 2, "first and every third frame, recorded and imagined"
    assert tiles(page, (60,) * 3) == tiles(page, (200,) * 3) == 1, "the last frame"
    assert not any(tiles(page, (level,) * 3) for level in (20, 30, 50, 190)), "the others"
    assert tiles(page, BLACK) == 2, "no difference in the first two"
    assert tiles(page, YELLOW) == 1


def test_rows_are_recorded_imagined_difference_and_the_last_seen_frame_comes_first(tmp_path):
    write_sheet(tmp_path / "sheet.png", flat([10, 20]), flat([11, 21]), last_context=flat([5])[:, 0])
    page = decode_image((tmp_path / "sheet.png").read_bytes(), 3, "the sheet")
    centres = page[26 + 56 :: 116, 104 + 56 :: 116, 0]
    assert centres[:2].tolist() == [[5, 10, 20], [5, 11, 21]]


def test_a_video_shows_both_side_by_side_at_the_given_rate(tmp_path):
    write_side_by_side(tmp_path / "new" / "pair.mp4", flat([40, 80, 120]), flat([200, 160, 120]), 12.5)
    with av.open(str(tmp_path / "new" / "pair.mp4")) as video:
        assert float(video.streams.video[0].average_rate) == pytest.approx(12.5)
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    height, width = frames[0].shape[:2]
    seen = [[int(frame[height // 2, x].mean()) for x in (width // 4, 3 * width // 4)] for frame in frames]
    assert np.abs(np.array(seen) - [[40, 200], [80, 160], [120, 120]]).max() < 6


def test_what_cannot_be_drawn_or_written_is_named(tmp_path):
    frames = flat([1, 2])
    with pytest.raises(ConfigError, match="every must be at least 1"):
        write_sheet(tmp_path / "sheet.png", frames, frames, 0)
    with pytest.raises(ConfigError, match="fps must be a number above 0"):
        write_side_by_side(tmp_path / "pair.mp4", frames, frames, 0)
    with pytest.raises(ShapeError, match=r"in 0\.\.1"):
        write_sheet(tmp_path / "sheet.png", frames, frames / np.float32(255), 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is not a folder"):
        write_sheet(tmp_path / "file" / "sheet.png", frames, frames)
    with pytest.raises(OutputError):
        write_side_by_side(tmp_path / "file" / "pair.mp4", frames, frames, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_large_pictures_are_shown_smaller(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (1, 2, 480, 640, 3), dtype=np.uint8)
    write_sheet(tmp_path / "a.png", frames, frames)
    height, width, _ = decode_image((tmp_path / "a.png").read_bytes(), 3, "the sheet").shape
    assert width < 2 * 240 + 120
    assert height < 3 * 180 + 60
