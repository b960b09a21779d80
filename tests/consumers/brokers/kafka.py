"""What all clients of Kafka have in common: two topics, which this looks at through confluent-kafka."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition

from tests.consumers.plan import Plan
from tests.services.kafka_server import KafkaServer, make_topic

SERVER = KafkaServer
FIXTURE = "kafka_bootstrap"

SESSION_SECONDS = 4.0
"""After which a group takes a killed consumer for dead. More than the 3 s for which a new group waits for members; real
brokers do not take less than 6 s unless they are told to."""


@contextmanager
def _reading(plan: Plan) -> Iterator[Consumer]:
    consumer = Consumer({"bootstrap.servers": plan.url, "group.id": plan.name, "enable.auto.commit": False})
    try:
        yield consumer
    finally:
        consumer.close()


def _places(plan: Plan, topic: str) -> list[TopicPartition]:
    return [TopicPartition(topic, number) for number in make_topic(plan.url, topic)]


def declare(plan: Plan) -> None:
    for name in (plan.name, plan.dead):
        make_topic(plan.url, name)


def publish(plan: Plan, keys: Sequence[str]) -> None:
    producer = Producer({"bootstrap.servers": plan.url})
    for key in keys:
        headers: Any = {"Idempotency-Key": key}
        producer.produce(plan.name, json.dumps({"id": key}), key, headers=headers)
        producer.poll(0)
    assert producer.flush(60) == 0


def left(plan: Plan, *, running: bool) -> int:
    """The lag of the group."""
    with _reading(plan) as consumer:
        ends = {}
        for place in _places(plan, plan.name):
            _, ends[place.partition] = consumer.get_watermark_offsets(place, timeout=30)
        committed = consumer.committed([TopicPartition(plan.name, number) for number in ends], timeout=30)
        return sum(ends[place.partition] - max(place.offset, 0) for place in committed)


def dead_letters(plan: Plan) -> set[str]:
    found: set[str] = set()
    with _reading(plan) as consumer:
        wanted = 0
        for place in _places(plan, plan.dead):
            low, high = consumer.get_watermark_offsets(place, timeout=30)
            wanted += high - low
            consumer.incremental_assign([TopicPartition(plan.dead, place.partition, 0)])
        while wanted:
            message = consumer.poll(30)
            assert message is not None
            assert message.error() is None
            found.add(str(json.loads(message.value() or b"")["id"]))
            wanted -= 1
    return found
