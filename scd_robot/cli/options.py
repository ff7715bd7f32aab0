"""How the function of a verb becomes options: what tyro shows of it by itself, made easier to read."""

import inspect
import re
import typing
from collections.abc import Callable
from typing import Annotated, Any

import tyro

__all__ = ["CONFIG", "readable"]

CONFIG = (tyro.conf.DisallowNone,)  # options are left out rather than given as None

_CONTINUED = re.compile(r"\n {12,}(?=\S)")  # lines of a docstring that go on with what an argument is


def readable(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, for tyro: the help wraps at the terminal's width, and usage names what stands without an option.

    A default of None is not shown, since the text says what it stands for.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    signature = inspect.signature(function)

    parameters = []
    for parameter in signature.parameters.values():
        annotation = hints[parameter.name]
        shown: dict[str, Any] = {}
        if tyro.conf.Positional in getattr(annotation, "__metadata__", ()):
            shown["metavar"] = parameter.name.upper()
            if typing.get_origin(typing.get_args(annotation)[0]) in (list, tuple):
                one = re.sub("IE$", "Y", parameter.name.upper().removesuffix("S"))
                shown = {"metavar": f"{one} [{one} ...]", "help_behavior_hint": "(required)"}
        if parameter.default is False:  # there is nothing that --no-overwrite would do
            annotation = Annotated[annotation, tyro.conf.FlagCreatePairsOff]
        if parameter.default is None or parameter.default == ():
            shown["help_behavior_hint"] = ""
        if shown:
            annotation = Annotated[annotation, tyro.conf.arg(**shown)]
        parameters.append(parameter.replace(annotation=annotation))

    def verb(*values: Any, **options: Any) -> Any:
        return function(*values, **options)

    verb.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    verb.__doc__ = _CONTINUED.sub(" ", function.__doc__ or "")
    return verb
