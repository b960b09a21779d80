"""What strikes a call from outside while it waits for a database is raised as itself, not as an outage."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from unittest.mock import Mock

import pymysql
import pytest
from sqlalchemy import create_engine, make_url, text

from idem_tasks.claims import ClaimRequest, EncodedOutcome, Granted, new_owner
from idem_tasks.events import Announcer
from idem_tasks.policy import Policy
from idem_tasks.runtime import register_interruption, run_sync
from idem_tasks.stores import sql_execution
from idem_tasks.stores.sql import SQLStore


class SoftLimitError(Exception):
    """Raised from a signal handler, as Celery's SoftTimeLimitExceeded is."""


class UnknownLimitError(Exception):
    """The same, of somebody who registered nothing."""


register_interruption(SoftLimitError)


@contextmanager
def struck_while_locked(url: str, kind: type[BaseException] = SoftLimitError) -> Iterator[None]:
    """Lock all records, and strike this thread while it waits for one of them."""

    def strike(*_: object) -> None:
        raise kind

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


@pytest.mark.parametrize("kind", [SoftLimitError, UnknownLimitError, KeyboardInterrupt])
@pytest.mark.parametrize("database", ["postgres_url", "mariadb_url"])
def test_nobody_gets_the_answer_to_a_claim_that_was_struck(
    request: pytest.FixtureRequest, database: str, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Struck between a statement and its answer: the connection is thrown away, whatever struck."""
    store = SQLStore(request.getfixturevalue(database), create_schema=True).on("blocking", Announcer(()))

    def claim(key: str) -> object:
        return run_sync(store.claim(ClaimRequest("scope", key, None, new_owner(), Policy())))

    first = claim("first")
    assert isinstance(first, Granted)
    with struck_while_locked(request.getfixturevalue(database), kind), pytest.raises(kind):
        run_sync(store.finish(first.lease, EncodedOutcome(body=b"1", codec="json")))

    def strike(*_: object, **__: object) -> None:
        raise kind

    with monkeypatch.context() as patched:
        patched.setattr(sql_execution.Prepared, "row", strike)
        with pytest.raises(kind):
            claim("struck")
        if database == "mariadb_url":
            patched.setattr(pymysql.connections.Connection, "_read_query_result", strike)
            with pytest.raises(kind):
                claim("struck before it was read")
    for key in ("a", "b", "c"):
        granted = claim(key)
        assert isinstance(granted, Granted)
        assert granted.lease.key == key
        record = run_sync(store.get("scope", key))
        assert record is not None
        assert record.owner == granted.lease.owner
    run_sync(store.close())


def test_a_file_is_free_after_a_claim_that_was_struck(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite: nobody has to wait until the traceback of it is collected."""
    store = SQLStore(sqlite_url).on("blocking", Announcer(()))
    run_sync(store.prepare())
    with monkeypatch.context() as patched:
        patched.setattr(sql_execution.Prepared, "row", Mock(side_effect=UnknownLimitError))
        with pytest.raises(UnknownLimitError) as held:
            run_sync(store.claim(ClaimRequest("scope", "key", None, new_owner(), Policy())))
    with closing(sqlite3.connect(make_url(sqlite_url).database or "", timeout=0, isolation_level=None)) as elsewhere:
        elsewhere.execute("BEGIN IMMEDIATE")
        elsewhere.execute("ROLLBACK")
    del held
    run_sync(store.close())
