"""Whatever strikes a call, and wherever: nothing is swallowed, nothing released after the effect, nothing held on."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import gc
import linecache
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

import pytest

import idem_tasks
from idem_tasks import RERUN, Idempotency, MemoryStore, Outcome, idempotent_task
from idem_tasks.claims import State, current_claim
from idem_tasks.errors import DuplicateError, InDoubtError, StoreUnavailableError
from idem_tasks.events import EventName
from idem_tasks.runtime import Blocking, register_interruption, run_sync
from tests.unit.scripted import LEASE, Scripted, World, away, world_on

_OURS = os.path.dirname(idem_tasks.__file__) + os.sep  # noqa: PTH120 - compared with the names in code objects
_NOT_STRUCK = ("memory.py", "memory_marker.py", "memory_outbox.py", os.path.join("testing", ""))  # noqa: PTH118


class SoftLimitError(Exception):
    """Stands for Celery's soft time limit: an Exception that strikes at any instruction."""


register_interruption(SoftLimitError)


class DeclinedError(Exception):
    """A failure that is recorded."""


class Striker:
    """Raises at the n-th line of this library that a call comes by, as a signal handler would."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at = at
        self.error = error
        self.line = ""

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(self._before)

    @property
    def struck(self) -> bool:
        return bool(self.line)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(_OURS) or any(other in name for other in _NOT_STRUCK):
            return None
        if frame.f_code is Blocking.invoke.__code__ and event == "line" and "value" in frame.f_locals:
            return self._trace  # the instruction after the handler's last is as good as its last
        # Nothing strikes at `try:`, which is no instruction and yet, to a tracer, a line.
        if event == "call" or (event == "line" and linecache.getline(name, frame.f_lineno).strip() != "try:"):
            self.at -= 1
            if self.at == 0:
                self.line = f"{name.removeprefix(_OURS)}:{frame.f_lineno} {frame.f_code.co_name}"
                sys.settrace(None)
                raise self.error
        return self._trace


def strike_everywhere(
    monkeypatch: pytest.MonkeyPatch, tiers: int, kind: type[BaseException], call: Callable[[World], Any]
) -> Iterator[tuple[World, Striker, BaseException | None]]:
    """Make the call again and again, struck one line later each time, and yield what came of it."""
    for at in range(1, 2000):
        with monkeypatch.context() as patch, world_on(patch, "blocking", tiers) as world:
            raised: BaseException | None = None
            run = call(world)
            run("warm")  # what is made once for a process is not what is looked at
            world.effects.clear()
            with Striker(at, kind("struck")) as striker:
                try:
                    contextvars.copy_context().run(run, "A-1")  # the current claim is left behind in it
                except BaseException as error:  # noqa: BLE001 - what is looked at
                    raised = error
            if not striker.struck:
                gc.collect()  # what Python says of coroutines that never began, it says here and not in another test
                return
            yield world, striker, raised
    raise AssertionError("the call never ended")


NEVER_BEGUN = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
"""Python says so of a call that was struck before its first step."""


@NEVER_BEGUN
@pytest.mark.parametrize("on_crash", ["rerun", "hold"])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SoftLimitError])
@pytest.mark.parametrize("tiers", [1, 2])
def test_struck_at_any_line(
    monkeypatch: pytest.MonkeyPatch, tiers: int, kind: type[BaseException], fails: bool, on_crash: str
) -> None:
    """An interruption at any line comes out as itself; the claim is renewed no more; after the handler has returned
    its claim is recorded or left to its lease, never released (F62), and under `hold` never once it has begun."""  # noqa: D205, D209

    def call(world: World) -> Callable[..., Any]:
        def handler(order: str) -> str:
            world.effects.append(order)
            if fails:
                raise ValueError("no")
            return "done"

        task = world.task(handler, on_crash=on_crash)

        def run(order: str) -> str:
            with contextlib.suppress(ValueError) if order == "warm" else contextlib.nullcontext():
                return str(task(order))
            return ""

        return run

    seen: dict[tuple[bool, State | None], list[str]] = {}
    allowed: set[State | None]
    for world, striker, raised in strike_everywhere(monkeypatch, tiers, kind, call):
        where = striker.line
        assert raised is striker.error, f"{raised!r} came out when struck at {where}"
        assert world.held() == 0, f"held on when struck at {where}"
        seen.setdefault((bool(world.effects), world.state()), []).append(where)
        if world.effects and fails:
            allowed = {State.RUNNING, State.RELEASED if on_crash == "rerun" else State.IN_DOUBT}
        elif world.effects:
            allowed = {State.RUNNING, State.COMPLETED}
        else:
            allowed = {None, State.RELEASED, State.RUNNING}
            if on_crash == "hold" and where.endswith((" perform", " run", " invoke")):
                allowed.add(State.IN_DOUBT)  # the handler was about to begin
        assert world.state() in allowed, f"{world.state()} when struck at {where}"
    # Between two protected stretches a claim is left to its lease: some lines, not whole steps.
    assert len(seen.get((False, State.RUNNING), [])) <= 12, seen[False, State.RUNNING]
    assert len(seen.get((True, State.RUNNING), [])) <= 24, seen[True, State.RUNNING]
    ending: State = State.COMPLETED if not fails else State.RELEASED if on_crash == "rerun" else State.IN_DOUBT
    assert seen[True, ending]
    assert seen[False, State.RELEASED]


@NEVER_BEGUN
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("on_duplicate", ["replay", "raise"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SoftLimitError])
@pytest.mark.parametrize("tiers", [1, 2])
def test_a_duplicate_struck_at_any_line(
    monkeypatch: pytest.MonkeyPatch, tiers: int, kind: type[BaseException], on_duplicate: str, fails: bool
) -> None:
    """An interrupted duplicate neither runs nor changes the record, and what struck it comes out as itself."""

    def call(world: World) -> Callable[..., Any]:
        def handler(order: str) -> str:
            world.effects.append(order)
            if fails:
                raise DeclinedError("no")
            return "done"

        task = world.task(handler, on_duplicate=on_duplicate, record_failures=(DeclinedError,))
        with contextlib.suppress(DeclinedError):
            task("A-1")

        def duplicate(order: str) -> None:
            world.effects[:] = ["A-1"]
            with contextlib.suppress(DeclinedError, DuplicateError):
                task("A-1")
            world.effects[:-1] = []

        return duplicate

    ending = State.FAILED if fails else State.COMPLETED
    for world, striker, raised in strike_everywhere(monkeypatch, tiers, kind, call):
        assert raised is striker.error, f"{raised!r} came out when struck at {striker.line}"
        assert (world.effects, world.state(), world.held()) == (["A-1"], ending, 0), striker.line


@NEVER_BEGUN
@pytest.mark.parametrize("answer", [Outcome("receipt 17"), RERUN], ids=["outcome", "rerun"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SoftLimitError])
@pytest.mark.parametrize("tiers", [1, 2])
def test_whoever_asks_is_struck_at_any_line(
    monkeypatch: pytest.MonkeyPatch, tiers: int, kind: type[BaseException], answer: Any
) -> None:
    """The doubt stays, or has ended as the function said; no rerun is held by nobody but for the usual few lines."""

    def call(world: World) -> Callable[..., Any]:
        for key in ("warm", "A-1"):
            world.claim_elsewhere(key)
        world.pass_time(LEASE + 1)
        dead[:] = [world.record().owner]
        return world.charge(on_crash=lambda _claim: answer, fingerprint=None)

    dead: list[str] = []
    seen: dict[tuple[bool, State | None], list[str]] = {}
    for world, striker, raised in strike_everywhere(monkeypatch, tiers, kind, call):
        where = striker.line
        if kind is SoftLimitError and isinstance(raised, InDoubtError):
            assert raised.__cause__ is striker.error, where  # it struck the function: a person finds the record
        else:
            assert raised is striker.error, f"{raised!r} came out when struck at {where}"
        assert world.held() == 0, f"held on when struck at {where}"
        state = None if world.record().owner in dead and world.state() is State.RUNNING else world.state()
        seen.setdefault((bool(world.effects), state), []).append(where)
        allowed: set[State | None] = {None, State.IN_DOUBT, State.COMPLETED}
        assert state in allowed | ({State.RELEASED, State.RUNNING} if answer is RERUN else set()), where
    assert seen[False, State.IN_DOUBT]
    if answer is RERUN:
        assert seen[False, State.RELEASED]
        assert seen[True, State.COMPLETED]
        assert len(seen.get((False, State.RUNNING), [])) <= 12, seen[False, State.RUNNING]
    else:
        assert seen[False, State.COMPLETED]
        assert not any(effects for effects, _ in seen)


@NEVER_BEGUN
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SoftLimitError])
@pytest.mark.parametrize("tiers", [1, 2])
def test_a_handler_that_publishes_is_struck_at_any_line(
    monkeypatch: pytest.MonkeyPatch, tiers: int, kind: type[BaseException]
) -> None:
    """Both of its messages are recorded with its outcome, or neither is; none is sent before, and nothing hangs."""

    def call(world: World) -> Callable[..., Any]:
        def handler(order: str) -> None:
            claim = current_claim()
            for body in ("receipt", "parcel"):
                claim.publish_message(body, to="mail")
            world.sent.clear()
            world.effects.append(order)

        return world.task(handler)

    sent: set[int] = set()
    for world, striker, raised in strike_everywhere(monkeypatch, tiers, kind, call):
        assert raised is striker.error, striker.line
        assert world.held() == 0, striker.line
        if not world.effects:
            continue
        recorded = world.state() is State.COMPLETED
        left = run_sync(world.record_tier.real.outbox.count())
        assert recorded or (left, world.sent) == (0, []), striker.line
        # What was sent, and struck before that was noted, is sent again by the relay: at least once.
        assert not recorded or left + len(world.sent) >= 2, striker.line
        sent.add(len(world.sent))
    assert sent == {0, 1, 2}


@NEVER_BEGUN
@pytest.mark.parametrize("tiers", [1, 2])
def test_a_handler_with_steps_goes_on_after_it_was_struck(monkeypatch: pytest.MonkeyPatch, tiers: int) -> None:
    """One that catches its soft limit, to clean up by another step, is not told that a step still runs."""

    def call(world: World) -> Callable[..., Any]:
        def handler(order: str) -> None:
            claim = current_claim()
            try:
                claim.step("charge", world.effects.append, order)
            except SoftLimitError:
                claim.step("clean up", world.effects.append, "cleaned")

        return world.task(handler)

    cleaned = 0
    for world, striker, raised in strike_everywhere(monkeypatch, tiers, SoftLimitError, call):
        # Struck while it says that its step is over, there is nothing left that could say so.
        if not striker.line.endswith(" _turn"):
            assert raised in (None, striker.error), f"{raised!r} when struck at {striker.line}"
        cleaned += "cleaned" in world.effects
    assert cleaned > 30


@NEVER_BEGUN
@pytest.mark.parametrize("completes", [False, True])
@pytest.mark.parametrize("tiers", [1, 2])
def test_a_block_struck_at_any_line(monkeypatch: pytest.MonkeyPatch, tiers: int, completes: bool) -> None:
    """An interrupted block holds nothing on, and keeps what it has completed."""
    completed: list[bool] = []

    def call(world: World) -> Callable[..., Any]:
        def block(key: str) -> None:
            completed.clear()
            with world.idem.claim(scope="shop.charge", key=key) as claim:
                world.effects.append(key)
                if completes:
                    claim.complete("done")
                    completed.append(True)

        return block

    for world, striker, raised in strike_everywhere(monkeypatch, tiers, KeyboardInterrupt, call):
        assert raised is striker.error, striker.line
        if not striker.line.endswith((" __enter__", " __exit__")):  # Python itself has no net there
            assert world.held() == 0, striker.line
        if world.effects and (completed or not completes) and world.held() == 0:
            assert world.state() in (State.COMPLETED, State.RUNNING), striker.line
        if completed:
            assert world.state() is State.COMPLETED, striker.line


# Signals and other threads, as they really come.


def test_a_signal_in_the_finish_is_raised_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler that raises while the outcome is written does so once it is written (F62)."""

    def strike(*_: object) -> None:
        raise SoftLimitError

    before = signal.signal(signal.SIGUSR1, strike)
    try:
        with world_on(monkeypatch, "blocking", 2) as world:
            world.record_tier.before("finish", lambda: os.kill(os.getpid(), signal.SIGUSR1))
            charge = world.charge()
            with pytest.raises(SoftLimitError):
                charge("A-1")
            assert world.state() is State.COMPLETED
            assert world.count(EventName.COMPLETED) == 1
            assert charge("A-1") == "charged 5 for A-1"
            assert world.effects == ["A-1"]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_exception_from_another_thread_releases_a_running_handler() -> None:
    """A thread pool that kills its thread (PyThreadState_SetAsyncExc) in mid-run leaves the key free to run again."""
    idem = Idempotency(store=MemoryStore(), observers=[])
    started, ended = threading.Event(), []

    @idempotent_task(key="{order}", idempotency=idem, scope="s")
    def handler(order: str) -> None:
        started.set()
        until = time.monotonic() + 30
        while time.monotonic() < until:
            time.sleep(0.001)

    def run() -> None:
        try:
            handler("A-1")
        except SystemExit as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(30)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
    thread.join(30)
    assert len(ended) == 1
    record = idem.get("s", "A-1")
    assert record is not None
    assert (record.state, record.failures) == (State.RELEASED, 0)


# Asyncio: cancelled at every await.


@pytest.fixture(params=[1, 2], ids=["memory", "tiered"])
def wandering(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[World]:
    """A world whose stores suspend before and after each verb takes effect, as real clients do."""
    with world_on(monkeypatch, "asyncio", request.param) as world:
        world.record_tier.wandering = True
        if world.marker is not None:
            world.marker.wandering = True
        yield world


async def cancel_after(steps: int, task: asyncio.Task[Any], times: int) -> bool:
    """Cancel a task after so many turns of the loop, and perhaps again right after; False if it was done before."""
    for _ in range(steps):
        await asyncio.sleep(0)
    if task.done():
        return False
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    return True


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("on_crash", ["rerun", "hold"])
@pytest.mark.parametrize("fails", [False, True])
def test_cancelled_at_any_await(wandering: World, times: int, on_crash: Any, fails: bool) -> None:
    """A cancellation before the handler withdraws the claim, in it releases or doubts, after it waits for the finish
    (F62); it is never swallowed, and no task is left behind."""  # noqa: D205, D209
    world = wandering
    phases: list[str] = []

    async def handler(order: str) -> str:
        phases.append("begun")
        await asyncio.sleep(0)
        phases.append("ended")
        if fails:
            raise ValueError("no")
        return "done"

    charge = world.decorated(handler, on_crash=on_crash)

    async def once(step: int) -> bool:
        phases.clear()
        key = f"A-{step}"
        task = asyncio.ensure_future(charge(key))
        was_running = await cancel_after(step, task, times)
        with contextlib.suppress(asyncio.CancelledError, ValueError):
            await task
        if not was_running:
            return False
        assert task.cancelled(), step
        assert len(world.heartbeat._held) == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}
        state = world.state(key)
        if not phases:
            assert state in (None, State.RELEASED), step
        elif "ended" in phases and not fails:
            assert state is State.COMPLETED, step
        elif on_crash == "hold":
            assert state is State.IN_DOUBT, step
        else:
            assert state is State.RELEASED, step
        if world.marker is not None and state is not State.COMPLETED:
            assert world.marker_of(key) is None, step
        return True

    async def all_steps() -> int:
        for step in range(200):
            if not await once(step):
                return step
        raise AssertionError("it never ended")

    assert world.driver(all_steps()) > 8


def test_a_cancelled_finish_that_fails_is_still_a_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that is cancelled while SQL is away ends cancelled, with the store's error as the cause."""
    with world_on(monkeypatch, "asyncio", 2) as world:
        charge = world.decorated(lambda order: order)
        world.record_tier.down("finish")
        world.record_tier.before("keep_pending", lambda: None)

        async def run() -> asyncio.CancelledError:
            task = asyncio.ensure_future(charge("A-1"))
            assert await cancel_after(3, task, 1)
            try:
                await task
            except asyncio.CancelledError as error:
                return error
            raise AssertionError

        error = world.driver(run())
        assert isinstance(error.__cause__, StoreUnavailableError)
        assert world.count(EventName.OUTCOME_PENDING) == 1


def test_a_struck_finish_that_fails_is_still_a_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    """SystemExit that strikes while SQL is away goes on; a soft limit gives way to the error that puts it back."""
    for struck, expected in ((SystemExit(1), SystemExit), (SoftLimitError(), StoreUnavailableError)):
        with monkeypatch.context() as patch, world_on(patch, "blocking", 2) as world:
            world.record_tier.before("finish", struck, *[away()] * 100)
            with pytest.raises(expected) as caught:
                world.charge()("A-1")
            if expected is SystemExit:
                assert isinstance(caught.value.__cause__, StoreUnavailableError)


def test_a_timeout_around_a_call_is_a_timeout(wandering: World) -> None:
    """`asyncio.timeout` that ends in the finish raises TimeoutError after it, and the outcome is recorded."""
    world = wandering
    charge = world.decorated(lambda order: order)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        world.record_tier.before("finish", lambda: scope.reschedule(loop.time()))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30) as scope:
                await charge("A-1")

    world.driver(run())
    assert world.state() is State.COMPLETED


def test_a_loop_that_shuts_down_in_mid_finish_finishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`asyncio.run` that ends while an outcome is written cancels all tasks; the outcome is written all the same."""
    with world_on(monkeypatch, "asyncio", 2) as world:
        for tier in (world.record_tier, world.marker):
            assert isinstance(tier, Scripted)
            tier.wandering = True
        charge = world.decorated(lambda order: order)

        async def main(steps: int) -> None:
            asyncio.ensure_future(charge(f"A-{steps}"))  # noqa: RUF006 - left behind on purpose
            for _ in range(steps):
                await asyncio.sleep(0)

        ran = 0
        for steps in range(40):
            world.effects.clear()
            asyncio.run(main(steps))
            state = world.state(f"A-{steps}")
            assert state in (None, State.RELEASED, State.COMPLETED), steps
            ran += state is State.COMPLETED
        assert ran > 10


def test_a_coroutine_that_is_thrown_away_is_not_renewed(wandering: World) -> None:
    """A call whose coroutine is closed at any await, as when its loop is gone, awaits and holds nothing more."""
    world = wandering

    async def body(order: str) -> str:
        await asyncio.sleep(0)
        return order

    charge = world.decorated(body)

    async def throw_away(steps: int) -> bool:
        coroutine = charge(f"A-{steps}")
        for _ in range(steps):
            if coroutine.send(None) is not None:  # it waits for a task of its own, the shielded finish
                coroutine.close()
                return True
        coroutine.close()
        assert world.heartbeat._held == {}
        return False

    async def at_every_step() -> None:
        for steps in range(1, 40):
            if await throw_away(steps):
                return
        raise AssertionError("it never came to its finish")

    world.driver(at_every_step())


def test_an_interrupted_start_of_the_heartbeat_is_made_again() -> None:
    """A thread that cannot be started gives the claim back; the next call starts it (F33)."""
    idem = Idempotency(store=MemoryStore(), observers=[])
    heartbeat: Any = idem.services("blocking").heartbeat
    starts: list[BaseException | None] = [RuntimeError("can't start new thread"), KeyboardInterrupt(), None]
    original = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        error = starts.pop(0)
        if error is not None:
            raise error
        original(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for kind in (RuntimeError, KeyboardInterrupt):
            with pytest.raises(kind):
                idem.run(str, "A-1", scope="s", key="A-1")
            assert heartbeat._held == {}
            record = idem.get("s", "A-1")
            assert record is not None
            assert record.state is State.RELEASED
        assert idem.run(str, "A-1", scope="s", key="A-1") == "A-1"
    assert heartbeat._thread is not None
    assert heartbeat._thread.is_alive()


def test_an_error_of_the_runtime_is_not_repeated() -> None:
    """The shield begins again for what struck from outside only: a fault of a store is raised at once."""
    tries: list[int] = []

    async def operation() -> None:
        tries.append(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_sync(Blocking().shield(operation))
    assert tries == [1]


def test_an_exception_that_was_being_handled_is_no_interruption() -> None:
    """A call within `except SoftLimit:` does not take that, which Python chains to every new error, for a new one."""
    tries: list[int] = []

    async def operation() -> None:
        tries.append(1)
        raise ZeroDivisionError

    async def call() -> None:
        try:
            raise SoftLimitError
        except SoftLimitError:
            await Blocking().shield(operation)

    with pytest.raises(ZeroDivisionError):
        run_sync(call())
    assert tries == [1]


def test_endless_interruptions_end() -> None:
    """A fault that strikes in a loop does not keep a call for ever."""
    tries: list[int] = []

    async def operation() -> None:
        tries.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sync(Blocking().shield(operation))
    assert len(tries) == 10
