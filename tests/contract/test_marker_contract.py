"""Every marker tier keeps the contract, in both runtimes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from idem_tasks.stores.base import Marker
from idem_tasks.stores.memory_marker import MemoryMarker
from idem_tasks.stores.redis import RedisStore
from idem_tasks.testing import ManualClock, MarkerContract
from idem_tasks.testing.driver import PATIENCE


class TestMemoryMarker(MarkerContract):
    """`MemoryMarker`, on a clock that the tests move."""

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    def pause(self, clock: ManualClock) -> Callable[[float], None]:
        return clock.advance

    @pytest.fixture
    def marker(self, clock: ManualClock) -> Marker:
        return MemoryMarker(clock)


class TestRedisMarker(MarkerContract):
    """`RedisStore` as a marker tier."""

    @pytest.fixture
    def marker(self, redis_url: str) -> Marker:
        return RedisStore(redis_url, socket_timeout=PATIENCE)
