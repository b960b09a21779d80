"""What is done for many at once: renewals of all claims of a process, and batches of messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

from redis import Redis

from benchmarks.by_hand.batches import BatchByHand
from benchmarks.by_hand.markers import LEASE_MILLISECONDS, RedisMarkers
from benchmarks.by_hand.protocol import LEASE, running_marker
from benchmarks.by_hand.records import PostgresRecords
from benchmarks.case import case
from benchmarks.measuring import Absent, Here, Way
from benchmarks.orders import AMOUNT, charge, new_orders, ours
from benchmarks.place import Place
from idem_tasks import Policy, SQLStore
from idem_tasks.claims import ClaimRequest, Granted, Lease, new_owner
from idem_tasks.events import Announcer
from idem_tasks.runtime import run_sync

HEARTBEAT = "One beat of the heartbeat"
BATCHES = "Batches, first calls"

RENEW = (
    "UPDATE by_hand SET lease_expires_at = clock_timestamp() + %s * interval '1 second' "
    "FROM unnest(%b::text[], %b::text[], %b::bigint[]) AS held (key, owner, token) "
    "WHERE by_hand.key = held.key AND by_hand.owner = held.owner AND by_hand.token = held.token AND outcome IS NULL"
)
RENEW_MARKERS = """
for i, key in ipairs(KEYS) do
  if redis.call('GET', key) == ARGV[i + 1] then redis.call('PEXPIRE', key, ARGV[1]) end
end
return 0
"""
MARKERS_AT_ONCE = 1000
"""Keys of one script: Lua has room for some 8,000 arguments, and Redis answers nobody else meanwhile."""


def claimed(store: SQLStore, number: int) -> list[Lease]:
    """Claim so many keys."""
    policy, order, leases = Policy(), new_orders(), []
    for _ in range(number):
        answer = run_sync(store.claim(ClaimRequest("bench", order(), "f" * 64, new_owner(), policy, "bench")))
        assert isinstance(answer, Granted)
        leases.append(answer.lease)
    return leases


def heartbeat(number: int, place: Place) -> Iterator[dict[str, Here]]:
    """Renew so many claims, in both tiers."""
    with (
        ours(place.postgres, place.redis) as idempotency,
        closing(PostgresRecords(place.postgres)) as records,
        Redis.from_url(place.redis, single_connection_client=True) as client,
    ):
        records.create()
        store = idempotency.store.on("blocking", Announcer(()))
        of_records = SQLStore(place.postgres)
        leases = claimed(of_records, number)
        run_sync(of_records.close())
        keys, owners = [lease.key for lease in leases], [lease.owner for lease in leases]
        tokens = [records.claim(lease.key, lease.owner, "f" * 64)[0] for lease in leases]
        marks = [running_marker(owner) for owner in owners]
        for key, mark in zip(keys, marks, strict=True):
            client.set(key, mark, px=LEASE_MILLISECONDS)

        def renew() -> None:
            assert len(run_sync(store.renew(leases, lambda _: True))) == number

        def by_hand() -> None:
            with records.connection.cursor() as cursor:
                cursor.execute(RENEW, (LEASE, keys, owners, tokens), prepare=True)
                assert cursor.rowcount == number
            for begin in range(0, number, MARKERS_AT_ONCE):
                some = slice(begin, begin + MARKERS_AT_ONCE)
                client.eval(RENEW_MARKERS, len(keys[some]), *keys[some], LEASE_MILLISECONDS, *marks[some])

        yield {"ours": Here(renew), "by hand": Here(by_hand)}


for _claims in (1, 100, 10_000):
    case(
        HEARTBEAT,
        f"{_claims:,} claim" + "s" * (_claims > 1),
        needs=("redis", "postgres"),
        turn=10 if _claims < 1000 else 1,
        in_quick=_claims < 1000,
    )(contextmanager(partial(heartbeat, _claims)))


def batch(number: int, place: Place) -> Iterator[dict[str, Way | Absent]]:
    """Run a handler for so many messages at once, and for the same number one after another."""
    with (
        ours(place.postgres, place.redis) as idempotency,
        closing(PostgresRecords(place.postgres)) as records,
        closing(RedisMarkers(place.redis)) as markers,
    ):
        records.create()
        order = new_orders()

        def orders() -> list[tuple[str, int]]:
            return [(order(), AMOUNT) for _ in range(number)]

        def charge_all(several: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
            return [charge(*each) for each in several]

        def one_at_a_time() -> None:
            for order_id, amount in orders():
                idempotency.run(charge, order_id, amount, scope="bench", key=order_id)

        run_batch: Any = getattr(idempotency, "run_batch", None)
        together = partial(run_batch, charge_all) if run_batch else None
        by_hand = BatchByHand(charge_all, records, markers)
        yield {
            "ours": Here(lambda: together(orders(), scope="bench", key="{message[0]}"))
            if together
            else Absent("this version has no batches"),
            "by hand": Here(lambda: by_hand(orders())),
            "ours, one at a time": Here(one_at_a_time),
        }


for _messages in (10, 100, 1000):
    case(
        BATCHES,
        f"{_messages:,} messages",
        needs=("redis", "postgres"),
        turn=1,
        calls=_messages,
        in_quick=_messages < 1000,
    )(contextmanager(partial(batch, _messages)))
