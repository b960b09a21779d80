"""What is aio-pika's own: the channel by which copies are published."""

from __future__ import annotations

import asyncio

import aio_pika
import pytest
from aio_pika.abc import AbstractIncomingMessage

from idem_tasks import Idempotency
from idem_tasks.integrations import aio_pika as of_aio_pika
from tests.integration.consumers.queues import Queues

pytestmark = pytest.mark.asyncio


async def test_copies_that_are_refused_do_not_use_up_the_channels(
    queues: Queues, idem: Idempotency, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection has 2,047 of them, and a dead letter is tried every second for as long as its queue is full."""
    monkeypatch.setattr(of_aio_pika, "PAUSE_AFTER_REFUSAL", 0.0)
    with queues.channel() as channel:
        channel.queue_delete(queues.dead)
        channel.queue_declare(queues.dead, durable=True, arguments={"x-max-length": 0, "x-overflow": "reject-publish"})
    tries, many = 0, asyncio.Event()

    def key(_: AbstractIncomingMessage) -> str:
        nonlocal tries
        tries += 1
        if tries == 10:
            many.set()
        return ""  # no key, so that it is a dead letter

    @of_aio_pika.idempotent_callback(
        queue=queues.name, key=key, idempotency=idem, dead_letter_exchange="", dead_letter_routing_key=queues.dead
    )
    async def on_message(message: AbstractIncomingMessage) -> None:
        """Is never called."""

    queues.publish("A-1")
    connection = await aio_pika.connect_robust(queues.url)
    try:
        queue = await (await connection.channel()).get_queue(queues.name)
        await queue.consume(on_message)
        await asyncio.wait_for(many.wait(), 20)
        assert connection.transport is not None
        assert len(connection.transport.connection.channels) <= 4
    finally:
        await connection.close()
        await idem.aclose()
    queues.wait_for(1)
