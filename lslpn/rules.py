"""Constraints on settings, declared with the fields of a dataclass, and parsing from text."""

from __future__ import annotations

import contextlib
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from .errors import InputError, meant


class Rule(NamedTuple):
    """A constraint on a field besides its type: `Annotated[int, Rule(...)]`."""

    expected: str
    holds: Callable[[Any], bool]


def at_least(low: int, what: str = "{} or more") -> Rule:
    """The rule for a lower bound, in the words of `what`."""
    return Rule(what.format(low), lambda value: value >= low)


def require(ok: bool, config: object, name: str, expected: str) -> None:
    """Raise an InputError about the field `name` unless `ok`."""
    if not ok:
        given = getattr(config, name)
        raise InputError(f"The option {name} must be {expected}, not {given!r}.")


def _words(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(repr(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("'none'" if a is type(None) else _words(a) for a in args)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return f"{_words(args[0])}, several with commas"
        return f"{len(args)} values with a comma, each {_words(args[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "text")


def hints(kind: type) -> dict[str, Any]:
    """The fields' types, `Annotated` if they have rules."""
    return typing.get_type_hints(kind, include_extras=True)


def check(config: Any) -> None:
    """Check every field against its rule and, if it is a Literal, against the choices."""
    for name, kind in hints(type(config)).items():
        value = getattr(config, name)
        rules = getattr(kind, "__metadata__", ())
        if rules:
            kind = kind.__origin__
        if typing.get_origin(kind) is Literal:
            require(value in typing.get_args(kind), config, name, _words(kind))
        for rule in rules:
            optional = value is None and type(None) in typing.get_args(kind)
            require(optional or rule.holds(value), config, name, rule.expected)


def check_names(given: Mapping[str, Any], names: set[str], what: str) -> None:
    """Raise an InputError if `given` has a name that is not in `names`."""
    for name in given:
        if name not in names:
            raise InputError(
                f"There is no {what} {name!r}{meant(str(name), names)}; choose from "
                f"{', '.join(sorted(names))}."
            )


def number(text: str) -> float:
    """A number, or a fraction such as 1/16; raises ValueError or ZeroDivisionError otherwise."""
    # fractions.Fraction would compute for hours on 1e999999999.
    numerator, slash, denominator = text.partition("/")
    return float(numerator) / (float(denominator) if slash else 1)


def coerce(name: str, value: Any, kind: Any) -> Any:
    """Convert `value`, which may be a string from the command line, to the type of a field."""
    if typing.get_origin(kind) is Annotated:
        kind = kind.__origin__
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    wrong = InputError(f"The option {name} cannot be {value!r}; expected {_words(kind)}.")
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and (value is None or str(value).lower() == "none"):
            return None
        for inner in args:
            if inner is not type(None):
                with contextlib.suppress(InputError):
                    return coerce(name, value, inner)
        raise wrong
    if origin is Literal:
        if value not in args:
            raise wrong
        return value
    if origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        fixed = args[-1] is not Ellipsis
        if not isinstance(value, (list, tuple)) or (fixed and len(value) != len(args)):
            raise wrong
        return tuple(coerce(name, part, args[0]) for part in value)
    if kind is str:
        return str(value)
    if kind is bool:
        words = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
        if not isinstance(value, (bool, str)) or str(value).lower() not in words:
            raise wrong
        return words[str(value).lower()]
    if isinstance(value, bool):
        raise wrong
    try:
        if isinstance(value, str):
            value = int(value) if kind is int else number(value)
        found = kind(value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise wrong from error
    if not math.isfinite(found) or (kind is int and found != value):
        raise wrong
    return found
