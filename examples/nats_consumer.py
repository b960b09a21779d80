"""NATS JetStream: every order comes twice, one can never be handled, and each charge is made once."""

import asyncio
import json
import os

import nats
from nats.aio.msg import Msg

from idem_tasks import Idempotency, MemoryStore
from idem_tasks.integrations.nats import idempotent_callback

STREAM = "t_example_nats"
idem = Idempotency(store=MemoryStore())
charged: list[str] = []


async def main() -> None:
    client = await nats.connect(os.environ.get("NATS_URL", "nats://127.0.0.1:4222"))
    js = client.jetstream()
    await js.add_stream(name=STREAM, subjects=[f"{STREAM}.*"])
    done = asyncio.Event()

    @idempotent_callback(
        js,
        key=lambda msg: json.loads(msg.data)["id"],
        dead_letter_subject=f"{STREAM}.dead",
        idempotency=idem,
        max_attempts=2,
    )
    async def charge(msg: Msg) -> str:
        order = json.loads(msg.data)
        if order["amount"] < 0:
            raise ValueError("nothing to charge")
        charged.append(order["id"])
        return f"charged {order['amount']}"

    async def dead_letter(msg: Msg) -> None:
        print("dead letter:", msg.data.decode(), (msg.headers or {})["idem_tasks_reason"])
        done.set()

    await js.subscribe(f"{STREAM}.orders", durable="shop", cb=charge, manual_ack=True)
    await client.subscribe(f"{STREAM}.dead", cb=dead_letter)
    for order in ({"id": "A-1", "amount": 5}, {"id": "A-1", "amount": 5}, {"id": "A-2", "amount": -1}):
        await js.publish(f"{STREAM}.orders", json.dumps(order).encode())

    await asyncio.wait_for(done.wait(), timeout=20)
    await js.delete_stream(STREAM)
    await client.close()


asyncio.run(main())
assert charged == ["A-1"]
print("charged", charged)
