"""A finish within a transaction of the handler's own, on the connections of drivers."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pymysql
import pytest
from sqlalchemy import make_url
from sqlalchemy.orm import Session

from idem_tasks import Policy, RedisStore, SQLStore, TieredStore, current_claim
from idem_tasks.claims import State
from idem_tasks.errors import ConfigurationError, InProgressError, LeaseLostError, StoreUnavailableError
from idem_tasks.testing import Driver
from idem_tasks.testing.driver import PATIENCE
from tests.integration.sessions.seller import SCOPE, SHORT, Seller

Connect = Callable[[], Any]


@pytest.fixture
def driver() -> Iterator[Driver]:
    with Driver("blocking") as driver:
        yield driver


@pytest.fixture
def connect(url: str) -> Connect:
    """A new connection of the driver itself, in no transaction yet."""
    place = make_url(url)
    if url.startswith("sqlite"):
        return lambda: sqlite3.connect(place.database or "")
    if url.startswith("postgres"):
        return lambda: psycopg.connect(
            host=place.host, port=place.port, user=place.username, password=place.password, dbname=place.database
        )
    return lambda: pymysql.connect(
        host=place.host or "",
        port=place.port or 3306,
        user=place.username,
        password=place.password or "",
        database=place.database,
    )


def write(connection: Any, name: str) -> None:
    mark = "?" if isinstance(connection, sqlite3.Connection) else "%s"
    cursor = connection.cursor()
    cursor.execute(f"INSERT INTO orders (name) VALUES ({mark})", (name,))
    cursor.close()


def test_rows_and_outcome_are_committed_together(seller: Seller, connect: Connect) -> None:
    """With the handler's own commit; the value given there is the outcome of every delivery (F14)."""
    seen: list[Any] = []

    def handler(name: str) -> str:
        with contextlib.closing(connect()) as connection:
            write(connection, name)
            current_claim().finish_in(connection, f"ordered {name}")
            seen.append((seller.orders(), seller.state()))
            connection.commit()
        return "not this"

    for _ in range(2):
        assert seller.idem.run(handler, "A-1", scope=SCOPE, key="A-1") == "ordered A-1"
    assert seen == [(0, State.RUNNING)]
    assert (seller.orders(), seller.state()) == (1, State.COMPLETED)


def test_what_was_rolled_back_is_not_recorded(seller: Seller, connect: Connect) -> None:
    """A handler that returns all the same fails, and says why; the next delivery runs (F14)."""

    def handler(name: str) -> None:
        with contextlib.closing(connect()) as connection:
            write(connection, name)
            current_claim().finish_in(connection)
            connection.rollback()

    with pytest.raises(ConfigurationError, match="was rolled back"):
        seller.idem.run(handler, "A-1", scope=SCOPE, key="A-1")
    assert (seller.orders(), seller.state()) == (0, State.RELEASED)


@pytest.mark.parametrize("wins", ["finished", "running"])
def test_a_zombie_is_told_before_its_commit(seller: Seller, connect: Connect, wins: str) -> None:
    """Taken over while it ran, it hears LeaseLostError, which rolls its transaction back (F1)."""

    def handler(name: str) -> None:
        seller.stop_renewing()
        lease = seller.take_over()
        if wins == "finished":
            seller.finish_elsewhere(lease)
        with contextlib.closing(connect()) as connection:
            write(connection, name)
            current_claim().finish_in(connection, name)
            connection.commit()

    def deliver() -> Any:
        return seller.idem.run(handler, "A-1", scope=SCOPE, key="A-1", policy=seller.idem.policy.replace(lease=SHORT))

    if wins == "finished":
        assert deliver() == "the other one"
    else:
        with pytest.raises(LeaseLostError):
            deliver()
    assert seller.orders("A-1") == 0


def test_a_connection_in_autocommit_is_refused(seller: Seller, connect: Connect) -> None:
    """There the outcome would be committed apart from the rows; within a transaction begun by hand it is not."""
    begun: list[bool] = []

    def handler(name: str) -> None:
        with contextlib.closing(connect()) as connection:
            if isinstance(connection, sqlite3.Connection):
                connection.isolation_level = None
            elif isinstance(connection, psycopg.Connection):
                connection.autocommit = True
            else:
                connection.autocommit(True)
            with pytest.raises(ConfigurationError, match="in autocommit"):
                current_claim().finish_in(connection, name)
            connection.cursor().execute("BEGIN")
            current_claim().finish_in(connection, name)
            begun.append(True)
            connection.cursor().execute("COMMIT")

    assert seller.idem.run(handler, "A-1", scope=SCOPE, key="A-1") == "A-1"
    assert begun == [True]


@pytest.mark.parametrize("url", ["postgres_url"], indirect=True)
def test_a_connection_that_answers_later_is_refused(seller: Seller, connect: Connect) -> None:
    """Of asyncio, or in pipeline mode: nobody would know whether the claim stands."""

    def in_a_pipeline(name: str) -> None:
        with contextlib.closing(connect()) as connection, connection.pipeline():
            write(connection, name)
            current_claim().finish_in(connection)

    def asynchronous(name: str) -> None:
        current_claim().finish_in(object.__new__(psycopg.AsyncConnection))

    for handler, why in ((in_a_pipeline, "pipeline mode"), (asynchronous, "is asyncio's")):
        with pytest.raises(ConfigurationError, match=why):
            seller.idem.run(handler, "A-1", scope=SCOPE, key="A-1")
        assert (seller.orders(), seller.state()) == (0, State.RELEASED)


def test_called_twice_in_a_transaction_it_says_so(seller: Seller, connect: Connect) -> None:
    """The second one meets the outcome of the first, as a lost claim would: nothing is committed, and a note tells."""

    def handler(name: str) -> None:
        with contextlib.closing(connect()) as connection:
            write(connection, name)
            current_claim().finish_in(connection, 1)
            current_claim().finish_in(connection, 2)

    with pytest.raises(LeaseLostError) as told:
        seller.idem.run(handler, "A-1", scope=SCOPE, key="A-1")
    assert "called once" in told.value.__notes__[0]
    assert (seller.orders(), seller.state()) == (0, State.RELEASED)


class TracedConnection(sqlite3.Connection):
    """A driver's connection as those who watch it wrap it."""


@pytest.mark.parametrize("url", ["sqlite_url"], indirect=True)
def test_a_subclass_of_a_drivers_connection_is_one(seller: Seller) -> None:
    """Wherever the class was defined."""

    def handler(name: str) -> None:
        file = make_url(seller.url).database
        with contextlib.closing(sqlite3.connect(str(file), factory=TracedConnection)) as connection:
            write(connection, name)
            current_claim().finish_in(connection, f"ordered {name}")
            connection.commit()

    assert seller.idem.run(handler, "A-1", scope=SCOPE, key="A-1") == "ordered A-1"
    assert (seller.orders(), seller.state()) == (1, State.COMPLETED)


@pytest.mark.parametrize("url", ["sqlite_url"], indirect=True)
def test_no_other_object_is_taken_for_a_connection(seller: Seller) -> None:
    """A cursor, say: it is refused, and its handler fails."""

    def handler() -> None:
        current_claim().finish_in(sqlite3.connect(":memory:").cursor())

    with pytest.raises(ConfigurationError, match=r"not a sqlite3\.Cursor"):
        seller.idem.run(handler, scope=SCOPE, key="A-1")


def test_a_handler_with_a_session_is_refused(seller: Seller, connect: Connect) -> None:
    """Its session's commit records the outcome: rows of another connection would not be part of that."""

    def body(name: str, session: Session) -> str:
        session.rollback()  # SQLite has one lock for writing
        with contextlib.closing(connect()) as connection:
            write(connection, name)
            current_claim().finish_in(connection, name)
            connection.commit()
        return name

    with pytest.raises(ConfigurationError, match="for a handler without session="):
        seller.task(body)("A-1")
    assert (seller.orders(), seller.state()) == (0, State.RELEASED)


@pytest.mark.parametrize("policy", [Policy(shadow=True), Policy(enabled=False)], ids=["shadow", "disabled"])
def test_where_nothing_is_recorded_it_does_nothing(seller: Seller, connect: Connect, policy: Policy) -> None:
    """The handler commits its own rows, for duplicates too, and what it returns is returned."""

    def handler(name: str) -> str:
        with contextlib.closing(connect()) as connection:
            write(connection, name)
            current_claim().finish_in(connection, "not this")
            connection.commit()
        return f"ordered {name}"

    for _ in range(2):
        assert seller.idem.run(handler, "A-1", scope=SCOPE, key="A-1", policy=policy) == "ordered A-1"
    assert seller.orders() == 2


@pytest.mark.parametrize("commits", [True, False])
def test_in_a_block(seller: Seller, connect: Connect, commits: bool) -> None:
    """`with idem.claim(...)` has the value that was committed as its outcome, or is released."""
    caught = contextlib.nullcontext() if commits else pytest.raises(ConfigurationError, match="was rolled back")
    with caught, seller.idem.claim(scope=SCOPE, key="A-1") as block, contextlib.closing(connect()) as connection:
        write(connection, "A-1")
        block.claim.finish_in(connection, "ordered")
        if commits:
            connection.commit()
        else:
            connection.rollback()
    assert (seller.orders(), seller.state()) == ((1, State.COMPLETED) if commits else (0, State.RELEASED))
    if commits:
        assert block.outcome == "ordered"


class DeclinedError(Exception):
    """A failure that is final."""


@pytest.mark.parametrize("url", ["postgres_url"], indirect=True)
@pytest.mark.parametrize("error", [DeclinedError, KeyError])
def test_what_is_raised_after_the_commit_changes_nothing(
    seller: Seller, connect: Connect, redis_url: str, error: type[Exception]
) -> None:
    """The committed outcome is that of all callers, also by the marker, and its messages are sent (F58)."""
    store = TieredStore(RedisStore(redis_url, socket_timeout=PATIENCE), SQLStore(seller.url))

    def handler(name: str) -> None:
        with contextlib.closing(connect()) as connection:
            write(connection, name)
            current_claim().publish_message({"order": name}, to="mail")
            current_claim().finish_in(connection, f"ordered {name}")
            connection.commit()
        raise error

    policy = Policy(record_failures=(DeclinedError,))
    with Driver("blocking") as driver, Seller(driver, seller.url, store) as tiered:
        for _ in range(2):
            assert tiered.idem.run(handler, "A-1", scope=SCOPE, key="A-1", policy=policy) == "ordered A-1"
        assert len(tiered.mails) == 1
    assert (seller.orders(), seller.state()) == (1, State.COMPLETED)


@pytest.mark.parametrize("error", [DeclinedError, KeyError])
def test_what_rolls_it_back_is_a_failure_as_ever(seller: Seller, connect: Connect, error: type[Exception]) -> None:
    """A final failure is recorded, any other one released: what `finish_in` wrote is gone."""

    def handler(name: str) -> None:
        with contextlib.closing(connect()) as connection:
            write(connection, name)
            current_claim().finish_in(connection, f"ordered {name}")
            connection.rollback()
            raise error

    policy = Policy(record_failures=(DeclinedError,))
    with pytest.raises(error):
        seller.idem.run(handler, "A-1", scope=SCOPE, key="A-1", policy=policy)
    ended = State.FAILED if error is DeclinedError else State.RELEASED
    assert (seller.orders(), seller.state()) == (0, ended)


@pytest.mark.parametrize("url", ["postgres_url"], indirect=True)
def test_a_transaction_that_is_left_open_is_not_guessed_about(seller: Seller, connect: Connect) -> None:
    """Nobody knows how it ends: nothing is released, and the message comes again; rolled back, the next one runs."""
    left = connect()
    ran: list[str] = []

    def handler(name: str) -> str:
        ran.append(name)
        if len(ran) == 1:
            write(left, name)
            current_claim().finish_in(left, "never committed")
            raise KeyError
        return "the second"

    policy = Policy(lease=1.0)
    with pytest.raises(StoreUnavailableError, match="not known whether"):
        seller.idem.run(handler, "A-1", scope=SCOPE, key="A-1", policy=policy)
    left.close()
    assert (seller.orders(), seller.state()) == (0, State.RUNNING)
    deadline = time.monotonic() + 10
    while True:
        try:
            assert seller.idem.run(handler, "A-1", scope=SCOPE, key="A-1", policy=policy) == "the second"
            break
        except InProgressError:
            assert time.monotonic() < deadline
            time.sleep(0.1)  # until the lease is over
    assert ran == ["A-1", "A-1"]


@pytest.mark.parametrize("url", ["postgres_url"], indirect=True)
def test_the_marker_follows(seller: Seller, connect: Connect, redis_url: str) -> None:
    """With Redis in front, duplicates are answered by the marker."""
    store = TieredStore(RedisStore(redis_url, socket_timeout=PATIENCE), SQLStore(seller.url))

    def handler(name: str) -> None:
        with contextlib.closing(connect()) as connection:
            current_claim().finish_in(connection, name)
            connection.commit()

    with Driver("blocking") as driver, Seller(driver, seller.url, store) as tiered:
        assert tiered.idem.run(handler, "A-1", scope=SCOPE, key="A-1") == "A-1"
        with tiered.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE idem_tasks_records SET outcome = '\"not read\"'")
        assert tiered.idem.run(handler, "A-1", scope=SCOPE, key="A-1") == "A-1"


@pytest.mark.parametrize("url", ["postgres_url"], indirect=True)
def test_no_marker_answers_with_what_was_rolled_back(seller: Seller, connect: Connect, redis_url: str) -> None:
    """With Redis in front too: it fails its handler, and the next delivery runs."""
    store = TieredStore(RedisStore(redis_url, socket_timeout=PATIENCE), SQLStore(seller.url))
    ran: list[str] = []

    def handler(name: str) -> None:
        ran.append(name)
        with contextlib.closing(connect()) as connection:
            write(connection, name)
            current_claim().finish_in(connection, f"ordered {len(ran)}")
            connection.rollback() if len(ran) == 1 else connection.commit()

    with Driver("blocking") as driver, Seller(driver, seller.url, store) as tiered:
        with pytest.raises(ConfigurationError, match="was rolled back"):
            tiered.idem.run(handler, "A-1", scope=SCOPE, key="A-1")
        for _ in range(2):
            assert tiered.idem.run(handler, "A-1", scope=SCOPE, key="A-1") == "ordered 2"
    assert (len(ran), seller.orders()) == (2, 1)


def test_a_step_neither_ends_the_handler_nor_comes_after_its_end(seller: Seller, connect: Connect) -> None:
    """A step's outcome is written under the running claim, which `finish_in` ends (F15)."""

    def in_a_step(name: str) -> None:
        def step() -> None:
            with contextlib.closing(connect()) as connection:
                write(connection, name)
                current_claim().finish_in(connection)

        current_claim().step("one", step)

    def after_it(name: str) -> None:
        with contextlib.closing(connect()) as connection:
            write(connection, name)
            current_claim().finish_in(connection)
            current_claim().step("one", str)

    for key, handler in (("A-1", in_a_step), ("A-2", after_it)):
        with pytest.raises(ConfigurationError, match="step 'one'"):
            seller.idem.run(handler, key, scope=SCOPE, key=key)
        assert seller.state(key) is State.RELEASED
    assert seller.orders() == 0


def test_messages_are_committed_with_the_rows(seller: Seller, connect: Connect) -> None:
    """In the handler's own transaction, and sent after its commit; what was rolled back sends nothing."""
    seen: list[int] = []

    def handler(name: str) -> None:
        with contextlib.closing(connect()) as connection:
            claim = current_claim()
            claim.publish_message({"order": name}, to="mail")
            claim.publish_message({"gift for": name}, to="mail")
            write(connection, name)
            claim.finish_in(connection)
            with pytest.raises(ConfigurationError, match="has ended"):
                claim.publish_message("too late", to="mail")
            if name == "A-2":
                connection.rollback()
            else:
                connection.commit()
            seen.append(len(seller.mails))

    seller.idem.run(handler, "A-1", scope=SCOPE, key="A-1")
    with pytest.raises(ConfigurationError, match="rolled back"):
        seller.idem.run(handler, "A-2", scope=SCOPE, key="A-2")
    assert seen == [0, 2]
    assert [message.body for message in seller.mails] == [{"order": "A-1"}, {"gift for": "A-1"}]
    assert seller.idem.relay().left == 0
