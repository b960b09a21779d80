"""A topic and a consumer group of one test's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from confluent_kafka import Consumer, Message, Producer, TopicPartition

from idem_tasks.integrations.confluent_kafka import IdempotentConsumer
from tests.services.kafka_server import make_topic
from tests.services.waiting import wait_until

SECONDS = 40.0
"""For what takes four: a group needs 3 s to begin, and this machine may be busy."""

PARTITIONS = 4
"""Of a topic that the mock cluster makes, and that of docker-compose.yml."""


class Topic:
    """Four partitions, what is published in them, and how far the group has committed them."""

    def __init__(self, bootstrap: str, name: str) -> None:
        self.bootstrap, self.name, self.group, self.dead = bootstrap, name, f"group_{name}", f"{name}_dead"
        self.scope = f"{name}/{self.group}"
        self.producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0})
        self._reader = Consumer({"bootstrap.servers": bootstrap, "group.id": self.group, "enable.auto.commit": False})
        for topic in (self.name, self.dead):
            assert len(make_topic(bootstrap, topic)) == PARTITIONS

    @property
    def config(self) -> dict[str, Any]:
        """A consumer's, whose death is noticed soon: but later than a new group waits for members, which is 3 s."""
        return {
            "bootstrap.servers": self.bootstrap,
            "group.id": self.group,
            "auto.offset.reset": "earliest",
            "session.timeout.ms": 4000,
            "heartbeat.interval.ms": 200,
        }

    def publish(self, value: str, *, partition: int = 0, **headers: str) -> None:
        named: Any = [(name.replace("_key", "-key"), text.encode()) for name, text in headers.items()]
        self.producer.produce(self.name, value, key="a key", partition=partition, headers=named)
        assert self.producer.flush(30) == 0

    def committed(self, partition: int = 0) -> int:
        (place,) = self._reader.committed([TopicPartition(self.name, partition)], timeout=30)
        return max(place.offset, 0)

    def dead_letters(self, number: int) -> list[Message]:
        """As many as are expected, once they are there."""
        found: list[Message] = []
        self._reader.assign([TopicPartition(self.dead, partition, 0) for partition in range(PARTITIONS)])

        def all_there() -> bool:
            message = self._reader.poll(0.1)
            if message is not None and message.error() is None:
                found.append(message)
            return len(found) >= number

        wait_until(all_there, seconds=SECONDS, what=f"{number} dead letters")
        return found

    def close(self) -> None:
        self._reader.close()


@contextmanager
def consuming(topic: Topic, handler: Callable[..., Any], **options: Any) -> Iterator[IdempotentConsumer]:
    """Run a consumer in a thread, until the block ends; raises what `run` raises."""
    errors: list[BaseException] = []
    options = {"commit_every": 0.1, "longest_delay": 0.3, **options}
    consumer = IdempotentConsumer(options.pop("client", topic.config), handler, **options)

    def run() -> None:
        try:
            consumer.run([topic.name])
        except BaseException as error:  # noqa: BLE001 - the test raises it
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield consumer
    finally:
        consumer.stop()
        thread.join(SECONDS)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
