"""One mark for each partition: a handler's rows and the mark are committed together, or neither is."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import create_engine, select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from idem_tasks import ConfigurationError, Idempotency, LeaseLostError, StoreUnavailableError, idempotent_task
from idem_tasks.integrations.confluent_kafka import IdempotentConsumer
from idem_tasks.integrations.kafka_watermark import WatermarkHandler
from idem_tasks.integrations.settling import Acknowledge, DeadLetter, PutBack
from idem_tasks.stores.schema import watermarks_table
from tests.integration.kafka.marking_consumer import Row, Table, marking, read_rows
from tests.integration.kafka.topics import SECONDS, Topic, consuming
from tests.services.run import REPOSITORY
from tests.services.waiting import wait_until

Place = tuple[str, int, int]
"""Stands in for a message: its topic, partition and offset are all that is looked at."""


def handler_of(
    idem: Idempotency, sessions: Any, handler: Callable[..., Any], runtime: Any = "blocking", **options: Any
) -> WatermarkHandler:
    return WatermarkHandler(
        handler,
        runtime=runtime,
        place=lambda message: message,
        group="billing",
        session=sessions,
        idempotency=idem,
        **options,
    )


def write(message: Place, session: Session) -> None:
    session.add(Row(name=f"{message[1]}:{message[2]}"))


@pytest.fixture(params=["sqlite_url", "postgres_url", "mariadb_url"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def sessions(url: str) -> Iterator[sessionmaker[Session]]:
    engine = create_engine(url)
    Table.metadata.create_all(engine)
    yield sessionmaker(engine)
    engine.dispose()


@pytest.fixture
def idem(url: str) -> Iterator[Idempotency]:
    with Idempotency.from_urls(database_url=url, create_schema=True, max_hold=60.0) as idem:
        yield idem


def test_a_message_below_the_mark_does_not_run(idem: Idempotency, sessions: sessionmaker[Session]) -> None:
    """Each message runs once, in each partition and group by itself; one that raised runs again, and left nothing."""
    fails = [True]

    def handler(message: Place, session: Session) -> None:
        write(message, session)
        if message[2] == 2 and fails:
            fails.clear()
            session.flush()
            raise LookupError

    task = handler_of(idem, sessions, handler)
    for place in [("t", 0, 0), ("t", 0, 1), ("t", 0, 0), ("t", 1, 1), ("t", 1, 0), ("t", 0, 7)]:
        task.function(place)
    with pytest.raises(LookupError):
        task.function(("t", 2, 2))
    task.function(("t", 2, 2))
    assert read_rows(sessions) == Counter(["0:0", "0:1", "1:1", "0:7", "2:2"])


def test_two_owners_of_a_partition_take_turns(idem: Idempotency, sessions: sessionmaker[Session]) -> None:
    """While one is at work the other is sent away, and finds the mark afterwards: no zombie changes it (F1, F46)."""
    begun, may_end = threading.Event(), threading.Event()

    def slow(message: Place, session: Session) -> None:
        write(message, session)
        session.flush()
        begun.set()
        assert may_end.wait(SECONDS)

    handler_of(idem, sessions, write).function(("t", 0, 0))
    first = threading.Thread(target=handler_of(idem, sessions, slow).function, args=(("t", 0, 1),))
    first.start()
    try:
        assert begun.wait(SECONDS)
        with pytest.raises(StoreUnavailableError):
            handler_of(idem, sessions, write).function(("t", 0, 1))
    finally:
        may_end.set()
        first.join()
    handler_of(idem, sessions, write).function(("t", 0, 1))
    assert read_rows(sessions) == Counter(["0:0", "0:1"])


def test_a_handler_may_roll_back_the_first_message_of_a_partition(
    idem: Idempotency, sessions: sessionmaker[Session]
) -> None:
    """What it writes afterwards is committed with the mark, which its rollback does not take away (F63)."""

    def handler(message: Place, session: Session) -> None:
        session.add(Row(name="undone"))
        session.flush()
        session.rollback()
        write(message, session)

    for offset in (0, 1, 0):
        handler_of(idem, sessions, handler).function(("t", 0, offset))
    assert read_rows(sessions) == Counter(["0:0", "0:1"])


@pytest.mark.parametrize("url", ["postgres_url", "mariadb_url"], indirect=True)
def test_new_partitions_do_not_wait_for_each_other(idem: Idempotency, sessions: sessionmaker[Session]) -> None:
    """While the first message of one is at work, those of others are too."""
    together = threading.Barrier(4)

    def handler(message: Place, session: Session) -> None:
        write(message, session)
        session.flush()
        together.wait(SECONDS)

    task = handler_of(idem, sessions, handler)
    idem.prepare()
    with ThreadPoolExecutor(4) as pool:
        ends = [pool.submit(task.function, ("t", number, 0)) for number in range(4)]
        for end in ends:
            end.result(SECONDS)
    assert read_rows(sessions) == Counter(f"{number}:0" for number in range(4))


def test_a_mark_that_was_moved_meanwhile_undoes_the_message(idem: Idempotency, sessions: sessionmaker[Session]) -> None:
    """Whose row was not locked any more commits nothing, and the message is looked at again (F1)."""
    table = watermarks_table()

    def handler(message: Place, session: Session) -> None:
        write(message, session)
        session.execute(update(table).values(next_offset=9))

    with pytest.raises(LeaseLostError):
        handler_of(idem, sessions, handler).function(("t", 0, 3))
    assert read_rows(sessions) == Counter()


@pytest.mark.parametrize("point", ["before_commit", "after_commit"])
def test_a_worker_killed_in_its_commit_leaves_both_or_nothing(
    idem: Idempotency, sessions: sessionmaker[Session], url: str, point: str
) -> None:
    """Delivered again, the message has had its effect once (F14)."""
    idem.prepare()
    command = [sys.executable, "-m", "tests.integration.kafka.marking_consumer", url, point]
    died = subprocess.run(command, cwd=REPOSITORY, timeout=60, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert read_rows(sessions).total() == (point == "after_commit")
    handler_of(idem, sessions, write).function(("t", 0, 0))
    assert read_rows(sessions) == Counter(["0:0"])


@pytest.mark.asyncio
async def test_coroutine_functions_are_marked_too(idem: Idempotency, url: str, sessions: sessionmaker[Session]) -> None:
    """A cancelled one leaves nothing, and runs again."""
    drivers = {"sqlite": "sqlite+aiosqlite", "mysql+pymysql": "mysql+asyncmy"}
    driver, rest = url.split("://", 1)
    engine = create_async_engine(f"{drivers.get(driver, driver)}://{rest}")
    begun = asyncio.Event()

    async def handler(message: Place, session: AsyncSession) -> None:
        session.add(Row(name=f"{message[1]}:{message[2]}"))
        await session.flush()
        if not begun.is_set():
            begun.set()
            await asyncio.sleep(SECONDS)

    task = handler_of(idem, async_sessionmaker(engine), handler, "asyncio")
    running = asyncio.create_task(task.function(("t", 0, 0)))
    await asyncio.wait_for(begun.wait(), SECONDS)
    running.cancel()
    await asyncio.wait([running])
    for _ in range(2):
        await task.function(("t", 0, 0))
    assert read_rows(sessions) == Counter(["0:0"])
    await engine.dispose()
    await idem.aclose()


@pytest.mark.parametrize("fields", [{"enabled": False}, {"shadow": True}])
def test_turned_off_it_runs_everything(sqlite_url: str, fields: dict[str, bool]) -> None:
    """Its session is committed for it all the same, or rolled back where it raises."""
    sessions = sessionmaker(create_engine(sqlite_url))
    Table.metadata.create_all(sessions.kw["bind"])

    def handler(message: Place, session: Session) -> None:
        write(message, session)
        if message[2] == 1:
            raise LookupError

    with Idempotency.from_urls(database_url=sqlite_url, **fields) as idem:  # type: ignore[arg-type]
        task = handler_of(idem, sessions, handler)
        for _ in range(2):
            task.function(("t", 0, 0))
        with pytest.raises(LookupError):
            task.function(("t", 0, 1))
    assert read_rows(sessions) == Counter({"0:0": 2})


def test_what_becomes_of_a_message(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is done, comes again, or is a dead letter if that was asked for and there is a place for it."""
    sessions = sessionmaker(create_engine(sqlite_url))
    place = (("t", 0, 0),)
    with Idempotency.from_urls(database_url=sqlite_url) as idem:
        patient = handler_of(idem, sessions, write)
        assert patient.settle(None, 0, "t:0:0", place, {}) == Acknowledge()
        assert isinstance(patient.settle(ValueError(), 0, "t:0:0", place, {}), PutBack)
        strict = handler_of(idem, sessions, write, on_error="dead_letter")
        assert isinstance(strict.settle(StoreUnavailableError(), 0, "t:0:0", place, {}), PutBack)
        assert isinstance(strict.settle(ValueError(), 0, "t:0:0", place, {}), DeadLetter)
        homeless = handler_of(idem, sessions, write, on_error="dead_letter", missing_road="dead_letter_topic=")
        assert isinstance(homeless.settle(ValueError(), 0, "t:0:0", place, {}), PutBack)
        assert "give dead_letter_topic=" in caplog.text


def test_what_only_a_person_can_mend_is_said(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """The message comes again, and what to change is in the log each time."""
    message = ("t", 0, 0)
    with Idempotency.from_urls(database_url=sqlite_url) as idem:
        task = handler_of(idem, sessionmaker(create_engine("sqlite://")), write)
        with pytest.raises(ConfigurationError) as raised:
            task.function(message)
        assert isinstance(task.settle(raised.value, 0, "t:0:0", (message,), {}), PutBack)
    assert "t:0:0" in caplog.text
    assert "idem-tasks init-db" in caplog.text


def test_what_needs_a_record_is_refused(idem: Idempotency, sessions: sessionmaker[Session]) -> None:
    """The error names what to leave out."""
    for options in ({"max_attempts": 3}, {"on_crash": "hold"}):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            handler_of(idem, sessions, write, **options)
    with pytest.raises(ConfigurationError, match="async def"):
        handler_of(idem, sessions, write, "asyncio")


def test_marks_need_sql(redis_url: str, sqlite_url: str) -> None:
    """Records in Redis have no transaction with the handler's rows, nor has a session of another database."""
    sessions = sessionmaker(create_engine("sqlite://"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"redis_url": redis_url}, "database_url="),
        ({"redis_url": redis_url, "database_url": sqlite_url}, "the database of the handler's effects"),
    ]
    for urls, says in cases:
        with Idempotency.from_urls(**urls) as idem, pytest.raises(ConfigurationError, match=says):
            handler_of(idem, sessions, write).function(("t", 0, 0))


def test_effects_happen_once_though_a_consumer_is_killed(topic: Topic, postgres_url: str) -> None:
    """It first shares its partitions with another, and when it is killed leaves them; no effect is doubled (F14)."""
    for number in range(200):
        topic.publish(f"{number}", partition=number % 4)
    engine = create_engine(postgres_url)
    Table.metadata.create_all(engine)
    sessions = sessionmaker(engine)
    with Idempotency.from_urls(database_url=postgres_url, create_schema=True) as idem:
        idem.prepare()
        command = [sys.executable, "-m", "tests.integration.kafka.marking_consumer", postgres_url]
        with subprocess.Popen([*command, topic.bootstrap, topic.name], cwd=REPOSITORY) as killed, ExitStack() as stack:
            try:
                wait_until(lambda: read_rows(sessions).total() > 10, seconds=SECONDS, what="effects of the first")
                stack.enter_context(consuming(topic, marking, idempotency=idem, session=sessions, watermark=True))
                own = os.getpid()
                wait_until(
                    lambda: read_rows(sessions, pid=own).total() > 0, seconds=SECONDS, what="those of the second"
                )
            finally:
                killed.kill()
            wait_until(
                lambda: [topic.committed(partition) for partition in range(4)] == [50] * 4,
                seconds=SECONDS,
                what="the commits",
            )
    assert read_rows(sessions) == Counter(str(number) for number in range(200))
    with sessions() as session:
        marks = session.execute(select(watermarks_table().c.next_offset)).scalars().all()
    assert list(marks) == [50] * 4
    engine.dispose()


def test_a_decorated_handler_is_refused(idem: Idempotency, sessions: sessionmaker[Session]) -> None:
    """It would keep a record of each message."""
    decorated = idempotent_task(key="{message}", idempotency=idem)(write)
    with pytest.raises(ConfigurationError, match="plain function"):
        IdempotentConsumer({"group.id": "g"}, decorated, session=sessions, watermark=True)
