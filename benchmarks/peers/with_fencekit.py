"""fencekit, its guard and its lock in Redis: `python with_fencekit.py REDIS_URL`."""

import sys
from datetime import timedelta

import redis
from fencekit import DistributedLock, IdempotencyGuard, idempotency_key
from fencekit.celery import idempotent_task
from speaking import charge, new_orders, serve

client = redis.Redis.from_url(sys.argv[1], decode_responses=True)
guarded = idempotent_task(
    IdempotencyGuard(client),
    DistributedLock(client),
    key=lambda order_id, _amount: idempotency_key({"order_id": order_id}, namespace="bench"),
    lock_resource=lambda order_id, _amount: f"bench:{order_id}",
    idempotency_ttl=timedelta(hours=24),
    lock_ttl=timedelta(minutes=1),
)(charge)

order = new_orders()
guarded("A-1", 4900)
serve({"first call": lambda: guarded(order(), 4900), "duplicate": lambda: guarded("A-1", 4900)})
