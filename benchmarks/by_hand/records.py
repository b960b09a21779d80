"""Records with the drivers alone: the smallest table that keeps the promise, and can be purged."""

from __future__ import annotations

import sqlite3
import time
from typing import Any

import psycopg
import pymysql
from sqlalchemy import make_url

from benchmarks.by_hand.protocol import LEASE, RETENTION

Claimed = tuple[int, str, bytes | None]


def psycopg_url(url: str) -> str:
    """Return the URL as psycopg itself reads it."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


class PostgresRecords:
    """psycopg in autocommit, statements prepared, one cursor for all."""

    CREATE = (
        'CREATE TABLE by_hand (key text COLLATE "C" PRIMARY KEY, owner text NOT NULL, token bigint NOT NULL, '
        "fingerprint text NOT NULL, lease_expires_at timestamptz NOT NULL, expires_at timestamptz NOT NULL, "
        "outcome bytea) WITH (fillfactor = 70)"
    )
    CLAIM = (
        "INSERT INTO by_hand VALUES (%s, %s, extract(epoch FROM clock_timestamp()) * 1000000, %s, "
        "clock_timestamp() + %s * interval '1 second', clock_timestamp() + %s * interval '1 second') "
        "ON CONFLICT DO NOTHING RETURNING token, owner, outcome"
    )
    READ = "SELECT token, owner, outcome FROM by_hand WHERE key = %s"
    FINISH = "UPDATE by_hand SET outcome = %s WHERE key = %s AND token = %s AND owner = %s AND outcome IS NULL"

    def __init__(self, url: str) -> None:
        self.connection = psycopg.connect(psycopg_url(url), autocommit=True)
        self._cursor = self.connection.cursor()

    def create(self) -> None:
        """Make the table, with the index by which it is purged."""
        self._cursor.execute(self.CREATE)
        self._cursor.execute("CREATE INDEX by_hand_expires_at ON by_hand (expires_at)")

    def claim(self, key: str, owner: str, fingerprint: str) -> Claimed:
        """One round trip, two for a duplicate."""
        row = self._cursor.execute(self.CLAIM, (key, owner, fingerprint, LEASE, RETENTION), prepare=True).fetchone()
        return row or self.read(key)

    def read(self, key: str) -> Claimed:
        """One round trip: what no duplicate can be faster than."""
        row = self._cursor.execute(self.READ, (key,), prepare=True).fetchone()
        assert row is not None
        return row

    def finish(self, key: str, owner: str, token: int, outcome: bytes) -> bool:
        """One round trip."""
        return self._cursor.execute(self.FINISH, (outcome, key, token, owner), prepare=True).rowcount == 1

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


class MariaDBRecords:
    """PyMySQL in autocommit, one cursor for all; it has no prepared statements."""

    CREATE = (
        "CREATE TABLE by_hand (`key` varbinary(255) PRIMARY KEY, owner varchar(64) NOT NULL, token bigint NOT NULL, "
        "fingerprint varchar(64) NOT NULL, lease_expires_at datetime(6) NOT NULL, expires_at datetime(6) NOT NULL, "
        "outcome longblob, KEY by_hand_expires_at (expires_at)) ENGINE = InnoDB"
    )
    CLAIM = (
        "INSERT INTO by_hand VALUES (%s, %s, timestampdiff(MICROSECOND, '1970-01-01', utc_timestamp(6)), %s, "
        "timestampadd(SECOND, %s, utc_timestamp(6)), timestampadd(SECOND, %s, utc_timestamp(6)), NULL) "
        "ON DUPLICATE KEY UPDATE owner = owner RETURNING token, owner, outcome"
    )
    FINISH = "UPDATE by_hand SET outcome = %s WHERE `key` = %s AND token = %s AND owner = %s AND outcome IS NULL"

    def __init__(self, url: str) -> None:
        place = make_url(url)
        self.connection = pymysql.connect(
            host=place.host,
            port=place.port or 3306,
            user=place.username,
            password=place.password or "",
            database=place.database,
            charset="utf8mb4",
            autocommit=True,
        )
        self._cursor = self.connection.cursor()

    def create(self) -> None:
        """Make the table."""
        self._cursor.execute(self.CREATE)

    def claim(self, key: str, owner: str, fingerprint: str) -> Claimed:
        """One round trip."""
        self._cursor.execute(self.CLAIM, (key, owner, fingerprint, LEASE, RETENTION))
        token, holder, outcome = self._cursor.fetchone()
        return token, holder, outcome

    def finish(self, key: str, owner: str, token: int, outcome: bytes) -> bool:
        """One round trip."""
        return self._cursor.execute(self.FINISH, (outcome, key, token, owner)) == 1

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


class SQLiteRecords:
    """sqlite3 in autocommit, in WAL mode with synchronous=NORMAL, as the library has it."""

    CREATE = (
        "CREATE TABLE by_hand (key text PRIMARY KEY, owner text NOT NULL, token integer NOT NULL, "
        "fingerprint text NOT NULL, lease_expires_at real NOT NULL, expires_at real NOT NULL, outcome blob)"
    )
    CLAIM = "INSERT INTO by_hand VALUES (?, ?, ?, ?, ?, ?, NULL) ON CONFLICT DO NOTHING RETURNING token, owner, outcome"
    READ = "SELECT token, owner, outcome FROM by_hand WHERE key = ?"
    FINISH = "UPDATE by_hand SET outcome = ? WHERE key = ? AND token = ? AND owner = ? AND outcome IS NULL"

    def __init__(self, url: str) -> None:
        self.connection = sqlite3.connect(make_url(url).database or ":memory:", isolation_level=None)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = NORMAL")

    def create(self) -> None:
        """Make the table, with the index by which it is purged."""
        self.connection.execute(self.CREATE)
        self.connection.execute("CREATE INDEX by_hand_expires_at ON by_hand (expires_at)")

    def claim(self, key: str, owner: str, fingerprint: str) -> Claimed:
        """Insert it, or read what is there."""
        now = time.time()
        values = (key, owner, int(now * 1e6), fingerprint, now + LEASE, now + RETENTION)
        row: Any = self.connection.execute(self.CLAIM, values).fetchone()
        if row is None:
            row = self.connection.execute(self.READ, (key,)).fetchone()
        token, holder, outcome = row
        return token, holder, outcome

    def finish(self, key: str, owner: str, token: int, outcome: bytes) -> bool:
        """Write it."""
        return self.connection.execute(self.FINISH, (outcome, key, token, owner)).rowcount == 1

    def close(self) -> None:
        """Close the file."""
        self.connection.close()
