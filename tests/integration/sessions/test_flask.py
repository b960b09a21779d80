"""Flask-SQLAlchemy's own `db.session` as the session of a handler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Engine

from idem_tasks import idempotent_task
from idem_tasks.claims import State
from idem_tasks.testing import Driver
from tests.integration.sessions.seller import SCOPE, Base, Order, Seller

pytestmark = pytest.mark.parametrize("url", ["sqlite_url", "postgres_url"], indirect=True)


@pytest.fixture
def driver() -> Iterator[Driver]:
    with Driver("blocking") as driver:
        yield driver


@pytest.fixture
def db() -> SQLAlchemy:
    """What a module of the user's has before there is an app."""
    return SQLAlchemy(model_class=Base)


@pytest.fixture
def app(seller: Seller, db: SQLAlchemy) -> Iterator[Flask]:
    app = Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = seller.url
    db.init_app(app)
    yield app
    with app.app_context():
        db.engine.dispose()


@pytest.fixture(params=["db.session", "lambda: db.session"])
def order(request: pytest.FixtureRequest, seller: Seller, db: SQLAlchemy) -> Callable[[str], str]:
    """A handler of the user's, decorated before there is an app."""
    source: Any = db.session if request.param == "db.session" else lambda: db.session

    @idempotent_task(key="{name}", scope=SCOPE, idempotency=seller.idem, session=source)
    def handler(name: str) -> str:
        db.session.add(Order(name=name))
        db.session.flush()
        if name == "A-2":
            raise LookupError(name)
        return f"ordered {name}"

    return handler


def pool_of(db: SQLAlchemy) -> Any:
    engine: Engine = db.engine
    return engine.pool


def test_db_session_is_committed_with_the_outcome(
    seller: Seller, app: Flask, db: SQLAlchemy, order: Callable[[str], str]
) -> None:
    """Each app context has a session of its own; rows and outcome are one transaction of it, and it is left open."""
    for _ in range(2):
        with app.app_context():
            assert order("A-1") == "ordered A-1"
            assert [each.name for each in db.session.query(Order)] == ["A-1"]  # and can be used
    assert (seller.orders(), seller.state()) == (1, State.COMPLETED)


def test_db_session_is_rolled_back_with_the_claim(
    seller: Seller, app: Flask, db: SQLAlchemy, order: Callable[[str], str]
) -> None:
    """A handler that raises leaves nothing, and a session that the rest of the request can commit."""
    with app.app_context():
        with pytest.raises(LookupError):
            order("A-2")
        db.session.add(Order(name="of the request"))
        db.session.commit()
        assert pool_of(db).checkedout() == 0
    assert (seller.orders("A-2"), seller.orders("of the request"), seller.state("A-2")) == (0, 1, State.RELEASED)


def test_a_view_and_its_handler_share_the_session(
    seller: Seller, app: Flask, db: SQLAlchemy, order: Callable[[str], str]
) -> None:
    """Within a request too; afterwards Flask-SQLAlchemy has closed it, and its connection is back in the pool."""

    @app.post("/orders/<name>")
    def view(name: str) -> str:
        return order(name)

    client = app.test_client()
    assert [client.post("/orders/A-1").text for _ in range(2)] == ["ordered A-1"] * 2
    with app.app_context():
        assert pool_of(db).checkedout() == 0
    assert (seller.orders(), seller.state()) == (1, State.COMPLETED)
