"""What is measured on the tables: calls side by side, then on each table what updates, purge and autovacuum do."""

from __future__ import annotations

import hashlib
import random
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from benchmarks.growth.purging import Purge, Purged, purging
from benchmarks.growth.tables import SCOPE, RecordsTable, Size, Statistics, handler
from benchmarks.measuring import WARM_UP, Effort, Here, Measured, measure
from benchmarks.orders import AMOUNT, Handler
from idem_tasks import Idempotency, Policy
from idem_tasks.claims import ClaimRequest, EncodedOutcome, Granted, new_owner
from idem_tasks.runtime import run_sync
from tests.services.waiting import wait_until

RANDOM_KEYS = "first call, random keys"
RISING_KEYS = "first call, rising keys"
DUPLICATE = "duplicate"

OPEN = 50
"""Claims that are held at once where updates are counted: a page then holds many records that run."""

FEWEST_CALLS = 200
"""Calls beside a purge below which nothing is said: the purge was over before."""

OUTCOME = EncodedOutcome(body=b'"' + b"x" * 98 + b'"', codec="json")

Keys = Callable[[], str]


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    effort: Effort
    rounds: int
    """How often `OPEN` claims are held and finished."""
    purge_seconds: float
    """How long a purge runs alone before claims are made beside it; at most, for it leaves three quarters."""
    beside_seconds: float
    """How long a purge runs beside claims, and how long claims are made without one, in each turn."""
    turns: int
    patience: float
    """Seconds to wait for autovacuum once it has something to do."""


FULL = Extent(Effort(seconds=15.0, turns=20), rounds=60, purge_seconds=10.0, beside_seconds=2.0, turns=9, patience=300)
QUICK = Extent(Effort(seconds=0.4, turns=4), rounds=4, purge_seconds=0.3, beside_seconds=0.2, turns=2, patience=10)


@dataclass(frozen=True)
class Timed:
    """One kind of call on one table; seconds."""

    median: float
    p99: float
    ratio: float
    """How many times that on the smallest table."""


@dataclass(frozen=True)
class Beside:
    """Claims without a purge and beside one, in turns; and what the purge did beside them."""

    without: Measured
    beside: Measured
    purged: Purged


@dataclass(frozen=True)
class Found:
    """All that was found on one table."""

    rows: int
    size: Size
    calls: dict[str, Timed]
    before: Statistics
    after: Statistics
    """Before and after the finishes that are counted."""
    alone: Purged
    beside: Beside | None
    """None: the purge was over too early."""
    purged: Purged
    """The whole purge."""
    emptied: Statistics
    cleaned: Statistics
    """After the purge, and once autovacuum had done what was due."""
    cleaning: float | None
    """Seconds until it had; None if it did not come in time."""


def measure_growth(tables: Sequence[RecordsTable], extent: Extent, say: Callable[[str], None]) -> list[Found]:
    """Measure tables that are filled already; `say` is told what comes next."""
    calls = measure_calls(tables, extent.effort, say)
    found = []
    for table in tables:
        say(f"{table.rows:,} records: updates, purge, autovacuum")
        found.append(measure_alone(table, extent, {kind: timed[table.rows] for kind, timed in calls.items()}))
    return found


# Calls side by side


def random_keys() -> str:
    """Return a key whose place in an index is anywhere, as that of a UUID of version 4 is."""
    return secrets.token_hex(16)


def rising_keys() -> Keys:
    """Return keys of which each is greater than those before, as numbers of orders are."""
    numbers = iter(range(10**9, 10**10))
    return lambda: f"order-{next(numbers)}"


def known_keys(table: RecordsTable) -> Keys:
    """Return keys of records that answer: any of those that are not over."""
    chosen = random.Random(table.rows)  # noqa: S311 - nobody has to be surprised
    return lambda: hashlib.md5(  # noqa: S324 - as PostgreSQL made them
        str(chosen.randint(table.expired + 1, table.rows)).encode()
    ).hexdigest()


def measure_calls(
    tables: Sequence[RecordsTable], effort: Effort, say: Callable[[str], None]
) -> dict[str, dict[int, Timed]]:
    """Let the tables take turns in each kind of call; returns what each took, by kind and rows."""
    rising = rising_keys()
    kinds: dict[str, Callable[[RecordsTable], Keys]] = {
        RANDOM_KEYS: lambda _: random_keys,
        RISING_KEYS: lambda _: rising,
        DUPLICATE: known_keys,
    }
    with ExitStack() as stack:
        handlers = {table.rows: stack.enter_context(calling(table)) for table in tables}
        timed = {}
        for kind, keys_of in kinds.items():
            say(kind)
            tables[0].checkpoint()
            ways = {str(table.rows): Here(partial(call, handlers[table.rows], keys_of(table))) for table in tables}
            measured = measure(ways, effort, turn=10)
            floor = measured[str(tables[0].rows)]
            timed[kind] = {int(rows): Timed(own.median, own.p99, own.ratio_to(floor)) for rows, own in measured.items()}
        return timed


@contextmanager
def calling(table: RecordsTable) -> Iterator[Handler]:
    """Give the handler on this table."""
    with Idempotency(store=table.store()) as idempotency:
        yield handler(idempotency)


def call(charge: Handler, keys: Keys) -> None:
    """Call it with the next key."""
    charge(keys(), AMOUNT)


# Each table alone


def measure_alone(table: RecordsTable, extent: Extent, calls: dict[str, Timed]) -> Found:
    """Measure what needs no other table beside it."""
    before = settled(table)
    finish_many(table, extent.rounds)
    after = updated(table, before.updates + extent.rounds * OPEN)
    with purging(table) as purge:
        purge.begin(extent.purge_seconds, table.expired // 4)
        alone = purge.end()
        beside = measure_beside(table, purge, extent)
        whole = Purged(alone.batches + beside.purged.batches)
        if not whole.is_all:
            purge.begin(3600.0, table.rows)
            whole.add(purge.end())
    emptied = settled(table)
    begun = time.monotonic()
    cleaned = vacuumed(table, extent.patience)
    return Found(
        table.rows,
        table.size,
        calls,
        before,
        after,
        alone,
        beside if len(beside.beside.all) >= FEWEST_CALLS else None,
        whole,
        emptied,
        cleaned or table.statistics(),
        time.monotonic() - begun if cleaned else None,
    )


def finish_many(table: RecordsTable, rounds: int) -> None:
    """Hold many claims, then finish them all, and that again and again."""
    store, policy = table.store(), Policy()
    try:
        for _ in range(rounds):
            leases = []
            for _ in range(OPEN):
                asked = ClaimRequest(SCOPE, random_keys(), "f" * 64, new_owner(), policy, "web-3:812 task")
                granted = run_sync(store.claim(asked))
                assert isinstance(granted, Granted)
                leases.append(granted.lease)
            for lease in leases:
                run_sync(store.finish(lease, OUTCOME))
    finally:
        run_sync(store.close())


def measure_beside(table: RecordsTable, purge: Purge, extent: Extent) -> Beside:
    """Make first calls without a purge and beside one, in turns, until nothing is left to be purged."""
    found = Beside(Measured(), Measured(), Purged())
    with calling(table) as charge:
        for _ in range(WARM_UP):
            call(charge, random_keys)
        for _ in range(extent.turns):
            until = time.monotonic() + extent.beside_seconds
            without = calls_while(charge, lambda: time.monotonic() < until)  # noqa: B023 - it is over by the next turn
            purge.begin(extent.beside_seconds, table.rows)
            beside = calls_while(charge, lambda: purge.is_under_way)
            found.purged.add(purge.end())
            for measured, took in ((found.without, without), (found.beside, beside)):
                measured.all += took
                measured.turns.append(statistics.median(took))
            if found.purged.is_all:
                break
    return found


def calls_while(charge: Handler, goes_on: Callable[[], bool]) -> list[float]:
    """Make first calls, one at least, and return what each took."""
    took = []
    while goes_on() or not took:
        begun = time.perf_counter()
        call(charge, random_keys)
        took.append(time.perf_counter() - begun)
    return took


# What PostgreSQL counted


def updated(table: RecordsTable, updates: int) -> Statistics:
    """Wait until it has heard of so many updates, and return what it counted."""
    wait_until(lambda: table.statistics().updates >= updates, seconds=60, what=f"{updates} updates to be counted")
    return table.statistics()


def settled(table: RecordsTable) -> Statistics:
    """Wait until it hears no more of sessions that have ended, and return what it counted."""
    last = table.statistics()
    while True:
        time.sleep(1.0)
        now = table.statistics()
        if now == last:
            return now
        last = now


def vacuumed(table: RecordsTable, patience: float) -> Statistics | None:
    """Wait until autovacuum has no more to do for its default settings; None if that takes too long."""
    try:
        wait_until(lambda: not table.is_due, seconds=patience, what="autovacuum")
    except TimeoutError:
        return None
    return table.statistics()
