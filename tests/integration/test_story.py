"""The story of one delivery on real databases and a real Redis, in both runtimes: what memory cannot show."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Self, cast

import pytest

from idem_tasks import Idempotency, RedisStore, SQLStore, TieredStore, current_claim, idempotent_task
from idem_tasks.claims import ClaimRequest, EncodedOutcome, Granted, InProgress, Lease, State, new_owner
from idem_tasks.errors import InDoubtError, InProgressError, LeaseLostError, StoreUnavailableError
from idem_tasks.events import Announcer, Event, EventName
from idem_tasks.policy import Policy
from idem_tasks.runtime import run_sync
from idem_tasks.stores.base import MarkerRunning, RuntimeName
from idem_tasks.testing import Driver
from tests.unit.scripted import Scripted

SCOPE = "shop.charge"
SHORT = 1.2
"""Seconds of a lease that is waited out, or renewed several times."""


class RealWorld:
    """A real store, or two tiers of them, whose verbs a test can strike; and another worker on the same database."""

    def __init__(self, driver: Driver, database_url: str, redis_url: str | None) -> None:
        quiet = Announcer(())
        self.driver = driver
        self.runtime: RuntimeName = driver.runtime
        self.record = Scripted(SQLStore(database_url, create_schema=True).on(self.runtime, quiet))
        self.marker = None if redis_url is None else Scripted(RedisStore(redis_url).on(self.runtime, quiet))
        store: Any = self.record
        if self.marker is not None:
            store = TieredStore(cast(Any, self.marker), cast(Any, self.record))
        self.elsewhere = SQLStore(database_url).on("blocking", quiet)
        self.events: list[Event] = []
        self.effects: list[str] = []
        self.idem = Idempotency(store=store, observers=[self.events.append])

    def __enter__(self) -> Self:
        # A first connection may take longer than a short lease: then no handler would begin.
        self.driver(self.record.prepare())
        self.driver(self.record.get(SCOPE, "warm up"))
        if self.marker is not None:
            self.driver(self.marker.prepare())
        self.record.verbs.clear()
        run_sync(self.elsewhere.get(SCOPE, "warm up"))
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.runtime == "blocking":
            self.idem.close()
        else:
            self.driver(self.idem.aclose())
        self.driver(self.record.close())
        run_sync(self.elsewhere.close())

    def task(self, body: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Decorate a plain function for this runtime; returns a plain call."""
        handler = body
        if self.runtime == "asyncio":

            async def coroutine_body(*args: Any, **kwargs: Any) -> Any:
                answer = body(*args, **kwargs)
                return await answer if inspect.isawaitable(answer) else answer

            coroutine_body.__signature__ = inspect.signature(body)  # type: ignore[attr-defined]
            handler = coroutine_body
        options = {"key": "{order}", "scope": SCOPE, "idempotency": self.idem, **options}
        decorated = idempotent_task(**options)(handler)
        return decorated if self.runtime == "blocking" else lambda *args: self.driver(decorated(*args))

    def charge(self, **options: Any) -> Callable[..., Any]:
        def charge(order: str) -> str:
            self.effects.append(order)
            return f"charged {order}"

        return self.task(charge, **options)

    def state(self, key: str = "A-1") -> State | None:
        found = run_sync(self.elsewhere.get(SCOPE, key))
        return None if found is None else found.state

    def take_over(self, key: str = "A-1") -> Lease:
        """Claim a key on another worker as soon as the lease of its holder is over."""
        request = ClaimRequest(SCOPE, key, None, new_owner(), Policy())
        with Driver("blocking") as driver:
            answer = driver.poll(partial(self.elsewhere.claim, request), lambda got: not isinstance(got, InProgress))
        assert isinstance(answer, Granted)
        return answer.lease

    def finish_elsewhere(self, lease: Lease) -> None:
        run_sync(self.elsewhere.finish(lease, EncodedOutcome(body=b'"the other one"', codec="json")))

    def wait(self, seconds: float) -> Any:
        """Let real time pass in a handler, so that the heartbeat can beat."""
        if self.runtime == "asyncio":
            return asyncio.sleep(seconds)
        return self.driver.pause(seconds)

    def names(self) -> list[EventName]:
        return [event.name for event in self.events]


@pytest.fixture(params=["blocking", "asyncio"])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    with Driver(request.param) as driver:
        yield driver


@pytest.fixture(params=["sqlite", "redis and postgresql"])
def urls(request: pytest.FixtureRequest) -> tuple[str, str | None]:
    """A database, and a Redis in front of it where it is a server."""
    if request.param == "sqlite":
        return request.getfixturevalue("sqlite_url"), None
    return request.getfixturevalue("postgres_url"), request.getfixturevalue("redis_url")


@pytest.fixture
def world(driver: Driver, urls: tuple[str, str | None]) -> Iterator[RealWorld]:
    with RealWorld(driver, *urls) as world:
        yield world


@pytest.fixture
def asyncio_world(urls: tuple[str, str | None]) -> Iterator[RealWorld]:
    with Driver("asyncio") as driver, RealWorld(driver, *urls) as world:
        yield world


def test_a_redelivered_message_replays(world: RealWorld) -> None:
    """Once, from the tier that answers first and from the other (F7)."""
    charge = world.charge()
    assert [charge("A-1"), charge("A-1")] == ["charged A-1"] * 2
    if world.marker is not None:
        world.driver(world.marker.drop([(SCOPE, "A-1")]))
        assert charge("A-1") == "charged A-1"
    assert world.effects == ["A-1"]


def test_a_failure_is_released(world: RealWorld) -> None:
    """At once, in every tier (F32)."""
    errors = [ValueError("no")]

    def handler(order: str) -> str:
        if errors:
            raise errors.pop()
        return order

    task = world.task(handler)
    with pytest.raises(ValueError, match="no"):
        task("A-1")
    assert world.state() is State.RELEASED
    assert task("A-1") == "A-1"


def test_a_doubt_waits_for_a_person(world: RealWorld) -> None:
    """Under `hold`, also when the marker is gone (F55)."""

    def handler(order: str) -> None:
        raise TimeoutError

    task = world.task(handler, on_crash="hold")
    with pytest.raises(TimeoutError):
        task("A-1")
    with pytest.raises(InDoubtError):
        task("A-1")
    assert world.state() is State.IN_DOUBT


def test_a_handler_longer_than_its_lease_keeps_it(world: RealWorld) -> None:
    """The heartbeat renews both tiers while it runs; a duplicate is in progress all the time (F1)."""
    attempts: list[type] = []

    def handler(order: str) -> Any:
        if world.runtime == "asyncio":
            return later(order)
        for _ in range(4):
            world.wait(SHORT / 2)
            look()
        assert not current_claim().lost
        return order

    async def later(order: str) -> str:
        for _ in range(4):
            await world.wait(SHORT / 2)
            # In a thread: the renewal of this very loop may hold SQLite's lock.
            await asyncio.to_thread(look)
        assert not current_claim().lost
        return order

    def look() -> None:
        request = ClaimRequest(SCOPE, "A-1", None, new_owner(), Policy())
        attempts.append(type(run_sync(world.elsewhere.claim(request))))

    assert world.task(handler, lease=SHORT, max_hold=60)("A-1") == "A-1"
    assert attempts == [InProgress] * 4
    assert world.record.verbs.count("renew") >= 3


@pytest.mark.parametrize("finishes", [False, True])
def test_a_handler_that_was_overtaken_gives_way(world: RealWorld, finishes: bool) -> None:
    """Its lease is over and another has the key: that one's outcome, or LeaseLostError (F1, F5)."""

    def handler(order: str) -> str:
        lease = world.take_over()
        if finishes:
            world.finish_elsewhere(lease)
        return "mine"

    world.record.down("renew")
    task = world.task(handler, lease=2 * SHORT, max_hold=60)  # a claim that takes longer than its lease is refused
    if finishes:
        assert task("A-1") == "the other one"
    else:
        with pytest.raises(LeaseLostError):
            task("A-1")
    assert world.state() is (State.COMPLETED if finishes else State.RUNNING)


def test_a_hung_handler_loses_its_key_after_max_hold(world: RealWorld) -> None:
    """It, or the loop it blocks, does not keep its key for ever, and its late outcome is not recorded (F2)."""

    def handler(order: str) -> str:
        lease = world.take_over()
        assert current_claim().lost
        world.finish_elsewhere(lease)
        return "mine"

    assert world.task(handler, lease=SHORT, max_hold=2 * SHORT)("A-1") == "the other one"


def test_nothing_is_answered_before_it_is_committed(world: RealWorld) -> None:
    """Up to the commit of the outcome every tier says that the key is in progress (F25)."""
    seen: list[Any] = []

    async def look() -> None:
        request = ClaimRequest(SCOPE, "A-1", None, new_owner(), Policy())
        for tier, verb in ((world.marker, "take"), (world.record, "claim")):
            if tier is not None:
                seen.append(type(await getattr(tier.real, verb)(request)))

    world.record.before("finish", look)
    assert world.charge()("A-1") == "charged A-1"
    assert seen == ([InProgress] if world.marker is None else [MarkerRunning, InProgress])


def test_no_process_remembers_what_others_forgot(world: RealWorld) -> None:
    """A record that was forgotten elsewhere is not answered from anything that this process kept of it (F25)."""
    charge = world.charge()
    assert [charge("A-1"), charge("A-1")] == ["charged A-1"] * 2
    assert run_sync(world.elsewhere.forget(SCOPE, "A-1"))
    if world.marker is not None:
        world.driver(world.marker.real.drop([(SCOPE, "A-1")]))
    assert charge("A-1") == "charged A-1"
    assert world.effects == ["A-1"] * 2


def test_what_is_forgotten_before_it_is_published_stays_forgotten(world: RealWorld) -> None:
    """A person forgets the record while its holder is about to publish: the next delivery runs (F53)."""

    async def forget() -> None:
        assert await world.record.real.forget(SCOPE, "A-1")
        if world.marker is not None:
            await world.marker.real.drop([(SCOPE, "A-1")])

    world.record.after("finish", forget)
    charge = world.charge()
    assert [charge("A-1"), charge("A-1")] == ["charged A-1"] * 2
    assert world.effects == ["A-1"] * 2
    assert charge("A-1") == "charged A-1"
    assert world.effects == ["A-1"] * 2


def test_an_outcome_that_sql_refused_is_written_through(world: RealWorld) -> None:
    """SQL away past the lease: put back; when it is there again the next delivery or the heartbeat records it (F45)."""
    charge = world.charge(lease=SHORT, max_hold=60)
    world.record.down("finish", "write_through")
    with pytest.raises(StoreUnavailableError):
        charge("A-1")
    assert EventName.OUTCOME_PENDING in world.names()
    assert world.state() is State.RUNNING
    world.record.up()
    if world.marker is None:
        services: list[Any] = []

        async def close() -> None:
            services.append(world.idem.services("asyncio"))
            await services[0].heartbeat.try_now()

        if world.runtime == "asyncio":
            world.driver(close())
        else:
            run_sync(world.idem.services("blocking").heartbeat.try_now())
    assert charge("A-1") == "charged A-1"
    assert world.state() is State.COMPLETED
    assert world.effects == ["A-1"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("verb", ["claim", "finish", "take", "publish"])
def test_struck_at_a_verb(world: RealWorld, when: str, verb: str) -> None:
    """Interrupted before or after a command: withdrawn before the handler, recorded after it (F62)."""
    if world.marker is None:
        verb = {"take": "claim", "publish": "finish"}.get(verb, verb)
    tier = world.record if verb in ("claim", "finish") or world.marker is None else world.marker
    effects = world.effects

    def handler(order: str) -> str:
        effects.append(order)
        return order

    if world.runtime == "blocking":
        getattr(tier, when)(verb, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            world.task(handler)("A-1")
    else:

        async def body(order: str) -> str:
            return handler(order)

        decorated = idempotent_task(key="{order}", scope=SCOPE, idempotency=world.idem)(body)

        async def run() -> None:
            task = asyncio.ensure_future(decorated("A-1"))

            async def cancel() -> None:
                task.cancel()
                await asyncio.sleep(0)

            getattr(tier, when)(verb, cancel)
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert task.cancelled()

        world.driver(run())
    if verb in ("claim", "take"):
        assert effects == []
        assert world.state() in (None, State.RELEASED)
    else:
        assert effects == ["A-1"]
        assert world.state() is State.COMPLETED
    assert world.task(handler)("A-1") == "A-1"
    assert effects == ["A-1"]


@pytest.mark.parametrize("verb", ["claim", "finish", "release"])
def test_a_duplicate_comes_while_a_command_is_under_way(asyncio_world: RealWorld, verb: str) -> None:
    """It is in progress or replayed, and runs only if the first one was released."""
    world = asyncio_world
    seen: list[str] = []

    async def body(order: str) -> str:
        world.effects.append(order)
        if verb == "release" and len(world.effects) == 1:
            raise ValueError("no")
        return order

    charge = idempotent_task(key="{order}", scope=SCOPE, idempotency=world.idem)(body)

    async def duplicate() -> None:
        try:
            seen.append(await charge("A-1"))
        except InProgressError:
            seen.append("in progress")

    async def run() -> None:
        world.record.after(verb, duplicate)
        with contextlib.suppress(ValueError):
            await charge("A-1")

    world.driver(run())
    if verb == "claim":
        assert seen == ["in progress"]
    assert len(world.effects) == (2 if seen == ["A-1"] and verb == "release" else 1)
