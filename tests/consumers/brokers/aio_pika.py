"""RabbitMQ by aio-pika."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

from idem_tasks.integrations.aio_pika import idempotent_callback
from tests.consumers.brokers.rabbitmq import FIXTURE, PREFETCH, SERVER, dead_letters, declare, left, publish
from tests.consumers.consumer import Options
from tests.consumers.ledger import async_effect
from tests.consumers.plan import Plan

__all__ = ["FIXTURE", "SERVER", "consume", "dead_letters", "declare", "left", "publish"]


def consume(plan: Plan, options: Options) -> None:
    asyncio.run(_consume(plan, options))


async def _consume(plan: Plan, options: Options) -> None:
    @idempotent_callback(
        queue=plan.name, dead_letter_exchange="", dead_letter_routing_key=plan.dead, **options.asynchronous()
    )
    async def on_order(message: AbstractIncomingMessage, session: Any) -> str:
        return await async_effect(json.loads(message.body)["id"], session)

    connection = await aio_pika.connect(plan.url)
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=PREFETCH)
    queue = await channel.get_queue(plan.name)
    await queue.consume(on_order)
    await asyncio.Future()
