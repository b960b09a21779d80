"""What all clients of RabbitMQ have in common: two queues, which this looks at through pika."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pika

from tests.consumers.plan import Plan
from tests.services.rabbitmq_server import RabbitMQServer
from tests.services.waiting import wait_until

SERVER = RabbitMQServer
FIXTURE = "rabbitmq_url"

PREFETCH = 16


@contextmanager
def channel_of(plan: Plan) -> Iterator[Any]:
    connection = pika.BlockingConnection(pika.URLParameters(plan.url))
    try:
        yield connection.channel()
    finally:
        connection.close()


def declare(plan: Plan) -> None:
    with channel_of(plan) as channel:
        for name in (plan.name, plan.dead):
            channel.queue_declare(name, durable=True)
            channel.queue_purge(name)


def publish(plan: Plan, keys: Sequence[str]) -> None:
    with channel_of(plan) as channel:
        channel.confirm_delivery()
        for key in keys:
            properties = pika.BasicProperties(
                headers={"Idempotency-Key": key}, content_type="application/json", delivery_mode=2
            )
            channel.basic_publish("", plan.name, json.dumps({"id": key}), properties, mandatory=True)


def left(plan: Plan, *, running: bool) -> int:
    with channel_of(plan) as channel:

        def declared() -> Any:
            return channel.queue_declare(plan.name, passive=True).method

        if not running:  # what a dead consumer held is in the queue again once its connection is gone
            wait_until(lambda: declared().consumer_count == 0, seconds=10, what="the end of dead consumers")
        return int(declared().message_count)


def dead_letters(plan: Plan) -> set[str]:
    found = set()
    with channel_of(plan) as channel:
        while (got := channel.basic_get(plan.dead))[0] is not None:
            found.add(str(json.loads(got[2])["id"]))
            channel.basic_ack(got[0].delivery_tag)
    return found
