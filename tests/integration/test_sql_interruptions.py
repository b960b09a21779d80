"""What strikes a call from outside while it waits for a database is raised as itself, not as an outage."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import create_engine, text

from idem_tasks.claims import ClaimRequest, EncodedOutcome, Granted, new_owner
from idem_tasks.events import Announcer
from idem_tasks.policy import Policy
from idem_tasks.runtime import register_interruption, run_sync
from idem_tasks.stores.sql import SQLStore


class SoftLimitError(Exception):
    """Raised from a signal handler, as Celery's SoftTimeLimitExceeded is."""


@contextmanager
def struck_while_locked(url: str) -> Iterator[None]:
    """Lock all records, and strike this thread while it waits for one of them."""
    register_interruption(SoftLimitError)

    def strike(*_: object) -> None:
        raise SoftLimitError

    before = signal.signal(signal.SIGUSR1, strike)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
    locker = create_engine(url)
    try:
        with locker.begin() as connection:
            connection.execute(text("SELECT * FROM idem_tasks_records FOR UPDATE")).all()
            timer.start()
            yield
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGUSR1, before)
        locker.dispose()


@pytest.mark.parametrize("database", ["postgres_url", "mariadb_url"])
def test_a_soft_limit_in_mid_statement_is_raised_as_itself(request: pytest.FixtureRequest, database: str) -> None:
    """A driver may wrap it as an operational error; nobody must take it for an outage and swallow it (F62)."""
    url = request.getfixturevalue(database)
    store = SQLStore(url, create_schema=True).on("blocking", Announcer(()))
    granted = run_sync(store.claim(ClaimRequest("scope", "key", None, new_owner(), Policy())))
    assert isinstance(granted, Granted)
    with struck_while_locked(url), pytest.raises(SoftLimitError):
        run_sync(store.finish(granted.lease, EncodedOutcome(body=b"1", codec="json")))
    for key in ("a", "b", "key"):
        # On the connection that was struck these would get one another's answers.
        record = run_sync(store.get("scope", key))
        assert (record is not None) == (key == "key")
    run_sync(store.finish(granted.lease, EncodedOutcome(body=b"1", codec="json")))
    record = run_sync(store.get("scope", "key"))
    assert record is not None
    assert record.outcome == b"1"
    run_sync(store.close())
