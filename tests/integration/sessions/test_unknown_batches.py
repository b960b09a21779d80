"""A batch whose commit is struck, lost, or followed by a fault: rows and outcomes agree, whatever comes next."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import delete, text
from sqlalchemy.orm import Session

from idem_tasks import SQLStore
from idem_tasks.batch import perform_batch
from idem_tasks.claims import State
from idem_tasks.errors import BatchError, StoreUnavailableError
from idem_tasks.events import Event, EventName
from idem_tasks.runtime import Blocking, run_sync
from idem_tasks.stores.schema import records_table
from idem_tasks.testing import Driver
from tests.integration.sessions.seller import SCOPE, Order, Seller
from tests.integration.sessions.test_batches import SoftLimitError, batch_of, failing, kinds, order_all, states
from tests.integration.sessions.test_sessions import SERVERS, on
from tests.integration.sessions.test_unknown_commits import LEASE, leaving
from tests.integration.sql_proxy import Proxy
from tests.unit.batches import Host


@pytest.fixture
def proxied(driver: Driver, postgres_url: str) -> Iterator[tuple[Seller, Proxy]]:
    """A seller whose sessions and records go through a proxy; what the test looks at by itself does not."""
    with (
        Proxy(postgres_url) as proxy,
        Seller(driver, postgres_url, SQLStore(proxy.url, create_schema=True)) as seller,
    ):
        seller.sessions = seller.sessionmaker(seller.new_engine(proxy.url))
        yield seller, proxy


@pytest.mark.parametrize("committed", [True, False])
def test_a_commit_is_looked_for_until_the_server_is_back(proxied: tuple[Seller, Proxy], committed: bool) -> None:
    """Back while the leases live, it says what there is: all outcomes are returned, or all are put back (F14, F21)."""
    seller, proxy = proxied
    task = batch_of(seller, order_all)
    with on("before_commit", leaving(proxy, committed=committed, turns=3)):
        if committed:
            assert task(["A", "B"]) == ["ordered A", "ordered B"]
        else:
            assert kinds(failing(task, ["A", "B"])) == ["StoreUnavailableError"] * 2
    assert (seller.orders(), states(seller, "AB")) == (
        (2, [State.COMPLETED] * 2) if committed else (0, [State.RELEASED] * 2)
    )
    assert task(["A", "B"]) == ["ordered A", "ordered B"]
    assert seller.orders() == 2


def test_a_commit_that_stays_unknown_is_left_to_the_next_delivery(proxied: tuple[Seller, Proxy]) -> None:
    """Nothing is released, and every message comes again: it gets the outcome that there is (F14, F57)."""
    seller, proxy = proxied
    task = batch_of(seller, order_all, lease=LEASE)
    with on("before_commit", leaving(proxy, committed=True)):
        error = failing(task, ["A", "B"])
    assert kinds(error) == ["StoreUnavailableError"] * 2
    assert isinstance(error.results[0], StoreUnavailableError)
    assert "it is not known whether" in str(error.results[0])
    proxy.come_back()
    assert task(["A", "B"]) == ["ordered A", "ordered B"]
    assert seller.orders() == 2


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_listener_that_raises_after_the_commit_undoes_nothing(seller: Seller) -> None:
    """Its exception is every message's, and all of them are recorded."""

    def broken(*_: object) -> None:
        raise ValueError("after the commit")

    task = batch_of(seller, order_all)
    with on("after_commit", broken):
        assert kinds(failing(task, ["A", "B"])) == ["ValueError"] * 2
    assert (seller.orders(), states(seller, "AB")) == (2, [State.COMPLETED] * 2)
    assert task(["A", "B"]) == ["ordered A", "ordered B"]


@pytest.mark.parametrize("when", ["before_commit", "after_commit", "after_begin", "after_flush"])
def test_a_soft_limit_in_the_transaction_comes_out_as_itself(seller: Seller, when: str) -> None:
    """Both are committed or neither is, and the next delivery has all of them once (F62)."""
    struck: list[int] = []

    def strike(*_: object) -> None:
        if not struck:
            struck.append(1)
            raise SoftLimitError

    task = batch_of(seller, order_all)
    with on(when, strike), pytest.raises(SoftLimitError):
        task(["A", "B"])
    assert seller.orders() in (0, 2)
    assert task(["A", "B"]) == ["ordered A", "ordered B"]
    assert seller.orders() == 2


def test_one_that_was_lost_before_the_handler_began(seller: Seller) -> None:
    """Nothing has run for any of them: the others run by themselves, and the lost one has to come again."""
    runs: list[list[str]] = []

    def body(names: list[str], session: Session) -> list[str]:
        runs.append(names)
        return order_all(names, session)

    def lose(event: Event) -> None:
        if event.name is EventName.GRANTED and event.key == "C":
            with seller.engine.begin() as connection:
                connection.execute(delete(records_table()).where(records_table().c.key == "B"))

    seller.idem._announce._observers += (lose,)
    error = failing(batch_of(seller, body), ["A", "B", "C"])
    assert kinds(error) == ["ordered A", "LeaseLostError", "ordered C"]
    assert (runs, seller.orders()) == ([["A"], ["C"]], 2)


def test_a_serialization_failure_at_the_commit_runs_them_again(driver: Driver, postgres_url: str) -> None:
    """It undid everything, and is no message's fault: all of them run again, together."""
    with Seller(driver, postgres_url) as seller:
        runs: list[list[str]] = []

        def body(names: list[str], session: Session) -> list[str]:
            runs.append(names)
            return order_all(names, session)

        def undone(session: Session, _: object) -> None:
            if len(runs) == 1:
                session.execute(text("DO $$ BEGIN RAISE EXCEPTION 'undone' USING ERRCODE = '40001'; END $$"))

        with on("after_flush", undone):
            assert batch_of(seller, body)(["A", "B"]) == ["ordered A", "ordered B"]
        assert (runs, seller.orders()) == ([["A", "B"]] * 2, 2)


def test_a_child_that_the_handler_forked_records_nothing(sqlite_url: str) -> None:
    """A handler's fork that goes on to return leaves the parent's transaction alone (F26)."""
    with Driver("blocking") as driver, Seller(driver, sqlite_url) as seller:
        parent = os.getpid()

        def body(names: list[str], session: Session) -> list[Any]:
            session.add_all(Order(name=name) for name in names)
            session.flush()
            child = os.fork()
            if child:
                os.waitpid(child, 0)
            return names

        try:
            done = batch_of(seller, body)(["A", "B"])
        finally:
            if os.getpid() != parent:
                os._exit(0)
        assert done == ["A", "B"]
        assert seller.orders() == 2


@pytest.mark.parametrize("options", [{}, {"enabled": False}, {"on_crash": "hold"}])
def test_where_nothing_can_be_awaited_claims_are_left_to_their_leases(
    monkeypatch: pytest.MonkeyPatch, sqlite_url: str, options: Any
) -> None:
    """As for a coroutine that is dropped in the handler: nothing is committed, released or recorded."""
    with Driver("blocking") as driver, Seller(driver, sqlite_url) as seller:
        left: list[Session] = []

        def body(names: list[str], session: Session) -> list[str]:
            left.append(session)
            order_all(names, session)
            monkeypatch.setattr(Blocking, "can_wait", lambda _, *, after: not after)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            batch_of(seller, body, **options)(["A", "B"])
        monkeypatch.undo()
        left[0].close()
        assert seller.orders() == 0
        assert states(seller, "AB") == [None if "enabled" in options else State.RUNNING] * 2


def test_where_nothing_can_be_awaited_at_the_beginning(monkeypatch: pytest.MonkeyPatch, sqlite_url: str) -> None:
    """Claims are left to their leases here too."""
    with Driver("blocking") as driver, Seller(driver, sqlite_url) as seller:
        left: list[Session] = []

        def strike(session: Session, *_: object) -> None:
            left.append(session)
            monkeypatch.setattr(Blocking, "can_wait", lambda _, *, after: not after)
            raise KeyboardInterrupt

        with on("after_begin", strike), pytest.raises(KeyboardInterrupt):
            batch_of(seller, order_all)(["A", "B"])
        monkeypatch.undo()
        left[0].close()
        assert states(seller, "AB") == [State.RUNNING] * 2


def test_a_soft_limit_at_the_beginning_under_a_framework(sqlite_url: str) -> None:
    """Nothing has run, so every message comes again: it is no failure of the handler's (F31)."""
    with Driver("blocking") as driver, Seller(driver, sqlite_url) as seller:

        def strike(*_: object) -> None:
            raise SoftLimitError

        batch = seller.idem._batch(order_all, ["A", "B"], SCOPE, str, None, seller.sessions, None, "blocking")
        batch.host = Host()
        with on("after_begin", strike), pytest.raises(BatchError) as caught:
            run_sync(perform_batch(batch))
        assert kinds(caught.value) == ["StoreUnavailableError"] * 2
        assert states(seller, "AB") == [State.RELEASED] * 2
