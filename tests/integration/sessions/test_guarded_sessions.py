"""Nothing of a handler's is committed but with its outcome, whatever it does with its session."""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from sqlalchemy import NullPool, event, make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.orm.session import JoinTransactionMode

from idem_tasks import ConfigurationError, StoreUnavailableError, current_claim, idempotent_task
from idem_tasks.claims import State
from idem_tasks.runtime import run_sync
from idem_tasks.testing import Driver
from tests.integration.sessions.seller import SCOPE, Listened, Order, Seller, order
from tests.integration.sql_proxy import Proxy
from tests.services.mariadb_server import MariaDBServer

PRIVATE = "4111-1111"


def on_databases(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("url", [f"{name}_url" for name in names], indirect=True)


on_each_postgres_driver = pytest.mark.parametrize(
    "driver, postgres_driver",
    [("blocking", "psycopg"), ("asyncio", "psycopg"), ("asyncio", "asyncpg")],
    indirect=True,
)


@pytest.fixture
def postgres_driver(request: pytest.FixtureRequest, seller: Seller) -> None:
    """Let the seller's sessions use this driver."""
    if request.param == "asyncpg":
        from sqlalchemy.ext.asyncio import create_async_engine

        engine = create_async_engine(make_url(seller.url).set(drivername="postgresql+asyncpg"))
        seller._made.append(engine)
        seller.sessions = seller.sessionmaker(engine)


def refused(seller: Seller, body: Callable[..., Any], match: str, **options: Any) -> None:
    """See a handler's work refused: nothing of it is there, and its claim is released."""
    with pytest.raises(ConfigurationError, match=match):
        seller.task(body, **options)("A-1")
    assert (seller.orders(), seller.state()) == (0, State.RELEASED)


# A connection of the caller's


@pytest.mark.parametrize("mode", ["conditional_savepoint", "create_savepoint", "rollback_only", "control_fully"])
def test_a_session_within_a_transaction_of_its_connection_is_refused(seller: Seller, mode: JoinTransactionMode) -> None:
    """What its owner can still roll back does not count as recorded."""
    engine = seller.new_engine()
    ran: list[str] = []
    task = seller.task(lambda name, _session: ran.append(name))

    async def call_asyncio() -> None:
        from sqlalchemy.ext.asyncio import AsyncSession

        async with engine.connect() as connection, connection.begin():
            decorated = idempotent_task(key="{name}", scope=SCOPE, idempotency=seller.idem, session=seller.sessions)(
                asyncio_handler
            )
            await decorated("A-1", session=AsyncSession(connection, join_transaction_mode=mode))

    async def asyncio_handler(name: str, session: Any) -> None:
        ran.append(name)

    def call() -> None:
        if seller.is_asyncio:
            seller.driver(call_asyncio())
        else:
            with engine.connect() as connection, connection.begin():
                task("A-1", session=Session(connection, join_transaction_mode=mode))

    with pytest.raises(ConfigurationError, match="bind it to the engine"):
        call()
    assert (ran, seller.state()) == ([], State.RELEASED)


@pytest.mark.parametrize("driver", ["blocking"], indirect=True)
def test_a_connection_of_the_callers_is_his_again_afterwards(seller: Seller) -> None:
    """One that is in no transaction serves, and may be committed by him when the call is over."""
    with seller.engine.connect() as connection:
        assert seller.task(order)("A-1", session=Session(connection)) == "ordered A-1"
        connection.execute(text("UPDATE orders SET name = 'his own'"))
        connection.commit()
    assert (seller.orders("his own"), seller.state()) == (1, State.COMPLETED)


def test_a_two_phase_session_is_refused(seller: Seller) -> None:
    """Its commit is two, and the outcome might come without the rows, or never."""
    refused(seller, order, "twophase", session=seller.sessionmaker(twophase=True))


# Who commits


def commit_connection(session: Session) -> None:
    session.connection().commit()


def commit_root(session: Session) -> None:
    root = session.get_transaction()
    assert root is not None
    session.begin_nested()
    root.commit()


def commit_by_statement(session: Session) -> None:
    session.execute(text("/* all of it */ COMMIT"))


COMMITS = [commit_connection, commit_root, commit_by_statement]


@pytest.mark.parametrize("after_rollback", [False, True])
@pytest.mark.parametrize("swallows", [False, True])
@pytest.mark.parametrize("commit", COMMITS)
def test_a_commit_past_the_session_is_refused(
    seller: Seller, commit: Callable[[Session], None], swallows: bool, after_rollback: bool
) -> None:
    """By its connection, its first transaction or a statement, swallowed or not: no row without an outcome (F63)."""

    def body(name: str, session: Session) -> str:
        if after_rollback:
            session.rollback()
        order(name, session)
        session.flush()
        with contextlib.suppress(ConfigurationError) if swallows else contextlib.nullcontext():
            commit(session)
        session.rollback()
        return order(name, session)

    refused(seller, body, "must not commit")


def test_a_commit_through_the_driver_is_found(seller: Seller) -> None:
    """It cannot be kept from happening; but the handler fails, and is told that its rows may be there."""

    def body(name: str, session: Session) -> str:
        order(name, session)
        session.flush()
        session.connection().connection.dbapi_connection.commit()  # type: ignore[union-attr]
        return order("after it", session)

    with pytest.raises(ConfigurationError, match="may be committed already"):
        seller.task(body)("A-1")
    assert (seller.orders("after it"), seller.state()) == (0, State.RELEASED)


@on_databases("postgres", "mariadb")
def test_autocommit_after_a_rollback_is_refused(seller: Seller) -> None:
    """Each write would be committed by itself, though the first transaction was none such."""

    def body(name: str, session: Session) -> str:
        session.rollback()
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        return order(name, session)

    refused(seller, body, "AUTOCOMMIT")


# What PostgreSQL has undone


@on_databases("postgres")
@on_each_postgres_driver
@pytest.mark.usefixtures("postgres_driver")
def test_a_commit_that_is_a_rollback_is_not_recorded(seller: Seller) -> None:
    """A listener swallowed an error after the outcome was written; PostgreSQL says COMMIT and undoes all (F14)."""

    def swallow(session: Session) -> None:
        with contextlib.suppress(DBAPIError):
            session.execute(text("INSERT INTO nowhere VALUES (1)"))

    event.listen(Listened, "before_commit", swallow)
    try:
        refused(seller, order, "begin_nested")
    finally:
        event.remove(Listened, "before_commit", swallow)
    assert seller.task(order)("A-1") == "ordered A-1"


@on_databases("postgres")
@on_each_postgres_driver
@pytest.mark.usefixtures("postgres_driver")
def test_an_error_in_a_savepoint_before_the_commit_is_none(seller: Seller) -> None:
    """A listener that tries something in begin_nested leaves the transaction whole."""

    def attempt(session: Session) -> None:
        if not session.in_nested_transaction():
            with contextlib.suppress(DBAPIError), session.begin_nested():
                session.execute(text("INSERT INTO nowhere VALUES (1)"))

    event.listen(Listened, "before_commit", attempt)
    try:
        assert seller.task(order)("A-1") == "ordered A-1"
    finally:
        event.remove(Listened, "before_commit", attempt)
    assert (seller.orders(), seller.state()) == (1, State.COMPLETED)


@on_databases("postgres")
@on_each_postgres_driver
@pytest.mark.usefixtures("postgres_driver")
def test_a_swallowed_error_is_explained_without_the_outcome(seller: Seller) -> None:
    """The finish is refused for it: said in words of ours, none of which quote what the handler returned."""

    def body(_name: str, session: Session) -> str:
        with contextlib.suppress(DBAPIError):
            session.execute(text("SELECT 1/0"))
        return PRIVATE

    with pytest.raises(ConfigurationError, match="begin_nested") as raised:
        seller.task(body, on_crash="hold")("A-1")
    record = run_sync(seller.elsewhere.get(SCOPE, "A-1"))
    assert record is not None
    assert PRIVATE not in str(record.error_message)
    assert PRIVATE not in "".join(traceback.format_exception(raised.value))


@on_databases("postgres", "mariadb")
def test_no_error_of_the_finish_shows_the_outcome(seller: Seller) -> None:
    """The engine is the user's, and would quote the parameters of a statement that met a broken connection."""

    def body(_name: str, session: Session) -> str:
        postgres = seller.url.startswith("postgres")
        own = session.scalar(text("SELECT pg_backend_pid()" if postgres else "SELECT CONNECTION_ID()"))
        with seller.engine.connect() as connection:
            connection.execute(text(f"SELECT pg_terminate_backend({own})" if postgres else f"KILL {own}"))
        return PRIVATE

    with pytest.raises(StoreUnavailableError) as raised:
        seller.task(body)("A-1")
    assert PRIVATE not in "".join(traceback.format_exception(raised.value))


@on_databases("postgres", "mariadb")
def test_sessions_that_reach_no_database_put_the_message_back(seller: Seller) -> None:
    """Their engine served before, and errors of it are watched; this one has no connection (F59)."""
    with Proxy(seller.url) as proxy:
        task = seller.task(order, session=seller.sessionmaker(seller.new_engine(proxy.url, poolclass=NullPool)))
        assert task("A-1") == "ordered A-1"
    with pytest.raises(StoreUnavailableError):
        task("A-2")
    assert (seller.orders(), seller.state("A-2")) == (1, State.RELEASED)


# SQLite's transactions, which Python begins late


@on_databases("sqlite")
@pytest.mark.parametrize("first", ["", "SELECT 1", "SAVEPOINT his_own"])
def test_a_savepoint_after_a_rollback_commits_nothing(seller: Seller, first: str) -> None:
    """Python's sqlite3 has begun nothing at that point, and the end of the savepoint would be a commit."""

    def body(name: str, session: Session) -> None:
        session.rollback()
        if first:
            session.execute(text(first))
        with session.begin_nested():
            order(name, session)
        if "his_own" in first:
            session.execute(text("RELEASE his_own"))
        raise LookupError

    with pytest.raises(LookupError):
        seller.task(body)("A-1")
    assert (seller.orders(), seller.state()) == (0, State.RELEASED)


@on_databases("sqlite")
def test_what_sqlite_undoes_is_no_half_of_the_work(seller: Seller) -> None:
    """A conflict that rolls everything back, swallowed, leaves nothing of what the handler wrote after it either."""

    def body(name: str, session: Session) -> str:
        session.execute(text("INSERT INTO orders VALUES (1, 'first')"))
        with contextlib.suppress(DBAPIError):
            session.execute(text("INSERT OR ROLLBACK INTO orders VALUES (1, 'again')"))
        return order(name, session)

    refused(seller, body, "was ended")


# What MariaDB commits by itself


IMPLICIT = [
    "TRUNCATE TABLE stock",
    "CREATE TABLE IF NOT EXISTS another (a int)",
    "ALTER TABLE stock COMMENT 'x'",
    "ANALYZE TABLE stock",
    "SET autocommit=1",
    "SET SESSION autocommit = 1",
    "START TRANSACTION",
    "LOCK TABLES stock WRITE",
]


@on_databases("mariadb")
@pytest.mark.parametrize("statement", IMPLICIT)
def test_a_statement_that_commits_is_refused_before_it_runs(seller: Seller, statement: str) -> None:
    """MariaDB and MySQL would commit what was written before it, without its outcome (F63)."""

    def body(name: str, session: Session) -> str:
        order(name, session)
        session.flush()
        with contextlib.suppress(ConfigurationError):
            session.execute(text(statement))
        return order(name, session)

    refused(seller, body, "commits what was written before it")


@on_databases("mariadb")
@pytest.mark.parametrize(
    "statement", ["CREATE TEMPORARY TABLE own (a int)", "ANALYZE SELECT 1", "SET @autocommits = 1"]
)
def test_a_statement_that_commits_nothing_is_not_refused(seller: Seller, statement: str) -> None:
    """Temporary tables and variables are the handler's own."""

    def body(name: str, session: Session) -> str:
        session.execute(text(statement))
        return order(name, session)

    assert seller.task(body)("A-1") == "ordered A-1"


@on_databases("mariadb")
@pytest.mark.parametrize("driver", ["blocking"], indirect=True)
def test_a_commit_in_a_procedure_is_found(seller: Seller) -> None:
    """No word of the statement tells; the server's answer does, which PyMySQL keeps (asyncmy does not)."""
    with seller.engine.connect() as connection:
        connection.execute(text("CREATE PROCEDURE close_the_day() COMMIT"))

    def body(name: str, session: Session) -> str:
        order(name, session)
        session.flush()
        session.execute(text("CALL close_the_day()"))
        return order("after it", session)

    with pytest.raises(ConfigurationError, match="may be committed already"):
        seller.task(body)("A-1")
    assert (seller.orders("after it"), seller.state()) == (0, State.RELEASED)


@pytest.fixture(params=[0, 1])
def waits_undo_all(request: pytest.FixtureRequest, driver: Driver) -> Iterator[tuple[Seller, bool]]:
    start: Callable[..., MariaDBServer] = request.getfixturevalue("private_mariadb")
    server = start(innodb_rollback_on_timeout=request.param)
    with Seller(driver, server.url) as seller:
        yield seller, bool(request.param)


def test_a_swallowed_lock_timeout_is_no_half_of_the_work(waits_undo_all: tuple[Seller, bool]) -> None:
    """Where it undoes the whole transaction the rest is not committed alone; where it does not, all is (F14)."""
    seller, undoes_all = waits_undo_all
    with Session(seller.engine) as session, session.begin():
        session.add(Order(number=1, name="contended"))

    def body(name: str, session: Session) -> str:
        session.execute(text("SET SESSION innodb_lock_wait_timeout = 1"))
        session.add(Order(name="first"))
        session.flush()
        with contextlib.suppress(OperationalError):
            session.execute(text("UPDATE orders SET name = 'mine' WHERE number = 1"))
        return order(name, session)

    with Session(seller.engine) as other:
        other.execute(text("UPDATE orders SET name = 'of another' WHERE number = 1"))
        if undoes_all:
            with pytest.raises(OperationalError, match="1205"):
                seller.task(body)("A-1")
        else:
            assert seller.task(body)("A-1") == "ordered A-1"
    assert seller.orders("first") == seller.orders("A-1") == (0 if undoes_all else 1)
    assert seller.state() is (State.RELEASED if undoes_all else State.COMPLETED)


# Steps


def step_after(seller: Seller, sessions: Any, begin: Callable[[Session], Any]) -> Callable[[str], Any]:
    """A handler that does something with its session, and then has a step."""
    decorate = idempotent_task(key="{name}", scope=SCOPE, idempotency=seller.idem, session=sessions)

    async def asyncio_handler(name: str, session: Any) -> str:
        await session.run_sync(begin)
        receipt: str = await current_claim().step("charge", asyncio.sleep, 0, "receipt")
        await session.run_sync(partial(order, name))
        return receipt

    def blocking(name: str, session: Any) -> str:
        begin(session)
        receipt: str = current_claim().step("charge", str, "receipt")
        order(name, session)
        return receipt

    task: Any = decorate(asyncio_handler if seller.is_asyncio else blocking)
    return lambda name: seller.driver(task(name)) if seller.is_asyncio else task(name)


@on_databases("postgres", "mariadb")
def test_a_step_may_follow_a_rollback(seller: Seller) -> None:
    """It needs no connection of the session's, and so opens none."""
    sessions = seller.sessionmaker(seller.new_engine(poolclass=NullPool))
    assert step_after(seller, sessions, Session.rollback)("A-1") == "receipt"
    assert (seller.orders(), seller.state()) == (1, State.COMPLETED)


@on_databases("postgres")
def test_a_step_after_a_rollback_keeps_away_from_the_session_too(seller: Seller) -> None:
    """What it begins there is refused, on a connection that was not yet open when the step began."""

    def in_step(session: Session) -> None:
        session.execute(text("SELECT 1"))

    decorate = idempotent_task(key="{name}", scope=SCOPE, idempotency=seller.idem, session=seller.sessions)

    async def asyncio_handler(name: str, session: Any) -> None:
        await session.rollback()
        await current_claim().step("one", session.run_sync, in_step)

    def blocking(name: str, session: Any) -> None:
        session.rollback()
        current_claim().step("one", in_step, session)

    task: Any = decorate(asyncio_handler if seller.is_asyncio else blocking)
    with pytest.raises(ConfigurationError, match="must not use the session"):
        seller.driver(task("A-1")) if seller.is_asyncio else task("A-1")
    assert seller.state() is State.RELEASED


@on_databases("mariadb")
@pytest.mark.parametrize("how", ["create_engine", "execution_options"])
def test_at_serializable_a_handler_has_steps_or_a_session(seller: Seller, how: str) -> None:
    """Reading locks the record there, and the journal would wait for it until the lease is over."""
    if how == "create_engine":
        engine = seller.new_engine(isolation_level="SERIALIZABLE")
    else:
        engine = seller.new_engine().execution_options(isolation_level="SERIALIZABLE")
    with pytest.raises(ConfigurationError, match="SERIALIZABLE"):
        step_after(seller, seller.sessionmaker(engine), lambda _session: None)("A-1")
    assert (seller.orders(), seller.state()) == (0, State.RELEASED)


# Names of tables


@on_databases("postgres", "mariadb")
def test_a_translated_schema_is_named(seller: Seller) -> None:
    """Without its name, "another database" would be a riddle: the URLs are the same."""
    engine = seller.new_engine().execution_options(schema_translate_map={None: "tenant_a"})
    refused(seller, order, r"\(whose schema_translate_map", session=seller.sessionmaker(engine))
