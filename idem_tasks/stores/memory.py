"""Records in this process's memory: the protocol in plain Python, for tests and one-process programs."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice

from idem_tasks.claims import (
    Action,
    AuditEntry,
    ClaimAnswer,
    ClaimRequest,
    EncodedOutcome,
    Finished,
    Granted,
    InDoubt,
    InProgress,
    Lease,
    Lost,
    NotKept,
    Parked,
    Record,
    Recorded,
    Release,
    Released,
    State,
    StepBegun,
    StepFinished,
    StepRecord,
    StepsDiffer,
    action_of,
    new_owner,
)
from idem_tasks.errors import ConflictError, InProgressError
from idem_tasks.events import Announcer
from idem_tasks.stores.base import MarkerPending, RuntimeName, refuse_if_moved
from idem_tasks.stores.memory_outbox import MemoryOutbox

_ENDED = (State.COMPLETED, State.FAILED)
_PURGEABLE = (*_ENDED, State.RELEASED)
_FENCED = (State.RUNNING, State.IN_DOUBT)
"""The states in which a record still obeys the claim whose fencing token and owner it carries."""

_SWEEP_FLOOR = 1000
"""Records below which nothing is swept: a few hundred kilobytes are not worth a walk over all of them."""

_AUDIT_LIMIT = 1000
"""Entries of the audit that are kept: this store is for tests and for programs that end."""

_MESSAGE_LIMIT = 2000
"""Characters of an error message that are kept: enough for people, and no place for a whole document."""


@dataclass(slots=True)
class _Step:
    """One step that a handler began; its outcome once it is finished. Times are seconds since the epoch."""

    name: str
    started_at: float
    finished_at: float | None = None
    outcome: EncodedOutcome | None = None

    def as_record(self, position: int) -> StepRecord:
        outcome = self.outcome or EncodedOutcome()
        return StepRecord(
            position=position,
            name=self.name,
            started_at=_datetime(self.started_at),
            finished_at=None if self.finished_at is None else _datetime(self.finished_at),
            outcome_bytes=None if outcome.body is None else len(outcome.body),
            codec=outcome.codec,
            not_kept=outcome.not_kept,
        )


@dataclass(slots=True)
class _Row:
    """One record; times are seconds since the epoch. Changed only under the store's lock."""

    scope: str
    key: str
    created_at: float
    updated_at: float
    state: State = State.RUNNING
    fencing_token: int = 0
    owner: str = ""
    fingerprint: str | None = None
    attempts: int = 0
    failures: int = 0
    crashes: int = 0
    generation: int = 1
    lease_expires_at: float = 0.0
    expires_at: float = 0.0
    completed_at: float | None = None
    outcome: bytes | None = None
    codec: str | None = None
    not_kept: NotKept | None = None
    error_type: str | None = None
    error_message: str | None = None
    holder: str = ""
    attention: str | None = None
    traceparent: str | None = None
    steps: dict[int, _Step] = field(default_factory=dict)

    def obeys(self, owner: str, fencing_token: int) -> bool:
        """Tell whether this claim was the last to be granted: the fence."""
        return self.owner == owner and self.fencing_token == fencing_token

    def is_held(self, now: float) -> bool:
        return self.state is State.RUNNING and now < self.lease_expires_at

    def retention_is_over(self, now: float) -> bool:
        return self.state in _PURGEABLE and self.expires_at <= now

    def lease_to(self, request: ClaimRequest) -> Lease:
        return Lease(
            request,
            self.fencing_token,
            attempts=self.attempts,
            failures=self.failures,
            crashes=self.crashes,
            generation=self.generation,
        )

    def record_outcome(self, outcome: EncodedOutcome, now: float, retention: float) -> None:
        self.outcome = outcome.body
        self.codec = outcome.codec
        self.not_kept = outcome.not_kept
        self.error_type = outcome.error_type
        self.error_message = _shortened(outcome.error_message)
        self.updated_at = self.completed_at = now
        # A run may outlast the retention that its claim was given: its outcome is kept for all of it (F61).
        self.expires_at = max(self.expires_at, now + retention)
        self.attention = "failed" if outcome.state is State.FAILED else None
        self.state = outcome.state

    def as_finished(self, now: float) -> Finished:
        outcome = EncodedOutcome(
            State.FAILED if self.state is State.FAILED else State.COMPLETED,
            self.outcome,
            self.codec,
            self.not_kept,
            self.error_type,
            self.error_message,
        )
        left = max(self.expires_at - now, 0.0)
        return Finished(outcome, self.fingerprint, left, self.fencing_token, self.traceparent)

    def attention_at(self, now: float) -> str | None:
        overdue = self.state is State.RUNNING and not self.is_held(now)
        return "overdue" if overdue else self.attention

    def as_record(self, now: float) -> Record:
        return Record(
            scope=self.scope,
            key=self.key,
            state=self.state,
            fencing_token=self.fencing_token,
            owner=self.owner,
            fingerprint=self.fingerprint,
            attempts=self.attempts,
            failures=self.failures,
            crashes=self.crashes,
            generation=self.generation,
            lease_expires_at=_datetime(self.lease_expires_at),
            outcome=self.outcome,
            codec=self.codec,
            not_kept=self.not_kept,
            error_type=self.error_type,
            error_message=self.error_message,
            holder=self.holder,
            created_at=_datetime(self.created_at),
            updated_at=_datetime(self.updated_at),
            completed_at=None if self.completed_at is None else _datetime(self.completed_at),
            expires_at=_datetime(self.expires_at),
            attention=self.attention_at(now),
            traceparent=self.traceparent,
        )


class MemoryStore:
    """Keeps records in this process's memory: gone when it ends, and unknown to every other process.

    Serves both runtimes, any number of threads and event loops at once; nothing ever waits. One lock makes each
    verb one step; it is never held across an await. Memory is bounded: records whose retention is over are dropped
    when the number of records has doubled since the last such sweep, and not below 1,000; those in doubt or parked
    stay until a person ends them.

    `clock` returns seconds since the epoch and may be given to move time in tests; it is the only clock that
    decides about leases and retention.
    """

    runtimes: frozenset[RuntimeName] = frozenset({"blocking", "asyncio"})

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = time.time if clock is None else clock
        self._lock = threading.Lock()
        self._rows: dict[tuple[str, str], _Row] = {}
        self._audit: deque[AuditEntry] = deque(maxlen=_AUDIT_LIMIT)
        self._last_token = 0
        self._sweep_at = _SWEEP_FLOOR
        self.outbox = MemoryOutbox(self._clock, self._lock)
        """The messages of recorded outcomes that wait to be sent."""

    def on(self, runtime: RuntimeName, announce: Announcer) -> MemoryStore:
        """Return this very store: memory is the same for both runtimes."""
        return self

    async def claim(self, request: ClaimRequest) -> ClaimAnswer:
        """Claim the record, or tell why not. Raises nothing."""
        with self._lock:
            now, place = self._clock(), (request.scope, request.key)
            row = self._rows.get(place)
            if row is None:
                self._sweep(now)
                row = self._rows[place] = _Row(request.scope, request.key, now, now)
                return self._grant(row, request, now)
            if row.retention_is_over(now):
                self._begin_generation(row, now)
                return self._grant(row, request, now)
            match row.state:
                case State.COMPLETED | State.FAILED:
                    return row.as_finished(now)
                case State.RELEASED:
                    return self._grant(row, request, now)
                case State.IN_DOUBT:
                    return InDoubt()
                case State.PARKED:
                    return Parked(row.crashes, row.failures)
                case State.RUNNING if row.owner == request.owner:
                    # Granted before, and the answer did not arrive (F21).
                    row.lease_expires_at = now + request.policy.lease
                    # Whether it took over is not known any more: rather say so once too often.
                    return Granted(replace(row.lease_to(request), taken_over=row.crashes > 0))
                case State.RUNNING if row.is_held(now):
                    return InProgress(row.lease_expires_at - now)
                case State.RUNNING:  # pragma: no branch - there is no other state
                    return self._take_over(row, request, now)

    async def claim_batch(self, requests: Sequence[ClaimRequest]) -> list[ClaimAnswer | None]:
        """Claim all these records; None for those that are released, dead or over, as in a database."""
        return [await self.claim(request) if self._is_usual(request) else None for request in requests]

    def _is_usual(self, request: ClaimRequest) -> bool:
        with self._lock:
            row, now = self._rows.get((request.scope, request.key)), self._clock()
            if row is None or row.owner == request.owner:
                return True
            is_dead = row.state is State.RUNNING and not row.is_held(now)
            return not (is_dead or row.state is State.RELEASED or row.retention_is_over(now))

    def _take_over(self, row: _Row, request: ClaimRequest, now: float) -> ClaimAnswer:
        """The holder's lease ran out: it crashed, as far as anybody can know.

        In doubt and parked keep the dead claim's token and owner, so that its late finish still tells the truth.
        """
        row.crashes += 1
        row.updated_at = now
        limit = request.policy.max_crashes
        if limit is not None and row.crashes > limit:
            row.state = State.PARKED
            row.attention = "parked"
            return Parked(row.crashes, row.failures, new=True)
        if request.policy.doubts:
            row.state = State.IN_DOUBT
            row.attention = "in_doubt"
            return InDoubt(new=True, dead=row.lease_to(replace(request, owner=row.owner)))
        return self._grant(row, request, now, taken_over=True)

    async def decide(
        self, dead: Lease, request: ClaimRequest, outcome: EncodedOutcome | None
    ) -> Granted | Finished | Lost:
        """End the doubt about this dead claim: by this outcome, or (None) by granting the record to `request`."""
        with self._lock:
            now = self._clock()
            row = self._rows.get((dead.scope, dead.key))
            if row is None:
                return Lost()
            if row.owner == request.owner:
                # Decided before, and the answer did not arrive (F21).
                if row.state is State.RUNNING:
                    row.lease_expires_at = now + request.policy.lease
                    return Granted(replace(row.lease_to(request), taken_over=True))
                return row.as_finished(now) if row.state in _ENDED else Lost()
            if row.state is not State.IN_DOUBT or not row.obeys(dead.owner, dead.fencing_token):
                return Lost()
            before, answer = (row.state, row.fencing_token), None
            if outcome is None:
                answer = self._grant(row, request, now, taken_over=True)
            else:
                row.owner = request.owner
                row.fencing_token = self._next_token(now)
                row.record_outcome(outcome, now, request.policy.retention)
            self._write_audit("answer", request.holder, None, row, before, now)
            return answer or row.as_finished(now)

    def _grant(self, row: _Row, request: ClaimRequest, now: float, taken_over: bool = False) -> Granted:
        policy = request.policy
        row.fencing_token = self._next_token(now)
        row.owner = request.owner
        row.fingerprint = request.fingerprint
        row.attempts += 1
        row.lease_expires_at = now + policy.lease
        row.expires_at = now + policy.max_hold + policy.retention
        row.holder = request.holder
        row.traceparent = request.traceparent
        row.updated_at = now
        row.attention = None
        row.state = State.RUNNING
        return Granted(
            Lease(
                request,
                row.fencing_token,
                attempts=row.attempts,
                failures=row.failures,
                crashes=row.crashes,
                generation=row.generation,
                taken_over=taken_over,
            )
        )

    def _begin_generation(self, row: _Row, now: float) -> None:
        row.generation += 1
        row.attempts = row.failures = row.crashes = 0
        row.outcome = row.codec = row.not_kept = row.error_type = row.error_message = None
        row.created_at = now
        row.completed_at = None
        row.steps.clear()

    def _next_token(self, now: float) -> int:
        """Rise over every token ever given, also when the record was deleted or the clock stepped back (F10)."""
        self._last_token = max(self._last_token + 1, int(now * 1_000_000))
        return self._last_token

    async def renew(
        self,
        leases: Sequence[Lease],
        still_held: Callable[[str], bool],
    ) -> frozenset[str]:
        """Extend these leases by their policy's `lease` from now; return the owners of those extended.

        `still_held` is not asked: a finish is one step here, so a claim is before or after it, never in it.
        """
        renewed = set()
        with self._lock:
            now = self._clock()
            for lease in leases:
                row = self._rows.get((lease.scope, lease.key))
                if row and row.state is State.RUNNING and row.obeys(lease.owner, lease.fencing_token):
                    row.lease_expires_at = now + lease.policy.lease
                    row.updated_at = now
                    renewed.add(lease.owner)
        return frozenset(renewed)

    async def finish(
        self, lease: Lease, outcome: EncodedOutcome, *, may_insert: bool = False
    ) -> Recorded | Finished | Lost:
        """Record the outcome under this lease's fence; with `may_insert` also where the record has vanished."""
        with self._lock:
            now, request = self._clock(), lease.request
            row = self._rows.get((request.scope, request.key))
            if row is None and may_insert:
                row = self._rows[request.scope, request.key] = _vanished(lease, now)
            if row is None:
                return Lost()
            if row.obeys(lease.owner, lease.fencing_token):
                if row.state in _FENCED:
                    row.record_outcome(outcome, now, lease.policy.retention)
                    if outcome.messages:
                        self.outbox.add(outcome.messages)
                if row.state is outcome.state:
                    return Recorded()
            return row.as_finished(now) if row.state in _ENDED else Lost()

    async def finish_batch(self, finished: Sequence[tuple[Lease, EncodedOutcome]]) -> list[Recorded | None]:
        """Record these outcomes, each under its lease's fence; None for one whose fence missed."""
        answers = [await self.finish(lease, outcome) for lease, outcome in finished]
        return [answer if isinstance(answer, Recorded) else None for answer in answers]

    async def keep_pending(self, lease: Lease, outcome: EncodedOutcome) -> bool:
        """Return False: memory that cannot be reached has no second place."""
        return False

    async def release(self, lease: Lease, release: Release) -> Released | Finished | Lost:
        """Give the claim up without an outcome, under the same fence as `finish`."""
        with self._lock:
            now = self._clock()
            row = self._rows.get((lease.scope, lease.key))
            if row is None:
                return Lost()
            if row.state in _ENDED:
                return row.as_finished(now)
            if not row.obeys(lease.owner, lease.fencing_token):
                return Lost()
            if row.state in _FENCED:
                self._give_up(row, lease, release, now)
            return Released(row.state)

    def _give_up(self, row: _Row, lease: Lease, release: Release, now: float) -> None:
        # Counted from those the claim was granted with, so that a release sent twice counts once.
        row.failures = lease.failures + 1 if release.failed else lease.failures
        row.error_type = release.error_type
        row.error_message = _shortened(release.error_message)
        row.lease_expires_at = row.updated_at = now
        if release.in_doubt:
            row.state = State.IN_DOUBT
            row.attention = "in_doubt"
        elif release.parked or (release.failed and _reached(lease.policy.max_attempts, row.failures)):
            row.state = State.PARKED
            row.attention = "parked"
        else:
            row.state = State.RELEASED
            row.attention = None

    async def begin_step(self, lease: Lease, position: int, name: str) -> StepBegun | StepFinished | StepsDiffer | Lost:
        """Note that the step begins, or return the outcome it has."""
        with self._lock:
            row = self._rows.get((lease.scope, lease.key))
            if row is None or row.state is not State.RUNNING or not row.obeys(lease.owner, lease.fencing_token):
                return Lost()
            now = self._clock()
            step = row.steps.setdefault(position, _Step(name, now))
            if step.name != name:
                return StepsDiffer(tuple(row.steps[at].name for at in sorted(row.steps)))
            if step.outcome is not None:
                return StepFinished(step.outcome)
            step.started_at = now
            return StepBegun()

    async def finish_step(
        self, lease: Lease, position: int, name: str, outcome: EncodedOutcome
    ) -> Recorded | StepFinished | Lost:
        """Keep the step's outcome unless it has one."""
        with self._lock:
            row = self._rows.get((lease.scope, lease.key))
            if row is None or row.state not in _FENCED or not row.obeys(lease.owner, lease.fencing_token):
                return Lost()
            now = self._clock()
            step = row.steps.setdefault(position, _Step(name, now))
            if step.outcome is None:
                step.outcome, step.finished_at = outcome, now
            return Recorded() if step.outcome == outcome else StepFinished(step.outcome)

    async def steps(self, scope: str, key: str) -> list[StepRecord]:
        """Return the steps of the record's generation in their order."""
        with self._lock:
            row = self._rows.get((scope, key))
            return [] if row is None else [row.steps[at].as_record(at) for at in sorted(row.steps)]

    async def write_through(self, scope: str, key: str, pending: MarkerPending, retention: float) -> bool:
        """Record a pending outcome under the fence of the claim that made it; never inserts."""
        with self._lock:
            row = self._rows.get((scope, key))
            if row is None or not row.obeys(pending.owner, pending.fencing_token):
                return False
            if row.state in _FENCED:
                row.record_outcome(pending.outcome, self._clock(), retention)
                self.outbox.add(pending.outcome.messages)
            return row.state in _ENDED

    async def get(self, scope: str, key: str) -> Record | None:
        """Return the record, or None."""
        with self._lock:
            row = self._rows.get((scope, key))
            return None if row is None else row.as_record(self._clock())

    async def forget(
        self, scope: str, key: str, *, expect_token: int | None = None, actor: str = "", reason: str | None = None
    ) -> AuditEntry | None:
        """Delete the record; returns what was done, or None where there is none. Raises as `Store.forget` says."""
        with self._lock:
            now = self._clock()
            row = self._rows.get((scope, key))
            if row is None:
                return None
            self._refuse_if_held(row, now)
            refuse_if_moved(scope, key, row.state, row.fencing_token, expect_token)
            del self._rows[scope, key]
            before = row.state, row.fencing_token
            return self._write_audit("forget", actor, reason, row, before, now, gone=True)

    async def resolve(
        self,
        scope: str,
        key: str,
        outcome: EncodedOutcome | None,
        *,
        expect_token: int | None = None,
        actor: str = "",
        reason: str | None = None,
    ) -> AuditEntry | None:
        """End `in_doubt`, `parked` or an overdue `running`: by this outcome, or (None) by releasing it.

        The outcome is kept for at least the retention of the last claim. Raises as `Store.resolve` says.
        """
        with self._lock:
            now = self._clock()
            row = self._rows.get((scope, key))
            if row is None:
                return None
            before = row.state, row.fencing_token
            self._refuse_if_held(row, now)
            refuse_if_moved(scope, key, row.state, row.fencing_token, expect_token)
            if row.state in _PURGEABLE:
                raise ConflictError(f"{scope} {key!r} is {row.state.value} already", scope=scope, key=key)
            row.owner = new_owner()
            row.fencing_token = self._next_token(now)
            row.lease_expires_at = row.updated_at = now
            if outcome is None:
                row.state = State.RELEASED
                row.attention = None
                row.failures = row.crashes = 0
            else:
                row.record_outcome(outcome, now, retention=row.expires_at - row.created_at)
            return self._write_audit(action_of(outcome), actor, reason, row, before, now)

    async def audit(self, *, scope: str | None, key: str | None, limit: int) -> list[AuditEntry]:
        """Return what was done to the records of this scope and key, if given, the last first; 1,000 are kept."""
        with self._lock:
            wanted = (
                entry for entry in reversed(self._audit) if scope in (None, entry.scope) and key in (None, entry.key)
            )
            return list(islice(wanted, limit))

    def _write_audit(
        self,
        action: Action,
        actor: str,
        reason: str | None,
        row: _Row,
        before: tuple[State, int],
        now: float,
        *,
        gone: bool = False,
    ) -> AuditEntry:
        entry = AuditEntry(
            at=_datetime(now),
            actor=actor,
            action=action,
            scope=row.scope,
            key=row.key,
            state_before=before[0],
            state_after=None if gone else row.state,
            token_before=before[1],
            token_after=None if gone else row.fencing_token,
            reason=reason,
        )
        self._audit.append(entry)
        return entry

    def _refuse_if_held(self, row: _Row, now: float) -> None:
        if row.is_held(now):
            raise InProgressError(scope=row.scope, key=row.key, retry_after=row.lease_expires_at - now)

    async def records(
        self,
        *,
        state: State | None,
        scope: str | None,
        after: tuple[str, str] | None,
        limit: int,
        attention: bool = False,
    ) -> list[Record]:
        """Return up to `limit` records in the order of scope and key, beginning after the given one."""
        with self._lock:
            now = self._clock()
            chosen = sorted(
                place
                for place, row in self._rows.items()
                if (state is None or row.state is state)
                and (scope is None or row.scope == scope)
                and (after is None or place > after)
                and (not attention or row.attention_at(now) is not None)
            )
            return [self._rows[place].as_record(now) for place in chosen[:limit]]

    async def stats(self) -> dict[State, int]:
        """Return how many records there are in each state."""
        with self._lock:
            counts = dict.fromkeys(State, 0)
            for row in self._rows.values():
                counts[row.state] += 1
            return counts

    async def purge(self, *, limit: int, grace: float) -> list[tuple[str, str]]:
        """Delete up to `limit` records whose retention ended over `grace` seconds ago; return their scope and key."""
        with self._lock:
            before = self._clock() - grace
            over = (place for place, row in self._rows.items() if row.retention_is_over(before))
            purged = list(islice(over, limit))
            for place in purged:
                del self._rows[place]
            return purged

    def _sweep(self, now: float) -> None:
        """Drop what is over, whenever there are twice as many records as after the last sweep."""
        if len(self._rows) < self._sweep_at:
            return
        self._rows = {place: row for place, row in self._rows.items() if not row.retention_is_over(now)}
        self._sweep_at = max(_SWEEP_FLOOR, 2 * len(self._rows))

    async def prepare(self) -> None:
        """Do nothing: there is nothing to make."""

    async def close(self) -> None:
        """Do nothing: there are no connections, and the records stay."""


def _vanished(lease: Lease, now: float) -> _Row:
    """The row of a claim that was lost with the database's last moments, as it stood."""
    return _Row(
        lease.scope,
        lease.key,
        created_at=now,
        updated_at=now,
        fencing_token=lease.fencing_token,
        owner=lease.owner,
        fingerprint=lease.request.fingerprint,
        attempts=lease.attempts,
        failures=lease.failures,
        crashes=lease.crashes,
        generation=lease.generation,
        holder=lease.request.holder,
        traceparent=lease.request.traceparent,
    )


def _reached(limit: int | None, count: int) -> bool:
    return limit is not None and count >= limit


def _shortened(message: str | None) -> str | None:
    return message if message is None else message[:_MESSAGE_LIMIT]


def _datetime(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
