"""Nobody can be asked, for a while or for too long, whether a commit took effect whose reply was lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import make_url
from sqlalchemy.orm import Session

from idem_tasks import SQLStore
from idem_tasks.claims import State
from idem_tasks.errors import InDoubtError, InProgressError, StoreUnavailableError
from idem_tasks.events import EventName
from idem_tasks.policy import OnCrash
from idem_tasks.testing import Driver
from tests.integration.sessions.seller import Seller, order
from tests.integration.sessions.test_sessions import SERVERS, on
from tests.integration.sql_proxy import Proxy

LEASE = 1.0
"""Seconds: some tries fit in, with their pauses."""

SILENCE = 2
"""Seconds that a server may take to answer; psycopg allows no fewer."""

pytestmark = pytest.mark.parametrize("url", SERVERS, indirect=True)


@pytest.fixture
def proxy(url: str) -> Iterator[Proxy]:
    place = make_url(url).update_query_dict({"connect_timeout": str(SILENCE)})
    if not url.startswith("postgres"):  # PyMySQL waits for a greeting as for any other answer
        place = place.update_query_dict({"read_timeout": str(SILENCE)})
    with Proxy(place.render_as_string(hide_password=False)) as proxy:
        yield proxy


@pytest.fixture
def seller(driver: Driver, url: str, proxy: Proxy) -> Iterator[Seller]:
    """One whose sessions and whose records go through the proxy; what the test looks at by itself does not."""
    with Seller(driver, url, SQLStore(proxy.url, create_schema=True)) as seller:
        seller.sessions = seller.sessionmaker(seller.new_engine(proxy.url))
        yield seller


def leaving(proxy: Proxy, *, committed: bool, **how: Any) -> Callable[..., None]:
    """Let the server go as the commit's reply comes, or before the commit reaches it."""

    def leave(*_: object) -> None:
        if committed:
            proxy.go_away_with_next_reply(**how)
        else:
            proxy.go_away(**how)

    return leave


@pytest.mark.parametrize("committed", [True, False])
def test_a_commit_is_looked_for_until_the_server_is_back(seller: Seller, proxy: Proxy, committed: bool) -> None:
    """Back while the lease lives, it says what there is: the value is returned, or the message put back (F14, F21)."""
    task = seller.task(order)
    with on("before_commit", leaving(proxy, committed=committed, turns=3)):
        if committed:
            assert task("A-1") == "ordered A-1"
        else:
            with pytest.raises(StoreUnavailableError, match="cannot be reached"):
                task("A-1")
    assert proxy.turned_away == 3
    assert (seller.orders(), seller.state()) == ((1, State.COMPLETED) if committed else (0, State.RELEASED))
    assert seller.names() == [EventName.GRANTED, EventName.COMPLETED if committed else EventName.RELEASED]
    assert task("A-1") == "ordered A-1"
    assert (seller.orders(), seller.state()) == (1, State.COMPLETED)


@pytest.mark.parametrize(
    "committed, on_crash, silently",
    [(True, "rerun", False), (False, "rerun", False), (False, "hold", False), (True, "rerun", True)],
)
def test_a_commit_that_stays_unknown_is_left_to_the_next_delivery(
    seller: Seller, proxy: Proxy, committed: bool, on_crash: OnCrash, silently: bool
) -> None:
    """The message comes again and nothing is released: it gets the outcome, or takes the dead claim over (F14, F57)."""
    ran: list[str] = []

    def body(name: str, session: Session) -> str:
        ran.append(name)
        return order(name, session)

    task = seller.task(body, lease=LEASE, on_crash=on_crash)
    with on("before_commit", leaving(proxy, committed=committed, silently=silently)):
        begun = time.monotonic()
        with pytest.raises(StoreUnavailableError, match="it is not known whether"):
            task("A-1")
        took = time.monotonic() - begun
    assert LEASE / 4 < took < LEASE + SILENCE + 1
    assert proxy.turned_away >= (1 if silently else 3)
    assert (seller.orders(), seller.state()) == ((1, State.COMPLETED) if committed else (0, State.RUNNING))
    assert seller.names() == [EventName.GRANTED]

    proxy.come_back()
    if not committed and on_crash == "hold":
        with pytest.raises(InDoubtError):
            redelivered(task)
        assert (seller.orders(), ran) == (0, ["A-1"])
        return
    assert redelivered(task) == "ordered A-1"
    assert ran == ["A-1"] * (1 if committed else 2)
    assert (seller.orders(), seller.state()) == (1, State.COMPLETED)


def redelivered(task: Callable[[str], Any]) -> Any:
    """Deliver the message again until nobody holds its claim any more."""

    async def deliver() -> Any:
        try:
            return task("A-1")
        except InProgressError:
            return None

    with Driver("blocking") as driver:
        return driver.poll(deliver, lambda outcome: outcome is not None, every=0.1)
