"""Workers and what runs in them: deliveries, heartbeats and people, each stopped at every round trip."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, TypeVar

from idem_tasks.call import Services
from idem_tasks.claims import Claim, Finished
from idem_tasks.errors import StoreUnavailableError
from idem_tasks.events import Announcer, Event, EventName
from idem_tasks.heartbeat import Heartbeat
from idem_tasks.outbox import Senders
from idem_tasks.outcomes import JsonCodec
from idem_tasks.runtime import FIRST_PAUSE, Asyncio, Blocking, register_interruption
from idem_tasks.stores.base import MarkerPending, Store
from idem_tasks.stores.cached import cached
from idem_tasks.stores.tiered import TieredStore
from idem_tasks.testing.explorer.database import SimulatedTransaction
from idem_tasks.testing.explorer.laws import Law, Violation
from idem_tasks.testing.explorer.scenario import RETENTION
from idem_tasks.testing.explorer.words import summary_of, words_of
from idem_tasks.testing.stepped import Step, stepped_marker, stepped_record

if TYPE_CHECKING:
    from idem_tasks.testing.explorer.world import World

T = TypeVar("T")

ACTORS_STEPS = 400
"""Steps of one actor after which it is taken to go round in a circle."""

_codec = JsonCodec()


class KilledError(BaseException):
    """A process that is gone: nothing of it reaches anybody any more."""


class SoftLimitError(Exception):
    """Strikes at any step, as Celery's soft time limit does."""


register_interruption(SoftLimitError)


class _Stop:
    """Suspends an actor at a step."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def __await__(self) -> Generator[Step, bool, bool]:
        return (yield self._step)


class Runtime(Blocking):
    """The blocking runtime, whose handler and pauses can be suspended."""

    invoke = Asyncio.invoke
    drive = Asyncio.drive

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def can_wait(self, *, after: BaseException) -> bool:
        """Say no for a process that is gone."""
        return not isinstance(after, KilledError)

    async def shield(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Shield as the blocking runtime does, unless the process is gone."""

        async def unless_gone() -> T:
            if self._worker.dead:
                raise KilledError
            return await operation()

        return await super().shield(unless_gone)

    async def ask(self, question: Callable[..., Any], subject: object, seconds: float) -> Any:
        """Stop before the question: what it asks about may change meanwhile."""
        await self._worker.reach(Step("handler", "the provider is asked", "before"))
        return await super().ask(question, subject, seconds)

    async def sleep(self, seconds: float) -> None:
        """Stop until the world goes on with this actor; then that many seconds have passed for all."""
        # A pause of random length would make another execution of the same actions.
        await self._worker.reach(Step("clock", "sleep", "before", max(seconds, FIRST_PAUSE)))


class StillHeartbeat(Heartbeat):
    """The heartbeat, which beats when the world says so."""

    def _wake_by(self, time: float) -> None:
        pass

    def is_due(self, now: float) -> bool:
        """Tell whether a beat would do something."""
        due = self._due_at()
        return due is not None and due <= now

    @property
    def is_needed(self) -> bool:
        """Whether it holds a claim, or has an outcome to record."""
        return self._due_at() is not None

    def summary(self) -> tuple[Any, ...]:
        """Return all that its next beats depend on."""
        held = tuple((owner, claim.deadline, claim.renew_at, claim.lost) for owner, claim in self._held.items())
        pending = tuple((owner, waiting.try_at, waiting.pause) for owner, waiting in self._pending.items())
        return held, pending


class Worker:
    """One process: a store of its own on the shared tiers, and a heartbeat."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.dead = False
        self.has_beaten = False
        self.delivery: str | None = None
        """Whose handler runs in it."""
        self.reply: str | None = None
        """What becomes of the next reply, where the world does not stop at each."""
        self.ran_until = 0.0
        """When the handler in it returned."""
        self.retention_is_over = False
        """Whether it has given up an outcome that nobody would be given any more."""
        announce = Announcer((self._hears,))
        record: Any = stepped_record(world.watched_record, self.reach)
        record.outbox = stepped_record(world.watched_outbox, self.reach, "outbox")
        if world.scenario.session:
            in_session = stepped_record(world.watched_database, self.reach, "session")
            record.transaction = lambda lease, _source, _given: SimulatedTransaction(world.database, in_session, lease)
        self.store: Store = TieredStore(stepped_marker(world.watched_marker, self.reach), record)
        if world.local_cache is not None:
            self.store = cached(self.store, world.local_cache)
        self.heartbeat = StillHeartbeat(self.store, announce)
        self.services = Services(
            self.store, self.heartbeat, announce, _codec, Runtime(self), Senders({"mail": world.post})
        )

    def _hears(self, event: Event) -> None:
        if event.name is EventName.OUTCOME_DROPPED:
            self.retention_is_over = self.world.clock() > self.ran_until + RETENTION

    async def reach(self, step: Step) -> bool:
        """Stop at a step of whatever runs in this process."""
        if self.dead:
            raise KilledError
        if step.when == "before" or self.world.scenario.every_reply:
            return await _Stop(step)
        fault, self.reply = self.reply, None
        if self.world.tells:
            self.world.log[-1] += f" -> {words_of(step.answer)}"
        self.world.was_told(step.answer)
        if fault == "reply lost":
            self.world.actor_at_hand.outages.add(step.tier)
            raise StoreUnavailableError("the reply was lost")
        if fault is None:
            self.world.actor_at_hand.hear(step)
        return fault == "sent again"


class Actor:
    """A coroutine of a worker that waits at a step."""

    def __init__(self, name: str, worker: Worker, coroutine: Coroutine[Any, Any, None]) -> None:
        self.name = name
        self.worker = worker
        self.coroutine = coroutine
        self.context = contextvars.Context()
        self.step: Step | None = None
        self.steps = 0
        self.trail = 0
        """A hash of all it was told: its local state follows from that."""
        self.holds_message = False
        self.first_epoch = 0
        self.sent_at = 0.0
        """When it came to its step: when a command was sent."""
        self.outages: set[str] = set()
        """The tiers that it could not reach, once at least."""
        self.claim: Claim | None = None
        """What its handler runs under, or ran."""
        self.ran_until = 0.0
        """When its handler returned or failed."""
        self.lease_lived = False
        """Whether its lease was not over, by its own clock, when it came to its step."""
        self.struck: BaseException | None = None
        """What interrupted it last."""
        self.met_pending = False
        """Whether the marker has just told it of an outcome that waits there."""
        self.has_run = False
        """Whether its handler has begun before, under the same claim."""
        self.superseded = False
        """Whether its release was answered with a recorded outcome."""

    @property
    def is_new(self) -> bool:
        """Whether it waits at its first step, at a tier, and could as well have come to it later.

        Not a heartbeat: what it renews was due, and held, when it began.
        """
        return (
            self.steps == 1
            and not self.name.endswith("heartbeat")
            and self.step is not None
            and self.step.tier in ("marker", "record")
        )

    def summary(self) -> tuple[Any, ...]:
        """Return all that its next steps depend on, with the answer that it has not heard yet."""
        waits_at = None if self.step is None else (self.step.tier, self.step.verb, summary_of(self.step.answer))
        deadline = None if self.claim is None else self.claim.deadline  # which a heartbeat may have moved
        return self.name, self.trail, waits_at, self.holds_message, self.first_epoch, deadline, self.has_run

    def resume(self, world: World, reply: bool | BaseException | None) -> None:
        """Go on to the next step or to the end."""
        world.going_on(self.name, self.sent_at, lease_lived=self.lease_lived)
        self.steps += 1
        if self.steps > ACTORS_STEPS:
            raise Violation(Law.KNOWN_ENDINGS, f"{self.name} went round in a circle")
        told = type(reply).__name__ if isinstance(reply, BaseException) else (reply, self.worker.reply)
        step = self.step
        if isinstance(reply, (SoftLimitError, SystemExit)):
            self.struck = reply
        if step is not None and isinstance(reply, StoreUnavailableError):
            self.outages.add(step.tier)
        elif step is not None and step.when == "after" and reply is False:
            self.hear(step)
        seen = None if step is None else (step.tier, step.verb, step.when, summary_of(step.answer))
        self.trail = hash((self.trail, seen, told, world.clock(), world.cache_summary()))
        self.step = None
        try:
            if isinstance(reply, BaseException):
                self.step = self.context.run(self.coroutine.throw, reply)
            else:
                self.step = self.context.run(self.coroutine.send, reply)
        except (StopIteration, KilledError):
            del world.actors[self.name]
        self.sent_at = world.clock()
        self.lease_lived = self.claim is not None and self.sent_at <= self.claim.deadline
        if self.step is not None:
            self._comes_to(world, self.step)

    def _comes_to(self, world: World, step: Step) -> None:
        """Let the laws see what it does next."""
        if self.met_pending:
            self.met_pending = False
            world.laws.met_pending(self.name, step.verb)
        if step.verb == "keep" and step.when == "before" and self.claim is not None:
            tried_for = self.sent_at - self.ran_until
            world.laws.gives_up(self.name, tried_for=tried_for, left=self.claim.deadline - self.sent_at)

    def hear(self, step: Step) -> None:
        """Note what an answer obliges it to."""
        if isinstance(step.answer, MarkerPending):
            self.met_pending = True
        if (step.tier, step.verb) == ("record", "release"):
            self.superseded = isinstance(step.answer, Finished)
