"""What taking, settling and counting messages do to the outbox, as plain functions of a connection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Connection

from idem_tasks.claims import OutboxMessage
from idem_tasks.stores.base import FailedSend
from idem_tasks.stores.schema import NAME_CHARACTERS
from idem_tasks.stores.sql_renewals import transaction
from idem_tasks.stores.sql_statements import AnyRow, Statements

MOST_AT_ONCE = 100
"""Messages in one statement: SQLite compiles it anew for each number, and may take 999 parameters only."""

_BYTES_AT_ONCE = 1_000_000
"""Of contents in one statement, unless one message alone has more: MariaDB and MySQL refuse what is larger than their
max_allowed_packet, 16 MB by default, and a driver's escapes double it at the worst."""


def message_arrays(messages: Sequence[OutboxMessage]) -> dict[str, Any]:
    """Return the parameters that insert messages with a finish on PostgreSQL."""
    return {
        "message_numbers": [message.number for message in messages],
        "message_ids": [message.id for message in messages],
        "message_tos": [message.to for message in messages],
        "message_contents": [message.content for message in messages],
    }


def insert_messages(sql: Statements, connection: Connection, messages: Sequence[OutboxMessage]) -> None:
    """Insert messages beside a finish, in its transaction, where that is a statement of its own."""
    for batch, values in batches_of(messages):
        connection.execute(sql.outbox.insert(len(batch)), values)


def batches_of(messages: Sequence[OutboxMessage]) -> Iterator[tuple[Sequence[OutboxMessage], dict[str, Any]]]:
    """Give as many messages as one statement inserts, and its parameters."""
    names = ("scope", "key", "fencing_token", "number", "id", "to", "content")
    for batch in _cut(messages):
        yield batch, {f"new_{name}_{n}": getattr(message, name) for n, message in enumerate(batch) for name in names}


def _cut(messages: Sequence[OutboxMessage]) -> Iterator[Sequence[OutboxMessage]]:
    start = size = 0
    for end, message in enumerate(messages):
        size += len(message.content)
        if end > start and (end - start == MOST_AT_ONCE or size > _BYTES_AT_ONCE):
            yield messages[start:end]
            start, size = end, len(message.content)
    if messages:
        yield messages[start:]


def take(
    sql: Statements, connection: Connection, owner: str, lease: float, limit: int, of: tuple[str, str] | None
) -> list[OutboxMessage]:
    """Lease the first messages of keys that nobody has, in the order to send them in."""
    values: dict[str, Any] = {"limit": limit}
    if of is not None:
        values["at_scope"], values["at_key"] = of
    statement = sql.outbox.take_any if of is None else sql.outbox.take_of
    leasing = {"new_owner": owner, "lease": lease}
    if sql.kind in ("postgresql", "sqlite"):
        rows: Sequence[AnyRow] = connection.execute(statement, values | leasing).all()
    else:
        rows = _take_in_transaction(sql, connection, statement, values, leasing)
    return sorted((OutboxMessage(*row) for row in rows), key=_order)


def _take_in_transaction(
    sql: Statements, connection: Connection, statement: Any, values: dict[str, Any], leasing: dict[str, Any]
) -> Sequence[AnyRow]:
    with transaction(connection):
        heads = [(row.scope, row.key) for row in connection.execute(statement, values)]
        if not heads:
            return []
        rows = connection.execute(sql.outbox.read_locked, {"places": heads, "limit": values["limit"]}).all()
        connection.execute(sql.outbox.lease_read, leasing | {"messages": [_place(row) for row in rows]})
        return rows


def settle(
    sql: Statements,
    connection: Connection,
    owner: str,
    sent: Sequence[OutboxMessage],
    failed: Sequence[FailedSend],
    rest: Sequence[OutboxMessage],
) -> None:
    """Delete what was sent, put off what failed, and give the rest back.

    Each on its own: a key's messages stay in order whatever of it is done, and a lease that is left runs out.
    """
    if sent:
        connection.execute(sql.outbox.delete, {"messages": [_place(message) for message in sent]})
    for each in failed:
        message = each.message
        values = {
            "seen_owner": owner,
            "at_scope": message.scope,
            "at_key": message.key,
            "at_fencing_token": message.fencing_token,
            "at_number": message.number,
            "delay": each.delay,
            "new_attempts": message.attempts + 1,
            "new_error_type": each.error_type[:NAME_CHARACTERS],
        }
        connection.execute(sql.outbox.put_off, values)
    if rest:
        values = {"seen_owner": owner, "messages": [_place(message) for message in rest]}
        connection.execute(sql.outbox.give_back, values)


def count(sql: Statements, connection: Connection) -> int:
    """Return how many messages there are."""
    return int(connection.execute(sql.outbox.count).scalar_one())


def _place(message: OutboxMessage | AnyRow) -> tuple[str, str, int, int]:
    return message.scope, message.key, message.fencing_token, message.number


def _order(message: OutboxMessage) -> tuple[bytes, bytes, int, int]:
    return message.scope.encode(), message.key.encode(), message.fencing_token, message.number
