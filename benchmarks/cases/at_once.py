"""Many first calls at once in two tiers: coroutines, threads, processes; and many deliveries of one key."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial

from sqlalchemy import make_url

from benchmarks.by_hand.in_asyncio import AsyncByHand
from benchmarks.by_hand.markers import RedisMarkers
from benchmarks.by_hand.protocol import ByHand
from benchmarks.by_hand.records import PostgresRecords
from benchmarks.case import case
from benchmarks.measuring import Here
from benchmarks.orders import AMOUNT, charge, charge_async, decorated, new_orders, ours
from benchmarks.place import Place
from benchmarks.worker_processes import InAll, Workers
from idem_tasks import Idempotency, InProgressError, idempotent_task

COROUTINES = "asyncio, first calls"
THREADS = "Threads, first calls"
PROCESSES = "Processes, first calls"
CONTENTION = "64 workers, one key"

CALLS = 192
"""First calls in one turn."""

CONTENDERS = 64


def make_table(url: str) -> None:
    """Make the table of what is written by hand."""
    with closing(PostgresRecords(url)) as records:
        records.create()


# Coroutines


async def in_turns(call: Callable[[str, int], Awaitable[object]], order: Callable[[], str], at_once: int) -> None:
    """Await `CALLS` calls, so many at once."""

    async def several() -> None:
        for _ in range(CALLS // at_once):
            await call(order(), AMOUNT)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(several())


def coroutines(at_once: int, place: Place) -> Iterator[dict[str, Here]]:
    """Give both ways on one event loop."""
    make_table(place.postgres)
    database_url = make_url(place.postgres).set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)
    with ours(place.postgres, place.redis), asyncio.Runner() as runner:
        idempotency = Idempotency.from_urls(database_url=database_url, redis_url=place.redis)
        call, order = idempotent_task(key="{order_id}", idempotency=idempotency)(charge_async), new_orders()
        by_hand = runner.run(AsyncByHand.connect(charge_async, place.redis, place.postgres, at_once))
        yield {
            "ours": Here(lambda: runner.run(in_turns(call, order, at_once))),
            "by hand": Here(lambda: runner.run(in_turns(by_hand, order, at_once))),
        }
        runner.run(by_hand.close())
        runner.run(idempotency.aclose())


for _at_once in (1, 16, 64):
    case(COROUTINES, f"{_at_once} at once", needs=("redis", "postgres"), turn=1, calls=CALLS)(
        contextmanager(partial(coroutines, _at_once))
    )


# Threads


class Hands:
    """What is written by hand, once for each thread: its connections are its own."""

    def __init__(self, handler: Callable[[str, int], object], place: Place, stack: ExitStack) -> None:
        self._handler = handler
        self._place = place
        self._stack = stack
        self._own = threading.local()

    def __call__(self, order_id: str, amount: int) -> object:
        """Call this thread's."""
        if not hasattr(self._own, "call"):
            markers = self._stack.enter_context(closing(RedisMarkers(self._place.redis)))
            records = self._stack.enter_context(closing(PostgresRecords(self._place.postgres)))
            self._own.call = ByHand(self._handler, records=records, markers=markers)
        done: object = self._own.call(order_id, amount)
        return done


def threads(number: int, place: Place) -> Iterator[dict[str, Here]]:
    """Give both ways on so many threads."""
    make_table(place.postgres)
    with ExitStack() as stack:
        idempotency = stack.enter_context(ours(place.postgres, place.redis))
        pool = stack.enter_context(ThreadPoolExecutor(number))
        order = new_orders()

        def all_threads(call: Callable[[str, int], object]) -> None:
            def several() -> None:
                for _ in range(CALLS // number):
                    call(order(), AMOUNT)

            for done in [pool.submit(several) for _ in range(number)]:
                done.result()

        yield {
            "ours": Here(partial(all_threads, decorated(idempotency))),
            "by hand": Here(partial(all_threads, Hands(charge, place, stack))),
        }


for _number in (1, 4, 12):
    case(THREADS, f"{_number} thread" + "s" * (_number > 1), needs=("redis", "postgres"), turn=1, calls=CALLS)(
        contextmanager(partial(threads, _number))
    )


# Processes


def processes(number: int, place: Place) -> Iterator[dict[str, InAll]]:
    """Give both ways on so many processes, of one thread each."""
    make_table(place.postgres)
    each = CALLS // number
    with ours(place.postgres, place.redis), Workers(number, place) as workers:
        yield {
            "ours": InAll(workers, "ours", each),
            "by hand": InAll(workers, "by hand", each),
        }


for _number in (1, 2, 4):
    case(
        PROCESSES,
        f"{_number} process" + "es" * (_number > 1),
        needs=("redis", "postgres"),
        turn=1,
        calls=CALLS,
        counted=False,
        all_cores=True,
    )(contextmanager(partial(processes, _number)))


# Contention


class Contenders:
    """Threads that all call with one key at the same moment; the one that is granted ends when all others know."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._order = new_orders()
        self._answered = threading.Semaphore(0)

    def handler(self, order_id: str, amount: int) -> dict[str, object]:
        """Run until the others have been told that this runs."""
        for _ in range(CONTENDERS - 1):
            if not self._answered.acquire(timeout=30):
                raise TimeoutError("not all contenders were answered")
        return charge(order_id, amount)

    def meet(self, call: Callable[[str, int], object]) -> None:
        """Call from all threads, and wait until each has its answer."""
        order_id, begin = self._order(), threading.Barrier(CONTENDERS)

        def one() -> int:
            begin.wait(timeout=30)
            try:
                call(order_id, AMOUNT)
            except (InProgressError, RuntimeError):  # the latter is what is written by hand
                self._answered.release()
                return 0
            return 1

        granted = sum(done.result() for done in [self._pool.submit(one) for _ in range(CONTENDERS)])
        if granted != 1:
            raise AssertionError(f"{granted} of {CONTENDERS} were granted")


@contextmanager
def contention(place: Place) -> Iterator[dict[str, Here]]:
    """One of 64 runs; the shield keeps the others off the database."""
    make_table(place.postgres)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(CONTENDERS))
        contenders = Contenders(pool)
        ways = {}
        for name, redis_url in (("ours", place.redis), ("ours, without Redis", "")):
            idempotency = stack.enter_context(ours(place.postgres, redis_url))
            call = idempotent_task(key="{order_id}", scope=name, idempotency=idempotency)(contenders.handler)
            ways[name] = Here(partial(contenders.meet, call))
        ways["by hand"] = Here(partial(contenders.meet, Hands(contenders.handler, place, stack)))
        yield ways


case(CONTENTION, "until all are answered", needs=("redis", "postgres"), turn=1)(contention)
