"""Every store keeps the contract, in both runtimes."""

from __future__ import annotations

import os

import pytest

from idem_tasks.testing import RecordTierContract, StoreContract
from tests.contract.stores import (
    CachedInMemory,
    CachedOnPostgreSQL,
    CachedOnRedis,
    InMemory,
    OnMariaDB,
    OnMySQL,
    OnPartitionedPostgreSQL,
    OnPostgreSQL,
    OnRedis,
    OnRedisAndPostgreSQL,
    OnRedisAndSQLite,
    OnSQLite,
    TieredInMemory,
)
from tests.services import fixtures


class TestMemory(InMemory, RecordTierContract):
    """`MemoryStore`."""


class TestTieredInMemory(TieredInMemory, StoreContract):
    """`TieredStore` of a marker and records in memory."""


class TestSQLite(OnSQLite, RecordTierContract):
    """`SQLStore` on a file."""


class TestPostgreSQL(OnPostgreSQL, RecordTierContract):
    """`SQLStore` on PostgreSQL."""


@pytest.mark.large
class TestPartitionedPostgreSQL(OnPartitionedPostgreSQL, RecordTierContract):
    """`SQLStore` on PostgreSQL, partitioned."""


class TestMariaDB(OnMariaDB, RecordTierContract):
    """`SQLStore` on MariaDB."""


if fixtures.MYSQL_VARIABLE in os.environ:

    class TestMySQL(OnMySQL, RecordTierContract):
        """`SQLStore` on MySQL."""

else:

    def test_mysql(mysql_url: str) -> None:
        """MySQL is one line in the list of what was not run, instead of one for every promise."""


class TestRedis(OnRedis, StoreContract):
    """`RedisStore` as a whole store."""


class TestTieredRedisPostgreSQL(OnRedisAndPostgreSQL, StoreContract):
    """`TieredStore` of Redis and PostgreSQL."""


@pytest.mark.large
class TestTieredRedisSQLite(OnRedisAndSQLite, StoreContract):
    """`TieredStore` of Redis and a SQLite file."""


class TestCachedInMemory(CachedInMemory, StoreContract):
    """A cache in front of `TieredStore` in memory."""


@pytest.mark.large
class TestCachedPostgreSQL(CachedOnPostgreSQL, StoreContract):
    """A cache in front of `SQLStore` on PostgreSQL."""


@pytest.mark.large
class TestCachedRedis(CachedOnRedis, StoreContract):
    """A cache in front of `RedisStore`."""
