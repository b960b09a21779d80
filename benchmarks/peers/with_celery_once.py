"""celery-once, the lock that it takes when a task is sent: `python with_celery_once.py REDIS_URL`."""

import sys
from contextlib import suppress

from celery_once.backends import Redis
from celery_once.tasks import AlreadyQueued
from speaking import charge, new_orders, serve

backend = Redis({"url": sys.argv[1]})
order = new_orders()


def first_call() -> None:
    """Take the lock as sending does, run, and let go of it as the end of a task does."""
    key = f"qo_bench.charge_order_id-{order()}"
    backend.raise_or_lock(key, timeout=3600)
    charge(key, 4900)
    backend.clear_lock(key)


def duplicate() -> None:
    """Be refused, because the task is queued."""
    with suppress(AlreadyQueued):
        backend.raise_or_lock("qo_bench.charge_order_id-A-1", timeout=3600)


duplicate()
serve({"first call": first_call, "duplicate": duplicate})
