"""The JSON codec gives back exactly what it was given, or says that it cannot."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime as dt
import enum
import functools
import http
import json
import math
import subprocess
import sys
import traceback
import typing
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from decimal import Decimal
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NewType, TypedDict
from uuid import UUID
from zoneinfo import ZoneInfo

import attrs
import msgspec
import pydantic
import pytest
from hypothesis import example, given, strategies as st

from idem_tasks import tagged
from idem_tasks.errors import ConfigurationError, OutcomeError
from idem_tasks.outcomes import UNANNOTATED, JsonCodec, OutcomeContext, ReturnType

if TYPE_CHECKING:
    from nowhere import Invisible  # type: ignore[import-not-found]

CONTEXT = OutcomeContext("orders", "A-17", None)
CODEC = JsonCodec()
BERLIN = ZoneInfo("Europe/Berlin")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Corner(enum.Enum):
    TOP_LEFT = (0, 0)


class Point(NamedTuple):
    x: int
    y: float


@dataclasses.dataclass
class Line:
    sku: str
    price: Decimal
    colour: Colour = Colour.RED


@dataclasses.dataclass
class Order:
    id: UUID
    at: dt.datetime
    lines: list[Line]
    took: dt.timedelta = dt.timedelta(0)
    body: bytes = b""
    pair: tuple[int, float] = (1, 1.0)
    tags: frozenset[str] = frozenset()
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    next: Order | None = None


@dataclasses.dataclass(frozen=True)
class Cent:
    amount: int


@dataclasses.dataclass
class Euro:
    amount: int


class Refund(msgspec.Struct):
    id: int
    amount: Decimal
    phase: complex = 0j


@attrs.define
class Parcel:
    weight: float
    label: str | None = None


class Receipt(pydantic.BaseModel):
    kind: Literal["receipt"] = "receipt"
    number: int = pydantic.Field(validation_alias="receiptNumber")
    total: Decimal
    at: dt.datetime
    home: pydantic.HttpUrl | None = None
    path: PurePosixPath = PurePosixPath("/")


class Voucher(pydantic.BaseModel):
    kind: Literal["voucher"] = "voucher"
    code: str = pydantic.Field(alias="voucherCode")


@dataclasses.dataclass
class Mail:
    receipt: Receipt
    sent: dt.date


class Plain:
    pass


class Money(Decimal):
    pass


ID = UUID("12345678-1234-5678-1234-567812345678")
NAIVE = dt.datetime(2026, 10, 25, 2, 30)  # noqa: DTZ001  (naive datetimes are values too)
UTC_NOON = dt.datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=dt.UTC)
ORDER = Order(ID, UTC_NOON, [Line("a", Decimal("1.50"), Colour.BLUE)], dt.timedelta(seconds=-1, microseconds=1))
RECEIPT = Receipt.model_validate(
    {"receiptNumber": 7, "total": "9.90", "at": UTC_NOON, "home": "https://example.org/", "path": "/x"}
)


def round_trip(value: Any, annotation: Any = UNANNOTATED) -> Any:
    return CODEC.decode(CODEC.encode(value, annotation, CONTEXT), annotation, CONTEXT)


def refused(value: Any, annotation: Any = UNANNOTATED) -> str:
    with pytest.raises(OutcomeError) as caught:
        CODEC.encode(value, annotation, CONTEXT)
    return str(caught.value)


# Built-in values ---------------------------------------------------------------------------------------------------

GOLDEN: list[tuple[Any, bytes]] = [
    (None, b"null"),
    (False, b"false"),
    (0, b"0"),
    (-0.0, b"-0.0"),
    (1.0, b"1.0"),
    (1e22, b"1e22"),
    ("", b'""'),
    ([], b"[]"),
    ({}, b"{}"),
    ((), b'{"$tuple":[]}'),
    ({"id": "A-17", "amount": 1999, "paid": True}, b'{"id":"A-17","amount":1999,"paid":true}'),
    ("Zürich", '"Zürich"'.encode()),
    ("\udc80", b'{"$str":"7bKA"}'),
    (2**63 - 1, b"9223372036854775807"),
    (2**63, b'{"$int":"0x8000000000000000"}'),
    (-(2**63) - 1, b'{"$int":"-0x8000000000000001"}'),
    (math.nan, b'{"$float":"nan"}'),
    (-math.inf, b'{"$float":"-inf"}'),
    (complex(-0.0, math.inf), b'{"$complex":[-0.0,{"$float":"inf"}]}'),
    ((1, "a"), b'{"$tuple":[1,"a"]}'),
    ({3, 1, 2}, b'{"$set":[1,2,3]}'),
    (frozenset({"b", "a"}), b'{"$frozenset":["a","b"]}'),
    (b"\x00\xff", b'{"$bytes":"AP8="}'),
    (bytearray(b"a"), b'{"$bytearray":"YQ=="}'),
    (Decimal("1.50"), b'{"$Decimal":"1.50"}'),
    (ID, b'{"$UUID":"12345678-1234-5678-1234-567812345678"}'),
    (UTC_NOON, b'{"$datetime":"2026-03-01T12:00:00.123456+00:00"}'),
    (NAIVE, b'{"$datetime":"2026-10-25T02:30:00"}'),
    (NAIVE.replace(fold=1), b'{"$datetime":"2026-10-25T02:30:00 fold"}'),
    (dt.date(2026, 3, 1), b'{"$date":"2026-03-01"}'),
    (dt.time(12, 30), b'{"$time":"12:30:00"}'),
    (dt.timedelta(days=-1, microseconds=5), b'{"$timedelta":[-1,0,5]}'),
    ({1: "a", "1": "b"}, b'{"$dict":[[1,"a"],["1","b"]]}'),
    ({"$tuple": [1]}, b'{"$dict":[["$tuple",[1]]]}'),
    ({"$tuple": [1], "b": 2}, b'{"$tuple":[1],"b":2}'),
]


@pytest.mark.parametrize("value, data", GOLDEN, ids=lambda part: type(part).__name__)
def test_the_stored_form_of_built_in_values_never_changes(value: Any, data: bytes) -> None:
    """What one version wrote, every later version reads, with an annotation or without."""
    assert CODEC.encode(value, UNANNOTATED, CONTEXT) == data
    for annotation in (UNANNOTATED, Any, Order, int):
        assert tagged.same(CODEC.decode(data, annotation, CONTEXT), value)


class Pairs(TypedDict):
    value: tuple[int, str]


@pytest.mark.parametrize(
    "annotation",
    [int, None, type(None), bool, str, dict, dict[str, int], list[Any], Pairs, dt.datetime | str, Order, Iterable[int]],
    ids=lambda part: getattr(part, "__name__", type(part).__name__),
)
@pytest.mark.parametrize("value", [None, 0, False, "", [], {}, 1, True, 1.0, (1, "a"), UTC_NOON, {"value": (1, "a")}])
def test_an_annotation_never_changes_a_built_in_value(value: Any, annotation: Any) -> None:
    """A handler's annotation may be wrong: what it returned is replayed all the same."""
    assert tagged.same(round_trip(value, annotation), value)


offsets = st.integers(-86399, 86399).map(lambda seconds: dt.timezone(dt.timedelta(seconds=seconds)))
zones = st.none() | offsets | st.sampled_from([dt.UTC, BERLIN, ZoneInfo("America/St_Johns")])
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.text(st.characters(categories=["Cs", "Lu"])),
    st.sampled_from(["$", "$tuple", "$dict", "$typed", "$int"]),
    st.binary(),
    st.decimals().filter(lambda number: not number.is_snan()),
    st.uuids(),
    st.datetimes(timezones=zones),
    st.dates(),
    st.times(timezones=st.none() | offsets),
    st.timedeltas(),
)
hashables = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4).map(tuple) | st.frozensets(inner, max_size=4), max_leaves=8
)
builtins = st.recursive(
    hashables | st.binary().map(bytearray) | st.sets(hashables, max_size=4),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=5)
        | st.dictionaries(hashables, inner, max_size=5)
        | st.dictionaries(st.sampled_from(["$tuple", "$dict", "$typed", "$"]), inner, max_size=1)
    ),
    max_leaves=25,
)


@given(builtins)
@example({"$typed": {"$tuple": 1}})
@example([Decimal("sNaN"), Decimal("-0E+7"), {math.nan: {math.nan}}])
@example({1: True, (1, True): (True, 1, 1.0)})
def test_every_built_in_value_comes_back_exactly(value: Any) -> None:
    """Type and value, at any depth, without an annotation and with any."""
    decoded = round_trip(value)
    assert tagged.same(decoded, value)
    assert type(decoded) is type(value)
    assert repr(decoded) == repr(value) or "{" in repr(value) or "zoneinfo" in repr(value)  # sets have no order


def test_integers_have_no_limit() -> None:
    """Not even the one that Python has for decimal text."""
    assert round_trip(-(10**5000)) == -(10**5000)


@given(builtins)
def test_the_stored_form_is_compact_plain_json(value: Any) -> None:
    """Any JSON reader can read it, and it holds no needless byte."""
    data = CODEC.encode(value, UNANNOTATED, CONTEXT)
    assert len(data) <= len(
        json.dumps(json.loads(data), ensure_ascii=False, separators=(",", ":")).encode()
    ) + data.count(b"e")


@pytest.mark.parametrize("fold", [0, 1])
def test_a_time_in_the_repeated_hour_keeps_its_offset(fold: int) -> None:
    """Of a zoned datetime the wall clock and the offset come back; a fixed offset stands in for the zone."""
    value = dt.datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=fold)
    decoded = round_trip(value)
    assert decoded.utcoffset() == value.utcoffset()
    assert decoded.timestamp() == value.timestamp()
    assert decoded.replace(tzinfo=None) == value.replace(tzinfo=None)
    order = Order(ID, value, [])
    assert round_trip(order, Order).at.timestamp() == value.timestamp()


@pytest.mark.parametrize(
    "value",
    [
        collections.OrderedDict(a=1),
        collections.defaultdict(list),
        collections.Counter("a"),
        Level.LOW,
        http.HTTPStatus.OK,
        Money("1.5"),
        Point(1, 2.0),
        type("Name", (str,), {})("a"),
        Colour.RED,
        Plain(),
        Plain,
        len,
        range(3),
        memoryview(b"a"),
        dt.time(12, tzinfo=BERLIN),
        PurePosixPath("/"),
        ORDER,
        Refund(1, Decimal(1)),
        Parcel(1.0),
        RECEIPT,
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [{"a": x}], lambda x: {("k",): (x,)}], ids=["", "in", "deep"])
def test_other_values_need_an_annotation(value: Any, wrap: Callable[[Any], Any]) -> None:
    """A class, or a subclass of a built-in type, is refused: it would come back as something else."""
    message = refused(wrap(value))
    assert "annotate the return type" in message or "came back changed" in message


@pytest.mark.parametrize(
    "a, b",
    [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        (0j, -0j),
        ("", b""),
        (b"", bytearray()),
        ([1], (1,)),
        ([1], [True]),
        ([1], [1, 1]),
        ({1}, {True}),
        ({1}, {2}),
        ({1}, frozenset({1})),
        ({(1, math.nan)}, {(True, math.nan)}),
        ({"a": 1}, {"a": True}),
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"b": 1}),
        ({1: 1}, {True: 1}),
        ({"a": [1]}, {"a": [2]}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (Decimal("1.0"), Decimal("1.00")),
        (UTC_NOON, UTC_NOON.astimezone(BERLIN)),
        (UTC_NOON, UTC_NOON.replace(tzinfo=None)),
        (NAIVE, NAIVE.replace(fold=1)),
        (dt.time(12), dt.time(12, tzinfo=BERLIN)),
        (dt.datetime(2026, 3, 1, tzinfo=dt.UTC), dt.date(2026, 3, 1)),
        (Level.LOW, 1),
        (Level.LOW, Level.HIGH),
        (Point(1, 2.0), (1, 2.0)),
        (Point(1, 2.0), Point(True, 2.0)),
        (Cent(1), Euro(1)),
        (Cent(1), Cent(True)),
        (Plain(), Plain()),
        (collections.OrderedDict(), collections.OrderedDict()),
        (PurePosixPath("/a"), PurePosixPath("/b")),
    ],
    ids=lambda part: getattr(part, "__name__", type(part).__name__),
)
def test_the_comparison_is_strict(a: Any, b: Any) -> None:
    """What `verify` compares by: types and values, all the way down, in both directions."""
    assert not tagged.same(a, b)
    assert not tagged.same(b, a)
    assert tagged.same(a, a) or type(a) is collections.OrderedDict
    assert tagged.difference(a, b)


# Classes -----------------------------------------------------------------------------------------------------------

TYPED: list[tuple[Any, Any, bytes]] = [
    (Colour.RED, Colour, b'{"$typed":"red"}'),
    (Level.HIGH, Level | None, b'{"$typed":2}'),
    (Point(1, 2.0), Point, b'{"$typed":[1,2.0]}'),
    (Parcel(0.5), Parcel, b'{"$typed":{"weight":0.5,"label":null}}'),
    (Refund(1, Decimal("2.0"), 1j), Refund, b'{"$typed":{"id":1,"amount":"2.0","phase":{"$complex":[0.0,1.0]}}}'),
    ([Line("a", Decimal(1))], list[Line], b'{"$typed":[{"sku":"a","price":"1","colour":"red"}]}'),
    ({ID: Cent(1)}, dict[UUID, Cent], b'{"$typed":{"12345678-1234-5678-1234-567812345678":{"amount":1}}}'),
    (
        Receipt.model_validate({"receiptNumber": 7, "total": "9.90", "at": UTC_NOON}),
        Receipt,
        b'{"$typed":{"kind":"receipt","number":7,"total":"9.90","at":"2026-03-01T12:00:00.123456Z","home":null,"path":"/"}}',
    ),
    (Voucher(voucherCode="x"), Voucher, b'{"$typed":{"kind":"voucher","code":"x"}}'),
]


@pytest.mark.parametrize("value, annotation, data", TYPED, ids=lambda part: type(part).__name__)
def test_the_stored_form_of_classes_never_changes(value: Any, annotation: Any, data: bytes) -> None:
    """What one version wrote, every later version reads."""
    encoded = CODEC.encode(value, annotation, CONTEXT)
    assert (json.loads(encoded), len(encoded)) == (json.loads(data), len(data))  # attrs' slots have no fixed order
    assert tagged.same(CODEC.decode(data, annotation, CONTEXT), value)


@pytest.mark.parametrize(
    "value, annotation",
    [
        (ORDER, Order),
        (dataclasses.replace(ORDER, next=ORDER, meta={"a": [1, 2.0, None]}), Order | None),
        ([ORDER], list[Order]),
        ((ORDER, 1), tuple[Order, int]),
        ({ID: [Colour.RED]}, dict[UUID, list[Colour]]),
        ({Colour.RED: 1}, Mapping[Colour, int]),
        ({Cent(1), Cent(2)}, set[Cent]),
        ([Refund(1, Decimal("0.10"))], list[Refund | int]),
        (Parcel(1.5, "x"), Annotated[Parcel, ["unhashable"]]),
        (Cent(1), NewType("Price", Cent)),
        (RECEIPT, Receipt),
        ([RECEIPT, None], list[Receipt | None]),
        (Mail(RECEIPT, dt.date(2026, 1, 1)), Mail),
        ([RECEIPT, Voucher(voucherCode="x")], list[Receipt | Voucher]),
        (Voucher(voucherCode="x"), Annotated[Receipt | Voucher, pydantic.Field(discriminator="kind")]),
        ({"value": Point(1, 1.0)}, dict[str, Point]),
    ],
    ids=lambda part: type(part).__name__,
)
def test_the_return_annotation_brings_classes_back(value: Any, annotation: Any) -> None:
    """Nested in containers and in one another, with strict equality of every attribute."""
    CODEC.check(annotation)
    decoded = round_trip(value, annotation)
    assert decoded == value
    assert tagged.same(decoded, value)


lines = st.builds(Line, st.text(), st.decimals(allow_nan=False, allow_infinity=False), st.sampled_from(Colour))
orders = st.builds(
    Order,
    st.uuids(),
    st.datetimes(timezones=st.none() | st.just(dt.UTC) | st.just(BERLIN)).filter(lambda at: at.tzinfo or not at.fold),
    st.lists(lines, max_size=3),
    st.timedeltas(dt.timedelta(days=-1000), dt.timedelta(days=1000)),
    st.binary(),
    st.tuples(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False)),
    st.frozensets(st.text()),
    st.dictionaries(st.text(), st.booleans() | st.text() | st.lists(st.integers(0, 9))),
)
money = st.decimals(allow_nan=False, allow_infinity=False)
receipts = st.builds(Receipt, receiptNumber=st.integers(), total=money, at=st.datetimes(timezones=st.just(dt.UTC)))
refunds = st.builds(Refund, st.integers(-(2**63), 2**63 - 1), money, st.complex_numbers())
parcels = st.builds(Parcel, st.floats(allow_nan=False, allow_infinity=False), st.none() | st.text())


@pytest.mark.parametrize(
    "strategy, annotation",
    [(orders, Order), (refunds, Refund), (parcels, Parcel), (receipts, Receipt)],
    ids=["dataclass", "Struct", "attrs", "pydantic"],
)
@given(data=st.data())
def test_annotated_classes_come_back_exactly_or_are_refused(
    strategy: st.SearchStrategy[Any], annotation: Any, data: st.DataObject
) -> None:
    """No value of a class ever comes back as a similar one."""
    value = data.draw(st.lists(strategy, max_size=3))
    try:
        encoded = CODEC.encode(value, list[annotation], CONTEXT)
    except OutcomeError:
        unusual = any(isinstance(v, Order) and v.at.tzinfo is BERLIN and v.at.year < 1900 for v in value)
        assert unusual, "an offset with seconds is all that JSON text of a class cannot hold here"
    else:
        assert tagged.same(CODEC.decode(encoded, list[annotation], CONTEXT), value)


@dataclasses.dataclass
class Normalizing:
    name: str

    def __post_init__(self) -> None:
        self.name += "!"


@dataclasses.dataclass
class Derived(Euro):
    extra: int = 0


class Undeclared(Euro):
    def __init__(self, amount: int) -> None:
        super().__init__(amount)
        self.note = "x"


@dataclasses.dataclass
class Lax:
    value: Any
    total: float = 0.0

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class Secret(pydantic.BaseModel):
    pin: pydantic.SecretStr = pydantic.SecretStr("1234")
    _seen: int = pydantic.PrivateAttr(default=0)


class Excluding(pydantic.BaseModel):
    shown: int = 1
    hidden: int = pydantic.Field(default=1, exclude=True)


def derived_receipt() -> Receipt:
    class Private(Receipt):
        pass

    return Private.model_validate({"receiptNumber": 1, "total": 1, "at": UTC_NOON})


@pytest.mark.parametrize(
    "value, annotation, hint",
    [
        (Lax((1,)), Lax, "Lax.value: tuple came back as list"),
        (Lax(UTC_NOON), Lax, "Lax.value: datetime.datetime came back as str"),
        (Lax({"a": b"x"}), Lax, "Lax.value: bytes came back as str"),
        (Lax({1: 2}), Lax, "Lax.value: int came back as str"),
        (Lax(math.nan), Lax, "Lax.value: float came back as NoneType"),
        (Lax(None, 1), Lax, "Lax.total: int came back as float"),
        (Lax(Colour.RED), Lax, "Colour came back as str"),
        (Normalizing("a"), Normalizing, "Normalizing.name: str came back changed"),
        (Derived(1), Euro, "Derived came back as"),
        (Undeclared(1), Undeclared, "Undeclared"),
        (derived_receipt(), Receipt, "Private came back as"),
        (Excluding(hidden=2), Excluding, "Excluding.hidden"),
        (Secret(), Secret, "Secret.pin: pydantic.types.SecretStr came back changed"),
        (Point(1, 2.0), tuple[int, float], "Point came back as tuple"),
        (Level.LOW, int, "Level came back as int"),
        (Colour.RED, dict[str, Any], "does not fit"),
        ({"a": Colour.RED}, dict[str, Any], "Colour came back as str"),
        ([Cent(1)], list[Euro], "Cent came back as"),
        (Cent(True), Cent, "does not fit"),
        (Order(ID, UTC_NOON, [], pair=(True, 1.0)), Order, "does not fit"),
        (Order(ID, UTC_NOON.replace(tzinfo=dt.timezone(dt.timedelta(seconds=1))), []), Order, "Order.at"),
        (Colour.RED, dt.datetime | str, "names no class"),
        (Corner.TOP_LEFT, Corner, "str or all int"),
        (Plain(), Plain, "Plain cannot be kept"),
        (Plain(), Any, "Plain"),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_value_that_would_come_back_changed_is_refused(value: Any, annotation: Any, hint: str) -> None:
    """Whatever `==` says about it."""
    assert hint in refused(value, annotation)


def test_without_verify_only_encoding_itself_can_fail() -> None:
    """`verify=False` trusts the annotation, and saves half the time."""
    data = JsonCodec(verify=False).encode(Lax((1,)), Lax, CONTEXT)
    assert CODEC.decode(data, Lax, CONTEXT).value == [1]
    with pytest.raises(OutcomeError):
        JsonCodec(verify=False).encode(Plain(), UNANNOTATED, CONTEXT)


def test_cached_properties_and_private_state_do_not_count_when_they_come_back_by_themselves() -> None:
    """A cached property that was read once is no part of the value."""

    @dataclasses.dataclass
    class Basket:
        prices: list[int]

        @functools.cached_property
        def total(self) -> int:
            return sum(self.prices)

    basket = Basket([1, 2])
    assert basket.total == 3
    assert round_trip(basket, Basket) == basket


def test_a_class_recorded_under_an_annotation_is_not_replayed_without_it() -> None:
    """A handler that lost its annotation gets an error, not a dict."""
    data = CODEC.encode(Cent(1), Cent, CONTEXT)
    with pytest.raises(OutcomeError, match="no longer has"):
        CODEC.decode(data, UNANNOTATED, CONTEXT)


# Errors ------------------------------------------------------------------------------------------------------------


def test_messages_and_tracebacks_hold_no_value() -> None:
    """A secret in an outcome stays out of the log, whichever library refuses it."""

    class Picky(pydantic.BaseModel):
        name: str

        @pydantic.field_validator("name")
        @classmethod
        def never(cls, name: str) -> str:
            raise ValueError(name)

    attempts: list[Callable[[], Any]] = [
        lambda: CODEC.encode([{"canary": Plain()}], UNANNOTATED, CONTEXT),
        lambda: CODEC.encode(Lax({"canary": ("canary",)}), Lax, CONTEXT),
        lambda: CODEC.encode(Picky.model_construct(name="canary"), Picky, CONTEXT),
        lambda: CODEC.decode(b'{"$typed":"canary"}', Colour, CONTEXT),
        lambda: CODEC.decode(b'{"$canary":1}', UNANNOTATED, CONTEXT),
        lambda: CODEC.decode(b'{"$Decimal":"canary"}', UNANNOTATED, CONTEXT),
        lambda: CODEC.decode(b'{"$typed":{"name":"canary"}}', Picky, CONTEXT),
    ]
    for attempt in attempts:
        with pytest.raises(OutcomeError) as caught:
            attempt()
        texts = [line for line in traceback.format_exception(caught.value) if "attempt" not in line]
        assert "canary" not in str(caught.value)
        assert not any("Error: " in text and "canary" in text for text in texts)


def test_too_deep_and_cyclic_values_are_refused() -> None:
    """Nesting ends in an OutcomeError, both ways."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert "nested too deeply" in refused(deep)
    cycle: dict[str, Any] = {}
    cycle["self"] = cycle
    assert "nested too deeply" in refused(cycle)
    order = dataclasses.replace(ORDER)
    order.next = order
    assert "nested too deeply" in refused(order, Order)
    for data in (b"[" * 100_000 + b"]" * 100_000, b'{"$tuple":[' * 5_000 + b"]}" * 5_000):
        with pytest.raises(OutcomeError):
            CODEC.decode(data, UNANNOTATED, CONTEXT)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\x80\x04N.",
        b"nul",
        b"NaN",
        b'"\xff"',
        b'{"$typed":{}',
        b'{"$typed":}',
        b'{ "$typed":{}}',
        b'{"$tuple":1}',
        b'{"$set":[[]]}',
        b'{"$dict":[[[],1]]}',
        b'{"$dict":[[1]]}',
        b'{"$int":1}',
        b'{"$int":"x"}',
        b'{"$str":"="}',
        b'{"$bytes":"a"}',
        b'{"$bytes":"a\\n=="}',
        b'{"$complex":[1]}',
        b'{"$datetime":5}',
        b'{"$datetime":"x"}',
        b'{"$timedelta":[1]}',
        b'{"$timedelta":[1e300,0,0]}',
        b'{"$UUID":"x"}',
        b'{"$os.system":"true"}',
        b'{"$eval":"1"}',
        b'{"$":1}',
    ],
)
@pytest.mark.parametrize("annotation", [UNANNOTATED, Order, Receipt, list[Refund]], ids=str)
def test_foreign_bytes_are_an_outcome_error(data: bytes, annotation: Any) -> None:
    """Never another exception, and never a value."""
    with pytest.raises(OutcomeError):
        CODEC.decode(data, annotation, CONTEXT)


EVERYTHING = [[value for value, _ in GOLDEN if not isinstance(value, float)], {"a": {"$dict": (b"", ID)}}]


@pytest.mark.parametrize(
    "value, annotation",
    [(EVERYTHING, UNANNOTATED), ([ORDER], list[Order]), (RECEIPT, Receipt), (Refund(1, Decimal(2)), Refund)],
    ids=["built-in", "dataclass", "pydantic", "Struct"],
)
def test_damaged_bytes_give_a_value_or_an_outcome_error(value: Any, annotation: Any) -> None:
    """At every position, cut off or with any bit flipped; a class is never anything but its class."""
    data = CODEC.encode(value, annotation, CONTEXT)
    damaged = [data[:end] for end in range(len(data))]
    damaged += [data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :] for i in range(len(data)) for bit in range(8)]
    wrong = 0
    for attempt in damaged:
        try:
            decoded = CODEC.decode(attempt, annotation, CONTEXT)
        except OutcomeError:
            wrong += 1
        else:
            if attempt.startswith(b'{"$typed":'):
                assert type(decoded) is type(value)
    assert wrong >= len(data)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_give_a_value_or_an_outcome_error(data: bytes) -> None:
    """Reading never crashes."""
    for annotation in (UNANNOTATED, Order):
        for attempt in (data, b'{"$typed":' + data + b"}", b'{"$dict":' + data + b"}"):
            with contextlib.suppress(OutcomeError):
                CODEC.decode(attempt, annotation, CONTEXT)


# What the annotation already tells ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "annotation",
    [
        Cent | Euro,
        Order | dict[str, int],
        Colour | str,
        list[Refund | Parcel],
        Receipt | Refund,
        Plain,
        list[Plain] | None,
        dict[str, Plain],
        Corner,
        collections.OrderedDict,
        collections.deque[int],
        range,
        type[int],
    ],
    ids=lambda part: getattr(part, "__name__", type(part).__name__),
)
def test_check_refuses_what_cannot_be_kept(annotation: Any) -> None:
    """Ambiguous unions and classes that are no data classes, at decoration."""
    with pytest.raises(ConfigurationError):
        CODEC.check(annotation)


@pytest.mark.parametrize(
    "annotation",
    [
        UNANNOTATED,
        Any,
        object,
        None,
        type(None),
        int,
        complex,
        dict,
        list[dict[str, Any]],
        dict[int, dt.datetime | str | Decimal],
        Pairs,
        Literal[1, "a"],
        Iterable[Order],
        typing.SupportsInt,
        Callable[[], int],
        Order | None,
        list[Order] | Order,
        Receipt | Voucher | None,
        Mail,
        typing.TypeVar("T"),
        typing.NoReturn,
        list["Later"],  # type: ignore[name-defined]  # noqa: F821
        "Later",
    ],
    ids=lambda part: getattr(part, "__name__", type(part).__name__),
)
def test_check_lets_pass_what_may_be_kept(annotation: Any) -> None:
    """No import fails because of an annotation that tells nothing, or nothing yet."""
    CODEC.check(annotation)


def test_check_waits_for_names_that_come_later() -> None:
    """A field that names a class of TYPE_CHECKING's is found out about at the first use."""

    @dataclasses.dataclass
    class Holder:
        inner: Invisible

    CODEC.check(Holder)
    assert "NameError" in refused(Holder(1), Holder)


# Return annotations --------------------------------------------------------------------------------------------------


def returns_order(item: Invisible) -> Order:
    raise NotImplementedError


async def returns_orders() -> list[Order]:
    raise NotImplementedError


def returns_nothing() -> None: ...
def returns_any() -> Any: ...
def returns_object() -> object: ...
def returns_unknown(x: int): ...  # type: ignore[no-untyped-def]  # noqa: ANN201
def returns_invisible() -> Invisible: ...
def returns_nested_invisible() -> dict[str, Invisible]: ...  # type: ignore[empty-body]
def returns_never() -> typing.NoReturn: ...  # type: ignore[empty-body]
def returns_coroutine() -> Coroutine[Any, Any, Order]: ...  # type: ignore[empty-body]
def returns_awaitable() -> Awaitable[Order]: ...  # type: ignore[empty-body]


class Handler:
    def __call__(self, x: int) -> Order:
        raise NotImplementedError

    def method(self) -> Cent:
        raise NotImplementedError

    @classmethod
    def class_method(cls) -> Cent:
        raise NotImplementedError

    @staticmethod
    def static_method() -> Cent:
        raise NotImplementedError


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def wraps_itself() -> Order:
    raise NotImplementedError


wraps_itself.__wrapped__ = wraps_itself  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "handler, annotation",
    [
        (returns_order, Order),
        (returns_orders, list[Order]),
        (returns_nothing, type(None)),
        (returns_any, UNANNOTATED),
        (returns_object, UNANNOTATED),
        (returns_unknown, UNANNOTATED),
        (returns_invisible, UNANNOTATED),
        (returns_nested_invisible, UNANNOTATED),
        (returns_never, UNANNOTATED),
        (returns_coroutine, Order),
        (returns_awaitable, Order),
        (functools.partial(returns_order, 1), Order),
        (wrapped(functools.partial(wrapped(returns_orders))), list[Order]),
        (Handler(), Order),
        (Handler().method, Cent),
        (Handler.method, Cent),
        (Handler.class_method, Cent),
        (Handler.static_method, Cent),
        (Handler, UNANNOTATED),
        (wraps_itself, UNANNOTATED),
        (len, UNANNOTATED),
        (lambda: 1, UNANNOTATED),
        (None, UNANNOTATED),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_the_return_annotation_is_found(handler: Any, annotation: Any) -> None:
    """Behind partials, wrappers and methods; what cannot be resolved is UNANNOTATED, never an error."""
    assert ReturnType(handler).early() == annotation
    assert ReturnType(handler).resolve() == annotation


def test_classes_beside_a_nested_handler_are_found() -> None:
    """A handler that makes a class of its own function's scope can be annotated with it."""

    @dataclasses.dataclass
    class Local:
        x: int

    def handler() -> Local:
        return Local(1)

    assert ReturnType(handler).resolve() is Local


def test_a_name_defined_after_decoration_is_found_at_the_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """`early` does not remember that a name was missing; `resolve` is computed once."""

    def handler() -> LaterOnly:  # type: ignore[name-defined]  # noqa: F821
        raise NotImplementedError

    returned = ReturnType(handler)
    assert returned.early() is UNANNOTATED
    monkeypatch.setitem(globals(), "LaterOnly", Cent)
    assert returned.resolve() is Cent
    monkeypatch.setitem(globals(), "LaterOnly", Euro)
    assert returned.resolve() is Cent


def test_the_codec_imports_neither_pydantic_nor_attrs() -> None:
    """What is not used is not loaded, even where values are encoded."""
    program = (
        "import sys; from idem_tasks.outcomes import *; import dataclasses\n"
        "@dataclasses.dataclass\nclass A: x: int\n"
        "JsonCodec().encode([A(1)], list[A], OutcomeContext('s', 'k', None))\n"
        "assert not {'pydantic', 'attr', 'attrs'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
