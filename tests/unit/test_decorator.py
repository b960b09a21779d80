"""The decorator finds out what it decorates, keeps it as it was, and says at once what cannot work."""

from __future__ import annotations

import asyncio
import functools
import inspect
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.orm import Session, sessionmaker

import idem_tasks
from idem_tasks import (
    Idempotency,
    IdempotentFunction,
    MemoryStore,
    Policy,
    Store,
    TieredStore,
    config,
    configure,
    current_claim,
    hosts,
    idempotency_of,
    idempotent_task,
)
from idem_tasks.claims import State
from idem_tasks.errors import ConfigurationError, InvalidKeyError
from idem_tasks.stores.memory_marker import MemoryMarker

idem = Idempotency(store=MemoryStore(), observers=[])


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Empty records for each test."""
    store: Any = idem.store
    store._rows.clear()


def task(**options: Any) -> Callable[[Any], Any]:
    return idempotent_task(**{"key": "{order}", "scope": "s", "idempotency": idem, **options})


# What can be decorated.


def twice(call: Callable[[], Any], runs: list[Any]) -> Any:
    """Call twice, expect one run, and return the outcome."""
    first, second = call(), call()
    assert first == second
    assert len(runs) == 1
    return first


def test_functions_and_coroutine_functions() -> None:
    """Both run once, and each stays what it was."""
    runs: list[str] = []

    @task()
    def blocking(order: str) -> str:
        runs.append(order)
        return order

    @task()
    async def asynchronous(order: str) -> str:
        runs.append(order)
        return order

    assert not inspect.iscoroutinefunction(blocking)
    assert inspect.iscoroutinefunction(asynchronous)
    assert twice(lambda: blocking("A-1"), runs) == "A-1"
    runs.clear()
    assert twice(lambda: asyncio.run(asynchronous("B-2")), runs) == "B-2"


def test_methods() -> None:
    """A method is decorated in its class; `self` is no part of the fingerprint, and the key may look into it."""
    runs: list[Any] = []

    class Shop:
        def __init__(self, name: str) -> None:
            self.name = name

        @task(key="{self.name}/{order}")
        def charge(self, order: str) -> str:
            runs.append(order)
            return f"{self.name} {order}"

        @staticmethod
        @task()
        def fixed(order: str) -> str:
            runs.append(order)
            return order

        @classmethod
        @task()
        def made(cls, order: str) -> str:
            runs.append(order)
            return f"{cls.__name__} {order}"

        @task()
        async def charge_later(self, order: str) -> str:
            runs.append(order)
            return order

    assert twice(lambda: Shop("north").charge("A-1"), runs) == "north A-1"
    assert Shop("south").charge("A-1") == "south A-1"
    runs.clear()
    assert twice(lambda: Shop("north").fixed("B-2"), runs) == "B-2"
    assert Shop.fixed("B-2") == "B-2"
    runs.clear()
    assert twice(lambda: Shop.made("C-3"), runs) == "Shop C-3"
    runs.clear()
    assert twice(lambda: asyncio.run(Shop("x").charge_later("D-4")), runs) == "D-4"


@pytest.mark.parametrize("wrap", [staticmethod, classmethod])
def test_the_wrong_order_with_pythons_own_decorators_is_refused(wrap: Any) -> None:
    """Over @staticmethod the handler would be given an instance: the message says what goes where."""
    with pytest.raises(ConfigurationError, match=f"under @{wrap.__name__}"):
        task()(wrap(lambda order: order))


def test_partials_and_callable_objects() -> None:
    """What a partial or an object with `__call__` runs is found out, also whether it is awaited."""
    runs: list[Any] = []

    def charge(currency: str, order: str) -> str:
        runs.append(order)
        return f"{order} {currency}"

    async def charge_later(currency: str, order: str) -> str:
        runs.append(order)
        return f"{order} {currency}"

    class Charge:
        def __call__(self, order: str) -> str:
            runs.append(order)
            return order

    class ChargeLater:
        async def __call__(self, order: str) -> str:
            runs.append(order)
            return order

    partial = task()(functools.partial(charge, "EUR"))
    assert twice(lambda: partial("A-1"), runs) == "A-1 EUR"
    runs.clear()
    later = task()(functools.partial(functools.partial(charge_later), "EUR"))
    assert twice(lambda: asyncio.run(later("B-2")), runs) == "B-2 EUR"
    runs.clear()
    called = task()(Charge())
    assert twice(lambda: called("C-3"), runs) == "C-3"
    runs.clear()
    called_later = task()(ChargeLater())
    assert inspect.iscoroutinefunction(called_later)
    assert twice(lambda: asyncio.run(called_later("D-4")), runs) == "D-4"


def test_a_wrapped_coroutine_function_is_awaited() -> None:
    """A plain wrapper that returns the coroutine hides nothing: recorded is what it returns (F30)."""
    runs: list[Any] = []

    def logged(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    @task()
    @logged
    async def charge(order: str) -> str:
        runs.append(order)
        return order

    assert twice(lambda: asyncio.run(charge("A-1")), runs) == "A-1"


def test_a_wrapper_that_waits_itself_is_taken_at_its_word() -> None:
    """A wrapper that has run the coroutine returns a value: it is recorded, not awaited after the effect (F30)."""
    runs: list[Any] = []

    def finished(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            coroutine = function(*args, **kwargs)
            try:
                coroutine.send(None)
            except StopIteration as stop:
                return stop.value

        return wrapper

    @task()
    @finished
    async def charge(order: str) -> str:
        runs.append(order)
        return order

    assert twice(lambda: asyncio.run(charge("A-1")), runs) == "A-1"


def test_a_function_that_returns_a_coroutine_is_refused() -> None:
    """Nobody would await it: an error, nothing recorded, and no warning about a coroutine (F30)."""

    async def later(order: str) -> str:
        raise AssertionError("it ran")

    @task()
    def charge(order: str) -> Any:
        return later(order)

    for _ in range(2):
        with pytest.raises(ConfigurationError, match="returned a coroutine"):
            charge("A-1")
    record = idem.get("s", "A-1")
    assert record is not None
    assert record.state is State.RELEASED


def generator(order: str) -> Any:
    yield order


async def async_generator(order: str) -> Any:
    yield order


class GeneratorObject:
    def __call__(self, order: str) -> Any:
        yield order


@pytest.mark.parametrize(
    "handler",
    [generator, async_generator, functools.partial(generator), GeneratorObject()],
    ids=["generator", "async", "partial", "object"],
)
def test_generator_functions_are_refused(handler: Any) -> None:
    """Calling one runs nothing, so there is nothing to record (F30)."""
    with pytest.raises(ConfigurationError, match="generator function"):
        task()(handler)


@pytest.mark.parametrize("handler", [int, 5, None, "charge"], ids=str)
def test_what_is_no_function_is_refused(handler: Any) -> None:
    """Classes and data are no handlers."""
    with pytest.raises(ConfigurationError, match="decorates functions"):
        task()(handler)


def test_a_decorated_function_is_not_decorated_again() -> None:
    """The inner claim would find the outer one in progress for ever."""

    def charge(order: str) -> str:
        return order

    decorated = task()(charge)
    with pytest.raises(ConfigurationError, match="already"):
        task()(decorated)
    with pytest.raises(ConfigurationError, match="already"):
        task()(functools.wraps(decorated)(lambda order: f"{decorated(order)}"))


def test_the_function_keeps_its_face() -> None:
    """Name, module, text, signature, annotations and defaults are the handler's, and it can be pickled by name."""
    assert decorated_at_top.__name__ == "decorated_at_top"
    assert decorated_at_top.__module__ == __name__
    assert decorated_at_top.__doc__ == "Charge an order."
    assert (
        str(inspect.signature(decorated_at_top)) == "(order: 'str', /, amount: 'int' = 5, *, note: 'str' = '') -> 'str'"
    )
    assert pickle.loads(pickle.dumps(decorated_at_top)) is decorated_at_top
    with pytest.raises(TypeError, match="missing a required argument"):
        decorated_at_top()


@task()
def decorated_at_top(order: str, /, amount: int = 5, *, note: str = "") -> str:
    """Charge an order."""
    return f"{order} {amount} {note}"


def test_all_ways_to_pass_an_argument_are_one_call() -> None:
    """Positional, by keyword or by default: one key and one fingerprint."""
    runs: list[Any] = []

    @task()
    def charge(order: str, amount: int = 5) -> str:
        runs.append(order)
        return order

    assert [charge("A-1"), charge(order="A-1"), charge("A-1", 5), charge("A-1", amount=5)] == ["A-1"] * 4
    assert len(runs) == 1


# What is said at decoration.


@pytest.mark.parametrize(
    "options, words",
    [
        ({"key": "{oder}"}, "did you mean 'order'"),
        ({"key": "constant"}, "names no parameter"),
        ({"key": ""}, "empty"),
        ({"lease": -1}, "lease"),
        ({"leese": 60}, "unknown keyword: leese; it is no field of Policy"),
        ({"on_duplicate": "ignore"}, "on_duplicate"),
        ({"fingerprint": ["amunt"]}, "amunt"),
        ({"scope": "{nothing}"}, "nothing"),
        ({"safe_to_retry": ValueError}, "hold"),
    ],
    ids=str,
)
def test_what_cannot_work_is_said_at_decoration(options: dict[str, Any], words: str) -> None:
    """Names, fields and values are checked before the first message."""

    def charge(order: str, amount: int = 5) -> str:
        return order

    with pytest.raises(ConfigurationError, match=words):
        task(**options)(charge)


def test_a_store_of_the_other_runtime_is_refused_at_decoration() -> None:
    """Not a hang at the first call."""

    class BlockingOnly(MemoryStore):
        runtimes = frozenset({"blocking"})

    only = Idempotency(store=BlockingOnly())
    idempotent_task(key="{order}", idempotency=only)(lambda order: order)

    async def charge(order: str) -> str:
        return order

    with pytest.raises(ConfigurationError, match="serves blocking handlers only"):
        idempotent_task(key="{order}", idempotency=only)(charge)


def test_a_return_annotation_that_cannot_be_kept_is_said_at_decoration() -> None:
    """Unless no outcome is kept at all."""

    def charge(order: str) -> threading.Thread:
        raise AssertionError

    with pytest.raises(ConfigurationError, match="Thread"):
        task()(charge)
    assert task(on_duplicate="skip")(charge) is not None


# Policies and Idempotency.


def test_fields_stand_over_the_policy_over_the_default() -> None:
    """A field of the decorator wins over `policy=`, and that over the `Idempotency`'s."""
    base = Idempotency(store=MemoryStore(), policy=Policy(lease=10, retention=1000))
    plain = idempotent_task(key="{order}", idempotency=base)(lambda order: order)
    own = idempotent_task(key="{order}", idempotency=base, policy=Policy(lease=20), max_crashes=1)(lambda order: order)
    assert idempotency_of(plain).policy == Policy(lease=10, retention=1000)
    assert idempotency_of(own).policy == Policy(lease=20, max_crashes=1)


def test_the_default_is_looked_up_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that was decorated before `configure` uses what that made, and what the next one makes."""
    monkeypatch.setattr(config, "_default", None)

    @idempotent_task(key="{order}", scope="s")
    def charge(order: str) -> str:
        return order

    first = configure(store=MemoryStore(), lease=10)
    charge("A-1")
    assert idempotency_of(charge).idempotency is first
    assert idempotency_of(charge).policy.lease == 10
    assert first.get("s", "A-1") is not None
    second = configure(store=MemoryStore(), lease=20)
    assert second.get("s", "A-1") is None
    charge("A-1")
    assert second.get("s", "A-1") is not None
    assert idempotency_of(charge).policy.lease == 20


def test_scopes_may_be_made_of_arguments() -> None:
    """Two tenants do not share a key (F36)."""

    @task(scope="{tenant}/charge", fingerprint=None)
    def charge(tenant: str, order: str) -> str:
        return tenant

    assert [charge("a", "A-1"), charge("b", "A-1"), charge("a", "A-1")] == ["a", "b", "a"]
    assert idempotency_of(charge).scope_for("a", "A-1") == "a/charge"


def test_the_default_scope_is_the_functions_name() -> None:
    """Module and qualified name, so that two functions do not share a key (F36)."""

    @idempotent_task(key="{order}", idempotency=idem)
    def charge(order: str) -> str:
        return current_claim().scope

    assert charge("A-1").endswith("test_the_default_scope_is_the_functions_name.<locals>.charge")


@pytest.mark.parametrize("store", [MemoryStore(), TieredStore(MemoryMarker(), MemoryStore())])
def test_a_session_needs_records_in_sql(store: Store) -> None:
    """The first call says so, and the handler does not run: its writes and its outcome could not be one commit."""
    runs: list[str] = []

    @task(session=sessionmaker(), idempotency=Idempotency(store=store, observers=[]))
    def charge(order: str, session: Session) -> None:
        runs.append(order)

    with pytest.raises(ConfigurationError, match="session= needs records in SQL"):
        charge("A-1")
    assert runs == []


# idempotency_of.


def test_what_is_known_of_a_function() -> None:
    """Key, record, policy and the bare function; `forget` lets it run again."""
    runs: list[str] = []

    @task()
    def charge(order: str, amount: int = 5) -> str:
        runs.append(order)
        return order

    known = idempotency_of(charge)
    assert isinstance(known, IdempotentFunction)
    assert known is charge.idempotency
    assert known.key_for("A-1") == known.key_for(order="A-1", amount=7) == "A-1"
    assert known.lookup("A-1") is None
    assert known.forget("A-1") is False
    charge("A-1")
    found = known.lookup("A-1")
    assert found is not None
    assert found.state is State.COMPLETED
    assert known.function("A-1") == "A-1"
    assert known.forget("A-1") is True
    charge("A-1")
    assert runs == ["A-1"] * 3
    with pytest.raises(InvalidKeyError):
        known.key_for("")


def test_what_is_known_of_a_method() -> None:
    """Through the class and through an instance."""

    class Shop:
        @task()
        def charge(self, order: str) -> str:
            return order

    assert idempotency_of(Shop.charge) is idempotency_of(Shop().charge)
    assert idempotency_of(functools.wraps(Shop.charge)(lambda: None)) is idempotency_of(Shop.charge)


@pytest.mark.parametrize("thing", [print, 5, None, pytest.fixture], ids=["builtin", "int", "None", "function"])
def test_nothing_is_known_of_anything_else(thing: Any) -> None:
    """An error that says that it is not decorated."""
    with pytest.raises(ConfigurationError, match="not decorated"):
        idempotency_of(thing)


def test_threads_that_race_the_first_call_agree() -> None:
    """The first calls of one function on many threads resolve its policy without harm."""
    runs: list[str] = []
    barrier = threading.Barrier(16)

    @task()
    def charge(order: str) -> str:
        runs.append(order)
        return order

    def call(number: int) -> None:
        barrier.wait(30)
        charge(f"A-{number}")

    threads = [threading.Thread(target=call, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(runs) == sorted(f"A-{number}" for number in range(16))


def test_threads_that_race_an_integration_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery imported after the decorators: no first call on any thread runs without its host, or fails."""
    both, errors = threading.Barrier(2), []
    monkeypatch.setattr(hosts, "_INTEGRATIONS", {"json": "an.integration"})
    monkeypatch.setattr("importlib.import_module", lambda _: both.wait(30))

    def find() -> None:
        try:
            hosts.find(print)
        except Exception as error:  # noqa: BLE001 - whatever it is
            errors.append(error)

    threads = [threading.Thread(target=find) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert hosts._INTEGRATIONS == {}


def test_the_public_names_are_there() -> None:
    """Everything in `__all__` can be had."""
    for name in idem_tasks.__all__:
        assert getattr(idem_tasks, name) is not None
    with pytest.raises(AttributeError):
        _ = idem_tasks.nothing
