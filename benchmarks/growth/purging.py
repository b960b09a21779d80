"""A process that purges while it is told to: a purge belongs to no process that handles messages."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from benchmarks.growth.tables import RecordsTable
from idem_tasks import SQLStore
from idem_tasks.runtime import run_sync

BATCH = 1000
"""Records in one transaction, as `Idempotency.purge` has it."""

SECONDS_TO_END = 10.0


@dataclass
class Purged:
    """How many records were deleted in each batch, and in how many seconds."""

    batches: list[tuple[int, float]] = field(default_factory=list)

    def add(self, other: Purged) -> None:
        """Add what was purged after it."""
        self.batches += other.batches

    @property
    def records(self) -> int:
        """How many were deleted."""
        return sum(deleted for deleted, _ in self.batches)

    @property
    def rate(self) -> float:
        """Records a second; 0 if there were none."""
        return rate_of(self.batches)

    @property
    def rates_of_tenths(self) -> tuple[float, float]:
        """Records a second in the first tenth of the batches, and in the last."""
        tenth = max(1, len(self.batches) // 10)
        return rate_of(self.batches[:tenth]), rate_of(self.batches[-tenth:])

    @property
    def is_all(self) -> bool:
        """Whether nothing was left."""
        return bool(self.batches) and self.batches[-1][0] < BATCH


def rate_of(batches: list[tuple[int, float]]) -> float:
    """Return records a second."""
    seconds = sum(took for _, took in batches)
    return sum(deleted for deleted, _ in batches) / seconds if seconds else 0.0


class Purge:
    """The process, as seen from the one that measures."""

    def __init__(self, end: Connection) -> None:
        self._end = end

    def begin(self, seconds: float, most: int) -> None:
        """Let it purge for so long, or until so many records are deleted, or nothing is left."""
        self._end.send((seconds, most))

    @property
    def is_under_way(self) -> bool:
        """Whether it has not ended yet."""
        return not self._end.poll()

    def end(self) -> Purged:
        """Wait until it ends, and return what it did."""
        purged: Purged = self._end.recv()
        return purged


@contextmanager
def purging(table: RecordsTable) -> Iterator[Purge]:
    """Give a process that purges this table."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=work, args=(its, table.url, table.prefix), daemon=True)
    process.start()
    its.close()
    try:
        yield Purge(ours)
    finally:
        ours.close()
        process.join(SECONDS_TO_END)
        process.kill()


def work(end: Connection, url: str, prefix: str) -> None:
    """Purge when told to, until nobody is there to tell."""
    store = SQLStore(url, table_prefix=prefix)
    try:
        while True:
            end.send(purge(store, *end.recv()))
    except EOFError:
        run_sync(store.close())


def purge(store: SQLStore, seconds: float, most: int) -> Purged:
    """Purge for so long, or until so many records are deleted, or nothing is left."""
    done = Purged()
    until = time.monotonic() + seconds
    while not done.is_all and done.records < most and time.monotonic() < until:
        begun = time.perf_counter()
        deleted = len(run_sync(store.purge(limit=BATCH, grace=0.0)))
        done.batches.append((deleted, time.perf_counter() - begun))
    return done
