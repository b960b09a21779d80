"""idemkit as asyncio, which it is made for, on Redis or PostgreSQL: `python with_idemkit.py URL`."""

import asyncio
import sys
from typing import Any

from idemkit import MethodConfig, PostgresBackend, RedisBackend, idempotent
from idemkit.backends.postgres import init_pg
from speaking import charge, new_orders, serve

url = sys.argv[1]
if url.startswith("redis"):
    backend = RedisBackend.from_url(url)
else:
    asyncio.run(init_pg(url))
    backend = PostgresBackend.from_url(url)


@idempotent(backend=backend, config=MethodConfig(key_fields=["order_id", "amount"]))
async def guarded(*, order_id: str, amount: int) -> dict[str, Any]:
    """Do nothing for an order."""
    return charge(order_id, amount)


order = new_orders()


async def first_call() -> None:
    """Call with a number that was never seen."""
    await guarded(order_id=order(), amount=4900)


async def duplicate() -> None:
    """Call with the same number every time."""
    await guarded(order_id="A-1", amount=4900)


serve({"first call": first_call, "duplicate": duplicate})
