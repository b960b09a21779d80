"""A duplicate that comes while the first copy runs is put back: not failed, not lost, not run."""

import threading

from celery import Celery
from celery.contrib.testing.worker import start_worker

from idem_tasks import EventName, configure, idempotent_task

app = Celery("shop", broker="memory://", backend="cache+memory://")
app.conf.broker_transport_options = {"polling_interval": 0.01}
put_back = threading.Event()
charged = []

configure(
    database_url="sqlite://",
    lease=1,  # seconds; a copy comes back when the lease of the one that runs could be over
    observers=[lambda event: put_back.set() if event.name is EventName.PUT_BACK else None],
)


@app.task(acks_late=True, reject_on_worker_lost=True)
@idempotent_task(key="{order_id}")
def charge(order_id: str) -> str:
    put_back.wait(10)  # a slow provider: in the meantime the second message arrives
    charged.append(order_id)
    return f"receipt for {order_id}"


with start_worker(app, pool="threads", concurrency=2, perform_ping_check=False):
    first, second = charge.delay("A-1"), charge.delay("A-1")
    assert first.get(timeout=10) == second.get(timeout=10) == "receipt for A-1"

assert put_back.is_set()
assert charged == ["A-1"]
