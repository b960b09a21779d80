"""Every store with a journal of steps keeps its contract, in both runtimes."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from idem_tasks.stores.base import Store
from idem_tasks.stores.memory import MemoryStore
from idem_tasks.stores.memory_marker import MemoryMarker
from idem_tasks.stores.redis import RedisStore
from idem_tasks.stores.sql import SQLStore
from idem_tasks.stores.tiered import TieredStore
from idem_tasks.testing import ManualClock, StepContract
from idem_tasks.testing.driver import PATIENCE
from tests.services import fixtures


class OnManualTime(StepContract):
    """For stores whose clock a test can move: nobody waits."""

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    def pause(self, clock: ManualClock) -> Callable[[float], None]:
        return clock.advance


class TestMemory(OnManualTime):
    """`MemoryStore`."""

    @pytest.fixture
    def store(self, clock: ManualClock) -> Store:
        return MemoryStore(clock)


class TestTieredInMemory(OnManualTime):
    """`TieredStore` of a marker and records in memory."""

    @pytest.fixture
    def store(self, clock: ManualClock) -> Store:
        return TieredStore(MemoryMarker(clock), MemoryStore(clock))


class TestSQLite(StepContract):
    """`SQLStore` on a file."""

    @pytest.fixture
    def store(self, sqlite_url: str) -> Store:
        return SQLStore(sqlite_url)


class TestPostgreSQL(StepContract):
    """`SQLStore` on PostgreSQL, with psycopg in both runtimes."""

    @pytest.fixture
    def store(self, postgres_database: str) -> Store:
        return SQLStore(postgres_database, create_schema=True)


class TestMariaDB(StepContract):
    """`SQLStore` on MariaDB, with PyMySQL and asyncmy."""

    @pytest.fixture
    def store(self, mariadb_database: str) -> Store:
        return SQLStore(mariadb_database, create_schema=True)


if fixtures.MYSQL_VARIABLE in os.environ:

    class TestMySQL(StepContract):
        """`SQLStore` on MySQL, with PyMySQL and asyncmy."""

        @pytest.fixture
        def store(self, mysql_url: str) -> Store:
            return SQLStore(mysql_url, create_schema=True)


class TestTieredRedisPostgreSQL(StepContract):
    """`TieredStore` of Redis and PostgreSQL: the main road."""

    @pytest.fixture
    def store(self, redis_url: str, postgres_database: str) -> Store:
        return TieredStore(
            RedisStore(redis_url, socket_timeout=PATIENCE), SQLStore(postgres_database, create_schema=True)
        )
