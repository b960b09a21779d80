"""What a handler commits with its own rows is kept by its process once it is committed, and not before."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from idem_tasks import SQLStore, current_claim, current_claims
from idem_tasks.claims import ClaimRequest, InProgress, new_owner
from idem_tasks.errors import BatchError
from idem_tasks.events import Announcer
from idem_tasks.policy import Policy
from idem_tasks.runtime import run_sync
from idem_tasks.stores.base import Store
from idem_tasks.stores.cached import cached
from idem_tasks.stores.local_cache import LocalCache
from idem_tasks.testing import Driver
from tests.integration.sessions.seller import SCOPE, SHORT, Order, Seller, order
from tests.integration.sessions.test_sessions import SERVERS, on
from tests.integration.sql_proxy import Proxy


@pytest.fixture
def store(url: str) -> Store:
    return cached(SQLStore(url), LocalCache(100, 60.0))


@pytest.fixture
def seller(driver: Driver, url: str, store: Store) -> Iterator[Seller]:
    with Seller(driver, url, store) as seller:
        yield seller


def change_records(seller: Seller) -> None:
    """Let whoever asks the database hear something else."""
    with seller.engine.begin() as connection:
        connection.execute(text("UPDATE idem_tasks_records SET outcome = :other"), {"other": b'"of the record"'})


def run_batch(seller: Seller, body: Callable[[list[str], Session], list[str]], *names: str, **fields: Any) -> Any:
    how: dict[str, Any] = {"scope": SCOPE, "key": "{message}", "session": seller.sessions, "policy": Policy(**fields)}
    if not seller.is_asyncio:
        return seller.idem.run_batch(body, names, **how)

    async def handler(new: list[str], session: Any) -> list[str]:
        return await session.run_sync(lambda plain: body(new, plain))  # type: ignore[no-any-return]

    return seller.driver(seller.idem.arun_batch(handler, names, **how))


def order_all(new: list[str], session: Session) -> list[str]:
    return [order(name, session) for name in new]


def test_what_a_session_committed_is_answered(seller: Seller) -> None:
    """Without the database from then on."""
    task = seller.task(order)
    assert task("A-1") == "ordered A-1"
    change_records(seller)
    assert task("A-1") == "ordered A-1"
    assert seller.orders() == 1


def test_what_a_session_has_not_committed_is_not(seller: Seller, store: Store) -> None:
    """Up to the commit a duplicate hears that it is in progress."""
    heard: list[object] = []

    def body(name: str, session: Session) -> str:
        ordered = order(name, session)
        session.flush()
        request = ClaimRequest(SCOPE, name, None, new_owner(), Policy())
        heard.append(run_sync(store.on("blocking", Announcer(())).claim(request)))
        return ordered

    assert seller.task(body)("A-1") == "ordered A-1"
    run_sync(store.on("blocking", Announcer(())).close())
    assert [type(answer) for answer in heard] == [InProgress]


def test_what_the_database_refused_is_not_kept(seller: Seller) -> None:
    """A commit that fails is none: the next delivery runs."""

    def body(name: str, session: Session) -> str:
        session.add(Order(number=1, name=name))
        return f"ordered {name}"

    task = seller.task(body)
    assert task("A-1") == "ordered A-1"
    for _ in range(2):
        with pytest.raises(IntegrityError):
            task("A-2")


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_commit_whose_reply_was_lost_is_asked_for(driver: Driver, url: str) -> None:
    """It is found to be done, but nobody knows since when: the next duplicate asks, and then it is known."""
    with Proxy(url) as proxy:
        store = cached(SQLStore(proxy.url, create_schema=True), LocalCache(100, 60.0))
        with Seller(driver, url, store) as seller:
            seller.sessions = seller.sessionmaker(seller.new_engine(proxy.url))
            task = seller.task(order)
            with on("before_commit", lambda *_: proxy.lose_next_reply()):
                assert task("A-1") == "ordered A-1"
            assert proxy.lost == 1
            before = proxy.round_trips
            assert task("A-1") == "ordered A-1"
            asked, before = proxy.round_trips - before, proxy.round_trips
            assert asked > 0
            assert task("A-1") == "ordered A-1"
            assert (proxy.round_trips, seller.orders()) == (before, 1)


def test_what_a_zombie_did_not_commit_is_not_kept(seller: Seller) -> None:
    """Overtaken while it ran, it hears the other one's outcome, and so does everybody after it."""

    def body(name: str, session: Session) -> str:
        seller.stop_renewing()
        session.rollback()  # on SQLite nobody can take over while its holder has the one lock that there is
        seller.finish_elsewhere(seller.take_over())
        return order(name, session)

    task = seller.task(body, lease=SHORT)
    assert [task("A-1"), task("A-1")] == ["the other one"] * 2
    assert seller.orders("A-1") == 0


def test_what_a_batch_committed_is_answered(seller: Seller) -> None:
    """All of it, since all of it is committed."""
    assert run_batch(seller, order_all, "A-1", "A-2") == ["ordered A-1", "ordered A-2"]
    change_records(seller)
    assert run_batch(seller, order_all, "A-2", "A-1", "A-3") == ["ordered A-2", "ordered A-1", "ordered A-3"]
    assert seller.orders() == 3


def test_what_a_batch_did_not_commit_is_not(seller: Seller) -> None:
    """The database refused the whole of it, so all of it runs again."""

    def order_twice(new: list[str], session: Session) -> list[str]:
        session.add_all([Order(number=1, name=name) for name in new * 2])
        return new

    for _ in range(2):
        with pytest.raises(BatchError):
            run_batch(seller, order_twice, "A-1", "A-2")
    assert run_batch(seller, order_all, "A-1", "A-2") == ["ordered A-1", "ordered A-2"]


@pytest.mark.parametrize("url", ["postgres_url", "mariadb_url"], indirect=True)
def test_what_a_batch_with_a_zombie_did_not_commit_is_not_kept(seller: Seller) -> None:
    """One fence missed, so nothing was committed: the other message runs again. On SQLite nobody else could write."""
    ran: list[list[str]] = []

    def body(new: list[str], session: Session) -> list[str]:
        ran.append(new)
        if len(ran) == 1:
            seller.idem.services(seller.driver.runtime).heartbeat.let_go(current_claims()[0].lease.owner)
            seller.finish_elsewhere(seller.take_over())
        return order_all(new, session)

    for _ in range(2):
        assert run_batch(seller, body, "A-1", "A-2", lease=SHORT) == ["the other one", "ordered A-2"]
    assert ran == [["A-1", "A-2"], ["A-2"]]


def test_what_a_handler_committed_by_itself_is_answered(sqlite_url: str) -> None:
    """With `finish_in`: once it was seen to be committed."""
    with (
        Driver("blocking") as driver,
        Seller(driver, sqlite_url, cached(SQLStore(sqlite_url), LocalCache(9, 60.0))) as seller,
    ):

        def handler(name: str, *, commits: bool) -> None:
            with contextlib.closing(sqlite3.connect(seller.engine.url.database or "")) as connection:
                connection.execute("INSERT INTO orders (name) VALUES (?)", (name,))
                current_claim().finish_in(connection, f"ordered {name}")
                connection.commit() if commits else connection.rollback()

        def deliver(*, commits: bool) -> Any:
            return seller.idem.run(handler, "A-1", scope=SCOPE, key="A-1", fingerprint=None, commits=commits)

        with pytest.raises(Exception, match="was rolled back"):
            deliver(commits=False)
        assert deliver(commits=True) == "ordered A-1"
        change_records(seller)
        assert deliver(commits=True) == "ordered A-1"
        assert seller.orders() == 1
