"""Keeps claims alive while their handlers run, and keeps trying to record what SQL would not take.

There is one heartbeat for all blocking claims of a process, a thread, and one per event loop, a task. Each beat is
one round trip per tier, however many claims there are.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import weakref
from dataclasses import dataclass

from idem_tasks.claims import Claim, EncodedOutcome, Finished, Lease, Lost, Recorded
from idem_tasks.errors import StoreError
from idem_tasks.events import Announcer, EventName
from idem_tasks.runtime import deadline_clock, run_sync
from idem_tasks.stores.base import Store

_logger = logging.getLogger("idem_tasks")

_IDLE = 10.0
"""Seconds without a claim after which the heartbeat ends; the next claim starts it again."""

_MAX_PENDING = 10_000
"""Outcomes kept in memory for another try; each may be as large as the policy's `max_outcome_bytes`."""

_LONGEST_PAUSE = 30.0
"""Seconds between two tries to record a pending outcome, at most."""


@dataclass(slots=True)
class _Pending:
    """An outcome that its record does not have yet."""

    lease: Lease
    outcome: EncodedOutcome
    until: float
    try_at: float
    pause: float = 1.0


class Heartbeat:
    """Renews every held claim at a third of its lease, until its finish begins, `max_hold` or its deadline."""

    def __init__(self, store: Store, announce: Announcer) -> None:
        self._store = store
        self._announce = announce
        self._held: dict[str, Claim] = {}
        self._pending: dict[str, _Pending] = {}

    def hold(self, claim: Claim) -> None:
        """Renew this claim from now on."""
        self._held[claim.lease.owner] = claim
        self._wake_by(claim.renew_at)

    def let_go(self, claim: Claim) -> None:
        """Renew it no more; it is finished or released next."""
        self._held.pop(claim.lease.owner, None)

    def keep_trying(self, lease: Lease, outcome: EncodedOutcome) -> None:
        """Try to record this outcome under its lease's fence, until it is recorded, superseded or out of date."""
        if len(self._pending) >= _MAX_PENDING:
            oldest = self._pending.pop(next(iter(self._pending)))
            self._announce(EventName.OUTCOME_DROPPED, oldest.lease.scope, oldest.lease.key, reason="too many wait")
        now = deadline_clock()
        self._pending[lease.owner] = _Pending(lease, outcome, now + lease.policy.retention, now + 1.0)
        self._wake_by(now + 1.0)

    @property
    def pending(self) -> int:
        """How many outcomes wait to be recorded."""
        return len(self._pending)

    async def beat(self) -> None:
        """Renew what is due, then try to record what is pending; never raises an `Exception`."""
        try:
            await self._renew_due()
            await self._record_pending()
        except Exception:
            # The heartbeat of all claims must outlive a fault in one beat; the fence still guards each of them.
            _logger.exception("a heartbeat failed")

    async def _renew_due(self) -> None:
        now = deadline_clock()
        due: list[Claim] = []
        for claim in list(self._held.values()):
            if now > claim.deadline:
                self.let_go(claim)
                claim.mark_lost()
                self._announce(EventName.LEASE_LOST, claim.scope, claim.key, fencing_token=claim.fencing_token)
            elif now - claim.held_since > claim.lease.policy.max_hold:
                claim.renew_at = claim.deadline + 0.001
            elif claim.renew_at <= now + claim.lease.policy.lease / 12:
                due.append(claim)
        if not due:
            return
        try:
            renewed = await self._store.renew([claim.lease for claim in due], self._held.__contains__)
        except StoreError as error:
            renewed = frozenset()
            self._announce(EventName.RENEWAL_FAILED, claims=len(due), error=type(error.__cause__ or error).__name__)
        for claim in due:
            if claim.lease.owner in renewed:
                claim.extend(now)
            else:
                claim.renew_at = min(deadline_clock() + claim.lease.policy.lease / 12, claim.deadline + 0.001)

    async def _record_pending(self) -> None:
        for owner, pending in list(self._pending.items()):
            lease, now = pending.lease, deadline_clock()
            if pending.try_at > now:
                continue
            try:
                answer = await self._store.finish(lease, pending.outcome, may_insert=False)
            except StoreError:
                pending.pause = min(pending.pause * 2, _LONGEST_PAUSE)
                pending.try_at = now + pending.pause
                if now > pending.until:
                    del self._pending[owner]
                    self._announce(EventName.OUTCOME_DROPPED, lease.scope, lease.key, reason="retention is over")
                continue
            del self._pending[owner]
            match answer:
                case Recorded():
                    self._announce(EventName.OUTCOME_WRITTEN_THROUGH, lease.scope, lease.key)
                case Finished() | Lost():
                    self._announce(EventName.OUTCOME_DROPPED, lease.scope, lease.key, reason="superseded")

    def _due_at(self) -> float | None:
        times = [claim.renew_at for claim in list(self._held.values())]
        times += [pending.try_at for pending in list(self._pending.values())]
        return min(times, default=None)

    def _wake_by(self, time: float) -> None:
        """See to it that a beat happens by then."""
        raise NotImplementedError  # pragma: no cover - each runtime has its own

    def forget_all(self) -> None:
        """Drop everything without a word to the store: a forked child holds none of its parent's claims."""
        self._held.clear()
        self._pending.clear()


class ThreadHeartbeat(Heartbeat):
    """The heartbeat of all blocking claims of this process: one daemon thread, started when it is needed."""

    def __init__(self, store: Store, announce: Announcer) -> None:
        super().__init__(store, announce)
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._wakes_at = 0.0
        _thread_heartbeats.add(self)

    def _wake_by(self, time: float) -> None:
        if self._thread is not None and self._wakes_at <= time:
            return
        with self._condition:
            if self._thread is None:
                self._wakes_at = time
                self._thread = threading.Thread(target=self._work, name="idem_tasks-heartbeat", daemon=True)
                self._thread.start()
            else:
                self._condition.notify()

    def _work(self) -> None:
        while True:
            with self._condition:
                # `hold` adds its claim first and looks at `_wakes_at` and `_thread` afterwards, without the lock.
                # Here it is the other way round, so that one of the two always sees the other.
                self._wakes_at = math.inf
                due, now = self._due_at(), deadline_clock()
                self._wakes_at = now + _IDLE if due is None else due
                if due is None or due > now:
                    woken = self._condition.wait(self._wakes_at - now)
                    if due is None and not woken and self._may_end():
                        return
                    continue
            run_sync(self.beat())

    def _may_end(self) -> bool:
        self._thread = None
        if self._due_at() is None:
            return True
        self._thread = threading.current_thread()
        return False

    def forget_all(self) -> None:
        """Start afresh in a forked child, which has none of its parent's threads, with a lock nobody holds."""
        super().forget_all()
        self._condition = threading.Condition()
        self._thread = None


_thread_heartbeats: weakref.WeakSet[ThreadHeartbeat] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for heartbeat in list(_thread_heartbeats):
        heartbeat.forget_all()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class LoopHeartbeat(Heartbeat):
    """The heartbeat of one event loop's claims: one task, started when it is needed."""

    def __init__(self, store: Store, announce: Announcer) -> None:
        super().__init__(store, announce)
        self._task: asyncio.Task[None] | None = None
        self._woken = asyncio.Event()
        self._wakes_at = 0.0

    def _wake_by(self, time: float) -> None:
        if self._task is None or self._task.done():
            self._wakes_at = time
            self._task = asyncio.get_running_loop().create_task(self._work(), name="idem_tasks-heartbeat")
        elif time < self._wakes_at:
            self._woken.set()

    async def _work(self) -> None:
        while True:
            now = deadline_clock()
            due = self._due_at()
            if due is not None and due <= now:
                await self.beat()
                continue
            self._wakes_at = now + _IDLE if due is None else due
            self._woken.clear()
            try:
                await asyncio.wait_for(self._woken.wait(), self._wakes_at - now)
            except TimeoutError:
                if self._due_at() is None:
                    return
