"""The same protocol for asyncio, with redis.asyncio and asyncpg."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
from redis.asyncio import Redis

from benchmarks.by_hand.markers import LEASE_MILLISECONDS, LIFE_MILLISECONDS, PUBLISH
from benchmarks.by_hand.protocol import (
    LEASE,
    RETENTION,
    answer,
    fingerprint_of,
    finished_marker,
    in_progress,
    lost,
    running_marker,
)
from benchmarks.by_hand.records import psycopg_url

CLAIM = (
    "INSERT INTO by_hand VALUES ($1, $2, extract(epoch FROM clock_timestamp()) * 1000000, $3, "
    "clock_timestamp() + $4 * interval '1 second', clock_timestamp() + $5 * interval '1 second') "
    "ON CONFLICT DO NOTHING RETURNING token"
)
FINISH = (
    "UPDATE by_hand SET outcome = $1 WHERE key = $2 AND token = $3 AND owner = $4 AND outcome IS NULL RETURNING token"
)

CONNECTIONS = 15
"""As many as SQLAlchemy's pools open by default."""


class AsyncByHand:
    """Runs a coroutine function once for each order, in two tiers."""

    def __init__(
        self, handler: Callable[[str, int], Awaitable[Any]], client: Redis, connections: list[asyncpg.Connection]
    ) -> None:
        self._handler = handler
        self._client = client
        self._connections = connections
        # Not asyncpg's own pool, which sends a reset after each use.
        self._free: asyncio.LifoQueue[asyncpg.Connection] = asyncio.LifoQueue()
        for connection in connections:
            self._free.put_nowait(connection)

    @classmethod
    async def connect(
        cls, handler: Callable[[str, int], Awaitable[Any]], redis_url: str, postgres_url: str, at_once: int
    ) -> AsyncByHand:
        """Connect as often as so many calls at once can make use of."""
        url = psycopg_url(postgres_url)
        connections = [await asyncpg.connect(url) for _ in range(min(at_once, CONNECTIONS))]
        return cls(handler, Redis.from_url(redis_url), connections)

    async def __call__(self, order_id: str, amount: int) -> Any:
        """Claim, run, finish; or return the outcome that is there."""
        fingerprint, owner = fingerprint_of(order_id, amount), secrets.token_hex(16)
        mark = running_marker(owner)
        standing = await self._client.execute_command(
            "SET", order_id, mark, "NX", "GET", "PX", LEASE_MILLISECONDS, get=True
        )
        if standing is not None:
            return answer(standing, fingerprint)
        token = await self._fetch(CLAIM, order_id, owner, fingerprint, LEASE, RETENTION)
        if token is None:
            raise in_progress(order_id)
        value = await self._handler(order_id, amount)
        finished = finished_marker(fingerprint, value)
        if await self._fetch(FINISH, finished, order_id, token, owner) is None:
            raise lost(order_id)
        await self._client.execute_command("EVAL", PUBLISH, 1, order_id, mark, finished, LIFE_MILLISECONDS)
        return value

    async def _fetch(self, statement: str, *values: object) -> int | None:
        connection = await self._free.get()
        try:
            token: int | None = await connection.fetchval(statement, *values)
        finally:
            self._free.put_nowait(connection)
        return token

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()
        for connection in self._connections:
            await connection.close()
