import gc
import itertools
import math
import multiprocessing
import os
import pickle
from fractions import Fraction

import av
import numpy as np
import pytest

from scd_robot.datasets import video
from scd_robot.datasets.video import VideoRows, VideoSegment, decode_image, encode_png, encode_video
from scd_robot.errors import DatasetError, MissingDependencyError, OutputError, ShapeError

SIZE = (32, 48)
FPS = 10


def pictures(count, size=SIZE, seed=0):
    """Smooth moving pictures (count, H, W, 3), each clearly brighter or darker than its neighbours."""
    y, x = np.mgrid[: size[0], : size[1]]
    rng = np.random.default_rng(seed)
    images = []
    for number in range(count):
        level = 60 + 20 * (number % 7) + rng.integers(0, 10)
        images.append(np.stack([level + 30 * np.sin(x / 7 + number), level + y / 2, np.full_like(x, level)], -1))
    return np.clip(images, 0, 255).astype(np.uint8)


def write(path, images, pts=None, unit=Fraction(1, FPS), codec="libx264", options=None, container=None, form="mp4"):
    """Encodes with PyAV alone; `pts` in multiples of `unit` [s]."""
    with av.open(str(path), "w", format=form, options=container or {}) as output:
        stream = output.add_stream(codec, rate=FPS)
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = unit
        stream.codec_context.options = {"crf": "20", **(options or {})} if codec != "mpeg4" else options or {}
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image).reformat(format="yuv420p")
            frame.pts, frame.time_base = number if pts is None else int(pts[number]), unit
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def decoded(path):
    """Times [s] from the first frame, and frames, by a plain decode from the start."""
    with av.open(str(path)) as container:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return np.array([time for time, _ in frames]) - frames[0][0], np.stack([image for _, image in frames])


def rows_of(path, times=None, size=SIZE, begin=0.0, end=math.inf, fps=FPS, count=None):
    times = np.arange(count) / fps if times is None else np.asarray(times, np.float64)
    return VideoRows([VideoSegment(str(path), times, begin, end, "episode 4")], (*size, 3), fps)


@pytest.fixture
def clip(tmp_path):
    """A file of 30 frames at 10 Hz, each fifth a key frame."""
    return write(tmp_path / "a.mp4", pictures(30), options={"g": "5", "x264-params": "scenecut=0"})


@pytest.fixture
def frames_decoded(monkeypatch):
    """Numbers of frames that were decoded after each start at a key frame."""
    seek, following, runs = video._Decoder._seek, video._Decoder._next, []

    def counting_starts(self, time):
        runs.append(0)
        seek(self, time)

    def counting_frames(self):
        timed = following(self)
        runs[-1] += timed is not None
        return timed

    monkeypatch.setattr(video._Decoder, "_seek", counting_starts)
    monkeypatch.setattr(video._Decoder, "_next", counting_frames)
    return runs


ENCODINGS = {
    "key frames only": {"options": {"g": "1"}},
    "as LeRobot": {"options": {"g": "2"}},
    "frames in another order than shown": {"options": {"g": "12", "bf": "3"}},
    "open groups of pictures": {
        "options": {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0:b-pyramid=normal"}
    },
    "no key frame after the first": {"options": {"g": "10", "x264-params": "intra-refresh=1"}},
    "begins late": {"pts": np.arange(40) + 13, "options": {"bf": "2"}},
    "no edit list": {"options": {"bf": "3", "g": "8"}, "container": {"use_editlist": "0"}},
    "fragments": {"options": {"bf": "3", "g": "8"}, "container": {"movflags": "frag_keyframe+empty_moov"}},
    "AV1": {"codec": "libsvtav1", "options": {"g": "10", "preset": "12", "svtav1-params": "lp=1"}},
    "MPEG-4": {"codec": "mpeg4", "options": {"g": "10"}},
}


class TestRead:
    @pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
    def test_any_rows_equal_a_plain_decode_from_the_start(self, tmp_path, encoding):
        if encoding.get("codec", "libx264") not in av.codecs_available:
            pytest.skip(f"this PyAV has no {encoding['codec']}")
        path = write(tmp_path / "a.mp4", pictures(40), **encoding)
        times, expected = decoded(path)
        rows = rows_of(path, times)
        rows.check()
        np.testing.assert_array_equal(rows[:], expected)
        rng = np.random.default_rng(0)
        for start, length in zip(rng.integers(0, 40, 25), rng.integers(1, 12, 25), strict=True):
            np.testing.assert_array_equal(rows[start : start + length], expected[start : start + length])
        shuffled = rng.permutation(40)[:15]
        np.testing.assert_array_equal(rows[shuffled], expected[shuffled])

    def test_successive_reads_decode_each_frame_once(self, clip, frames_decoded):
        rows = rows_of(clip, count=30)
        for start in range(0, 30, 3):
            rows.read(start, start + 3)
        assert frames_decoded == [30]

    @pytest.mark.parametrize(("first", "far"), [(1, 26), (12, 21)])
    def test_a_far_row_is_reached_from_the_key_frame_before_it(self, clip, frames_decoded, first, far):
        """Far is more than the distance of key frames, 0.5 s here, once two of them were seen."""
        rows = rows_of(clip, count=30)
        rows.read(0, first)
        rows.read(far, far + 1)
        assert frames_decoded == [first + 1, 3]  # the key frame, the wanted one, and the next

    def test_a_near_row_is_reached_by_going_on(self, clip, frames_decoded):
        rows = rows_of(clip, count=30)
        for row in (0, 6, 8, 12, 12, 15):
            rows.read(row, row + 1)
        assert frames_decoded == [17]

    def test_rows_of_several_files_and_parts_of_files(self, tmp_path):
        paths = [write(tmp_path / f"{n}.mp4", pictures(12, seed=n), options={"g": "4"}) for n in range(2)]
        frames = [decoded(path)[1] for path in paths]
        parts = [(0, 0, 7), (0, 7, 12), (1, 0, 4), (1, 4, 12)]
        rows = VideoRows(
            [
                VideoSegment(str(paths[file]), np.arange(begin, end) / FPS, begin / FPS, end / FPS, f"episode {number}")
                for number, (file, begin, end) in enumerate(parts)
            ],
            (*SIZE, 3),
            FPS,
        )
        rows.check()
        expected = np.concatenate([frames[file][begin:end] for file, begin, end in parts])
        np.testing.assert_array_equal(rows[:], expected)
        np.testing.assert_array_equal(rows[[20, 3, 11, 3]], expected[[20, 3, 11, 3]])

    def test_variable_rates_are_read_by_time_and_not_by_number(self, tmp_path):
        there = np.array([0, 1, 2, 5, 6, 9])  # 3, 4, 7 and 8 were dropped by the camera
        path = write(tmp_path / "a.mp4", pictures(6), pts=there, options={"bf": "2"})
        expected = decoded(path)[1]
        np.testing.assert_array_equal(rows_of(path, there / FPS)[:], expected)
        with pytest.raises(
            DatasetError, match=r"episode 4, step 4, needs a frame at 0\.4000 s .* nearest .* 0\.5000 s"
        ):
            rows_of(path, count=10)[4]

    @pytest.mark.parametrize("jitter", [0.03, -0.03, 0.049])
    def test_jittered_times_take_the_nearest_frame(self, clip, jitter):
        expected = decoded(clip)[1]
        times = np.arange(30) / FPS
        times[5] += jitter
        np.testing.assert_array_equal(rows_of(clip, times)[:], expected)

    def test_times_out_of_order_keep_their_rows(self, clip):
        expected = decoded(clip)[1]
        np.testing.assert_array_equal(rows_of(clip, [0.5, 0.3, 0.4, 2.9, 0.0])[:], expected[[5, 3, 4, 29, 0]])

    def test_frames_of_a_neighbour_are_not_taken(self, clip):
        """The last row's time is nearer to the next episode's first frame."""
        times = np.array([1.0, 1.1, 1.26])
        with pytest.raises(DatasetError, match=r"episode 4, step 2, .* nearest frame is at 1\.2000 s"):
            rows_of(clip, times, begin=1.0, end=1.3)[:]
        with pytest.raises(DatasetError, match=r"episode 4, step 0, needs a frame at 0\.9400 s"):
            rows_of(clip, [0.94, 1.1], begin=1.0, end=1.3)[:]

    def test_full_range_colours_are_not_stretched(self, tmp_path):
        path = tmp_path / "a.mp4"
        with av.open(str(path), "w") as output:
            stream = output.add_stream("libx264", rate=FPS)
            stream.height, stream.width = SIZE
            stream.pix_fmt = "yuvj420p"
            for level in (10, 128, 245):
                image = np.full((*SIZE, 3), level, np.uint8)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(image).reformat(format="yuvj420p")))
            output.mux(stream.encode(None))
        levels = rows_of(path, count=3)[:].astype(int).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(levels, [10, 128, 245], atol=2)


class TestRefuses:
    def test_a_video_shorter_than_its_rows_before_and_while_reading(self, clip):
        rows = rows_of(clip, count=33)
        with pytest.raises(DatasetError, match=r"shorter than its rows: expected 33 frames .* episode 4, found 30"):
            rows.check()
        np.testing.assert_array_equal(rows[:30], decoded(clip)[1])
        for wanted in (30, slice(28, 33), 32):
            with pytest.raises(DatasetError, match=r"episode 4, step 3\d, .*a.mp4.*expected 33 frames, found 30"):
                rows[wanted]

    @pytest.mark.parametrize(("fps", "row"), [(3 * FPS, 15), (FPS / 2, 1)])
    def test_a_video_of_another_rate_is_not_called_shorter(self, tmp_path, fps, row):
        encode_video(tmp_path / "a.mp4", pictures(30), fps)
        rows = rows_of(tmp_path / "a.mp4", count=30)
        rows.check()
        with pytest.raises(
            DatasetError, match=rf"has {fps:.4g} frames per second where the rows have {FPS}, but .*mend"
        ):
            rows[row]

    def test_a_video_of_which_the_end_is_lost(self, tmp_path):
        """The header, in front, still tells of all frames."""
        path = write(tmp_path / "a.mp4", pictures(30), options={"g": "5"}, container={"movflags": "faststart"})
        expected = decoded(path)[1]
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.7)])
        rows = rows_of(path, count=30)
        rows.check()
        np.testing.assert_array_equal(rows[:10], expected[:10])
        with pytest.raises(DatasetError, match=r"a\.mp4"):
            rows[29]

    def test_frames_of_another_size(self, clip):
        rows = rows_of(clip, count=30, size=(48, 32))
        with pytest.raises(DatasetError, match="frames of 32 x 48 pixels, expected 48 x 32"):
            rows.check()
        with pytest.raises(DatasetError, match="frames of 32 x 48 pixels, expected 48 x 32"):
            rows[3]

    @pytest.mark.parametrize("content", [b"", b"no video", b"\x00\x00\x00\x20ftypisom" + bytes(20)])
    def test_files_that_are_no_videos(self, tmp_path, content):
        path = tmp_path / "a.mp4"
        path.write_bytes(content)
        for action in (lambda rows: rows.check(), lambda rows: rows[0]):
            with pytest.raises(DatasetError, match=r"a\.mp4 cannot be read .*: copy or record it again"):
                action(rows_of(path, count=3))

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(DatasetError, match=r"a\.mp4 cannot be read \(FileNotFoundError"):
            rows_of(tmp_path / "a.mp4", count=3)[0]

    @pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile a.mp4\n", "#EXTM3U\n#EXTINF:3,\na.mp4\n"])
    def test_a_list_of_other_files(self, tmp_path, clip, text):
        """FFmpeg would open whatever files or addresses it names."""
        path = tmp_path / "b.mp4"
        path.write_text(text)
        with pytest.raises(DatasetError, match="cannot be read"):
            rows_of(path, count=3)[0]

    def test_a_file_with_sound_only(self, tmp_path):
        path = tmp_path / "a.mp4"
        with av.open(str(path), "w") as output:
            stream = output.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        with pytest.raises(DatasetError, match="holds no video"):
            rows_of(path, count=3)[0]

    def test_damage_is_told_that_a_plain_decode_paints_over(self, tmp_path):
        """FFmpeg by itself gives pictures for slices that it cannot decode, some of them not marked as damaged."""
        path = tmp_path / "a.mp4"
        y, x = np.mgrid[:48, :64]
        waves = [128 + 60 * np.sin(x / 9 + number / 3) + 50 * np.cos(y / 7 - number / 5) for number in range(12)]
        encode_video(path, [np.stack([wave] * 3, -1).astype(np.uint8) for wave in waves], FPS, gop=4)
        good, told = path.read_bytes(), 0
        with av.open(str(path)) as container:
            starts = [good.index(bytes(packet)) for packet in container.demux(video=0) if packet.size]
        for position, bit in itertools.product([start + offset for start in starts for offset in (7, 8, 9)], (1, 0x80)):
            path.write_bytes(good[:position] + bytes([good[position] ^ bit]) + good[position + 1 :])
            try:
                rows_of(path, count=12, size=(48, 64))[:]
            except DatasetError:
                told += self.looks_good(path, 12)
        assert told

    @staticmethod
    def looks_good(path, count):
        """Whether a plain decode gives all frames at their times, none of them marked."""
        try:
            with av.open(str(path)) as container:
                container.streams.video[0].codec_context.thread_count = 1
                frames = list(container.decode(video=0))
        except av.FFmpegError:
            return False
        times = [round(frame.time * FPS, 6) for frame in frames]
        return times == list(range(count)) and not any(frame.is_corrupt for frame in frames)


class TestProcesses:
    def test_a_worker_reads_a_pickled_array(self, clip):
        rows = rows_of(clip, count=30)
        expected = rows[:]
        copy = pickle.loads(pickle.dumps(rows))
        np.testing.assert_array_equal(copy[5:9], expected[5:9])
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            np.testing.assert_array_equal(pool.apply(rows.read, (7, 11)), expected[7:11])

    def test_parent_and_child_read_on_after_a_fork(self, tmp_path):
        """Both go on in the middle of a file, larger than a buffer: the position in the parent's must not move."""
        noise = np.random.default_rng(0).integers(0, 256, (30, 128, 128, 3), dtype=np.uint8)
        path = write(tmp_path / "a.mp4", noise, options={"crf": "10"})
        rows, expected = rows_of(path, count=30, size=(128, 128)), decoded(path)[1]
        rows.read(0, 4)
        receiver, sender = os.pipe()
        gc.collect()  # the child must not be the one to end threads of decoders above
        child = os.fork()
        if child == 0:
            try:
                good = np.array_equal(rows.read(4, 30), expected[4:30]) and np.array_equal(rows[:5], expected[:5])
                os.write(sender, b"y" if good else b"n")
            finally:
                os._exit(0)
        assert os.read(receiver, 1) == b"y"
        os.waitpid(child, 0)
        np.testing.assert_array_equal(rows.read(4, 30), expected[4:30])

    def test_few_files_stay_open(self, tmp_path):
        images = pictures(3)
        for number in range(video._MAX_IDLE + 4):
            rows_of(write(tmp_path / f"{number}.mp4", images), count=3)[:]
        opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        assert sum(name.startswith(str(tmp_path)) for name in opened) == video._MAX_IDLE

    def test_a_file_that_was_replaced_is_read_anew(self, tmp_path):
        path = write(tmp_path / "a.mp4", pictures(5))
        rows = rows_of(path, count=5)
        before = rows[:]
        write(tmp_path / "b.mp4", pictures(5, seed=9)[::-1]).replace(path)
        np.testing.assert_array_equal(rows[:], decoded(path)[1])
        assert not np.array_equal(rows[:], before)


class TestEncode:
    @pytest.mark.parametrize("fps", [10, 30, 50, 29.97, 100 / 3, 0.5])
    def test_times_are_multiples_of_the_step(self, tmp_path, fps):
        assert encode_video(tmp_path / "a.mp4", iter(pictures(9)), fps) == 9
        with av.open(str(tmp_path / "a.mp4")) as container:
            stream = container.streams.video[0]
            times = [frame.pts * stream.time_base for frame in container.decode(stream)]
        assert times == [number / Fraction(fps).limit_denominator(1001) for number in range(9)]

    def test_key_frames_come_as_often_as_asked(self, tmp_path):
        encode_video(tmp_path / "a.mp4", [pictures(1)[0]] * 9, FPS, gop=3)
        with av.open(str(tmp_path / "a.mp4")) as container:
            keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
        assert keys == [True, False, False] * 3

    def test_real_pictures_keep_35_decibels(self, tmp_path, recordings):
        source = recordings / "cr5_5ep_lerobot_v21/videos/chunk-000/observation.images.top/episode_000002.mp4"
        images = rows_of(source, count=76, size=(480, 640))[::5]
        encode_video(tmp_path / "a.mp4", images, FPS)
        found = rows_of(tmp_path / "a.mp4", count=len(images), size=(480, 640))[:]
        errors = np.mean((found.astype(np.float64) - images) ** 2, axis=(1, 2, 3))
        assert 10 * np.log10(255**2 / errors.max()) >= 35

    @pytest.mark.parametrize(
        "images",
        [np.zeros((2, 31, 48, 3), np.uint8), np.zeros((2, 32, 48, 1), np.uint8), np.zeros((2, 32, 48, 3), np.float32)],
    )
    def test_frames_that_do_not_fit_are_refused(self, tmp_path, images):
        with pytest.raises(ShapeError, match=r"frames of a video must be uint8 \(H, W, 3\)"):
            encode_video(tmp_path / "a.mp4", images, FPS)

    def test_frames_of_two_sizes_are_refused(self, tmp_path):
        with pytest.raises(ShapeError, match=r"of one even size, got uint8 \(48, 32, 3\)"):
            encode_video(tmp_path / "a.mp4", [pictures(1)[0], pictures(1, (48, 32))[0]], FPS)

    def test_a_place_that_cannot_be_written(self, tmp_path):
        with pytest.raises(OutputError, match="cannot write the video"):
            encode_video(tmp_path / "absent" / "a.mp4", pictures(2), FPS)

    def test_an_encoder_that_is_not_there(self, tmp_path):
        with pytest.raises(MissingDependencyError, match="cannot encode lib265"):
            encode_video(tmp_path / "a.mp4", pictures(2), FPS, codec="lib265")


class TestImages:
    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize("size", [(1, 1), (17, 23), (64, 64)])
    def test_png_keeps_every_pixel(self, size, channels):
        image = np.random.default_rng(0).integers(0, 256, (*size, channels), dtype=np.uint8)
        np.testing.assert_array_equal(decode_image(encode_png(image), channels, "x"), image)

    def test_jpeg_is_read(self):
        context = av.CodecContext.create("mjpeg", "w")
        context.height, context.width = SIZE
        context.pix_fmt, context.time_base = "yuvj420p", Fraction(1)
        image = pictures(1)[0]
        packets = context.encode(av.VideoFrame.from_ndarray(image).reformat(format="yuvj420p"))
        found = decode_image(b"".join(bytes(packet) for packet in [*packets, *context.encode(None)]), 3, "x")
        assert np.abs(found.astype(int) - image).mean() < 6

    def test_sixteen_bits_are_refused(self):
        context = av.CodecContext.create("png", "w")
        context.height, context.width = SIZE
        context.pix_fmt, context.time_base = "gray16be", Fraction(1)
        frame = av.VideoFrame.from_ndarray(np.full(SIZE, 700, np.uint16), format="gray16le")
        packets = context.encode(frame.reformat(format="gray16be"))
        data = b"".join(bytes(packet) for packet in [*packets, *context.encode(None)])
        with pytest.raises(DatasetError, match="x has 16 bits per channel"):
            decode_image(data, 1, "x")

    @pytest.mark.parametrize("data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n"])
    def test_what_is_no_image_is_refused(self, data):
        with pytest.raises(DatasetError, match=r"^x "):
            decode_image(data, 3, "x")

    def test_every_damage_to_a_png_shows(self):
        image = pictures(1, (8, 8))[0]
        good = encode_png(image)
        for position in range(len(good)):
            data = bytearray(good)
            data[position] ^= 4
            try:
                found = decode_image(bytes(data), 3, "x")
            except DatasetError:
                continue
            np.testing.assert_array_equal(found, image)  # it was in a part that holds no pixels
