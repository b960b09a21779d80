"""Every store keeps the contract, in both runtimes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from idem_tasks.stores.base import RecordTier, Store
from idem_tasks.stores.memory import MemoryStore
from idem_tasks.stores.memory_marker import MemoryMarker
from idem_tasks.stores.tiered import TieredStore
from idem_tasks.testing import ManualClock, RecordTierContract, StoreContract


class OnManualTime:
    """For stores whose clock a test can move: nobody waits."""

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    def pause(self, clock: ManualClock) -> Callable[[float], None]:
        return clock.advance


class TestMemory(OnManualTime, RecordTierContract):
    """`MemoryStore`."""

    @pytest.fixture
    def store(self, clock: ManualClock) -> RecordTier:
        return MemoryStore(clock)


class TestTieredInMemory(OnManualTime, StoreContract):
    """`TieredStore` of a marker and records in memory."""

    @pytest.fixture
    def store(self, clock: ManualClock) -> Store:
        return TieredStore(MemoryMarker(clock), MemoryStore(clock))
