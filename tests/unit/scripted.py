"""A world of one key for tests of the story: real stores whose every verb a test can stop, break or cut off.

`World` runs handlers in either runtime, on one tier or two, on clocks that only it moves.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest

from idem_tasks import Idempotency, MemoryStore, TieredStore
from idem_tasks.claims import ClaimRequest, EncodedOutcome, Granted, Lease, Record, Release, State, new_owner
from idem_tasks.decorator import idempotent_task
from idem_tasks.errors import StoreUnavailableError
from idem_tasks.events import Announcer, Event, EventName
from idem_tasks.heartbeat import Heartbeat, LoopHeartbeat, ThreadHeartbeat
from idem_tasks.policy import Policy
from idem_tasks.runtime import Asyncio, Blocking, run_sync
from idem_tasks.stores.base import RuntimeName
from idem_tasks.stores.memory_marker import MemoryMarker
from idem_tasks.testing import Driver, ManualClock

Action = Callable[[], Any] | BaseException
"""What happens at a point: an exception is raised; a function is called, and what it returns is awaited if need be."""

SCOPE = "shop.charge"
LEASE = 60.0


def away(what: str = "the database") -> StoreUnavailableError:
    """Make the error of a store that cannot be reached."""
    return StoreUnavailableError(f"{what} cannot be reached")


class Scripted:
    """A real store or marker; what a test plans happens before or after a verb takes effect.

    An exception planned `after` a verb is a reply that was lost. `wandering` makes every verb suspend before and
    after it takes effect, as a real asyncio client does.
    """

    def __init__(self, real: Any) -> None:
        self.real = real
        self.verbs: list[str] = []
        self.wandering = False
        self.lacking: set[str] = set()
        """Verbs that this store need not have, and has not."""
        self._plans: dict[tuple[str, str], list[Action]] = defaultdict(list)
        self._always: dict[tuple[str, str], Action] = {}

    def before(self, verb: str, *actions: Action) -> None:
        """Let these happen, one a call, before the verb takes effect."""
        self._plans["before", verb] += actions

    def after(self, verb: str, *actions: Action) -> None:
        """Let these happen, one a call, once the verb has taken effect."""
        self._plans["after", verb] += actions

    def down(self, *verbs: str, error: BaseException | None = None) -> None:
        """Refuse these verbs, or all, until `up`."""
        for verb in verbs or ("*",):
            self._always["before", verb] = error or away()

    def up(self) -> None:
        """Answer again."""
        self._always.clear()

    @property
    def runtimes(self) -> frozenset[RuntimeName]:
        return cast("frozenset[RuntimeName]", self.real.runtimes)

    def on(self, runtime: RuntimeName, announce: Announcer) -> Scripted:
        return self

    @property
    def outbox(self) -> Any:
        return self.real.outbox

    def __getattr__(self, verb: str) -> Any:
        if verb in self.lacking:
            raise AttributeError(verb)
        method = getattr(self.real, verb)

        async def scripted(*args: Any, **kwargs: Any) -> Any:
            self.verbs.append(verb)
            await self._reach("before", verb)
            answer = await method(*args, **kwargs)
            await self._reach("after", verb)
            return answer

        return scripted

    async def _reach(self, when: str, verb: str) -> None:
        if self.wandering:
            await asyncio.sleep(0)
        action = self._always.get((when, verb)) or self._always.get((when, "*"))
        plan = self._plans[when, verb]
        if action is None and plan:
            action = plan.pop(0)
        if isinstance(action, BaseException):
            raise action
        if action is not None:
            result = action()
            if inspect.isawaitable(result):
                await result


class World:
    """One scope, a store with its marker if there is one, and the clocks; handlers run in `runtime`."""

    def __init__(self, runtime: RuntimeName, driver: Driver, tiers: int) -> None:
        self.runtime = runtime
        self.driver = driver
        self.clock = ManualClock()
        self.local = ManualClock(1000.0)
        self.record_tier = Scripted(MemoryStore(self.clock))
        self.marker = Scripted(MemoryMarker(self.clock)) if tiers == 2 else None
        store: Any = self.record_tier
        if self.marker is not None:
            store = TieredStore(cast(Any, self.marker), cast(Any, self.record_tier))
        self.events: list[Event] = []
        self.sent: list[Any] = []
        self.idem = Idempotency(store=store, observers=[self.events.append], senders={"mail": self.sent.append})
        self.effects: list[Any] = []

    # What a test does.

    def task(self, body: Callable[..., Any], *, key: str = "{order}", **options: Any) -> Callable[..., Any]:
        """Decorate a plain function, as a coroutine function where this world is asyncio; returns a plain call."""
        decorated = self.decorated(body, key=key, **options)
        return lambda *args, **kwargs: self.drive(decorated, *args, **kwargs)

    def decorated(self, body: Callable[..., Any], *, key: str = "{order}", **options: Any) -> Callable[..., Any]:
        handler = body
        if self.runtime == "asyncio" and not inspect.iscoroutinefunction(body):

            async def coroutine_body(*args: Any, **kwargs: Any) -> Any:
                await asyncio.sleep(0)
                return body(*args, **kwargs)

            coroutine_body.__signature__ = inspect.signature(body)  # type: ignore[attr-defined]
            coroutine_body.__annotations__ = body.__annotations__
            handler = coroutine_body
        options = {"scope": SCOPE, "idempotency": self.idem, "lease": LEASE, **options}
        return idempotent_task(key=key, **options)(handler)

    def charge(self, **options: Any) -> Callable[..., Any]:
        """Return a handler `charge(order, amount=5)` whose effects are counted, decorated with these options."""

        def charge(order: str, amount: int = 5) -> str:
            self.effects.append(order)
            return f"charged {amount} for {order}"

        return self.task(charge, **options)

    def drive(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function, or run a coroutine function on the event loop."""
        if self.runtime == "blocking":
            return function(*args, **kwargs)

        async def call() -> Any:
            return await function(*args, **kwargs)

        return self.driver(call())

    def pass_time(self, seconds: float) -> None:
        """Move the store's clock and the local one."""
        self.clock.advance(seconds)
        self.local.advance(seconds)

    def beat(self) -> None:
        """Let the heartbeat beat once."""
        self.drive(self._beat) if self.runtime == "asyncio" else run_sync(self.heartbeat.beat())

    async def _beat(self) -> None:
        await self.heartbeat.beat()

    @property
    def heartbeat(self) -> Heartbeat:
        """The heartbeat; in asyncio only while the loop runs."""
        return self.idem.services(self.runtime).heartbeat

    def held(self) -> int:
        """Return how many claims are renewed."""
        if self.runtime == "blocking":
            return len(self.heartbeat._held)

        async def count() -> int:
            return len(self.heartbeat._held)

        return self.driver(count())

    def record(self, key: str = "A-1") -> Record:
        """Return the record, which has to be there."""
        found = self.get(key)
        assert found is not None
        return found

    def get(self, key: str = "A-1") -> Record | None:
        """Return the record as the store has it."""
        return run_sync(self.real.get(SCOPE, key))

    @property
    def real(self) -> MemoryStore:
        return cast(MemoryStore, self.record_tier.real)

    def marker_of(self, key: str = "A-1") -> str | None:
        """Return what kind of marker stands, in one word."""
        assert self.marker is not None
        standing = self.marker.real._standing((SCOPE, key), self.clock())
        return None if standing is None else type(standing).__name__.strip("_").lower()

    def names(self) -> list[EventName]:
        """Return the names of the events, in order, without those that every call has."""
        usual = (EventName.GRANTED, EventName.COMPLETED, EventName.REPLAYED)
        return [event.name for event in self.events if event.name not in usual]

    def count(self, name: EventName) -> int:
        """Return how many events of this name there were."""
        return sum(event.name is name for event in self.events)

    # Another worker, which talks to the same store.

    def claim_elsewhere(self, key: str = "A-1", **policy: Any) -> Lease:
        """Claim a key as another worker does, and expect it to be granted."""
        answer = run_sync(self.real.claim(self.request(key, **policy)))
        assert isinstance(answer, Granted), answer
        return answer.lease

    def request(self, key: str = "A-1", *, fingerprint: str | None = None, **policy: Any) -> ClaimRequest:
        return ClaimRequest(SCOPE, key, fingerprint, new_owner(), Policy(**{"lease": LEASE, **policy}))

    def take_over(self, key: str = "A-1", **policy: Any) -> Lease:
        """Let the lease of this world's claim run out by the store's clock, and claim its key elsewhere."""
        self.clock.advance(LEASE + 1)
        return self.claim_elsewhere(key, **policy)

    def finish_elsewhere(self, lease: Lease, body: bytes = b'"the other one"') -> None:
        """Record another worker's outcome."""
        run_sync(self.real.finish(lease, EncodedOutcome(body=body, codec="json")))

    def release_elsewhere(self, lease: Lease) -> None:
        run_sync(self.real.release(lease, Release()))

    def state(self, key: str = "A-1") -> State | None:
        found = self.get(key)
        return None if found is None else found.state


@contextmanager
def world_on(monkeypatch: pytest.MonkeyPatch, runtime: RuntimeName, tiers: int) -> Iterator[World]:
    """Make a world whose waiting moves its clocks, and whose heartbeat beats when the test says so."""
    with Driver(runtime) as driver:
        world = World(runtime, driver, tiers)
        for module in ("batch", "task", "steps", "asking", "heartbeat", "claims"):
            monkeypatch.setattr(f"idem_tasks.{module}.deadline_clock", world.local)

        async def sleep(_: object, seconds: float) -> None:
            world.pass_time(seconds)
            if runtime == "asyncio":
                await asyncio.sleep(0)

        monkeypatch.setattr(Blocking, "sleep", sleep)
        monkeypatch.setattr(Asyncio, "sleep", sleep)
        for heartbeat in (ThreadHeartbeat, LoopHeartbeat):
            monkeypatch.setattr(heartbeat, "_wake_by", lambda *_: None)
        yield world
