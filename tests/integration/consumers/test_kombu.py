"""What is kombu's own: the loop that has to call back, brokers other than RabbitMQ, Celery's messages."""

from __future__ import annotations

from contextlib import closing
from typing import Any
from unittest import mock

import pytest
from kombu import Connection, Queue

from idem_tasks import ConfigurationError, Idempotency
from idem_tasks.integrations.kombu_consumer import idempotent_callback
from tests.integration.consumers.rigs import Heard, KombuRig


class RedisRig(KombuRig):
    transport_options = {"visibility_timeout": 3}  # noqa: RUF012 - nobody changes it


def publish(url: str, queue: str, body: Any, **options: Any) -> None:
    options = {"headers": {"Idempotency-Key": body}, **options}
    with Connection(url) as connection, connection.Producer() as producer:
        producer.publish(body, routing_key=queue, declare=[Queue(queue, exchange="", routing_key=queue)], **options)


def waiting(url: str, queue: str) -> int:
    with Connection(url) as connection:
        return int(connection.default_channel.client.llen(queue) + connection.default_channel.client.hlen("unacked"))


@pytest.fixture
def url(redis_url: str) -> str:
    return redis_url


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"priority": 3}], ids=str)
def test_a_message_on_redis_is_put_back_and_then_replayed(
    url: str, unique_name: str, idem: Idempotency, heard: Heard, options: dict[str, Any]
) -> None:
    """As on RabbitMQ, and nothing is left, neither waiting nor unacknowledged (F31)."""
    with idem.claim(scope=unique_name, key="A-1", fingerprint=b"A-1") as claim:
        publish(url, unique_name, "A-1", **options)
        with RedisRig(url, unique_name, idem, lambda _: None) as consumer:
            heard.wait_for("put_back", 2)
            claim.complete("done")
            heard.wait_for("replayed")
    assert consumer.begun == []
    assert waiting(url, unique_name) == 0


def test_a_message_on_redis_is_never_held_for_a_quarter_of_its_visibility_timeout(
    url: str, unique_name: str, idem: Idempotency, heard: Heard
) -> None:
    """Or it would be delivered again while it is held, and twice as often each time (F64)."""
    with idem.claim(scope=unique_name, key="A-1", fingerprint=b"A-1") as claim:
        publish(url, unique_name, "A-1")
        with RedisRig(url, unique_name, idem, lambda _: None, longest_delay=300.0):
            heard.wait_for("put_back", 3)
            claim.complete("done")
            heard.wait_for("replayed")
    delays = [event.details["delay"] for event in heard.events if event.name.value == "put_back"]
    assert max(delays) < 3 / 4


@pytest.mark.parametrize("exchange", ["", "no_such_exchange"])
def test_dead_letters_on_redis(url: str, unique_name: str, idem: Idempotency, heard: Heard, exchange: str) -> None:
    """They go to a queue; without a queue that takes them they stay, though Redis itself would drop them."""
    publish(url, unique_name, "A-1", headers={})
    road = {"dead_letter_exchange": exchange, "dead_letter_routing_key": f"{unique_name}_dead"}
    with RedisRig(url, unique_name, idem, lambda _: None, **road):
        heard.wait_for("dead_lettered", 2 if exchange else 1)
    if exchange:
        assert waiting(url, unique_name) == 1
        return
    with Connection(url) as connection, closing(connection.SimpleQueue(f"{unique_name}_dead")) as dead:
        message = dead.get(timeout=10)
        message.ack()
    assert (message.payload, message.headers["idem_tasks_reason"]) == ("A-1", "invalid_key")
    assert waiting(url, unique_name) == 0


def test_the_id_of_a_celery_task_is_a_key(url: str, unique_name: str, idem: Idempotency, heard: Heard) -> None:
    """Of a message without any other."""
    for _ in range(2):
        publish(url, unique_name, "A-1", headers={"id": "0b0f1a"})
    with RedisRig(url, unique_name, idem, lambda _: None) as consumer:
        heard.wait_for("replayed")
    assert consumer.handled == ["A-1"]
    assert idem.get(unique_name, "0b0f1a") is not None


def test_a_loop_that_does_not_call_back_is_refused(idem: Idempotency) -> None:
    """With the first message, before anything runs: what is held would be held for ever."""

    @idempotent_callback(queue="orders", idempotency=idem)
    def on_order(body: str, message: Any) -> None: ...

    with pytest.raises(ConfigurationError, match=r"on_iteration = callback\.on_iteration"):
        on_order("A-1", mock.sentinel.message)
