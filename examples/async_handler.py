"""A coroutine function: ten deliveries at once, one run, one outcome for all."""

import asyncio

from idem_tasks import Idempotency, idempotent_task

# A duplicate that comes while the first still runs waits for its outcome.
idem = Idempotency.from_urls(database_url="sqlite:///mails.db", on_in_progress="wait")
idem.prepare()  # makes the table

sent: list[str] = []


@idempotent_task(key="{order_id}", idempotency=idem)
async def confirm(order_id: str) -> str:
    await asyncio.sleep(0.1)
    sent.append(order_id)
    return f"mail for {order_id}"


async def main() -> None:
    outcomes = await asyncio.gather(*(confirm("A-1") for _ in range(10)))
    assert outcomes == ["mail for A-1"] * 10
    assert sent == ["A-1"]
    print("ten deliveries, one mail")

    await idem.aforget("async_handler.confirm", "A-1")
    await idem.aclose()


asyncio.run(main())
