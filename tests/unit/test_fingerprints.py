"""A fingerprint is the same for the same data, everywhere and for ever, and another for other data (F19)."""

from __future__ import annotations

import datetime as dt
import enum
import hashlib
import inspect
import json
import math
import os
import subprocess
import sys
import threading
from collections import OrderedDict, UserDict
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import attrs
import msgspec
import pydantic
import pytest
from hypothesis import given, strategies as st

from idem_tasks.errors import InvalidKeyError
from idem_tasks.fingerprints import ArgumentsFingerprint, fingerprint_of


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Text(str):  # noqa: SLOT000 - as users write them
    def __str__(self) -> str:
        return "something else"


class Pair(NamedTuple):
    first: int
    second: int


@dataclass
class Line:
    sku: str
    tags: set[str] = field(default_factory=set)


class StructLine(msgspec.Struct, tag=True, rename="upper"):
    sku: str
    tags: set[str] = msgspec.field(default_factory=set)
    note: str | msgspec.UnsetType = msgspec.UNSET


@attrs.define
class AttrsLine:
    sku: str
    tags: set[str] = attrs.Factory(set)


class ModelLine(pydantic.BaseModel):
    sku: str
    tags: set[str] = set()


class Skus(pydantic.RootModel[list[str]]):
    pass


class Node(pydantic.BaseModel):
    below: Node | None = None


EAST = dt.timezone(dt.timedelta(hours=2))
CANONICAL: list[tuple[object, str]] = [
    (None, "null"),
    (True, "true"),
    (False, "false"),
    (0, "0"),
    (-7, "-7"),
    (2**80, "1208925819614629174706176"),
    (Level.HIGH, "3"),
    (1.0, "1"),
    (-0.0, "0"),
    (0.1, "0.1"),
    (-2.5e-7, "-2.5e-07"),
    (1e22, "10000000000000000000000"),
    (math.inf, "inf"),
    (-math.inf, "-inf"),
    (math.nan, "nan"),
    ("", '""'),
    ('say "hé"\n', '"say \\"h\\u00e9\\"\\n"'),
    ("\0", '"\\u0000"'),
    ("\ud800", '"\\ud800"'),
    ("😀", '"\\ud83d\\ude00"'),
    (Text("a"), '"a"'),
    (Colour.RED, '"red"'),
    (b"", '""'),
    (b"\x00\xff", '"AP8="'),
    (Decimal("1.50"), '"1.5"'),
    (Decimal("1E+2"), '"100"'),
    (Decimal("-0.00"), '"0"'),
    (Decimal("1E+999999"), '"1E+999999"'),
    (Decimal("0.1234567890123456789012345678901234567890"), '"0.123456789012345678901234567890123456789"'),
    (Decimal("NaN"), '"NaN"'),
    (UUID("12345678-1234-5678-1234-567812345678"), '"12345678-1234-5678-1234-567812345678"'),
    (dt.date(2024, 2, 29), '"2024-02-29"'),
    (dt.time(1, 2, 3), '"01:02:03"'),
    (dt.datetime(2024, 2, 29, 12), '"2024-02-29T12:00:00"'),  # noqa: DTZ001 - naive ones are written as they are
    (dt.datetime(2024, 2, 29, 12, tzinfo=dt.UTC), '"2024-02-29T12:00:00+00:00"'),
    (dt.datetime(2024, 2, 29, 14, tzinfo=EAST), '"2024-02-29T12:00:00+00:00"'),
    (dt.timedelta(days=1, microseconds=5), '"P1DT0.000005S"'),
    (-dt.timedelta(seconds=1), '"P-1DT86399.000000S"'),
    ([], "[]"),
    ((), "[]"),
    ([1, [2, (3,)]], "[1,[2,[3]]]"),
    (Pair(1, 2), "[1,2]"),
    ({3, 1, 20}, "[1,20,3]"),
    (frozenset({"b", "a"}), '["a","b"]'),
    ({1, "1", None}, '["1",1,null]'),
    ({}, "{}"),
    ({"b": 1, "a": {"d": 2, "c": 3}}, '{"a":{"c":3,"d":2},"b":1}'),
    (OrderedDict(b=1, a=2), '{"a":2,"b":1}'),
    ({10: "x", 9: "y"}, '{"10":"x","9":"y"}'),
    ({None: 1, True: 2, 1.5: 3}, '{"1.5":3,"null":1,"true":2}'),
    ({Colour.RED: 1, dt.date(2024, 1, 1): 2, b"k": 3}, '{"2024-01-01":2,"aw==":3,"red":1}'),
    ({1: "a", "1": "b"}, '{"1":"a","1":"b"}'),
    (Line("a", {"y", "x"}), '{"sku":"a","tags":["x","y"]}'),
    (StructLine("a", {"y", "x"}), '{"sku":"a","tags":["x","y"]}'),
    (AttrsLine("a", {"y", "x"}), '{"sku":"a","tags":["x","y"]}'),
    (ModelLine(sku="a", tags={"y", "x"}), '{"sku":"a","tags":["x","y"]}'),
    (Skus(["b", "a"]), '["b","a"]'),
    ([Line("a"), {"line": ModelLine(sku="b")}], '[{"sku":"a","tags":[]},{"line":{"sku":"b","tags":[]}}]'),
]


@pytest.mark.parametrize("value, text", CANONICAL, ids=lambda each: each if isinstance(each, str) else "")
def test_the_canonical_text_never_changes(value: object, text: str) -> None:
    """F19: the fingerprint is the SHA-256 of this very text; records outlive releases."""
    assert fingerprint_of(value) == hashlib.sha256(text.encode()).hexdigest()


GOLDEN_PROGRAM = """
import datetime as dt
from decimal import Decimal
from idem_tasks.fingerprints import fingerprint_of
print(fingerprint_of({
    "order_id": "A-1", "lines": [{"sku": "é", "price": 1.25, "quantity": 3}], "tags": {"red", "blue", "green"},
    "total": Decimal("3.750"), "at": dt.datetime(2024, 2, 29, 12, tzinfo=dt.UTC), "paid": True, "note": None,
}))
"""
GOLDEN_DIGEST = "71fb2f81edf880b12d1d160daa6446daf3b2810acd20c53dec710b426d7c1054"


@pytest.mark.parametrize("seed", ["0", "1", "4242"])
def test_the_digest_is_the_same_in_every_process(seed: str) -> None:
    """F19: neither the hash seed nor the order of sets and dicts changes a fingerprint."""
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
    answer = subprocess.run(
        [sys.executable, "-c", GOLDEN_PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == GOLDEN_DIGEST


@pytest.mark.parametrize(
    "one, other",
    [
        (1, "1"),
        (1, True),
        (0, False),
        (0, None),
        (None, "null"),
        ("", None),
        ([], {}),
        ([1, 2], [2, 1]),
        ([1, 2], [[1], 2]),
        (["a,b"], ["a", "b"]),
        ('a"', "a"),
        ({"a": 1}, {"a": None}),
        ({"a": None}, {}),
        (0.1 + 0.2, 0.3),
        (2**53, 2**53 + 1),
        (b"a", "a"),
        (Decimal("0.1234567890123456789012345678901"), Decimal("0.1234567890123456789012345678902")),
        (dt.datetime(2024, 1, 1), dt.datetime(2024, 1, 1, tzinfo=dt.UTC)),  # noqa: DTZ001
        (dt.timedelta(1), dt.timedelta(seconds=1)),
    ],
)
def test_other_data_has_another_fingerprint(one: object, other: object) -> None:
    """What JSON tells apart is told apart."""
    assert fingerprint_of(one) != fingerprint_of(other)


class Plain:
    pass


def circle() -> object:
    values: list[object] = [1]
    values.append({"again": values})
    return values


def wide_circle() -> object:
    values: list[object] = []
    values.extend([values] * 10)
    return values


def deep(levels: int) -> object:
    value: object = "bottom"
    for _ in range(levels):
        value = [value]
    return value


def circle_of_models() -> Node:
    node = Node()
    node.below = node
    return node


def incomplete() -> Line:
    line = Line("a")
    del line.sku
    return line


REFUSED: list[tuple[Callable[[], object], str]] = [
    (Plain, f"contains an object of type {__name__}.Plain, which has no canonical form"),
    (lambda: {"deep": [Plain()]}, f"object of type {__name__}.Plain"),
    (lambda: Plain, "object of type builtins.type"),
    (lambda: Line, "object of type builtins.type"),
    (lambda: StructLine, "object of type"),
    (lambda: ModelLine, "object of type"),
    (lambda: print, "object of type builtins.builtin_function_or_method"),
    (lambda: (each for each in "ab"), "object of type builtins.generator"),
    (lambda: UserDict(a=1), "object of type collections.UserDict"),
    (lambda: 1j, "object of type builtins.complex"),
    (lambda: {(1, 2): 3}, "dict with a key of type tuple"),
    (circle, "itself"),
    (wide_circle, "itself"),
    (lambda: deep(101), "more than 100 containers"),
    (circle_of_models, "ValueError"),
    (incomplete, "AttributeError"),
    (lambda: 10**5000, "ValueError"),
    (lambda: dt.datetime.min.replace(tzinfo=EAST), "OverflowError"),
]


@pytest.mark.parametrize("make, problem", REFUSED)
def test_what_has_no_canonical_form_is_refused_with_the_way_out(make: Callable[[], object], problem: str) -> None:
    """The error names the argument and the type, says what to do, and does not hold the value."""
    with pytest.raises(InvalidKeyError, match="argument 'x'") as caught:
        fingerprint_of(make(), name="argument 'x' of shop.charge")
    assert problem in str(caught.value)
    assert "fingerprint=[...]" in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_refusal_never_shows_the_value() -> None:
    """What cannot be written may be a secret."""
    for secret in ({("s3cret",): 1}, [{"s3cret": Plain()}], deep(101)):
        with pytest.raises(InvalidKeyError) as caught:
            fingerprint_of(secret)
        assert "s3cret" not in str(caught.value)
        assert "bottom" not in str(caught.value)


def test_a_hundred_levels_and_a_value_met_twice_are_accepted() -> None:
    """Only a value inside itself is a circle; the same one side by side is not."""
    shared = {"a": 1}
    assert fingerprint_of([shared, shared]) == fingerprint_of([{"a": 1}, {"a": 1}])
    fingerprint_of(deep(100))


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.datetimes()
    | st.datetimes(timezones=st.timezones(), min_value=dt.datetime(2, 1, 1))  # noqa: DTZ001 - hypothesis asks for it
    | st.dates()
    | st.timedeltas()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(), inner)
        | st.dictionaries(st.integers(), inner)
        | st.frozensets(SCALARS)
    ),
    max_leaves=20,
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner) | st.dictionaries(st.integers(), inner)
    ),
    max_leaves=20,
)


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reordered(member) for key, member in reversed(value.items())}
    if isinstance(value, list):
        return tuple(reordered(member) for member in value)
    if isinstance(value, frozenset):
        return set(sorted(value, key=repr, reverse=True))  # noqa: C414 - put in by another order
    return value


@given(VALUES)
def test_order_of_dicts_and_sets_and_list_or_tuple_never_matter(value: object) -> None:
    """F19: the same data, built in another order, has the same fingerprint."""
    assert fingerprint_of(reordered(value)) == fingerprint_of(value)


@given(JSON_VALUES)
def test_a_trip_through_json_changes_nothing(value: object) -> None:
    """A call made directly and one that came through a JSON broker have one fingerprint."""
    assert fingerprint_of(json.loads(json.dumps(value))) == fingerprint_of(value)


def comparable(value: Any) -> object:
    """The value in a form whose == tells 1 from True, but neither from 1.0 nor a list from a tuple."""
    if isinstance(value, dict):
        return {str(key): comparable(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [comparable(member) for member in value]
    return (type(value) is bool, "nan" if value != value else value)  # noqa: PLR0124 - only NaN differs from itself


SMALL = st.recursive(
    st.sampled_from([None, True, False, 0, 1, 1.0, -0.0, math.nan, "", "0", "1", "null", '"', ","]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.tuples(inner)
        | st.dictionaries(st.sampled_from(["", "0", "1", ",", 2]), inner, max_size=2)
    ),
    max_leaves=4,
)


@given(SMALL, SMALL)
def test_equal_fingerprints_mean_equal_json(one: object, other: object) -> None:
    """Only equal data meets, and all of it does."""
    assert (fingerprint_of(one) == fingerprint_of(other)) == (comparable(one) == comparable(other))


def arguments(function: Callable[..., object]) -> ArgumentsFingerprint:
    return ArgumentsFingerprint("shop.charge", list(enumerate(inspect.signature(function).parameters.values())))


def test_the_fingerprint_of_a_call_is_that_of_a_dict_of_what_differs_from_the_defaults() -> None:
    """A handler that gains a parameter with a default keeps the fingerprints of messages under way."""

    def charge(order: str, é: int = 0, z: int = 0, *args: int, currency: str = "EUR", **more: int) -> None: ...  # noqa: PLC2401

    made = arguments(charge)
    assert made.of(["A", 0, 0, (), "EUR", {}], skip_first=False) == fingerprint_of({"order": "A"})
    assert made.of(["A", 1, 2, (3,), "USD", {"k": 4}], skip_first=False) == fingerprint_of(
        {"order": "A", "é": 1, "z": 2, "args": [3], "currency": "USD", "more": {"k": 4}}
    )
    assert made.of(["A", 0, 0, (), "EUR", {}], skip_first=True) == fingerprint_of({})


def test_a_default_needs_no_canonical_form() -> None:
    """Only what a caller passes is written."""

    def charge(order: str, gateway: object = print) -> None: ...

    made = arguments(charge)
    assert made.of(["A", print], skip_first=False) == fingerprint_of({"order": "A"})
    with pytest.raises(InvalidKeyError, match=r'argument "gateway" of shop\.charge'):
        made.of(["A", input], skip_first=False)


def test_the_frameworks_argument_is_left_out_of_args_too() -> None:
    """A handler that takes *args gets Celery's task as the first of them."""

    def charge(*args: object) -> None: ...

    made = arguments(charge)
    assert made.of([(object(), 1, 2)], skip_first=True) == fingerprint_of({"args": [1, 2]})
    assert made.of([(object(),)], skip_first=True) == fingerprint_of({})


def test_threads_do_not_disturb_one_another() -> None:
    """F26: nothing of a call is kept."""

    def charge(order: int, lines: list[dict[str, int]]) -> None: ...

    made = arguments(charge)
    wrong: list[int] = []
    expected = [fingerprint_of({"order": n, "lines": [{"n": n}]}) for n in range(4)]

    def work(n: int) -> None:
        wrong.extend(n for _ in range(500) if made.of([n, [{"n": n}]], skip_first=False) != expected[n])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
