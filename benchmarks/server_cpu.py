"""What messages cost the servers: `python -m benchmarks.server_cpu`.

Starts a Redis and a PostgreSQL, makes calls, and reads how much CPU the servers' processes have taken by then: that is
what a core of theirs can be divided by, however slow the client is. Takes a minute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack

import psutil

from benchmarks.cores import client_cores, on_cores, server_cores
from benchmarks.orders import AMOUNT, charge, decorated, new_orders, ours
from idem_tasks import Idempotency
from tests.services.postgres_server import PostgresServer
from tests.services.redis_server import RedisServer
from tests.services.run import Run
from tests.services.server import Server

MESSAGES = 20_000
AT_ONCE = 100
"""Messages of a batch."""

WARM_UP = 500

MEASURABLE = 10e-6
"""Seconds of CPU for a message, below which it is only what a server does for itself."""

HEAD = "| | Redis: µs | PostgreSQL: µs | a core of Redis: messages/s | a core of PostgreSQL: messages/s |"


def cpu_of(server: Server) -> float:
    """Return the seconds of CPU that all processes of a server have taken; none of them may have ended."""
    assert server.process is not None
    root = psutil.Process(server.process.pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def line(name: str, servers: tuple[Server, Server], do: Callable[[], object], messages: int) -> str:
    """Do it until so many messages are done, and return a row of the table."""
    for _ in range(max(1, WARM_UP // messages)):
        do()
    before = [cpu_of(server) for server in servers]
    for _ in range(MESSAGES // messages):
        do()
    each = [(cpu_of(server) - begun) / MESSAGES for server, begun in zip(servers, before, strict=True)]
    costs = [f"{cost * 1e6:.0f}" for cost in each]
    rates = [f"{1 / cost:,.0f}" if cost > MEASURABLE else "-" for cost in each]
    return f"| {' | '.join([name, *costs, *rates])} |"


def main() -> int:
    """Measure, and print the table."""
    run = Run.begin()
    try:
        with on_cores(server_cores()):
            redis, postgres = RedisServer(run).start(), PostgresServer(run, fsync="on", max_wal_size="4GB").start()
        with on_cores(client_cores()), ExitStack() as stack:
            both = stack.enter_context(ours(postgres.url, redis.url))
            alone = stack.enter_context(ours(postgres.url))
            print(HEAD, "|---|--:|--:|--:|--:|", sep="\n")
            for row in rows(both, alone, (redis, postgres)):
                print(row, flush=True)
    finally:
        run.end()
    return 0


def rows(both: Idempotency, alone: Idempotency, servers: tuple[Server, Server]) -> list[str]:
    """Return the rows of the table."""
    order = new_orders()
    in_both, in_sql = decorated(both), decorated(alone)
    in_both("known", AMOUNT)

    def batch() -> None:
        several = [(order(), AMOUNT) for _ in range(AT_ONCE)]
        both.run_batch(lambda new: [charge(*each) for each in new], several, scope="batch", key="{message[0]}")

    return [
        line("duplicate, the marker answers", servers, lambda: in_both("known", AMOUNT), 1),
        line("duplicate, PostgreSQL alone", servers, lambda: in_sql("known", AMOUNT), 1),
        line("first call, both", servers, lambda: in_both(order(), AMOUNT), 1),
        line("first call, PostgreSQL alone", servers, lambda: in_sql(order(), AMOUNT), 1),
        line(f"first calls in batches of {AT_ONCE}, both", servers, batch, AT_ONCE),
    ]


if __name__ == "__main__":
    sys.exit(main())
