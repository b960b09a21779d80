"""The topics that a consumer of Kafka is given, before it connects."""

from __future__ import annotations

import pytest
from aiokafka import AIOKafkaConsumer

from idem_tasks import ConfigurationError, Idempotency, MemoryStore
from idem_tasks.integrations import aiokafka, confluent_kafka

pytestmark = pytest.mark.asyncio


async def mail(message: object) -> None:
    """Is never called."""


async def test_one_text_is_no_list_of_topics() -> None:
    """Aiokafka would consume a topic of each of its letters, and wait for ever."""
    idem = Idempotency(store=MemoryStore())
    client = AIOKafkaConsumer(group_id="mail", enable_auto_commit=False)
    with pytest.raises(ConfigurationError, match=r"run\(\['orders'\]\)"):
        await aiokafka.IdempotentConsumer(client, mail, idempotency=idem).run("orders")
    await client.stop()
    blocking = confluent_kafka.IdempotentConsumer({"group.id": "mail"}, print, idempotency=idem)
    with pytest.raises(ConfigurationError, match=r"run\(\['orders'\]\)"):
        blocking.run("orders")


async def test_a_client_that_has_topics_is_refused() -> None:
    """It would not tell of the partitions that it is given and loses."""
    client = AIOKafkaConsumer("orders", group_id="mail", enable_auto_commit=False)
    consumer = aiokafka.IdempotentConsumer(client, mail, idempotency=Idempotency(store=MemoryStore()))
    with pytest.raises(ConfigurationError, match="make it without, and give them to run"):
        await consumer.run(["orders"])
    await client.stop()
