"""Records in Redis beside many, foreign and damaged keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from idem_tasks.claims import ClaimRequest, Granted, Lease, State, new_owner
from idem_tasks.errors import StoreError
from idem_tasks.policy import Policy
from idem_tasks.runtime import run_sync
from idem_tasks.stores.marker import place
from idem_tasks.stores.redis import RedisStore
from idem_tasks.testing.store_in_use import DONE

RECORDS = b"idem:r:"


def request(key: str = "key") -> ClaimRequest:
    return ClaimRequest("scope", key, None, new_owner(), Policy())


@pytest.fixture
def client(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def store(redis_url: str) -> Iterator[RedisStore]:
    store = RedisStore(redis_url)
    yield store
    run_sync(store.close())


def granted(store: RedisStore, key: str = "key") -> Lease:
    answer = run_sync(store.claim(request(key)))
    assert isinstance(answer, Granted)
    return answer.lease


def listed(store: RedisStore, limit: int = 10_000, **only: State) -> list[str]:
    found = run_sync(store.records(state=only.get("state"), scope=None, after=None, limit=limit))
    return [record.key for record in found]


def copy_record(client: Redis, numbers: range) -> None:
    """Write the record of `key` to many other keys."""
    fields: Any = client.hgetall(place(RECORDS, "scope", "key"))
    pipeline = client.pipeline(transaction=False)
    for number in numbers:
        pipeline.hset(place(RECORDS, "scope", f"key {number:05}"), mapping=fields)
    pipeline.execute()


def test_many_records_are_listed_and_counted(client: Redis, store: RedisStore) -> None:
    """Thousands come in several replies of SCAN and several pipelines, each once, in order, and no more than asked."""
    granted(store)
    copy_record(client, range(2500))
    assert listed(store) == ["key", *(f"key {number:05}" for number in range(2500))]
    assert listed(store, limit=3) == ["key", "key 00000", "key 00001"]
    assert listed(store, limit=500) == ["key", *(f"key {number:05}" for number in range(499))]
    assert listed(store, state=State.COMPLETED) == []
    assert run_sync(store.stats())[State.RUNNING] == 2501


@pytest.mark.parametrize(
    "name",
    [b"", b"hello", b"5:scope", b"5:scopekey", b"x:scope:key", b"5:scop\xff:key", b"5:scope:\xff", b"99:scope:key"],
)
def test_a_key_that_is_no_records_is_not_listed(client: Redis, store: RedisStore, name: bytes) -> None:
    """Somebody else's key under the prefix hides no record, and is left as it is."""
    client.hset(RECORDS + name, "of", "another program")
    granted(store)
    assert listed(store) == ["key"]
    assert run_sync(store.stats())[State.RUNNING] == 1
    assert client.hgetall(RECORDS + name) == {b"of": b"another program"}


def test_a_record_that_has_no_state_runs_nothing(client: Redis, store: RedisStore) -> None:
    """What is damaged is told and not guessed at; forgotten, its key may run again."""
    client.hset(place(RECORDS, "scope", "key"), "of", "another program")
    with pytest.raises(StoreError, match="none that this version can read; forget it"):
        run_sync(store.claim(request()))
    assert run_sync(store.forget("scope", "key"))
    granted(store)


def test_it_has_no_second_place(store: RedisStore) -> None:
    """An outcome that Redis does not take is kept nowhere: it is the only place there is."""
    assert not run_sync(store.keep_pending(granted(store), DONE))
    assert run_sync(store.purge(limit=10, grace=0.0)) == []
