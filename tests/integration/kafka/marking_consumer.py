"""Consumers that write rows under a mark, and are killed.

python -m tests.integration.kafka.marking_consumer URL POINT dies at this point of its first commit;
python -m tests.integration.kafka.marking_consumer URL KAFKA TOPIC consumes until it is killed, and commits no offset.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter

from confluent_kafka import Message
from sqlalchemy import create_engine, event, select, true
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.types import String

from idem_tasks import Idempotency
from idem_tasks.integrations.confluent_kafka import IdempotentConsumer
from idem_tasks.integrations.kafka_watermark import WatermarkHandler


class Table(DeclarativeBase):
    pass


class Row(Table):
    __tablename__ = "effects"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))
    pid: Mapped[int] = mapped_column(default=os.getpid)


def read_rows(sessions: sessionmaker[Session], *, pid: int | None = None) -> Counter[str]:
    """How often each name is there; of all processes, or of one."""
    with sessions() as session:
        return Counter(session.scalars(select(Row.name).where(Row.pid == pid if pid else true())))


def marking(message: Message, session: Session) -> None:
    session.add(Row(name=(message.value() or b"").decode()))


def slowly(message: Message, session: Session) -> None:
    time.sleep(0.1)
    marking(message, session)


def consume(url: str, bootstrap: str, topic: str) -> None:
    config = {
        "bootstrap.servers": bootstrap,
        "group.id": f"group_{topic}",
        "auto.offset.reset": "earliest",
        "session.timeout.ms": 4000,
        "heartbeat.interval.ms": 200,
    }
    idem = Idempotency.from_urls(database_url=url)
    sessions = sessionmaker(create_engine(url))
    options = {"commit_every": 600.0}
    IdempotentConsumer(config, slowly, idempotency=idem, session=sessions, watermark=True, **options).run([topic])  # type: ignore[arg-type]


def die_at(url: str, point: str) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def handler(message: tuple[str, int, int], session: Session) -> None:
        session.add(Row(name=f"{message[1]}:{message[2]}"))
        session.flush()
        event.listen(session, point, die)

    idem = Idempotency.from_urls(database_url=url)
    WatermarkHandler(
        handler,
        runtime="blocking",
        place=lambda message: message,
        group="billing",
        session=sessionmaker(create_engine(url)),
        idempotency=idem,
    ).function(("t", 0, 0))


if __name__ == "__main__":
    (die_at if len(sys.argv) == 3 else consume)(*sys.argv[1:])
