"""A session's transaction that an interruption strikes as it is begun: no handler has run, and the claim is free."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from idem_tasks.claims import State
from idem_tasks.errors import StoreUnavailableError
from idem_tasks.events import EventName
from idem_tasks.testing import Driver
from tests.integration.sessions.seller import Seller, order
from tests.integration.sessions.test_sessions import (
    SERVERS,
    SoftLimitError,
    cancelled_once,
    on,
    struck_within_sqlalchemy,
)


class Framework:
    """A host that settles nothing by itself."""

    scope = None
    message = "m-1"
    framework_argument = False

    def is_failure(self, error: BaseException) -> bool:
        return True

    def proves_no_effect(self, error: BaseException) -> bool:
        return False

    def settle(self, error: BaseException, announce: Any) -> BaseException:
        return error


@pytest.fixture(params=[False, True], ids=["alone", "under a framework"])
def has_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        monkeypatch.setattr("idem_tasks.hosts._finders", [lambda _: Framework()])
    return bool(request.param)


def raised_by(struck: type[BaseException], *, has_host: bool) -> type[BaseException]:
    """A framework would fail a message for its soft limit; a shutdown it knows to be one."""
    return StoreUnavailableError if has_host and issubclass(struck, Exception) else struck


def sees_it_come_again(seller: Seller, struck: type[BaseException], *, has_host: bool) -> None:
    """See a call that is struck run nothing and hold nothing, though its policy is `hold`, and the next one run."""
    ran: list[str] = []

    def body(name: str, session: Session) -> str:
        ran.append(name)
        return order(name, session)

    task = seller.task(body, on_crash="hold")
    with pytest.raises(raised_by(struck, has_host=has_host)):
        task("A-1")
    assert (ran, seller.orders(), seller.state()) == ([], 0, State.RELEASED)
    assert EventName.IN_DOUBT not in seller.names()
    assert task("A-1") == "ordered A-1"
    assert (ran, seller.orders(), seller.state()) == (["A-1"], 1, State.COMPLETED)


@pytest.mark.parametrize("struck", [SoftLimitError, KeyboardInterrupt])
@pytest.mark.parametrize("driver", ["blocking"], indirect=True)
def test_an_interruption_as_it_is_begun_gives_the_claim_back(
    seller: Seller, struck: type[BaseException], has_host: bool
) -> None:
    """Nothing is written, and the message comes again: to a framework a soft limit is an outage (F31, F62)."""
    strikes = [struck()]

    def strike(*_: object) -> None:
        if strikes:
            raise strikes.pop()

    with on("after_begin", strike):
        sees_it_come_again(seller, struck, has_host=has_host)
    assert strikes == []


@pytest.mark.parametrize("driver", ["blocking"], indirect=True)
@pytest.mark.parametrize("url", ["sqlite_url"], indirect=True)
def test_a_soft_limit_that_sqlalchemy_wraps_gives_the_claim_back(seller: Seller, has_host: bool) -> None:
    """It comes out as itself, and to a framework it is an outage as any other (F31, F62)."""
    with struck_within_sqlalchemy(seller, "after_begin"):
        sees_it_come_again(seller, SoftLimitError, has_host=has_host)


@pytest.mark.parametrize("struck", [SoftLimitError, KeyboardInterrupt])
@pytest.mark.parametrize("driver", ["blocking"], indirect=True)
@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_an_interruption_while_the_server_is_waited_for_gives_the_claim_back(
    seller: Seller, struck: type[BaseException], has_host: bool
) -> None:
    """The same in mid-statement, where the connection is good for nobody any more (F31, F62)."""
    with struck_while_records_are_locked(seller, struck):
        sees_it_come_again(seller, struck, has_host=has_host)


@contextmanager
def struck_while_records_are_locked(seller: Seller, struck: type[BaseException]) -> Iterator[None]:
    """Lock the table of records as a transaction begins, and strike this thread once it waits for that."""
    locked, was_waited_for = threading.Event(), threading.Event()

    def strike(*_: object) -> None:
        raise struck

    def lock() -> None:
        with seller.engine.connect() as connection:
            if seller.url.startswith("postgres"):
                connection.execute(text("LOCK TABLE idem_tasks_records"))
            else:
                connection.execute(text("LOCK TABLES idem_tasks_records WRITE"))
            locked.set()
            with Driver("blocking") as driver:

                async def found() -> int:
                    return is_waited_for(seller)

                driver.poll(found, bool, every=0.02)
            was_waited_for.set()
            os.kill(os.getpid(), signal.SIGUSR1)
            if not seller.url.startswith("postgres"):
                connection.execute(text("UNLOCK TABLES"))

    threads: list[threading.Thread] = []

    def begin_lock(*_: object) -> None:
        if not threads:
            threads.append(threading.Thread(target=lock))
            threads[0].start()
            assert locked.wait(10)

    before = signal.signal(signal.SIGUSR1, strike)
    try:
        with on("after_begin", begin_lock):
            yield
    finally:
        signal.signal(signal.SIGUSR1, before)
        for thread in threads:
            thread.join(10)
    assert was_waited_for.is_set()


def is_waited_for(seller: Seller) -> int:
    """Tell how many transactions wait for the locked table."""
    with seller.engine.connect() as connection:
        if seller.url.startswith("postgres"):
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'idem_tasks_records'::regclass"
        else:
            waiting = (
                "SELECT count(*) FROM information_schema.processlist "
                "WHERE db = DATABASE() AND state LIKE 'Waiting for table%'"
            )
        return connection.scalar(text(waiting)) or 0


@pytest.mark.parametrize("driver", ["asyncio"], indirect=True)
def test_a_cancellation_as_it_is_begun_gives_the_claim_back(seller: Seller) -> None:
    """Nothing is written, and the message comes again (F62)."""
    with cancelled_once("after_begin"):
        sees_it_come_again(seller, asyncio.CancelledError, has_host=False)
