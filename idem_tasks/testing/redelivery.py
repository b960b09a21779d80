"""One message of a handler's, delivered until it is settled, on tiers in memory that belong to this message alone.

A delivery passes places: before and after each round trip, the handler's end, and every `crash_point` of the user's.
At one of them its worker can be killed, or something else can happen. Time moves only here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from idem_tasks.call import Services
from idem_tasks.claims import current_claim
from idem_tasks.decorator import IdempotentFunction
from idem_tasks.errors import (
    PUT_BACK,
    DuplicateError,
    IdemTasksError,
    InDoubtError,
    InProgressError,
    ParkedError,
)
from idem_tasks.events import Announcer, Event, EventName
from idem_tasks.heartbeat import Heartbeat
from idem_tasks.idempotency import Idempotency, services_from
from idem_tasks.runtime import Asyncio, Blocking, Runtime, deadline_clock, deadline_clock_from
from idem_tasks.stores.base import RuntimeName
from idem_tasks.stores.memory import MemoryStore
from idem_tasks.stores.memory_marker import MemoryMarker
from idem_tasks.stores.tiered import TieredStore
from idem_tasks.testing.clock import ManualClock
from idem_tasks.testing.stepped import Step, stepped_marker, stepped_record

T = TypeVar("T")

MOST_DELIVERIES = 10
"""Deliveries after which a message that is still not settled never will be."""


USERS = "user's"
"""The tier of a place that is not ours but the user's `crash_point`."""


class WorkerKilled(BaseException):
    """Ends a delivery as a kill does, as far as an exception can: `finally` and `except BaseException` still run."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a delivery is; `nested`: in a handler that the handler under test called."""

    tier: str
    verb: str
    when: Literal["before", "after"] = "after"
    nested: bool = False


Happening = Callable[[], Awaitable[object]]
"""What happens at a place, other than a kill; it may raise what a lost reply raises."""


@dataclass(frozen=True, slots=True)
class End:
    """How one delivery ended: what its caller got, and whether the message was acknowledged after it.

    "held" is in doubt or parked, for a person; "again" asks for another delivery; "failed" is the handler's own
    exception, and "killed" nobody heard of.
    """

    how: Literal["returned", "raised", "held", "again", "failed", "killed"]
    value: Any = None

    @property
    def settled(self) -> bool:
        return self.how in {"returned", "raised", "held"}


KILLED = End("killed")


class Delivery:
    """One delivery on its way; once its worker is dead it passes no place any more."""

    def __init__(self, at: int | None = None, happening: Happening | None = None) -> None:
        """`at` is the number of the place where something happens: `happening`, or without it a kill."""
        self.places: list[Place] = []
        self.depth = 0
        """How many handlers it is in: 2 in one that the handler under test called."""
        self.raised: BaseException | None = None
        """What a handler raised last."""
        self.arrived = at is None
        """Whether it came to the place where something happens."""
        self.dead = False
        self._at = at
        self._happening = happening

    def pass_by(self, place: Place) -> Happening | None:
        """Note where it is, and return what happens there; raises `WorkerKilled` if it is killed or was before."""
        if self.dead:
            raise WorkerKilled
        self.places.append(place)
        if len(self.places) - 1 != self._at:
            return None
        self.arrived = True
        if self._happening is None:
            self.dead = True
            raise WorkerKilled
        return self._happening


_delivery: ContextVar[Delivery | None] = ContextVar("idem_tasks_delivery", default=None)


def crash_point(name: str) -> None:
    """Mark a place in a handler, or in a fake that it calls, where `assert_idempotent` kills the worker too.

    `name` completes "killed ...", as in `crash_point("after the charge")`. Does nothing anywhere else.
    """
    delivery = _delivery.get()
    if delivery is not None:
        delivery.pass_by(Place(USERS, name))


def _current_delivery() -> Delivery:
    delivery = _delivery.get()
    assert delivery is not None, "a step outside of every delivery"
    return delivery


class Message:
    """A message and the world it is delivered in."""

    def __init__(self, function: IdempotentFunction, call: Callable[[], Any]) -> None:
        """`call` makes the call that a delivery is; it returns an awaitable where the handler is asynchronous."""
        self.function = function
        self.ends: list[End] = []
        self.runs = 0
        self.not_kept: str | None = None
        self._call = call
        self._clock = ManualClock()
        self.deadlines = ManualClock(deadline_clock())
        marker = stepped_marker(MemoryMarker(self._clock), self._reach)
        self._store = TieredStore(marker, stepped_record(MemoryStore(self._clock), self._reach))
        self._made: dict[tuple[Idempotency, RuntimeName], Services] = {}

    async def play(self, script: Callable[[Message], Awaitable[T]]) -> T:
        """Let this happen to the message, while every `Idempotency` uses its world."""
        with services_from(self._services), deadline_clock_from(self.deadlines):
            return await script(self)

    async def deliver(self, at: int | None = None, happening: Happening | None = None) -> Delivery:
        """Deliver it once more, and note how that ends."""
        delivery = Delivery(at, happening)
        outside = _delivery.set(delivery)
        try:
            self.ends.append(await self._answer(delivery))
        finally:
            _delivery.reset(outside)
        return delivery

    async def settle(self) -> None:
        """Deliver it until it is acknowledged; before each delivery the lease of the one before runs out."""
        for _ in range(MOST_DELIVERIES):
            if self.ends[-1].settled:
                return
            self.let_lease_expire()
            await self.deliver()

    def let_lease_expire(self) -> None:
        """Let more time pass than the handler's lease, and than the last delivery was told to wait."""
        error = self.ends[-1].value if self.ends else None
        told = error.retry_after if isinstance(error, InProgressError) else 0.0
        self._pass_time(max(self.function.policy.lease, told) + 1)

    async def _answer(self, delivery: Delivery) -> End:
        try:
            value = self._call()
            return End("returned", await value if self.function.asynchronous else value)
        except BaseException as error:
            if delivery.dead:  # whatever its last breath is wrapped in, such as the group of a TaskGroup
                return KILLED
            if not isinstance(error, Exception):
                raise
            return self._end(error, ours=isinstance(error, IdemTasksError) and error is not delivery.raised)

    def _end(self, error: Exception, *, ours: bool) -> End:
        """Tell what an error means for the message; `ours` is false for what the handler itself raised."""
        if isinstance(error, PUT_BACK):
            return End("again", error)
        if isinstance(error, InDoubtError | ParkedError):
            return End("held", error)
        if ours and isinstance(error, DuplicateError):
            return End("returned", error.outcome)
        return End("raised" if ours or isinstance(error, self.function.policy.record_failures) else "failed", error)

    async def _reach(self, step: Step) -> bool:
        await self._pass_by(step.tier, step.verb, step.when)
        return False

    async def _pass_by(self, tier: str, verb: str, when: Literal["before", "after"]) -> None:
        delivery = _current_delivery()
        # A handler's steps are written from within it, its claim and its finish from without.
        outermost = 1 if verb in {"begin_step", "finish_step"} else 0
        happening = delivery.pass_by(Place(tier, verb, when, nested=delivery.depth > outermost))
        if happening is not None:
            await happening()

    def _services(self, idempotency: Idempotency, runtime: RuntimeName) -> Services:
        made = self._made.get((idempotency, runtime))
        if made is None:
            announce = Announcer((self._hear,))
            store = self._store.on(runtime, announce)
            world = _Watched(Blocking() if runtime == "blocking" else Asyncio(), self)
            made = Services(store, _NoHeartbeat(store, announce), announce, idempotency.codec, world)
            self._made[idempotency, runtime] = made
        return made

    def _hear(self, event: Event) -> None:
        if event.name is EventName.OUTCOME_NOT_KEPT:
            self.not_kept = str(event.details["reason"])

    def _pass_time(self, seconds: float) -> None:
        self._clock.advance(seconds)
        self.deadlines.advance(seconds)

    # What `_Watched` tells.

    async def run(self, handler: Callable[..., Any], running: Coroutine[Any, Any, Any]) -> Any:
        """Run a handler, count that if it is the one under test, and stop at its end."""
        delivery = _current_delivery()
        self.runs += handler is self.function.function
        value, raised = None, None
        delivery.depth += 1
        try:
            value = await running
        except Exception as error:  # noqa: BLE001 - raised below
            raised = delivery.raised = error
        finally:
            delivery.depth -= 1
        await self._pass_by("handler", "run", "after")
        if raised is not None:
            raise raised
        return value

    async def wait(self, seconds: float) -> None:
        """Let time pass, in which those who live renew their leases."""
        while seconds > 0:
            passing = min(seconds, self.function.policy.lease / 4)
            self._pass_time(passing)
            seconds -= passing
            for services in self._made.values():
                await services.heartbeat.beat()


class _Watched:
    """A runtime in which handlers are watched, and waiting moves the message's time."""

    def __init__(self, runtime: Runtime, message: Message) -> None:
        self._runtime = runtime
        self._message = message
        self.ask = runtime.ask
        self.shield = runtime.shield
        self.can_wait = runtime.can_wait
        self.drive = runtime.drive

    async def invoke(self, handler: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if current_claim().step_running is not None:
            return await self._runtime.invoke(handler, args, kwargs)
        return await self._message.run(handler, self._runtime.invoke(handler, args, kwargs))

    async def sleep(self, seconds: float) -> None:
        await self._message.wait(seconds)


class _NoHeartbeat(Heartbeat):
    """Beats only when `Message.wait` lets it: a thread's or loop's own would renew the dead."""

    def _wake_by(self, time: float) -> None:
        pass
