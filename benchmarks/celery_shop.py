"""The app whose workers `cases/through_celery.py` starts; it is told by the environment where its servers are."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.signals import task_postrun, worker_process_init
from redis import Redis

from benchmarks.by_hand.markers import RedisMarkers
from benchmarks.by_hand.protocol import ByHand
from benchmarks.by_hand.records import PostgresRecords
from benchmarks.orders import charge
from idem_tasks import configure, idempotent_task

REDIS = os.environ["BENCHMARK_REDIS"]
POSTGRES = os.environ["BENCHMARK_POSTGRES"]
ROUND = int(os.environ["BENCHMARK_ROUND"])
"""Messages after which the benchmark is told that all are done."""

DONE = "benchmark-done"
ALL_DONE = "benchmark-all-done"

configure(database_url=POSTGRES, redis_url=REDIS)
app = Celery("benchmark", broker=REDIS)
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    task_default_queue="benchmark",
    worker_prefetch_multiplier=4,
    worker_enable_remote_control=False,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
)
own: dict[str, Any] = {}


@worker_process_init.connect
def connect(**_: object) -> None:
    """Open what is written by hand, in each child of the pool."""
    own["by hand"] = ByHand(charge, records=PostgresRecords(POSTGRES), markers=RedisMarkers(REDIS))
    own["counter"] = Redis.from_url(REDIS, single_connection_client=True)


@task_postrun.connect
def count(**_: object) -> None:
    """Count a message as done; the last one wakes the benchmark. It is the same for all tasks."""
    if own["counter"].incr(DONE) == ROUND:
        own["counter"].rpush(ALL_DONE, 1)


@app.task(name="plain")
def plain(order_id: str, amount: int) -> dict[str, Any]:
    """Do nothing, without any protection."""
    return charge(order_id, amount)


@app.task(name="ours")
@idempotent_task(key="{order_id}")
def protected(order_id: str, amount: int) -> dict[str, Any]:
    """Do nothing, once for each order."""
    return charge(order_id, amount)


@app.task(name="by hand")
def by_hand(order_id: str, amount: int) -> Any:
    """Do nothing, once for each order, by hand."""
    return own["by hand"](order_id, amount)
