"""Redis in front of PostgreSQL: what is lost in one is known to the other.

It uses only the scope `example` of the servers that it is given:
IDEM_TASKS_REDIS_URL=redis://… IDEM_TASKS_DATABASE_URL=postgresql://… python redis_and_postgres.py
"""

import os
import secrets

from redis import Redis

from idem_tasks import configure, idempotent_task

idempotency = configure(create_schema=True)  # in production: idem-tasks init-db
if "IDEM_TASKS_REDIS_URL" not in os.environ or "IDEM_TASKS_DATABASE_URL" not in os.environ:
    raise SystemExit("set IDEM_TASKS_REDIS_URL and IDEM_TASKS_DATABASE_URL first")
redis = Redis.from_url(os.environ["IDEM_TASKS_REDIS_URL"])
order_id = f"A-{secrets.token_hex(4)}"
charged: list[str] = []


@idempotent_task(key="{order_id}", scope="example")
def charge(order_id: str) -> str:
    charged.append(order_id)
    return f"receipt for {order_id}"


def markers() -> list[bytes]:
    return list(redis.scan_iter(f"idem:*{order_id}*"))


assert charge(order_id) == charge(order_id) == f"receipt for {order_id}"
[marker] = markers()
print(f"Redis answers by {marker.decode()} for the next {redis.ttl(marker) / 3600:.0f} hours")

redis.delete(marker)  # Redis may lose everything at any moment: SQL decides
assert charge(order_id) == f"receipt for {order_id}"
assert charged == [order_id]
assert markers() == [marker]  # and Redis answers again

assert idempotency.forget("example", order_id)
assert markers() == []
idempotency.close()
redis.close()
