"""A function given as `on_crash` is asked once, by whoever found the dead holder; a clear word of it decides."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from idem_tasks import HOLD, RERUN, DeadClaim, Idempotency, MemoryStore, Outcome, Policy, current_claim, idempotent_task
from idem_tasks.claims import Claim, ClaimRequest, InDoubt, Lease, State
from idem_tasks.errors import (
    ConfigurationError,
    FingerprintMismatchError,
    InDoubtError,
    LeaseLostError,
    OutcomeError,
    ParkedError,
    ReplayedFailureError,
    StoreUnavailableError,
)
from idem_tasks.events import EventName
from idem_tasks.runtime import register_interruption, run_sync
from idem_tasks.testing import ManualClock
from tests.unit.scripted import LEASE, SCOPE, World, away


class DeclinedError(Exception):
    """The bank said no."""


class SoftLimitError(Exception):
    """Stands for Celery's soft time limit."""


register_interruption(SoftLimitError)


class KilledError(BaseException):
    """Stands for SIGKILL: nothing of this process happens after it."""


class Provider:
    """A function given as `on_crash` that answers as a test says, and notes what it was asked."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[DeadClaim] = []

    def __call__(self, claim: DeadClaim) -> Any:
        self.asked.append(claim)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer() if callable(self.answer) else self.answer


def left_by_a_dead_holder(world: World, **policy: Any) -> Lease:
    """Let another worker claim the key and die."""
    lease = world.claim_elsewhere(**policy)
    world.pass_time(LEASE + 1)
    return lease


def details(world: World, name: EventName) -> list[dict[str, Any]]:
    return [event.details for event in world.events if event.name is name]


# What it answers.


def test_an_outcome_is_recorded_and_returned_to_everybody(world: World) -> None:
    """The effect happened: nothing runs, the caller and every duplicate get its outcome (F15)."""
    dead, ask = left_by_a_dead_holder(world), Provider(Outcome("receipt 17"))
    charge = world.charge(on_crash=ask, fingerprint=None)
    assert charge("A-1") == "receipt 17"
    assert charge("A-1") == "receipt 17"
    assert world.effects == []
    assert len(ask.asked) == 1
    record = world.record()
    assert (record.state, record.crashes, record.attention) == (State.COMPLETED, 1, None)
    assert record.fencing_token > dead.fencing_token
    assert record.owner != dead.owner
    assert world.names() == [EventName.ANSWERED]
    assert details(world, EventName.ANSWERED) == [{"answer": "completed", "crashes": 1}]
    assert world.held() == 0


def test_an_outcome_is_published(tiered: World) -> None:
    """From then on the marker answers, as after any finish."""
    left_by_a_dead_holder(tiered)
    charge = tiered.charge(on_crash=Provider(Outcome("receipt 17")), fingerprint=None)
    charge("A-1")
    assert tiered.marker_of() == "finished"
    tiered.record_tier.down()
    assert charge("A-1") == "receipt 17"


def test_rerun_runs_the_handler(world: World) -> None:
    """The effect did not happen: the handler runs, as one that took over, behind a marker of its own."""
    dead = left_by_a_dead_holder(world)
    seen: list[tuple[Any, ...]] = []

    def handler(order: str) -> str:
        claim = current_claim()
        seen.append((claim.taken_over, claim.attempt, claim.crashes, claim.fencing_token > dead.fencing_token))
        assert world.marker is None or world.marker_of() == "running"
        return "done"

    assert world.task(handler, on_crash=Provider(RERUN), fingerprint=None)("A-1") == "done"
    assert seen == [(True, 2, 1, True)]
    assert world.names() == [EventName.ANSWERED, EventName.TAKEN_OVER]
    assert details(world, EventName.ANSWERED) == [{"answer": "rerun", "crashes": 1}]
    assert world.state() is State.COMPLETED
    assert world.marker is None or world.marker_of() == "finished"


def test_hold_leaves_it_to_a_person(world: World) -> None:
    """The function does not know either: the record stays in doubt, and nobody asks again."""
    dead, ask = left_by_a_dead_holder(world), Provider(HOLD)
    charge = world.charge(on_crash=ask, fingerprint=None)
    for _ in range(2):
        with pytest.raises(InDoubtError):
            charge("A-1")
    assert (len(ask.asked), world.effects) == (1, [])
    record = world.record()
    assert (record.state, record.attention, record.fencing_token) == (State.IN_DOUBT, "in_doubt", dead.fencing_token)
    assert details(world, EventName.IN_DOUBT) == [{"new": True, "answer": "hold"}, {"new": False}]
    world.finish_elsewhere(dead)
    assert charge("A-1") == "the other one"


def test_a_final_failure_is_recorded(world: World) -> None:
    """The provider declined it: that failure is raised, as the type that the policy names."""
    left_by_a_dead_holder(world)
    ask = Provider(Outcome.failed(DeclinedError, "card expired"))
    charge = world.charge(on_crash=ask, fingerprint=None, record_failures=DeclinedError)
    for _ in range(2):
        with pytest.raises(DeclinedError, match="card expired"):
            charge("A-1")
    assert (world.state(), len(ask.asked)) == (State.FAILED, 1)


def test_a_failure_can_be_told_by_name(world: World) -> None:
    """One that no policy names is raised under its name."""
    left_by_a_dead_holder(world)
    charge = world.charge(on_crash=Provider(Outcome.failed("bank.Declined", "no")), fingerprint=None)
    with pytest.raises(ReplayedFailureError) as caught:
        charge("A-1")
    assert (caught.value.error_type, caught.value.error_message) == ("bank.Declined", "no")


def test_a_failure_can_be_told_by_an_exception() -> None:
    """Its type and its text are kept."""
    failure = Outcome.failed(DeclinedError("card expired")).failure
    assert failure is not None
    assert failure.error_type == f"{__name__}.DeclinedError"
    assert failure.error_message == "card expired"


def test_an_outcome_shows_no_payload() -> None:
    """In a log it says what kind it is of, and neither the value nor the message."""
    assert repr(Outcome("4242 4242")) == "<Outcome>"
    assert repr(Outcome.failed("bank.Declined", "4242 4242")) == "<Outcome failed bank.Declined>"


@pytest.mark.parametrize("value", [None, 0, False, "", []])
def test_an_outcome_that_is_false_is_an_outcome(world: World, value: Any) -> None:
    """Nothing takes an empty outcome for none (F28)."""
    left_by_a_dead_holder(world)
    assert world.charge(on_crash=Provider(Outcome(value)), fingerprint=None)("A-1") == value


def test_the_policy_says_what_a_duplicate_gets(world: World) -> None:
    """Under `skip` the outcome is not kept, and the asker is a duplicate too."""
    left_by_a_dead_holder(world)
    charge = world.charge(on_crash=Provider(Outcome("receipt 17")), fingerprint=None, on_duplicate="skip")
    assert charge("A-1") is None
    assert (world.record().outcome, world.record().not_kept) == (None, "skipped")


def test_an_outcome_that_cannot_be_encoded_completes_the_record(world: World) -> None:
    """The effect has happened, and is not repeated because its value cannot be kept (F43)."""
    left_by_a_dead_holder(world)
    charge = world.charge(on_crash=Provider(Outcome(object())), fingerprint=None)
    for _ in range(2):
        with pytest.raises(OutcomeError):
            charge("A-1")
    assert world.state() is State.COMPLETED
    assert world.effects == []


def test_other_arguments_than_the_dead_holders_are_told(world: World) -> None:
    """The outcome is of what the dead holder was called with."""
    left_by_a_dead_holder(world)
    world.real._rows[SCOPE, "A-1"].fingerprint = "f" * 64
    with pytest.raises(FingerprintMismatchError):
        world.charge(on_crash=Provider(Outcome("receipt 17")))("A-1")
    assert world.state() is State.COMPLETED


# What it is asked with.


def test_it_sees_the_dead_claim_and_nothing_else(world: World) -> None:
    """Scope, key, token and counts of the dead claim; no claim of its own, and no arguments."""
    dead = left_by_a_dead_holder(world)

    def answer() -> Any:
        with pytest.raises(ConfigurationError):
            current_claim()
        return RERUN

    ask = Provider(answer)
    world.charge(on_crash=ask, fingerprint=None)("A-1")
    [claim] = ask.asked
    assert (claim.scope, claim.key, claim.fencing_token) == (SCOPE, "A-1", dead.fencing_token)
    assert (claim.attempt, claim.crashes, claim.taken_over) == (1, 1, True)
    assert claim.provider_key("charge") == Claim(dead, cast(Any, None), asked_at=0.0).provider_key("charge")
    assert repr(claim) == f"<DeadClaim {SCOPE} 'A-1' fencing token {dead.fencing_token}, attempt 1>"
    with pytest.raises(AttributeError):
        claim.key = "B-2"  # type: ignore[misc]


def test_it_is_not_asked_where_nobody_died(world: World) -> None:
    """A first call, a duplicate and a release need no answer."""
    ask = Provider(AssertionError("asked"))
    charge = world.charge(on_crash=ask)
    charge("A-1")
    charge("A-1")
    world.release_elsewhere(world.claim_elsewhere("A-2"))
    charge("A-2")
    assert ask.asked == []


def test_too_many_crashes_park_before_it_is_asked(world: World) -> None:
    """A message that kills every worker might kill it by the very question (F42)."""
    left_by_a_dead_holder(world)
    ask = Provider(RERUN)
    with pytest.raises(ParkedError):
        world.charge(on_crash=ask, fingerprint=None, max_crashes=0)("A-1")
    assert ask.asked == []


def test_in_shadow_it_is_not_asked(world: World) -> None:
    """Shadow leaves nothing in doubt, and asks nobody."""
    left_by_a_dead_holder(world)
    ask = Provider(HOLD)
    world.charge(on_crash=ask, fingerprint=None, shadow=True)("A-1")
    assert (ask.asked, world.effects) == ([], ["A-1"])


def test_a_store_that_cannot_decide_leaves_it_in_doubt(world: World) -> None:
    """A store that does not tell whose claim it was is one of `hold`: nobody is asked in vain."""
    left_by_a_dead_holder(world)
    ask = Provider(RERUN)

    async def claim(_request: Any) -> InDoubt:
        return InDoubt(new=True)

    world.record_tier.real = type("Old", (), {"claim": staticmethod(claim), "runtimes": MemoryStore.runtimes})()
    with pytest.raises(InDoubtError):
        world.charge(on_crash=ask, fingerprint=None)("A-1")
    assert ask.asked == []


def test_a_handler_that_raises_is_in_doubt_and_nobody_is_asked(world: World) -> None:
    """As under `hold`: an exception may have come after the effect (F55)."""
    ask = Provider(Outcome("never"))

    def handler(order: str) -> None:
        raise TimeoutError

    task = world.task(handler, on_crash=ask)
    with pytest.raises(TimeoutError):
        task("A-1")
    with pytest.raises(InDoubtError):
        task("A-1")
    assert (world.state(), ask.asked) == (State.IN_DOUBT, [])


def test_what_is_safe_to_retry_is_released(world: World) -> None:
    """Under a function too the user may name exceptions that prove that nothing happened."""

    def handler(order: str) -> None:
        raise DeclinedError

    with pytest.raises(DeclinedError):
        world.task(handler, on_crash=Provider(HOLD), safe_to_retry=DeclinedError)("A-1")
    assert world.state() is State.RELEASED


# What goes wrong while it is asked.


@pytest.mark.parametrize("error", [ValueError("card 4111"), StopIteration("card 4111"), SoftLimitError("card 4111")])
def test_raising_leaves_it_in_doubt(world: World, error: Exception) -> None:
    """Its type is announced, never its text; the message may be acknowledged, for a person finds the record."""
    left_by_a_dead_holder(world)
    ask = Provider(error)
    if world.runtime == "asyncio" and isinstance(error, StopIteration):
        ask = Provider(RuntimeError("card 4111"))  # what Python makes of it in a coroutine
    charge = world.charge(on_crash=ask, fingerprint=None)
    with pytest.raises(InDoubtError) as caught:
        charge("A-1")
    assert world.state() is State.IN_DOUBT
    [told] = details(world, EventName.IN_DOUBT)
    assert told["new"] is True
    assert "4111" not in str(told) + str(caught.value)
    assert told["error"] in str(caught.value)
    with pytest.raises(InDoubtError):
        charge("A-1")
    assert len(ask.asked) == 1


@pytest.mark.parametrize(
    "answer", [None, True, "rerun", {"id": 17}, Outcome], ids=["None", "True", "str", "dict", "type"]
)
def test_anything_else_leaves_it_in_doubt(world: World, answer: Any) -> None:
    """What is no clear word is none; the error and the event say what came, by its type."""
    left_by_a_dead_holder(world)

    def ask(_claim: DeadClaim) -> Any:
        return answer

    with pytest.raises(InDoubtError, match="not an Outcome, RERUN or HOLD") as caught:
        world.charge(on_crash=ask, fingerprint=None)("A-1")
    assert isinstance(caught.value.__cause__, ConfigurationError)
    assert world.state() is State.IN_DOUBT
    assert details(world, EventName.IN_DOUBT) == [{"new": True, "error": str(caught.value.__cause__)}]


def test_an_answer_counts_for_a_lease(world: World) -> None:
    """What was true longer ago than that may not be so any more."""
    left_by_a_dead_holder(world)

    def answer() -> Any:
        world.pass_time(LEASE + 0.1)
        return RERUN

    with pytest.raises(InDoubtError, match=r"took 60\.1 s"):
        world.charge(on_crash=Provider(answer), fingerprint=None)("A-1")
    assert (world.state(), world.effects) == (State.IN_DOUBT, [])


def test_a_coroutine_function_is_stopped_after_a_lease() -> None:
    """It gets as long as its word would count, and no message waits for it for ever."""
    idem = Idempotency(store=MemoryStore(), observers=[])

    async def ask(_claim: DeadClaim) -> Any:
        await asyncio.Event().wait()

    async def charge(order: str) -> str:
        return order

    async def deliver() -> None:
        dead = idem.aclaim(scope="s", key="A-1", lease=0.6, max_hold=0.6)
        await dead.__aenter__()
        await idem.aclose()
        await asyncio.sleep(1.3)  # it is renewed until its max_hold is over
        await idem.arun(charge, "A-1", scope="s", key="A-1", policy=Policy(on_crash=ask, lease=0.6), fingerprint=None)

    with pytest.raises(InDoubtError, match="raised TimeoutError"):
        asyncio.run(asyncio.wait_for(deliver(), 20))


@pytest.mark.parametrize("kind", [KilledError, SystemExit, asyncio.CancelledError])
def test_whoever_dies_asking_leaves_it_in_doubt(world: World, kind: type[BaseException]) -> None:
    """The record was in doubt before anybody asked: no word, no run, and a person finds it."""
    left_by_a_dead_holder(world)
    ask = Provider(kind())
    charge = world.charge(on_crash=ask, fingerprint=None)
    with pytest.raises(kind):
        charge("A-1")
    assert (world.state(), world.record().attention) == (State.IN_DOUBT, "in_doubt")
    with pytest.raises(InDoubtError):
        charge("A-1")
    assert (len(ask.asked), world.effects) == (1, [])


def test_others_meanwhile_find_it_in_doubt(world: World) -> None:
    """No second delivery asks beside the first one, whatever its own policy says."""
    left_by_a_dead_holder(world)
    found: list[Any] = []

    def answer() -> Any:
        for policy in ({"on_crash": ask}, {"on_crash": "rerun"}, {"on_crash": "hold"}):
            store = world.idem.store.on("blocking", world.idem._announce)
            found.append(run_sync(store.claim(world.request(**policy))))
        return RERUN

    ask = Provider(answer)
    world.charge(on_crash=ask, fingerprint=None)("A-1")
    assert found == [InDoubt()] * 3
    assert [each.dead for each in found] == [None] * 3
    assert len(ask.asked) == 1


# Who else may end the doubt.


@pytest.mark.parametrize("answer", [Outcome("receipt 17"), RERUN], ids=["outcome", "rerun"])
def test_a_late_finish_counts_until_the_answer_is_applied(world: World, answer: Any) -> None:
    """The holder was only slow, and knows best: its outcome is everybody's, and the function's word is dropped."""
    dead = left_by_a_dead_holder(world)

    def late() -> Any:
        world.finish_elsewhere(dead)
        return answer

    assert world.charge(on_crash=Provider(late), fingerprint=None)("A-1") == "the other one"
    assert world.effects == []


def test_a_late_finish_after_the_answer_misses(world: World) -> None:
    """One outcome for all: the first recorded wins."""
    dead = left_by_a_dead_holder(world)
    charge = world.charge(on_crash=Provider(Outcome("receipt 17")), fingerprint=None)
    charge("A-1")
    world.finish_elsewhere(dead)
    assert charge("A-1") == "receipt 17"


@pytest.mark.parametrize("answer", [Outcome("receipt 17"), RERUN, HOLD], ids=["outcome", "rerun", "hold"])
def test_a_person_who_was_faster_decides(world: World, answer: Any) -> None:
    """`resolve` while the function was asked: its answer is applied to nothing."""
    left_by_a_dead_holder(world)

    def resolve_first() -> Any:
        world.real._rows[SCOPE, "A-1"].state = State.PARKED  # so that one `resolve` serves both runtimes
        run_sync(world.real.resolve(SCOPE, "A-1", None))
        return answer

    charge = world.charge(on_crash=Provider(resolve_first), fingerprint=None)
    if answer is HOLD:
        with pytest.raises(InDoubtError):
            charge("A-1")
    else:
        assert charge("A-1") == "charged 5 for A-1"


def test_a_holder_that_wakes_up_after_a_rerun_does_it_again(world: World) -> None:
    """RERUN promises no more than `rerun`: that the effect is not there yet does not prove the holder dead (F56)."""
    effects: list[str] = []
    task: Callable[..., Any]

    def second(order: str) -> str:
        effects.append("second")
        return "second"

    def first(order: str) -> str:
        # Paused past its lease; meanwhile another delivery asks, hears "no", and runs the handler.
        world.clock.advance(LEASE + 1)
        policy = Policy(on_crash=lambda _claim: RERUN, lease=LEASE)
        other = Idempotency(store=world.real, observers=[world.events.append])
        other.run(second, order, scope=SCOPE, key=order, fingerprint=None, policy=policy)
        effects.append("first")  # awake again
        return "first"

    task = world.task(first, on_crash=Provider(HOLD), fingerprint=None)
    assert task("A-1") == "second"
    assert effects == ["second", "first"]
    assert world.count(EventName.ANSWERED) == 1
    assert world.count(EventName.TAKEN_OVER) == 1
    assert world.count(EventName.SUPERSEDED) == 1


def test_a_holder_that_wakes_up_during_the_rerun_is_told_that_it_lost(world: World) -> None:
    """Its effect may have happened beside the other one's, and it says so (F56)."""

    def first(order: str) -> str:
        world.clock.advance(LEASE + 1)
        answer = run_sync(world.real.claim(world.request(on_crash=Provider(RERUN))))
        assert isinstance(answer, InDoubt)
        assert answer.dead is not None
        run_sync(world.real.decide(answer.dead, world.request(), None))
        return "first"

    with pytest.raises(LeaseLostError):
        world.task(first, on_crash=Provider(HOLD), fingerprint=None)("A-1")
    assert world.count(EventName.LEASE_LOST) == 1


# Applying the answer.


@pytest.mark.parametrize("answer", [Outcome("receipt 17"), RERUN], ids=["outcome", "rerun"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_decision_is_sent_again(world: World, answer: Any, when: str) -> None:
    """A command or a reply that was lost: the next try finds what the first one did, and it is done once (F21)."""
    left_by_a_dead_holder(world)
    ask = Provider(answer)
    getattr(world.record_tier, when)("decide", away())
    done = world.charge(on_crash=ask, fingerprint=None)("A-1")
    assert done == ("charged 5 for A-1" if answer is RERUN else "receipt 17")
    assert (len(ask.asked), len(world.effects)) == (1, 1 if answer is RERUN else 0)
    assert world.record().attempts == (2 if answer is RERUN else 1)
    assert world.held() == 0


@pytest.mark.parametrize("answer", [Outcome("receipt 17"), RERUN], ids=["outcome", "rerun"])
def test_a_store_that_stays_away_leaves_it_in_doubt(world: World, answer: Any) -> None:
    """It is tried for as long as the answer counts; then the message comes again, and a person finds the record."""
    left_by_a_dead_holder(world)
    world.record_tier.down("decide")
    charge = world.charge(on_crash=Provider(answer), fingerprint=None)
    before = world.local()
    with pytest.raises(StoreUnavailableError):
        charge("A-1")
    assert LEASE / 2 < world.local() - before <= LEASE
    assert (world.state(), world.effects) == (State.IN_DOUBT, [])
    world.record_tier.up()
    with pytest.raises(InDoubtError):
        charge("A-1")


def test_without_a_marker_the_record_decides(tiered: World) -> None:
    """Redis away: the answer is applied all the same."""
    left_by_a_dead_holder(tiered)
    assert tiered.marker is not None
    tiered.marker.down()
    assert tiered.charge(on_crash=Provider(Outcome("receipt 17")), fingerprint=None)("A-1") == "receipt 17"
    assert tiered.state() is State.COMPLETED


@pytest.mark.parametrize("when", ["before", "after"])
def test_whoever_is_shut_down_while_deciding_holds_nothing(world: World, when: str) -> None:
    """A rerun that was granted, and whose handler did not begin, is given back at once."""
    left_by_a_dead_holder(world)
    getattr(world.record_tier, when)("decide", SystemExit())
    with pytest.raises(SystemExit):
        world.charge(on_crash=Provider(RERUN), fingerprint=None)("A-1")
    assert world.state() is (State.IN_DOUBT if when == "before" else State.RELEASED)
    assert (world.effects, world.held()) == ([], 0)


def test_a_pending_outcome_of_the_dead_holder_goes_first(tiered: World) -> None:
    """It woke up, could not reach SQL and left its outcome in the marker: that is the truth (F45)."""
    dead = left_by_a_dead_holder(tiered)
    marker = tiered.marker
    assert marker is not None

    def answer() -> Any:
        from idem_tasks.claims import EncodedOutcome

        assert run_sync(marker.real.keep(dead, EncodedOutcome(body=b'"the other one"', codec="json")))
        return RERUN

    assert tiered.charge(on_crash=Provider(answer), fingerprint=None)("A-1") == "the other one"
    assert tiered.effects == []


# Where it may stand.


def test_a_block_asks_too() -> None:
    """`with idem.claim(...)` is the same story."""
    clock = ManualClock()
    idem = Idempotency(store=MemoryStore(clock), observers=[])
    run_sync(idem.store.claim(ClaimRequest("s", "k", None, "dead", Policy())))
    clock.advance(61)
    with idem.claim(scope="s", key="k", on_crash=lambda _claim: Outcome("receipt 17")) as claim:
        assert claim.replayed
        assert claim.outcome == "receipt 17"


def test_a_coroutine_function_is_awaited(world: World) -> None:
    """In an asyncio handler; for a plain one it is an error, at decoration."""
    left_by_a_dead_holder(world)

    async def ask(_claim: DeadClaim) -> Outcome:
        await asyncio.sleep(0)
        return Outcome("receipt 17")

    for function in (ask, functools.partial(ask)):
        if world.runtime == "blocking":
            with pytest.raises(ConfigurationError, match="async def"):
                world.charge(on_crash=function)
        else:
            assert world.charge(on_crash=function, fingerprint=None)("A-1") == "receipt 17"


async def _ask(_claim: DeadClaim) -> Outcome:
    raise AssertionError("awaited")


class _AskingObject:
    async def __call__(self, _claim: DeadClaim) -> Outcome:
        raise AssertionError("awaited")


@pytest.mark.parametrize("ask", [_ask, _AskingObject()], ids=["function", "object"])
def test_a_coroutine_function_needs_an_asyncio_handler(ask: Any) -> None:
    """However a plain handler comes by it."""
    idem = Idempotency(store=MemoryStore(), observers=[], policy=Policy(on_crash=ask))

    def handler(order: str) -> None: ...

    with pytest.raises(ConfigurationError, match="async def"):
        idempotent_task(key="{order}", on_crash=ask)(handler)
    with pytest.raises(ConfigurationError, match="async def"):
        idempotent_task(key="{order}", idempotency=idem)(handler)
    with pytest.raises(ConfigurationError, match="async def"):
        idem.run(handler, "A-1", scope="s", key="k")
    with pytest.raises(ConfigurationError, match="async def"):
        idem.claim(scope="s", key="k")


def _generator(_claim: DeadClaim) -> Iterator[None]:
    yield


def _of_nothing() -> Any: ...


def _of_two(_order: str, _claim: DeadClaim) -> Any: ...


@pytest.mark.parametrize(
    "wrong",
    ["ask", None, 1, Outcome, HOLD, _generator, _of_nothing, _of_two],
    ids=lambda each: getattr(each, "__name__", str(each)),
)
def test_what_cannot_be_asked_is_an_error_at_decoration(wrong: Any) -> None:
    """Found out before anything crashes, not after."""
    with pytest.raises(ConfigurationError, match="on_crash"):
        Policy(on_crash=wrong)


@pytest.mark.parametrize("right", [print, functools.partial(_of_two, "A-1")], ids=["builtin", "partial"])
def test_whatever_can_be_called_with_the_claim_may_be_asked(right: Any) -> None:
    """Also a builtin, and a partial of something longer."""
    assert Policy(on_crash=right).doubts
