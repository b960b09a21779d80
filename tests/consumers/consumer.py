"""One consumer's process, which works until it is killed."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from idem_tasks import Event, Idempotency
from tests.consumers import brokers
from tests.consumers.ledger import RefusedError
from tests.consumers.plan import Plan

LONGEST_DELAY = 2.0

DELIVERIES = "deliveries"
"""How the files end in which the processes note what happened to each delivery: one event's name a line."""


LOG = "log"


@dataclass(frozen=True)
class Options:
    """What every integration is given; a broker module adds its own words."""

    plan: Plan

    def blocking(self) -> dict[str, Any]:
        return self._with(sessionmaker(create_engine(self.plan.database_url, pool_size=self.plan.workers)))

    def asynchronous(self) -> dict[str, Any]:
        return self._with(async_sessionmaker(create_async_engine(self.plan.database_url, pool_size=self.plan.workers)))

    def _with(self, session: Any) -> dict[str, Any]:
        return {
            "idempotency": Idempotency.from_urls(
                database_url=self.plan.database_url, redis_url=self.plan.redis_url, observers=[_noted(self.plan)]
            ),
            "session": session,
            "lease": self.plan.lease,
            "max_crashes": None,  # whoever is killed here is innocent
            "record_failures": RefusedError,
            "longest_delay": LONGEST_DELAY,
        }


def _noted(plan: Plan) -> Any:
    # One write each, which the system keeps though the process is killed at once.
    file = os.open(Path(plan.folder) / f"{os.getpid()}.{DELIVERIES}", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def note(event: Event) -> None:
        os.write(file, f"{event.name.value}\n".encode())

    return note


def work(plan: Plan) -> None:
    """Consume with the plan's broker; what is logged goes to the run's folder."""
    log = os.open(Path(plan.folder) / LOG, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(process)d %(message)s")
    brokers.module(plan.broker).consume(plan, Options(plan))
