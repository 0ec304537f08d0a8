"""Checking settings against what takes them, so that a mistake is one line that says what is allowed."""

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

FEW, MANY = 10, 100
NUMBERS = {int, float}
KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "a mapping",
    NoneType: "null",
}


def check_settings(
    argument: str, settings: Mapping[str, Any], function: Callable[..., Any], given: Collection[str] = ()
) -> None:
    """Compares settings with the signature of what they are arguments of.

    Values are checked where the signature admits nothing but the plain kinds of a config, strings excepted. Signatures
    of others say `int` for what may be a fraction, so any number will do.

    Args:
        argument: what to call them in the error.
        settings: values by name.
        function: or class, which takes them.
        given: its parameters that are no settings, because the caller gives them.

    Raises:
        ValueError: a name is unknown (with those that are allowed), one is missing, or a value is of another kind.
    """
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and name not in given
    }
    for name, value in settings.items():
        if name not in named:
            if takes_any and name not in given:
                continue
            raise ValueError(f"{argument} has no setting {name!r}{names_hint(name, named)}")
        kinds = _kinds(named[name].annotation)
        fits = type(value) in kinds or (type(value) in NUMBERS and kinds & NUMBERS) or value is named[name].default
        if kinds <= KINDS.keys() and not fits:
            allowed = " or ".join(text for kind, text in KINDS.items() if kind in kinds)
            raise ValueError(f"{argument}.{name} must be {allowed}, got {value!r}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in settings:
            raise ValueError(f"{argument}.{name} must be set")


def check_number(
    argument: str,
    value: Any,
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    whole: bool = False,
) -> None:
    """Raises ValueError, with the argument's name, unless `value` is a number (a `whole` one) within the bounds."""
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    bounds = {
        f"at least {least}": least is None or (is_number and value >= least),
        f"above {above}": above is None or (is_number and value > above),
        f"at most {most}": most is None or (is_number and value <= most),
    }
    if not (is_number and all(bounds.values())):
        texts = " and ".join(text for text in bounds if not text.endswith("None"))
        raise ValueError(f"{argument} must be {'an integer' if whole else 'a number'}, {texts}, got {value!r}")


def check_choice(argument: str, value: Any, allowed: Collection[str]) -> None:
    """Raises ValueError, with the nearest names, unless `value` is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{argument}={value!r} is unknown{names_hint(value, allowed)}")


def names_hint(name: Any, allowed: Collection[str]) -> str:
    """The end of a sentence about a wrong name: the nearest of those allowed, or all where they are few."""
    nearest = difflib.get_close_matches(str(name), allowed, n=3, cutoff=0.5)
    if nearest and len(allowed) > FEW:
        return f"; the nearest names are {', '.join(nearest)}"
    return f"; allowed are {', '.join(allowed)}" if len(allowed) <= MANY else ""


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation admits, without what they hold."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return {get_origin(member) or member for member in members}
