"""Connections to the database: one engine per process and, for asyncio, per event loop; each made when first used.

A client gives a plain function of a `Connection` the connection to work on: called directly, or through
`run_sync`. Engines are in AUTOCOMMIT, so that a statement is one round trip and its own transaction.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import SQLAlchemyError

from idem_tasks.errors import ConfigurationError, IdemTasksError
from idem_tasks.runtime import interruption_in
from idem_tasks.stores.base import RuntimeName
from idem_tasks.stores.sql_execution import BY_DRIVER
from idem_tasks.stores.sql_urls import BACKENDS, LOCK_TIMEOUT, parse_url, shown, target

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")

Work = Callable[[Connection], T]

_ENGINE_OPTIONS: dict[str, Any] = {
    "isolation_level": "AUTOCOMMIT",
    # Else each statement is followed by the round trip of a ROLLBACK that has nothing to roll back.
    "skip_autocommit_rollback": True,
    "hide_parameters": True,
    "execution_options": {BY_DRIVER: True},
}


class Client(Protocol):
    """Runs work on a connection."""

    @property
    def address(self) -> str:
        """Where the database is, for messages; without password."""
        ...

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file that belongs to this machine alone."""
        ...

    async def run(self, work: Work[T]) -> T:
        """Run the work on a connection of its own meanwhile."""
        ...

    async def close(self) -> None:
        """Close all connections; new ones are opened if it is used again."""
        ...

    def let_go(self) -> None:
        """Forget all connections without a word to the server: in a forked child they are the parent's (F27)."""
        ...


def clients_for(source: str | Engine | AsyncEngine) -> dict[RuntimeName, Client]:
    """Return a client for each runtime that this URL or engine can serve; connects to nothing."""
    if isinstance(source, str):
        url = parse_url(source)
        return {"blocking": BlockingClient(url), "asyncio": AsyncioClient(url)}
    engine = getattr(source, "sync_engine", source)
    if not isinstance(engine, Engine):
        raise ConfigurationError(f"a database is given as URL, Engine or AsyncEngine, not {type(source).__name__}")
    if engine.dialect.name not in BACKENDS:
        raise ConfigurationError(f"{engine.dialect.name} is not supported; use one of: {', '.join(sorted(BACKENDS))}")
    if isinstance(source, Engine):
        return {"blocking": BlockingClient(source.url, source)}
    return {"asyncio": AsyncioClient(source.url, source)}


def _carefully(work: Work[T], connection: Connection) -> T:
    """Do the work; when it is struck from outside, throw the connection away.

    A statement may be under way on it, whose answer the next user would take for the answer to his own.
    """
    before = sys.exception()
    try:
        return work(connection)
    except BaseException as error:
        of_the_server = isinstance(error, SQLAlchemyError | IdemTasksError)
        if not of_the_server or interruption_in(error, before) is not None:
            connection.invalidate()
        raise


class BlockingClient:
    """One engine for all threads of the process."""

    def __init__(self, url: URL, given: Engine | None = None) -> None:
        self.address = shown(url)
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._url = url
        self._given = given
        self._engine: Engine | None = None
        self._making = threading.Lock()
        _clients.add(self)

    async def run(self, work: Work[T]) -> T:
        with (self._engine or self._make()).connect() as connection:
            return _carefully(work, connection)

    def _make(self) -> Engine:
        with self._making:
            if self._engine is None:
                if self._given is not None:
                    self._engine = self._given.execution_options(isolation_level="AUTOCOMMIT")
                else:
                    place = target(self._url, "blocking")
                    self._engine = create_engine(place.url, **_ENGINE_OPTIONS, **place.options)
                    _prepare_connections(self._engine)
            return self._engine

    async def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None and self._given is None:
            engine.dispose()

    def let_go(self) -> None:
        self._making = threading.Lock()
        if self._given is not None:
            _inherited.append(self._given.pool)
            self._given.dispose(close=False)
        _inherited.append(self._engine)
        self._engine = None


class AsyncioClient:
    """One engine for each event loop: connections cannot be used in another one (F54)."""

    def __init__(self, url: URL, given: AsyncEngine | None = None) -> None:
        self.address = shown(url)
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._url = url
        self._given = given
        self._engines: WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopEngine] = WeakKeyDictionary()
        _clients.add(self)

    async def run(self, work: Work[T]) -> T:
        engine = await self._engine()
        async with engine.connect() as connection:
            return await connection.run_sync(lambda bare: _carefully(work, bare))

    async def _engine(self) -> AsyncEngine:
        loop = asyncio.get_running_loop()
        found = self._engines.get(loop)
        if found is not None:
            return found.engine
        for ended in [each for each in self._engines if each.is_closed()]:
            del self._engines[ended]
        if self._given is not None:
            engine = self._given.execution_options(isolation_level="AUTOCOMMIT")
            self._engines[loop] = _LoopEngine(engine, None)
            return engine
        place = target(self._url, "asyncio")
        from sqlalchemy.ext.asyncio import create_async_engine  # it needs greenlet

        engine = create_async_engine(place.url, **_ENGINE_OPTIONS, **place.options)
        _prepare_connections(engine.sync_engine)
        end = _disposed_with_its_loop(engine)
        self._engines[loop] = _LoopEngine(engine, end)
        await anext(end)
        return engine

    async def close(self) -> None:
        found = self._engines.pop(asyncio.get_running_loop(), None)
        if found is not None and found.end is not None:
            await found.end.aclose()

    def let_go(self) -> None:
        if self._given is not None:
            _inherited.append(self._given.pool)
            self._given.sync_engine.dispose(close=False)
        _inherited.append(self._engines)
        self._engines = WeakKeyDictionary()


class _LoopEngine:
    __slots__ = ("end", "engine")

    def __init__(self, engine: AsyncEngine, end: AsyncGenerator[None] | None) -> None:
        self.engine = engine
        self.end = end


async def _disposed_with_its_loop(engine: AsyncEngine) -> AsyncGenerator[None]:
    """Close the connections when the loop ends: `asyncio.run` closes the asynchronous generators begun in it."""
    try:
        yield
    finally:
        await engine.dispose()


# What a new connection is told.


def _prepare_connections(engine: Engine) -> None:
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
    elif engine.dialect.name in ("mysql", "mariadb"):
        event.listen(engine, "connect", _prepare_mysql)


def _prepare_sqlite(connection: Any, _record: object) -> None:
    """WAL, so that readers and the writer do not wait for one another; synchronous=NORMAL, as WAL allows.

    A killed process loses nothing; a power cut can lose the last commits, and never damages the file.
    """
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.execute("PRAGMA journal_mode")
    if cursor.fetchone()[0] == "delete":
        _turn_to_wal(cursor)
    cursor.close()


def _turn_to_wal(cursor: Any) -> None:
    """The first to open a file changes its mode; SQLite does not wait for others who do the same: so try again."""
    import sqlite3

    until = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return


def _prepare_mysql(connection: Any, _record: object) -> None:
    """Short lock waits (F46), no key ever cut to fit (F52), and no old snapshot (F12)."""
    cursor = connection.cursor()
    cursor.execute(
        f"SET SESSION innodb_lock_wait_timeout = {LOCK_TIMEOUT:.0f}, "
        "sql_mode = CONCAT(@@sql_mode, ',STRICT_ALL_TABLES')"
    )
    cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
    cursor.close()


# After a fork the child has copies of its parent's connections: talking over them, or closing them, would disturb
# the parent. So they are kept, unused, for as long as the child lives.

_clients: WeakSet[BlockingClient | AsyncioClient] = WeakSet()
_inherited: list[object] = []


def _let_go_in_child() -> None:
    for client in list(_clients):
        client.let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
