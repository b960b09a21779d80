"""RabbitMQ by pika."""

from __future__ import annotations

import json
from typing import Any

import pika

from idem_tasks.integrations.pika import idempotent_callback
from tests.consumers.brokers.rabbitmq import FIXTURE, PREFETCH, SERVER, dead_letters, declare, left, publish
from tests.consumers.consumer import Options
from tests.consumers.ledger import effect
from tests.consumers.plan import Plan

__all__ = ["FIXTURE", "SERVER", "consume", "dead_letters", "declare", "left", "publish"]


def consume(plan: Plan, options: Options) -> None:
    @idempotent_callback(
        queue=plan.name,
        workers=plan.workers,
        dead_letter_exchange="",
        dead_letter_routing_key=plan.dead,
        **options.blocking(),
    )
    def on_order(channel: Any, method: Any, properties: Any, body: bytes, session: Any) -> str:
        return effect(json.loads(body)["id"], session)

    channel = pika.BlockingConnection(pika.URLParameters(plan.url)).channel()
    channel.basic_qos(prefetch_count=PREFETCH)
    channel.basic_consume(plan.name, on_order)
    channel.start_consuming()
