"""Databases that last as long as a test."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, NullPool, create_engine, make_url, text


@contextmanager
def new_database(server_url: str, name: str, template: str | None = None) -> Iterator[str]:
    """Make an empty database, give its URL, and drop it even if clients are still connected.

    `template`: on PostgreSQL, the database that it is a copy of.
    """
    engine = create_engine(server_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    is_postgres = engine.dialect.name == "postgresql"
    with engine.connect() as connection:
        like = f"TEMPLATE {template}" if template else "" if is_postgres else "CHARACTER SET utf8mb4"
        connection.execute(text(f"CREATE DATABASE {name} {like}"))
    try:
        yield make_url(server_url).set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            if is_postgres:
                connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
            else:
                _disconnect_clients(connection, name)
                connection.execute(text(f"DROP DATABASE {name}"))


def _disconnect_clients(connection: Connection, database: str) -> None:
    """An open transaction of theirs would make DROP DATABASE wait."""
    clients = text("SELECT id FROM information_schema.processlist WHERE db = :database")
    for client in connection.scalars(clients, {"database": database}).all():
        connection.execute(text(f"KILL {client:d}"))
