"""Frames of video files, read by their time, and single images in files of others; all through PyAV.

Shapes: N rows, T rows of one episode, H W C an image.
"""

import contextlib
import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from scd_robot.datasets.lazy import LazyArray
from scd_robot.errors import DatasetError, MissingDependencyError, OutputError, ShapeError

__all__ = ["PIXEL_FORMATS", "VideoRows", "VideoSegment", "decode_image", "encode_png", "encode_video", "exact_rate"]

_WHOLE = 5e-5  # relative; 30.0003 frames per second are 30, told by steps of whole microseconds

PIXEL_FORMATS = {1: "gray", 3: "rgb24", 4: "rgba"}  # FFmpeg's names of uint8 images with C channels

_SAME_RATE = 0.05  # share by which a file's frames per second may miss those of the rows before that is told
_SLACK_S = 1e-3  # by which a frame may miss its row, beyond half a control step
_KEY_SPACING_S = 1.0  # between key frames, until two of them were seen
_MAX_BACK_S = 10.0  # gone back for another start where decoding fails
_MAX_IDLE = 8  # files kept open between reads
_IMAGE_CODECS = {b"\x89PNG": "png", b"\xff\xd8\xff": "mjpeg"}  # by the first bytes

# What PyAV raises on damaged files.
_DECODE_ERRORS = (av.FFmpegError, OSError, ValueError, RuntimeError, MemoryError)


@dataclass(frozen=True, eq=False)
class VideoSegment:
    """Rows of one episode, and where their frames are.

    Attributes:
        path: of the video file.
        times: (T,) float64 [s] of the rows, counted from the first frame of the file.
        begin: [s] counted likewise; frames before it are another episode's.
        end: [s]; frames from there on are another episode's; may be infinite.
        name: of the episode, for messages.
    """

    path: str
    times: NDArray[np.float64]
    begin: float
    end: float
    name: str


class VideoRows(LazyArray):
    """Frames (N, H, W, C) of one or many video files: for each row the frame nearest to its time.

    Reading seeks to the key frame before the first frame that is wanted and decodes from there, each frame once; the
    next read goes on from where this one ended. Frames are found by their time stamps, so neither missing frames nor
    frames in another order than they are shown shift the others.
    """

    def __init__(
        self, segments: Sequence[VideoSegment], shape: tuple[int, int, int], fps: float, tolerance: float = 0.5
    ) -> None:
        """Opens nothing yet.

        Args:
            segments: in the order of the rows, none empty.
            shape: (H, W, C) that the frames must have, C a key of `PIXEL_FORMATS`.
            fps: control steps per second.
            tolerance: how far the time of a frame may be from its row's [control steps].
        """
        self._segments = list(segments)
        self._ends = np.cumsum([len(segment.times) for segment in segments])
        self._half_step, self._tolerance_s = 0.5 / fps, tolerance / fps
        super().__init__((int(self._ends[-1]), *shape), np.uint8)

    def check(self) -> None:
        """Compares the headers of the files with the rows; decodes nothing.

        Raises:
            DatasetError: a file is missing or damaged, has frames of another size, or fewer of them than rows.
        """
        rows: dict[str, int] = {}
        for segment in self._segments:
            rows[segment.path] = rows.get(segment.path, 0) + len(segment.times)
        names = {segment.path: segment.name for segment in self._segments}  # the last in a file lacks frames first
        for path, expected in rows.items():
            with _errors(path), contextlib.closing(_Decoder(path)) as decoder:
                self._check_size(path, decoder.stream.height, decoder.stream.width)
                found = decoder.count(0.5 / self._half_step)
                if found is not None and found < expected:
                    raise DatasetError(
                        f"{path} is shorter than its rows: expected {expected} frames up to the end of {names[path]}, "
                        f"found {found}; the video is truncated, copy or record it again"
                    )

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """See `LazyArray.read`; raises DatasetError where a file is damaged or has no frame near a row's time."""
        out, done = self._empty(stop - start), 0
        number = int(np.searchsorted(self._ends, start, side="right"))
        while done < len(out):
            segment = self._segments[number]
            first = start + done - (int(self._ends[number]) - len(segment.times))
            last = min(len(segment.times), first + len(out) - done)
            self._read_segment(segment, first, last, out[done : done + last - first])
            done, number = done + last - first, number + 1
        return out

    def _read_segment(self, segment: VideoSegment, first: int, last: int, out: NDArray[np.uint8]) -> None:
        """Rows `first` up to `last` of an episode."""
        converter = VideoReformatter()  # not kept: it may hold threads, which would not survive a fork
        low, high = segment.begin - self._half_step, segment.end - self._half_step
        with _errors(segment.path), _decoder(segment.path) as decoder:
            for row in np.argsort(segment.times[first:last], kind="stable"):
                time = float(segment.times[first + row])
                found = decoder.nearest(time, low, high)
                if found is None or abs(found.time - time) > self._tolerance_s + _SLACK_S:
                    raise DatasetError(self._no_frame(segment, int(first + row), found, decoder))
                self._check_size(segment.path, found.frame.height, found.frame.width)
                image = converter.reformat(found.frame, format=PIXEL_FORMATS[self.shape[3]]).to_ndarray()
                out[row] = image.reshape(self.shape[1:])

    def _no_frame(self, segment: VideoSegment, row: int, found: "_Timed | None", decoder: "_Decoder") -> str:
        time = segment.times[row]
        where = f"{segment.name}, step {row}, needs a frame at {time:.4f} s of {segment.path}"
        fps, rate = 0.5 / self._half_step, float(decoder.stream.average_rate or 0)
        differs = rate > 0 and not math.isclose(rate, fps, rel_tol=_SAME_RATE)
        rates = f", which has {rate:.4g} frames per second where the rows have {fps:.4g}" if differs else ""
        where += rates
        if decoder.last is not None and decoder.last < time:
            there = round((decoder.last - segment.begin) * fps) + 1
            if there >= len(segment.times) or rates:
                each = "" if rates else ", although it has one for each row"
                return (
                    f"{where}, but its last frame is at {decoder.last:.4f} s{each} (allowed are "
                    f"{self._tolerance_s:.4f} s): mend the time stamps or the frames per second, raise "
                    "--frame-tolerance, leave the episode out with --drop, or this camera with --keys"
                )
            return (
                f"{where}, but its last frame is at {decoder.last:.4f} s: the video is shorter than its rows (expected "
                f"{len(segment.times)} frames, found {max(0, there)}); copy or record it again"
            )
        nearest = "no frame of this episode is near" if found is None else f"the nearest frame is at {found.time:.4f} s"
        return (
            f"{where}, but {nearest} (allowed are {self._tolerance_s:.4f} s); mend the time stamps, raise "
            "--frame-tolerance, leave the episode out with --drop, or this camera with --keys"
        )

    def _check_size(self, path: str, height: int, width: int) -> None:
        if (height, width) != self.shape[1:3]:
            raise DatasetError(
                f"{path} has frames of {height} x {width} pixels, expected {self.shape[1]} x {self.shape[2]} "
                "(height x width) by the dataset's description; the wrong file, or a damaged one"
            )


class _Timed(NamedTuple):
    time: float  # [s] from the first frame of the file
    frame: av.VideoFrame


class _Decoder:
    """A file that is decoded forwards; a single thread, so that a fork loses nothing of it.

    Attributes:
        stream: PyAV's.
        last: [s] time of the last frame of the file, known once it was come to.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        # Only this container: playlists would open other files, and addresses.
        self._container = av.open(f"file:{path}", format="mp4", metadata_errors="replace")
        try:
            if not self._container.streams.video:
                raise DatasetError(f"{path} holds no video; expected one video stream")
            self.stream = self._container.streams.video[0]
            if not self.stream.time_base or self.stream.codec_context is None:
                raise DatasetError(f"{path} does not tell the unit of its times, or a codec that is known; damaged")
        except BaseException:
            self._container.close()
            raise
        self.stream.codec_context.thread_count = 1
        self.stream.codec_context.options = {"err_detect": "crccheck+explode"}  # damage is told, not painted over
        self.last: float | None = None
        self._time_base = Fraction(self.stream.time_base)
        self._origin = self.stream.start_time or 0
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._before: _Timed | None = None  # two neighbouring frames: the one at or before the last wanted time,
        self._after: _Timed | None = None  # and the next; None at the ends
        self._last_key: float | None = None
        self._key_spacing = _KEY_SPACING_S

    def close(self) -> None:
        """Closes the file."""
        self._container.close()

    def count(self, fps: float) -> int | None:
        """Number of frames by the header; None where it does not tell."""
        if self.stream.frames:
            return int(self.stream.frames)
        return round(self.stream.duration * self._time_base * fps) if self.stream.duration else None

    def nearest(self, time: float, low: float, high: float) -> _Timed | None:
        """Of the frames from `low` up to `high` [s] the one nearest to `time`, None where none is near."""
        if not self._reaches(time):
            self._seek(time)
        self._advance(time)
        near = [timed for timed in (self._before, self._after) if timed is not None and low <= timed.time < high]
        return min(near, key=lambda timed: abs(timed.time - time), default=None)

    def _reaches(self, time: float) -> bool:
        """Whether `time` is ahead, and so near that decoding up to it costs less than a seek."""
        if self._before is None:
            return False
        ahead = self._after or self._before
        return self._before.time - _SLACK_S <= time <= ahead.time + self._key_spacing

    def _advance(self, time: float) -> None:
        while self._after is not None and self._after.time <= time + _SLACK_S:
            self._before, self._after = self._after, self._next()

    def _seek(self, time: float) -> None:
        """Goes to a key frame from which the frame at `time` can be decoded.

        That is not always the nearest one: containers know the order of decoding only, and a group of pictures may
        need the one before it.
        """
        back = 0.0
        while True:
            target = max(0.0, time + _SLACK_S - back)
            try:
                self._container.seek(self._origin + int(target / self._time_base), stream=self.stream)
                self._frames, self._last_key = self._container.decode(self.stream), None
                self._before = self._after = None
                self._after = self._next()
                self._advance(time)
            except av.FFmpegError:
                if target == 0 or back > _MAX_BACK_S:
                    raise
            else:
                if target == 0 or self._before is not None:
                    return
            back = 2 * back + 1

    def _next(self) -> _Timed | None:
        frame = next(self._frames, None)
        if frame is None:
            self.last = self._after.time if self._after is not None else self.last
            return None
        if frame.pts is None or frame.is_corrupt:
            at = "without a time" if frame.pts is None else f"at {self._time(frame.pts):.4f} s"
            raise DatasetError(f"{self._path} has a damaged frame {at}; copy or record it again")
        time = self._time(frame.pts)
        if frame.key_frame:
            self._key_spacing = time - self._last_key if self._last_key is not None else self._key_spacing
            self._last_key = time
        return _Timed(time, frame)

    def _time(self, pts: int) -> float:
        return float((pts - self._origin) * self._time_base)


# Decoders not in use, the last used one at the end. A process uses none that it inherited: their files share the
# parent's position.
_idle: OrderedDict[tuple[int, str, int, int, int], _Decoder] = OrderedDict()


@contextlib.contextmanager
def _decoder(path: str) -> Iterator[_Decoder]:
    """The decoder of a file, this thread's alone while it is used; thrown away after an error."""
    status = os.stat(path)
    key = (os.getpid(), path, status.st_ino, status.st_size, status.st_mtime_ns)
    decoder = _idle.pop(key, None) or _Decoder(path)
    try:
        yield decoder
    except BaseException:
        decoder.close()
        raise
    _idle[key] = decoder
    while len(_idle) > _MAX_IDLE:
        _idle.popitem(last=False)[1].close()


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except _DECODE_ERRORS as error:
        raise DatasetError(
            f"{path} cannot be read ({type(error).__name__}: {error}); it is damaged, or of a kind that is not read: "
            "copy or record it again, leave its episodes out with --drop, or this camera with --keys"
        ) from error


def exact_rate(fps: float) -> Fraction:
    """The rate that a video file can say: whole where `fps` is but for rounding, else within 1e-5 frames per second."""
    whole = Fraction(round(fps))
    return whole if whole and abs(fps / whole - 1) < _WHOLE else Fraction(fps).limit_denominator(100_000)


def encode_video(
    path: Path, frames: Iterable[NDArray[np.uint8]], fps: float, codec: str = "libx264", crf: int = 18, gop: int = 2
) -> int:
    """Writes an mp4 file, yuv420p, the frames at exact multiples of 1 / `exact_rate(fps)`.

    Args:
        path: of the new file; what an interruption leaves of it is the caller's to remove.
        frames: (H, W, 3) each, H and W even.
        fps: frames per second.
        codec: FFmpeg's name of an encoder.
        crf: its constant quality; smaller is better.
        gop: frames from one key frame to the next; random access decodes as many.

    Returns:
        How many frames there were.

    Raises:
        ShapeError: frames of another shape or dtype.
        OutputError: the file cannot be written.
        MissingDependencyError: this build of FFmpeg lacks the encoder.
    """
    if codec not in av.codecs_available:
        raise MissingDependencyError(f"this PyAV cannot encode {codec}: pip install --force-reinstall av")
    rate = exact_rate(fps)
    count = 0
    try:
        with av.open(str(path), "w", format="mp4") as container:
            stream: Any = container.add_stream(codec, rate=rate)
            stream.pix_fmt = "yuv420p"
            stream.codec_context.options = {"crf": str(crf), "g": str(gop), "bf": "0"}
            converter = VideoReformatter()
            for image in frames:
                if count == 0:
                    stream.height, stream.width = image.shape[:2]
                if (
                    image.shape != (stream.height, stream.width, 3)
                    or image.dtype != np.uint8
                    or any(size % 2 for size in image.shape[:2])
                ):
                    raise ShapeError(
                        f"frames of a video must be uint8 (H, W, 3) of one even size, got {image.dtype} {image.shape}"
                    )
                picture = converter.reformat(av.VideoFrame.from_ndarray(image), format="yuv420p")
                picture.pts, picture.time_base = count, 1 / rate
                container.mux(stream.encode(picture))
                count += 1
            container.mux(stream.encode(None))
    except av.FFmpegError as error:
        raise OutputError(
            f"cannot write the video {path}: {error.strerror}; free some space or try another path"
        ) from error
    return count


def decode_image(data: bytes, channels: int, name: str) -> NDArray[np.uint8]:
    """A PNG or JPEG file as (H, W, C).

    Args:
        data: the file's bytes.
        channels: C, a key of `PIXEL_FORMATS`.
        name: for messages.

    Raises:
        DatasetError: damaged, of another kind, or with more than 8 bits per channel.
    """
    codec = next((known for magic, known in _IMAGE_CODECS.items() if data.startswith(magic)), None)
    if codec is None:
        raise DatasetError(f"{name} is neither a PNG nor a JPEG file: it begins with {data[:8]!r}")
    with _errors(name):
        context: Any = av.CodecContext.create(codec, "r")
        context.thread_count, context.options = 1, {"err_detect": "crccheck+explode"}
        frames = [*context.decode(av.Packet(data)), *context.decode(None)]
        if len(frames) != 1 or frames[0].is_corrupt:
            raise DatasetError(f"{name} is damaged: it holds {len(frames)} whole images, expected one")
        bits = max(component.bits for component in frames[0].format.components)
        if bits > 8:
            raise DatasetError(f"{name} has {bits} bits per channel; only images of 8 bits are read")
        image: NDArray[Any] = VideoReformatter().reformat(frames[0], format=PIXEL_FORMATS[channels]).to_ndarray()
    return image.reshape(*image.shape[:2], channels)


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """(H, W, C) uint8, C a key of `PIXEL_FORMATS`, as the bytes of a PNG file."""
    pixels = PIXEL_FORMATS[image.shape[2]]
    context: Any = av.CodecContext.create("png", "w")
    context.height, context.width = image.shape[:2]
    context.pix_fmt, context.time_base, context.thread_count = pixels, Fraction(1), 1
    plain = image[:, :, 0] if image.shape[2] == 1 else image
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(plain), format=pixels)
    frame.pts = 0
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])
