"""The tables on database servers: as described, made by several processes at once, and never by surprise."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, NullPool, create_engine, literal, literal_column, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.sql.elements import ColumnElement

from idem_tasks.claims import ClaimAnswer, ClaimRequest, Granted, new_owner
from idem_tasks.errors import ConfigurationError, StoreError, StoreUnavailableError
from idem_tasks.events import Announcer
from idem_tasks.policy import Policy
from idem_tasks.runtime import run_sync
from idem_tasks.stores import migrations, sql
from idem_tasks.stores.schema import outbox_table, records_table, steps_table, watermarks_table
from idem_tasks.stores.sql import SQLStore


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        yield connection


POSTGRES_COLUMNS = text(
    "SELECT attname, format_type(atttypid, atttypmod), attnotnull, collname FROM pg_attribute "
    "LEFT JOIN pg_collation ON pg_collation.oid = attcollation "
    "WHERE attrelid = CAST(:name AS regclass) AND attnum > 0 ORDER BY attnum"
)
POSTGRES_INDEXES = text("SELECT indexdef FROM pg_indexes WHERE tablename = :name ORDER BY indexname")
POSTGRES_OPTIONS = text("SELECT reloptions FROM pg_class WHERE oid = CAST(:name AS regclass)")


def described_by_postgres(connection: Connection, name: str) -> list[object]:
    queries = (POSTGRES_COLUMNS, POSTGRES_INDEXES, POSTGRES_OPTIONS)
    return [connection.execute(query, {"name": name}).all() for query in queries]


def described_by_mariadb(connection: Connection, name: str) -> list[object]:
    created: str = connection.execute(text(f"SHOW CREATE TABLE {name}")).one()[1]
    return [*sorted(line.strip().rstrip(",") for line in created.splitlines())]  # indexes are made in any order


@pytest.mark.parametrize(
    "fixture, describe", [("postgres_url", described_by_postgres), ("mariadb_url", described_by_mariadb)]
)
def test_the_migration_makes_what_the_code_believes_in(
    request: pytest.FixtureRequest, fixture: str, describe: Callable[[Connection, str], list[object]]
) -> None:
    """The revisions and `schema` make the same tables, to the last option, as the server describes them."""
    url = request.getfixturevalue(fixture)
    store = SQLStore(url)
    run_sync(store.prepare())
    run_sync(store.close())
    with connected(url) as connection:
        for table in (records_table(), steps_table(), outbox_table(), watermarks_table()):
            migrated = describe(connection, table.name)
            table.drop(connection)
            table.metadata.create_all(connection)
            assert describe(connection, table.name) == migrated


def test_scope_and_key_compare_as_bytes_on_postgres(postgres_url: str) -> None:
    """No locale of the server or of its C library decides which keys are the same (F51)."""
    store = SQLStore(postgres_url)
    run_sync(store.prepare())
    run_sync(store.close())
    with connected(postgres_url) as connection:
        columns = connection.execute(POSTGRES_COLUMNS, {"name": "idem_tasks_records"}).all()
    assert {row.attname: row.collname for row in columns if row.attname in {"scope", "key", "owner"}} == {
        "scope": "C",
        "key": "C",
        "owner": "C",
    }


@pytest.mark.parametrize("fixture", ["sqlite_url", "postgres_url", "mariadb_url"])
def test_no_second_record_of_a_key(request: pytest.FixtureRequest, fixture: str) -> None:
    """The server itself refuses one of another state, time, owner or generation (F13)."""
    url = request.getfixturevalue(fixture)
    store = SQLStore(url, create_schema=True)
    run_sync(store.claim(ClaimRequest("scope", "key", None, new_owner(), Policy())))
    run_sync(store.close())
    table = records_table()
    changed: dict[str, ColumnElement[Any]] = {"state": literal("released"), "owner": literal("another")}
    changed |= {"generation": table.c.generation + 1, "created_at": literal_column("'2030-01-01 00:00:00'")}
    columns = [changed.get(column.name, column) for column in table.c]
    insert = table.insert().from_select(list(table.c.keys()), select(*columns))
    with connected(url) as connection, pytest.raises(IntegrityError):
        connection.execute(insert)


PREPARE = """
import asyncio, sys
from idem_tasks.events import Announcer
from idem_tasks.runtime import run_sync
from idem_tasks.stores.sql import SQLStore

async def prepare(store):
    await store.prepare()
    await store.close()

store = SQLStore(sys.argv[1], create_schema=True)
sys.stdin.read()  # until all are ready
if sys.argv[2] == "asyncio":
    asyncio.run(prepare(store.on("asyncio", Announcer(()))))
else:
    run_sync(prepare(store))
"""


@pytest.mark.parametrize("fixture", ["sqlite_url", "postgres_url", "mariadb_url"])
def test_processes_may_make_the_tables_at_once(request: pytest.FixtureRequest, fixture: str) -> None:
    """Several processes that start on an empty database make the tables once, and none of them fails."""
    url = request.getfixturevalue(fixture)
    command = [sys.executable, "-W", "error", "-c", PREPARE, url]
    starting = [
        subprocess.Popen([*command, runtime], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        for runtime in ("blocking", "asyncio") * 2
    ]
    for process in starting:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    errors = [process.communicate(timeout=60)[1].decode() for process in starting]
    assert [process.returncode for process in starting] == [0] * len(starting), "\n".join(errors)
    store = SQLStore(url, create_schema=False)
    assert run_sync(store.stats())
    run_sync(store.close())


@pytest.mark.parametrize(
    "fixture, create_schema", [("sqlite_url", False), ("postgres_url", None), ("mariadb_url", None)]
)
def test_without_tables_it_says_what_to_run(
    request: pytest.FixtureRequest, fixture: str, create_schema: bool | None
) -> None:
    """Where tables are not made on first use, the first call names the command that makes them."""
    store = SQLStore(request.getfixturevalue(fixture), create_schema=create_schema)
    with pytest.raises(ConfigurationError, match="idem-tasks init-db"):
        run_sync(store.get("scope", "key"))
    run_sync(store.close())


@pytest.mark.parametrize(
    "fixture, create_schema", [("sqlite_url", None), ("postgres_url", True), ("mariadb_url", True)]
)
def test_tables_are_made_on_first_use_where_asked(
    request: pytest.FixtureRequest, fixture: str, create_schema: bool | None
) -> None:
    """The first call on an empty database makes the tables and then does its work."""
    store = SQLStore(request.getfixturevalue(fixture), create_schema=create_schema)
    assert run_sync(store.get("scope", "key")) is None
    run_sync(store.close())


def test_a_schema_of_its_own_on_postgres(postgres_url: str) -> None:
    """With `schema` all tables are there and nowhere else; a schema that is missing is named."""
    store = SQLStore(postgres_url, schema="jobs", create_schema=True)
    with pytest.raises(ConfigurationError, match="jobs"):
        run_sync(store.get("scope", "key"))
    with connected(postgres_url) as connection:
        connection.execute(text("CREATE SCHEMA jobs"))
        assert run_sync(store.get("scope", "key")) is None
        tables = connection.execute(
            text("SELECT schemaname, tablename FROM pg_tables WHERE tablename LIKE 'idem%' ORDER BY tablename")
        )
        names = ("audit", "outbox", "records", "schema", "steps", "watermarks")
        assert [tuple(table) for table in tables] == [("jobs", f"idem_tasks_{name}") for name in names]
    run_sync(store.close())


def test_a_table_of_an_older_version_says_what_to_run(postgres_url: str) -> None:
    """A column that is not there yet names the command that adds it."""
    store = SQLStore(postgres_url)
    run_sync(store.prepare())
    with connected(postgres_url) as connection:
        connection.execute(text("ALTER TABLE idem_tasks_records DROP COLUMN traceparent"))
    with pytest.raises(ConfigurationError, match="idem-tasks init-db"):
        run_sync(store.get("scope", "key"))
    run_sync(store.close())


def test_many_first_calls_at_once_make_the_tables_of_a_new_file(tmp_path: Path) -> None:
    """SQLite says the same for a missing table as for any refused statement, and another task makes it meanwhile."""

    async def claim_all(url: str) -> list[ClaimAnswer]:
        store = SQLStore(url).on("asyncio", Announcer(()))
        answers = await asyncio.gather(
            *(store.claim(ClaimRequest("scope", f"key {n}", None, new_owner(), Policy())) for n in range(10))
        )
        await store.close()
        return answers

    for n in range(10):
        answers = asyncio.run(claim_all(f"sqlite:///{tmp_path}/{n}.db"))
        assert all(isinstance(answer, Granted) for answer in answers)


def test_tables_that_cannot_be_made_leave_nothing(sqlite_url: str) -> None:
    """On SQLite too a migration is done or not done: one that fails writes no version, and may be tried again."""
    store = SQLStore(sqlite_url)
    with connected(sqlite_url) as connection:
        connection.execute(text("CREATE TABLE idem_tasks_records (of_another_program INTEGER)"))
        with pytest.raises(StoreError):
            run_sync(store.prepare())
        tables = connection.execute(text("SELECT name FROM sqlite_master WHERE type = 'table'")).scalars().all()
        assert tables == ["idem_tasks_records"]
        connection.execute(text("DROP TABLE idem_tasks_records"))
    run_sync(store.prepare())
    assert run_sync(store.get("scope", "key")) is None
    run_sync(store.close())


def test_somebody_who_makes_the_tables_for_ever_is_not_waited_for(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another one never ends with the tables, the message is put back."""
    monkeypatch.setattr(sql, "_SCHEMA_WAIT", 0.2)
    store = SQLStore(sqlite_url)
    with migrations._in_this_process, pytest.raises(StoreUnavailableError, match="has been making the tables"):
        run_sync(store.prepare())
    run_sync(store.prepare())
    run_sync(store.close())
