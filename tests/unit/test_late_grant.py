"""A claim that is granted so late that its lease may be over is made sure of before the handler begins."""

from __future__ import annotations

import threading
import time

import pytest

from idem_tasks import Idempotency, InProgressError, MemoryStore, Policy, State, StoreUnavailableError
from idem_tasks.claims import ClaimAnswer, ClaimRequest

LEASE = 0.3


class LateStore(MemoryStore):
    """Answers the first claims only when their lease is over."""

    def __init__(self, late: int) -> None:
        super().__init__()
        self.asked = 0
        self.late = late

    async def claim(self, request: ClaimRequest) -> ClaimAnswer:
        answer = await super().claim(request)
        self.asked += 1
        if self.asked <= self.late:
            time.sleep(LEASE * 1.2)  # noqa: ASYNC251 - a blocking store
        return answer


def test_a_handler_begins_under_a_lease_that_is_renewed() -> None:
    """F1: the store's answer took longer than the lease; nobody else runs while the handler does."""
    idem = Idempotency(store=LateStore(1), observers=[], policy=Policy(lease=LEASE))
    runs = []

    def second() -> str:
        runs.append("second")
        return "second"

    def first() -> str:
        runs.append("first")
        until = time.monotonic() + 3 * LEASE
        while time.monotonic() < until:
            with pytest.raises(InProgressError):
                idem.run(second, scope="s", key="k")
            threading.Event().wait(0.05)
        return "first"

    assert idem.run(first, scope="s", key="k") == "first"
    assert runs == ["first"]


def test_a_store_that_is_always_late_leaves_no_claim() -> None:
    """Nothing has run, so the message is put back, and the next delivery may run at once, also under `hold`."""
    store = LateStore(3)
    idem = Idempotency(store=store, observers=[], policy=Policy(lease=LEASE, on_crash="hold"))
    with pytest.raises(StoreUnavailableError, match="longer than the lease"):
        idem.run(lambda: "never", scope="s", key="k")
    record = idem.get("s", "k")
    assert record is not None
    assert record.state is State.RELEASED
    assert idem.run(lambda: "done", scope="s", key="k") == "done"
