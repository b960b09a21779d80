"""What the figures were taken on: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import sqlite3
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psycopg
import pymysql
from redis import Redis
from sqlalchemy import make_url

from benchmarks.by_hand.records import psycopg_url
from benchmarks.cores import ALL, client_cores, server_cores
from benchmarks.place import Place

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("idem-tasks", "redis", "hiredis", "psycopg", "asyncpg", "PyMySQL", "SQLAlchemy", "msgspec", "celery")


def description(servers: Place, load_before: float) -> dict[str, str]:
    """Return name and value of all that a reader needs to know, to run it again."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "machine": f"{_processor()}, {len(ALL)} cores, {_memory()}, {platform.system()} {platform.release()}",
        "load before the run": f"{load_before:.2f}",
        "cores": f"client {_cores(client_cores())}, servers {_cores(server_cores())}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        **_server_versions(servers),
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }


def _cores(cores: frozenset[int]) -> str:
    return ", ".join(str(core) for core in sorted(cores))


def _commit() -> str:
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],  # noqa: S607 - from the PATH
            cwd=REPOSITORY,
            capture_output=True,
            check=True,
            text=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "not known"
    return said.stdout.strip()


def _processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _server_versions(servers: Place) -> dict[str, str]:
    found = {"SQLite": f"{sqlite3.sqlite_version}, WAL, synchronous=NORMAL"}
    if servers.redis:
        with Redis.from_url(servers.redis) as client:
            settings = client.config_get("appendonly")
            found["Redis"] = f"{client.info('server')['redis_version']}, appendonly={settings['appendonly']}"
    if servers.postgres:
        with psycopg.connect(psycopg_url(servers.postgres)) as connection:
            values = [connection.execute(f"SHOW {name}").fetchone() for name in ("server_version", *_DURABLE)]
        server, *settings = [str(row[0]) for row in values if row]
        durable = ", ".join(f"{name}={value}" for name, value in zip(_DURABLE, settings, strict=True))
        found["PostgreSQL"] = f"{server}, {durable}"
    if servers.mariadb:
        place = make_url(servers.mariadb)
        connection = pymysql.connect(
            host=place.host, port=place.port or 3306, user=place.username, password=place.password or ""
        )
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT version(), @@innodb_flush_log_at_trx_commit")
            server, flushes = cursor.fetchone()
        found["MariaDB"] = f"{server}, innodb_flush_log_at_trx_commit={flushes}"
    return found


_DURABLE = ("fsync", "synchronous_commit")
