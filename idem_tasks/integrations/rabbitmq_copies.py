"""How RabbitMQ gets a message once more: put back to its queue, or as a dead letter; the same for each of its clients.

The copy is published, confirmed by the broker and routed to a queue, before the message itself is acknowledged (F60).
A message whose copy is refused, returned or not confirmed in time is held on and handled again after a pause. It is not
given back to the broker: RabbitMQ 3.10 counts a nack with requeue=True against the delivery limit of a quorum queue as
it counts a reject, and drops the message beyond that (F40).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from idem_tasks.errors import ConfigurationError, InvalidKeyError
from idem_tasks.integrations.settling import COUNT_HEADER, DeadLetter, PutBack, key_in_headers

_logger = logging.getLogger("idem_tasks")

CONSUMER_TIMEOUT = 1800.0
"""Seconds for which RabbitMQ lets a consumer hold a message: its default `consumer_timeout` since 3.8.17."""

CONFIRM_TIMEOUT = 10.0
"""Seconds to wait for the broker's confirmation; pika waits for as long as its connection does."""

PAUSE_AFTER_REFUSAL = 1.0
"""Seconds before a message whose copy was refused is handled again."""

WITHOUT_ID_HEADER = "idem_tasks_without_id"
"""Of a copy whose message had no `message_id`, if the client gave it one: that is no key."""

_NOT_COPIED = frozenset({"BCC", "CC", "x-delivery-count"})
"""Headers with a meaning for the broker itself: CC and BCC would send the copy to other queues too, and the deliveries
of a quorum queue are counted anew."""

_MOST_OF_A_SHORT_TEXT = 255
"""Bytes; as long as names of queues, exchanges and routing keys can be."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Where a message is published to once more, and under which headers."""

    exchange: str
    routing_key: str
    headers: dict[str, Any]
    expires: bool
    """Whether it keeps its `expiration`; a dead letter does not, as with the broker's own dead letters."""


class Roads:
    """Where the messages of one queue go if they are not acknowledged as they are."""

    def __init__(self, queue: str, dead_letter_exchange: str | None, dead_letter_routing_key: str | None) -> None:
        """Raise `ConfigurationError` for names that RabbitMQ cannot have, and for a road in a circle."""
        _check_name("queue", queue)
        if not queue:
            raise ConfigurationError(
                "queue must be the name of the queue that is consumed: messages are put back to it"
            )
        if dead_letter_exchange is None and dead_letter_routing_key is not None:
            raise ConfigurationError(
                'dead_letter_routing_key needs dead_letter_exchange; "" is the exchange that leads to the queue of '
                "that name"
            )
        _check_name("dead_letter_exchange", dead_letter_exchange)
        _check_name("dead_letter_routing_key", dead_letter_routing_key)
        routing_key = queue if dead_letter_routing_key is None else dead_letter_routing_key
        if dead_letter_exchange == "" and routing_key == queue:
            raise ConfigurationError(
                f'dead_letter_exchange="" leads dead letters of {queue!r} back to itself: give dead_letter_routing_key='
                "the name of another queue"
            )
        self.queue = queue
        self._exchange = dead_letter_exchange
        self._routing_key = routing_key

    @property
    def missing(self) -> str | None:
        """The keyword to give if dead letters have nowhere to go."""
        return "dead_letter_exchange=" if self._exchange is None else None

    def copy(self, settlement: PutBack | DeadLetter, headers: Mapping[str, Any] | None) -> Copy:
        """Return what to publish for a message with these headers."""
        kept = {name: value for name, value in (headers or {}).items() if name not in _NOT_COPIED}
        if isinstance(settlement, PutBack):
            return Copy("", self.queue, {**kept, COUNT_HEADER: settlement.count}, expires=True)
        assert self._exchange is not None, "without a road a message is put back"
        return Copy(self._exchange, self._routing_key, {**kept, **settlement.headers}, expires=False)

    def log_not_published(self, made: Copy, error: BaseException) -> None:
        """Say which copy the broker did not take, and where it should have gone."""
        _logger.error(
            "a message of %s could not be published to the exchange %r under %r, which has to lead to a queue; it is "
            "held, and tried again: %r",
            self.queue, made.exchange, made.routing_key, error,
        )  # fmt: skip

    def scope(self, *_: object) -> str:
        """The default scope of its messages: the name of the queue."""
        return self.queue

    def key(self, headers: Mapping[str, Any] | None, message_id: object, task_id: object = None) -> str:
        """The default key of a message: that in its headers, else its id, else the id of its Celery task."""
        if headers and WITHOUT_ID_HEADER in headers:
            message_id = None
        for key in (key_in_headers(headers), message_id, task_id):
            if key:
                return str(key)
        raise InvalidKeyError(
            f"a message of {self.queue} has no Idempotency-Key, no source and id of a CloudEvent and no message_id; "
            "let its publisher give one, or take the key from the message with key=..."
        )


def _check_name(keyword: str, name: object) -> None:
    if name is None:
        return
    if not isinstance(name, str) or len(name.encode("utf-8", "surrogatepass")) > _MOST_OF_A_SHORT_TEXT:
        raise ConfigurationError(f"{keyword} must be a text of at most {_MOST_OF_A_SHORT_TEXT} bytes, not {name!r:.99}")
