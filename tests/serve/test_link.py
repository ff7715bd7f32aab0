"""A connection that is made anew whenever it breaks."""

import contextlib
import threading
import time
from types import SimpleNamespace

from scd_robot.serve.link import Broken, Connected, SocketLink
from scd_robot.serve.wire import pack


def test_a_server_that_is_of_no_use_is_asked_more_and_more_rarely(monkeypatch):
    class Waited(threading.Event):
        def wait(self, timeout=None):
            pauses.append(timeout)
            if len(pauses) == 8:
                self.set()

    class Useless(contextlib.AbstractContextManager):  # says what it serves, answers `left` messages, and is gone
        def __init__(self, left):
            self.coming = [pack({"protocol": "other"}), *[pack({})] * left]

        def recv(self, timeout=None):
            if not self.coming:
                raise ConnectionResetError
            return self.coming.pop(0)

        def __exit__(self, *error):
            pass

    class Way:
        address = "ws://useless"
        answers = iter([0, OSError(), 0, RuntimeError("a bug"), 1, 0, 0, 0])

        def open(self, timeout_s):
            if isinstance(left := next(self.answers), Exception):
                raise left
            return Useless(left)

    pauses = []
    monkeypatch.setattr("scd_robot.serve.link.threading", SimpleNamespace(Event=Waited, Thread=threading.Thread))
    link = SocketLink(Way())
    link._threads[0].join(timeout=30.0)
    link._frames.put(None)
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.05, 0.1, 0.2, 0.4]


def test_a_frame_that_cannot_be_sent_costs_its_connection_and_no_thread():
    sent, gone = [], threading.Event()

    class Odd(contextlib.AbstractContextManager):  # says what it serves, fails with the first frame, and is then gone
        socket = SimpleNamespace(shutdown=lambda how: gone.set())

        def __init__(self):
            self.coming = [pack({"protocol": "other"})]

        def recv(self, timeout=None):
            if self.coming:
                return self.coming.pop()
            assert gone.wait(30)
            raise ConnectionResetError("gone")

        def send(self, frame):
            sent.append(frame)
            if frame == b"one":
                raise RuntimeError("a bug")

        def __exit__(self, *error):
            pass

    def next_event():
        deadline = time.monotonic() + 60
        while (event := link.receive()) is None:
            assert time.monotonic() < deadline, "a thread of the link has ended"
            time.sleep(0.001)
        return event

    link = SocketLink(SimpleNamespace(address="ws://odd", open=lambda timeout_s: Odd()))
    assert isinstance(next_event(), Connected)
    link.send(b"one")
    assert next_event() == Broken("gone")
    assert isinstance(next_event(), Connected)
    link.send(b"two")
    link.close()
    assert sent == [b"one", b"two"]
