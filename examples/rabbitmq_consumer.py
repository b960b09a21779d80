"""RabbitMQ through pika: a duplicate is replayed, and a message that can never be handled becomes a dead letter.

It makes and deletes two queues of its own: RABBITMQ_URL=amqp://… python rabbitmq_consumer.py
"""

import json
import os
import secrets
import time

import pika

from idem_tasks import Idempotency, MemoryStore
from idem_tasks.integrations.pika import idempotent_callback

if "RABBITMQ_URL" not in os.environ:
    raise SystemExit("set RABBITMQ_URL first")
connection = pika.BlockingConnection(pika.URLParameters(os.environ["RABBITMQ_URL"]))
channel = connection.channel()
orders = f"orders-{secrets.token_hex(4)}"
dead = f"{orders}-dead"
for name in (orders, dead):
    channel.queue_declare(name, durable=True)
shipped: list[str] = []


class UnknownOrderError(Exception): ...


@idempotent_callback(
    queue=orders,
    idempotency=Idempotency(store=MemoryStore(), observers=[]),  # yours: configure(database_url=…) once
    record_failures=UnknownOrderError,
    dead_letter_exchange="",
    dead_letter_routing_key=dead,
)
def ship(_channel: object, _method: object, _properties: object, body: bytes) -> str:
    order = json.loads(body)["order"]
    if not order.startswith("A-"):
        raise UnknownOrderError
    shipped.append(order)
    return f"parcel for {order}"


for order in ("A-1", "A-2", "A-1", "B-7"):
    properties = pika.BasicProperties(message_id=order, delivery_mode=2)
    channel.basic_publish("", orders, json.dumps({"order": order}), properties)
channel.basic_qos(prefetch_count=16)
channel.basic_consume(orders, ship)
with ship:  # which waits for running handlers at its end
    until = time.monotonic() + 20
    while not channel.queue_declare(dead, passive=True).method.message_count and time.monotonic() < until:
        connection.process_data_events(time_limit=0.1)
_method, why, body = channel.basic_get(dead, auto_ack=True)
assert sorted(shipped) == ["A-1", "A-2"]
assert (json.loads(body), why.headers["idem_tasks_reason"]) == ({"order": "B-7"}, "failed")
print(f"shipped {sorted(shipped)}; dead: {body.decode()}, {why.headers['idem_tasks_reason']}")
for name in (orders, dead):
    channel.queue_delete(name)
connection.close()
