"""Markers with redis-py alone."""

from __future__ import annotations

from redis import Redis

from benchmarks.by_hand.protocol import LEASE, MARKER_LIFE

PUBLISH = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
return 0
"""
LEASE_MILLISECONDS = int(LEASE * 1000)
LIFE_MILLISECONDS = int(MARKER_LIFE * 1000)


class RedisMarkers:
    """One connection, outside of any pool: nothing that redis-py offers is faster."""

    def __init__(self, url: str) -> None:
        self.client = Redis.from_url(url, single_connection_client=True)

    def take(self, key: str, value: bytes) -> bytes | None:
        """One round trip."""
        standing = self.client.execute_command("SET", key, value, "NX", "GET", "PX", LEASE_MILLISECONDS, get=True)
        assert standing is None or isinstance(standing, bytes)
        return standing

    def publish(self, key: str, value: bytes, outcome: bytes) -> None:
        """One round trip. EVAL takes as long as EVALSHA for a script as small as this one."""
        self.client.execute_command("EVAL", PUBLISH, 1, key, value, outcome, LIFE_MILLISECONDS)

    def get(self, key: str) -> bytes | None:
        """Read a marker and do no more: what no duplicate can be faster than."""
        standing = self.client.execute_command("GET", key)
        assert standing is None or isinstance(standing, bytes)
        return standing

    def forget(self, key: str) -> None:
        """Delete a marker, as an eviction does."""
        self.client.execute_command("DEL", key)

    def close(self) -> None:
        """Close the connection."""
        self.client.close()
