"""FastStream with its middleware, on a real RabbitMQ and a real NATS."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import nats
import pytest
import pytest_asyncio
from faststream import AckPolicy, BaseMiddleware, ContextRepo
from faststream.exceptions import AckMessage, NackMessage, RejectMessage
from faststream.message import StreamMessage
from faststream.nats import JStream, NatsBroker, PullSub
from faststream.rabbit import RabbitBroker, RabbitMessage, RabbitQueue
from kombu import Connection

from idem_tasks import ConfigurationError, Event, Idempotency, MemoryStore, idempotent_task
from idem_tasks.integrations.faststream import IdempotencyMiddleware, Message

pytestmark = pytest.mark.asyncio


@dataclass
class Receipt:
    order: str
    amount: int


class Shop:
    """A broker whose handlers are idempotent, its queue, and what happened."""

    def __init__(self, url: str, queue: str) -> None:
        self.url = url
        self.events: list[Event] = []
        self.idem = Idempotency(store=MemoryStore(), observers=[self.events.append])
        self.dead: list[tuple[bytes, Mapping[str, str]]] = []
        self.begun: list[str] = []
        self.replies: list[Any] = []
        self.queue = RabbitQueue(queue, durable=False)
        self.answers = RabbitQueue(f"{queue}_answers", durable=False)

    def broker(self, **options: Any) -> RabbitBroker:
        known: dict[str, Any] = {"idempotency": self.idem, "lease": 1.5, "dead_letter": self.keep}
        return RabbitBroker(self.url, middlewares=[IdempotencyMiddleware(**known | options)], logger=None)

    async def keep(self, message: Message, headers: Mapping[str, str]) -> None:
        self.dead.append((message.body, headers))

    def names(self) -> list[str]:
        return [event.name.value for event in self.events]


async def until(is_so: Callable[[], bool], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not is_so():  # noqa: ASYNC110 - nobody sets an event when a broker has done something
            await asyncio.sleep(0.02)


@pytest_asyncio.fixture
async def shop(rabbitmq_url: str, unique_name: str) -> AsyncIterator[Shop]:
    shop = Shop(rabbitmq_url, unique_name)
    yield shop
    async with RabbitBroker(rabbitmq_url, logger=None) as broker:
        for queue in (shop.queue, shop.answers):
            await (await broker.declare_queue(queue)).delete(if_unused=False, if_empty=False)
    await shop.idem.aclose()


async def take(broker: RabbitBroker, queue: RabbitQueue, seconds: float = 10.0) -> bytes:
    """Wait for a message that nobody consumes, and take it."""
    declared = await broker.declare_queue(queue)
    async with asyncio.timeout(seconds):
        while (message := await declared.get(fail=False)) is None:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.02)
    await message.ack()
    return message.body


async def test_a_duplicate_gets_the_recorded_outcome_and_its_answer_is_sent_again(shop: Shop) -> None:
    """The handler runs once, and what publishes its value publishes it twice, of the same type."""
    broker = shop.broker()

    @broker.subscriber(shop.queue)
    @broker.publisher(shop.answers)
    async def charge(order: str) -> Receipt:
        shop.begun.append(order)
        return Receipt(order, len(shop.begun))

    @broker.subscriber(shop.answers)
    async def answer(receipt: Receipt, message: RabbitMessage) -> None:
        shop.replies.append(receipt)

    async with broker:
        await broker.start()
        for _ in range(2):
            await broker.publish("A-1", shop.queue, message_id="m-1")
        await until(lambda: "replayed" in shop.names() and len(shop.replies) == 2)
    assert shop.begun == ["A-1"]
    assert shop.replies == [Receipt("A-1", 1)] * 2


@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function MemoryObject:pytest.PytestUnraisableExceptionWarning"
)
async def test_a_request_is_answered_again(shop: Shop) -> None:
    """A caller that sends its request once more hears what the first was told."""
    # FastStream 0.6 leaves the streams of a request to the garbage collector, hence the filter.
    broker = shop.broker()

    @broker.subscriber(shop.queue)
    async def charge(order: str) -> dict[str, int]:
        shop.begun.append(order)
        return {"receipt": len(shop.begun)}

    async with broker:
        await broker.start()
        answers = [
            await broker.request("A-1", shop.queue, headers={"Idempotency-Key": "k-1"}, timeout=10) for _ in range(2)
        ]
    assert [answer.body for answer in answers] == [b'{"receipt":1}', b'{"receipt":1}'] or [
        answer.body for answer in answers
    ] == [b'{"receipt": 1}'] * 2
    assert shop.begun == ["A-1"]


async def test_what_is_in_progress_is_put_back(shop: Shop) -> None:
    """Though FastStream would reject, and so drop, a message whose handler raised (F31)."""
    broker = shop.broker()
    release = asyncio.Event()

    @broker.subscriber(shop.queue)
    async def charge(order: str) -> None:
        shop.begun.append(order)
        await release.wait()

    async with broker:
        await broker.start()
        for _ in range(2):
            await broker.publish("A-1", shop.queue, message_id="m-1")
        await until(lambda: "put_back" in shop.names())
        release.set()
        await until(lambda: "replayed" in shop.names())
    assert shop.begun == ["A-1"]


async def test_a_poisonous_message_is_a_dead_letter(shop: Shop) -> None:
    """It is put back until its attempts are used up, and then given to `dead_letter` with the reason."""
    broker = shop.broker(max_attempts=2)

    @broker.subscriber(shop.queue)
    async def charge(order: str) -> None:
        shop.begun.append(order)
        raise ValueError(order)

    async with broker:
        await broker.start()
        await broker.publish("poison", shop.queue, message_id="m-1")
        await until(lambda: bool(shop.dead))
    ((body, headers),) = shop.dead
    assert body == b"poison"
    assert headers["idem_tasks_reason"] == "parked"
    assert headers["idem_tasks_origin"] == shop.queue.name
    assert shop.begun == ["poison", "poison"]


async def test_a_message_without_a_key_is_refused(shop: Shop) -> None:
    """FastStream makes up an id for each delivery; that is no key (F29)."""
    broker = shop.broker()

    @broker.subscriber(shop.queue)
    async def charge(order: str) -> None:
        shop.begun.append(order)

    async with broker:
        await broker.start()
        await asyncio.to_thread(publish_without_id, shop)
        await until(lambda: bool(shop.dead))
    assert shop.dead[0][1]["idem_tasks_reason"] == "invalid_key"
    assert shop.begun == []


def publish_without_id(shop: Shop) -> None:
    """As other clients do; FastStream's own give each message an id."""
    with Connection(shop.url) as connection, connection.Producer() as producer:
        producer.publish("A-1", routing_key=shop.queue.name)


@pytest.mark.parametrize("dead_letter", [None, "fails"])
async def test_without_a_road_for_dead_letters_nothing_is_dropped(
    shop: Shop, caplog: pytest.LogCaptureFixture, dead_letter: str | None
) -> None:
    """What should be a dead letter stays in its queue, and the log says why."""

    async def fails(message: Message, headers: Mapping[str, str]) -> None:
        raise OSError("no road")

    broker = shop.broker(on_error="dead_letter", dead_letter=None if dead_letter is None else fails, longest_delay=0.1)

    @broker.subscriber(shop.queue)
    async def charge(order: str) -> None:
        shop.begun.append(order)
        raise ValueError(order)

    async with broker:
        await broker.start()
        await broker.publish("A-1", shop.queue, message_id="m-1")
        await until(lambda: len(shop.begun) >= 3)
    async with RabbitBroker(shop.url, logger=None) as other:
        assert await take(other, shop.queue) == b"A-1"
    assert ("give dead_letter=" if dead_letter is None else "no road") in caplog.text


async def test_rejected_messages_go_where_the_broker_has_a_road_for_them(shop: Shop, unique_name: str) -> None:
    """`dead_letter="reject"` leaves a dead letter to the queue's own dead-letter exchange."""
    shop.queue = RabbitQueue(
        f"{unique_name}_dying",
        durable=False,
        arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": shop.answers.name},
    )
    broker = shop.broker(on_error="dead_letter", dead_letter="reject")

    @broker.subscriber(shop.queue)
    async def charge(order: str) -> None:
        raise ValueError(order)

    async with broker:
        await broker.declare_queue(shop.answers)
        await broker.start()
        await broker.publish("A-1", shop.queue, message_id="m-1")
        assert await take(broker, shop.answers) == b"A-1"


@pytest.mark.parametrize("decision", [AckMessage, NackMessage, RejectMessage])
async def test_what_a_handler_decides_itself_is_done(shop: Shop, decision: type[Exception]) -> None:
    """Its `AckMessage` is an end that is recorded; its Nack and Reject release the claim."""
    broker = shop.broker()

    @broker.subscriber(shop.queue)
    async def charge(order: str) -> None:
        shop.begun.append(order)
        if len(shop.begun) == 1:
            raise decision

    async with broker:
        await broker.start()
        await broker.publish("A-1", shop.queue, message_id="m-1")
        await until(lambda: bool(shop.begun))
        if decision is not NackMessage:
            await broker.publish("A-1", shop.queue, message_id="m-1")
        await until(lambda: "replayed" in shop.names() or len(shop.begun) == 2)
    assert len(shop.begun) == (1 if decision is AckMessage else 2)


@pytest.mark.parametrize("decorated", [False, True])
async def test_a_nack_of_the_handlers_own_says_that_nothing_has_happened(shop: Shop, decorated: bool) -> None:
    """It is no failure, neither to be counted nor recorded, and leaves no doubt; whoever claims the key."""
    options: dict[str, Any] = {"on_crash": "hold", "record_failures": (Exception,), "max_attempts": 1}
    broker = shop.broker(**({} if decorated else options))

    async def charge(order: str) -> None:
        shop.begun.append(order)
        if len(shop.begun) < 3:
            raise NackMessage

    known: dict[str, Any] = {"key": "{order}", "scope": "orders", "idempotency": shop.idem, **options}
    handler: Any = idempotent_task(**known)(charge) if decorated else charge
    broker.subscriber(shop.queue)(handler)
    async with broker:
        await broker.start()
        await broker.publish("A-1", shop.queue, message_id="m-1")
        await until(lambda: "completed" in shop.names())
    assert len(shop.begun) == 3


async def test_a_cancelled_handler_gives_its_message_back(shop: Shop) -> None:
    """FastStream 0.6 would reject it, which RabbitMQ drops, and later ones would keep it from others."""
    broker = shop.broker()
    running: list[Any] = []

    @broker.subscriber(shop.queue)
    async def charge(order: str) -> None:
        shop.begun.append(order)
        if len(shop.begun) == 1:
            running.append(asyncio.current_task())
            await asyncio.Event().wait()

    async with broker:
        await broker.start()
        await broker.publish("A-1", shop.queue, message_id="m-1")
        await until(lambda: bool(running))
        running[0].cancel()
        await until(lambda: "completed" in shop.names())
    assert shop.begun == ["A-1", "A-1"]


async def test_a_handler_whose_loop_is_gone_ends_quietly(shop: Shop) -> None:
    """Nothing can be awaited any more, neither by the decorator nor by the middleware."""
    broker = shop.broker()
    running: list[Any] = []

    @broker.subscriber(shop.queue)
    async def charge(order: str) -> None:
        running.append(order)
        await asyncio.Event().wait()

    [call] = broker.subscribers[0].calls
    middleware = IdempotencyMiddleware(idempotency=shop.idem)
    context = ContextRepo()
    message = StreamMessage[Any](None, b"A-1", message_id="m-1", headers={"Idempotency-Key": "k-1"})

    async def call_next(_: Any) -> None:
        await call.handler._original_call("A-1")

    with context.scope("handler_", broker.subscribers[0]):
        coroutine = middleware(None, context=context).consume_scope(call_next, message)
        coroutine.send(None)
        assert running == ["A-1"]
        coroutine.close()


async def test_handlers_that_do_not_agree_lose_no_message(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """Of one subscriber some are decorated and some are not: its messages come again, and the log says why."""
    broker = shop.broker(longest_delay=0.1)
    subscriber = broker.subscriber(shop.queue)

    @subscriber(filter=lambda message: message.content_type == "text/plain")
    @idempotent_task(key="{order}", idempotency=shop.idem)
    async def charge(order: str) -> None:
        shop.begun.append(order)

    @subscriber
    async def refund(order: str) -> None:
        shop.begun.append(order)

    async with broker:
        await broker.start()
        await broker.publish("A-1", shop.queue, message_id="m-1")
        await until(lambda: caplog.text.count("decorate all or none") >= 2)
    assert shop.begun == []
    async with RabbitBroker(shop.url, logger=None) as another:
        assert await take(another, shop.queue) == b"A-1"


async def test_an_ack_under_a_decorator_of_its_own_is_told_of(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """The decorator cannot tell it from a failure, so nothing is recorded, and the log says what to do."""
    broker = shop.broker()

    @broker.subscriber(shop.queue)
    @idempotent_task(key="{order}", scope="orders", idempotency=shop.idem)
    async def charge(order: str) -> None:
        raise AckMessage

    async with broker:
        await broker.start()
        await broker.publish("A-1", shop.queue)
        await until(lambda: "no outcome is recorded" in caplog.text)


async def test_an_outcome_that_could_not_be_published_is_published_later(shop: Shop) -> None:
    """The message comes again, and is replayed."""
    broker = shop.broker()
    commands: list[Any] = []

    class BreaksOnce(BaseMiddleware[Any, Any]):
        async def publish_scope(self, call_next: Callable[[Any], Any], cmd: Any) -> Any:
            if cmd.destination == shop.answers.name:
                commands.append(cmd.body)
                if len(commands) == 1:
                    raise OSError("the connection is gone")
            return await call_next(cmd)

    broker.add_middleware(BreaksOnce)

    @broker.subscriber(shop.queue)
    @broker.publisher(shop.answers)
    async def charge(order: str) -> str:
        shop.begun.append(order)
        return order

    async with broker:
        await broker.start()
        await broker.publish("A-1", shop.queue, message_id="m-1")
        await until(lambda: "replayed" in shop.names() and len(commands) == 2)
    assert (shop.begun, commands) == (["A-1"], ["A-1", "A-1"])


@pytest.mark.parametrize("asynchronous", [True, False])
async def test_a_decorated_handler_keeps_its_own_key(shop: Shop, asynchronous: bool) -> None:
    """The middleware adds how its message is settled; its arguments are FastStream's."""
    broker = shop.broker(longest_delay=0.1)

    def failing_once(order: str) -> str:
        shop.begun.append(order)
        if len(shop.begun) == 1:
            raise ValueError(order)
        return order

    async def failing_once_later(order: str) -> str:
        return failing_once(order)

    decorate = idempotent_task(key="{order}", scope="orders", idempotency=shop.idem)
    handler: Any = decorate(failing_once_later) if asynchronous else decorate(failing_once)
    broker.subscriber(shop.queue)(handler)
    async with broker:
        await broker.start()
        await broker.publish("A-1", shop.queue)
        await until(lambda: "completed" in shop.names())
        await broker.publish("A-1", shop.queue)
        await until(lambda: "replayed" in shop.names())
    assert shop.begun == ["A-1", "A-1"]
    assert await shop.idem.aget("orders", "A-1") is not None


async def test_messages_that_are_acknowledged_early_are_warned_of(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """A consumer that dies would lose them (F44)."""
    broker = shop.broker()

    @broker.subscriber(shop.queue, ack_policy=AckPolicy.ACK_FIRST)
    async def charge(order: str) -> None:
        shop.begun.append(order)

    async with broker:
        await broker.start()
        await broker.publish("A-1", shop.queue, message_id="m-1")
        await until(lambda: bool(shop.begun))
    assert any("AckPolicy.NACK_ON_ERROR" in r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)


async def test_a_wrong_option_is_an_error_at_once() -> None:
    """Not at the first message."""
    with pytest.raises(ConfigurationError, match="dead_letter='drop' must be"):
        IdempotencyMiddleware(dead_letter="drop")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="on_error"):
        IdempotencyMiddleware(on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError):
        IdempotencyMiddleware(lease=-1)


async def test_on_nats_the_server_keeps_what_is_put_back(nats_url: str, unique_name: str) -> None:
    """JetStream waits out the delay, and the place in its stream is a key."""
    events: list[Event] = []
    begun: list[str] = []
    middleware = IdempotencyMiddleware(idempotency=Idempotency(store=MemoryStore(), observers=[events.append]))
    broker = NatsBroker(nats_url, middlewares=[middleware], logger=None)
    stream = JStream(unique_name, subjects=[f"{unique_name}.*"])

    @broker.subscriber(f"{unique_name}.orders", stream=stream, durable="shop", pull_sub=PullSub(timeout=0.2))
    async def charge(order: str) -> None:
        begun.append(order)
        if len(begun) == 1:
            raise ValueError(order)

    async with broker:
        await broker.start()
        await broker.publish("A-1", f"{unique_name}.orders", stream=unique_name)
        await until(lambda: "completed" in [event.name.value for event in events])
    assert begun == ["A-1", "A-1"]
    assert events[-1].key == f"{unique_name}:1"
    client = await nats.connect(nats_url)
    await client.jetstream().delete_stream(unique_name)
    await client.close()


async def test_a_batch_is_refused(nats_url: str, unique_name: str, caplog: pytest.LogCaptureFixture) -> None:
    """It would have the key of its first message, and a duplicate of that would pass for all of them."""
    begun: list[Any] = []
    middleware = IdempotencyMiddleware(idempotency=Idempotency(store=MemoryStore()), longest_delay=0.1)
    broker = NatsBroker(nats_url, middlewares=[middleware], logger=None)
    stream, pull = JStream(unique_name, subjects=[f"{unique_name}.*"]), PullSub(batch=True, timeout=0.2)

    @broker.subscriber(f"{unique_name}.orders", stream=stream, durable="shop", pull_sub=pull)
    async def charge(orders: list[str]) -> None:
        begun.append(orders)

    async with broker:
        await broker.start()
        await broker.publish("A-1", f"{unique_name}.orders", stream=unique_name)
        await until(lambda: "this subscriber takes batches" in caplog.text)
    assert begun == []
    client = await nats.connect(nats_url)
    info = await client.jetstream().consumer_info(unique_name, "shop")
    assert (info.num_ack_pending or 0) + (info.num_pending or 0) == 1
    await client.jetstream().delete_stream(unique_name)
    await client.close()
