"""A Taskiq worker in a process of its own, for tests that kill it: each effect is a line of a file."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from taskiq.api import run_receiver_task
from taskiq_aio_pika import AioPikaBroker

from idem_tasks import configure, idempotent_task
from idem_tasks.integrations.taskiq import IdempotencyMiddleware
from tests.integration.test_taskiq import new_broker

URL, DATABASE_URL, QUEUE, LEDGER, SECONDS = sys.argv[1:]

broker: AioPikaBroker = new_broker(URL, QUEUE)
broker.add_middlewares(IdempotencyMiddleware())
configure(database_url=DATABASE_URL, lease=1.5)


def write(what: str, order: str) -> None:
    with Path(LEDGER).open("a") as file:
        file.write(f"{what} {order}\n")


@broker.task(task_name="charge")
@idempotent_task(key="{order}")
async def charge(order: str) -> None:
    """Write `begin` and `end`, some seconds apart."""
    write("begin", order)
    await asyncio.sleep(float(SECONDS))
    write("end", order)


if __name__ == "__main__":
    broker.is_worker_process = True
    asyncio.run(run_receiver_task(broker, run_startup=True))
