"""Outcomes as bytes, and back to exactly the value that the handler returned.

A value of built-in types needs no help: `tagged` gives it an exact JSON form. A value that contains a class
(dataclass, msgspec.Struct, attrs, pydantic, Enum, named tuple) needs the handler's return annotation to be built again,
and is stored as ``{"$typed": ...}``. Which of the two it is, the value decides, so that an annotation that is not quite
true costs nothing as long as no class is involved.

Two rules come before everything else. What comes back is the same value of the same type, or an `OutcomeError`: never
something similar. And stored bytes name no code: the handler's own annotation is the only source of classes.
"""

from __future__ import annotations

import collections.abc
import enum
import functools
import inspect
import sys
import types
import typing
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec
import msgspec.inspect

from . import tagged
from .errors import ConfigurationError, OutcomeError
from .values import value


class Unannotated(enum.Enum):
    """The type of `UNANNOTATED`."""

    UNANNOTATED = "unannotated"


UNANNOTATED: Final = Unannotated.UNANNOTATED
"""Stands in for a return annotation that is missing, says nothing (`Any`) or cannot be resolved."""


@value(frozen=True, slots=True)
class OutcomeContext:
    """Which record an outcome belongs to, for codecs that bind the bytes to it."""

    scope: str
    key: str
    fingerprint: str | None
    step: str | None = None
    """The name of the handler's step whose outcome it is; None: the handler's own."""


class Codec(Protocol):
    """Turns an outcome into bytes and back.

    `name` is stored beside the bytes, for people and for migrations; it never chooses the code that decodes them.
    """

    name: str

    def encode(self, value: Any, type: Any, context: OutcomeContext) -> bytes:  # noqa: A002
        """Give bytes that `decode` turns into the same value; `OutcomeError` where that is not possible.

        `type` is the handler's return annotation, or `UNANNOTATED`.
        """

    def decode(self, data: bytes, type: Any, context: OutcomeContext) -> Any:  # noqa: A002
        """Give the value that was encoded; `OutcomeError` for bytes that this codec did not write for this type."""

    def check(self, type: Any) -> None:  # noqa: A002
        """Raise `ConfigurationError` where the annotation alone tells that its values cannot be kept."""


class JsonCodec:
    """JSON that gives back exactly the value that was encoded, or raises `OutcomeError`.

    Exact for every built-in type with or without an annotation: None, bool, int, float (with NaN and infinities),
    complex, str, bytes, bytearray, list, tuple, dict with any keys, set, frozenset, datetime, date, time, timedelta,
    Decimal, UUID. Exact for dataclasses, msgspec.Struct, attrs, pydantic models, named tuples and enums of str or int
    where the return annotation names them, at any depth: `list[Order]`, `dict[UUID, Order] | None`.

    Of an aware datetime the wall clock and the offset come back, not the name of its zone.
    With `verify` every outcome is decoded again and compared, in type and value, before it is recorded.
    """

    name = "json"

    def __init__(self, *, verify: bool = True) -> None:
        self.verify = verify

    def encode(self, value: Any, type: Any, context: OutcomeContext) -> bytes:  # noqa: A002
        """Give bytes that `decode` turns into the same value; `OutcomeError`, naming types only, where none do."""
        try:
            data = _encode(value, type)
            problem = ""
            if self.verify and not tagged.same(value, decoded := _decode(data, type)):
                problem = tagged.difference(value, decoded)
        except Exception as error:  # noqa: BLE001  (a class may raise anything)
            raise _cannot_be_kept(value, type, _reason(error, type)) from None
        if problem:
            raise _cannot_be_kept(value, type, problem)
        return data

    def decode(self, data: bytes, type: Any, context: OutcomeContext) -> Any:  # noqa: A002
        """Give the value that was encoded; `OutcomeError` for bytes that are damaged or do not fit the annotation."""
        try:
            return _decode(data, type)
        except Exception as error:  # noqa: BLE001  (a class may raise anything)
            problem = f"a recorded outcome cannot be decoded{_under(type)}: {_reason(error, type)}"
            raise OutcomeError(problem) from None

    def check(self, type: Any) -> None:  # noqa: A002
        """Raise `ConfigurationError` for an annotation whose values cannot be kept or told apart.

        That is a class that is not a data class, an enum whose values are not all str or all int, or a union of classes
        that JSON cannot tell apart. What is not known yet, as a name that is defined later, passes.
        """
        if type is UNANNOTATED:
            return
        try:
            _typed_form(type)
        except ConfigurationError:
            raise
        except Exception:  # noqa: BLE001  (as a NameError: it may be defined later)
            return


_TYPED = b'{"$typed":'  # then the value in its annotation's own JSON, then a brace


def _encode(value: Any, annotation: Any) -> bytes:
    try:
        return _to_json(tagged.tag(value))
    except tagged.NoForm:
        if annotation is UNANNOTATED:
            raise
    return _TYPED + _typed_form(annotation).encode(value) + b"}"


def _decode(data: bytes, annotation: Any) -> Any:
    if data.startswith(_TYPED):
        if annotation is UNANNOTATED:
            raise OutcomeError("it was recorded under a return annotation, which the handler no longer has")
        if not data.endswith(b"}"):
            raise OutcomeError("it is cut off")
        return _typed_form(annotation).decode(data[len(_TYPED) : -1])
    form = _from_json(data)
    return tagged.untag(form) if b'"$' in data else form  # no tag without these two bytes


def _cannot_be_kept(value: Any, annotation: Any, problem: str) -> OutcomeError:
    return OutcomeError(
        f"an outcome of type {tagged.type_name(type(value))} cannot be kept{_under(annotation)}: {problem}"
    )


def _reason(error: Exception, annotation: Any) -> str:
    """Say what went wrong without the words of others, which quote values."""
    if isinstance(error, (OutcomeError, ConfigurationError)):
        return str(error)
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or in itself"
    if isinstance(error, tagged.NoForm):
        found = f"it contains {tagged.type_name(error.kind)}"
        if annotation is UNANNOTATED:
            return f"{found}, and the handler has no return annotation that tells; annotate the return type"
        return f"{found}, which JSON has no form for"
    name = type(error).__name__
    if name == "ValidationError":  # msgspec's or pydantic's
        return "its JSON does not fit the annotation"
    return f"{name} in its JSON form"


def _under(annotation: Any) -> str:
    return "" if annotation is UNANNOTATED else f" under the return annotation {tagged.type_name(annotation)}"


# Classes: JSON as the return annotation says ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _TypedForm:
    """How the values of one annotation are written and read."""

    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


def _typed_form(annotation: Any) -> _TypedForm:
    try:
        return _cached_typed_form(annotation)
    except TypeError:  # the annotation cannot be hashed, as Annotated with a list
        return _make_typed_form(annotation)


def _make_typed_form(annotation: Any) -> _TypedForm:
    """Choose msgspec, or pydantic for unions of its models; `ConfigurationError` where neither can tell."""
    try:
        info = msgspec.inspect.type_info(annotation)
    except TypeError as error:
        classes = [part for part in _parts(annotation) if isinstance(part, type) and part not in tagged.BUILTINS]
        if any(map(tagged.is_pydantic, classes)):
            return _make_pydantic_form(annotation)
        if not classes:  # all that fits is built-in and needs no annotation, be it as ambiguous as `datetime | str`
            raise OutcomeError("the annotation names no class") from None
        raise ConfigurationError(
            f"the return annotation {tagged.type_name(annotation)} is ambiguous or not supported: {error}"
        ) from None
    for kind in _custom_classes(info, set()):
        if not (kind in tagged.BUILTINS or tagged.is_pydantic(kind) or _is_abstract(kind)):
            raise ConfigurationError(
                f"an outcome of type {tagged.type_name(kind)} cannot be kept; return built-in types, "
                "a dataclass, msgspec.Struct, attrs class or pydantic model"
            )
    return _TypedForm(_to_json, msgspec.json.Decoder(annotation, dec_hook=_read_hook).decode)


_cached_typed_form = functools.lru_cache(maxsize=256)(_make_typed_form)


def _parts(annotation: Any) -> Iterator[Any]:
    """Give everything that an annotation names, from the outside in."""
    annotation = getattr(annotation, "__value__", annotation)  # type X = ...
    yield getattr(annotation, "__supertype__", annotation)  # NewType
    for argument in typing.get_args(annotation):
        yield from _parts(argument)


def _custom_classes(info: Any, seen: set[int]) -> Iterator[Any]:
    """Give the classes in msgspec's description of an annotation that msgspec itself cannot read."""
    if isinstance(info, tuple):
        for item in info:
            yield from _custom_classes(item, seen)
    elif isinstance(info, (msgspec.inspect.Type, msgspec.inspect.Field)) and id(info) not in seen:
        seen.add(id(info))
        if isinstance(info, msgspec.inspect.CustomType):
            yield info.cls
        for name in info.__struct_fields__:
            yield from _custom_classes(getattr(info, name), seen)


def _is_abstract(kind: Any) -> bool:
    """Whether the class only stands for others (`Iterable`, a Protocol, object), so that it tells nothing yet."""
    return kind is object or inspect.isabstract(kind) or getattr(kind, "_is_protocol", False)


def _write_hook(value: Any) -> Any:
    kind: Any = type(value)
    return msgspec.Raw(_pydantic_form(kind).encode(value)) if tagged.is_pydantic(kind) else tagged.tag(value)


def _read_hook(kind: Any, form: Any) -> Any:
    return _pydantic_form(kind).decode(_to_json(form)) if tagged.is_pydantic(kind) else tagged.untag(form)


_to_json = msgspec.json.Encoder(enc_hook=_write_hook).encode
_from_json = msgspec.json.Decoder().decode


def _make_pydantic_form(annotation: Any) -> _TypedForm:
    from pydantic import TypeAdapter  # never the first to import it: a model was met
    from pydantic.errors import PydanticSchemaGenerationError

    adapter: Any
    try:
        adapter = TypeAdapter(annotation)
    except PydanticSchemaGenerationError:
        raise ConfigurationError(
            f"the return annotation {tagged.type_name(annotation)} joins pydantic models with what pydantic cannot read"
        ) from None
    write: dict[str, bool]
    read: dict[str, bool]
    if "by_name" in inspect.signature(adapter.validate_json).parameters:  # pydantic 2.11
        write = {"by_alias": False}  # a validation_alias need not be the name that is written
        read = {"by_alias": True, "by_name": True}
    else:
        write, read = {"by_alias": True}, {}
    return _TypedForm(
        functools.partial(adapter.dump_json, round_trip=True, warnings="error", **write),
        functools.partial(adapter.validate_json, **read),
    )


_pydantic_form = functools.lru_cache(maxsize=256)(_make_pydantic_form)


# The annotation itself ---------------------------------------------------------------------------------------------


class ReturnType:
    """The return annotation of a handler, resolved at the first use and never at import.

    Sees through functools.partial, methods, `functools.wraps` and callable objects; of a coroutine function it is the
    awaited type. Whatever stands in the way (a name imported under TYPE_CHECKING only, a syntax error in a string)
    makes it `UNANNOTATED`, never an error.
    """

    def __init__(self, handler: Callable[..., Any]) -> None:
        self._handler = handler
        self._resolved: Any = None  # resolved, no annotation is None: `-> None` is type(None)

    def resolve(self) -> Any:
        """Give the annotation, looked up once; `UNANNOTATED` where there is none that says anything."""
        if self._resolved is None:
            self._resolved = self.early()
        return self._resolved

    def early(self) -> Any:
        """Give the annotation as far as it is known now, without remembering it: for checks at decoration."""
        try:
            annotation = _return_annotation(_bare_function(self._handler))
        except Exception:  # noqa: BLE001  (an annotation may hold anything)
            return UNANNOTATED
        if annotation in _SAYS_NOTHING or isinstance(annotation, typing.TypeVar):
            return UNANNOTATED
        return annotation


class OutcomeType(ReturnType):
    """The type of one outcome in what a handler of many messages returns: a list of them, or a mapping to them.

    Exceptions in it are no outcomes.
    """

    def early(self) -> Any:
        """Give the type as far as it is known now."""
        returned = super().early()
        origin, arguments = typing.get_origin(returned), typing.get_args(returned)
        if not isinstance(origin, type):
            return UNANNOTATED
        if issubclass(origin, Mapping) and len(arguments) == 2:
            return _without_exceptions(arguments[1])
        many = len(arguments) == 1 or arguments[1:] == (...,)
        return _without_exceptions(arguments[0]) if issubclass(origin, Sequence) and many else UNANNOTATED


def _without_exceptions(annotation: Any) -> Any:
    kinds = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    if not kinds:
        return UNANNOTATED if annotation in _SAYS_NOTHING else annotation
    outcomes = [kind for kind in kinds if not (isinstance(kind, type) and issubclass(kind, BaseException))]
    return typing.Union[tuple(outcomes)] if outcomes else UNANNOTATED  # noqa: UP007 - of however many there are


def return_type_of(handler: Callable[..., Any]) -> Callable[[], Any]:
    """Return what resolves the handler's return annotation when it is asked, and remembers it for a plain function."""
    function = inspect.unwrap(handler)

    def resolve() -> Any:
        if not inspect.isfunction(function):
            return ReturnType(handler).resolve()
        if function not in _return_types:
            _return_types[function] = ReturnType(function).resolve()
        return _return_types[function]

    return resolve


_return_types: weakref.WeakKeyDictionary[object, Any] = weakref.WeakKeyDictionary()
"""By function, and weakly: `run` and `step` are given lambdas and closures, which hold whole messages."""

_SAYS_NOTHING = (Any, object, typing.Never, typing.NoReturn, typing.Self, typing.LiteralString)


def _bare_function(handler: Any) -> types.FunctionType:
    """Give the function whose annotations and globals count, from under its wrappers."""
    for _ in range(100):  # wrappers may wrap themselves
        if isinstance(handler, functools.partial):
            handler = handler.func
        elif hasattr(handler, "__wrapped__"):
            handler = handler.__wrapped__
        elif isinstance(handler, types.FunctionType):
            return handler
        elif inspect.ismethod(handler):
            handler = handler.__func__
        else:
            handler = vars(type(handler))["__call__"]
    raise TypeError("no function under these wrappers")


def _return_annotation(function: types.FunctionType) -> Any:
    if sys.version_info >= (3, 14):
        import annotationlib

        annotations = annotationlib.get_annotations(function, format=annotationlib.Format.FORWARDREF)
    else:
        annotations = function.__annotations__
    if "return" not in annotations:
        return UNANNOTATED

    def only_the_return() -> None:
        """Stands in for the function, whose parameters may name what cannot be resolved."""

    only_the_return.__annotations__ = {"return": annotations["return"]}
    names = inspect.getclosurevars(function).nonlocals  # classes that were made beside the handler
    hints = typing.get_type_hints(only_the_return, function.__globals__, names, include_extras=True)
    annotation = hints["return"]
    if typing.get_origin(annotation) in (collections.abc.Awaitable, collections.abc.Coroutine):
        return typing.get_args(annotation)[-1]
    return annotation
