"""The journal of steps on databases: what others do to its record at the same moment, and tables that are not there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import NullPool, create_engine, inspect, text

from idem_tasks.claims import Lost, Recorded, StepBegun, StepFinished
from idem_tasks.errors import StoreConfigurationError, StoreUnavailableError
from idem_tasks.stores.sql import SQLStore
from idem_tasks.testing.driver import PATIENCE, Driver
from idem_tasks.testing.store_in_use import DONE, SHORT, StoreInUse

SERVERS = ["postgres_url", "mariadb_url"]


@pytest.fixture(params=["sqlite_url", *SERVERS])
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def use(url: str) -> Iterator[StoreInUse]:
    with Driver("blocking") as driver:
        use = StoreInUse(SQLStore(url, create_schema=True), driver)
        driver(use.store.prepare())
        yield use
        driver(use.store.close())


def steps(url: str) -> int:
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        return int(connection.execute(text("SELECT count(*) FROM idem_tasks_steps")).scalar_one())


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_locked_record_asks_to_be_tried_again(url: str, use: StoreInUse) -> None:
    """A step waits for no long time for a record that another transaction holds, and writes nothing (F46)."""
    lease = use.granted()
    use.begin_step(lease)
    with create_engine(url, poolclass=NullPool).begin() as other:
        other.execute(text("UPDATE idem_tasks_records SET holder = 'somebody else'"))
        with pytest.raises(StoreUnavailableError, match="locked"):
            use.begin_step(lease, 2, "mail")
        with pytest.raises(StoreUnavailableError, match="locked"):
            use.finish_step(lease)
    assert use.begin_step(lease) == StepBegun()
    assert use.finish_step(lease) == Recorded()
    assert steps(url) == 1


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_claim_that_is_taken_over_meanwhile_writes_nothing(url: str, use: StoreInUse) -> None:
    """A step that waited for its record sees the fence as it is then, not as it was when it was sent (F1, F12)."""
    lease = use.granted()
    with create_engine(url, poolclass=NullPool).connect() as other, ThreadPoolExecutor(1) as thread:
        other.execute(text("UPDATE idem_tasks_records SET fencing_token = fencing_token + 1"))
        waiting = thread.submit(use.begin_step, lease)
        wait_for_a_lock(url)
        other.commit()
        assert waiting.result(PATIENCE) == Lost()
    assert steps(url) == 0


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_step_that_is_begun_while_its_record_is_forgotten_goes_with_it(
    url: str, use: StoreInUse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A paused holder that wakes up just then leaves no step behind for the next claim of that key (F53)."""
    lease = use.granted(lease=SHORT)
    use.let_expire(lease)
    with create_engine(url, poolclass=NullPool).connect() as holder, ThreadPoolExecutor(1) as thread:
        holder.execute(text("SELECT * FROM idem_tasks_records FOR UPDATE"))
        forgetting = thread.submit(use.forget)
        wait_for_a_lock(url)
        holder.execute(
            text(
                "INSERT INTO idem_tasks_steps SELECT scope, {key}, generation, 1, 'charge', fencing_token, "
                "NULL, NULL, NULL, updated_at, NULL FROM idem_tasks_records".format(
                    key="key" if url.startswith("postgres") else "`key`"
                )
            )
        )
        holder.commit()
        assert forgetting.result(PATIENCE)
    assert steps(url) == 0


WAITING = {
    "postgresql": "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid <> pg_backend_pid()",
    "mysql": "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'",
}


def wait_for_a_lock(url: str) -> None:
    """Wait until a statement waits for a row of this test's database."""
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    waiting, tick = text(WAITING[engine.dialect.name]), threading.Event()
    with engine.connect() as connection:
        for _ in range(200):
            if connection.execute(waiting).scalar_one():
                return
            tick.wait(0.02)
    raise AssertionError("nobody waits for a lock")


def without_steps(url: str) -> None:
    """Bring the database back to what the oldest version made."""
    with create_engine(url, poolclass=NullPool).begin() as connection:
        for table in inspect(connection).get_table_names():
            if table not in ("idem_tasks_records", "idem_tasks_schema"):
                connection.execute(text(f"DROP TABLE {table}"))
        connection.execute(text("UPDATE idem_tasks_schema SET version_num = '0001'"))


def test_an_older_database_says_what_to_run(url: str, use: StoreInUse) -> None:
    """Without the table of steps, claims and outcomes are as before; what needs it names the command that makes it."""
    use.driver(use.store.close())
    without_steps(url)
    older = StoreInUse(SQLStore(url, create_schema=False), use.driver)
    lease = older.granted()
    for call in (lambda: older.begin_step(lease), lambda: older.finish_step(lease)):
        with pytest.raises(StoreConfigurationError, match="idem-tasks init-db"):
            call()
    assert older.finish(lease) == Recorded()
    older.driver(older.store.prepare())
    again = older.granted("again")
    assert older.begin_step(again) == StepBegun()
    older.driver(older.store.close())


def test_an_older_database_is_brought_up_to_date_where_that_is_allowed(url: str, use: StoreInUse) -> None:
    """With `create_schema` the first step makes the table, and the records stay."""
    use.driver(use.store.close())
    lease = use.granted()
    use.driver(use.store.close())
    without_steps(url)
    assert use.begin_step(lease) == StepBegun()
    assert use.finish_step(lease) == Recorded()
    assert use.begin_step(lease) == StepFinished(DONE)
    assert use.forget("nothing") is None


def test_no_statement_is_built_twice(url: str, use: StoreInUse) -> None:
    """A step builds no statement and SQLAlchemy compiles none: all is there from the first one."""
    lease = use.granted()

    def step(position: int) -> None:
        use.begin_step(lease, position)
        use.finish_step(lease, DONE, position)

    step(1)
    engine = use.store._clients["blocking"]._engine  # type: ignore[attr-defined]
    compiled = len(engine._compiled_cache)
    for position in range(2, 6):
        step(position)
    assert len(engine._compiled_cache) == compiled
