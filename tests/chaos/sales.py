"""What a shop has besides its records: rows of sales, and a post office for the messages that its handlers publish.

Rows are in the database of the records, each in one transaction with its record. Nothing in the table keeps two rows of
one order from being there: that is for the library.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import BigInteger, Column, Double, Integer, MetaData, String, Table, create_engine, select

from idem_tasks import OutboxMessage
from tests.chaos.history import Effect, Sent
from tests.chaos.ledger import Ledger

SALES = Table(
    "sales",
    MetaData(),
    Column("number", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True),
    Column("order", String(20), nullable=False),
    Column("at", Double, nullable=False),
    Column("pid", BigInteger, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("fencing_token", BigInteger, nullable=False),
)


def sale(order: str, pid: int, attempt: int, fencing_token: int) -> dict[str, Any]:
    """Return the values of a row."""
    return {"order": order, "at": time.time(), "pid": pid, "attempt": attempt, "fencing_token": fencing_token}


def prepare(url: str) -> None:
    """Make the table."""
    engine = create_engine(url)
    SALES.metadata.create_all(engine)
    engine.dispose()


def sold(url: str, shop: str) -> Iterator[Effect]:
    """Yield the rows that are there, which are the effects of `post`."""
    engine = create_engine(url)
    with engine.connect() as connection:
        for row in connection.execute(select(SALES)):
            yield Effect(row.at, shop, row.order, "post", row.pid, row.attempt, row.fencing_token)
    engine.dispose()


def post_office(ledger: Ledger, shop: str) -> Callable[[OutboxMessage], None]:
    """Return a sender that writes down what it sent."""

    def send(message: OutboxMessage) -> None:
        ledger.note(Sent(time.time(), shop, message.key, message.scope, os.getpid(), message.id))

    return send
