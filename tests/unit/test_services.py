"""The test servers themselves: each fixture gives something that a client can really use."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import nats
import psutil
import psycopg
import pymysql
import pytest
from kombu import Connection
from redis import Redis, RedisCluster as RedisClusterClient
from redis.exceptions import ConnectionError as RedisConnectionError, TimeoutError as RedisTimeoutError
from redis.sentinel import Sentinel
from sqlalchemy import create_engine, make_url, text

from tests.services.finding import REPOSITORY
from tests.services.nats_server import NATSServer
from tests.services.postgres_server import PostgresServer
from tests.services.redis_server import RedisCluster, RedisSentinel, RedisServer
from tests.services.run import Run
from tests.services.waiting import wait_until


@pytest.mark.parametrize("time", ["first", "second"])
def test_each_test_gets_an_empty_redis_database(redis_url: str, time: str) -> None:
    """What one test writes, the next does not see."""
    with Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("left behind", time)


@pytest.mark.parametrize("fixture", ["sqlite_url", "postgres_url", "mariadb_url", "mysql_url"])
@pytest.mark.parametrize("time", ["first", "second"])
def test_each_test_gets_an_empty_database(fixture: str, time: str, request: pytest.FixtureRequest) -> None:
    """A table that one test makes, the next does not see."""
    engine = create_engine(request.getfixturevalue(fixture))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE left_behind (word VARCHAR(20))"))
        connection.execute(text("INSERT INTO left_behind VALUES (:word)"), {"word": f"{time} 🎉"})
        assert connection.scalar(text("SELECT word FROM left_behind")) == f"{time} 🎉"
    engine.dispose()


@pytest.fixture
def still_open() -> Iterator[ExitStack]:
    """Named before a database, it is closed after the database is dropped."""
    with ExitStack() as stack:
        yield stack


def test_a_database_goes_although_a_client_is_still_in_it(
    still_open: ExitStack, postgres_url: str, mariadb_url: str
) -> None:
    """A test that fails in mid-transaction does not block the next one."""
    postgres = make_url(postgres_url)
    client = psycopg.connect(host=postgres.host, port=postgres.port, user=postgres.username, dbname=postgres.database)
    still_open.enter_context(closing(client))
    client.execute("CREATE TABLE held (word VARCHAR(20))")
    mariadb = make_url(mariadb_url)
    other = pymysql.connect(host=mariadb.host, port=mariadb.port, user=mariadb.username, database=mariadb.database)
    still_open.enter_context(closing(other))
    with other.cursor() as cursor:
        cursor.execute("CREATE TABLE held (word VARCHAR(20))")
        cursor.execute("SELECT * FROM held")


def test_rabbitmq_carries_a_message(rabbitmq_url: str, unique_name: str) -> None:
    """A message that was published to the test's virtual host comes out again."""
    with Connection(rabbitmq_url) as connection:
        queue = connection.SimpleQueue(unique_name)
        queue.put("hello")
        message = queue.get(timeout=10)
        message.ack()
        queue.close()
    assert message.payload == "hello"


@pytest.mark.asyncio
async def test_nats_keeps_a_message(private_nats: Callable[..., NATSServer], unique_name: str) -> None:
    """What a stream acknowledged is there after the server was killed."""
    server = private_nats()
    client = await nats.connect(server.url)
    await client.jetstream().add_stream(name=unique_name, subjects=[f"{unique_name}.*"])
    await client.jetstream().publish(f"{unique_name}.a", b"hello")
    await client.close()
    server.kill()
    server.start()
    client = await nats.connect(server.url)
    assert (await client.jetstream().get_msg(unique_name, 1)).data == b"hello"
    await client.close()


@pytest.mark.parametrize("time", ["first", "second"])
@pytest.mark.asyncio
async def test_nats_has_jetstream(nats_url: str, unique_name: str, time: str) -> None:
    """The shared server keeps streams too."""
    client = await nats.connect(nats_url)
    added = await client.jetstream().add_stream(name=unique_name, subjects=[unique_name])
    assert added.state.messages == 0
    await client.jetstream().delete_stream(unique_name)
    await client.close()


def test_sentinel_names_the_primary(redis_sentinel: RedisSentinel) -> None:
    """A client that knows only the sentinel finds the primary."""
    sentinel = Sentinel(redis_sentinel.sentinels)
    assert sentinel.discover_master(redis_sentinel.primary_name) == ("127.0.0.1", redis_sentinel.primary.port)
    for client in sentinel.sentinels:
        client.close()


def test_sentinel_fails_over(private_redis_sentinel: RedisSentinel) -> None:
    """When the primary is killed the replica takes its place."""
    servers = private_redis_sentinel
    servers.primary.kill()
    with servers.sentinel.client() as sentinel:
        wait_until(
            lambda: sentinel.sentinel_get_master_addr_by_name(servers.primary_name)[1] == servers.replica.port,
            seconds=20,
            what="the failover",
        )


def test_cluster_spreads_keys_over_its_nodes(redis_cluster: RedisCluster) -> None:
    """Keys of different slots land on different nodes, through one client."""
    with RedisClusterClient.from_url(redis_cluster.url) as client:
        for number in range(30):
            client.set(f"key-{number}", number, ex=60)
        assert client.get("key-7") == b"7"
    for node in redis_cluster.nodes:
        with node.client() as client:
            assert client.dbsize() > 0


def test_a_private_redis_can_hang_crash_and_come_back(private_redis: Callable[..., RedisServer]) -> None:
    """Paused it does not answer, killed it refuses, restarted it has what it wrote to disk."""
    server = private_redis(appendonly="yes", appendfsync="always")
    with Redis.from_url(server.url, socket_timeout=0.2) as client:
        client.set("kept", "yes", ex=60)
        server.pause()
        with pytest.raises(RedisTimeoutError):
            client.get("kept")
        server.resume()
        assert client.get("kept") == b"yes"
        server.kill()
        assert not server.is_running
        with pytest.raises(RedisConnectionError):
            client.get("kept")
        server.start()
        assert client.get("kept") == b"yes"


def test_a_private_postgres_survives_a_crash(private_postgres: Callable[..., PostgresServer]) -> None:
    """What was committed before a SIGKILL is there after the next start."""
    server = private_postgres(max_connections=20)
    address = server.url.replace("+psycopg", "")
    with psycopg.connect(address) as connection:
        assert connection.execute("SHOW max_connections").fetchone() == ("20",)
        connection.execute("CREATE TABLE kept AS SELECT 1 AS number")
    server.kill()
    server.start()
    with psycopg.connect(address) as connection:
        assert connection.execute("SELECT number FROM kept").fetchone() == (1,)


def test_the_end_of_a_run_stops_its_servers_and_removes_its_folder() -> None:
    """Even a server that hangs."""
    run = Run.begin()
    server = RedisServer(run).start()
    server.pause()
    run.end()
    assert not server.is_running
    assert not run.folder.exists()


KILLED_RUN = """
import os, signal
from tests.services.redis_server import RedisServer
from tests.services.run import Run

run = Run.begin()
server = RedisServer(run).start()
print(server.process.pid, run.folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_nothing_behind() -> None:
    """After a SIGKILL of the tests their servers stop all the same."""
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_RUN], cwd=REPOSITORY, check=False, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    pid, folder = killed.stdout.split()
    wait_until(lambda: not Path(folder).exists(), seconds=10, what="the folder to go")
    wait_until(lambda: not psutil.pid_exists(int(pid)), seconds=10, what="the server to go")
