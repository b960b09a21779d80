"""Built-in values as JSON that gives back the same value of the same type.

What JSON keeps by itself is written as it is: `None`, `bool`, `str`, `int` of 64 bits, finite `float`, `list`, and
`dict` with `str` keys. Everything else that can be kept is written as an object with one key, its tag::

    (1, "a")                ->  {"$tuple": [1, "a"]}
    {7: Decimal("1.50")}    ->  {"$dict": [[7, {"$Decimal": "1.50"}]]}
    {"$tuple": 1}           ->  {"$dict": [["$tuple", 1]]}          a dict that looks like a tag

The set of tags is closed, and reading one only ever makes a built-in value: nothing that the data names is imported
or called. Subclasses of built-in types (`OrderedDict`, `IntEnum`, named tuples) have no form here, because they would
come back as something else. Of an aware datetime the wall clock and the offset are kept, not the name of its zone.

The stored bytes outlive the version that wrote them: tags are added, never changed.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import enum
import functools
import math
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec

_INT_MIN, _INT_MAX = -(2**63), 2**63 - 1  # what every JSON library reads as an exact integer
_NONE = type(None)
_MISSING = object()


class NoForm(Exception):  # noqa: N818  (the answer of a search, not an error)
    """A value is of a type that has no tagged form; `kind` is that type."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        super().__init__(kind)


# Writing -----------------------------------------------------------------------------------------------------------


def tag(value: Any) -> Any:
    """Give the JSON form of a built-in value, nested to any depth; `NoForm` where there is none."""
    kind = type(value)
    if kind is str:
        return value if value.isascii() or _is_unicode(value) else {"$str": _write_text(value)}
    if kind is int:
        return value if _INT_MIN <= value <= _INT_MAX else {"$int": hex(value)}
    if kind is bool or kind is _NONE:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind is dict:
        return _tag_dict(value)
    if kind is list:
        return [tag(item) for item in value]
    write = _WRITERS.get(kind)
    if write is None:
        raise NoForm(kind)
    return {f"${kind.__name__}": write(value)}


def _tag_dict(value: dict[Any, Any]) -> dict[str, Any]:
    for key in value:
        if type(key) is not str or not (key.isascii() or _is_unicode(key)) or (len(value) == 1 and key[:1] == "$"):
            return {"$dict": [[tag(key), tag(item)] for key, item in value.items()]}
    return {key: tag(item) for key, item in value.items()}


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold the text: lone surrogates, as in undecodable file names, it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _write_text(value: str) -> str:
    return _write_bytes(value.encode("utf-8", "surrogatepass"))


def _write_bytes(value: bytes | bytearray) -> str:
    return base64.b64encode(value).decode("ascii")


def _write_clock(value: dt.datetime | dt.time) -> str:
    return value.isoformat() + (" fold" if value.fold else "")


def _write_timedelta(value: dt.timedelta) -> list[int]:
    return [value.days, value.seconds, value.microseconds]


def _write_complex(value: complex) -> list[Any]:
    return [tag(value.real), tag(value.imag)]


def _write_tuple(value: tuple[Any, ...]) -> list[Any]:
    return [tag(item) for item in value]


def _write_set(value: Iterable[Any]) -> list[Any]:
    return sorted((tag(item) for item in value), key=msgspec.json.encode)  # equal sets, equal bytes


_WRITERS: dict[type, Callable[[Any], Any]] = {
    tuple: _write_tuple,
    set: _write_set,
    frozenset: _write_set,
    bytes: _write_bytes,
    bytearray: _write_bytes,
    complex: _write_complex,
    Decimal: str,
    UUID: str,
    dt.datetime: _write_clock,
    dt.date: dt.date.isoformat,
    dt.time: _write_clock,
    dt.timedelta: _write_timedelta,
}

BUILTINS: frozenset[type] = frozenset({str, int, bool, _NONE, float, dict, list, *_WRITERS})


# Reading -----------------------------------------------------------------------------------------------------------


def untag(form: Any) -> Any:
    """Give back the value that `tag` took; any exception but `BaseException` where it never made such a form."""
    kind = type(form)
    if kind is list:
        return [untag(item) for item in form]
    if kind is not dict:
        return form
    if len(form) == 1:
        [(key, inner)] = form.items()
        if key.startswith("$"):
            return _READERS[key](inner)
    return {key: untag(item) for key, item in form.items()}


def _read_text(form: str) -> str:
    return _read_bytes(form).decode("utf-8", "surrogatepass")


def _read_bytes(form: str) -> bytes:
    return base64.b64decode(form, validate=True)


def _read_datetime(form: str) -> dt.datetime:
    return dt.datetime.fromisoformat(form.removesuffix(" fold")).replace(fold=int(form.endswith(" fold")))


def _read_time(form: str) -> dt.time:
    return dt.time.fromisoformat(form.removesuffix(" fold")).replace(fold=int(form.endswith(" fold")))


def _read_timedelta(form: list[int]) -> dt.timedelta:
    days, seconds, microseconds = form
    return dt.timedelta(days, seconds, microseconds)


def _read_complex(form: list[Any]) -> complex:
    real, imag = untag(form)
    return complex(real, imag)


_READERS: dict[str, Callable[[Any], Any]] = {
    "$str": _read_text,
    "$int": lambda form: int(form, 16),
    "$float": float,
    "$dict": lambda form: {untag(key): untag(item) for key, item in form},
    "$tuple": lambda form: tuple(map(untag, form)),
    "$set": lambda form: set(map(untag, form)),
    "$frozenset": lambda form: frozenset(map(untag, form)),
    "$bytes": _read_bytes,
    "$bytearray": lambda form: bytearray(_read_bytes(form)),
    "$complex": _read_complex,
    "$Decimal": Decimal,
    "$UUID": UUID,
    "$datetime": _read_datetime,
    "$date": dt.date.fromisoformat,
    "$time": _read_time,
    "$timedelta": _read_timedelta,
}


# Comparing ---------------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal in type and value, all the way down.

    Stricter than `==`: `True` is not 1, 1.0 is not 1, 0.0 is not -0.0, `Decimal("1.0")` is not `Decimal("1.00")`, the
    order of a dict counts, and data classes are compared attribute by attribute, whatever their `__eq__` says. NaN is
    itself. Other classes, such as those that pydantic knows, are asked by `==`, unless they extend a built-in type:
    such a value is never the same as another.
    """
    kind = type(a)
    if kind is not type(b):
        return False
    if kind in _COMPARED_BY_VALUE:
        return bool(a == b)
    if kind is dict:
        return len(a) == len(b) and _same_items(a, b)
    if kind is list or kind is tuple:
        return len(a) == len(b) and all(map(same, a, b))
    if kind in _COMPARED_BY_REPR:
        return repr(a) == repr(b)
    if kind is set or kind is frozenset:
        return len(a) == len(b) and _same_elements(a, b)
    if kind is dt.datetime or kind is dt.time:
        return _same_clock(a, b)
    if issubclass(kind, enum.Enum):
        return a is b
    held, held_too = _attributes(a), _attributes(b)
    if held is None or held_too is None:
        return bool(a == b) and not isinstance(a, tuple(BUILTINS))
    return held.keys() == held_too.keys() and all(same(value, held_too[name]) for name, value in held.items())


_COMPARED_BY_VALUE = frozenset({str, int, bool, _NONE, bytes, bytearray, UUID, dt.date, dt.timedelta})
_COMPARED_BY_REPR = frozenset({float, complex, Decimal})


def _same_items(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    for (key, value), (key_too, value_too) in zip(a.items(), b.items(), strict=True):
        # Most outcomes are small dicts of strings and numbers: two calls of `same` per item would double the time.
        if not (type(key) is type(key_too) is str):
            if not same(key, key_too):
                return False
        elif key != key_too:
            return False
        if not (type(value) is type(value_too) and type(value) in _COMPARED_BY_VALUE):
            if not same(value, value_too):
                return False
        elif value != value_too:
            return False
    return True


def _same_elements(a: Iterable[Any], b: Iterable[Any]) -> bool:
    twins = {item: item for item in b}
    for item in a:
        twin = twins.get(item, _MISSING)
        candidates = twins if twin is _MISSING else (twin,)  # NaN is not found by hash, nor a time in the repeated hour
        if not any(same(item, candidate) for candidate in candidates):
            return False
    return True


def _same_clock(a: Any, b: Any) -> bool:
    if (a.tzinfo is None) != (b.tzinfo is None):
        return False
    if a.tzinfo is None:
        return bool(a == b) and a.fold == b.fold
    # The same wall clock at the same offset: `==` is False for every zoned time in the hour that clocks repeat.
    return bool(a.replace(tzinfo=None) == b.replace(tzinfo=None)) and a.utcoffset() == b.utcoffset()


def _attributes(value: Any) -> dict[str, Any] | None:
    """What an instance of a data class consists of; None for an instance of any other class."""
    kind: Any = type(value)
    names = _field_names(kind)
    if names is None:
        return None
    held = {name: getattr(value, name) for name in names}
    for name, item in getattr(value, "__dict__", held).items():
        if name not in held and not isinstance(getattr(kind, name, None), functools.cached_property):
            held[name] = item  # set beside the declared fields: what does not come back is noticed
    return held


@functools.lru_cache(maxsize=256)
def _field_names(kind: Any) -> tuple[str, ...] | None:
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return tuple(kind._fields)
    if issubclass(kind, tuple(BUILTINS)):
        return None  # a subclass of a built-in type is more than its attributes
    if issubclass(kind, msgspec.Struct):
        return tuple(kind.__struct_fields__)
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    if hasattr(kind, "__attrs_attrs__"):
        return tuple(attribute.name for attribute in kind.__attrs_attrs__)
    if is_pydantic(kind):
        return (*kind.model_fields, "__pydantic_extra__", "__pydantic_private__")
    return None


def is_pydantic(kind: Any) -> bool:
    """Whether this is a pydantic model, without importing pydantic."""
    return isinstance(kind, type) and hasattr(kind, "__pydantic_validator__") and hasattr(kind, "model_fields")


def difference(a: Any, b: Any) -> str:
    """Say where two values that are not the same differ, in names of types and fields: never in values."""
    kind = type(a)
    if kind is not type(b):
        return f"{type_name(kind)} came back as {type_name(type(b))}"
    parts: Iterable[tuple[str, Any, Any]] = ()
    if kind is list or kind is tuple:
        parts = (("", x, y) for x, y in zip(a, b, strict=False))
    elif kind is dict:
        parts = (("", x, y) for x, y in zip((*a, *a.values()), (*b, *b.values()), strict=False))
    elif held := _attributes(a):
        parts = ((f"{kind.__qualname__}.{name}: ", x, getattr(b, name, None)) for name, x in held.items())
    for place, x, y in parts:
        if not same(x, y):
            return place + difference(x, y)
    return f"{type_name(kind)} came back changed"


def type_name(kind: Any) -> str:
    """The name of a type or an annotation, for messages."""
    if not isinstance(kind, type):
        return str(kind).removeprefix("typing.")
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
