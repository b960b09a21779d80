"""A consumer of Kafka: each order is shipped once, whatever comes twice, and what is poisoned becomes a dead letter."""

import time

from confluent_kafka import Consumer, Message, Producer

from idem_tasks import Idempotency, MemoryStore
from idem_tasks.integrations.confluent_kafka import IdempotentConsumer

cluster = Producer({"bootstrap.servers": "none:1", "test.mock.num.brokers": 1, "log_level": 0})  # one for tests
(broker,) = cluster.list_topics(timeout=10).brokers.values()
KAFKA = {"bootstrap.servers": f"{broker.host}:{broker.port}"}

producer = Producer(KAFKA)
for order in ("A-1", "A-2", "A-1", "bad", "A-3"):
    producer.produce("orders", order, partition=0, headers={"Idempotency-Key": order.encode()})
producer.flush(10)

idem = Idempotency(store=MemoryStore())  # yours: Idempotency.from_urls(database_url="postgresql://…")
shipped: list[str] = []


def ship(message: Message) -> str:
    order = (message.value() or b"").decode()
    if order == "bad":
        raise ValueError("there is no such order")
    shipped.append(order)
    return f"parcel for {order}"


until = time.monotonic() + 30
consumer = IdempotentConsumer(
    {**KAFKA, "group.id": "shipping", "auto.offset.reset": "earliest"},
    ship,
    idempotency=idem,
    record_failures=(ValueError,),  # final: to the dead letters
    dead_letter_topic="orders.dead",
    producer=producer,
)
with consumer:
    consumer.run(["orders"], should_stop=lambda: "A-3" in shipped or time.monotonic() > until)

reader = Consumer({**KAFKA, "group.id": "people", "auto.offset.reset": "earliest"})
reader.subscribe(["orders.dead"])
dead = reader.poll(30)
reader.close()

assert shipped == ["A-1", "A-2", "A-3"]
assert dead is not None
reasons = dict(dead.headers() or ())
assert (dead.value(), reasons["idem_tasks_reason"]) == (b"bad", b"failed")
print(f"shipped {shipped}, dead letter {dead.value()!r} from {reasons['idem_tasks_origin']!r}")
