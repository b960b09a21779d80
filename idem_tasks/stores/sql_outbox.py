"""The statements of the outbox: messages are inserted with a finish, leased by their keys' first ones, and deleted.

A key belongs to whoever has leased its first message: nobody else takes any of its messages until that one is
deleted, or due again. So a later message is never sent before an earlier one, though many send at once.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Executable,
    Integer,
    LargeBinary,
    Select,
    String,
    Table,
    and_,
    bindparam,
    column,
    delete,
    func,
    literal,
    literal_column,
    null,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.sql.dml import Delete, Insert, Update
from sqlalchemy.types import TypeEngine

from idem_tasks.stores.sql_clock import after_seconds, now

if TYPE_CHECKING:
    from idem_tasks.stores.sql_statements import Kind


class OutboxStatements:
    """The statements for one table on one kind of database."""

    def __init__(self, kind: Kind, table: Table, finish: Update, insert_finished: Insert) -> None:
        """`finish` and `insert_finished` are the record's, which on PostgreSQL insert the messages themselves."""
        self.kind = kind
        self._table = table
        self._columns = table.c
        if kind == "postgresql":
            self.finish: Executable = self._with_messages(finish)
            """Records an outcome and inserts its messages; its row count is theirs, and 0 if the fence missed."""
            self.insert_finished: Executable = self._with_messages(insert_finished)
        self._make_settling()
        self.take_any = self._taking(of_one_key=False)
        self.take_of = self._taking(of_one_key=True)
        self.count = select(func.count()).select_from(table)

    # With a finish

    def _waiting(self) -> dict[str, ColumnElement[Any]]:
        return {"created_at": now(), "due_at": now(), "attempts": literal(0, Integer)}

    def _with_messages(self, finish: Any) -> Executable:
        c = self._columns
        record = finish.table.c
        finished = finish.returning(record.scope, record.key, record.fencing_token).cte("finished")
        kinds: dict[str, TypeEngine[Any]] = {
            "number": Integer(),
            "id": String(),
            "to": String(),
            "content": LargeBinary(),
        }
        arrays: list[ColumnElement[Any]] = [
            bindparam(f"message_{name}s", type_=ARRAY(kind)) for name, kind in kinds.items()
        ]
        message = (
            func.unnest(*arrays)
            .table_valued(*(column(name, kind) for name, kind in kinds.items()), name="message")
            .render_derived()
        )
        waiting = self._waiting()
        rows = select(
            finished.c.scope,
            finished.c.key,
            finished.c.fencing_token,
            *(message.c[name] for name in kinds),
            *waiting.values(),
        ).select_from(finished.join(message, true()))
        names = ["scope", "key", "fencing_token", *kinds, *waiting]
        insert = postgresql.insert(self._table).from_select([c[name] for name in names], rows).on_conflict_do_nothing()
        return insert.execution_options(preserve_rowcount=True)  # which SQLAlchemy forgets of an INSERT

    @cache  # noqa: B019 (there are as many as kinds of databases in use, and they live as long as the process)
    def insert(self, number: int) -> Insert:
        """Insert so many messages, and none that is there already."""
        names = ("scope", "key", "fencing_token", "number", "id", "to", "content")
        rows = [
            {name: bindparam(f"new_{name}_{n}", type_=self._columns[name].type) for name in names} | self._waiting()
            for n in range(number)
        ]
        if self.kind == "postgresql":
            return postgresql.insert(self._table).values(rows).on_conflict_do_nothing()
        if self.kind == "sqlite":
            return sqlite.insert(self._table).values(rows).on_conflict_do_nothing()
        return mysql.insert(self._table).values(rows).on_duplicate_key_update(id=self._columns.id)

    # Taking

    def _heads(self, *, of_one_key: bool) -> Select[Any]:
        """The first messages of their keys, as far as they are due."""
        c, other = self._columns, self._table.alias("other")
        # Not "where none is earlier": PostgreSQL makes a join of that, which compares each message of a key with each.
        first = (
            select(other.c.fencing_token, other.c.number)
            .where(other.c.scope == c.scope, other.c.key == c.key)
            .order_by(other.c.fencing_token, other.c.number)
            .limit(literal_column("1"))
            .correlate(self._table)
            .scalar_subquery()
        )
        is_first = tuple_(c.fencing_token, c.number) == first
        heads = select(c.scope, c.key, c.due_at).where(c.due_at <= now(), is_first)
        if of_one_key:
            return heads.where(c.scope == bindparam("at_scope"), c.key == bindparam("at_key"))
        return heads.order_by(c.due_at).limit(bindparam("limit", type_=Integer()))

    def _messages_of(self, heads: Any) -> Select[Any]:
        """Their messages, from the oldest head on, each key's in its order: always the first ones of a key."""
        c = self._columns
        return (
            select(c.scope, c.key, c.fencing_token, c.number)
            .join(heads, and_(heads.c.scope == c.scope, heads.c.key == c.key))
            .order_by(heads.c.due_at, c.scope, c.key, c.fencing_token, c.number)
            .limit(bindparam("limit", type_=Integer()))
        )

    def _taking(self, *, of_one_key: bool) -> Executable:
        """One statement that leases and returns messages; on MariaDB and MySQL one that locks their heads."""
        c = self._columns
        heads = self._heads(of_one_key=of_one_key)
        message = (c.id, c.scope, c.key, c.fencing_token, c.number, c.to, c.content, c.attempts)
        leased = update(self._table).values(owner=bindparam("new_owner"), due_at=after_seconds("lease"))
        if self.kind == "postgresql":
            # Found in the state before the statement, locked, and looked at once more: of two who find the same head
            # one passes it over.
            batch = self._messages_of(heads.with_for_update(skip_locked=True).cte("heads")).cte("batch")
            at_batch = and_(
                *(c[name] == batch.c[name] for name in ("scope", "key", "fencing_token", "number")),
            )
            return leased.where(at_batch).returning(*message)
        if self.kind == "sqlite":
            found = self._messages_of(heads.cte("heads"))
            return leased.where(self._place().in_(found)).returning(*message)
        places = tuple_(c.scope, c.key).in_(bindparam("places", expanding=True))
        self.read_locked: Select[Any] = (
            select(*message)
            .where(places)
            .order_by(c.scope, c.key, c.fencing_token, c.number)
            .limit(bindparam("limit", type_=Integer()))
        )
        self.lease_read: Update = leased.where(self._is_one_of())
        return heads.with_for_update(skip_locked=True)

    # Settling

    def _place(self) -> Any:
        c = self._columns
        return tuple_(c.scope, c.key, c.fencing_token, c.number)

    def _is_one_of(self) -> ColumnElement[bool]:
        is_one: ColumnElement[bool] = self._place().in_(bindparam("messages", expanding=True))
        return is_one

    def _make_settling(self) -> None:
        c = self._columns
        is_ours = c.owner == bindparam("seen_owner")
        self.delete: Delete = delete(self._table).where(self._is_one_of())
        self.give_back: Update = (
            update(self._table).where(self._is_one_of(), is_ours).values(owner=null(), due_at=now())
        )
        self.put_off: Update = (
            update(self._table)
            .where(
                is_ours,
                *(c[name] == bindparam(f"at_{name}") for name in ("scope", "key", "fencing_token", "number")),
            )
            .values(
                owner=null(),
                due_at=after_seconds("delay"),
                attempts=bindparam("new_attempts", type_=c.attempts.type),
                error_type=bindparam("new_error_type", type_=c.error_type.type),
            )
        )
