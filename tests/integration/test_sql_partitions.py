"""A table that is partitioned by the hash of its key keeps every promise: one record a key, and what is live stays."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any

import pytest
from sqlalchemy import Connection, NullPool, create_engine, text
from sqlalchemy.orm import Session, sessionmaker

from idem_tasks import Idempotency, idempotent_task
from idem_tasks.claims import Finished, Granted, InProgress, Recorded
from idem_tasks.runtime import run_sync
from idem_tasks.stores.schema import DEFAULT_PREFIX
from idem_tasks.stores.sql import SQLStore
from idem_tasks.stores.sql_statements import statements_for
from idem_tasks.testing.driver import Driver
from idem_tasks.testing.store_in_use import SHORT, StoreInUse
from tests.services.partitions import partition, partitioning
from tests.services.tables import make_tables
from tests.services.waiting import wait_until

KEYS = [f"key-{number}" for number in range(20)]
KEYS_IN_ORDER = sorted(KEYS)


@pytest.fixture(params=["postgres_url", "mariadb_url"])
def use(request: pytest.FixtureRequest) -> Iterator[StoreInUse]:
    url = request.getfixturevalue(request.param)
    with using(url) as use:
        partition(url)
        yield use


@contextmanager
def using(url: str) -> Iterator[StoreInUse]:
    """Give a store whose tables are made."""
    with Driver("blocking") as driver:
        use = StoreInUse(SQLStore(url, create_schema=True), driver)
        driver(use.store.prepare())
        yield use
        driver(use.store.close())


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    """Give a connection in which each statement is a transaction, unless it says BEGIN."""
    with create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool).connect() as connection:
        yield connection


def test_a_key_has_one_record_in_all_partitions(use: StoreInUse) -> None:
    """It is granted once, whatever its state and time are by then, and taken over once (F13)."""
    for key in KEYS:
        lease = use.granted(key)
        assert isinstance(use.claim(key), InProgress)
        use.release(lease)
        assert isinstance(use.claim(key, lease=SHORT), Granted)
    for key in KEYS:
        use.finish(use.taken_over(key))
        assert isinstance(use.claim(key), Finished)
    assert sum(use.driver(use.store.stats()).values()) == len(KEYS)


def test_a_purge_takes_no_live_record_of_another_partition(use: StoreInUse) -> None:
    """Rows at the same place of two partitions are told apart: what has ended goes, what is live stays (F47)."""
    over = KEYS[::2]
    for key in over:
        use.finish(use.granted(key, lease=0.1, max_hold=0.1, retention=0.1))
    for key in KEYS[1::2]:
        use.granted(key)
    use.driver.pause(0.4)
    purged = use.purge(limit=3) + use.purge()
    assert sorted(purged) == sorted((use.scope, key) for key in over)
    assert [key for key in KEYS if use.get(key) is None] == over


def test_leases_of_all_partitions_are_renewed_together(use: StoreInUse) -> None:
    """One renewal reaches every claim, and none that was finished."""
    leases = [use.granted(key, lease=SHORT) for key in KEYS]
    use.finish(leases[0])
    assert use.renew(*leases) == {lease.owner for lease in leases[1:]}


@pytest.fixture(params=["postgres_url", "mariadb_url"])
def partitioned_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(request.param)
    make_tables(url)
    partition(url)
    return url


def test_a_batch_over_all_partitions(partitioned_url: str) -> None:
    """One handler gets what is new, whatever partition it is in; the rest is answered."""
    sent: list[str] = []

    def send_all(keys: list[str]) -> list[str]:
        sent.extend(keys)
        return [f"sent {key}" for key in keys]

    with Idempotency.from_urls(database_url=partitioned_url) as idem:
        for some in (KEYS[::2], KEYS, KEYS):
            answers = idem.run_batch(send_all, some, scope="send", key="{message}")
            assert answers == [f"sent {key}" for key in some]
    assert sorted(sent) == KEYS_IN_ORDER


def test_rows_and_outcome_are_one_transaction(partitioned_url: str) -> None:
    """What a handler writes through its session is there once, or not at all."""
    with connected(partitioned_url) as connection:
        connection.execute(text("CREATE TABLE parcels (name varchar(20))"))

    sessions = sessionmaker(create_engine(partitioned_url, poolclass=NullPool))
    with Idempotency.from_urls(database_url=partitioned_url) as idem:

        @idempotent_task(key="{name}", scope="ship", idempotency=idem, session=sessions)
        def ship(name: str, session: Session, fails: bool = False) -> str:
            session.execute(text("INSERT INTO parcels VALUES (:name)"), {"name": name})
            if fails:
                raise ValueError(name)
            return name

        for key in KEYS:
            with pytest.raises(ValueError, match=key):
                ship(key, fails=True)  # type: ignore[call-arg]
            assert ship(key, fails=False) == ship(key, fails=False) == key  # type: ignore[call-arg]
    with connected(partitioned_url) as connection:
        assert sorted(connection.scalars(text("SELECT name FROM parcels"))) == KEYS_IN_ORDER


# PostgreSQL


@pytest.fixture
def plain(postgres_url: str) -> Iterator[StoreInUse]:
    """A store in use whose records are not partitioned yet."""
    with using(postgres_url) as use:
        yield use


def test_records_that_are_there_are_partitioned_as_the_page_says(plain: StoreInUse, postgres_url: str) -> None:
    """Workers are turned away meanwhile, nothing is lost, and a claim that nobody could renew stands."""
    for key in KEYS:
        plain.finish(plain.granted(key))
    running = plain.granted("running", lease=SHORT)
    with connected(postgres_url) as connection:
        with partitioning_meanwhile(connection):
            assert isinstance(plain.claim(KEYS[0]), InProgress)
            plain.let_expire(running)
        made = "SELECT relname, reloptions FROM pg_class JOIN pg_inherits ON oid = inhrelid WHERE relkind = 'r'"
        partitions = connection.execute(text(made)).all()
        names = text("SELECT indexname FROM pg_indexes WHERE tablename = 'idem_tasks_records'")
        indexes = set(connection.scalars(names))
    assert isinstance(plain.claim("running"), InProgress)
    assert plain.finish(running) == Recorded()
    assert {type(plain.claim(key)) for key in [*KEYS, "running"]} == {Finished}
    assert sorted(partitions) == [(f"idem_tasks_records_{number}", ["fillfactor=70"]) for number in range(4)]
    assert indexes == {f"idem_tasks_records_{name}" for name in ("pkey", "attention", "expires_at")}


def test_a_handler_that_ends_meanwhile_is_recorded(postgres_url: str) -> None:
    """Its finish is tried again until the table is there."""
    make_tables(postgres_url)
    has_begun, may_end = Event(), Event()

    def send() -> str:
        has_begun.set()
        assert may_end.wait(60)
        return "sent"

    with (
        Idempotency.from_urls(database_url=postgres_url) as idem,
        connected(postgres_url) as connection,
        ThreadPoolExecutor(1) as worker,
        using(postgres_url) as elsewhere,
    ):
        running = worker.submit(idem.run, send, scope="send", key="A-1")
        assert has_begun.wait(60)
        with partitioning_meanwhile(connection):
            may_end.set()
            # Takes as long as the finish waits for the table, which it then has to try again.
            assert isinstance(elsewhere.claim(), InProgress)
            assert not running.done()
        assert running.result(60) == "sent"
        assert idem.run(send, scope="send", key="A-1") == "sent"


@contextmanager
def partitioning_meanwhile(connection: Connection) -> Iterator[None]:
    """Run the page's statements up to the commit, which comes at the end."""
    statements = partitioning(connection.engine)
    end = statements.index("COMMIT")
    for statement in statements[:end]:
        connection.exec_driver_sql(statement)
    yield
    for statement in statements[end:]:
        connection.exec_driver_sql(statement)


def test_making_the_tables_again_leaves_the_partitions(postgres_url: str) -> None:
    """`init-db` finds its tables, and makes nothing."""
    make_tables(postgres_url)
    partition(postgres_url)
    make_tables(postgres_url)
    with connected(postgres_url) as connection:
        kind = text("SELECT relkind FROM pg_class WHERE relname = 'idem_tasks_records'")
        assert connection.scalar(kind) in ("p", b"p")


def test_a_claim_is_planned_for_one_partition(postgres_url: str) -> None:
    """The planner sees by the key which partition it is in."""
    make_tables(postgres_url)
    partition(postgres_url)
    engine = create_engine(postgres_url, poolclass=NullPool)
    statement: Any = statements_for("postgresql", None, DEFAULT_PREFIX).claim
    claim = statement.compile(engine)
    seen = set()
    with engine.connect() as connection:
        for key in KEYS:
            values = dict.fromkeys(claim.params) | {"at_scope": "shop", "at_key": key}
            plan = connection.exec_driver_sql(f"EXPLAIN (COSTS OFF) {claim}", claim.construct_params(values)).scalars()
            scanned = set(re.findall(r" on (idem_tasks_records_\d)", "\n".join(plan)))
            assert len(scanned) == 1
            seen |= scanned
    assert len(seen) == 4


def test_calls_look_into_one_partition(plain: StoreInUse, postgres_url: str) -> None:
    """Also once their statements are prepared: claims, releases and finishes of one key read none of the others."""
    partition(postgres_url)
    scans = text("SELECT idx_scan + seq_scan FROM pg_stat_user_tables WHERE relname ~ '^idem_tasks_records_.$'")
    with connected(postgres_url) as connection:

        def counted() -> list[int]:
            return sorted(connection.scalars(scans))

        connection.execute(text("SELECT pg_stat_reset()"))
        for _ in range(20):
            plain.release(plain.granted())
        plain.finish(plain.granted())
        for _ in range(20):
            assert isinstance(plain.claim(), Finished)
        run_sync(plain.store.close())
        wait_until(lambda: counted()[3] >= 60, seconds=20, what="the scans to be counted")
        assert counted()[:3] == [0, 0, 0]
