"""Taskiq tasks with the decorator and the middleware, on a real RabbitMQ."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Self

import aio_pika
import pytest
import pytest_asyncio
from taskiq import Context, InMemoryBroker, SimpleRetryMiddleware, TaskiqDepends, TaskiqMessage, TaskiqMiddleware
from taskiq.api import run_receiver_task
from taskiq.result_backends.dummy import DummyResultBackend
from taskiq_aio_pika import AioPikaBroker

from idem_tasks import (
    ConfigurationError,
    Event,
    Idempotency,
    MemoryStore,
    Policy,
    StoreUnavailableError,
    idempotency_of,
    idempotent_task,
)
from idem_tasks.integrations.taskiq import IdempotencyMiddleware
from tests.integration.processes import process
from tests.services.waiting import wait_until

pytestmark = pytest.mark.asyncio

HERE = Path(__file__).parent


def new_broker(url: str, name: str) -> AioPikaBroker:
    """Make a broker of one queue, that knows of no other test's."""
    names = {"queue": name, "dead_letter_queue": f"{name}_dead", "delay_queue": f"{name}_delay"}
    try:
        from taskiq_aio_pika import Exchange, Queue, QueueType
    except ImportError:  # before 0.6
        options: dict[str, Any] = {f"{option}_name": value for option, value in names.items()}
        return AioPikaBroker(url, exchange_name=f"{name}_exchange", **options)
    queues: dict[str, Any] = {option: Queue(name=value, type=QueueType.CLASSIC) for option, value in names.items()}
    task_queues = [queues.pop("queue")]
    return AioPikaBroker(url, exchange=Exchange(name=f"{name}_exchange"), task_queues=task_queues, **queues)


async def remove(url: str, name: str) -> None:
    """Delete what `new_broker` declared."""
    connection = await aio_pika.connect(url)
    channel = await connection.channel()
    for queue in (name, f"{name}_dead", f"{name}_delay"):
        await channel.queue_delete(queue)
    await channel.exchange_delete(f"{name}_exchange")
    await connection.close()


class Shop:
    """A broker, a worker in this process, and what happened."""

    def __init__(self, url: str, name: str) -> None:
        self.broker = new_broker(url, name)
        self.events: list[Event] = []
        self.idem = Idempotency(store=MemoryStore(), observers=[self.events.append])
        self.begun: list[Any] = []
        self.saved: list[Any] = []
        self.broker.with_result_backend(Saving(self.saved))

    def task(self, function: Callable[..., Any], **labels: Any) -> Any:
        known: dict[str, Any] = {"key": "{order}", "idempotency": self.idem, "lease": 1.5, "fingerprint": None}
        return self.broker.task(task_name=function.__name__, **labels)(idempotent_task(**known)(function))

    def names(self) -> list[str]:
        return [event.name.value for event in self.events]


class Saving(DummyResultBackend[Any]):
    """Keeps each result, as a backend would."""

    def __init__(self, saved: list[Any]) -> None:
        super().__init__()
        self.saved = saved

    async def set_result(self, task_id: str, result: Any) -> None:
        self.saved.append((task_id, result.return_value if result.error is None else type(result.error)))


class Worker:
    """Taskiq's receiver in a task of this loop."""

    def __init__(self, broker: AioPikaBroker) -> None:
        self.broker = broker

    async def __aenter__(self) -> None:
        self.broker.is_worker_process = True
        await self.broker.startup()
        self.receiving = asyncio.create_task(run_receiver_task(self.broker))

    async def __aexit__(self, *error: object) -> None:
        self.receiving.cancel()
        with suppress(asyncio.CancelledError):
            await self.receiving
        await self.broker.shutdown()


async def until(is_so: Callable[[], bool], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not is_so():  # noqa: ASYNC110 - nobody sets an event when a broker has done something
            await asyncio.sleep(0.02)


@pytest_asyncio.fixture
async def shop(rabbitmq_url: str, unique_name: str) -> AsyncIterator[Shop]:
    shop = Shop(rabbitmq_url, unique_name)
    yield shop
    await remove(rabbitmq_url, unique_name)
    await shop.idem.aclose()
    shop.idem.close()


async def test_a_task_that_was_sent_twice_runs_once(shop: Shop) -> None:
    """The second succeeds with the recorded outcome."""
    shop.broker.add_middlewares(IdempotencyMiddleware())

    async def charge(order: str) -> str:
        shop.begun.append(order)
        return f"charged {order}"

    task = shop.task(charge)
    async with Worker(shop.broker):
        sent = [await task.kiq("A-1") for _ in range(2)]
        await until(lambda: len(shop.saved) == 2)
    assert shop.begun == ["A-1"]
    assert sorted(shop.saved) == sorted((each.task_id, "charged A-1") for each in sent)


@pytest.mark.parametrize("delay_label", [None, "delay"])
@pytest.mark.parametrize("asynchronous", [True, False])
async def test_what_is_in_progress_is_put_back(shop: Shop, asynchronous: bool, delay_label: str | None) -> None:
    """Held by this worker, or with a delay by the broker; nobody is answered before there is an outcome (F31)."""
    shop.broker.add_middlewares(IdempotencyMiddleware(delay_label=delay_label))
    release = threading.Event()

    def charge(order: str) -> str:
        shop.begun.append(order)
        release.wait(timeout=20)
        return f"charged {order}"

    async def charge_later(order: str) -> str:
        return await asyncio.to_thread(charge, order)

    task = shop.task(charge_later if asynchronous else charge)
    async with Worker(shop.broker):
        sent = [await task.kiq("A-1") for _ in range(2)]
        await until(lambda: "put_back" in shop.names())
        assert shop.saved == []
        release.set()
        await until(lambda: len(shop.saved) == 2)
    assert shop.begun == ["A-1"]
    assert sorted(shop.saved) == sorted((each.task_id, "charged A-1") for each in sent)


async def test_a_retry_of_taskiq_runs(shop: Shop) -> None:
    """The claim of a handler that raised is released, and the delay of a put-back is not that of the retry."""
    shop.broker.add_middlewares(SimpleRetryMiddleware(), IdempotencyMiddleware(delay_label="delay"))

    async def charge(order: str) -> None:
        shop.begun.append(order)
        if len(shop.begun) == 1:
            raise ValueError(order)

    task = shop.task(charge, retry_on_error=True, max_retries=3)
    async with Worker(shop.broker):
        await task.kiq("A-1")
        await until(lambda: "completed" in shop.names())
    assert shop.begun == ["A-1", "A-1"]


async def test_what_a_handler_requeues_comes_again(shop: Shop) -> None:
    """`Context.requeue` releases the claim, and says that nothing has happened."""
    shop.broker.add_middlewares(IdempotencyMiddleware())

    async def charge(order: str, context: Context = TaskiqDepends()) -> None:  # noqa: B008 - Taskiq's way
        shop.begun.append(order)
        if len(shop.begun) == 1:
            await context.requeue()

    task = shop.task(charge)
    async with Worker(shop.broker):
        await task.kiq("A-1")
        await until(lambda: "completed" in shop.names())
    assert shop.begun == ["A-1", "A-1"]


async def test_a_broker_that_takes_nothing_is_tried_until_it_does(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The copy that the worker got is not acknowledged before."""
    shop.broker.add_middlewares(IdempotencyMiddleware())
    release = asyncio.Event()
    kick = shop.broker.kick
    refused: list[Any] = []

    async def charge(order: str) -> None:
        shop.begun.append(order)
        await release.wait()

    async def refuse_once(message: Any) -> None:
        if not refused:
            refused.append(message)
            raise OSError("the connection is gone")
        await kick(message)

    task = shop.task(charge)
    async with Worker(shop.broker):
        for _ in range(2):
            await task.kiq("A-1")
        monkeypatch.setattr(shop.broker, "kick", refuse_once)
        await until(lambda: "put_back" in shop.names())
        release.set()
        await until(lambda: "replayed" in shop.names())
    assert len(refused) == 1
    assert "could not be put back, and is tried again" in caplog.text
    assert shop.begun == ["A-1"]


async def test_a_direct_call_shares_the_record(shop: Shop) -> None:
    """Its scope is the same, and it has no message."""
    shop.broker.add_middlewares(IdempotencyMiddleware())

    async def charge(order: str) -> str:
        shop.begun.append(order)
        return f"charged {order}"

    task = shop.task(charge)
    async with Worker(shop.broker):
        assert await task("A-1") == "charged A-1"
        await task.kiq("A-1")
        await until(lambda: "replayed" in shop.names())
    assert shop.begun == ["A-1"]
    assert idempotency_of(task).scope_for("A-1").endswith("charge")


async def test_the_wrong_order_of_decorators_is_refused() -> None:
    """Over `@broker.task` a worker would run the bare function."""

    async def charge(order: str) -> None:
        """Nothing."""

    with pytest.raises(ConfigurationError, match=r"goes under @broker\.task"):
        idempotent_task(key="{order}")(InMemoryBroker().task(charge))


async def test_a_task_that_is_acknowledged_early_is_warned_of(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """A worker that dies would lose it (F44)."""
    shop.broker.add_middlewares(IdempotencyMiddleware())

    async def charge(order: str) -> None:
        shop.begun.append(order)

    task = shop.task(charge, ack_type="when_received")
    async with Worker(shop.broker):
        await task.kiq("A-1")
        await until(lambda: "completed" in shop.names())
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("is acknowledged before it runs" in warning for warning in warnings) == 1


async def test_a_wrong_delay_is_an_error_at_once() -> None:
    """Not when the first message is put back."""
    with pytest.raises(ConfigurationError, match="longest_delay"):
        IdempotencyMiddleware(longest_delay=0)


async def test_what_a_task_lets_through_is_put_back_too(shop: Shop) -> None:
    """It is not decorated, and called what is."""
    shop.broker.add_middlewares(IdempotencyMiddleware())
    release = asyncio.Event()

    async def charge(order: str) -> str:
        shop.begun.append(order)
        await release.wait()
        return f"charged {order}"

    async def call(order: str) -> str:
        return await shop.idem.arun(charge, order, scope="charge", key=order, policy=Policy(lease=1.5))

    task = shop.broker.task(task_name="call")(call)
    async with Worker(shop.broker):
        for _ in range(2):
            await task.kiq("A-1")
        await until(lambda: "in_progress" in shop.names())
        release.set()
        await until(lambda: len(shop.saved) == 2)
    assert shop.begun == ["A-1"]
    assert [value for _, value in shop.saved] == ["charged A-1"] * 2


async def test_what_is_put_back_is_not_retried_too(shop: Shop) -> None:
    """Else each copy would make two; the middleware that retries sees an error of ours that left its task."""
    shop.broker.add_middlewares(
        SimpleRetryMiddleware(default_retry_label=True), IdempotencyMiddleware(longest_delay=0.2)
    )

    async def charge(order: str) -> str:
        return order

    async def call(order: str) -> str:
        return await shop.idem.arun(charge, order, scope="charge", key=order)

    task = shop.broker.task(task_name="call")(call)
    with shop.idem.claim(scope="charge", key="A-1", policy=Policy(lease=30)) as claim:
        async with Worker(shop.broker):
            await task.kiq("A-1")
            await until(lambda: shop.names().count("in_progress") == 4)
            claim.complete("charged A-1")
            await until(lambda: bool(shop.saved))
    assert shop.names().count("replayed") == 1


async def test_a_handler_may_send_what_a_broker_in_memory_runs_at_once(shop: Shop) -> None:
    """It is put back all the same when it has to come again, and not what it sent."""
    broker = InMemoryBroker(await_inplace=True)
    broker.add_middlewares(IdempotencyMiddleware(longest_delay=0.1))

    async def note(order: str) -> None:
        shop.begun.append(f"noted {order}")

    noted = broker.task(task_name="note")(note)

    async def charge(order: str) -> None:
        shop.begun.append(order)
        await noted.kiq(order)
        if shop.begun.count(order) == 1:
            raise StoreUnavailableError("of a nested call")

    decorate = idempotent_task(key="{order}", idempotency=shop.idem, fingerprint=None)
    await broker.task(task_name="charge")(decorate(charge)).kiq("A-1")
    assert shop.begun == ["A-1", "noted A-1"] * 2


async def test_a_middleware_that_retries_has_to_come_first(shop: Shop) -> None:
    """Its `on_error` would be asked before ours, and nothing could keep it from sending a second copy."""
    shop.broker.add_middlewares(IdempotencyMiddleware(), SimpleRetryMiddleware())
    with pytest.raises(ConfigurationError, match="add IdempotencyMiddleware after SimpleRetryMiddleware"):
        await shop.broker.startup()


async def test_labels_of_bytes_are_put_back_as_they_came(shop: Shop) -> None:
    """As JSON they are text; the message tells that they were bytes."""
    seen: list[Any] = []

    class Noting(TaskiqMiddleware):
        def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
            seen.append(message.labels["seal"])
            return message

    shop.broker.add_middlewares(Noting(), IdempotencyMiddleware(longest_delay=0.2))

    async def charge(order: str) -> None:
        shop.begun.append(order)

    task = shop.task(charge)
    with shop.idem.claim(scope=idempotency_of(task).scope_for("A-1"), key="A-1", policy=Policy(lease=30)) as claim:
        async with Worker(shop.broker):
            await task.kicker().with_labels(seal=b"\xff\x00").kiq("A-1")
            await until(lambda: shop.names().count("put_back") == 2)
            claim.complete()
            await until(lambda: "replayed" in shop.names())
    assert set(seen) == {b"\xff\x00"}


class Workers:
    """Processes that consume one queue, and the file in which they write what happened."""

    def __init__(self, url: str, database_url: str, queue: str, ledger: Path) -> None:
        self.url, self.queue, self.ledger = url, queue, ledger
        self.command = [sys.executable, "-m", "tests.integration.taskiq_worker", url, database_url, queue, str(ledger)]
        self.broker = new_broker(url, queue)

    async def __aenter__(self) -> Self:
        await self.broker.startup()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.broker.shutdown()
        await remove(self.url, self.queue)

    def start(self, seconds: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """Start a worker whose handlers take so many seconds."""
        return process([*self.command, seconds], env=os.environ | {"PYTHONPATH": str(HERE.parents[1])})

    async def send(self, task_name: str) -> None:
        async def elsewhere(order: str) -> None:
            """Runs in the workers."""

        await self.broker.task(task_name=task_name)(elsewhere).kiq("A-1")

    async def until(self, is_so: Callable[[list[str]], bool], what: str) -> None:
        await asyncio.to_thread(wait_until, lambda: is_so(self.lines()), seconds=40, what=what)

    def lines(self) -> list[str]:
        return self.ledger.read_text().splitlines() if self.ledger.exists() else []


@pytest_asyncio.fixture
async def workers(rabbitmq_url: str, unique_name: str, sqlite_url: str, tmp_path: Path) -> AsyncIterator[Workers]:
    await asyncio.to_thread(Idempotency.from_urls(database_url=sqlite_url).prepare)
    async with Workers(rabbitmq_url, sqlite_url, unique_name, tmp_path / "ledger") as workers:
        yield workers


async def test_a_killed_worker_leaves_its_message_to_the_next(workers: Workers) -> None:
    """RabbitMQ delivers it again, it is put back while the dead worker's lease runs, and then it runs once more."""
    with workers.start("60") as first:
        await workers.send("charge")
        await workers.until(lambda lines: lines == ["begin A-1"], "the handler")
        first.kill()
    with workers.start("0"):
        await workers.until(lambda lines: "end A-1" in lines, "the take-over")
    assert [line for line in workers.lines() if "put_back" not in line] == ["begin A-1", "begin A-1", "end A-1"]


async def test_in_a_pool_of_processes_it_is_put_back_too(workers: Workers) -> None:
    """An error of ours comes out of the pool, and the middleware sees to it."""
    with workers.start("1") as worker:
        for _ in range(2):
            await workers.send("charge_in_a_pool")
        await workers.until(lambda lines: "replayed A-1" in lines, "the duplicate")
        worker.terminate()
        worker.wait(timeout=20)
    assert [line for line in workers.lines() if "put_back" not in line] == ["begin A-1", "end A-1", "replayed A-1"]
    assert "put_back A-1" in workers.lines()
