"""A handler's own rows and its outcome are one transaction of its session."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from idem_tasks import RedisStore, SQLStore, TieredStore, current_claim
from idem_tasks.claims import State
from idem_tasks.errors import ConfigurationError, InDoubtError, LeaseLostError, StoreUnavailableError
from idem_tasks.events import EventName
from idem_tasks.policy import OnCrash
from idem_tasks.runtime import register_interruption, run_sync
from idem_tasks.testing import Driver
from idem_tasks.testing.driver import PATIENCE
from tests.integration.sessions.seller import SCOPE, SHORT, Base, Listened, Order, Seller, order
from tests.integration.sql_proxy import Proxy


class SoftLimitError(Exception):
    """Raised at any instruction, as Celery's SoftTimeLimitExceeded is."""


register_interruption(SoftLimitError)


@contextlib.contextmanager
def on(what: str, do: Callable[..., None]) -> Iterator[None]:
    """Do something at an event of the seller's sessions."""
    event.listen(Listened, what, do)
    try:
        yield
    finally:
        event.remove(Listened, what, do)


@contextlib.contextmanager
def cancelled_once(what: str) -> Iterator[None]:
    """Let the task at hand be cancelled the first time that this event comes."""
    strikes = ["once"]

    def cancel(*_: object) -> None:
        if strikes:
            strikes.pop()
            own = asyncio.current_task()
            assert own is not None
            own.cancel()

    with on(what, cancel):
        yield
    assert strikes == []


@contextlib.contextmanager
def struck_within_sqlalchemy(seller: Seller, after: str) -> Iterator[None]:
    """Let a soft limit strike once, in the first statement after this event: there SQLAlchemy wraps what is raised."""
    plan: list[BaseException] = [SoftLimitError()]
    strikes: list[BaseException] = []

    class Traced(sqlite3.Connection):
        def cursor(self, *args: Any, **kwargs: Any) -> Any:
            if strikes:
                raise strikes.pop()
            return super().cursor(*args, **kwargs)

    def arm(*_: object) -> None:
        strikes.extend(plan)
        plan.clear()

    seller.sessions = seller.sessionmaker(seller.new_engine(connect_args={"factory": Traced}))
    with on(after, arm):
        yield
    assert (plan, strikes) == ([], [])


# Together


def test_rows_and_outcome_are_committed_together(seller: Seller) -> None:
    """A handler's order is there exactly when its outcome is, and a duplicate gets that and writes nothing (F14)."""
    seen: list[Any] = []

    def body(name: str, session: Session) -> str:
        session.add(Order(name=name))
        session.flush()
        seen.append((seller.orders(), current_claim().session is not None))
        return f"ordered {name}"

    task = seller.task(body)
    assert [task("A-1"), task("A-1")] == ["ordered A-1"] * 2
    assert seen == [(0, True)]
    assert (seller.orders(), seller.state()) == (1, State.COMPLETED)
    assert seller.names() == [EventName.GRANTED, EventName.COMPLETED, EventName.REPLAYED]


def test_nothing_is_written_by_a_handler_that_raises(seller: Seller) -> None:
    """What it wrote is rolled back before its claim is released, and the next delivery writes (F14, F32)."""
    errors = [ValueError("no")]

    def body(name: str, session: Session) -> str:
        session.add(Order(name=name))
        session.flush()
        if errors:
            raise errors.pop()
        return order("again", session)

    task = seller.task(body)
    with pytest.raises(ValueError, match="no"):
        task("A-1")
    assert (seller.orders(), seller.state()) == (0, State.RELEASED)
    assert task("A-1") == "ordered again"
    assert (seller.orders("A-1"), seller.orders("again")) == (1, 1)


def test_what_the_database_refuses_at_the_end_is_raised(seller: Seller) -> None:
    """Rows that are first sent after the handler returned, and refused, are a failure of the handler."""

    def body(name: str, session: Session) -> str:
        session.add(Order(number=1, name=name))
        return name

    task = seller.task(body)
    task("A-1")
    with pytest.raises(IntegrityError):
        task("A-2")
    assert (seller.orders(), seller.state("A-2")) == (1, State.RELEASED)


def test_the_marker_follows_the_commit(driver: Driver, postgres_url: str, redis_url: str) -> None:
    """With Redis in front, duplicates of what a session committed are answered by the marker."""
    store = TieredStore(RedisStore(redis_url, socket_timeout=PATIENCE), SQLStore(postgres_url, create_schema=True))
    with Seller(driver, postgres_url, store) as seller:
        task = seller.task(order)
        assert task("A-1") == "ordered A-1"
        with seller.engine.begin() as connection:
            connection.execute(text("UPDATE idem_tasks_records SET outcome = '\"not read\"'"))
        assert task("A-1") == "ordered A-1"
        assert seller.orders() == 1

        def lose(name: str, session: Session) -> str:
            seller.stop_renewing()
            lease = seller.take_over("A-2")
            seller.finish_elsewhere(lease)
            return order(name, session)

        losing = seller.task(lose, lease=SHORT)
        assert [losing("A-2"), losing("A-2")] == ["the other one"] * 2
        assert seller.orders("A-2") == 0


# A zombie


@pytest.mark.parametrize("wins", ["finished", "running"])
def test_a_zombies_work_vanishes(seller: Seller, wins: str) -> None:
    """Overtaken while it runs, a handler commits nothing: the taker's rows and outcome stand alone (F1, F14)."""

    def body(name: str, session: Session) -> str:
        seller.stop_renewing()
        if seller.url.startswith("sqlite"):
            session.rollback()  # nobody can take a claim over while its holder has the one lock there is
        else:
            order(name, session)
            session.flush()
        lease = seller.take_over()
        if wins == "finished":
            seller.finish_elsewhere(lease)
        return order(name, session)

    task = seller.task(body, lease=SHORT)
    if wins == "finished":
        assert task("A-1") == "the other one"
        assert seller.names()[-1] is EventName.SUPERSEDED
    else:
        with pytest.raises(LeaseLostError):
            task("A-1")
        assert (seller.state(), seller.names()[-1]) == (State.RUNNING, EventName.LEASE_LOST)
    assert (seller.orders("A-1"), seller.orders()) == (0, int(wins == "finished"))


def test_a_zombie_that_raises_gets_the_recorded_outcome(seller: Seller) -> None:
    """Overtaken and then refused by a unique column, its failure does not hide the recorded success (F58)."""

    def body(name: str, session: Session) -> str:
        seller.stop_renewing()
        session.rollback()
        seller.finish_elsewhere(seller.take_over())
        raise ValueError("a unique column, say")

    assert seller.task(body, lease=SHORT)("A-1") == "the other one"


# Who commits


@pytest.mark.parametrize("swallows", [False, True])
def test_a_commit_by_the_handler_is_refused(seller: Seller, swallows: bool) -> None:
    """It raises, and where a handler swallows that, it is not recorded all the same: no row without outcome (F63)."""

    def body(name: str, session: Session) -> str:
        order(name, session)
        if swallows:
            with contextlib.suppress(ConfigurationError):
                session.commit()
            session.rollback()
            return order(name, session)
        session.commit()
        return name

    with pytest.raises(ConfigurationError, match="must not commit"):
        seller.task(body)("A-1")
    assert (seller.orders(), seller.state()) == (0, State.RELEASED)


def test_savepoints_and_rollbacks_are_the_handlers_own(seller: Seller) -> None:
    """A part that failed is undone, and the rest committed; after its own rollback a handler begins afresh."""

    def body(name: str, session: Session) -> str:
        order("undone", session)
        session.flush()
        session.rollback()
        with session.begin_nested():
            order("kept", session)
        with contextlib.suppress(ValueError), session.begin_nested():
            order("undone too", session)
            session.flush()
            raise ValueError
        session.begin_nested()  # left open
        return order(name, session)

    assert seller.task(body)("A-1") == "ordered A-1"
    assert (seller.orders(), seller.orders("kept"), seller.orders("A-1"), seller.state()) == (2, 1, 1, State.COMPLETED)


def test_a_listener_is_left_behind_on_no_session(seller: Seller) -> None:
    """A session of the caller's can be committed by him again once the call is over, also one that raised."""

    def body(name: str, session: Session) -> str:
        if name == "A-2":
            raise ValueError
        return order(name, session)

    session = seller.sessions()
    task = seller.task(body)
    assert task("A-1", session=session) == "ordered A-1"
    with pytest.raises(ValueError):  # noqa: PT011 - its own
        task("A-2", session=session)
    order("his own", session)
    if seller.is_asyncio:
        seller.driver(session.commit())
        seller.driver(session.close())
    else:
        session.commit()
        session.close()
    assert seller.orders() == 2


# Sessions that cannot be used


def refuses(seller: Seller, sessions: Any, match: str, key: str = "A-1") -> None:
    """See a handler refused before it runs, under hold too, and its key free at once."""
    ran: list[str] = []
    task = seller.task(lambda name, _session: ran.append(name), session=sessions, on_crash="hold")
    with pytest.raises(ConfigurationError, match=match) as refused:
        task(key)
    assert (ran, seller.state(key)) == ([], State.RELEASED)
    assert "secret" not in str(refused.value)
    assert seller.task(order)(key) == f"ordered {key}"


def test_a_session_of_another_database_is_refused(seller: Seller, request: pytest.FixtureRequest) -> None:
    """One that has no table of records, and one that has, are both told from the right one; no password is shown."""
    url = request.getfixturevalue("sqlite_url" if not seller.url.startswith("sqlite") else "mariadb_url")
    sessions = seller.sessionmaker(seller.new_engine(url))
    refuses(seller, sessions, "have to be in one database")
    with Seller(Driver("blocking"), url):
        refuses(seller, sessions, "have to be in one database", "A-2")


def test_an_engine_in_autocommit_is_refused(seller: Seller) -> None:
    """Each write would be committed by itself; told by the driver, without a round trip."""
    refuses(seller, seller.sessionmaker(seller.new_engine(isolation_level="AUTOCOMMIT")), "AUTOCOMMIT")


def test_a_session_without_a_bind_for_the_records_is_refused(seller: Seller) -> None:
    """With binds for the user's own tables alone, nobody knows where the record is."""
    refuses(seller, seller.sessionmaker(bind=None, binds={Base: seller.new_engine()}), "a bind for")


def test_a_session_in_a_transaction_is_refused(seller: Seller) -> None:
    """What its caller began is neither committed nor rolled back."""
    session = seller.sessions()
    order("his own", session)
    task = seller.task(order)
    with pytest.raises(ConfigurationError, match="commit or roll back before"):
        task("A-1", session=session)
    if seller.is_asyncio:
        seller.driver(session.commit())
        seller.driver(session.close())
    else:
        session.commit()
        session.close()
    assert (seller.orders("his own"), seller.state()) == (1, State.RELEASED)


def test_a_session_of_the_other_runtime_is_refused(seller: Seller) -> None:
    """A maker of sessions at decoration, what a callable returns before the handler runs."""
    with Driver("blocking" if seller.is_asyncio else "asyncio") as driver, Seller(driver, seller.url) as other:
        with pytest.raises(ConfigurationError, match="does not serve"):
            seller.task(order, session=other.sessions)

        def other_session() -> Any:
            return other.sessions()

        refuses(seller, other_session, "does not serve")


@pytest.mark.parametrize("source", ["a string", object()])
def test_what_makes_no_sessions_is_refused_at_decoration(seller: Seller, source: object) -> None:
    """Only what can be called can make a session."""
    with pytest.raises(ConfigurationError, match="session= takes a sessionmaker"):
        seller.task(order, session=source)


def test_a_callable_that_returns_no_session_is_refused(seller: Seller) -> None:
    """A generator, as FastAPI's dependencies are, is no session."""
    refuses(seller, lambda: (number for number in range(1)), "is a generator, not a Session")


# Whose session


def scoped(seller: Seller) -> Any:
    """Make a registry with one session for the test."""
    if seller.is_asyncio:
        from sqlalchemy.ext.asyncio import async_scoped_session

        return async_scoped_session(seller.sessions, scopefunc=lambda: "this test")
    from sqlalchemy.orm import scoped_session

    return scoped_session(seller.sessions, scopefunc=lambda: "this test")


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_scoped_session_is_left_open(seller: Seller, wrapped: bool) -> None:
    """Also one that a framework's callable returns, as Flask-SQLAlchemy's `lambda: db.session`: it is not ours."""
    registry = scoped(seller)
    seen: list[Any] = []

    def body(name: str, session: Session) -> str:
        seen.append((session, getattr(registry(), "sync_session", registry()), Order(name=name)))
        session.add(seen[0][2])
        return f"ordered {name}"

    assert seller.task(body, session=(lambda: registry) if wrapped else registry)("A-1") == "ordered A-1"
    [(used, current, made)] = seen
    assert used is current
    assert made in used  # closed, it would know of none
    if seller.is_asyncio:
        seller.driver(registry.remove())
    else:
        registry.remove()
    assert seller.orders() == 1


def test_sessions_of_a_sessionmaker_are_closed(seller: Seller) -> None:
    """Their connections are back in the pool, whether the handler returned or raised."""
    engine = seller.new_engine()
    sync_engine = getattr(engine, "sync_engine", engine)

    def body(name: str, session: Session) -> str:
        order(name, session)
        session.flush()
        assert sync_engine.pool.checkedout() == 1
        if name == "A-2":
            raise ValueError
        return name

    task = seller.task(body, session=seller.sessionmaker(engine))
    task("A-1")
    with pytest.raises(ValueError):  # noqa: PT011 - its own
        task("A-2")
    assert sync_engine.pool.checkedout() == 0


def test_a_handler_without_a_parameter_has_it_in_its_claim(seller: Seller) -> None:
    """`current_claim().session` is it; where a handler has none, that says how to get one."""
    from idem_tasks import idempotent_task

    async def body_asyncio(name: str) -> str:
        done: str = await current_claim().session.run_sync(lambda bare: order(name, bare))
        return done

    def body(name: str) -> str:
        return order(name, current_claim().session)

    def without(name: str) -> None:
        with pytest.raises(ConfigurationError, match="has no session"):
            current_claim().session  # noqa: B018 - it raises

    decorate = idempotent_task(key="{name}", scope=SCOPE, idempotency=seller.idem, session=seller.sessions)
    if seller.is_asyncio:
        assert seller.driver(decorate(body_asyncio)("A-1")) == "ordered A-1"
    else:
        assert decorate(body)("A-1") == "ordered A-1"
        seller.idem.run(without, "A-2", scope=SCOPE, key="A-2")
    assert seller.orders() == 1


# Without a fence


@pytest.mark.parametrize("policy", [{"shadow": True}, {"enabled": False}])
def test_in_shadow_and_disabled_the_rows_are_committed_all_the_same(seller: Seller, policy: dict[str, bool]) -> None:
    """The handler does not commit, so the library does, for duplicates too; what raises is rolled back."""
    task = seller.task(order, **policy)
    assert [task("A-1"), task("A-1")] == ["ordered A-1"] * 2
    assert seller.orders() == 2

    def failing(name: str, session: Session) -> None:
        order(name, session)
        session.flush()
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - its own
        seller.task(failing, **policy)("A-2")
    assert seller.orders() == 2


@pytest.mark.parametrize("policy", [{"shadow": True}, {"enabled": False}])
def test_in_shadow_and_disabled_a_session_that_cannot_be_made_runs_nothing(
    seller: Seller, policy: dict[str, bool]
) -> None:
    """What the maker of sessions raises comes out as it is, and the next delivery runs."""
    ran: list[str] = []

    def broken() -> Any:
        raise LookupError("no session")

    with pytest.raises(LookupError, match="no session"):
        seller.task(lambda name, _session: ran.append(name), session=broken, **policy)("A-1")
    assert (ran, seller.state()) == ([], State.RELEASED if "shadow" in policy else None)
    assert seller.task(order, **policy)("A-1") == "ordered A-1"


# Interruptions, and a reply that is lost


@pytest.mark.parametrize("what, stands", [("after_flush", False), ("before_commit", False), ("after_commit", True)])
@pytest.mark.parametrize("on_crash, left", [("rerun", State.RELEASED), ("hold", State.IN_DOUBT)])
@pytest.mark.parametrize("driver", ["blocking"], indirect=True)
def test_a_soft_limit_at_the_end_leaves_both_or_nothing(
    seller: Seller, what: str, stands: bool, on_crash: str, left: State
) -> None:
    """Struck before the commit nothing is there, after it everything; it is raised in either case (F62)."""

    def strike(*_: object) -> None:
        raise SoftLimitError

    task = seller.task(order, on_crash=on_crash)
    with on(what, strike), pytest.raises(SoftLimitError):
        task("A-1")
    assert (seller.orders(), seller.state()) == ((1, State.COMPLETED) if stands else (0, left))
    if left is State.RELEASED or stands:
        assert task("A-1") == "ordered A-1"
        assert seller.orders() == 1
    else:
        with pytest.raises(InDoubtError):
            task("A-1")


@pytest.mark.parametrize("driver", ["blocking"], indirect=True)
@pytest.mark.parametrize("url", ["sqlite_url"], indirect=True)
def test_a_soft_limit_that_sqlalchemy_wraps_at_the_end_comes_out_as_itself(seller: Seller) -> None:
    """It is neither taken for a fault of the database nor for a failure of the handler: nothing is there."""
    with struck_within_sqlalchemy(seller, "before_flush"):
        task = seller.task(order)
        with pytest.raises(SoftLimitError):
            task("A-1")
        assert (seller.orders(), seller.state()) == (0, State.RELEASED)
        assert task("A-1") == "ordered A-1"
    assert seller.orders() == 1


@pytest.mark.parametrize("what", ["before_flush", "after_flush", "before_commit", "after_commit"])
@pytest.mark.parametrize("driver", ["asyncio"], indirect=True)
def test_a_cancellation_at_the_end_waits_for_the_commit(seller: Seller, what: str) -> None:
    """Cancelled once its handler has returned, a call commits and is cancelled then (F62)."""

    def cancel(*_: object) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    task = seller.task(order)
    with on(what, cancel), pytest.raises(asyncio.CancelledError):
        task("A-1")
    assert (seller.orders(), seller.state()) == (1, State.COMPLETED)
    assert task("A-1") == "ordered A-1"


@pytest.mark.parametrize("what", ["before_flush", "after_flush", "before_commit", "after_commit"])
@pytest.mark.parametrize("driver", ["asyncio"], indirect=True)
def test_a_loop_that_ends_at_the_end_leaves_both_or_nothing(seller: Seller, what: str) -> None:
    """Cancelled with every task of its loop, a commit is looked for and not guessed: rows and outcome agree (F62)."""

    def cancel(*_: object) -> None:
        for task in asyncio.all_tasks():
            task.cancel()

    task = seller.task(order)
    with on(what, cancel), pytest.raises(asyncio.CancelledError):
        task("A-1")
    assert (seller.orders(), seller.state()) in ((1, State.COMPLETED), (0, State.RELEASED))
    assert task("A-1") == "ordered A-1"
    assert seller.orders() == 1


@pytest.mark.parametrize("driver", ["asyncio"], indirect=True)
def test_a_commit_that_alone_was_cancelled_before_it_was_sent_brings_the_message_back(seller: Seller) -> None:
    """Nobody cancelled the call, so it says that nothing is committed, and it does not commit what is left (F59)."""
    task = seller.task(order)
    with cancelled_once("after_flush"), pytest.raises(StoreUnavailableError, match="before anything was committed"):
        task("A-1")
    assert (seller.orders(), seller.state()) == (0, State.RELEASED)
    assert task("A-1") == "ordered A-1"
    assert seller.orders() == 1


def test_a_listener_that_raises_after_the_commit_undoes_nothing(seller: Seller) -> None:
    """Its exception is the call's, and the outcome stands with the rows: the next delivery gets it."""

    def broken(*_: object) -> None:
        raise LookupError("after the commit")

    task = seller.task(order)
    with on("after_commit", broken), pytest.raises(LookupError, match="after the commit"):
        task("A-1")
    assert (seller.orders(), seller.state()) == (1, State.COMPLETED)
    assert seller.names() == [EventName.GRANTED, EventName.COMPLETED]
    assert task("A-1") == "ordered A-1"
    assert seller.orders() == 1


SERVERS = ["postgres_url", "mariadb_url"]


@pytest.fixture
def proxied(seller: Seller) -> Iterator[Proxy]:
    """A seller whose sessions, and nothing else, go through a proxy."""
    with Proxy(seller.url) as proxy:
        seller.sessions = seller.sessionmaker(seller.new_engine(proxy.url))
        yield proxy


def end_connection_of(seller: Seller, session: Session) -> None:
    """Let the server end the connection of a session."""
    postgres = seller.url.startswith("postgres")
    own = session.scalar(text("SELECT pg_backend_pid()" if postgres else "SELECT CONNECTION_ID()"))
    with seller.engine.connect() as connection:
        connection.execute(text(f"SELECT pg_terminate_backend({own})" if postgres else f"KILL {own}"))


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_commit_whose_reply_is_lost_is_no_second_run(seller: Seller, proxied: Proxy) -> None:
    """It is looked for, not sent again: one row, its outcome, and the value is returned (F21, F14)."""

    def cut(*_: object) -> None:
        proxied.lose_next_reply()

    task = seller.task(order)
    with on("before_commit", cut):
        assert task("A-1") == "ordered A-1"
    assert proxied.lost == 1
    assert task("A-1") == "ordered A-1"
    assert (seller.orders(), seller.state()) == (1, State.COMPLETED)
    assert seller.names() == [EventName.GRANTED, EventName.COMPLETED, EventName.REPLAYED]


@pytest.mark.parametrize("url", SERVERS, indirect=True)
@pytest.mark.parametrize("what", ["after_flush", "before_commit"])
def test_a_connection_that_is_gone_before_the_commit_leaves_nothing(seller: Seller, what: str) -> None:
    """Nothing can have been committed: the message is put back, and the next delivery runs (F14, F59)."""

    def kill(session: Session, *_: object) -> None:
        end_connection_of(seller, session)

    task = seller.task(order)
    with on(what, kill), pytest.raises(StoreUnavailableError):
        task("A-1")
    assert (seller.orders(), seller.state()) == (0, State.RELEASED)
    assert task("A-1") == "ordered A-1"
    assert seller.orders() == 1


@pytest.mark.parametrize("url", SERVERS, indirect=True)
@pytest.mark.parametrize("on_crash", ["rerun", "hold"])
def test_a_connection_that_is_gone_in_mid_run_is_no_failure(seller: Seller, on_crash: OnCrash) -> None:
    """The database of the records went away with it: the message is put back, though the handler raised (F59)."""

    def body(name: str, session: Session) -> str:
        end_connection_of(seller, session)
        return str(session.scalar(text("SELECT 1")))

    task = seller.task(body, on_crash=on_crash)
    with pytest.raises(StoreUnavailableError, match="lost its database while its handler ran") as raised:
        task("A-1")
    assert isinstance(raised.value.__cause__, DBAPIError)
    assert (seller.orders(), seller.state()) == (0, State.RELEASED if on_crash == "rerun" else State.IN_DOUBT)


# Deadlocks and serialization failures


@pytest.mark.parametrize("times, runs", [(1, 2), (99, 6)])
@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_serialization_failure_runs_the_handler_again(seller: Seller, times: int, runs: int) -> None:
    """Told by its number, at the finish too; the sixth is raised and says which isolation to take (F39)."""
    engine = seller.new_engine(isolation_level="REPEATABLE READ")
    if not seller.url.startswith("postgres"):
        event.listen(getattr(engine, "sync_engine", engine), "connect", _isolate_snapshots)
    ran: list[str] = []

    def body(name: str, session: Session) -> str:
        ran.append(name)
        assert current_claim().lease.owner in seller.idem.services(seller.driver.runtime).heartbeat._held
        if len(ran) <= times:
            session.scalar(text("SELECT count(*) FROM orders"))
            seller.renew_elsewhere()
        return order(name, session)

    task = seller.task(body, session=seller.sessionmaker(engine))
    if times == 1:
        assert task("A-1") == "ordered A-1"
        assert (seller.orders(), seller.state()) == (1, State.COMPLETED)
    else:
        with pytest.raises(DBAPIError) as raised:
            task("A-1")
        assert "READ COMMITTED" in "".join(raised.value.__notes__)
        assert (seller.orders(), seller.state()) == (0, State.RELEASED)
    assert len(ran) == runs


def _isolate_snapshots(connection: Any, _record: object) -> None:
    """As MariaDB does from 11.6 on by default."""
    cursor = connection.cursor()
    cursor.execute("SET SESSION innodb_snapshot_isolation = ON")
    cursor.close()


@pytest.mark.parametrize("url", ["postgres_url"], indirect=True)
def test_under_hold_a_handler_does_not_run_again(seller: Seller) -> None:
    """It may have done something outside before it met the conflict: that is for a person to say."""
    ran: list[str] = []

    def body(name: str, session: Session) -> str:
        ran.append(name)
        seller.renew_elsewhere()
        return order(name, session)

    sessions = seller.sessionmaker(seller.new_engine(isolation_level="REPEATABLE READ"))
    with pytest.raises(DBAPIError):
        seller.task(body, session=sessions, on_crash="hold")("A-1")
    assert (ran, seller.orders(), seller.state()) == (["A-1"], 0, State.IN_DOUBT)


@pytest.mark.parametrize("url", ["sqlite_url"], indirect=True)
def test_a_stale_snapshot_of_sqlite_runs_the_handler_again(seller: Seller) -> None:
    """After its own rollback a handler has no write lock; what it read first may be old when it writes (F39)."""
    ran: list[str] = []

    def body(name: str, session: Session) -> str:
        ran.append(name)
        if len(ran) == 1:
            session.rollback()
            session.connection().exec_driver_sql("BEGIN")  # Python's sqlite3 begins with the first write
            session.scalar(text("SELECT count(*) FROM orders"))
            with Session(seller.engine) as other, other.begin():
                order("of another", other)
        return order(name, session)

    assert seller.task(body)("A-1") == "ordered A-1"
    assert (len(ran), seller.orders("A-1")) == (2, 1)


# Messages


def mail(name: str, session: Session) -> str:
    current_claim().publish_message(name, to="mail")
    return order(name, session)


def test_messages_are_committed_with_the_rows(seller: Seller) -> None:
    """They are sent after the commit, once; a handler that raises leaves neither."""
    seen: list[int] = []

    def body(name: str, session: Session) -> str:
        ordered = mail(name, session)
        seen.append(len(seller.mails))
        return ordered

    def raises(name: str, session: Session) -> str:
        mail(name, session)
        raise LookupError

    task = seller.task(body)
    assert [task("A-1"), task("A-1")] == ["ordered A-1"] * 2
    with pytest.raises(LookupError):
        seller.task(raises)("A-2")
    assert (seen, [message.body for message in seller.mails]) == ([0], ["A-1"])
    assert (seller.orders(), run_sync(seller.elsewhere.outbox.count())) == (1, 0)


def test_a_superseded_session_sends_nothing(seller: Seller) -> None:
    """F1: the fence misses, and rows and messages are rolled back together."""

    def body(name: str, session: Session) -> str:
        seller.stop_renewing()
        session.rollback()  # SQLite: nobody can take it over while its holder has the one lock there is
        seller.finish_elsewhere(seller.take_over())
        return mail(name, session)

    assert seller.task(body, lease=SHORT)("A-1") == "the other one"
    assert (seller.mails, seller.orders("A-1"), run_sync(seller.elsewhere.outbox.count())) == ([], 0, 0)


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_run_that_a_conflict_undid_sends_nothing(seller: Seller) -> None:
    """Only what the last run published is sent, and its numbers begin at 0 again."""
    engine = seller.new_engine(isolation_level="REPEATABLE READ")
    if not seller.url.startswith("postgres"):
        event.listen(getattr(engine, "sync_engine", engine), "connect", _isolate_snapshots)
    runs: list[str] = []

    def body(name: str, session: Session) -> str:
        runs.append(name)
        current_claim().publish_message(f"run {len(runs)}", to="mail")
        if len(runs) == 1:
            session.scalar(text("SELECT count(*) FROM orders"))
            seller.renew_elsewhere()
        return order(name, session)

    assert seller.task(body, session=seller.sessionmaker(engine))("A-1") == "ordered A-1"
    assert [(message.body, message.number) for message in seller.mails] == [("run 2", 0)]
