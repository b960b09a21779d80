"""The same protocol for many new orders at once: two scripts and two statements for all of them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.by_hand.markers import LEASE_MILLISECONDS, LIFE_MILLISECONDS, RedisMarkers
from benchmarks.by_hand.protocol import (
    LEASE,
    RETENTION,
    fingerprint_of,
    finished_marker,
    in_progress,
    lost,
    running_marker,
)
from benchmarks.by_hand.records import PostgresRecords

TAKE = """
local standing = {}
for i, key in ipairs(KEYS) do
  standing[i] = redis.call('SET', key, ARGV[i + 1], 'NX', 'GET', 'PX', ARGV[1])
end
return standing
"""
PUBLISH = """
for i, key in ipairs(KEYS) do
  if redis.call('GET', key) == ARGV[2 * i] then redis.call('SET', key, ARGV[2 * i + 1], 'PX', ARGV[1]) end
end
return 0
"""
CLAIM = (
    "INSERT INTO by_hand SELECT key, owner, extract(epoch FROM clock_timestamp()) * 1000000, fingerprint, "
    "clock_timestamp() + %s * interval '1 second', clock_timestamp() + %s * interval '1 second' "
    "FROM unnest(%b::text[], %b::text[], %b::text[]) AS wanted (key, owner, fingerprint) ORDER BY key "
    "ON CONFLICT DO NOTHING RETURNING key, token"
)
FINISH = (
    "UPDATE by_hand SET outcome = done.outcome "
    "FROM unnest(%b::text[], %b::bigint[], %b::text[], %b::bytea[]) AS done (key, token, owner, outcome) "
    "WHERE by_hand.key = done.key AND by_hand.token = done.token AND by_hand.owner = done.owner "
    "AND by_hand.outcome IS NULL"
)

Orders = Sequence[tuple[str, int]]


class BatchByHand:
    """Runs a handler of many orders once for all of them; none of them may have been seen before."""

    def __init__(self, handler: Callable[[Orders], list[Any]], records: PostgresRecords, markers: RedisMarkers) -> None:
        self._handler = handler
        self._cursor = records.connection.cursor()
        self._client = markers.client

    def __call__(self, orders: Orders) -> list[Any]:
        """Claim all, run, finish all."""
        keys = [order_id for order_id, _ in orders]
        fingerprints = [fingerprint_of(order_id, amount) for order_id, amount in orders]
        owners = [secrets.token_hex(16) for _ in orders]
        marks = [running_marker(owner) for owner in owners]
        if any(self._client.execute_command("EVAL", TAKE, len(keys), *keys, LEASE_MILLISECONDS, *marks)):
            raise in_progress("one of them")
        wanted = (LEASE, RETENTION, keys, owners, fingerprints)
        granted = dict(self._cursor.execute(CLAIM, wanted, prepare=True).fetchall())
        tokens = [granted[key] for key in keys]
        values = self._handler(orders)
        outcomes = [finished_marker(*each) for each in zip(fingerprints, values, strict=True)]
        self._cursor.execute(FINISH, (keys, tokens, owners, outcomes), prepare=True)
        if self._cursor.rowcount != len(keys):
            raise lost("one of them")
        changes = [part for each in zip(marks, outcomes, strict=True) for part in each]
        self._client.execute_command("EVAL", PUBLISH, len(keys), *keys, LIFE_MILLISECONDS, *changes)
        return values
