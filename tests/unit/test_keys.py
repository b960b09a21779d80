"""A call's key, scope and fingerprint are taken at its entry, are stable, and never meet another call's."""

# ruff: noqa: ARG003, ARG005 - callables for a key take all of the handler's arguments, and use some

from __future__ import annotations

import datetime as dt
import enum
import functools
import hashlib
import inspect
import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given, strategies as st

from idem_tasks.errors import ConfigurationError, InvalidKeyError
from idem_tasks.keys import (
    KEY_MAX_BYTES,
    SCOPE_MAX_BYTES,
    CallKey,
    KeyPlan,
    _Binder,
    check_key,
    check_scope,
    fingerprint_of,
    scope_of,
)

EAST = dt.timezone(dt.timedelta(hours=2))


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Unset(enum.Enum):
    NOTHING = None


class Text(str):  # noqa: SLOT000 - as users write them
    def __str__(self) -> str:
        return "something else"


@dataclass
class Order:
    id: object
    tenant: str = "acme"


def charge(order_id: object, amount: int = 5, *args: object, currency: str = "EUR", **kwargs: object) -> None:
    raise AssertionError("the handler must not run")


def ship(order: object, tenant: object = "acme") -> None:
    raise AssertionError("the handler must not run")


class Shop:
    name = "north"

    def charge(self, order_id: str, session: object = None) -> None:
        raise AssertionError("the handler must not run")

    @classmethod
    def refund(cls, order_id: str) -> None:
        raise AssertionError("the handler must not run")


def key_of(handler: Callable[..., object], key: Any, *args: object, **kwargs: object) -> str:
    return KeyPlan(handler, key=key, scope="s", fingerprint=None).of(args, kwargs).key


# The template


@pytest.mark.parametrize(
    "template, args, kwargs, key",
    [
        ("{order_id}", ("A-1",), {}, "A-1"),
        ("{order_id}", (), {"order_id": "A-1"}, "A-1"),
        ("order {order_id}!", ("A-1",), {}, "order A-1!"),
        ("{{{order_id}}}", ("A-1",), {}, "{A-1}"),
        ("{order_id}:{amount}:{currency}", ("A",), {}, "A:5:EUR"),
        ("{order_id}:{currency}", ("A",), {"currency": "USD"}, "A:USD"),
        ("{args[0]}", ("A", 1, "first", "second"), {}, "first"),
        ("{args[1]}", ("A", 1, "first", "second"), {}, "second"),
        ("{kwargs[message_id]}", ("A",), {"message_id": "m"}, "m"),
        ("{order_id.id}", (Order(7),), {}, "7"),
        ("{order_id.id.hex}", (Order(UUID(int=10)),), {}, "0" * 31 + "a"),
        ("{order_id[id]}", ({"id": "x"},), {}, "x"),
        ("{order_id[_id]}", ({"_id": "x"},), {}, "x"),
        ("{order_id[detail type]}", ({"detail type": "x"},), {}, "x"),
        ("{order_id[a:b]}", ({"a:b": "x"},), {}, "x"),
        ("{order_id[items][0][sku]}", ({"items": [{"sku": "x"}]},), {}, "x"),
        ("{order_id[0].id}", ([Order("x")],), {}, "x"),
        ("{order_id[0]}", ({0: "x"},), {}, "x"),
    ],
)
def test_a_template_takes_the_handlers_arguments(
    template: str, args: tuple[object, ...], kwargs: dict[str, object], key: str
) -> None:
    """Positional, keyword and default arguments, attributes and items all work."""
    assert key_of(charge, template, *args, **kwargs) == key


@pytest.mark.parametrize(
    "value, key",
    [
        ("A-1", "A-1"),
        (" A ", " A "),
        ("café", "café"),
        ("cafe\N{COMBINING ACUTE ACCENT}", "cafe\N{COMBINING ACUTE ACCENT}"),
        (Text("A"), "A"),
        (0, "0"),
        (-12, "-12"),
        (Colour.RED, "red"),
        (Level.HIGH, "3"),
        (UUID("12345678-1234-5678-1234-567812345678"), "12345678-1234-5678-1234-567812345678"),
        (Decimal("1.0"), "1"),
        (Decimal("1.00"), "1"),
        (Decimal("1E+3"), "1000"),
        (Decimal("-0.50"), "-0.5"),
        (Decimal("0E-7"), "0"),
        (Decimal("1E+1000"), "1E+1000"),
        (dt.date(2024, 2, 29), "2024-02-29"),
        (dt.datetime(2024, 2, 29, 12), "2024-02-29T12:00:00"),  # noqa: DTZ001 - naive: as it is
        (dt.datetime(2024, 2, 29, 12, tzinfo=dt.UTC), "2024-02-29T12:00:00+00:00"),
        (dt.datetime(2024, 2, 29, 14, tzinfo=EAST), "2024-02-29T12:00:00+00:00"),
        (b"A-1", "A-1"),
        ("caf\xe9".encode(), "café"),
    ],
)
def test_accepted_values_have_one_stable_text(value: object, key: str) -> None:
    """F19: equal values are one key, and a broker that turns an int into a str changes nothing."""
    assert key_of(charge, "{order_id}", value) == key
    assert key_of(charge, lambda order_id: order_id, value) == key
    assert check_key(value) == key


@pytest.mark.parametrize(
    "value, problem",
    [
        (None, "is None"),
        (Unset.NOTHING, "is None"),
        ("", "is empty"),
        (b"", "is empty"),
        (" \t\n", "is blank"),
        ("\N{NO-BREAK SPACE}", "is blank"),
        (True, "is of type bool"),
        (1.5, "is of type float"),
        (Decimal("NaN"), "is of type Decimal"),
        (["secret"], "is of type list"),
        (("secret",), "is of type tuple"),
        ({"secret": 1}, "is of type dict"),
        (Order("secret"), "is of type Order"),
        (object(), "is of type object"),
        (dt.time(1), "is of type time"),
        (b"secret\xff", "bytes raised UnicodeDecodeError"),
        pytest.param(10**5000, "int raised ValueError", id="5,000 digits"),
        (dt.datetime.min.replace(tzinfo=EAST), "datetime raised OverflowError"),
        ("secret\0", "NUL"),
        ("secret\ud800", "surrogate"),
    ],
)
def test_what_cannot_be_a_key_is_refused(value: object, problem: str) -> None:
    """F29, F52: an error before anything ran, that names the field and never the value."""
    makers: list[Callable[[], str]] = [
        lambda: key_of(charge, "order-{order_id}", value),
        lambda: key_of(charge, lambda order_id: order_id, value),
        lambda: check_key(value),
        lambda: check_scope(value),
    ]
    for make in makers:
        with pytest.raises(InvalidKeyError, match=problem) as caught:
            make()
        assert "secret" not in str(caught.value)
    if problem.startswith("is "):
        with pytest.raises(InvalidKeyError, match=rf"{{order_id}} in the key of \S+\.charge {problem}"):
            key_of(charge, "order-{order_id}", value)


def test_a_refused_type_comes_with_the_way_out() -> None:
    """The error says what to write instead."""
    with pytest.raises(InvalidKeyError, match=re.escape('"{order.id}"')):
        key_of(ship, "{order}", Order(1))


@pytest.mark.parametrize(
    "template, problem",
    [
        ("{order.number}", "{order.number} in the key of %s is missing: Order has no 'number'"),
        ("{order.id.number}", "{order.id.number} in the key of %s is missing: str has no 'number'"),
        ("{order[id]}", "{order[id]} in the key of %s is missing: Order has no 'id'"),
        ("{order.id[99]}", "{order.id[99]} in the key of %s is missing: str has no 99"),
    ],
)
def test_a_missing_part_is_named(template: str, problem: str) -> None:
    """F29: never an unprotected run."""
    with pytest.raises(InvalidKeyError) as caught:
        key_of(ship, template, Order("secret"))
    assert str(caught.value) == problem % scope_of(ship)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("missing", [{}, {"id": None}, {"id": ""}, {"other": 1}])
def test_an_event_without_its_id_never_runs(missing: dict[str, object]) -> None:
    """F29: a missing item, None and an empty text are all no key."""
    with pytest.raises(InvalidKeyError, match=re.escape("{order[id]} in the key of")):
        key_of(ship, "prefix-{order[id]}", missing)


@pytest.mark.parametrize(
    "template, problem",
    [
        ("{ordr}", "'ordr' is not a parameter; known: order, tenant; did you mean 'order'?"),
        ("{x}", "'x' is not a parameter; known: order, tenant"),
        ("{}", "{} is not a parameter"),
        ("{0}", "{0} is not a parameter"),
        ("{order.}", "{order.} is not a parameter"),
        ("{order[]}", "{order[]} is not a parameter"),
        ("{order id}", "{order id} is not a parameter"),
        ("{order", "expected '}' before end of string"),
        ("order}", "Single '}' encountered"),
        ("{order:>5}", "no format and no conversion"),
        ("{order!r}", "no format and no conversion"),
        ("{order:{tenant}}", "no format and no conversion"),
        ("{order.__class__}", "{order.__class__} looks into a private attribute"),
        ("{order.id._secret}", "private"),
        ("order", "names no parameter, so all its messages would be one"),
        ("{{order}}", "names no parameter, so all its messages would be one"),
        ("", "it is empty"),
        ("  ", "it is empty"),
        ("{order}\0", "NUL"),
        ("{order}\ud800", "surrogate"),
        ("{order}{tenant}", "behind {order} a separator is needed"),
        ("{order}0{tenant}", "behind {order} a separator is needed"),
        ("{order}%{tenant}", "behind {order} a separator is needed"),
        (None, "must be a template or a callable that is not async, not NoneType"),
        (7, "must be a template or a callable that is not async, not int"),
    ],
)
def test_a_template_that_cannot_work_is_refused_at_decoration(template: Any, problem: str) -> None:
    """Names and forms are checked before the first message."""
    with pytest.raises(ConfigurationError) as caught:
        KeyPlan(ship, key=template)
    assert problem in str(caught.value)
    assert scope_of(ship) in str(caught.value)


def test_an_async_callable_is_refused_at_decoration() -> None:
    """Its coroutine would never be awaited."""

    async def key(order: str) -> str:
        return order

    wrongs: tuple[dict[str, Any], ...] = (
        {"key": key},
        {"key": "{order}", "scope": key},
        {"key": "{order}", "fingerprint": key},
    )
    for wrong in wrongs:
        with pytest.raises(ConfigurationError, match="not async"):
            KeyPlan(ship, **wrong)


def test_a_handler_without_parameters_that_can_be_found_out_is_refused() -> None:
    """Some built-in functions tell nothing about themselves."""
    with pytest.raises(ConfigurationError, match=r"the parameters of builtins\.\w+ cannot be found out"):
        KeyPlan(iter, key="{order}")


# Two fields


@pytest.mark.parametrize(
    "template, order, tenant, key",
    [
        ("{tenant}-{order}", "c", "a-b", "a%2Db-c"),
        ("{tenant}-{order}", "b-c", "a", "a-b-c"),
        ("{tenant}-{order}", "b%2Dc", "50%", "50%25-b%2Dc"),
        ("{tenant}::{order}", "b", "a:", "a%3A::b"),
        ("{tenant}─{order}", "b", "a─%", "a%E2%94%80%25─b"),
        ("<{tenant}>", "b", "a>%", "<a>%>"),
    ],
)
def test_a_separator_within_a_field_is_escaped(template: str, order: str, tenant: str, key: str) -> None:
    """F36: only where another field follows, and readable."""
    assert key_of(ship, template, order, tenant) == key


WORDS = st.text("ab-%:25─", min_size=1, max_size=4)


@given(st.sampled_from(["-", "--", ":", "a", "-a", "─", "│:"]), WORDS, WORDS, WORDS, WORDS)
@example("-", "x-y", "z", "x", "y-z")
def test_two_fields_never_run_into_one_another(between: str, one: str, two: str, three: str, four: str) -> None:
    """F36: two tenants never share a key, whatever is in their names."""
    plan = KeyPlan(ship, key=f"{{order}}{between}{{tenant}}", scope="s", fingerprint=None)
    same = plan.of((one, two), {}).key == plan.of((three, four), {}).key
    assert same == ((one, two) == (three, four))


# The column


@pytest.mark.parametrize("check, limit", [(check_key, KEY_MAX_BYTES), (check_scope, SCOPE_MAX_BYTES)])
def test_what_is_longer_than_its_column_is_kept_as_head_and_hash(check: Callable[..., str], limit: int) -> None:
    """F52, F35: counted in bytes; cut between characters; nothing that is cut meets another."""
    assert check("x" * limit) == "x" * limit
    assert check("é" * (limit // 2)) == "é" * (limit // 2)
    long = "é" * limit
    assert check(long) == "é" * ((limit - 72) // 2) + "~sha256:" + hashlib.sha256(long.encode()).hexdigest()
    assert check(long) != check(long + "x")
    assert len(check("x" * (limit + 1)).encode()) == limit


def test_a_given_key_never_equals_a_hashed_one() -> None:
    """A caller who sends the stored form of another's long key gets a key of its own."""
    stored = check_key("x" * 1000)
    assert check_key(stored) != stored
    assert check_key("~sha256:" + "z" * 64) != "~sha256:" + "z" * 64
    assert check_key("~sha256:" + "z" * 65) == "~sha256:" + "z" * 65
    assert check_key("~sha256:" + "z" * 63) == "~sha256:" + "z" * 63


def test_a_stored_key_is_found_as_it_is_shown() -> None:
    """A person copies a key from a listing."""
    for given_key in ("A-1", "x" * 1000, check_key("x" * 1000)):
        assert check_key(check_key(given_key), stored=True) == check_key(given_key)
        assert check_scope(check_scope(given_key), stored=True) == check_scope(given_key)


KEYS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(str.strip)
LONG_KEYS = st.builds(lambda text, times: text * times, KEYS, st.sampled_from([1, 50, 300])) | st.builds(
    lambda text: check_key(text * 300), KEYS
)


@given(LONG_KEYS, LONG_KEYS)
def test_distinct_keys_stay_distinct_and_fit(one: str, other: str) -> None:
    """F52: of any length, also keys that look like hashed ones."""
    assert (check_key(one) == check_key(other)) == (one == other)
    assert (check_scope(one) == check_scope(other)) == (one == other)
    assert len(check_key(one).encode()) <= KEY_MAX_BYTES
    assert len(check_scope(one).encode()) <= SCOPE_MAX_BYTES
    assert check_key(one)[:40] == one[:40] or len(one.encode()) > KEY_MAX_BYTES


# The scope


def test_the_scope_is_a_constant_a_template_a_callable_or_the_default() -> None:
    """F36: what is given to the handler goes first, then the caller's default, then module and name."""

    def scope(scope: Any, **default: Any) -> str:
        return KeyPlan(ship, key="{order}", scope=scope, fingerprint=None).of(("A", "eu/1"), {}, **default).scope

    assert scope("billing") == "billing"
    assert scope("{tenant}/ship", default_scope="ignored") == "eu/1/ship"
    assert scope(lambda order, tenant: f"{tenant}!") == "eu/1!"
    assert scope(None, default_scope="shop.tasks.ship") == "shop.tasks.ship"
    assert scope(None) == f"{__name__}.ship"


@pytest.mark.parametrize("wrong", ["", " ", "{nobody}/ship", "{tenant", 7])
def test_a_scope_that_cannot_work_is_refused_at_decoration(wrong: Any) -> None:
    """As a key is."""
    with pytest.raises(ConfigurationError, match="the scope of"):
        KeyPlan(ship, key="{order}", scope=wrong)


def test_a_call_without_a_scope_is_refused() -> None:
    """F36: never one scope for all tenants by accident."""
    with pytest.raises(InvalidKeyError, match=re.escape("{tenant} in the scope of")):
        KeyPlan(ship, key="{order}", scope="{tenant}").of(("A", None), {})
    with pytest.raises(InvalidKeyError, match="what the scope callable of"):
        KeyPlan(ship, key="{order}", scope=lambda order, tenant: tenant).of(("A", None), {})
    with pytest.raises(InvalidKeyError, match="the scope is empty"):
        KeyPlan(ship, key="{order}").of(("A",), {}, default_scope="")


def test_the_default_scope_names_what_people_wrote() -> None:
    """Functions, methods, partials and callable objects."""

    class Callable_:  # noqa: N801
        def __call__(self, order: str) -> None: ...

    assert scope_of(charge) == f"{__name__}.charge"
    assert scope_of(Shop.charge) == scope_of(Shop().charge) == f"{__name__}.Shop.charge"
    assert scope_of(functools.partial(functools.partial(charge, 1), 2)) == f"{__name__}.charge"
    assert scope_of(Callable_()).endswith("names_what_people_wrote.<locals>.Callable_")
    assert scope_of(lambda: 1) == scope_of(lambda: 2)


def test_a_scripts_scope_does_not_depend_on_how_it_is_started(tmp_path: Path) -> None:
    """F36: two scripts with a handler of one name do not answer for each other."""
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "worker.py").write_text(
        "from idem_tasks.keys import scope_of\ndef handle(): ...\n"
        "def tell(_): return scope_of(handle)\n"
        "if __name__ == '__main__':\n"
        "    import multiprocessing\n"
        "    print(scope_of(handle), multiprocessing.get_context('spawn').Pool(1).map(tell, [0])[0])\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{tmp_path}"}

    def run(*arguments: str) -> list[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
        ).stdout.split()

    assert run("-m", "shop.worker") == ["shop.worker.handle"] * 2
    assert run("-c", "from shop.worker import tell; print(tell(0))") == ["shop.worker.handle"]
    assert run("shop/worker.py") == ["worker.handle"] * 2
    assert run("-c", "from idem_tasks.keys import *\ndef handle(): ...\nprint(scope_of(handle))") == ["__main__.handle"]


# The call


def test_the_call_key_is_frozen() -> None:
    """F18: what a handler does to its arguments afterwards changes nothing."""
    lines = [{"sku": "a"}]
    plan = KeyPlan(ship, key="{order[0][sku]}")
    call = plan.of((lines,), {})
    lines[0]["sku"] = "b"
    assert call == CallKey(f"{__name__}.ship", "a", fingerprint_of({"order": [{"sku": "a"}]}))
    with pytest.raises(AttributeError):
        call.key = "b"  # type: ignore[misc]


def test_the_form_of_a_call_never_matters() -> None:
    """F19: positional, keyword and default arguments are one call."""
    plan = KeyPlan(charge, key="{order_id}")
    calls = [
        plan.of(("A",), {}),
        plan.of((), {"order_id": "A"}),
        plan.of(("A", 5), {}),
        plan.of(("A",), {"amount": 5, "currency": "EUR"}),
        plan.of((), {"currency": "EUR", "amount": 5, "order_id": "A"}),
    ]
    assert len(set(calls)) == 1
    assert plan.of(("A", 6), {}).fingerprint != calls[0].fingerprint


@given(st.lists(st.integers(), min_size=1, max_size=3), st.integers(0, 3), st.randoms())
def test_the_binding_form_never_matters(values: list[int], positional: int, random: Any) -> None:
    """F19: any split into positional and keyword arguments, in any order, is one call."""

    def handler(a: int, b: int = 2, c: int = 3) -> None: ...

    plan = KeyPlan(handler, key="{a}:{b}:{c}")
    keywords = list(zip("abc", values, strict=False))[positional:]
    random.shuffle(keywords)
    full = dict(zip("abc", [*values, *(2, 3)[len(values) - 1 :]], strict=True))
    assert plan.of(tuple(values[:positional]), dict(keywords)) == plan.of((), full)


@pytest.mark.parametrize(
    "args, kwargs",
    [
        ((), {}),
        (("A",), {"order_id": "B"}),
        (("A",), {"currency": 1, "self": 2}),
        (("A",), {"b": 1}),
        (("A", 2, 3), {}),
    ],
)
def test_wrong_arguments_are_a_type_error(args: Any, kwargs: Any) -> None:
    """As calling the handler is, before anything ran; it names the handler. Also with a callable for a key."""

    def handler(order_id: str, amount: int = 1, *, currency: str) -> None: ...

    with pytest.raises(TypeError):
        handler(*args, **kwargs)
    for key in ("{order_id}", lambda *args, **kwargs: "k"):
        with pytest.raises(TypeError, match=r"handler\(\): "):
            KeyPlan(handler, key=key).of(args, kwargs)


def every_kind(a: Any, b: Any = 2, /, c: Any = 3, *args: Any, d: Any, e: Any = 5, **kw: Any) -> Any: ...
def positional_only(a: Any, b: Any = 2, /, c: Any = 3) -> Any: ...
def keyword_only(a: Any, *, b: Any, c: Any = 3) -> Any: ...
def plain(a: Any, b: Any = 2, c: Any = None) -> Any: ...
def nothing() -> Any: ...


@pytest.mark.parametrize("handler", [every_kind, positional_only, keyword_only, plain, nothing])
def test_a_call_is_bound_as_python_binds_it(handler: Any) -> None:
    """Every way to give up to four positional and any keyword arguments, right or wrong."""
    bind = _Binder("handler", inspect.signature(handler)).bind
    for count, names in itertools.product(range(5), range(64)):
        args = tuple(range(10, 10 + count))
        kwargs = {name: name for bit, name in enumerate("abcdex") if names >> bit & 1}
        try:
            expected = inspect.signature(handler).bind(*args, **kwargs)
        except TypeError:
            with pytest.raises(TypeError):
                bind(args, kwargs)
        else:
            expected.apply_defaults()
            assert list(bind(args, kwargs)) == list(expected.arguments.values())


def test_an_argument_may_be_what_stands_for_none() -> None:
    """`inspect.Parameter.empty` given as an argument is an argument."""
    assert _Binder("plain", inspect.signature(plain)).bind((inspect.Parameter.empty,), {})[0] is inspect.Parameter.empty


def test_partials_wrapped_functions_and_callable_objects_are_bound_by_their_signature() -> None:
    """Whatever `inspect.signature` says counts."""

    @functools.wraps(ship)
    def wrapped(*args: Any, **kwargs: Any) -> None: ...

    class Handler:
        def __call__(self, order: str) -> None: ...

    assert key_of(wrapped, "{order}", "A") == "A"
    assert key_of(Handler(), "{order}", "A") == "A"
    assert key_of(functools.partial(ship, tenant="t"), "{order}:{tenant}", "A") == "A:t"
    assert key_of(Shop().charge, "{order_id}", "A") == "A"
    assert key_of(Shop.refund, "{order_id}", "A") == "A"


def test_a_callable_gets_the_same_arguments() -> None:
    """As they were given: positional ones by position, keywords by name."""
    seen: list[object] = []

    def key(*args: object, **kwargs: object) -> str:
        seen.append((args, kwargs))
        return "k"

    plan = KeyPlan(ship, key=key, scope=key, fingerprint=key)
    assert plan.of(("A",), {"tenant": "t"}) == CallKey("k", "k", fingerprint_of("k"))
    assert seen == [(("A",), {"tenant": "t"})] * 3


def test_celerys_task_is_not_the_messages() -> None:
    """Under bind=True the first argument goes to templates only."""

    def handler(task: Any, order_id: str, amount: int = 1) -> None: ...

    task = SimpleNamespace(request=SimpleNamespace(id="id-1"))
    plan = KeyPlan(handler, key=lambda order_id, **kwargs: order_id, scope=lambda order_id, **kwargs: "s")
    call = plan.of((task, "A"), {"amount": 2}, framework_argument=True)
    assert call == CallKey("s", "A", fingerprint_of({"order_id": "A", "amount": 2}))
    by_id = KeyPlan(handler, key="{task.request.id}", fingerprint=lambda order_id: order_id)
    assert by_id.of((task, "A"), {}, framework_argument=True).key == "id-1"
    assert by_id.of((task, "A"), {}, framework_argument=True).fingerprint == fingerprint_of("A")


def test_a_methods_self_and_a_session_are_no_part_of_the_fingerprint() -> None:
    """What differs between two deliveries of one message is left out; a template may use it."""
    plan = KeyPlan(Shop.charge, key="{self.name}/{order_id}")
    call = plan.of((Shop(), "A"), {"session": object()})
    assert (call.key, call.fingerprint) == ("north/A", fingerprint_of({"order_id": "A"}))

    def second(order_id: str, self: str) -> None: ...

    assert KeyPlan(second, key="{order_id}").of(("A", "B"), {}).fingerprint != call.fingerprint
    function: Any = vars(Shop)["refund"].__func__
    assert KeyPlan(function, key="{order_id}").of((Shop, "A"), {}).fingerprint == call.fingerprint


def test_the_fingerprint_is_what_was_chosen() -> None:
    """Names in any order, a callable, or nothing."""

    def fingerprint(chosen: Any, *args: object) -> str | None:
        return KeyPlan(ship, key="{order}", fingerprint=chosen).of(args, {}).fingerprint

    assert fingerprint(["tenant", "order"], 1, 2) == fingerprint("arguments", 1, 2)
    assert fingerprint(("order", "tenant", "order"), 1, 2) == fingerprint("arguments", 1, 2)
    assert fingerprint(["order"], 1, 2) == fingerprint(["order"], 1, object()) == fingerprint_of({"order": 1})
    assert fingerprint(lambda order, tenant: [order], 1, 2) == fingerprint_of([1])
    assert fingerprint(None, 1, object()) is None


@pytest.mark.parametrize(
    "wrong, problem",
    [
        (["ordr"], "cannot have 'ordr'; known: order_id; did you mean 'order_id'?"),
        (["self"], "cannot have 'self'; known: order_id"),
        (["session"], "cannot have 'session'; known: order_id"),
        ([1], "cannot have 1; known: order_id"),
        ([], "names no parameter; for no check it is None"),
        ("order_id", 'must be "arguments", a list of parameter names or a callable that is not async, not str'),
        (7, "not int"),
    ],
)
def test_a_fingerprint_that_cannot_work_is_refused_at_decoration(wrong: Any, problem: str) -> None:
    """Names are checked before the first message."""
    with pytest.raises(ConfigurationError) as caught:
        KeyPlan(Shop.charge, key="{order_id}", fingerprint=wrong)
    assert problem in str(caught.value)


def test_an_argument_without_a_canonical_form_is_named() -> None:
    """Before any effect, with the way out."""
    with pytest.raises(InvalidKeyError, match=r'argument "tenant" of \S+\.ship contains an object of type') as caught:
        KeyPlan(ship, key="{order}").of(("A", object()), {})
    assert "fingerprint=[...]" in str(caught.value)
    with pytest.raises(InvalidKeyError, match="what the fingerprint callable of"):
        KeyPlan(ship, key="{order}", fingerprint=lambda order: object()).of(("A",), {})


def test_an_error_of_a_callable_is_its_own() -> None:
    """It is a fault in the user's code, shown as such."""

    def key(order: str) -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        key_of(ship, key, "A")


def test_one_plan_serves_many_threads() -> None:
    """F26: nothing of a call is kept."""
    plan = KeyPlan(ship, key="{tenant}/{order}")
    wrong: list[int] = []

    def work(n: int) -> None:
        wrong.extend(n for _ in range(500) if plan.of((n,), {"tenant": f"t{n}"}).key != f"t{n}/{n}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
