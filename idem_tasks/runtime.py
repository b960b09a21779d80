"""The two runtimes a handler can live in, and all that differs between them.

Everything else is written once, as coroutines. A blocking call drives its coroutine with `run_sync` on its
caller's thread: it never suspends, because a blocking store awaits nothing that waits. An asyncio call awaits it.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from idem_tasks.errors import ConfigurationError, IdemTasksError

T = TypeVar("T")

_CLOCK = getattr(time, "CLOCK_BOOTTIME", None)


def deadline_clock() -> float:
    """Return seconds on a clock that never jumps and, where the system has one, runs on while it is suspended."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


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

    async def invoke(self, handler: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the handler on its caller's thread and return its value."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait without holding up anything but this call."""
        ...

    async def shield(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Bring an operation to its end though this call is cancelled meanwhile; raise the cancellation after it.

        The operation must be one that may be begun again: its first try may have taken effect.
        """
        ...


class HandlerStopIteration(Exception):  # noqa: N818 - it carries what it is named after
    """Carries a handler's StopIteration out of a coroutine, which Python forbids to raise it (PEP 479)."""

    def __init__(self, error: StopIteration) -> None:
        super().__init__()
        self.error = error


class Blocking:
    """Plain functions: in threads, processes, greenlets."""

    async def invoke(self, handler: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the handler."""
        try:
            value = handler(*args, **kwargs)
        except StopIteration as error:
            raise HandlerStopIteration(error) from None
        if inspect.iscoroutine(value):
            value.close()
            raise ConfigurationError(
                f"{getattr(handler, '__qualname__', handler)} returned a coroutine, which nobody awaits here; "
                "nothing ran: decorate the async def function itself"
            )
        return value

    async def sleep(self, seconds: float) -> None:
        """Block this thread or greenlet."""
        time.sleep(seconds)  # noqa: ASYNC251 - this coroutine is driven by run_sync, on its caller's thread

    async def shield(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Begin the operation again when something from outside strikes in it, and raise that afterwards.

        A soft time limit, SystemExit on shutdown or a gevent.Timeout can strike at any instruction. Stores raise
        it as itself, also when a database driver has wrapped it (`interruption_in`).
        """
        struck: BaseException | None = None
        for _ in range(_SHIELD_TRIES):
            try:
                value = await operation()
            except IdemTasksError:
                raise
            except BaseException as interruption:  # noqa: BLE001 - raised after the operation's end
                struck = interruption
                continue
            if struck is not None:
                raise struck
            return value
        assert struck is not None
        raise struck


class Asyncio:
    """Coroutine functions, on the running event loop."""

    async def invoke(self, handler: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Await the handler."""
        return await handler(*args, **kwargs)

    async def sleep(self, seconds: float) -> None:
        """Suspend this task."""
        await asyncio.sleep(seconds)

    async def shield(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run the operation in a task of its own; a loop that shuts down cancels that too: then begin again."""
        cancelled = asyncio.CancelledError()
        was_cancelled = False
        for _ in range(_SHIELD_TRIES):
            task = asyncio.ensure_future(operation())
            while not task.done():
                try:
                    await asyncio.shield(task)
                except asyncio.CancelledError as error:
                    cancelled, was_cancelled = error, True
                except GeneratorExit:
                    raise  # this coroutine is thrown away with its loop; it may not wait any more
                except BaseException:  # noqa: BLE001, S110 - the operation's own; result() raises it below
                    pass
            if not task.cancelled():
                value = task.result()
                if was_cancelled:
                    raise cancelled
                return value
        raise cancelled


_SHIELD_TRIES = 10
"""A call is interrupted once or twice at most (soft limit, then shutdown); more would be a fault in a loop."""

_INTERRUPTIONS: list[type[BaseException]] = []


def register_interruption(kind: type[BaseException]) -> None:
    """Make `kind`, an Exception raised by a framework at any instruction, count as one (Celery's soft limit)."""
    if kind not in _INTERRUPTIONS:
        _INTERRUPTIONS.append(kind)


def interruption_in(error: BaseException, before: BaseException | None) -> BaseException | None:
    """Find what struck from outside in a driver's error: a soft limit comes out of PyMySQL as OperationalError.

    `before` is what was being handled when the driver was called (`sys.exception()`): Python chains that to every
    new error, and it did not strike now.
    """
    seen: BaseException | None = error
    for _ in range(_CHAIN_LIMIT):
        if seen is None or seen is before:
            return None
        if not isinstance(seen, Exception) or isinstance(seen, tuple(_INTERRUPTIONS)):
            return seen
        seen = seen.__context__ if seen.__cause__ is None else seen.__cause__
    return None


_CHAIN_LIMIT = 50
