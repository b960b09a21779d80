"""The budget of the SQL store: round trips on the wire and commits in the server, for every case and database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, NullPool, create_engine, event, make_url, text

from idem_tasks.claims import EncodedOutcome, OutboxMessage, Recorded
from idem_tasks.stores.base import RuntimeName
from idem_tasks.stores.sql import SQLStore
from idem_tasks.testing.batch_contract import BatchInUse
from idem_tasks.testing.driver import Driver
from idem_tasks.testing.store_in_use import DONE, SHORT, StoreInUse
from tests.integration.sql_proxy import Proxy
from tests.services.mariadb_server import MariaDBServer
from tests.services.postgres_server import PostgresServer
from tests.services.waiting import wait_until

WARM_UP = 7
"""asyncpg prepares a statement when it is first used, psycopg when it was used five times: a round trip, once."""

CASES: dict[str, Callable[[StoreInUse, str], Callable[[], object]]] = {}
"""Each prepares a record under a key, and returns the one call to be counted."""


def case(function: Callable[[StoreInUse, str], Callable[[], object]]) -> None:
    CASES[function.__name__] = function


@case
def first_claim(use: StoreInUse, key: str) -> Callable[[], object]:
    return partial(use.granted, key)


@case
def finish(use: StoreInUse, key: str) -> Callable[[], object]:
    return partial(use.finish, use.granted(key))


@case
def finish_with_messages(use: StoreInUse, key: str) -> Callable[[], object]:
    lease = use.granted(key)
    messages = tuple(OutboxMessage(f"{n:032}", use.scope, key, lease.fencing_token, n, "mail", b"{}") for n in range(3))
    return partial(use.finish, lease, EncodedOutcome(body=b"1", codec="json", messages=messages))


@case
def release(use: StoreInUse, key: str) -> Callable[[], object]:
    return partial(use.release, use.granted(key), failed=True)


@case
def duplicate_of_finished(use: StoreInUse, key: str) -> Callable[[], object]:
    use.finish(use.granted(key))
    return partial(use.claim, key)


@case
def duplicate_of_running(use: StoreInUse, key: str) -> Callable[[], object]:
    use.granted(key)
    return partial(use.claim, key)


@case
def claim_of_released(use: StoreInUse, key: str) -> Callable[[], object]:
    use.release(use.granted(key))
    return partial(use.granted, key)


@case
def takeover(use: StoreInUse, key: str) -> Callable[[], object]:
    use.let_expire(use.granted(key, lease=SHORT))
    return partial(use.granted, key)


@case
def put_in_doubt(use: StoreInUse, key: str) -> Callable[[], object]:
    use.let_expire(use.granted(key, lease=SHORT))
    return partial(use.claim, key, on_crash="hold")


@case
def superseded_finish(use: StoreInUse, key: str) -> Callable[[], object]:
    lease = use.granted(key)
    use.release(lease)
    use.finish(use.granted(key))
    return partial(use.finish, lease)


@case
def renewal_of_three(use: StoreInUse, key: str) -> Callable[[], object]:
    return partial(use.renew, *(use.granted(f"{key}-{number}") for number in range(3)))


@case
def first_claims_of_ten(use: StoreInUse, key: str) -> Callable[[], object]:
    return partial(in_batches(use).claim, [use.request(f"{key}-{number}") for number in range(10)])


@case
def finishes_of_ten(use: StoreInUse, key: str) -> Callable[[], object]:
    leases = in_batches(use).granted(*(f"{key}-{number}" for number in range(10)))
    return partial(in_batches(use).finish, *((lease, DONE) for lease in leases))


@case
def duplicates_of_ten(use: StoreInUse, key: str) -> Callable[[], object]:
    leases = in_batches(use).granted(*(f"{key}-{number}" for number in range(10)))
    in_batches(use).finish(*((lease, DONE) for lease in leases[:5]))
    return partial(in_batches(use).claim, [use.request(lease.key) for lease in leases])


@case
def finishes_of_ten_of_which_one_is_superseded(use: StoreInUse, key: str) -> Callable[[], object]:
    leases = in_batches(use).granted(*(f"{key}-{number}" for number in range(10)))
    use.release(leases[3])
    return partial(in_batches(use).finish, *((lease, DONE) for lease in leases))


@case
def begin_of_a_step(use: StoreInUse, key: str) -> Callable[[], object]:
    return partial(use.begin_step, use.granted(key))


@case
def finish_of_a_step(use: StoreInUse, key: str) -> Callable[[], object]:
    lease = use.granted(key)
    use.begin_step(lease)
    return partial(use.finish_step, lease)


@case
def replay_of_a_step(use: StoreInUse, key: str) -> Callable[[], object]:
    lease = use.granted(key)
    use.begin_step(lease)
    use.finish_step(lease)
    use.release(lease)
    return partial(use.begin_step, use.granted(key))


@case
def forget(use: StoreInUse, key: str) -> Callable[[], object]:
    use.finish(use.granted(key))
    return partial(use.forget, key)


@case
def purge(use: StoreInUse, key: str) -> Callable[[], object]:
    use.finish(use.granted(key, lease=0.1, max_hold=0.1, retention=0.1))
    use.driver.pause(0.25)  # longer than max_hold and retention: this very record is there to be purged
    return use.purge


def in_batches(use: StoreInUse) -> BatchInUse:
    return BatchInUse(use)


POSTGRES = {
    "first_claim": (1, 1),
    "finish": (1, 1),
    "finish_with_messages": (1, 1),
    "release": (1, 1),
    "duplicate_of_finished": (1, 0),
    "duplicate_of_running": (1, 0),
    "claim_of_released": (2, 1),
    "takeover": (2, 1),
    "put_in_doubt": (2, 1),
    "superseded_finish": (2, 0),
    "renewal_of_three": (1, 1),
    "first_claims_of_ten": (1, 1),
    "finishes_of_ten": (1, 1),
    "duplicates_of_ten": (1, 0),
    "finishes_of_ten_of_which_one_is_superseded": (1, 1),
    "begin_of_a_step": (1, 1),
    "finish_of_a_step": (1, 1),
    "replay_of_a_step": (1, 1),
    # Looks, and deletes the record, its steps and then writes who did it: the steps in a statement of their own, which
    # has to see what was begun while the first waited for the record.
    "forget": (6, 1),
    "purge": (1, 1),
}
MARIADB = POSTGRES | {
    "finish_with_messages": (4, 1),
    # A read-write transaction, because it locked the row; it writes nothing, as another test shows.
    "duplicate_of_finished": (1, 1),
    "duplicate_of_running": (1, 1),
    "claim_of_released": (2, 2),
    "takeover": (2, 2),
    "put_in_doubt": (2, 2),
    "superseded_finish": (2, 1),
    "renewal_of_three": (4, 1),
    "duplicates_of_ten": (1, 1),
    # The server counts those that it wrote; which ones, it has to be asked.
    "finishes_of_ten_of_which_one_is_superseded": (2, 1),
    "purge": (5, 1),
}
SQLITE = POSTGRES | {
    "finish_with_messages": (4, 1),
    "duplicate_of_finished": (2, 0),
    "duplicate_of_running": (2, 0),
    "claim_of_released": (3, 1),
    "takeover": (3, 1),
    "put_in_doubt": (3, 1),
    "finishes_of_ten": (12, 1),
    "duplicates_of_ten": (2, 0),
    "finishes_of_ten_of_which_one_is_superseded": (12, 1),
    "replay_of_a_step": (1, 0),
    "purge": (4, 1),
}
"""Round trips and commits of each case. A call into SQLite counts as a round trip, though it is one of microseconds."""


def counted(use: StoreInUse, round_trips: Callable[[], int], commits: Callable[[], int]) -> dict[str, tuple[int, int]]:
    counts = {}
    for name, prepare in CASES.items():
        for number in range(2 if name in {"takeover", "put_in_doubt"} else WARM_UP):
            call = prepare(use, f"{name}-{number}")
            use.driver.pause(0.002)  # SQLite writes nothing that is as it was, and its clock counts milliseconds
            before = round_trips(), commits()
            call()
            counts[name] = (round_trips() - before[0], commits() - before[1])
    return counts


@contextmanager
def in_use(url: str, runtime: RuntimeName) -> Iterator[StoreInUse]:
    with Driver(runtime) as driver:
        use = StoreInUse(SQLStore(url, create_schema=True), driver)
        driver(use.store.prepare())
        yield use
        driver(use.store.close())


@contextmanager
def watching(url: str) -> Iterator[Connection]:
    """A connection past the proxy."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        yield connection


@pytest.mark.parametrize("runtime, driver", [("blocking", "psycopg"), ("asyncio", "psycopg"), ("asyncio", "asyncpg")])
def test_postgres(private_postgres: Callable[..., PostgresServer], runtime: RuntimeName, driver: str) -> None:
    """On PostgreSQL each case takes what the budget says, and a duplicate burns no transaction id."""
    server = private_postgres(autovacuum="off")
    transaction_ids = text("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
    with Proxy(server.url) as proxy, watching(server.url) as watcher:
        url = make_url(proxy.url).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
        with in_use(url, runtime) as use:
            counts = counted(use, lambda: proxy.round_trips, lambda: watcher.execute(transaction_ids).scalar_one())
    assert counts == POSTGRES


@pytest.mark.parametrize("runtime", ["blocking", "asyncio"])
def test_mariadb(private_mariadb: Callable[..., MariaDBServer], runtime: RuntimeName) -> None:
    """On MariaDB each case takes what the budget says."""
    server = private_mariadb(innodb_monitor_enable="trx_rw_commits")
    commits = text("SELECT count FROM information_schema.innodb_metrics WHERE name = 'trx_rw_commits'")
    with Proxy(server.url) as proxy, watching(server.url) as watcher, in_use(proxy.url, runtime) as use:
        counts = counted(use, lambda: proxy.round_trips, lambda: watcher.execute(commits).scalar_one())
    assert counts == MARIADB


def test_a_duplicate_writes_nothing_on_mariadb(private_mariadb: Callable[..., MariaDBServer]) -> None:
    """On MariaDB a duplicate writes not a byte to the log, though its statement begins with INSERT."""
    server = private_mariadb()
    log_position = text("SHOW GLOBAL STATUS LIKE 'Innodb_lsn_current'")
    with watching(server.url) as watcher, in_use(server.url, "blocking") as use:

        def position() -> int:
            return int(watcher.execute(log_position).one()[1])

        def is_quiet() -> bool:
            before = position()
            use.driver.pause(0.5)
            return position() == before

        use.finish(use.granted("finished"))
        use.granted("running")
        wait_until(is_quiet, seconds=30, what="the server to have nothing left to write")

        def twenty_duplicates_write() -> bool:
            before = position()
            for _ in range(20):
                use.claim("finished")
                use.claim("running")
            return position() != before

        # The server writes for itself now and then; a duplicate that wrote would do so each time.
        assert not all(twenty_duplicates_write() for _ in range(10))


@pytest.mark.parametrize("runtime", ["blocking", "asyncio"])
def test_sqlite(sqlite_url: str, runtime: RuntimeName) -> None:
    """On SQLite each case takes what the budget says, and a duplicate writes nothing."""
    statements: list[str] = []

    def remember(statement: str) -> None:
        if "data_version" not in statement:
            statements.append(statement)

    def trace(connection: Any, _record: object) -> None:
        if hasattr(connection, "run_async"):
            connection.run_async(lambda driver: driver.set_trace_callback(remember))
        else:
            connection.set_trace_callback(remember)

    event.listen(Engine, "connect", trace)
    try:
        with in_use(sqlite_url, runtime) as use, watching(sqlite_url) as watcher:
            version = text("PRAGMA data_version")
            counts = counted(use, lambda: len(statements), lambda: watcher.execute(version).scalar_one())
    finally:
        event.remove(Engine, "connect", trace)
    assert counts == SQLITE


def test_a_finish_is_a_hot_update_on_postgres(postgres_url: str) -> None:
    """A renewal and a finish change no indexed column, so PostgreSQL writes no index entry for them."""
    with in_use(postgres_url, "blocking") as use:
        for number in range(20):
            lease = use.granted(str(number))
            use.renew(lease)
            use.finish(lease)
    assert hot_updates(postgres_url) == (40, 40)


def test_a_finish_of_many_is_one_of_hot_updates_on_postgres(postgres_url: str) -> None:
    """As long as their page has room for both versions of all of them, which a large batch begins to fill."""
    with in_use(postgres_url, "blocking") as use:
        leases = in_batches(use).granted(*(str(number) for number in range(8)))
        assert in_batches(use).finish(*((lease, DONE) for lease in leases)) == [Recorded()] * 8
    assert hot_updates(postgres_url) == (8, 8)


def hot_updates(url: str) -> tuple[int, ...]:
    """Return how many updates there were, and how many of them were HOT."""
    # Connections tell their statistics when they end.
    updates = text("SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'idem_tasks_records'")
    with watching(url) as watcher:
        return tuple(watcher.execute(updates).one())


def test_statements_are_built_once(postgres_url: str) -> None:
    """A call builds no statement and SQLAlchemy compiles none: all is there from the first call."""
    with in_use(postgres_url, "blocking") as use:
        for number in range(2):
            use.finish(use.granted(str(number)))
            finish_many(use, number)
        engine = use.store._clients["blocking"]._engine  # type: ignore[attr-defined]
        compiled = len(engine._compiled_cache)
        for number in range(2, 6):
            use.finish(use.granted(str(number)))
            finish_many(use, number)
        assert len(engine._compiled_cache) == compiled


def finish_many(use: StoreInUse, number: int) -> None:
    """Claim and finish as many as this number says, and some more."""
    leases = in_batches(use).granted(*(f"{number}-{each}" for each in range(number + 2)))
    in_batches(use).finish(*((lease, DONE) for lease in leases))
