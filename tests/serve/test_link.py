"""A connection that is made anew whenever it breaks."""

import contextlib
import threading
from types import SimpleNamespace

from scd_robot.serve.link import SocketLink
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
        answers = iter([0, 0, 0, 0, 1, 0, 0, 0])

        def open(self, timeout_s):
            return Useless(next(self.answers))

    pauses = []
    monkeypatch.setattr("scd_robot.serve.link.threading", SimpleNamespace(Event=Waited, Thread=threading.Thread))
    link = SocketLink(Way())
    link._threads[0].join(timeout=30.0)
    link._frames.put(None)
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.05, 0.1, 0.2, 0.4]
