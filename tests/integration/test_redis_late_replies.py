"""A reply that comes too late for its command answers no other one."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis

from idem_tasks.claims import ClaimRequest, EncodedOutcome, Finished, new_owner
from idem_tasks.errors import StoreUnavailableError
from idem_tasks.events import Announcer
from idem_tasks.policy import Policy
from idem_tasks.runtime import run_sync
from idem_tasks.stores.base import MarkerTaken, RuntimeName
from idem_tasks.stores.redis import RedisStore
from tests.services.redis_server import RedisSentinel, RedisServer

DONE = Finished(EncodedOutcome(body=b'"of the first"', codec="json"), None, 60.0)


def request(key: str) -> ClaimRequest:
    return ClaimRequest("scope", key, None, new_owner(), Policy(lease=30))


@pytest.mark.parametrize("runtime", ["blocking", "asyncio"])
def test_behind_a_sentinel(private_redis_sentinel: RedisSentinel, runtime: RuntimeName) -> None:
    """A timeout there hangs up, or the next key would be answered with the outcome of the one before (F22)."""
    servers = private_redis_sentinel
    with servers.sentinel.client() as client:
        client.sentinel_set(servers.primary_name, "down-after-milliseconds", 60000)
    [(host, port)] = servers.sentinels
    answers_only_its_own(f"redis+sentinel://{host}:{port}/{servers.primary_name}", servers.primary.client(), runtime)


@pytest.mark.parametrize("runtime", ["blocking", "asyncio"])
def test_of_a_single_redis(private_redis: Callable[..., RedisServer], runtime: RuntimeName) -> None:
    """A timeout there hangs up too."""
    server = private_redis()
    answers_only_its_own(server.url, server.client(), runtime)


def answers_only_its_own(url: str, admin: Redis, runtime: RuntimeName) -> None:
    async def main() -> None:
        store: Any = RedisStore(url, socket_timeout=1.5).on(runtime, Announcer(()))
        first = request("first")
        assert await store.take(first) == MarkerTaken()
        await store.publish(first, DONE, 60.0)
        with admin:
            # Until after the breaker's second, when the next command is on its way.
            admin.client_pause(3250, all=True)
        with pytest.raises(StoreUnavailableError):
            await store.take(request("first"))
        assert await answer_to(store, request("second")) == MarkerTaken()
        await store.close()

    if runtime == "asyncio":
        asyncio.run(main())
    else:
        run_sync(main())


async def answer_to(store: Any, wanted: ClaimRequest) -> Any:
    """The answer, once the breaker lets a try through."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(StoreUnavailableError):
            return await store.take(wanted)
    raise AssertionError("Redis stays away")
