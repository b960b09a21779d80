"""Taskiq: the decorator under the task's, and a middleware that sends again what is in progress."""

import asyncio
import os
from contextlib import suppress

from taskiq.api import run_receiver_task
from taskiq_aio_pika import AioPikaBroker

from idem_tasks import Event, Idempotency, MemoryStore, idempotent_task
from idem_tasks.integrations.taskiq import IdempotencyMiddleware

in_progress, replayed = asyncio.Event(), asyncio.Event()


def note(event: Event) -> None:
    {"in_progress": in_progress, "replayed": replayed}.get(event.name.value, asyncio.Event()).set()


broker = AioPikaBroker(os.environ.get("RABBITMQ_URL", "amqp://guest:guest@127.0.0.1//"))
broker.add_middlewares(IdempotencyMiddleware())
charged: list[str] = []


@broker.task
@idempotent_task(key="{order}", idempotency=Idempotency(store=MemoryStore(), observers=[note]), lease=1.5)
async def charge(order: str) -> None:
    charged.append(order)
    await in_progress.wait()


async def main() -> None:
    broker.is_worker_process = True
    await broker.startup()
    worker = asyncio.create_task(run_receiver_task(broker))
    for _ in range(2):
        await charge.kiq("A-1")  # both are taken at once: one runs, the other finds it in progress
    await asyncio.wait_for(replayed.wait(), timeout=20)
    worker.cancel()
    with suppress(asyncio.CancelledError):
        await worker
    for queue in ("taskiq", "taskiq.dead_letter"):
        await broker.write_channel.queue_delete(queue)
    await broker.shutdown()


asyncio.run(main())
assert charged == ["A-1"]
print("charged", charged)
