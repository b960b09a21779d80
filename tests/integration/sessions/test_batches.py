"""What a handler of many messages writes through its session, and the outcomes of all, are one transaction."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from idem_tasks import RedisStore, SQLStore, TieredStore, current_claims, idempotent_batch
from idem_tasks.claims import State
from idem_tasks.errors import BatchError, ConfigurationError, LeaseLostError, StoreUnavailableError
from idem_tasks.events import EventName
from idem_tasks.runtime import register_interruption
from idem_tasks.testing import Driver
from tests.integration.sessions.seller import SCOPE, Order, Seller
from tests.integration.sessions.test_sessions import SERVERS

LEASE = 2.0
"""Seconds of a lease that is waited out; claims that are granted after that long begin no handler."""

Body = Callable[[list[str], Session], Any]


class SoftLimitError(Exception):
    """Raised at any instruction, as Celery's SoftTimeLimitExceeded is."""


register_interruption(SoftLimitError)


def batch_of(seller: Seller, body: Body, **options: Any) -> Callable[..., Any]:
    """Decorate a plain function of the orders' names and a session for this runtime; returns a plain call."""
    handler: Any
    if seller.is_asyncio:

        async def handle(names: list[str], session: Any) -> Any:
            return await session.run_sync(lambda within: body(names, within))

        handler = handle
    else:

        def handle_blocking(names: list[str], session: Any) -> Any:
            return body(names, session)

        handler = handle_blocking
    options = {"key": "{message}", "scope": SCOPE, "idempotency": seller.idem, "session": seller.sessions} | options
    decorated: Any = idempotent_batch(**options)(handler)
    return lambda *args, **kwargs: (
        seller.driver(decorated(*args, **kwargs)) if seller.is_asyncio else decorated(*args, **kwargs)
    )


def order_all(names: list[str], session: Session) -> list[str]:
    """What most handlers do."""
    session.add_all(Order(name=name) for name in names)
    return [f"ordered {name}" for name in names]


def failing(call: Callable[..., Any], *args: Any) -> BatchError:
    with pytest.raises(BatchError) as caught:
        call(*args)
    return caught.value


def kinds(error: BatchError) -> list[str]:
    return [type(each).__name__ if isinstance(each, BaseException) else each for each in error.results]


def states(seller: Seller, keys: str) -> list[State | None]:
    return [seller.state(key) for key in keys]


def test_rows_and_outcomes_are_committed_together(seller: Seller) -> None:
    """All orders are there exactly when all outcomes are, and duplicates write nothing (F14)."""
    seen: list[Any] = []

    def body(names: list[str], session: Session) -> list[str]:
        done = order_all(names, session)
        session.flush()
        seen.append((names, seller.orders(), [claim.session is not None for claim in current_claims()]))
        return done

    task = batch_of(seller, body)
    assert task(["B", "A"]) == task(["B", "A"]) == ["ordered B", "ordered A"]
    assert task(["A", "C", "D"]) == ["ordered A", "ordered C", "ordered D"]
    assert seen == [(["B", "A"], 0, [True, True]), (["C", "D"], 2, [True, True])]
    assert (seller.orders(), states(seller, "ABCD")) == (4, [State.COMPLETED] * 4)


def test_behind_a_marker(driver: Driver, postgres_url: str, redis_url: str) -> None:
    """With Redis in front the markers answer duplicates of all of them."""
    store = TieredStore(RedisStore(redis_url), SQLStore(postgres_url, create_schema=True))
    with Seller(driver, postgres_url, store) as seller:
        task = batch_of(seller, order_all)
        assert task(["A", "B"]) == task(["B", "A"])[::-1] == ["ordered A", "ordered B"]
        assert seller.orders() == 2


def test_one_that_failed_is_alone_with_that(seller: Seller) -> None:
    """What was written for one cannot be told from the others: all is undone, and each runs by itself (F38)."""
    runs: list[list[str]] = []

    def body(names: list[str], session: Session) -> list[Any]:
        runs.append(names)
        done: list[Any] = order_all(names, session)
        return [ValueError("no") if name == "B" else outcome for name, outcome in zip(names, done, strict=True)]

    error = failing(batch_of(seller, body), ["A", "B", "C"])
    assert kinds(error) == ["ordered A", "ValueError", "ordered C"]
    assert runs == [["A", "B", "C"], ["A"], ["B"], ["C"]]
    assert (seller.orders(), seller.orders("B")) == (2, 0)
    assert states(seller, "ABC") == [State.COMPLETED, State.RELEASED, State.COMPLETED]


def test_a_row_that_is_refused_fails_its_message_alone(seller: Seller) -> None:
    """A constraint that one message breaks at the commit does not keep the others from being written (F38)."""

    def body(names: list[str], session: Session) -> list[str]:
        session.add_all(Order(number=1 if name in "AB" else 2, name=name) for name in names)
        return [f"ordered {name}" for name in names]

    error = failing(batch_of(seller, body), ["A", "B", "C"])
    assert kinds(error) == ["ordered A", "IntegrityError", "ordered C"]
    assert isinstance(error.results[1], IntegrityError)
    assert (seller.orders("A"), seller.orders("B"), seller.orders("C")) == (1, 0, 1)


def test_a_handler_that_raises_writes_nothing(seller: Seller) -> None:
    """All is rolled back, and each message has failed once."""

    def body(names: list[str], session: Session) -> list[str]:
        order_all(names, session)
        session.flush()
        raise ValueError

    assert kinds(failing(batch_of(seller, body), ["A", "B"])) == ["ValueError", "ValueError"]
    assert (seller.orders(), states(seller, "AB")) == (0, [State.RELEASED, State.RELEASED])


@pytest.mark.parametrize("url", SERVERS, indirect=True)  # on SQLite a session keeps every other worker from writing
def test_one_that_was_taken_over_keeps_the_others(seller: Seller) -> None:
    """One claim lost in mid-run: nothing of that run is committed, and the rest runs again by itself."""
    runs: list[list[str]] = []

    def body(names: list[str], session: Session) -> list[str]:
        runs.append(names)
        if len(runs) == 1:
            heartbeat = seller.idem.services(seller.driver.runtime).heartbeat
            claims = {claim.key: claim for claim in current_claims()}
            heartbeat.let_go(claims["B"].lease.owner)
            seller.finish_elsewhere(seller.take_over("B"))
        session.add_all(Order(name=name) for name in names)
        return [f"ordered {name}" for name in names]

    task = batch_of(seller, body, lease=LEASE, fingerprint=None)
    assert task(["A", "B", "C"]) == ["ordered A", "the other one", "ordered C"]
    assert runs == [["A", "B", "C"], ["A"], ["C"]]
    assert (seller.orders(), seller.orders("B")) == (3, 0)
    assert EventName.SUPERSEDED in seller.names()


@pytest.mark.parametrize("url", SERVERS, indirect=True)  # on SQLite a session keeps every other worker from writing
def test_one_that_was_lost_has_to_come_again(seller: Seller) -> None:
    """One claim taken over and not finished yet: its message comes again, the others are written."""
    runs: list[list[str]] = []

    def body(names: list[str], session: Session) -> list[str]:
        runs.append(names)
        if len(runs) == 1:
            claims = {claim.key: claim for claim in current_claims()}
            seller.idem.services(seller.driver.runtime).heartbeat.let_go(claims["B"].lease.owner)
            seller.take_over("B")
        return order_all(names, session)

    error = failing(batch_of(seller, body, lease=LEASE, fingerprint=None), ["A", "B", "C"])
    assert kinds(error) == ["ordered A", "LeaseLostError", "ordered C"]
    assert isinstance(error.results[1], LeaseLostError)
    assert seller.orders() == 2


def test_under_hold_each_has_its_own_transaction(seller: Seller) -> None:
    """Where no message may run twice, each runs by itself from the beginning: a failure undoes nothing of another."""
    runs: list[list[str]] = []

    def body(names: list[str], session: Session) -> list[Any]:
        runs.append(names)
        order_all(names, session)
        return [ValueError("no") if name == "B" else "done" for name in names]

    assert kinds(failing(batch_of(seller, body, on_crash="hold"), ["A", "B", "C"])) == ["done", "ValueError", "done"]
    assert runs == [["A"], ["B"], ["C"]]
    assert states(seller, "ABC") == [State.COMPLETED, State.IN_DOUBT, State.COMPLETED]


def test_a_dict_of_outcomes(seller: Seller) -> None:
    """A dict is matched by key here too, and one too many is an error after all is committed."""

    def body(names: list[str], session: Session) -> dict[str, str]:
        order_all(names, session)
        return dict.fromkeys(names, "done") | ({"Z": "?"} if len(names) > 1 else {})

    error = failing(batch_of(seller, body), ["A", "B"])
    assert error.results == ["done", "done"]
    assert seller.orders() == 2
    assert batch_of(seller, body)(["C"]) == ["done"]


def test_what_is_published_is_sent_with_the_commit(seller: Seller) -> None:
    """Messages are written in the same transaction, each with its claim's outcome; none twice where all ran again."""
    failed = {"B"}

    def body(names: list[str], session: Session) -> list[Any]:
        order_all(names, session)
        for claim in current_claims():
            claim.publish_message(claim.key, to="mail")
        return [ValueError("no") if name in failed else "done" for name in names]

    failing(batch_of(seller, body), ["A", "B", "C"])
    assert [mail.body for mail in seller.mails] == ["A", "C"]
    failed.clear()
    assert batch_of(seller, body)(["B", "D"]) == ["done", "done"]
    assert [mail.body for mail in seller.mails] == ["A", "C", "B", "D"]


def test_a_batch_with_a_session_has_no_steps(seller: Seller) -> None:
    """A step would be replayed though what was written beside it is undone: it is refused before it runs."""

    def body(names: list[str], session: Session) -> list[str]:
        return [current_claims()[0].step("ship", str.upper, name) for name in names]

    assert kinds(failing(batch_of(seller, body), ["A", "B"])) == ["ConfigurationError"] * 2


def test_a_handler_must_not_commit(seller: Seller) -> None:
    """Rows without their outcomes would be written again (F63)."""

    def body(names: list[str], session: Session) -> list[str]:
        order_all(names, session)
        session.commit()
        return names

    assert kinds(failing(batch_of(seller, body), ["A", "B"])) == ["ConfigurationError"] * 2
    assert seller.orders() == 0


def test_a_session_of_another_database_is_refused(driver: Driver, sqlite_url: str, postgres_url: str) -> None:
    """Nothing runs, and all claims are given back."""
    with Seller(driver, sqlite_url) as seller:
        sessions = seller.sessionmaker(seller.new_engine(postgres_url))
        error = failing(batch_of(seller, order_all, session=sessions), ["A", "B"])
        assert kinds(error) == ["ConfigurationError"] * 2
        assert isinstance(error.results[0], ConfigurationError)
        assert states(seller, "AB") == [State.RELEASED] * 2


@pytest.mark.parametrize("options", [{"shadow": True}, {"enabled": False}])
def test_without_protection_it_is_only_committed(seller: Seller, options: Any) -> None:
    """In shadow and disabled the handler's rows are committed for it; one failed message undoes no other's."""
    failed = {"B"}

    def body(names: list[str], session: Session) -> list[Any]:
        order_all(names, session)
        return [ValueError("no") if name in failed else "done" for name in names]

    task = batch_of(seller, body, **options)
    assert kinds(failing(task, ["A", "B"])) == ["done", "ValueError"]
    assert (seller.orders("A"), seller.orders("B")) == (1, 0)
    failed.clear()
    assert task(["A", "B"]) == ["done", "done"]
    assert (seller.orders("A"), seller.orders("B")) == (2, 1)

    def broken(names: list[str], session: Session) -> list[str]:
        order_all(names, session)
        raise ValueError

    failing(batch_of(seller, broken, **options), ["C", "D"])
    assert seller.orders("C") == 0


@pytest.mark.parametrize("options", [{"shadow": True}, {"enabled": False}])
def test_without_protection_nothing_is_sent_twice(seller: Seller, options: Any) -> None:
    """Where one message failed all run again, and what was published before that is forgotten."""

    def body(names: list[str], session: Session) -> list[Any]:
        for claim, name in zip(current_claims(), names, strict=True):
            claim.publish_message(name, to="mail")
        return [ValueError("no") if name == "B" else "done" for name in names]

    failing(batch_of(seller, body, **options), ["A", "B", "C"])
    assert [mail.body for mail in seller.mails] == ["A", "C"]


def test_the_caller_may_give_the_session(seller: Seller) -> None:
    """A session that the caller passes is used, and left as it was found."""

    async def given() -> Any:
        async with seller.sessions() as session:
            return await later(["A", "B"], session=session)

    if seller.is_asyncio:

        @idempotent_batch(key="{message}", scope=SCOPE, idempotency=seller.idem, session=seller.sessions)
        async def later(names: list[str], session: Any) -> list[str]:
            return list(await session.run_sync(partial(order_all, names)))

        done = seller.driver(given())
    else:
        with seller.sessions() as session:
            done = batch_of(seller, order_all)(["A", "B"], session)
    assert done == ["ordered A", "ordered B"]
    assert seller.orders() == 2


def test_run_batch_has_a_session(driver: Driver, sqlite_url: str) -> None:
    """`run_batch(..., session=)` gives it to a handler that has a parameter of that name."""
    with Seller(driver, sqlite_url) as seller:
        if seller.is_asyncio:

            async def handle(names: list[str], session: Any) -> list[str]:
                return list(await session.run_sync(partial(order_all, names)))

            done: Any = seller.driver(
                seller.idem.arun_batch(handle, ["A", "B"], scope=SCOPE, key="{message}", session=seller.sessions)
            )
        else:
            done = seller.idem.run_batch(order_all, ["A", "B"], scope=SCOPE, key=str, session=seller.sessions)
        assert done == ["ordered A", "ordered B"]
        assert seller.orders() == 2


@pytest.mark.parametrize("kind", [SoftLimitError, asyncio.CancelledError])
@pytest.mark.parametrize("when", ["together", "apart"])
def test_what_strikes_the_handler_gives_all_back(seller: Seller, kind: type[BaseException], when: str) -> None:
    """It comes out as itself, and nothing is written of the message it struck nor of those that were to follow."""

    def body(names: list[str], session: Session) -> list[Any]:
        order_all(names, session)
        if len(names) > 1 and when == "apart":
            return [ValueError("no"), *names[1:]]
        if names != ["A"]:
            raise kind
        return names

    with pytest.raises(kind):
        batch_of(seller, body)(["A", "B", "C"])
    assert seller.orders() == (1 if when == "apart" else 0)
    assert states(seller, "BC") == [State.RELEASED] * 2


def test_a_deadlock_runs_them_again(driver: Driver, postgres_url: str) -> None:
    """A serialization failure undid everything: the handler runs again within the call."""
    with Seller(driver, postgres_url) as seller:
        runs: list[list[str]] = []

        def body(names: list[str], session: Session) -> list[str]:
            runs.append(names)
            done = order_all(names, session)
            if len(runs) == 1:
                session.execute(text("DO $$ BEGIN RAISE EXCEPTION 'undone' USING ERRCODE = '40001'; END $$"))
            return done

        assert batch_of(seller, body)(["A", "B"]) == ["ordered A", "ordered B"]
        assert (runs, seller.orders()) == ([["A", "B"]] * 2, 2)

        def always(names: list[str], session: Session) -> list[str]:
            session.execute(text("DO $$ BEGIN RAISE EXCEPTION 'undone' USING ERRCODE = '40001'; END $$"))
            return names

        error = failing(batch_of(seller, always), ["C", "D"])
        assert "stood in the way" in "".join(error.results[0].__notes__)


def test_a_connection_that_is_lost_brings_them_back(driver: Driver, postgres_url: str) -> None:
    """The database ends the session's connection: nothing is written, and every message comes again (F59)."""
    with Seller(driver, postgres_url) as seller:

        def body(names: list[str], session: Session) -> list[str]:
            order_all(names, session)
            session.flush()
            session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
            return names

        error = failing(batch_of(seller, body), ["A", "B"])
        assert kinds(error) == ["StoreUnavailableError"] * 2
        assert isinstance(error.results[0], StoreUnavailableError)
        assert seller.orders() == 0


def test_two_batches_of_the_same_keys_never_wait_for_each_other(postgres_url: str) -> None:
    """In opposite order, many times over: records are locked in one order, and each key runs once (F66)."""
    with Driver("blocking") as driver, Seller(driver, postgres_url) as seller:
        task = batch_of(seller, order_all)
        errors: list[BaseException] = []

        def work(reverse: bool) -> None:
            for number in range(10):
                names = sorted((f"{number}-{each}" for each in range(20)), reverse=reverse)
                for _ in range(200):
                    try:
                        task(names)
                    except BatchError as error:
                        if {kind for kind in kinds(error) if not kind.startswith("ordered")} == {"InProgressError"}:
                            continue
                        errors.append(error)
                    break

        threads = [threading.Thread(target=work, args=(reverse,)) for reverse in (False, True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == []
        assert seller.orders() == 200
