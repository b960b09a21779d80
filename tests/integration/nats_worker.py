"""A consumer in a process of its own, for tests that kill it: each effect is a line of a file."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import nats
from nats.aio.msg import Msg

from idem_tasks import Idempotency
from idem_tasks.integrations.nats import idempotent_callback


async def main(url: str, database_url: str, stream: str, ledger: str, seconds: float) -> None:
    """Write `begin` and `end` of each message, `seconds` apart."""
    idem = Idempotency.from_urls(database_url=database_url)
    client = await nats.connect(url)
    lines = Path(ledger)

    js = client.jetstream()

    @idempotent_callback(js, idempotency=idem, lease=1.5)
    async def charge(message: Msg) -> None:
        write(lines, "begin", message)
        await asyncio.sleep(seconds)
        write(lines, "end", message)

    await js.subscribe(f"{stream}.orders", durable="shop", cb=charge, manual_ack=True)
    await asyncio.Event().wait()


def write(ledger: Path, what: str, message: Msg) -> None:
    with ledger.open("a") as file:
        file.write(f"{what} {message.data.decode()}\n")


if __name__ == "__main__":
    url, database_url, stream, ledger, seconds = sys.argv[1:]
    asyncio.run(main(url, database_url, stream, ledger, float(seconds)))
