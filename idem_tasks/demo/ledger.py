"""The ledger: where handlers write what they charged, and everybody what happened; what the demo counts from."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    NullPool,
    String,
    Table,
    create_engine,
    func,
    inspect,
    select,
)

from idem_tasks.demo.settings import Side
from idem_tasks.stores.sql_urls import parse_url, target

_SQLITE_PATIENCE = 30
"""Seconds to wait while others write: nothing may go uncounted."""


@dataclass(frozen=True, slots=True)
class Charge:
    """Money taken from a customer."""

    order_id: str
    cents: int


class Ledger:
    """Two tables in the demo's database: charges and events. Each call is a connection and a commit of its own.

    So a killed process leaves nothing half written, and a forked one shares no connection.
    """

    def __init__(self, url: str, prefix: str) -> None:
        wanted = target(parse_url(url), "blocking")
        arguments = dict(wanted.options["connect_args"])
        if wanted.url.get_backend_name() == "sqlite":
            arguments["timeout"] = _SQLITE_PATIENCE
        self._engine: Engine = create_engine(
            wanted.url, connect_args=arguments, poolclass=NullPool, hide_parameters=True
        )
        self._prefix = prefix
        tables = MetaData()
        number = Column("number", Integer, primary_key=True)
        self._charges = Table(
            f"{prefix}charges",
            tables,
            number,
            Column("side", String(10), nullable=False),
            Column("order_id", String(40), nullable=False),
            Column("customer", String(80), nullable=False),
            Column("cents", Integer, nullable=False),
            mysql_charset="utf8mb4",
            mariadb_charset="utf8mb4",
        )
        self._events = Table(
            f"{prefix}events",
            tables,
            number.copy(),
            Column("side", String(10), nullable=False),
            Column("name", String(40), nullable=False),
            Column("order_id", String(40), nullable=False),
            Column("message", String(40), nullable=False),
            Column("pid", Integer, nullable=False),
        )

    def open(self) -> None:
        """Make the tables."""
        with self._engine.begin() as connection:
            self._charges.metadata.create_all(connection)

    def drop_all(self) -> None:
        """Drop every table of this run, also those that are not the ledger's."""
        with self._engine.begin() as connection:
            for name in self._tables(connection):
                Table(name, MetaData()).drop(connection)

    def _tables(self, connection: Connection) -> list[str]:
        return [name for name in inspect(connection).get_table_names() if name.startswith(self._prefix)]

    def charge(self, side: Side, order_id: str, customer: str, cents: int) -> int:
        """Write down a charge, and return its number."""
        row = self._charges.insert().values(side=side, order_id=order_id, customer=customer, cents=cents)
        with self._engine.begin() as connection:
            inserted = connection.execute(row).inserted_primary_key
        assert inserted is not None
        return int(inserted[0])

    def note(self, side: Side, name: str, *, order_id: str = "", message: str = "") -> None:
        """Write down that something happened, here in this process."""
        row = self._events.insert().values(side=side, name=name, order_id=order_id, message=message, pid=os.getpid())
        with self._engine.begin() as connection:
            connection.execute(row)

    def charges(self, side: Side) -> list[Charge]:
        """Return everything that was charged."""
        columns = self._charges.c
        with self._engine.connect() as connection:
            rows = connection.execute(select(columns.order_id, columns.cents).where(columns.side == side))
            return [Charge(*row) for row in rows]

    def counts(self, side: Side) -> Counter[str]:
        """Return how often each kind of event happened."""
        columns = self._events.c
        query = select(columns.name, func.count()).where(columns.side == side).group_by(columns.name)
        with self._engine.connect() as connection:
            return Counter({row[0]: row[1] for row in connection.execute(query)})

    def messages(self, side: Side, name: str) -> set[str]:
        """Return the messages to which this happened."""
        columns = self._events.c
        query = select(columns.message).distinct().where(columns.side == side, columns.name == name)
        with self._engine.connect() as connection:
            return set(connection.scalars(query))

    def processes(self, side: Side, name: str) -> Sequence[int]:
        """Return the processes in which this happened."""
        columns = self._events.c
        query = select(columns.pid).where(columns.side == side, columns.name == name).order_by(columns.number)
        with self._engine.connect() as connection:
            return connection.scalars(query).all()
