"""The contract of a journal of steps as tests: for stores that keep one beside their records, as `StepJournal` says.

Make a subclass in a test module and give it a fixture `store`, as for `StoreContract`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from idem_tasks.claims import (
    EncodedOutcome,
    Granted,
    InDoubt,
    Lost,
    NotKept,
    Parked,
    Recorded,
    Released,
    State,
    StepBegun,
    StepFinished,
    StepsDiffer,
)
from idem_tasks.stores.base import journal_of
from idem_tasks.testing.contract import StoreSuite
from idem_tasks.testing.driver import Verb
from idem_tasks.testing.store_in_use import DONE, OTHER, SHORT, TAKERS, StoreInUse


class StepContract(StoreSuite):
    """What a journal of steps promises; a subclass gives the store."""

    def test_a_finished_step_answers_every_later_attempt(self, use: StoreInUse) -> None:
        """What a step gave is there for the next attempt, and for the one after it (F15)."""
        lease = use.granted()
        assert use.begin_step(lease) == StepBegun()
        assert use.finish_step(lease) == Recorded()
        for _ in range(3):
            use.release(lease)
            lease = use.granted()
            assert use.begin_step(lease) == StepFinished(DONE)

    def test_a_step_that_was_only_begun_begins_again(self, use: StoreInUse) -> None:
        """Nobody knows what came of it: the next attempt runs it, and its outcome is kept (F15)."""
        first = use.granted(lease=SHORT)
        use.begin_step(first)
        second = use.taken_over()
        assert use.begin_step(second) == StepBegun()
        assert use.finish_step(second) == Recorded()
        use.release(second)
        assert use.begin_step(use.granted()) == StepFinished(DONE)

    def test_a_dead_holders_steps_are_there_after_the_takeover(self, use: StoreInUse) -> None:
        """A worker that dies between two steps leaves the outcome of the first (F15)."""
        first = use.granted(lease=SHORT)
        use.begin_step(first)
        use.finish_step(first)
        use.begin_step(first, 2, "mail")
        second = use.taken_over()
        assert use.begin_step(second) == StepFinished(DONE)
        assert use.begin_step(second, 2, "mail") == StepBegun()

    @pytest.mark.parametrize(
        "body",
        [b"", b"null", b"0", bytes(range(256)), b"\x00" * 1000, b"x" * 200_000],
        ids=["empty", "null", "0", "all bytes", "zeros", "large"],
    )
    def test_outcomes_come_back_byte_by_byte(self, use: StoreInUse, body: bytes) -> None:
        """The outcome of a step is exactly the bytes that were kept; an empty one is not none (F28)."""
        outcome = EncodedOutcome(body=body, codec="json+zlib")
        lease = use.granted()
        use.begin_step(lease)
        assert use.finish_step(lease, outcome) == Recorded()
        assert use.begin_step(lease) == StepFinished(outcome)

    @pytest.mark.parametrize("reason", ["too_large", "not_encodable"])
    def test_an_outcome_that_was_not_kept_says_why(self, use: StoreInUse, reason: NotKept) -> None:
        """A step without an outcome is finished all the same, so that it never runs again (F43)."""
        lease = use.granted()
        use.begin_step(lease)
        assert use.finish_step(lease, EncodedOutcome(not_kept=reason)) == Recorded()
        assert use.begin_step(lease) == StepFinished(EncodedOutcome(not_kept=reason))
        assert use.finish_step(lease, DONE) == StepFinished(EncodedOutcome(not_kept=reason))

    def test_the_first_outcome_stands(self, use: StoreInUse) -> None:
        """A finish may be sent again (F21); another outcome changes nothing, and is told the first."""
        lease = use.granted()
        use.begin_step(lease)
        assert use.finish_step(lease) == Recorded()
        assert use.finish_step(lease) == Recorded()
        assert use.finish_step(lease, OTHER) == StepFinished(DONE)
        assert use.begin_step(lease) == StepFinished(DONE)

    def test_a_begin_may_be_sent_again(self, use: StoreInUse) -> None:
        """One whose reply was lost begins the same step (F21)."""
        lease = use.granted()
        assert use.begin_step(lease) == use.begin_step(lease) == StepBegun()

    def test_steps_of_one_name_are_told_apart_by_their_position(self, use: StoreInUse) -> None:
        """A loop may do the same step several times."""
        lease = use.granted()
        for position, outcome in enumerate((DONE, OTHER), start=1):
            assert use.begin_step(lease, position) == StepBegun()
            use.finish_step(lease, outcome, position)
        assert [use.begin_step(lease, position) for position in (1, 2, 3)] == [
            StepFinished(DONE),
            StepFinished(OTHER),
            StepBegun(),
        ]

    def test_other_steps_than_last_time_are_told(self, use: StoreInUse) -> None:
        """A step of another name at its position is not begun; all names of the earlier attempt come back in order."""
        lease = use.granted()
        for position, name in enumerate(("charge", "reserve", "mail"), start=1):
            use.begin_step(lease, position, name)
            if name != "mail":
                use.finish_step(lease, DONE, position, name)
        use.release(lease)
        lease = use.granted()
        differ = StepsDiffer(("charge", "reserve", "mail"))
        assert use.begin_step(lease, 1, "refund") == differ
        assert use.begin_step(lease, 3, "refund") == differ
        assert use.begin_step(lease, 1, "charge") == StepFinished(DONE)
        assert use.begin_step(lease, 3, "mail") == StepBegun()

    @pytest.mark.parametrize("other", ["Charge", "charge ", "chargé", "c" * 255])
    def test_names_compare_as_bytes(self, use: StoreInUse, other: str) -> None:
        """No collation takes two names for one (F51)."""
        lease = use.granted()
        use.begin_step(lease)
        assert use.begin_step(lease, 1, other) == StepsDiffer(("charge",))
        assert use.begin_step(lease, 2, other) == StepBegun()
        assert use.begin_step(lease, 2, other) == StepBegun()

    def test_steps_belong_to_one_key(self, use: StoreInUse) -> None:
        """The same step of another key or scope is another one (F36)."""
        lease = use.granted()
        use.begin_step(lease)
        use.finish_step(lease)
        assert use.begin_step(use.granted("another key")) == StepBegun()
        assert use.begin_step(use.granted(use.request(scope=f"{use.scope}.other"))) == StepBegun()

    def test_a_superseded_claim_writes_no_step(self, use: StoreInUse) -> None:
        """Once it was taken over, a paused holder begins nothing, and its late outcome is not kept (F1)."""
        first = use.granted(lease=SHORT)
        use.begin_step(first)
        second = use.taken_over()
        assert use.begin_step(first, 2, "mail") == Lost()
        assert use.finish_step(first) == Lost()
        assert use.begin_step(second) == StepBegun()
        assert use.finish_step(second, OTHER) == Recorded()
        assert use.finish_step(first) == Lost()
        assert use.begin_step(second, 2, "post") == StepBegun()

    def test_an_ended_claim_writes_no_step(self, use: StoreInUse) -> None:
        """Neither one that was released nor one whose outcome is recorded."""
        for key in ("released", "completed"):
            lease = use.granted(key)
            use.begin_step(lease)
            use.release(lease) if key == "released" else use.finish(lease)
            assert use.begin_step(lease) == use.begin_step(lease, 2, "mail") == Lost()
            assert use.finish_step(lease) == Lost()

    def test_a_claim_in_doubt_keeps_the_truth_and_begins_nothing(self, use: StoreInUse) -> None:
        """Under hold a paused holder's step has happened, so its outcome is kept; another one is not begun (F55)."""
        lease = use.granted(lease=SHORT, on_crash="hold")
        use.begin_step(lease)
        assert use.after_the_lease(on_crash="hold") == InDoubt(new=True)
        assert use.begin_step(lease, 2, "mail") == Lost()
        assert use.finish_step(lease) == Recorded()
        use.resolve(None)
        assert use.begin_step(use.granted()) == StepFinished(DONE)

    def test_a_claim_can_be_parked(self, use: StoreInUse) -> None:
        """Whose steps are others than last time waits for a person, with the reason, and keeps its steps."""
        lease = use.granted()
        use.begin_step(lease)
        use.finish_step(lease)
        how = {"parked": True, "error_type": "StepsChangedError", "error_message": "other steps"}
        assert use.release(lease, **how) == Released(State.PARKED)
        record = use.record()
        assert (record.state, record.attention, record.error_message) == (State.PARKED, "parked", "other steps")
        assert use.claim() == Parked(0, 0)
        use.resolve(None)
        assert use.begin_step(use.granted()) == StepFinished(DONE)

    def test_a_forgotten_record_leaves_no_steps(self, use: StoreInUse) -> None:
        """Forgetting is a new beginning, of every step too (F53)."""
        lease = use.granted()
        use.begin_step(lease)
        use.finish_step(lease)
        use.release(lease)
        other = use.granted("other")
        use.begin_step(other)
        use.finish_step(other)
        assert use.forget()
        assert use.begin_step(use.granted()) == StepBegun()
        assert use.begin_step(other) == StepFinished(DONE)

    def test_a_new_generation_has_no_steps(self, use: StoreInUse) -> None:
        """What is claimed afresh after its retention begins every step again."""
        lease = use.granted(lease=0.1, max_hold=0.1, retention=0.1)
        use.begin_step(lease)
        use.finish_step(lease)
        use.finish(lease)
        use.driver.pause(0.4)
        assert use.begin_step(use.granted(), 1, "of another name") == StepBegun()

    def test_purged_records_leave_no_steps(self, use: StoreInUse) -> None:
        """A purge takes the steps of what it purges, of all generations, and of nothing else."""
        for _ in range(2):
            lease = use.granted(lease=0.1, max_hold=0.1, retention=0.1)
            use.begin_step(lease)
            use.finish_step(lease)
            use.finish(lease)
            use.driver.pause(0.4)
        other = use.granted("other")
        use.begin_step(other)
        use.finish_step(other)
        use.purge()
        assert use.get() is None
        again = use.granted()
        assert again.generation == 1
        assert use.begin_step(again) == StepBegun()
        assert use.begin_step(other) == StepFinished(DONE)

    def test_steps_are_listed_in_their_order(self, use: StoreInUse) -> None:
        """Whoever looks sees how far a handler came, and of each outcome its size and codec, but not what is in it."""
        assert use.steps() == []
        lease = use.granted()
        assert use.steps() == []
        kept = {
            1: DONE,
            2: EncodedOutcome(body=b"", codec="own"),
            3: EncodedOutcome(not_kept="too_large"),
            10: EncodedOutcome(body="\u00e9".encode() * 1000, codec="json"),
        }
        for position, outcome in kept.items():
            use.begin_step(lease, position, f"step {position}")
            use.finish_step(lease, outcome, position, f"step {position}")
        use.begin_step(lease, 11, "ch\u00e4rge")
        use.begin_step(use.granted("other"))
        told = [(each.position, each.name, each.outcome_bytes, each.codec, each.not_kept) for each in use.steps()]
        assert told == [
            (1, "step 1", len(DONE.body or b""), "json", None),
            (2, "step 2", 0, "own", None),
            (3, "step 3", None, None, "too_large"),
            (10, "step 10", 2000, "json", None),
            (11, "ch\u00e4rge", None, None, None),
        ]
        assert [each.position for each in use.steps() if each.finished_at is None] == [11]

    def test_a_step_says_when_it_was_begun_last_and_when_finished(self, use: StoreInUse) -> None:
        """By the store's clock; a finished step that is begun again, or finished again, keeps its times."""
        first = use.granted(lease=SHORT)
        use.begin_step(first)
        [begun] = use.steps()
        second = use.taken_over()
        use.begin_step(second)
        [again] = use.steps()
        assert begun.started_at < again.started_at
        assert again.finished_at is None
        use.finish_step(second)
        [finished] = use.steps()
        assert finished.finished_at is not None
        assert finished.started_at == again.started_at <= finished.finished_at
        assert abs((finished.finished_at - use.record().updated_at).total_seconds()) < 60
        use.driver.pause(0.1)
        use.begin_step(second)
        use.finish_step(second, OTHER)
        assert use.steps() == [finished]

    def test_only_the_steps_of_this_generation_are_listed(self, use: StoreInUse) -> None:
        """Not those from before the record was claimed afresh or forgotten; once it has ended they are still there."""
        lease = use.granted(lease=0.1, max_hold=0.1, retention=0.1)
        use.begin_step(lease)
        use.finish_step(lease)
        use.finish(lease)
        assert [step.name for step in use.steps()] == ["charge"]
        use.driver.pause(0.4)
        afresh = use.granted()
        assert use.steps() == []
        use.begin_step(afresh, 1, "mail")
        assert [step.name for step in use.steps()] == ["mail"]
        use.release(afresh)
        use.forget()
        assert use.steps() == []

    def test_many_finishes_at_once_agree(self, use: StoreInUse) -> None:
        """Whichever is first stands, and all hear of it: one outcome is seen by everybody (F21)."""
        lease, journal = use.granted(), journal_of(use.store)
        use.begin_step(lease)
        outcomes = [EncodedOutcome(body=b"%d" % number, codec="json") for number in range(TAKERS)]
        answers = use.driver.together([partial(journal.finish_step, lease, 1, "charge", each) for each in outcomes])
        stands = use.begin_step(lease)
        assert isinstance(stands, StepFinished)
        assert [answer for answer in answers if answer != stands] == [Recorded()]
        assert answers[outcomes.index(stands.outcome)] == Recorded()

    def test_a_late_finish_and_a_takeover_agree(self, use: StoreInUse) -> None:
        """The next attempt sees the outcome of the last one exactly if that one heard that it is kept (F1, F15)."""
        journal = journal_of(use.store)
        for number in range(5):
            first = use.granted(f"key-{number}", lease=SHORT)
            use.begin_step(first)
            use.let_expire(first)
            request = use.request(f"key-{number}")
            verbs: list[Verb[Any]] = [
                partial(journal.finish_step, first, 1, "charge", DONE),
                partial(use.store.claim, request),
            ]
            late, answer = use.driver.together(verbs)
            assert isinstance(answer, Granted)
            seen = use.begin_step(answer.lease)
            assert (late, seen) in {(Recorded(), StepFinished(DONE)), (Lost(), StepBegun())}
