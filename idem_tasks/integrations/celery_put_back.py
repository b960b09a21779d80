"""Puts a Celery message back: the same message, later, safely published before this copy is acknowledged."""

from __future__ import annotations

import random
from typing import Any

from celery import Celery, Task
from celery.app.task import Context
from kombu import Producer
from kombu.pools import producers

COUNT_HEADER = "idem_tasks_put_back"
"""The message header that counts how often a message was put back."""

_FIRST_DELAY = 0.5
"""Seconds before the first copy comes back, at least; doubled each time."""

_LONGEST_DELAY = 300.0
"""Seconds. A worker holds a delayed message unacknowledged; RabbitMQ allows that for 1,800 s."""

_SHARE_OF_VISIBILITY = 0.2
"""Of the visibility timeout; with the jitter below a quarter, or held copies would be delivered twice (F64)."""

_JITTER = 0.2
"""Of the delay, at most: so that the duplicates of one message do not come back together."""

_MADE_ANEW = frozenset({"parent_id", "ignore_result", "argsrepr", "kwargsrepr"})
"""Headers that Celery does not take over when it sends a request again: a message without a parent becomes
its own parent, and arguments whose sender hid them from the logs are shown."""

CONFIRM_TIMEOUT = 10.0
"""Seconds to wait for RabbitMQ's confirmation before the message is published once more."""

_DEFAULT_VISIBILITY_TIMEOUT = 3600.0
"""Seconds; kombu's for Redis."""


def times_put_back(request: Context) -> int:
    """Return how often this message was put back before."""
    count = (request.headers or {}).get(COUNT_HEADER, 0)
    return count if isinstance(count, int) else 0


def delay_of(app: Celery, retry_after: float, count: int) -> float:
    """Return the seconds until the copy is to run: the rest of the lease, or longer the more often it came."""
    options = app.conf.broker_transport_options or {}
    visibility_timeout = float(options.get("visibility_timeout") or _DEFAULT_VISIBILITY_TIMEOUT)
    growing = _FIRST_DELAY * 2.0 ** min(count, 20)
    delay = min(max(retry_after, growing), _LONGEST_DELAY, visibility_timeout * _SHARE_OF_VISIBILITY)
    return delay * (1 + random.random() * _JITTER)  # noqa: S311 - jitter is no secret


def put_back(task: Task, request: Context, args: Any, kwargs: Any, *, delay: float, count: int) -> None:
    """Publish the request's message again, unchanged but for its delay and count; raises if that is uncertain.

    Same task id, retries, headers, root, parent, group, chord, chain and links, so that whoever waits for the
    result does not notice. `args` and `kwargs` are what the message held, whatever the handler did to them.
    """
    if task.app.conf.task_always_eager:
        raise RuntimeError("task_always_eager is set in a worker, so nothing can be published")
    signature = task.signature_from_request(request, args, kwargs, retries=request.retries, countdown=delay)
    signature.options["headers"] = {
        **(signature.options.get("headers") or {}),
        **{name: value for name, value in vars(request).items() if name in _MADE_ANEW},
        COUNT_HEADER: count,
    }
    with confirming_producer(task.app) as producer:
        signature.apply_async(producer=producer, add_to_parent=False, confirm_timeout=CONFIRM_TIMEOUT)


def confirming_producer(app: Celery) -> Producer:
    """Take a producer, for a `with` block, whose publish returns only when the broker has the message (F60).

    Redis does so by its reply; AMQP only with publisher confirms, which Celery's own producers lack.
    """
    connection = app.connection_for_write()
    if connection.get_transport_cls().driver_type == "amqp":
        connection = app.connection_for_write(transport_options={"confirm_publish": True})
    producer: Producer = producers[connection].acquire(block=True)
    return producer
