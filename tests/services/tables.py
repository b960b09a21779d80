"""Databases whose tables are made: copies of one that this process made once, which takes a tenth of the time."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import NullPool, create_engine, make_url, text

from idem_tasks.runtime import run_sync
from idem_tasks.stores.sql import SQLStore
from tests.services import finding, fixtures
from tests.services.databases import new_database
from tests.services.run import Run


def make_tables(url: str) -> None:
    store = SQLStore(url, create_schema=True)
    run_sync(store.prepare())
    run_sync(store.close())


@pytest.fixture(scope="session")
def _sqlite_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tables") / "records.db"
    make_tables(f"sqlite:///{file}")
    return file


@pytest.fixture
def sqlite_tables_url(_sqlite_tables: Path, tmp_path: Path) -> str:
    """`sqlite_url` with tables."""
    shutil.copy(_sqlite_tables, tmp_path / "records.db")
    return f"sqlite:///{tmp_path / 'records.db'}"


@pytest.fixture(scope="session")
def _postgres_tables(service_run: Run, worker_number: int) -> Iterator[tuple[str, str]]:
    server = make_url(fixtures.found(finding.POSTGRES, service_run).url).set(drivername="postgresql+psycopg")
    yield from _with_tables(server.render_as_string(hide_password=False), worker_number)


@pytest.fixture
def postgres_tables_url(_postgres_tables: tuple[str, str], unique_name: str) -> Iterator[str]:
    """`postgres_url` with tables."""
    server, prepared = _postgres_tables
    with new_database(server, unique_name, template=make_url(prepared).database) as url:
        yield url


@pytest.fixture(scope="session")
def _mariadb_tables(service_run: Run, worker_number: int) -> Iterator[tuple[str, str]]:
    yield from _with_tables(fixtures.pymysql_url(fixtures.found(finding.MARIADB, service_run).url), worker_number)


@pytest.fixture
def mariadb_tables_url(_mariadb_tables: tuple[str, str], unique_name: str) -> Iterator[str]:
    """`mariadb_url` with tables."""
    server, prepared = _mariadb_tables
    with new_database(server, unique_name) as url:
        _copy_tables(prepared, url)
        yield url


def _with_tables(server: str, worker_number: int) -> Iterator[tuple[str, str]]:
    """Give the server, and a database on it with tables, to which nobody is connected."""
    with new_database(server, fixtures.new_name(worker_number)) as url:
        make_tables(url)
        yield server, url


def _copy_tables(prepared: str, url: str) -> None:
    """MariaDB has no templates: make each table as it is there, and fill the only one that has rows."""
    name = make_url(prepared).database
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        for table in connection.scalars(text(f"SHOW TABLES FROM {name}")).all():
            connection.execute(text(f"CREATE TABLE {table} LIKE {name}.{table}"))
            connection.execute(text(f"INSERT INTO {table} SELECT * FROM {name}.{table}"))
