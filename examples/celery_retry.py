"""A retry runs the handler again; what it recorded in the end answers every other message of that key."""

from celery import Celery, Task
from celery.contrib.testing.worker import start_worker

from idem_tasks import configure, current_claim, idempotency_of, idempotent_task

app = Celery("shop", broker="memory://", backend="cache+memory://")
app.conf.broker_transport_options = {"polling_interval": 0.01}
configure(database_url="sqlite://", lease=1)
answers = iter([TimeoutError("no answer"), "charged"])


@app.task(bind=True, acks_late=True, reject_on_worker_lost=True, max_retries=3)
@idempotent_task(key="{order_id}")
def charge(self: Task, order_id: str) -> str:
    answer = next(answers)  # the provider's
    if isinstance(answer, TimeoutError):
        raise self.retry(exc=answer, countdown=0)  # published while the claim stands; released before it leaves
    return f"{order_id} {answer} at attempt {current_claim().attempt}"


with start_worker(app, pool="threads", concurrency=2, perform_ping_check=False):
    assert charge.delay("A-1").get(timeout=10) == "A-1 charged at attempt 2"
    assert charge.delay("A-1").get(timeout=10) == "A-1 charged at attempt 2"  # recorded: nothing was asked again

record = idempotency_of(charge).lookup("A-1")
assert (record.state, record.attempts, record.failures) == ("completed", 2, 0)
