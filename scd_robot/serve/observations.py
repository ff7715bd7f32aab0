"""From a client's keys, flat or nested, to the observation keys of a checkpoint.

Without a mapping a key of the checkpoint is looked for under its own name, and under names that mean the same:
`observation.state`, `observation/state`, `state`, and "state" inside of "observation".
"""

import logging
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError, ShapeError, UnknownNameError
from scd_robot.types import ArraySpec
from scd_robot.usable import is_picture, is_there, problem_with

__all__ = ["ObservationReader", "flatten"]

logger = logging.getLogger(__name__)


def flatten(message: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Inner maps as keys with slashes: {"observation": {"state": x}} becomes {"observation/state": x}."""
    flat: dict[str, Any] = {}
    for key, value in message.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[prefix + key] = value
    return flat


class ObservationReader:
    """Finds, checks and names what one control step saw.

    Args:
        spec: by key, without a batch axis.
        mapping: the client's (flat) key of some keys of `spec`.
        optional: keys that a policy does without in some control steps, where a client sends nil for them.

    Attributes:
        client_keys: what a client should call each key of `spec`.

    Raises:
        UnknownNameError: `mapping` names a key that the checkpoint does not have.
        ConfigError: two keys are to be read from one.
    """

    def __init__(
        self,
        spec: Mapping[str, ArraySpec],
        mapping: Mapping[str, str] | None = None,
        optional: Collection[str] = (),
    ) -> None:
        mapping = mapping or {}
        for key in mapping:
            if key not in spec:
                raise UnknownNameError("observation key of the checkpoint", key, spec)
        self.client_keys = {key: mapping.get(key, key) for key in spec}
        if len(set(self.client_keys.values())) < len(spec):
            raise ConfigError(f"two observation keys are read from one key of the client: {self.client_keys}")
        self._spec = dict(spec)
        self._mapped = frozenset(mapping)
        self._optional = frozenset(optional)
        self._turned = False  # pictures of a client were, and that was told

    def read(self, given: Mapping[str, Any]) -> dict[str, NDArray[Any] | None]:
        """The observation, by the checkpoint's keys and without a batch axis; other entries are ignored.

        Args:
            given: a message, flattened.

        Raises:
            ShapeError: a key is missing or there twice, or cannot be used, see `scd_robot.usable`.
        """
        alike: dict[str, list[str]] = {}
        for name in given:
            alike.setdefault(_plain(name), []).append(name)
        seen: dict[str, NDArray[Any] | None] = {}
        taken: dict[str, str] = {}
        for key, wanted in self._spec.items():
            name = self.client_keys[key]
            names = [name] if name in given or key in self._mapped else alike.get(_plain(name), [])
            came = [name for name in names if given.get(name) is not None]
            if len(came) > 1:
                raise ShapeError(f"observation {key!r} could be any of {', '.join(map(repr, sorted(came)))}; send one")
            if came:
                if (other := taken.setdefault(came[0], key)) != key:
                    raise ShapeError(
                        f"observations {other!r} and {key!r} would both be {came[0]!r}; {self.difference(given)}"
                    )
                seen[key] = self._checked(came[0], given[came[0]], wanted)
            elif key in self._optional and any(name in given for name in names):
                seen[key] = None
            else:
                nil = "; or send nil for it where nothing came" if key in self._optional else ""
                raise ShapeError(f"observation {name!r} is missing; {self.difference(given)}{nil}")
        if not is_there(seen):
            raise ShapeError(f"no observation is there; {self.difference(given)}")
        return seen

    def difference(self, given: Mapping[str, Any]) -> str:
        """What is expected and what was given, for messages."""
        expected = ", ".join(f"{self.client_keys[key]} {_words(array)}" for key, array in sorted(self._spec.items()))
        came = [f"{key} {_words(value)}" for key, value in sorted(given.items()) if not key.startswith("scd/")]
        more = f" and {len(came) - 20} more" if len(came) > 20 else ""
        return (
            f"expected {expected}; got {', '.join(came[:20]) or 'nothing'}{more}; rename them in the client or start "
            "the server with --keys"
        )

    def _checked(self, name: str, value: Any, wanted: ArraySpec) -> NDArray[Any]:
        if isinstance(value, np.ndarray) and _is_turned(value.shape, wanted):
            if not self._turned:
                logger.warning("a client sends pictures as channels, height, width (%r): they are turned", name)
            self._turned, value = True, np.ascontiguousarray(np.moveaxis(value, 0, -1))
        problem = problem_with(value, wanted)
        if problem is not None:
            raise ShapeError(f"observation {name!r} {problem}")
        return np.asarray(value).astype(wanted.dtype)


def _is_turned(shape: tuple[int, ...], wanted: ArraySpec) -> bool:
    """Whether this surely is a picture with channels first (C, H, W), as openpi's clients of ALOHA send them."""
    if not is_picture(wanted):
        return False
    height, width, channels = wanted.shape
    return shape == (channels, height, width) and width != channels


def _plain(name: str) -> str:
    return name.replace(".", "/").removeprefix("observation/")


def _words(value: Any) -> str:
    if isinstance(value, ArraySpec | np.ndarray | np.generic):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__
