"""Keys are stored whole: what would meet by a short hash does not meet here."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from hashlib import md5
from typing import Any

import pytest

from idem_tasks.claims import EncodedOutcome, Finished
from idem_tasks.stores.redis import RedisStore
from idem_tasks.stores.sql import SQLStore
from idem_tasks.stores.tiered import TieredStore
from idem_tasks.testing.driver import Driver
from idem_tasks.testing.store_in_use import StoreInUse


@pytest.fixture(params=["sqlite_url", "postgres_url", "mariadb_url", "redis_url", "redis_url, postgres_url"])
def use(request: pytest.FixtureRequest) -> Iterator[StoreInUse]:
    stores: list[Any] = [store_at(request.getfixturevalue(name)) for name in request.param.split(", ")]
    with Driver("blocking") as driver:
        use = StoreInUse(TieredStore(*stores) if len(stores) == 2 else stores[0], driver)
        yield use
        driver(use.store.close())


def store_at(url: str) -> RedisStore | SQLStore:
    return RedisStore(url) if url.startswith("redis") else SQLStore(url, create_schema=True)


def lock_id(key: bytes) -> int:
    """What PostgreSQL's advisory locks and others take for a key: 32 bits of a hash."""
    return int.from_bytes(md5(key, usedforsecurity=False).digest()[:4], "big")


@pytest.mark.parametrize("short_hash", [zlib.adler32, zlib.crc32, lock_id])
def test_keys_of_the_same_short_hash_are_different(use: StoreInUse, short_hash: Callable[[bytes], int]) -> None:
    """Each has an outcome of its own, and its duplicates get that one (F35)."""
    keys = that_meet_by(short_hash)
    assert short_hash(keys[0].encode()) == short_hash(keys[1].encode())
    for key in keys:
        use.finish(use.granted(key), EncodedOutcome(body=key.encode(), codec="text"))
    for key in keys:
        found = use.claim(key)
        assert isinstance(found, Finished)
        assert found.outcome.body == key.encode()


def that_meet_by(short_hash: Callable[[bytes], int]) -> tuple[str, str]:
    """Two keys whose hashes are equal, found by trying: among 300,000 there are about ten pairs."""
    seen: dict[int, str] = {}
    for number in range(300_000):
        key = f"order-{number * 7919:x}"
        other = seen.setdefault(short_hash(key.encode()), key)
        if other != key:
            return other, key
    raise AssertionError(short_hash)
