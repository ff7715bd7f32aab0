"""What a verb was writing when its process was told to end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["unfinished_removed"]


@contextmanager
def unfinished_removed() -> Iterator[None]:
    """Makes SIGTERM an exit (code 143) on whose way out unfinished files are removed, as they are after Ctrl-C.

    By itself it ends a process where it stands. Training and the server have handlers of their own.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
