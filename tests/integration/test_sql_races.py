"""A record that others change between a verb's look and its write: the verb begins again, and not for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, NullPool, create_engine, event, text

from idem_tasks.claims import Granted, InProgress, State
from idem_tasks.errors import StoreUnavailableError
from idem_tasks.stores.sql import SQLStore
from idem_tasks.stores.sql_claims import RACES, RETRY_AFTER_LOCK
from idem_tasks.testing.driver import Driver
from idem_tasks.testing.store_in_use import DONE, StoreInUse

Meddle = Callable[..., None]


@pytest.fixture(params=["sqlite_url", "postgres_url", "mariadb_url"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = create_engine(request.getfixturevalue(request.param), poolclass=NullPool)
    yield engine
    engine.dispose()


@pytest.fixture
def use(engine: Engine) -> Iterator[StoreInUse]:
    with Driver("blocking") as driver:
        use = StoreInUse(SQLStore(engine, create_schema=True), driver)
        driver(use.store.prepare())
        yield use


@pytest.fixture
def meddle(engine: Engine) -> Iterator[Meddle]:
    """`meddle("before", "UPDATE", change, times)` lets another worker change the record around a statement."""
    other = create_engine(engine.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    listening: list[tuple[str, Callable[..., None]]] = []

    def start(when: str, verb: str, change: str, times: int = RACES) -> None:
        left = times

        def on_statement(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            nonlocal left
            if statement.lstrip().startswith(verb) and left:
                left -= 1
                with other.connect() as connection:
                    connection.execute(text(f"UPDATE idem_tasks_records SET {change}"))

        listening.append((f"{when}_cursor_execute", on_statement))
        event.listen(engine, *listening[-1])

    yield start
    for each in listening:
        event.remove(engine, *each)


SOMEBODY_ELSES = "fencing_token = fencing_token + 1"


def test_a_claim_that_lost_a_race_begins_again(use: StoreInUse, meddle: Meddle) -> None:
    """What the other one wrote is read again, and the token is higher than it (F11)."""
    use.release(use.granted())
    before = use.record().fencing_token
    meddle("before", "UPDATE", SOMEBODY_ELSES, times=1)
    assert use.granted().fencing_token > before + 1


def test_a_claim_that_loses_every_race_comes_again_later(use: StoreInUse, meddle: Meddle) -> None:
    """Where others are always first, the key is in progress: nobody tries for ever (F11)."""
    use.release(use.granted())
    meddle("before", "UPDATE", SOMEBODY_ELSES)
    assert use.claim() == InProgress(RETRY_AFTER_LOCK)
    assert isinstance(use.claim(), Granted)


def test_a_resolve_that_lost_a_race_begins_again(use: StoreInUse, meddle: Meddle) -> None:
    """A person's outcome is written once the record stands still for a moment."""
    use.release(use.granted(), in_doubt=True)
    meddle("before", "UPDATE", SOMEBODY_ELSES, times=1)
    resolved = use.resolve(DONE)
    assert resolved is not None
    assert resolved.state is State.COMPLETED


def test_a_resolve_that_loses_every_race_says_so(use: StoreInUse, meddle: Meddle) -> None:
    """Nothing is written over what others write, and the person hears to try again."""
    use.release(use.granted(), in_doubt=True)
    meddle("before", "UPDATE", SOMEBODY_ELSES)
    with pytest.raises(StoreUnavailableError, match="being changed by others"):
        use.resolve(DONE)
    assert use.record().state is State.IN_DOUBT


def test_a_forget_that_lost_a_race_begins_again(use: StoreInUse, meddle: Meddle) -> None:
    """A record that was held while it was to be deleted, and no longer when asked why, is deleted."""
    use.granted()
    meddle("after", "DELETE", "state = 'released'", times=1)
    assert use.forget()
    assert use.get() is None


def test_a_forget_that_loses_every_race_says_so(use: StoreInUse, meddle: Meddle) -> None:
    """A record that is held at each try stays, and the person hears to try again."""
    use.granted()
    meddle("before", "DELETE", "state = 'running'")
    meddle("after", "DELETE", "state = 'released'")
    with pytest.raises(StoreUnavailableError, match="being changed by others"):
        use.forget()
    assert use.forget()
