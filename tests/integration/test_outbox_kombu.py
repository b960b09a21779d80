"""Messages through kombu: what a broker gets, and that it may be away."""

from __future__ import annotations

import os
import signal
import time
from contextlib import closing
from typing import Any

import pytest
from kombu import Connection, Exchange, Queue

from idem_tasks import (
    ConfigurationError,
    Idempotency,
    MessageError,
    OutboxMessage,
    RelayReport,
    SQLStore,
    current_claim,
)
from idem_tasks.integrations.kombu import KombuSender
from tests.services.rabbitmq_server import RabbitMQServer
from tests.services.redis_server import RedisServer

SECONDS = 30.0


def received(url: str, queue: str, number: int) -> list[Any]:
    with Connection(url) as connection, closing(connection.SimpleQueue(queue)) as messages:
        found = [messages.get(timeout=10) for _ in range(number)]
        for message in found:
            message.ack()
    return found


def publishing(idem: Idempotency, key: str, *bodies: Any, **options: Any) -> list[str]:
    def handler() -> list[str]:
        return [current_claim().publish_message(body, to="broker", **options) for body in bodies]

    return idem.run(handler, scope="s", key=key)


@pytest.fixture(params=["rabbitmq_url", "redis_url"])
def broker_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(request.param)
    return url


def test_what_a_broker_gets(broker_url: str, sqlite_url: str, unique_name: str) -> None:
    """The body as JSON, the id as message and correlation id, headers, scope and key; in order."""
    sender = KombuSender(broker_url)
    with Idempotency(store=SQLStore(sqlite_url), senders={"broker": sender}, observers=[]) as idem, closing(sender):
        ids = publishing(idem, "k", {"n": 1}, ["ä"], queue=unique_name, headers={"tenant": "t"})
        messages = received(broker_url, unique_name, 2)
    assert [message.payload for message in messages] == [{"n": 1}, ["ä"]]
    assert [message.properties["message_id"] for message in messages] == ids
    assert [message.properties["correlation_id"] for message in messages] == ids
    assert {name: messages[0].headers[name] for name in ("tenant", "scope", "key")} == {
        "tenant": "t", "scope": "s", "key": "k",
    }  # fmt: skip


def test_a_message_that_no_queue_takes_stays(rabbitmq_url: str, sqlite_url: str, unique_name: str) -> None:
    """RabbitMQ returns it: it is not gone, and is sent once there is a queue."""
    sender = KombuSender(rabbitmq_url, exchange=unique_name)
    with (
        Idempotency(store=SQLStore(sqlite_url), senders={"broker": sender}, observers=[]) as idem,
        closing(sender),
        Connection(rabbitmq_url) as connection,
    ):
        exchange = Exchange(unique_name, "topic", channel=connection.default_channel, auto_delete=True)
        exchange.declare()
        publishing(idem, "k", 1, routing_key="order.paid")
        assert idem.relay().left == 1
        publishing(idem, "l", 2, routing_key="order.paid", mandatory=False)
        assert idem.relay().left == 1, "that one may be lost"
        Queue(unique_name, exchange, routing_key="order.#", channel=connection.default_channel).declare()
        time.sleep(1.1)  # a message that failed waits for a second
        assert idem.relay() == RelayReport(sent=1, failed=0, left=0)
        with closing(connection.SimpleQueue(Queue(unique_name, exchange, routing_key="order.#"))) as messages:
            assert messages.get(timeout=5).payload == 1


def test_wrong_options_are_refused_at_publish(sqlite_url: str) -> None:
    """Nothing is connected to."""
    sender = KombuSender("amqp://localhost:1//", exchange="x")
    with Idempotency(store=SQLStore(sqlite_url), senders={"broker": sender}, observers=[]) as idem:
        with pytest.raises(ConfigurationError, match="unknown options: queu;"):
            publishing(idem, "k", 1, queu="x")
        with pytest.raises(ConfigurationError, match="either to a queue or to an exchange"):
            publishing(idem, "k", 1, queue="x")
        with pytest.raises(ConfigurationError, match="needs a queue, an exchange or a routing_key"):
            publishing(idem, "k", 1, exchange="")
        assert idem.relay().left == 0


@pytest.mark.parametrize(
    "options",
    [
        {"priority": "high"}, {"priority": -1}, {"priority": 256}, {"expiration": "soon"}, {"expiration": -1},
        {"routing_key": "r" * 256}, {"routing_key": "ä" * 128}, {"exchange": 1}, {"exchange": "x" * 256},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_can_never_be_sent_are_refused(sqlite_url: str, options: dict[str, Any]) -> None:
    """At publish, and as defaults at once: such a message would hold up its key for ever."""
    name = next(iter(options))
    with pytest.raises(ConfigurationError, match=name):
        KombuSender("amqp://localhost:1//", **options)
    sender = KombuSender("amqp://localhost:1//", exchange="x")
    with Idempotency(store=SQLStore(sqlite_url), senders={"broker": sender}, observers=[]) as idem:
        with pytest.raises(ConfigurationError, match=name):
            publishing(idem, "k", 1, **options)
        assert idem.relay().left == 0
    KombuSender("amqp://localhost:1//", queue="ä" * 127, priority=255, expiration=0.5, mandatory=False)


@pytest.mark.parametrize("headers", [{"n": 2**63}, {"a": [{"n": 2**63}]}, {"n" * 256: 1}, {"a": {"n" * 256: 1}}])
def test_headers_that_can_never_be_sent_are_refused(sqlite_url: str, headers: dict[str, Any]) -> None:
    """AMQP holds names of 255 bytes and numbers of 64 bits."""
    sender = KombuSender("amqp://localhost:1//", exchange="x")
    with Idempotency(store=SQLStore(sqlite_url), senders={"broker": sender}, observers=[]) as idem:
        with pytest.raises(MessageError, match="header"):
            publishing(idem, "k", 1, headers=headers)
        assert idem.relay().left == 0


def test_what_amqp_can_just_hold_is_sent(rabbitmq_url: str, sqlite_url: str, unique_name: str) -> None:
    """The longest names, the largest numbers."""
    headers = {"n" * 255: [-(2**63), 2**63 - 1, None, 0.5, True, {"a": "b"}]}
    sender = KombuSender(rabbitmq_url, priority=255, expiration=60)
    with Idempotency(store=SQLStore(sqlite_url), senders={"broker": sender}, observers=[]) as idem, closing(sender):
        publishing(idem, "k", 1, queue=unique_name, headers=headers)
        [message] = received(rabbitmq_url, unique_name, 1)
    assert message.headers == {**headers, "scope": "s", "key": "k"}


def test_a_child_that_is_forked_in_mid_send_sends(rabbitmq_url: str, unique_name: str) -> None:
    """It has no thread that would let go of the lock; its connection is its own, and the parent's goes on."""
    sender = KombuSender(rabbitmq_url, queue=unique_name)
    message = OutboxMessage("0" * 32, "s", "k", 1, 0, "broker", b'{"body":1,"headers":{},"options":{}}')
    sender(message)
    with sender._lock:  # as another thread has it that sends
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            failed = 1
            try:
                sender.close()
                sender(message)
                failed = 0
            finally:
                os._exit(failed)
        status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 0
    sender(message)
    sender.close()
    assert len(received(rabbitmq_url, unique_name, 3)) == 3


@pytest.mark.parametrize("fixture", ["private_rabbitmq", "private_redis"])
def test_a_broker_that_is_down(request: pytest.FixtureRequest, fixture: str, sqlite_url: str, unique_name: str) -> None:
    """The calls succeed and the rows stay; once it is back they are sent, in order, each once."""
    server: RabbitMQServer | RedisServer = request.getfixturevalue(fixture)()
    sender = KombuSender(server.url, queue=unique_name)
    with Idempotency(store=SQLStore(sqlite_url), senders={"broker": sender}, observers=[]) as idem, closing(sender):
        publishing(idem, "before", 0)
        assert received(server.url, unique_name, 1)[0].payload == 0
        server.stop()
        publishing(idem, "k", 1, 2, 3)
        assert idem.relay().left == 3
        server.start()
        deadline = time.monotonic() + SECONDS
        while idem.relay().left:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        messages = received(server.url, unique_name, 3)
    assert [message.payload for message in messages] == [1, 2, 3]
