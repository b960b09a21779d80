"""Many messages at once: each keeps the promises of one alone, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import gc
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from idem_tasks import Idempotency, MemoryStore, Policy, current_claim, current_claims, idempotency_of, idempotent_batch
from idem_tasks.batch import perform_batch
from idem_tasks.claims import EncodedOutcome, State
from idem_tasks.errors import (
    BatchError,
    ConfigurationError,
    DuplicateError,
    FingerprintMismatchError,
    InDoubtError,
    InProgressError,
    InvalidKeyError,
    LeaseLostError,
    OutcomeError,
    ParkedError,
    StoreError,
    StoreUnavailableError,
    comes_again,
)
from idem_tasks.events import EventName
from idem_tasks.integrations.settling import MessageHandler
from idem_tasks.replay import DOUBTFUL_SIZE
from idem_tasks.runtime import Blocking, register_interruption, run_sync
from idem_tasks.testing import assert_idempotent
from tests.unit.batches import (
    Host,
    Message,
    RetryError,
    batch_of,
    batching,
    messages,
    one_at_a_time,
    shipping,
)
from tests.unit.scripted import LEASE, SCOPE, World, away, world_on


class DeclinedError(Exception):
    """A failure that is recorded."""


class SoftLimitError(Exception):
    """Stands for Celery's soft time limit."""


register_interruption(SoftLimitError)


@pytest.fixture(params=["alone", "together"])
def shop(world: World, request: pytest.FixtureRequest) -> World:
    """A world whose records are asked for one at a time, or many at once."""
    return batching(world) if request.param == "together" else one_at_a_time(world)


@pytest.fixture
def alone(world: World) -> World:
    """A world whose records are asked for one at a time."""
    return one_at_a_time(world)


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch, runtime: Any) -> Iterator[World]:
    """A world whose records are asked for many at once, without markers."""
    with world_on(monkeypatch, runtime, 1) as world:
        yield batching(world)


def failing(call: Callable[..., Any], *args: Any) -> BatchError:
    """Return the error of a batch that has to fail."""
    with pytest.raises(BatchError) as caught:
        call(*args)
    return caught.value


def kinds(error: BatchError) -> list[str]:
    """Return the outcomes, and the types of what stands in the places of the others."""
    return [type(each).__name__ if isinstance(each, BaseException) else each for each in error.results]


# What is run, and what is returned.


def test_only_new_messages_run(shop: World) -> None:
    """A batch that is delivered again runs nothing; one that is new in part runs that part, and returns all."""
    ship = shipping(shop)
    assert ship(messages("B", "A")) == ["shipped B", "shipped A"]
    assert ship(messages("B", "A")) == ["shipped B", "shipped A"]
    assert ship(messages("C", "A", "D")) == ["shipped C", "shipped A", "shipped D"]
    assert shop.effects == ["B", "A", "C", "D"]
    assert {shop.state(key) for key in "ABCD"} == {State.COMPLETED}
    assert shop.held() == 0


def test_many_are_claimed_and_finished_in_one_step_each(many: World) -> None:
    """A store that can do that is asked once for all claims and once for all outcomes; in bytes' order (F66)."""
    shipping(many)(messages("b", "é", "a", "B"))
    assert many.record_tier.verbs == ["claim_batch", "finish_batch"]
    many.record_tier.verbs.clear()
    shipping(many)(messages("z"))
    assert many.record_tier.verbs == ["claim", "finish"]


def test_alone_they_are_claimed_in_order(alone: World) -> None:
    """Two batches of the same keys in another order claim them in one order, so that neither waits for ever (F66)."""
    order: list[str] = []
    alone.idem._announce._observers += (lambda event: order.append(event.key),)
    shipping(alone)(messages("b", "é", "a", "B"))
    assert order[:4] == ["B", "a", "b", "é"]


def test_a_key_twice_in_a_batch_runs_once(shop: World) -> None:
    """The second message of one key is a duplicate of the first, and takes its outcome (F66)."""
    ship = shipping(shop)
    assert ship(messages("A", "B", "A", "A")) == ["shipped A", "shipped B", "shipped A", "shipped A"]
    assert shop.effects == ["A", "B"]
    assert shop.count(EventName.REPLAYED) == 2


def test_other_arguments_under_a_key_of_the_batch_are_refused(shop: World) -> None:
    """Two messages of one batch with one key and other content: the second is refused, the first one runs."""
    error = failing(shipping(shop), [{"id": "A", "amount": 5}, {"id": "A", "amount": 6}])
    assert kinds(error) == ["shipped A", "FingerprintMismatchError"]
    assert error.errors == (1,)
    assert shop.effects == ["A"]


def test_the_recorded_content_is_replayed_beside_another_that_is_refused(shop: World) -> None:
    """A message with other content than recorded does not speak for a redelivery of the recorded one behind it."""
    ship = shipping(shop)
    recorded = messages("A")
    ship(recorded)
    error = failing(ship, [{"id": "A", "amount": 6}, *recorded, *recorded])
    assert kinds(error) == ["FingerprintMismatchError", "shipped A", "shipped A"]
    assert shop.effects == ["A"]


def test_other_arguments_than_recorded_are_refused(shop: World) -> None:
    """A key that was used before with other content is refused alone."""
    shipping(shop)(messages("A"))
    error = failing(shipping(shop), [{"id": "A", "amount": 6}, {"id": "B", "amount": 5}])
    assert kinds(error) == ["FingerprintMismatchError", "shipped B"]
    assert isinstance(error.results[0], FingerprintMismatchError)


@pytest.mark.parametrize("fingerprint", [None, lambda message: message["id"]])
def test_a_fingerprint_may_be_less_than_the_message(shop: World, fingerprint: Any) -> None:
    """None compares nothing, a callable says what has to be the same."""
    ship = shipping(shop, fingerprint=fingerprint)
    assert ship([{"id": "A", "amount": 5}]) == ship([{"id": "A", "amount": 6}]) == ["shipped A"]


def test_no_messages_ask_for_nothing(shop: World) -> None:
    """An empty batch returns an empty list, and reaches neither handler nor store."""
    assert shipping(shop)([]) == []
    assert (shop.effects, shop.record_tier.verbs) == ([], [])


def test_a_message_without_a_key_fails_alone(shop: World) -> None:
    """No key, and a key that cannot be made, fail before any effect; the others run (F29)."""
    error = failing(shipping(shop), [{"id": None}, {"id": "A"}, {}, {"id": ""}])
    assert kinds(error) == ["InvalidKeyError", "shipped A", "InvalidKeyError", "InvalidKeyError"]
    assert (shop.effects, error.errors) == (["A"], (0, 2, 3))
    assert isinstance(error.results[0], InvalidKeyError)


def test_keys_are_taken_before_the_handler_changes_its_messages(shop: World) -> None:
    """A handler that empties its messages finds each again under its own key (F18)."""
    runs: list[int] = []

    def ship(messages: list[Message]) -> list[str]:
        runs.append(len(messages))
        for message in messages:
            message.clear()
        messages.clear()
        return ["done", "done"]

    task = batch_of(shop, ship)
    assert task(messages("A", "B")) == task(messages("A", "B")) == ["done", "done"]
    assert runs == [2]


def test_scopes_may_differ_within_a_batch(shop: World) -> None:
    """A scope that is a template over the message separates what has one key."""
    ship = shipping(shop, scope="shop/{message[kind]}", key=lambda message: message["id"])
    assert ship([{"id": "A", "kind": "x"}, {"id": "A", "kind": "y"}]) == ["shipped A", "shipped A"]
    assert shop.effects == ["A", "A"]


# Each fails alone.


def test_an_exception_in_the_place_of_an_outcome_fails_that_message(shop: World) -> None:
    """The member that failed is released and runs again; the others are recorded and do not (F38)."""
    error = failing(shipping(shop, {"B": ValueError("no")}), messages("A", "B", "C"))
    assert kinds(error) == ["shipped A", "ValueError", "shipped C"]
    assert [shop.state(key) for key in "ABC"] == [State.COMPLETED, State.RELEASED, State.COMPLETED]
    assert shop.record("B").failures == 1
    assert shipping(shop)(messages("A", "B", "C")) == ["shipped A", "shipped B", "shipped C"]
    assert shop.effects == ["A", "B", "C", "B"]
    assert "shipped" not in str(error)


def test_a_handler_that_raises_fails_them_all(shop: World) -> None:
    """Each is released and counted by itself, and the exception is the cause."""
    raised = ValueError("no")

    def ship(messages: list[Message]) -> list[str]:
        raise raised

    shipping(shop)(messages("A"))
    error = failing(batch_of(shop, ship), messages("A", "B", "C"))
    assert kinds(error) == ["shipped A", "ValueError", "ValueError"]
    assert error.__cause__ is raised
    assert [shop.record(key).failures for key in "BC"] == [1, 1]
    assert shop.held() == 0


def test_a_stop_iteration_is_an_exception_as_any_other(shop: World) -> None:
    """Python does not let a coroutine raise one; the messages fail by it all the same."""

    def ship(messages: list[Message]) -> list[str]:
        raise StopIteration

    error = failing(batch_of(shop, ship), messages("A"))
    assert kinds(error)[0] in ("StopIteration", "RuntimeError")
    assert shop.state("A") is State.RELEASED


def test_hold_leaves_the_failed_one_in_doubt(shop: World) -> None:
    """Under `hold` a member that failed waits for a person, and only that."""
    error = failing(shipping(shop, {"B": ValueError("no")}, on_crash="hold"), messages("A", "B"))
    assert kinds(error) == ["shipped A", "ValueError"]
    assert [shop.state(key) for key in "AB"] == [State.COMPLETED, State.IN_DOUBT]
    error = failing(shipping(shop, on_crash="hold"), messages("A", "B"))
    assert kinds(error) == ["shipped A", "InDoubtError"]
    assert isinstance(error.results[1], InDoubtError)


def test_a_recorded_failure_is_that_of_its_message(shop: World) -> None:
    """`record_failures` makes one member's failure final, and its duplicates get it again."""
    options: Any = {"record_failures": DeclinedError}
    for _ in range(2):
        error = failing(shipping(shop, {"B": DeclinedError("no")}, **options), messages("A", "B", "B"))
        assert kinds(error) == ["shipped A", "DeclinedError", "DeclinedError"]
    assert shop.state("B") is State.FAILED
    assert shop.effects == ["A", "B"]


def test_too_many_failures_park_the_message(shop: World) -> None:
    """`max_attempts` counts each member by itself."""
    ship = shipping(shop, {"B": ValueError("no")}, max_attempts=2)
    failing(ship, messages("A", "B"))
    failing(ship, messages("C", "B"))
    error = failing(ship, messages("A", "B", "D"))
    assert kinds(error) == ["shipped A", "ParkedError", "shipped D"]
    assert isinstance(error.results[1], ParkedError)


def test_what_gather_makes_of_a_cancellation_is_no_outcome(shop: World) -> None:
    """`asyncio.gather(return_exceptions=True)` returns a CancelledError, which fails its member uncounted."""
    error = failing(shipping(shop, {"B": asyncio.CancelledError()}), messages("A", "B"))
    assert kinds(error) == ["shipped A", "CancelledError"]
    assert (shop.state("B"), shop.record("B").failures) == (State.RELEASED, 0)


# What the handler returns.


def test_a_dict_is_matched_by_key(shop: World) -> None:
    """The keys of a dict are read as idempotency keys are: 12 and "12" are one."""

    def ship(messages: list[Message]) -> dict[Any, str]:
        return {message["id"]: f"shipped {message['id']}" for message in reversed(messages)}

    task = batch_of(shop, ship)
    assert task([{"id": 12}, {"id": "A"}]) == ["shipped 12", "shipped A"]
    assert shop.state("12") is State.COMPLETED


def test_what_a_dict_has_nothing_for_fails_alone(shop: World) -> None:
    """A message without an outcome in the dict is released, and says so."""
    error = failing(batch_of(shop, lambda _messages: {"A": "done"}), messages("A", "B"))
    assert kinds(error) == ["done", "ConfigurationError"]
    assert "no outcome for shop.charge 'B'" in str(error.results[1])
    assert [shop.state(key) for key in "AB"] == [State.COMPLETED, State.RELEASED]


def test_what_a_dict_has_too_much_is_an_error_after_all_is_recorded(shop: World) -> None:
    """Outcomes for messages that the handler was not given are not dropped in silence; the others are recorded."""
    returned = {"A": "done", "B": "done", "Z": "done", None: "?", (1,): "?"}
    error = failing(batch_of(shop, lambda _messages: returned), messages("A", "B"))
    assert error.results == ["done", "done"]
    assert "'Z', '<NoneType>', '<tuple>'" in str(error)
    assert error.surplus == ("Z", "<NoneType>", "<tuple>")
    assert [shop.state(key) for key in "AB"] == [State.COMPLETED, State.COMPLETED]
    assert batch_of(shop, lambda _messages: returned)(messages("A", "B")) == ["done", "done"]


def test_one_key_twice_in_a_dict_is_one_too_many(shop: World) -> None:
    """12 and "12" in one dict: the first counts, and the second is an error."""
    error = failing(batch_of(shop, lambda _messages: {12: "first", "12": "second"}), [{"id": 12}])
    assert error.results == ["first"]


def test_a_dict_does_not_tell_two_scopes(shop: World) -> None:
    """Messages with one key in two scopes need a list."""
    task = batch_of(shop, lambda _messages: {"A": "done"}, scope="shop/{message[kind]}")
    error = failing(task, [{"id": "A", "kind": "x"}, {"id": "A", "kind": "y"}])
    assert kinds(error) == ["ConfigurationError", "ConfigurationError"]


class Broken(dict[str, str]):
    """A mapping that cannot be read."""

    def items(self) -> Any:
        raise RuntimeError("not now")


@pytest.mark.parametrize("returned", [None, [], ["one"], "AB", {"A", "B"}, iter(["a", "b"]), Broken()])
def test_what_says_nothing_fails_them_all(shop: World, returned: Any) -> None:
    """A list of another length, or no list, tells of no message what became of it: none is recorded."""
    error = failing(batch_of(shop, lambda _messages: returned), messages("A", "B"))
    expected = "RuntimeError" if isinstance(returned, Broken) else "ConfigurationError"
    assert kinds(error) == [expected, expected]
    assert [shop.state(key) for key in "AB"] == [State.RELEASED, State.RELEASED]


def test_outcomes_have_the_type_of_their_elements(shop: World) -> None:
    """What `list[tuple[int, ...] | Exception]` says of one outcome is what a duplicate gets."""

    def ship(messages: list[Message]) -> list[tuple[int, ...] | Exception]:
        return [(1, 2) for _ in messages]

    task = batch_of(shop, ship)
    assert task(messages("A", "B")) == task(messages("A", "B")) == [(1, 2), (1, 2)]


# While others run, or ran.


def test_what_is_in_progress_fails_alone(shop: World) -> None:
    """A message that runs elsewhere does not hold up the others."""
    lease = shop.claim_elsewhere("B")
    error = failing(shipping(shop), messages("A", "B", "C", "B"))
    assert kinds(error) == ["shipped A", "InProgressError", "shipped C", "InProgressError"]
    assert isinstance(error.results[1], InProgressError)
    assert error.results[1].retry_after == pytest.approx(LEASE)
    shop.finish_elsewhere(lease)
    assert shipping(shop, fingerprint=None)(messages("A", "B", "C")) == ["shipped A", "the other one", "shipped C"]


def test_dead_and_released_ones_are_claimed_alone(shop: World) -> None:
    """What the verb of many leaves is claimed by itself: a dead holder's, and what was released."""
    shop.claim_elsewhere("dead")
    shop.release_elsewhere(shop.claim_elsewhere("free"))
    shop.pass_time(LEASE + 1)
    assert shipping(shop)(messages("new", "free", "dead")) == ["shipped new", "shipped free", "shipped dead"]
    assert shop.count(EventName.TAKEN_OVER) == 1
    assert shop.record("dead").crashes == 1


def test_on_crash_is_asked_for_its_message(shop: World) -> None:
    """A function decides about a dead holder's message alone."""
    from idem_tasks import HOLD, RERUN, Outcome

    answers = {"happened": Outcome("by hand"), "not": RERUN, "unknown": HOLD}
    for key in answers:
        shop.claim_elsewhere(key)
    shop.pass_time(LEASE + 1)
    ship = shipping(shop, on_crash=lambda dead: answers[dead.key], fingerprint=None)
    error = failing(ship, messages("happened", "not", "unknown", "new"))
    assert kinds(error) == ["by hand", "shipped not", "InDoubtError", "shipped new"]


def test_what_was_taken_over_meanwhile_gets_the_other_outcome(shop: World) -> None:
    """A member whose claim was lost in mid-run is finished by itself: the first recorded outcome wins."""

    def ship(messages: list[Message]) -> list[str]:
        shop.finish_elsewhere(shop.take_over("B"))
        return ["mine" for _ in messages]

    assert batch_of(shop, ship)(messages("A", "B", "C")) == ["mine", "the other one", "mine"]


def test_what_was_taken_over_and_runs_has_to_come_again(shop: World) -> None:
    """A member whose claim was lost, with no outcome yet, is a LeaseLostError in its place."""

    def ship(messages: list[Message]) -> list[str]:
        shop.take_over("B")
        return ["mine" for _ in messages]

    error = failing(batch_of(shop, ship), messages("A", "B", "C"))
    assert kinds(error) == ["mine", "LeaseLostError", "mine"]
    assert isinstance(error.results[1], LeaseLostError)


def test_an_exception_after_a_take_over_is_answered_by_the_other_outcome(shop: World) -> None:
    """A handler that raises, superseded in all its messages, is not heard: their outcomes are there (F58)."""

    def ship(messages: list[Message]) -> list[str]:
        for key in "AB":
            shop.finish_elsewhere(shop.take_over(key))
        raise ValueError

    assert batch_of(shop, ship)(messages("A", "B")) == ["the other one", "the other one"]


def test_the_heartbeat_holds_all_claims(shop: World) -> None:
    """A batch that runs for longer than its lease keeps every claim, until it is finished."""
    beaten: list[int] = []

    def ship(messages: list[Message]) -> list[str]:
        for _ in range(4):
            shop.pass_time(LEASE / 2)
            if shop.runtime == "blocking":
                shop.beat()
            else:
                beaten.append(1)
                run_sync(shop.real.renew([claim.lease for claim in current_claims()], lambda _: True))
                for claim in current_claims():
                    claim.extend(shop.local())
        return ["done" for _ in messages]

    assert batch_of(shop, ship)(messages("A", "B")) == ["done", "done"]
    assert shop.count(EventName.LEASE_LOST) == 0


# Claims.


def test_the_handler_has_a_claim_for_each_message(shop: World) -> None:
    """`current_claims()` are those of the messages that the handler was given, in their order."""
    shipping(shop)(messages("A"))
    seen: list[Any] = []

    def ship(messages: list[Message]) -> list[str]:
        seen.extend((claim.key, claim.fencing_token > 0, claim.provider_key("ship")) for claim in current_claims())
        with pytest.raises(ConfigurationError, match=r"current_claims\(\)"):
            current_claim()
        return ["done" for _ in messages]

    batch_of(shop, ship)(messages("C", "A", "B"))
    assert [(key, granted) for key, granted, _ in seen] == [("C", True), ("B", True)]
    assert len({provider_key for *_, provider_key in seen}) == 2
    with pytest.raises(ConfigurationError, match="outside"):
        current_claims()


def test_a_handler_of_one_message_has_no_claims(shop: World) -> None:
    """Within a handler of one message, `current_claims` says what to call instead; the batch's come back after it."""

    def charge(order: str) -> None:
        with pytest.raises(ConfigurationError, match=r"current_claim\(\)"):
            current_claims()

    if shop.runtime == "blocking":
        inner = shop.task(charge)

        def ship(messages: list[Message]) -> list[int]:
            inner("X")
            return [len(current_claims()) for _ in messages]

        assert batch_of(shop, ship)(messages("A", "B")) == [2, 2]
    else:
        shop.task(charge)("X")


def test_messages_are_published_with_their_own_outcome(shop: World) -> None:
    """Each claim publishes for its own message: sent once that is recorded, and not for the one that failed."""

    def ship(messages: list[Message]) -> list[Any]:
        for claim in current_claims():
            claim.publish_message(claim.key, to="mail")
        return [ValueError("no") if message["id"] == "B" else "done" for message in messages]

    error = failing(batch_of(shop, ship), messages("A", "B", "C"))
    assert kinds(error) == ["done", "ValueError", "done"]
    assert [message.body for message in shop.sent] == ["A", "C"]


@pytest.mark.parametrize("runtime, tiers", [("blocking", 1)], indirect=True)
def test_steps_are_those_of_one_message(world: World) -> None:
    """A step is done once for its message, and replayed when that comes again."""
    fails: dict[str, Any] = {"B": ValueError("no")}

    def effect(key: str) -> str:
        world.effects.append(key)
        return key

    def ship(messages: list[Message]) -> list[Any]:
        assert len(messages) == len(current_claims())
        done = [claim.step("ship", effect, claim.key) for claim in current_claims()]
        return [fails.pop(key, key) for key in done]

    task = batch_of(world, ship)
    failing(task, messages("A", "B"))
    assert task(messages("A", "B")) == ["A", "B"]
    assert world.effects == ["A", "B"]


# The store fails.


def test_a_store_that_is_away_is_asked_once(shop: World) -> None:
    """Nothing runs, every message has to come again, and the store is not waited for once for each."""
    shop.record_tier.down()
    error = failing(shipping(shop), messages("A", "B", "C"))
    assert kinds(error) == ["StoreUnavailableError"] * 3
    assert shop.effects == []
    assert shop.record_tier.verbs.count("claim") == 1
    assert all(isinstance(each, StoreError) for each in error.results)


def test_what_was_granted_before_the_store_went_runs(alone: World) -> None:
    """Claims that stand are used; the rest is not asked for."""
    alone.record_tier.before("claim", lambda: None, away())
    error = failing(shipping(alone), messages("A", "B", "C"))
    assert kinds(error) == ["shipped A", "StoreUnavailableError", "StoreUnavailableError"]
    assert alone.effects == ["A"]


def test_the_lost_reply_of_a_batch_of_claims_is_made_up_for(many: World) -> None:
    """Claims whose reply was lost are granted again to the same owner, with the same fencing token (F21)."""
    many.record_tier.after("claim_batch", away())
    assert shipping(many)(messages("A", "B")) == ["shipped A", "shipped B"]
    assert [many.record(key).attempts for key in "AB"] == [1, 1]


def test_the_lost_reply_of_a_batch_of_outcomes_is_made_up_for(many: World) -> None:
    """Outcomes whose reply was lost are recorded once."""
    many.record_tier.after("finish_batch", away())
    assert shipping(many)(messages("A", "B")) == ["shipped A", "shipped B"]
    assert many.record_tier.verbs == ["claim_batch", "finish_batch", "finish", "finish"]
    assert many.count(EventName.COMPLETED) == 2


def test_outcomes_are_kept_pending_when_the_store_stays_away(shop: World) -> None:
    """After the effect nothing is released: each outcome is kept for another try, and its message comes again (F57)."""
    ship = shipping(shop)

    def away_at_the_end(messages: list[Message]) -> list[str]:
        shop.record_tier.down("finish", "finish_batch")
        return ["done" for _ in messages]

    error = failing(batch_of(shop, away_at_the_end), messages("A", "B"))
    assert kinds(error) == ["StoreUnavailableError", "StoreUnavailableError"]
    assert shop.count(EventName.OUTCOME_PENDING) == 2
    assert shop.count(EventName.RELEASED) == 0
    shop.record_tier.up()
    shop.local.advance(10)
    shop.beat()
    assert ship(messages("A", "B")) == ["done", "done"]
    assert shop.effects == []


def test_outcomes_that_are_refused_together_are_finished_by_themselves_at_once(many: World) -> None:
    """One that the database does not take must not cost the others their leases, nor their outcomes (F38)."""
    many.record_tier.down("finish_batch", error=StoreError("refused"))
    begun = many.local()
    assert shipping(many)(messages("A", "B")) == ["shipped A", "shipped B"]
    assert many.local() == begun
    assert many.record_tier.verbs == ["claim_batch", "finish_batch", "finish", "finish"]


def test_claims_are_renewed_while_others_are_finished(many: World) -> None:
    """Each waits for its turn under its lease: the last one is not lost to a slow store."""
    many.record_tier.down("finish_batch")

    def slowly() -> Any:
        many.pass_time(LEASE / 2)
        return many.heartbeat.beat()

    many.record_tier.after("finish", *[slowly] * 4)
    assert shipping(many)(messages("A", "B", "C", "D"))[-1] == "shipped D"
    assert many.count(EventName.LEASE_LOST) == 0


def test_no_message_waits_for_a_store_that_another_one_found_away(shop: World) -> None:
    """Once the leases are over, all outcomes are kept at once: an outcome that comes too late is run again (F57)."""

    def hang() -> None:
        shop.pass_time(10)
        raise away()

    def away_at_the_end(messages: list[Message]) -> list[str]:
        for verb in ("finish", "finish_batch"):
            shop.record_tier.before(verb, *[hang] * 100)
        return ["done" for _ in messages]

    begun = shop.local()
    failing(batch_of(shop, away_at_the_end), messages(*"ABCDEFGHIJ"))
    assert shop.count(EventName.OUTCOME_PENDING) == 10
    assert shop.local() - begun < LEASE + 20


def test_no_failed_message_waits_for_a_store_that_another_one_found_away(shop: World) -> None:
    """Their leases are over, so that nothing is left to release."""

    def hang() -> None:
        shop.pass_time(LEASE / 2)
        raise away()

    shop.record_tier.before("release", *[hang] * 100)
    failing(shipping(shop, dict.fromkeys("ABCDEFGHIJ", ValueError("no"))), messages(*"ABCDEFGHIJ"))
    assert shop.count(EventName.RELEASE_FAILED) == 10
    assert shop.record_tier.verbs.count("release") == 2


def test_without_a_store_the_handler_may_run_unprotected(shop: World) -> None:
    """`on_store_unavailable="run"` runs all of them, at the beginning and at the end."""
    ship = shipping(shop, on_store_unavailable="run")
    shop.record_tier.down()
    assert ship(messages("A", "B")) == ["shipped A", "shipped B"]
    shop.record_tier.up()

    def away_at_the_end(messages: list[Message]) -> list[str]:
        shop.record_tier.down()
        return ["done" for _ in messages]

    assert batch_of(shop, away_at_the_end, on_store_unavailable="run")(messages("A", "B")) == ["done", "done"]
    assert shop.count(EventName.UNPROTECTED_RUN) == 4


@pytest.mark.parametrize("options", [{"on_store_unavailable": "run"}, {"shadow": True}])
def test_a_store_that_is_away_is_asked_once_where_all_run_without_it(shop: World, options: Any) -> None:
    """No message waits for a store that another one found away."""
    shop.record_tier.down()
    assert shipping(shop, **options)(messages("A", "B", "C")) == ["shipped A", "shipped B", "shipped C"]
    assert shop.record_tier.verbs.count("claim") == 1


def test_what_is_in_shadow_runs_though_its_grants_came_too_late(many: World) -> None:
    """Shadow keeps nothing from running."""
    many.record_tier.after("claim_batch", lambda: many.local.advance(LEASE + 1))
    assert shipping(many, shadow=True)(messages("A", "B")) == ["shipped A", "shipped B"]


def test_a_claim_that_ran_out_while_others_were_asked_for_begins_nothing(alone: World) -> None:
    """Its handler would run beside another one, and nobody was killed or paused (F1)."""
    alone.record_tier.after("claim", *[lambda: alone.pass_time(LEASE / 2)] * 3)
    error = failing(shipping(alone), messages("A", "B", "C"))
    assert kinds(error) == ["StoreUnavailableError", "StoreUnavailableError", "shipped C"]
    assert alone.effects == ["C"]
    assert alone.held() == 0


def test_a_batch_of_grants_that_came_too_late_is_given_back(many: World) -> None:
    """Grants that arrive after their lease begin nothing (F1)."""
    many.record_tier.after("claim_batch", lambda: many.local.advance(LEASE + 1))
    error = failing(shipping(many), messages("A", "B"))
    assert kinds(error) == ["StoreUnavailableError", "StoreUnavailableError"]
    assert many.effects == []
    assert [many.state(key) for key in "AB"] == [State.RELEASED, State.RELEASED]


def test_large_outcomes_are_written_in_several_steps(many: World) -> None:
    """No statement grows with the number of large outcomes, or a database would refuse it for ever (F43)."""
    text = "x" * (DOUBTFUL_SIZE // 2)
    batch_of(many, lambda messages: [text for _ in messages])(messages("A", "B", "C", "D", "E"))
    assert many.record_tier.verbs.count("finish_batch") == 5
    assert {many.state(key) for key in "ABCDE"} == {State.COMPLETED}


def test_an_outcome_that_cannot_be_kept_is_that_of_its_message(shop: World) -> None:
    """The others are recorded with their values (F43)."""
    task = batch_of(shop, lambda messages: [object() if message["id"] == "B" else 1 for message in messages])
    task(messages("A", "B"))
    error = failing(task, messages("A", "B"))
    assert kinds(error) == [1, "OutcomeError"]
    assert isinstance(error.results[1], OutcomeError)


# Policies.


@pytest.mark.parametrize("on_duplicate", ["skip", "raise"])
def test_duplicates_as_the_policy_says(shop: World, on_duplicate: Any) -> None:
    """`skip` gives None, `raise` a DuplicateError in the message's place: within a batch and after it."""
    ship = shipping(shop, on_duplicate=on_duplicate)
    for number in range(2):
        first = "shipped A" if number == 0 else None
        if on_duplicate == "skip":
            assert ship(messages("A", "A")) == [first, None]
            continue
        error = failing(ship, messages("A", "A"))
        assert kinds(error) == [first or "DuplicateError", "DuplicateError"]
        duplicate = cast(DuplicateError, error.results[1])
        assert duplicate.outcome == "shipped A"


def test_disabled_runs_everything(shop: World) -> None:
    """`enabled=False` runs the bare handler with all messages, also those without a key or twice."""
    ship = shipping(shop, enabled=False)
    keys = ["A", "A", None]
    assert ship([{"id": key} for key in keys]) == ["shipped A", "shipped A", "shipped None"]
    assert shop.record_tier.verbs == []


def test_shadow_runs_everything_and_counts(shop: World) -> None:
    """In shadow duplicates are counted and run all the same, within a batch too; no key keeps nothing from running."""
    ship = shipping(shop, shadow=True)
    assert ship(messages("A", "B", "A")) == ["shipped A", "shipped B", "shipped A"]
    assert ship([{"id": None}, *messages("A", "C")]) == ["shipped None", "shipped A", "shipped C"]
    assert shop.effects == ["A", "B", "A", None, "A", "C"]
    assert shop.count(EventName.SHADOW_DUPLICATE) == 2
    shop.record_tier.down("finish", "finish_batch")
    assert ship(messages("D", "E")) == ["shipped D", "shipped E"]


def test_waiting_is_refused(shop: World) -> None:
    """`on_in_progress="wait"` is an error at decoration, or at the first call where only the configuration says so."""
    with pytest.raises(ConfigurationError, match="not for a batch"):
        shipping(shop, on_in_progress="wait")
    shop.idem.policy = Policy(on_in_progress="wait")
    with pytest.raises(ConfigurationError, match="not for a batch"):
        shipping(shop)(messages("A"))


# What strikes.


@pytest.mark.parametrize(
    "kind, runtime",
    [
        (KeyboardInterrupt, "blocking"),  # on asyncio it would end the test's event loop
        (SoftLimitError, "blocking"),
        (SoftLimitError, "asyncio"),
        (asyncio.CancelledError, "blocking"),
        (asyncio.CancelledError, "asyncio"),
    ],
    indirect=["runtime"],
)
def test_what_strikes_the_handler_goes_on_as_itself(shop: World, kind: type[BaseException]) -> None:
    """Its messages are released, and what struck is not wrapped."""

    def ship(messages: list[Message]) -> list[str]:
        raise kind

    with pytest.raises(kind):
        batch_of(shop, ship)(messages("A", "B"))
    assert [shop.state(key) for key in "AB"] == [State.RELEASED, State.RELEASED]
    assert shop.held() == 0


@pytest.mark.parametrize("shop, verb", [("alone", "claim"), ("together", "claim_batch")], indirect=["shop"])
def test_what_strikes_the_claims_gives_all_back(shop: World, verb: str) -> None:
    """Nothing has run: what was granted is given back at once, also where the reply had not come yet."""
    actions: list[Any] = [lambda: None] if verb == "claim" else []
    shop.record_tier.after(verb, *actions, asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        shipping(shop)(messages("A", "B", "C"))
    assert {shop.state(key) for key in "ABC"} <= {State.RELEASED, None}
    assert (shop.effects, shop.held()) == ([], 0)
    assert shipping(shop)(messages("A", "B", "C")) == ["shipped A", "shipped B", "shipped C"]


def test_a_cancellation_waits_for_all_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled while the outcomes are written, the call ends once all are recorded (F62)."""
    for together in (True, False):
        with world_on(monkeypatch, "asyncio", 1) as world:
            if together:
                batching(world)
            world.record_tier.wandering = True

            @idempotent_batch(key="{message[id]}", scope=SCOPE, idempotency=world.idem)
            async def ship(messages: list[Message]) -> list[str]:
                asyncio.get_running_loop().call_soon(cast(Any, asyncio.current_task()).cancel)
                return ["done" for _ in messages]

            with pytest.raises(asyncio.CancelledError):
                world.drive(ship, messages("A", "B"))
            assert [world.state(key) for key in "AB"] == [State.COMPLETED, State.COMPLETED]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_soft_limit_among_the_outcomes_waits_for_all_of_them(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Struck while they are written one by one, the call ends once all are recorded, and the next one runs nothing."""
    with world_on(monkeypatch, "blocking", 1) as world:
        ship = shipping(one_at_a_time(world))
        getattr(world.record_tier, when)("finish", lambda: None, SoftLimitError())
        with pytest.raises(SoftLimitError):
            ship(messages("A", "B", "C"))
        assert ([world.state(key) for key in "ABC"], world.held()) == ([State.COMPLETED] * 3, 0)
        assert ship(messages("A", "B", "C")) == ["shipped A", "shipped B", "shipped C"]
        assert world.effects == ["A", "B", "C"]


def test_a_coroutine_that_is_dropped_leaves_its_claims_to_their_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """After GeneratorExit nothing can be awaited: the claims are renewed no more, and nothing else is done."""
    with world_on(monkeypatch, "asyncio", 1) as world:

        async def ship(messages: list[Message]) -> list[str]:
            await asyncio.Event().wait()
            return []

        async def drop() -> None:
            batch = world.idem._batch(
                ship, messages("A", "B"), SCOPE, "{message[id]}", "message", None, None, "asyncio"
            )
            coroutine = perform_batch(batch)
            coroutine.send(None)
            coroutine.close()

        world.drive(drop)
        gc.collect()
        assert [world.state(key) for key in "AB"] == [State.RUNNING, State.RUNNING]
        assert world.held() == 0


def test_what_strikes_a_key_callable_is_no_missing_key(world: World) -> None:
    """A soft limit in a key callable ends the call: the message is not told that it has no key."""

    def key(message: Message) -> str:
        raise SoftLimitError

    with pytest.raises(SoftLimitError):
        shipping(world, key=key)(messages("A"))
    assert world.record_tier.verbs == []


class Odd(list[str]):
    """A list whose length nobody can tell just now."""

    def __len__(self) -> int:
        raise SoftLimitError


def test_what_strikes_while_outcomes_are_matched_leaves_claims_to_their_leases(world: World) -> None:
    """The handler has returned: nothing is released, whatever strikes (F62)."""
    with pytest.raises(SoftLimitError):
        batch_of(world, lambda _messages: Odd())(messages("A", "B"))
    assert [world.state(key) for key in "AB"] == [State.RUNNING, State.RUNNING]


def under_a_host(world: World, handler: Callable[..., Any]) -> Any:
    """Make a batch of two messages as a framework's call of it."""
    batch = world.idem._batch(handler, messages("A", "B"), SCOPE, "{message[id]}", "message", None, None, "blocking")
    batch.host = Host()
    for member in batch.members:
        member.call = replace(member.its_call, host=batch.host)
    return batch


@pytest.mark.parametrize("together", [True, False])
def test_a_soft_limit_before_the_handler_brings_all_messages_back(
    monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """Within a framework it is a StoreUnavailableError, so that no message is failed for it (F31)."""
    with world_on(monkeypatch, "blocking", 1) as world:
        batching(world) if together else one_at_a_time(world)
        batch = under_a_host(world, len)
        world.record_tier.after("claim_batch" if together else "claim", SoftLimitError())
        with pytest.raises(StoreUnavailableError, match="before its handler began"):
            run_sync(perform_batch(batch))
        assert {world.state(key) for key in "AB"} <= {State.RELEASED, None}
        batch.announce(EventName.PUT_BACK, count=1)
        assert [event.key for event in world.events if event.name is EventName.PUT_BACK] == ["A", "B"]


def test_only_what_comes_again_is_announced_as_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that has its outcome already is in the copy too, and is not put back for its own sake."""
    with world_on(monkeypatch, "blocking", 1) as world:
        world.claim_elsewhere("B")
        batch = under_a_host(world, lambda messages: ["done" for _ in messages])
        with pytest.raises(BatchError, match="InProgressError"):
            run_sync(perform_batch(batch))
        batch.announce(EventName.PUT_BACK, count=1)
        assert [event.key for event in world.events if event.name is EventName.PUT_BACK] == ["B"]


def test_what_a_framework_raises_goes_on_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Retry is no failure: every message is released, uncounted, and Retry is what the framework gets."""

    def ship(messages: list[Message]) -> list[str]:
        raise RetryError

    with world_on(monkeypatch, "blocking", 1) as world:
        with pytest.raises(RetryError):
            run_sync(perform_batch(under_a_host(world, ship)))
        assert [(world.state(key), world.record(key).failures) for key in "AB"] == [(State.RELEASED, 0)] * 2


def test_where_nothing_can_be_awaited_claims_are_left_to_their_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coroutine that is dropped while it claims gives nothing back, for it cannot."""
    with world_on(monkeypatch, "blocking", 1) as world:
        world.record_tier.after("claim_batch", KeyboardInterrupt())
        monkeypatch.setattr(Blocking, "can_wait", lambda _, *, after: not after)
        with pytest.raises(KeyboardInterrupt):
            shipping(world)(messages("A", "B"))
        assert [world.state(key) for key in "AB"] == [State.RUNNING, State.RUNNING]


def test_what_is_known_of_a_task_takes_one_message(world: World) -> None:
    """A framework's task of it, bound or not, answers for one message."""

    @idempotent_batch(key="{message[id]}", idempotency=world.idem)
    def ship(messages: list[Message]) -> list[str]:
        return ["done" for _ in messages]

    known = idempotency_of(ship).of_task("shop.ship", bound=True)
    [message] = messages("A")
    assert (known.scope_for(message), known.key_for(message)) == ("shop.ship", "A")


@pytest.mark.parametrize("use", ["consumer", "assert_idempotent"])
def test_what_takes_one_message_refuses_a_handler_of_many(world: World, use: str) -> None:
    """A consumer and `assert_idempotent` say so before any message comes."""

    @idempotent_batch(key="{message[id]}", idempotency=world.idem)
    def ship(messages: list[Message]) -> list[str]:
        return ["done" for _ in messages]

    def give() -> object:
        if use == "consumer":
            return MessageHandler(ship, runtime="blocking", key=str, scope="queue", fingerprint=None)
        return assert_idempotent(ship, messages("A"))

    with pytest.raises(ConfigurationError, match="many"):
        give()


@pytest.mark.parametrize("error", [InProgressError(retry_after=7.0), StoreUnavailableError("away")])
def test_a_batch_comes_again_if_any_of_its_messages_has_to(error: Exception) -> None:
    """Put back, and not before what runs elsewhere may be over; one that only failed is not put back."""
    results = ["done", ValueError("no"), error]
    batch = BatchError(results=results, errors=(1, 2))
    assert comes_again(batch)
    assert batch.retry_after == getattr(error, "retry_after", 0.0)
    assert not comes_again(BatchError(results=results, errors=(1,)))
    assert BatchError("text alone").retry_after == 0.0


# What is refused at decoration.


@pytest.mark.parametrize(
    "handler, said",
    [
        (lambda: None, "takes one list of messages"),
        (lambda _messages, _other: None, "takes one list of messages"),
        (lambda *_messages: None, "takes one list of messages"),
        (lambda _messages: None, None),
        ("text", "decorates functions"),
    ],
)
def test_a_handler_takes_one_list(handler: Any, said: str | None) -> None:
    """Other parameters than the messages are refused at once."""
    decorate: Any = idempotent_batch(key="{message[id]}", idempotency=Idempotency(store=MemoryStore()))
    if said is None:
        decorate(handler)
        return
    with pytest.raises(ConfigurationError, match=said):
        decorate(handler)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"key": "constant"}, "names no parameter"),
        ({"key": "{order}"}, "not a parameter"),
        ({"key": "{message[id]}", "fingerprint": "arguments"}, '"message"'),
        ({"key": "{message[id]}", "fingerprint": ["id"]}, "callable of one message"),
        ({"key": "{message[id]}", "leese": 5}, "unknown keyword: leese"),
    ],
)
def test_what_cannot_work_is_refused_at_decoration(options: Any, said: str) -> None:
    """Keys, fingerprints and policies are checked before any message comes."""
    with pytest.raises(ConfigurationError, match=said):
        idempotent_batch(**options)(lambda messages: messages)


@pytest.mark.parametrize("given", ["text", b"bytes", {"id": "A"}, 17])
def test_messages_are_a_list(world: World, given: Any) -> None:
    """A single message, given where a list belongs, is not taken for a list of its letters or keys."""
    with pytest.raises(ConfigurationError, match="are a list"):
        shipping(world)(given)


class Unkept:
    """A class that no codec knows."""


def test_an_outcome_type_that_cannot_be_kept_is_refused_at_decoration() -> None:
    """What one outcome is annotated as is checked as that of a handler of one message."""

    def ship(messages: list[Message]) -> list[BatchError | Unkept]:
        return []

    with pytest.raises(ConfigurationError):
        idempotent_batch(key="{message[id]}", idempotency=Idempotency(store=MemoryStore()))(ship)


# Without the decorator, on methods, for people.


def test_run_batch(shop: World) -> None:
    """`run_batch` and `arun_batch` do the same for a bare function."""

    def ship(messages: list[Message]) -> dict[str, str]:
        shop.effects.extend(messages)
        return {message["id"]: "done" for message in messages}

    async def ship_later(messages: list[Message]) -> dict[str, str]:
        return ship(messages)

    for _ in range(2):
        if shop.runtime == "blocking":
            done = shop.idem.run_batch(ship, iter(messages("A", "B")), scope=SCOPE, key=lambda message: message["id"])
        else:
            done = shop.drive(shop.idem.arun_batch, ship_later, messages("A", "B"), scope=SCOPE, key="{message[id]}")
        assert done == ["done", "done"]
    assert len(shop.effects) == 2


@pytest.mark.parametrize("runtime", ["blocking"], indirect=True)
def test_a_method_may_be_a_handler(shop: World) -> None:
    """`self` goes before the messages, and is no part of any key."""

    class Shop:
        @idempotent_batch(key="{message[id]}", scope=SCOPE, idempotency=shop.idem)
        def ship(self, messages: list[Message]) -> list[str]:
            return [type(self).__name__ for _ in messages]

    assert Shop().ship(messages("A", "B")) == ["Shop", "Shop"]
    assert Shop().ship(messages=messages("A", "B")) == ["Shop", "Shop"]


def test_messages_may_have_a_default(world: World) -> None:
    """A call without messages is one of the default's."""

    def ship(messages: Sequence[Message] = ()) -> list[Any]:
        return ["shipped" for _ in messages]

    assert batch_of(world, ship)() == []


def test_its_verbs_for_people_take_one_message(world: World) -> None:
    """`idempotency_of` a batch handler knows the key, scope and record of one message."""

    @idempotent_batch(key="{message[id]}", scope=SCOPE, idempotency=world.idem)
    def ship(messages: list[Message]) -> list[str]:
        return ["done" for _ in messages]

    known = idempotency_of(ship)
    [message] = messages("A")
    assert (known.scope_for(message), known.key_for(message)) == (SCOPE, "A")
    if world.runtime == "blocking":
        ship([message])
        found = known.lookup(message)
        assert found is not None
        assert found.state is State.COMPLETED
        assert known.forget(message)


def test_batch_error_survives_pickle(shop: World) -> None:
    """Celery sends errors between processes: outcomes and errors come along."""
    error = failing(shipping(shop, {"B": ValueError("no")}), messages("A", "B"))
    again = pickle.loads(pickle.dumps(error))
    assert (kinds(again), again.errors, str(again)) == (kinds(error), (1,), str(error))


def test_a_recorded_failure_met_by_a_batch_is_replayed_alone(shop: World) -> None:
    """A record that failed for good raises in its message's place only."""
    lease = shop.claim_elsewhere("B")
    run_sync(
        shop.real.finish(lease, EncodedOutcome(State.FAILED, error_type="builtins.ValueError", error_message="no"))
    )
    error = failing(shipping(shop, fingerprint=None), messages("A", "B"))
    assert kinds(error) == ["shipped A", "ReplayedFailureError"]


def test_a_store_error_that_is_no_outage_fails_its_message(alone: World) -> None:
    """What the database answers with an error for one message does not keep the others from running."""
    alone.record_tier.before("claim", StoreError("refused"))
    error = failing(shipping(alone), messages("A", "B"))
    assert kinds(error) == ["StoreError", "shipped B"]
    assert isinstance(StoreUnavailableError(), StoreError)
