"""The handler of all benchmarks, which does nothing but return some 100 bytes, and orders that were never seen."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from idem_tasks import Idempotency, MemoryStore, idempotent_task

AMOUNT = 4900
NOTE = "x" * 50

Handler = Callable[[str, int], dict[str, Any]]


def charge(order_id: str, amount: int) -> dict[str, Any]:
    """Do nothing for an order."""
    return {"receipt": f"R-{order_id}", "amount": amount, "note": NOTE}


async def charge_async(order_id: str, amount: int) -> dict[str, Any]:
    """Do nothing for an order."""
    return charge(order_id, amount)


def new_orders() -> Callable[[], str]:
    """Return a function that gives another number at each call, which no other such function gives."""
    beginning, numbers = secrets.token_hex(4), itertools.count()
    return lambda: f"{beginning}-{next(numbers):08}"


@contextmanager
def ours(database_url: str = "", redis_url: str = "", *, local_cache: int = 0) -> Iterator[Idempotency]:
    """Give the library with its defaults, its tables made; in memory where no URL is given."""
    if database_url or redis_url:
        made = Idempotency.from_urls(
            database_url=database_url or None,
            redis_url=redis_url or None,
            create_schema=True if database_url else None,
            local_cache=local_cache,
        )
    else:
        made = Idempotency(store=MemoryStore())
    with made as idempotency:
        idempotency.prepare()
        yield idempotency


def decorated(idempotency: Idempotency) -> Handler:
    """Return the handler as its user decorates it."""
    return idempotent_task(key="{order_id}", idempotency=idempotency)(charge)
