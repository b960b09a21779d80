"""`RedisStore` keeps both contracts: of a marker tier, and of a store by itself; on Redis and on fakeredis."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
from fakeredis import TcpFakeServer

from idem_tasks.claims import State
from idem_tasks.stores.base import Marker, Store
from idem_tasks.stores.redis import RedisStore
from idem_tasks.testing import MarkerContract, StoreContract
from idem_tasks.testing.store_in_use import StoreInUse


class TestMarkerOnRedis(MarkerContract):
    """Markers on a Redis server."""

    @pytest.fixture
    def marker(self, redis_url: str) -> Marker:
        return RedisStore(redis_url)


class ForgetsWhatIsOver(StoreContract):
    """Records of a store that deletes them by itself, so that a purge finds nothing."""

    keeps_ended = False
    keeps_generations = False

    def test_purge_tells_what_it_deleted_and_obeys_its_limit(self, use: StoreInUse) -> None:
        """What has ended is gone with its retention, and a purge names nothing."""
        self.ended(use)
        use.driver.poll(partial(use.store.get, use.scope, "key"), lambda record: record is None)
        assert use.purge(limit=2) == []

    def test_purge_spares_what_ended_within_the_grace(self, use: StoreInUse) -> None:
        """A purge deletes nothing, also without a grace."""
        use.finish(use.granted())
        assert use.purge(grace=0) == []
        assert use.record().state is State.COMPLETED


class TestStoreOnRedis(ForgetsWhatIsOver):
    """Records on a Redis server."""

    @pytest.fixture
    def store(self, redis_url: str) -> Store:
        return RedisStore(redis_url)


class ManyClients(TcpFakeServer):
    """A hundred may connect at once; otherwise as it is."""

    request_queue_size = 128


@pytest.fixture(scope="module")
def fakeredis_url() -> Iterator[str]:
    server = ManyClients(("127.0.0.1", 0), server_type="redis")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"redis://127.0.0.1:{server.server_address[1]}/0"
    server.shutdown()
    server.server_close()
    thread.join()


class TestMarkerOnFakeRedis(MarkerContract):
    """Markers on fakeredis' TCP server, which the demo uses."""

    @pytest.fixture
    def marker(self, fakeredis_url: str) -> Marker:
        return RedisStore(fakeredis_url, socket_timeout=20)


class TestStoreOnFakeRedis(ForgetsWhatIsOver):
    """Records on fakeredis' TCP server."""

    @pytest.fixture
    def store(self, fakeredis_url: str) -> Store:
        return RedisStore(fakeredis_url, socket_timeout=20)
