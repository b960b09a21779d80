"""`Idempotency` runs handlers by hand, shows records, and closes what it opened."""

from __future__ import annotations

import asyncio
import decimal
import gc
import os
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import pytest

from idem_tasks import Idempotency, MemoryStore, Policy, current_claim
from idem_tasks.claims import State
from idem_tasks.errors import (
    ConfigurationError,
    ConflictError,
    FingerprintMismatchError,
    InDoubtError,
    InProgressError,
    InvalidKeyError,
    OutcomeError,
    StoreUnavailableError,
)
from idem_tasks.stores import _marker_prefix
from idem_tasks.stores.base import RuntimeName
from tests.unit.scripted import SCOPE, World, away, world_on


@pytest.fixture(params=["blocking", "asyncio"])
def world(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[World]:
    with world_on(monkeypatch, cast(RuntimeName, request.param), 2) as world:
        yield world


def run(world: World, handler: Any, *args: Any, **options: Any) -> Any:
    """`run` or `arun`, with a plain function either way."""
    options = {"scope": SCOPE, "key": "A-1", **options}
    if world.runtime == "blocking":
        return world.idem.run(handler, *args, **options)

    async def awaited(*args: Any, **kwargs: Any) -> Any:
        return handler(*args, **kwargs)

    return world.driver(world.idem.arun(awaited, *args, **options))


# Handlers.


def test_a_handler_is_run_once(world: World) -> None:
    """For its scope and key, with its arguments as the fingerprint."""
    runs: list[Any] = []

    def handler(payload: dict[str, Any], *, note: str = "") -> str:
        runs.append((payload, note, current_claim().key))
        return "done"

    for _ in range(2):
        assert run(world, handler, {"id": 1}, note="n") == "done"
    assert runs == [({"id": 1}, "n", "A-1")]
    with pytest.raises(FingerprintMismatchError):
        run(world, handler, {"id": 2}, note="n")
    assert run(world, handler, {"id": 2}, fingerprint=None) == "done"


def test_a_fingerprint_of_ones_own(world: World) -> None:
    """Whatever has to be the same when the key is."""
    assert run(world, str, "a", fingerprint="x") == "a"
    assert run(world, str, "b", fingerprint="x") == "a"
    with pytest.raises(FingerprintMismatchError):
        run(world, str, "a", fingerprint="y")


def test_keys_and_scopes_are_checked(world: World) -> None:
    """None, empty, or with a NUL: nothing runs (F29, F52). Numbers are keys too."""
    for key in (None, "", "a\0b"):
        with pytest.raises(InvalidKeyError):
            run(world, str, "a", key=key)
    with pytest.raises(InvalidKeyError):
        run(world, str, "a", scope="")
    assert run(world, str, "a", key=17) == "a"
    assert world.state("17") is State.COMPLETED


def test_a_policy_of_ones_own(world: World) -> None:
    """`policy=` stands in the place of the object's; shadow holds here too."""
    assert run(world, str, "a", policy=Policy(on_duplicate="skip")) == "a"
    assert run(world, str, "a", policy=Policy(on_duplicate="skip")) is None
    assert run(world, str, "b", policy=Policy(shadow=True)) == "b"
    assert run(world, str, "b", key=None, policy=Policy(shadow=True)) == "b"
    assert run(world, str, "b", key=None, policy=Policy(enabled=False)) == "b"


def test_a_handler_that_stops_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` raises what the handler raised."""
    with world_on(monkeypatch, "blocking", 1) as world, pytest.raises(StopIteration):
        run(world, next, iter([]), fingerprint=None)


def test_a_handlers_return_type_is_known(world: World) -> None:
    """An outcome of a class comes back as that class, for functions, methods and callables that cannot be hashed."""

    class Handler:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self) -> decimal.Decimal:
            return decimal.Decimal("1.0")

        def method(self) -> decimal.Decimal:
            return decimal.Decimal("2.0")

    for number, handler in enumerate((Handler(), Handler().method)):
        for _ in range(2):
            assert run(world, handler, key=f"A-{number}") == decimal.Decimal(number + 1)


def test_a_closure_that_was_run_is_not_kept() -> None:
    """`run` is given lambdas that hold whole messages: they are freed with their caller."""
    idem = Idempotency(store=MemoryStore(), observers=[])

    class Message:
        pass

    message = Message()
    held = weakref.ref(message)
    idem.run(lambda message=message: str(type(message)), scope="s", key="A-1")
    del message
    gc.collect()
    assert held() is None


# For people.


def test_a_record_can_be_looked_at_and_forgotten(world: World) -> None:
    """`get` shows it, `forget` deletes it once, also its marker."""
    idem = world.idem
    assert get(world) is None
    run(world, str, "a")
    assert get(world).state is State.COMPLETED
    forget = idem.forget if world.runtime == "blocking" else idem.aforget
    assert world.drive(forget, SCOPE, "A-1") is True
    assert world.marker_of() is None
    assert world.drive(forget, SCOPE, "A-1") is False
    assert run(world, str, "b") == "b"


def get(world: World) -> Any:
    return world.drive(world.idem.get if world.runtime == "blocking" else world.idem.aget, SCOPE, "A-1")


def resolve(world: World, **how: Any) -> Any:
    return world.drive(world.idem.resolve if world.runtime == "blocking" else world.idem.aresolve, SCOPE, "A-1", **how)


def in_doubt(world: World) -> None:
    def handler() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        run(world, handler, policy=Policy(on_crash="hold"))


def test_a_doubt_is_resolved_by_an_outcome(world: World) -> None:
    """Also by one that is None (F28): it is what all later deliveries get."""
    for outcome in ("it happened", None):
        world.real._rows.clear()
        in_doubt(world)
        with pytest.raises(InDoubtError):
            run(world, lambda: pytest.fail("it ran"))
        assert resolve(world, outcome=outcome).state is State.COMPLETED
        assert run(world, lambda: pytest.fail("it ran")) == outcome
        world.pass_time(1)
        world.drive(world.idem.forget if world.runtime == "blocking" else world.idem.aforget, SCOPE, "A-1")


@dataclass
class Receipt:
    number: int


def charge() -> Receipt:
    raise TimeoutError


async def acharge() -> Receipt:
    raise TimeoutError


def test_an_outcome_with_a_class_is_resolved_under_its_type(world: World) -> None:
    """It is kept as the handler's own return type would keep it, and duplicates get the class; the error names it."""
    idem = world.idem

    def deliver() -> Receipt:
        options: dict[str, Any] = {"scope": SCOPE, "key": "A-1", "policy": Policy(on_crash="hold")}
        if world.runtime == "blocking":
            return idem.run(charge, **options)
        found: Receipt = world.driver(idem.arun(acharge, **options))
        return found

    with pytest.raises(TimeoutError):
        deliver()
    with pytest.raises(OutcomeError, match="give resolve its return type as outcome_type"):
        resolve(world, outcome=Receipt(17))
    with pytest.raises(OutcomeError, match=r"cannot be kept under the return annotation \S*datetime"):
        resolve(world, outcome=Receipt(17), outcome_type=datetime)
    with pytest.raises(ConfigurationError, match="outcome_type"):
        resolve(world, rerun=True, outcome_type=Receipt)
    assert resolve(world, outcome=Receipt(17), outcome_type=Receipt).state is State.COMPLETED
    assert deliver() == Receipt(17)


def test_a_doubt_is_resolved_by_running_again(world: World) -> None:
    """The next delivery runs."""
    in_doubt(world)
    assert resolve(world, rerun=True).state is State.RELEASED
    assert run(world, str, "a", fingerprint=None) == "a"


def test_what_cannot_be_resolved(world: World) -> None:
    """No record: None. Running: in progress. Ended: a conflict. Both or neither way out: an error."""
    assert resolve(world, rerun=True) is None
    lease = world.claim_elsewhere()
    with pytest.raises(InProgressError):
        resolve(world, rerun=True)
    world.finish_elsewhere(lease)
    with pytest.raises(ConflictError):
        resolve(world, rerun=True)
    for how in ({}, {"rerun": True, "outcome": 1}, {"rerun": True, "outcome": None}):
        with pytest.raises(ConfigurationError):
            resolve(world, **how)
    with pytest.raises(OutcomeError):
        resolve(world, outcome=threading.Lock())


def test_a_marker_that_cannot_be_deleted_is_said(world: World) -> None:
    """A person has to know that a duplicate may still be answered by it; doing it again mends it (F53)."""
    run(world, str, "a")
    assert world.marker is not None
    world.marker.down("drop", error=away("the marker"))
    forget = world.idem.forget if world.runtime == "blocking" else world.idem.aforget
    with pytest.raises(StoreUnavailableError, match="marker"):
        world.drive(forget, SCOPE, "A-1")
    assert world.get() is None
    world.marker.up()
    assert world.drive(forget, SCOPE, "A-1") is False
    assert world.marker_of() is None


def test_records_are_listed_in_order_and_in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, whatever the page size; by state and scope if asked; lazily."""
    monkeypatch.setattr("idem_tasks.idempotency._PAGE", 3)
    idem = Idempotency(store=MemoryStore(), observers=[])
    for scope in "ba":
        for number in range(5):
            idem.run(str, scope=scope, key=f"A-{number}")
    with pytest.raises(ZeroDivisionError):
        idem.run(lambda: 1 // 0, scope="a", key="B")
    places = [(record.scope, record.key) for record in idem.records()]
    assert places == sorted(places)
    assert len(places) == 11
    assert [record.key for record in idem.records(state="released")] == ["B"]
    assert len(list(idem.records(scope="b", state=State.COMPLETED))) == 5
    with pytest.raises(ConfigurationError, match="no such state"):
        list(idem.records(state="done"))
    assert idem.stats()[State.COMPLETED] == 10
    assert idem.stats()[State.RELEASED] == 1


def test_purge_goes_on_until_all_is_gone() -> None:
    """In batches, of what is over for longer than the grace (F17)."""
    now = [1_700_000_000.0]
    idem = Idempotency(store=MemoryStore(lambda: now[0]), policy=Policy(retention=10, max_hold=60), observers=[])
    for number in range(7):
        idem.run(str, scope="s", key=f"A-{number}")
    now[0] += 71
    assert idem.purge(batch=3) == 0
    assert idem.purge(batch=3, grace=0) == 7
    assert list(idem.records()) == []
    with pytest.raises(ConfigurationError, match="batch"):
        idem.purge(batch=0)


def test_prepare_makes_the_stores_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `idem-tasks init-db` does."""
    with world_on(monkeypatch, "blocking", 2) as world:
        world.idem.prepare()
        assert world.record_tier.verbs == ["prepare"]


# Closing.


def test_close_records_what_is_pending(world: World) -> None:
    """An outcome that waits for SQL is tried once more, whenever its next try would be; then all is closed."""
    world.record_tier.down("finish")
    with pytest.raises(StoreUnavailableError):
        run(world, str, "a")
    world.record_tier.up()
    world.drive(world.idem.close if world.runtime == "blocking" else world.idem.aclose)
    assert world.state() is State.COMPLETED
    assert world.record_tier.verbs[-1] == "close"
    assert run(world, str, "b", fingerprint=None) == "a"


def test_closing_what_was_never_used_does_nothing() -> None:
    """Twice, too; and `with` closes."""
    with Idempotency(store=MemoryStore()) as idem:
        pass
    idem.close()
    asyncio.run(idem.aclose())


# Services.


def test_threads_that_race_the_first_use_share_one_heartbeat() -> None:
    """However many threads begin at once, the process has one."""
    idem = Idempotency(store=MemoryStore(), observers=[])
    barrier = threading.Barrier(16)

    def use(_: int) -> Any:
        barrier.wait(30)
        return idem.services("blocking")

    with ThreadPoolExecutor(16) as threads:
        assert len({id(services) for services in threads.map(use, range(16))}) == 1


def test_each_loop_has_its_own_services() -> None:
    """Loops on several threads at once, and one after the other, do not share a heartbeat (F54)."""
    idem = Idempotency(store=MemoryStore(), observers=[])
    barrier = threading.Barrier(4)

    async def use() -> Any:
        first = idem.services("asyncio")
        barrier.wait(30)
        assert idem.services("asyncio") is first
        return first.heartbeat

    with ThreadPoolExecutor(4) as threads:
        heartbeats = list(threads.map(lambda _: asyncio.run(use()), range(4)))
    assert len({id(heartbeat) for heartbeat in heartbeats}) == 4


def test_a_store_of_one_runtime_is_refused_by_the_other() -> None:
    """At the first use, with the way out in the message."""

    class AsyncioOnly(MemoryStore):
        runtimes = frozenset({"asyncio"})

    idem = Idempotency(store=AsyncioOnly())
    with pytest.raises(ConfigurationError, match="from a URL"):
        idem.run(str, scope="s", key="A-1")
    with pytest.raises(ConfigurationError), idem.claim(scope="s", key="A-1"):
        pass


# From URLs.


def test_the_kinds_of_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database, Redis, or both; fields of the policy; a wrong scheme names the right ones."""
    assert type(Idempotency.from_urls(database_url="sqlite://").store).__name__ == "SQLStore"
    assert type(Idempotency.from_urls(redis_url="redis://localhost:1/0").store).__name__ == "RedisStore"
    both = Idempotency.from_urls(database_url="sqlite://", redis_url="redis://localhost:1/0", lease=10)
    assert type(both.store).__name__ == "TieredStore"
    assert both.policy.lease == 10
    assert Idempotency.from_urls(database_url="sqlite://", policy=Policy(lease=10), max_hold=20).policy.max_hold == 20
    for database_url, redis_url in (("oracle://x", None), (None, "http://x"), ("redis://x", None)):
        with pytest.raises(ConfigurationError, match="must begin with"):
            Idempotency.from_urls(database_url=database_url, redis_url=redis_url)
    with pytest.raises(ConfigurationError):
        Idempotency.from_urls(database_url="sqlite://", leese=10)  # type: ignore[call-arg]


def test_sqlite_keeps_the_story(tmp_path: Any) -> None:
    """The same from a URL, with a real database behind it, in both runtimes, and the next process finds it."""
    url = f"sqlite:///{tmp_path}/records.db"
    with Idempotency.from_urls(database_url=url, observers=[]) as idem:
        assert idem.run(str, "a", scope="s", key="A-1") == "a"
        with pytest.raises(ZeroDivisionError):
            idem.run(lambda: 1 // 0, scope="s", key="B-2")

        async def handler(value: str) -> str:
            return value

        async def main() -> str:
            try:
                return await idem.arun(handler, "a", scope="s", key="A-1")
            finally:
                await idem.aclose()

        assert asyncio.run(main()) == "a"
    with Idempotency.from_urls(database_url=url, observers=[]) as idem:
        assert idem.run(str, "a", scope="s", key="A-1") == "a"
        assert {record.key: record.state for record in idem.records()} == {
            "A-1": State.COMPLETED,
            "B-2": State.RELEASED,
        }


def test_two_databases_behind_one_redis_have_markers_of_their_own() -> None:
    """Production is never answered by the markers of staging; user, password and driver make no difference."""
    ours = _marker_prefix("postgresql+psycopg://app:secret@db:5432/shop")
    assert ours == _marker_prefix("postgresql://other:word@db:5432/shop")
    others = ["postgresql://db:5432/staging", "postgresql://db2:5432/shop", "sqlite:///shop.db", "mysql://db/shop"]
    assert len({ours, *map(_marker_prefix, others)}) == 5
    assert ours.startswith("idem:")
    assert "secret" not in ours


def test_a_child_forked_while_a_lock_is_held_can_make_its_services() -> None:
    """The lock's holder may be a thread that only the parent has."""
    idem = Idempotency(store=MemoryStore())
    with idem._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if idem.services("blocking") is not None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
