"""A handler that writes a row: with `session=` the row and the outcome are one transaction."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import closing, contextmanager

from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session, sessionmaker

from benchmarks.by_hand.markers import RedisMarkers
from benchmarks.by_hand.protocol import fingerprint_of, finished_marker, running_marker
from benchmarks.by_hand.records import PostgresRecords
from benchmarks.case import case
from benchmarks.measuring import Here
from benchmarks.orders import AMOUNT, new_orders, ours
from benchmarks.place import Place
from idem_tasks import idempotent_task

GROUP = "Rows and outcome in one transaction"
ALONE = "the handler's transaction alone"

SALE = text("INSERT INTO sales (order_id, amount) VALUES (:order_id, :amount)")
FINISH = text(
    "UPDATE by_hand SET outcome = :outcome WHERE key = :key AND token = :token AND owner = :owner AND outcome IS NULL"
)


def sell(order_id: str, amount: int, session: Session) -> dict[str, str]:
    """Write a row."""
    session.execute(SALE, {"order_id": order_id, "amount": amount})
    return {"sold": order_id}


@case(GROUP, "first call, `session=`, Redis and PostgreSQL", needs=("redis", "postgres"))
@contextmanager
def session(place: Place) -> Iterator[dict[str, Here]]:
    """The finish rides in the handler's own commit."""
    engine = create_engine(place.postgres)
    sessions = sessionmaker(engine)
    with (
        ours(place.postgres, place.redis) as idempotency,
        closing(RedisMarkers(place.redis)) as markers,
        closing(PostgresRecords(place.postgres)) as records,
    ):
        records.create()
        records.connection.execute("CREATE TABLE sales (order_id text PRIMARY KEY, amount integer)")
        order = new_orders()
        call = idempotent_task(key="{order_id}", session=sessions, idempotency=idempotency)(sell)

        def alone() -> None:
            with sessions.begin() as session:
                sell(order(), AMOUNT, session)

        def by_hand() -> None:
            key, owner = order(), secrets.token_hex(16)
            fingerprint, mark = fingerprint_of(key, AMOUNT), running_marker(owner)
            assert markers.take(key, mark) is None
            token, holder, _ = records.claim(key, owner, fingerprint)
            assert holder == owner
            with sessions.begin() as session:
                finished = finished_marker(fingerprint, sell(key, AMOUNT, session))
                fence = {"outcome": finished, "key": key, "token": token, "owner": owner}
                session.execute(FINISH, fence)
            markers.publish(key, mark, finished)

        yield {
            # The session is the library's to give, which the decorated function's type does not show.
            "ours": Here(lambda: call(order(), AMOUNT)),  # type: ignore[call-arg]
            "by hand": Here(by_hand),
            ALONE: Here(alone),
        }
    engine.dispose()
