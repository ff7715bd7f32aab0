"""What ROS 2 messages say, as numbers and pictures; no part of ROS is imported.

Shapes: H W C picture.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ShapeError

__all__ = ["joint_values", "picture", "stamp_of"]

_CHANNELS = {"rgb8": 3, "bgr8": 3, "mono8": 1}
_KINDS = {"pos": "position", "vel": "velocity", "effort": "effort"}


def joint_values(message: Any) -> dict[str, float]:
    """Numbers of a `sensor_msgs/JointState` by name: <joint>.pos, <joint>.vel, <joint>.effort.

    Raises:
        ShapeError: an array is neither empty, which is how a message leaves it out, nor as long as that of the names.
    """
    names, values = list(message.name), {}
    for ending, field in _KINDS.items():
        numbers = getattr(message, field)
        if len(numbers) not in (0, len(names)):
            raise ShapeError(
                f"a message names {len(names)} joints and holds {len(numbers)} numbers as {field}; it must be one per "
                "joint, or none"
            )
        values.update({f"{name}.{ending}": float(number) for name, number in zip(names, numbers, strict=False)})
    return values


def picture(message: Any) -> NDArray[np.uint8]:
    """(H, W, C) of a `sensor_msgs/Image` of encoding rgb8, bgr8 (the colours are put in order) or mono8.

    Raises:
        ShapeError: another encoding, or fewer bytes than height and width ask for.
    """
    channels = _CHANNELS.get(message.encoding)
    if channels is None:
        raise ShapeError(f"pictures must be encoded as {', '.join(_CHANNELS)}, got {message.encoding!r}")
    height, width, step = int(message.height), int(message.width), int(message.step)
    data = np.frombuffer(message.data, np.uint8)
    if step < width * channels or len(data) < step * height:
        raise ShapeError(
            f"a picture of {height} x {width} pixels as {message.encoding} must have rows of at least "
            f"{width * channels} bytes, got {len(data)} bytes in rows of {step}"
        )
    rows = data[: step * height].reshape(height, step)[:, : width * channels]
    pixels = rows.reshape(height, width, channels)
    return np.array(pixels[..., ::-1] if message.encoding == "bgr8" else pixels, order="C")


def stamp_of(message: Any) -> tuple[int, int] | None:
    """Seconds and nanoseconds of a message's header; None where it was left at 0."""
    stamp = message.header.stamp
    return (int(stamp.sec), int(stamp.nanosec)) if stamp.sec or stamp.nanosec else None
