"""A seller on each database, in each runtime. The tables are made: these tests are about what goes into them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from idem_tasks.testing import Driver
from tests.integration.sessions.seller import Seller

DATABASES = ["sqlite_url", "postgres_url", "mariadb_url"]


@pytest.fixture
def sqlite_url(sqlite_tables_url: str) -> str:
    return sqlite_tables_url


@pytest.fixture
def postgres_url(postgres_tables_url: str) -> str:
    return postgres_tables_url


@pytest.fixture
def mariadb_url(mariadb_tables_url: str) -> str:
    return mariadb_tables_url


@pytest.fixture(params=["blocking", "asyncio"])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    with Driver(request.param) as driver:
        yield driver


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def seller(driver: Driver, url: str) -> Iterator[Seller]:
    with Seller(driver, url) as seller:
        yield seller
