"""Frozen dataclasses to JSON and back, strictly: nothing unknown is ignored, nothing missing is guessed."""

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from scd_robot.errors import ConfigError, nearest_names

__all__ = ["check_finite", "from_json", "to_json"]

T = TypeVar("T")


def to_json(config: Any) -> Any:
    """Plain JSON types from a tree of dataclasses, mappings, tuples and scalars."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_json(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_json(value) for value in config]
    if config is None or isinstance(config, bool | int | float | str):
        return config
    if isinstance(config, numbers.Integral):  # NumPy's
        return int(config)
    raise ConfigError(f"cannot write a {type(config).__name__} into a configuration")


def from_json(cls: type[T], data: Any, where: str = "", partial: bool = False) -> T:
    """Builds dataclass `cls` from what `to_json` gave, or, `partial`, from what somebody wrote who left defaults out.

    Raises:
        ConfigError: an unknown or missing field, or a value of another type; the message names the place.
    """
    value: T = _read(cls, data, where or cls.__name__, partial)
    return value


def check_finite(config: Any) -> None:
    """Raises ConfigError where a number of a dataclass is NaN or infinite; `from_json` lets none in either."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{field.name} must be finite, got {value}")


def _read(kind: Any, data: Any, where: str, partial: bool) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, data, where, partial)
    if origin is typing.Literal:
        if data not in arguments:
            raise ConfigError(f"{where} must be one of {', '.join(map(repr, arguments))}, got {data!r}")
        return data
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        return _read(next(a for a in arguments if a is not type(None)), data, where, partial)
    if origin is dict:
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where} must be an object, got {type(data).__name__}")
        return {key: _read(arguments[1], value, f"{where}.{key}", partial) for key, value in data.items()}
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise ConfigError(f"{where} must be a list, got {type(data).__name__}")
        return tuple(_read(arguments[0], value, f"{where}[{i}]", partial) for i, value in enumerate(data))
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        raise ConfigError(f"{where} must be {kind.__name__}, got {data!r}")
    if kind is float and not math.isfinite(data):
        raise ConfigError(f"{where} must be finite, got {data}")
    return data


def _read_dataclass(kind: Any, data: Any, where: str, partial: bool) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be an object with the fields of {kind.__name__}, got {type(data).__name__}")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for name in data:
        if name not in names:
            near = nearest_names(name, names)
            raise ConfigError(f"{where} has no field {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    required = [field.name for field in dataclasses.fields(kind) if _is_required(field)] if partial else names
    missing = [name for name in required if name not in data]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")
    return kind(**{name: _read(hints[name], value, f"{where}.{name}", partial) for name, value in data.items()})


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
