"""Whatever Redis refuses is a clear error that names the fix and shows no password."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis import Redis, exceptions

from idem_tasks.claims import ClaimRequest, EncodedOutcome, Finished, Granted, Lease, Release, new_owner
from idem_tasks.errors import ConfigurationError, IdemTasksError, StoreError, StoreUnavailableError
from idem_tasks.policy import Policy
from idem_tasks.runtime import run_sync
from idem_tasks.stores.base import MarkerPending, MarkerTaken
from idem_tasks.stores.marker import place
from idem_tasks.stores.redis import RedisStore
from tests.integration.redis_proxy import proxy
from tests.services.redis_server import RedisServer

DONE = EncodedOutcome(body=b'"done"', codec="json")
SECRET = "pa55w0rd-canary"

Start = Callable[..., RedisServer]


def request(key: str = "key") -> ClaimRequest:
    return ClaimRequest("scope", key, None, new_owner(), Policy())


@pytest.fixture
def store() -> Iterator[Callable[..., RedisStore]]:
    """Makes stores, and closes them."""
    made: list[RedisStore] = []

    def make(url: str, **options: Any) -> RedisStore:
        made.append(RedisStore(url, **options))
        return made[-1]

    yield make
    for each in made:
        run_sync(each.close())


Make = Callable[..., RedisStore]


def error_of(store: RedisStore) -> IdemTasksError:
    """Return what a first take raises; its client's own error is its cause, and it shows no password."""
    with pytest.raises((StoreError, ConfigurationError)) as caught:
        run_sync(store.take(request()))
    assert isinstance(caught.value.__cause__, exceptions.RedisError)
    assert SECRET not in f"{caught.value} {caught.value.__cause__} {store!r}"
    return caught.value


def test_a_wrong_password(private_redis: Start, store: Make) -> None:
    """A refused password is a mistake in the URL; which one, is not shown."""
    server = private_redis(requirepass="right")
    error = error_of(store(f"redis://:{SECRET}@127.0.0.1:{server.port}/0"))
    assert isinstance(error, ConfigurationError)
    assert "refuses the user name or password" in str(error)
    run_sync(store(f"redis://:right@127.0.0.1:{server.port}/0").take(request()))


def test_a_missing_password(private_redis: Start, store: Make) -> None:
    """A server that asks for a password names where to write it."""
    error = error_of(store(private_redis(requirepass=SECRET).url))
    assert isinstance(error, ConfigurationError)
    assert "password" in str(error)


def test_a_password_that_nobody_asked_for(private_redis: Start, store: Make) -> None:
    """A server without passwords refuses one."""
    error = error_of(store(f"redis://:{SECRET}@127.0.0.1:{private_redis().port}/0"))
    assert isinstance(error, ConfigurationError)


def test_a_password_that_is_changed_later_is_no_configuration_error(private_redis: Start, store: Make) -> None:
    """What worked once was set up well: messages are not to be failed for it, but delivered again."""
    server = private_redis(requirepass="right")
    changed = store(f"redis://:right@127.0.0.1:{server.port}/0")
    run_sync(changed.take(request("before")))
    with server.client() as client:
        client.config_set("requirepass", SECRET)
        client.client_kill_filter(_type="normal", skipme=True)
    error = error_of(changed)
    assert type(error) is StoreError
    assert "password" in str(error)


def test_a_database_that_is_not_there(private_redis: Start, store: Make) -> None:
    """A number above what the server has is a mistake in the URL."""
    server = private_redis(databases=2)
    error = error_of(store(f"redis://127.0.0.1:{server.port}/7"))
    assert isinstance(error, ConfigurationError)
    assert "has no database of this number" in str(error)


def test_nobody_listens(service_run: Any, store: Make) -> None:
    """A server that is not there is unavailable: it may come back."""
    error = error_of(store(f"redis://:{SECRET}@127.0.0.1:{service_run.free_port()}/0"))
    assert isinstance(error, StoreUnavailableError)
    assert "cannot be reached" in str(error)


def test_a_host_that_does_not_exist(store: Make) -> None:
    """A name that nobody knows is unavailable, and the message asks for host and port."""
    error = error_of(store("redis://no-such-host.invalid:6379/0"))
    assert isinstance(error, StoreUnavailableError)
    assert "are host and port of the URL right" in str(error)


def test_a_read_only_replica(private_redis: Start, store: Make) -> None:
    """A replica does not write: unavailable, because a failover ends that; the message names both fixes."""
    replica = private_redis(replicaof=f"127.0.0.1 {private_redis().port}")
    error = error_of(store(replica.url))
    assert isinstance(error, StoreUnavailableError)
    assert "read-only replica" in str(error)


def test_out_of_memory(private_redis: Start, store: Make) -> None:
    """A full Redis answers with an error that names maxmemory, before any effect; what it holds it still gives back."""
    server = private_redis(maxmemory_policy="noeviction")
    full = store(server.url)
    held = request("held")
    run_sync(full.take(held))
    granted = run_sync(full.claim(request("claimed")))
    assert isinstance(granted, Granted)
    with server.client() as client:
        client.config_set("maxmemory", "100kb")
    for answer in (
        full.take(request()),
        full.claim(request()),
        full.publish(held, Finished(DONE, None, 60.0), 60.0),
        full.keep(Lease(held, 1), DONE),
        full.finish(granted.lease, DONE),
    ):
        with pytest.raises(StoreError, match=r"out of memory.*maxmemory") as caught:
            run_sync(answer)
        assert not isinstance(caught.value, StoreUnavailableError)
    run_sync(full.give_back("scope", "held", held.owner))
    with server.client() as client:
        assert not client.exists(place(b"idem:m:", "scope", "held"))


def test_still_loading(private_redis: Start, store: Make) -> None:
    """A Redis that loads its data is unavailable until it has."""
    server = private_redis(key_load_delay=1000, loading_process_events_interval_bytes=1024)
    with server.client() as client:
        pipeline = client.pipeline()
        for number in range(3000):
            pipeline.set(f"key {number}", "x" * 100, ex=3600)
        pipeline.execute()
        client.save()
    server.stop()
    server.process = server.launch(server.command())
    answers = []
    for _ in range(400):
        if not server.is_running:
            pytest.fail(server.log_end())
        try:
            run_sync(store(server.url).take(request()))
        except StoreUnavailableError as error:
            answers.append(str(error))
        if answers and "is loading its data" in answers[-1]:
            return
        threading.Event().wait(0.02)
    pytest.fail(f"never seen loading: {answers[-3:]}")


def test_busy_with_a_script(private_redis: Start, store: Make) -> None:
    """A Redis that runs somebody's endless script says so once it answers anything at all."""
    server = private_redis(busy_reply_threshold=50)
    busy = store(server.url, socket_timeout=5)
    run_sync(busy.take(request("before")))

    def run_for_ever() -> None:
        with server.client() as client, pytest.raises(exceptions.RedisError):
            client.eval("while true do end", 0)

    script = threading.Thread(target=run_for_ever)
    script.start()
    with server.client() as client:
        for _ in range(200):
            try:
                client.ping()
            except exceptions.ResponseError:
                break
            threading.Event().wait(0.02)
        error = error_of(busy)
        client.script_kill()
    script.join()
    assert type(error) is StoreError
    assert "SCRIPT KILL" in str(error)


def test_a_pool_that_is_empty_is_no_outage(redis_url: str, store: Make) -> None:
    """Too few connections for the threads that want one say so, and keep no other call from its try."""
    small = store(redis_url + "?max_connections=1")
    run_sync(small.prepare())
    (pool,) = [client.redis.connection_pool for client in small._connection._by_process.values()]
    busy = pool.get_connection()
    assert "raise max_connections" in str(error_of(small))
    pool.release(busy)
    run_sync(small.take(request()))


def test_a_key_of_another_type(redis_url: str, store: Make) -> None:
    """A foreign key in a marker's place is an error: the record decides, nothing is guessed."""
    with Redis.from_url(redis_url) as client:
        client.rpush(place(b"idem:m:", "scope", "key"), "a", "b")
        client.set(place(b"idem:r:", "scope", "key"), "a")
    foreign = store(redis_url)
    for answer in (foreign.take(request()), foreign.claim(request())):
        with pytest.raises(StoreError, match="prefix that nothing else uses"):
            run_sync(answer)


@pytest.mark.parametrize(
    "value", [b"", b"finished:", b"finished:\xc1", b"finished:\x90", b"pending:o:", b"hello", b"\xff:x"]
)
def test_an_unreadable_marker(redis_url: str, store: Make, value: bytes) -> None:
    """What no version of ours wrote is an error: the record decides, nothing is guessed, nothing is deleted."""
    key = place(b"idem:m:", "scope", "key")
    unreadable = store(redis_url)
    with Redis.from_url(redis_url) as client:
        client.set(key, value, px=60_000)
        with pytest.raises(StoreError, match="no marker that this version can read"):
            run_sync(unreadable.take(request()))
        assert client.get(key) == value


def test_a_marker_that_never_expires(redis_url: str, store: Make) -> None:
    """A running marker without a time to live, which none of ours is, does not block its key for ever (F33)."""
    held = store(redis_url)
    run_sync(held.take(request()))
    with Redis.from_url(redis_url) as client:
        client.persist(place(b"idem:m:", "scope", "key"))
    with pytest.raises(StoreError, match="never expires"):
        run_sync(held.take(request()))


def test_a_batch_leaves_what_it_cannot_read(redis_url: str, store: Make) -> None:
    """To a verb of its own, which says what is wrong there; all others of the batch are answered."""
    some = store(redis_url)
    asked = [ClaimRequest("scope", key, None, new_owner(), Policy()) for key in ("endless", "foreign", "free")]
    run_sync(some.take(ClaimRequest("scope", "endless", None, new_owner(), Policy())))
    with Redis.from_url(redis_url) as client:
        client.persist(place(b"idem:m:", "scope", "endless"))
        client.set(place(b"idem:m:", "scope", "foreign"), b"hello", px=60_000)
        client.hset(place(b"idem:r:", "scope", "foreign"), "hello", "you")
    assert run_sync(some.take_batch(asked)) == [None, None, MarkerTaken()]
    answers = run_sync(some.claim_batch(asked))
    assert [type(answer) for answer in answers] == [Granted, type(None), Granted]


def test_a_cluster_node_wants_its_own_scheme(redis_cluster: Any, store: Make) -> None:
    """redis:// to a cluster's node says which scheme to use, at the latest with a key of another node's."""
    single = store(redis_cluster.url)
    refused = []
    for number in range(100):
        try:
            run_sync(single.take(request(f"key {number}")))
        except (ConfigurationError, StoreError) as error:
            refused.append(str(error))
    assert refused
    assert {"redis+cluster://" in error for error in refused} == {True}, refused


def test_a_single_server_is_no_cluster(redis_url: str, store: Make) -> None:
    """redis+cluster:// to a server without clustering says which scheme to use."""
    with pytest.raises(ConfigurationError, match="use redis:// instead"):
        run_sync(store(redis_url.replace("redis://", "redis+cluster://").rpartition("/")[0]).take(request()))


def test_a_server_that_is_no_redis(private_redis: Start, store: Make) -> None:
    """Something that does not speak the protocol is an error, not a wait."""
    with proxy(private_redis().port, lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n") as url:
        error_of(store(url))


MARKER_RULES = "~idem:* +set +get +del +pttl +pexpire +eval"
STORE_RULES = f"{MARKER_RULES} +hget +hmget +hgetall +hset +hdel +time +scan"


def grant(server: RedisServer, rules: str) -> str:
    """Make a user with these rights alone, and return its URL."""
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "worker", "reset", "on", f">{SECRET}", *rules.split())
    return f"redis://worker:{SECRET}@127.0.0.1:{server.port}/0"


def test_the_rights_that_markers_need(private_redis: Start, store: Make) -> None:
    """A user with `~idem:* +set +get +del +pttl +pexpire +eval` can do all a marker tier does, and nothing else."""
    url = grant(private_redis(), MARKER_RULES)
    marker = store(url)
    lease = Lease(request(), 1)
    assert run_sync(marker.take(lease.request)) == MarkerTaken()
    run_sync(marker.take(request()))
    run_sync(marker.renew_markers([lease]))
    run_sync(marker.keep(lease, DONE))
    pending = run_sync(marker.take(request()))
    assert isinstance(pending, MarkerPending)
    run_sync(marker.publish(lease.request, Finished(DONE, None, 60.0), 60.0))
    run_sync(marker.drop_pending("scope", "key", pending))
    run_sync(marker.give_back("scope", "key", lease.owner))
    run_sync(marker.drop([("scope", "key")]))
    with Redis.from_url(url) as client:
        for command in (
            ("FLUSHALL",),
            ("GET", "foreign"),
            ("KEYS", "*"),
            ("CONFIG", "GET", "*"),
            ("HGETALL", "idem:x"),
        ):
            with pytest.raises(exceptions.NoPermissionError):
                client.execute_command(*command)


def test_the_rights_that_records_need(private_redis: Start, store: Make) -> None:
    """As a whole store the user needs `+hget +hmget +hgetall +hset +hdel +time +scan` besides."""
    records = store(grant(private_redis(), STORE_RULES))
    run_sync(records.prepare())
    granted = run_sync(records.claim(request()))
    assert isinstance(granted, Granted)
    assert run_sync(records.renew([granted.lease], lambda _: True)) == {granted.lease.owner}
    run_sync(records.release(granted.lease, Release(in_doubt=True, error_type="E")))
    run_sync(records.resolve("scope", "key", None))
    again = run_sync(records.claim(request()))
    assert isinstance(again, Granted)
    run_sync(records.finish(again.lease, DONE))
    assert run_sync(records.get("scope", "key"))
    assert len(run_sync(records.records(state=None, scope=None, after=None, limit=10))) == 1
    assert sum(run_sync(records.stats()).values()) == 1
    assert run_sync(records.forget("scope", "key"))
    run_sync(records.finish(again.lease, DONE, may_insert=True))


@pytest.mark.parametrize(
    "rules", ["~other:* +@all", "~idem:* +set +get +del +pttl +pexpire", "~idem:* +get +del +pttl +pexpire +eval"]
)
def test_a_right_that_is_missing(private_redis: Start, store: Make, rules: str) -> None:
    """A user without a right is told the whole list at the first call, before any effect."""
    error = error_of(store(grant(private_redis(), rules)))
    assert isinstance(error, ConfigurationError)
    assert MARKER_RULES.removeprefix("~idem:* ") in str(error)
