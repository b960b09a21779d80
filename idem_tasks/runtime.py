"""The two runtimes a handler can live in, and all that differs between them.

Everything else is written once, as coroutines. A blocking call drives its coroutine with `run_sync` on its
caller's thread: it never suspends, because a blocking store awaits nothing that waits. An asyncio call awaits it.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import CoroutineType
from typing import Any, Protocol, TypeVar

from idem_tasks.errors import ConfigurationError

T = TypeVar("T")


def _system_clock(boottime: int | None) -> Callable[[], float]:
    return time.monotonic if boottime is None else partial(time.clock_gettime, boottime)


_read_clock = _system_clock(getattr(time, "CLOCK_BOOTTIME", None))


def deadline_clock() -> float:
    """Return seconds on a clock that never jumps and, where the system has one, runs on while it is suspended."""
    return _read_clock()


@contextmanager
def deadline_clock_from(read: Callable[[], float]) -> Iterator[None]:
    """Let `deadline_clock` of this process tell what `read` returns, for tests that move time."""
    global _read_clock  # noqa: PLW0603 - one clock a process, as the system's is
    before, _read_clock = _read_clock, read
    try:
        yield
    finally:
        _read_clock = before


async def resolve(reply: Awaitable[T] | T) -> T:
    """Return a blocking client's reply as it is, or wait for an asyncio client's."""
    if inspect.isawaitable(reply):
        return await reply
    return reply


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits to its end, on this thread, and return its value.

    Raises what it raises. A coroutine that does wait was given an asyncio client by mistake: RuntimeError.
    """
    try:
        coroutine.send(None)
    except StopIteration as stop:
        value: T = stop.value
        return value
    coroutine.close()
    raise RuntimeError("a blocking call met an asyncio store or handler and would wait for ever")


class Runtime(Protocol):
    """What a claim needs of the world its handler lives in."""

    async def invoke(self, handler: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the handler on its caller's thread and return its value."""
        ...

    async def ask(self, question: Callable[..., Any], subject: object, seconds: float) -> Any:
        """Call what tells of the outside world, and return its answer; one that can be stopped gets `seconds`."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait without holding up anything but this call."""
        ...

    async def shield(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Bring an operation to its end though this call is cancelled meanwhile; raise the cancellation after it.

        The operation must be one that may be begun again: its first try may have taken effect. What it raises itself
        gives way to a cancellation or shutdown, which is never swallowed, and becomes its cause.
        """
        ...

    def can_wait(self, *, after: BaseException) -> bool:
        """Tell whether anything can still be awaited once this was raised."""
        ...

    def drive(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine of ours for a handler: return its value, or what the handler awaits for it."""
        ...


class HandlerStopIteration(Exception):  # noqa: N818 - it carries what it is named after
    """Carries a handler's StopIteration out of a coroutine, which Python forbids to raise it (PEP 479)."""

    def __init__(self, error: StopIteration) -> None:
        super().__init__()
        self.error = error


class Blocking:
    """Plain functions: in threads, processes, greenlets."""

    async def invoke(self, handler: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the handler."""
        try:
            value = handler(*args, **kwargs)
        except StopIteration as error:
            raise HandlerStopIteration(error) from None
        if type(value) is CoroutineType:
            value.close()
            raise ConfigurationError(
                f"{getattr(handler, '__qualname__', handler)} returned a coroutine, which nobody awaits here; "
                "nothing ran: await it with arun(...), or decorate the async def function itself"
            )
        return value

    async def ask(self, question: Callable[..., Any], subject: object, seconds: float) -> Any:
        """Call it; nothing can stop it here."""
        return await self.invoke(question, (subject,), {})

    async def sleep(self, seconds: float) -> None:
        """Block this thread or greenlet."""
        time.sleep(seconds)  # noqa: ASYNC251 - this coroutine is driven by run_sync, on its caller's thread

    async def shield(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Begin the operation again when something from outside strikes in it, and raise that afterwards.

        A soft time limit, SystemExit on shutdown or a gevent.Timeout can strike at any instruction. Stores raise
        it as itself, also when a database driver has wrapped it (`interruption_in`).
        """
        before, struck = sys.exception(), None
        for _ in range(_SHIELD_TRIES):
            try:
                value = await operation()
            except BaseException as error:
                interruption = interruption_in(error, before)
                if interruption is not None:
                    # A shutdown stays one, though a time limit strikes after it.
                    struck = interruption if struck is None or isinstance(struck, Exception) else struck
                elif struck is None or isinstance(struck, Exception):
                    raise
                else:
                    raise struck from error
            else:
                if struck is not None:
                    raise struck
                return value
        assert struck is not None
        raise struck

    def can_wait(self, *, after: BaseException) -> bool:
        """Say yes: nothing here ever suspends."""
        return True

    def drive(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run it to its end."""
        try:
            return run_sync(coroutine)
        except HandlerStopIteration as carrier:
            raise carrier.error from None


class Asyncio:
    """Coroutine functions, on the running event loop."""

    async def invoke(self, handler: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Await the handler; one that returns its value at once (under a wrapper that waited itself) has run too."""
        value = handler(*args, **kwargs)
        return await value if inspect.isawaitable(value) else value

    async def ask(self, question: Callable[..., Any], subject: object, seconds: float) -> Any:
        """Await it for so many seconds; raises `TimeoutError` then."""
        async with asyncio.timeout(seconds):
            return await self.invoke(question, (subject,), {})

    async def sleep(self, seconds: float) -> None:
        """Suspend this task."""
        await asyncio.sleep(seconds)

    async def shield(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run the operation in a task of its own; a loop that shuts down cancels that too: then begin again."""
        cancelled: asyncio.CancelledError | None = None
        for _ in range(_SHIELD_TRIES):
            task = asyncio.ensure_future(operation())
            while not task.done():
                try:
                    await asyncio.wait((task,))
                except asyncio.CancelledError as error:
                    cancelled = error
            if not task.cancelled():
                if cancelled is None:
                    return task.result()
                raise cancelled from task.exception()
        raise cancelled or asyncio.CancelledError

    def can_wait(self, *, after: BaseException) -> bool:
        """Say no after GeneratorExit: the event loop is gone, or does not know this coroutine any more."""
        return not isinstance(after, GeneratorExit)

    def drive(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Return it: the handler awaits it."""
        return coroutine


FIRST_PAUSE = 0.05
"""Seconds between the first two looks at a key in progress, or tries of a write; doubled each time."""

LONGEST_PAUSE = 2.0
"""Seconds between two such tries, at most."""

_SHIELD_TRIES = 10
"""A call is interrupted once or twice at most (soft limit, then shutdown); more would be a fault in a loop."""

_INTERRUPTIONS: list[type[BaseException]] = []


def register_interruption(kind: type[BaseException]) -> None:
    """Make `kind`, an Exception raised by a framework at any instruction, count as one (Celery's soft limit)."""
    if kind not in _INTERRUPTIONS:
        _INTERRUPTIONS.append(kind)


def is_interruption(error: BaseException) -> bool:
    """Tell whether a framework raised this at any instruction."""
    return isinstance(error, tuple(_INTERRUPTIONS))


def interruption_in(error: BaseException, before: BaseException | None) -> BaseException | None:
    """Find what struck from outside in a driver's error: a soft limit comes out of PyMySQL as OperationalError.

    `before` is what was being handled when the driver was called (`sys.exception()`): Python chains that to every
    new error, and it did not strike now. Nor did the cancellation by which `asyncio.timeout` and `wait_for` end what
    takes too long: that of asyncpg and asyncmy is an outage.
    """
    seen: BaseException | None = error
    for _ in range(_CHAIN_LIMIT):
        if seen is None or seen is before:
            return None
        if isinstance(seen, TimeoutError) and isinstance(seen.__cause__, asyncio.CancelledError):
            return None
        if not isinstance(seen, Exception) or isinstance(seen, tuple(_INTERRUPTIONS)):
            return seen
        seen = seen.__context__ if seen.__cause__ is None else seen.__cause__
    return None


_CHAIN_LIMIT = 50
