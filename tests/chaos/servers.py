"""The servers of a run, all of its own, and how workers reach them: through proxies.

Two shops: one on RabbitMQ with Redis and PostgreSQL, one on Redis with a Redis behind a Sentinel and MariaDB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import pymysql
from redis.exceptions import RedisError

from tests.chaos.proxy import Proxies, Proxy
from tests.services.mariadb_server import MariaDBServer
from tests.services.postgres_server import PostgresServer
from tests.services.rabbitmq_server import RabbitMQServer
from tests.services.redis_server import RedisServer, SentinelServer
from tests.services.run import Run
from tests.services.server import Server
from tests.services.waiting import wait_until

T = TypeVar("T")

SERVERS: tuple[type[Server], ...] = (RabbitMQServer, RedisServer, PostgresServer, MariaDBServer)

SECONDS_TO_FAIL_OVER = 40.0


class Markers(Protocol):
    """The Redis that holds a shop's markers."""

    @property
    def url(self) -> str:
        """As workers reach it."""
        ...

    @property
    def proxies(self) -> Sequence[Proxy]:
        """Of each node."""
        ...

    def primary(self) -> int:
        """Which of the nodes holds the markers now."""
        ...

    def node(self, number: int) -> RedisServer: ...

    def settle(self) -> None:
        """Return when it is whole again."""
        ...


class SingleRedis:
    """One Redis, without persistence."""

    def __init__(self, run: Run, proxies: Proxies) -> None:
        self._server = RedisServer(run).start()
        self.proxies = (proxies.to(self._server.port),)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.proxies[0].port}/0"

    def primary(self) -> int:
        return 0

    def node(self, number: int) -> RedisServer:
        return self._server

    def settle(self) -> None:
        wait_until(self._server.answers, seconds=10, what="Redis to answer")


class ReplicatedRedis:
    """A primary and its replica, which know each other and are known to their Sentinel by their proxies."""

    SERVICE = "idem"

    def __init__(self, run: Run, proxies: Proxies) -> None:
        self._nodes = (RedisServer(run, repl_diskless_sync_delay=0), RedisServer(run, repl_diskless_sync_delay=0))
        self.proxies = tuple(proxies.to(node.port) for node in self._nodes)
        for node, proxy in zip(self._nodes, self.proxies, strict=True):
            node.options |= {"replica_announce_ip": "127.0.0.1", "replica_announce_port": proxy.port}
        self._nodes[0].start()
        self._nodes[1].options["replicaof"] = f"127.0.0.1 {self.proxies[0].port}"
        self._nodes[1].start()
        self._sentinel = SentinelOfProxy(run, self._nodes[0], self.SERVICE)
        self._sentinel.proxy = self.proxies[0]
        self._sentinel.start()
        self.settle()

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self._sentinel.port}/{self.SERVICE}/0"

    def primary(self) -> int:
        with self._sentinel.client() as client:
            _host, port = client.sentinel_get_master_addr_by_name(self.SERVICE)
        return [proxy.port for proxy in self.proxies].index(int(port))

    def node(self, number: int) -> RedisServer:
        return self._nodes[number]

    def settle(self) -> None:
        """Return when there is one primary, with the other as its replica, and the Sentinel knows."""
        wait_until(self._is_whole, seconds=SECONDS_TO_FAIL_OVER, what="the primary to have its replica")

    def detach_replica(self, primary: int) -> None:
        """From now on what the primary is told is known to it alone."""
        with self.node(1 - primary).client() as client:
            client.replicaof("127.0.0.1", "1")

    def fail_over_from(self, dead: int) -> None:
        """Return when the Sentinel has made the other node the primary."""
        wait_until(lambda: self.primary() != dead, seconds=SECONDS_TO_FAIL_OVER, what="the failover")

    def attach_replica(self, number: int) -> None:
        """Sooner than the Sentinel would do it by itself."""
        with self.node(number).client() as client:
            client.replicaof("127.0.0.1", str(self.proxies[1 - number].port))

    def _is_whole(self) -> bool:
        try:
            primary = self.primary()
            with self.node(primary).client() as first, self.node(1 - primary).client() as second:
                says = second.info("replication")
                is_linked = says["role"] == "slave" and says["master_link_status"] == "up"
                is_primary = first.info("replication")["role"] == "master"
            with self._sentinel.client() as client:
                [replica] = client.sentinel_slaves(self.SERVICE)
        except (RedisError, ValueError, KeyError):
            return False
        return is_linked and is_primary and not replica["is_disconnected"] and not replica["is_sdown"]


class SentinelOfProxy(SentinelServer):
    """A Sentinel that hears the primary through its proxy, and tells clients to do so too."""

    proxy: Proxy

    def prepare(self) -> None:
        super().prepare()
        config = self.folder / "redis.conf"
        config.write_text(config.read_text().replace(f" {self.primary.port} ", f" {self.proxy.port} "))


@dataclass
class Database:
    """The SQL server of a shop's records."""

    server: PostgresServer | MariaDBServer
    proxy: Proxy
    url: str
    direct_url: str
    engine_options: dict[str, Any]
    """For the engine of the shop's own sessions."""


def new_postgres(run: Run, proxies: Proxies) -> Database:
    server = PostgresServer(run).start()
    proxy = proxies.to(server.port)
    return Database(server, proxy, server.url.replace(f":{server.port}/", f":{proxy.port}/"), server.url, {})


def new_mariadb(run: Run, proxies: Proxies) -> Database:
    # At 0, the default of the tests, a killed server forgets what it committed in its last second.
    server = MariaDBServer(run, innodb_flush_log_at_trx_commit=2).start()
    with closing(pymysql.connect(host="127.0.0.1", port=server.port, user="root", autocommit=True)) as connection:
        connection.cursor().execute("CREATE DATABASE shop CHARACTER SET utf8mb4")
    proxy = proxies.to(server.port)
    url = "mysql+pymysql://root@127.0.0.1:{}/shop?charset=utf8mb4"
    # MariaDB's default, REPEATABLE READ, would refuse the finish of a handler whose claim was renewed meanwhile.
    options = {"isolation_level": "READ COMMITTED"}
    return Database(server, proxy, url.format(proxy.port), url.format(server.port), options)


@dataclass
class Broker:
    """Where a shop's messages wait; it is never restarted, and the publisher reaches it directly."""

    server: RabbitMQServer | RedisServer
    proxy: Proxy
    url: str
    direct_url: str


def new_rabbitmq(run: Run, proxies: Proxies) -> Broker:
    server = RabbitMQServer(run).start()
    proxy = proxies.to(server.port)
    return Broker(server, proxy, server.url.replace(f":{server.port}/", f":{proxy.port}/"), server.url)


def new_redis_broker(run: Run, proxies: Proxies) -> Broker:
    server = RedisServer(run).start()
    proxy = proxies.to(server.port)
    return Broker(server, proxy, f"redis://127.0.0.1:{proxy.port}/0", server.url)


@dataclass
class Premises:
    """All servers of one shop."""

    name: str
    broker: Broker
    markers: Markers
    database: Database


@dataclass
class Servers:
    """All servers of a run."""

    ledger: PostgresServer
    premises: tuple[Premises, ...]


def start_servers(run: Run, proxies: Proxies) -> Servers:
    """Start them all, at once."""
    with ThreadPoolExecutor() as pool:

        def started(make: Callable[[Run, Proxies], T]) -> Future[T]:
            return pool.submit(make, run, proxies)

        ledger = pool.submit(lambda: PostgresServer(run).start())
        first = started(new_rabbitmq), started(SingleRedis), started(new_postgres)
        second = started(new_redis_broker), started(ReplicatedRedis), started(new_mariadb)
        return Servers(
            ledger.result(),
            (
                Premises("rabbitmq+postgresql", first[0].result(), first[1].result(), first[2].result()),
                Premises("redis+mariadb", second[0].result(), second[1].result(), second[2].result()),
            ),
        )
