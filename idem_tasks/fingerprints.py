"""Fingerprints: 64 hex digits that tell whether two calls with one key have the same arguments.

A fingerprint is the SHA-256 of the value's canonical text: JSON in ASCII, without spaces, dict keys and set
members sorted, objects as dicts of their fields. It is written by this module alone, so it is the same in
every process and for every hash seed, Python version and release of a library. It compares data, not Python
types, because brokers carry data:

- What JSON carries alike is alike: tuple and list, an Enum and its value, a UUID or date and its text, an
  object and a dict of its fields (so renaming a class changes nothing), the dict keys 1 and "1".
- What is equal is alike: 1 and 1.0, 0.0 and -0.0, Decimal 1.0 and 1.00, one instant in two time zones.
- What JSON tells apart is told apart: 1, "1" and True; None and "null"; one order of a list and another.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal
from enum import Enum
from json.encoder import encode_basestring_ascii as quoted
from typing import Any
from uuid import UUID

from msgspec import UNSET, Struct

from idem_tasks.errors import InvalidKeyError

MAX_DEPTH = 100  # containers within one another; each takes at most three of Python's 1,000 stack frames

_EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)  # never rounds; the default context does
# An object without one of its fields, an int of 5,000 digits or a circle of models, the year 10,000 in UTC.
_UNWRITABLE = (AttributeError, ValueError, OverflowError)
_WAY_OUT = "name the arguments to compare with fingerprint=[...], or give a callable, or None for no check"


def fingerprint_of(value: object, *, name: str = "the fingerprint's value") -> str:
    """The fingerprint of any value of plain data, 64 hex digits; equal data has equal fingerprints.

    Plain data: None, bool, int, float, str, bytes, Decimal, UUID, date, time, datetime, timedelta, Enum,
    list, tuple, set, frozenset, dict with keys that are not containers, dataclass, msgspec.Struct, attrs
    class, pydantic model (as its model_dump() gives it), one within another. Anything else, a value that
    contains itself and one deeper than 100: InvalidKeyError, whose message says `name` and the type, never the
    value.

    Takes about 3 µs for a few scalars and 0.5 µs for each more. A payload of 10 kB takes 0.4 ms: there, name
    the arguments to compare.
    """
    return _digest(_checked_text(value, name))


class ArgumentsFingerprint:
    """Makes the fingerprint of a call's bound arguments: that of the dict of those that are not the default.

    Leaving defaults out makes f(1), f(x=1) and f(1, currency="EUR") one where "EUR" is the default, lets a
    handler gain a parameter with a default without making messages under way look different, and lets a
    default be something that has no canonical form.
    """

    __slots__ = ("_parameters",)

    def __init__(self, owner: str, chosen: Sequence[tuple[int, inspect.Parameter]]) -> None:
        """`chosen`: the parameters that take part, each with its position in the values given to `of`."""
        self._parameters = sorted(
            (
                name := quoted(parameter.name),
                f"argument {name} of {owner}",
                position,
                parameter.kind is parameter.VAR_POSITIONAL,
                *_default(parameter),
            )
            for position, parameter in chosen
        )

    def of(self, values: Sequence[object], *, skip_first: bool) -> str:
        """The fingerprint of one call; `skip_first` leaves the first argument out."""
        members = []
        for name, called, position, is_args, default, default_text in self._parameters:
            value: Any = values[position]
            if skip_first and position == 0:
                if not is_args:
                    continue
                value = value[1:]
            if value is default:
                continue
            text = quoted(value) if type(value) is str else _checked_text(value, called)
            if text != default_text:
                members.append(f"{name}:{text}")
        return _digest("{" + ",".join(members) + "}")


def decimal_text(value: Decimal) -> str:
    """One text for equal numbers, exact: "10" for 10, 10.0 and 1E+1; with an exponent from 10**41 on."""
    if not value.is_finite():
        return str(value)
    if not value:
        return "0"
    value = value.normalize(_EXACT)
    return f"{value:f}" if -40 <= value.adjusted() <= 40 else str(value)


def datetime_text(value: dt.datetime) -> str:
    """One text for one instant: ISO 8601, in UTC if it is aware. A naive one stays as it is."""
    return (value if value.utcoffset() is None else value.astimezone(dt.UTC)).isoformat()


class _NoCanonicalFormError(ValueError):
    """Its message says what was met, in words that fit behind "contains"."""


def _default(parameter: inspect.Parameter) -> tuple[object, str | None]:
    default: object = parameter.default
    if parameter.kind is parameter.VAR_POSITIONAL:
        default = ()
    elif parameter.kind is parameter.VAR_KEYWORD:
        default = {}
    elif default is parameter.empty:
        return default, None
    try:
        return default, _text(default, [])
    except _UNWRITABLE:
        return default, None  # found by identity


def _checked_text(value: object, name: str) -> str:
    try:
        return _text(value, [])
    except _NoCanonicalFormError as error:
        raise InvalidKeyError(f"{name} contains {error}, which has no canonical form; {_WAY_OUT}") from None
    except _UNWRITABLE as error:
        raise InvalidKeyError(
            f"{name} has no canonical form (writing it raised {type(error).__name__}); {_WAY_OUT}"
        ) from None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _text(value: object, inside: list[int]) -> str:
    """The canonical text of a value; `inside` has the ids of the containers around it."""
    write = _SCALARS.get(type(value))
    if write is not None:
        return write(value)
    if type(value) not in _CONTAINERS:
        if isinstance(value, Enum):
            return _text(value.value, inside)
        for kind, write in _SCALARS.items():
            if isinstance(value, kind):
                return write(value)
    if id(value) in inside:
        raise _NoCanonicalFormError("itself")
    if len(inside) == MAX_DEPTH:
        raise _NoCanonicalFormError(f"more than {MAX_DEPTH} containers within one another")
    inside.append(id(value))
    if isinstance(value, list | tuple):
        text = f"[{','.join(_texts(value, inside))}]"
    elif isinstance(value, set | frozenset):
        text = f"[{','.join(sorted(_texts(value, inside)))}]"
    elif isinstance(value, dict):
        text = _dict(value, inside)
    elif hasattr(type(value), "model_dump"):  # pydantic; a root model's dump need not be a dict
        text = _text(value.model_dump(), inside)  # type: ignore[attr-defined]
    else:
        text = _dict(_fields(value), inside)
    inside.pop()
    return text


def _texts(values: Iterable[object], inside: list[int]) -> list[str]:
    # Most values are scalars; not calling _text for them halves the time.
    return [write(value) if (write := _SCALARS.get(type(value))) else _text(value, inside) for value in values]


def _dict(members: dict[Any, Any], inside: list[int]) -> str:
    keys = [quoted(key) if type(key) is str else _key(key) for key in members]
    texts = _texts(members.values(), inside)
    return f"{{{','.join(sorted([f'{key}:{text}' for key, text in zip(keys, texts, strict=True)]))}}}"


def _key(key: object) -> str:
    text = _text(key, [])
    if text[0] in "[{":
        raise _NoCanonicalFormError(f"a dict with a key of type {type(key).__qualname__}")
    return text if text[0] == '"' else f'"{text}"'


def _fields(value: object) -> dict[str, Any]:
    kind: Any = type(value)
    names: Iterable[str]
    if isinstance(value, Struct):
        names = value.__struct_fields__
    elif hasattr(kind, "__attrs_attrs__"):
        names = [attribute.name for attribute in kind.__attrs_attrs__]
    elif dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
    else:
        raise _NoCanonicalFormError(f"an object of type {kind.__module__}.{kind.__qualname__}")
    fields = {name: getattr(value, name) for name in names}
    return {name: member for name, member in fields.items() if member is not UNSET}


def _float(value: float) -> str:
    return int.__repr__(int(value)) if value.is_integer() else float.__repr__(value)


def _timedelta(value: dt.timedelta) -> str:
    return f'"P{value.days}DT{value.seconds}.{value.microseconds:06}S"'  # Python keeps the three normalised


_CONTAINERS = frozenset({dict, list, tuple, set, frozenset})

# By exact type; a subclass is found by going down the list, so datetime stands before date.
_SCALARS: dict[type, Callable[[Any], str]] = {
    str: quoted,
    int: int.__repr__,
    bool: lambda value: "true" if value else "false",
    type(None): lambda _: "null",
    float: _float,
    Decimal: lambda value: quoted(decimal_text(value)),
    UUID: lambda value: f'"{value}"',
    dt.datetime: lambda value: quoted(datetime_text(value)),
    dt.date: lambda value: f'"{value.isoformat()}"',
    dt.time: lambda value: f'"{value.isoformat()}"',
    dt.timedelta: _timedelta,
    bytes: lambda value: f'"{base64.b64encode(value).decode()}"',
}
