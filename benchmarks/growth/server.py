"""The PostgreSQL whose tables grow: one of its own, or the one that the environment names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from sqlalchemy import make_url

from benchmarks.by_hand.records import psycopg_url
from benchmarks.cores import on_cores, server_cores
from benchmarks.place import Place
from tests.services import finding
from tests.services.postgres_server import PostgresServer
from tests.services.run import Run

SETTINGS = {
    "fsync": "on",
    "shared_buffers": "1GB",
    "max_wal_size": "4GB",
    "autovacuum_naptime": "5s",  # so that what it does is seen before the run ends
}


@contextmanager
def postgres() -> Iterator[Place]:
    """Give a server: the one that the environment names, or one that is started, on cores of its own."""
    run = Run.begin()
    try:
        url = os.environ.get(finding.POSTGRES.variable)
        if not url:
            with on_cores(server_cores()):
                url = PostgresServer(run, **SETTINGS).start().url
        with_driver = make_url(url).set(drivername="postgresql+psycopg")
        yield Place(run.folder, postgres=with_driver.render_as_string(hide_password=False))
    finally:
        run.end()


def settings(url: str) -> str:
    """Return how the server is set where that matters here."""
    with psycopg.connect(psycopg_url(url)) as connection:
        rows = connection.execute(
            "SELECT name, current_setting(name) FROM pg_settings WHERE name = ANY(%s)", (list(SETTINGS),)
        )
        return ", ".join(f"{name}={value}" for name, value in rows)
