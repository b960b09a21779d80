"""FastStream: a middleware makes the handlers idempotent, and a duplicate's answer is published again."""

import asyncio
import os

from faststream.rabbit import RabbitBroker, RabbitQueue

from idem_tasks import Idempotency, MemoryStore
from idem_tasks.integrations.faststream import IdempotencyMiddleware

broker = RabbitBroker(
    os.environ.get("RABBITMQ_URL", "amqp://guest:guest@127.0.0.1//"),
    middlewares=[IdempotencyMiddleware(idempotency=Idempotency(store=MemoryStore()), dead_letter="reject")],
    logger=None,
)
orders = RabbitQueue("t_example_faststream", auto_delete=True)
receipts = RabbitQueue("t_example_faststream_receipts", auto_delete=True)
charged: list[str] = []
answered: asyncio.Queue[str] = asyncio.Queue()


@broker.subscriber(orders)
@broker.publisher(receipts)
async def charge(order: str) -> str:
    charged.append(order)
    return f"receipt {len(charged)} for {order}"


@broker.subscriber(receipts)
async def receipt(text: str) -> None:
    await answered.put(text)


async def main() -> None:
    async with broker:
        await broker.start()
        for _ in range(2):  # the publisher is not sure whether its first message arrived
            await broker.publish("A-1", orders, headers={"Idempotency-Key": "A-1"})
        answers = [await asyncio.wait_for(answered.get(), timeout=20) for _ in range(2)]
    assert charged == ["A-1"]
    assert answers == ["receipt 1 for A-1"] * 2
    print("charged", charged, "answered", answers)


asyncio.run(main())
