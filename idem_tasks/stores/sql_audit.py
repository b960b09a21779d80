"""Who did what to a record, written in the transaction that does it, as plain functions of a connection."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.sql.dml import Delete, Update

from idem_tasks.claims import Action, AuditEntry, State
from idem_tasks.stores.schema import ERROR_MESSAGE_CHARACTERS, NAME_CHARACTERS
from idem_tasks.stores.sql_renewals import transaction
from idem_tasks.stores.sql_statements import AnyRow, Statements


def change(
    sql: Statements,
    connection: Connection,
    statement: Update | Delete,
    values: dict[str, Any],
    entry: AuditEntry,
    *also: Delete,
) -> bool:
    """Change the record and write the entry, both or neither; False if the record was not as it was seen.

    `also` is done in the same transaction, at the place of the record.
    """
    with transaction(connection):
        changed = connection.execute(statement, values).rowcount == 1
        if changed:
            for each in also:
                connection.execute(each, {"at_scope": entry.scope, "at_key": entry.key})
            connection.execute(sql.write_audit, _columns(entry))
    return changed


def entry_for(
    row: AnyRow,
    *,
    action: Action,
    place: tuple[str, str],
    actor: str,
    reason: str | None = None,
    state: State | None = None,
    token: int | None = None,
) -> AuditEntry:
    """Describe a change of the record that was read as this row; without `state` it is gone."""
    return AuditEntry(
        at=datetime.fromtimestamp(row.clock / 1_000_000, UTC),
        actor=actor,
        action=action,
        scope=place[0],
        key=place[1],
        state_before=State(row.state),
        state_after=state,
        token_before=row.fencing_token,
        token_after=token,
        reason=reason,
    )


def audit(sql: Statements, connection: Connection, scope: str | None, key: str | None, limit: int) -> list[AuditEntry]:
    """Return the entries of this scope and key, if given, the last first."""
    values: dict[str, Any] = {"limit": limit}
    if scope is not None:
        values["at_scope"] = scope
    if key is not None:
        values["at_key"] = key
    found = connection.execute(sql.audit(by_scope=scope is not None, by_key=key is not None), values)
    return [_entry(row) for row in found]


def _columns(entry: AuditEntry) -> dict[str, Any]:
    return {
        "new_actor": storable(entry.actor, NAME_CHARACTERS),
        "new_action": entry.action,
        "at_scope": entry.scope,
        "at_key": entry.key,
        "new_state_before": entry.state_before,
        "new_state_after": entry.state_after,
        "new_token_before": entry.token_before,
        "new_token_after": entry.token_after,
        "new_reason": storable(entry.reason, ERROR_MESSAGE_CHARACTERS),
    }


def _entry(row: AnyRow) -> AuditEntry:
    states = {
        name: None if value is None else State(value)
        for name, value in (("state_before", row.state_before), ("state_after", row.state_after))
    }
    return AuditEntry(**(row._asdict() | states))


def storable(text: str | None, characters: int) -> str | None:
    """Cut a text to length, and replace what no database stores as text: NUL and lone surrogates."""
    if text is None:
        return None
    return text[:characters].replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()
