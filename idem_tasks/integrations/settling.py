"""What becomes of a message once its call ended, whatever the broker: acknowledged, put back, or a dead letter.

A broker's integration makes a `MessageHandler` of the user's function, calls it with each message, asks `settle` what
to do with the message, and does that in its client's words. Nothing is dropped: what can neither be acknowledged nor
run again goes to the broker's own dead letters, with headers that say why.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from idem_tasks.decorator import IdempotentFunction, idempotency_of, idempotent_task
from idem_tasks.errors import (
    ConfigurationError,
    DuplicateError,
    FingerprintMismatchError,
    IdemTasksError,
    InDoubtError,
    InvalidKeyError,
    OutcomeError,
    ParkedError,
    ReplayedFailureError,
    comes_again,
)
from idem_tasks.events import EventName
from idem_tasks.stores.base import RuntimeName

OnError = Literal["put_back", "dead_letter"]
"""What becomes of a message whose handler raised: it comes again, later each time, or it is a dead letter at once."""

COUNT_HEADER = "idem_tasks_put_back"
"""The message header that counts how often a message was put back; the same as Celery's messages have."""

REASON_HEADER = "idem_tasks_reason"
"""Why a message is a dead letter: parked, in_doubt, fingerprint_mismatch, invalid_key, failed or handler_error."""

FIRST_DELAY = 0.5
"""Seconds before a message that was put back comes again, at least; doubled each time."""

LONGEST_DELAY = 30.0
"""Seconds, unless `longest_delay` says otherwise. RabbitMQ lets a consumer hold a message for 1,800 s, NATS for as long
as it is told that it is in progress; a message held back takes one place of the prefetch count."""

_JITTER = 0.2
"""Of the delay, at most: so that the duplicates of one message do not come back together."""


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Its outcome is recorded."""


@dataclass(frozen=True, slots=True)
class PutBack:
    """It has to come again after `delay` seconds; it was put back `count` times then, this time included."""

    delay: float
    count: int
    reason: str


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """It would be refused each time, or waits for a person; `headers` say why, without any of its content."""

    reason: str
    headers: Mapping[str, str]


Settlement = Acknowledge | PutBack | DeadLetter


class MessageHandler:
    """A user's function with what makes it idempotent, and with what tells how its messages are settled."""

    def __init__(
        self,
        handler: Callable[..., Any],
        *,
        runtime: RuntimeName,
        key: str | Callable[..., object],
        scope: str | Callable[..., object],
        fingerprint: str | Sequence[str] | Callable[..., object] | None,
        on_error: OnError = "put_back",
        longest_delay: float = LONGEST_DELAY,
        **options: Any,
    ) -> None:
        """`options` are the decorator's others: `session`, `idempotency`, `policy` and its fields.

        A handler that is decorated already keeps its own key, scope, fingerprint and options. Raises
        `ConfigurationError` for a handler of the other runtime, and for what the decorator refuses.
        """
        if on_error not in get_args(OnError):
            raise ConfigurationError(f"on_error={on_error!r} must be one of {', '.join(get_args(OnError))}")
        if not longest_delay > 0:
            raise ConfigurationError(f"longest_delay={longest_delay!r} must be more than 0 seconds")
        self._on_error = on_error
        self._longest_delay = float(longest_delay)
        self.function = _decorated(handler, key=key, scope=scope, fingerprint=fingerprint, **options)
        """The decorated function."""
        self.task: IdempotentFunction = idempotency_of(self.function)
        if self.task.asynchronous != (runtime == "asyncio"):
            needed, given = ("async def", "def") if runtime == "asyncio" else ("def", "async def")
            raise ConfigurationError(f"{_name(handler)} is a plain {given}, and this consumer runs {needed} handlers")

    def settle(
        self, error: BaseException | None, count: int, origin: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Settlement:
        """Say, and announce, what is to be done with the message whose call ended with `error`, or returned (None).

        `count` is how often it was put back before, `origin` the queue, topic or subject that it came from; `args`
        and `kwargs` are those of the call.
        """
        settlement = self._settlement(error, count, origin)
        match settlement:
            case PutBack(delay, times, reason):
                self._announce(EventName.PUT_BACK, args, kwargs, count=times, delay=round(delay, 3), reason=reason)
            case DeadLetter(reason):
                self._announce(EventName.DEAD_LETTERED, args, kwargs, reason=reason, origin=origin)
        return settlement

    def _settlement(self, error: BaseException | None, count: int, origin: str) -> Settlement:
        if error is None or isinstance(error, DuplicateError | OutcomeError):
            return Acknowledge()  # the handler ran, now or before; its value is nothing that a consumer passes on
        if comes_again(error) or not isinstance(error, Exception):
            return self._later(error, count)  # F31, F59; and a shutdown or a cancellation
        if self._is_final(error):
            return _dead_letter("failed", error, origin)
        for kind, reason in _DEAD.items():
            if isinstance(error, kind):
                return _dead_letter(reason, error, origin)
        if self._on_error == "dead_letter":
            return _dead_letter("handler_error", error, origin)
        return self._later(error, count)

    def _is_final(self, error: BaseException) -> bool:
        if isinstance(error, ReplayedFailureError):
            return True
        return isinstance(error, self.task.policy.record_failures) and not isinstance(error, IdemTasksError)

    def _later(self, error: BaseException, count: int) -> PutBack:
        growing = FIRST_DELAY * 2.0 ** min(count, 20)
        delay = min(max(getattr(error, "retry_after", 0.0), growing), self._longest_delay)
        delay *= 1 + random.random() * _JITTER  # noqa: S311 - jitter is no secret
        return PutBack(delay, count + 1, type(error).__name__)

    def _announce(self, name: EventName, args: tuple[Any, ...], kwargs: Mapping[str, Any], **details: Any) -> None:
        try:
            scope, key = self.task.scope_for(*args, **kwargs), self.task.key_for(*args, **kwargs)
        except Exception:  # noqa: BLE001 - a message without a usable key is settled too
            scope, key = "", ""
        self.task.announce(name, scope, key, **details)


_DEAD: dict[type[Exception], str] = {
    ParkedError: "parked",
    InDoubtError: "in_doubt",
    FingerprintMismatchError: "fingerprint_mismatch",
    InvalidKeyError: "invalid_key",
}


def _dead_letter(reason: str, error: BaseException, origin: str) -> DeadLetter:
    """Only types and names: what an error says may quote the message."""
    headers = {REASON_HEADER: reason, "idem_tasks_error_type": type(error).__name__, "idem_tasks_origin": origin}
    for name in ("scope", "key"):
        value = getattr(error, name, "")
        if isinstance(error, IdemTasksError) and value:
            headers[f"idem_tasks_{name}"] = value
    return DeadLetter(reason, headers)


def _decorated(handler: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    try:
        known = idempotency_of(handler)
    except ConfigurationError:
        return idempotent_task(**options)(handler)
    if known.takes_many:
        raise ConfigurationError(
            f"{_name(handler)} is decorated with @idempotent_batch and takes many messages at once; "
            "this consumer gives its handler one at a time: take @idempotent_task"
        )
    return handler


def _name(handler: Callable[..., Any]) -> str:
    return str(getattr(handler, "__qualname__", handler))


# The key of a message


_KEY_HEADERS = ("idempotency-key", "idempotency_key")

_CLOUD_EVENTS = ("ce_", "ce-", "cloudevents:", "cloudevents_")
"""How the attributes of a CloudEvent are prefixed in the headers of Kafka, NATS and HTTP, and AMQP."""


def key_in_headers(headers: Mapping[str, Any] | None) -> str | None:
    """Return the key that the publisher gave a message: `Idempotency-Key`, else the source and id of its CloudEvent.

    CloudEvents 1.0 says that source and id together are the same for duplicates only; neither alone is. A source has no
    blank in it, so that "source id" stands for one pair only. Names are compared without their case, values may be
    bytes in UTF-8. None where there is neither; an empty value is no key.
    """
    found = {name.lower(): _text(value) for name, value in (headers or {}).items()}
    for name in _KEY_HEADERS:
        if found.get(name):
            return found[name]
    for prefix in _CLOUD_EVENTS:
        source, event_id = found.get(f"{prefix}source"), found.get(f"{prefix}id")
        if source and event_id:
            return f"{source} {event_id}"
    return None


def times_put_back(headers: Mapping[str, Any] | None) -> int:
    """Return how often a message was put back before."""
    try:
        return max(int(_text((headers or {}).get(COUNT_HEADER)) or 0), 0)
    except ValueError:
        return 0


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return "" if value is None else str(value)
