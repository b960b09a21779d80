"""Messages of Kafka whose effects are rows of one database: one mark for each partition instead of a record for each.

The mark says how far the consumer group has come, and is moved in the transaction in which the handler writes. So a
message below it is a duplicate, and a worker that was paused meanwhile commits nothing.
"""

from __future__ import annotations

import inspect
import logging
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from idem_tasks import config
from idem_tasks.claims import EncodedOutcome
from idem_tasks.errors import ConfigurationError, IdemTasksError, LeaseLostError, StoreUnavailableError
from idem_tasks.events import EventName
from idem_tasks.idempotency import Idempotency
from idem_tasks.integrations.settling import (
    LONGEST_DELAY,
    Acknowledge,
    DeadLetter,
    OnError,
    PutBack,
    Settlement,
    check_settling,
    dead_letter,
    later,
    log_our_own,
    put_back,
)
from idem_tasks.keys import check_key, check_scope
from idem_tasks.runtime import HandlerStopIteration, interruption_in, run_sync
from idem_tasks.session_argument import SessionArgument
from idem_tasks.stores.base import MarkingTransaction, MarkPlace, RuntimeName, watermarks_of

logger = logging.getLogger("idem_tasks")

PlaceOf = Callable[[Any], tuple[str, int, int]]
"""Tells the topic, partition and offset of a message."""


class WatermarkHandler:
    """A user's function, run once for each message in a transaction that moves the mark of its partition.

    Only for a handler whose whole effect is what it writes through its session, to the database of the records, and
    only where the messages of a partition come in their order. It keeps no outcome; nothing outside of the database
    is protected; and `current_claim()`, with its steps, provider keys and messages, is not there. A topic that is made
    again under its name starts below its marks, which have to be deleted first, or its messages count as duplicates.
    """

    def __init__(
        self,
        handler: Callable[..., Any],
        *,
        runtime: RuntimeName,
        place: PlaceOf,
        group: str,
        session: Any,
        idempotency: Idempotency | None = None,
        on_error: OnError = "put_back",
        longest_delay: float = LONGEST_DELAY,
        missing_road: str | None = None,
        **others: Any,
    ) -> None:
        """Raises `ConfigurationError` without `session`, and for options that need a record."""
        check_settling(on_error, longest_delay)
        if session is None:
            raise ConfigurationError(
                "watermark=True needs session=, a sessionmaker: the mark is moved in the handler's own transaction"
            )
        if others:
            raise ConfigurationError(
                f"watermark=True keeps no record of a message, so {', '.join(sorted(others))} would do nothing: leave "
                "it out, or leave out watermark"
            )
        if hasattr(handler, "idempotency"):
            raise ConfigurationError(
                "watermark=True takes a plain function: one with @idempotent_task keeps a record of each message"
            )
        if inspect.iscoroutinefunction(inspect.unwrap(handler)) != (runtime == "asyncio"):
            needed = "async def" if runtime == "asyncio" else "def"
            raise ConfigurationError(f"{getattr(handler, '__qualname__', handler)} must be {needed} for this consumer")
        self._handler = handler
        self._runtime: RuntimeName = runtime
        self._place = place
        self._group = check_key(group)
        self._group_shown = group
        self._session = SessionArgument(handler, session, runtime)
        self._idempotency = idempotency
        self._on_error = on_error
        self._longest_delay = float(longest_delay)
        self._missing_road = missing_road
        self._made: set[MarkPlace] = set()
        self.function: Callable[..., Any] = self._run if runtime == "asyncio" else self._run_blocking

    def settle(
        self,
        error: BaseException | None,
        count: int,
        origin: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        hold_limit: float = math.inf,
    ) -> Settlement:
        """Say, and announce, what is to be done with the message whose call ended with `error`, or returned (None)."""
        if error is None:
            return Acknowledge()
        longest = min(self._longest_delay, hold_limit)
        settlement: PutBack | DeadLetter = later(error, count, longest)
        if isinstance(error, IdemTasksError):
            log_our_own(error, origin)
        elif isinstance(error, Exception):
            logger.error("the handler of a message of %s raised", origin, exc_info=error)
            if self._on_error == "dead_letter" and self._missing_road is None:
                settlement = dead_letter("handler_error", error, origin)
            elif self._on_error == "dead_letter":
                logger.error("%s should be a dead letter, and has nowhere to go: give %s", origin, self._missing_road)
                settlement = put_back(longest, count, error)
        match settlement:
            case PutBack(delay, times, reason):
                self._announce(EventName.PUT_BACK, args[0], count=times, delay=round(delay, 3), reason=reason)
            case DeadLetter(reason):
                self._announce(EventName.DEAD_LETTERED, args[0], reason=reason, origin=origin)
        return settlement

    def _announce(self, name: EventName, message: Any, **details: Any) -> None:
        topic, partition, offset = self._place(message)
        scope = check_scope(f"{topic}/{self._group_shown}")
        self._used.services(self._runtime).announce(name, scope, f"{topic}:{partition}:{offset}", **details)

    @property
    def _used(self) -> Idempotency:
        return self._idempotency or config.default_idempotency()

    def _run_blocking(self, message: Any) -> Any:
        try:
            return run_sync(self._run(message))
        except HandlerStopIteration as carrier:
            raise carrier.error from None

    async def _run(self, message: Any) -> None:
        """Run the handler and move the mark, both or neither; a message below the mark is done already."""
        topic, partition, offset = self._place(message)
        services, policy = self._used.services(self._runtime), self._used.policy.in_force()
        session = self._session.of((message,), {})
        if policy.shadow or not policy.active:
            await self._run_unprotected(message)
            return
        place = MarkPlace(topic, partition, self._group)
        marks = watermarks_of(services.store)
        if place not in self._made:
            await marks.make(place)
            self._made.add(place)
        transaction = marks.transaction(place, session.source, session.given, max_hold=policy.max_hold)
        runtime = services.runtime
        try:
            await transaction.begin()
            is_done = offset < transaction.mark
            if is_done:
                await transaction.roll_back(throw_away=False)
            else:
                await runtime.invoke(self._handler, (message,), session.passed({}, transaction.session))
                await runtime.shield(lambda: self._advance(transaction, place, offset))
        except BaseException as raised:
            struck, is_cut_off = interruption_in(raised, None) is not None, transaction.is_cut_off
            if runtime.can_wait(after=raised):
                await runtime.shield(lambda: transaction.roll_back(throw_away=struck))
            if not (struck or isinstance(raised, IdemTasksError)) and (is_cut_off or transaction.is_conflict(raised)):
                raise StoreUnavailableError(
                    f"{topic}:{partition}:{offset} lost its database, or another transaction stood in its way: all of "
                    "it is written or nothing, and the mark tells which when it comes again"
                ) from raised
            raise
        finally:
            ended_by = sys.exception()
            if ended_by is None or runtime.can_wait(after=ended_by):
                await runtime.shield(transaction.close)
        self._announce(EventName.REPLAYED if is_done else EventName.COMPLETED, message)

    async def _advance(self, transaction: MarkingTransaction, place: MarkPlace, offset: int) -> None:
        if transaction.commit_begun:
            raise StoreUnavailableError("the commit was interrupted; the mark tells what became of it")
        if not await transaction.advance(offset):
            raise LeaseLostError(
                f"{place.topic}:{place.partition}:{offset}: somebody else has moved the mark meanwhile, so nothing of "
                "it is written; the message is looked at again"
            )

    async def _run_unprotected(self, message: Any) -> None:
        services, session = self._used.services(self._runtime), self._session.of((message,), {})
        transaction = session.source.unfenced(session.given)
        try:
            await transaction.begin()
            await services.runtime.invoke(self._handler, (message,), session.passed({}, transaction.session))
            await transaction.commit(EncodedOutcome())
        except BaseException:  # whatever struck: half of what the handler wrote must not go back to the pool
            await transaction.roll_back(throw_away=False)
            raise
        finally:
            await transaction.close()
