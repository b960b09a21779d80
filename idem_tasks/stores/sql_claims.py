"""What a claim, a finish and a release do to a record, as plain functions of a connection.

What is found is decided here, in words, and then done by one compare-and-set on the fencing token, owner and state
that were found: so of any number of simultaneous claims one is granted, on every kind of database alike.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any, Literal, TypeVar

from sqlalchemy import Connection, Executable
from sqlalchemy.sql.dml import Update

from idem_tasks.claims import (
    ClaimAnswer,
    ClaimRequest,
    EncodedOutcome,
    Finished,
    Granted,
    InDoubt,
    InProgress,
    Lease,
    Lost,
    Parked,
    Recorded,
    Release,
    Released,
    State,
)
from idem_tasks.stores.base import MarkerPending
from idem_tasks.stores.schema import ERROR_MESSAGE_CHARACTERS, NAME_CHARACTERS, TRACEPARENT_CHARACTERS
from idem_tasks.stores.sql_audit import change, entry_for, storable
from idem_tasks.stores.sql_execution import fetch, write
from idem_tasks.stores.sql_relay import insert_messages, message_arrays
from idem_tasks.stores.sql_renewals import renew, transaction
from idem_tasks.stores.sql_statements import ENDED, FENCED, PURGEABLE, AnyRow, Statements

A = TypeVar("A")

ClaimCommit = Literal["durable", "auto", "async"]
"""Whether the commit of a first claim waits until PostgreSQL has it on its disk: always, unless a marker is held for
it, never. It always waits where a crash leaves doubt."""

_LONGEST_MILLISECONDS = 2**31 - 1
"""What PostgreSQL takes as a time limit."""

RACES = 3
"""How often a verb begins again because the record changed between its look and its write."""

RETRY_AFTER_LOCK = 1.0
"""Seconds after which a claim is worth another try that found the record locked: its lease could not be read."""


def claim(
    sql: Statements, connection: Connection, request: ClaimRequest, commit: ClaimCommit = "durable"
) -> ClaimAnswer:
    """Claim the record, or tell why not."""
    statement = _first_claim(sql, request, commit)
    for _ in range(RACES):
        row = _claim_or_read(sql, connection, statement, request)
        answer = None if row is None else _answer(sql, connection, request, row)
        if answer is not None:
            return answer
    return InProgress(RETRY_AFTER_LOCK)


def _claim_or_read(
    sql: Statements, connection: Connection, statement: Executable, request: ClaimRequest
) -> AnyRow | None:
    """Insert a running record unless there is one; return what is there now, None if it comes or goes just now."""
    row = fetch(connection, statement, place(request.scope, request.key) | granting(request))
    return row or _read(sql, connection, request.scope, request.key)


def _first_claim(sql: Statements, request: ClaimRequest, commit: ClaimCommit) -> Executable:
    """Return the statement that claims a record that nobody has claimed yet.

    Where a crash leaves doubt, the claim is the only sign that its effect may have happened, and has to be durable.
    """
    can_be_lost = commit == "async" or (commit == "auto" and request.marked)
    if sql.claim_async is None or request.policy.doubts or not can_be_lost:
        return sql.claim
    return sql.claim_async


def _answer(sql: Statements, connection: Connection, request: ClaimRequest, row: AnyRow) -> ClaimAnswer | None:
    """Tell what the record that was found means for this claim; None if it changed meanwhile."""
    answer = known_answer(request, row)
    if answer is not None:
        return answer
    if _is_over(row):
        lease = _next_lease(request, row, attempts=1, failures=0, crashes=0, generation=row.generation + 1)
        return Granted(lease) if _take(connection, sql.take_afresh, lease, row) else None
    if row.state == State.RELEASED:
        lease = _next_lease(request, row, attempts=row.attempts + 1)
        return Granted(lease) if _take(connection, sql.take, lease, row) else None
    if row.owner == request.owner:
        return _own(sql, connection, request, row)
    return _take_over(sql, connection, request, row)


def known_answer(request: ClaimRequest, row: AnyRow) -> ClaimAnswer | None:
    """Tell what the record that was found means for this claim; None where that is to be written first."""
    if _is_over(row):
        return None
    match State(row.state):
        case State.RUNNING if row.owner == request.owner:
            return None if _is_old(request, row) else Granted(_own_lease(request, row))
        case State.RUNNING:
            return InProgress(row.lease_left) if row.lease_left > 0 else None
        case State.COMPLETED | State.FAILED:
            return _finished(row)
        case State.IN_DOUBT:
            return InDoubt()
        case State.PARKED:
            return Parked(row.crashes, row.failures)
        case State.RELEASED:  # pragma: no branch - there is no other state
            return None


def _is_over(row: AnyRow) -> bool:
    return row.state in PURGEABLE and row.retention_left <= 0


def _own(sql: Statements, connection: Connection, request: ClaimRequest, row: AnyRow) -> Granted | None:
    """Ours: just now, or by an earlier try whose reply was lost (F21) and whose lease may be running out."""
    lease = _own_lease(request, row)
    return None if _is_old(request, row) and not renew(sql, connection, [lease]) else Granted(lease)


def _is_old(request: ClaimRequest, row: AnyRow) -> bool:
    return bool(row.lease_left < request.policy.lease * 2 / 3)


def _own_lease(request: ClaimRequest, row: AnyRow) -> Lease:
    # Whether it took over is not known any more where that reply was lost: rather say so once too often.
    return _lease(request, row, row.fencing_token, taken_over=row.crashes > 0)


def _take_over(sql: Statements, connection: Connection, request: ClaimRequest, row: AnyRow) -> ClaimAnswer | None:
    """The holder's lease ran out: it crashed, as far as anybody can know."""
    policy = request.policy
    crashes = row.crashes + 1
    answer: ClaimAnswer
    if policy.max_crashes is not None and crashes > policy.max_crashes:
        state, answer = State.PARKED, Parked(crashes, row.failures, new=True)
    elif policy.doubts:
        dead = _lease(replace(request, owner=row.owner), row, row.fencing_token, crashes=crashes)
        state, answer = State.IN_DOUBT, InDoubt(new=True, dead=dead)
    else:
        lease = _next_lease(request, row, attempts=row.attempts + 1, crashes=crashes, taken_over=True)
        return Granted(lease) if _take(connection, sql.take, lease, row) else None
    new = {"new_state": state, "new_crashes": crashes}
    return answer if write(connection, sql.set_aside, place(request.scope, request.key) | seen(row) | new) else None


def _take(connection: Connection, statement: Update, lease: Lease, row: AnyRow) -> bool:
    return write(connection, statement, _taking(lease, row))


def _taking(lease: Lease, row: AnyRow) -> dict[str, Any]:
    new = {
        "new_fencing_token": lease.fencing_token,
        "new_attempts": lease.attempts,
        "new_failures": lease.failures,
        "new_crashes": lease.crashes,
        "new_generation": lease.generation,
    }
    return place(lease.scope, lease.key) | seen(row) | granting(lease.request) | new


def _next_lease(request: ClaimRequest, row: AnyRow, **changed: Any) -> Lease:
    """The token rises over the record's last and, even where a row was lost, over all earlier ones (F10)."""
    return _lease(request, row, max(row.fencing_token + 1, row.clock), **changed)


def _lease(request: ClaimRequest, row: AnyRow, fencing_token: int, **changed: Any) -> Lease:
    counts = {name: getattr(row, name) for name in ("attempts", "failures", "crashes", "generation")}
    return Lease(request, fencing_token, **(counts | changed))


def decide(
    sql: Statements, connection: Connection, dead: Lease, request: ClaimRequest, outcome: EncodedOutcome | None
) -> Granted | Finished | Lost:
    """End the doubt about this dead claim: by this outcome, or (None) by granting the record to `request`."""
    row = _read(sql, connection, dead.scope, dead.key)
    if row is None:
        return Lost()
    if row.owner == request.owner:
        # Decided before, and the answer did not arrive (F21).
        if row.state in ENDED:
            return _finished(row)
        return (_own(sql, connection, request, row) if row.state == State.RUNNING else None) or Lost()
    if row.state != State.IN_DOUBT or not _obeys(row, dead):
        return Lost()
    lease = _next_lease(request, row, attempts=row.attempts + 1, taken_over=True)
    state = State.RUNNING if outcome is None else outcome.state
    where = dead.scope, dead.key
    entry = entry_for(row, action="answer", place=where, actor=request.holder, state=state, token=lease.fencing_token)
    if outcome is None:
        taken = change(sql, connection, sql.take_doubted, _taking(lease, row), entry)
        return Granted(lease) if taken else Lost()
    values = place(*where) | seen(row) | ended(outcome) | {"retention": request.policy.retention}
    values |= {"new_fencing_token": lease.fencing_token, "new_owner": request.owner}
    if not change(sql, connection, sql.resolve_ended, values, entry):
        return Lost()
    return Finished(
        outcome,
        row.fingerprint,
        max(row.retention_left, request.policy.retention),
        lease.fencing_token,
        row.traceparent,
    )


# Finish and release


def finish(
    sql: Statements, connection: Connection, lease: Lease, outcome: EncodedOutcome, may_insert: bool
) -> Recorded | Finished | Lost:
    """Record the outcome under the lease's fence."""
    with _together(sql, connection, outcome):
        if write_finish(sql, connection, lease, outcome):
            return Recorded()
    row = _read(sql, connection, lease.scope, lease.key)
    if row is None and may_insert:
        row = _insert_finished(sql, connection, lease, outcome)
    if row is None or row.state not in ENDED:
        return Lost()
    return Recorded() if has_ended_as(row, lease, outcome) else _finished(row)


def has_ended_as(row: AnyRow | None, lease: Lease, outcome: EncodedOutcome) -> bool:
    """Tell whether the record obeys the lease, and has this outcome.

    The other state of our own claim is another outcome: that of a `finish_in`, say, whose handler failed after it.
    """
    return row is not None and _obeys(row, lease) and row.state == outcome.state


def write_finish(sql: Statements, connection: Connection, lease: Lease, outcome: EncodedOutcome) -> bool:
    """Write the outcome to its record, and its messages; False if that does not obey this lease any more.

    Whatever commits, commits all of it: the store's own connection at once, or in a transaction where there are
    messages; a session of the user's with its other writes.
    """
    return _write(sql, connection, finishing(lease, outcome), outcome)


def _write(sql: Statements, connection: Connection, values: dict[str, Any], outcome: EncodedOutcome) -> bool:
    if not outcome.messages:
        return write(connection, sql.finish, values)
    if sql.kind == "postgresql":
        return connection.execute(sql.outbox.finish, values | message_arrays(outcome.messages)).rowcount > 0
    if not write(connection, sql.finish, values):
        return False
    insert_messages(sql, connection, outcome.messages)
    return True


def finishing(lease: Lease, outcome: EncodedOutcome) -> dict[str, Any]:
    """Return the parameters of a fenced finish."""
    retention = {"retention": lease.policy.retention}
    return place(lease.scope, lease.key) | fence(lease) | ended(outcome) | retention


def _insert_finished(sql: Statements, connection: Connection, lease: Lease, outcome: EncodedOutcome) -> AnyRow | None:
    """Insert the finished record unless there is one, and return the one that is there."""
    values = finishing(lease, outcome) | _vanished(lease)
    if outcome.messages and sql.kind == "postgresql":
        connection.execute(sql.outbox.insert_finished, values | message_arrays(outcome.messages))
        return _read(sql, connection, lease.scope, lease.key)
    with _together(sql, connection, outcome):
        connection.execute(sql.insert_finished, values)
        row = _read(sql, connection, lease.scope, lease.key)
        if outcome.messages and row is not None and _obeys(row, lease):
            insert_messages(sql, connection, outcome.messages)
    return row


def _together(
    sql: Statements, connection: Connection, outcome: EncodedOutcome
) -> contextlib.AbstractContextManager[None]:
    """Make one transaction of what records an outcome with messages, where it is not one statement."""
    if outcome.messages and sql.kind != "postgresql":
        return transaction(connection)
    return contextlib.nullcontext()


def is_seen(sql: Statements, connection: Connection, lease: Lease) -> bool:
    """Tell, as the first statement of a transaction of the user's, whether it sees the record under this lease."""
    values = place(lease.scope, lease.key) | fence(lease)
    if sql.kind == "sqlite":
        return connection.execute(sql.begin, values).rowcount == 1
    if sql.kind == "postgresql":
        values |= longest_idle(lease.policy.max_hold)
    return connection.execute(sql.begin, values).first() is not None


def longest_idle(max_hold: float) -> dict[str, Any]:
    """Return the parameter that says for how long a transaction of the user's may do nothing on PostgreSQL."""
    return {"idle_milliseconds": str(min(round(max_hold * 1000), _LONGEST_MILLISECONDS))}


def look(sql: Statements, connection: Connection, lease: Lease) -> Recorded | Finished | Lost | None:
    """Tell how a transaction under this lease ended, once it has; None: it left nothing, and the lease stands.

    Waits for a commit that is under way, as long as statements wait for locks.
    """
    return how_it_ended(connection.execute(sql.read_settled, place(lease.scope, lease.key)).one_or_none(), lease)


def how_it_ended(row: AnyRow | None, lease: Lease) -> Recorded | Finished | Lost | None:
    """Tell by the record how a transaction under this lease ended."""
    if row is None:
        return Lost()
    if row.state in ENDED:
        return Recorded() if _obeys(row, lease) else _finished(row)
    return None if row.state in FENCED and _obeys(row, lease) else Lost()


def write_through(
    sql: Statements, connection: Connection, scope: str, key: str, pending: MarkerPending, retention: float
) -> bool:
    """Record a pending outcome, with its messages, under the fence of the claim that made it; never inserts."""
    values = place(scope, key) | fence(pending) | ended(pending.outcome) | {"retention": retention}
    with _together(sql, connection, pending.outcome):
        if _write(sql, connection, values, pending.outcome):
            return True
    row = _read(sql, connection, scope, key)
    return row is not None and row.state in ENDED and _obeys(row, pending)


def release(sql: Statements, connection: Connection, lease: Lease, release: Release) -> Released | Finished | Lost:
    """Give the claim up under the lease's fence."""
    state, failures = _state_after(lease, release)
    new = {
        "new_state": state,
        "new_failures": failures,
        "new_attention": None if state is State.RELEASED else state,
        "new_error_type": storable(release.error_type, NAME_CHARACTERS),
        "new_error_message": storable(release.error_message, ERROR_MESSAGE_CHARACTERS),
    }
    if write(connection, sql.release, place(lease.scope, lease.key) | fence(lease) | new):
        return Released(state)
    row = _read(sql, connection, lease.scope, lease.key)
    if row is None:
        return Lost()
    if row.state in ENDED:
        return _finished(row)
    return Released(State(row.state)) if _obeys(row, lease) else Lost()


def _state_after(lease: Lease, release: Release) -> tuple[State, int]:
    """The failures are counted from those the claim was granted with: under its fence nobody else counts any."""
    failures = lease.failures + 1 if release.failed else lease.failures
    limit = lease.policy.max_attempts
    if release.in_doubt:
        return State.IN_DOUBT, failures
    if release.parked:
        return State.PARKED, failures
    if release.failed and limit is not None and failures >= limit:
        return State.PARKED, failures
    return State.RELEASED, failures


# Rows and parameters


def place(scope: str, key: str) -> dict[str, Any]:
    """Return the parameters that say which record."""
    return {"at_scope": scope, "at_key": key}


def seen(row: AnyRow) -> dict[str, Any]:
    """Return the parameters by which a compare-and-set knows the record as it was read."""
    return {"seen_token": row.fencing_token, "seen_owner": row.owner, "seen_state": row.state}


def _fitting(traceparent: str | None) -> str | None:
    """Leave out one that is no W3C traceparent: half of it would link to nothing, and it is no reason to fail."""
    return traceparent if traceparent is None or len(traceparent) <= TRACEPARENT_CHARACTERS else None


def granting(request: ClaimRequest) -> dict[str, Any]:
    """Return the parameters that write whose claim is granted."""
    policy = request.policy
    return {
        "new_owner": request.owner,
        "new_fingerprint": request.fingerprint,
        "new_holder": storable(request.holder, NAME_CHARACTERS),
        "new_traceparent": _fitting(request.traceparent),
        "lease": policy.lease,
        "lifetime": policy.max_hold + policy.retention,
    }


def ended(outcome: EncodedOutcome) -> dict[str, Any]:
    """Return the parameters that write an outcome."""
    return {
        "new_state": outcome.state.value,
        "new_outcome": outcome.body,
        "new_codec": outcome.codec,
        "new_not_kept": outcome.not_kept,
        "new_error_type": storable(outcome.error_type, NAME_CHARACTERS),
        "new_error_message": storable(outcome.error_message, ERROR_MESSAGE_CHARACTERS),
        "new_attention": State.FAILED if outcome.state is State.FAILED else None,
    }


def _vanished(lease: Lease) -> dict[str, Any]:
    return {
        "new_fingerprint": lease.request.fingerprint,
        "new_attempts": lease.attempts,
        "new_failures": lease.failures,
        "new_crashes": lease.crashes,
        "new_generation": lease.generation,
        "new_holder": storable(lease.request.holder, NAME_CHARACTERS),
        "new_traceparent": _fitting(lease.request.traceparent),
    }


def fence(claim: Lease | MarkerPending) -> dict[str, Any]:
    """Return the parameters by which a record is known to obey this claim still."""
    return {"seen_token": claim.fencing_token, "seen_owner": claim.owner}


def _obeys(row: AnyRow, claim: Lease | MarkerPending) -> bool:
    """Tell whether this claim was the last to be granted."""
    return bool(row.fencing_token == claim.fencing_token and row.owner == claim.owner)


def _read(sql: Statements, connection: Connection, scope: str, key: str) -> AnyRow | None:
    return fetch(connection, sql.read, place(scope, key))


def _finished(row: AnyRow) -> Finished:
    outcome = EncodedOutcome(
        State.FAILED if row.state == State.FAILED else State.COMPLETED,
        row.outcome,
        row.codec,
        row.not_kept,
        row.error_type,
        row.error_message,
    )
    return Finished(outcome, row.fingerprint, max(row.retention_left, 0.0), row.fencing_token, row.traceparent)
