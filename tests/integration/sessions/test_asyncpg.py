"""What holds for sessions on psycopg holds on asyncpg, which words its errors, and breaks off, in its own way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import make_url

from idem_tasks import SQLStore
from idem_tasks.policy import OnCrash
from idem_tasks.testing import Driver
from tests.integration.sessions import (
    test_idle_transactions as idle,
    test_sessions as sessions,
    test_struck_beginnings as beginnings,
    test_unknown_commits as unknown,
)
from tests.integration.sessions.seller import Seller
from tests.integration.sql_proxy import Proxy


class AsyncpgSeller(Seller):
    """Has asyncpg for its sessions and for its records."""

    asyncio_drivers = Seller.asyncio_drivers | {"postgresql": "postgresql+asyncpg"}


@pytest.fixture
def driver() -> Iterator[Driver]:
    with Driver("asyncio") as driver:
        yield driver


@pytest.fixture
def seller(driver: Driver, postgres_url: str) -> Iterator[Seller]:
    with AsyncpgSeller(driver, postgres_url, records(postgres_url)) as seller:
        yield seller


def records(url: str) -> SQLStore:
    place = make_url(url).set(drivername="postgresql+asyncpg")
    return SQLStore(place.render_as_string(hide_password=False), create_schema=True)


def test_it_is_asyncpg(seller: Seller) -> None:
    """The sessions are what the tests below take them for."""
    assert seller.sessions.kw["bind"].driver == "asyncpg"


@pytest.mark.parametrize(
    "promise",
    [
        sessions.test_rows_and_outcome_are_committed_together,
        sessions.test_nothing_is_written_by_a_handler_that_raises,
        sessions.test_what_the_database_refuses_at_the_end_is_raised,
        sessions.test_savepoints_and_rollbacks_are_the_handlers_own,
        sessions.test_an_engine_in_autocommit_is_refused,
        sessions.test_messages_are_committed_with_the_rows,
        sessions.test_under_hold_a_handler_does_not_run_again,
        beginnings.test_a_cancellation_as_it_is_begun_gives_the_claim_back,
    ],
)
def test_on_asyncpg(seller: Seller, promise: Callable[[Seller], None]) -> None:
    """Each promise of that name is kept there too."""
    promise(seller)


@pytest.mark.parametrize("wins", ["finished", "running"])
def test_a_zombies_work_vanishes(seller: Seller, wins: str) -> None:
    """Overtaken while it runs, a handler commits nothing."""
    sessions.test_a_zombies_work_vanishes(seller, wins)


@pytest.mark.parametrize("times, runs", [(1, 2), (99, 6)])
def test_a_serialization_failure_runs_the_handler_again(seller: Seller, times: int, runs: int) -> None:
    """Told by its SQLSTATE, which SQLAlchemy hands on from asyncpg's error."""
    sessions.test_a_serialization_failure_runs_the_handler_again(seller, times, runs)


@pytest.mark.parametrize("what", ["before_flush", "after_flush", "before_commit", "after_commit"])
def test_a_cancellation_at_the_end(seller: Seller, what: str) -> None:
    """Rows and outcome agree, whether the call is cancelled or its loop ends."""
    sessions.test_a_cancellation_at_the_end_waits_for_the_commit(seller, what)


@pytest.mark.parametrize("what", ["before_flush", "after_flush", "before_commit", "after_commit"])
def test_a_loop_that_ends_at_the_end(seller: Seller, what: str) -> None:
    """Cancelled with every task of its loop, a commit is looked for and not guessed."""
    sessions.test_a_loop_that_ends_at_the_end_leaves_both_or_nothing(seller, what)


@pytest.mark.parametrize("what", ["after_flush", "before_commit"])
def test_a_connection_that_is_gone_before_the_commit(seller: Seller, what: str) -> None:
    """Nothing can have been committed: the message is put back."""
    sessions.test_a_connection_that_is_gone_before_the_commit_leaves_nothing(seller, what)


@pytest.mark.parametrize("on_crash", ["rerun", "hold"])
def test_a_connection_that_is_gone_in_mid_run(seller: Seller, on_crash: OnCrash) -> None:
    """It is no failure of the handler."""
    sessions.test_a_connection_that_is_gone_in_mid_run_is_no_failure(seller, on_crash)


@pytest.mark.parametrize("goes_on", [idle.writes, idle.returns])
def test_an_idle_transaction(seller: Seller, goes_on: Callable[..., str]) -> None:
    """The server ends it, and tells asyncpg so."""
    idle.test_a_paused_handlers_transaction_is_ended_by_the_server(seller, goes_on)


def test_a_commit_whose_reply_is_lost(seller: Seller) -> None:
    """It is looked for, not sent again."""
    with Proxy(seller.url) as proxy:
        seller.sessions = seller.sessionmaker(seller.new_engine(proxy.url))
        sessions.test_a_commit_whose_reply_is_lost_is_no_second_run(seller, proxy)


@pytest.mark.parametrize("committed", [True, False])
def test_a_commit_is_looked_for_until_the_server_is_back(driver: Driver, postgres_url: str, committed: bool) -> None:
    """Through asyncpg's own errors while it connects."""
    with Proxy(postgres_url) as proxy, AsyncpgSeller(driver, postgres_url, records(proxy.url)) as seller:
        seller.sessions = seller.sessionmaker(seller.new_engine(proxy.url))
        unknown.test_a_commit_is_looked_for_until_the_server_is_back(seller, proxy, committed)
