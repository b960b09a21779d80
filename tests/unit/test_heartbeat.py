"""The heartbeat renews what is held, gives up what is lost, and leaves no thread, task or outcome behind."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from idem_tasks import Idempotency, MemoryStore, current_claim, heartbeat as heartbeats
from idem_tasks.claims import Claim, ClaimRequest, EncodedOutcome, Granted, Lease, State, new_owner
from idem_tasks.errors import ConfigurationError, StoreError
from idem_tasks.events import Announcer, Event, EventName
from idem_tasks.heartbeat import Heartbeat, LoopHeartbeat, ThreadHeartbeat
from idem_tasks.policy import Policy
from idem_tasks.runtime import deadline_clock, run_sync
from idem_tasks.testing import ManualClock
from tests.unit.scripted import Scripted, away

DONE = EncodedOutcome(body=b'"done"', codec="json")
PATIENCE = 30.0


class Beating:
    """A heartbeat on a store of its own, with clocks that stand still, and claims made on that store."""

    def __init__(self, heartbeat: Callable[[Any, Announcer], Heartbeat], clock: Callable[[], float]) -> None:
        self.now = clock if isinstance(clock, ManualClock) else deadline_clock
        self.real = MemoryStore(clock)
        self.store = Scripted(self.real)
        self.events: list[Event] = []
        self.heartbeat = heartbeat(self.store, Announcer([self.events.append]))

    def claim(self, key: str = "A-1", **policy: Any) -> Claim:
        request = ClaimRequest("s", key, None, new_owner(), Policy(**{"lease": 60.0, **policy}))
        answer = run_sync(self.real.claim(request))
        assert isinstance(answer, Granted)

        return Claim(answer.lease, cast(Any, None), asked_at=self.now())

    def claim_due_soon(self, key: str) -> Claim:
        """Return a claim to be renewed in 30 ms, which a busy machine may stand still for long before it is lost."""
        claim = self.claim(key)
        claim.renew_at = self.now() + 0.03
        return claim

    def names(self) -> list[EventName]:
        return [event.name for event in self.events]

    def lease_left(self, key: str = "A-1") -> float:
        record = run_sync(self.real.get("s", key))
        assert record is not None
        return record.lease_expires_at.timestamp() - self.real._clock()

    def beat(self) -> None:
        run_sync(self.heartbeat.beat())

    def renewals(self) -> int:
        return self.store.verbs.count("renew")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """One clock for the store and for the process; only the test moves it."""
    clock = ManualClock()
    for module in ("heartbeat", "claims"):
        monkeypatch.setattr(f"idem_tasks.{module}.deadline_clock", clock)
    return clock


@pytest.fixture
def beating(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> Beating:
    """A heartbeat that beats when the test says so."""
    monkeypatch.setattr(ThreadHeartbeat, "_wake_by", lambda *_: None)
    return Beating(ThreadHeartbeat, clock)


# One beat.


def test_a_claim_is_renewed_at_a_third_of_its_lease(beating: Beating, clock: ManualClock) -> None:
    """Not before, and then for a whole lease; the local deadline moves with it (F1)."""
    claim = beating.claim()
    beating.heartbeat.hold(claim)
    clock.advance(14)
    beating.beat()
    assert beating.renewals() == 0
    clock.advance(6)
    beating.beat()
    assert beating.renewals() == 1
    assert beating.lease_left() == 60
    assert claim.deadline == clock() + 60


def test_many_claims_are_renewed_by_one_command(beating: Beating, clock: ManualClock) -> None:
    """However many claims are held, and though their times differ a little, a beat is one renewal."""
    for number in range(50):
        beating.heartbeat.hold(beating.claim(f"A-{number}"))
        clock.advance(0.05)
    clock.advance(19)
    beating.beat()
    assert beating.renewals() == 1
    assert {round(beating.lease_left(f"A-{number}")) for number in range(50)} == {60}


def test_a_claim_that_was_let_go_is_not_renewed(beating: Beating, clock: ManualClock) -> None:
    """A claim in its finish is left alone."""
    claim = beating.claim()
    beating.heartbeat.hold(claim)
    beating.heartbeat.let_go(claim.lease.owner)
    clock.advance(30)
    beating.beat()
    assert beating.renewals() == 0


def test_the_store_is_told_what_is_still_held(beating: Beating, clock: ManualClock) -> None:
    """A claim whose finish begins during the renewal is known to the store as no longer held."""
    answers: list[bool] = []
    claim = beating.claim()

    class Store(Scripted):
        async def renew(self, leases: list[Lease], still_held: Callable[[str], bool]) -> frozenset[str]:
            answers.append(still_held(leases[0].owner))
            beating.heartbeat.let_go(leases[0].owner)
            answers.append(still_held(leases[0].owner))
            return frozenset()

    beating.heartbeat._store = cast(Any, Store(beating.real))
    beating.heartbeat.hold(claim)
    clock.advance(20)
    beating.beat()
    assert answers == [True, False]


@pytest.mark.parametrize("error", [away(), StoreError("odd"), ConfigurationError("no table")], ids=repr)
def test_a_renewal_that_fails_is_tried_again_until_the_deadline(
    beating: Beating, clock: ManualClock, error: Exception
) -> None:
    """A healthy handler survives a store that is away for less than its lease (F3)."""
    claim = beating.claim()
    beating.heartbeat.hold(claim)
    beating.store.down("renew", error=error)
    for _ in range(7):
        clock.advance(5)
        beating.beat()
    assert beating.renewals() == 5
    assert not claim.lost
    beating.store.up()
    clock.advance(5)
    beating.beat()
    assert beating.lease_left() == 60
    assert not claim.lost
    assert EventName.RENEWAL_FAILED in beating.names()
    assert EventName.LEASE_LOST not in beating.names()


def test_past_its_deadline_a_claim_is_lost(beating: Beating, clock: ManualClock) -> None:
    """A claim that nobody could renew says so to its handler once, and is asked for no more (F3)."""
    claim = beating.claim()
    beating.heartbeat.hold(claim)
    beating.store.down("renew")
    for _ in range(20):
        clock.advance(5)
        beating.beat()
    assert claim.lost
    assert beating.names().count(EventName.LEASE_LOST) == 1
    assert beating.heartbeat._due_at() is None
    beating.store.up()
    clock.advance(5)
    beating.beat()
    assert claim.lost


def test_a_claim_that_was_taken_over_is_lost_at_its_deadline(beating: Beating, clock: ManualClock) -> None:
    """A renewal that the store refuses is no error: it may be locked. The deadline tells (F2, F5)."""
    claim = beating.claim()
    beating.heartbeat.hold(claim)
    beating.real._rows["s", "A-1"].owner = "another"
    for _ in range(13):
        clock.advance(5)
        beating.beat()
    assert claim.lost
    assert beating.names() == [EventName.LEASE_LOST]


def test_a_hung_handler_keeps_its_key_for_max_hold_and_a_lease(beating: Beating, clock: ManualClock) -> None:
    """After `max_hold` renewals stop; the lease runs out, the claim is lost, and another may have it (F2)."""
    claim = beating.claim(max_hold=300)
    beating.heartbeat.hold(claim)
    begun = clock()
    while not claim.lost:
        clock.advance(5)
        beating.beat()
        assert clock() - begun < 400
    assert clock() - begun > 300
    beating.beat()
    assert beating.heartbeat._due_at() is None
    assert isinstance(run_sync(beating.real.claim(beating.claim("B-2").lease.request)), Granted)
    assert beating.claim("A-1").crashes == 1


def test_the_deadline_counts_from_before_the_renewal_was_sent(beating: Beating, clock: ManualClock) -> None:
    """A renewal that took ten seconds gives fifty more: the store may have acted at once."""
    claim = beating.claim()
    beating.heartbeat.hold(claim)
    clock.advance(20)
    beating.store.after("renew", lambda: clock.advance(10))
    beating.beat()
    assert claim.deadline - clock() == 50


def test_a_fault_in_a_beat_does_not_end_the_heartbeat(
    beating: Beating, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that no store may raise is logged, and the next beat renews."""
    claim = beating.claim()
    beating.heartbeat.hold(claim)
    clock.advance(20)
    beating.store.before("renew", ZeroDivisionError())
    beating.beat()
    assert "a heartbeat failed" in caplog.text
    beating.beat()
    assert beating.lease_left() == 60


# Outcomes that wait.


def pending(beating: Beating, count: int = 1) -> list[Claim]:
    held = [beating.claim(f"A-{number}") for number in range(1, count + 1)]
    for claim in held:
        beating.heartbeat.keep_trying(claim.lease, DONE)
    return held


def test_a_pending_outcome_is_tried_until_it_is_recorded(beating: Beating, clock: ManualClock) -> None:
    """Ever more seldom, up to twice a minute; never before its time (F45, F57)."""
    pending(beating)
    beating.store.down("finish")
    for _ in range(600):
        clock.advance(1)
        beating.beat()
    tries = beating.store.verbs.count("finish")
    assert 15 < tries < 30
    beating.store.up()
    clock.advance(30)
    beating.beat()
    assert beating.heartbeat.pending == 0
    assert beating.names() == [EventName.OUTCOME_WRITTEN_THROUGH]
    record = run_sync(beating.real.get("s", "A-1"))
    assert record is not None
    assert record.state is State.COMPLETED


def test_a_pending_outcome_that_is_superseded_is_dropped(beating: Beating, clock: ManualClock) -> None:
    """The record belongs to another claim by now: said once, and not tried again."""
    pending(beating)
    beating.real._rows["s", "A-1"].owner = "another"
    clock.advance(2)
    beating.beat()
    beating.beat()
    assert beating.names() == [EventName.OUTCOME_DROPPED]
    assert beating.heartbeat.pending == 0


def test_a_pending_outcome_of_a_record_that_is_gone_brings_nothing_back(beating: Beating, clock: ManualClock) -> None:
    """What was forgotten or purged meanwhile stays so (F53)."""
    pending(beating)
    beating.real._rows.clear()
    clock.advance(2)
    beating.beat()
    assert run_sync(beating.real.get("s", "A-1")) is None
    assert beating.names() == [EventName.OUTCOME_DROPPED]


def test_a_pending_outcome_is_dropped_after_its_retention(beating: Beating, clock: ManualClock) -> None:
    """Nobody would replay it any more."""
    claim = beating.claim(retention=100)
    beating.heartbeat.keep_trying(claim.lease, DONE)
    beating.store.down("finish")
    for _ in range(20):
        clock.advance(10)
        beating.beat()
    assert beating.names() == [EventName.OUTCOME_DROPPED]


def test_many_pending_outcomes_do_not_hold_up_renewals(beating: Beating, clock: ManualClock) -> None:
    """While SQL is away a beat waits for one refused outcome, not for all: each may take a whole timeout (F49)."""
    claim = beating.claim("B-2")
    pending(beating, 100)
    beating.heartbeat.hold(claim)
    beating.store.down("finish")
    clock.advance(20)
    beating.beat()
    assert beating.store.verbs == ["renew", "finish"]
    beating.store.up()
    clock.advance(20)
    beating.beat()
    assert beating.heartbeat.pending == 0


def test_a_batch_of_pending_outcomes_does_not_hold_up_renewals(beating: Beating, clock: ManualClock) -> None:
    """After an outage there may be thousands: claims are renewed between them, and all are recorded."""
    pending(beating, 30)
    running = beating.claim("B-2", lease=3.0)
    beating.heartbeat.hold(running)
    beating.store.after("finish", *[lambda: clock.advance(0.1)] * 30)
    clock.advance(1.0)
    while beating.heartbeat.pending:
        beating.beat()
    assert EventName.LEASE_LOST not in beating.names()
    assert beating.lease_left("B-2") > 1.5
    assert beating.names().count(EventName.OUTCOME_WRITTEN_THROUGH) == 30


def test_pending_outcomes_are_bounded(beating: Beating, monkeypatch: pytest.MonkeyPatch) -> None:
    """When too many wait, the oldest is dropped and named."""
    monkeypatch.setattr("idem_tasks.heartbeat._MAX_PENDING", 2)
    pending(beating, 3)
    assert beating.heartbeat.pending == 2
    assert [(event.name, event.key) for event in beating.events] == [(EventName.OUTCOME_DROPPED, "A-1")]


def test_close_tries_once_more(beating: Beating) -> None:
    """What waits for its time is tried at once when connections are about to be closed, and told of once."""
    pending(beating, 3)
    run_sync(beating.heartbeat.try_now())
    assert beating.names() == [EventName.OUTCOME_WRITTEN_THROUGH] * 3


def test_close_tries_all_once_more(beating: Beating, clock: ManualClock) -> None:
    """However long that takes."""
    pending(beating, 10)
    beating.store.after("finish", *[lambda: clock.advance(0.1)] * 10)
    run_sync(beating.heartbeat.try_now())
    assert beating.heartbeat.pending == 0


def test_two_that_beat_at_once_tell_of_an_outcome_once(beating: Beating, caplog: pytest.LogCaptureFixture) -> None:
    """`close` beats on its caller's thread while the heartbeat's own is at it."""
    pending(beating)
    beating.store.after("finish", lambda: run_sync(beating.heartbeat.try_now()))
    run_sync(beating.heartbeat.try_now())
    assert beating.names() == [EventName.OUTCOME_WRITTEN_THROUGH]
    assert "a heartbeat failed" not in caplog.text


# The thread.


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens on another thread."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


def heartbeat_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "idem_tasks-heartbeat"]


def let_go_of_all(heartbeat: Heartbeat) -> None:
    """Leave its thread nothing to wait for."""
    assert isinstance(heartbeat, ThreadHeartbeat)
    with heartbeat._condition:
        heartbeat._held.clear()
        heartbeat._pending.clear()
        heartbeat._condition.notify_all()


@pytest.fixture
def threaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Beating]:
    """A heartbeat on real time, whose thread ends after 10 ms without a claim."""
    until(lambda: not heartbeat_threads())
    monkeypatch.setattr("idem_tasks.heartbeat._IDLE", 0.01)
    beating = Beating(ThreadHeartbeat, time.time)
    yield beating
    let_go_of_all(beating.heartbeat)
    until(lambda: not heartbeat_threads())


@pytest.fixture(autouse=True, scope="module")
def no_other_heartbeats() -> Iterator[None]:
    """Let the heartbeats of earlier tests in this process end first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("idem_tasks.heartbeat._IDLE", 0.01)
        for heartbeat in list(heartbeats._heartbeats):
            if isinstance(heartbeat, ThreadHeartbeat) and heartbeat._thread is not None:
                let_go_of_all(heartbeat)
        yield


def test_the_thread_starts_with_the_first_claim_and_ends_when_idle(threaded: Beating) -> None:
    """A process that has no claims has no heartbeat; its thread does not keep the process alive."""
    assert heartbeat_threads() == []
    claim = threaded.claim(lease=1.5)
    threaded.heartbeat.hold(claim)
    [thread] = heartbeat_threads()
    assert thread.daemon
    until(lambda: threaded.renewals() >= 2)
    assert not claim.lost
    threaded.heartbeat.let_go(claim.lease.owner)
    until(lambda: not thread.is_alive())
    assert cast(ThreadHeartbeat, threaded.heartbeat)._thread is None


def test_a_claim_with_an_earlier_time_wakes_the_thread(threaded: Beating) -> None:
    """A short lease is not renewed late because a long one is waited for."""
    threaded.heartbeat.hold(threaded.claim("A-1", lease=3600.0))
    short = threaded.claim_due_soon("B-2")
    threaded.heartbeat.hold(short)
    first = short.deadline
    until(lambda: short.deadline > first)
    assert len(heartbeat_threads()) == 1


@pytest.mark.parametrize("_run", range(50))
def test_a_claim_is_never_missed_by_a_thread_that_ends(threaded: Beating, _run: int) -> None:
    """Claims that come just as the idle thread ends are renewed all the same, by one thread."""
    for pause in (0.0, 0.004, 0.009, 0.0095, 0.01, 0.0105, 0.011):
        claim = threaded.claim(f"A-{pause}", lease=0.1)
        threaded.heartbeat.hold(claim)
        threaded.heartbeat.let_go(claim.lease.owner)
        time.sleep(pause)  # the very thing that is raced against
    claim = threaded.claim_due_soon("last")
    first = claim.deadline
    threaded.heartbeat.hold(claim)
    until(lambda: claim.deadline > first)
    assert len(heartbeat_threads()) == 1


def test_many_threads_hold_at_once(threaded: Beating) -> None:
    """Claims taken up on many threads at the same moment are all renewed, by one thread."""
    held = [threaded.claim_due_soon(f"A-{number}") for number in range(40)]
    barrier = threading.Barrier(len(held))

    def hold(claim: Claim) -> None:
        barrier.wait(PATIENCE)
        threaded.heartbeat.hold(claim)

    threads = [threading.Thread(target=hold, args=(claim,)) for claim in held]
    first = {claim.key: claim.deadline for claim in held}
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    until(lambda: all(claim.deadline > first[claim.key] for claim in held))
    assert len(heartbeat_threads()) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_was_killed_is_replaced(threaded: Beating) -> None:
    """An exit that strikes the heartbeat's own thread costs one beat: the next claim starts another."""
    threaded.store.before("renew", SystemExit())
    claim = threaded.claim_due_soon("A-1")
    threaded.heartbeat.hold(claim)
    until(lambda: not heartbeat_threads())
    first = claim.deadline
    threaded.heartbeat.hold(threaded.claim_due_soon("B-2"))
    until(lambda: claim.deadline > first)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_starts_afresh(threaded: Beating) -> None:
    """A child holds none of its parent's claims, even if the lock was taken at the fork, and starts its own thread."""
    heartbeat = cast(ThreadHeartbeat, threaded.heartbeat)
    heartbeat.hold(threaded.claim_due_soon("A-1"))
    with heartbeat._condition:
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            assert heartbeat._held == {}
            assert heartbeat._thread is None
            parents = threaded.real._rows["s", "A-1"].lease_expires_at
            own = threaded.claim_due_soon("B-2")
            heartbeat.hold(own)
            first = own.deadline
            until(lambda: own.deadline > first)
            assert threaded.real._rows["s", "A-1"].lease_expires_at == parents
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    claim = threaded.claim_due_soon("C-3")
    first = claim.deadline
    heartbeat.hold(claim)
    until(lambda: claim.deadline > first)


# The event loop.


async def on_the_loop(condition: Callable[[], bool]) -> None:
    """Wait, on the event loop, for something that its timers do."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - the timers set no event
            await asyncio.sleep(0.01)


def test_a_loops_claims_are_renewed_on_it() -> None:
    """Claims of handlers that await are renewed by the loop they run on; between beats there is no task."""

    async def main() -> None:
        beating = Beating(LoopHeartbeat, time.time)
        loop_thread = threading.get_ident()
        threads: list[int] = []
        beating.store._always["before", "renew"] = lambda: threads.append(threading.get_ident())
        held = [beating.claim(f"A-{number}", lease=1.5) for number in range(5)]
        for claim in held:
            beating.heartbeat.hold(claim)
        await on_the_loop(lambda: len(threads) >= 2)
        assert set(threads) == {loop_thread}
        assert not any(claim.lost for claim in held)
        for claim in held:
            beating.heartbeat.let_go(claim.lease.owner)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_an_earlier_claim_moves_the_timer() -> None:
    """A short lease is not renewed late because a long one is waited for."""

    async def main() -> None:
        beating = Beating(LoopHeartbeat, time.time)
        beating.heartbeat.hold(beating.claim("A-1", lease=3600.0))
        short = beating.claim_due_soon("B-2")
        first = short.deadline
        beating.heartbeat.hold(short)
        await on_the_loop(lambda: short.deadline > first)

    asyncio.run(main())


def test_the_beat_goes_on_when_all_tasks_are_cancelled() -> None:
    """A program that cancels every task of a loop that lives on does not stop its renewals."""

    async def main() -> None:
        beating = Beating(LoopHeartbeat, time.time)
        claim = beating.claim_due_soon("A-1")
        began = asyncio.Event()

        async def slow() -> None:
            began.set()
            await asyncio.sleep(PATIENCE)

        beating.store.before("renew", slow)
        first = claim.deadline
        beating.heartbeat.hold(claim)
        await began.wait()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await on_the_loop(lambda: claim.deadline > first)

    asyncio.run(main())


def test_a_claims_context_is_not_kept_by_the_heartbeat() -> None:
    """The beat does not run as part of the request that happened to start it."""
    idem = Idempotency(store=MemoryStore(), observers=[])
    seen: list[bool] = []

    async def handler() -> None:
        heartbeat: Any = idem.services("asyncio").heartbeat

        async def beat() -> None:
            try:
                current_claim()
            except ConfigurationError:
                seen.append(True)
            else:
                seen.append(False)

        heartbeat.beat = beat
        heartbeat._wakes_at = float("inf")
        heartbeat._wake_by(deadline_clock())
        await on_the_loop(lambda: bool(seen))

    asyncio.run(idem.arun(handler, scope="s", key="A-1"))
    assert seen == [True]


@pytest.mark.parametrize("closes", ["run", "close"])
def test_a_loop_ends_without_a_word(closes: str, caplog: pytest.LogCaptureFixture) -> None:
    """Neither `asyncio.run` nor a bare `loop.close()` finds a pending task of ours, and the next loop works (F54)."""
    idem = Idempotency(store=MemoryStore(), observers=[])

    async def handler(key: str) -> str:
        return key

    async def call(number: int) -> str:
        return await idem.arun(handler, f"A-{number}", scope="s", key=f"A-{number}")

    for number in range(3):
        if closes == "run":
            assert asyncio.run(call(number)) == f"A-{number}"
        else:
            loop = asyncio.new_event_loop()
            assert loop.run_until_complete(call(number)) == f"A-{number}"
            loop.close()
    gc.collect()
    assert caplog.records == []
    assert len(idem._loops) == 1, "a closed loop is kept"
