"""What claiming and finishing many records at once does to them, as plain functions of a connection.

Only the usual cases are decided here, those in which one statement is enough: whatever else a claim or a finish meets
is left to a verb of its own, by the answer None.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Connection

from idem_tasks.claims import ClaimAnswer, ClaimRequest, EncodedOutcome, Finished, Granted, Lease, Lost, Recorded
from idem_tasks.stores.sql_batch_statements import members_of
from idem_tasks.stores.sql_claims import (
    fence,
    finishing,
    granting,
    has_ended_as,
    how_it_ended,
    is_seen,
    known_answer,
    longest_idle,
    place,
    write_finish,
)
from idem_tasks.stores.sql_renewals import transaction
from idem_tasks.stores.sql_statements import AnyRow, Statements

MOST_AT_ONCE = 1000
"""Records in one statement, as in a renewal or a purge."""

_BYTES_AT_ONCE = 4_000_000
"""Of outcomes in one statement, unless one alone has more: MariaDB and MySQL refuse what is larger than their
max_allowed_packet, 16 MB by default, and base64 makes a third more of them."""

Place = tuple[str, str]
Finish = tuple[Lease, EncodedOutcome]


def claim(sql: Statements, connection: Connection, requests: Sequence[ClaimRequest]) -> list[ClaimAnswer | None]:
    """Claim these records by one statement (MySQL, and SQLite where one was there: by two), and read no other one."""
    values = [place(request.scope, request.key) | granting(request) for request in requests]
    result = connection.execute(sql.batches.claim, members_of(values, connection.dialect))
    found = _by_place(result.all() if result.returns_rows else ())
    missing = [(request.scope, request.key) for request in requests if (request.scope, request.key) not in found]
    if missing and sql.kind != "postgresql":
        found |= _read(sql, connection, missing)
    return [_answer(request, found.get((request.scope, request.key))) for request in requests]


def _answer(request: ClaimRequest, row: AnyRow | None) -> ClaimAnswer | None:
    if row is None:
        return None
    if row.state is None:  # just inserted, on PostgreSQL
        return Granted(Lease(request, row.fencing_token))
    return known_answer(request, row)


def finish(sql: Statements, connection: Connection, finished: Sequence[Finish]) -> list[Recorded | None]:
    """Record these outcomes by one statement; on SQLite by one for each, in one transaction."""
    is_one_statement = sql.kind != "sqlite" and not any(outcome.messages for _, outcome in finished)
    with contextlib.nullcontext() if is_one_statement else transaction(connection):
        written = write_finishes(sql, connection, finished)
    return [Recorded() if is_written else None for is_written in written]


def write_finishes(sql: Statements, connection: Connection, finished: Sequence[Finish]) -> list[bool]:
    """Write the outcomes, with their messages, and tell of each whether its fence held.

    Those without messages by one statement for each 1,000, or 4 MB, on a server. Whatever commits, commits all of it.
    """
    if sql.kind == "sqlite" or len(finished) == 1:
        return [write_finish(sql, connection, lease, outcome) for lease, outcome in finished]
    written: set[str] = set()
    for some in cut([each for each in finished if not each[1].messages]):
        written |= _write_together(sql, connection, some)
    for lease, outcome in finished:
        if outcome.messages and write_finish(sql, connection, lease, outcome):
            written.add(lease.owner)
    return [lease.owner in written for lease, _ in finished]


def _write_together(sql: Statements, connection: Connection, finished: Sequence[Finish]) -> frozenset[str]:
    """Write the outcomes by one statement, and return the owners of those whose fence held."""
    values = members_of([finishing(lease, outcome) for lease, outcome in finished], connection.dialect)
    result = connection.execute(sql.batches.finish, values)
    if result.returns_rows:
        return frozenset(result.scalars())
    if result.rowcount == len(finished):
        return frozenset(lease.owner for lease, _ in finished)
    found = _read(sql, connection, [(lease.scope, lease.key) for lease, _ in finished])
    return frozenset(
        lease.owner for lease, outcome in finished if has_ended_as(found.get((lease.scope, lease.key)), lease, outcome)
    )


def cut(finished: Sequence[Finish]) -> Iterator[Sequence[Finish]]:
    """Give as many as one statement takes."""
    start = size = 0
    for end, (_, outcome) in enumerate(finished):
        more = len(outcome.body or b"")
        size += more
        if end > start and (end - start == MOST_AT_ONCE or size > _BYTES_AT_ONCE):
            yield finished[start:end]
            start, size = end, more
    if finished:
        yield finished[start:]


# In a transaction of the user's


def are_seen(sql: Statements, connection: Connection, leases: Sequence[Lease]) -> bool:
    """Tell, as the first statement of a transaction of the user's, whether it sees all records under these leases."""
    values = members_of([place(lease.scope, lease.key) | fence(lease) for lease in leases], connection.dialect)
    if len(leases) == 1:
        return is_seen(sql, connection, leases[0])
    if sql.kind == "postgresql":
        values |= longest_idle(max(lease.policy.max_hold for lease in leases))
    owners = frozenset(connection.execute(sql.batches.begin, values).scalars())
    return all(lease.owner in owners for lease in leases)


def look(sql: Statements, connection: Connection, leases: Sequence[Lease]) -> list[Recorded | Finished | Lost | None]:
    """Tell of each how a transaction under these leases ended, once it has, as `sql_claims.look` does for one."""
    values = members_of([place(lease.scope, lease.key) for lease in leases], connection.dialect)
    found = _by_place(connection.execute(sql.batches.read_settled, values).all())
    return [how_it_ended(found.get((lease.scope, lease.key)), lease) for lease in leases]


# Rows and parameters


def _read(sql: Statements, connection: Connection, places: Sequence[Place]) -> dict[Place, AnyRow]:
    return _by_place(
        connection.execute(sql.batches.read, members_of([place(*each) for each in places], connection.dialect))
    )


def _by_place(rows: Any) -> dict[Place, AnyRow]:
    return {(row[0], row[1]): row for row in rows}
