"""A consumer whose handlers hang: python -m tests.integration.kafka.hanging_consumer KAFKA TOPIC URL BEGAN MAY_END."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from confluent_kafka import Message

from idem_tasks import Idempotency
from idem_tasks.integrations.confluent_kafka import IdempotentConsumer
from tests.services.waiting import wait_until


def main(bootstrap: str, topic: str, url: str, began: str, may_end: str) -> None:
    def handler(_message: Message) -> str:
        Path(began).touch()
        wait_until(Path(may_end).exists, seconds=60, what="the end of the handler")
        return "of a zombie"

    config = {
        "bootstrap.servers": bootstrap,
        "group.id": f"group_{topic}",
        "auto.offset.reset": "earliest",
        "session.timeout.ms": 4000,
        "heartbeat.interval.ms": 200,
    }
    with Idempotency.from_urls(database_url=url, lease=1.0) as idem:
        consumer = IdempotentConsumer(config, handler, idempotency=idem)
        signal.signal(signal.SIGTERM, lambda *_: consumer.stop())
        consumer.run([topic])


if __name__ == "__main__":
    main(*sys.argv[1:])
