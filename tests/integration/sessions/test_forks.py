"""A handler with a session that forks: the transaction stays its parent's."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from idem_tasks.claims import State
from idem_tasks.events import EventName
from idem_tasks.testing import Driver
from tests.integration.sessions.seller import Seller, order

CHILD_MAY_TAKE = 30
"""Seconds; a child that reads its parent's replies might wait for ever."""

LEFT = 7
"""What a child exits with that has come out of the call."""


class ChildError(Exception):
    """A child's own."""


@pytest.fixture
def driver() -> Iterator[Driver]:
    with Driver("blocking") as driver:
        yield driver


@pytest.mark.parametrize("ends", ["returns", "raises", "exits"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_leaves_the_transaction_alone(seller: Seller, ends: str) -> None:
    """Whichever way it comes out of the call, it commits, rolls back and closes nothing: its parent does (F27, F14)."""
    parent = os.getpid()
    children: list[int] = []

    def body(name: str, session: Session) -> str:
        ordered = order(name, session)
        session.flush()
        pid = os.fork()
        if pid == 0:
            signal.alarm(CHILD_MAY_TAKE)
            if ends == "raises":
                raise ChildError
            if ends == "exits":
                raise SystemExit
            return "the child's"
        _, status = os.waitpid(pid, 0)
        children.append(os.waitstatus_to_exitcode(status))
        assert (seller.orders(), seller.state()) == (0, State.RUNNING)
        assert session.scalar(text("SELECT count(*) FROM orders")) == 1  # in the same transaction
        return ordered

    task = seller.task(body)
    try:
        value = task("A-1")
    except BaseException:
        if os.getpid() == parent:
            raise
        value = None
    if os.getpid() != parent:
        gc.collect()  # what it had of the call is dropped now, at the latest
        os._exit(LEFT)
    assert (value, children) == ("ordered A-1", [LEFT])
    assert (seller.orders(), seller.state()) == (1, State.COMPLETED)
    assert seller.names() == [EventName.GRANTED, EventName.COMPLETED]
