"""The servers that are measured: named in the environment, or started here on cores of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from redis import Redis
from sqlalchemy import make_url

from benchmarks import place
from benchmarks.cores import on_cores, server_cores
from tests.services import finding
from tests.services.fixtures import pymysql_url
from tests.services.mariadb_server import MariaDBServer
from tests.services.postgres_server import PostgresServer
from tests.services.redis_server import RedisServer
from tests.services.run import Run
from tests.services.server import Server, Unavailable

STARTED: dict[place.Server, tuple[finding.Service, Callable[[Run], Server]]] = {
    "redis": (finding.REDIS, RedisServer),
    "postgres": (finding.POSTGRES, lambda run: PostgresServer(run, fsync="on")),
    "mariadb": (
        finding.MARIADB,
        lambda run: MariaDBServer(
            run, innodb_flush_log_at_trx_commit=1, innodb_monitor_enable="trx_rw_commits", innodb_log_file_size="256M"
        ),
    ),
}
"""The tests' servers, but a commit is on the disk before it is answered, which tests do not wait for."""


@contextmanager
def started(needs: Collection[place.Server]) -> Iterator[place.Place]:
    """Give those of the servers that can be had, and stop those that were started; raises `NotEmpty`."""
    run = Run.begin()
    try:
        with on_cores(server_cores()):
            urls = {name: _url(*STARTED[name], run) for name in needs}
        yield place.Place(run.folder, **urls)
    finally:
        run.end()


class NotEmpty(Exception):  # noqa: N818 - it is for a person, who gave the wrong server
    """A Redis that was named holds something, and benchmarks flush it."""


def _url(service: finding.Service, server: Callable[[Run], Server], run: Run) -> str:
    """Return the URL with the driver that blocking calls use; empty if there is no such server."""
    url = os.environ.get(service.variable, "")
    if url and service is finding.REDIS:
        _refuse_what_is_not_empty(url)
    if not url:
        try:
            url = server(run).start().url
        except Unavailable:
            return ""
    if service is finding.POSTGRES:
        return make_url(url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    return pymysql_url(url) if service is finding.MARIADB else url


def _refuse_what_is_not_empty(url: str) -> None:
    with Redis.from_url(url) as client:
        if client.dbsize():
            raise NotEmpty(
                f"the Redis of {finding.REDIS.variable} is not empty, and benchmarks flush it: name a scratch server"
            )
