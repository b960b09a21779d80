"""What people do with records, and what clears them away, as plain functions of a connection."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from idem_tasks.claims import AuditEntry, EncodedOutcome, Record, State, action_of
from idem_tasks.errors import ConflictError, InProgressError, StoreUnavailableError
from idem_tasks.stores.base import refuse_if_moved
from idem_tasks.stores.sql_audit import audit, change, entry_for
from idem_tasks.stores.sql_claims import RACES, ended, place, seen
from idem_tasks.stores.sql_renewals import transaction
from idem_tasks.stores.sql_statements import PURGEABLE, AnyRow, Statements


def get(sql: Statements, connection: Connection, scope: str, key: str) -> Record | None:
    """Return the record, or None."""
    row = connection.execute(sql.get, place(scope, key)).one_or_none()
    return None if row is None else _record(row)


def forget(
    sql: Statements,
    connection: Connection,
    scope: str,
    key: str,
    expect_token: int | None,
    actor: str,
    reason: str | None,
) -> AuditEntry | None:
    """Delete the record, and write down who did it; raises as `Store.forget` says."""
    for _ in range(RACES):
        row = connection.execute(sql.read, place(scope, key)).one_or_none()
        if row is None:
            return None
        _refuse_if_held(row, scope, key)
        refuse_if_moved(scope, key, row.state, row.fencing_token, expect_token)
        entry = entry_for(row, action="forget", place=(scope, key), actor=actor, reason=reason)
        # The steps after the record: then those are seen too that a paused holder began while this waited for it.
        if change(sql, connection, sql.forget, place(scope, key) | seen(row), entry, sql.forget_steps):
            return entry
    raise _changing(scope, key)


def resolve(
    sql: Statements,
    connection: Connection,
    scope: str,
    key: str,
    outcome: EncodedOutcome | None,
    owner: str,
    expect_token: int | None,
    actor: str,
    reason: str | None,
) -> AuditEntry | None:
    """End `in_doubt`, `parked` or an overdue `running` by this outcome, or (None) by releasing it.

    `owner` is new for this request, so that a try whose reply was lost is known again (F21).
    """
    for _ in range(RACES):
        row = connection.execute(sql.read, place(scope, key)).one_or_none()
        if row is None:
            return None
        if row.owner == owner:
            return audit(sql, connection, scope, key, 1)[0]
        _refuse_if_held(row, scope, key)
        refuse_if_moved(scope, key, row.state, row.fencing_token, expect_token)
        if row.state in PURGEABLE:
            raise ConflictError(f"{scope} {key!r} is {row.state} already", scope=scope, key=key)
        token = max(row.fencing_token + 1, row.clock)
        values = place(scope, key) | seen(row) | {"new_fencing_token": token, "new_owner": owner}
        statement, state = sql.resolve_released, State.RELEASED
        if outcome is not None:
            statement, state = sql.resolve_ended, State(outcome.state)
            values |= ended(outcome) | {"retention": _lifetime(sql, connection, scope, key)}
        entry = entry_for(
            row, action=action_of(outcome), place=(scope, key), actor=actor, reason=reason, state=state, token=token
        )
        if change(sql, connection, statement, values, entry):
            return entry
    raise _changing(scope, key)


def _lifetime(sql: Statements, connection: Connection, scope: str, key: str) -> float:
    """Seconds for which the last claim was to be kept: all that is known of its policy's retention here."""
    record = get(sql, connection, scope, key)
    return 0.0 if record is None else (record.expires_at - record.created_at).total_seconds()


def _refuse_if_held(row: AnyRow, scope: str, key: str) -> None:
    if row.state == State.RUNNING and row.lease_left > 0:
        raise InProgressError(scope=scope, key=key, retry_after=row.lease_left)


def _changing(scope: str, key: str) -> StoreUnavailableError:
    return StoreUnavailableError(f"{scope} {key!r} is being changed by others all the time; try again")


def records(
    sql: Statements,
    connection: Connection,
    state: State | None,
    scope: str | None,
    after: tuple[str, str] | None,
    limit: int,
    attention: bool,
) -> list[Record]:
    """Return up to `limit` records in the order of scope and key, beginning after the given one."""
    waits = state in (State.IN_DOUBT, State.PARKED, State.FAILED)
    page = sql.records(
        by_state=state is not None,
        by_scope=scope is not None,
        after=after is not None,
        by_attention="state" if waits else "any" if attention else "none",
    )
    values: dict[str, Any] = {"limit": limit}
    if state is not None:
        values["in_state"] = state
    if scope is not None:
        values["in_scope"] = scope
    if after is not None:
        values |= place(*after)
    return [_record(row) for row in connection.execute(page, values)]


def stats(sql: Statements, connection: Connection) -> dict[State, int]:
    """Return how many records there are in each state."""
    counts = dict.fromkeys(State, 0)
    for row in connection.execute(sql.stats):
        counts[State(row.state)] = row.number
    return counts


def purge(sql: Statements, connection: Connection, limit: int, grace: float) -> list[tuple[str, str]]:
    """Delete up to `limit` records whose retention ended over `grace` seconds ago, by their primary key (F47)."""
    values = {"limit": limit, "cut": -grace}
    if sql.kind == "postgresql":
        return [(row.scope, row.key) for row in connection.execute(sql.purge, values)]
    with transaction(connection):
        if sql.kind == "sqlite":
            doomed = [(row.scope, row.key) for row in connection.execute(sql.purge, values)]
        else:
            doomed = [(row.scope, row.key) for row in connection.execute(sql.doomed, values)]
            if doomed:
                connection.execute(sql.delete_locked, {"places": doomed})
        if doomed:
            connection.execute(sql.delete_steps, {"places": doomed})
    return doomed


def _record(row: AnyRow) -> Record:
    return Record(**(row._asdict() | {"state": State(row.state)}))
