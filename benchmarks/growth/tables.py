"""Tables of records that differ in nothing but their number of rows, and what PostgreSQL knows of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import psycopg

from benchmarks.by_hand.records import psycopg_url
from benchmarks.orders import AMOUNT, Handler, charge
from idem_tasks import Idempotency, SQLStore, idempotent_task
from idem_tasks.stores.schema import records_table

SCOPE = "shop.tasks.charge"
FIRST = "first"
"""The key of the record that all others are copies of."""

EXPIRED = 4
"""One record in so many is over, and waits for a purge."""

COPIED = {
    "key": "md5(n::text)",
    "owner": "md5('owner' || n)",
    "fencing_token": "fencing_token + n",
    "expires_at": "created_at + (n - %(expired)s) * interval '7 days' / %(rows)s "
    "+ CASE WHEN n > %(expired)s THEN interval '1 day' ELSE interval '-2 hours' END",
}
"""What a copy does not share. Keys are like random UUIDs, which an index likes least; older records end earlier."""


@dataclass(frozen=True)
class Statistics:
    """What PostgreSQL counted since the table was made."""

    updates: int
    hot_updates: int
    dead: int
    live: int
    autovacuums: int


@dataclass(frozen=True)
class Size:
    """Bytes for each record."""

    table: float
    indexes: dict[str, float]

    @property
    def total(self) -> float:
        """Of the table and its indexes."""
        return self.table + sum(self.indexes.values())


class RecordsTable:
    """A table of so many records, of which the first quarter is over; as an `Idempotency` makes it."""

    def __init__(self, url: str, rows: int) -> None:
        self.rows = rows
        self.prefix = f"of_{rows}_"
        self.url = url
        self._name = f"{self.prefix}records"
        self._connection = psycopg.connect(psycopg_url(url), autocommit=True)
        self.size = Size(0.0, {})
        """What a record takes once the table has been filled."""

    @property
    def expired(self) -> int:
        """How many are over when it has been filled."""
        return self.rows // EXPIRED

    def store(self) -> SQLStore:
        """Return a store of these records, to be closed."""
        return SQLStore(self.url, table_prefix=self.prefix, create_schema=True)

    def fill(self) -> float:
        """Make the records, clean up behind that, and return how many a second were made."""
        with Idempotency(store=self.store()) as idempotency:
            idempotency.prepare()
            handler(idempotency)(FIRST, AMOUNT)
        columns = records_table(prefix=self.prefix).c.keys()
        copied = ", ".join(COPIED.get(name, name) for name in columns)
        begun = time.monotonic()
        self._connection.execute(
            f"INSERT INTO {self._name} ({', '.join(columns)}) SELECT {copied} "  # noqa: S608 - names of our own
            f"FROM {self._name}, generate_series(1, %(rows)s) AS n WHERE key = '{FIRST}'",
            {"rows": self.rows, "expired": self.expired},
        )
        took = time.monotonic() - begun
        self._connection.execute(f"VACUUM ANALYZE {self._name}")
        self.size = self._measured()
        return self.rows / took

    def statistics(self) -> Statistics:
        """Return them as they are now; a server learns of what a session did when that ends, or idles for a while."""
        row = self._row(
            "SELECT n_tup_upd, n_tup_hot_upd, n_dead_tup, n_live_tup, autovacuum_count "
            "FROM pg_stat_user_tables WHERE relname = %s"
        )
        return Statistics(*row)

    @property
    def is_due(self) -> bool:
        """Whether there is as much to clean up as autovacuum waits for by default: 50 records, and a fifth of all."""
        [is_due] = self._row(
            "SELECT n_dead_tup > 50 + 0.2 * reltuples FROM pg_stat_user_tables JOIN pg_class ON pg_class.oid = relid "
            "WHERE pg_class.relname = %s"
        )
        return bool(is_due)

    def checkpoint(self) -> None:
        """Write everything to the disk now, so that it is not written while something is measured."""
        self._connection.execute("CHECKPOINT")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _measured(self) -> Size:
        """Return what a record takes, all files of the table counted."""
        rows = self.rows + 1
        found = self._connection.execute(
            "SELECT indexrelid::regclass::text, pg_relation_size(indexrelid) FROM pg_index "
            "WHERE indrelid = %s::regclass ORDER BY 1",
            (self._name,),
        ).fetchall()
        indexes = {name.removeprefix(f"{self._name}_"): size / rows for name, size in found}
        [table] = self._row("SELECT pg_table_size(%s)")
        return Size(table / rows, indexes)

    def _row(self, query: str) -> tuple[Any, ...]:
        """Return the only row, of a query that takes the table's name."""
        row = self._connection.execute(query, (self._name,)).fetchone()
        assert row is not None
        return row


def handler(idempotency: Idempotency) -> Handler:
    """Return the handler under the records' scope; all calls have the same fingerprint, as the copies have."""
    return idempotent_task(key="{order_id}", scope=SCOPE, fingerprint=("amount",), idempotency=idempotency)(charge)
