"""The outbox: what a handler publishes is kept with its outcome, in one transaction, and sent once that is recorded.

At least once, and always with the same id. The process that recorded the outcome sends at once; what a crash or a
broker's outage left behind, a relay sends. Of each key a message is sent after all earlier ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from idem_tasks.claims import HANDLER_HAS_ENDED, Lease, OutboxMessage, new_owner
from idem_tasks.errors import ConfigurationError, MessageError, StoreError
from idem_tasks.events import Announcer, EventName
from idem_tasks.runtime import Asyncio, Runtime, deadline_clock, interruption_in
from idem_tasks.stores.base import FailedSend, Outbox, Store, outbox_of

Sender = Callable[[OutboxMessage], None]
"""Sends one message, or raises; called in the thread that relays (from asyncio in a thread of its own).

It returns once the message is safe with its receiver or broker, and not before: then it is forgotten here. It may have
a method `check(options)`, which raises for options that it does not understand, and `check_headers(headers)` likewise,
when the message is published.
"""

CELERY = "celery"
"""The sender of `publish`, which needs not be registered."""

_INTEGRATION = "idem_tasks.integrations.celery_outbox"

_SENDER_CHARACTERS = 100
"""Longest name of a sender: the outbox's column."""

_MESSAGE_BYTES = 1024 * 1024
"""Most of a message as it is kept; what a database refuses is found out now, and not when the effect has happened."""

_LEASE = 60.0
"""Seconds for which taken messages are nobody else's; no send is begun in their second half."""

_BATCH = 100
"""Messages that are taken at once."""

_PATIENCE = 10.0
"""Seconds for which an asyncio call that is cancelled waits for the message that is being sent."""

_FIRST_DELAY = 1.0
"""Seconds after which a failed message is tried again; doubled each time."""

_LONGEST_DELAY = 60.0


class Senders:
    """The senders of one `Idempotency`, by name."""

    def __init__(self, given: Mapping[str, Sender] | None = None) -> None:
        if given is not None and not isinstance(given, Mapping):
            raise ConfigurationError(f"senders={given!r:.99} must be a dict of functions by their names")
        self._given = dict(given or {})
        for name, sender in self._given.items():
            if not 0 < len(name) <= _SENDER_CHARACTERS or not name.isprintable():
                raise ConfigurationError(
                    f"the sender {name!r} must have a name of 1 to {_SENDER_CHARACTERS} printable characters"
                )
            if not callable(sender):
                raise ConfigurationError(f"the sender {name!r} must be a function of a message, not {sender!r:.99}")
            if inspect.iscoroutinefunction(sender):
                raise ConfigurationError(
                    f"the sender {name!r} must be a plain function, also for asyncio, where it runs in a thread"
                )

    def named(self, name: str) -> Sender:
        """Return the sender of this name; raises `ConfigurationError` if there is none."""
        if name in self._given:
            return self._given[name]
        if name == CELERY:
            made: Sender = _celery().CelerySender()
            return self._given.setdefault(name, made)
        known = ", ".join(sorted(self._given)) or "none"
        raise ConfigurationError(f"no sender is called {name!r}; known: {known}; give Idempotency(senders=...)")


def _celery() -> Any:
    return importlib.import_module(_INTEGRATION)


def message_id(*parts: str | int) -> str:
    """Return 32 hex digits that are the same for the same parts, and for no others."""
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:32]


class OutgoingMessages:
    """The messages of one claim: those that its handler has published so far.

    A handler may have threads, and there is no lock: one that an interruption left locked would keep the finish, which
    closes this again, waiting for ever. Each message takes a number of its own instead.
    """

    def __init__(self, lease: Lease, store: Store, senders: Senders) -> None:
        self._lease = lease
        self._store = store
        self._senders = senders
        self._messages: dict[int, OutboxMessage] = {}
        self._numbers = itertools.count()
        self._is_closed = False

    def add_task(self, task: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Keep a Celery task or signature; returns the id of the task, group or chord."""
        if "celery" not in sys.modules:
            raise ConfigurationError(f"publish takes a Celery task or signature, not {type(task).__name__}")
        celery = _celery()
        number, id_ = self._next()
        frozen = celery.freeze(task, args, kwargs, id_)
        self._add(number, id_, CELERY, celery.encode(frozen), {}, {})
        result: str = celery.result_id(frozen)
        return result

    def add_message(self, body: Any, to: str, headers: Mapping[str, Any], options: Mapping[str, Any]) -> str:
        """Keep a message for the sender called `to`; returns its id."""
        sender = self._senders.named(to)
        check = getattr(sender, "check", None)
        if check is not None:
            check(options)
        number, id_ = self._next()
        self._add(number, id_, to, body, headers, options, getattr(sender, "check_headers", None))
        return id_

    def close(self) -> tuple[OutboxMessage, ...]:
        """Refuse every further message, and return those there are."""
        self._is_closed = True
        return tuple(self._messages[number] for number in sorted(self._messages))

    def drop(self) -> None:
        """Forget all messages, and take others again."""
        self._messages.clear()
        self._numbers = itertools.count()
        self._is_closed = False

    def _next(self) -> tuple[int, str]:
        self._refuse_if_closed()
        if self._lease.policy.active and outbox_of(self._store) is None:
            raise ConfigurationError(
                f"an outbox needs records in SQL, where messages and outcome are one transaction; "
                f"a {type(self._store).__name__} has none: give a database_url, with or without Redis in front of it"
            )
        lease, number = self._lease, next(self._numbers)
        # A claim that no store granted has no token; its owner is as new at every run.
        run: str | int = lease.fencing_token or lease.owner
        return number, message_id(lease.scope, lease.key, run, number)

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise ConfigurationError(HANDLER_HAS_ENDED)

    def _add(
        self,
        number: int,
        id_: str,
        to: str,
        body: Any,
        headers: Mapping[str, Any],
        options: Mapping[str, Any],
        check_headers: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        before = sys.exception()
        try:
            content = _encode({"body": body, "headers": headers, "options": options})
        except Exception as error:  # a class may raise anything
            if interruption_in(error, before) is not None:
                raise
            raise MessageError(f"message {number} cannot be written as JSON: {error}") from error
        if len(content) > _MESSAGE_BYTES:
            raise MessageError(f"message {number} has {len(content)} bytes as JSON; {_MESSAGE_BYTES} are the most")
        lease = self._lease
        message = OutboxMessage(id_, lease.scope, lease.key, lease.fencing_token, number, to, content)
        if check_headers is not None:
            check_headers(message.headers)
        self._messages[number] = message
        self._refuse_if_closed()  # while another thread's handler ended: rather say so of one that is sent


_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class RelayReport:
    """What a relay did: how many messages were sent, how many could not be, and how many are in the outbox now."""

    sent: int
    failed: int
    left: int


def _never() -> bool:
    return False


@dataclass(slots=True)
class _Batch:
    """Messages that were taken at once, and what has become of them."""

    owner: str
    taken: Sequence[OutboxMessage]
    sent: list[OutboxMessage] = field(default_factory=list)
    failed: list[FailedSend] = field(default_factory=list)
    handed_over: set[str] = field(default_factory=set)

    def rest(self) -> list[OutboxMessage]:
        """What is free again at once: not one that was struck in mid-send, perhaps it is sent; its lease runs out."""
        return [message for message in self.taken if message.id not in self.handed_over]


class Relay:
    """Takes messages out of a store's outbox, sends them, and deletes what was sent."""

    def __init__(self, store: Store, senders: Senders, announce: Announcer, runtime: Runtime) -> None:
        self._outbox = outbox_of(store)
        self._store = store
        self._senders = senders
        self._announce = announce
        self._runtime = runtime

    async def run(self, limit: int, should_stop: Callable[[], bool]) -> RelayReport:
        """Do as `send`, and report; counting what is left reads the whole outbox."""
        outbox = self._outbox_there_is()
        sent, failed = await self.send(limit, should_stop)
        return RelayReport(sent, failed, await outbox.count())

    async def send(self, limit: int, should_stop: Callable[[], bool] = _never) -> tuple[int, int]:
        """Send up to `limit` messages that are due; stop earlier where `should_stop` says so, between two messages.

        Returns how many were sent, and how many could not be. Raises `StoreError`, and `ConfigurationError` where the
        store has no outbox.
        """
        outbox = self._outbox_there_is()
        if limit < 1:
            raise ConfigurationError(f"limit={limit} must be 1 or more")
        return await self._send(outbox, limit, None, should_stop)

    def _outbox_there_is(self) -> Outbox:
        if self._outbox is None:
            raise ConfigurationError(f"a {type(self._store).__name__} has no outbox: it needs records in SQL")
        return self._outbox

    async def send_now(self, messages: Sequence[OutboxMessage]) -> None:
        """Send what was recorded just now, after all that its key has left; never raises for what fails.

        That is announced, and left to a relay.
        """
        first, outbox = messages[0], self._outbox
        assert outbox is not None  # or nothing would have been published
        before = sys.exception()
        try:
            await self._send(outbox, max(len(messages), _BATCH), (first.scope, first.key), _never)
        except Exception as error:
            # Of the store or of an observer: the outcome is recorded, so the call has succeeded.
            if interruption_in(error, before) is not None:
                raise
            self._failed(first, error)

    async def send_unrecorded(self, messages: Sequence[OutboxMessage]) -> None:
        """Send messages that no record holds, in order; raises what their sender raises."""
        for message in messages:
            cancelled = await self._hand_over(message)
            self._sent(message)
            if cancelled is not None:
                raise cancelled

    async def _send(
        self, outbox: Outbox, limit: int, of: tuple[str, str] | None, should_stop: Callable[[], bool]
    ) -> tuple[int, int]:
        sent = failed = 0
        while sent + failed < limit and not should_stop():
            owner, begun = new_owner(), deadline_clock()
            taken = await outbox.take(owner, lease=_LEASE, limit=min(limit - sent - failed, _BATCH), of=of)
            if not taken:
                break
            batch = _Batch(owner, taken)
            try:
                await self._send_batch(batch, begun + _LEASE / 2, should_stop)
            except BaseException as struck:
                # Cancelled, or by a soft limit or shutdown: what is sent already would be sent again.
                if self._runtime.can_wait(after=struck):
                    with contextlib.suppress(StoreError):
                        await self._settle(outbox, batch)
                raise
            await self._settle(outbox, batch)
            sent, failed = sent + len(batch.sent), failed + len(batch.failed)
        return sent, failed

    async def _settle(self, outbox: Outbox, batch: _Batch) -> None:
        rest = batch.rest()

        async def settle() -> StoreError | None:
            try:
                await outbox.settle(batch.owner, sent=batch.sent, failed=batch.failed, rest=rest)
            except StoreError as error:
                return error  # raised within the shield, it would hide a soft limit that struck before it
            return None

        refused = await self._runtime.shield(settle)
        if refused is not None:
            raise refused

    async def _send_batch(self, batch: _Batch, until: float, should_stop: Callable[[], bool]) -> None:
        stopped: set[tuple[str, str]] = set()
        for message in batch.taken:
            if should_stop() or deadline_clock() > until:
                break
            if (message.scope, message.key) in stopped:
                continue  # an earlier one failed: this one waits for it
            before = sys.exception()
            batch.handed_over.add(message.id)
            try:
                cancelled = await self._hand_over(message)
            except Exception as error:
                # A sender may raise anything, and the others' messages are to be sent all the same.
                if interruption_in(error, before) is not None:
                    raise
                delay = min(_FIRST_DELAY * 2.0 ** min(message.attempts, 20), _LONGEST_DELAY)
                batch.failed.append(FailedSend(message, delay, type(error).__name__))
                stopped.add((message.scope, message.key))
                self._failed(message, error)
            else:
                batch.sent.append(message)
                self._sent(message)
                if cancelled is not None:
                    raise cancelled

    async def _hand_over(self, message: OutboxMessage) -> asyncio.CancelledError | None:
        """Return once it is sent, with what cancelled this call meanwhile, which is to be raised then."""
        sender = self._senders.named(message.to)
        if not isinstance(self._runtime, Asyncio):
            sender(message)
            return None
        sending = asyncio.ensure_future(asyncio.to_thread(sender, message))
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError as cancelled:
            # The thread cannot be cancelled: without its answer nobody knows whether the message was sent.
            sending.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.wait((sending,), timeout=_PATIENCE)
            if not sending.done() or sending.cancelled() or sending.exception() is not None:
                raise
            return cancelled
        return None

    def _sent(self, message: OutboxMessage) -> None:
        self._announce(EventName.OUTBOX_SENT, message.scope, message.key, id=message.id, to=message.to)

    def _failed(self, message: OutboxMessage, error: Exception) -> None:
        self._announce(
            EventName.OUTBOX_FAILED,
            message.scope,
            message.key,
            id=message.id,
            to=message.to,
            attempts=message.attempts + 1,
            error=type(error).__name__,
        )
