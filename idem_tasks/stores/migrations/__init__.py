"""The history of the tables, as Alembic revisions; `upgrade` brings a database to the newest."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, func, select

_in_this_process = threading.Lock()
"""Alembic keeps its context in module globals. Never waited for: its holder may be a task of the same loop."""


def upgrade(connection: Connection, schema: str | None, prefix: str) -> bool:
    """Bring the tables to the newest revision, in one transaction where the database has such; True when done.

    False, at once: somebody else is at it; ask again. Needs an AUTOCOMMIT connection without a transaction.
    """
    if not _in_this_process.acquire(blocking=False):
        return False
    try:
        with _alone(connection, f"idem_tasks:{schema or ''}.{prefix}") as alone:
            if alone:
                with _quiet_alembic():
                    command.upgrade(_config(connection, schema, prefix), "head")
            return alone
    finally:
        _in_this_process.release()


def revision_of(connection: Connection, schema: str | None, prefix: str) -> str | None:
    """Return the number of the newest revision that the tables have, such as 0001; None where there are none."""
    options = {"version_table": f"{prefix}schema", "version_table_schema": schema}  # as in env.py
    with _quiet_alembic():
        return MigrationContext.configure(connection, opts=options).get_current_revision()


@contextmanager
def _quiet_alembic() -> Iterator[None]:
    """Keep what Alembic says of its own set-up out of the log of a worker that makes its tables."""
    logger = logging.getLogger("alembic")
    before = logger.level
    logger.setLevel(max(before, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(before)


def _config(connection: Connection, schema: str | None, prefix: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes.update(connection=connection, schema=schema, prefix=prefix)
    return config


@contextmanager
def _alone(connection: Connection, name: str) -> Iterator[bool]:
    """Hold the database's own lock of this name, so that several processes may start at once; False if taken.

    It is tried, not waited for: on PostgreSQL a waiting lock holds a snapshot that CREATE INDEX CONCURRENTLY
    waits for in turn.
    """
    digest = sha256(name.encode()).hexdigest()
    if connection.dialect.name == "postgresql":
        number = int(digest[:15], 16)
        with connection.execution_options(isolation_level="READ COMMITTED").begin():
            yield bool(connection.scalar(select(func.pg_try_advisory_xact_lock(number))))
    elif connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        try:
            yield True
        except BaseException:  # whatever struck: the lock is that of this transaction
            connection.exec_driver_sql("ROLLBACK")
            raise
        connection.exec_driver_sql("COMMIT")
    else:
        taken = bool(connection.scalar(select(func.get_lock(digest, 0))))
        try:
            yield taken
        finally:
            if taken:
                connection.scalar(select(func.release_lock(digest)))
