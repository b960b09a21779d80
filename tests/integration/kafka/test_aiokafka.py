"""Messages of Kafka through aiokafka: run once, in their order, committed behind their outcomes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from idem_tasks import ConfigurationError, Idempotency, current_claim
from idem_tasks.claims import State
from idem_tasks.integrations.aiokafka import IdempotentConsumer
from tests.integration.kafka.topics import SECONDS, Topic
from tests.services.kafka_server import KafkaServer

pytestmark = pytest.mark.asyncio


def client_of(topic: Topic, **options: Any) -> AIOKafkaConsumer:
    return AIOKafkaConsumer(
        bootstrap_servers=topic.bootstrap,
        group_id=topic.group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        session_timeout_ms=6000,
        **options,
    )


@asynccontextmanager
async def consuming(topic: Topic, handler: Callable[..., Any], **options: Any) -> AsyncIterator[asyncio.Task[None]]:
    """Run a consumer in a task, until the block ends."""
    client = options.pop("client", None) or client_of(topic)
    consumer = IdempotentConsumer(client, handler, **{"commit_every": 0.1, "longest_delay": 0.3, **options})
    task = asyncio.create_task(consumer.run([topic.name]))
    yield task
    consumer.stop()
    if not task.cancelled():
        await asyncio.wait_for(task, SECONDS)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not await asyncio.to_thread(is_so):  # noqa: ASYNC110 - the broker tells of no event
            await asyncio.sleep(0.05)


async def test_messages_run_once_and_are_committed(topic: Topic, idem: Idempotency) -> None:
    """A duplicate is replayed, a key in progress holds up its partition only, what is poisoned is a dead letter."""
    handled = []

    async def handler(message: Any) -> str:
        await asyncio.sleep(0)
        if message.value == b"bad":
            raise ValueError
        handled.append((message.value.decode(), current_claim().key))
        return "done"

    for _ in range(2):
        topic.publish("one", Idempotency_key="A-1")
        topic.publish("two", ce_source="/shop", ce_id="e-1")
    topic.publish("bad", partition=1, trace="t-1")
    topic.publish("three", partition=1)
    topic.publish("busy", partition=2, Idempotency_key="A-2")
    topic.publish("behind it", partition=2)
    async with (
        AIOKafkaProducer(bootstrap_servers=topic.bootstrap) as producer,
        idem.aclaim(scope=topic.scope, key="A-2", fingerprint=b"busy") as claim,
        consuming(
            topic,
            handler,
            idempotency=idem,
            record_failures=(ValueError,),
            dead_letter_topic=topic.dead,
            producer=producer,
        ),
    ):
        await until(lambda: (topic.committed(0), topic.committed(1)) == (4, 2))
        assert topic.committed(2) == 0
        await claim.complete("done elsewhere")
        await until(lambda: topic.committed(2) == 2)
    assert [key for _, key in handled if "/" in key or key == "A-1"] == ["A-1", "/shop e-1"]
    assert min(handled) == ("behind it", f"{topic.name}:2:1")
    assert len(handled) == 4
    (dead,) = topic.dead_letters(1)
    assert (dead.key(), dead.value()) == (b"a key", b"bad")
    assert dict(dead.headers() or ()) == {
        "trace": b"t-1",
        "idem_tasks_reason": b"failed",
        "idem_tasks_error_type": b"ValueError",
        "idem_tasks_origin": f"{topic.name}:1:0".encode(),
    }
    await idem.aclose()


async def test_a_dead_letter_that_the_producer_refuses_is_none(
    topic: Topic, idem: Idempotency, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again, with an ERROR, and other partitions go on; one of nothing at all is taken."""
    handled = []

    async def handler(message: Any) -> None:
        if message.partition != 2:
            raise ValueError
        handled.append(message.value)

    topic.publish('{"order": 1}')
    topic.producer.produce(topic.name, None, key=None, partition=1, headers={"nothing": None, "bytes": b"\xff"})
    topic.producer.flush()
    client = client_of(topic, value_deserializer=lambda value: value and json.loads(value))
    async with (
        AIOKafkaProducer(bootstrap_servers=topic.bootstrap) as producer,
        consuming(
            topic,
            handler,
            idempotency=idem,
            client=client,
            record_failures=(ValueError,),
            dead_letter_topic=topic.dead,
            producer=producer,
        ),
    ):
        await until(lambda: caplog.text.count(f"{topic.name}:0:0 is no dead letter yet") == 2)
        topic.publish('{"order": 2}', partition=2)
        await until(lambda: (topic.committed(1), topic.committed(2)) == (1, 1))
        assert topic.committed(0) == 0
    assert handled == [{"order": 2}]
    (dead,) = topic.dead_letters(1)
    assert dict(dead.headers() or ())["bytes"] == b"\xff"
    await idem.aclose()


async def test_a_consumer_whose_brokers_are_gone_can_be_stopped(
    private_kafka: Callable[..., KafkaServer], unique_name: str, idem: Idempotency
) -> None:
    """Its last commit is lost, which costs a replay."""
    handled = []

    async def handler(message: Any) -> None:
        handled.append(message.value)

    server = private_kafka()
    topic = Topic(server.url, unique_name)
    topic.publish("message")
    async with consuming(topic, handler, idempotency=idem, commit_every=600.0):
        await until(lambda: handled == [b"message"])
        server.kill()
    topic.close()
    await idem.aclose()


async def test_batches_are_awaited_too(topic: Topic, idem: Idempotency) -> None:
    """A batch has as many as there are when its first message has waited, and its duplicates are replayed."""
    batches = []

    async def handler(messages: list[Any]) -> list[str]:
        await asyncio.sleep(0)
        batches.append([message.value.decode() for message in messages])
        return ["done"] * len(messages)

    for value in ("one", "two", "one"):
        topic.publish(value, Idempotency_key=value)
    async with consuming(topic, handler, idempotency=idem, batch=True, batch_wait=0.5):
        await until(lambda: topic.committed() == 3)
    assert batches == [["one", "two"]]
    await idem.aclose()


async def test_a_cancelled_consumer_gives_its_claims_back(topic: Topic, idem: Idempotency) -> None:
    """Nothing is committed, and another consumer runs the message at once; a long handler there is no trouble."""
    begun = asyncio.Event()

    async def hangs(_message: Any) -> None:
        begun.set()
        await asyncio.sleep(SECONDS)

    async def is_long(_message: Any) -> None:
        await asyncio.sleep(2.5)  # longer than max_poll_interval_ms

    topic.publish("message")
    key = f"{topic.name}:0:0"
    async with consuming(topic, hangs, idempotency=idem) as task:
        await asyncio.wait_for(begun.wait(), SECONDS)
        task.cancel()
        await asyncio.wait([task])
    record = await idem.aget(topic.scope, key)
    assert record is not None
    assert (record.state, topic.committed()) == (State.RELEASED, 0)
    async with consuming(topic, is_long, idempotency=idem, client=client_of(topic, max_poll_interval_ms=1000)):
        await until(lambda: topic.committed() == 1)
    record = await idem.aget(topic.scope, key)
    assert record is not None
    assert record.attempts == 2
    await idem.aclose()


async def test_what_cannot_work_is_refused_at_once() -> None:
    """The error names what to change; auto-commit would lose messages whose worker dies (F44)."""

    async def handler(_message: Any) -> None: ...

    def plain(_message: Any) -> None: ...

    refused: list[tuple[dict[str, Any], Any, dict[str, Any], str]] = [
        ({"group_id": "g"}, handler, {}, "enable_auto_commit=False"),
        ({"enable_auto_commit": False}, handler, {}, "group_id"),
        ({"enable_auto_commit": False, "group_id": "g"}, handler, {"dead_letter_topic": "dead"}, "producer="),
        ({"enable_auto_commit": False, "group_id": "g"}, plain, {}, "async def"),
        ({"enable_auto_commit": False, "group_id": "g"}, handler, {"watermark": True}, "session="),
    ]
    for config, given, options, says in refused:
        client = AIOKafkaConsumer(**config)
        with pytest.raises(ConfigurationError, match=says):
            IdempotentConsumer(client, given, **options)
        await client.stop()
