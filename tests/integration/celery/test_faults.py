"""Workers are killed and paused, brokers and databases fail: no message is lost, no outcome is contradicted."""

import time
from collections.abc import Callable, Iterator

import pytest
from celery import states
from sqlalchemy import make_url

from tests.integration.celery.proxy import Proxy
from tests.integration.celery.workers import Shop
from tests.services.postgres_server import PostgresServer
from tests.services.waiting import wait_until

SECONDS = 30.0


def test_a_killed_worker_loses_nothing(own_shop: Callable[..., Shop], unique_name: str) -> None:
    """SIGKILL to the whole tree: RabbitMQ delivers again at once, Redis after the visibility timeout (F33)."""
    shop = own_shop(transport={"visibility_timeout": 3})
    worker = shop.start()
    result = shop.send("charge", unique_name, hold=True)
    [started] = shop.ledger.wait("started", unique_name)
    worker.kill()
    wait_until(lambda: time.time() > started.at + 4, seconds=10, what="the visibility timeout to be over")
    shop.start()
    shop.ledger.wait("taken_over", unique_name, seconds=SECONDS)
    shop.go(unique_name)
    assert result.get(timeout=SECONDS) == f"charged {unique_name} 1"
    assert shop.ledger.count("effect", unique_name) == 1


@pytest.mark.parametrize("broker", ["redis"])
def test_a_task_longer_than_the_visibility_timeout_runs_once(own_shop: Callable[..., Shop], unique_name: str) -> None:
    """F24, F64: Redis delivers a second copy while the first runs; put back, not run, it does not multiply."""
    shop = own_shop(transport={"visibility_timeout": 2})
    shop.start("threads", 2)
    result = shop.send("charge", unique_name, hold=True)
    [started] = shop.ledger.wait("started", unique_name)
    wait_until(lambda: time.time() > started.at + 3, seconds=10, what="the visibility timeout to be over")
    shop.start("threads", 2)  # as it starts it looks for messages that were not acknowledged in time
    put_back = shop.ledger.wait("put_back", unique_name, count=4, seconds=SECONDS)
    shop.go(unique_name)
    assert result.get(timeout=SECONDS) == f"charged {unique_name} 1"
    shop.ledger.wait("replayed", unique_name, seconds=SECONDS)
    assert shop.ledger.count("started", unique_name) == 1
    assert [row.details["count"] for row in put_back] == [*range(1, len(put_back) + 1)], "one copy, going round"


def test_a_paused_worker_whose_lease_was_taken_puts_its_message_back(
    own_shop: Callable[..., Shop], unique_name: str
) -> None:
    """F1, F59: taken over while it was paused, it ends while the taker runs: both get the taker's outcome."""
    shop = own_shop(worker_prefetch_multiplier=1)
    paused = shop.start("threads", 1)  # so that the second message waits for the other worker
    first = shop.send("charge", unique_name, hold=True)
    shop.ledger.wait("started", unique_name)
    paused.pause()
    shop.start("threads", 2)
    second = shop.send("charge", unique_name, 2, hold=True)
    shop.ledger.wait("started", unique_name, count=2, seconds=SECONDS)
    shop.go(unique_name, attempt=1)
    paused.resume()
    shop.ledger.wait("put_back_LeaseLostError", unique_name, seconds=SECONDS)
    shop.go(unique_name, attempt=2)
    assert second.get(timeout=SECONDS) == first.get(timeout=SECONDS) == f"charged {unique_name} 2"
    assert shop.ledger.count("taken_over", unique_name) == 1


@pytest.fixture
def postgres(private_postgres: Callable[..., PostgresServer]) -> PostgresServer:
    return private_postgres()


def test_a_message_waits_for_its_database(
    own_shop: Callable[..., Shop], unique_name: str, postgres: PostgresServer
) -> None:
    """F45, F57, F59: it is away as a message comes, and as a handler ends: both are put back, each runs once."""
    url = make_url(postgres.url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    shop = own_shop(store={"database_url": url, "create_schema": True})
    shop.start("threads", 4)
    before, during = f"{unique_name}-before", f"{unique_name}-during"
    running = shop.send("charge", before, hold=True)
    shop.ledger.wait("started", before)
    postgres.stop()
    waiting = shop.send("charge", during)
    shop.go(before)
    [row] = shop.ledger.wait("put_back", during)[:1]
    assert row.details["reason"] == "StoreUnavailableError"
    [row] = shop.ledger.wait("put_back", before)[:1]
    assert row.details["reason"] == "StoreUnavailableError"
    assert running.state != states.SUCCESS, "an outcome that only the marker has is not acknowledged"
    postgres.start()
    assert running.get(timeout=SECONDS) == f"charged {before} 1"
    assert waiting.get(timeout=SECONDS) == f"charged {during} 1"
    assert [shop.ledger.count("effect", order) for order in (before, during)] == [1, 1]


@pytest.fixture
def proxy(broker_urls: Callable[[str], str], broker: str) -> Iterator[Proxy]:
    """Between a worker and its broker, for what it publishes; a message of ours is known by its task's name."""
    url = make_url(broker_urls(broker))
    assert url.host is not None
    assert url.port is not None
    made = Proxy((url.host, url.port), marked=b"shop.charge")
    yield made
    made.close()


def behind(proxy: Proxy, shop: Shop) -> Shop:
    url = make_url(shop.broker).set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
    shop.config["broker_write_url"] = url
    shop.config["broker_read_url"] = shop.broker
    return shop


@pytest.mark.parametrize("lost", [1, 10])
def test_a_publish_that_is_lost_on_its_way_loses_no_message(
    own_shop: Callable[..., Shop], unique_name: str, proxy: Proxy, lost: int
) -> None:
    """F60: the connection is cut with the copy on it; nothing is acknowledged before a copy is confirmed."""
    shop = behind(proxy, own_shop())
    shop.start("threads", 4)
    first = shop.send("charge", unique_name, hold=True)
    shop.ledger.wait("started", unique_name)
    proxy.swallow = lost
    second = shop.send("charge", unique_name)
    shop.ledger.wait("put_back", unique_name, seconds=SECONDS)
    assert proxy.swallowed == lost
    shop.go(unique_name)
    assert second.get(timeout=SECONDS) == first.get(timeout=SECONDS) == f"charged {unique_name} 1"
    assert shop.ledger.count("effect", unique_name) == 1
    assert shop.ledger.count("in_progress", unique_name) < 8 + lost, "a refused message does not spin"


def test_an_early_acknowledged_message_that_cannot_be_put_back_fails(
    own_shop: Callable[..., Shop], unique_name: str, proxy: Proxy
) -> None:
    """It was acknowledged before it ran, so nobody delivers it again: its sender is told."""
    proxy.marked = b"shop.early"
    shop = behind(proxy, own_shop())
    shop.start("threads", 4)
    first = shop.send("early", unique_name, hold=True)
    shop.ledger.wait("started", unique_name)
    proxy.swallow = 100
    failed = shop.send("early", unique_name).get(timeout=SECONDS, propagate=False)
    assert "InProgressError" in repr(failed)
    shop.go(unique_name)
    assert first.get(timeout=SECONDS) == "done"


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_a_terminated_task_gives_its_key_back(own_shop: Callable[..., Shop], unique_name: str, pool: str) -> None:
    """revoke(terminate=True): the message is gone, as was asked, and the next one of that key runs."""
    shop = own_shop(worker_enable_remote_control=True)
    shop.start(pool, 2)
    result = shop.send("charge", unique_name, hold=True)
    shop.ledger.wait("started", unique_name)
    shop.client.control.revoke(result.id, terminate=True)
    shop.ledger.wait("released", unique_name)
    shop.go(unique_name)
    assert shop.send("charge", unique_name).get(timeout=SECONDS) == f"charged {unique_name} 1"
    assert shop.ledger.count("effect", unique_name) == 1


def test_a_hard_limit_in_gevent_gives_its_key_back(own_shop: Callable[..., Shop], unique_name: str) -> None:
    """There it is a gevent.Timeout in the handler."""
    shop = own_shop()
    shop.start("gevent", 4)
    shop.send("hard_limited", unique_name)
    shop.ledger.wait("released", unique_name)
    assert shop.send("hard_limited", unique_name).get(timeout=SECONDS) == "done"
    assert shop.ledger.count("started", unique_name) == 2
    assert shop.ledger.count("effect", unique_name) == 1
