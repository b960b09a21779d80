"""Redis goes away, comes back empty, fails over; processes fork and event loops end."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from coverage import Coverage
from redis import Redis

from idem_tasks.claims import ClaimRequest, EncodedOutcome, Finished, Granted, InProgress, Lease, Recorded, new_owner
from idem_tasks.errors import StoreUnavailableError
from idem_tasks.events import Announcer
from idem_tasks.policy import Policy
from idem_tasks.runtime import run_sync
from idem_tasks.stores.base import MarkerTaken
from idem_tasks.stores.redis import RedisStore
from idem_tasks.stores.sql import SQLStore
from idem_tasks.stores.tiered import TieredStore
from tests.integration.time_limits import time_limits
from tests.services.redis_server import RedisSentinel, RedisServer
from tests.services.waiting import wait_until

DONE = EncodedOutcome(body=b'"done"', codec="json")

Start = Callable[..., RedisServer]


def request(key: str = "key", **policy: Any) -> ClaimRequest:
    return ClaimRequest("scope", key, None, new_owner(), Policy(**policy))


def sentinel_url(servers: RedisSentinel) -> str:
    hosts = ",".join(f"{host}:{port}" for host, port in servers.sentinels)
    return f"redis+sentinel://{hosts}/{servers.primary_name}"


# Outages


def test_only_the_first_call_waits_for_a_hanging_redis(private_redis: Start) -> None:
    """A Redis that hangs costs one timeout; the next calls fail at once, and one tries again after a second (F49)."""
    server = private_redis()
    store = RedisStore(server.url, socket_timeout=0.3)
    run_sync(store.prepare())
    server.pause()
    took = []
    for _ in range(20):
        began = time.monotonic()
        with pytest.raises(StoreUnavailableError) as caught:
            run_sync(store.take(request()))
        assert caught.value.__cause__ is not None
        took.append(time.monotonic() - began)
    assert took[0] >= 0.3
    assert sum(took[1:]) < 0.3
    server.resume()
    wait_until(lambda: is_available(store), seconds=10, what="the breaker to let a try through")
    run_sync(store.close())


def is_available(store: RedisStore) -> bool:
    try:
        run_sync(store.take(request(new_owner())))
    except StoreUnavailableError:
        return False
    return True


def test_asyncio_calls_fail_at_once_too(private_redis: Start) -> None:
    """The same on an event loop (F49)."""
    server = private_redis()
    store = RedisStore(server.url, socket_timeout=0.3).on("asyncio", Announcer(()))

    async def main() -> float:
        await store.prepare()
        server.pause()
        with pytest.raises(StoreUnavailableError):
            await store.take(request())
        began = time.monotonic()
        for _ in range(20):
            with pytest.raises(StoreUnavailableError):
                await store.take(request())
        return time.monotonic() - began

    assert asyncio.run(main()) < 0.3
    server.resume()


def test_a_restart_between_two_calls_is_not_noticed(private_redis: Start) -> None:
    """Connections that died while they were idle are made anew within the call."""
    server = private_redis()
    store = RedisStore(server.url)
    run_sync(store.take(request("before")))
    server.restart()
    assert run_sync(store.take(request("after"))) == MarkerTaken()
    run_sync(store.close())


def test_a_store_made_before_its_server_connects_when_it_is_there(private_redis: Start) -> None:
    """Nothing is connected, and nothing fails, before the first call."""
    server = private_redis()
    server.stop()
    store = RedisStore(server.url)
    with pytest.raises(StoreUnavailableError):
        run_sync(store.take(request()))
    server.start()
    wait_until(lambda: is_available(store), seconds=10, what="the store to find its server")
    run_sync(store.close())


# What a lost marker may not change


def in_front_of(database_url: str, redis_url: str) -> TieredStore:
    return TieredStore(RedisStore(redis_url), SQLStore(database_url, create_schema=True))


@pytest.mark.parametrize("loss", ["flush", "restart"])
def test_a_lost_marker_grants_nothing_twice(private_redis: Start, postgres_url: str, loss: str) -> None:
    """Redis is flushed or comes back empty in mid-run: the record refuses the second claim (F7, F8)."""
    server = private_redis()
    store = in_front_of(postgres_url, server.url).on("blocking", Announcer(()))
    granted = run_sync(store.claim(request()))
    assert isinstance(granted, Granted)
    if loss == "flush":
        with server.client() as client:
            client.flushall()
    else:
        server.restart()
    assert isinstance(run_sync(store.claim(request())), InProgress)
    assert run_sync(store.finish(granted.lease, DONE, may_insert=False)) == Recorded()
    assert isinstance(run_sync(store.claim(request())), Finished)
    run_sync(store.close())


def test_an_evicted_marker_grants_nothing_twice(private_redis: Start, postgres_url: str) -> None:
    """Keys with a time to live are what volatile-* evicts first; the record decides (F7, F8)."""
    server = private_redis(maxmemory_policy="volatile-ttl")
    store = in_front_of(postgres_url, server.url).on("blocking", Announcer(()))
    assert isinstance(run_sync(store.claim(request())), Granted)
    with server.client() as client:
        client.config_set("maxmemory", "100kb")
        wait_until(lambda: evicts(client), seconds=10, what="Redis to evict")
        client.config_set("maxmemory", "0")
    assert isinstance(run_sync(store.claim(request())), InProgress)
    run_sync(store.close())


def evicts(client: Redis) -> bool:
    client.execute_command("PING")
    client.eval("return 1", 0)
    return not client.keys("idem:m:*")


def test_a_marker_that_outlives_its_lease_by_a_clock_is_no_danger(private_redis: Start, postgres_url: str) -> None:
    """Redis' own idea of time only moves the shield: too early the record refuses, too late a caller waits (F9)."""
    server = private_redis()
    store = in_front_of(postgres_url, server.url).on("blocking", Announcer(()))
    granted = run_sync(store.claim(request()))
    assert isinstance(granted, Granted)
    with server.client() as client:
        (key,) = client.keys("idem:m:*")
        client.pexpire(key, 1)
        wait_until(lambda: not client.exists(key), seconds=5, what="the marker to expire")
        assert isinstance(run_sync(store.claim(request())), InProgress)
        run_sync(store.renew([granted.lease], lambda _: True))
        client.pexpire(key, 10**10)
    assert run_sync(store.finish(granted.lease, DONE, may_insert=False)) == Recorded()
    assert isinstance(run_sync(store.claim(request())), Finished)
    run_sync(store.close())


def test_a_holder_that_comes_late_touches_nobody_elses_marker(redis_url: str) -> None:
    """Whatever a late holder does, the marker of the one after it stands (F4), and what is forgotten stays so (F53)."""
    marker = RedisStore(redis_url)
    late = Lease(request(), 1)
    run_sync(marker.take(late.request))
    run_sync(marker.drop([("scope", "key")]))
    run_sync(marker.publish(late.request, Finished(DONE, None, 60.0), 60.0))
    newer = request()
    assert run_sync(marker.take(newer)) == MarkerTaken()
    run_sync(marker.give_back("scope", "key", late.owner))
    run_sync(marker.renew_markers([late]))
    run_sync(marker.publish(late.request, Finished(DONE, None, 60.0), 60.0))
    assert run_sync(marker.keep(late, DONE)) is False
    assert run_sync(marker.take(newer)) == MarkerTaken()
    run_sync(marker.close())


# Sentinel


@pytest.mark.parametrize("runtime", ["blocking", "asyncio"])
def test_a_failover_that_loses_a_marker_grants_nothing_twice(
    private_redis_sentinel: RedisSentinel, postgres_url: str, runtime: str
) -> None:
    """The primary dies before its replica has the marker; claims go on with the new primary, by the record (F7)."""
    servers = private_redis_sentinel

    async def main() -> None:
        store: Any = in_front_of(postgres_url, sentinel_url(servers))
        store = store.on(runtime, Announcer(()))
        await store.claim(request("before"))
        servers.replica.pause()
        granted = await store.claim(request(lease=60.0))
        assert isinstance(granted, Granted)
        servers.primary.kill()
        servers.replica.resume()
        wait_until(lambda: has_failed_over(servers), seconds=30, what="the failover")
        assert isinstance(await store.claim(request()), InProgress)
        await store.renew([granted.lease], lambda _: True)
        assert await store.finish(granted.lease, DONE, may_insert=False) == Recorded()
        assert isinstance(await store.claim(request()), Finished)
        deadline = time.monotonic() + 20
        while not await is_answered(store, f"after {time.monotonic()}"):  # the breaker makes this wait cheap
            assert time.monotonic() < deadline
        await store.close()

    if runtime == "asyncio":
        asyncio.run(main())
    else:
        run_sync(main())


def has_failed_over(servers: RedisSentinel) -> bool:
    with servers.sentinel.client() as client:
        address: Any = client.sentinel_get_master_addr_by_name(servers.primary_name)
    return bool(address[1] == servers.replica.port)


async def is_answered(store: Any, key: str) -> bool:
    try:
        return bool(await store._marker.take(request(key)) == MarkerTaken())
    except StoreUnavailableError:
        return False


def test_a_sentinel_that_does_not_know_the_service(redis_sentinel: RedisSentinel) -> None:
    """A service that no Sentinel knows cannot be reached; the message names it."""
    store = RedisStore(sentinel_url(redis_sentinel) + "-unknown")
    with pytest.raises(StoreUnavailableError, match="'idem-unknown' by the Sentinels"):
        run_sync(store.take(request()))
    run_sync(store.close())


# Event loops and processes


def test_a_second_event_loop_has_connections_of_its_own(private_redis: Start) -> None:
    """The same store works in one asyncio.run after the other, and each takes its connections along (F54)."""
    server = private_redis()
    store = RedisStore(server.url).on("asyncio", Announcer(()))

    async def main(key: str) -> object:
        return await store.take(request(key))

    with server.client() as client:
        for number in range(3):
            assert asyncio.run(main(f"key {number}")) == MarkerTaken()
            gc.collect()
        wait_until(lambda: len(client.client_list()) == 1, seconds=5, what="all connections but this to be closed")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loop_that_was_dropped_is_let_go(redis_url: str) -> None:
    """An event loop that was closed without an end of its tasks leaves nothing in the store (F54)."""
    store = RedisStore(redis_url).on("asyncio", Announcer(()))

    def drop_a_loop(number: int) -> None:
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(store.take(request(f"key {number}"))) == MarkerTaken()
        loop.close()

    for number in range(3):
        drop_a_loop(number)
    asyncio.run(store.take(request("last")))
    assert not store._connection._by_loop
    gc.collect()  # what was dropped warns here, and not in the next test


def test_two_event_loops_at_once(redis_url: str) -> None:
    """Loops in two threads share a store, and no connection."""
    store = RedisStore(redis_url).on("asyncio", Announcer(()))
    answers: list[object] = []
    together = threading.Barrier(2)

    async def main() -> None:
        answers.extend([await store.take(request(f"key {number}")) for number in range(50)])

    def run() -> None:
        together.wait(10)
        asyncio.run(main())

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers.count(MarkerTaken()) == 50
    assert len(answers) == 100


def test_a_forked_child_has_connections_of_its_own(redis_url: str) -> None:
    """After a fork in mid-use, parent and children each get the replies to their own commands (F27)."""
    store = RedisStore(redis_url)
    run_sync(store.prepare())

    def work(name: str) -> int:
        wrong = 0
        for number in range(100):
            mine = request(f"{name} {number}")
            wrong += run_sync(store.take(mine)) != MarkerTaken()
            run_sync(store.publish(mine, Finished(DONE, mine.key, 60.0), 60.0))
            answer: Any = run_sync(store.take(request(mine.key)))
            wrong += answer.finished.fingerprint != mine.key
        return wrong

    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=lambda: os._exit(work(f"child {os.getpid()}"))) for _ in range(3)]
    for child in children:
        child.start()
    assert work("parent") == 0
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    run_sync(store.close())


@pytest.fixture
def unmeasured() -> Iterator[None]:
    """Let no coverage be measured: it takes a lock now and then, and struck there, it would wait for it for ever."""
    stopped = []
    while (measuring := Coverage.current()) is not None:  # pytest-cov's is above the one that every process starts
        measuring.stop()
        stopped.append(measuring)
    yield
    for measuring in reversed(stopped):
        measuring.start()


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # struck in a finalizer
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it strikes in a __del__ too
def test_an_interrupted_call_leaves_no_reply_for_the_next(redis_url: str) -> None:
    """A time limit that strikes between a command and its reply never makes the next key get that reply."""
    store = RedisStore(redis_url)
    for number in range(100):
        mine = request(f"key {number}")
        run_sync(store.take(mine))
        run_sync(store.publish(mine, Finished(DONE, mine.key, 60.0), 60.0))

    with time_limits() as struck:
        for number in range(1000):
            struck(0.00002 + (number % 50) * 0.000005, partial(check, store, number % 100))
            check(store, (number * 7) % 100)
    run_sync(store.close())


def check(store: RedisStore, number: int) -> None:
    answer: Any = run_sync(store.take(request(f"key {number}")))
    assert answer.finished.fingerprint == f"key {number}"
