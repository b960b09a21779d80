"""Callbacks for pika: the handler runs in a worker thread, and its message is settled once its outcome is recorded.

The thread of the connection does nothing but what pika does there: it keeps up the heartbeats, takes messages,
acknowledges them, and publishes copies of those that are put back or dead letters.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from idem_tasks.errors import ConfigurationError, MissingExtraError
from idem_tasks.integrations.rabbitmq_copies import CONSUMER_TIMEOUT, PAUSE_AFTER_REFUSAL, Roads
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
    from pika.exceptions import AMQPError
except ImportError as error:
    raise MissingExtraError(package="pika", extra="rabbitmq") from error

if TYPE_CHECKING:
    from idem_tasks.idempotency import Idempotency

_PUMP = 0.1
"""Seconds between two looks at whether all handlers have ended, in `close`."""

_PERSISTENT = 2

_logger = logging.getLogger("idem_tasks")


def body_of(_channel: Any, _method: Any, _properties: Any, body: bytes) -> bytes:
    """Return what has to be the same whenever the key is."""
    return body


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
    workers: int = 8,
    **fields: Unpack[PolicyFields],
) -> Callable[[Callable[..., Any]], IdempotentCallback]:
    """Make of a handler `(channel, method, properties, body)` what `channel.basic_consume(queue, callback)` takes.

    A message is acknowledged once its outcome is recorded, whether it was made now or before. What is in progress
    elsewhere, and what cannot be recorded now, is held for a delay and then published to `queue` again. What is
    parked, in doubt, or can never be handled is published to `dead_letter_exchange` under `dead_letter_routing_key`
    (default: the name of the queue); without one it is put back and an error is logged, but never dropped.

    `key` defaults to the header Idempotency-Key, the source and id of a CloudEvent, or the `message_id`; `scope` to
    the name of the queue; `fingerprint` to the body. `on_error`: a message whose handler raised is put back
    ("put_back"), later each time and `longest_delay` seconds at most, or is a dead letter at once ("dead_letter").
    `workers` handlers run at once, each in a thread, where the channel must not be touched; the prefetch count should
    be higher, by the messages that are held. All else is as with `idempotent_task`.

    Raises `ConfigurationError` for what is known to be wrong before a message comes.
    """
    roads = Roads(queue, dead_letter_exchange, dead_letter_routing_key)
    if workers < 1:
        raise ConfigurationError(f"workers={workers!r} must be a whole number, 1 or more")

    def key_of(_channel: Any, _method: Any, properties: Any, _body: bytes) -> str:
        return roads.key(properties.headers, properties.message_id)

    def decorate(handler: Callable[..., Any]) -> IdempotentCallback:
        made = MessageHandler(
            handler,
            runtime="blocking",
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
        return IdempotentCallback(made, roads, workers)

    return decorate


@dataclass(slots=True, eq=False)
class _Delivery:
    """One message as it came, whatever its handler does to its properties (F18)."""

    channel: Any
    method: Any
    properties: Any
    body: bytes
    count: int
    """How often it was put back, or should have been."""

    @property
    def connection(self) -> Any:
        return self.channel.connection

    def arguments(self) -> tuple[Any, ...]:
        return self.channel, self.method, copy.deepcopy(self.properties), self.body


class IdempotentCallback:
    """A callback for `basic_consume`, and a context manager that waits for running handlers at its end.

    It may be given to one connection after another: a handler whose connection was cut goes on, its outcome is
    recorded, and the message that is delivered again gets that.
    """

    settles_messages = True

    def __init__(self, handler: MessageHandler, roads: Roads, workers: int) -> None:
        self.handler = handler
        self._roads = roads
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix=f"idem_tasks {roads.queue}")
        self._unsettled: set[_Delivery] = set()
        self._publisher: Any = None
        self._thread: int | None = None
        self._closed = False

    def __call__(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        """Begin the handler in a worker thread; pika calls this in the thread of the connection."""
        if not hasattr(channel.connection, "add_callback_threadsafe"):
            raise ConfigurationError("idempotent_callback works with a BlockingConnection of pika, not with others")
        self._thread = threading.get_ident()
        self._begin(_Delivery(channel, method, properties, body, times_put_back(properties.headers)))

    def close(self) -> None:
        """Begin no more handlers, and return once the running ones have ended and their messages are settled.

        Call it in the thread of the connection, before that is closed. Messages that are held, or whose handler has
        not begun, go back to the queue when their channel is closed.
        """
        self._closed = True
        self._workers.shutdown(wait=False, cancel_futures=True)
        if threading.get_ident() == self._thread:
            while connection := self._open_connection():
                try:
                    connection.process_data_events(time_limit=_PUMP)
                except AMQPError as error:
                    _logger.warning("the connection of %s ended: %r", self._roads.queue, error)
        self._workers.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, delivery: _Delivery) -> None:
        if self._closed or not delivery.channel.is_open:
            return  # unacknowledged, it goes back as soon as its channel is closed
        self._unsettled.add(delivery)
        future = self._workers.submit(self._handle, delivery)
        future.add_done_callback(partial(self._handled, delivery))

    def _open_connection(self) -> Any:
        """Return a connection that still has something to settle."""
        return next((one.connection for one in self._unsettled.copy() if one.connection.is_open), None)

    def _handled(self, delivery: _Delivery, future: Future[None]) -> None:
        """Let go of a message that nobody is going to settle; its channel returns it when it is closed."""
        failed = None if future.cancelled() else future.exception()
        if failed is not None:
            _logger.error("a message of %s could not be settled", self._roads.queue, exc_info=failed)
        if failed is not None or future.cancelled():
            self._unsettled.discard(delivery)

    # In a worker thread

    def _handle(self, delivery: _Delivery) -> None:
        arguments, raised = delivery.arguments(), None
        try:
            self.handler.function(*arguments)
        except BaseException as error:  # noqa: BLE001 - a SystemExit in a thread ends nothing but its handler
            raised = error
        settlement = self.handler.settle(
            raised, delivery.count, self._roads.queue, arguments, {}, hold_limit=CONSUMER_TIMEOUT
        )
        try:
            delivery.connection.add_callback_threadsafe(partial(self._settle, delivery, settlement))
        except AMQPError as error:
            self._unsettled.discard(delivery)
            self._warn("could not be settled", error)

    # In the thread of the connection, where an exception would end the consumer

    def _settle(self, delivery: _Delivery, settlement: Settlement) -> None:
        try:
            match settlement:
                case Acknowledge():
                    self._acknowledge(delivery)
                case PutBack(delay):
                    delivery.connection.call_later(delay, partial(self._publish, delivery, settlement))
                case DeadLetter():
                    self._publish(delivery, settlement)
        finally:
            self._unsettled.discard(delivery)

    def _publish(self, delivery: _Delivery, settlement: PutBack | DeadLetter) -> None:
        """Publish the message once more, and acknowledge it once the broker has the copy."""
        if not delivery.channel.is_open:
            return  # the broker has the message again already
        made = self._roads.copy(settlement, delivery.properties.headers)
        properties = copy.copy(delivery.properties)
        properties.headers, properties.delivery_mode = made.headers, _PERSISTENT
        if not made.expires:
            properties.expiration = None
        try:
            publisher = self._publisher_of(delivery.connection)
            publisher.basic_publish(made.exchange, made.routing_key, delivery.body, properties, mandatory=True)
        except Exception as error:  # noqa: BLE001 - whatever it is, the message must stay
            self._roads.log_not_published(made, error)
            if delivery.connection.is_open:
                delivery.count += 1
                delivery.connection.call_later(PAUSE_AFTER_REFUSAL, partial(self._begin, delivery))
        else:
            self._acknowledge(delivery)

    def _publisher_of(self, connection: Any) -> Any:
        """Return a channel of our own, so that neither confirmations nor its errors disturb the consumer's."""
        publisher = self._publisher
        if publisher is None or publisher.connection is not connection or not publisher.is_open:
            publisher = self._publisher = connection.channel()
            publisher.confirm_delivery()
        return publisher

    def _acknowledge(self, delivery: _Delivery) -> None:
        try:
            delivery.channel.basic_ack(delivery.method.delivery_tag)
        except AMQPError as error:
            self._warn("could not be acknowledged", error)

    def _warn(self, what: str, error: Exception) -> None:
        _logger.warning("a message of %s %s, and is delivered again: %r", self._roads.queue, what, error)
