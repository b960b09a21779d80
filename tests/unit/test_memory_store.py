"""What the contract leaves open: bounded memory, moved clocks, threads, and the markers in memory."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from idem_tasks.claims import (
    ClaimRequest,
    EncodedOutcome,
    Finished,
    Granted,
    InDoubt,
    InProgress,
    Lease,
    Record,
    Recorded,
    Release,
    Released,
    State,
    new_owner,
)
from idem_tasks.errors import InProgressError
from idem_tasks.events import Announcer
from idem_tasks.policy import Policy
from idem_tasks.runtime import run_sync
from idem_tasks.stores.base import Marker, MarkerTaken, RecordTier
from idem_tasks.stores.memory import MemoryStore
from idem_tasks.stores.memory_marker import MemoryMarker
from idem_tasks.testing import ManualClock

DONE = EncodedOutcome(body=b"1", codec="json")
BRIEF = Policy(lease=10, max_hold=10, retention=10)


def request(key: str = "key", policy: Policy = BRIEF) -> ClaimRequest:
    return ClaimRequest("scope", key, None, new_owner(), policy)


def granted(store: MemoryStore, key: str = "key", policy: Policy = BRIEF) -> Lease:
    answer = run_sync(store.claim(request(key, policy)))
    assert isinstance(answer, Granted)
    return answer.lease


def finished(store: MemoryStore, key: str = "key", policy: Policy = BRIEF) -> Lease:
    lease = granted(store, key, policy)
    assert run_sync(store.finish(lease, DONE)) == Recorded()
    return lease


def record(store: MemoryStore, key: str = "key") -> Record:
    found = run_sync(store.get("scope", key))
    assert found is not None
    return found


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1_000_000.0)


@pytest.fixture
def store(clock: ManualClock) -> MemoryStore:
    return MemoryStore(clock)


def test_it_is_what_the_tiers_ask_for() -> None:
    """Both satisfy their protocols, and are one object for both runtimes."""
    tier: RecordTier = MemoryStore()
    marker: Marker = MemoryMarker()
    for each in (tier, marker):
        assert each.runtimes == {"blocking", "asyncio"}
        assert each.on("blocking", Announcer(())) is each.on("asyncio", Announcer(())) is each


def test_without_a_clock_it_tells_the_time() -> None:
    """By default leases run by the system's clock."""
    lease = granted(MemoryStore())
    assert lease.fencing_token > 1_700_000_000_000_000


def test_a_lease_is_over_at_its_end(store: MemoryStore, clock: ManualClock) -> None:
    """In progress up to the last moment; taken over from the very end on."""
    granted(store)
    clock.advance(9.5)
    assert run_sync(store.claim(request())) == InProgress(0.5)
    clock.advance(0.5)
    taken = granted(store)
    assert (taken.taken_over, taken.crashes) == (True, 1)


def test_an_outcome_answers_to_the_end_of_its_retention(store: MemoryStore, clock: ManualClock) -> None:
    """Kept for `max_hold` and `retention` from the claim, and granted afresh from then on (F16)."""
    finished(store)
    clock.advance(19.0)
    answer = run_sync(store.claim(request()))
    assert isinstance(answer, Finished)
    assert answer.expires_in == 1.0
    clock.advance(1.0)
    assert granted(store).generation == 2


def test_counts_start_again_with_a_generation(store: MemoryStore, clock: ManualClock) -> None:
    """A released record whose retention is over forgets its failures and its error too."""
    run_sync(store.release(granted(store), Release(failed=True, error_type="KeyError", error_message="x")))
    clock.advance(20)
    lease = granted(store)
    assert (lease.attempts, lease.failures, lease.generation) == (1, 0, 2)
    assert record(store).error_type is None


def test_a_dead_holder_long_ago_is_still_a_crash(store: MemoryStore, clock: ManualClock) -> None:
    """A running record never expires: under `hold` it is in doubt however late it is found."""
    granted(store)
    clock.advance(1_000_000)
    assert run_sync(store.claim(request(policy=BRIEF.replace(on_crash="hold")))) == InDoubt(new=True)


def test_asking_again_after_the_lease_is_over_revives_it(store: MemoryStore, clock: ManualClock) -> None:
    """The same request, late, gets its own claim back with a new lease, if nobody took it over."""
    wish = request()
    first = run_sync(store.claim(wish))
    clock.advance(11)
    second = run_sync(store.claim(wish))
    assert isinstance(first, Granted)
    assert isinstance(second, Granted)
    assert second.lease.fencing_token == first.lease.fencing_token
    assert run_sync(store.claim(request())) == InProgress(10)


def test_an_overdue_record_says_so(store: MemoryStore, clock: ManualClock) -> None:
    """People see which running record has nobody who renews it."""
    granted(store)
    assert record(store).attention is None
    clock.advance(10)
    assert record(store).attention == "overdue"


@pytest.mark.parametrize("how", ["release", "takeover", "forget", "purge", "generation"])
def test_tokens_rise_though_the_clock_steps_back(store: MemoryStore, clock: ManualClock, how: str) -> None:
    """A clock that was set back never gives an old fencing token again (F9, F10)."""
    lease = finished(store) if how in ("forget", "purge", "generation") else granted(store)
    if how == "release":
        run_sync(store.release(lease, Release()))
    elif how == "forget":
        run_sync(store.forget("scope", "key"))
    else:
        clock.advance(21)
    if how == "purge":
        assert run_sync(store.purge(limit=1, grace=0)) == [("scope", "key")]
    if how == "takeover":
        assert granted(store).fencing_token > lease.fencing_token
        return
    if how != "generation":
        clock.set(5.0)
    assert granted(store).fencing_token > lease.fencing_token


def test_expired_records_are_dropped_as_it_goes(store: MemoryStore, clock: ManualClock) -> None:
    """However many keys come by, no more than twice those alive are kept, beyond a first thousand."""
    most = 0
    for number in range(5_000):
        finished(store, f"key {number}")
        clock.advance(0.1)
        most = max(most, len(store._rows))
    assert most <= 1_001
    assert all(row.expires_at > clock() - 100 for row in store._rows.values())


def test_live_records_are_never_dropped(store: MemoryStore, clock: ManualClock) -> None:
    """Whatever is running, in doubt, parked or within its retention survives every sweep."""
    long = BRIEF.replace(retention=1e9, max_attempts=1)
    granted(store, "running")
    run_sync(store.release(granted(store, "in doubt"), Release(in_doubt=True)))
    run_sync(store.release(granted(store, "parked", long), Release(failed=True)))
    finished(store, "kept", long)
    for number in range(3_000):
        finished(store, f"key {number}")
        clock.advance(1)
    assert [record(store, key).state for key in ("running", "in doubt", "parked", "kept")] == [
        State.RUNNING,
        State.IN_DOUBT,
        State.PARKED,
        State.COMPLETED,
    ]


def test_sweeps_are_rare(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of sweeps grows with the logarithm of the records, not with the calls."""
    sizes: set[int] = set()
    for number in range(10_000):
        finished(store, f"key {number}")
        sizes.add(store._sweep_at)
    assert len(sizes) <= 5


def test_threads_share_one_truth() -> None:
    """Eight threads that claim, finish, release and forget the same keys never run one key twice at a time."""
    store = MemoryStore()
    running: Counter[str] = Counter()
    overlaps: list[str] = []

    def work(seed: int) -> None:
        for step in range(300):
            key = f"key {(seed + step) % 5}"
            answer = run_sync(store.claim(request(key, Policy())))
            if isinstance(answer, Finished):
                with suppress(InProgressError):
                    run_sync(store.forget("scope", key))
            if not isinstance(answer, Granted):
                continue
            running[key] += 1
            if running[key] != 1:
                overlaps.append(key)
            running[key] -= 1
            if step % 3:
                assert run_sync(store.release(answer.lease, Release())) == Released(State.RELEASED)
            else:
                assert run_sync(store.finish(answer.lease, DONE)) == Recorded()

    with ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(work, seed) for seed in range(8)]:
            future.result(timeout=60)
    assert overlaps == []
    assert set(running.values()) == {0}


def test_a_repr_shows_no_outcome(store: MemoryStore) -> None:
    """What people and logs see of a record never holds its outcome."""
    lease = granted(store)
    run_sync(store.finish(lease, EncodedOutcome(body=b"secret", codec="json")))
    assert "secret" not in repr(record(store))
    assert "secret" not in repr(run_sync(store.claim(request())))


def test_it_has_no_second_place(store: MemoryStore) -> None:
    """Memory keeps no pending outcomes: what cannot be reached is gone anyway."""
    assert not run_sync(store.keep_pending(granted(store), DONE))


def test_markers_are_dropped_as_it_goes(clock: ManualClock) -> None:
    """Expired markers do not pile up."""
    marker = MemoryMarker(clock)
    for number in range(5_000):
        assert run_sync(marker.take(request(f"key {number}"))) == MarkerTaken()
        clock.advance(0.1)
    assert len(marker._markers) <= 1_001


def test_the_time_left_in_a_marker_shrinks(clock: ManualClock) -> None:
    """A served outcome tells what is left of its retention now, not when it was published."""
    marker = MemoryMarker(clock)
    wish = request()
    run_sync(marker.take(wish))
    run_sync(marker.publish(wish, Finished(DONE, None, 100.0), ttl=50.0))
    clock.advance(30)
    answer: Any = run_sync(marker.take(request()))
    assert answer.finished.expires_in == 70.0
    clock.advance(20)
    assert run_sync(marker.take(request())) == MarkerTaken()
