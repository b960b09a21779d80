"""NATS JetStream with nats-py: the callback of a subscription, or what a fetched message is given to.

A message is told to be in progress while its handler runs, and acknowledged once its outcome is recorded. One that has
to come again is put back with a delay; JetStream itself keeps it until then.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from idem_tasks.errors import ConfigurationError, MissingExtraError
from idem_tasks.integrations.settling import (
    LONGEST_DELAY,
    REASON_HEADER,
    DeadLetter,
    MessageHandler,
    OnError,
    PutBack,
    key_in_headers,
)
from idem_tasks.policy import Policy, PolicyFields
from idem_tasks.runtime import deadline_clock

try:
    from nats.aio.msg import Msg
    from nats.errors import Error as NatsError, MsgAlreadyAckdError
    from nats.js import JetStreamContext
    from nats.js.api import AckPolicy, ConsumerInfo, Header
except ImportError as error:
    raise MissingExtraError(package="nats-py", extra="nats") from error

if TYPE_CHECKING:
    from idem_tasks.idempotency import Idempotency

_logger = logging.getLogger("idem_tasks")

CONFIRM_TIMEOUT = 5.0
"""Seconds to wait until the server confirms an acknowledgement or a dead letter; nats-py reconnects after 2 s."""

_BEATS = 3
"""How often a message is told to be in progress in the time that JetStream waits for it: two may be lost."""

_DEFAULT_ACK_WAIT = 30.0
"""Seconds; JetStream's, should a server not say."""


def message_key(message: Msg) -> str:
    """Return the key that the publisher gave a message, else its place: `stream:sequence`.

    The publisher's is `Idempotency-Key`, the source and id of a CloudEvent, or `Nats-Msg-Id`. The place is the same
    for every delivery; a publisher that sends a message twice makes two places of it.
    """
    given = key_in_headers(message.headers) or (message.headers or {}).get(Header.MSG_ID)
    return given or f"{message.metadata.stream}:{message.metadata.sequence.stream}"


def consumer_scope(message: Msg) -> str:
    """Return `stream.consumer`: each durable consumer of a stream has its own outcomes."""
    return f"{message.metadata.stream}.{message.metadata.consumer}"


def message_body(message: Msg) -> bytes:
    """Return what must be the same whenever the key is."""
    return message.data


def idempotent_callback(
    js: JetStreamContext,
    *,
    key: str | Callable[..., object] | None = None,
    scope: str | Callable[..., object] | None = None,
    fingerprint: str | Sequence[str] | Callable[..., object] | None = message_body,
    session: Any = None,
    idempotency: Idempotency | None = None,
    policy: Policy | None = None,
    on_error: OnError = "put_back",
    longest_delay: float = LONGEST_DELAY,
    dead_letter_subject: str | None = None,
    **fields: Unpack[PolicyFields],
) -> Callable[[Callable[..., Awaitable[Any]]], Callable[[Msg], Awaitable[None]]]:
    """Make of a handler `async def (msg)` what `js.subscribe(subject, durable=…, cb=callback, manual_ack=True)` takes.

    A message of a pull subscription is given to it by `await callback(msg)`. A message is acknowledged once its
    outcome is recorded, whether it was made now or before. What is in progress elsewhere, and what cannot be recorded
    now, is delivered again after a delay. What is parked, in doubt, or can never be handled is published to
    `dead_letter_subject`, which a stream has to keep; without one it is put back and an error is logged, but never
    dropped. `js` publishes it, and asks for the consumer's settings once.

    `key` defaults to `message_key`, `scope` to `stream.consumer`, `fingerprint` to the body. `on_error`: a message
    whose handler raised is put back ("put_back"), later each time and `longest_delay` seconds at most, or is a dead
    letter at once ("dead_letter"). All else is as with `idempotent_task`.

    Raises `ConfigurationError` for what is known to be wrong before a message comes, and from the callback for a
    consumer that could lose messages: the message is not settled then, and comes again after its `ack_wait`.
    """

    def decorate(handler: Callable[..., Awaitable[Any]]) -> Callable[[Msg], Awaitable[None]]:
        made = MessageHandler(
            handler,
            runtime="asyncio",
            key=message_key if key is None else key,
            scope=consumer_scope if scope is None else scope,
            fingerprint=fingerprint,
            on_error=on_error,
            longest_delay=longest_delay,
            missing_road=None if dead_letter_subject else "dead_letter_subject= to idempotent_callback",
            session=session,
            idempotency=idempotency,
            policy=policy,
            **fields,
        )
        needs_name = scope is None and made.function is not handler  # else the handler is decorated, with its scope
        callback = _Callback(made, js, dead_letter_subject, float(longest_delay), needs_name=needs_name)
        return callback.receive  # nats-py wants a coroutine function

    return decorate


@dataclass(frozen=True, slots=True)
class _Consumer:
    """What a consumer's settings mean for its messages."""

    ack_wait: float
    """Seconds until a message that nobody settles is delivered again."""
    max_deliver: int
    """After so many deliveries JetStream gives a message up; 0 or less: never."""

    def is_last(self, message: Msg) -> bool:
        return 0 < self.max_deliver <= message.metadata.num_delivered


class _Callback:
    def __init__(
        self,
        settling: MessageHandler,
        js: JetStreamContext,
        dead_letter_subject: str | None,
        longest_delay: float,
        *,
        needs_name: bool,
    ) -> None:
        self._settling = settling
        self._js = js
        self._dead_letter_subject = dead_letter_subject
        self._longest_delay = longest_delay
        self._needs_name = needs_name
        self._consumers: dict[tuple[str, str], _Consumer] = {}

    async def receive(self, message: Msg) -> None:
        """Run the handler for this message, or replay its outcome, and settle the message."""
        consumer = await self._consumer_of(message)
        delivery = _Delivery(message, consumer, self._settling.task.policy.max_hold)
        count = message.metadata.num_delivered - 1
        try:
            delay = await self._run_and_settle(delivery, count)
            while delay is not None:  # JetStream would not deliver it again, so it is kept here until it is done
                await asyncio.sleep(delay)
                count += 1
                delay = await self._run_and_settle(delivery, count)
        except GeneratorExit:  # the event loop is gone: nothing can be awaited
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and not delivery.is_settled:  # a shutdown or a cancellation
                await self._give_back(delivery, error, count)
            raise
        finally:
            delivery.let_go()

    receive.settles_messages = True  # type: ignore[attr-defined]

    async def _run_and_settle(self, delivery: _Delivery, count: int) -> float | None:
        """Return None once the message is settled; else the seconds after which this delivery has to run again."""
        error: Exception | None = None
        try:
            await self._settling.function(delivery.message)
        except Exception as raised:  # noqa: BLE001 - whatever a handler raises
            error = raised
        settlement = self._settling.settle(error, count, delivery.message.subject, (delivery.message,), {})
        match settlement:
            case PutBack(delay):
                return await delivery.put_back(delay)
            case DeadLetter() if not await self._is_published(delivery.message, settlement):
                return await delivery.put_back(self._longest_delay)
        await delivery.acknowledge()
        return None

    async def _give_back(self, delivery: _Delivery, error: BaseException, count: int) -> None:
        """Have an interrupted message delivered again, sooner than JetStream would; its last delivery is kept."""
        message = delivery.message
        if not delivery.is_last:
            settlement = self._settling.settle(error, count, message.subject, (message,), {})
            assert isinstance(settlement, PutBack)
            await delivery.put_back(settlement.delay)
        elif await self._is_published(message, _given_up(message)):
            await delivery.acknowledge()

    async def _is_published(self, message: Msg, dead_letter: DeadLetter) -> bool:
        """Publish a dead letter and wait until a stream has it; tell, and log, whether one has."""
        place = f"{message.metadata.stream}:{message.metadata.sequence.stream}"
        if self._dead_letter_subject is None:  # the last delivery of a message that was interrupted
            _logger.error(
                "JetStream gives %s up, whose last delivery was interrupted, and it has nowhere to go: "
                "give dead_letter_subject= to idempotent_callback, and make the consumer with max_deliver=-1",
                place,
            )
            return False
        if message.subject == self._dead_letter_subject:  # each would make another, as fast as the server can
            _logger.error(
                "%s is a dead letter, and its consumer takes those too: give the consumer a filter_subject without %s, "
                "or another dead_letter_subject= to idempotent_callback",
                place,
                message.subject,
            )
            return False
        own = {name: value for name, value in (message.headers or {}).items() if not name.lower().startswith("nats-")}
        # Published once more under its own headers the message has the same key, also where that was its place.
        headers = own if key_in_headers(own) else own | {"Idempotency-Key": message_key(message)}
        headers |= {name: _on_one_line(value) for name, value in dead_letter.headers.items()}
        # That of the message itself would make its stream drop the dead letter as a duplicate; the time tells it from
        # that of a stream which was made again.
        stored = message.metadata.timestamp.isoformat()
        headers[Header.MSG_ID] = f"{place}:{stored}:{message.metadata.consumer}:{dead_letter.reason}"
        try:
            await self._js.publish(self._dead_letter_subject, message.data, timeout=CONFIRM_TIMEOUT, headers=headers)
        except Exception as error:  # noqa: BLE001 - whatever the client raises, the message stays where it is
            subject = self._dead_letter_subject
            _logger.error("%s could not be published to %s, which a stream has to keep: %r", place, subject, error)  # noqa: TRY400 - the client's traceback says no more
            return False
        return True

    async def _consumer_of(self, message: Msg) -> _Consumer:
        names = message.metadata.stream, message.metadata.consumer
        if names not in self._consumers:
            info = await self._js.consumer_info(*names)
            self._consumers[names] = _checked(info, needs_name=self._needs_name)
        return self._consumers[names]


class _Delivery:
    """One delivery of a message, which JetStream is told is in progress until it is settled.

    Or until `max_hold` is over, as the claim is renewed no longer: a handler that hangs must not keep its message from
    the others. A last delivery has nobody else.
    """

    def __init__(self, message: Msg, consumer: _Consumer, max_hold: float) -> None:
        self.message = message
        self.is_last = consumer.is_last(message)
        self.is_settled = False
        """Whether JetStream was told what becomes of it."""
        seconds = math.inf if self.is_last else max_hold
        self._telling = asyncio.create_task(self._tell_progress(consumer.ack_wait / _BEATS, seconds))

    async def _tell_progress(self, period: float, seconds: float) -> None:
        until = deadline_clock() + seconds
        while deadline_clock() + period < until:
            await asyncio.sleep(period)
            try:
                await self.message.in_progress()
            except NatsError as error:
                _logger.warning("JetStream may deliver a message that is in progress: %r", error)

    def let_go(self) -> None:
        """Tell no more."""
        self._telling.cancel()

    async def acknowledge(self) -> None:
        """Acknowledge it, and wait until JetStream has heard; if that is lost it comes again and is replayed."""
        self.let_go()
        self.is_settled = True
        try:
            await self.message.ack_sync(timeout=CONFIRM_TIMEOUT)
        except MsgAlreadyAckdError:
            self._log_settled_by_handler()
        except (NatsError, TimeoutError) as error:
            _logger.warning("an acknowledgement was not confirmed, and its message may be replayed: %r", error)

    async def put_back(self, delay: float) -> float | None:
        """Have it delivered again after so many seconds; on its last delivery, return them instead."""
        if self.is_last:
            return delay
        self.let_go()
        self.is_settled = True
        try:
            await self.message.nak(delay=delay)
        except MsgAlreadyAckdError:
            self._log_settled_by_handler()
        except NatsError as error:
            _logger.warning("a message could not be put back; it comes again after its ack_wait: %r", error)
        return None

    def _log_settled_by_handler(self) -> None:
        """Log what the client's error says, which quotes the message with its body."""
        _logger.error(
            "the handler of a message of %s settled it itself, before its outcome was recorded; it does not come "
            "again: leave ack(), nak() and term() to the callback",
            self.message.subject,
        )


def _checked(info: ConsumerInfo, *, needs_name: bool) -> _Consumer:
    """Refuse a consumer that loses messages, and warn of one that may (F40, F44)."""
    config, name = info.config, f"{info.stream_name}.{info.name}"
    if config.ack_policy != AckPolicy.EXPLICIT:
        raise ConfigurationError(
            f"{name} has ack_policy={config.ack_policy!r}, under which a message can be acknowledged before its "
            "handler ran: make the consumer with AckPolicy.EXPLICIT"
        )
    if needs_name and not config.durable_name:
        raise ConfigurationError(
            f"{name} is not durable: it has another name each time, and outcomes are kept by it; give durable= to the "
            "subscription, or scope= to idempotent_callback"
        )
    max_deliver = config.max_deliver or 0
    if max_deliver > 0:
        _logger.warning(
            "%s gives a message up after %s deliveries, also if its consumers died each time: make it with "
            "max_deliver=-1, and let max_attempts and max_crashes say when a message is parked",
            name,
            max_deliver,
        )
    return _Consumer(min([config.ack_wait or _DEFAULT_ACK_WAIT, *(config.backoff or ())]), max_deliver)


def _given_up(message: Msg) -> DeadLetter:
    """Say why a message is a dead letter that was interrupted on its last delivery."""
    return DeadLetter("max_deliver", {REASON_HEADER: "max_deliver", "idem_tasks_origin": message.subject})


def _on_one_line(value: str) -> str:
    """A line break would begin another header."""
    return value.replace("\r", "\\r").replace("\n", "\\n")
