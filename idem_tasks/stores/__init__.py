"""Where records are kept: in memory, in a database, in Redis, or in both tiers.

Each kind is imported when it is first named, so that no client library is loaded that is not used.
"""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from idem_tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from idem_tasks.stores.base import Store
    from idem_tasks.stores.sql import SQLStore

_REDIS_SCHEMES = frozenset(
    {
        *("redis", "rediss", "unix", "valkey", "valkeys"),
        *("redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"),
    }
)
_SQL_SCHEMES = frozenset({"sqlite", "postgresql", "postgres", "mysql", "mariadb"})


def store_from_url(
    url: str, *, create_schema: bool | None = None, schema: str | None = None, table_prefix: str | None = None
) -> Store:
    """Return the store that a URL names; it connects at its first use.

    `memory://` keeps records in this process; `sqlite:///file`, `postgresql://`, `mysql://` and `mariadb://` in a
    database; `redis://` in Redis. The rest is for databases. `create_schema`: None makes the tables on first use on
    SQLite only, True everywhere, False never. `schema` and `table_prefix` say where the tables are. Raises
    `ConfigurationError` for any other scheme.
    """
    scheme = url.partition(":")[0].lower()
    if scheme == "memory":
        from idem_tasks.stores.memory import MemoryStore

        return MemoryStore()
    if scheme in _REDIS_SCHEMES:
        from idem_tasks.stores.redis import RedisStore

        return RedisStore(url)
    if scheme.partition("+")[0] in _SQL_SCHEMES:
        return _record_store(url, create_schema, schema, table_prefix)
    raise ConfigurationError(
        f"no store for the URL scheme {scheme!r}; known: memory, {', '.join(sorted(_SQL_SCHEMES | _REDIS_SCHEMES))}"
    )


def store_from_urls(
    database_url: str | None,
    redis_url: str | None,
    *,
    create_schema: bool | None = None,
    schema: str | None = None,
    table_prefix: str | None = None,
) -> Store:
    """Return one store of both tiers where both URLs are given, else the one that is given.

    Raises `ConfigurationError` for a wrong scheme, and if neither is given.
    """
    if database_url is not None and database_url.partition("+")[0].partition(":")[0] not in _SQL_SCHEMES:
        raise ConfigurationError(
            f"database_url must begin with one of {', '.join(sorted(_SQL_SCHEMES))}, as in sqlite:///idem_tasks.db"
        )
    if redis_url is not None and redis_url.partition(":")[0].lower() not in _REDIS_SCHEMES:
        raise ConfigurationError(
            f"redis_url must begin with one of {', '.join(sorted(_REDIS_SCHEMES))}, as in redis://localhost:6379/0"
        )
    if database_url is None or redis_url is None:
        url = database_url or redis_url
        if url is None:
            raise ConfigurationError("a store needs a database URL, a Redis URL, or both")
        return store_from_url(url, create_schema=create_schema, schema=schema, table_prefix=table_prefix)
    from idem_tasks.stores.redis import RedisStore
    from idem_tasks.stores.tiered import TieredStore

    record = _record_store(database_url, create_schema, schema, table_prefix)  # which checks the URL
    return TieredStore(RedisStore(redis_url, prefix=_marker_prefix(database_url)), record)


def _record_store(url: str, create_schema: bool | None, schema: str | None, table_prefix: str | None) -> SQLStore:
    from idem_tasks.stores.schema import DEFAULT_PREFIX
    from idem_tasks.stores.sql import SQLStore

    prefix = DEFAULT_PREFIX if table_prefix is None else table_prefix
    return SQLStore(url, create_schema=create_schema, schema=schema, table_prefix=prefix)


def _marker_prefix(database_url: str) -> str:
    """Return a prefix of the database's own, so that two databases behind one Redis never answer for each other.

    Where two workers write one server's address differently, their markers do not meet: SQL decides, as it would
    without Redis. User, password and driver do not count; a file counts with its machine.
    """
    try:
        parts = urlsplit(database_url)
    except ValueError:
        # Of brackets; SQLAlchemy takes them in a password.
        raise ConfigurationError(
            "the database URL cannot be read; in a user name or password, write [ as %5B and ] as %5D"
        ) from None
    if parts.scheme.startswith("sqlite"):
        place = f"{socket.gethostname()}:{Path(parts.path[1:]).resolve() if parts.path else os.getpid()}"
    else:
        place = f"{parts.hostname or ''}:{parts.port or ''}{parts.path}?{parts.query}"
    return f"idem:{hashlib.sha256(place.encode()).hexdigest()[:12]}:"
