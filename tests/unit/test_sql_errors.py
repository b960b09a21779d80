"""What an error of a database means, and what is said of it."""

from __future__ import annotations

import pytest
from sqlalchemy import QueuePool, create_engine, exc

from idem_tasks.errors import InProgressError, StoreError, StoreUnavailableError
from idem_tasks.runtime import run_sync
from idem_tasks.stores.sql import SQLStore
from idem_tasks.stores.sql_errors import Fault, error_for, fault_of, is_conflict

COMES_AGAIN = {Fault.UNAVAILABLE, Fault.POOL_EXHAUSTED, Fault.LOCKED, Fault.CONFLICT}


@pytest.mark.parametrize("fault", Fault)
def test_every_fault_has_an_error(fault: Fault) -> None:
    """It names the database; what another try may mend, and nothing else, is `StoreUnavailableError`."""
    error = error_for(fault, "postgresql://h/shop", "jobs.idem_tasks_*")
    assert isinstance(error, StoreError)
    assert str(error).startswith("postgresql://h/shop")
    assert isinstance(error, StoreUnavailableError) == (fault in COMES_AGAIN)


def test_whose_error_it_is() -> None:
    """Ours and Python's are not the database's; SQLAlchemy's own are, whatever they mean."""
    assert fault_of(InProgressError(scope="s", key="k", retry_after=1.0)) is None
    assert fault_of(ValueError("a bug")) is None
    assert fault_of(exc.InvalidRequestError("a bug of ours")) is Fault.OTHER
    assert fault_of(OSError(111, "refused")) is Fault.UNAVAILABLE


def test_a_chain_of_errors_that_bites_its_tail_is_no_conflict() -> None:
    """An error that is its own cause, as some libraries make them, is looked through once and no more."""
    first, second = ValueError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    assert not is_conflict(first)


def test_a_pool_without_a_free_connection_is_unavailable(sqlite_url: str) -> None:
    """An engine of yours whose connections are all in use puts messages back, and is named as the cause."""
    engine = create_engine(sqlite_url, poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.01)
    store = SQLStore(engine, create_schema=True)
    with engine.connect(), pytest.raises(StoreUnavailableError, match="all connections of this process are in use"):
        run_sync(store.get("scope", "key"))
    assert run_sync(store.get("scope", "key")) is None
    engine.dispose()
