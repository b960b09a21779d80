"""What a server's error means is told by its code: its text may be in any language, and quote anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import NullPool, create_engine, text

from idem_tasks.claims import Finished, Granted, InProgress
from idem_tasks.errors import StoreError, StoreUnavailableError
from idem_tasks.stores.base import RuntimeName
from idem_tasks.stores.sql import SQLStore
from idem_tasks.testing.driver import Driver
from idem_tasks.testing.store_in_use import StoreInUse
from tests.services.mariadb_server import MariaDBServer

RUNTIMES: list[RuntimeName] = ["blocking", "asyncio"]

LOCKED = {"postgres_url": "55P03", "mariadb_url": "1205"}
OF_NO_CONCERN = {"postgres_url": "P0001", "mariadb_url": "1644"}
MISLEADING = [
    "duplicate key value violates unique constraint",
    "Duplicate entry for key PRIMARY",
    "canceling statement due to lock timeout",
    "Lock wait timeout exceeded; try restarting transaction",
    "deadlock detected",
    "relation idem_tasks_records does not exist",
    "server closed the connection unexpectedly",
]


@pytest.fixture(params=["postgres_url", "mariadb_url"])
def fixture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def url(request: pytest.FixtureRequest, fixture: str) -> str:
    found: str = request.getfixturevalue(fixture)
    return found


@pytest.fixture(params=RUNTIMES)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    with Driver(request.param) as driver:
        yield driver


@pytest.fixture
def use(url: str, driver: Driver) -> Iterator[StoreInUse]:
    use = StoreInUse(SQLStore(url, create_schema=True), driver)
    driver(use.store.prepare())
    yield use
    driver(use.store.close())


@contextmanager
def raising(url: str, code: str, message: str) -> Iterator[None]:
    """Let the server itself raise this error, in these words, when a record is written."""
    is_postgres = url.startswith("postgres")
    with create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT").connect() as connection:
        for statement in POSTGRES_TRAP if is_postgres else MARIADB_TRAP:
            connection.execute(text(statement.replace("{code}", code).replace("{message}", message)))
        yield
        connection.execute(text("DROP TRIGGER trap" + (" ON idem_tasks_records" if is_postgres else "")))


POSTGRES_TRAP = [
    """CREATE OR REPLACE FUNCTION fall() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        RAISE EXCEPTION '{message}' USING ERRCODE = '{code}'; END $$""",
    "CREATE TRIGGER trap BEFORE UPDATE ON idem_tasks_records FOR EACH ROW EXECUTE FUNCTION fall()",
]
MARIADB_TRAP = [
    """CREATE TRIGGER trap BEFORE UPDATE ON idem_tasks_records FOR EACH ROW
        SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {code}, MESSAGE_TEXT = '{message}'""",
]


def test_a_code_is_known_whatever_its_words(fixture: str, url: str, use: StoreInUse) -> None:
    """A record that is locked is in progress also where the server says so in another language (F39)."""
    use.release(use.granted())
    with raising(url, LOCKED[fixture], "Wartezeit abgelaufen"):
        assert isinstance(use.claim(), InProgress)
    assert isinstance(use.claim(), Granted)


@pytest.mark.parametrize("message", MISLEADING)
def test_words_without_the_code_mean_nothing(fixture: str, url: str, use: StoreInUse, message: str) -> None:
    """An error that reads like a duplicate, a lock or an outage is none: it is not answered, and not retried (F39)."""
    use.release(use.granted())
    with raising(url, OF_NO_CONCERN[fixture], message), pytest.raises(StoreError) as caught:
        use.claim()
    assert type(caught.value) is StoreError
    assert isinstance(use.claim(), Granted)


def test_a_server_that_speaks_another_language(private_mariadb: Callable[..., MariaDBServer], driver: Driver) -> None:
    """On a MariaDB that answers in German, duplicates, locks and a missing table are told apart as ever (F39)."""
    server = private_mariadb(lc_messages="de_DE")
    use = StoreInUse(SQLStore(server.url, create_schema=True), driver)
    driver(use.store.prepare())
    lease = use.granted()
    assert isinstance(use.claim(), InProgress)
    with create_engine(server.url, poolclass=NullPool).connect() as other:
        with pytest.raises(Exception, match="Tabelle"):
            other.execute(text("SELECT * FROM no_such_table"))
        other.execute(text("UPDATE idem_tasks_records SET holder = 'somebody else'"))
        with pytest.raises(StoreUnavailableError, match="locked"):
            use.finish(lease)
        other.rollback()
    use.finish(lease)
    assert isinstance(use.claim(), Finished)
    driver(use.store.close())
