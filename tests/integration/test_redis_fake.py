"""Markers on fakeredis' TCP server, which the demo starts where no Redis is given."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from fakeredis import TcpFakeServer

from idem_tasks.stores.base import Marker
from idem_tasks.stores.redis import RedisStore
from idem_tasks.testing import MarkerContract


class ManyClients(TcpFakeServer):
    """A hundred may connect at once; otherwise as it is."""

    request_queue_size = 128


@pytest.fixture(scope="module")
def fakeredis_url() -> Iterator[str]:
    server = ManyClients(("127.0.0.1", 0), server_type="redis")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"redis://127.0.0.1:{server.server_address[1]}/0"
    server.shutdown()
    server.server_close()
    thread.join()


class TestMarkerOnFakeRedis(MarkerContract):
    """It does all that a marker tier has to do."""

    @pytest.fixture
    def marker(self, fakeredis_url: str) -> Marker:
        return RedisStore(fakeredis_url, socket_timeout=20)
