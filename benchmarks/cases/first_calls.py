"""The first call of a key: claim, handler, finish; on every store, beside the same with its drivers alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from benchmarks.by_hand.markers import RedisMarkers
from benchmarks.by_hand.protocol import ByHand
from benchmarks.by_hand.records import MariaDBRecords, PostgresRecords, SQLiteRecords
from benchmarks.case import case
from benchmarks.measuring import Here
from benchmarks.orders import AMOUNT, charge, decorated, new_orders, ours
from benchmarks.place import Place
from idem_tasks import Idempotency, RedisStore, SQLStore, TieredStore

GROUP = "First call"
AnyRecords = PostgresRecords | MariaDBRecords | SQLiteRecords


@contextmanager
def both(database_url: str, redis_url: str, by_hand: ByHand) -> Iterator[dict[str, Here]]:
    """Give the two ways."""
    with ours(database_url, redis_url) as idempotency:
        call, order = decorated(idempotency), new_orders()
        yield {"ours": Here(lambda: call(order(), AMOUNT)), "by hand": Here(lambda: by_hand(order(), AMOUNT))}


@contextmanager
def with_records(database_url: str, redis_url: str, made: AnyRecords) -> Iterator[dict[str, Here]]:
    """Give the two ways with these records, and with markers where there is a Redis."""
    with closing(made) as records:
        records.create()
        if not redis_url:
            with both(database_url, "", ByHand(charge, records=records)) as ways:
                yield ways
            return
        with (
            closing(RedisMarkers(redis_url)) as markers,
            both(database_url, redis_url, ByHand(charge, records=records, markers=markers)) as ways,
        ):
            yield ways


@case(GROUP, "Redis and PostgreSQL", needs=("redis", "postgres"))
@contextmanager
def redis_and_postgres(place: Place) -> Iterator[dict[str, Here]]:
    """Four round trips and two commits, of which "auto" waits for one only."""
    record = SQLStore(place.postgres, create_schema=True, claim_commit="auto")
    with (
        with_records(place.postgres, place.redis, PostgresRecords(place.postgres)) as ways,
        Idempotency(store=TieredStore(RedisStore(place.redis, prefix="auto:"), record)) as idempotency,
    ):
        idempotency.prepare()
        call, order = decorated(idempotency), new_orders()
        yield ways | {"ours, `claim_commit='auto'`": Here(lambda: call(order(), AMOUNT))}


@case(GROUP, "PostgreSQL alone", needs=("postgres",))
@contextmanager
def postgres(place: Place) -> Iterator[dict[str, Here]]:
    """Two round trips and two commits."""
    with with_records(place.postgres, "", PostgresRecords(place.postgres)) as ways:
        yield ways


@case(GROUP, "Redis and MariaDB", needs=("redis", "mariadb"))
@contextmanager
def redis_and_mariadb(place: Place) -> Iterator[dict[str, Here]]:
    """Four round trips and two commits."""
    with with_records(place.mariadb, place.redis, MariaDBRecords(place.mariadb)) as ways:
        yield ways


@case(GROUP, "SQLite alone")
@contextmanager
def sqlite(place: Place) -> Iterator[dict[str, Here]]:
    """Two commits into a file."""
    with with_records(place.sqlite, "", SQLiteRecords(place.sqlite.replace("records", "by_hand"))) as ways:
        yield ways


@case(GROUP, "Redis alone", needs=("redis",))
@contextmanager
def redis(place: Place) -> Iterator[dict[str, Here]]:
    """Two round trips; by hand it has no fencing token, for which Redis needs a script at the claim too."""
    with (
        closing(RedisMarkers(place.redis)) as markers,
        both("", place.redis, ByHand(charge, markers=markers)) as ways,
    ):
        yield ways
