"""The tables, and the column types that make every database keep them alike.

`records_table` describes what revision 0001 makes, `steps_table` 0002, `audit_table` 0003, `outbox_table` 0004,
`watermarks_table` 0005; tests hold them together. Scope and key compare as bytes everywhere, because a collation that
folds case or ignores trailing spaces makes two keys one (F51). Times are kept in UTC and come from the database's clock
alone: PostgreSQL `timestamptz`, MariaDB and MySQL `DATETIME(6)`, SQLite text as `2030-01-31 23:59:59.123`, which sorts
as it counts.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    DDL,
    BigInteger,
    Column,
    DateTime,
    Dialect,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    event,
    types,
)
from sqlalchemy.dialects import mysql

from idem_tasks.claims import STEP_NAME_BYTES

SCOPE_BYTES = 191
KEY_BYTES = 255
"""Longest scope and key in UTF-8; both in one index stay below the 767 bytes that every InnoDB row format allows."""

ERROR_MESSAGE_CHARACTERS = 2000
"""What is kept of an error message: enough for people, and no place for a whole document."""

NAME_CHARACTERS = 255
"""What is kept of a holder's name and of an error's type."""

TRACEPARENT_CHARACTERS = 55

DEFAULT_PREFIX = "idem_tasks_"

_MYSQL_FAMILY = ("mysql", "mariadb")
_INNODB: dict[str, Any] = {
    "mysql_engine": "InnoDB",
    "mariadb_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mariadb_charset": "utf8mb4",
}


class ByteText(types.TypeDecorator[str]):
    """Text of at most `length` bytes in UTF-8 that compares byte by byte."""

    impl = String
    cache_ok = True

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.length = length

    def load_dialect_impl(self, dialect: Dialect) -> types.TypeEngine[Any]:
        """Choose what the database has for it."""
        if dialect.name in _MYSQL_FAMILY:
            return dialect.type_descriptor(mysql.VARBINARY(self.length))
        if dialect.name == "postgresql":
            return dialect.type_descriptor(String(self.length, collation="C"))
        return dialect.type_descriptor(String(self.length))

    def process_bind_param(self, value: str | None, dialect: Dialect) -> Any:
        """Encode it where the column holds bytes."""
        return value.encode() if value is not None and dialect.name in _MYSQL_FAMILY else value

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        """Decode it where the column holds bytes."""
        return bytes(value).decode() if value is not None and dialect.name in _MYSQL_FAMILY else value


class Instant(types.TypeDecorator[datetime]):
    """A point in time; Python sees aware datetimes in UTC. Written by the database's clock only, never bound."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> types.TypeEngine[Any]:
        """Choose what the database has for it."""
        if dialect.name in _MYSQL_FAMILY:
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        if dialect.name == "postgresql":
            return dialect.type_descriptor(DateTime(timezone=True))
        return dialect.type_descriptor(Text())

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Return it in UTC, whatever the session's time zone is."""
        if value is None:
            return None
        instant: datetime = datetime.fromisoformat(value) if isinstance(value, str) else value
        return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)


OUTCOME = LargeBinary().with_variant(mysql.LONGBLOB(), *_MYSQL_FAMILY)
"""Bytes; a plain MySQL BLOB ends at 64 kB."""

AUDIT_ID = BigInteger().with_variant(Integer(), "sqlite")
"""SQLite numbers rows by itself only in a column of the type INTEGER."""

FILLFACTOR = DDL("ALTER TABLE %(fullname)s SET (fillfactor = 70)")  # type: ignore[no-untyped-call]
"""Room in each page for the versions that claim, renewals and finish leave: HOT updates (measured: 90 %)."""


@cache
def audit_table(schema: str | None = None, prefix: str = DEFAULT_PREFIX) -> Table:
    """Return the table of what people did to records, always the same one for the same schema and prefix."""
    name = f"{prefix}audit"
    table = Table(
        name,
        MetaData(schema=schema),
        # PostgreSQL: an identity, because a sequence of its own would need a right of its own.
        Column("id", AUDIT_ID, Identity(), primary_key=True),
        Column("at", Instant, nullable=False),
        Column("actor", String(NAME_CHARACTERS), nullable=False),
        Column("action", String(20), nullable=False),
        Column("scope", ByteText(SCOPE_BYTES), nullable=False),
        Column("key", ByteText(KEY_BYTES), nullable=False),
        Column("state_before", String(9)),
        Column("state_after", String(9)),
        Column("token_before", BigInteger),
        Column("token_after", BigInteger),
        Column("reason", Text),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        mysql_charset="utf8mb4",
        mariadb_charset="utf8mb4",
    )
    Index(f"{name}_place", table.c.scope, table.c.key)
    return table


@cache
def records_table(schema: str | None = None, prefix: str = DEFAULT_PREFIX) -> Table:
    """Return the table of records, always the same one for the same schema and prefix."""
    name = f"{prefix}records"
    table = Table(
        name,
        MetaData(schema=schema),
        Column("scope", ByteText(SCOPE_BYTES), nullable=False),
        Column("key", ByteText(KEY_BYTES), nullable=False),
        Column("state", String(9), nullable=False),
        Column("fencing_token", BigInteger, nullable=False),
        Column("owner", ByteText(64), nullable=False),
        Column("fingerprint", String(128)),
        Column("attempts", Integer, nullable=False),
        Column("failures", Integer, nullable=False),
        Column("crashes", Integer, nullable=False),
        Column("lease_expires_at", Instant, nullable=False),
        Column("outcome", OUTCOME),
        Column("codec", String(100)),
        Column("not_kept", String(20)),
        Column("error_type", String(NAME_CHARACTERS)),
        Column("error_message", Text),
        Column("holder", String(NAME_CHARACTERS), nullable=False),
        Column("created_at", Instant, nullable=False),
        Column("updated_at", Instant, nullable=False),
        Column("completed_at", Instant),
        Column("expires_at", Instant, nullable=False),
        Column("generation", Integer, nullable=False),
        Column("attention", String(8)),
        Column("traceparent", String(TRACEPARENT_CHARACTERS)),
        PrimaryKeyConstraint("scope", "key"),
        **_INNODB,
    )
    event.listen(table, "after_create", FILLFACTOR.execute_if(dialect="postgresql"))
    Index(f"{name}_expires_at", table.c.expires_at)
    attention = table.c.attention
    is_set = attention.is_not(None)
    Index(f"{name}_attention", attention, postgresql_where=is_set, sqlite_where=is_set)
    return table


@cache
def steps_table(schema: str | None = None, prefix: str = DEFAULT_PREFIX) -> Table:
    """Return the table of the records' steps, always the same one for the same schema and prefix.

    No foreign key: PostgreSQL could not partition the records then, and each write of a step would check it.
    """
    table = Table(
        f"{prefix}steps",
        MetaData(schema=schema),
        Column("scope", ByteText(SCOPE_BYTES), nullable=False),
        Column("key", ByteText(KEY_BYTES), nullable=False),
        Column("generation", Integer, nullable=False),
        Column("position", Integer, nullable=False),
        Column("name", ByteText(STEP_NAME_BYTES), nullable=False),
        Column("fencing_token", BigInteger, nullable=False),
        Column("outcome", OUTCOME),
        Column("codec", String(100)),
        Column("not_kept", String(20)),
        Column("started_at", Instant, nullable=False),
        Column("finished_at", Instant),
        PrimaryKeyConstraint("scope", "key", "generation", "position"),
        **_INNODB,
    )
    event.listen(table, "after_create", FILLFACTOR.execute_if(dialect="postgresql"))
    return table


MESSAGE_ID_CHARACTERS = 32
SENDER_CHARACTERS = 100
"""Longest name of a sender."""


@cache
def outbox_table(schema: str | None = None, prefix: str = DEFAULT_PREFIX) -> Table:
    """Return the table of messages that wait to be sent, always the same one for the same schema and prefix.

    A message that is leased or failed is due again at `due_at`; a lease has an `owner`.
    """
    name = f"{prefix}outbox"
    table = Table(
        name,
        MetaData(schema=schema),
        Column("scope", ByteText(SCOPE_BYTES), nullable=False),
        Column("key", ByteText(KEY_BYTES), nullable=False),
        Column("fencing_token", BigInteger, nullable=False, autoincrement=False),
        Column("number", Integer, nullable=False, autoincrement=False),
        Column("id", String(MESSAGE_ID_CHARACTERS), nullable=False),
        Column("to", String(SENDER_CHARACTERS), nullable=False),
        Column("content", OUTCOME, nullable=False),
        Column("created_at", Instant, nullable=False),
        Column("due_at", Instant, nullable=False),
        Column("owner", ByteText(64)),
        Column("attempts", Integer, nullable=False),
        Column("error_type", String(NAME_CHARACTERS)),
        PrimaryKeyConstraint("scope", "key", "fencing_token", "number"),
        **_INNODB,
    )
    Index(f"{name}_due_at", table.c.due_at)
    return table


TOPIC_BYTES = 249
"""Longest name of a topic, as Kafka has it."""


@cache
def watermarks_table(schema: str | None = None, prefix: str = DEFAULT_PREFIX) -> Table:
    """Return the table of how far consumer groups have come, always the same one for the same schema and prefix.

    `next_offset` is that of the first message of the partition whose effects are not committed yet.
    """
    return Table(
        f"{prefix}watermarks",
        MetaData(schema=schema),
        Column("topic", ByteText(TOPIC_BYTES), nullable=False),
        Column("partition", Integer, nullable=False, autoincrement=False),
        Column("consumer_group", ByteText(KEY_BYTES), nullable=False),
        Column("next_offset", BigInteger, nullable=False),
        Column("updated_at", Instant, nullable=False),
        PrimaryKeyConstraint("topic", "partition", "consumer_group"),
        **_INNODB,
    )
