"""What users write themselves, by its dotted name: `package.module:callable`.

The standard library and `errors` only: other interpreters run this too (see `sim_eval/policy_server.py`).
"""

import hashlib
import importlib
import importlib.metadata
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scd_robot.errors import ConfigError, UnknownNameError

__all__ = [
    "begins_rows",
    "call_with_options",
    "describe_module",
    "import_dotted",
    "is_dotted",
    "parse_options",
    "takes",
]

_DOTTED_NAME = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


def is_dotted(name: str) -> bool:
    """Whether a name has the form `package.module:callable`."""
    return _DOTTED_NAME.fullmatch(name) is not None


def import_dotted(name: str, kind: str) -> Any:
    """What a dotted name names; its module is installed, or lies in the current folder.

    Args:
        name: `package.module:callable`.
        kind: what it should be, for messages: "environment".

    Raises:
        ConfigError: another form, or there is no such module.
        UnknownNameError: the module has nothing of this name.
    """
    match = _DOTTED_NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"the {kind} must be named package.module:callable, got {name!r}")
    module_name, attribute = match.groups()
    folder = os.getcwd()  # the program `scd`, unlike `python`, does not look there
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that a file of the user's hides no installed package
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks something itself
        raise ConfigError(
            f"cannot import {module_name} for the {kind} {name} ({error}): looked among the installed packages and in "
            f"{folder}; start this where {module_name.partition('.')[0]} lies, or name its folder with PYTHONPATH=..."
        ) from error
    if not hasattr(module, attribute):
        raise UnknownNameError(f"callable in module {module_name}", attribute, vars(module))
    return getattr(module, attribute)


def parse_options(items: Sequence[str]) -> dict[str, Any]:
    """Options as they are typed: `seed=1 scale=0.5 layers=[4,2] run=runs/a` gives a number, a list and a text.

    Raises:
        ConfigError: an item is no KEY=VALUE, or a key is given twice.
    """
    options: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not (equals and key.isidentifier()):
            raise ConfigError(f"options are written KEY=VALUE, for example seed=1; got {item!r}")
        if key in options:
            raise ConfigError(f"option {key!r} is given twice; keep one")
        try:
            options[key] = json.loads(text)
        except ValueError:  # a text without quotation marks
            options[key] = text
    return options


def call_with_options(function: Callable[..., Any], name: str, options: Mapping[str, Any], **offered: Any) -> Any:
    """Calls something of the user's with keyword options.

    Args:
        function: a callable or class.
        name: of it, for messages.
        options: given by the user; each must be a parameter.
        **offered: are passed too where the function has a parameter of this very name and no option replaces it.

    Raises:
        UnknownNameError: it has no parameter of an option's name.
        ConfigError: it cannot be called so.
    """
    if not callable(function):
        raise ConfigError(f"{name} must be a callable or a class, got {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, without a signature
        return function(**options)
    arguments = {key: value for key, value in offered.items() if key in signature.parameters} | dict(options)
    if unknown := [key for key in arguments if not takes(function, key)]:
        raise UnknownNameError(f"option of {name}", unknown[0], signature.parameters)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        how = f"with the options {sorted(options)}" if options else "without options"
        raise ConfigError(f"{name} cannot be called {how}: {error}") from error
    return function(**arguments)


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name, or takes any."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # written in C, without a signature
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def begins_rows(policy: Any) -> bool:
    """Whether `policy.reset` can begin episodes in some rows alone; `takes_rows` of False says it cannot."""
    return takes(policy.reset, "rows") and bool(getattr(policy, "takes_rows", True))


def describe_module(name: str) -> dict[str, Any]:
    """Which code a dotted name stands for, once it was imported.

    Returns:
        `file` (its name), `sha256` of that file alone, and `version` of the distribution it belongs to; None where
        there is none.
    """
    module = sys.modules[name.partition(":")[0]]
    file = getattr(module, "__file__", None)
    package = module.__name__.partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", None)
    for distribution in importlib.metadata.packages_distributions().get(package, ())[:1]:
        version = importlib.metadata.version(distribution)
    return {
        "file": None if file is None else Path(file).name,
        "sha256": None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest(),
        "version": None if version is None else str(version),
    }
