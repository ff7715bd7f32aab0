"""Messages as bytes: msgpack with numpy arrays, as openpi-client writes and reads them, with nothing else let in.

An array is the map {"__ndarray__": True, "data": bytes in C order, "dtype": "<f4", "shape": [...]}, a numpy scalar
{"__npgeneric__": True, "data": number, "dtype": "<f4"}; these keys travel as bytes. Only real numbers and booleans
pass, in either direction: no objects, records, texts or complex numbers, no extension types, nothing that is unpickled.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from scd_robot.errors import MissingDependencyError, ScdRobotError

try:
    import msgpack
except ModuleNotFoundError as error:
    raise MissingDependencyError("serving needs msgpack: pip install msgpack, or 'scd_robot[serve]'") from error

__all__ = ["DEEPEST", "MessageError", "pack", "unpack"]

_NUMBERS = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})
_MOST_CONTAINERS = 4096  # maps and lists in one message: empty ones are tiny on the wire and large in memory
_LONGEST_LIST = 4096
DEEPEST = 16  # maps within maps
_MOST_AXES = 8


class MessageError(ScdRobotError, ValueError):
    """Bytes that are no message of this protocol, or something that cannot be put into one."""


def pack(message: Mapping[str, Any]) -> bytes:
    """A message as bytes.

    Raises:
        MessageError: it holds something other than numbers, arrays of numbers, texts, bytes, lists and maps.
    """
    try:
        packed: bytes = msgpack.packb(message, default=_encode)
    except (TypeError, ValueError, OverflowError) as error:
        raise MessageError(f"this cannot be sent: {error}") from error
    return packed


def unpack(data: bytes) -> dict[str, Any]:
    """The message that these bytes are.

    Args:
        data: as received, from anyone.

    Returns:
        By text keys, keys of inner maps included; arrays are not writable and lie in `data`.

    Raises:
        MessageError: they are none.
    """
    containers = 0

    def count(container: Any) -> Any:
        nonlocal containers
        containers += 1
        if containers > _MOST_CONTAINERS:
            raise MessageError(f"a message may hold {_MOST_CONTAINERS} maps and lists")
        return _decode(container) if isinstance(container, dict) else container

    try:
        message = msgpack.unpackb(
            data,
            object_hook=count,
            list_hook=count,
            ext_hook=_refuse_extension,
            max_array_len=_LONGEST_LIST,
            max_map_len=_MOST_CONTAINERS,
            max_ext_len=0,
        )
    except MessageError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise MessageError(f"these {len(data)} bytes are no msgpack message with numpy arrays: {error}") from error
    if not isinstance(message, dict):
        raise MessageError(f"a message must be a map, got {type(message).__name__}")
    named: dict[str, Any] = _with_text_keys(message, 0)
    return named


def _encode(value: Any) -> Any:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"expected numbers, arrays, texts, lists and maps, got {type(value).__name__}")
    if value.dtype.str[1:] not in _NUMBERS:
        raise TypeError(f"arrays must hold numbers, got one of {value.dtype}")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def _decode(entries: dict[Any, Any]) -> Any:
    """The array or number that a map stands for, else the map."""
    fields = {key.decode("utf-8", "replace") if isinstance(key, bytes) else key: x for key, x in entries.items()}
    if "__ndarray__" in fields:
        dtype, data, shape = _dtype(fields.get("dtype")), fields.get("data"), fields.get("shape")
        if not isinstance(shape, list) or not isinstance(data, bytes) or len(shape) > _MOST_AXES:
            raise MessageError(
                f"an array needs bytes and a shape of at most {_MOST_AXES} sizes, got shape {shape!r:.80}"
            )
        if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != len(data):
            raise MessageError(f"an array of shape {shape} and {dtype} cannot be made of {len(data)} bytes")
        return np.frombuffer(data, dtype).reshape(shape)
    if "__npgeneric__" in fields:
        number = fields.get("data")
        if not isinstance(number, bool | int | float):
            raise MessageError(f"a numpy scalar must be a number, got {type(number).__name__}")
        dtype = _dtype(fields.get("dtype"))
        if dtype.kind in "iu":  # numpy 1 would wrap around
            limits = np.iinfo(dtype)
            if isinstance(number, float) or not limits.min <= number <= limits.max:
                raise MessageError(f"a numpy scalar of {dtype} cannot be {number!r:.80}")
        with np.errstate(over="ignore"):
            return dtype.type(number)
    return entries


def _dtype(name: Any) -> np.dtype[Any]:
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
    if not isinstance(text, str) or text[:1] not in tuple("<>|=") or text[1:] not in _NUMBERS:
        raise MessageError(f"arrays must hold real numbers of at most 8 bytes or booleans, got dtype {name!r:.80}")
    return np.dtype(text)


def _refuse_extension(code: int, data: bytes) -> Any:
    raise MessageError(f"msgpack's extension types are not part of the protocol, got type {code}")


def _with_text_keys(value: Any, depth: int) -> Any:
    if depth > DEEPEST:
        raise MessageError(f"maps may be nested {DEEPEST} deep")
    if not isinstance(value, dict):
        if isinstance(value, np.ndarray | np.generic | str | bytes | bool | int | float | list | None):
            return value
        raise MessageError(f"a message may not hold a {type(value).__name__}")
    named = {}
    for key, inner in value.items():
        name = key.decode("utf-8", "replace") if isinstance(key, bytes) else key
        if name in named:
            raise MessageError(f"the key {name!r:.80} stands twice in one map")
        named[name] = _with_text_keys(inner, depth + 1)
    return named
