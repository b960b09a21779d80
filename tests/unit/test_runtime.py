"""The two runtimes: what runs where, and what an interruption cannot stop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import pytest

from idem_tasks import runtime
from idem_tasks.errors import ConfigurationError, StoreUnavailableError
from idem_tasks.runtime import (
    Asyncio,
    Blocking,
    HandlerStopIteration,
    deadline_clock,
    deadline_clock_from,
    interruption_in,
    register_interruption,
    resolve,
    run_sync,
)


async def returning(value: Any) -> Any:
    return value


async def raising(error: BaseException) -> Any:
    raise error


# run_sync and resolve


@pytest.mark.parametrize("value", [None, 0, False, "", [], (1, 2), StopIteration(3)], ids=repr)
def test_run_sync_returns_the_value(value: Any) -> None:
    """Whatever a coroutine returns is returned, also what looks like nothing."""
    assert run_sync(returning(value)) is value


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
def test_run_sync_raises_what_is_raised(error: BaseException) -> None:
    """An exception comes through as the same object."""
    with pytest.raises(type(error)) as raised:
        run_sync(raising(error))
    assert raised.value is error


def test_run_sync_refuses_to_wait_and_cleans_up() -> None:
    """A coroutine that would wait is closed and refused, not hung."""
    cleaned = []

    async def waits() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            cleaned.append(True)

    async def suspends() -> None:
        try:
            await Suspension()
        finally:
            cleaned.append(True)

    with pytest.raises(RuntimeError, match="asyncio"):
        run_sync(suspends())
    with pytest.raises(RuntimeError):
        run_sync(waits())
    assert cleaned == [True, True]


class Suspension:
    def __await__(self) -> Generator[None, None, None]:
        yield


def test_run_sync_runs_inside_an_event_loop_and_inside_itself() -> None:
    """A blocking call made on a loop's thread, or inside another one, works as anywhere."""

    async def outer() -> Any:
        return run_sync(returning(run_sync(returning(5))))

    assert asyncio.run(outer()) == 5


def test_run_sync_stays_on_its_thread() -> None:
    """Nothing runs on a helper thread: thread-locals of the caller are there."""

    async def thread() -> int:
        return threading.get_ident()

    assert run_sync(thread()) == threading.get_ident()


def test_resolve_takes_a_reply_or_an_awaitable() -> None:
    """One source serves both kinds of clients."""
    assert run_sync(resolve(5)) == 5
    assert run_sync(resolve(None)) is None
    assert run_sync(resolve(returning(6))) == 6

    async def on_a_loop() -> list[int]:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_result, 7)
        return [await resolve(future), await resolve(8)]

    assert asyncio.run(on_a_loop()) == [7, 8]


def test_the_deadline_clock_runs_with_time_and_never_back() -> None:
    """It counts seconds, and only forwards."""
    before, started = deadline_clock(), time.monotonic()
    time.sleep(0.01)
    after, ended = deadline_clock(), time.monotonic()
    assert 0.01 <= after - before <= (ended - started) + 0.005
    moments = [deadline_clock() for _ in range(1000)]
    assert moments == sorted(moments)


def test_the_deadline_clock_without_boottime() -> None:
    """Where the system has no clock that runs through suspend, it is the monotonic one."""
    with deadline_clock_from(runtime._system_clock(None)):
        assert deadline_clock() == pytest.approx(time.monotonic(), abs=1)


# invoke


def test_invoke_calls_on_the_callers_thread() -> None:
    """A blocking handler gets its arguments and runs on its caller's thread."""

    def handler(first: int, *, second: int) -> tuple[int, int, int]:
        return first, second, threading.get_ident()

    assert run_sync(Blocking().invoke(handler, (1,), {"second": 2})) == (1, 2, threading.get_ident())


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(1), KeyboardInterrupt(), GeneratorExit()])
def test_invoke_raises_the_handlers_own_exception(error: BaseException) -> None:
    """A handler's exception is not changed."""

    def handler() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        run_sync(Blocking().invoke(handler, (), {}))
    assert raised.value is error


def test_a_handlers_stop_iteration_is_carried_out() -> None:
    """StopIteration, which a coroutine cannot raise, travels in an error of its own."""
    error = StopIteration(5)

    def handler() -> None:
        raise error

    with pytest.raises(HandlerStopIteration) as raised:
        run_sync(Blocking().invoke(handler, (), {}))
    assert raised.value.error is error


def test_a_blocking_handler_that_returns_a_coroutine_is_refused() -> None:
    """An async handler that was hidden from us runs nothing, and is not recorded as done (F30)."""
    ran = []

    async def hidden() -> None:
        ran.append(True)

    with pytest.raises(ConfigurationError, match="async def"):
        run_sync(Blocking().invoke(lambda: hidden(), (), {}))  # noqa: PLW0108 - hides it
    assert ran == []


def test_asyncio_invoke_awaits_the_handler() -> None:
    """An asyncio handler runs on the loop of its caller."""

    async def handler(first: int, *, second: int) -> tuple[int, int, object]:
        await asyncio.sleep(0)
        return first, second, asyncio.get_running_loop()

    async def call() -> bool:
        result = await Asyncio().invoke(handler, (1,), {"second": 2})
        return bool(result == (1, 2, asyncio.get_running_loop()))

    assert asyncio.run(call())


def test_sleep_waits_about_that_long() -> None:
    """Both runtimes wait for seconds."""
    run: Callable[[Coroutine[Any, Any, None]], None]
    for run, sleeping in ((run_sync, Blocking().sleep(0.02)), (asyncio.run, Asyncio().sleep(0.02))):
        started = time.monotonic()
        run(sleeping)
        assert 0.015 < time.monotonic() - started < 5


def test_asyncio_sleep_holds_up_nobody() -> None:
    """Others run meanwhile."""

    async def both() -> list[str]:
        order: list[str] = []

        async def sleeper() -> None:
            await Asyncio().sleep(0.05)
            order.append("slept")

        async def other() -> None:
            order.append("other")

        await asyncio.gather(sleeper(), other())
        return order

    assert asyncio.run(both()) == ["other", "slept"]


# The blocking shield


class SoftLimit(Exception):  # noqa: N818 - as Celery's SoftTimeLimitExceeded
    """An Exception that a framework raises at any instruction."""


class Interrupted:
    """An operation that is struck in its first tries and then succeeds."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.tries = 0

    async def __call__(self) -> str:
        self.tries += 1
        if self.errors:
            raise self.errors.pop(0)
        return "recorded"


def test_the_blocking_shield_returns_the_value() -> None:
    """Undisturbed, an operation runs once."""
    operation = Interrupted()
    assert run_sync(Blocking().shield(operation)) == "recorded"
    assert operation.tries == 1


@pytest.mark.parametrize("error", [SoftLimit(), SystemExit(0), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_what_strikes_a_blocking_finish_is_raised_after_it(error: BaseException) -> None:
    """A soft limit, a shutdown or a gevent kill does not stop a finish, and is not lost either (F62)."""
    operation = Interrupted(error)
    with pytest.raises(type(error)) as raised:
        run_sync(Blocking().shield(operation))
    assert raised.value is error
    assert operation.tries == 2


@pytest.mark.parametrize("strikes", [(SoftLimit(), SystemExit(5)), (SystemExit(5), SoftLimit())], ids=repr)
def test_of_several_interruptions_a_shutdown_is_raised(strikes: tuple[BaseException, ...]) -> None:
    """A soft limit before or after a shutdown ends in the shutdown, with the operation done."""
    operation = Interrupted(*strikes)
    with pytest.raises(SystemExit):
        run_sync(Blocking().shield(operation))
    assert operation.tries == 3


def test_a_store_error_ends_the_blocking_shield_at_once() -> None:
    """An answer of the store is no interruption: it is not tried again."""
    operation = Interrupted(StoreUnavailableError("down"))
    with pytest.raises(StoreUnavailableError):
        run_sync(Blocking().shield(operation))
    assert operation.tries == 1


def test_a_store_error_after_an_interruption_is_raised() -> None:
    """That the outcome is not recorded matters more than what struck."""
    operation = Interrupted(SoftLimit(), StoreUnavailableError("down"))
    with pytest.raises(StoreUnavailableError):
        run_sync(Blocking().shield(operation))
    assert operation.tries == 2


def test_a_shutdown_is_never_swallowed_by_a_store_error() -> None:
    """A process that was told to end ends, whatever its store says; its message was not acknowledged."""
    operation = Interrupted(SystemExit(5), StoreUnavailableError("down"))
    with pytest.raises(SystemExit) as raised:
        run_sync(Blocking().shield(operation))
    assert isinstance(raised.value.__cause__, StoreUnavailableError)


def test_a_fault_of_the_operation_is_no_interruption() -> None:
    """An exception that struck from nowhere else is raised at once, not tried again."""
    operation = Interrupted(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        run_sync(Blocking().shield(operation))
    assert operation.tries == 1


def test_the_blocking_shield_does_not_try_for_ever() -> None:
    """An operation that always fails ends in its own error."""
    operation = Interrupted(*[SoftLimit(str(number)) for number in range(100)])
    with pytest.raises(SoftLimit):
        run_sync(Blocking().shield(operation))
    assert operation.tries == 10


# The asyncio shield


def test_the_asyncio_shield_returns_the_value() -> None:
    """Undisturbed, an operation runs once."""
    operation = Interrupted()
    assert asyncio.run(Asyncio().shield(operation)) == "recorded"
    assert operation.tries == 1


class Steps:
    """An operation that takes several turns of the event loop, and says where it is."""

    def __init__(self, error: Exception | None = None) -> None:
        self.begun = asyncio.Event()
        self.may_end = asyncio.Event()
        self.ends = 0
        self.begins = 0
        self.error = error

    async def __call__(self) -> str:
        self.begins += 1
        self.begun.set()
        await self.may_end.wait()
        await asyncio.sleep(0)
        self.ends += 1
        if self.error is not None:
            raise self.error
        return "recorded"


def on_a_loop(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), timeout=10))


def test_a_cancellation_waits_for_the_finish() -> None:
    """A task that is cancelled in its finish is cancelled after it, however often it is cancelled (F62)."""

    async def story() -> None:
        steps = Steps()
        task = asyncio.create_task(Asyncio().shield(steps))
        await steps.begun.wait()
        for _ in range(3):
            task.cancel("shutdown")
            await asyncio.sleep(0)
            assert not task.done()
        steps.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert (steps.begins, steps.ends) == (1, 1)

    on_a_loop(story)


def test_a_cancellation_before_the_first_step_waits_too() -> None:
    """A cancellation that comes while the operation has only been scheduled does not lose it."""

    async def story() -> None:
        steps = Steps()
        steps.may_end.set()
        task = asyncio.create_task(Asyncio().shield(steps))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert steps.ends == 1

    on_a_loop(story)


def test_a_timeout_around_the_finish_is_a_timeout_after_it() -> None:
    """`asyncio.timeout` works as it always does, only later."""

    async def story() -> None:
        steps = Steps()
        asyncio.get_running_loop().call_later(0.05, steps.may_end.set)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await Asyncio().shield(steps)
        assert steps.ends == 1

    on_a_loop(story)


def test_a_store_error_is_raised_by_the_asyncio_shield() -> None:
    """An operation's own error is raised once, and not tried again."""

    async def story() -> None:
        operation = Interrupted(StoreUnavailableError("down"))
        with pytest.raises(StoreUnavailableError):
            await Asyncio().shield(operation)
        assert operation.tries == 1

    on_a_loop(story)


def test_a_cancellation_is_never_swallowed_by_a_store_error() -> None:
    """A consumer that is cancelled must end, whatever its store says; that is the cause it ends with."""

    async def story() -> None:
        steps = Steps(StoreUnavailableError("down"))
        task = asyncio.create_task(Asyncio().shield(steps))
        await steps.begun.wait()
        task.cancel()
        await asyncio.sleep(0)
        steps.may_end.set()
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        assert isinstance(raised.value.__cause__, StoreUnavailableError)

    on_a_loop(story)


def test_a_loop_that_shuts_down_lets_the_finish_end() -> None:
    """`asyncio.run` cancels every task at its end, the operation's own too: it is begun again and ends."""
    ends = []

    async def operation() -> str:
        await asyncio.sleep(0.01)
        ends.append(True)
        return "recorded"

    async def main() -> None:
        task = asyncio.create_task(Asyncio().shield(operation))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()

    asyncio.run(main())
    assert ends == [True]


def test_a_coroutine_thrown_away_in_its_finish_goes_quietly() -> None:
    """A loop closed in the middle of a finish leaves no coroutine that refuses to be closed."""

    async def never() -> None:
        await asyncio.Event().wait()

    async def story() -> None:
        shield = Asyncio().shield(never)
        shield.send(None)
        shield.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    on_a_loop(story)


# What struck


@pytest.fixture(autouse=True)
def soft_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_INTERRUPTIONS", [])
    register_interruption(SoftLimit)
    register_interruption(SoftLimit)
    assert [SoftLimit] == runtime._INTERRUPTIONS


def wrapped(inner: BaseException, *, cause: bool) -> Exception:
    """Wrap as a driver does: explicitly, or by raising while handling."""
    try:
        try:
            raise inner
        except BaseException as error:
            if cause:
                raise OSError("driver") from error
            raise OSError("driver")  # noqa: B904 - the context is what is tested
    except OSError as outer:
        return outer


@pytest.mark.usefixtures("soft_limit")
@pytest.mark.parametrize("cause", [True, False], ids=["cause", "context"])
@pytest.mark.parametrize("inner", [SoftLimit(), SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_what_struck_is_found_in_a_drivers_error(inner: BaseException, cause: bool) -> None:
    """A soft limit that comes out of a driver as its own error is recognised, however deep it is."""
    error = wrapped(inner, cause=cause)
    assert interruption_in(error, None) is inner
    assert interruption_in(wrapped(error, cause=cause), None) is inner
    assert interruption_in(inner, None) is inner


@pytest.mark.usefixtures("soft_limit")
def test_a_plain_outage_is_no_interruption() -> None:
    """A driver's error without anything from outside in it stays an error."""
    assert interruption_in(OSError("refused"), None) is None
    assert interruption_in(wrapped(ValueError(), cause=True), None) is None


def test_a_time_out_is_no_cancellation() -> None:
    """What asyncio ends for taking too long was cancelled by nobody else: a driver that says so tells of an outage."""

    async def silent() -> None:
        try:
            async with asyncio.timeout(0):
                await asyncio.sleep(60)
        except TimeoutError as error:
            raise OSError("no answer") from error

    with pytest.raises(OSError, match="no answer") as told:
        asyncio.run(silent())
    assert isinstance(told.value.__cause__, TimeoutError)
    assert isinstance(told.value.__cause__.__cause__, asyncio.CancelledError)
    assert interruption_in(told.value, None) is None


@pytest.mark.usefixtures("soft_limit")
def test_what_was_handled_before_did_not_strike_now() -> None:
    """A release called while a soft limit is being handled is not taken for struck by it."""
    before = SoftLimit()
    error = wrapped(before, cause=False)
    assert interruption_in(error, before) is None
    assert interruption_in(error, None) is before
    assert interruption_in(before, before) is None


@pytest.mark.usefixtures("soft_limit")
def test_an_error_that_counts_as_false_is_still_looked_into() -> None:
    """Presence decides, not truth: some errors have a length of 0."""

    class Empty(Exception):  # noqa: N818
        def __len__(self) -> int:
            return 0

    inner = SoftLimit()
    empty = Empty()
    empty.__context__ = inner
    outer = OSError()
    outer.__cause__ = empty
    assert interruption_in(outer, None) is inner


def test_a_chain_of_errors_that_bites_its_tail_ends() -> None:
    """A loop in a chain of causes does not hang."""
    first, second = OSError(1), OSError(2)
    first.__context__, second.__context__ = second, first
    assert interruption_in(first, None) is None
