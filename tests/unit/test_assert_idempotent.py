"""`assert_idempotent` takes a handler to every crash point, and tells which of its effects were repeated or lost."""

from __future__ import annotations

import asyncio
import functools
import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from celery import Celery
from sqlalchemy.ext.asyncio import create_async_engine

from idem_tasks import (
    ConfigurationError,
    Idempotency,
    InProgressError,
    InvalidKeyError,
    MemoryStore,
    Policy,
    config,
    configure,
    current_claim,
    idempotency_of,
    idempotent_task,
)
from idem_tasks.runtime import deadline_clock
from idem_tasks.testing import (
    IdempotencyReport,
    ReportedPoint,
    aassert_idempotent,
    assert_idempotent,
    crash_point,
    redelivery,
)

KILLED = [
    "killed before it took the marker",
    "killed before it claimed the record",
    "killed before its handler ran",
    "killed after its handler ended",
    "killed before its outcome was published",
    "killed before it was acknowledged",
]
OTHERS = [
    "delivered twice",
    "delivered again while it ran",
    "paused past its lease",
    "the reply to its claim was lost",
    "the reply to its finish was lost",
]
RUN_AGAIN = {"killed after its handler ended", "paused past its lease"}
"""The crash points at which a handler that reruns runs twice from beginning to end."""


class Shop:
    """A shop whose charges and mails are effects; `charge` is a handler that has both."""

    def __init__(self, *, provider_knows_orders: bool = False, mails_are_rows: bool = False) -> None:
        self.charges: list[str] = []
        self.mails: list[str] = []
        self._provider_knows_orders = provider_knows_orders
        self._mails_are_rows = mails_are_rows

    @property
    def effects(self) -> dict[str, list[str]]:
        return {"charges": self.charges, "mails": self.mails}

    def forget(self) -> None:
        self.charges.clear()
        self.mails.clear()

    @idempotent_task(key="{order}")
    def charge(self, order: str, amount: int = 5) -> str:
        if not (self._provider_knows_orders and order in self.charges):
            self.charges.append(order)
        crash_point("after the charge")
        if not (self._mails_are_rows and order in self.mails):
            self.mails.append(order)
        return f"charged {amount} for {order}"


def appending(effects: list[Any], **options: Any) -> Callable[..., str]:
    """Return a handler that has one effect at every run, decorated with these options."""

    @idempotent_task(key="{order}", **options)
    def charge(order: str, amount: int = 5) -> str:
        effects.append(order)
        return f"charged {amount} for {order}"

    return charge


def upserting(effects: dict[Any, int], **options: Any) -> Callable[..., str]:
    """Return a handler whose effect is the same however often it runs, decorated with these options."""

    @idempotent_task(key="{order}", **options)
    def charge(order: str, amount: int = 5) -> str:
        effects[order] = amount
        return f"charged {amount} for {order}"

    return charge


def failing(task: Callable[..., Any], *args: Any, **how: Any) -> str:
    """Expect `assert_idempotent` to fail, and return what it says."""
    with pytest.raises(AssertionError) as caught:
        assert_idempotent(task, *args, **how)
    return str(caught.value)


def marked(text: str) -> set[str]:
    """Return the crash points that a report's table marks."""
    return {line[2:].split("  ")[0] for line in text.splitlines() if line.startswith("! ")}


@contextmanager
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Give the seconds of each wait meanwhile."""
    waited: list[float] = []
    wait = redelivery.Message.wait

    async def noted(message: redelivery.Message, seconds: float) -> None:
        waited.append(seconds)
        await wait(message, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(redelivery.Message, "wait", noted)
        yield waited


def point(report: IdempotencyReport, name: str) -> ReportedPoint:
    (found,) = [point for point in report.points if point.name == name]
    return found


# Crash points.


def test_every_crash_point_is_visited() -> None:
    """Each step at which a worker can die, then what else happens to messages; the undisturbed run comes first."""
    paid: dict[str, int] = {}
    report = assert_idempotent(upserting(paid), "A-1", effects=lambda: len(paid), reset=paid.clear)
    assert [point.name for point in report.points] == ["undisturbed", *KILLED, *OTHERS]
    assert report.passed
    assert all(point.effects == {"effects": 1} for point in report.points)
    assert all(point.outcome == "'charged 5 for A-1'" for point in report.points)


def test_the_handler_runs_again_only_where_its_outcome_was_not_recorded() -> None:
    """Twice where its worker died or was paused between the effect and the record, once everywhere else."""
    report = assert_idempotent(upserting({}), "A-1")
    assert {point.name for point in report.points if point.runs == 2} == RUN_AGAIN
    assert {point.runs for point in report.points} == {1, 2}


def test_an_effect_without_protection_of_its_own_is_repeated() -> None:
    """It says which one, how often, and where; and how it can be mended (F1)."""
    charges: list[str] = []
    text = failing(appending(charges), "A-1", effects={"charges": charges})
    assert marked(text) == RUN_AGAIN
    assert "charges: 2 instead of 1" in text
    assert "on_crash" in text
    assert "business key" in text


@pytest.mark.parametrize(
    "mended, repeated",
    [
        ({}, {"charges", "mails"}),
        ({"mails_are_rows": True}, {"charges"}),
        ({"provider_knows_orders": True}, {"mails"}),
        ({"provider_knows_orders": True, "mails_are_rows": True}, set()),
    ],
    ids=["none", "mails", "charges", "both"],
)
def test_each_effect_is_judged_by_itself(mended: dict[str, bool], repeated: set[str]) -> None:
    """Of a method's two effects, those that are not mended are named."""
    shop = Shop(**mended)
    try:
        report = str(assert_idempotent(shop.charge, "A-1", effects=shop.effects, reset=shop.forget))
    except AssertionError as error:
        report = str(error)
    assert {name for name in shop.effects if f"{name}: 2 instead of 1" in report} == repeated
    assert ("!" in report) == bool(repeated)


def test_a_crash_point_of_the_users_is_one_more() -> None:
    """The worker is killed there too: what came before it is repeated, what comes after it is not."""
    shop = Shop()
    text = failing(shop.charge, "A-1", effects=shop.effects)
    assert "killed after the charge" in marked(text)
    line = next(line for line in text.splitlines() if "killed after the charge " in line)
    assert line.split()[-6:] == ["2!", "1", "'charged", "5", "for", "A-1'"]


def test_a_crash_point_passed_again_has_a_number() -> None:
    """A loop's crash points are told apart."""

    @idempotent_task(key="{order}")
    def send(order: str) -> None:
        for _ in range(3):
            crash_point("between mails")

    names = [point.name for point in assert_idempotent(send, "A-1").points]
    assert names[4:7] == ["killed between mails", "killed between mails (2)", "killed between mails (3)"]


def test_a_crash_point_does_nothing_elsewhere() -> None:
    """A fake may have it in every test."""
    crash_point("after the charge")
    assert Shop().charge.__wrapped__(Shop(), "B-2") == "charged 5 for B-2"  # type: ignore[attr-defined]


def test_a_dead_worker_does_nothing_more() -> None:
    """Nothing of a killed delivery reaches the store: its claim is neither released nor finished."""
    states: list[str] = []

    @idempotent_task(key="{order}")
    def charge(order: str) -> None:
        record = idempotency_of(charge).lookup(order)
        assert record is not None
        states.append(f"{record.attempts} {record.crashes}")
        try:
            crash_point("in the handler")
        except BaseException:  # noqa: BLE001 - as code does that cleans up
            crash_point("in what cleans up")  # raises again
            states.append("went on")

    report = assert_idempotent(charge, "A-1")
    at = [point.name for point in report.points].index("killed in the handler")
    assert report.points[at].runs == 2
    assert set(states) == {"1 0", "2 1"}


def test_a_nested_handler_has_crash_points_too() -> None:
    """A handler that it calls uses the same store, and is not run again where its own outcome was recorded."""
    mails: list[str] = []
    mail = appending(mails, lease=5000, max_hold=5000)  # far longer than that of the handler under test

    @idempotent_task(key="{order}")
    def charge(order: str) -> str:
        return mail(order)

    text = failing(charge, "A-1", effects={"mails": mails})
    assert re.search(r"undisturbed +1 +1 ", text)
    assert marked(text) == {"killed after its handler ended, in a nested call"}
    assert "killed before it took the marker, in a nested call" in text
    assert "killed after its handler ended  " in text


def test_a_nested_handler_that_refuses_its_duplicate_is_told() -> None:
    """What it raises is the failure of the handler that called it, which then never ends (F1)."""
    mail = upserting({}, on_duplicate="raise")

    @idempotent_task(key="{order}")
    def charge(order: str) -> str:
        return mail(order)

    text = failing(charge, "A-1")
    assert "killed after its handler ended" in marked(text)
    assert "the handler raised DuplicateError" in text


# Effects.


def test_without_effects_only_outcomes_are_compared() -> None:
    """A handler whose effects nobody counts passes, and is not called idempotent for that."""
    report = assert_idempotent(appending([]), "A-1")
    assert report.points[0].effects == {}
    first, *_ = str(report).splitlines()
    assert first == "charge('A-1') has one outcome at all 11 crash points; its effects were not counted"


@pytest.mark.parametrize(
    "count",
    [
        lambda recorded: recorded,
        lambda recorded: lambda: len(recorded),
        lambda recorded: lambda: {"effects": len(recorded)},
        lambda recorded: {"effects": recorded},
        lambda recorded: {"effects": lambda: len(recorded)},
    ],
    ids=["list", "callable", "numbers by name", "lists by name", "callables by name"],
)
def test_effects_are_counted_in_many_ways(count: Callable[[list[str]], Any]) -> None:
    """A list, a callable, or several by name."""
    charges: list[str] = []
    text = failing(appending(charges), "A-1", effects=count(charges))
    assert "effects: 2 instead of 1" in text


def test_an_effect_may_be_one_that_was_not_there_undisturbed() -> None:
    """Names may come and go: a refund that only a second run makes is told too."""
    done: list[str] = []

    @idempotent_task(key="{order}")
    def charge(order: str) -> None:
        done.append("refund" if current_claim().taken_over and order in done else order)

    text = failing(charge, "A-1", effects=lambda: Counter(done), reset=done.clear)
    assert "refund: 1 instead of 0" in text
    assert "A-1: " not in text


def test_effects_before_are_not_counted() -> None:
    """What was recorded earlier does not matter."""
    charges = ["from another test"]
    report = assert_idempotent(appending(charges, on_crash="hold"), "A-1", effects=charges)
    assert report.points[0].effects == {"effects": 1}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sqlalchemy.Engine]:
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/shop.db")
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE payments (order_id TEXT)"))
        connection.execute(sqlalchemy.text("CREATE TABLE mails (order_id TEXT PRIMARY KEY)"))
        connection.execute(sqlalchemy.text("CREATE TABLE idem_tasks_records (id TEXT)"))
    yield engine
    engine.dispose()


def paying(engine: sqlalchemy.Engine, insert_mail: str) -> Callable[[str], None]:
    @idempotent_task(key="{order}")
    def pay(order: str) -> None:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("INSERT INTO payments VALUES (:order)"), {"order": order})
            connection.execute(sqlalchemy.text(insert_mail), {"order": order})
            connection.execute(sqlalchemy.text("INSERT INTO idem_tasks_records VALUES (:order)"), {"order": order})

    return pay


def emptying(engine: sqlalchemy.Engine) -> Callable[[], None]:
    def empty() -> None:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("DELETE FROM payments"))
            connection.execute(sqlalchemy.text("DELETE FROM mails"))

    return empty


def test_rows_of_a_database_are_effects(engine: sqlalchemy.Engine) -> None:
    """Counted by table, without ours; a row under a business key is not repeated."""
    pay = paying(engine, "INSERT OR IGNORE INTO mails VALUES (:order)")
    text = failing(pay, "A-1", effects=engine, reset=emptying(engine))
    assert "payments: 2 instead of 1" in text
    assert "mails: 2" not in text
    assert "idem_tasks_records" not in text


def test_an_insert_that_collides_is_told(engine: sqlalchemy.Engine) -> None:
    """A handler that cannot run a second time leaves its message unacknowledged."""
    pay = paying(engine, "INSERT INTO mails VALUES (:order)")
    text = failing(pay, "A-1", effects=engine, reset=emptying(engine))
    assert marked(text) == RUN_AGAIN
    assert "the handler raised IntegrityError" in text


def test_what_cannot_be_counted_is_refused() -> None:
    """It says what can be."""
    asynchronous = create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(ConfigurationError, match="a SQLAlchemy Engine, not AsyncEngine"):
        assert_idempotent(appending([]), "A-1", effects=asynchronous)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="counted '3', which is no whole number"):
        assert_idempotent(appending([]), "A-1", effects=lambda: "3")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="a SQLAlchemy Engine, not str"):
        assert_idempotent(appending([]), "A-1", effects="sqlite:///shop.db")


def test_a_dict_is_taken_for_effects_by_name() -> None:
    """A fake that remembers receipts by key is no such mapping: the length of a receipt is no number of effects."""
    receipts: dict[str, str] = {}

    @idempotent_task(key="{order}")
    def charge(order: str) -> str:
        return receipts.setdefault(order, f"receipt for {order}")

    with pytest.raises(ConfigurationError, match=r"not str.*; a dict .* under a name"):
        assert_idempotent(charge, "A-1", effects=receipts, reset=receipts.clear)
    report = assert_idempotent(charge, "A-1", effects={"charges": receipts}, reset=receipts.clear)
    assert report.points[0].effects == {"charges": 1}


def test_effects_that_count_nothing_are_refused() -> None:
    """What looks at the wrong list, or at a fake that remembers an earlier test, would pass whatever is done."""
    with pytest.raises(ConfigurationError, match=r"counted nothing .* reset="):
        assert_idempotent(appending([]), "A-1", effects=[])
    paid = {"A-1": 5}
    with pytest.raises(ConfigurationError, match=r"counted nothing .* reset="):
        assert_idempotent(upserting(paid), "A-1", effects={"charges": paid})


def test_a_final_failure_need_not_have_an_effect() -> None:
    """Nothing happens in a handler that declines, and nothing is what is counted."""
    charges: list[str] = []

    @idempotent_task(key="{order}", record_failures=LookupError)
    def charge(order: str) -> None:
        raise LookupError("no such card")

    assert assert_idempotent(charge, "A-1", effects=charges).passed


def test_fakes_that_remember_need_a_reset() -> None:
    """An upsert that was made in one run is not made in the next: without `reset` that is no verdict."""
    paid: dict[str, int] = {}
    with pytest.raises(ConfigurationError, match=r"effects were .*: 1.* and .*: 0.* reset="):
        assert_idempotent(upserting(paid), "A-1", effects=lambda: len(paid))


def test_a_missing_effect_is_told() -> None:
    """A run that takes an earlier one's trace for the whole work leaves the rest undone (F1)."""
    shop = Shop()

    @idempotent_task(key="{order}")
    def charge(order: str) -> None:
        if order in shop.charges:
            return
        shop.charges.append(order)
        crash_point("after the charge")
        shop.mails.append(order)

    text = failing(charge, "A-1", effects=shop.effects, reset=shop.forget)
    assert marked(text) == {"killed after the charge"}
    assert "mails: 0 instead of 1" in text
    assert "by itself" in text


# Outcomes.


def test_two_outcomes_of_one_message_are_told() -> None:
    """An outcome that cannot be kept is another one for a duplicate (F43)."""

    @idempotent_task(key="{order}", max_outcome_bytes=3)
    def charge(order: str) -> str:
        return "charged"

    text = failing(charge, "A-1")
    assert marked(text) == {
        "killed before its outcome was published",
        "killed before it was acknowledged",
        "delivered twice",
        "delivered again while it ran",
        "paused past its lease",
    }
    assert "the caller got OutcomeError" in text
    assert "one caller got 'charged', another OutcomeError" in text
    assert "max_outcome_bytes=3" in text


def test_an_outcome_that_differs_in_every_run_is_one_for_all_callers() -> None:
    """All deliveries of a message get what was recorded first, also one that was taken over."""
    numbers = itertools.count()

    @idempotent_task(key="{order}")
    def number(order: str) -> int:
        return next(numbers)

    assert assert_idempotent(number, "A-1").passed


@pytest.mark.parametrize("on_duplicate", ["skip", "raise"])
def test_what_duplicates_get_by_policy_is_right(on_duplicate: str) -> None:
    """None, or DuplicateError with the outcome, is no other outcome."""
    assert assert_idempotent(upserting({}, on_duplicate=on_duplicate), "A-1").passed


def test_a_final_failure_is_an_outcome() -> None:
    """A handler that raises what its policy records is as good as one that returns."""

    @idempotent_task(key="{order}", record_failures=LookupError)
    def charge(order: str) -> None:
        raise LookupError("no such card")

    report = assert_idempotent(charge, "A-1")
    assert {point.outcome for point in report.points} == {"LookupError: no such card"}


def test_a_final_failure_may_be_replayed_under_its_name() -> None:
    """One that cannot be made again from its text is the same outcome."""

    class DeclinedError(Exception):
        def __init__(self, code: int, card: str) -> None:
            super().__init__(f"{code} {card}")

    @idempotent_task(key="{order}", record_failures=DeclinedError)
    def charge(order: str) -> None:
        raise DeclinedError(5, "4711")

    assert "ReplayedFailureError" in {point.outcome.split(":")[0] for point in assert_idempotent(charge, "A-1").points}


def test_a_message_that_nobody_acknowledges_is_told() -> None:
    """A handler that asks for another delivery for ever, once it was interrupted."""
    runs: list[str] = []

    @idempotent_task(key="{order}", max_crashes=None)
    def charge(order: str) -> None:
        runs.append(order)
        if len(runs) > 1:
            raise InProgressError(scope="elsewhere", key=order, retry_after=1.0)

    text = failing(charge, "A-1", reset=runs.clear)
    assert marked(text) == RUN_AGAIN
    assert "never acknowledged: InProgressError" in text


def test_a_handler_that_does_something_else_every_time_is_told() -> None:
    """A crash point that is not reached again proves nothing."""
    runs: list[int] = []

    @idempotent_task(key="{order}")
    def charge(order: str) -> None:
        runs.append(1)
        if len(runs) == 1:
            crash_point("only once")

    assert "was not reached" in failing(charge, "A-1")


# Policies.


def test_hold_leaves_in_doubt_what_may_have_happened() -> None:
    """At most once: an effect is never repeated, and may be missing where a person is told to look (F2)."""
    charges: list[str] = []
    report = assert_idempotent(appending(charges, on_crash="hold"), "A-1", effects=charges)
    doubtful = {point.name: point.effects["effects"] for point in report.points if "in doubt" in point.outcome}
    assert doubtful == {
        "killed before its handler ran": 0,
        "killed after its handler ended": 1,
        "paused past its lease": 1,
        "the reply to its claim was lost": 0,
    }
    assert {point.runs for point in report.points} == {0, 1}


def test_a_parked_message_is_right() -> None:
    """A policy without a second try parks after the first crash, for a person."""
    charges: list[str] = []
    report = assert_idempotent(appending(charges, max_crashes=0), "A-1", effects=charges)
    assert point(report, "killed after its handler ended").outcome == "parked"


@pytest.mark.parametrize("options", [{"lease": 0.1, "max_hold": 1000}, {"lease": 5000, "max_hold": 5000}, {}])
def test_waiting_for_a_key_in_progress_takes_no_time(
    options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that waits longer than the lease of one that lives does not take over from it: that is renewed."""
    charge = upserting({}, on_in_progress="wait", wait_timeout=300, **options)
    began = time.monotonic()
    with waiting(monkeypatch) as waited:
        report = assert_idempotent(charge, "A-1")
    assert point(report, "delivered again while it ran").runs == 1
    assert sum(waited) > 300
    assert time.monotonic() - began < 60


def test_a_copy_comes_while_the_first_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is delivered again while the first runs finds its key in progress, and waits if it is to (F5)."""
    with waiting(monkeypatch) as waited:
        assert_idempotent(upserting({}, on_in_progress="wait", wait_timeout=7), "A-1")
    assert sum(waited) >= 7


def test_a_finish_without_a_reply_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else of an undisturbed handler waits (F21)."""
    with waiting(monkeypatch) as waited:
        assert_idempotent(upserting({}), "A-1")
    assert len(waited) == 1


def test_a_handler_that_asks_its_provider_after_a_takeover_is_right() -> None:
    """It is told that another one may have done the work before it (F1)."""
    charges: list[str] = []

    @idempotent_task(key="{order}")
    def charge(order: str) -> None:
        if not (current_claim().taken_over and order in charges):
            charges.append(order)

    report = assert_idempotent(charge, "A-1", effects=lambda: charges.count("A-1"), reset=charges.clear)
    assert {point.effects["effects"] for point in report.points} == {1}


@pytest.mark.parametrize("how", ["run", "block", "asyncio"])
def test_whatever_a_handler_does_with_records_is_on_the_same_store(how: str) -> None:
    """Also what is not decorated, and what is asyncio within a blocking handler."""
    own = Idempotency(store=MemoryStore())
    mails: list[str] = []

    @idempotent_task(key="{order}", idempotency=own)
    async def send(order: str) -> None:
        mails.append(order)

    @idempotent_task(key="{order}", idempotency=own)
    def charge(order: str) -> None:
        if how == "run":
            own.run(mails.append, order, scope="mail", key=order)
        elif how == "asyncio":
            asyncio.run(send(order))
        else:
            with own.claim(scope="mail", key=order) as claim:
                if not claim.replayed:
                    mails.append(order)

    text = failing(charge, "A-1", effects={"mails": mails})
    died = "before its outcome was recorded" if how == "block" else "after its handler ended"
    assert marked(text) == {f"killed {died}, in a nested call"}
    assert list(own.records()) == []


def test_a_retention_that_is_too_short_is_found() -> None:
    """Its outcome is forgotten before the message comes again (F17)."""
    charges: list[str] = []
    text = failing(appending(charges, max_hold=60, retention=1), "A-1", effects=charges)
    assert "killed before it was acknowledged" in marked(text)


@pytest.mark.parametrize("where", ["decorator", "idempotency", "configure"])
def test_the_handlers_own_policy_is_in_force(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it comes from its decorator, its `Idempotency` or `configure`."""
    monkeypatch.setattr(config, "_default", None)
    charges: list[str] = []
    options: dict[str, Any] = {}
    if where == "decorator":
        options = {"policy": Policy(on_crash="hold")}
    elif where == "idempotency":
        options = {"idempotency": Idempotency(store=MemoryStore(), policy=Policy(on_crash="hold"))}
    else:
        configure(store=MemoryStore(), on_crash="hold")
    assert assert_idempotent(appending(charges, **options), "A-1", effects=charges).passed


# What is left as it was.


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("configured", [False, True])
def test_nothing_of_the_users_is_touched(configured: bool, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what is configured, nor its store, nor the clock; also after an error."""
    monkeypatch.setattr(config, "_default", None)
    monkeypatch.setenv("IDEM_TASKS_DATABASE_URL", "nonsense://")
    before = configure(store=MemoryStore()) if configured else None
    own, began = Idempotency(store=MemoryStore()), deadline_clock()

    @idempotent_task(key="{order}", idempotency=own)
    def nested(order: str) -> None:
        if fails:
            raise LookupError(order)

    @idempotent_task(key="{order}")
    def charge(order: str) -> None:
        nested(order)

    if fails:
        with pytest.raises(LookupError):
            assert_idempotent(charge, "A-1")
    else:
        assert_idempotent(charge, "A-1")
    assert config._default is before
    assert list(own.records()) == []
    assert before is None or list(before.records()) == []
    assert deadline_clock() - began < 60


def test_a_record_of_the_users_does_not_matter() -> None:
    """A key that was used before is new at each crash point."""
    charges: list[str] = []
    charge = appending(charges, idempotency=Idempotency(store=MemoryStore()), on_crash="hold")
    charge("A-1")
    assert assert_idempotent(charge, "A-1", effects=charges).points[0].runs == 1


def test_arguments_are_delivered_as_they_were_sent() -> None:
    """A handler that changes its arguments gets the same again; objects that are no data are not copied (F18)."""
    lines = {"lines": [1, 2], "pair": (1, [2])}
    fake = object()
    given: list[Any] = []

    @idempotent_task(key="{order}", fingerprint=["order", "payload"])
    def charge(order: str, payload: Any, *, gateway: object) -> None:
        payload["lines"].append(3)
        given.append(gateway)

    assert assert_idempotent(charge, "A-1", lines, kwargs={"gateway": fake}).passed
    assert lines == {"lines": [1, 2], "pair": (1, [2])}
    assert set(given) == {fake}


def test_keywords_of_the_handler_do_not_meet_ours() -> None:
    """A handler may have a parameter `effects`; its keyword arguments are given by `kwargs`."""

    @idempotent_task(key="{task}")
    def charge(task: str, effects: int, *, kwargs: int) -> int:
        return effects + kwargs

    report = assert_idempotent(charge, kwargs={"task": "A-1", "effects": 1, "kwargs": 2})
    assert report.points[0].outcome == "3"
    assert report.call == "charge(task='A-1', effects=1, kwargs=2)"


# Misuse.


def test_a_handler_that_fails_undisturbed_raises_as_it_is() -> None:
    """Its exception goes on unchanged, with a note."""

    @idempotent_task(key="{order}")
    def charge(order: str) -> None:
        raise LookupError(order)

    with pytest.raises(LookupError) as caught:
        assert_idempotent(charge, "A-1")
    assert caught.value.__notes__ == ["raised in the undisturbed run of assert_idempotent"]


def test_what_ends_the_program_is_not_kept_from_it() -> None:
    """Ctrl-C, pytest.skip or a shutdown within a handler goes on at once."""

    class ShutdownError(BaseException):
        pass

    @idempotent_task(key="{order}")
    def charge(order: str) -> None:
        raise ShutdownError

    with pytest.raises(ShutdownError):
        assert_idempotent(charge, "A-1")


def test_a_handler_that_fails_the_second_time_needs_a_reset() -> None:
    """A fake that refuses what it knows is told from a handler that is wrong."""
    seen: set[str] = set()

    @idempotent_task(key="{order}")
    def charge(order: str) -> None:
        assert order not in seen
        seen.add(order)

    with pytest.raises(AssertionError) as caught:
        assert_idempotent(charge, "A-1")
    assert "reset=" in caught.value.__notes__[-1]


def test_a_call_that_has_no_key_raises_what_says_so() -> None:
    """A message without an idempotency key never gets to its handler: the error tells why, as it does in a worker."""
    with pytest.raises(InvalidKeyError, match="order") as caught:
        assert_idempotent(appending([]), None)
    assert caught.value.__notes__ == ["raised in the undisturbed run of assert_idempotent"]


def test_a_call_that_does_not_reach_its_handler_is_refused() -> None:
    """A wrapper that answers by itself leaves nothing to examine."""
    charge = appending([])

    @functools.wraps(charge)
    def closed(order: str) -> None: ...

    with pytest.raises(ConfigurationError, match="returned None and its handler never ran"):
        assert_idempotent(closed, "A-1")


def test_what_is_not_decorated_is_refused() -> None:
    """A bare function, or the value that a handler returned."""
    with pytest.raises(ConfigurationError, match="not decorated with @idempotent_task: give assert_idempotent the"):
        assert_idempotent(print, "A-1")


def test_what_is_not_protected_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turned off or in shadow every delivery runs, and there is nothing to assert."""
    with pytest.raises(ConfigurationError, match="leave shadow=True out"):
        assert_idempotent(appending([], shadow=True), "A-1")
    with pytest.raises(ConfigurationError, match="enabled=False"):
        assert_idempotent(appending([], enabled=False), "A-1")
    monkeypatch.setenv("IDEM_TASKS_DISABLED", "1")
    with pytest.raises(ConfigurationError, match="IDEM_TASKS_DISABLED"):
        assert_idempotent(appending([]), "A-1")


# Asyncio.


class AsyncShop(Shop):
    @idempotent_task(key="{order}")
    async def achieve(self, order: str) -> str:
        await asyncio.sleep(0)
        self.charges.append(order)
        crash_point("after the charge")
        await asyncio.sleep(0)
        self.mails.append(order)
        return order


def test_an_async_handler_is_judged_as_a_blocking_one() -> None:
    """The same crash points, the same verdict, on one event loop for all."""
    blocking, asynchronous = Shop(), AsyncShop()
    expected = failing(blocking.charge, "A-1", effects=blocking.effects)
    text = failing(asynchronous.achieve, "A-1", effects=asynchronous.effects)
    assert marked(text) == marked(expected) == RUN_AGAIN | {"killed after the charge"}


def test_a_kill_within_a_task_group_is_a_kill() -> None:
    """Though it comes out as a group of exceptions."""
    shop = Shop()

    @idempotent_task(key="{order}", on_crash="hold")
    async def charge(order: str) -> None:
        async def call_provider() -> None:
            shop.charges.append(order)
            crash_point("after the charge")

        async with asyncio.TaskGroup() as group:
            group.create_task(call_provider())

    report = assert_idempotent(charge, "A-1", effects=shop.effects)
    assert point(report, "killed after the charge").outcome == "in doubt"


def test_within_an_event_loop_it_is_awaited() -> None:
    """`assert_idempotent` says so, and `aassert_idempotent` runs on the loop that runs."""
    loops: set[asyncio.AbstractEventLoop] = set()
    mails: list[str] = []

    @idempotent_task(key="{order}", on_crash="hold")
    async def send(order: str) -> None:
        loops.add(asyncio.get_running_loop())
        mails.append(order)

    async def count() -> int:
        return len(mails)

    async def reset() -> None:
        mails.clear()

    async def examine() -> IdempotencyReport:
        with pytest.raises(ConfigurationError, match="await aassert_idempotent"):
            assert_idempotent(send, "A-1")
        with pytest.raises(AssertionError, match="not idempotent at 2 of 11"):
            await aassert_idempotent(appending(mails), "A-1", effects=count)
        report = await aassert_idempotent(send, "A-1", effects=count, reset=reset)
        assert loops == {asyncio.get_running_loop()}
        return report

    assert asyncio.run(examine()).points[0].effects == {"effects": 1}


def test_a_blocking_handler_may_be_examined_within_an_event_loop() -> None:
    """Either function does it, on the loop's thread."""

    async def examine() -> set[bool]:
        charge = upserting({})
        return {assert_idempotent(charge, "A-1").passed, (await aassert_idempotent(charge, "A-1")).passed}

    assert asyncio.run(examine()) == {True}


def test_a_current_event_loop_stays_that() -> None:
    """An async handler does not take the thread's event loop away from other tests."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        shop = AsyncShop()
        failing(shop.achieve, "A-1", effects=shop.effects)
        assert asyncio.get_event_loop_policy().get_event_loop() is loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()


# Celery.


@pytest.mark.parametrize("bind", [False, True])
@pytest.mark.parametrize("options", [{}, {"autoretry_for": (ValueError,)}], ids=["plain", "autoretry"])
def test_a_celery_task_is_judged_as_its_handler(bind: bool, options: dict[str, Any]) -> None:
    """Under the task's name, without a broker, bound or not."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    made = {"acks_late": True, "shared": False, **options}  # shared, every later app of this process would have it
    charges: list[str] = []
    scopes: set[str] = set()

    def work(order: str) -> str:
        charges.append(order)
        scopes.add(idempotency_of(task).scope_for(order))
        return f"charged {order}"

    if bind:

        @app.task(name="shop.charge", bind=True, **made)  # type: ignore[untyped-decorator]
        @idempotent_task(key="{order}")
        def task(self: Any, order: str) -> str:
            return work(order)

    else:

        @app.task(name="shop.charge", **made)  # type: ignore[untyped-decorator]
        @idempotent_task(key="{order}")
        def task(order: str) -> str:
            return work(order)

    text = failing(task, "A-1", effects={"charges": charges})
    assert marked(text) == RUN_AGAIN
    assert scopes == {"shop.charge"}


# The report.


def test_the_report_is_a_table_for_people() -> None:
    """What happened, the runs, the effects and the outcome in columns; what was wrong is marked."""
    shop = Shop(mails_are_rows=True)
    text = failing(shop.charge, "A-1", effects={**shop.effects, "nothing": []}, reset=shop.forget)
    assert text.splitlines()[:6] == [
        "Shop.charge('A-1') is not idempotent at 3 of 12 crash points",
        "",
        "                                           runs   charges   mails   outcome",
        "  undisturbed                                 1         1       1   'charged 5 for A-1'",
        "  killed before it took the marker            1         1       1   'charged 5 for A-1'",
        "  killed before it claimed the record         1         1       1   'charged 5 for A-1'",
    ]
    assert "! paused past its lease                       2         2!      1   'charged 5 for A-1'" in text
    assert "nothing" not in text


def test_a_long_outcome_is_shortened() -> None:
    """A row stays a row."""

    @idempotent_task(key="{order}", record_failures=LookupError)
    def charge(order: str) -> None:
        raise LookupError("no such card\n" * 1000)

    assert max(map(len, str(assert_idempotent(charge, "A" * 1000)).splitlines())) < 120
