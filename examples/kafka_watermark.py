"""Rows out of Kafka, with one mark for each partition: written exactly once, and no record of each message."""

import time

from confluent_kafka import Message, Producer
from sqlalchemy import create_engine, func, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from idem_tasks import Idempotency
from idem_tasks.integrations.confluent_kafka import IdempotentConsumer

cluster = Producer({"bootstrap.servers": "none:1", "test.mock.num.brokers": 1, "log_level": 0})  # one for tests
(broker,) = cluster.list_topics(timeout=10).brokers.values()
KAFKA = {"bootstrap.servers": f"{broker.host}:{broker.port}"}
URL = "sqlite:///totals.db"
Sessions = sessionmaker(create_engine(URL))
seen: list[str] = []
idem = Idempotency.from_urls(database_url=URL, observers=[lambda event: seen.append(event.name)])  # the same database


class Base(DeclarativeBase):
    pass


class Sale(Base):
    __tablename__ = "sales"
    number: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int]


Base.metadata.create_all(Sessions.kw["bind"])
producer = Producer(KAFKA)
for amount in (10, 20, 30):
    producer.produce("sales", str(amount), partition=0)
producer.flush(10)


def book(message: Message, session: Session) -> None:
    session.add(Sale(amount=int(message.value() or b"0")))


def booked() -> tuple[int, int]:
    with Sessions() as session:
        total, number = session.execute(select(func.sum(Sale.amount), func.count())).one()
        return total or 0, number


until = time.monotonic() + 40
for run in (1, 2):  # each under another name, so that Kafka delivers all from the beginning
    config = {**KAFKA, "group.id": f"booking, run {run}", "auto.offset.reset": "earliest"}
    consumer = IdempotentConsumer(config, book, group="booking", idempotency=idem, session=Sessions, watermark=True)
    consumer.run(["sales"], should_stop=lambda all_of=3 * run: len(seen) == all_of or time.monotonic() > until)
    assert booked() == (60, 3)
assert seen == ["completed"] * 3 + ["replayed"] * 3

with Sessions() as session:
    mark = session.execute(text("SELECT topic, consumer_group, next_offset FROM idem_tasks_watermarks")).one()
print(f"booked {booked()}, mark {tuple(mark)}")
