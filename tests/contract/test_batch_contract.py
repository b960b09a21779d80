"""Every store and marker tier with batch verbs keeps their contract, in both runtimes."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from idem_tasks.stores.base import Marker
from idem_tasks.stores.memory_marker import MemoryMarker
from idem_tasks.stores.redis import RedisStore
from idem_tasks.testing import BatchContract, BatchMarkerContract, ManualClock
from idem_tasks.testing.batch_contract import SITUATIONS, BatchInUse
from idem_tasks.testing.driver import PATIENCE
from idem_tasks.testing.store_in_use import StoreInUse
from tests.contract.stores import (
    CachedInMemory,
    CachedOnPostgreSQL,
    CachedOnRedis,
    InMemory,
    OnManualTime,
    OnMariaDB,
    OnMySQL,
    OnPostgreSQL,
    OnRedis,
    OnRedisAndPostgreSQL,
    OnRedisAndSQLite,
    OnSQLite,
    TieredInMemory,
)
from tests.services import fixtures


class AnyBatch(BatchContract):
    """The contract, and the law that it comes down to."""

    def test_any_batch_is_answered_as_one_at_a_time(self, use: StoreInUse) -> None:
        """Any number of records, in any situations and any order."""

        @settings(
            max_examples=6,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(st.lists(st.sampled_from(list(SITUATIONS)), max_size=20))
        def law(situations: list[str]) -> None:
            BatchInUse(in_new_scope(use)).answered_alike(situations)

        law()


def in_new_scope(use: StoreInUse) -> StoreInUse:
    return StoreInUse(use.store, use.driver)


class TestMemory(InMemory, AnyBatch):
    """`MemoryStore`."""


class TestTieredInMemory(TieredInMemory, AnyBatch):
    """`TieredStore` of a marker and records in memory."""


class TestSQLite(OnSQLite, AnyBatch):
    """`SQLStore` on a file."""


class TestPostgreSQL(OnPostgreSQL, AnyBatch):
    """`SQLStore` on PostgreSQL."""


class TestMariaDB(OnMariaDB, AnyBatch):
    """`SQLStore` on MariaDB."""


class TestRedis(OnRedis, AnyBatch):
    """`RedisStore` as a whole store."""


class TestTieredRedisPostgreSQL(OnRedisAndPostgreSQL, AnyBatch):
    """`TieredStore` of Redis and PostgreSQL."""


class TestTieredRedisSQLite(OnRedisAndSQLite, AnyBatch):
    """`TieredStore` of Redis and a SQLite file."""


class TestCachedInMemory(CachedInMemory, AnyBatch):
    """A cache in front of `TieredStore` in memory."""


@pytest.mark.large
class TestCachedPostgreSQL(CachedOnPostgreSQL, AnyBatch):
    """A cache in front of `SQLStore` on PostgreSQL."""


@pytest.mark.large
class TestCachedRedis(CachedOnRedis, AnyBatch):
    """A cache in front of `RedisStore`."""


if fixtures.MYSQL_VARIABLE in os.environ:

    class TestMySQL(OnMySQL, AnyBatch):
        """`SQLStore` on MySQL."""


class TestMemoryMarker(OnManualTime, BatchMarkerContract):
    """`MemoryMarker`, on a clock that the tests move."""

    @pytest.fixture
    def marker(self, clock: ManualClock) -> Marker:
        return MemoryMarker(clock)


class TestRedisMarker(BatchMarkerContract):
    """`RedisStore` as a marker tier."""

    @pytest.fixture
    def marker(self, redis_url: str) -> Marker:
        return RedisStore(redis_url, socket_timeout=PATIENCE)
