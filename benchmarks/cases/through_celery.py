"""Messages through Celery, end to end: from the queue in Redis to the acknowledgement, in a worker of two processes.

Messages are sent while the worker is paused, so that what is measured is the worker and not the sender.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
from celery import Celery
from redis import Redis

from benchmarks.by_hand.records import PostgresRecords
from benchmarks.case import case
from benchmarks.measuring import Times
from benchmarks.orders import AMOUNT, new_orders, ours
from benchmarks.place import Place
from tests.services import reaper
from tests.services.run import REPOSITORY, Run

GROUP = "Celery, end to end"
ROUND = 400
"""Messages in one turn."""

PROCESSES = 2
SECONDS_FOR_ROUND = 60
ORDER = "A-1"

DONE = "benchmark-done"
ALL_DONE = "benchmark-all-done"


class Worker:
    """A worker of Celery that is paused but for the time in which it is measured."""

    def __init__(self, place: Place, run: Run) -> None:
        self._redis = Redis.from_url(place.redis)
        self._client = Celery("client", broker=place.redis, set_as_current=False)
        self._client.conf.task_default_queue = "benchmark"
        self._log = place.folder / "worker.log"
        environment = {
            "BENCHMARK_REDIS": place.redis,
            "BENCHMARK_POSTGRES": place.postgres,
            "BENCHMARK_ROUND": str(ROUND),
            "PYTHONPATH": str(REPOSITORY),
        }
        self._process = run.start(
            [sys.executable, "-m", "celery", "-A", "benchmarks.celery_shop", "worker", "--loglevel", "warning",
             "--pool", "prefork", "--concurrency", str(PROCESSES), "--without-gossip", "--without-mingle",
             "--without-heartbeat"],
            log=self._log, cwd=Path(place.folder), env=os.environ | environment, user=None, group=None,
            stop_signal=signal.SIGTERM,
        )  # fmt: skip

    def close(self) -> None:
        """End it at once; nothing is worth waiting for."""
        reaper.send(signal.SIGKILL, self._family())
        self._process.wait()
        self._redis.close()
        self._client.close()

    def do(self, task: str, orders: list[str]) -> Times:
        """Let it take these messages, and tell what each took on the clock, and of the worker's CPU."""
        self._redis.delete(DONE, ALL_DONE)
        self._redis.set(DONE, ROUND - len(orders))
        reaper.send(signal.SIGSTOP, self._family())
        for order_id in orders:
            self._client.send_task(task, (order_id, AMOUNT), ignore_result=True)
        cpu, begun = self._cpu(), time.perf_counter()
        reaper.send(signal.SIGCONT, self._family())
        if self._redis.blpop([ALL_DONE], timeout=SECONDS_FOR_ROUND) is None:
            raise TimeoutError(f"{task}: not done in {SECONDS_FOR_ROUND} s; the worker said: {self._said()}")
        return Times([time.perf_counter() - begun], [self._cpu() - cpu])

    def _family(self) -> list[psutil.Process]:
        return reaper.family(psutil.Process(self._process.pid))

    def _cpu(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._family())

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


class Messages:
    """A way: a round of messages for a task."""

    def __init__(self, worker: Worker, task: str, order: Callable[[], str]) -> None:
        self._worker = worker
        self._task = task
        self._order = order

    def take(self, times: int) -> Times:
        """Let the worker take so many rounds."""
        taken = Times()
        for _ in range(times):
            done = self._worker.do(self._task, [self._order() for _ in range(ROUND)])
            taken.elapsed += done.elapsed
            taken.cpu += done.cpu
        return taken


@case(
    GROUP,
    f"Redis broker, prefork of {PROCESSES}",
    needs=("redis", "postgres"),
    floor="no protection",
    turn=1,
    calls=ROUND,
    counted=False,
    all_cores=True,
)
@contextmanager
def through_celery(place: Place) -> Iterator[dict[str, Messages]]:
    """A task that is not protected, first calls, and duplicates."""
    run = Run.begin()
    try:
        with (
            ours(place.postgres, place.redis),
            closing(PostgresRecords(place.postgres)) as records,
            closing(Worker(place, run)) as worker,
        ):
            records.create()
            order = new_orders()
            worker.do("plain", [order()])  # it has started when this is done
            worker.do("ours", [ORDER])
            yield {
                "no protection": Messages(worker, "plain", order),
                "ours, first calls": Messages(worker, "ours", order),
                "ours, duplicates": Messages(worker, "ours", lambda: ORDER),
                "by hand, first calls": Messages(worker, "by hand", order),
            }
    finally:
        run.end()
