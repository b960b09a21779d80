"""Kafka by confluent-kafka."""

from __future__ import annotations

import json
from typing import Any

from confluent_kafka import Message, Producer

from idem_tasks.integrations.confluent_kafka import IdempotentConsumer
from tests.consumers.brokers.kafka import FIXTURE, SERVER, SESSION_SECONDS, dead_letters, declare, left, publish
from tests.consumers.consumer import Options
from tests.consumers.ledger import effect
from tests.consumers.plan import Plan

__all__ = ["FIXTURE", "PACE", "SERVER", "consume", "dead_letters", "declare", "left", "publish"]

PACE = {"kill_every": 6.0}
"""A group needs the session of the dead consumer, and a second or so, until another has its partitions."""


def consume(plan: Plan, options: Options) -> None:
    config = {
        "bootstrap.servers": plan.url,
        "group.id": plan.name,
        "auto.offset.reset": "earliest",
        "session.timeout.ms": round(SESSION_SECONDS * 1000),
        "heartbeat.interval.ms": 300,
    }

    def on_order(message: Message, session: Any) -> str:
        return effect(json.loads(message.value() or b"")["id"], session)

    IdempotentConsumer(
        config,
        on_order,
        workers=plan.workers,
        commit_every=0.3,
        dead_letter_topic=plan.dead,
        producer=Producer({"bootstrap.servers": plan.url, "linger.ms": 0}),
        **options.blocking(),
    ).run([plan.name])
