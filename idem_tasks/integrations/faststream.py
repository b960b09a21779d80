"""FastStream: a middleware that runs each message's handler once for its key, and settles the message.

`RabbitBroker(url, middlewares=[IdempotencyMiddleware()])`. A duplicate gets the recorded outcome as if the handler had
returned it, so that its reply and its publishers are sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal

from idem_tasks import hosts
from idem_tasks.decorator import idempotency_of
from idem_tasks.errors import ConfigurationError, MissingExtraError
from idem_tasks.integrations.settling import (
    FIRST_DELAY,
    LONGEST_DELAY,
    DeadLetter,
    MessageHandler,
    OnError,
    PutBack,
    key_in_headers,
)
from idem_tasks.outcomes import UNANNOTATED, ReturnType
from idem_tasks.stores.base import RuntimeName

try:
    from faststream import AckPolicy, BaseMiddleware, ContextRepo
    from faststream.exceptions import AckMessage, HandlerException, IgnoredException, NackMessage, RejectMessage
    from faststream.message import SourceType, StreamMessage
except ImportError as error:
    raise MissingExtraError(package="faststream", extra="faststream") from error

_logger = logging.getLogger("idem_tasks")

Message = StreamMessage[Any]
DeadLetters = Literal["reject"] | Callable[[Message, Mapping[str, str]], Awaitable[Any]]

_REMEMBERED = 10_000
"""Messages whose put-backs are counted, at most: brokers do not all count deliveries, and a count only sets a delay."""

_EARLY = {AckPolicy.ACK_FIRST: "before it runs", AckPolicy.MANUAL: "by its handler, before its outcome is recorded"}


def message_key(message: Message) -> str | None:
    """Return the key that the publisher gave a message, else its message id, else its place in a stream or topic.

    The publisher's is `Idempotency-Key`, or the source and id of a CloudEvent. None, and so an `InvalidKeyError`,
    where there is neither: FastStream then makes up an id for each delivery. A correlation id is no key: all
    messages of a conversation have it.
    """
    raw = message.raw_message
    given = key_in_headers(message.headers) or message.headers.get("message_id") or message.headers.get("Nats-Msg-Id")
    found = given or getattr(raw, "message_id", None) or _place(raw)
    return None if found is None else str(found)


def _place(raw: Any) -> str | None:
    if getattr(raw, "reply", "").startswith("$JS.ACK."):  # JetStream's; a message of NATS itself comes once
        return f"{raw.metadata.stream}:{raw.metadata.sequence.stream}"
    place = [getattr(raw, name, None) for name in ("topic", "partition", "offset")]  # Kafka's
    if None in place:
        return None
    return ":".join(str(part() if callable(part) else part) for part in place)  # confluent-kafka has methods


def message_body(message: Message) -> bytes:
    """Return what must be the same whenever the key is."""
    body: bytes = message.body
    return body


class IdempotencyMiddleware:
    """Makes the handlers of a broker, or of a router, run their effects once for each key, and settles their messages.

    The scope is the handler's `module.qualname`, unless `scope` says otherwise. A handler that is decorated with
    `@idempotent_task` itself keeps its key and all else, and its messages are settled. `dead_letter` is "reject" where
    the broker keeps what is rejected (a RabbitMQ queue with a dead-letter exchange), or a coroutine function that
    publishes a message with headers that say why, and returns when it is safe. `longest_delay` is in seconds. The other
    `options` are those of `@idempotent_task`: `session`, `idempotency`, `policy` and its fields.

    Raises `ConfigurationError` for what the decorator refuses.
    """

    def __init__(
        self,
        *,
        key: str | Callable[..., object] = message_key,
        scope: str | Callable[..., object] | None = None,
        fingerprint: str | Sequence[str] | Callable[..., object] | None = message_body,
        dead_letter: DeadLetters | None = None,
        on_error: OnError = "put_back",
        longest_delay: float = LONGEST_DELAY,
        **options: Any,
    ) -> None:
        if not (dead_letter is None or dead_letter == "reject" or callable(dead_letter)):
            raise ConfigurationError(
                f'dead_letter={dead_letter!r} must be "reject", or async def keep(message, headers), which publishes it'
            )
        self._identity: dict[str, Any] = {"key": key, "scope": scope, "fingerprint": fingerprint}
        self._settling: dict[str, Any] = {
            "on_error": on_error,
            "longest_delay": longest_delay,
            "missing_road": None if dead_letter else "dead_letter= to IdempotencyMiddleware",
        }
        self._options = options
        self.dead_letter = dead_letter
        self.longest_delay = float(longest_delay)
        self._times_put_back: dict[str, int] = {}
        self._handlers: dict[Any, _Handler] = {}
        self._made_of(_call_next_of_message)  # so that a wrong option is an error here, not at the first message

    def __call__(self, msg: Any, /, *, context: ContextRepo) -> BaseMiddleware[Any, Any]:
        """Return the middleware of one message, as FastStream asks for."""
        return _OfMessage(msg, context=context, common=self)

    def handler_of(self, subscriber: Any) -> _Handler:
        """Return what runs and settles the messages of a subscriber."""
        if subscriber not in self._handlers:
            functions = [call.handler._original_call for call in subscriber.calls]  # noqa: SLF001 - it has no other name
            if len({_is_decorated(function) for function in functions}) > 1:
                raise ConfigurationError(
                    f"of the handlers of {subscriber!r} some are decorated with @idempotent_task: decorate all or none"
                )
            if early := _EARLY.get(subscriber.ack_policy):
                _logger.warning(
                    "%r: its messages are acknowledged %s, so that a consumer that dies loses one: give the subscriber "
                    "ack_policy=AckPolicy.NACK_ON_ERROR",
                    subscriber,
                    early,
                )
            self._handlers[subscriber] = self._made_of(functions[0])
        return self._handlers[subscriber]

    def _made_of(self, function: Callable[..., Any]) -> _Handler:
        if _is_decorated(function):
            runtime: RuntimeName = "asyncio" if idempotency_of(function).asynchronous else "blocking"
            return _Handler(self._handler(function, runtime), claims=False)

        async def handle(message: Message) -> Any:
            return await _call_next_of_message(message)

        handle.__module__, handle.__qualname__ = function.__module__, function.__qualname__  # its default scope
        returned = ReturnType(function).resolve()
        handle.__annotations__ = {} if returned is UNANNOTATED else {"return": returned}
        return _Handler(self._handler(handle, "asyncio", **self._options), claims=True)

    def _handler(self, function: Callable[..., Any], runtime: RuntimeName, **options: Any) -> MessageHandler:
        return MessageHandler(function, runtime=runtime, **self._identity, **self._settling, **options)

    def count_put_back(self, message: Message) -> int:
        """Return how often this process put a message back before, and count this time."""
        before = self._times_put_back.pop(message.message_id, 0)
        self._times_put_back[message.message_id] = before + 1
        if len(self._times_put_back) > _REMEMBERED:
            del self._times_put_back[next(iter(self._times_put_back))]
        return before

    def forget(self, message: Message) -> None:
        """Count no more for a message that is done."""
        self._times_put_back.pop(message.message_id, None)


@dataclass(frozen=True, slots=True)
class _Handler:
    """What runs and settles the messages of one subscriber."""

    settling: MessageHandler
    claims: bool
    """Whether the middleware claims keys for it; else the handler does, which is decorated itself."""


_CallNext = Callable[[Any], Awaitable[Any]]
_call_next: ContextVar[_CallNext] = ContextVar("idem_tasks_faststream_call_next")


async def _call_next_of_message(message: Message) -> Any:
    return await _call_next.get()(message)


def _is_decorated(function: Callable[..., Any]) -> bool:
    try:
        idempotency_of(function)
    except ConfigurationError:
        return False
    return True


class _OfMessage(BaseMiddleware[Any, Any]):
    """What FastStream puts around the handling of one message."""

    def __init__(self, msg: Any, /, *, context: ContextRepo, common: IdempotencyMiddleware) -> None:
        super().__init__(msg, context=context)
        self._common = common
        self._acknowledged: AckMessage | None = None
        self._has_outcome = False

    async def consume_scope(self, call_next: _CallNext, msg: Message) -> Any:
        """Run the handler or return its recorded outcome; raise what makes FastStream settle the message."""
        if msg.source_type is SourceType.RESPONSE:  # to a request of ours
            return await call_next(msg)
        try:
            handler = self._common.handler_of(self.context.get_local("handler_"))
        except ConfigurationError as error:  # FastStream rejects a message for it, and RabbitMQ would drop that
            _logger.error("a message of %s could not be handled: %s", self._origin(), error)  # noqa: TRY400 - it says all
            raise await _later(msg, self._common.longest_delay) from error
        _current.set(_Host(handler.settling.function, msg.message_id))
        try:
            _refuse_batch(msg)
            if handler.claims:
                _call_next.set(partial(self._noticing_ack, call_next))
                value = await handler.settling.function(msg)
            else:
                value = await call_next(msg)
        except IgnoredException as own:  # the handler's own Nack, Reject or stop
            if isinstance(own, AckMessage):
                _logger.error(  # noqa: TRY400 - where it was raised says nothing
                    "a handler of %s raised AckMessage under its own @idempotent_task, so that no outcome is recorded "
                    "and a duplicate runs again: let it return instead, or leave the decorator to the middleware",
                    self._origin(),
                )
            raise
        except Exception as error:
            raise await self._settled(handler.settling, msg, error) from error
        except GeneratorExit:  # the event loop is gone: nothing can be awaited
            raise
        except BaseException:  # a cancellation, for which FastStream 0.6 would reject the message
            with contextlib.suppress(Exception):  # its connection is gone: it comes again then
                await msg.nack()
            raise
        self._has_outcome = True
        self._common.forget(msg)
        if self._acknowledged is not None:
            raise self._acknowledged
        return value

    async def _noticing_ack(self, call_next: _CallNext, msg: Message) -> Any:
        """Let a handler's own `AckMessage` be recorded as an end of it, which it is."""
        try:
            return await call_next(msg)
        except AckMessage as acknowledged:
            self._acknowledged = acknowledged
            return None

    async def _settled(self, settling: MessageHandler, msg: Message, error: Exception) -> HandlerException:
        count = self._common.count_put_back(msg)
        settlement = settling.settle(error, count, self._origin(), (msg,), {})
        match settlement:
            case PutBack(delay):
                return await _later(msg, delay)
            case DeadLetter() if not await self._is_dead(msg, settlement):
                return await _later(msg, self._common.longest_delay)
        self._common.forget(msg)
        if isinstance(settlement, DeadLetter) and self._common.dead_letter == "reject":
            return RejectMessage()
        return AckMessage()

    async def _is_dead(self, msg: Message, dead_letter: DeadLetter) -> bool:
        """Have a dead letter kept; tell, and log, whether it is."""
        keep = self._common.dead_letter
        if keep == "reject":
            return True
        assert keep is not None  # else it is put back
        try:
            await keep(msg, dead_letter.headers)
        except Exception as failed:  # noqa: BLE001 - it must not be acknowledged, whatever it was
            _logger.error("a dead letter of %s could not be published: %r", self._origin(), failed)  # noqa: TRY400 - its traceback may show the message
            return False
        return True

    def _origin(self) -> str:
        context = self.context.get_local("log_context") or {}
        return str(next((context[name] for name in _ORIGINS if context.get(name)), ""))

    async def after_processed(
        self,
        exc_type: type[BaseException] | None = None,
        exc_val: BaseException | None = None,
        exc_tb: TracebackType | None = None,
    ) -> bool | None:
        """Have a message come again whose outcome is recorded, but not published as FastStream should."""
        if self._has_outcome and isinstance(exc_val, Exception) and not isinstance(exc_val, HandlerException):
            _logger.error("the outcome of a message of %s was not published: %r", self._origin(), exc_val)
            await asyncio.sleep(FIRST_DELAY)
            raise NackMessage from exc_val
        return False


class _Host:
    """One delivery of a FastStream message, seen from what claims its key; the middleware settles it."""

    scope: str | None = None
    framework_argument = False

    def __init__(self, function: Callable[..., Any], message: str) -> None:
        self.function = function
        self.message = message
        """Its id."""

    def is_failure(self, error: BaseException) -> bool:
        """Tell a handler's failure from what it says to FastStream."""
        return not isinstance(error, IgnoredException)

    def proves_no_effect(self, error: BaseException) -> bool:
        """Tell whether the handler asked for another delivery."""
        return isinstance(error, NackMessage)

    def settle(self, error: BaseException, announce: Callable[..., None]) -> BaseException:
        """Leave it to the middleware."""
        return error


_current: ContextVar[_Host | None] = ContextVar("idem_tasks_faststream_host", default=None)


def _find_host(function: Callable[..., Any]) -> _Host | None:
    host = _current.get()
    return host if host is not None and hosts.runs(host.function, function) else None


def _refuse_nothing(target: object) -> None:
    """A subscriber under the decorator is called by FastStream all the same, with the middleware around it."""


hosts.register(_find_host, _refuse_nothing)


def _refuse_batch(msg: Message) -> None:
    """Raise `ConfigurationError` for a batch: it has the headers of its first message, and so that one's key."""
    if msg.batch_headers or isinstance(msg.raw_message, list | tuple):
        raise ConfigurationError(
            "IdempotencyMiddleware takes one message a call, and this subscriber takes batches: subscribe without "
            "batch=True, or give such subscribers a broker or a router without the middleware"
        )


_ORIGINS = ("queue", "topic", "subject", "stream", "channel", "list")
"""How FastStream's log context names where a message came from."""


async def _later(msg: Message, delay: float) -> NackMessage:
    """Return what brings a message back after the delay: the broker waits, if it can, else this consumer."""
    if "delay" in inspect.signature(msg.nack).parameters:  # NATS
        return NackMessage(delay=delay)
    await asyncio.sleep(delay)
    return NackMessage()
