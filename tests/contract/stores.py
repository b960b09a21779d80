"""The stores that keep contracts, each as a class that gives the fixture `store` to a suite beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from idem_tasks.stores.base import RecordTier, Store
from idem_tasks.stores.cached import cached
from idem_tasks.stores.local_cache import LocalCache
from idem_tasks.stores.memory import MemoryStore
from idem_tasks.stores.memory_marker import MemoryMarker
from idem_tasks.stores.redis import RedisStore
from idem_tasks.stores.sql import SQLStore
from idem_tasks.stores.tiered import TieredStore
from idem_tasks.testing import ManualClock
from idem_tasks.testing.driver import PATIENCE


class OnManualTime:
    """For stores whose clock a test can move: nobody waits."""

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    def pause(self, clock: ManualClock) -> Callable[[float], None]:
        return clock.advance


class InMemory(OnManualTime):
    """`MemoryStore`."""

    @pytest.fixture
    def store(self, clock: ManualClock) -> RecordTier:
        return MemoryStore(clock)


class TieredInMemory(OnManualTime):
    """`TieredStore` of a marker and records in memory."""

    @pytest.fixture
    def store(self, clock: ManualClock) -> Store:
        return TieredStore(MemoryMarker(clock), MemoryStore(clock))


class CachedInMemory(OnManualTime):
    """A cache in this process, in front of `TieredStore` in memory."""

    @pytest.fixture
    def store(self, clock: ManualClock) -> Store:
        return cached(TieredStore(MemoryMarker(clock), MemoryStore(clock)), LocalCache(1024, 60.0, clock))


class OnSQLite:
    """`SQLStore` on a file."""

    @pytest.fixture
    def store(self, sqlite_tables_url: str) -> RecordTier:
        return SQLStore(sqlite_tables_url)


class OnPostgreSQL:
    """`SQLStore` on PostgreSQL, with psycopg in both runtimes."""

    @pytest.fixture
    def store(self, postgres_database: str) -> RecordTier:
        return SQLStore(postgres_database, create_schema=True)


class OnPartitionedPostgreSQL:
    """`SQLStore` on PostgreSQL, with records that are partitioned by the hash of their key."""

    @pytest.fixture
    def store(self, partitioned_postgres_database: str) -> RecordTier:
        return SQLStore(partitioned_postgres_database)


class OnMariaDB:
    """`SQLStore` on MariaDB, with PyMySQL and asyncmy."""

    @pytest.fixture
    def store(self, mariadb_database: str) -> RecordTier:
        return SQLStore(mariadb_database, create_schema=True)


class OnMySQL:
    """`SQLStore` on MySQL, with PyMySQL and asyncmy."""

    @pytest.fixture
    def store(self, mysql_url: str) -> RecordTier:
        return SQLStore(mysql_url, create_schema=True)


class OnRedis:
    """`RedisStore` as a whole store."""

    keeps_ended = False
    keeps_generations = False
    keeps_audit = False

    @pytest.fixture
    def store(self, redis_url: str) -> Store:
        return RedisStore(redis_url, socket_timeout=PATIENCE)


class OnRedisAndPostgreSQL:
    """`TieredStore` of Redis and PostgreSQL: the main road."""

    @pytest.fixture
    def store(self, redis_url: str, postgres_database: str) -> Store:
        return TieredStore(
            RedisStore(redis_url, socket_timeout=PATIENCE), SQLStore(postgres_database, create_schema=True)
        )


class OnRedisAndSQLite:
    """`TieredStore` of Redis and a SQLite file."""

    @pytest.fixture
    def store(self, redis_url: str, sqlite_tables_url: str) -> Store:
        return TieredStore(RedisStore(redis_url, socket_timeout=PATIENCE), SQLStore(sqlite_tables_url))


class CachedOnPostgreSQL:
    """A cache in this process, in front of `SQLStore` on PostgreSQL."""

    @pytest.fixture
    def store(self, postgres_database: str) -> Store:
        return cached(SQLStore(postgres_database, create_schema=True), LocalCache(1024, 60.0))


class CachedOnRedis(OnRedis):
    """A cache in this process, in front of `RedisStore`, which has fewer abilities than the others."""

    @pytest.fixture
    def store(self, redis_url: str) -> Store:
        return cached(RedisStore(redis_url, socket_timeout=PATIENCE), LocalCache(1024, 60.0))
