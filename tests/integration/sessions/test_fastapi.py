"""A session that FastAPI's `Depends` made, handed to a handler as its argument."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from idem_tasks import idempotent_task
from idem_tasks.claims import State
from tests.integration.sessions.seller import SCOPE, Order, Seller

pytestmark = [
    pytest.mark.parametrize("url", ["sqlite_url", "postgres_url"], indirect=True),
    pytest.mark.parametrize("endpoint", ["from the endpoint", "to the endpoint itself"]),
]


class Shop:
    """An app whose orders are handlers with the session of `get_session`, and a client of it."""

    def __init__(self, seller: Seller, *, endpoint: str) -> None:
        self.seller = seller
        self.app = FastAPI()
        self.made: list[Order] = []
        self.still_there: list[int] = []
        """How many of those were in the dependency's session as it closed that; once for each request."""
        view = asyncio_view if seller.is_asyncio else blocking_view
        self.app.post("/orders/{name}")(view(self, is_endpoint=endpoint == "to the endpoint itself"))

    def post(self, name: str) -> tuple[int, Any]:
        """Send an order; returns the status, and what the body says."""
        request = self._post(name)
        return self.seller.driver(request) if self.seller.is_asyncio else asyncio.run(request)

    async def _post(self, name: str) -> tuple[int, Any]:
        # Plain ASGI: Starlette's own client would need one more package.
        sent: list[Any] = []
        path = f"/orders/{name}"
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [],
        }

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        body = b"".join(message.get("body", b"") for message in sent)
        return sent[0]["status"], json.loads(body)


def blocking_view(shop: Shop, *, is_endpoint: bool) -> Any:
    """FastAPI calls it in a thread, and the dependency perhaps in another."""
    seller = shop.seller

    def get_session() -> Iterator[Session]:
        with seller.sessions() as session:
            yield session
            shop.still_there.append(sum(each in session for each in shop.made))

    def order(name: str, session: Annotated[Session, Depends(get_session)]) -> str:
        shop.made.append(Order(name=name))
        session.add_all(shop.made)
        session.flush()
        if name == "A-2":
            raise LookupError(name)
        return f"ordered {name}"

    handler: Any = idempotent_task(key="{name}", scope=SCOPE, idempotency=seller.idem, session=seller.sessions)(order)
    if is_endpoint:
        return handler

    def view(name: str, session: Annotated[Session, Depends(get_session)]) -> str:
        done: str = handler(name, session=session)
        return done

    return view


def asyncio_view(shop: Shop, *, is_endpoint: bool) -> Any:
    """The same, in the event loop."""
    seller = shop.seller

    async def get_session() -> AsyncIterator[AsyncSession]:
        async with seller.sessions() as session:
            yield session
            shop.still_there.append(sum(each in session for each in shop.made))

    async def order(name: str, session: Annotated[AsyncSession, Depends(get_session)]) -> str:
        shop.made.append(Order(name=name))
        session.add_all(shop.made)
        await session.flush()
        if name == "A-2":
            raise LookupError(name)
        return f"ordered {name}"

    handler: Any = idempotent_task(key="{name}", scope=SCOPE, idempotency=seller.idem, session=seller.sessions)(order)
    if is_endpoint:
        return handler

    async def view(name: str, session: Annotated[AsyncSession, Depends(get_session)]) -> str:
        done: str = await handler(name, session=session)
        return done

    return view


def test_a_session_of_depends_is_committed_with_the_outcome(seller: Seller, endpoint: str) -> None:
    """Rows and outcome are one transaction of the dependency's session, which is left to it; a duplicate adds none."""
    shop = Shop(seller, endpoint=endpoint)
    assert [shop.post("A-1") for _ in range(2)] == [(200, "ordered A-1")] * 2
    assert (seller.orders(), seller.state()) == (1, State.COMPLETED)
    assert shop.still_there == [1, 0]


def test_a_session_of_depends_is_rolled_back_with_the_claim(seller: Seller, endpoint: str) -> None:
    """What the handler raises comes through to FastAPI, and nothing is written."""
    shop = Shop(seller, endpoint=endpoint)
    with pytest.raises(LookupError):
        shop.post("A-2")
    assert (seller.orders(), seller.state("A-2")) == (0, State.RELEASED)
