"""What is pika's own: worker threads, the heartbeats that go on meanwhile, and the end of a consumer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pika
import pytest

from idem_tasks import ConfigurationError, Idempotency
from idem_tasks.integrations.pika import idempotent_callback
from tests.integration.consumers.queues import Queues
from tests.integration.consumers.rigs import Heard, PikaRig
from tests.services.fixtures import private
from tests.services.rabbitmq_server import RabbitMQServer
from tests.services.run import Run
from tests.services.waiting import wait_until


def test_a_handler_may_take_longer_than_the_heartbeat_interval(queues: Queues, idem: Idempotency) -> None:
    """Its connection stays, and its message is delivered once."""
    queues.publish("A-1")
    url = f"{queues.url}?heartbeat=1"  # cut by RabbitMQ after 2 s without one
    with PikaRig(url, queues.name, idem, lambda _: time.sleep(4)) as consumer:
        consumer.wait_for("A-1")
    assert (consumer.begun, consumer.connections) == (["A-1"], 1)
    queues.wait_for(0)


def test_the_end_waits_for_running_handlers(queues: Queues, idem: Idempotency) -> None:
    """What runs is finished and acknowledged, and what has not begun goes back to the queue."""
    begun, go_on = threading.Event(), threading.Event()

    def work(body: str) -> None:
        begun.set()
        go_on.wait(10)

    for number in range(3):
        queues.publish(f"A-{number}")
    consumer = PikaRig(queues.url, queues.name, idem, work, workers=1)
    with consumer:
        assert begun.wait(10)
        consumer._stop.set()
        wait_until(lambda: consumer.callback._closed, seconds=10, what="the end to begin")
        go_on.set()
    assert consumer.handled == consumer.begun == ["A-0"]
    queues.wait_for(2)


def test_a_handler_that_exits_ends_nothing_else(queues: Queues, idem: Idempotency) -> None:
    """SystemExit in a worker thread puts its message back, and the consumer goes on."""
    queues.publish("A-1")
    left = iter([SystemExit(1)])

    def work(body: str) -> None:
        for error in left:
            raise error

    with PikaRig(queues.url, queues.name, idem, work) as consumer:
        consumer.wait_for("A-1")
    assert consumer.begun == ["A-1", "A-1"]
    queues.wait_for(0)


def test_a_message_that_cannot_be_settled_stays(
    queues: Queues, idem: Idempotency, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A defect is logged with its traceback, holds up no end, and leaves the message to the broker."""
    queues.publish("A-1")
    consumer = PikaRig(queues.url, queues.name, idem, lambda _: None)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(consumer.callback.handler, "settle", fail)
    with consumer:
        consumer.wait_for("A-1")
    assert "could not be settled" in caplog.text
    queues.wait_for(1)


class ImpatientRabbitMQ(RabbitMQServer):
    """Looks every half second, not every minute, whether a message has been held for too long."""

    def environment(self) -> dict[str, str]:
        arguments = "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS"
        environment = super().environment()
        return environment | {arguments: f"{environment[arguments]} -rabbit channel_tick_interval 500"}


@pytest.fixture
def impatient_rabbitmq(service_run: Run) -> Iterator[RabbitMQServer]:
    with private(ImpatientRabbitMQ, service_run) as start:
        yield start(consumer_timeout=1000)


def test_a_handler_that_outlasts_the_consumer_timeout(
    impatient_rabbitmq: RabbitMQServer, idem: Idempotency, heard: Heard, unique_name: str
) -> None:
    """RabbitMQ takes its message away and delivers it again: that copy is put back, and then gets the outcome (F24)."""
    queues = Queues(impatient_rabbitmq.url, unique_name)
    queues.declare()
    queues.publish("A-1")
    go_on = threading.Event()
    with PikaRig(queues.url, queues.name, idem, lambda _: go_on.wait(30)) as consumer:
        heard.wait_for("put_back")
        go_on.set()
        heard.wait_for("replayed")
    assert (consumer.begun, consumer.handled) == (["A-1"], ["A-1"])
    assert consumer.connections > 1
    queues.wait_for(0)


def test_other_connections_are_refused(idem: Idempotency) -> None:
    """With the first message, before anything runs."""

    @idempotent_callback(queue="orders", idempotency=idem)
    def on_order(channel: Any, method: Any, properties: Any, body: bytes) -> None: ...

    with pytest.raises(ConfigurationError, match="BlockingConnection"):
        on_order(Channel(), None, pika.BasicProperties(), b"")
    on_order.close()


class Channel:
    """One of a SelectConnection, say."""

    connection = object()


def test_workers_are_counted(idem: Idempotency) -> None:
    """None is an error at decoration."""
    with pytest.raises(ConfigurationError, match="workers=0"):
        idempotent_callback(queue="orders", idempotency=idem, workers=0)
