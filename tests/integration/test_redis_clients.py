"""Whatever a store is given to reach Redis by, it keeps the marker contract's core: URLs, ready clients, a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
from redis import Redis

from idem_tasks.claims import ClaimRequest, EncodedOutcome, Finished, Granted, Lease, Recorded, new_owner
from idem_tasks.errors import ConfigurationError
from idem_tasks.events import Announcer
from idem_tasks.policy import Policy
from idem_tasks.runtime import run_sync
from idem_tasks.stores.base import MarkerFinished, MarkerRunning, MarkerTaken
from idem_tasks.stores.redis import RedisStore
from tests.integration.time_limits import TimeLimitError
from tests.services.redis_server import RedisCluster, RedisSentinel, RedisServer
from tests.services.waiting import wait_until

DONE = EncodedOutcome(body=b'"done"', codec="json")
KEYS = 40


def request(key: str = "key") -> ClaimRequest:
    return ClaimRequest("scope", key, None, new_owner(), Policy())


async def exercise(store: RedisStore) -> None:
    """Use every verb on enough keys to meet every node."""
    await store.prepare()
    leases = [Lease(request(f"marker {number}"), 1) for number in range(KEYS)]
    for lease in leases:
        assert await store.take(lease.request) == MarkerTaken()
        assert isinstance(await store.take(request(lease.key)), MarkerRunning)
    await store.renew_markers(leases)
    for lease in leases:
        await store.publish(lease.request, Finished(DONE, None, 60.0), 60.0)
        assert isinstance(await store.take(request(lease.key)), MarkerFinished)
    batch = [request(f"marker of many {number}") for number in range(KEYS)]
    assert await store.take_batch(batch) == [MarkerTaken()] * KEYS
    await store.publish_batch([(each, Finished(DONE, None, 60.0), 60.0) for each in batch[1:]])
    await store.give_back_batch(batch)
    again = await store.take_batch([request(each.key) for each in batch])
    assert [type(answer) for answer in again] == [MarkerTaken] + [MarkerFinished] * (KEYS - 1)
    await store.drop([("scope", lease.key) for lease in leases])
    assert await store.take(request(leases[0].key)) == MarkerTaken()

    claimed = [await store.claim(request(f"record {number:02}")) for number in range(KEYS)]
    granted = [answer.lease for answer in claimed if isinstance(answer, Granted)]
    assert len(granted) == KEYS
    assert len(await store.renew(granted, lambda _: True)) == KEYS
    for lease in granted:
        assert await store.finish(lease, DONE) == Recorded()
    found = await store.records(state=None, scope="scope", after=("scope", "record 09"), limit=25)
    assert [record.key for record in found] == [f"record {number:02}" for number in range(10, 35)]
    assert sum((await store.stats()).values()) == KEYS
    together = [answer.lease for answer in await store.claim_batch(batch) if isinstance(answer, Granted)]
    assert await store.finish_batch([(lease, DONE) for lease in together]) == [Recorded()] * KEYS
    await store.close()
    assert await store.get("scope", "record 00")
    await store.close()


def exercise_both(store: RedisStore, flush: Callable[[], object]) -> None:
    run_sync(exercise(store.on("blocking", Announcer(()))))
    flush()
    asyncio.run(exercise(store.on("asyncio", Announcer(()))))


def flush_of(*servers: RedisServer) -> Callable[[], None]:
    def flush() -> None:
        for server in servers:
            with server.client() as client:
                client.flushall()

    return flush


def test_valkey_urls(private_redis: Callable[..., RedisServer]) -> None:
    """valkey:// is redis:// by another name."""
    server = private_redis()
    exercise_both(RedisStore(server.url.replace("redis://", "valkey://")), flush_of(server))


def test_a_unix_socket(private_redis: Callable[..., RedisServer], tmp_path: Path) -> None:
    """unix:// reaches a socket, and the database of its query."""
    server = private_redis(unixsocket=str(tmp_path / "redis.sock"))
    exercise_both(RedisStore(f"unix://{tmp_path}/redis.sock?db=3"), flush_of(server))
    with Redis(port=server.port, db=3) as client:
        assert client.dbsize()


def test_a_sentinel(redis_sentinel: RedisSentinel) -> None:
    """redis+sentinel:// follows a service."""
    host, port = redis_sentinel.sentinels[0]
    url = f"redis+sentinel://{host}:{port}/{redis_sentinel.primary_name}/0"
    exercise_both(RedisStore(url), flush_of(redis_sentinel.primary))


def test_a_cluster(redis_cluster: RedisCluster) -> None:
    """redis+cluster:// finds the node of each key; every command is on one key."""
    nodes = ",".join(f"127.0.0.1:{node.port}" for node in redis_cluster.nodes)
    exercise_both(RedisStore(f"redis+cluster://{nodes}"), flush_of(*redis_cluster.nodes))
    for node in redis_cluster.nodes:
        with node.client() as client:
            assert client.dbsize()


def test_a_given_blocking_client(redis_url: str) -> None:
    """A client serves the runtime it was made for, and is not closed."""
    with Redis.from_url(redis_url) as client:
        store = RedisStore(client)
        assert store.runtimes == {"blocking"}
        run_sync(exercise(store))
        assert client.ping()
        with pytest.raises(ConfigurationError, match="give it a URL, which serves both"):
            store.on("asyncio", Announcer(()))


def test_a_given_asyncio_client(redis_url: str) -> None:
    """The same with a client for an event loop."""

    async def main() -> None:
        async with redis.asyncio.Redis.from_url(redis_url) as client:
            store = RedisStore(client)
            assert store.runtimes == {"asyncio"}
            assert store.on("asyncio", Announcer(())) is store
            await exercise(store)
            assert await client.ping()

    asyncio.run(main())


def test_a_given_cluster_client(redis_cluster: RedisCluster) -> None:
    """A cluster's client too, in both runtimes."""
    with redis.RedisCluster(host="127.0.0.1", port=redis_cluster.nodes[0].port) as client:
        run_sync(exercise(RedisStore(client)))
    flush_of(*redis_cluster.nodes)()

    async def main() -> None:
        async with redis.asyncio.RedisCluster(host="127.0.0.1", port=redis_cluster.nodes[0].port) as client:
            await exercise(RedisStore(client))

    asyncio.run(main())


@pytest.mark.parametrize("kind", [redis.Redis, redis.asyncio.Redis])
def test_a_client_that_decodes_is_refused(kind: Any) -> None:
    """Outcomes are bytes: a client that turns them into text cannot be used."""
    with pytest.raises(ConfigurationError, match="decode_responses"):
        RedisStore(kind(decode_responses=True))


def test_something_else_is_refused() -> None:
    """What is neither a URL nor a client is named by its type, never by its content."""
    with pytest.raises(ConfigurationError, match="not dict"):
        RedisStore({"password": "secret"})  # type: ignore[arg-type]


def test_a_runtime_has_one_store(redis_url: str) -> None:
    """Every handler of a runtime shares one store, and so its connections."""
    store = RedisStore(redis_url)
    blocking, asynchronous = (store.on(runtime, Announcer(())) for runtime in ("blocking", "asyncio"))
    assert blocking is not asynchronous
    assert asynchronous.on("blocking", Announcer(())) is blocking
    assert blocking.on("asyncio", Announcer(())) is asynchronous


def test_two_prefixes_do_not_meet(redis_url: str) -> None:
    """Stores with other prefixes share a server and see nothing of each other, whatever is in a prefix."""
    for prefix in ("a:", "a*", "[a]", "a?", "\\a", ""):
        store = RedisStore(redis_url, prefix=prefix)
        assert run_sync(store.take(request())) == MarkerTaken()
        assert isinstance(run_sync(store.claim(request())), Granted)
        assert sum(run_sync(store.stats()).values()) == 1
        run_sync(store.close())


def hangs_up(url: str, servers: list[Redis], name: str) -> None:
    """Strike a call after its command was sent, and see that none of the servers keeps a connection of this name."""
    store = RedisStore(f"{url}?client_name={name}&max_connections=50")  # else some are kept that were not struck

    def connections() -> list[str]:
        return [each["addr"] for server in servers for each in server.client_list() if each["name"] == name]

    async def struck(client: Any) -> None:
        client.redis.set(b"idem:struck", b"1", px=1000)
        assert connections()
        raise TimeLimitError

    run_sync(store.prepare())
    with pytest.raises(TimeLimitError):
        run_sync(store._connection._call(struck))
    wait_until(lambda: connections() == [], seconds=10, what="the connections to be closed")
    assert run_sync(store.take(request())) == MarkerTaken()
    run_sync(store.close())


def test_a_call_that_is_cancelled_before_its_reply(private_redis: Callable[..., RedisServer]) -> None:
    """Its connection is closed: the next call gets the reply to its own command."""
    server = private_redis()

    async def main() -> None:
        store = RedisStore(server.url).on("asyncio", Announcer([]))
        assert await store.take(request("before")) == MarkerTaken()
        server.pause()
        calling = asyncio.ensure_future(store.take(request("before")))
        await asyncio.sleep(0.05)  # until it waits for the reply, of which nothing tells
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        server.resume()
        assert await store.take(request("after")) == MarkerTaken()
        await store.close()

    asyncio.run(main())


def test_the_number_of_a_database_is_sent_as_text(private_redis: Callable[..., RedisServer]) -> None:
    """A time limit that strikes while hiredis makes text of a number crashes the process, and a reconnect sends one."""
    server = private_redis()
    for number, where in ((1, "/1"), (2, "/0?db=2")):
        store = RedisStore(server.url.rpartition("/")[0] + where)
        run_sync(store.take(request()))
        [client] = store._connection._by_process.values()
        assert client.redis.connection_pool.connection_kwargs["db"] == str(number)
        run_sync(store.close())
        with Redis(port=server.port, db=number) as database:
            assert database.dbsize() == 1


@pytest.mark.parametrize("options, keeps", [("", True), ("?protocol=3", False), ("?max_connections=9", False)])
def test_what_only_a_pool_keeps_to_has_commands_go_by_it(redis_url: str, options: str, keeps: bool) -> None:
    """Single commands go past the client's pool, unless the URL has an option that only the pool knows."""
    store = RedisStore(redis_url + options)
    run_sync(store.prepare())
    assert run_sync(store.take(request())) == MarkerTaken()
    [client] = store._connection._by_process.values()
    assert (client.commands is not client.redis) is keeps
    run_sync(store.close())


def test_a_call_that_is_struck_hangs_up(redis_url: str, unique_name: str) -> None:
    """A reply that is still to come after a time limit answers no other key."""
    with Redis.from_url(redis_url, decode_responses=True) as client:
        hangs_up(redis_url, [client], unique_name)


def test_a_call_that_is_struck_hangs_up_on_every_node(redis_cluster: RedisCluster, unique_name: str) -> None:
    """In a cluster the reply may be to come from any node."""
    with ExitStack() as stack:
        servers = [stack.enter_context(node.client()) for node in redis_cluster.nodes]
        hangs_up(redis_cluster.url.replace("redis://", "redis+cluster://").removesuffix("/0"), servers, unique_name)


def test_a_call_that_is_cancelled_leaves_no_reply_for_the_next(redis_url: str) -> None:
    """On an event loop redis-py itself hangs up what was cancelled between a command and its reply."""
    store: Any = RedisStore(redis_url).on("asyncio", Announcer(()))

    async def main() -> None:
        await store.prepare()
        for number in range(50):
            call = asyncio.ensure_future(store.take(request(f"key {number}")))
            for _ in range(number % 7):
                await asyncio.sleep(0)
            call.cancel()
            with suppress(asyncio.CancelledError):
                await call
            assert await store.take(request(f"other {number}")) == MarkerTaken()
        await store.close()

    asyncio.run(main())


def test_a_call_that_is_struck_before_it_connects(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no connection yet there is none to close."""
    store = RedisStore(redis_url)
    with monkeypatch.context() as patch:

        def strike(_: str) -> None:
            raise TimeLimitError

        patch.setattr(store._opener, "open", strike)
        with pytest.raises(TimeLimitError):
            run_sync(store.take(request()))
    assert run_sync(store.take(request())) == MarkerTaken()
    run_sync(store.close())
