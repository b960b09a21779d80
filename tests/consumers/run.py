"""Endurance on servers of its own: python -m tests.consumers.run --broker pika --messages 5000 --seed 1."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tests.consumers import brokers
from tests.consumers.endurance import endure
from tests.consumers.plan import Plan
from tests.services.postgres_server import PostgresServer
from tests.services.redis_server import RedisServer
from tests.services.run import Run
from tests.services.server import Server, stop_all

_SECONDS = 60.0
_SECONDS_A_MESSAGE = 0.2


def main(broker: str, messages: int, seed: int, **pace: Any) -> bool:
    run, servers = Run.begin(), list[Server]()
    try:
        for kind in (PostgresServer, RedisServer, brokers.module(broker).SERVER):
            servers.append(kind(run).start())
        plan = Plan(
            broker=broker,
            url=servers[2].url,
            name="orders",
            database_url=servers[0].url.replace("postgresql://", "postgresql+psycopg://"),
            redis_url=servers[1].url,
            folder=str(run.new_folder("consumers")),
            seed=seed,
            **{
                **brokers.pace(broker),
                **pace,
                "messages": messages,
                "seconds": _SECONDS + messages * _SECONDS_A_MESSAGE,
            },
        )
        verdict = endure(plan)
    finally:
        stop_all(servers)
        run.end()
    print(f"{broker}, seed {seed}\n{verdict}")  # noqa: T201 - a command
    return verdict.good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--broker", choices=brokers.names(), required=True)
    parser.add_argument("--messages", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill-every", type=float, help="seconds, about; default: what suits the broker")
    given = parser.parse_args()
    pace = {} if given.kill_every is None else {"kill_every": given.kill_every}
    sys.exit(0 if main(given.broker, given.messages, given.seed, **pace) else 1)
