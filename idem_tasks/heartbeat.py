"""Keeps claims alive while their handlers run, and keeps trying to record what SQL would not take.

There is one heartbeat for all blocking claims of a process, a thread, and one per event loop, a task. Each beat is
one round trip per tier, however many claims there are.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import os
import threading
import weakref
from dataclasses import dataclass

from idem_tasks.claims import Claim, EncodedOutcome, Finished, Lease, Lost, Recorded
from idem_tasks.errors import IdemTasksError, StoreUnavailableError
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

_TRYING = 0.2
"""Seconds for which a beat tries pending outcomes before claims are looked after again: a batch that outlived an outage
leaves thousands, and a claim is due every third of its lease."""


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
        _heartbeats.add(self)

    def hold(self, claim: Claim) -> None:
        """Renew this claim from now on."""
        self._held[claim.lease.request.owner] = claim
        self._wake_by(claim.renew_at)

    def let_go(self, owner: str) -> None:
        """Renew this claim no more; it is finished or released next."""
        self._held.pop(owner, None)

    def keep_trying(self, lease: Lease, outcome: EncodedOutcome) -> None:
        """Try to record this outcome under its lease's fence, until it is recorded, superseded or out of date."""
        for owner in list(self._pending)[: len(self._pending) + 1 - _MAX_PENDING]:
            self._drop(owner, "too many wait")
        now = deadline_clock()
        self._pending[lease.owner] = _Pending(lease, outcome, now + lease.policy.retention, now + 1.0)
        self._wake_by(now + 1.0)

    @property
    def pending(self) -> int:
        """How many outcomes wait to be recorded."""
        return len(self._pending)

    async def beat(self, trying: float = _TRYING) -> None:
        """Renew what is due, then try for so many seconds to record what is pending; never raises an `Exception`."""
        try:
            await self._renew_due()
            await self._record_pending(deadline_clock() + trying)
        except Exception:
            # The heartbeat of all claims must outlive a fault in one beat; the fence still guards each of them.
            _logger.exception("a heartbeat failed")

    async def try_now(self) -> None:
        """Beat, and let no pending outcome wait for its time: the connections are about to be closed."""
        for pending in list(self._pending.values()):
            pending.try_at = 0.0
        await self.beat(trying=math.inf)

    async def _renew_due(self) -> None:
        now = deadline_clock()
        due: list[Claim] = []
        for claim in list(self._held.values()):
            if now > claim.deadline:
                self.let_go(claim.lease.owner)
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
        except IdemTasksError as error:
            renewed = frozenset()
            self._announce(EventName.RENEWAL_FAILED, claims=len(due), error=type(error.__cause__ or error).__name__)
        for claim in due:
            if claim.lease.owner in renewed:
                claim.extend(now)
            else:
                claim.renew_at = min(deadline_clock() + claim.lease.policy.lease / 12, claim.deadline + 0.001)

    async def _record_pending(self, until: float) -> None:
        for owner, pending in list(self._pending.items()):
            lease, now = pending.lease, deadline_clock()
            if pending.try_at > now:
                continue
            if now > until:
                break  # the rest is due still, and tried after the next renewals
            try:
                answer = await self._store.finish(lease, pending.outcome, may_insert=False)
            except IdemTasksError as error:
                pending.pause = min(pending.pause * 2, _LONGEST_PAUSE)
                pending.try_at = now + pending.pause
                if now > pending.until:
                    self._drop(owner, "retention is over")
                if isinstance(error, StoreUnavailableError):
                    break  # the others would wait for the same timeout, and renewals with them
                continue
            match answer:
                case Recorded():
                    if self._pending.pop(owner, None) is not None:
                        self._announce(EventName.OUTCOME_WRITTEN_THROUGH, lease.scope, lease.key)
                case Finished() | Lost():
                    self._drop(owner, "superseded")

    def _drop(self, owner: str, reason: str) -> None:
        # `close` beats on its caller's thread: each outcome is taken out, and told of, by one of the two.
        pending = self._pending.pop(owner, None)
        if pending is not None:
            self._announce(EventName.OUTCOME_DROPPED, pending.lease.scope, pending.lease.key, reason=reason)

    def _due_at(self) -> float | None:
        times = [claim.renew_at for claim in list(self._held.values())]
        times += [pending.try_at for pending in list(self._pending.values())]
        return min(times, default=None)

    def _wake_by(self, time: float) -> None:
        """See to it that a beat happens by then."""
        raise NotImplementedError  # pragma: no cover - a thread's and a task's heartbeat below each have their own

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

    def _wake_by(self, time: float) -> None:
        if self._thread is not None and self._wakes_at <= time:
            return
        with self._condition:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="idem_tasks-heartbeat", daemon=True)
                thread.start()
                self._wakes_at = time
                self._thread = thread  # known only once it runs: a start that fails or is interrupted is made again
            else:
                self._condition.notify()

    def _work(self) -> None:
        try:
            while self._wait():
                run_sync(self.beat())
        finally:
            if self._thread is threading.current_thread():
                self._thread = None

    def _wait(self) -> bool:
        """Wait until a beat is due; False when there was nothing to do for so long that the thread may end."""
        while True:
            with self._condition:
                # `hold` adds its claim first and looks at `_wakes_at` and `_thread` afterwards, without the lock.
                # Here it is the other way round, so that one of the two always sees the other.
                self._wakes_at = math.inf
                due, now = self._due_at(), deadline_clock()
                self._wakes_at = now + _IDLE if due is None else due
                if due is not None and due <= now:
                    return True
                woken = self._condition.wait(self._wakes_at - now)
                if due is None and not woken and self._may_end():
                    return False

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


class LoopHeartbeat(Heartbeat):
    """The heartbeat of one event loop's claims: a timer, and for each beat a task.

    Between beats there is no task that a loop could be closed under.
    """

    def __init__(self, store: Store, announce: Announcer) -> None:
        super().__init__(store, announce)
        self._wakes_at = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def _wake_by(self, time: float) -> None:
        if self._wakes_at <= time:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._wakes_at = time
        loop, pause = asyncio.get_running_loop(), max(time - deadline_clock(), 0.0)
        # In a context of its own: that of the claim at hand would be kept, and taken for the beat's.
        self._timer = loop.call_later(pause, self._start, context=contextvars.Context())

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._work(), name="idem_tasks-heartbeat")

    async def _work(self) -> None:
        try:
            await self.beat()
        finally:
            # Also when somebody cancels all tasks of a loop that lives on.
            self._wakes_at, due = math.inf, self._due_at()
            if due is not None:
                self._wake_by(due)

    def forget_all(self) -> None:
        """Start afresh in a forked child, where the loop of these claims does not run."""
        super().forget_all()
        self._wakes_at = math.inf


_heartbeats: weakref.WeakSet[Heartbeat] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for heartbeat in list(_heartbeats):
        heartbeat.forget_all()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
