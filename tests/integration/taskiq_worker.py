"""A Taskiq worker in a process of its own, for tests that kill it: each effect is a line of a file."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from taskiq.api import run_receiver_task
from taskiq_aio_pika import AioPikaBroker

from idem_tasks import Event, configure, idempotent_task
from idem_tasks.integrations.taskiq import IdempotencyMiddleware
from tests.integration.test_taskiq import new_broker

URL, DATABASE_URL, QUEUE, LEDGER, SECONDS = sys.argv[1:]

broker: AioPikaBroker = new_broker(URL, QUEUE)
broker.add_middlewares(IdempotencyMiddleware())


def write(what: str, order: str) -> None:
    with Path(LEDGER).open("a") as file:
        file.write(f"{what} {order}\n")


def note(event: Event) -> None:
    if event.name.value in {"put_back", "replayed"}:
        write(event.name.value, event.key)


configure(database_url=DATABASE_URL, lease=1.5, observers=[note])


@broker.task(task_name="charge")
@idempotent_task(key="{order}")
async def charge(order: str) -> None:
    """Write `begin` and `end`, some seconds apart."""
    write("begin", order)
    await asyncio.sleep(float(SECONDS))
    write("end", order)


@broker.task(task_name="charge_in_a_pool")
@idempotent_task(key="{order}")
def charge_in_a_pool(order: str) -> None:
    """Write the same from a process of a pool."""
    write("begin", order)
    time.sleep(float(SECONDS))
    write("end", order)


async def main() -> None:
    """Work until SIGTERM, and end the pool then."""
    broker.is_worker_process = True
    working = asyncio.ensure_future(run_receiver_task(broker, run_startup=True, use_process_pool=True))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, working.cancel)
    with suppress(asyncio.CancelledError):
        await working
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
