"""A policy behind a socket, and the client for it; the client's side needs numpy, msgpack and websockets only.

The server's side is `scd_robot.serve.server`, or `scd serve`.
"""

from scd_robot.serve.client import HistoryLostError, PolicyClient, RequestRefusedError, ServerUnreachableError
from scd_robot.serve.remote_policy import RemotePolicy
from scd_robot.serve.remote_stream import RemoteStream

__all__ = [
    "HistoryLostError",
    "PolicyClient",
    "RemotePolicy",
    "RemoteStream",
    "RequestRefusedError",
    "ServerUnreachableError",
]
