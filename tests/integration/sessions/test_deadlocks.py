"""Real deadlocks between two handlers: both end, with one row each."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import delete, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from idem_tasks import idempotent_task
from idem_tasks.testing import Driver
from idem_tasks.testing.driver import PATIENCE
from tests.integration.sessions.seller import SCOPE, Order, Seller, Stock

ROUNDS = 50


def sell(session: Session, name: str) -> None:
    session.execute(update(Stock).where(Stock.name == name).values(sold=Stock.sold + 1))


@pytest.mark.parametrize("url", ["postgres_url", "mariadb_url"], indirect=True)
def test_two_handlers_in_a_deadlock_both_end(seller: Seller) -> None:
    """The one that the server chose runs again under its claim, 50 times over; each sale counts once (F39)."""
    with Session(seller.engine) as session, session.begin():
        session.add_all([Stock(name="left", sold=0), Stock(name="right", sold=0)])
    if seller.url.startswith("postgres"):  # which looks for deadlocks after a second, unless told otherwise
        soon = {"options": "-c deadlock_timeout=20ms"}
        seller.sessions = seller.sessionmaker(seller.new_engine(connect_args=soon))
    again = 0
    for number in range(ROUNDS):
        again += meet(seller, number)
    assert again >= ROUNDS  # in every round there was one
    assert seller.orders() == 2 * ROUNDS
    with Session(seller.engine) as session:
        assert [stock.sold for stock in session.query(Stock).order_by(Stock.name)] == [2 * ROUNDS] * 2


@pytest.mark.parametrize("url", ["mariadb_url"], indirect=True)
@pytest.mark.parametrize("driver", ["blocking"], indirect=True)
def test_a_deadlock_that_a_handler_swallows_is_no_half_of_its_work(seller: Seller) -> None:
    """The server has undone what came before it; the rest is not committed alone, but the handler runs again (F14)."""
    with Session(seller.engine) as session, session.begin():
        session.add_all([Stock(name="left", sold=0), Stock(name="right", sold=0)])
    ran: list[str] = []

    def body(name: str, session: Session) -> str:
        ran.append(name)
        sell(session, "left")
        if len(ran) == 1:
            with other_in_deadlock(seller, session), contextlib.suppress(OperationalError):
                sell(session, "right")
        session.add(Order(name=name))
        return name

    assert seller.task(body)("A-1") == "A-1"
    with Session(seller.engine) as session:
        sold = {stock.name: stock.sold for stock in session.query(Stock)}
    assert (len(ran), seller.orders(), sold["left"]) == (2, 1, 101)


@contextlib.contextmanager
def other_in_deadlock(seller: Seller, session: Session) -> Iterator[None]:
    """Let another transaction wait for `left` while it holds `right`, and have done more, so that it is not chosen."""
    with Session(seller.engine) as other, other.begin():
        other.add_all([Order(name="of another") for _ in range(200)])
        other.flush()
        sell(other, "right")

        def wait_and_sell() -> None:
            for _ in range(100):
                sell(other, "left")

        waits = threading.Thread(target=wait_and_sell)
        waits.start()
        own = other.connection().connection.driver_connection.thread_id()  # type: ignore[union-attr]
        waiting = text(
            "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_mysql_thread_id = :own "
            "AND trx_state = 'LOCK WAIT'"
        )
        with seller.engine.connect() as connection, Driver("blocking") as driver:

            async def found() -> int:
                return connection.scalar(waiting, {"own": own}) or 0

            driver.poll(found, bool, every=0.11)
        yield
        waits.join(PATIENCE)
        other.execute(delete(Order))


def meet(seller: Seller, number: int) -> int:
    """Let two handlers lock two rows in opposite order; returns how often one ran again."""
    return asyncio_meet(seller, number) if seller.is_asyncio else blocking_meet(seller, number)


def blocking_meet(seller: Seller, number: int) -> int:
    both_hold_one = threading.Barrier(2, timeout=PATIENCE)
    runs: list[str] = []

    @idempotent_task(key="{first}", scope=f"{SCOPE}{number}", idempotency=seller.idem, session=seller.sessions)
    def handle(first: str, second: str, *, session: Any = None) -> str:
        runs.append(first)
        sell(session, first)
        if runs.count(first) == 1:
            both_hold_one.wait()
        sell(session, second)
        session.add(Order(name=f"{first} {number}"))
        return first

    with ThreadPoolExecutor(2) as threads:
        sold = [threads.submit(handle, "left", "right"), threads.submit(handle, "right", "left")]
        assert [each.result(PATIENCE) for each in sold] == ["left", "right"]
    return len(runs) - 2


def asyncio_meet(seller: Seller, number: int) -> int:
    runs: list[str] = []

    async def both() -> list[str]:
        both_hold_one = asyncio.Barrier(2)

        @idempotent_task(key="{first}", scope=f"{SCOPE}{number}", idempotency=seller.idem, session=seller.sessions)
        async def handle(first: str, second: str, *, session: Any = None) -> str:
            runs.append(first)
            await session.run_sync(sell, first)
            if runs.count(first) == 1:
                async with asyncio.timeout(PATIENCE):
                    await both_hold_one.wait()
            await session.run_sync(sell, second)
            session.add(Order(name=f"{first} {number}"))
            return first

        return list(await asyncio.gather(handle("left", "right"), handle("right", "left")))

    assert seller.driver(both()) == ["left", "right"]
    return len(runs) - 2
