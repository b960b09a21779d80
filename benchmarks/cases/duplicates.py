"""A duplicate of a call that was finished: what most redeliveries are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from redis import Redis

from benchmarks.by_hand.markers import RedisMarkers
from benchmarks.by_hand.protocol import ByHand, decode
from benchmarks.by_hand.records import PostgresRecords, SQLiteRecords
from benchmarks.case import case
from benchmarks.measuring import Here
from benchmarks.orders import AMOUNT, charge, decorated, ours
from benchmarks.place import Place

GROUP = "Duplicate"
ORDER = "A-1"
GET = "GET and decode"
CACHED = "ours, `local_cache=1024`"


@case(GROUP, "the marker answers", needs=("redis", "postgres"), floor=GET)
@contextmanager
def marker_answers(place: Place) -> Iterator[dict[str, Here]]:
    """One round trip to Redis; no duplicate that asks it can be faster than a GET."""
    with (
        ours(place.postgres, place.redis) as idempotency,
        ours(place.postgres, place.redis, local_cache=1024) as remembering,
        closing(RedisMarkers(place.redis)) as markers,
    ):
        call, by_hand = decorated(idempotency), ByHand(charge, markers=markers)
        known = decorated(remembering)
        call(ORDER, AMOUNT)
        known(ORDER, AMOUNT)
        by_hand(ORDER, AMOUNT)

        def get() -> None:
            standing = markers.get(ORDER)
            assert standing is not None
            decode(standing[standing.index(b"{") :])

        yield {
            "ours": Here(lambda: call(ORDER, AMOUNT)),
            CACHED: Here(lambda: known(ORDER, AMOUNT)),
            "by hand": Here(lambda: by_hand(ORDER, AMOUNT)),
            GET: Here(get),
        }


@case(GROUP, "the marker is lost", needs=("redis", "postgres"))
@contextmanager
def marker_is_lost(place: Place) -> Iterator[dict[str, Here]]:
    """Redis, PostgreSQL, and Redis again, which then answers."""
    with (
        ours(place.postgres, place.redis) as idempotency,
        closing(RedisMarkers(place.redis)) as markers,
        closing(PostgresRecords(place.postgres)) as records,
        Redis.from_url(place.redis_uncounted) as eviction,
    ):
        records.create()
        call, by_hand = decorated(idempotency), ByHand(charge, records=records, markers=markers)
        call(ORDER, AMOUNT)
        by_hand(ORDER, AMOUNT)
        yield {
            "ours": Here(lambda: call(ORDER, AMOUNT), before=eviction.flushdb),
            "by hand": Here(lambda: by_hand(ORDER, AMOUNT), before=eviction.flushdb),
        }


@case(GROUP, "PostgreSQL alone", needs=("postgres",), floor="SELECT and decode")
@contextmanager
def postgres(place: Place) -> Iterator[dict[str, Here]]:
    """One round trip."""
    with (
        ours(place.postgres) as idempotency,
        ours(place.postgres, local_cache=1024) as remembering,
        closing(PostgresRecords(place.postgres)) as records,
    ):
        records.create()
        call, by_hand = decorated(idempotency), ByHand(charge, records=records)
        known = decorated(remembering)
        call(ORDER, AMOUNT)
        known(ORDER, AMOUNT)
        by_hand(ORDER, AMOUNT)

        def select() -> None:
            outcome = records.read(ORDER)[2]
            assert outcome is not None
            decode(outcome[outcome.index(b"{") :])

        yield {
            "ours": Here(lambda: call(ORDER, AMOUNT)),
            CACHED: Here(lambda: known(ORDER, AMOUNT)),
            "by hand": Here(lambda: by_hand(ORDER, AMOUNT)),
            "SELECT and decode": Here(select),
        }


@case(GROUP, "SQLite alone")
@contextmanager
def sqlite(place: Place) -> Iterator[dict[str, Here]]:
    """Two statements on a file."""
    with (
        ours(place.sqlite) as idempotency,
        closing(SQLiteRecords(place.sqlite.replace("records", "by_hand"))) as records,
    ):
        records.create()
        call, by_hand = decorated(idempotency), ByHand(charge, records=records)
        call(ORDER, AMOUNT)
        by_hand(ORDER, AMOUNT)
        yield {"ours": Here(lambda: call(ORDER, AMOUNT)), "by hand": Here(lambda: by_hand(ORDER, AMOUNT))}
