"""A handler with a session that forks: the transaction stays its parent's."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from idem_tasks import idempotent_batch, idempotent_task
from idem_tasks.claims import State
from idem_tasks.events import EventName
from idem_tasks.testing import Driver
from tests.integration.sessions.seller import SCOPE, Order, Seller, order

CHILD_MAY_TAKE = 30
"""Seconds; a child that reads its parent's replies might wait for ever."""

LEFT = 7
"""What a child exits with that has come out of the call."""


class ChildError(Exception):
    """A child's own."""


def exit_code_of(child: int) -> int:
    """Wait for its end."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


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
        children.append(exit_code_of(pid))
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


@pytest.mark.parametrize("names", [["A-1"], ["A-1", "A-2"]], ids=["one", "many"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_that_is_forked_beside_a_handler_leaves_its_transaction_alone(url: str, names: list[str]) -> None:
    """On asyncio another task may fork: a child that drops the handler's coroutine closes nothing of it (F27, F14)."""
    begun, goes_on = asyncio.Event(), asyncio.Event()

    async def handle(new: list[str], session: Any) -> list[str]:
        session.add_all(Order(name=name) for name in new)
        await session.flush()
        begun.set()
        await goes_on.wait()
        assert await session.scalar(text("SELECT count(*) FROM orders")) == len(new)  # in the same transaction
        return [f"ordered {name}" for name in new]

    async def handle_one(name: str, session: Any) -> list[str]:
        return await handle([name], session)

    with Driver("asyncio") as driver, Seller(driver, url) as seller:
        how: Any = {"scope": SCOPE, "idempotency": seller.idem, "session": seller.sessions}
        one: Any = idempotent_task(key="{name}", **how)(handle_one)
        many: Any = idempotent_batch(key="{message}", **how)(handle)

        async def main() -> Any:
            running = [asyncio.ensure_future(one(*names) if len(names) == 1 else many(names))]
            await begun.wait()
            pid = os.fork()
            if pid == 0:
                signal.alarm(CHILD_MAY_TAKE)
                running.pop().get_coro().close()
                gc.collect()  # the session too is dropped now, at the latest
                os._exit(LEFT)
            assert (exit_code_of(pid), seller.orders()) == (LEFT, 0)
            goes_on.set()
            return await running[0]

        assert driver(main()) == [f"ordered {name}" for name in names]
        assert (seller.orders(), [seller.state(name) for name in names]) == (len(names), [State.COMPLETED] * len(names))
