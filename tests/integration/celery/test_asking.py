"""A worker is killed in mid-run, and the next delivery asks the provider over HTTP what became of the charge."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from idem_tasks import Idempotency, State
from tests.integration.celery.workers import LEASE, Shop

SECONDS = 30.0


class Provider:
    """Charges once for each idempotency key, and tells the receipt of it."""

    def __init__(self) -> None:
        self.charges: dict[str, int] = {}
        self.down = False
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                provider.charges[self.path] = provider.charges.get(self.path, 0) + 1
                self.answer(200)

            def do_GET(self) -> None:
                self.answer(500 if provider.down else 200 if self.path in provider.charges else 404)

            def answer(self, status: int) -> None:
                body = f"receipt {self.path[-4:]}".encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @property
    def times(self) -> list[int]:
        return list(self.charges.values())


@contextmanager
def serving() -> Iterator[Provider]:
    provider = Provider()
    thread = threading.Thread(target=provider.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield provider
    finally:
        provider.server.shutdown()
        provider.server.server_close()
        thread.join()


@pytest.fixture
def provider() -> Iterator[Provider]:
    with serving() as provider:
        yield provider


def record_state(shop: Shop, key: str) -> State:
    with Idempotency.from_urls(**shop.store) as idempotency:
        record = idempotency.get("shop.asks", key)
    assert record is not None
    return record.state


def test_a_charge_that_happened_is_found(own_shop: Callable[..., Shop], provider: Provider, unique_name: str) -> None:
    """Killed after the charge: it is not made again, and the caller gets the receipt that the provider has (F15)."""
    shop = own_shop()
    shop.start(SHOP_PROVIDER=provider.url)
    receipt = shop.send("asks", unique_name, "after").get(timeout=SECONDS)
    assert receipt.startswith("receipt ")
    assert shop.send("asks", unique_name, "after").get(timeout=SECONDS) == receipt
    assert provider.times == [1]
    assert [shop.ledger.count(what, unique_name) for what in ("started", "asked", "answered")] == [1, 1, 1]
    assert record_state(shop, unique_name) is State.COMPLETED


def test_a_charge_that_did_not_happen_is_made(
    own_shop: Callable[..., Shop], provider: Provider, unique_name: str
) -> None:
    """Killed before the charge: the provider knows nothing of it, and the handler runs again (F33)."""
    shop = own_shop()
    shop.start(SHOP_PROVIDER=provider.url)
    assert shop.send("asks", unique_name, "before").get(timeout=SECONDS).startswith("receipt ")
    assert provider.times == [1]
    assert [shop.ledger.count(what, unique_name) for what in ("started", "asked", "taken_over")] == [2, 1, 1]


@pytest.mark.parametrize("how", ["is down", "dies asking"])
def test_without_an_answer_a_person_finds_it(
    own_shop: Callable[..., Shop], provider: Provider, unique_name: str, how: str
) -> None:
    """The provider is down, or the worker is killed while it asks: the record is in doubt, and nobody asks again.

    The message is acknowledged only because of that: an event says so, and the queue is empty.
    """
    shop, key = own_shop(), f"{unique_name} {how}"
    provider.down = how == "is down"
    shop.start(SHOP_PROVIDER=provider.url)
    failed = shop.send("asks", key, "after").get(timeout=SECONDS, propagate=False)
    assert "InDoubtError" in repr(failed)
    assert shop.ledger.count("in_doubt", key) >= 1
    assert record_state(shop, key) is State.IN_DOUBT
    time.sleep(2 * LEASE)  # nothing comes again meanwhile
    assert shop.waiting() == 0
    assert [shop.ledger.count(what, key) for what in ("started", "asked")] == [1, 1]
    assert provider.times == [1]
    with Idempotency.from_urls(**shop.store) as idempotency:
        [waiting] = idempotency.records(state="in_doubt")
        idempotency.resolve(waiting.scope, waiting.key, outcome="receipt by phone", expect_token=waiting.fencing_token)
    assert shop.send("asks", key, "after").get(timeout=SECONDS) == "receipt by phone"
