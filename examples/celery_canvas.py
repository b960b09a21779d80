"""A duplicate in a group or chain gets the recorded outcome, and what follows it the same value."""

from celery import Celery, chain, group
from celery.contrib.testing.worker import start_worker

from idem_tasks import configure, idempotent_task

app = Celery("shop", broker="memory://", backend="cache+memory://")
app.conf.broker_transport_options = {"polling_interval": 0.01}
configure(database_url="sqlite://", lease=1)
charged, mailed = [], []


@app.task(acks_late=True, reject_on_worker_lost=True)
@idempotent_task(key="{order_id}")
def charge(order_id: str) -> str:
    charged.append(order_id)
    return order_id


@app.task(acks_late=True, reject_on_worker_lost=True)
@idempotent_task(key="{order_id}")  # a key of its own: each copy of `charge` sends a `mail`
def mail(order_id: str) -> str:
    mailed.append(order_id)
    return f"mailed {order_id}"


with start_worker(app, pool="threads", concurrency=2, perform_ping_check=False):
    both = group(chain(charge.s("A-1"), mail.s()), chain(charge.s("A-1"), mail.s()))()
    assert both.get(timeout=20) == ["mailed A-1", "mailed A-1"]

assert charged == ["A-1"]
assert mailed == ["A-1"]
