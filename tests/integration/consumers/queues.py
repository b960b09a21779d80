"""The queues of one test on RabbitMQ, as a publisher and a person see them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pika

from tests.services.waiting import wait_until


class Queues:
    def __init__(self, url: str, name: str) -> None:
        self.url = url
        self.name = name
        self.dead = f"{name}_dead"

    @contextmanager
    def channel(self) -> Iterator[Any]:
        connection = pika.BlockingConnection(pika.URLParameters(self.url))
        try:
            yield connection.channel()
        finally:
            connection.close()

    def declare(self, **arguments: Any) -> None:
        """Make both; `arguments` with underscores: `x_queue_type="quorum"`."""
        with self.channel() as channel:
            given = {name.replace("_", "-"): value for name, value in arguments.items()}
            channel.queue_declare(self.name, durable=True, arguments=given)
            channel.queue_declare(self.dead, durable=True)

    def delete(self) -> None:
        with self.channel() as channel:
            channel.queue_delete(self.name)
            channel.queue_delete(self.dead)

    def publish(self, body: str, key: str | None = "", **properties: Any) -> None:
        """Publish a message whose key is its body, or `key`, or that has none (None)."""
        headers = {} if key is None else {"Idempotency-Key": key or body}
        properties = {"content_type": "text/plain", "content_encoding": "utf-8", **properties}
        properties["headers"] = headers | properties.get("headers", {})
        with self.channel() as channel:
            channel.confirm_delivery()
            channel.basic_publish("", self.name, body, pika.BasicProperties(**properties), mandatory=True)

    def waiting(self) -> int:
        """How many messages are in the queue and with no consumer."""
        with self.channel() as channel:
            return int(channel.queue_declare(self.name, passive=True).method.message_count)

    def wait_for(self, number: int) -> None:
        """Wait until so many messages are in the queue, once the consumers are gone."""
        wait_until(lambda: self.waiting() == number, seconds=10, what=f"{number} messages in {self.name}")

    def next_dead_letter(self) -> tuple[Any, str]:
        """Return properties and body of the next dead letter, which is gone then."""
        deadline = time.monotonic() + 20
        with self.channel() as channel:
            while True:
                got, properties, body = channel.basic_get(self.dead, auto_ack=True)
                if got is not None:
                    return properties, body.decode()
                assert time.monotonic() < deadline, "no dead letter came"
                time.sleep(0.05)
