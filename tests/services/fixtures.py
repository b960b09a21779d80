"""The fixtures through which tests get servers.

Shared servers, each test with a part of its own: `redis_url`, `postgres_url`, `mariadb_url`, `mysql_url`,
`rabbitmq_url`, `kafka_bootstrap`, `nats_url`, `redis_sentinel`, `redis_cluster`; and `sqlite_url`; those with tables
are in `tables.py`. What is not there is skipped, and under CI=true fails. A test that restarts, kills, pauses or
reconfigures a server starts one: `private_redis()`, `private_postgres()`, `private_mariadb()`, `private_rabbitmq()`,
`private_nats()`, `private_kafka()`; or takes `private_redis_sentinel`, `private_redis_cluster`.
"""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

import pytest
from redis import Redis
from sqlalchemy import make_url

from tests.not_run_here import NOT_RUN_HERE
from tests.services import finding
from tests.services.databases import new_database
from tests.services.kafka_server import KafkaServer
from tests.services.mariadb_server import MariaDBServer
from tests.services.nats_server import NATSServer
from tests.services.postgres_server import PostgresServer
from tests.services.rabbitmq_server import RabbitMQServer
from tests.services.redis_server import RedisCluster, RedisSentinel, RedisServer
from tests.services.run import Run
from tests.services.server import Server, Unavailable, stop_all

RUN = pytest.StashKey[Run]()

S = TypeVar("S", bound=Server)

MYSQL_VARIABLE = "IDEM_TASKS_TEST_MYSQL_URL"


# The run


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.stash[RUN] = Run(Path(config.workerinput["run_folder"]))
    else:
        config.stash[RUN] = Run.begin()


@pytest.hookimpl(optionalhook=True)  # xdist's
def pytest_configure_node(node: "WorkerController") -> None:
    node.workerinput["run_folder"] = str(node.config.stash[RUN].folder)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.stash[RUN].end()


class WorkerController(Protocol):
    workerinput: dict[str, str]
    config: pytest.Config


@pytest.fixture(scope="session")
def service_run(pytestconfig: pytest.Config) -> Run:
    """The run's folder, ports and processes."""
    return pytestconfig.stash[RUN]


@pytest.fixture(scope="session")
def worker_number(worker_id: str) -> int:
    """0, 1, .. for xdist's gw0, gw1, ..; 0 without xdist."""
    return int(worker_id.removeprefix("gw")) if worker_id.startswith("gw") else 0


@pytest.fixture
def unique_name(worker_number: int) -> str:
    """A name that no other test of any run has; letters, digits and `_`: for queues, prefixes, databases."""
    return new_name(worker_number)


def new_name(worker_number: int) -> str:
    return f"t{worker_number}_{secrets.token_hex(6)}"


def unavailable(reason: object) -> NoReturn:
    """Skip the test, or fail it where every service is promised."""
    if finding.in_ci():
        pytest.fail(str(reason), pytrace=False)
    pytest.skip(str(reason))


# Shared servers


def found(service: finding.Service, run: Run) -> finding.Found:
    try:
        return finding.find(service, run)
    except Unavailable as reason:
        unavailable(reason)


@pytest.fixture(scope="session")
def _redis_database(service_run: Run, worker_number: int) -> str:
    server = found(finding.REDIS, service_run)
    url = make_url(server.url)
    url = url.set(database=str(int(url.database or 0) + worker_number))
    database = url.render_as_string(hide_password=False)
    if not server.started_here:
        with Redis.from_url(database) as client:
            if client.dbsize():
                pytest.fail(f"{url!r} is not empty; tests would flush it: give a scratch server", pytrace=False)
    return database


@pytest.fixture
def redis_url(_redis_database: str) -> Iterator[str]:
    """`redis://…/N`: an empty database that no other test uses meanwhile."""
    with flushed(Redis.from_url(_redis_database)):
        yield _redis_database


@contextmanager
def flushed(client: Redis) -> Iterator[None]:
    with client:
        client.flushdb()
        yield
        client.flushdb()


@pytest.fixture
def postgres_url(service_run: Run, unique_name: str) -> Iterator[str]:
    """`postgresql+psycopg://…`: an empty database of this test's own."""
    server = make_url(found(finding.POSTGRES, service_run).url).set(drivername="postgresql+psycopg")
    with new_database(server.render_as_string(hide_password=False), unique_name) as url:
        yield url


@pytest.fixture
def mariadb_url(service_run: Run, unique_name: str) -> Iterator[str]:
    """`mysql+pymysql://…?charset=utf8mb4`: an empty MariaDB database of this test's own."""
    with new_database(pymysql_url(found(finding.MARIADB, service_run).url), unique_name) as url:
        yield url


@pytest.fixture
def mysql_url(unique_name: str) -> Iterator[str]:
    """`mysql+pymysql://…?charset=utf8mb4`: an empty MySQL database of this test's own."""
    server = os.environ.get(MYSQL_VARIABLE)
    if server is None:
        pytest.skip(NOT_RUN_HERE["mysql"])
    with new_database(pymysql_url(server), unique_name) as url:
        yield url


def pymysql_url(url: str) -> str:
    changed = make_url(url).set(drivername="mysql+pymysql").update_query_dict({"charset": "utf8mb4"})
    return changed.render_as_string(hide_password=False)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """`sqlite:///…`: a file of this test's own, not yet made."""
    return f"sqlite:///{tmp_path / 'records.db'}"


@pytest.fixture
def rabbitmq_url(service_run: Run, worker_number: int) -> str:
    """`amqp://…/vhost`: a virtual host that no other test uses meanwhile.

    Queues of earlier tests can be left in it, and a server named by the environment has only the one virtual host
    of its URL: take `unique_name` for queues and exchanges.
    """
    server = found(finding.RABBITMQ, service_run)
    if not server.started_here:
        return server.url
    return server.url.removesuffix("0") + str(worker_number)


@pytest.fixture
def nats_url(service_run: Run) -> str:
    """`nats://…`: a server with JetStream that other tests use too; take `unique_name` for streams and subjects."""
    return found(finding.NATS, service_run).url


@pytest.fixture(scope="session")
def kafka_bootstrap(service_run: Run) -> str:
    """`host:port` of a Kafka that all tests share: take `unique_name` for topics and groups.

    It is librdkafka's mock cluster, unless KAFKA_BOOTSTRAP names a real one: `docker compose up kafka`.
    """
    return found(finding.KAFKA, service_run).url


@pytest.fixture(scope="session")
def _redis_sentinel(service_run: Run) -> Iterator[RedisSentinel]:
    require(RedisServer, service_run)
    servers = RedisSentinel(service_run)
    yield servers
    servers.remove()


@pytest.fixture
def redis_sentinel(_redis_sentinel: RedisSentinel) -> Iterator[RedisSentinel]:
    """An empty primary and its replica under a Sentinel: `.sentinels`, `.primary_name`, `.primary`, `.replica`."""
    with flushed(_redis_sentinel.primary.client()):
        yield _redis_sentinel


@pytest.fixture(scope="session")
def _redis_cluster(service_run: Run) -> Iterator[RedisCluster]:
    require(RedisServer, service_run)
    servers = RedisCluster(service_run)
    yield servers
    servers.remove()


@pytest.fixture
def redis_cluster(_redis_cluster: RedisCluster) -> Iterator[RedisCluster]:
    """An empty cluster of three nodes: `.url` is that of the first, `.nodes` are all."""
    with ExitStack() as stack:
        for node in _redis_cluster.nodes:
            stack.enter_context(flushed(node.client()))
        yield _redis_cluster


# Servers of a test's own


def require(server: type[Server], run: Run) -> None:
    try:
        finding.require_program(server, run)
    except Unavailable as reason:
        unavailable(reason)


@contextmanager
def private(server: type[S], run: Run) -> Iterator[Callable[..., S]]:
    require(server, run)
    started: list[S] = []

    def start(**options: str | int) -> S:
        started.append(server(run, **options))
        return started[-1].start()

    yield start
    stop_all(started)


@pytest.fixture
def private_redis(service_run: Run) -> Iterator[Callable[..., RedisServer]]:
    """`private_redis(maxmemory="2mb")` starts a Redis, with lines of redis.conf, for this test alone."""
    with private(RedisServer, service_run) as start:
        yield start


@pytest.fixture
def private_redis_sentinel(service_run: Run) -> Iterator[RedisSentinel]:
    """As `redis_sentinel`, for this test alone."""
    require(RedisServer, service_run)
    servers = RedisSentinel(service_run)
    yield servers
    servers.remove()


@pytest.fixture
def private_redis_cluster(service_run: Run) -> Iterator[RedisCluster]:
    """As `redis_cluster`, for this test alone."""
    require(RedisServer, service_run)
    servers = RedisCluster(service_run)
    yield servers
    servers.remove()


@pytest.fixture
def private_postgres(service_run: Run) -> Iterator[Callable[..., PostgresServer]]:
    """`private_postgres(max_connections=10)` starts a PostgreSQL for this test alone."""
    with private(PostgresServer, service_run) as start:
        yield start


@pytest.fixture
def private_mariadb(service_run: Run) -> Iterator[Callable[..., MariaDBServer]]:
    """`private_mariadb(max_connections=10)` starts a MariaDB for this test alone."""
    with private(MariaDBServer, service_run) as start:
        yield start


@pytest.fixture
def private_rabbitmq(service_run: Run) -> Iterator[Callable[..., RabbitMQServer]]:
    """`private_rabbitmq(heartbeat=2)` starts a RabbitMQ, with lines of rabbitmq.conf; it takes 10 s."""
    with private(RabbitMQServer, service_run) as start:
        yield start


@pytest.fixture
def private_nats(service_run: Run) -> Iterator[Callable[..., NATSServer]]:
    """`private_nats(max_payload="64KB")` starts a NATS, with lines of its configuration, for this test alone."""
    with private(NATSServer, service_run) as start:
        yield start


@pytest.fixture
def private_kafka(service_run: Run) -> Iterator[Callable[..., KafkaServer]]:
    """`private_kafka()` starts a mock cluster for this test alone; it forgets its topics when it ends."""
    with private(KafkaServer, service_run) as start:
        yield start
