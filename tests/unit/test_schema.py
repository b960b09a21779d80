"""The tables: what the migration makes is what the code believes in, and it can be made by several at once."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url

from idem_tasks.claims import AuditEntry, Record
from idem_tasks.runtime import run_sync
from idem_tasks.stores.schema import audit_table, outbox_table, records_table, steps_table, watermarks_table
from idem_tasks.stores.sql import SQLStore


def ddl(url: str) -> set[str]:
    """The statements that made what is in an SQLite file, but for Alembic's own table."""
    connection = sqlite3.connect(make_url(url).database or "")
    statements = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    connection.close()
    return {" ".join(sql.split()) for (sql,) in statements if "version_num" not in sql}


@pytest.mark.parametrize("prefix", ["idem_tasks_", "my_"])
def test_the_migration_makes_what_the_code_believes_in(tmp_path: Path, prefix: str) -> None:
    """The revisions and `schema` make the same tables, columns, types and indexes."""
    migrated, described = f"sqlite:///{tmp_path}/migrated.db", f"sqlite:///{tmp_path}/described.db"
    store = SQLStore(migrated, table_prefix=prefix)
    run_sync(store.prepare())
    run_sync(store.close())
    engine = create_engine(described)
    for make in (records_table, steps_table, audit_table, outbox_table, watermarks_table):
        table = make(prefix=prefix)
        table.metadata.create_all(engine)
    engine.dispose()
    assert ddl(migrated) == ddl(described)
    assert f"{prefix}records" in "".join(ddl(migrated))
    assert f"{prefix}steps" in "".join(ddl(migrated))


def test_a_record_has_every_column() -> None:
    """What people see of a record is every column of its table, under the same names."""
    assert {field.name for field in fields(Record)} == set(records_table().columns.keys())


def test_an_audit_entry_has_every_column() -> None:
    """But for the number that orders them."""
    assert {field.name for field in fields(AuditEntry)} | {"id"} == set(audit_table().columns.keys())


def test_threads_may_make_the_tables_at_once(sqlite_url: str) -> None:
    """Alembic keeps its context in module globals; several stores in one process still prepare at once."""
    stores = [SQLStore(sqlite_url) for _ in range(8)]
    start = threading.Barrier(len(stores), timeout=30)

    def prepare(store: SQLStore) -> None:
        start.wait()
        run_sync(store.prepare())
        run_sync(store.close())

    with ThreadPoolExecutor(len(stores)) as threads:
        list(threads.map(prepare, stores))
    assert "idem_tasks_records" in "".join(ddl(sqlite_url))


def test_tables_of_other_prefixes_live_side_by_side(sqlite_url: str) -> None:
    """A prefix has its own tables and its own version."""
    for prefix in ("one_", "two_"):
        store = SQLStore(sqlite_url, table_prefix=prefix)
        run_sync(store.prepare())
        assert run_sync(store.get("scope", "key")) is None
        run_sync(store.close())
    connection = sqlite3.connect(make_url(sqlite_url).database or "")
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    connection.close()
    names = ("audit", "outbox", "records", "schema", "steps", "watermarks")
    assert {name for (name,) in tables} == {f"{prefix}_{name}" for prefix in ("one", "two") for name in names}
