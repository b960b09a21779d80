"""A handler of aio-pika that acknowledges its message itself, and a consumer that has nothing acknowledged."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractIncomingMessage

from idem_tasks import Idempotency
from idem_tasks.integrations.aio_pika import idempotent_callback
from tests.integration.consumers.queues import Queues
from tests.integration.consumers.rigs import Heard

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("no_ack", [False, True], ids=["by the handler", "by no_ack"])
async def test_a_message_that_was_settled_before_its_outcome_is_told_without_its_content(
    queues: Queues, idem: Idempotency, heard: Heard, caplog: pytest.LogCaptureFixture, no_ack: bool
) -> None:
    """The log says what to leave out, and does not quote the message, as the client's error does."""

    @idempotent_callback(queue=queues.name, idempotency=idem)
    async def on_message(message: AbstractIncomingMessage) -> None:
        if not no_ack:
            await message.ack()

    queues.publish("very secret", "A-1")
    connection = await aio_pika.connect_robust(queues.url)
    try:
        queue = await (await connection.channel()).get_queue(queues.name)
        options: dict[str, Any] = {"no_ack": True} if no_ack else {}
        with caplog.at_level(logging.WARNING, "idem_tasks"):
            await queue.consume(on_message, **options)
            async with asyncio.timeout(20):
                while not caplog.records:  # noqa: ASYNC110 - nobody sets an event when something is logged
                    await asyncio.sleep(0.02)
    finally:
        await connection.close()
        await idem.aclose()
    [record] = caplog.records
    assert "leave ack(), reject() and process() to the callback" in record.message
    assert "A-1" not in record.message
    assert heard.count("completed") == 1
