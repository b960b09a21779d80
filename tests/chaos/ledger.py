"""What the handlers did, written down where no fault reaches it: a PostgreSQL of its own.

Each row is one statement in autocommit, so that a process that is stopped in the middle holds nothing.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Self, TypeVar

import msgspec
import psycopg

from tests.chaos.history import ROWS, Answered, Effect, Sent, Started, Stepped

R = TypeVar("R", Started, Effect, Stepped, Sent, Answered)

NAMES = {kind: name for name, kind in ROWS.items()}


class Ledger:
    """Rows by those who were there; used by every process of the run, each over a connection of its own."""

    def __init__(self, url: str) -> None:
        self._url = url.replace("postgresql+psycopg://", "postgresql://")  # as psycopg itself writes it
        self._connection: psycopg.Connection | None = None
        self._pid = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._connection is not None:
            self._connection.close()

    def prepare(self) -> None:
        self._connected().execute(
            "CREATE TABLE ledger (number bigserial PRIMARY KEY, name text, shop text, pid bigint, told text)"
        )

    def note(self, row: Started | Effect | Stepped | Sent | Answered) -> None:
        self._connected().execute(
            "INSERT INTO ledger (name, shop, pid, told) VALUES (%s, %s, %s, %s)",
            (NAMES[type(row)], row.shop, row.pid, msgspec.json.encode(asdict(row)).decode()),
        )

    def rows(self, kind: type[R]) -> tuple[R, ...]:
        found = self._connected().execute("SELECT told FROM ledger WHERE name = %s ORDER BY number", (NAMES[kind],))
        return tuple(msgspec.json.decode(told, type=kind) for (told,) in found)

    def counts(self) -> dict[str, int]:
        found = self._connected().execute("SELECT name, count(*) FROM ledger GROUP BY name")
        return {str(name): int(count) for name, count in found}

    def at_work(self, shop: str) -> dict[int, str]:
        """The processes of a shop whose last word was not an answer, and its order: most are within a handler."""
        found = self._connected().execute(
            "SELECT DISTINCT ON (pid) pid, name, told FROM"
            " (SELECT * FROM ledger WHERE shop = %s ORDER BY number DESC LIMIT 100) AS latest"
            " ORDER BY pid, number DESC",
            (shop,),
        )
        return {int(pid): msgspec.json.decode(told)["order"] for pid, name, told in found if name != NAMES[Answered]}

    def _connected(self) -> psycopg.Connection:
        if self._connection is None or self._pid != os.getpid():
            self._connection = psycopg.connect(self._url, autocommit=True)
            self._pid = os.getpid()
        return self._connection
