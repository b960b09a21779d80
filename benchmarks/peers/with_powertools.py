"""Powertools for AWS Lambda, its records in Redis: `python with_powertools.py REDIS_URL`."""

import sys
from typing import Any

import redis
from aws_lambda_powertools.utilities.idempotency import IdempotencyConfig, idempotent_function
from aws_lambda_powertools.utilities.idempotency.persistence.redis import RedisCachePersistenceLayer
from speaking import charge, new_orders, serve


class Context:
    """What Lambda says of an invocation: how long it may still take."""

    def get_remaining_time_in_millis(self) -> int:
        """Return a minute."""
        return 60_000


config = IdempotencyConfig(expires_after_seconds=86400, payload_validation_jmespath="")
config.register_lambda_context(Context())
layer = RedisCachePersistenceLayer(client=redis.Redis.from_url(sys.argv[1], decode_responses=True))


@idempotent_function(data_keyword_argument="order_id", config=config, persistence_store=layer)
def guarded(order_id: str, amount: int) -> dict[str, Any]:
    """Do nothing for an order."""
    return charge(order_id, amount)


order = new_orders()
guarded(order_id="A-1", amount=4900)
serve(
    {
        "first call": lambda: guarded(order_id=order(), amount=4900),
        "duplicate": lambda: guarded(order_id="A-1", amount=4900),
    }
)
