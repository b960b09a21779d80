"""A consumer of NATS JetStream: what becomes of its messages, on a real server."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import nats
import pytest
import pytest_asyncio
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from idem_tasks import ConfigurationError, Event, Idempotency, MemoryStore, SQLStore, idempotent_task
from idem_tasks.integrations.nats import idempotent_callback
from tests.integration.processes import process
from tests.services.nats_server import NATSServer
from tests.services.waiting import wait_until

pytestmark = pytest.mark.asyncio

HERE = Path(__file__).parent
DURABLE = "shop"


class Shop:
    """A stream, its consumer `shop`, and the records of what it did."""

    def __init__(self, client: Client, stream: str) -> None:
        self.client = client
        self.js = client.jetstream()
        self.stream = stream
        self.events: list[Event] = []
        self.idem = Idempotency(store=MemoryStore(), observers=[self.events.append])
        self.begun: list[str] = []

    async def begin(self, callback: Callable[[Msg], Any], queue: str | None = None, **config: Any) -> None:
        """Subscribe with a consumer of these settings."""
        await self.js.subscribe(
            f"{self.stream}.orders",
            queue=queue,
            durable=DURABLE,
            cb=callback,
            manual_ack=True,
            config=ConsumerConfig(**{"ack_wait": 1.0} | config),
        )

    def callback(self, handler: Callable[..., Any], **options: Any) -> Callable[[Msg], Any]:
        known: dict[str, Any] = {"idempotency": self.idem, "lease": 1.5}
        return idempotent_callback(self.js, **known | options)(handler)

    async def publish(self, body: str = "A-1", **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        await self.js.publish(f"{self.stream}.orders", body.encode(), headers=named or None)

    async def charge(self, message: Msg) -> str:
        """Handle a message at once."""
        self.begun.append(message.data.decode())
        return f"charged {message.data.decode()}"

    def names(self) -> list[str]:
        return [event.name.value for event in self.events]

    async def left(self) -> tuple[int, int]:
        """How many messages the consumer has not acknowledged, and not delivered yet."""
        info = await self.js.consumer_info(self.stream, DURABLE)
        return info.num_ack_pending or 0, info.num_pending or 0

    async def until_done(self, count: int) -> None:
        """Wait until so many calls ended in an outcome, run or replayed, and every message is acknowledged."""
        await until(lambda: sum(self.names().count(name) for name in ("completed", "replayed")) >= count)
        await until_async(self.left, (0, 0))

    async def dead_letter(self) -> Msg:
        """Wait for the next message on the dead-letter subject."""
        dead = await self.js.pull_subscribe(f"{self.stream}.dead", durable="dead")
        (message,) = await dead.fetch(1, timeout=10)
        await message.ack()
        return message


async def until(is_so: Callable[[], bool], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not is_so():  # noqa: ASYNC110 - nobody sets an event when a server has done something
            await asyncio.sleep(0.02)


async def until_async(ask: Callable[[], Any], expected: object, seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while await ask() != expected:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.02)


@pytest_asyncio.fixture
async def shop(nats_url: str, unique_name: str) -> AsyncIterator[Shop]:
    client = await nats.connect(nats_url)
    shop = Shop(client, unique_name)
    await shop.js.add_stream(name=unique_name, subjects=[f"{unique_name}.*"])
    yield shop
    await shop.js.delete_stream(unique_name)
    await client.close()
    await shop.idem.aclose()


async def test_a_message_that_was_published_twice_is_charged_once(shop: Shop) -> None:
    """The second gets the recorded outcome, and both are acknowledged."""
    await shop.begin(shop.callback(shop.charge))
    await shop.publish(Idempotency_Key="k-1")
    await shop.publish(Idempotency_Key="k-1")
    await shop.until_done(2)
    assert shop.begun == ["A-1"]
    record = await shop.idem.aget(f"{shop.stream}.{DURABLE}", "k-1")
    assert record is not None
    assert record.outcome == b'"charged A-1"'


async def test_messages_of_a_pull_subscription_are_settled_too(shop: Shop) -> None:
    """A fetched message is given to the same callback."""
    release = asyncio.Event()

    async def slow(message: Msg) -> str:
        await release.wait()
        return await shop.charge(message)

    subscription = await shop.js.pull_subscribe(f"{shop.stream}.orders", durable=DURABLE)
    callback = shop.callback(slow)
    for key in ("k-1", "k-1", "k-2"):
        await shop.publish(Idempotency_Key=key)
    messages = await subscription.fetch(3, timeout=5)
    running = asyncio.gather(*map(callback, messages))
    (again,) = await subscription.fetch(1, timeout=10)  # it met the other in progress
    release.set()
    await running
    await callback(again)
    await shop.until_done(3)
    assert shop.begun == ["A-1", "A-1"]


async def test_the_message_id_of_nats_is_a_key_and_so_is_the_place_in_the_stream(shop: Shop) -> None:
    """`Nats-Msg-Id` where it is given, else `stream:sequence`, which each delivery of a message has."""
    await shop.begin(shop.callback(shop.charge))
    await shop.publish(Nats_Msg_Id="m-1")
    await shop.publish()
    await shop.until_done(2)
    assert await shop.idem.aget(f"{shop.stream}.{DURABLE}", "m-1") is not None
    assert await shop.idem.aget(f"{shop.stream}.{DURABLE}", f"{shop.stream}:2") is not None


async def test_what_is_in_progress_is_put_back_until_it_is_done(shop: Shop) -> None:
    """A copy of a message that is being handled waits at the server, and is replayed then (F31)."""
    release = asyncio.Event()

    async def slow(message: Msg) -> str:
        await release.wait()
        return await shop.charge(message)

    for _ in range(2):
        await shop.begin(shop.callback(slow), queue=DURABLE)
    for _ in range(8):  # of which each of the two gets some
        await shop.publish(Idempotency_Key="k-1")
    await until(lambda: "put_back" in shop.names())
    release.set()
    await shop.until_done(8)
    assert shop.begun == ["A-1"]
    put_back = next(event for event in shop.events if event.name.value == "put_back")
    assert put_back.details["reason"] == "InProgressError"
    assert put_back.details["delay"] >= 0.5


async def test_a_handler_longer_than_ack_wait_is_delivered_once(shop: Shop) -> None:
    """The server hears that it is in progress, three times in each `ack_wait` (F24)."""
    deliveries: list[int] = []

    async def long(message: Msg) -> None:
        deliveries.append(message.metadata.num_delivered)
        await asyncio.sleep(3.5)

    await shop.begin(shop.callback(long))
    await shop.publish()
    await shop.until_done(1)
    info = await shop.js.consumer_info(shop.stream, DURABLE)
    assert (deliveries, info.num_redelivered) == ([1], 0)


async def test_a_handler_that_hangs_does_not_keep_its_message(shop: Shop) -> None:
    """After `max_hold` JetStream hears no more of it, and another delivery takes over (F2)."""

    async def hang_once(message: Msg) -> None:
        shop.begun.append(message.data.decode())
        if len(shop.begun) == 1:
            await asyncio.Event().wait()

    subscription = await shop.js.pull_subscribe(
        f"{shop.stream}.orders", durable=DURABLE, config=ConsumerConfig(ack_wait=1)
    )
    callback = shop.callback(hang_once, lease=1.0, max_hold=1.0)
    await shop.publish()
    (message,) = await subscription.fetch(1)
    hanging = asyncio.create_task(callback(message))
    (again,) = await subscription.fetch(1, timeout=10)
    await callback(again)
    await shop.until_done(1)
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging
    assert shop.begun == ["A-1", "A-1"]


async def test_a_killed_consumer_leaves_its_message_to_the_next(
    nats_url: str, shop: Shop, sqlite_url: str, tmp_path: Path
) -> None:
    """What it had begun runs again after its lease, and what it had done does not."""
    ledger = tmp_path / "ledger"
    await asyncio.to_thread(Idempotency.from_urls(database_url=sqlite_url).prepare)
    await shop.js.add_consumer(
        shop.stream,
        ConsumerConfig(
            durable_name=DURABLE,
            deliver_subject=f"{shop.stream}_push",
            filter_subject=f"{shop.stream}.orders",
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=1.0,
        ),
    )
    await shop.publish("A-1")
    with worker(nats_url, sqlite_url, shop.stream, ledger, seconds=60) as first:
        await asyncio.to_thread(wait_until, lambda: lines(ledger) == ["begin A-1"], seconds=40, what="the handler")
        first.kill()
        first.wait(timeout=10)
    with worker(nats_url, sqlite_url, shop.stream, ledger, seconds=0):
        await asyncio.to_thread(wait_until, lambda: lines(ledger)[-1] == "end A-1", seconds=40, what="the take-over")
        await until_async(shop.left, (0, 0))
    assert lines(ledger) == ["begin A-1", "begin A-1", "end A-1"]


def worker(
    url: str, database_url: str, stream: str, ledger: Path, *, seconds: float
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    command = [sys.executable, str(HERE / "nats_worker.py"), url, database_url, stream, str(ledger), str(seconds)]
    return process(command)


def lines(ledger: Path) -> list[str]:
    return ledger.read_text().splitlines() if ledger.exists() else [""]


@pytest.mark.parametrize("how", ["restart", "kill"])
async def test_a_server_that_restarts_in_mid_handler_changes_nothing(
    private_nats: Callable[..., NATSServer], unique_name: str, how: str
) -> None:
    """The handler goes on, and its message is acknowledged or replayed once the server is back."""
    server = private_nats()
    client = await nats.connect(server.url, reconnect_time_wait=0.1, error_cb=ignore)
    shop = Shop(client, unique_name)
    await shop.js.add_stream(name=unique_name, subjects=[f"{unique_name}.*"])
    begun, release = asyncio.Event(), asyncio.Event()

    async def slow(message: Msg) -> str:
        begun.set()
        await release.wait()
        return await shop.charge(message)

    await shop.begin(shop.callback(slow))
    await shop.publish()
    await begun.wait()
    await asyncio.to_thread(server.restart if how == "restart" else server.kill)
    if how == "kill":
        await asyncio.to_thread(server.start)
    release.set()
    await until(lambda: client.is_connected)
    await shop.until_done(1)
    assert shop.begun == ["A-1"]
    await client.close()


async def ignore(error: Exception) -> None:
    """A client says by itself that its server went away."""


async def test_an_acknowledgement_that_nobody_confirms_is_known(
    private_nats: Callable[..., NATSServer], unique_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that hangs just then has heard it, or delivers the message again and it is replayed."""
    server = private_nats()
    client = await nats.connect(server.url)
    shop = Shop(client, unique_name)
    await shop.js.add_stream(name=unique_name, subjects=[f"{unique_name}.*"])

    async def charge(message: Msg) -> str:
        await asyncio.to_thread(server.pause)
        return await shop.charge(message)

    await shop.begin(shop.callback(charge))
    await shop.publish()
    await until(lambda: "was not confirmed" in caplog.text)
    await asyncio.to_thread(server.resume)
    await shop.until_done(1)
    assert shop.begun == ["A-1"]
    await client.close()


async def test_what_cannot_be_put_back_comes_again_by_itself(
    shop: Shop, nats_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that is closed in mid-run leaves its message to JetStream."""
    other = await nats.connect(nats_url)
    subscription = await other.jetstream().pull_subscribe(
        f"{shop.stream}.orders", durable=DURABLE, config=ConsumerConfig(ack_wait=1)
    )

    async def fail(message: Msg) -> None:
        await other.close()
        raise ValueError

    await shop.publish()
    (message,) = await subscription.fetch(1)
    await shop.callback(fail)(message)
    assert "could not be put back" in caplog.text
    mine = await shop.js.pull_subscribe(f"{shop.stream}.orders", durable=DURABLE)
    (again,) = await mine.fetch(1, timeout=10)
    await shop.callback(shop.charge)(again)
    await shop.until_done(1)
    assert shop.begun == ["A-1"]


@pytest.mark.parametrize("raises", [False, True])
async def test_a_message_that_its_handler_settled_is_told_without_its_content(
    shop: Shop, caplog: pytest.LogCaptureFixture, raises: bool
) -> None:
    """The log says what to leave out, and does not quote the message, as the client's error does."""

    async def charge(message: Msg) -> None:
        await message.ack()
        if raises:
            raise ValueError

    await shop.begin(shop.callback(charge))
    await shop.publish("very secret")
    await until(lambda: "leave ack(), nak() and term() to the callback" in caplog.text)
    assert "very secret" not in caplog.text
    await until_async(shop.left, (0, 0))


async def test_what_cannot_be_done_is_a_dead_letter_with_its_reason(shop: Shop) -> None:
    """A poisonous message is put back until its attempts are used up, then kept where a person finds it."""

    async def fail(message: Msg) -> None:
        shop.begun.append(message.data.decode())
        raise ValueError(message.data.decode())

    await shop.begin(shop.callback(fail, max_attempts=2, dead_letter_subject=f"{shop.stream}.dead", longest_delay=0.1))
    await shop.publish("poison", Nats_Msg_Id="m-1", Trace="t-1")
    dead = await shop.dead_letter()
    assert dead.data == b"poison"
    assert dead.headers is not None
    own_id = dead.headers.pop("Nats-Msg-Id")  # the message's would make a stream drop it as a duplicate
    assert own_id.startswith(f"{shop.stream}:1:20")
    assert own_id.endswith(f":{DURABLE}:parked")
    assert dead.headers == {
        "Trace": "t-1",
        "Idempotency-Key": "m-1",  # so that it is the same message when a person sends it again
        "idem_tasks_reason": "parked",
        "idem_tasks_error_type": "ParkedError",
        "idem_tasks_origin": f"{shop.stream}.orders",
        "idem_tasks_scope": f"{shop.stream}.{DURABLE}",
        "idem_tasks_key": "m-1",
    }
    await until_async(shop.left, (0, 0))
    assert shop.begun == ["poison", "poison"]


async def test_a_key_cannot_add_a_header_to_a_dead_letter(shop: Shop) -> None:
    """A line break in a key is shown as one, and ends no line."""

    async def fail(message: Msg) -> None:
        raise ValueError

    callback = shop.callback(
        fail, key=lambda _: "a\nb", on_error="dead_letter", dead_letter_subject=f"{shop.stream}.dead", max_attempts=1
    )
    await shop.begin(callback)
    await shop.publish()
    await shop.publish()
    reasons = [(await shop.dead_letter()).headers or {} for _ in range(2)]
    assert [headers["idem_tasks_reason"] for headers in reasons] == ["handler_error", "parked"]
    assert reasons[1]["idem_tasks_key"] == r"a\nb"


@pytest.mark.parametrize("subject", [None, "nobody_keeps_this"])
async def test_without_a_road_for_dead_letters_nothing_is_dropped(
    shop: Shop, caplog: pytest.LogCaptureFixture, subject: str | None
) -> None:
    """What should be a dead letter is put back, and the log says what to give."""
    deliveries: list[int] = []

    async def charge(message: Msg) -> None:
        deliveries.append(message.metadata.num_delivered)
        raise ValueError

    callback = shop.callback(charge, on_error="dead_letter", dead_letter_subject=subject, longest_delay=0.1)
    await shop.begin(callback)
    await shop.publish()
    await until(lambda: len(deliveries) >= 3)
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    wanted = "give dead_letter_subject=" if subject is None else "could not be published to nobody_keeps_this"
    assert any(wanted in error for error in errors)
    assert sum(await shop.left()) == 1


async def test_a_consumer_of_its_own_dead_letters_does_not_make_more_of_them(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """A dead letter that comes back and would be one again is put back, and the log says what to change."""
    callback = shop.callback(
        shop.charge, key=lambda _: "", dead_letter_subject=f"{shop.stream}.dead", longest_delay=0.1
    )
    config = ConsumerConfig(ack_wait=1.0)
    await shop.js.subscribe(f"{shop.stream}.*", durable=DURABLE, cb=callback, manual_ack=True, config=config)
    await shop.publish()
    await until(lambda: shop.names().count("dead_lettered") >= 4)
    assert (await shop.js.stream_info(shop.stream)).state.messages == 2
    assert "its consumer takes those too" in caplog.text


async def test_a_cancelled_handler_gives_its_message_back(shop: Shop) -> None:
    """Its claim is released and the message comes again at once, not after its `ack_wait`."""
    begun = asyncio.Event()

    async def endless(message: Msg) -> None:
        begun.set()
        await asyncio.Event().wait()

    subscription = await shop.js.pull_subscribe(
        f"{shop.stream}.orders", durable=DURABLE, config=ConsumerConfig(ack_wait=60)
    )
    await shop.publish()
    (message,) = await subscription.fetch(1)
    call = asyncio.create_task(shop.callback(endless)(message))
    await begun.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    (again,) = await subscription.fetch(1, timeout=5)
    await shop.callback(shop.charge)(again)
    await shop.until_done(1)
    assert (shop.begun, again.metadata.num_delivered) == (["A-1"], 2)


async def test_a_cancellation_comes_too_late_for_what_is_recorded(
    private_nats: Callable[..., NATSServer], unique_name: str
) -> None:
    """Struck while the acknowledgement is under way, a message is not given back, nor made a dead letter."""
    server = private_nats()
    client = await nats.connect(server.url)
    shop = Shop(client, unique_name)
    await shop.js.add_stream(name=unique_name, subjects=[f"{unique_name}.*"])
    subscription = await shop.js.pull_subscribe(
        f"{unique_name}.orders", durable=DURABLE, config=ConsumerConfig(ack_wait=30, max_deliver=1)
    )

    async def charge(message: Msg) -> str:
        await asyncio.to_thread(server.pause)
        return await shop.charge(message)

    await shop.publish()
    (message,) = await subscription.fetch(1)
    call = asyncio.create_task(shop.callback(charge, dead_letter_subject=f"{unique_name}.dead")(message))
    await until(lambda: "completed" in shop.names())
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.to_thread(server.resume)
    await until_async(shop.left, (0, 0))
    assert (await shop.js.stream_info(unique_name)).state.messages == 1
    await client.close()


async def test_the_last_delivery_of_a_message_is_not_given_up(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """Where `max_deliver` would drop what is put back, it is kept and tried again here (F40)."""
    deliveries: list[int] = []

    async def fail_twice(message: Msg) -> None:
        deliveries.append(message.metadata.num_delivered)
        if len(deliveries) < 4:
            raise ValueError

    await shop.begin(shop.callback(fail_twice, longest_delay=0.2), max_deliver=2)
    await shop.publish()
    await shop.until_done(1)
    assert deliveries == [1, 2, 2, 2]
    assert "gives a message up after 2 deliveries" in caplog.text


async def test_a_last_delivery_that_is_cancelled_is_a_dead_letter(shop: Shop) -> None:
    """JetStream would not deliver it again, so a person gets it (F40)."""
    begun = asyncio.Event()

    async def endless(message: Msg) -> None:
        begun.set()
        await asyncio.Event().wait()

    subscription = await shop.js.pull_subscribe(
        f"{shop.stream}.orders", durable=DURABLE, config=ConsumerConfig(max_deliver=1)
    )
    await shop.publish()
    (message,) = await subscription.fetch(1)
    call = asyncio.create_task(shop.callback(endless, dead_letter_subject=f"{shop.stream}.dead")(message))
    await begun.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert ((await shop.dead_letter()).headers or {})["idem_tasks_reason"] == "max_deliver"
    assert await shop.left() == (0, 0)


@pytest.mark.parametrize("policy", [AckPolicy.NONE, AckPolicy.ALL])
async def test_a_consumer_that_acknowledges_by_itself_is_refused(shop: Shop, policy: AckPolicy) -> None:
    """A message could be acknowledged before its handler ran (F44)."""
    subscription = await shop.js.subscribe(
        f"{shop.stream}.orders", durable=DURABLE, config=ConsumerConfig(ack_policy=policy)
    )
    await shop.publish()
    with pytest.raises(ConfigurationError, match=r"AckPolicy\.EXPLICIT"):
        await shop.callback(shop.charge)(await subscription.next_msg(timeout=5))
    assert shop.begun == []


async def test_a_consumer_without_a_name_of_its_own_needs_a_scope(shop: Shop) -> None:
    """An ephemeral consumer has another name after a restart, under which no outcome would be found."""
    subscription = await shop.js.subscribe(f"{shop.stream}.orders")
    await shop.publish()
    message = await subscription.next_msg(timeout=5)
    with pytest.raises(ConfigurationError, match="not durable"):
        await shop.callback(shop.charge)(message)
    await shop.callback(shop.charge, scope="shop")(message)
    assert shop.begun == ["A-1"]


async def test_a_decorated_handler_keeps_its_own_key(shop: Shop) -> None:
    """The callback adds to it only how its messages are settled."""

    @idempotent_task(key=lambda message: message.data.decode(), scope="orders", fingerprint=None, idempotency=shop.idem)
    async def charge(message: Msg) -> str:
        return await shop.charge(message)

    await shop.begin(idempotent_callback(shop.js)(charge))
    await shop.publish()
    await shop.publish()
    await shop.until_done(2)
    assert shop.begun == ["A-1"]
    assert await shop.idem.aget("orders", "A-1") is not None


async def test_a_plain_function_is_refused(shop: Shop) -> None:
    """A callback of nats-py is a coroutine function."""

    def charge(message: Msg) -> None:
        """Nothing."""

    with pytest.raises(ConfigurationError, match="async def"):
        shop.callback(charge)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_rows_of_a_session_are_written_once(shop: Shop, postgres_url: str, driver: str) -> None:
    """Every message is delivered twice, and its row and its outcome are one transaction."""
    url = make_url(postgres_url).set(drivername=f"postgresql+{driver}")
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE sold (id SERIAL PRIMARY KEY, name TEXT)"))
    idem = Idempotency(
        store=SQLStore(url.render_as_string(hide_password=False), create_schema=True), observers=[shop.events.append]
    )

    async def sell(message: Msg, session: Any) -> None:
        await session.execute(text("INSERT INTO sold (name) VALUES (:name)"), {"name": message.data.decode()})

    await shop.begin(shop.callback(sell, idempotency=idem, session=async_sessionmaker(engine)), ack_wait=10)
    for number in range(20):
        for _ in range(2):
            await shop.publish(str(number), Idempotency_Key=f"k-{number}")
    await shop.until_done(40)
    async with engine.connect() as connection:
        found = (await connection.execute(text("SELECT name FROM sold ORDER BY id"))).scalars().all()
    assert found == [str(number) for number in range(20)]
    await engine.dispose()
    await idem.aclose()
