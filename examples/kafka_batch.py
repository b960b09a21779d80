"""A consumer of Kafka that takes many messages at once: each has an outcome of its own, and fails alone."""

import time

from confluent_kafka import Consumer, Message, Producer, TopicPartition

from idem_tasks import Idempotency, MemoryStore
from idem_tasks.integrations.confluent_kafka import IdempotentConsumer

cluster = Producer({"bootstrap.servers": "none:1", "test.mock.num.brokers": 1, "log_level": 0})  # one for tests
(broker,) = cluster.list_topics(timeout=10).brokers.values()
KAFKA = {"bootstrap.servers": f"{broker.host}:{broker.port}"}

producer = Producer(KAFKA)
orders = [f"A-{number}" for number in range(1, 51)]
for order in (*orders, *orders, "bad", "last"):  # each order comes twice
    producer.produce("orders", order, partition=0, headers={"Idempotency-Key": order.encode()})
producer.flush(10)

idem = Idempotency(store=MemoryStore())  # yours: Idempotency.from_urls(database_url="postgresql://…")
shipped: list[str] = []
sizes: list[int] = []


def ship(messages: list[Message]) -> list[str | Exception]:
    """Gets the messages that are new, and returns an outcome for each, or the exception of one that failed."""
    sizes.append(len(messages))
    outcomes: list[str | Exception] = []
    for message in messages:
        order = (message.value() or b"").decode()
        if order == "bad":
            outcomes.append(ValueError("there is no such order"))
        else:
            shipped.append(order)
            outcomes.append(f"parcel for {order}")
    return outcomes


until = time.monotonic() + 30
config = {**KAFKA, "group.id": "shipping", "auto.offset.reset": "earliest"}
final = {"record_failures": (ValueError,), "dead_letter_topic": "orders.dead", "producer": producer}
with IdempotentConsumer(config, ship, idempotency=idem, batch=True, batch_size=40, **final) as consumer:
    consumer.run(["orders"], should_stop=lambda: "last" in shipped or time.monotonic() > until)

reader = Consumer(config)
(committed,) = reader.committed([TopicPartition("orders", 0)], timeout=10)
reader.close()

assert shipped == [*orders, "last"]  # each once, in their order
assert max(sizes) > 1
assert committed.offset == 2 * len(orders) + 2  # all behind it, the dead letter too, is finished
print(f"{len(shipped)} orders shipped in batches of {sizes}, committed up to {committed.offset}")
