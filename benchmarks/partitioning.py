"""What partitions take to make, and what a call costs then: `python -m benchmarks.partitioning [ROWS]`.

Fills two tables of PostgreSQL with a million records, partitions one of them by the statements of `docs/capacity.md`,
and lets calls take turns on both.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, closing
from functools import partial

from sqlalchemy import NullPool, create_engine

from benchmarks.cores import client_cores, on_cores
from benchmarks.growth.measures import DUPLICATE, RANDOM_KEYS, call, calling, known_keys, random_keys
from benchmarks.growth.server import postgres
from benchmarks.growth.tables import RecordsTable
from benchmarks.measuring import FULL, Here, measure
from benchmarks.place import new_place
from idem_tasks.stores.schema import DEFAULT_PREFIX
from tests.services.partitions import partitioning

ROWS = 1_000_000


def main(arguments: list[str]) -> int:
    """Measure, and print."""
    rows = int(arguments[0]) if arguments else ROWS
    with postgres() as server, on_cores(client_cores()), ExitStack() as stack:
        plain, parted = (
            stack.enter_context(
                closing(RecordsTable(stack.enter_context(new_place(server, ("postgres",))).postgres, rows))
            )
            for _ in range(2)
        )
        for table in (plain, parted):
            table.fill()
        seconds = partition(parted)
        print(f"{seconds:.0f} s to partition {rows:,} records, {seconds * 1e6 / rows:.1f} s for a million")
        in_plain, in_parted = (stack.enter_context(calling(table)) for table in (plain, parted))
        for kind, keys in ((RANDOM_KEYS, random_keys), (DUPLICATE, known_keys(plain))):
            ways = {"plain": Here(partial(call, in_plain, keys)), "partitioned": Here(partial(call, in_parted, keys))}
            measured = measure(ways, FULL, turn=10)
            ratio = measured["partitioned"].ratio_to(measured["plain"])
            medians = ", ".join(f"{name} {own.median * 1e6:,.0f} us" for name, own in measured.items())
            print(f"{kind}: {medians}; partitioned / plain {ratio:.2f}")
    return 0


def partition(table: RecordsTable) -> float:
    """Partition it, and return the seconds from the first statement to the commit."""
    engine = create_engine(table.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    begun = committed = time.monotonic()
    with engine.connect() as connection:
        for statement in partitioning(engine):
            connection.exec_driver_sql(statement.replace(DEFAULT_PREFIX, table.prefix))
            if statement == "COMMIT":
                committed = time.monotonic()
    return committed - begun


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
