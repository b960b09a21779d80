"""What the handlers did, written down where no worker's death can undo it: a table in an SQLite file."""

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    at: float  # time.time()
    what: str
    key: str
    pid: int
    details: dict[str, Any]


class Ledger:
    """Rows of what happened to which key; read and written by workers and tests alike."""

    def __init__(self, path: Path | str) -> None:
        self.path = path
        with self._connected() as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("CREATE TABLE IF NOT EXISTS ledger (at, what, key, pid, details)")

    def note(self, what: str, key: str, **details: Any) -> None:
        row = (time.time(), what, key, os.getpid(), json.dumps(details, default=repr))
        with self._connected() as database:
            database.execute("INSERT INTO ledger VALUES (?, ?, ?, ?, ?)", row)

    def rows(self, what: str, key: str) -> list[Row]:
        question = "SELECT * FROM ledger WHERE what = ? AND key = ? ORDER BY rowid"
        with self._connected() as database:
            found = database.execute(question, (what, key)).fetchall()
        return [Row(at, what, key, pid, json.loads(details)) for at, what, key, pid, details in found]

    def count(self, what: str, key: str) -> int:
        return len(self.rows(what, key))

    def wait(self, what: str, key: str, *, count: int = 1, seconds: float = 20.0) -> list[Row]:
        """The rows, as soon as there are `count` of them."""
        deadline = time.monotonic() + seconds
        while len(found := self.rows(what, key)) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:g} s for {count} x {what} {key}, found {len(found)}")
            time.sleep(0.03)
        return found

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=20, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous = OFF")
            yield database
