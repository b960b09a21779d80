"""Where a case keeps its records: URLs of an empty Redis, of new databases, and of a file."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import psycopg
import pymysql
from redis import Redis
from sqlalchemy import make_url

from tests.integration.sql_proxy import Proxy
from tests.services.databases import new_database

Server = Literal["redis", "postgres", "mariadb"]


@dataclass(frozen=True)
class Place:
    """Where a case keeps its records; a server that is not there has an empty URL."""

    folder: Path
    redis: str = ""
    postgres: str = ""
    mariadb: str = ""
    redis_uncounted: str = ""
    """The same Redis, for what is not of the call: past the proxy that counts."""

    @property
    def sqlite(self) -> str:
        """The URL of a file in the folder."""
        return f"sqlite:///{self.folder / 'records.db'}"


@contextmanager
def new_place(servers: Place, needs: Collection[Server]) -> Iterator[Place]:
    """Give a place with a new database on each server that is needed, and remove all that was made in it."""
    with ExitStack() as stack:
        name = f"b_{secrets.token_hex(6)}"
        postgres, mariadb = (
            stack.enter_context(new_database(getattr(servers, server), name)) if server in needs else ""
            for server in ("postgres", "mariadb")
        )
        if "redis" in needs:
            client = stack.enter_context(Redis.from_url(servers.redis))
            client.flushdb()
            stack.callback(client.flushdb)
        folder = stack.enter_context(TemporaryDirectory(dir=servers.folder))
        redis = servers.redis if "redis" in needs else ""
        yield Place(Path(folder), redis, postgres, mariadb, redis)


@dataclass(frozen=True)
class Counters:
    """Read what has been sent and committed so far. A server that does not tell of commits has None for them."""

    redis: Callable[[], int]
    sql: Callable[[], int]
    commits: Callable[[], int | None]


@contextmanager
def counted_place(place: Place) -> Iterator[tuple[Place, Counters]]:
    """Give the same place behind proxies that count round trips on the wire, whoever the client is."""
    with ExitStack() as stack:
        proxies: dict[str, Proxy] = {}
        for name in ("redis", "postgres", "mariadb"):
            if url := getattr(place, name):
                proxies[name] = stack.enter_context(Proxy(url))
        commits = [
            stack.enter_context(watch(url))
            for url, watch in ((place.postgres, _postgres_commits), (place.mariadb, _mariadb_commits))
            if url
        ]

        def all_commits() -> int | None:
            counts = [count() for count in commits]
            return None if None in counts else sum(count or 0 for count in counts)

        yield (
            replace(place, **{name: proxy.url for name, proxy in proxies.items()}),
            Counters(
                redis=lambda: proxies["redis"].round_trips if "redis" in proxies else 0,
                sql=lambda: sum(proxy.round_trips for name, proxy in proxies.items() if name != "redis"),
                commits=all_commits,
            ),
        )


@contextmanager
def _postgres_commits(url: str) -> Iterator[Callable[[], int | None]]:
    """Transaction ids: a transaction that writes nothing takes none."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:

        def count() -> int:
            row = connection.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint").fetchone()
            assert row is not None
            return int(row[0])

        yield count


@contextmanager
def _mariadb_commits(url: str) -> Iterator[Callable[[], int | None]]:
    """InnoDB's own count, which a server keeps only if it is told to; a server of ours is."""
    place = make_url(url)
    connection = pymysql.connect(
        host=place.host, port=place.port or 3306, user=place.username, password=place.password or ""
    )
    with connection, connection.cursor() as cursor:

        def count() -> int | None:
            cursor.execute(
                "SELECT count FROM information_schema.innodb_metrics "
                "WHERE name = 'trx_rw_commits' AND time_enabled IS NOT NULL"
            )
            row = cursor.fetchone()
            return None if row is None else int(row[0])

        yield count
