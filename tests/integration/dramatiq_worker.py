"""A Dramatiq worker in a process of its own, for tests that kill it: each effect is a line of a file."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from idem_tasks import configure, idempotent_task
from idem_tasks.integrations.dramatiq import IdempotencyMiddleware

URL, DATABASE_URL, QUEUE, LEDGER, SECONDS = sys.argv[1:]

broker = RabbitmqBroker(url=URL, confirm_delivery=True)
broker.add_middleware(IdempotencyMiddleware())
configure(database_url=DATABASE_URL, lease=1.5)


def write(what: str, order: str) -> None:
    with Path(LEDGER).open("a") as file:
        file.write(f"{what} {order}\n")


@dramatiq.actor(broker=broker, queue_name=QUEUE)
@idempotent_task(key="{order}")
def charge(order: str) -> None:
    """Write `begin` and `end`, some seconds apart."""
    write("begin", order)
    time.sleep(float(SECONDS))
    write("end", order)


if __name__ == "__main__":
    dramatiq.Worker(broker, worker_timeout=100, worker_threads=2).start()
    while True:
        time.sleep(1)
