"""Messages are openpi's, byte for byte, and nothing but numbers and texts comes out of bytes from anyone."""

import pickle

import msgpack
import numpy as np
import pytest

from scd_robot.serve.wire import MessageError, pack, unpack


def openpi_encode(value):
    """openpi's encoding as its protocol has it, independent of ours."""
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def array(data=b"\0" * 8, dtype="<f4", shape=(2,)):
    return msgpack.packb({"x": {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}})


@pytest.mark.parametrize("dtype", ["?", "i1", "<i2", ">i4", "<i8", "u1", "<u8", "<f2", "<f4", ">f8"])
def test_arrays_and_numbers_travel_as_openpi_writes_them(dtype):
    values = (np.arange(12).reshape(3, 4)[:, ::2] % 2).astype(dtype)
    message = {
        "x": values,
        "inner": {"y": values[0, 0], "z": np.zeros((0, 3), dtype)},
        "prompt": "go",
        "n": 3,
        "f": 0.5,
    }
    data = msgpack.packb(message, default=openpi_encode)
    assert pack(message) == data
    back = unpack(data)
    np.testing.assert_array_equal(back["x"], values)
    assert back["x"].dtype == values.dtype
    assert back["inner"]["y"] == values[0, 0]
    assert back["inner"]["z"].shape == (0, 3)
    assert (back["prompt"], back["n"], back["f"]) == ("go", 3, 0.5)


def test_keys_may_be_bytes_or_texts():
    data = {b"x": {"__ndarray__": True, "data": b"\1\2", "dtype": b"|u1", "shape": [2]}}
    np.testing.assert_array_equal(unpack(msgpack.packb(data))["x"], [1, 2])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x93\x01",
        msgpack.packb([1, 2]),
        msgpack.packb("text"),
        msgpack.packb({}) + b"\x00",
        msgpack.packb({1: 2}),
        msgpack.packb({"x": msgpack.ExtType(5, b"")}),
        msgpack.packb({"x": msgpack.Timestamp(1)}),
        msgpack.packb({"x": 1, b"x": 2}),
        b"\x81\xa1\xff\x00",
        b"\x81\xa1x" * 600 + b"\x00",
        b"\x81\xa1x" * 40 + b"\x00",
        b"\x81\xa1x" + b"\x91" * 2000 + b"\xc0",
        msgpack.packb({"x": [{}] * 5000}),
        msgpack.packb({"x": [[[]] * 100] * 100}),
        pickle.dumps({"x": 1}),
        array(dtype="|O"),
        array(dtype="<c8"),
        array(dtype="|V4"),
        array(dtype="<U1"),
        array(dtype="<M8"),
        array(dtype="<f16"),
        array(dtype="f4,f4"),
        array(dtype=[["a", "<f4"]]),
        array(dtype=None),
        array(dtype=7),
        array(shape=(3,)),
        array(shape=(-2, -1)),
        array(shape=(2.0,)),
        array(shape=(True, 2)),
        array(shape=2),
        array(shape=None),
        array(shape=(1,) * 9 + (2,)),
        array(data=b"", shape=(0, 2**62, 2**62)),
        array(data="text", shape=(1,)),
        msgpack.packb({"x": {b"__ndarray__": True}}),
        msgpack.packb({"x": {b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"}}),
        msgpack.packb({"x": {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}}),
        msgpack.packb({"x": {b"__npgeneric__": True, b"data": 1, b"dtype": "|O"}}),
    ],
)
def test_bytes_that_are_no_message_are_refused(data):
    with pytest.raises(MessageError):
        unpack(data)


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.array([1j]),
        np.array(["a"]),
        np.zeros(1, "f4,f4"),
        np.datetime64("2020"),
        object(),
        {1, 2},
    ],
)
def test_what_is_no_number_is_not_sent(value):
    with pytest.raises(MessageError, match="cannot be sent"):
        pack({"x": value})
