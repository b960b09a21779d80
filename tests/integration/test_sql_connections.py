"""Connections that break, fork, outlive their loop or never come about, and what the caller hears of it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn, cast

import pytest
from sqlalchemy import Connection, NullPool, create_engine, event, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from idem_tasks.claims import Granted, Recorded, Released, State
from idem_tasks.errors import (
    ConfigurationError,
    MissingExtraError,
    StoreError,
    StoreUnavailableError,
)
from idem_tasks.events import Announcer
from idem_tasks.runtime import run_sync
from idem_tasks.stores import sql_clients, sql_urls
from idem_tasks.stores.base import RuntimeName
from idem_tasks.stores.sql import SQLStore
from idem_tasks.stores.sql_clients import BlockingClient
from idem_tasks.stores.sql_renewals import transaction
from idem_tasks.testing.driver import Driver
from idem_tasks.testing.store_in_use import DONE, StoreInUse
from tests.integration.sql_proxy import Proxy
from tests.services.postgres_server import PostgresServer

RUNTIMES: list[RuntimeName] = ["blocking", "asyncio"]
SERVERS = ["postgres_url", "mariadb_url"]


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=RUNTIMES)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    with Driver(request.param) as driver:
        yield driver


def opened(url: str, driver: Driver) -> StoreInUse:
    use = StoreInUse(SQLStore(url, create_schema=True), driver)
    driver(use.store.prepare())
    return use


# Lost replies


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_lost_reply_is_read_back_as_our_own(url: str, driver: Driver) -> None:
    """The server did it, the reply was lost, the store asks again: each verb finds its own work done (F21)."""
    with Proxy(url) as proxy:
        use = opened(proxy.url, driver)
        proxy.lose_next_reply()
        lease = use.granted("a")
        assert (lease.attempts, use.record("a").attempts) == (1, 1)
        proxy.lose_next_reply()
        assert use.renew(lease) == {lease.owner}
        proxy.lose_next_reply()
        assert use.finish(lease) == Recorded()
        assert use.record("a").outcome == DONE.body
        lease = use.granted("b")
        proxy.lose_next_reply()
        assert use.release(lease, failed=True) == Released(State.RELEASED)
        proxy.lose_next_reply()
        lease = use.granted("b")
        assert (lease.attempts, lease.failures, use.record("b").attempts) == (2, 1, 2)
        assert proxy.lost == 5
        driver(use.store.close())


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_person_resolves_once_whichever_reply_is_lost(url: str, driver: Driver) -> None:
    """The second try knows its own work, and does not tell the person that somebody else was faster (F21)."""
    with Proxy(url) as proxy:
        use = opened(proxy.url, driver)
        for number in range(5):
            use.release(use.granted(str(number)), in_doubt=True)
            proxy.lose_next_reply(after=number)
            resolved = use.resolve(None, str(number))
            assert resolved is not None
            assert resolved.state is State.RELEASED
            assert resolved == use.record(str(number))
        assert proxy.lost >= 3
        driver(use.store.close())


def test_a_restarted_server_is_reconnected_to(private_postgres: Callable[..., PostgresServer], driver: Driver) -> None:
    """Pooled connections that a restart cut off are replaced, and nobody hears of it."""
    server = private_postgres()
    use = opened(server.url, driver)
    lease = use.granted()
    server.restart()
    assert use.finish(lease) == Recorded()
    server.stop()
    with pytest.raises(StoreUnavailableError) as caught:
        use.record()
    assert caught.value.__cause__ is not None
    server.start()
    assert use.record().state is State.COMPLETED
    driver(use.store.close())


@pytest.mark.parametrize("scheme", ["postgresql+psycopg", "postgresql+asyncpg"])
def test_a_table_that_was_changed_costs_one_statement_a_connection(postgres_url: str, scheme: str) -> None:
    """A plan that no longer fits is not tried for ever: the connection that has it is thrown away."""
    url = make_url(postgres_url).set(drivername=scheme).render_as_string(hide_password=False)
    with Driver("asyncio" if scheme.endswith("asyncpg") else "blocking") as driver:
        use = opened(url, driver)
        for number in range(12):  # psycopg prepares what came five times
            use.granted(f"before-{number}")
        with create_engine(postgres_url, poolclass=NullPool).begin() as connection:
            connection.execute(text("ALTER TABLE idem_tasks_records ALTER COLUMN codec TYPE text"))
        with pytest.raises(StoreError):
            use.claim("in between")
        for number in range(6):
            use.granted(f"after-{number}")
        driver(use.store.close())


# Forks and event loops


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_forked_child_has_connections_of_its_own(url: str) -> None:
    """Parent and children use one store at once, and none reads another's replies (F27)."""
    with Driver("blocking") as driver:
        use = opened(url, driver)
        for number in range(10):
            use.finish(use.granted(str(number)))

        def read_all() -> None:
            keys = [use.record(str(number)).key for _ in range(20) for number in range(10)]
            assert keys == [str(number) for _ in range(20) for number in range(10)]

        fork = multiprocessing.get_context("fork")
        children = [fork.Process(target=read_all) for _ in range(4)]
        for child in children:
            child.start()
        read_all()
        for child in children:
            child.join(60)
        assert [child.exitcode for child in children] == [0] * 4
        read_all()
        driver(use.store.close())


def test_a_forked_child_leaves_its_parents_sqlite_alone(sqlite_url: str) -> None:
    """A child that uses the same file, and ends, neither locks its parent out nor loses what it wrote (F27)."""
    with Driver("blocking") as driver:
        use = opened(sqlite_url, driver)
        use.finish(use.granted("parent's"))
        fork = multiprocessing.get_context("fork")
        child = fork.Process(target=lambda: use.finish(use.granted("child's")))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        use.finish(use.granted("parent's second"))
        assert [
            record.key for record in driver(use.store.records(state=None, scope=use.scope, after=None, limit=9))
        ] == [
            "child's",
            "parent's",
            "parent's second",
        ]
        driver(use.store.close())


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_forked_child_leaves_a_given_engine_alone(url: str) -> None:
    """The child has a connection of its own on the same engine, and its parent goes on with the one it had."""
    engine = create_engine(url)
    store = SQLStore(engine, create_schema=True).on("blocking", Announcer(()))

    def number_of_connection() -> int:
        assert run_sync(store.get("scope", "key")) is None
        with engine.connect() as connection:
            asks = "SELECT pg_backend_pid()" if url.startswith("postgres") else "SELECT CONNECTION_ID()"
            return int(connection.scalar(text(asks)) or 0)

    def in_the_child() -> None:
        assert number_of_connection() != parents

    parents = number_of_connection()
    child = multiprocessing.get_context("fork").Process(target=in_the_child)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert number_of_connection() == parents
    engine.dispose()


def test_a_forked_child_leaves_a_given_asyncio_engine_alone(postgres_url: str) -> None:
    """The child has connections of its own, and its parent goes on with the ones that it had (F27)."""

    async def main() -> None:
        engine = create_async_engine(postgres_url.replace("+psycopg", "+asyncpg"))
        store = SQLStore(engine, create_schema=True)
        assert await store.get("scope", "key") is None
        child = multiprocessing.get_context("fork").Process(target=lambda: asyncio.run(in_the_child(store)))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert await store.get("scope", "key") is None
        await engine.dispose()

    async def in_the_child(store: SQLStore) -> None:
        assert await store.get("scope", "key") is None

    asyncio.run(main())


@pytest.mark.parametrize("url", ["sqlite_url", *SERVERS], indirect=True)
def test_event_loops_come_and_go(url: str) -> None:
    """Each `asyncio.run` has connections of its own, and they end with it, though nobody closed the store (F54)."""
    store = SQLStore(url, create_schema=True).on("asyncio", Announcer(()))
    for _ in range(3):
        assert asyncio.run(store.get("scope", "key")) is None
    if not url.startswith("sqlite"):
        assert _clients_of(url) == 0


def _clients_of(url: str) -> int:
    query = {
        "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE datname = :name AND pid <> pg_backend_pid()",
        "mysql": "SELECT count(*) FROM information_schema.processlist WHERE db = :name AND id <> connection_id()",
    }
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        name = {"name": make_url(url).database}
        return int(connection.scalar(text(query[engine.dialect.name]), name) or 0)


@pytest.mark.parametrize("url", ["sqlite_url", *SERVERS], indirect=True)
def test_a_program_ends_without_closing_anything(url: str) -> None:
    """No thread or connection keeps a program from ending, nor makes it complain."""
    program = (
        "import asyncio, sys\n"
        "from idem_tasks.events import Announcer\n"
        "from idem_tasks.runtime import run_sync\n"
        "from idem_tasks.stores.sql import SQLStore\n"
        "store = SQLStore(sys.argv[1], create_schema=True)\n"
        "run_sync(store.get('scope', 'key'))\n"
        "asyncio.run(store.on('asyncio', Announcer(())).get('scope', 'key'))\n"
        "loop = asyncio.new_event_loop()\n"
        "loop.run_until_complete(store.on('asyncio', Announcer(())).get('scope', 'key'))\n"
    )
    subprocess.run([sys.executable, "-c", program, url], timeout=30, check=True)


def test_no_asyncio_is_loaded_for_blocking_handlers(sqlite_url: str) -> None:
    """A blocking program needs no greenlet, no asyncio driver and, once its tables are there, no Alembic."""
    with Driver("blocking") as driver:
        driver(opened(sqlite_url, driver).store.close())
    program = (
        "import sys\n"
        "from idem_tasks.runtime import run_sync\n"
        "from idem_tasks.stores.sql import SQLStore\n"
        "run_sync(SQLStore(sys.argv[1]).get('scope', 'key'))\n"
        "print(sorted({'greenlet', 'aiosqlite', 'alembic', 'sqlalchemy.ext.asyncio'} & set(sys.modules)))\n"
    )
    printed = subprocess.run([sys.executable, "-c", program, sqlite_url], check=True, stdout=subprocess.PIPE).stdout
    loaded = printed.decode().strip()
    assert "alembic" not in loaded
    assert "aiosqlite" not in loaded
    assert "sqlalchemy.ext.asyncio" not in loaded


# Engines of the user's own


@pytest.mark.parametrize("url", ["sqlite_url", *SERVERS], indirect=True)
def test_an_engine_of_ones_own_serves_blocking_handlers(url: str) -> None:
    """A given Engine is used, its events tell of each statement, and it is not closed with the store."""
    engine = create_engine(url)
    store = SQLStore(engine, create_schema=True)
    assert store.runtimes == {"blocking"}
    seen: list[str] = []
    with Driver("blocking") as driver:
        use = StoreInUse(store, driver)
        driver(store.prepare())
        event.listen(engine, "before_cursor_execute", lambda *statement: seen.append(statement[2].split()[0]))
        assert use.finish(use.granted()) == Recorded()
        driver(store.close())
    assert (seen[-1], len(seen)) == ("UPDATE", 2)
    assert engine.pool.checkedin() == 1  # type: ignore[attr-defined]
    engine.dispose()
    with pytest.raises(ConfigurationError, match="AsyncEngine"):
        store.on("asyncio", Announcer(()))


def test_an_async_engine_of_ones_own_serves_asyncio_handlers(postgres_url: str) -> None:
    """A given AsyncEngine is used, and is not closed with the store."""

    async def story() -> None:
        engine = create_async_engine(postgres_url)
        store = SQLStore(engine, create_schema=True)
        assert store.runtimes == {"asyncio"}
        assert await store.get("scope", "key") is None
        await store.close()
        assert engine.pool.checkedin() == 1  # type: ignore[attr-defined]
        await engine.dispose()
        with pytest.raises(ConfigurationError, match="an Engine"):
            store.on("blocking", Announcer(()))

    asyncio.run(story())


def test_something_else_is_refused() -> None:
    """Neither URL nor engine is a mistake that is told at once."""
    with pytest.raises(ConfigurationError, match="not int"):
        SQLStore(5)  # type: ignore[arg-type]


# Settings that cannot work


@pytest.mark.parametrize(
    "url",
    [
        "oracle://user:hunter2@host/db",
        "postgresql+psycopg2://user:hunter2@host/db",
        "user:hunter2",
        "mysql://u:hunter2@h",
    ],
)
def test_a_url_that_cannot_work_is_refused_at_once(url: str) -> None:
    """A wrong scheme, a missing database or no URL at all: said when the store is made, without the password."""
    with pytest.raises(ConfigurationError) as caught:
        SQLStore(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:hunter2@127.0.0.1:1/db",
        "postgresql+asyncpg://user:hunter2@127.0.0.1:1/db",
        "postgresql://user:hunter2@nowhere.invalid/db",
        "postgresql+asyncpg://user:hunter2@nowhere.invalid/db",
        "mysql://user:hunter2@127.0.0.1:1/db",
        "mysql://user:hunter2@nowhere.invalid/db",
    ],
)
def test_a_server_that_is_not_there_is_unavailable(url: str, driver: Driver) -> None:
    """No server behind the URL: unavailable, with the address and what to check, and never the password."""
    use = StoreInUse(SQLStore(url), driver)
    with pytest.raises(StoreUnavailableError, match=r"check .*host, port") as caught:
        use.claim()
    error: BaseException | None = caught.value
    assert "user" in str(error)
    while error is not None:
        assert "hunter2" not in str(error)
        error = error.__cause__
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), StoreUnavailableError)
    driver(use.store.close())


@pytest.mark.parametrize(
    "name, runtime", [("mysql", "blocking"), ("mysql", "asyncio"), ("postgresql+asyncpg", "asyncio")]
)
def test_a_wrong_user_or_database_is_told(name: str, runtime: RuntimeName, request: pytest.FixtureRequest) -> None:
    """Where the driver tells the server's code, a refused user and a missing database are wrong settings."""
    url = request.getfixturevalue("mariadb_url" if name == "mysql" else "postgres_url")
    right = make_url(url).set(drivername=name)
    with Driver(runtime) as driver:
        for wrong in (right.set(username="nobody", password="hunter2"), right.set(database="nothing_here")):
            use = StoreInUse(SQLStore(wrong.render_as_string(hide_password=False)), driver)
            with pytest.raises(ConfigurationError, match="check") as caught:
                use.claim()
            assert "hunter2" not in str(caught.value)
            driver(use.store.close())


def test_a_wrong_database_is_told_with_psycopg(postgres_url: str, driver: Driver) -> None:
    """Psycopg hides the server's code: unavailable, with all that there is to check."""
    wrong = make_url(postgres_url).set(database="nothing_here")
    use = StoreInUse(SQLStore(wrong.render_as_string()), driver)
    with pytest.raises(StoreUnavailableError, match="password and database"):
        use.claim()
    driver(use.store.close())


def test_an_sqlite_file_in_no_folder_is_told(tmp_path: Path, driver: Driver) -> None:
    """The folder of the file is missing, or the file is no database: said, with what to check."""
    (tmp_path / "text").write_text("no database at all, but a text that is long enough to be taken for one\n" * 20)
    for place in ("missing/records.db", "text"):
        use = StoreInUse(SQLStore(f"sqlite:///{tmp_path}/{place}"), driver)
        with pytest.raises(ConfigurationError, match="folder"):
            use.claim()
        driver(use.store.close())


def test_a_missing_driver_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that is not installed is named together with what installs it, at the first call."""
    missing: list[tuple[str, RuntimeName, str, str]] = [
        ("postgresql://h/db", "blocking", "psycopg", "postgres"),
        ("postgresql+asyncpg://h/db", "asyncio", "asyncpg", "postgres"),
        ("mysql://h/db", "blocking", "pymysql", "mysql"),
        ("mysql://h/db", "asyncio", "asyncmy", "mysql"),
        ("sqlite:///file", "asyncio", "aiosqlite", "asyncio"),
        ("postgresql://h/db", "asyncio", "greenlet", "asyncio"),
    ]
    for url, runtime, package, extra in missing:
        with monkeypatch.context() as patch, Driver(runtime) as driver:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingExtraError) as caught:
                driver(SQLStore(url).on(runtime, Announcer(())).get("scope", "key"))
        assert (caught.value.package, caught.value.extra) == (package, extra)


# Servers that do not let us


def test_a_read_only_postgres_names_the_primary(postgres_url: str, driver: Driver) -> None:
    """A replica refuses the claim: the error says so, and where to go (F12)."""
    driver(opened(postgres_url, driver).store.close())
    url = make_url(postgres_url).update_query_dict({"options": "-c default_transaction_read_only=on"})
    use = StoreInUse(SQLStore(url.render_as_string()), driver)
    with pytest.raises(StoreError, match="primary"):
        use.claim()
    driver(use.store.close())


def test_a_read_only_mariadb_names_the_primary(mariadb_url: str) -> None:
    """The same on MariaDB (F12)."""
    with Driver("blocking") as driver:
        driver(opened(mariadb_url, driver).store.close())
        url = make_url(mariadb_url).update_query_dict({"init_command": "SET SESSION TRANSACTION READ ONLY"})
        use = StoreInUse(SQLStore(url.render_as_string()), driver)
        with pytest.raises(StoreError, match="primary"):
            use.claim()
        driver(use.store.close())


def test_a_user_without_rights_is_told(postgres_url: str) -> None:
    """A user that may not write names the rights that are missing."""
    with Driver("blocking") as driver:
        driver(opened(postgres_url, driver).store.close())
        engine = create_engine(postgres_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        role = f"r_{os.getpid()}"
        with engine.connect() as connection:
            connection.execute(text(f"CREATE ROLE {role} LOGIN"))
            try:
                use = StoreInUse(SQLStore(make_url(postgres_url).set(username=role).render_as_string()), driver)
                with pytest.raises(ConfigurationError, match="INSERT"):
                    use.claim()
                driver(use.store.close())
            finally:
                connection.execute(text(f"DROP ROLE {role}"))


def test_an_error_never_quotes_what_was_stored(postgres_url: str, driver: Driver) -> None:
    """Our error and the driver's, which is its cause, hold no outcome, argument or key."""
    use = opened(postgres_url, driver)
    lease = use.granted("key-with-canary")
    with create_engine(postgres_url, poolclass=NullPool).begin() as connection:
        connection.execute(text("ALTER TABLE idem_tasks_records ALTER COLUMN codec TYPE varchar(1)"))
    with pytest.raises(StoreError) as caught:
        use.finish(lease, type(DONE)(body=b"canary", codec="canary-codec"))
    error: BaseException | None = caught.value
    while error is not None:
        assert "canary" not in str(error)
        error = error.__cause__
    driver(use.store.close())


def test_the_servers_time_zone_does_not_matter(postgres_url: str, mariadb_url: str) -> None:
    """Whatever the session's time zone, times are in UTC and leases last as long as they should."""
    zones = {
        make_url(postgres_url).update_query_dict({"options": "-c timezone=Asia/Kolkata"}),
        make_url(mariadb_url).update_query_dict({"init_command": "SET time_zone = '+05:30'"}),
    }
    with Driver("blocking") as driver:
        for url in zones:
            use = opened(url.render_as_string(hide_password=False), driver)
            token = use.granted().fencing_token
            record = use.record()
            assert record.created_at.timestamp() == pytest.approx(token / 1_000_000, abs=1)
            assert (record.lease_expires_at - record.created_at).total_seconds() == pytest.approx(60, abs=1)
            assert record.attention is None
            driver(use.store.close())


@pytest.mark.parametrize("url", ["sqlite_url", *SERVERS], indirect=True)
def test_what_does_not_fit_or_is_no_text_fails_nothing(url: str, driver: Driver) -> None:
    """NUL, lone surrogates and overlong words in what is kept for people never make a claim or release fail."""
    use = opened(url, driver)
    lease = use.granted(holder="h\0" * 500, traceparent="t" * 60)
    assert use.release(lease, error_type="E" * 500, error_message="\0\ud800\U0001f600" * 2000) == Released(
        State.RELEASED
    )
    record = use.record()
    assert record.traceparent is None
    assert record.error_message is not None
    assert record.error_message.startswith("\ufffd?\U0001f600")
    driver(use.store.close())


def test_memory_sqlite_serves_threads_and_tasks(driver: Driver) -> None:
    """SQLite in memory is one database for all threads, or all tasks, of a runtime."""
    use = opened("sqlite://", driver)
    answers = use.claim_together([use.request() for _ in range(20)])
    assert sum(isinstance(answer, Granted) for answer in answers) == 1
    driver(use.store.close())


def test_a_password_with_an_at_sign_is_not_taken_for_the_host() -> None:
    """Unescaped, half of it would be shown as the host in every error."""
    with pytest.raises(ConfigurationError, match="%40") as caught:
        SQLStore("postgresql://user:sec@ret@host/shop")
    assert "ret" not in str(caught.value).replace("write", "")


# The first connection


def test_threads_that_come_at_once_share_one_engine(sqlite_url: str) -> None:
    """Two first calls open one pool: the second waits for it, and opens none beside it."""
    store = SQLStore(sqlite_url)
    client = store._clients["blocking"]
    assert isinstance(client, BlockingClient)
    with ThreadPoolExecutor(2) as threads:
        with client._making:
            first, second = threads.submit(client._make), threads.submit(client._make)
        assert first.result(30) is second.result(30)
    run_sync(store.close())


def test_connections_that_were_opened_are_used_again(postgres_url: str) -> None:
    """What twelve threads needed at once stays open: the next twelve open no session more."""
    store = SQLStore(postgres_url, create_schema=True)
    run_sync(store.prepare())
    engine = cast(BlockingClient, store._client)._make()
    opened: list[object] = []
    event.listen(engine, "connect", lambda connection, _record: opened.append(connection))
    together = threading.Barrier(12)

    def hold_one(_number: int) -> None:
        with engine.connect():
            together.wait(30)

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(hold_one, range(12)))
        assert len(opened) == 11  # and the one that made the tables
        list(threads.map(hold_one, range(12)))
    assert len(opened) == 11
    run_sync(store.close())


def being_read(url: str) -> sqlite3.Connection:
    """A transaction that reads the file, so that its mode cannot be changed."""
    connection = sqlite3.connect(make_url(url).database or "", isolation_level=None)
    connection.execute("CREATE TABLE of_another_program (number INTEGER)")
    connection.execute("BEGIN")
    connection.execute("SELECT * FROM of_another_program").fetchall()
    return connection


def test_a_new_file_is_waited_for(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite does not wait while another process changes a new file's mode; the store does."""
    other = being_read(sqlite_url)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            other.execute("COMMIT")

    monkeypatch.setattr(sql_urls, "SQLITE_BUSY_TIMEOUT", 0.01)
    monkeypatch.setattr(sql_clients, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    store = SQLStore(sqlite_url)
    assert run_sync(store.get("scope", "key")) is None
    assert len(slept) == 2
    run_sync(store.close())
    other.close()


def test_a_new_file_is_not_waited_for_for_ever(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that somebody keeps to himself puts messages back."""
    other = being_read(sqlite_url)
    monkeypatch.setattr(sql_urls, "SQLITE_BUSY_TIMEOUT", 0.01)
    monkeypatch.setattr(sql_clients, "LOCK_TIMEOUT", 0.05)
    store = SQLStore(sqlite_url)
    with pytest.raises(StoreUnavailableError, match="locked"):
        run_sync(store.get("scope", "key"))
    other.close()
    assert run_sync(store.get("scope", "key")) is None
    run_sync(store.close())


def test_a_relay_finds_nothing_while_others_write(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in which another process writes for long is no failure of a relay, which comes again."""
    monkeypatch.setattr(sql_urls, "SQLITE_BUSY_TIMEOUT", 0.05)
    store = SQLStore(sqlite_url, create_schema=True)
    run_sync(store.prepare())
    other = sqlite3.connect(make_url(sqlite_url).database or "", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert run_sync(store.outbox.take("relay", lease=60.0, limit=10)) == []
    other.close()
    run_sync(store.close())


def kill(admin: Connection, number: int, error: Exception) -> NoReturn:
    admin.execute(text(f"KILL {number}"))
    raise error


def test_a_transaction_on_a_connection_that_died_ends_it(mariadb_url: str) -> None:
    """Where not even ROLLBACK goes through, the connection is thrown away, and the first error is the one raised."""
    engine = create_engine(mariadb_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection, engine.connect() as other:
        number = connection.scalar(text("SELECT CONNECTION_ID()"))
        first = ValueError("first")
        with pytest.raises(ValueError, match="first") as caught, transaction(connection):
            kill(other, number, first)
        assert caught.value is first
        assert connection.invalidated
    engine.dispose()
