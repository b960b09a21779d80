"""NATS JetStream by nats-py: pull subscriptions of one durable consumer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import nats
from nats.aio.msg import Msg
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig
from nats.js.errors import NotFoundError

from idem_tasks.integrations.nats import idempotent_callback
from tests.consumers.consumer import Options
from tests.consumers.ledger import async_effect
from tests.consumers.plan import Plan
from tests.services.nats_server import NATSServer

T = TypeVar("T")

SERVER = NATSServer
FIXTURE = "nats_url"

CONSUMER = "shop"
ACK_WAIT = 1.5
"""Seconds until the messages of a consumer that was killed are delivered again."""


@asynccontextmanager
async def jetstream(plan: Plan) -> AsyncIterator[JetStreamContext]:
    client = await nats.connect(plan.url)
    try:
        yield client.jetstream()
    finally:
        await client.close()


def declare(plan: Plan) -> None:
    async def of(js: JetStreamContext) -> None:
        for name in (plan.name, plan.dead):
            with suppress(NotFoundError):
                await js.delete_stream(name)
            await js.add_stream(name=name, subjects=[name])
        await js.add_consumer(plan.name, ConsumerConfig(durable_name=CONSUMER, ack_wait=ACK_WAIT))

    _run(plan, of)


def publish(plan: Plan, keys: Sequence[str]) -> None:
    async def of(js: JetStreamContext) -> None:
        for key in keys:
            await js.publish(plan.name, json.dumps({"id": key}).encode(), headers={"Idempotency-Key": key})

    _run(plan, of)


def consume(plan: Plan, options: Options) -> None:
    async def of(js: JetStreamContext) -> None:
        @idempotent_callback(js, dead_letter_subject=plan.dead, **options.asynchronous())
        async def on_order(message: Msg, session: Any) -> str:
            return await async_effect(json.loads(message.data)["id"], session)

        subscription = await js.pull_subscribe_bind(CONSUMER, plan.name)
        async with asyncio.TaskGroup() as group:
            for _ in range(plan.workers):
                group.create_task(_work(subscription, on_order))

    _run(plan, of)


async def _work(subscription: JetStreamContext.PullSubscription, on_order: Any) -> None:
    while True:
        with suppress(NatsTimeoutError):
            for message in await subscription.fetch(1, timeout=1):
                await on_order(message)


def left(plan: Plan, *, running: bool) -> int:
    async def of(js: JetStreamContext) -> int:
        info = await js.consumer_info(plan.name, CONSUMER)
        return (info.num_pending or 0) + (info.num_ack_pending or 0)

    return _run(plan, of)


def dead_letters(plan: Plan) -> set[str]:
    async def of(js: JetStreamContext) -> set[str]:
        state = (await js.stream_info(plan.dead)).state
        messages = [await js.get_msg(plan.dead, number) for number in range(1, state.last_seq + 1)]
        return {str(json.loads(message.data or b"")["id"]) for message in messages}

    return _run(plan, of)


def _run(plan: Plan, of: Callable[[JetStreamContext], Awaitable[T]]) -> T:
    async def run() -> T:
        async with jetstream(plan) as js:
            return await of(js)

    return asyncio.run(run())
