"""Callbacks for aio-pika: a message is settled once its outcome is recorded, and never by `message.process()`.

That one drops a message whose handler raises or is cancelled. Here a handler that is cancelled, because its connection
was cut or the program ends, leaves its message unacknowledged, and the broker delivers it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Unpack, cast
from weakref import WeakKeyDictionary

from idem_tasks.errors import MissingExtraError
from idem_tasks.integrations.rabbitmq_copies import (
    CONFIRM_TIMEOUT,
    CONSUMER_TIMEOUT,
    PAUSE_AFTER_REFUSAL,
    WITHOUT_ID_HEADER,
    Copy,
    Roads,
)
from idem_tasks.integrations.settling import (
    LONGEST_DELAY,
    Acknowledge,
    DeadLetter,
    MessageHandler,
    OnError,
    PutBack,
    Settlement,
    times_put_back,
)
from idem_tasks.policy import Policy, PolicyFields

try:
    from aio_pika.abc import AbstractIncomingMessage
    from aio_pika.exceptions import MessageProcessError
    from aiormq.abc import AbstractChannel, AbstractConnection
    from aiormq.exceptions import ChannelInvalidStateError, DeliveryError
    from pamqp.commands import Basic
except ImportError as error:
    raise MissingExtraError(package="aio-pika", extra="rabbitmq") from error

if TYPE_CHECKING:
    from idem_tasks.idempotency import Idempotency


class Callback(Protocol):
    """What `queue.consume` takes; it may be given to one connection after another."""

    async def __call__(self, message: AbstractIncomingMessage) -> None:
        """Run the handler, and settle its message."""

    async def close(self) -> None:
        """Begin no more handlers, and return once the running ones have ended and their messages are settled.

        Call it before the connection is closed, which would cancel them. Messages that are held, or whose handler has
        not begun, go back to the queue when their channel is closed.
        """


_PERSISTENT = 2

_logger = logging.getLogger("idem_tasks")


def body_of(message: AbstractIncomingMessage) -> bytes:
    """Return what has to be the same whenever the key is."""
    return message.body


def idempotent_callback(
    *,
    queue: str,
    key: str | Callable[..., object] | None = None,
    scope: str | Callable[..., object] | None = None,
    fingerprint: str | Sequence[str] | Callable[..., object] | None = body_of,
    session: Any = None,
    idempotency: Idempotency | None = None,
    policy: Policy | None = None,
    on_error: OnError = "put_back",
    longest_delay: float = LONGEST_DELAY,
    dead_letter_exchange: str | None = None,
    dead_letter_routing_key: str | None = None,
    **fields: Unpack[PolicyFields],
) -> Callable[[Callable[..., Awaitable[Any]]], Callback]:
    """Make of a handler `async def (message)` what `await queue.consume(callback)` takes.

    A message is acknowledged once its outcome is recorded, whether it was made now or before. What is in progress
    elsewhere, and what cannot be recorded now, is held for a delay and then published to `queue` again. What is
    parked, in doubt, or can never be handled is published to `dead_letter_exchange` under `dead_letter_routing_key`
    (default: the name of the queue); without one it is put back and an error is logged, but never dropped.

    `key` defaults to the header Idempotency-Key, the source and id of a CloudEvent, or the `message_id`, which aio-pika
    makes anew for each publish that gives none; `scope` to the name of the queue; `fingerprint` to the body.
    `on_error`: a message whose handler raised is put back ("put_back"), later each time and `longest_delay` seconds at
    most, or is a dead letter at once ("dead_letter"). All else is as with `idempotent_task`.

    The handler leaves it to the callback to acknowledge. Raises `ConfigurationError` for what is known to be wrong
    before a message comes.
    """
    roads = Roads(queue, dead_letter_exchange, dead_letter_routing_key)

    def key_of(message: AbstractIncomingMessage) -> str:
        return roads.key(message.headers, message.message_id)

    def decorate(handler: Callable[..., Awaitable[Any]]) -> Callback:
        made = MessageHandler(
            handler,
            runtime="asyncio",
            key=key_of if key is None else key,
            scope=roads.scope if scope is None else scope,
            fingerprint=fingerprint,
            on_error=on_error,
            longest_delay=longest_delay,
            missing_road=roads.missing,
            session=session,
            idempotency=idempotency,
            policy=policy,
            **fields,
        )
        consumer = _Consumer(made, roads)

        @functools.wraps(handler)
        async def callback(message: AbstractIncomingMessage) -> None:
            await consumer.consume(message)

        closing: Any = callback  # a function: aio-pika awaits nothing else
        closing.close = consumer.close
        closing.settles_messages = True
        return cast(Callback, closing)

    return decorate


class _Consumer:
    """Handles and settles the messages of one queue, any number of them at once."""

    def __init__(self, handler: MessageHandler, roads: Roads) -> None:
        self._handler = handler
        self._roads = roads
        self._closed = False
        self._busy = 0
        self._at_rest = asyncio.Event()
        self._publishers: WeakKeyDictionary[AbstractConnection, _Publisher] = WeakKeyDictionary()

    async def consume(self, message: AbstractIncomingMessage) -> None:
        properties = copy.deepcopy(message.properties)  # whatever the handler does to them (F18)
        count = times_put_back(properties.headers)
        while not self._closed:
            with self._working():
                settlement = await self._handle(message, count)
                if isinstance(settlement, Acknowledge):
                    await self._acknowledge(message)
                    return
            if isinstance(settlement, PutBack):
                await asyncio.sleep(settlement.delay)
            try:
                connection = message.channel.connection
            except ChannelInvalidStateError:
                return  # the broker has the message again already
            with self._working():
                if await self._published(connection, message.body, properties, settlement):
                    await self._acknowledge(message)
                    return
            await asyncio.sleep(PAUSE_AFTER_REFUSAL)
            count += 1

    async def close(self) -> None:
        self._closed = True
        while self._busy:
            self._at_rest.clear()
            await self._at_rest.wait()

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            if not self._busy:
                self._at_rest.set()

    async def _acknowledge(self, message: AbstractIncomingMessage) -> None:
        try:
            await message.ack()
        except (MessageProcessError, TypeError):  # their texts quote the message
            _logger.error(  # noqa: TRY400 - where it stands says nothing
                "a message of %s was settled before its outcome was recorded, by its handler or by no_ack=True, and is "
                "lost if its consumer dies in between: leave ack(), reject() and process() to the callback",
                self._roads.queue,
            )
        except Exception as error:  # noqa: BLE001 - its connection was cut, however that shows
            _logger.warning(
                "a message of %s could not be acknowledged, and is delivered again: %r", self._roads.queue, error
            )

    async def _handle(self, message: AbstractIncomingMessage, count: int) -> Settlement:
        raised: BaseException | None = None
        try:
            await self._handler.function(message)
        except Exception as error:  # noqa: BLE001 - it is settled
            raised = error
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise  # unacknowledged, it comes again
            raised = error  # of something that the handler awaited
        return self._handler.settle(raised, count, self._roads.queue, (message,), {}, hold_limit=CONSUMER_TIMEOUT)

    async def _published(
        self,
        connection: AbstractConnection,
        body: bytes,
        properties: Basic.Properties,
        settlement: PutBack | DeadLetter,
    ) -> bool:
        """Publish the message once more; False if the broker may not have the copy."""
        made, properties = self._roads.copy(settlement, properties.headers), copy.copy(properties)
        properties.headers, properties.delivery_mode = _writable(made.headers), _PERSISTENT
        if not properties.message_id:  # aiormq gives one to what it publishes, another each time
            properties.headers[WITHOUT_ID_HEADER] = True
        if not made.expires:
            properties.expiration = None
        try:
            await self._publisher(connection).publish(connection, made, properties, body)
        except (Exception, asyncio.CancelledError) as error:
            if _is_cancelled():
                raise
            self._roads.log_not_published(made, error)
            return False
        return True

    def _publisher(self, connection: AbstractConnection) -> _Publisher:
        found = self._publishers.get(connection)
        if found is None:
            found = self._publishers[connection] = _Publisher()
        return found


def _writable(header: Any) -> Any:
    """Return a header as pamqp writes it: it reads bytes from a text that is not UTF-8, and writes a bytearray only."""
    match header:
        case bytes():
            return bytearray(header)
        case dict():
            return {name: _writable(value) for name, value in header.items()}
        case list():
            return [_writable(value) for value in header]
    return header


def _is_cancelled() -> bool:
    """Tell a cancellation of this task from that of something which it awaits, such as a channel that was closed."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


class _Publisher:
    """A channel of our own on the connection of a consumer, so that its errors do not disturb that one's.

    It publishes one message after another: a message that is returned is told from others by its message_id alone,
    and duplicates have the same.
    """

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()
        self._channel: AbstractChannel | None = None

    async def publish(
        self, connection: AbstractConnection, made: Copy, properties: Basic.Properties, body: bytes
    ) -> None:
        """Return once the broker has it in a queue; raise what aiormq raises, or `TimeoutError`."""
        async with self._one_at_a_time:
            try:
                async with asyncio.timeout(CONFIRM_TIMEOUT):
                    await self._publish(connection, made, properties, body)
            except DeliveryError:
                raise  # returned or refused, and the channel is as good as before
            except BaseException as error:
                channel, self._channel = self._channel, None  # a confirmation may still come, as if for the next one
                if channel is not None and isinstance(error, Exception):
                    with contextlib.suppress(Exception):  # a connection has no more than 2,047 of them
                        async with asyncio.timeout(CONFIRM_TIMEOUT):
                            await channel.close()
                raise

    async def _publish(
        self, connection: AbstractConnection, made: Copy, properties: Basic.Properties, body: bytes
    ) -> None:
        channel = self._channel
        if channel is None or channel.is_closed:
            channel = self._channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        await channel.basic_publish(
            body, exchange=made.exchange, routing_key=made.routing_key, properties=properties, mandatory=True
        )
