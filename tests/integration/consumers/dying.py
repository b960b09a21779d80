"""A consumer killed within its handler, once: python -m tests.integration.consumers.dying CLIENT URL QUEUE DATABASE."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from idem_tasks import Idempotency, current_claim
from tests.consumers.ledger import Effect
from tests.integration.consumers.rigs import RIGS


def sessions_for(client: str, database_url: str) -> Any:
    if client == "aio_pika":
        return async_sessionmaker(create_async_engine(database_url))
    return sessionmaker(create_engine(database_url))


def write(body: str, session: Any) -> None:
    session.add(Effect(key=body, pid=os.getpid()))
    if current_claim().attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def main(client: str, url: str, queue: str, database_url: str) -> None:
    idem = Idempotency.from_urls(database_url=database_url)
    RIGS[client](url, queue, idem, write, session=sessions_for(client, database_url)).consume()


if __name__ == "__main__":
    main(*sys.argv[1:])
