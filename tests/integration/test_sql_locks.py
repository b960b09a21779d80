"""Locked records: a claim says so quickly, a renewal passes them by, and deadlocks are nobody's business."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Connection, NullPool, create_engine, make_url, text

from idem_tasks.claims import Granted, InProgress, Lease, Recorded
from idem_tasks.errors import StoreUnavailableError
from idem_tasks.stores import sql_urls
from idem_tasks.stores.base import RuntimeName
from idem_tasks.stores.schema import records_table
from idem_tasks.stores.sql import SQLStore
from idem_tasks.testing.driver import Driver
from idem_tasks.testing.store_in_use import StoreInUse

SERVERS = ["postgres_url", "mariadb_url"]
RUNTIMES: list[RuntimeName] = ["blocking", "asyncio"]


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=RUNTIMES)
def use(url: str, request: pytest.FixtureRequest) -> Iterator[StoreInUse]:
    with Driver(request.param) as driver:
        use = StoreInUse(SQLStore(url, create_schema=True), driver)
        driver(use.store.prepare())
        yield use
        driver(use.store.close())


@contextmanager
def transaction(url: str) -> Iterator[Connection]:
    """A transaction of somebody else's, rolled back at the end."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        yield connection
        connection.rollback()


def touch(connection: Connection, use: StoreInUse, *keys: str) -> None:
    """Lock these records, as a finish does that is not committed yet."""
    table = records_table()
    for key in keys:
        place = (table.c.scope == use.scope) & (table.c.key == key)
        connection.execute(table.update().where(place).values(holder="somebody else"))


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_claim_of_a_locked_record_is_in_progress_soon(url: str, use: StoreInUse) -> None:
    """A record that another transaction holds is in progress, not an outage, and waits for no long time (F46)."""
    use.release(use.granted())
    with transaction(url) as other:
        touch(other, use, "key")
        began = time.monotonic()
        answer = use.claim()
        assert time.monotonic() - began < sql_urls.LOCK_TIMEOUT + 2
    assert isinstance(answer, InProgress)
    assert answer.retry_after > 0
    assert isinstance(use.claim(), Granted)


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_claim_of_a_record_not_committed_yet_is_in_progress_soon(url: str, use: StoreInUse) -> None:
    """A record inserted by a transaction that is still open is in progress (F46)."""
    use.finish(use.granted("other"))
    table = records_table()
    with transaction(url) as other:
        # Times cannot be bound, so the new record is made of the old one.
        columns = [column.name for column in table.c if column.name != "key"]
        copied = (
            table.select().where(table.c.key == "other").with_only_columns(text("'key'"), *map(table.c.get, columns))
        )
        other.execute(table.insert().from_select(["key", *columns], copied))
        assert isinstance(use.claim("key"), InProgress)
    assert isinstance(use.claim("key"), Granted)


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_renewal_passes_locked_records_by(url: str, use: StoreInUse) -> None:
    """One uncommitted finish does not stop the renewals of all other claims of the process (F46)."""
    leases = [use.granted(str(number)) for number in range(5)]
    with transaction(url) as other:
        touch(other, use, "2")
        began = time.monotonic()
        renewed = use.renew(*leases)
        assert time.monotonic() - began < sql_urls.LOCK_TIMEOUT
    assert renewed == {lease.owner for lease in leases if lease.key != "2"}
    assert use.renew(*leases) == {lease.owner for lease in leases}


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_finish_of_a_locked_record_asks_to_be_tried_again(url: str, use: StoreInUse) -> None:
    """A finish cannot pass a lock by: it is unavailable for the moment, and recorded when tried again."""
    lease = use.granted()
    with transaction(url) as other:
        touch(other, use, "key")
        with pytest.raises(StoreUnavailableError, match="locked"):
            use.finish(lease)
    assert use.finish(lease) == Recorded()


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_purge_passes_locked_records_by(url: str, use: StoreInUse) -> None:
    """A purge neither waits for a locked record nor deletes it (F46, F47)."""
    for key in "abc":
        use.finish(use.granted(key, lease=0.1, max_hold=0.1, retention=0.1))
    use.driver.pause(0.4)
    with transaction(url) as other:
        touch(other, use, "b")
        assert sorted(use.purge()) == [(use.scope, "a"), (use.scope, "c")]
    assert use.purge() == [(use.scope, "b")]


@pytest.mark.parametrize("url", ["sqlite_url", *SERVERS], indirect=True)
def test_ten_thousand_leases_are_renewed(url: str, use: StoreInUse) -> None:
    """No limit on parameters is met, however many claims a process holds."""
    first = use.granted("0")
    table = records_table()
    engine = create_engine(url, poolclass=NullPool)
    columns = [column.name for column in table.c if column.name != "key"]
    with engine.begin() as connection:
        # Doubled until there are enough: the keys get one more character each time.
        for digit in range(14):
            key = table.c.key + str(digit % 10) if digit >= 10 else table.c.key + "abcdefghij"[digit]
            copied = table.select().where(table.c.scope == use.scope).with_only_columns(key, *map(table.c.get, columns))
            connection.execute(table.insert().from_select(["key", *columns], copied))
        keys = connection.scalars(table.select().with_only_columns(table.c.key)).all()
    leases = [Lease(use.request(key, owner=first.owner), first.fencing_token) for key in keys[:10_000]]
    began = time.monotonic()
    assert use.renew(*leases) == {first.owner}
    assert time.monotonic() - began < 30
    assert (use.record(keys[9_999]).lease_expires_at - use.record(keys[9_999]).created_at).total_seconds() > 60


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_deadlock_is_survived(url: str, use: StoreInUse) -> None:
    """A statement that loses a deadlock is sent again; the caller hears nothing of it."""
    lease = use.granted()
    codes: tuple[str, ...] = ("40P01", "40001") if url.startswith("postgres") else ("1213",)
    for code in codes:
        with failing_once(url, code):
            assert use.renew(lease) == {lease.owner}


@contextmanager
def failing_once(url: str, code: str) -> Iterator[None]:
    """Let the server itself raise this error, once, when a record is written."""
    is_postgres = url.startswith("postgres")
    with create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT").connect() as connection:
        for statement in POSTGRES_TRAP if is_postgres else MARIADB_TRAP:
            connection.execute(text(statement.replace("{code}", code)))
        yield
        connection.execute(text("DROP TRIGGER trap" + (" ON idem_tasks_records" if is_postgres else "")))


# A sequence is not rolled back with the statement that fails, so it fails once.
POSTGRES_TRAP = [
    "DROP SEQUENCE IF EXISTS falls",
    "CREATE SEQUENCE falls",
    """CREATE OR REPLACE FUNCTION fall() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF nextval('falls') = 1 THEN RAISE EXCEPTION 'a trap' USING ERRCODE = '{code}'; END IF; RETURN NEW; END $$""",
    "CREATE TRIGGER trap BEFORE UPDATE ON idem_tasks_records FOR EACH ROW EXECUTE FUNCTION fall()",
]
MARIADB_TRAP = [
    "CREATE OR REPLACE SEQUENCE falls",
    """CREATE TRIGGER trap BEFORE UPDATE ON idem_tasks_records FOR EACH ROW
        IF NEXTVAL(falls) = 1 THEN SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = {code}; END IF""",
]


@pytest.fixture(params=RUNTIMES)
def busy(sqlite_url: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreInUse]:
    """A store on an SQLite file, where nobody waits longer than half a second."""
    monkeypatch.setattr(sql_urls, "SQLITE_BUSY_TIMEOUT", 0.5)
    with Driver(request.param) as driver:
        use = StoreInUse(SQLStore(sqlite_url), driver)
        yield use
        driver(use.store.close())


def test_a_busy_sqlite_is_in_progress_and_no_lost_claim(sqlite_url: str, busy: StoreInUse) -> None:
    """While somebody else writes, a claim is in progress, a replay is served, and a renewal extends nothing (F46)."""
    lease = busy.granted("held")
    busy.finish(busy.granted("finished"))
    other = sqlite3.connect(make_url(sqlite_url).database or "", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        assert isinstance(busy.claim("new"), InProgress)
        assert busy.renew(lease) == frozenset()
        with pytest.raises(StoreUnavailableError):
            busy.finish(lease)
        assert busy.record("finished").outcome is not None
    finally:
        other.execute("ROLLBACK")
        other.close()
    assert busy.renew(lease) == {lease.owner}
    assert busy.finish(lease) == Recorded()


@pytest.mark.parametrize("url", ["sqlite_url", *SERVERS], indirect=True)
def test_what_is_no_longer_held_is_not_renewed(url: str, use: StoreInUse) -> None:
    """A claim that ended while the heartbeat waited for its turn is left alone, and where all have, nothing is sent."""
    lease = use.granted()
    before = use.record().lease_expires_at
    assert use.driver(use.store.renew([lease], lambda _owner: False)) == frozenset()
    assert use.record().lease_expires_at == before
