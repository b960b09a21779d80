"""A handler that is paused in mid-transaction keeps its locks on PostgreSQL for `max_hold`, and no longer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from idem_tasks.claims import State
from idem_tasks.errors import StoreUnavailableError
from idem_tasks.testing import Driver
from tests.integration.sessions.seller import Seller, order

MAX_HOLD = 1.0

pytestmark = pytest.mark.parametrize("url", ["postgres_url"], indirect=True)


def wait_for_its_end(seller: Seller, session: Session) -> None:
    """Say nothing in the session until the server has ended its connection."""
    own = session.scalar(text("SELECT pg_backend_pid()"))
    with seller.engine.connect() as connection, Driver("blocking") as driver:
        connection.execution_options(isolation_level="AUTOCOMMIT")

        async def is_there() -> int:
            return connection.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE pid = :own"), {"own": own}) or 0

        driver.poll(is_there, lambda number: number == 0)


def writes(name: str, session: Session) -> str:
    ordered = order(name, session)
    session.flush()
    return ordered


def returns(name: str, session: Session) -> str:
    return f"ordered {name}"


@pytest.mark.parametrize("goes_on", [writes, returns])
def test_a_paused_handlers_transaction_is_ended_by_the_server(
    seller: Seller, goes_on: Callable[[str, Session], str]
) -> None:
    """Idle for `max_hold` it is gone: nothing is written when the handler goes on, and it runs again (F14, F59)."""
    ran: list[str] = []

    def body(name: str, session: Session) -> str:
        ran.append(name)
        order(name, session)
        session.flush()
        if len(ran) == 1:
            wait_for_its_end(seller, session)
            return goes_on(name, session)
        return f"ordered {name}"

    task = seller.task(body, lease=MAX_HOLD, max_hold=MAX_HOLD)
    with pytest.raises(StoreUnavailableError):
        task("A-1")
    assert (seller.orders(), seller.state()) == (0, State.RELEASED)
    assert [task("A-1"), task("A-1")] == ["ordered A-1"] * 2
    assert (ran, seller.orders(), seller.state()) == (["A-1"] * 2, 1, State.COMPLETED)
