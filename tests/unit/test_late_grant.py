"""A claim that is granted so late that its lease may be over is given back, and its message comes again."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from idem_tasks import Event, EventName, Idempotency, MemoryStore, Policy, State, StoreUnavailableError
from idem_tasks.claims import ClaimAnswer, ClaimRequest, Finished, Lease, Lost, Release, Released
from idem_tasks.policy import OnCrash

LEASE = 0.3


class LateStore(MemoryStore):
    """Answers the first claims only when their lease is over."""

    def __init__(self, late: int) -> None:
        super().__init__()
        self.asked = 0
        self.late = late
        self.meanwhile: Callable[[], object] = lambda: None
        self.refuses = False

    async def claim(self, request: ClaimRequest) -> ClaimAnswer:
        answer = await super().claim(request)
        self.asked += 1
        if self.asked <= self.late:
            time.sleep(LEASE * 1.2)  # noqa: ASYNC251 - a blocking store
            self.meanwhile()
        return answer

    async def release(self, lease: Lease, release: Release) -> Released | Finished | Lost:
        if self.refuses:
            raise StoreUnavailableError("away")
        return await super().release(lease, release)


@pytest.mark.parametrize("on_crash", ["rerun", "hold"])
def test_no_handler_begins_under_a_lease_that_may_be_over(on_crash: OnCrash) -> None:
    """F1: the message is put back and its claim released: the next delivery runs at once, also under `hold`."""
    idem = Idempotency(store=LateStore(1), observers=[], policy=Policy(lease=LEASE, on_crash=on_crash))
    runs: list[str] = []
    with pytest.raises(StoreUnavailableError, match="longer than the lease"):
        idem.run(runs.append, "late", scope="s", key="k", fingerprint=None)
    record = idem.get("s", "k")
    assert record is not None
    assert record.state is State.RELEASED
    idem.run(runs.append, "in time", scope="s", key="k", fingerprint=None)
    assert runs == ["in time"]


def test_a_late_grant_that_was_taken_over_is_left_to_its_taker() -> None:
    """F1: nothing of the taker's is released, and its outcome is recorded."""
    store = LateStore(1)
    idem = Idempotency(store=store, observers=[], policy=Policy(lease=LEASE))
    store.meanwhile = lambda: idem.claim(scope="s", key="k").__enter__()
    with pytest.raises(StoreUnavailableError):
        idem.run(lambda: "never", scope="s", key="k", fingerprint=None)
    record = idem.get("s", "k")
    assert record is not None
    assert (record.state, record.crashes) == (State.RUNNING, 1)


def test_a_late_grant_that_cannot_be_given_back_is_announced() -> None:
    """The store is away by then: its lease runs out by itself, and observers hear of it."""
    events: list[Event] = []
    store = LateStore(1)
    store.refuses = True
    idem = Idempotency(store=store, observers=[events.append], policy=Policy(lease=LEASE))
    with pytest.raises(StoreUnavailableError, match="longer than the lease"):
        idem.run(lambda: "never", scope="s", key="k")
    assert EventName.RELEASE_FAILED in [event.name for event in events]
