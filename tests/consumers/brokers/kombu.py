"""RabbitMQ by kombu."""

from __future__ import annotations

from typing import Any

from kombu import Connection, Queue
from kombu.mixins import ConsumerMixin

from idem_tasks.integrations.kombu_consumer import IdempotentCallback, idempotent_callback
from tests.consumers.brokers.rabbitmq import FIXTURE, PREFETCH, SERVER, dead_letters, declare, left, publish
from tests.consumers.consumer import Options
from tests.consumers.ledger import effect
from tests.consumers.plan import Plan

__all__ = ["FIXTURE", "SERVER", "consume", "dead_letters", "declare", "left", "publish"]


def consume(plan: Plan, options: Options) -> None:
    @idempotent_callback(
        queue=plan.name, dead_letter_exchange="", dead_letter_routing_key=plan.dead, **options.blocking()
    )
    def on_order(body: dict[str, str], message: Any, session: Any) -> str:
        return effect(body["id"], session)

    with Connection(plan.url) as connection:
        Consumers(connection, Queue(plan.name, no_declare=True), on_order).run()  # type: ignore[no-untyped-call]


class Consumers(ConsumerMixin):
    def __init__(self, connection: Connection, queue: Queue, callback: IdempotentCallback) -> None:
        self.connection = connection
        self.queue = queue
        self.callback = callback

    def on_iteration(self) -> None:
        self.callback.on_iteration()

    def get_consumers(self, consumer: Any, channel: Any) -> list[Any]:
        return [consumer([self.queue], callbacks=[self.callback], prefetch_count=PREFETCH)]
