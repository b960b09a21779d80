"""Databases that all contract tests of a process share: every test uses a scope of its own."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from sqlalchemy import make_url

from tests.services import finding, fixtures
from tests.services.databases import new_database
from tests.services.partitions import partition
from tests.services.run import Run
from tests.services.tables import make_tables


@pytest.fixture(scope="session")
def postgres_database(service_run: Run) -> Iterator[str]:
    """`postgresql+psycopg://…`: a database for this process."""
    server = make_url(fixtures.found(finding.POSTGRES, service_run).url).set(drivername="postgresql+psycopg")
    with new_database(server.render_as_string(hide_password=False), f"contract_{secrets.token_hex(6)}") as url:
        yield url


@pytest.fixture(scope="session")
def partitioned_postgres_database(service_run: Run) -> Iterator[str]:
    """The same, with records that are partitioned by the hash of their key."""
    server = make_url(fixtures.found(finding.POSTGRES, service_run).url).set(drivername="postgresql+psycopg")
    with new_database(server.render_as_string(hide_password=False), f"contract_{secrets.token_hex(6)}") as url:
        make_tables(url)
        partition(url)
        yield url


@pytest.fixture(scope="session")
def mariadb_database(service_run: Run) -> Iterator[str]:
    """`mysql+pymysql://…`: a database for this process."""
    server = fixtures.pymysql_url(fixtures.found(finding.MARIADB, service_run).url)
    with new_database(server, f"contract_{secrets.token_hex(6)}") as url:
        yield url
