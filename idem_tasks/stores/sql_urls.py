"""From a database URL to the driver, the settings and the pool of each runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

from sqlalchemy import URL, AsyncAdaptedQueuePool, Pool, QueuePool, make_url
from sqlalchemy.exc import ArgumentError

from idem_tasks.errors import ConfigurationError, MissingExtraError
from idem_tasks.stores.base import RuntimeName

LOCK_TIMEOUT = 1.0
"""Seconds a statement waits for a row that another transaction holds: long for a commit, short for a worker (F46)."""

SQLITE_BUSY_TIMEOUT = 5.0
"""Seconds a statement waits while others write: in SQLite every write waits for all writes, whatever their key."""

CONNECT_TIMEOUT = 5
"""Seconds, whole ones, within which a server that is there answers."""

SILENCE_TIMEOUT = 20
"""Seconds after which a server that says nothing at all is given up: far beyond any of these statements."""

POOL_SIZE = 15
"""Connections in one process, or event loop, opened when needed; what SQLAlchemy calls an overflow it would close at
once: of 240 calls on 16 threads, 51 opened a session of their own."""

POOL_TIMEOUT = 5.0
"""Seconds to wait for a connection while all are in use."""


BACKENDS = frozenset({"sqlite", "postgresql", "mysql", "mariadb"})
"""The dialects of SQLAlchemy whose SQL is written here."""


@dataclass(frozen=True, slots=True)
class _Driver:
    name: str
    extra: str
    dialect: str


_PSYCOPG = _Driver("psycopg", "postgres", "postgresql+psycopg")
_ASYNCPG = _Driver("asyncpg", "postgres", "postgresql+asyncpg")
_PYMYSQL = _Driver("pymysql", "mysql", "mysql+pymysql")
_ASYNCMY = _Driver("asyncmy", "mysql", "mysql+asyncmy")
_SQLITE3 = _Driver("sqlite3", "", "sqlite+pysqlite")
_AIOSQLITE = _Driver("aiosqlite", "asyncio", "sqlite+aiosqlite")

_DRIVERS: dict[str, tuple[_Driver, _Driver]] = {
    "sqlite": (_SQLITE3, _AIOSQLITE),
    "sqlite+pysqlite": (_SQLITE3, _AIOSQLITE),
    "sqlite+aiosqlite": (_SQLITE3, _AIOSQLITE),
    "postgres": (_PSYCOPG, _PSYCOPG),
    "postgresql": (_PSYCOPG, _PSYCOPG),
    "postgresql+psycopg": (_PSYCOPG, _PSYCOPG),
    "postgresql+asyncpg": (_PSYCOPG, _ASYNCPG),
    "mysql": (_PYMYSQL, _ASYNCMY),
    "mysql+pymysql": (_PYMYSQL, _ASYNCMY),
    "mysql+asyncmy": (_PYMYSQL, _ASYNCMY),
    "mariadb": (_PYMYSQL, _ASYNCMY),
    "mariadb+pymysql": (_PYMYSQL, _ASYNCMY),
    "mariadb+asyncmy": (_PYMYSQL, _ASYNCMY),
}
"""For each scheme the blocking driver and the asyncio driver."""


@dataclass(frozen=True, slots=True)
class Target:
    """What `create_engine` and `create_async_engine` need."""

    url: URL
    options: dict[str, Any] = field(default_factory=dict)


def parse_url(text: str) -> URL:
    """Return the URL; raises `ConfigurationError` for one that cannot work. Never shows its password."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # the latter of a port that is no number
        # SQLAlchemy's own message would show the URL with its password.
        raise ConfigurationError(
            "the database URL cannot be read; it looks like postgresql://user:password@host:5432/database, "
            "mysql://user:password@host:3306/database or sqlite:////folder/file.db"
        ) from None
    if "@" in (url.host or ""):
        raise ConfigurationError("the database URL has more than one @; in a user name or password, write it as %40")
    if url.drivername not in _DRIVERS:
        raise ConfigurationError(
            f"{url.drivername}:// is not supported as a database URL; use one of: {', '.join(sorted(_DRIVERS))}"
        )
    if url.port is not None and not 0 < url.port < 65536:
        raise ConfigurationError("the port in the database URL is no number from 1 to 65535")
    if not url.drivername.startswith("sqlite") and not url.database:
        raise ConfigurationError(f"the database URL {shown(url)} names no database; append /name")
    return url


def shown(url: URL) -> str:
    """Return a URL for messages: without password and options."""
    return url.set(query={}).render_as_string(hide_password=True)


def target(url: URL, runtime: RuntimeName) -> Target:
    """Return the URL with this runtime's driver, its settings and its pool.

    Settings that the URL itself gives are left as they are. Raises `MissingExtraError` if the driver is missing.
    """
    blocking, asyncio = _DRIVERS[url.drivername]
    driver = blocking if runtime == "blocking" else asyncio
    _require(driver.name, driver.extra)
    if runtime == "asyncio":
        _require("greenlet", "asyncio")
    settings = _SETTINGS[driver.name](url)
    return Target(
        settings.url.set(drivername=driver.dialect),
        {"pool_size": POOL_SIZE, "max_overflow": 0, "pool_timeout": POOL_TIMEOUT, "pool_use_lifo": True}
        | settings.options,
    )


def _require(module: str, extra: str) -> None:
    try:
        import_module(module)
    except ImportError:
        raise MissingExtraError(package=module, extra=extra) from None


def is_in_memory(url: URL) -> bool:
    """Tell whether it is SQLite without a file."""
    return url.drivername.startswith("sqlite") and (
        url.database in (None, "", ":memory:") or url.query.get("mode") == "memory"
    )


def _with_defaults(url: URL, defaults: dict[str, Any]) -> Target:
    missing = {name: value for name, value in defaults.items() if name not in url.query}
    return Target(url, {"connect_args": missing})


def _for_sqlite(pool: type[Pool], url: URL) -> Target:
    target = _with_defaults(url, {"timeout": SQLITE_BUSY_TIMEOUT})
    if is_in_memory(url):
        # One connection, used by one call at a time: a second one would see another, empty database.
        target.options["connect_args"]["check_same_thread"] = False
        target.options.update(poolclass=pool, pool_size=1, max_overflow=0)
    return target


def _for_psycopg(url: URL) -> Target:
    defaults = {
        "connect_timeout": CONNECT_TIMEOUT,
        "keepalives_idle": SILENCE_TIMEOUT // 2,
        "keepalives_interval": SILENCE_TIMEOUT // 4,
        "keepalives_count": 2,
        "tcp_user_timeout": SILENCE_TIMEOUT * 1000,
        "application_name": "idem_tasks",
    }
    target = _with_defaults(url, defaults)
    given = url.query.get("options", "")
    given = given if isinstance(given, str) else " ".join(given)
    if "lock_timeout" not in given:
        # At connect, so that it costs no round trip of its own. A PgBouncer wants ignore_startup_parameters=options.
        options = f"{given} -c lock_timeout={LOCK_TIMEOUT * 1000:.0f}".strip()
        return Target(url.update_query_dict({"options": options}), target.options)
    return target


def _for_asyncpg(url: URL) -> Target:
    target = _with_defaults(url, {"timeout": float(CONNECT_TIMEOUT), "command_timeout": float(SILENCE_TIMEOUT)})
    target.options["connect_args"]["server_settings"] = {
        "lock_timeout": f"{LOCK_TIMEOUT * 1000:.0f}",
        "application_name": "idem_tasks",
    }
    return target


def _for_mysql(url: URL) -> Target:
    defaults = {"connect_timeout": CONNECT_TIMEOUT, "read_timeout": SILENCE_TIMEOUT, "charset": "utf8mb4"}
    return _with_defaults(url, defaults)


def _for_pymysql(url: URL) -> Target:
    target = _for_mysql(url)
    if "write_timeout" not in url.query:
        target.options["connect_args"]["write_timeout"] = SILENCE_TIMEOUT
    return target


_SETTINGS: dict[str, Callable[[URL], Target]] = {
    "sqlite3": partial(_for_sqlite, QueuePool),
    "aiosqlite": partial(_for_sqlite, AsyncAdaptedQueuePool),
    "psycopg": _for_psycopg,
    "asyncpg": _for_asyncpg,
    "pymysql": _for_pymysql,
    "asyncmy": _for_mysql,
}
