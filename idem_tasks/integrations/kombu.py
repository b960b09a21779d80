"""Sends messages of the outbox through kombu, to an exchange or a queue of any broker that it knows."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Mapping
from numbers import Real
from typing import Any

from kombu import Connection, Producer, Queue

from idem_tasks.claims import OutboxMessage
from idem_tasks.errors import ConfigurationError, MessageError

_CONFIRM_TIMEOUT = 10.0
"""Seconds to wait for the broker's confirmation."""

_CONNECT_TIMEOUT = 5.0
"""Seconds in which a broker that is there accepts a connection."""

_MOST_OF_A_SHORT_TEXT = 255
"""Bytes; as long as AMQP's short strings are."""

_HIGHEST_PRIORITY = 255

_OPTIONS = frozenset({"exchange", "routing_key", "queue", "mandatory", "priority", "expiration"})


class KombuSender:
    """Publishes messages to the broker at `url`; one for `senders={"shop": KombuSender("amqp://...")}`.

    The body is JSON, `message_id` and `correlation_id` are the message's id, and the headers are its headers with
    `scope` and `key`. Options of `publish_message`, each with a default given here: `exchange` and `routing_key`;
    or `queue`, which is made if it is not there; `priority`; `expiration` (seconds); `mandatory`. With RabbitMQ each
    message waits for its confirmation, and one that no queue takes is an error, unless `mandatory` is False.

    One connection for each process, made when it is first used, and again after an error.
    """

    def __init__(self, url: str, **defaults: Any) -> None:
        self._url = url
        self._defaults = defaults
        self._check(defaults)
        self._lock = threading.Lock()
        self._producer: Producer | None = None
        _made.add(self)

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise `ConfigurationError` for options that it does not know, and for values that no broker takes."""
        options = {**self._defaults, **options}
        self._check(options)
        if not any(options.get(name) for name in ("exchange", "routing_key", "queue")):
            raise ConfigurationError("a message needs a queue, an exchange or a routing_key")

    def _check(self, options: Mapping[str, Any]) -> None:
        unknown = sorted(set(options) - _OPTIONS)
        if unknown:
            raise ConfigurationError(f"unknown options: {', '.join(unknown)}; known: {', '.join(sorted(_OPTIONS))}")
        if "queue" in options and "exchange" in options:
            raise ConfigurationError("a message goes either to a queue or to an exchange")
        check_options(options)

    def check_headers(self, headers: Mapping[str, Any]) -> None:
        """Raise `MessageError` for headers that AMQP cannot hold."""
        check_headers(headers)

    def __call__(self, message: OutboxMessage) -> None:
        """Return once the broker has the message; raise what kombu raises."""
        options = {**self._defaults, **message.options}
        queue, mandatory = options.pop("queue", None), options.pop("mandatory", True)
        if queue is not None:
            options |= {"exchange": "", "routing_key": queue, "declare": [Queue(queue, exchange="", routing_key=queue)]}
        with self._lock:
            producer = self._connected()
            try:
                producer.publish(
                    message.json,
                    content_type="application/json",
                    content_encoding="utf-8",
                    headers={**message.headers, "scope": message.scope, "key": message.key},
                    message_id=message.id,
                    correlation_id=message.id,
                    delivery_mode="persistent",
                    **self._of_transport(producer, mandatory),
                    **options,
                )
            except BaseException:  # whatever struck: a confirmation may still come, and be taken for the next one's
                self._disconnect()
                raise

    def _of_transport(self, producer: Producer, mandatory: bool) -> dict[str, Any]:
        if producer.connection.transport.driver_type != "amqp":
            return {}  # its reply to the command is the confirmation
        return {"confirm_timeout": _CONFIRM_TIMEOUT, "mandatory": mandatory}

    def _connected(self) -> Producer:
        if self._producer is None:
            connection = Connection(
                self._url, connect_timeout=_CONNECT_TIMEOUT, transport_options={"confirm_publish": True}
            )
            self._producer = Producer(connection)
        return self._producer

    def _disconnect(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(Exception):  # it is broken perhaps, and that may be anything of its transport
                producer.connection.close()

    def close(self) -> None:
        """Close the connection of this process; a further message opens a new one."""
        with self._lock:
            self._disconnect()


_made: weakref.WeakSet[KombuSender] = weakref.WeakSet()


def _begin_anew() -> None:
    """In a forked child: the lock is perhaps held by a thread of the parent, whose connection it is too."""
    for sender in list(_made):
        sender._lock, sender._producer = threading.Lock(), None  # noqa: SLF001 - of this module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` for values with which a message could never be sent."""
    for name in ("exchange", "routing_key", "queue"):
        text = options.get(name)
        if text is not None and not (isinstance(text, str) and _is_short(text)):
            raise ConfigurationError(f"{name} must be a text of at most {_MOST_OF_A_SHORT_TEXT} bytes")
    priority, expiration = options.get("priority"), options.get("expiration")
    if priority is not None and not (isinstance(priority, int) and 0 <= priority <= _HIGHEST_PRIORITY):
        raise ConfigurationError(f"priority={priority!r} must be a whole number from 0 to {_HIGHEST_PRIORITY}")
    if expiration is not None and not (isinstance(expiration, Real) and 0 <= float(expiration) < float("inf")):
        raise ConfigurationError(f"expiration={expiration!r} must be a number of seconds, 0 or more")


def check_headers(headers: Mapping[Any, Any]) -> None:
    """Raise `MessageError` for a name of more than 255 bytes, and for a whole number of more than 64 bits."""
    for name, value in headers.items():
        if not (isinstance(name, str) and _is_short(name)):
            raise MessageError(f"the name of a header must be a text of at most {_MOST_OF_A_SHORT_TEXT} bytes")
        _check_header(name, value)


def _check_header(name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        check_headers(value)
    elif isinstance(value, list | tuple):
        for each in value:
            _check_header(name, each)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise MessageError(f"the header {name!r} must be a whole number of at most 64 bits")


def _is_short(text: str) -> bool:
    return len(text.encode("utf-8", "surrogatepass")) <= _MOST_OF_A_SHORT_TEXT
