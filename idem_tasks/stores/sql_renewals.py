"""Extending leases: all of a process's claims together, in the order of their keys, past whatever is locked.

An uncommitted finish holds its record's lock for as long as the handler's transaction lasts; waiting for it would
stop every other renewal of the process (F46).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from idem_tasks.claims import Lease
from idem_tasks.stores.sql_batch_statements import members_of
from idem_tasks.stores.sql_statements import Statements

_MYSQL_BATCH = 500
"""Leases in one transaction: beyond a few thousand places MySQL gives up the index (range_optimizer_max_mem_size)."""


def renew(sql: Statements, connection: Connection, leases: Sequence[Lease]) -> frozenset[str]:
    """Extend these leases by their policy's `lease` from now; return the owners of those extended.

    One statement on PostgreSQL and SQLite. On MariaDB and MySQL four for each 500 leases of the same length: begin,
    lock what is not locked, write, commit.
    """
    if not leases:
        return frozenset()
    if sql.kind in ("mariadb", "mysql"):
        return frozenset(_renew_in_transactions(sql, connection, leases))
    wanted = [
        {
            "at_scope": lease.scope,
            "at_key": lease.key,
            "seen_token": lease.fencing_token,
            "seen_owner": lease.owner,
            "lease": lease.policy.lease,
        }
        for lease in leases
    ]
    return frozenset(connection.execute(sql.batches.renew, members_of(wanted, connection.dialect)).scalars())


def _renew_in_transactions(sql: Statements, connection: Connection, leases: Sequence[Lease]) -> Iterator[str]:
    by_length: dict[float, list[Lease]] = defaultdict(list)
    for lease in sorted(leases, key=lambda lease: (lease.scope.encode(), lease.key.encode())):
        by_length[lease.policy.lease].append(lease)
    for seconds, wanted in by_length.items():
        for start in range(0, len(wanted), _MYSQL_BATCH):
            batch = wanted[start : start + _MYSQL_BATCH]
            # Not by place alone: a process can hold a dead claim and the one that took it over.
            fences = {(lease.scope, lease.key, lease.fencing_token, lease.owner) for lease in batch}
            with transaction(connection):
                places = [(lease.scope, lease.key) for lease in batch]
                locked = connection.execute(sql.lock_running, {"places": places}).all()
                ours = [row for row in locked if tuple(row) in fences]
                if ours:
                    held = [(row.scope, row.key) for row in ours]
                    connection.execute(sql.renew_locked, {"places": held, "lease": seconds})
            yield from (row.owner for row in ours)


@contextmanager
def transaction(connection: Connection) -> Iterator[None]:
    """Make several statements of an AUTOCOMMIT connection one transaction."""
    # SQLite: a transaction that reads before it writes would otherwise fail where another one wrote meanwhile.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.dialect.name == "sqlite" else "START TRANSACTION")
    try:
        yield
        connection.exec_driver_sql("COMMIT")
    except BaseException:  # whatever struck: the connection goes back to its pool
        try:
            connection.exec_driver_sql("ROLLBACK")
        except SQLAlchemyError:
            connection.invalidate()
        raise
