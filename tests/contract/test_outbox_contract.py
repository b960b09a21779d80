"""Every store with an outbox keeps its contract, in both runtimes."""

from __future__ import annotations

import os

from idem_tasks.testing import OutboxContract
from tests.contract.stores import (
    CachedInMemory,
    InMemory,
    OnMariaDB,
    OnMySQL,
    OnPostgreSQL,
    OnRedisAndPostgreSQL,
    OnSQLite,
    TieredInMemory,
)
from tests.services import fixtures


class TestMemory(InMemory, OutboxContract):
    """`MemoryStore`."""


class TestTieredInMemory(TieredInMemory, OutboxContract):
    """`TieredStore` of a marker and records in memory."""


class TestCachedInMemory(CachedInMemory, OutboxContract):
    """A cache in front of `TieredStore` in memory."""


class TestSQLite(OnSQLite, OutboxContract):
    """`SQLStore` on a file."""


class TestPostgreSQL(OnPostgreSQL, OutboxContract):
    """`SQLStore` on PostgreSQL."""


class TestMariaDB(OnMariaDB, OutboxContract):
    """`SQLStore` on MariaDB."""


class TestTieredRedisPostgreSQL(OnRedisAndPostgreSQL, OutboxContract):
    """`TieredStore` of Redis and PostgreSQL."""


if fixtures.MYSQL_VARIABLE in os.environ:

    class TestMySQL(OnMySQL, OutboxContract):
        """`SQLStore` on MySQL."""
