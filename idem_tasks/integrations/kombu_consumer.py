"""Callbacks for kombu's consumers, on RabbitMQ, Redis and its other brokers.

The handler runs where kombu calls it, in the thread that drains events, and so does all that is done to its message: a
channel belongs to one thread. What is held is published when the loop comes round: by `on_iteration`.
"""

from __future__ import annotations

import contextlib
import copy
import heapq
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from idem_tasks.errors import ConfigurationError, MissingExtraError
from idem_tasks.integrations.rabbitmq_copies import CONFIRM_TIMEOUT, CONSUMER_TIMEOUT, PAUSE_AFTER_REFUSAL, Roads
from idem_tasks.integrations.settling import (
    LONGEST_DELAY,
    Acknowledge,
    DeadLetter,
    MessageHandler,
    OnError,
    PutBack,
    times_put_back,
)
from idem_tasks.policy import Policy, PolicyFields

try:
    from kombu import Connection, Producer
    from kombu.message import Message
    from kombu.serialization import loads
except ImportError as error:
    raise MissingExtraError(package="kombu", extra="celery") from error

if TYPE_CHECKING:
    from idem_tasks.idempotency import Idempotency

_CONNECT_TIMEOUT = 5.0
"""Seconds in which a broker that is there accepts a connection."""

_PROPERTIES = (
    "app_id",
    "correlation_id",
    "message_id",
    "priority",
    "reply_to",
    "timestamp",
    "type",
    "user_id",
)
"""What a copy has of a message besides its body, content type and headers; the others are those of a delivery."""

_logger = logging.getLogger("idem_tasks")


def body_of(_body: Any, message: Message) -> bytes:
    """Return what has to be the same whenever the key is: the body as it was sent."""
    raw = message.body or b""
    return raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else bytes(raw)


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
) -> Callable[[Callable[..., Any]], IdempotentCallback]:
    """Make of a handler `(body, message)` what `Consumer(queues=[queue], callbacks=[callback])` takes.

    The loop that drains events has to call `callback.on_iteration()` each time round, at least once a second or so:
    `on_iteration = callback.on_iteration` in a `ConsumerMixin`.

    A message is acknowledged once its outcome is recorded, whether it was made now or before. What is in progress
    elsewhere, and what cannot be recorded now, is held for a delay and then published to `queue` again. What is
    parked, in doubt, or can never be handled is published to `dead_letter_exchange` under `dead_letter_routing_key`
    (default: the name of the queue); without one it is put back and an error is logged, but never dropped.

    `key` defaults to the header Idempotency-Key, the source and id of a CloudEvent, the `message_id`, or the task id
    of a Celery message; `scope` to the name of the queue; `fingerprint` to the body as it was sent. `on_error`: a
    message whose handler raised is put back ("put_back"), later each time and `longest_delay` seconds at most, or is a
    dead letter at once ("dead_letter"). With Redis a delay stays below a quarter of the visibility timeout too. All
    else is as with `idempotent_task`.

    Raises `ConfigurationError` for what is known to be wrong before a message comes.
    """
    roads = Roads(queue, dead_letter_exchange, dead_letter_routing_key)

    def key_of(_body: Any, message: Message) -> str:
        return roads.key(message.headers, message.properties.get("message_id"), message.headers.get("id"))

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
        return IdempotentCallback(made, roads)

    return decorate


@dataclass(slots=True)
class _Delivery:
    """One message as it came, whatever its handler does to it (F18)."""

    message: Message
    headers: dict[str, Any]
    properties: dict[str, Any]
    count: int
    """How often it was put back, or should have been."""


class IdempotentCallback:
    """A callback of one consumer, whose loop calls `on_iteration` too; it may outlive that one's connection."""

    settles_messages = True

    def __init__(self, handler: MessageHandler, roads: Roads) -> None:
        self.handler = handler
        self._roads = roads
        self._held: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._publishers = _Publishers()
        self._is_called = False

    def __call__(self, body: Any, message: Message) -> None:
        """Run the handler, and settle its message; a shutdown leaves it unacknowledged, so that it comes again.

        Raises `ConfigurationError` if nobody calls `on_iteration`.
        """
        if not self._is_called:
            raise ConfigurationError(
                f"the loop that consumes {self._roads.queue} has to call on_iteration() of this callback each time "
                "round, or what is held would stay held; in a ConsumerMixin: on_iteration = callback.on_iteration"
            )
        headers, properties = copy.deepcopy(message.headers), copy.deepcopy(_properties(message))  # F18
        self._handle(body, _Delivery(message, headers, properties, times_put_back(headers)))

    def on_iteration(self) -> None:
        """Publish the messages that were held long enough; returns at once if there is none."""
        self._is_called = True
        while self._held and self._held[0][0] <= time.monotonic():
            heapq.heappop(self._held)[2]()

    def close(self) -> None:
        """Close the connection by which copies are published; the next one opens it again."""
        self._publishers.close()

    def _handle(self, body: Any, delivery: _Delivery) -> None:
        message, raised = delivery.message, None
        try:
            self.handler.function(body, message)
        except Exception as error:  # noqa: BLE001 - it is settled
            raised = error
        limit = float(getattr(message.channel, "visibility_timeout", CONSUMER_TIMEOUT))
        settlement = self.handler.settle(
            raised, delivery.count, self._roads.queue, (body, message), {}, hold_limit=limit
        )
        match settlement:
            case Acknowledge():
                self._acknowledge(message)
            case PutBack(delay):
                self._after(delay, partial(self._publish, delivery, settlement))
            case DeadLetter():
                self._publish(delivery, settlement)

    def _after(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._held, (time.monotonic() + delay, next(self._numbers), action))

    def _publish(self, delivery: _Delivery, settlement: PutBack | DeadLetter) -> None:
        """Publish the message once more, and acknowledge it once the broker has the copy."""
        message, properties = delivery.message, dict(delivery.properties)
        if not _is_open(message.channel):
            return  # the broker has the message again already, or will have it
        made = self._roads.copy(settlement, delivery.headers)
        compression = made.headers.pop("compression", None)  # the body is not compressed any more
        if not made.expires:
            properties.pop("expiration", None)
        try:
            self._publishers.publish(
                message.channel.connection.client,
                message.body,
                exchange=made.exchange,
                routing_key=made.routing_key,
                headers=made.headers,
                compression=compression,
                **properties,
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, the message must stay
            self._roads.log_not_published(made, error)
            delivery.count += 1
            self._after(PAUSE_AFTER_REFUSAL, partial(self._again, delivery))
        else:
            self._acknowledge(message)

    def _acknowledge(self, message: Message) -> None:
        try:
            message.ack()
        except Exception as error:  # noqa: BLE001 - its connection was cut, however that shows
            _logger.warning(
                "a message of %s could not be acknowledged, and is delivered again: %r", self._roads.queue, error
            )

    def _again(self, delivery: _Delivery) -> None:
        message = delivery.message
        if _is_open(message.channel):
            # Decoded anew, whatever the handler did to what it was given (F18).
            self._handle(loads(message.body, message.content_type, message.content_encoding, message.accept), delivery)


class _Publishers:
    """One connection of our own for what is published, with confirmations; made when it is needed."""

    def __init__(self) -> None:
        self._producer: Producer | None = None

    def publish(self, consumers: Connection, body: Any, *, exchange: str, routing_key: str, **options: Any) -> None:
        """Return once the broker has it in a queue; raise whatever kombu raises."""
        try:
            producer = self._connected(consumers)
            _see_that_it_is_routed(producer, exchange, routing_key)
            producer.publish(
                body,
                exchange=exchange,
                routing_key=routing_key,
                delivery_mode="persistent",
                mandatory=True,
                confirm_timeout=CONFIRM_TIMEOUT,
                **options,
            )
        except BaseException:  # whatever struck: a confirmation may still come, and be taken for the next one's
            self.close()
            raise

    def _connected(self, consumers: Connection) -> Producer:
        if self._producer is None:
            options = {**(consumers.transport_options or {}), "confirm_publish": True}
            # Nobody would send the heartbeats of a connection that is idle most of the time.
            made = consumers.clone(transport_options=options, connect_timeout=_CONNECT_TIMEOUT, heartbeat=0)
            self._producer = Producer(made)
        return self._producer

    def close(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(Exception):  # it is broken perhaps, and that may be anything of its transport
                producer.connection.close()


def _see_that_it_is_routed(producer: Producer, exchange: str, routing_key: str) -> None:
    """Raise an error for what no queue would take, where the transport does not know `mandatory`."""
    channel = producer.channel
    if not exchange or not hasattr(channel, "typeof"):
        return
    if not channel.typeof(exchange).lookup(channel.get_table(exchange), exchange, routing_key, None):
        raise LookupError(f"no queue is bound to the exchange {exchange!r} for {routing_key!r}")


def _properties(message: Message) -> dict[str, Any]:
    """Return how a message was published, as `Producer.publish` takes it."""
    properties = {name: message.properties[name] for name in _PROPERTIES if message.properties.get(name) is not None}
    expiration = message.properties.get("expiration")
    if expiration is not None:
        properties["expiration"] = (int(expiration) + 0.5) / 1000  # kombu takes seconds, and cuts the milliseconds
    return properties | {
        "content_type": message.content_type or "application/data",  # without any, kombu would encode it once more
        "content_encoding": message.content_encoding,
    }


def _is_open(channel: Any) -> bool:
    return (
        channel.connection is not None and getattr(channel, "is_open", True) and not getattr(channel, "closed", False)
    )
