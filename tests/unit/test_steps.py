"""`claim.step`: the outcome of each step once, whatever becomes of the handler around it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import pytest

from idem_tasks import (
    Claim,
    Idempotency,
    MemoryStore,
    OutcomeContext,
    RedisStore,
    TieredStore,
    current_claim,
    idempotent_task,
)
from idem_tasks.claims import EncodedOutcome, State
from idem_tasks.errors import (
    ConfigurationError,
    InDoubtError,
    InvalidKeyError,
    LeaseLostError,
    OutcomeError,
    ParkedError,
    StepsChangedError,
    StoreConfigurationError,
    StoreError,
    StoreUnavailableError,
)
from idem_tasks.events import EventName
from idem_tasks.outcomes import JsonCodec
from idem_tasks.runtime import register_interruption, run_sync
from idem_tasks.stores.memory_marker import MemoryMarker
from idem_tasks.testing import assert_idempotent, crash_point
from tests.unit.scripted import LEASE, SCOPE, World, away, world_on

Body = Callable[[str], Generator[tuple[Any, ...], Any, Any]]
"""A handler that yields the arguments of each step and is sent its value, so that it is written once."""


def stepping(world: World, body: Body, **options: Any) -> Callable[..., Any]:
    def handler(order: str) -> Any:
        steps = body(order)
        try:
            wanted = next(steps)
            while True:
                try:
                    value = current_claim().step(*wanted)
                except BaseException as error:  # noqa: BLE001 - thrown into the body
                    wanted = steps.throw(error)
                else:
                    wanted = steps.send(value)
        except StopIteration as end:
            return end.value

    async def coroutine_handler(order: str) -> Any:
        steps = body(order)
        try:
            wanted = next(steps)
            while True:
                try:
                    value = await current_claim().step(*wanted)
                except BaseException as error:  # noqa: BLE001 - thrown into the body
                    wanted = steps.throw(error)
                else:
                    wanted = steps.send(value)
        except StopIteration as end:
            return end.value

    return world.task(coroutine_handler if world.runtime == "asyncio" else handler, **options)


class Shop:
    """Charges and mails; what is planned happens to the handler between or after them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.effects: list[str] = []
        self.plan: list[BaseException | Callable[[], Any]] = []

    def charge(self, order: str) -> str:
        self.effects.append("charge")
        self.happen("in charge")
        return f"receipt {len(self.effects)}"

    async def mail(self, order: str) -> int:
        await asyncio.sleep(0)
        return self.post(order)

    def post(self, order: str) -> int:
        self.effects.append("mail")
        self.happen("in mail")
        return len(self.effects)

    def happen(self, where: str) -> None:
        if self.plan and getattr(self.plan[0], "where", "between") == where:
            planned = self.plan.pop(0)
            if isinstance(planned, BaseException):
                raise planned
            planned()

    def order(self, order: str) -> Generator[tuple[Any, ...], Any, Any]:
        receipt = yield "charge", self.charge, order
        self.happen("between")
        mailed = yield "mail", self.mail if self.world.runtime == "asyncio" else self.post, order
        return [receipt, mailed]


class BrokenError(Exception):
    """Fails a handler, at the place in its first argument."""

    def __init__(self, where: str = "between") -> None:
        super().__init__(where)
        self.where = where


class SoftLimitError(Exception):
    """Stands for Celery's soft time limit."""


register_interruption(SoftLimitError)


@pytest.fixture
def shop(world: World) -> Shop:
    return Shop(world)


def test_a_finished_step_does_not_run_again(world: World, shop: Shop) -> None:
    """A handler that fails after a step gets the step's outcome at its next attempt (F15)."""
    task = stepping(world, shop.order)
    shop.plan = [BrokenError(), BrokenError()]
    for _ in range(2):
        with pytest.raises(BrokenError):
            task("A-1")
    assert task("A-1") == ["receipt 1", 2]
    assert task("A-1") == ["receipt 1", 2]
    assert shop.effects == ["charge", "mail"]


def test_a_crash_between_two_steps_repeats_none(world: World, shop: Shop) -> None:
    """Whoever takes over from a dead worker goes on after the last finished step (F15)."""
    task = stepping(world, shop.order)
    world.record_tier.before("release", away())
    shop.plan = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        task("A-1")
    world.pass_time(LEASE + 1)
    assert task("A-1") == ["receipt 1", 2]
    assert shop.effects == ["charge", "mail"]


def test_a_step_that_raised_runs_again(world: World, shop: Shop) -> None:
    """Nothing is recorded of it, and its exception is the handler's own."""
    task = stepping(world, shop.order)
    shop.plan = [BrokenError("in mail")]
    with pytest.raises(BrokenError):
        task("A-1")
    assert task("A-1") == ["receipt 1", 3]
    assert shop.effects == ["charge", "mail", "mail"]


def test_a_dead_worker_leaves_a_step_in_doubt(world: World, shop: Shop) -> None:
    """Under hold a step that was begun and not finished runs again only when a person says so (F15, F55)."""
    task = stepping(world, shop.order, on_crash="hold")
    shop.plan = [BrokenError("in charge")]
    with pytest.raises(BrokenError):
        task("A-1")
    with pytest.raises(InDoubtError):
        task("A-1")
    assert shop.effects == ["charge"]
    run_sync(world.real.resolve(SCOPE, "A-1", None))
    assert task("A-1") == ["receipt 2", 3]


def test_other_steps_park_the_record(world: World, shop: Shop) -> None:
    """The step does not run, and the error and the record say what was done then and now."""
    names = ["charge", "mail"]

    def body(order: str) -> Generator[tuple[Any, ...], Any, Any]:
        for name in names:
            yield name, shop.charge, order
        raise BrokenError

    task = stepping(world, body)
    with pytest.raises(BrokenError):
        task("A-1")
    names[1] = "refund"
    with pytest.raises(StepsChangedError) as caught:
        task("A-1")
    assert (caught.value.earlier, caught.value.now) == (("charge", "mail"), ("charge", "refund"))
    assert len(shop.effects) == 2
    record = world.record()
    assert (record.state, record.error_message) == (State.PARKED, str(caught.value))
    assert "charge, mail" in str(caught.value)
    assert record.failures == 1
    assert world.held() == 0
    assert world.count(EventName.PARKED) == 1
    assert world.count(EventName.LEASE_LOST) == 0
    with pytest.raises(ParkedError):
        task("A-1")
    run_sync(world.real.forget(SCOPE, "A-1"))
    if world.marker is not None:
        run_sync(world.marker.real.drop([(SCOPE, "A-1")]))
    with pytest.raises(BrokenError):
        task("A-1")


def test_a_handler_cannot_go_on_once_it_is_parked(world: World, shop: Shop) -> None:
    """One that keeps the error to itself, or raises another one, changes nothing of what is recorded."""
    names, endings = ["charge"], ["raise", "return"]

    def body(order: str) -> Generator[tuple[Any, ...], Any, Any]:
        try:
            yield names[0], shop.charge, order
        except StepsChangedError:
            if endings.pop() == "raise":
                raise BrokenError from None
            return "all is well"
        raise BrokenError

    task = stepping(world, body)
    for key in ("A-1", "A-2"):
        names[0] = "charge"
        with pytest.raises(BrokenError):
            task(key)
        names[0] = "refund"
        with pytest.raises(BrokenError if key == "A-2" else StepsChangedError):
            task(key)
        assert world.state(key) is State.PARKED
    assert world.count(EventName.PARKED) == 2
    assert world.count(EventName.RELEASED) == 2


def test_fewer_steps_than_last_time_are_fine(world: World, shop: Shop) -> None:
    """What is not asked for is not missed."""
    numbers = [2, 1]

    def body(order: str) -> Generator[tuple[Any, ...], Any, Any]:
        for _ in range(numbers.pop(0)):
            yield "charge", shop.charge, order
        if numbers:
            raise BrokenError
        return "done"

    task = stepping(world, body)
    with pytest.raises(BrokenError):
        task("A-1")
    assert task("A-1") == "done"
    assert len(shop.effects) == 2


def test_a_new_record_begins_every_step_again(world: World, shop: Shop) -> None:
    """After the retention an order of the same number is another one."""
    task = stepping(world, shop.order, retention=60, max_hold=60)
    task("A-1")
    world.pass_time(200_000)
    assert task("A-1") == ["receipt 3", 4]


@dataclass
class Receipt:
    number: int


def receipt_of() -> Receipt:
    return Receipt(7)


class Odd:
    """Has no JSON form."""


def test_an_outcome_comes_back_as_its_annotation_says(world: World) -> None:
    """A step's value is decoded as a handler's is, to the type that the step's function names."""
    got: list[Any] = []

    def body(order: str) -> Generator[tuple[Any, ...], Any, Any]:
        got.append((yield "receipt", receipt_of))
        got.append((yield "pair", lambda: (1, b"2")))
        if len(got) < 4:
            raise BrokenError

    task = stepping(world, body)
    with pytest.raises(BrokenError):
        task("A-1")
    task("A-1")
    assert got == [Receipt(7), (1, b"2")] * 2


@pytest.mark.parametrize(
    "value, reason", [(Odd(), "could not be encoded"), ("x" * 100, "max_outcome_bytes")], ids=["odd", "large"]
)
def test_what_cannot_be_kept_is_returned_this_time(world: World, value: Any, reason: str) -> None:
    """And never runs again: a later attempt that needs it gets an error that says why (F43)."""
    got: list[Any] = []

    def make() -> Any:
        got.append(value)
        return value

    def body(order: str) -> Generator[tuple[Any, ...], Any, Any]:
        assert (yield "make", make) is value
        raise BrokenError

    task = stepping(world, body, max_outcome_bytes=50)
    with pytest.raises(BrokenError):
        task("A-1")
    [event] = [event for event in world.events if event.name is EventName.OUTCOME_NOT_KEPT]
    assert event.details["step"] == "make"
    with pytest.raises(OutcomeError, match=f"step 'make' of .*{reason}"):
        task("A-1")
    assert len(got) == 1


def test_an_annotation_that_cannot_be_kept_is_told_before_the_effect(world: World, shop: Shop) -> None:
    """What the function's annotation tells is a mistake of the program, found at its first run."""

    def odd() -> Odd:
        shop.effects.append("odd")
        return Odd()

    def body(order: str) -> Generator[tuple[Any, ...], Any, Any]:
        yield "odd", odd

    with pytest.raises(ConfigurationError, match="Odd"):
        stepping(world, body)("A-1")
    assert shop.effects == []


def test_an_outcome_is_kept_though_duplicates_are_skipped(world: World, shop: Shop) -> None:
    """`skip` is about the handler's outcome: its steps are needed by its own next attempt."""
    task = stepping(world, shop.order, on_duplicate="skip")
    shop.plan = [BrokenError()]
    with pytest.raises(BrokenError):
        task("A-1")
    assert task("A-1") == ["receipt 1", 2]
    assert shop.effects == ["charge", "mail"]


class Seen(JsonCodec):
    """Remembers what outcomes were bound to."""

    def __init__(self) -> None:
        super().__init__()
        self.contexts: list[OutcomeContext] = []

    def encode(self, value: Any, type: Any, context: OutcomeContext) -> bytes:  # noqa: A002
        self.contexts.append(context)
        return super().encode(value, type, context)

    def decode(self, data: bytes, type: Any, context: OutcomeContext) -> Any:  # noqa: A002
        self.contexts.append(context)
        return super().decode(data, type, context)


def test_an_outcome_is_bound_to_its_step(world: World, shop: Shop) -> None:
    """A codec is told which step's bytes they are, so that one cannot be passed off as another's."""
    codec = world.idem.codec = Seen()
    task = stepping(world, shop.order, fingerprint=None)
    shop.plan = [BrokenError()]
    with pytest.raises(BrokenError):
        task("A-1")
    task("A-1")
    bound = [OutcomeContext(SCOPE, "A-1", None, step) for step in ("charge", "charge", "mail", None)]
    assert codec.contexts == bound


# The store


def test_a_store_that_is_away_for_a_while_is_waited_for(world: World, shop: Shop) -> None:
    """Beginning and finishing are tried again while the lease lives: nothing runs twice, and nothing is lost."""
    world.record_tier.before("begin_step", away(), away())
    world.record_tier.before("finish_step", away(), StoreError("odd"))
    world.record_tier.after("finish_step", away())
    assert stepping(world, shop.order)("A-1") == ["receipt 1", 2]
    assert shop.effects == ["charge", "mail"]


def test_a_step_is_not_begun_without_its_store(world: World, shop: Shop) -> None:
    """After the lease the message is put back, and nothing has run (F45)."""
    world.record_tier.down("begin_step")
    with pytest.raises(StoreUnavailableError, match="the beginning of step 'charge'"):
        stepping(world, shop.order)("A-1")
    assert shop.effects == []
    assert world.state() is State.RELEASED


def test_an_outcome_that_cannot_be_recorded_puts_the_message_back(world: World, shop: Shop) -> None:
    """The handler does not go on as if it were, and the next attempt runs the step again (F15, F45)."""
    world.record_tier.down("finish_step")
    task = stepping(world, shop.order)
    with pytest.raises(StoreUnavailableError, match="the outcome of step 'charge'"):
        task("A-1")
    assert world.local() >= LEASE - 2
    world.record_tier.up()
    assert task("A-1") == ["receipt 2", 3]


def test_without_its_store_where_that_is_allowed(world: World, shop: Shop) -> None:
    """Under on_store_unavailable="run" the handler goes on, which is told."""
    world.record_tier.down("begin_step", "finish_step")
    assert stepping(world, shop.order, on_store_unavailable="run")("A-1") == ["receipt 1", 2]
    assert world.count(EventName.UNPROTECTED_RUN) >= 2


def test_a_missing_table_is_told_at_once_before_the_effect(world: World, shop: Shop) -> None:
    """Waiting does not make it; after the effect its outcome is tried for as long as any."""
    world.record_tier.down("begin_step", error=StoreConfigurationError("no table"))
    began = world.local()
    with pytest.raises(StoreConfigurationError):
        stepping(world, shop.order)("A-1")
    assert world.local() == began
    assert shop.effects == []


def test_an_outcome_that_the_database_refuses_is_left_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is larger than a packet may be would run its step for ever (F43)."""
    large = "x" * 2_000_000

    def refuse_large() -> None:
        raise StoreError("too large a packet")

    def body(order: str) -> Generator[tuple[Any, ...], Any, Any]:
        assert (yield "large", lambda: large) == large
        raise BrokenError

    journal: Any = world.real.finish_step

    async def finish_step(*args: Any) -> Any:
        return refuse_large() if args[-1].body is not None else await journal(*args)

    monkeypatch.setattr(world.real, "finish_step", finish_step)
    task = stepping(world, body, max_outcome_bytes=10_000_000)
    with pytest.raises(BrokenError):
        task("A-1")
    with pytest.raises(OutcomeError, match="max_outcome_bytes"):
        task("A-1")
    assert world.count(EventName.OUTCOME_NOT_KEPT) == 1


def test_a_superseded_handler_stops_at_its_next_step(world: World, shop: Shop) -> None:
    """Its lease was over and somebody else is at it: no further effect, and the message comes again (F1, F59)."""
    shop.plan = [world.take_over]
    with pytest.raises(LeaseLostError):
        stepping(world, shop.order)("A-1")
    assert shop.effects == ["charge"]


def test_a_superseded_step_is_not_taken_for_recorded(world: World, shop: Shop) -> None:
    """Whose lease is over in mid-step hears it when the step ends (F1)."""

    def taken_over() -> None:
        world.take_over()

    taken_over.where = "in charge"  # type: ignore[attr-defined]
    shop.plan = [taken_over]
    with pytest.raises(LeaseLostError):
        stepping(world, shop.order)("A-1")
    assert shop.effects == ["charge"]


def test_a_superseded_handler_with_other_steps_parks_nothing(world: World, shop: Shop) -> None:
    """The record is another's, who is at work on it: the message comes again, and no person is called for (F1)."""
    names = ["charge"]

    def body(order: str) -> Generator[tuple[Any, ...], Any, Any]:
        yield names[0], shop.charge, order
        raise BrokenError

    task = stepping(world, body)
    with pytest.raises(BrokenError):
        task("A-1")
    names[0] = "refund"
    world.record_tier.before("release", world.take_over)
    with pytest.raises(LeaseLostError):
        task("A-1")
    assert (shop.effects, world.state(), world.count(EventName.PARKED)) == (["charge"], State.RUNNING, 0)


def test_the_first_outcome_is_everybodys(world: World, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one is there already, as after a reply that was lost, the handler gets that one."""
    journal: Any = world.real.finish_step

    async def finish_step(lease: Any, position: int, name: str, outcome: EncodedOutcome) -> Any:
        await journal(lease, position, name, EncodedOutcome(body=b'"the first"', codec="json"))
        return await journal(lease, position, name, outcome)

    monkeypatch.setattr(world.real, "finish_step", finish_step)

    def body(order: str) -> Generator[tuple[Any, ...], Any, Any]:
        return (yield "charge", shop.charge, order)

    assert stepping(world, body)("A-1") == "the first"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_soft_limit_after_the_effect_waits_for_its_record(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """What strikes while a step's outcome is written is raised once it is written (F62)."""
    with world_on(monkeypatch, "blocking", 2) as world:
        shop = Shop(world)
        getattr(world.record_tier, when)("finish_step", SoftLimitError())
        task = stepping(world, shop.order)
        with pytest.raises(SoftLimitError):
            task("A-1")
        assert task("A-1") == ["receipt 1", 2]
        assert shop.effects == ["charge", "mail"]


def test_a_cancellation_after_the_effect_waits_for_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """What strikes while a step's outcome is written is raised once it is written (F62)."""
    with world_on(monkeypatch, "asyncio", 2) as world:
        shop = Shop(world)
        task = stepping(world, shop.order)

        def cancel() -> None:
            for other in asyncio.all_tasks():
                if other is not asyncio.current_task():
                    other.cancel()

        world.record_tier.before("finish_step", cancel)
        with pytest.raises(asyncio.CancelledError):
            task("A-1")
        assert task("A-1") == ["receipt 1", 2]
        assert shop.effects == ["charge", "mail"]


def test_the_heartbeat_renews_while_a_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step may take longer than the lease."""
    with world_on(monkeypatch, "blocking", 2) as world:

        def slow() -> str:
            for _ in range(5):
                world.pass_time(LEASE / 2)
                world.beat()
            return "done"

        def body(order: str) -> Generator[tuple[Any, ...], Any, Any]:
            return (yield "slow", slow)

        assert stepping(world, body)("A-1") == "done"


# Looking at them


def test_the_steps_of_a_record_can_be_seen(world: World, shop: Shop) -> None:
    """In both runtimes: how far the handler came, and what there is of each outcome, but never the outcome."""
    look = world.idem.steps if world.runtime == "blocking" else world.idem.asteps
    shop.plan = [BrokenError("in mail")]
    with pytest.raises(BrokenError):
        stepping(world, shop.order)("A-1")
    charge, mail = world.drive(look, SCOPE, "A-1")
    assert (charge.position, charge.name, charge.codec, charge.outcome_bytes) == (1, "charge", "json", 11)
    assert charge.finished_at is not None
    assert (mail.position, mail.name, mail.finished_at, mail.outcome_bytes) == (2, "mail", None, None)
    assert "receipt" not in repr((charge, mail))
    assert world.drive(look, SCOPE, "A-2") == []
    with pytest.raises(InvalidKeyError):
        world.drive(look, SCOPE, "")


# What runs without a journal


@pytest.mark.parametrize("policy", [{"shadow": True}, {"enabled": False}], ids=["shadow", "disabled"])
def test_an_unprotected_handler_just_runs_its_steps(world: World, shop: Shop, policy: dict[str, Any]) -> None:
    """Nothing is asked of the store, and nothing of ours is in the way."""
    task = stepping(world, shop.order, **policy)
    shop.plan = [BrokenError()]
    with pytest.raises(BrokenError):
        task("A-1")
    assert task("A-1") == ["receipt 2", 3]
    assert not {"begin_step", "finish_step"} & set(world.record_tier.verbs)


def test_a_replay_reads_no_steps(world: World, shop: Shop) -> None:
    """A duplicate costs what it costs without steps."""
    task = stepping(world, shop.order)
    task("A-1")
    world.record_tier.verbs.clear()
    task("A-1")
    assert not {"begin_step", "finish_step"} & set(world.record_tier.verbs)


class Plain:
    """A store of somebody else's, without steps."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.runtimes = store.runtimes

    def on(self, *_: Any) -> Plain:
        return self

    def __getattr__(self, verb: str) -> Any:
        if verb.endswith("_step"):
            raise AttributeError(verb)
        return getattr(self._store, verb)


@pytest.mark.parametrize(
    "store",
    [
        Plain(MemoryStore()),
        TieredStore(MemoryMarker(), cast(Any, Plain(MemoryStore()))),
    ],
    ids=["plain", "tiered"],
)
def test_a_store_without_steps_says_so(store: Any) -> None:
    """Before the step runs."""
    ran: list[int] = []
    idem = Idempotency(store=store, observers=[])
    with pytest.raises(ConfigurationError, match=r"Plain keeps no steps: .*database_url"):
        idem.run(lambda: current_claim().step("one", ran.append, 1), scope="s", key="k")
    assert ran == []
    assert idem.steps("s", "k") == []


def test_redis_alone_keeps_no_steps(redis_url: str) -> None:
    """Steps need records in SQL, and RedisStore says so before the step runs; whoever looks for some finds none."""
    key = os.urandom(8).hex()
    with Idempotency(store=RedisStore(redis_url), observers=[]) as idem:
        with pytest.raises(ConfigurationError, match="RedisStore keeps no steps"):
            idem.run(lambda: current_claim().step("one", lambda: 1), scope="s", key=key)
        assert idem.steps("s", key) == []


# One after another


def test_a_step_within_a_step_is_refused() -> None:
    """Its place among the steps would be another one when the outer one is replayed."""
    idem = Idempotency(store=MemoryStore(), observers=[])

    def handler() -> None:
        claim = current_claim()
        claim.step("outer", lambda: claim.step("inner", lambda: 1))

    with pytest.raises(ConfigurationError, match="step 'inner' was begun while step 'outer' runs"):
        idem.run(handler, scope="s", key="k")


def test_steps_of_a_nested_call_are_its_own() -> None:
    """A step may call another idempotent handler, whose claim has steps of its own."""
    idem = Idempotency(store=MemoryStore(), observers=[])

    def inner() -> str:
        return current_claim().step("one", lambda: "inner")

    def outer() -> str:
        return current_claim().step("one", lambda: idem.run(inner, scope="s", key="inner"))

    assert idem.run(outer, scope="s", key="outer") == "inner"


def test_steps_in_two_threads_are_refused() -> None:
    """Which of them is the first would be another one each time."""
    idem = Idempotency(store=MemoryStore(), observers=[])
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        go_on.wait(10)

    def handler() -> str:
        claim = current_claim()
        with ThreadPoolExecutor(1) as thread:
            other = thread.submit(claim.step, "slow", slow)
            begun.wait(10)
            assert claim.step_running == "slow"
            with pytest.raises(ConfigurationError, match="one after another"):
                claim.step("quick", lambda: 1)
            go_on.set()
            other.result(10)
        assert claim.step_running is None
        return claim.step("after", lambda: "fine")

    assert idem.run(handler, scope="s", key="k") == "fine"


def test_steps_in_two_tasks_are_refused() -> None:
    """Which of them is the first would be another one each time."""
    idem = Idempotency(store=MemoryStore(), observers=[])

    async def wait() -> None:
        await asyncio.sleep(0)

    async def handler() -> Any:
        claim = current_claim()
        return await asyncio.gather(claim.step("one", wait), claim.step("two", wait), return_exceptions=True)

    first, second = asyncio.run(idem.arun(handler, scope="s", key="k"))
    assert first is None
    assert isinstance(second, ConfigurationError)


@pytest.mark.parametrize("name", ["", "\0", "x" * 256, 7])
def test_a_step_needs_a_name(world: World, shop: Shop, name: Any) -> None:
    """Before it runs."""

    def body(order: str) -> Generator[tuple[Any, ...], Any, Any]:
        yield name, shop.charge, order

    with pytest.raises(ConfigurationError, match="a step is named by"):
        stepping(world, body)("A-1")
    assert shop.effects == []


def test_a_step_publishes_nothing() -> None:
    """A message that is kept with the handler's outcome would be missing where the step is replayed."""
    idem = Idempotency(store=MemoryStore(), observers=[])

    def handler() -> None:
        current_claim().step("one", lambda: current_claim().publish_message({}, to="anybody"))

    with pytest.raises(ConfigurationError, match="step 'one' must not publish"):
        idem.run(handler, scope="s", key="k")


def test_keywords_are_the_functions_own() -> None:
    """Also those called as the parameters of `step`."""
    idem = Idempotency(store=MemoryStore(), observers=[])
    got: Any = idem.run(
        lambda: current_claim().step("one", lambda **kwargs: kwargs, name=1, fn=2, self=3), scope="s", key="k"
    )
    assert got == {"name": 1, "fn": 2, "self": 3}


def test_a_steps_stop_iteration_reaches_the_handler() -> None:
    """As it is, though Python forbids a coroutine to raise it."""
    idem = Idempotency(store=MemoryStore(), observers=[])

    def handler() -> str:
        with pytest.raises(StopIteration):
            current_claim().step("one", next, iter(()))
        return "caught"

    assert idem.run(handler, scope="s", key="k") == "caught"


def test_steps_in_a_block() -> None:
    """The claim of a `with` block has steps too."""
    idem = Idempotency(store=MemoryStore(), observers=[])
    ran: list[int] = []
    for attempt in range(2):
        try:
            with idem.claim(scope="s", key="k") as block:
                block.claim.step("one", ran.append, 1)
                if attempt == 0:
                    raise BrokenError
        except BrokenError:
            continue
    assert ran == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_writes_no_step() -> None:
    """The claim is still the parent's: in its child a step just runs."""
    store = MemoryStore()
    idem = Idempotency(store=store, observers=[])

    def handler() -> int:
        claim: Claim = current_claim()
        child = os.fork()
        if child == 0:
            os._exit(0 if claim.step("in the child", lambda: 7) == 7 else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert idem.run(handler, scope="s", key="k") == 0


# As a user tests it


def test_assert_idempotent_kills_at_every_step() -> None:
    """A handler whose provider remembers keys is idempotent wherever its worker dies, before and after each step."""
    idem = Idempotency(store=MemoryStore(), observers=[])
    charged: dict[str, int] = {}
    mails: set[str] = set()

    def charge(order: str, key: str) -> str:
        charged.setdefault(key, len(charged))
        crash_point("after the charge")
        return f"receipt {order}"

    def mail(order: str, receipt: str) -> None:
        mails.add(f"{order} {receipt}")

    @idempotent_task(key="{order}", idempotency=idem)
    def pay(order: str) -> str:
        claim = current_claim()
        receipt = claim.step("charge", charge, order, claim.provider_key("charge"))
        claim.step("mail", mail, order, receipt)
        return receipt

    def forget() -> None:
        charged.clear()
        mails.clear()

    report = str(
        assert_idempotent(
            pay, "A-1", effects={"charges": lambda: len(charged), "mails": lambda: len(mails)}, reset=forget
        )
    )
    for point in (
        "killed before a step began",
        "killed before a step ran",
        "killed after the charge",
        "killed after a step ran",
        "killed after a step's outcome was recorded",
        "killed after a step's outcome was recorded (2)",
    ):
        assert f"{point} " in report, report
    assert "nested" not in report
