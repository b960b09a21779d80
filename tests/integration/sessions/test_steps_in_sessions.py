"""Steps of a handler that has a session: their outcomes are committed apart from it, so they keep away from it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from idem_tasks import (
    ConfigurationError,
    RedisStore,
    SQLStore,
    State,
    TieredStore,
    current_claim,
    idempotent_task,
)
from idem_tasks.testing import Driver
from idem_tasks.testing.driver import PATIENCE
from tests.integration.sessions.seller import SCOPE, Order, Seller
from tests.integration.sessions.test_sessions import on

on_servers = pytest.mark.parametrize("url", ["postgres_url", "mariadb_url"], indirect=True)


class BrokenError(Exception):
    """Fails a handler between its step and its end."""


Touch = Callable[[Any, Order], Any]
"""What a step does with the session and an order in it; it may return an awaitable."""

TOUCHES: dict[str, Touch] = {
    "claim.session": lambda _session, _order: current_claim().session,
    "add": lambda session, _order: session.add(Order(name="in a step")),
    "execute": lambda session, _order: session.execute(text("UPDATE orders SET name = 'in a step'")),
    "flush": lambda session, _order: session.flush(),
    "change": lambda _session, order: setattr(order, "name", "in a step"),
}


def handler(seller: Seller, step: Callable[[], Any], after: Callable[[], None] = lambda: None) -> Callable[..., Any]:
    """A handler that adds an order, flushed or not, and has one step of this name."""
    decorate = idempotent_task(key="{name}", scope=SCOPE, idempotency=seller.idem, session=seller.sessions)

    def of_step() -> Any:
        return step()

    async def of_async_step() -> Any:
        answer = step()
        return await answer if asyncio.iscoroutine(answer) else answer

    def blocking(name: str, session: Any) -> Any:
        session.add(Order(name=name))
        value = current_claim().step("one", of_step)
        after()
        return value

    async def asyncio_handler(name: str, session: Any) -> Any:
        session.add(Order(name=name))
        value = await current_claim().step("one", of_async_step)
        after()
        return value

    if not seller.is_asyncio:
        return decorate(blocking)
    decorated: Callable[..., Any] = decorate(asyncio_handler)
    return lambda name: seller.driver(decorated(name))


class BrokenOnce:
    """A shop whose step charges, and whose handler fails after it, the first time."""

    def __init__(self) -> None:
        self.effects: list[str] = []
        self._failures = [BrokenError()]

    def charge(self) -> str:
        self.effects.append("charged")
        return f"receipt {len(self.effects)}"

    def fail(self) -> None:
        if self._failures:
            raise self._failures.pop()


@on_servers
def test_a_step_is_kept_though_the_transaction_is_undone(seller: Seller) -> None:
    """Its outside effect has happened; the rows of the handler have not (F14, F15)."""
    shop = BrokenOnce()
    task = handler(seller, shop.charge, shop.fail)
    with pytest.raises(BrokenError):
        task("A-1")
    assert seller.orders() == 0
    assert task("A-1") == "receipt 1"
    assert (shop.effects, seller.orders()) == (["charged"], 1)


@on_servers
def test_a_step_is_kept_behind_a_marker(driver: Driver, url: str, redis_url: str) -> None:
    """With Redis in front it is the record's transaction all the same: a step is replayed, and keeps off."""
    store = TieredStore(RedisStore(redis_url, socket_timeout=PATIENCE), SQLStore(url, create_schema=True))
    shop = BrokenOnce()
    used: list[Session] = []
    with Seller(driver, url, store) as seller, on("after_begin", lambda session, *_: used.append(session)):
        task = handler(seller, shop.charge, shop.fail)
        with pytest.raises(BrokenError):
            task("A-1")
        assert [task("A-1"), task("A-1")] == ["receipt 1"] * 2
        assert (shop.effects, seller.orders()) == (["charged"], 1)
        with pytest.raises(ConfigurationError, match="must not use the session"):
            handler(seller, lambda: used[-1].add(Order(name="in a step")))("A-2")
        assert (seller.orders(), seller.state("A-2")) == (1, State.RELEASED)


@on_servers
@pytest.mark.parametrize(
    "touch, swallows", [("claim.session", False), *((touch, it) for touch in list(TOUCHES)[1:] for it in (False, True))]
)
def test_a_step_that_uses_the_session_is_refused(seller: Seller, touch: str, swallows: bool) -> None:
    """What it writes there would be missing when it is replayed: nothing is committed, nor recorded of the step."""
    decorate = idempotent_task(key="{name}", scope=SCOPE, idempotency=seller.idem, session=seller.sessions)

    def blocking(name: str, session: Any) -> None:
        row = Order(name=name)
        session.add(row)
        if touch == "change":
            session.flush()
        try:
            current_claim().step("one", lambda: TOUCHES[touch](session, row))
        except ConfigurationError:
            if not swallows:
                raise

    async def asyncio_handler(name: str, session: Any) -> None:
        row = Order(name=name)
        session.add(row)
        if touch == "change":
            await session.flush()

        async def step() -> None:
            answer = TOUCHES[touch](session, row)
            if asyncio.iscoroutine(answer):
                await answer

        try:
            await current_claim().step("one", step)
        except ConfigurationError:
            if not swallows:
                raise

    chosen: Callable[..., Any] = asyncio_handler if seller.is_asyncio else blocking
    task: Callable[..., Any] = decorate(chosen)
    with pytest.raises(ConfigurationError, match="must not use the session"):
        seller.driver(task("A-1")) if seller.is_asyncio else task("A-1")
    assert seller.orders() == 0
    assert seller.state() is State.RELEASED


@pytest.mark.parametrize("url", ["sqlite_url"], indirect=True)
def test_on_sqlite_a_handler_has_steps_or_a_session(seller: Seller) -> None:
    """Its transaction holds the only lock for writing, so the journal could not be written: said before the step."""
    effects: list[int] = []
    with pytest.raises(ConfigurationError, match="on SQLite"):
        handler(seller, lambda: effects.append(1))("A-1")
    assert (effects, seller.orders()) == ([], 0)


@pytest.mark.parametrize("url", ["postgres_url"], indirect=True)
def test_a_handler_that_runs_again_in_the_same_call_begins_its_steps_again(seller: Seller) -> None:
    """A serialization failure undoes the rows and runs the handler again; its steps are replayed from the first."""
    effects: list[int] = []
    conflicts = ["40001"]

    def once() -> None:
        if conflicts:
            raise conflict(conflicts.pop())

    def conflict(code: str) -> Exception:
        from sqlalchemy.exc import OperationalError

        class Failure(Exception):  # noqa: N818 - a driver's
            sqlstate = code

        return OperationalError("UPDATE", {}, Failure())

    def effect() -> int:
        effects.append(1)
        return len(effects)

    assert handler(seller, effect, once)("A-1") == 1
    assert (effects, seller.orders()) == ([1], 1)
