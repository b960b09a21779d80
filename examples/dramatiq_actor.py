"""Dramatiq: the decorator under the actor's, and a middleware that puts back what is in progress."""

import os
import threading

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from idem_tasks import Event, configure, idempotent_task
from idem_tasks.integrations.dramatiq import IdempotencyMiddleware

put_back, replayed = threading.Event(), threading.Event()


def note(event: Event) -> None:
    {"put_back": put_back, "replayed": replayed}.get(event.name.value, threading.Event()).set()


configure(database_url="sqlite:///example_dramatiq.db", lease=1.5, observers=[note])
broker = RabbitmqBroker(url=os.environ.get("RABBITMQ_URL", "amqp://guest:guest@127.0.0.1//"), confirm_delivery=True)
broker.add_middleware(IdempotencyMiddleware())
charged: list[str] = []


@dramatiq.actor(broker=broker, queue_name="t_example_dramatiq", max_retries=3)
@idempotent_task(key="{order}")
def charge(order: str) -> None:
    charged.append(order)
    put_back.wait(timeout=20)


worker = dramatiq.Worker(broker, worker_timeout=100, worker_threads=2)
worker.start()
for _ in range(2):
    charge.send("A-1")  # both are taken at once: one runs, the other finds it in progress
assert replayed.wait(timeout=20)

worker.stop()
for suffix in ("", ".DQ", ".XQ"):
    broker.channel.queue_delete(f"t_example_dramatiq{suffix}")
broker.close()
assert charged == ["A-1"]
print("charged", charged)
