"""Kafka by aiokafka."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from idem_tasks.integrations.aiokafka import IdempotentConsumer
from tests.consumers.brokers.kafka import FIXTURE, SERVER, dead_letters, declare, left, publish
from tests.consumers.consumer import Options
from tests.consumers.ledger import async_effect
from tests.consumers.plan import Plan

__all__ = ["FIXTURE", "PACE", "SERVER", "consume", "dead_letters", "declare", "left", "publish"]

PACE = {"kill_every": 8.0, "consumers": 1, "messages": 200, "seconds": 90.0}
"""In librdkafka's mock cluster aiokafka works as the only member of its group."""

_SESSION_SECONDS = 6.0
"""For which aiokafka also waits for its group, and the mock cluster makes it wait 3 s."""


def consume(plan: Plan, options: Options) -> None:
    async def on_order(message: Any, session: Any) -> str:
        return await async_effect(json.loads(message.value)["id"], session)

    async def main() -> None:
        client = AIOKafkaConsumer(
            bootstrap_servers=plan.url,
            group_id=plan.name,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=round(_SESSION_SECONDS * 1000),
            heartbeat_interval_ms=300,
        )
        async with AIOKafkaProducer(bootstrap_servers=plan.url) as producer:
            await IdempotentConsumer(
                client,
                on_order,
                commit_every=0.3,
                dead_letter_topic=plan.dead,
                producer=producer,
                **options.asynchronous(),
            ).run([plan.name])

    asyncio.run(main())
