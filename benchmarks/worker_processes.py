"""Processes that wait to be told how many first calls to make, and in which way."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

from benchmarks.by_hand.markers import RedisMarkers
from benchmarks.by_hand.protocol import ByHand
from benchmarks.by_hand.records import PostgresRecords
from benchmarks.measuring import Times
from benchmarks.orders import AMOUNT, charge, decorated, new_orders
from benchmarks.place import Place
from idem_tasks import Idempotency

SECONDS_TO_END = 10.0


class Workers:
    """So many processes, each with connections of its own."""

    def __init__(self, number: int, place: Place) -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(number)]
        self._ends = [ours for ours, _ in pipes]
        self._processes = [context.Process(target=work, args=(end, place), daemon=True) for _, end in pipes]

    def __enter__(self) -> Self:
        for process in self._processes:
            process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join(SECONDS_TO_END)
            process.kill()

    def call(self, way: str, times: int) -> float:
        """Let each process make so many first calls, wait for all, and return their CPU in seconds."""
        for end in self._ends:
            end.send((way, times))
        return sum(end.recv() for end in self._ends)


@dataclass(frozen=True)
class InAll:
    """A way: so many first calls in each process."""

    workers: Workers
    way: str
    times: int

    def take(self, times: int) -> Times:
        """Do it so many times."""
        taken = Times()
        for _ in range(times):
            begun = time.perf_counter()
            taken.cpu.append(self.workers.call(self.way, self.times))
            taken.elapsed.append(time.perf_counter() - begun)
        return taken


def work(end: Connection, place: Place) -> None:
    """Make the calls that are asked for, until nothing is."""
    with ExitStack() as stack:
        markers = stack.enter_context(closing(RedisMarkers(place.redis)))
        records = stack.enter_context(closing(PostgresRecords(place.postgres)))
        idempotency = stack.enter_context(Idempotency.from_urls(database_url=place.postgres, redis_url=place.redis))
        ways: dict[str, Callable[[str, int], object]] = {
            "ours": decorated(idempotency),
            "by hand": ByHand(charge, records=records, markers=markers),
        }
        order = new_orders()
        while (asked := end.recv()) is not None:
            way, times = asked
            begun = time.process_time()
            for _ in range(times):
                ways[way](order(), AMOUNT)
            end.send(time.process_time() - begun)
