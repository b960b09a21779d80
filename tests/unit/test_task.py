"""The story of one delivery keeps its promises, whatever fails, is lost or is late on the way."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from idem_tasks import Idempotency, MemoryStore, current_claim
from idem_tasks.claims import EncodedOutcome, Release, State
from idem_tasks.errors import (
    ConfigurationError,
    DuplicateError,
    FingerprintMismatchError,
    InDoubtError,
    InProgressError,
    InvalidKeyError,
    LeaseLostError,
    OutcomeError,
    ParkedError,
    ReplayedFailureError,
    StoreConfigurationError,
    StoreError,
    StoreUnavailableError,
)
from idem_tasks.events import EventName
from idem_tasks.runtime import run_sync
from tests.unit.scripted import LEASE, SCOPE, World, away, world_on


class DeclinedError(Exception):
    """The bank said no."""


class BrokenError(Exception):
    """An exception that cannot be turned into text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class NeedsTwoError(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)


# One delivery after the other.


def test_a_call_leaves_nothing_to_the_garbage_collector() -> None:
    """What a call is made of goes as it ends: no circle waits in a busy process for a collection."""
    idem = Idempotency(store=MemoryStore())

    def charge(order: str) -> str:
        return order

    idem.run(charge, "A-1", scope=SCOPE, key="A-1")
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for key in ("A-2", "A-3", "A-2"):
            idem.run(charge, key, scope=SCOPE, key=key)
        gc.collect()
        assert [left for left in gc.garbage if type(left).__module__.startswith("idem_tasks")] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    idem.close()


def test_a_redelivered_message_replays_the_outcome(world: World) -> None:
    """The second delivery returns what the first one did, and the effect happens once."""
    charge = world.charge()
    assert charge("A-1") == "charged 5 for A-1"
    assert charge("A-1") == "charged 5 for A-1"
    assert world.effects == ["A-1"]
    assert [event.name for event in world.events] == [EventName.GRANTED, EventName.COMPLETED, EventName.REPLAYED]
    assert world.record().state is State.COMPLETED
    assert world.held() == 0


def test_the_claim_is_the_look_up(world: World) -> None:
    """Nothing is read before the claim: a look and then a leap lets two through (F11)."""
    world.charge()("A-1")
    assert world.record_tier.verbs == ["claim", "finish"]


def test_a_duplicate_is_answered_by_the_marker_alone(tiered: World) -> None:
    """While the marker stands, a duplicate does not reach the record."""
    charge = tiered.charge()
    charge("A-1")
    tiered.record_tier.down()
    assert charge("A-1") == "charged 5 for A-1"


@pytest.mark.parametrize("value", [None, 0, False, "", [], {}, 0.0, b"", ()])
def test_an_outcome_that_is_false_replays_as_itself(world: World, value: object) -> None:
    """Nothing takes an empty outcome for a missing one (F28)."""
    calls: list[str] = []

    def handler(order: str) -> Any:
        calls.append(order)
        return value

    task = world.task(handler)
    first, second = task("A-1"), task("A-1")
    assert calls == ["A-1"]
    assert (first, type(second), second) == (value, type(value), value)


def test_the_key_is_taken_before_the_handler_changes_its_arguments(world: World) -> None:
    """A handler that empties its payload is found again under the key and fingerprint it came with (F18)."""
    runs: list[int] = []

    def handler(order: dict[str, Any]) -> str:
        runs.append(1)
        order.clear()
        return "done"

    task = world.task(handler, key="{order[id]}")
    assert task({"id": "A-1", "lines": [1, 2]}) == "done"
    assert task({"id": "A-1", "lines": [1, 2]}) == "done"
    assert runs == [1]
    assert world.state() is State.COMPLETED


def test_other_arguments_under_one_key_are_refused(world: World) -> None:
    """A key that is used again for something else is an error, and nothing runs."""
    charge = world.charge()
    charge("A-1", 5)
    with pytest.raises(FingerprintMismatchError):
        charge("A-1", 6)
    assert world.effects == ["A-1"]
    assert world.names() == [EventName.MISMATCHED]


@pytest.mark.parametrize("key", [None, "", "  "])
def test_no_key_is_an_error(world: World, key: str | None) -> None:
    """A message without a key does not run, and nothing is claimed (F29)."""
    with pytest.raises(InvalidKeyError):
        world.charge()(key)
    assert world.effects == []
    assert world.record_tier.verbs == []


def test_on_duplicate_skip_keeps_nothing(world: World) -> None:
    """Under `skip` a duplicate gets None and no outcome is stored."""
    charge = world.charge(on_duplicate="skip")
    assert charge("A-1") == "charged 5 for A-1"
    assert charge("A-1") is None
    assert world.record().outcome is None
    assert world.record().not_kept == "skipped"


def test_on_duplicate_raise_carries_the_outcome(world: World) -> None:
    """Under `raise` a duplicate gets an error that has the outcome."""
    charge = world.charge(on_duplicate="raise")
    charge("A-1")
    with pytest.raises(DuplicateError) as caught:
        charge("A-1")
    assert caught.value.outcome == "charged 5 for A-1"


def test_on_duplicate_raise_of_a_failure_has_no_outcome(world: World) -> None:
    """Under `raise` a recorded failure is a duplicate too, without a value."""

    def handler(order: str) -> None:
        raise DeclinedError("no")

    task = world.task(handler, on_duplicate="raise", record_failures=DeclinedError)
    with pytest.raises(DeclinedError):
        task("A-1")
    with pytest.raises(DuplicateError) as caught:
        task("A-1")
    assert caught.value.outcome is None


def test_an_outcome_that_cannot_be_encoded_is_recorded_without_it(world: World) -> None:
    """The call returns its value, is completed, and a duplicate gets an error instead of a second run (F43)."""
    runs: list[int] = []

    def handler(order: str) -> Any:
        runs.append(1)
        return threading.Lock()

    task = world.task(handler)
    assert task("A-1") is not None
    with pytest.raises(OutcomeError, match="could not be encoded"):
        task("A-1")
    assert runs == [1]
    assert world.state() is State.COMPLETED
    assert world.count(EventName.OUTCOME_NOT_KEPT) == 1


def test_an_outcome_that_is_too_large_is_recorded_without_it(world: World) -> None:
    """The limit is on encoded bytes; above it the outcome is not kept and a duplicate is told why (F43)."""

    def handler(order: str) -> str:
        return "x" * 100

    task = world.task(handler, max_outcome_bytes=50)
    assert task("A-1") == "x" * 100
    with pytest.raises(OutcomeError, match="max_outcome_bytes"):
        task("A-1")


def test_a_codec_that_fails_does_not_undo_the_effect(world: World) -> None:
    """Whatever a codec raises, the record is completed (F43)."""

    class Failing:
        name = "failing"

        def encode(self, value: Any, type: Any, context: Any) -> bytes:  # noqa: A002
            raise ZeroDivisionError

        def decode(self, data: bytes, type: Any, context: Any) -> Any:  # noqa: A002
            raise AssertionError

        def check(self, type: Any) -> None:  # noqa: A002
            pass

    world.idem.codec = Failing()
    charge = world.charge()
    assert charge("A-1") == "charged 5 for A-1"
    with pytest.raises(OutcomeError):
        charge("A-1")
    assert world.effects == ["A-1"]


def test_a_codec_that_gives_no_bytes_does_not_undo_the_effect(world: World) -> None:
    """What is no bytes is no outcome; the record is completed without one (F43)."""

    class Forgetful:
        name = "forgetful"

        def encode(self, value: Any, type: Any, context: Any) -> Any:  # noqa: A002
            return None

        def decode(self, data: bytes, type: Any, context: Any) -> Any:  # noqa: A002
            raise AssertionError

        def check(self, type: Any) -> None:  # noqa: A002
            pass

    world.idem.codec = Forgetful()
    assert world.charge()("A-1") == "charged 5 for A-1"
    assert world.state() is State.COMPLETED
    assert world.count(EventName.OUTCOME_NOT_KEPT) == 1


def test_an_outcome_that_the_database_refuses_is_recorded_without_it(world: World) -> None:
    """A limit of the server's own, such as MariaDB's packet, must not have the effect repeated for ever (F43)."""
    real = world.record_tier.real

    class Narrow:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        async def finish(self, lease: Any, outcome: EncodedOutcome, **options: Any) -> Any:
            if outcome.body is not None and len(outcome.body) > 1024 * 1024:
                raise away()
            return await real.finish(lease, outcome, **options)

    world.record_tier.real = Narrow()
    task = world.task(lambda order: order[0] * 2_000_000, max_outcome_bytes=4_000_000)
    assert len(task("A-1")) == 2_000_000
    assert world.state() is State.COMPLETED
    assert world.count(EventName.OUTCOME_NOT_KEPT) == 1
    with pytest.raises(OutcomeError):
        task("A-1")


# In progress.


def test_a_running_key_is_in_progress(world: World) -> None:
    """A duplicate of a running handler is neither run nor answered: it hears when to come back (F31)."""
    world.claim_elsewhere()
    with pytest.raises(InProgressError) as caught:
        world.charge()("A-1")
    assert 0 < caught.value.retry_after <= LEASE
    assert world.effects == []
    assert world.names() == [EventName.IN_PROGRESS]


@pytest.mark.parametrize("on_duplicate", ["replay", "skip", "raise"])
def test_waiting_gets_the_outcome_of_the_one_that_runs(world: World, on_duplicate: Any) -> None:
    """Under `wait` a duplicate sleeps until the first one's outcome is there."""
    lease = world.claim_elsewhere()
    charge = world.charge(on_in_progress="wait", on_duplicate=on_duplicate, wait_timeout=10, fingerprint=None)
    world.record_tier.before("claim", lambda: None, lambda: None, lambda: world.finish_elsewhere(lease))
    if on_duplicate == "raise":
        with pytest.raises(DuplicateError):
            charge("A-1")
    else:
        assert charge("A-1") == {"replay": "the other one", "skip": None}[on_duplicate]
    assert world.effects == []
    assert world.record_tier.verbs == ["claim"] * 3
    assert EventName.IN_PROGRESS not in world.names()


def test_waiting_takes_over_when_the_first_one_gives_up(world: World) -> None:
    """A duplicate that waits runs the handler itself if the first one releases its claim."""
    lease = world.claim_elsewhere()
    world.record_tier.before("claim", lambda: None, lambda: world.release_elsewhere(lease))
    assert world.charge(on_in_progress="wait")("A-1") == "charged 5 for A-1"
    assert world.record().attempts == 2


def test_waiting_ends_at_its_time(world: World) -> None:
    """After `wait_timeout` the duplicate is in progress; it looked up to the end, and not in a hot loop."""
    world.claim_elsewhere()
    begun = world.local()
    with pytest.raises(InProgressError):
        world.charge(on_in_progress="wait", wait_timeout=7)("A-1")
    assert world.local() - begun == pytest.approx(7)
    assert len(world.record_tier.verbs) < 12


def test_a_handler_that_calls_itself_meets_its_own_claim(world: World) -> None:
    """A nested delivery of the same key is in progress, and the outer one goes on or fails by its own choice."""
    if world.runtime == "blocking":

        def outer(order: str) -> str:
            with pytest.raises(InProgressError):
                task(order)
            return "done"
    else:

        async def outer(order: str) -> str:  # type: ignore[misc]
            with pytest.raises(InProgressError):
                await task(order)
            return "done"

    task = world.decorated(outer)
    assert world.drive(task, "A-1") == "done"
    assert world.state() is State.COMPLETED


def test_nested_handlers_each_have_their_claim(world: World) -> None:
    """The inner handler sees its own claim, the outer one its own again afterwards, and both are recorded."""
    keys: list[str] = []

    def see(order: str) -> str:
        keys.append(current_claim().key)
        return order

    inner = world.decorated(see)
    if world.runtime == "blocking":

        def outer(order: str) -> str:
            see(order)
            inner("B-2")
            return see(order)
    else:

        async def outer(order: str) -> str:  # type: ignore[misc]
            see(order)
            await inner("B-2")
            return see(order)

    assert world.task(outer)("A-1") == "A-1"
    assert keys == ["A-1", "B-2", "A-1"]
    assert world.state("A-1") is world.state("B-2") is State.COMPLETED


def test_an_inner_call_in_progress_does_not_fail_the_outer_one(world: World) -> None:
    """An error that puts a nested call off is no failure: not counted, and never recorded as final (F31, F37)."""

    def handler(order: str) -> None:
        raise InProgressError(scope="inner", key="B-2", retry_after=3.0)

    task = world.task(handler, record_failures=Exception, max_attempts=1)
    with pytest.raises(InProgressError):
        task("A-1")
    assert world.state() is State.RELEASED
    assert world.record().failures == 0


# current_claim().


def test_the_claim_is_at_hand_in_the_handler(world: World) -> None:
    """`current_claim()` has the key, the token and the attempt; outside of a handler it is an error."""
    seen: list[Any] = []

    def handler(order: str) -> None:
        claim = current_claim()
        seen.append((claim.scope, claim.key, claim.attempt, claim.crashes, claim.taken_over, claim.lost))
        assert claim.fencing_token == world.record().fencing_token

    with pytest.raises(ConfigurationError, match="outside"):
        current_claim()
    world.task(handler)("A-1")
    assert seen == [(SCOPE, "A-1", 1, 0, False, False)]
    with pytest.raises(ConfigurationError):
        current_claim()


def test_a_claim_is_not_inherited_by_a_thread(world: World) -> None:
    """A thread that a handler starts has no claim unless its context is copied."""
    errors: list[BaseException] = []

    def in_thread() -> None:
        try:
            current_claim()
        except ConfigurationError as error:
            errors.append(error)

    def handler(order: str) -> None:
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()

    world.task(handler)("A-1")
    assert len(errors) == 1


def test_tasks_that_run_at_once_see_their_own_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty handlers interleaved on one loop each see their own claim before and after they wait (F26)."""
    with world_on(monkeypatch, "asyncio", 2) as world:

        async def handler(order: str) -> str:
            before = current_claim().key
            await asyncio.sleep(0)
            child = asyncio.create_task(asyncio.sleep(0, current_claim().key))
            return f"{order} {before} {await child} {current_claim().key}"

        task = world.decorated(handler)

        async def many() -> list[Any]:
            return await asyncio.gather(*(task(f"A-{number}") for number in range(50)))

        answers = world.driver(many())
        assert answers == [f"A-{n} A-{n} A-{n} A-{n}" for n in range(50)]


def test_fifty_threads_mix_nothing_up() -> None:
    """One function on fifty threads with fifty keys and policies of two functions: each has its own (F26)."""
    idem = Idempotency(store=MemoryStore(), observers=[])
    barrier = threading.Barrier(50)

    def handler(order: str) -> str:
        before = current_claim().key
        barrier.wait(30)
        return f"{before} {current_claim().key}"

    def run(number: int) -> str:
        return idem.run(handler, f"A-{number}", scope=f"scope-{number % 2}", key=f"A-{number}")

    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(run, range(50)))
    assert answers == [f"A-{number} A-{number}" for number in range(50)]
    assert idem.stats()[State.COMPLETED] == 50


# Handlers that raise.


def test_a_failure_releases_the_claim_before_it_leaves(world: World) -> None:
    """The handler's own exception goes on unchanged, and its next delivery runs at once (F32, F34, F37)."""
    error = DeclinedError("no")
    outcomes: list[Any] = [error, "done"]

    def handler(order: str) -> Any:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    task = world.task(handler)
    with pytest.raises(DeclinedError) as caught:
        task("A-1")
    assert caught.value is error
    record = world.record()
    assert (record.state, record.failures, record.error_message) == (State.RELEASED, 1, "no")
    assert record.error_type == f"{__name__}.DeclinedError"
    assert task("A-1") == "done"
    assert world.held() == 0


def test_a_released_claim_leaves_no_marker(tiered: World) -> None:
    """The marker of a failed handler is gone before its exception leaves (F32)."""

    def handler(order: str) -> None:
        raise DeclinedError("no")

    with pytest.raises(DeclinedError):
        tiered.task(handler)("A-1")
    assert tiered.marker_of() is None


def test_an_error_of_ours_is_no_final_failure(world: World) -> None:
    """Under `record_failures=Exception` what is not set up right is not the outcome: mended, the message runs."""

    def handler(order: str) -> None:
        world.effects.append(order)
        if len(world.effects) == 1:
            current_claim().publish_message("receipt", to="nobody")
        if len(world.effects) == 2:
            raise ReplayedFailureError("of a nested call")

    task = world.task(handler, record_failures=Exception)
    with pytest.raises(ConfigurationError, match="no sender is called 'nobody'"):
        task("A-1")
    assert world.state() is State.RELEASED
    for _ in range(2):
        with pytest.raises(ReplayedFailureError):
            task("A-1")
    assert (world.state(), len(world.effects)) == (State.FAILED, 2)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, StopAsyncIteration, asyncio.CancelledError])
def test_every_exception_goes_through_unchanged(world: World, kind: type[BaseException]) -> None:
    """Nothing a handler raises is swallowed or changed; what is no failure is not counted as one."""
    error = kind("stop")

    def handler(order: str) -> None:
        raise error

    with pytest.raises(kind) as caught:
        world.drive(world.decorated(handler), "A-1")
    if world.runtime == "blocking" or kind is StopAsyncIteration:
        assert caught.value is error
    assert world.state() is State.RELEASED
    assert world.record().failures == (1 if issubclass(kind, Exception) else 0)


@pytest.mark.parametrize("kind", [StopIteration, GeneratorExit])
def test_what_python_uses_itself_is_a_handlers_exception_too(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """A blocking handler's StopIteration or GeneratorExit arrives as itself, and its claim is released."""
    error = kind("here")

    def handler(order: str) -> None:
        raise error

    with world_on(monkeypatch, "blocking", 2) as world:
        with pytest.raises(kind) as caught:
            world.task(handler)("A-1")
        assert caught.value is error
        assert world.state() is State.RELEASED
        assert world.marker_of() is None


def test_an_exception_holds_no_frame_of_ours(world: World) -> None:
    """An exception is freed as soon as its catcher drops it, with all that its handler's frame held."""

    class Connection:
        pass

    seen: list[weakref.ref[Connection]] = []

    def handler(order: str) -> None:
        connection = Connection()
        seen.append(weakref.ref(connection))
        raise DeclinedError("no")

    task = world.decorated(handler)

    def call() -> None:
        with contextlib.suppress(DeclinedError):
            task("A-1")
        assert seen[0]() is None

    async def call_async() -> None:
        with contextlib.suppress(DeclinedError):
            await task("A-1")
        assert seen[0]() is None

    gc.disable()
    try:
        world.drive(call if world.runtime == "blocking" else call_async)
    finally:
        gc.enable()


def test_a_failure_that_is_named_is_final(world: World) -> None:
    """A type in `record_failures` is recorded, and raised as itself for every duplicate."""
    runs: list[int] = []

    def handler(order: str) -> None:
        runs.append(1)
        raise DeclinedError("the card was declined")

    task = world.task(handler, record_failures=DeclinedError)
    for _ in range(3):
        with pytest.raises(DeclinedError, match="the card was declined"):
            task("A-1")
    assert runs == [1]
    assert world.state() is State.FAILED
    assert world.count(EventName.FAILED) == 1


def test_a_failure_that_cannot_be_rebuilt_keeps_its_name(world: World) -> None:
    """A recorded failure whose constructor wants more is replayed by name; nothing is imported for it."""

    def handler(order: str) -> None:
        raise NeedsTwoError(402, "declined")

    task = world.task(handler, record_failures=(NeedsTwoError, DeclinedError))
    with pytest.raises(NeedsTwoError):
        task("A-1")
    with pytest.raises(ReplayedFailureError) as caught:
        task("A-1")
    assert caught.value.error_type == f"{__name__}.NeedsTwoError"
    assert caught.value.error_message == "(402, 'declined')"


def test_an_exception_without_text_is_handled_like_any_other(world: World) -> None:
    """An exception whose `__str__` fails is released or recorded, and goes on as itself."""

    def handler(order: str) -> None:
        raise BrokenError

    with pytest.raises(BrokenError):
        world.task(handler)("A-1")
    assert world.state() is State.RELEASED
    with pytest.raises(BrokenError):
        world.task(handler, record_failures=BrokenError)("A-1")
    with pytest.raises((BrokenError, ReplayedFailureError)):
        world.task(handler, record_failures=BrokenError)("A-1")
    assert "BrokenError" in (world.record().error_message or "")


def test_too_many_failures_park_the_record(world: World) -> None:
    """After `max_attempts` failures the record waits for a person; the last exception still goes on."""

    def handler(order: str) -> None:
        world.effects.append(order)
        raise DeclinedError("no")

    task = world.task(handler, max_attempts=2)
    for _ in range(2):
        with pytest.raises(DeclinedError):
            task("A-1")
    with pytest.raises(ParkedError) as caught:
        task("A-1")
    assert (caught.value.failures, len(world.effects)) == (2, 2)
    assert [e.details.get("new") for e in world.events if e.name is EventName.PARKED] == [True, False]
    world.idem.resolve(SCOPE, "A-1", rerun=True)
    with pytest.raises(DeclinedError):
        task("A-1")


def test_too_many_crashes_park_the_record(world: World) -> None:
    """A message that kills its workers is parked after `max_crashes` takeovers, counted by the store (F42)."""
    charge = world.charge(max_crashes=1, fingerprint=None)
    world.claim_elsewhere()
    world.take_over()
    world.pass_time(LEASE + 1)
    with pytest.raises(ParkedError) as caught:
        charge("A-1")
    assert caught.value.crashes == 2
    assert world.effects == []


def test_a_dead_holders_claim_is_taken_over(world: World) -> None:
    """When a lease runs out the next delivery runs, and knows that it took over (F33)."""
    world.claim_elsewhere()
    world.pass_time(LEASE + 1)
    seen: list[bool] = []

    def handler(order: str) -> str:
        seen.append(current_claim().taken_over)
        return "done"

    assert world.task(handler)("A-1") == "done"
    assert seen == [True]
    assert EventName.TAKEN_OVER in world.names()


# Hold: at most once.


def test_hold_leaves_a_failure_in_doubt(world: World) -> None:
    """Under `hold` an exception may have come after the effect: nobody runs it again before a person says so (F55)."""

    def handler(order: str) -> None:
        world.effects.append(order)
        raise TimeoutError("no answer")

    task = world.task(handler, on_crash="hold")
    with pytest.raises(TimeoutError):
        task("A-1")
    assert world.state() is State.IN_DOUBT
    for _ in range(2):
        with pytest.raises(InDoubtError):
            task("A-1")
    assert world.effects == ["A-1"]
    world.idem.resolve(SCOPE, "A-1", outcome="charged, says the bank")
    assert task("A-1") == "charged, says the bank"


def test_hold_releases_what_is_safe_to_retry(world: World) -> None:
    """Under `hold` an exception that proves that nothing happened releases the claim."""
    errors: list[Exception] = [DeclinedError("no")]

    def handler(order: str) -> str:
        if errors:
            raise errors.pop()
        return "done"

    task = world.task(handler, on_crash="hold", safe_to_retry=DeclinedError)
    with pytest.raises(DeclinedError):
        task("A-1")
    assert task("A-1") == "done"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_hold_never_releases_an_interrupted_handler(world: World, kind: type[BaseException]) -> None:
    """Under `hold` a shutdown in mid-run leaves the record in doubt."""

    def handler(order: str) -> None:
        raise kind

    with pytest.raises(kind):
        world.drive(world.decorated(handler, on_crash="hold"), "A-1")
    assert world.state() is State.IN_DOUBT


def test_hold_puts_a_dead_holders_claim_in_doubt(world: World) -> None:
    """Under `hold` a crash leaves the record in doubt, and a late finish of that claim still tells the truth."""
    lease = world.claim_elsewhere(on_crash="hold")
    world.pass_time(LEASE + 1)
    charge = world.charge(on_crash="hold", fingerprint=None)
    with pytest.raises(InDoubtError):
        charge("A-1")
    assert world.effects == []
    world.finish_elsewhere(lease)
    assert charge("A-1") == "the other one"


def test_hold_is_no_doubt_where_nothing_ran(world: World) -> None:
    """A claim that was granted though its caller was told of an error is given up again, not doubted later."""
    world.record_tier.after("claim", asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        world.charge(on_crash="hold")("A-1")
    assert world.state() is State.RELEASED
    assert world.effects == []


# Superseded.


def test_a_late_finish_returns_the_outcome_that_was_recorded(world: World) -> None:
    """A handler that outlives its lease and was overtaken returns the other one's outcome (F1, F5)."""

    def handler(order: str) -> str:
        world.finish_elsewhere(world.take_over(fingerprint=None))
        return "mine"

    task = world.task(handler)
    assert task("A-1") == "the other one"
    assert world.names() == [EventName.SUPERSEDED]
    assert task("A-1") == "the other one"


def test_a_late_finish_without_an_outcome_has_lost_its_lease(world: World) -> None:
    """A handler that was overtaken by one that still runs gets LeaseLostError, and changes nothing (F4, F5)."""

    def handler(order: str) -> str:
        world.take_over()
        return "mine"

    with pytest.raises(LeaseLostError):
        world.task(handler)("A-1")
    assert world.state() is State.RUNNING
    assert world.names() == [EventName.LEASE_LOST]


def test_a_late_failure_returns_the_outcome_that_was_recorded(world: World) -> None:
    """A superseded handler's exception does not hide the recorded success (F58)."""

    def handler(order: str) -> str:
        world.finish_elsewhere(world.take_over())
        raise DeclinedError("duplicate key value violates unique constraint")

    assert world.task(handler)("A-1") == "the other one"
    [event] = [event for event in world.events if event.name is EventName.SUPERSEDED]
    assert event.details["error"] == "DeclinedError"


def test_a_late_failure_without_an_outcome_has_lost_its_lease(world: World) -> None:
    """A superseded handler's exception is the cause of the LeaseLostError that has the message delivered again."""

    def handler(order: str) -> str:
        world.take_over()
        raise DeclinedError("no")

    with pytest.raises(LeaseLostError) as caught:
        world.task(handler)("A-1")
    assert isinstance(caught.value.__cause__, DeclinedError)
    assert world.state() is State.RUNNING


def test_a_late_interruption_is_never_answered_by_an_outcome(world: World) -> None:
    """A shutdown goes on though somebody else has recorded an outcome: it is never swallowed."""

    def handler(order: str) -> str:
        world.finish_elsewhere(world.take_over())
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        world.drive(world.decorated(handler), "A-1")


def test_a_late_final_failure_is_not_recorded_over_an_outcome(world: World) -> None:
    """A named failure of a superseded handler returns the recorded outcome too (F58)."""

    def handler(order: str) -> str:
        world.finish_elsewhere(world.take_over())
        raise DeclinedError("no")

    assert world.task(handler, record_failures=DeclinedError)("A-1") == "the other one"
    assert world.state() is State.COMPLETED


@pytest.mark.parametrize("fails", [False, True])
def test_a_stranger_s_outcome_is_never_returned(world: World, fails: bool) -> None:
    """An overtaker with other arguments has an outcome for those: a superseded handler is told so."""

    def handler(order: str) -> str:
        world.finish_elsewhere(world.take_over(fingerprint="f" * 64))
        if fails:
            raise DeclinedError("no")
        return "mine"

    with pytest.raises(FingerprintMismatchError):
        world.task(handler)("A-1")
    assert EventName.SUPERSEDED in world.names()


def test_a_failure_recorded_by_the_overtaker_is_raised(world: World) -> None:
    """A superseded handler raises the failure that all deliveries of its key see."""

    def handler(order: str) -> str:
        lease = world.take_over()
        failure = EncodedOutcome(State.FAILED, error_type=f"{__name__}.DeclinedError", error_message="no")
        run_sync(world.real.finish(lease, failure))
        return "mine"

    with pytest.raises(DeclinedError, match="no"):
        world.task(handler, record_failures=DeclinedError)("A-1")


def test_a_record_that_vanished_is_written_again(world: World) -> None:
    """A claim lost with the database's last moments is recorded at the finish, while its lease lives (F7)."""

    def handler(order: str) -> str:
        world.real._rows.clear()
        return "done"

    task = world.task(handler)
    assert task("A-1") == "done"
    assert world.state() is State.COMPLETED
    assert task("A-1") == "done"


def test_a_record_that_vanished_long_ago_is_not_written_again(world: World) -> None:
    """Past its lease a handler does not bring back a record that is gone: a person may have forgotten it (F53)."""

    def handler(order: str) -> str:
        world.real._rows.clear()
        world.local.advance(LEASE + 1)
        return "done"

    with pytest.raises(LeaseLostError):
        world.task(handler)("A-1")
    assert world.get() is None


def test_a_finish_after_the_retention_is_kept_for_all_of_it(world: World) -> None:
    """A run longer than its retention is not completed and expired at once (F61)."""

    def handler(order: str) -> str:
        world.effects.append(order)
        world.clock.advance(500)
        return "done"

    task = world.task(handler, retention=100, max_hold=LEASE)
    assert task("A-1") == "done"
    world.clock.advance(99)
    assert task("A-1") == "done"
    assert world.effects == ["A-1"]


# Stores that fail.


def test_a_claim_that_cannot_reach_the_store_does_not_run(world: World) -> None:
    """While SQL is away nothing runs, and the message is to be delivered again."""
    world.record_tier.down()
    with pytest.raises(StoreUnavailableError):
        world.charge()("A-1")
    assert world.effects == []
    world.record_tier.up()
    assert world.charge()("A-1") == "charged 5 for A-1"


def test_on_store_unavailable_run_runs_unprotected(world: World) -> None:
    """Under `run` the handler runs while SQL is away, counted and logged; its claim says that it is no claim."""
    tokens: list[int] = []

    def handler(order: str) -> str:
        tokens.append(current_claim().fencing_token)
        assert not current_claim().lost
        return order

    task = world.task(handler, on_store_unavailable="run")
    world.record_tier.down()
    assert [task("A-1"), task("A-1")] == ["A-1", "A-1"]
    assert tokens == [0, 0]
    assert world.count(EventName.UNPROTECTED_RUN) == 2


def test_a_store_that_cannot_be_claimed_is_announced_with_its_remedy(world: World) -> None:
    """Whoever watches for errors hears that the store is away, and why, also where the message is put back."""
    world.record_tier.down()
    with pytest.raises(StoreUnavailableError):
        world.charge()("A-1")
    assert world.count(EventName.STORE_UNAVAILABLE) == 1


def test_on_store_unavailable_run_does_not_fail_a_finished_handler(world: World) -> None:
    """Under `run` a handler whose finish cannot reach SQL returns its value: put back, it would run again at once."""
    charge = world.charge(on_store_unavailable="run")
    world.record_tier.down("finish")
    assert charge("A-1") == "charged 5 for A-1"
    assert world.count(EventName.UNPROTECTED_RUN) == 1
    world.record_tier.up()
    world.pass_time(2)
    world.beat()
    assert world.state() is State.COMPLETED


def test_a_finish_whose_reply_is_lost_is_recorded_once(world: World) -> None:
    """The finish is sent again and finds its own outcome (F21)."""
    world.record_tier.after("finish", away())
    charge = world.charge()
    assert charge("A-1") == "charged 5 for A-1"
    assert world.record_tier.verbs == ["claim", "finish", "finish"]
    assert charge("A-1") == "charged 5 for A-1"
    assert world.effects == ["A-1"]


def test_a_release_whose_reply_is_lost_still_lets_the_exception_go(world: World) -> None:
    """The handler's exception goes on whatever becomes of its release, which is logged."""

    def handler(order: str) -> None:
        raise DeclinedError("no")

    world.record_tier.after("release", away())
    with pytest.raises(DeclinedError):
        world.task(handler)("A-1")
    assert world.state() is State.RELEASED
    assert EventName.RELEASE_FAILED in world.names()


def test_a_release_that_fails_leaves_the_lease_to_run_out(world: World) -> None:
    """A claim that could not be released is not renewed, so that the next delivery takes it over (F33)."""

    def handler(order: str) -> None:
        raise DeclinedError("no")

    world.record_tier.down("release")
    with pytest.raises(DeclinedError):
        world.task(handler)("A-1")
    assert world.held() == 0
    assert world.state() is State.RUNNING
    world.pass_time(LEASE + 1)
    assert world.charge(fingerprint=None)("A-1") == "charged 5 for A-1"


def test_a_claim_that_is_struck_and_cannot_be_withdrawn_is_logged(world: World) -> None:
    """What struck goes on whatever becomes of the claim, whose lease then runs out (F33, F62)."""
    world.record_tier.after("claim", KeyboardInterrupt())
    world.record_tier.down("release")
    with pytest.raises(KeyboardInterrupt):
        world.charge()("A-1")
    assert world.names() == [EventName.RELEASE_FAILED]
    assert world.held() == 0
    assert world.state() is State.RUNNING
    world.pass_time(LEASE + 1)
    assert world.charge()("A-1") == "charged 5 for A-1"
    assert world.effects == ["A-1"]


def test_a_claim_that_is_struck_takes_nothing_from_its_holder(world: World) -> None:
    """Struck while another one holds the key, it has nothing to give up, and gives up nothing of his (F62)."""
    lease = world.claim_elsewhere()
    world.record_tier.before("claim", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        world.charge()("A-1")
    assert "release" not in world.record_tier.verbs
    assert world.record().owner == lease.owner
    assert world.state() is State.RUNNING


class SoftLimitError(Exception):
    """Stands for a framework's soft time limit."""


class Framework:
    """A host that settles nothing by itself."""

    scope = None
    message = "m-1"
    framework_argument = False

    def is_failure(self, error: BaseException) -> bool:
        return True

    def proves_no_effect(self, error: BaseException) -> bool:
        return False

    def settle(self, error: BaseException, announce: Any) -> BaseException:
        return error


@pytest.mark.parametrize(
    "struck, raised", [(SoftLimitError(), StoreUnavailableError), (KeyError("a bug"), KeyError)], ids=["limit", "bug"]
)
def test_a_soft_limit_before_the_handler_puts_the_message_back(
    monkeypatch: pytest.MonkeyPatch, world: World, struck: Exception, raised: type[Exception]
) -> None:
    """Nothing has run, so the message comes again, where the framework would fail it; a bug is not hidden (F31)."""
    monkeypatch.setattr("idem_tasks.hosts._finders", [lambda _: Framework()])
    monkeypatch.setattr("idem_tasks.runtime._INTERRUPTIONS", [SoftLimitError])
    world.record_tier.after("claim", struck)
    with pytest.raises(raised):
        world.charge()("A-1")
    assert world.effects == []
    assert world.state() is State.RELEASED
    assert world.charge()("A-1") == "charged 5 for A-1"


def test_a_finish_is_retried_while_the_lease_lives(world: World) -> None:
    """SQL away for some seconds at the finish costs nothing but these seconds (F45)."""
    world.record_tier.before("finish", away(), StoreError("odd"), away(), away())
    charge = world.charge()
    assert charge("A-1") == "charged 5 for A-1"
    assert world.record_tier.verbs.count("finish") == 5
    assert charge("A-1") == "charged 5 for A-1"


@pytest.mark.parametrize("error", [away(), StoreError("disk full"), StoreConfigurationError("no such table")])
def test_an_outcome_that_cannot_be_recorded_is_put_back(world: World, error: Exception) -> None:
    """Past the lease the call ends in StoreUnavailableError, whatever SQL says, and is recorded later (F45, F57)."""
    world.record_tier.down("finish", error=error)
    charge = world.charge()
    begun = world.local()
    with pytest.raises(StoreUnavailableError) as caught:
        charge("A-1")
    assert caught.value.__cause__ is error
    assert LEASE - 3 < world.local() - begun <= LEASE
    [event] = [event for event in world.events if event.name is EventName.OUTCOME_PENDING]
    assert event.details["kept_in_marker"] is (world.marker is not None)
    world.beat()
    assert world.state() is State.RUNNING
    world.record_tier.up()
    world.pass_time(40)
    world.beat()
    assert world.state() is State.COMPLETED
    assert world.count(EventName.OUTCOME_WRITTEN_THROUGH) == 1
    assert charge("A-1") == "charged 5 for A-1"
    assert world.effects == ["A-1"]


def test_a_failure_that_cannot_be_recorded_is_put_back(world: World) -> None:
    """A named failure is kept like an outcome, and the error says what the handler raised (F45)."""

    def handler(order: str) -> None:
        world.effects.append(order)
        raise DeclinedError("no")

    task = world.task(handler, record_failures=DeclinedError)
    world.record_tier.down("finish")
    with pytest.raises(StoreUnavailableError) as caught:
        task("A-1")
    assert isinstance(caught.value.__context__, DeclinedError)
    world.record_tier.up()
    world.pass_time(2)
    world.beat()
    with pytest.raises(DeclinedError):
        task("A-1")
    assert world.effects == ["A-1"]


def test_a_pending_outcome_is_written_through_by_the_next_delivery(tiered: World) -> None:
    """An outcome kept in the marker is recorded by whoever comes next, then replayed; never before that (F57)."""
    charge = tiered.charge()
    tiered.record_tier.down("finish", "write_through")
    with pytest.raises(StoreUnavailableError):
        charge("A-1")
    assert tiered.marker_of() == "pending"
    with pytest.raises(StoreUnavailableError):
        charge("A-1")
    assert tiered.count(EventName.REPLAYED) == 0
    tiered.record_tier.up()
    assert charge("A-1") == "charged 5 for A-1"
    assert tiered.state() is State.COMPLETED
    assert tiered.marker_of() is None
    assert charge("A-1") == "charged 5 for A-1"
    assert tiered.marker_of() == "finished"
    assert tiered.effects == ["A-1"]


def test_a_pending_outcome_of_a_stale_claim_gives_way_to_the_record(tiered: World) -> None:
    """A pending outcome whose claim was taken over is dropped, and the record decides (F53, F57)."""
    charge = tiered.charge()
    tiered.record_tier.down("finish")
    with pytest.raises(StoreUnavailableError):
        charge("A-1")
    tiered.record_tier.up()
    tiered.finish_elsewhere(tiered.take_over())
    assert charge("A-1") == "the other one"
    assert tiered.count(EventName.OUTCOME_DROPPED) == 1
    tiered.pass_time(2)
    tiered.beat()
    assert tiered.count(EventName.OUTCOME_DROPPED) == 2
    assert charge("A-1") == "the other one"


def test_a_pending_outcome_is_compared_by_fingerprint(tiered: World) -> None:
    """A pending outcome is no answer to other arguments under its key."""
    charge = tiered.charge()
    tiered.record_tier.down("finish")
    with pytest.raises(StoreUnavailableError):
        charge("A-1", 5)
    tiered.record_tier.up()
    with pytest.raises(FingerprintMismatchError):
        charge("A-1", 6)
    assert tiered.state() is State.COMPLETED


def test_with_both_tiers_away_the_record_stays_for_on_crash(tiered: World) -> None:
    """SQL and Redis away at the finish: the record stays running, and the process keeps trying (F45)."""
    charge = tiered.charge(on_crash="hold")
    assert tiered.marker is not None
    tiered.record_tier.down("finish", "write_through")
    tiered.marker.before("keep", away("the marker"))
    with pytest.raises(StoreUnavailableError):
        charge("A-1")
    assert EventName.MARKER_UNAVAILABLE in tiered.names()
    assert tiered.state() is State.RUNNING
    tiered.record_tier.up()
    tiered.pass_time(LEASE + 1)
    with pytest.raises(InDoubtError):
        charge("A-1")
    tiered.beat()
    assert tiered.state() is State.COMPLETED
    assert charge("A-1") == "charged 5 for A-1"
    assert tiered.effects == ["A-1"]


def test_a_marker_that_is_away_changes_nothing(tiered: World) -> None:
    """With Redis away SQL alone arbitrates, from the claim to the replay (F7)."""
    assert tiered.marker is not None
    tiered.marker.down()
    charge = tiered.charge()
    assert [charge("A-1"), charge("A-1")] == ["charged 5 for A-1"] * 2
    assert tiered.effects == ["A-1"]
    assert tiered.count(EventName.MARKER_UNAVAILABLE) > 0


def test_a_marker_that_vanishes_changes_nothing(tiered: World) -> None:
    """A marker flushed while the handler runs, and after it, costs a look at the record and nothing else (F7)."""
    assert tiered.marker is not None
    marker = tiered.marker.real

    def handler(order: str) -> str:
        tiered.effects.append(order)
        marker._markers.clear()
        with pytest.raises(AssertionError):
            tiered.claim_elsewhere()
        return "done"

    task = tiered.task(handler)
    assert task("A-1") == "done"
    marker._markers.clear()
    assert task("A-1") == "done"
    assert tiered.effects == ["A-1"]


def test_a_publish_whose_reply_is_lost_changes_nothing(tiered: World) -> None:
    """The outcome is recorded: whether its marker is there is nobody's concern."""
    assert tiered.marker is not None
    tiered.marker.after("publish", away("the marker"))
    charge = tiered.charge()
    assert [charge("A-1"), charge("A-1")] == ["charged 5 for A-1"] * 2
    assert tiered.effects == ["A-1"]


def test_a_publish_that_fails_puts_duplicates_off_for_the_lease_at_most(tiered: World) -> None:
    """Our running marker stays when it cannot be replaced: a duplicate is put back until it expires, then replayed."""
    assert tiered.marker is not None
    tiered.marker.before("publish", away("the marker"))
    charge = tiered.charge()
    assert charge("A-1") == "charged 5 for A-1"
    with pytest.raises(InProgressError):
        charge("A-1")
    tiered.pass_time(LEASE)
    assert charge("A-1") == "charged 5 for A-1"
    assert tiered.effects == ["A-1"]


def test_a_forgotten_record_is_not_brought_back_by_a_late_publish(tiered: World) -> None:
    """A person forgets the record between the finish and the publish: the next delivery runs (F53)."""
    assert tiered.marker is not None
    tiered.marker.before("publish", lambda: run_sync(tiered.idem.store.forget(SCOPE, "A-1")))
    charge = tiered.charge()
    assert charge("A-1") == "charged 5 for A-1"
    assert tiered.marker_of() is None
    assert charge("A-1") == "charged 5 for A-1"
    assert tiered.effects == ["A-1", "A-1"]


# Shadow, and disabled.


def test_shadow_runs_everything_and_counts_duplicates(world: World) -> None:
    """In shadow every delivery runs, is answered by its own handler, and a duplicate is counted."""
    charge = world.charge(shadow=True)
    assert [charge("A-1"), charge("A-1"), charge("A-1", 6)] == ["charged 5 for A-1"] * 2 + ["charged 6 for A-1"]
    assert world.count(EventName.SHADOW_DUPLICATE) == 2


@pytest.mark.parametrize("verbs", [("*",), ("finish",), ("release",)])
@pytest.mark.parametrize("error", [away(), StoreError("odd"), StoreConfigurationError("no such table")], ids=repr)
@pytest.mark.parametrize("fails", [False, True])
def test_shadow_never_raises_for_the_store(world: World, verbs: tuple[str, ...], error: Exception, fails: bool) -> None:
    """In shadow a broken store is announced; the handler runs and its own ending is all that its caller sees."""
    world.record_tier.down(*verbs, error=error)

    def handler(order: str) -> str:
        world.effects.append(order)
        if fails:
            raise DeclinedError("no")
        return "done"

    task = world.task(handler, shadow=True, record_failures=DeclinedError, on_in_progress="wait")
    for _ in range(2):
        with pytest.raises(DeclinedError) if fails else contextlib.nullcontext():
            assert task("A-1") == "done"
    assert world.effects == ["A-1", "A-1"]
    assert world.local() == 1000.0, "it waited"


def test_shadow_never_parks_and_never_doubts(world: World) -> None:
    """In shadow neither failures, nor crashes, nor `hold` leave anything for a person."""

    def handler(order: str) -> str:
        raise DeclinedError("no")

    task = world.task(handler, shadow=True, on_crash="hold", max_attempts=1, max_crashes=0)
    for _ in range(2):
        with pytest.raises(DeclinedError):
            task("A-1")
        assert world.state() is State.RELEASED
    world.claim_elsewhere()
    world.clock.advance(LEASE + 1)
    with pytest.raises(DeclinedError):
        task("A-1")
    assert world.state() is State.RELEASED


@pytest.mark.parametrize("state", [State.RUNNING, State.IN_DOUBT, State.PARKED, State.FAILED, State.COMPLETED])
def test_shadow_runs_whatever_the_record_says(world: World, state: State) -> None:
    """In shadow no state of a record keeps a handler from running, and the record stays as it was."""
    lease = world.claim_elsewhere(max_attempts=1)
    if state is State.IN_DOUBT:
        run_sync(world.real.release(lease, Release(in_doubt=True)))
    elif state is State.PARKED:
        run_sync(world.real.release(lease, Release(failed=True)))
    elif state in (State.FAILED, State.COMPLETED):
        run_sync(world.real.finish(lease, EncodedOutcome(state)))
    assert world.state() is state
    assert world.charge(shadow=True, fingerprint=None)("A-1") == "charged 5 for A-1"
    assert world.state() is state
    assert world.count(EventName.SHADOW_DUPLICATE) == 1


@pytest.mark.parametrize("finishes", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_shadow_is_never_superseded(world: World, finishes: bool, fails: bool) -> None:
    """In shadow a handler that was overtaken returns its own value, or raises its own exception."""

    def handler(order: str) -> str:
        lease = world.take_over()
        if finishes:
            world.finish_elsewhere(lease)
        if fails:
            raise DeclinedError("no")
        return "mine"

    with pytest.raises(DeclinedError) if fails else contextlib.nullcontext():
        assert world.task(handler, shadow=True)("A-1") == "mine"


def test_shadow_runs_without_a_key(world: World) -> None:
    """In shadow a message without a usable key runs, unprotected and announced."""
    charge = world.charge(shadow=True)
    assert charge("") == "charged 5 for "
    assert world.count(EventName.UNPROTECTED_RUN) == 1
    assert world.record_tier.verbs == []


@pytest.mark.parametrize("how", ["field", "environment"])
def test_disabled_is_the_bare_handler(world: World, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Turned off, nothing of ours can get in the way: no store, no key, yet `current_claim` has an answer."""
    world.record_tier.down()
    seen: list[tuple[str, int]] = []

    def handler(order: str | None) -> str | None:
        seen.append((current_claim().key, current_claim().fencing_token))
        return order

    if how == "environment":
        monkeypatch.setenv("IDEM_TASKS_DISABLED", "1")
    task = world.task(handler, enabled=how == "environment")
    assert [task("A-1"), task("A-1"), task(None)] == ["A-1", "A-1", None]
    assert seen == [("A-1", 0), ("A-1", 0), ("", 0)]
    assert world.record_tier.verbs == []


def test_disabled_does_not_ask_for_a_key_that_cannot_be_made(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turned off, a key callable that fails keeps nobody from running."""

    def key(order: str) -> str:
        raise ZeroDivisionError

    task = world.charge(key=key)
    with pytest.raises(ZeroDivisionError):
        task("A-1")
    monkeypatch.setenv("IDEM_TASKS_DISABLED", "1")
    assert task("A-1") == "charged 5 for A-1"


@pytest.mark.parametrize("value", ["", "0", "false", "False", "no", "off"])
def test_only_yes_turns_it_off(world: World, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """IDEM_TASKS_DISABLED=false does not take the protection away."""
    monkeypatch.setenv("IDEM_TASKS_DISABLED", value)
    charge = world.charge()
    assert [charge("A-1"), charge("A-1")] == ["charged 5 for A-1"] * 2
    assert world.effects == ["A-1"]


# Forks.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("ends", ["returns", "exits"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_end_its_parents_claim(monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    """A child forked in a handler that leaves it by its own way neither finishes nor releases the parent's claim."""
    with world_on(monkeypatch, "blocking", 1) as world:
        parent = os.getpid()

        def handler(order: str) -> str:
            pid = os.fork()
            if pid == 0:
                if ends == "exits":
                    raise SystemExit
                return "child"
            _, status = os.waitpid(pid, 0)
            return f"parent, child left with {os.waitstatus_to_exitcode(status)}"

        try:
            value = world.task(handler)("A-1")
        except BaseException:
            if os.getpid() == parent:
                raise
            os._exit(7 if world.record_tier.verbs == ["claim"] and world.held() == 0 else 1)
        if os.getpid() != parent:
            os._exit(7 if world.record_tier.verbs == ["claim"] and world.held() == 0 else 1)
        assert value == "parent, child left with 7"


# Purge and people.


def test_purge_spares_what_may_still_be_redelivered(world: World) -> None:
    """An expired record is purged after the grace only; running ones never (F17, F47)."""
    charge = world.charge(retention=100, max_hold=LEASE)
    charge("A-1")
    world.claim_elsewhere("B-2", retention=1, max_hold=LEASE)
    world.clock.advance(100 + LEASE + 1)
    assert run_sync(world.idem.store.purge(limit=10, grace=3600)) == []
    assert run_sync(world.idem.store.purge(limit=10, grace=0)) == [(SCOPE, "A-1")]
    assert (world.get("A-1"), world.state("B-2")) == (None, State.RUNNING)


def test_a_stale_marker_never_outlives_a_persons_word(tiered: World) -> None:
    """What a person resolves or forgets is not answered by the marker any more (F53)."""
    charge = tiered.charge()
    charge("A-1")
    assert tiered.marker_of() == "finished"
    assert run_sync(tiered.idem.store.forget(SCOPE, "A-1"))
    assert tiered.marker_of() is None
    charge("A-1")
    assert tiered.effects == ["A-1", "A-1"]
