"""A worker that dies at one point of its commit: python -m tests.integration.sessions.dying_worker URL POINT."""

from __future__ import annotations

import os
import signal
import sys

from sqlalchemy import create_engine, event
from sqlalchemy.orm import Session, sessionmaker

from idem_tasks import Idempotency, SQLStore, idempotent_task
from tests.integration.sessions.seller import SCOPE, SHORT, Order, order

POINTS = {
    "before the finish": "after_flush",
    "between finish and commit": "before_commit",
    "after the commit": "after_commit",
}


def main(url: str, point: str) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    idem = Idempotency(store=SQLStore(url))
    sessions = sessionmaker(create_engine(url))

    @idempotent_task(key="{name}", scope=SCOPE, idempotency=idem, session=sessions, lease=SHORT)
    def handle(name: str, *, session: Session) -> str:
        session.add(Order(name="before"))
        session.flush()
        event.listen(session, POINTS[point], die)
        return order(name, session)

    handle("A-1")  # type: ignore[call-arg] # it is given by the decorator


if __name__ == "__main__":
    main(*sys.argv[1:])
