"""What becomes of a message once its call ended, whatever the broker: acknowledged, put back, or a dead letter.

A broker's integration makes a `MessageHandler` of the user's function, calls it with each message, asks `settle` what
to do with the message, and does that in its client's words. Nothing is dropped: what can neither be acknowledged nor
run again goes to the broker's own dead letters, with headers that say why.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import random
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal, get_args

from idem_tasks.decorator import IdempotentFunction, idempotency_of, idempotent_task
from idem_tasks.errors import (
    ConfigurationError,
    DuplicateError,
    FingerprintMismatchError,
    IdemTasksError,
    InDoubtError,
    InProgressError,
    InvalidKeyError,
    OutcomeError,
    ParkedError,
    ReplayedFailureError,
    StoreError,
    comes_again,
)
from idem_tasks.events import EventName
from idem_tasks.keys import raised_by_callable
from idem_tasks.stores.base import RuntimeName

_logger = logging.getLogger("idem_tasks")

OnError = Literal["put_back", "dead_letter"]
"""What becomes of a message whose handler raised: it comes again, later each time, or it is a dead letter at once."""

COUNT_HEADER = "idem_tasks_put_back"
"""The message header that counts how often a message was put back; the same as Celery's messages have."""

REASON_HEADER = "idem_tasks_reason"
"""Why a message is a dead letter: parked, in_doubt, fingerprint_mismatch, invalid_key, failed or handler_error; NATS
has max_deliver too."""

FIRST_DELAY = 0.5
"""Seconds before a message that was put back comes again, at least; doubled each time."""

LONGEST_DELAY = 30.0
"""Seconds, unless `longest_delay` says otherwise. A message held back takes one place of the prefetch count."""

_SHARE_OF_LIMIT = 0.2
"""Of the time for which a broker lets a consumer hold a message; with the jitter below a quarter, so that a message is
never delivered again while it is held (F64)."""

_HIGHEST_COUNT = 10**6
"""Anybody can write a header; this is a month at the longest delay, and fits into the integers of every broker."""

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
    """The type of the error."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """It would be refused each time, or waits for a person; `headers` say why, without any of its content."""

    reason: str
    headers: Mapping[str, str]


Settlement = Acknowledge | PutBack | DeadLetter


def check_settling(on_error: str, longest_delay: float) -> None:
    """Raise `ConfigurationError` for values that say nothing."""
    if on_error not in get_args(OnError):
        raise ConfigurationError(f"on_error={on_error!r} must be one of {', '.join(get_args(OnError))}")
    if not longest_delay > 0:
        raise ConfigurationError(f"longest_delay={longest_delay!r} must be more than 0 seconds")


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
        missing_road: str | None = None,
        decorator: Callable[..., Any] = idempotent_task,
        **options: Any,
    ) -> None:
        """`options` are the decorator's others: `session`, `idempotency`, `policy` and its fields.

        `decorator` is `idempotent_batch` for a handler of many messages; `settle` is asked for each of them.
        `missing_road`: what to give so that dead letters have somewhere to go, if that was not given; they are put
        back then, as late as possible, and never dropped.

        A handler that is decorated already keeps its own key, scope and fingerprint. Raises `ConfigurationError` for
        one with further options, for a handler of the other runtime, and for what the decorator refuses.
        """
        check_settling(on_error, longest_delay)
        self._on_error = on_error
        self._longest_delay = float(longest_delay)
        self._missing_road = missing_road
        self.function = _decorated(decorator, handler, key=key, scope=scope, fingerprint=fingerprint, **options)
        """The decorated function."""
        self.task: IdempotentFunction = idempotency_of(self.function)
        self._code = _code_of(self.task.function)
        if self.task.asynchronous != (runtime == "asyncio"):
            needed, given = ("async def", "a plain def") if runtime == "asyncio" else ("plain def", "an async def")
            raise ConfigurationError(f"{_name(handler)} is {given}, and this consumer runs {needed} handlers")

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
        """Say, and announce, what is to be done with the message whose call ended with `error`, or returned (None).

        `count` is how often it was put back before, `origin` the queue, topic or subject that it came from; `args`
        and `kwargs` are those of the call. `hold_limit`: seconds for which the broker lets its consumer hold a
        message; a delay stays below a quarter of it. What a handler raises of its own is logged with its traceback,
        and so is what kept it from being called, such as a function that takes the key from the message.
        """
        if error is not None:
            self._log(error, origin)
        settlement = self._settlement(error, count, origin, min(self._longest_delay, hold_limit * _SHARE_OF_LIMIT))
        match settlement:
            case PutBack(delay, times, reason):
                self._announce(EventName.PUT_BACK, args, kwargs, count=times, delay=round(delay, 3), reason=reason)
            case DeadLetter(reason):
                # What is said of a key names what is missing, and never a value.
                told = {"error": str(error)} if isinstance(error, InvalidKeyError) else {}
                self._announce(EventName.DEAD_LETTERED, args, kwargs, reason=reason, origin=origin, **told)
        return settlement

    def _settlement(self, error: BaseException | None, count: int, origin: str, longest: float) -> Settlement:
        if error is None:
            return Acknowledge()
        if isinstance(error, DuplicateError | OutcomeError) and not self._raised_by_handler(error):
            return Acknowledge()  # the handler ran before; its value is nothing that a consumer passes on
        if comes_again(error) or not isinstance(error, Exception):
            return later(error, count, longest)  # F31, F59; and a shutdown or a cancellation
        reason = self._reason_of_death(error)
        if reason is None:
            return later(error, count, longest)
        if self._missing_road is not None:
            _logger.error(
                "a message of %s should be a dead letter (%s), and has nowhere to go: give %s; until then it comes "
                "again and again",
                origin, reason, self._missing_road,
            )  # fmt: skip
            return put_back(longest, count, error)
        return dead_letter(reason, error, origin)

    def _reason_of_death(self, error: Exception) -> str | None:
        """Say why it is a dead letter; None for what has to be tried again."""
        if not isinstance(error, IdemTasksError) and self._has_no_key(error):
            return "invalid_key"
        for kind, reason in _DEAD.items():
            if isinstance(error, kind):
                return reason
        if not isinstance(error, IdemTasksError) and isinstance(error, self.task.policy.record_failures):
            return "failed"
        return "handler_error" if self._on_error == "dead_letter" else None

    def _raised_by_handler(self, error: BaseException) -> bool:
        """Tell what the handler let through, of another call of ours that it made, say, from what we raise for it."""
        return any(frame.f_code is self._code for frame, _ in traceback.walk_tb(error.__traceback__))

    def _has_no_key(self, error: BaseException) -> bool:
        """Tell whether the message is one that its key cannot be taken from, such as a body that is no JSON."""
        return raised_by_callable(error) and not self._raised_by_handler(error)

    def _log(self, error: BaseException, origin: str) -> None:
        """Log what nobody else tells; of our own errors the others are announced, or make a dead letter."""
        if isinstance(error, IdemTasksError):
            if isinstance(error, ConfigurationError) and not isinstance(error, StoreError):
                log_our_own(error, origin)
        elif self._raised_by_handler(error):
            _logger.error("the handler of a message of %s raised", origin, exc_info=error)
        elif (
            isinstance(error, Exception) and error.__traceback__ is None
        ):  # in the place of its outcome: a handler of batches
            _logger.error("the handler of a message of %s returned an exception for it", origin, exc_info=error)
        elif self._has_no_key(error):
            _logger.error("no key could be taken from a message of %s", origin, exc_info=error)
        elif isinstance(error, Exception):
            _logger.error("the handler of a message of %s could not be called", origin, exc_info=error)

    def _announce(self, name: EventName, args: tuple[Any, ...], kwargs: Mapping[str, Any], **details: Any) -> None:
        try:
            scope, key = self.task.scope_for(*args, **kwargs), self.task.key_for(*args, **kwargs)
        except Exception:  # noqa: BLE001 - a message without a usable key is settled too
            scope, key = "", ""
        try:
            self.task.announce(name, scope, key, **details)
        except IdemTasksError:  # there is no usable Idempotency, so nobody who could be told
            _logger.exception("%s is not announced", name.value)


def log_our_own(error: IdemTasksError, origin: str) -> None:
    """Say why a message is not done; our errors name what to change, and quote no message."""
    level = logging.ERROR if isinstance(error, ConfigurationError) else logging.WARNING
    _logger.log(level, "a message of %s is not done: %s", origin, error)


def later(error: BaseException, count: int, longest: float) -> PutBack:
    """Have a message come again once the other's lease is over, or later each time, within `longest` seconds."""
    retry_after = error.retry_after if isinstance(error, InProgressError) else 0.0
    return put_back(min(max(retry_after, FIRST_DELAY * 2.0 ** min(count, 20)), longest), count, error)


def put_back(delay: float, count: int, error: BaseException) -> PutBack:
    """Return that a message comes again after this delay, or a little later."""
    delay *= 1 + random.random() * _JITTER  # noqa: S311 - jitter is no secret
    return PutBack(delay, min(count + 1, _HIGHEST_COUNT), type(error).__name__)


_DEAD: dict[type[Exception], str] = {
    ParkedError: "parked",
    InDoubtError: "in_doubt",
    FingerprintMismatchError: "fingerprint_mismatch",
    InvalidKeyError: "invalid_key",
    ReplayedFailureError: "failed",
}


def dead_letter(reason: str, error: BaseException, origin: str) -> DeadLetter:
    """Return that a message is a dead letter; with types and names only: what an error says may quote the message."""
    headers = {REASON_HEADER: reason, "idem_tasks_error_type": type(error).__name__, "idem_tasks_origin": origin}
    for name in ("scope", "key"):
        value = getattr(error, name, "")
        if isinstance(error, IdemTasksError) and value:
            headers[f"idem_tasks_{name}"] = value
    return DeadLetter(reason, headers)


def _decorated(decorator: Callable[..., Any], handler: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    try:
        known = idempotency_of(handler)
    except ConfigurationError:
        decorated: Callable[..., Any] = decorator(**options)(handler)
        return decorated
    if known.takes_many and decorator is idempotent_task:
        raise ConfigurationError(
            f"{_name(handler)} is decorated with @idempotent_batch and takes many messages at once; "
            "this consumer gives its handler one at a time: take @idempotent_task"
        )
    if decorator is not idempotent_task and not known.takes_many:
        raise ConfigurationError(
            f"{_name(handler)} is decorated with @idempotent_task and takes one message at a time; "
            "this consumer gives its handler many: take @idempotent_batch"
        )
    further = {name for name, value in options.items() if value is not None} - {"key", "scope", "fingerprint"}
    if further:
        raise ConfigurationError(
            f"{_name(handler)} is decorated with @idempotent_task already: give {', '.join(sorted(further))} there"
        )
    return handler


def _code_of(function: Any) -> CodeType | None:
    """Return the code that runs in a handler's own frame; None for a function that is not written in Python."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return code if isinstance(code, CodeType) else None


def _name(handler: Callable[..., Any]) -> str:
    return str(getattr(handler, "__qualname__", handler))


# What the headers of a message say


_KEY_HEADERS = ("idempotency-key", "idempotency_key")

_CLOUD_EVENTS = ("ce_", "ce-", "cloudevents:", "cloudevents_")
"""How the attributes of a CloudEvent are prefixed in the headers of Kafka, NATS and HTTP, and AMQP."""


def key_in_headers(headers: Mapping[str, Any] | None) -> str | None:
    """Return the key that the publisher gave a message: `Idempotency-Key`, else the source and id of its CloudEvent.

    CloudEvents 1.0 says that source and id together are the same for duplicates only; neither alone is. A source has no
    blank in it, so that "source id" stands for one pair only. Names are compared without their case, values may be
    bytes in UTF-8. None where there is neither; an empty value is no key.
    """
    found = {name.lower(): text for name, value in (headers or {}).items() if (text := _text(value))}
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
        return min(max(int(_text((headers or {}).get(COUNT_HEADER)) or 0), 0), _HIGHEST_COUNT)
    except ValueError:
        return 0


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return "" if value is None else str(value)
