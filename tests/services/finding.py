"""Where a server that the tests share comes from: the environment, this machine, containers, or Debian's packages."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.services import compose
from tests.services.kafka_server import KafkaServer
from tests.services.mariadb_server import MariaDBServer
from tests.services.nats_server import NATSServer
from tests.services.postgres_server import PostgresServer
from tests.services.rabbitmq_server import RabbitMQServer
from tests.services.redis_server import RedisServer
from tests.services.run import Run
from tests.services.server import Server, Unavailable

REPOSITORY = Path(__file__).parents[2]


def in_ci() -> bool:
    return os.environ.get("CI") == "true"


@dataclass(frozen=True)
class Service:
    name: str  # in docker-compose.yml too
    variable: str  # names a scratch server in the environment
    server: type[Server]


REDIS = Service("redis", "IDEM_TASKS_TEST_REDIS_URL", RedisServer)
POSTGRES = Service("postgres", "IDEM_TASKS_TEST_POSTGRES_URL", PostgresServer)
MARIADB = Service("mariadb", "IDEM_TASKS_TEST_MARIADB_URL", MariaDBServer)
KAFKA = Service("kafka", "KAFKA_BOOTSTRAP", KafkaServer)
RABBITMQ = Service("rabbitmq", "IDEM_TASKS_TEST_RABBITMQ_URL", RabbitMQServer)
NATS = Service("nats", "IDEM_TASKS_TEST_NATS_URL", NATSServer)


@dataclass(frozen=True)
class Found:
    url: str
    started_here: bool  # by this run, from a program on this machine: nobody else uses it


def find(service: Service, run: Run) -> Found:
    """The server that all tests of the run share, started now if nobody has needed it yet; else Unavailable."""
    if url := os.environ.get(service.variable):
        return Found(url, started_here=False)
    found = json.loads(run.once(service.name, lambda: json.dumps(_found_or_started(service, run))))
    if "unavailable" in found:
        raise Unavailable(found["unavailable"])
    return Found(**found)


def require_program(server: type[Server], run: Run) -> None:
    """See to it that this machine can start such a server; else Unavailable."""
    try:
        server.find()
    except Unavailable:
        if not _may_install():
            raise
        run.once("packages", _install_packages)
        server.find()


def _found_or_started(service: Service, run: Run) -> dict[str, str | bool]:
    try:
        require_program(service.server, run)
    except Unavailable as reason:
        if compose.engine_answers():
            return {"url": compose.up(service.name, run.folder), "started_here": False}
        return {"unavailable": f"{reason}, or name one with {service.variable}"}
    return {"url": service.server(run).start().url, "started_here": True}


def _may_install() -> bool:
    return in_ci() and os.geteuid() == 0 and shutil.which("apt-get") is not None


def _install_packages() -> str:
    subprocess.run(["sh", "scripts/services", "packages"], cwd=REPOSITORY, check=True, timeout=600)
    return "installed"
