"""From a call to its scope, idempotency key and fingerprint, before the handler can change an argument.

A `KeyPlan` is compiled and checked when a handler is decorated; a call costs a few microseconds and keeps
nothing in the plan, so one plan serves any number of threads.

**What may be a key or a part of one:** str, int, UUID, Decimal, date, datetime, an Enum with such a value,
and bytes that are UTF-8. Equal values are one key: Decimal 1.0 and 1.00, one instant in two time zones (written
in UTC). 12 and "12" are one key too, because a broker may turn one into the other. Refused: None, what is
empty or blank, bool, float (its text depends on who writes it), containers and other objects (their text shows
a memory address), NUL and lone surrogates (databases do not store them).

**What is kept as it is:** case, blanks at either end, and the way accents are composed (no NFC). A
redelivered message has the very same characters, and folding would make two keys one.

**Two fields never run into one another.** In "{tenant}-{order}" a "-" within the tenant is written "%2D" (and
"%" is "%25"), as in a URL; otherwise tenant "a-b", order "c" and tenant "a", order "b-c" would be one key.
The last field is never changed, so a template with one field gives the bare value.

**Too long for its column** (counted in bytes of UTF-8): a readable head, "~sha256:" and the SHA-256 of the
whole. A given key that has "~sha256:" in that place is hashed too, so no given key equals a hashed one.
"""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import inspect
import re
import string
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import UUID

from msgspec import Struct

from idem_tasks.errors import ConfigurationError, InvalidKeyError
from idem_tasks.fingerprints import ArgumentsFingerprint, datetime_text, decimal_text, fingerprint_of

__all__ = [
    "KEY_MAX_BYTES",
    "SCOPE_MAX_BYTES",
    "CallKey",
    "KeyPlan",
    "check_key",
    "check_scope",
    "fingerprint_of",
    "raised_by_callable",
    "scope_of",
]

# In bytes of UTF-8, so in bytes of VARBINARY. Both together, as a primary key, stay under the 767 that
# MariaDB and MySQL take in an index in every row format.
KEY_MAX_BYTES = 255
SCOPE_MAX_BYTES = 191

_HASHED = "~sha256:"
_HASHED_CHARS = len(_HASHED) + 64
_WAY_OUT = (
    'name something within it ("{order.id}", "{event[id]}"), or give a callable that returns a str, int, UUID, '
    "Decimal, date or datetime"
)
_FIELD = re.compile(r"([^\W\d]\w*)((?:\.[^\W\d]\w*|\[[^\[\]]+\])*)")  # name, then .attribute or [item]
_STEP = re.compile(r"\.(\w+)|\[([^\[\]]+)\]")


class CallKey(Struct, frozen=True):
    """What one call claims; taken at its entry and never made again."""

    scope: str
    key: str
    fingerprint: str | None  # 64 hex digits; None: not compared


class KeyPlan:
    """Says for every call of one handler which scope, key and fingerprint it has."""

    __slots__ = ("_bind", "_constant_scope", "_default_scope", "_fingerprint", "_key", "_owner", "_scope")

    def __init__(
        self,
        handler: Callable[..., object],
        *,
        key: str | Callable[..., object],
        scope: str | Callable[..., object] | None = None,
        fingerprint: str | Sequence[str] | Callable[..., object] | None = "arguments",
        signature: inspect.Signature | None = None,
    ) -> None:
        """Compile and check; a name that is no parameter, or a template that cannot work: ConfigurationError.

        `key` and `scope` are templates over the handler's parameters ("{order.id}", "{event[id]}",
        "{items[0].sku}", "{{" for a brace) or callables that get the same arguments; a scope without fields is
        a constant. `fingerprint` is "arguments" (all that differ from their defaults, except a first parameter
        self or cls, and session), a list of parameter names, a callable, or None for no check. `signature` is for
        a handler that is called with other arguments than it takes.
        """
        self._owner = owner = scope_of(handler)
        try:
            signature = signature or inspect.signature(handler)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"the parameters of {owner} cannot be found out: {error}") from None
        parameters = list(signature.parameters.values())
        names = [parameter.name for parameter in parameters]
        self._bind = _Binder(owner, signature).bind
        self._key = _maker("key", key, owner, names)
        if isinstance(self._key, _Template) and not self._key.fields:
            raise ConfigurationError(
                f"key={key!r} of {owner} names no parameter, so all its messages would be one; {_known(names)}"
            )
        self._scope = None if scope is None else _maker("scope", scope, owner, names)
        self._default_scope = check_scope(owner)
        self._constant_scope = None
        if isinstance(self._scope, _Template) and not self._scope.fields:
            self._constant_scope = _fit(self._scope.start, SCOPE_MAX_BYTES, "scope")
        self._fingerprint = _fingerprint_maker(fingerprint, owner, parameters)

    def of(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        default_scope: str | None = None,
        framework_argument: bool = False,
    ) -> CallKey:
        """Scope, key and fingerprint of one call; nothing has run when it raises.

        Arguments that the handler does not take: the TypeError that calling it would raise. No usable key,
        scope or fingerprint: InvalidKeyError, which names the field or argument and never shows a value.

        default_scope: stands in for "module.qualname" where the handler was given no scope.
        framework_argument: args[0] is the framework's (Celery's Task under bind=True). It is no part of the
        fingerprint and is not given to callables; a template may use it ("{self.request.id}").
        """
        values = self._bind(args, kwargs)
        own = args[1:] if framework_argument else args
        if self._constant_scope is not None:
            scope = self._constant_scope
        elif self._scope is not None:
            scope = _fit(self._scope.text(values, own, kwargs), SCOPE_MAX_BYTES, "scope")
        else:
            scope = self._default_scope if default_scope is None else check_scope(default_scope)
        key = _fit(self._key.text(values, own, kwargs), KEY_MAX_BYTES, "key")
        fingerprint = None
        if isinstance(self._fingerprint, ArgumentsFingerprint):
            fingerprint = self._fingerprint.of(values, skip_first=framework_argument)
        elif self._fingerprint is not None:
            name = f"what the fingerprint callable of {self._owner} returned"
            fingerprint = fingerprint_of(self._fingerprint(*own, **kwargs), name=name)
        return CallKey(scope, key, fingerprint)


def raised_by_callable(error: BaseException) -> bool:
    """Tell whether a callable raised this from which a key, scope or fingerprint was to be taken.

    Not what says that a call does not fit its handler, which is no fault of the message.
    """
    codes = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
    return KeyPlan.of.__code__ in codes and _Binder.bind.__code__ not in codes


def scope_of(handler: object) -> str:
    """The default scope of a handler, "module.qualname"; the same however its program was started.

    A script's module is called by its file's name instead of "__main__": otherwise two scripts with a handler
    of one name would answer for each other. Moving or renaming a handler changes its default scope.
    """
    while isinstance(handler, functools.partial):
        handler = handler.func
    named: Any = handler if hasattr(handler, "__qualname__") else type(handler)
    module = named.__module__
    if module in ("__main__", "__mp_main__"):  # the second in a process that multiprocessing spawned
        main: Any = sys.modules[module]
        if getattr(main, "__spec__", None) is not None:  # python -m
            module = main.__spec__.name
        elif getattr(main, "__file__", None) is not None:
            module = Path(main.__file__).stem
    return f"{module}.{named.__qualname__}"


def check_key(key: object, *, stored: bool = False) -> str:
    """A given key as a record holds it; InvalidKeyError if it cannot be one.

    stored=True is for a key that was read from a record: a hashed one is not hashed again.
    """
    return _fit(_text(key, "the key"), KEY_MAX_BYTES, "key", stored=stored)


def check_scope(scope: object, *, stored: bool = False) -> str:
    """A given scope as a record holds it; InvalidKeyError if it cannot be one. `stored` as in `check_key`."""
    return _fit(_text(scope, "the scope"), SCOPE_MAX_BYTES, "scope", stored=stored)


def _fit(text: str, limit: int, what: str, *, stored: bool = False) -> str:
    if len(text) < _HASHED_CHARS and text.isascii() and "\0" not in text:
        return text  # as nearly all are: within any limit, and too short to look hashed
    encoded = _encoded(text, what)
    looks_hashed = text[-_HASHED_CHARS:-64] == _HASHED
    if len(encoded) <= limit and (stored or not looks_hashed):
        return text
    head = encoded[: limit - _HASHED_CHARS].decode(errors="ignore")  # without a character that was cut in two
    return f"{head}{_HASHED}{hashlib.sha256(encoded).hexdigest()}"


def _encoded(text: str, what: str) -> bytes:
    if "\0" in text:
        raise InvalidKeyError(f"the {what} contains a NUL character, which databases do not store")
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidKeyError(f"the {what} contains a lone surrogate, which no text in UTF-8 has") from None


def _text(value: object, name: str) -> str:
    """The text of an accepted value; errors call it `name` and never show it."""
    if type(value) is str and value.strip():
        return value
    if isinstance(value, Enum):
        value = value.value
    if value is None:
        raise InvalidKeyError(f"{name} is None")
    kind = type(value).__qualname__
    try:
        text = _scalar_text(value)
    except (ValueError, OverflowError) as error:  # bytes not UTF-8, an int of 5,000 digits, the year 10,000 in UTC
        raise InvalidKeyError(f"{name} cannot be used: writing this {kind} raised {type(error).__name__}") from None
    if text is None:
        raise InvalidKeyError(
            f"{name} is of type {kind}, which has no text that is sure to be the same next time; {_WAY_OUT}"
        )
    if not text.strip():
        raise InvalidKeyError(f"{name} is {'blank' if text else 'empty'}")
    return text


def _scalar_text(value: object) -> str | None:
    match value:
        case bool():
            return None
        case str():
            return str.__str__(value)  # a subclass may have another __str__
        case int():
            return int.__repr__(value)
        case UUID():
            return str(value)
        case bytes():
            return value.decode()
        case Decimal() if value.is_finite():
            return decimal_text(value)
        case dt.datetime():
            return datetime_text(value)
        case dt.date():
            return value.isoformat()
    return None


@dataclass(frozen=True, slots=True)
class _Field:
    """One {field} of a template and the literal text behind it."""

    name: str  # for errors
    position: int  # of its parameter
    steps: tuple[tuple[bool, Any], ...]  # (True, attribute) or (False, item), from the parameter inwards
    following: str
    separator: str  # the first character of `following` where another field comes after it, else ""

    def text(self, values: Sequence[object]) -> str:
        value: Any = values[self.position]
        for is_attribute, step in self.steps:
            try:
                value = getattr(value, step) if is_attribute else value[step]
            except (AttributeError, LookupError, TypeError):
                kind = type(value).__qualname__
                raise InvalidKeyError(f"{self.name} is missing: {kind} has no {step!r}") from None
        text = value if type(value) is str and value.strip() else _text(value, self.name)
        if self.separator and (self.separator in text or "%" in text):
            escape = "".join(f"%{byte:02X}" for byte in self.separator.encode())
            text = text.replace("%", "%25").replace(self.separator, escape)
        return text + self.following


class _Template:
    """Literal text and fields, taken apart and checked once."""

    __slots__ = ("fields", "start")

    def __init__(self, template: str, what: str, names: Sequence[str]) -> None:
        literals, fields = [""], []
        try:
            if not _encoded(template, "template").strip():
                raise ValueError("it is empty")
            for literal, field, form, conversion in string.Formatter().parse(template):
                literals[-1] += literal
                if form or conversion:
                    raise ValueError("a field takes no format and no conversion, because their text is not stable")
                if field is not None:
                    fields.append(field)
                    literals.append("")
            last = len(fields) - 1
            self.start = literals[0]
            self.fields = [_field(field, what, literals[n + 1], n == last, names) for n, field in enumerate(fields)]
        except ValueError as error:
            raise ConfigurationError(f"{what} cannot be {template!r}: {error}") from None

    def text(self, values: Sequence[object], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        text = self.start
        for field in self.fields:
            text += field.text(values)
        return text


def _field(field: str, what: str, following: str, is_last: bool, names: Sequence[str]) -> _Field:
    matched = _FIELD.fullmatch(field)
    if matched is None:
        raise ValueError(f"{{{field}}} is not a parameter, or one with .attribute and [item] behind it")
    name, path = matched.groups()
    if name not in names:
        raise ValueError(f"{name!r} is not a parameter; {_known(names, name)}")
    steps: list[tuple[bool, Any]] = []
    for attribute, item in _STEP.findall(path):
        if attribute.startswith("_"):
            raise ValueError(f"{{{field}}} looks into a private attribute")
        steps.append((True, attribute) if attribute else (False, int(item) if item.isdecimal() else item))
    # What the escape of a separator is made of cannot be one; nor can nothing ("" is in every string).
    if not is_last and following[:1] in "%0123456789ABCDEF":
        raise ValueError(f"behind {{{field}}} a separator is needed, such as : or /, or two calls could have one text")
    separator = "" if is_last else following[0]
    return _Field(f"{{{field}}} in {what}", names.index(name), tuple(steps), following, separator)


@dataclass(frozen=True, slots=True)
class _Called:
    """A callable in a template's place."""

    function: Callable[..., object]
    name: str

    def text(self, values: Sequence[object], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        return _text(self.function(*args, **kwargs), self.name)


def _maker(kind: str, source: object, owner: str, names: Sequence[str]) -> _Template | _Called:
    if isinstance(source, str):
        return _Template(source, f"the {kind} of {owner}", names)
    return _Called(_checked(kind, source, owner, "a template"), f"what the {kind} callable of {owner} returned")


def _checked(kind: str, source: object, owner: str, other: str) -> Callable[..., object]:
    if not callable(source) or inspect.iscoroutinefunction(source):
        raise ConfigurationError(
            f"the {kind} of {owner} must be {other} or a callable that is not async, not {type(source).__qualname__}"
        )
    return source


def _fingerprint_maker(
    source: object, owner: str, parameters: Sequence[inspect.Parameter]
) -> ArgumentsFingerprint | Callable[..., object] | None:
    if source is None:
        return None
    able = {
        parameter.name: (position, parameter)
        for position, parameter in enumerate(parameters)
        if parameter.name != "session" and (position > 0 or parameter.name not in ("self", "cls"))
    }
    if source == "arguments":
        return ArgumentsFingerprint(owner, list(able.values()))
    if isinstance(source, str) or not isinstance(source, Iterable):
        return _checked("fingerprint", source, owner, '"arguments", a list of parameter names')
    chosen = list(source)
    for name in chosen:
        if name not in able:
            raise ConfigurationError(f"the fingerprint of {owner} cannot have {name!r}; {_known(list(able), name)}")
    if not chosen:
        raise ConfigurationError(f"the fingerprint of {owner} names no parameter; for no check it is None")
    return ArgumentsFingerprint(owner, [able[name] for name in dict.fromkeys(chosen)])


def _known(names: Sequence[str], name: object = "") -> str:
    close = get_close_matches(str(name), names, n=1)
    return f"known: {', '.join(names) or 'none'}" + (f"; did you mean {close[0]!r}?" if close else "")


class _Binder:
    """Binds calls to the parameters of a handler, as Python does."""

    __slots__ = ("_at_least", "_at_most", "_by_position", "_owner", "_parameters", "_signature")

    def __init__(self, owner: str, signature: inspect.Signature) -> None:
        self._owner = owner
        self._signature = signature
        parameters = list(signature.parameters.values())
        kinds = [parameter.kind for parameter in parameters]
        self._parameters = [(parameter.name, parameter.default) for parameter in parameters]
        self._at_least = kinds.count(inspect.Parameter.POSITIONAL_ONLY)
        self._at_most = self._at_least + kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)
        if inspect.Parameter.VAR_POSITIONAL in kinds or inspect.Parameter.VAR_KEYWORD in kinds:
            self._at_most = -1  # not by the short way
        self._by_position = self._at_most if self._at_most == len(parameters) else -1

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[object]:
        """Return the values of all parameters, in their order; TypeError for arguments that the handler does not take.

        Nearly all calls go by the short way, in a tenth of the time that `inspect.Signature.bind` takes.
        """
        if len(args) == self._by_position and not kwargs:
            return args
        if self._at_least <= len(args) <= self._at_most:
            values, used = list(args), 0
            for name, default in self._parameters[len(args) :]:
                if name in kwargs:
                    values.append(kwargs[name])
                    used += 1
                elif default is not inspect.Parameter.empty:
                    values.append(default)
            if used == len(kwargs) and len(values) == len(self._parameters):
                return values
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self._owner}(): {error}") from None
        bound.apply_defaults()
        return list(bound.arguments.values())
