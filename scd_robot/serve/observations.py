"""From a client's keys, flat or nested, to the observation keys of a checkpoint.

Without a mapping a key of the checkpoint is looked for under its own name, and under names that mean the same:
`observation.state`, `observation/state`, `state`, and "state" inside of "observation".
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError, ShapeError, UnknownNameError
from scd_robot.types import ArraySpec

__all__ = ["ObservationReader", "flatten"]


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
        optional: keys that a model does without in some control steps.

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
        optional: frozenset[str] = frozenset(),
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
        self._optional = optional

    def read(self, given: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """The observation, by the checkpoint's keys and without a batch axis; other entries are ignored.

        Args:
            given: a message, flattened.

        Raises:
            ShapeError: a key is missing or there twice, or has another shape, another kind of numbers, NaN or infinite
                values.
        """
        alike: dict[str, list[str]] = {}
        for name in given:
            alike.setdefault(_plain(name), []).append(name)
        seen = {}
        for key, wanted in self._spec.items():
            name = self.client_keys[key]
            names = [name] if name in given or key in self._mapped else alike.get(_plain(name), [])
            names = [name for name in names if given.get(name) is not None]
            if len(names) > 1:
                raise ShapeError(f"observation {key!r} could be any of {', '.join(map(repr, sorted(names)))}; send one")
            if names:
                seen[key] = self._checked(names[0], given[names[0]], wanted)
            elif key not in self._optional:
                raise ShapeError(f"observation {name!r} is missing; {self.difference(given)}")
        if not seen:
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
        if not isinstance(value, np.ndarray | np.generic):
            raise ShapeError(f"observation {name!r} must be an array, got {_words(value)}")
        array = np.asarray(value)
        if array.shape != wanted.shape:
            hint = ""
            if array.shape == (1, *wanted.shape):
                hint = "; leave the batch axis out"
            elif array.ndim == 3 and (*array.shape[1:], array.shape[0]) == wanted.shape:
                hint = "; send height, width, channels"
            elif wanted.dtype == "uint8" and array.ndim == 3 and array.shape[2] == wanted.shape[-1]:
                hint = "; resize it in the client to the size of the recording"
            raise ShapeError(f"observation {name!r} must be {_words(wanted)}, got {_words(array)}{hint}")
        if wanted.dtype == "uint8" and array.dtype != np.uint8:
            raise ShapeError(f"observation {name!r} must hold uint8 from 0 to 255, got {array.dtype}")
        with np.errstate(over="ignore"):
            array = array.astype(wanted.dtype)
        if not np.isfinite(array).all():
            raise ShapeError(f"observation {name!r} holds a NaN or infinite value")
        return array


def _plain(name: str) -> str:
    return name.replace(".", "/").removeprefix("observation/")


def _words(value: Any) -> str:
    if isinstance(value, ArraySpec | np.ndarray | np.generic):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__
