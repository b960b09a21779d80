"""Every store with a journal of steps keeps its contract, in both runtimes."""

from __future__ import annotations

import os

from idem_tasks.testing import StepContract
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


class TestMemory(InMemory, StepContract):
    """`MemoryStore`."""


class TestTieredInMemory(TieredInMemory, StepContract):
    """`TieredStore` of a marker and records in memory."""


class TestCachedInMemory(CachedInMemory, StepContract):
    """A cache in front of `TieredStore` in memory."""


class TestSQLite(OnSQLite, StepContract):
    """`SQLStore` on a file."""


class TestPostgreSQL(OnPostgreSQL, StepContract):
    """`SQLStore` on PostgreSQL."""


class TestMariaDB(OnMariaDB, StepContract):
    """`SQLStore` on MariaDB."""


class TestTieredRedisPostgreSQL(OnRedisAndPostgreSQL, StepContract):
    """`TieredStore` of Redis and PostgreSQL."""


if fixtures.MYSQL_VARIABLE in os.environ:

    class TestMySQL(OnMySQL, StepContract):
        """`SQLStore` on MySQL."""
