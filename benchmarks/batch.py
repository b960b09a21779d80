"""What a batch saves its handler: `python benchmarks/batch.py [POSTGRES_URL REDIS_URL]`.

Runs 100 messages at a time through `run_batch`, and as many one after another through `run`, with a handler that
does nothing but return 100 bytes; first new ones, then all of them again; and the protocol of a batch by hand, as
`batch_stores.py` has it. Prints the medians. `--profile` at the end shows where the batches spend their time.
"""

from __future__ import annotations

import cProfile
import pstats
import secrets
import statistics
import sys
import time
from collections.abc import Callable

import psycopg
import redis
from batch_stores import MESSAGES, PREFIX, by_hand, servers
from sqlalchemy import MetaData, create_engine, make_url

from idem_tasks import Idempotency, RedisStore, SQLStore, TieredStore

ROUNDS = 40
OUTCOME = "x" * 98

Message = dict[str, str]
Way = Callable[[str, list[Message]], object]


def ship(_message: Message) -> str:
    """Do nothing for one message."""
    return OUTCOME


def ship_all(messages: list[Message]) -> list[str]:
    """Do nothing for many."""
    return [OUTCOME for _ in messages]


def measure(ways: dict[str, Way]) -> dict[str, float]:
    """Return the messages a second of each way, the median of many rounds in turn."""
    taken: dict[str, list[float]] = {}
    for number in range(ROUNDS + 5):
        for name, way in ways.items():
            if "one at a time" in name and number % 5:
                continue
            scope = f"bench-{secrets.token_hex(4)}"
            messages = [{"id": f"order-{each:06}", "amount": "5"} for each in range(MESSAGES)]
            for again in ("", ", duplicates")[: 1 if "by hand" in name else 2]:
                begun = time.perf_counter()
                way(scope, messages)
                if number >= 5:
                    taken.setdefault(name + again, []).append(time.perf_counter() - begun)
    return {name: MESSAGES / statistics.median(times) for name, times in taken.items()}


def main() -> None:
    """Measure, print, and remove what was made."""
    profile = "--profile" in sys.argv and not sys.argv.remove("--profile")
    with servers() as (postgres_url, redis_url):
        store = TieredStore(
            RedisStore(redis_url, prefix=PREFIX), SQLStore(postgres_url, create_schema=True, table_prefix=PREFIX)
        )
        connection = psycopg.connect(
            make_url(postgres_url).set(drivername="postgresql").render_as_string(False), autocommit=True
        )
        client = redis.Redis.from_url(redis_url)
        try:
            with Idempotency(store=store) as idem:
                idem.prepare()

                def batches(scope: str, messages: list[Message]) -> None:
                    idem.run_batch(ship_all, messages, scope=scope, key="{message[id]}")

                def alone(scope: str, messages: list[Message]) -> None:
                    for message in messages:
                        idem.run(ship, message, scope=scope, key=message["id"])

                ways: dict[str, Way] = {
                    "batches": batches,
                    "one at a time": alone,
                    "by hand, in batches": lambda scope, _: by_hand(connection, client, scope),
                }
                found = measure(ways)
                for name, rate in found.items():
                    print(f"{name:28} {rate:10,.0f} messages a second, {1e6 / rate:8.1f} us a message")
                print(f"batches / by hand       {found['batches'] / found['by hand, in batches']:.2f}")
                print(f"batches / one at a time {found['batches'] / found['one at a time']:.1f}")
                if profile:
                    with cProfile.Profile() as profiler:
                        for number in range(50):
                            batches(f"profiled-{number}", [{"id": str(each)} for each in range(MESSAGES)])
                    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)
        finally:
            connection.close()
            engine = create_engine(make_url(postgres_url).set(drivername="postgresql+psycopg"))
            metadata = MetaData()
            metadata.reflect(engine, only=lambda name, _: name.startswith(PREFIX))
            metadata.drop_all(engine)
            engine.dispose()
            for key in client.scan_iter(f"{PREFIX}*"):
                client.delete(key)
            client.close()


if __name__ == "__main__":
    main()
