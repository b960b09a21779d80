"""The statements of the marks: how far a consumer group has come in a partition, one row for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    func,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.sql.dml import Insert, Update

from idem_tasks.stores.base import MarkPlace
from idem_tasks.stores.sql_clock import now

if TYPE_CHECKING:
    from idem_tasks.stores.sql_statements import Kind, Statements


class WatermarkStatements:
    """The statements for one table on one kind of database."""

    def __init__(self, kind: Kind, table: Table) -> None:
        c = table.c
        at_place = and_(
            c.topic == bindparam("at_topic"),
            c.partition == bindparam("at_partition"),
            c.consumer_group == bindparam("at_group"),
        )
        self.read = select(c.next_offset).where(at_place)
        self.lock: Select[Any] = self.read
        """Locks the row, or is refused at once: what is locked is at work elsewhere. SQLite locks the whole file."""
        if kind != "sqlite":
            settings: list[ColumnElement[Any]] = []
            if kind == "postgresql":
                # A worker that is paused in mid-transaction must not keep the row for ever.
                limit = bindparam("idle_milliseconds", type_=Text())
                settings.append(func.set_config("idle_in_transaction_session_timeout", limit, literal_column("true")))
            self.lock = select(c.next_offset, *settings).where(at_place).with_for_update(nowait=True)
        first = {
            "topic": bindparam("at_topic", type_=c.topic.type),
            "partition": bindparam("at_partition", type_=c.partition.type),
            "consumer_group": bindparam("at_group", type_=c.consumer_group.type),
            "next_offset": literal_column("0"),
            "updated_at": now(),
        }
        self.insert: Insert
        """Makes the row unless there is one; on SQLite it takes the write lock in any case."""
        if kind == "postgresql":
            self.insert = postgresql.insert(table).values(first).on_conflict_do_nothing()
        elif kind == "sqlite":
            self.insert = sqlite.insert(table).values(first).on_conflict_do_nothing()
        else:
            self.insert = mysql.insert(table).values(first).on_duplicate_key_update(next_offset=c.next_offset)
        self.move: Update = (
            update(table)
            .where(at_place, c.next_offset <= bindparam("seen_offset"))
            .values(next_offset=bindparam("new_offset"), updated_at=now())
        )


def make(sql: Statements, connection: Connection, place: MarkPlace) -> None:
    """Make the mark, before the first message, unless there is one; each statement is a transaction of its own."""
    values = parameters(place)
    if connection.execute(sql.watermarks.read, values).one_or_none() is None:  # a row that is locked is not waited for
        connection.execute(sql.watermarks.insert, values)


def parameters(place: MarkPlace) -> dict[str, Any]:
    """Return the parameters that say where a mark is."""
    return {"at_topic": place.topic, "at_partition": place.partition, "at_group": place.group}
