"""One `configure` for a web application's coroutines and its workers' plain functions: they share their records."""

import asyncio

from idem_tasks import configure, idempotent_task

idempotency = configure(database_url="sqlite:///shared.db")
effects: list[str] = []


@idempotent_task(key="{order_id}", scope="orders/confirm")
def confirm_in_worker(order_id: str) -> str:
    effects.append("worker")
    return f"confirmed {order_id}"


@idempotent_task(key="{order_id}", scope="orders/confirm")
async def confirm_in_web(order_id: str) -> str:
    effects.append("web")
    return f"confirmed {order_id}"


async def web() -> str:
    outcome = await confirm_in_web("A-1")
    await idempotency.aclose()
    return outcome


assert asyncio.run(web()) == "confirmed A-1"
assert confirm_in_worker("A-1") == "confirmed A-1"  # the outcome of the web's run
assert asyncio.run(web()) == "confirmed A-1"  # in another event loop too
assert effects == ["web"]
print("one effect, in the web application; the worker got its outcome")

idempotency.forget("orders/confirm", "A-1")
idempotency.close()
