"""`assert_idempotent`: takes a handler to every crash point, redelivers its message, and counts its effects."""

from __future__ import annotations

import asyncio
import inspect
import reprlib
import textwrap
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from idem_tasks.config import configure, default_restored
from idem_tasks.decorator import IdempotentFunction, idempotency_of
from idem_tasks.errors import ConfigurationError, InDoubtError, ParkedError, ReplayedFailureError, StoreUnavailableError
from idem_tasks.replay import message_of, type_name
from idem_tasks.runtime import run_sync
from idem_tasks.stores.memory import MemoryStore
from idem_tasks.testing.effects import Counts, Effects, count
from idem_tasks.testing.redelivery import USERS, Delivery, End, Message, Place
from idem_tasks.testing.report import IdempotencyReport, ReportedPoint

Reset = Callable[[], object]
Script = Callable[[Message], Awaitable[Delivery]]

UNDISTURBED = "undisturbed"

_CLAIMED = Place("record", "claim")
_ENDED = Place("handler", "run")
_RECORDED = Place("record", "finish")

_KILLED = {
    Place("marker", "take", "before"): "before it took the marker",
    Place("marker", "take"): "before it claimed the record",
    _CLAIMED: "before its handler ran",
    Place("record", "begin_step", "before"): "before a step began",
    Place("record", "begin_step"): "before a step ran",
    Place("record", "finish_step", "before"): "after a step ran",
    Place("record", "finish_step"): "after a step's outcome was recorded",
    _ENDED: "after its handler ended",
    Place("record", "finish", "before"): "before its outcome was recorded",
    _RECORDED: "before its outcome was published",
    Place("marker", "publish"): "before it was acknowledged",
}


def assert_idempotent(
    task: Callable[..., Any],
    /,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    effects: Effects | None = None,
    reset: Reset | None = None,
) -> IdempotencyReport:
    """Deliver `task(*args, **kwargs)` to every crash point, and raise AssertionError if an effect is repeated or lost.

    `task` is a decorated function or method, or the Celery task made of one. It runs under its own policy, on a
    store in memory that is new at each crash point; nothing that is configured is touched. `effects` says how to
    count what it does: a callable that returns a number, or numbers by name; a list; several of these by name; or a
    SQLAlchemy Engine, whose rows are counted. Without it only outcomes are compared. `reset` is called before each
    crash point, for fakes that remember the one before.

    Returns what was seen; `print` it. Raises what the handler raises undisturbed, and `ConfigurationError` for a
    handler that is not decorated, or not protected. From a coroutine, await `aassert_idempotent`.
    """
    __tracebackhide__ = True
    examination = _Examination(task, args, kwargs or {}, effects, reset)
    if not examination.function.asynchronous:
        report = run_sync(examination.report())
    elif _loop_is_running():
        raise ConfigurationError("an event loop is running: await aassert_idempotent(...) here")
    else:
        # Made by the factory, it does not become the current loop of this thread in place of another one.
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            report = runner.run(examination.report())
    if not report.passed:
        raise AssertionError(str(report))
    return report


async def aassert_idempotent(
    task: Callable[..., Any],
    /,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    effects: Effects | None = None,
    reset: Reset | None = None,
) -> IdempotencyReport:
    """As `assert_idempotent`, on the running event loop; `effects` and `reset` may be coroutine functions."""
    __tracebackhide__ = True
    report = await _Examination(task, args, kwargs or {}, effects, reset).report()
    if not report.passed:
        raise AssertionError(str(report))
    return report


class _Examination:
    """One handler, the call to deliver, and how its effects are counted."""

    def __init__(
        self,
        task: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        effects: Effects | None,
        reset: Reset | None,
    ) -> None:
        self.function = _decorated(task)
        self._task = task
        self._args = args
        self._kwargs = kwargs
        self._effects = effects
        self._reset = reset

    async def report(self) -> IdempotencyReport:
        """Go to every crash point."""
        with default_restored() as configured:
            if configured is None:
                configure(store=MemoryStore())  # not what the environment says; no store of its own is used here
            _refuse_unprotected(self.function)
            return IdempotencyReport(self._call_text(), tuple(await self._points()))

    async def _points(self) -> list[ReportedPoint]:
        undisturbed, end, places = await self._undisturbed("raised in the undisturbed run of assert_idempotent")
        again, *_ = await self._undisturbed(f"raised by the second undisturbed run, which {_REMEMBERS}")
        if _nonzero(again.effects) != _nonzero(undisturbed.effects):
            raise ConfigurationError(
                f"effects were {dict(undisturbed.effects)} in one undisturbed run and {dict(again.effects)} in the "
                f"next, which {_REMEMBERS}"
            )
        points = [undisturbed]
        for name, script in _crash_points(places):
            message, first, counted = await self._play(script)
            points.append(_judged(name, message, first, counted, undisturbed, end))
        if self._effects is not None and end.how == "returned" and not any(_nonzero(p.effects) for p in points):
            raise ConfigurationError(_NOTHING_COUNTED)
        return points

    async def _undisturbed(self, note: str) -> tuple[ReportedPoint, End, list[Place]]:
        message, delivery, counted = await self._play(Message.deliver)
        (end,) = message.ends
        never_ran = _ENDED not in delivery.places
        if end.how not in {"returned", "raised"} or (never_ran and end.how == "raised"):
            end.value.add_note(note)
            raise end.value
        if never_ran:
            raise ConfigurationError(
                f"{self._call_text()} returned {_text(end)} and its handler never ran: what wraps it answers by itself"
            )
        return ReportedPoint(UNDISTURBED, message.runs, counted, _text(end)), end, delivery.places

    async def _play(self, script: Script) -> tuple[Message, Delivery, Counts]:
        """Let this happen to a new message, and count the effects of that."""
        if self._reset is not None:
            waits = self._reset()
            if inspect.isawaitable(waits):
                await waits
        before = await count(self._effects)
        message = Message(self.function, self._deliver)
        delivery = await message.play(script)
        after = await count(self._effects)
        names = dict.fromkeys([*before, *after])
        return message, delivery, {name: after.get(name, 0) - before.get(name, 0) for name in names}

    def _deliver(self) -> Any:
        return self._task(*_as_sent(self._args), **_as_sent(dict(self._kwargs)))

    def _call_text(self) -> str:
        shown = [reprlib.repr(value) for value in self._args]
        shown += [f"{name}={reprlib.repr(value)}" for name, value in self._kwargs.items()]
        name = getattr(self.function.function, "__qualname__", repr(self.function.function))
        return f"{name.rpartition('<locals>.')[2]}({', '.join(shown)})"


_REMEMBERS = (
    "began with a store of its own: what the handler works with remembers the run before; "
    "give reset=, a callable that makes it forget"
)


_NOTHING_COUNTED = (
    "effects= counted nothing in any run: it looks elsewhere than the handler works, or what the handler works with "
    "remembers an earlier test; then give reset=, a callable that makes it forget"
)


def _nonzero(counted: Mapping[str, int]) -> Counts:
    return {name: number for name, number in counted.items() if number}


def _decorated(task: Callable[..., Any]) -> IdempotentFunction:
    try:
        known = idempotency_of(task)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{error}: give assert_idempotent the decorated handler itself, and its arguments behind it"
        ) from None
    if known.takes_many:
        raise ConfigurationError(
            "assert_idempotent follows the record of one message, and this handler takes many: give it one that is "
            "decorated with @idempotent_task"
        )
    return known


def _refuse_unprotected(function: IdempotentFunction) -> None:
    if function.policy.shadow:
        raise ConfigurationError("in shadow every delivery runs, so there is nothing to assert; leave shadow=True out")
    if not function.policy.active:
        raise ConfigurationError(
            "this handler is not protected, by enabled=False or IDEM_TASKS_DISABLED; turn it on for this test"
        )


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _as_sent(value: Any) -> Any:
    """Copy what a message carries, because a broker delivers it as it was sent; other objects are not copied."""
    if type(value) is dict:
        return {key: _as_sent(item) for key, item in value.items()}
    if type(value) in {list, tuple, set}:
        return type(value)(_as_sent(item) for item in value)
    return value


# What can happen to a message.

_NOTHING_BETWEEN = {("take", "claim"), ("run", "finish"), ("finish", "publish")}
"""After the first and before the second is one and the same place to die."""


def _crash_points(places: list[Place]) -> Iterator[tuple[str, Script]]:
    """Yield what can happen on the way that an undisturbed delivery takes, in its order, and then the rest."""
    seen: Counter[str] = Counter()
    for at, place in enumerate(places):
        if place.when == "before" and (places[at - 1].verb, place.verb) in _NOTHING_BETWEEN:
            continue
        name = f"killed {_where(place)}"
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})", _killed(at)
    yield "delivered twice", _delivered_twice
    yield "delivered again while it ran", _delivered_meanwhile(places.index(_ENDED))
    yield "paused past its lease", _paused(places.index(_ENDED))
    yield "the reply to its claim was lost", _reply_lost(places.index(_CLAIMED))
    yield "the reply to its finish was lost", _reply_lost(places.index(_RECORDED))


def _where(place: Place) -> str:
    if place.tier == USERS:
        return place.verb
    where = _KILLED.get(replace(place, nested=False), f"{place.when} {place.tier}.{place.verb}")
    return f"{where}, in a nested call" if place.nested else where


def _killed(at: int) -> Script:
    async def script(message: Message) -> Delivery:
        first = await message.deliver(at)
        await message.settle()
        return first

    return script


async def _delivered_twice(message: Message) -> Delivery:
    first = await message.deliver()
    await message.deliver()
    await message.settle()
    return first


def _delivered_meanwhile(at: int) -> Script:
    async def script(message: Message) -> Delivery:
        first = await message.deliver(at, message.deliver)
        await message.deliver()
        await message.settle()
        return first

    return script


def _paused(at: int) -> Script:
    """Let another copy begin and end while the worker of the first is paused, just before it finishes."""

    async def script(message: Message) -> Delivery:
        async def elsewhere() -> None:
            message.let_lease_expire()
            await message.deliver()
            await message.settle()

        first = await message.deliver(at, elsewhere)
        await message.settle()
        return first

    return script


def _reply_lost(at: int) -> Script:
    async def script(message: Message) -> Delivery:
        async def lose() -> None:
            raise StoreUnavailableError("the reply was lost")

        first = await message.deliver(at, lose)
        await message.settle()
        return first

    return script


# What came of it.


def _judged(
    name: str, message: Message, first: Delivery, counted: Counts, undisturbed: ReportedPoint, end: End
) -> ReportedPoint:
    settled = [end for end in message.ends if end.settled]
    told = [end for end in settled if end.how != "held"]
    complete = bool(told) and len(told) == len(settled)
    expected = {**dict.fromkeys(counted, 0), **undisturbed.effects}
    counted = {**dict.fromkeys(expected, 0), **counted}
    return ReportedPoint(
        name,
        message.runs,
        counted,
        ", then ".join(dict.fromkeys(map(_text, settled))) or _text(message.ends[-1]),
        repeated=tuple(effect for effect in expected if counted[effect] > expected[effect]),
        missing=tuple(effect for effect in expected if complete and counted[effect] < expected[effect]),
        faults=tuple(_faults(message, first, told, end, nobody_settled=not settled)),
    )


def _faults(
    message: Message, first: Delivery, told: list[End], undisturbed: End, *, nobody_settled: bool
) -> Iterator[str]:
    if not first.arrived:
        yield "this crash point was not reached: the handler does something else in each run"
    failures = [end for end in message.ends if end.how == "failed"]
    if failures:
        yield f"the handler raised {_text(failures[-1])}"
    elif nobody_settled:
        yield f"never acknowledged: {_text(message.ends[-1])}"
    if message.function.policy.on_duplicate == "skip":
        told = [end for end in told if end.value is not None]
    why = f"; its outcome was not kept: {message.not_kept}" if message.not_kept else ""
    for end in told:
        if not _same(told[0], end):
            yield f"one caller got {_text(told[0])}, another {_text(end)}{why}"
            return
    if told and told[0].how != undisturbed.how:
        yield f"the caller got {_text(told[0])}{why}"


def _same(one: End, other: End) -> bool:
    if one.how == other.how == "raised":
        return _failure(one.value) == _failure(other.value)
    return bool(one.how == other.how and one.value == other.value)


def _failure(error: Exception) -> tuple[str, str]:
    """Return type and message as they are recorded, also of a failure that was rebuilt from that."""
    if isinstance(error, ReplayedFailureError):
        return error.error_type, error.error_message
    return type_name(type(error)), message_of(error)


def _text(end: End) -> str:
    """Say in short what a delivery's caller got."""
    if end.how == "returned":
        return _shortened(reprlib.repr(end.value))
    if isinstance(end.value, InDoubtError):
        return "in doubt"
    if isinstance(end.value, ParkedError):
        return "parked"
    return _shortened(f"{type(end.value).__name__}: {message_of(end.value)}")


def _shortened(text: str) -> str:
    return textwrap.shorten(text, _WIDEST, placeholder="...")


_WIDEST = 60
