"""Dramatiq actors with the decorator and the middleware, on a real RabbitMQ and a real Redis."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import AsyncIO, Shutdown
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from dramatiq.threading import raise_thread_exception
from kombu import Connection

from idem_tasks import ConfigurationError, Event, Idempotency, MemoryStore, idempotency_of, idempotent_task
from idem_tasks.integrations.dramatiq import IdempotencyMiddleware
from tests.integration.processes import process
from tests.services.waiting import wait_until

HERE = Path(__file__).parent


class Shop:
    """A broker, its queue, a worker in this process, and what happened."""

    def __init__(self, broker: dramatiq.Broker, queue: str) -> None:
        self.broker = broker
        self.queue = queue
        self.events: list[Event] = []
        self.idem = Idempotency(store=MemoryStore(), observers=[self.events.append])
        self.begun: list[Any] = []
        self.worker: dramatiq.Worker | None = None
        broker.add_middleware(IdempotencyMiddleware())
        broker.add_middleware(AsyncIO())

    def actor(self, function: Callable[..., Any], **options: Any) -> Any:
        known: dict[str, Any] = {"key": "{order}", "idempotency": self.idem, "lease": 1.5}
        fields = {name: options.pop(name) for name in list(options) if name in {"max_attempts", "on_crash"}}
        decorated = idempotent_task(**known | fields)(function)
        return dramatiq.actor(broker=self.broker, queue_name=self.queue, min_backoff=50, **options)(decorated)

    def start(self) -> None:
        self.worker = dramatiq.Worker(self.broker, worker_timeout=100, worker_threads=3)
        self.worker.start()

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.stop()

    def names(self) -> list[str]:
        return [event.name.value for event in self.events]

    def wait(self, is_so: Callable[[], bool], what: str) -> None:
        wait_until(is_so, seconds=20, what=what)


@pytest.fixture(params=["rabbitmq", "redis"])
def shop(request: pytest.FixtureRequest, unique_name: str) -> Iterator[Shop]:
    """Each test runs on both brokers."""
    broker: dramatiq.Broker
    if request.param == "rabbitmq":
        broker = RabbitmqBroker(url=request.getfixturevalue("rabbitmq_url"), confirm_delivery=True)
    else:
        broker = RedisBroker(url=request.getfixturevalue("redis_url"))
    shop = Shop(broker, unique_name)
    yield shop
    shop.stop()
    if isinstance(broker, RabbitmqBroker):
        with Connection(request.getfixturevalue("rabbitmq_url")) as connection, connection.channel() as channel:
            for suffix in ("", ".DQ", ".XQ"):
                channel.queue_delete(unique_name + suffix)
    else:
        broker.client.close()
    broker.close()
    shop.idem.close()


def bare(order: str) -> None:
    """Is never called here."""


def dead_letters(shop: Shop) -> int:
    """How many messages Dramatiq keeps as dead."""
    if isinstance(shop.broker, RabbitmqBroker):
        return int(shop.broker.get_queue_message_counts(shop.queue)[2])
    return int(shop.broker.client.zcard(f"{shop.broker.namespace}:{shop.queue}.XQ"))  # type: ignore[attr-defined]


def test_a_message_that_was_sent_twice_runs_once(shop: Shop) -> None:
    """The second gets the recorded outcome."""

    def charge(order: str) -> None:
        shop.begun.append(order)

    actor = shop.actor(charge)
    for _ in range(2):
        actor.send("A-1")
    shop.start()
    shop.wait(lambda: "replayed" in shop.names(), "the duplicate")
    assert shop.begun == ["A-1"]


def test_what_is_in_progress_is_put_back_and_uses_up_no_retry(shop: Shop) -> None:
    """A copy waits at the broker until the first is done (F31, F40)."""
    release = threading.Event()

    def charge(order: str) -> None:
        shop.begun.append(order)
        release.wait(timeout=20)

    actor = shop.actor(charge, max_retries=0)
    for _ in range(2):
        actor.send("A-1")
    shop.start()
    shop.wait(lambda: shop.names().count("put_back") >= 2, "two times")
    release.set()
    shop.wait(lambda: "replayed" in shop.names(), "the duplicate")
    assert shop.begun == ["A-1"]
    assert [event.details["count"] for event in shop.events if event.name.value == "put_back"][:2] == [1, 2]
    assert dead_letters(shop) == 0


def test_a_copy_that_is_put_back_is_not_answered(redis_url: str, unique_name: str) -> None:
    """Who waits for the result of a message hears nothing before there is one."""
    broker = RedisBroker(url=redis_url)
    backend = RedisBackend(url=redis_url)
    broker.add_middleware(Results(backend=backend))
    shop = Shop(broker, unique_name)
    release = threading.Event()

    def charge(order: str) -> str:
        shop.begun.append(order)
        release.wait(timeout=20)
        return f"charged {order}"

    actor = shop.actor(charge, store_results=True)
    messages = [actor.send("A-1") for _ in range(2)]
    shop.start()
    shop.wait(lambda: "put_back" in shop.names(), "the duplicate")
    release.set()
    answers = [message.get_result(backend=backend, block=True, timeout=20_000) for message in messages]
    assert answers == ["charged A-1", "charged A-1"]
    assert shop.begun == ["A-1"]
    shop.stop()
    broker.close()
    for client in (broker.client, backend.client):
        client.close()


def test_a_handlers_own_exception_is_retried_by_dramatiq(shop: Shop) -> None:
    """Its claim is released before, so that the retry runs."""

    def charge(order: str) -> None:
        shop.begun.append(order)
        if len(shop.begun) == 1:
            raise ValueError(order)

    shop.actor(charge).send("A-1")
    shop.start()
    shop.wait(lambda: "completed" in shop.names(), "the retry")
    assert shop.begun == ["A-1", "A-1"]


def test_what_waits_for_a_person_is_a_dead_letter_at_once(shop: Shop) -> None:
    """A parked message is not retried."""

    def charge(order: str) -> None:
        shop.begun.append(order)
        raise ValueError(order)

    shop.actor(charge, max_attempts=2).send("A-1")
    shop.start()
    shop.wait(lambda: "dead_lettered" in shop.names(), "the dead letter")
    shop.wait(lambda: dead_letters(shop) == 1, "its queue")
    assert shop.begun == ["A-1", "A-1"]


def test_retry_says_that_nothing_has_happened(shop: Shop) -> None:
    """Under hold any other exception leaves the record in doubt."""

    def charge(order: str) -> None:
        shop.begun.append(order)
        if len(shop.begun) == 1:
            raise dramatiq.errors.Retry("later", delay=50)

    shop.actor(charge, on_crash="hold").send("A-1")
    shop.start()
    shop.wait(lambda: "completed" in shop.names(), "the retry")
    assert "in_doubt" not in shop.names()


def test_a_shutdown_in_mid_run_puts_the_message_back(shop: Shop) -> None:
    """It uses up no retry, and its claim is released."""
    threads: list[int] = []

    def charge(order: str) -> None:
        threads.append(threading.get_ident())
        until = time.monotonic() + 20
        while len(threads) == 1 and time.monotonic() < until:
            time.sleep(0.01)

    shop.actor(charge, max_retries=0).send("A-1")
    shop.start()
    shop.wait(lambda: len(threads) == 1, "the handler")
    raise_thread_exception(threads[0], Shutdown)
    shop.wait(lambda: "completed" in shop.names(), "the other delivery")
    assert "released" in shop.names()
    assert dead_letters(shop) == 0


def test_arguments_that_a_handler_changed_are_put_back_as_they_came(shop: Shop) -> None:
    """The copy is what was sent (F18)."""
    release = threading.Event()

    def charge(order: str, lines: list[str]) -> None:
        shop.begun.append(list(lines))
        lines.clear()
        if len(shop.begun) == 1:
            raise Shutdown("now")
        release.set()

    shop.actor(charge).send("A-1", ["book"])
    shop.start()
    assert release.wait(timeout=20)
    assert shop.begun == [["book"], ["book"]]


def test_coroutine_functions_are_settled_too(shop: Shop) -> None:
    """With Dramatiq's AsyncIO middleware, whose event loop is in a thread of its own."""

    async def charge(order: str) -> None:
        shop.begun.append(order)

    actor = shop.actor(charge)
    for _ in range(3):
        actor.send("A-1")
    shop.start()
    shop.wait(lambda: shop.names().count("replayed") == 2, "the duplicates")
    assert shop.begun == ["A-1"]


def test_a_direct_call_has_the_same_scope_and_its_own_errors(shop: Shop) -> None:
    """Calls and workers share the record."""

    def charge(order: str) -> str:
        shop.begun.append(order)
        return f"charged {order}"

    actor = shop.actor(charge)
    assert actor("A-1") == "charged A-1"
    actor.send("A-1")
    shop.start()
    shop.wait(lambda: "replayed" in shop.names(), "the message")
    assert shop.begun == ["A-1"]
    record = idempotency_of(actor).lookup("A-1")
    assert record is not None
    assert record.scope.endswith("charge")


def test_the_wrong_order_of_decorators_is_refused(shop: Shop) -> None:
    """Over `@dramatiq.actor` a worker would run the bare function."""
    actor = dramatiq.actor(broker=shop.broker, queue_name=shop.queue)(bare)
    with pytest.raises(ConfigurationError, match=r"goes under @dramatiq\.actor"):
        idempotent_task(key="{order}")(actor)


def test_a_broker_that_does_not_confirm_is_warned_of(
    rabbitmq_url: str, unique_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is put back could be lost (F60)."""
    broker = RabbitmqBroker(url=rabbitmq_url)
    broker.add_middleware(IdempotencyMiddleware())
    worker = dramatiq.Worker(broker, worker_timeout=100, worker_threads=1)
    worker.start()
    worker.stop()
    broker.close()
    assert any("confirm_delivery=True" in r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)


def test_a_wrong_delay_is_an_error_at_once() -> None:
    """Not when the first message is put back."""
    with pytest.raises(ConfigurationError, match="longest_delay"):
        IdempotencyMiddleware(longest_delay=0)


def test_a_killed_worker_leaves_its_message_to_the_next(
    rabbitmq_url: str, unique_name: str, sqlite_url: str, tmp_path: Path
) -> None:
    """RabbitMQ delivers it again, it is put back while the dead worker's lease runs, and then it runs once more."""
    ledger = tmp_path / "ledger"
    Idempotency.from_urls(database_url=sqlite_url).prepare()
    command = [sys.executable, str(HERE / "dramatiq_worker.py"), rabbitmq_url, sqlite_url, unique_name, str(ledger)]

    def lines() -> list[str]:
        return ledger.read_text().splitlines() if ledger.exists() else []

    broker = RabbitmqBroker(url=rabbitmq_url, confirm_delivery=True)
    actor = dramatiq.actor(actor_name="charge", broker=broker, queue_name=unique_name)(bare)
    with process([*command, "60"]) as first:
        actor.send("A-1")
        wait_until(lambda: lines() == ["begin A-1"], seconds=40, what="the handler")
        first.kill()
    with process([*command, "0"]):
        wait_until(lambda: lines()[-1] == "end A-1", seconds=40, what="the take-over")
    assert lines() == ["begin A-1", "begin A-1", "end A-1"]
    with broker.connection.channel() as channel:
        for suffix in ("", ".DQ", ".XQ"):
            channel.queue_delete(unique_name + suffix)
    broker.close()
