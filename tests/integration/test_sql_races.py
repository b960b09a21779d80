"""A record that others change between a verb's look and its write: the verb begins again, and not for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, NullPool, create_engine, event, text

from idem_tasks.claims import Granted, InDoubt, InProgress, Lost, Recorded, State
from idem_tasks.errors import InProgressError, StoreUnavailableError
from idem_tasks.stores.sql import SQLStore
from idem_tasks.stores.sql_claims import RACES, RETRY_AFTER_LOCK
from idem_tasks.testing.driver import Driver
from idem_tasks.testing.store_in_use import DONE, SHORT, StoreInUse

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

    def start(when: str, verb: str | tuple[str, ...], change: str, times: int = RACES) -> None:
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


TRANSACTION = ("BEGIN", "START TRANSACTION")
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
    meddle("before", TRANSACTION, SOMEBODY_ELSES, times=1)
    resolved = use.resolve(DONE)
    assert resolved is not None
    assert resolved.state is State.COMPLETED


def test_a_resolve_that_loses_every_race_says_so(use: StoreInUse, meddle: Meddle) -> None:
    """Nothing is written over what others write, and the person hears to try again."""
    use.release(use.granted(), in_doubt=True)
    meddle("before", TRANSACTION, SOMEBODY_ELSES)
    with pytest.raises(StoreUnavailableError, match="being changed by others"):
        use.resolve(DONE)
    assert use.driver(use.store.audit(scope=None, key=None, limit=1)) == []
    assert use.record().state is State.IN_DOUBT


def test_a_forget_that_lost_a_race_begins_again(use: StoreInUse, meddle: Meddle) -> None:
    """What is deleted, and said to be deleted, is the record as it was read."""
    use.release(use.granted())
    meddle("before", TRANSACTION, SOMEBODY_ELSES, times=1)
    before = use.record().fencing_token
    done = use.forget()
    assert done is not None
    assert done.token_before == before + 1
    assert use.get() is None


def test_a_forget_that_loses_every_race_says_so(use: StoreInUse, meddle: Meddle) -> None:
    """A record that is another one at each try stays, and the person hears to try again."""
    use.release(use.granted())
    meddle("before", TRANSACTION, SOMEBODY_ELSES)
    with pytest.raises(StoreUnavailableError, match="being changed by others"):
        use.forget()
    assert use.forget()


def test_a_holder_that_wakes_up_before_it_is_forgotten_stays(use: StoreInUse, meddle: Meddle) -> None:
    """A lease that was over when it was read, and was renewed meanwhile, is respected (F53)."""
    lease = use.granted(lease=SHORT)
    use.let_expire(lease)
    far = "'2999-01-01 00:00:00.000'"
    meddle("before", TRANSACTION, f"lease_expires_at = {far}", times=1)
    with pytest.raises(InProgressError):
        use.forget()
    assert use.finish(lease) == Recorded()


def test_a_decision_that_loses_its_race_is_lost(use: StoreInUse, meddle: Meddle) -> None:
    """Somebody else ended the doubt between its look and its write: nothing is written, to the audit neither."""
    for outcome in (DONE, None):
        lease = use.granted(lease=SHORT, on_crash="hold")
        use.let_expire(lease)
        answer = use.claim(on_crash="hold")
        assert isinstance(answer, InDoubt)
        assert answer.dead is not None
        meddle("before", TRANSACTION, SOMEBODY_ELSES, times=1)
        assert use.decide(answer.dead, use.request(), outcome) == Lost()
        assert use.driver(use.store.audit(scope=None, key=None, limit=1)) == []
        use.driver(use.store.resolve(use.scope, "key", None))
        use.driver(use.store.forget(use.scope, "key"))
        with use.store._clients["blocking"]._engine.connect() as connection:  # type: ignore[attr-defined]
            connection.execute(text("DELETE FROM idem_tasks_audit"))
