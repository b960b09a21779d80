"""The contract of a store as tests: whatever keeps every promise here can stand behind `idempotent_task`.

Make a subclass in a test module and give it a fixture `store`:

    class TestMyStore(StoreContract):
        @pytest.fixture
        def store(self) -> Store:
            return MyStore()

Every test runs in both runtimes and uses a scope that no other test uses, so a store may be shared between tests and
need not be emptied. Set `runtimes`, `keeps_ended`, `keeps_generations`, `decides` and `keeps_audit` where the store
differs, and override `pause` where it has a clock of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from idem_tasks.asking import Verdict
from idem_tasks.claims import (
    AuditEntry,
    DeadClaim,
    EncodedOutcome,
    Finished,
    Granted,
    InDoubt,
    InProgress,
    Lease,
    Lost,
    NotKept,
    Parked,
    Record,
    Recorded,
    Released,
    State,
    action_of,
)
from idem_tasks.errors import ConfigurationError, ConflictError, InProgressError
from idem_tasks.events import Announcer
from idem_tasks.stores.base import MarkerPending, RecordTier, RuntimeName, Store
from idem_tasks.testing.driver import Driver
from idem_tasks.testing.store_in_use import (
    DECLINED,
    DONE,
    LONG,
    MEETING_KEYS,
    OTHER,
    SHORT,
    TAKERS,
    WORKERS,
    StoreInUse,
)


def dont_know(_claim: DeadClaim) -> Verdict:
    """Stand for a function given as `on_crash`; a store never calls it."""
    raise AssertionError("a store called the policy's function")


def fence_of(lease: Lease) -> tuple[str, int]:
    """Return what a record obeys."""
    return lease.owner, lease.fencing_token


class StoreSuite:
    """The fixtures of all suites for stores; a subclass gives the store."""

    runtimes: tuple[RuntimeName, ...] = ("blocking", "asyncio")
    """The runtimes to test it in."""

    @pytest.fixture
    def store(self) -> Store:
        """Return the store to test; the subclass overrides this."""
        raise NotImplementedError("give a fixture `store`")

    @pytest.fixture(params=["blocking", "asyncio"])
    def runtime(self, request: pytest.FixtureRequest) -> RuntimeName:
        """Each runtime in turn."""
        name: RuntimeName = request.param
        if name not in self.runtimes:
            pytest.skip(f"this store does not serve {name}")
        return name

    @pytest.fixture
    def pause(self) -> Callable[[float], None]:
        """Let seconds pass; a store with a clock of its own moves it instead of waiting."""
        return time.sleep

    @pytest.fixture
    def use(self, store: Store, runtime: RuntimeName, pause: Callable[[float], None]) -> Iterator[StoreInUse]:
        """The store in one runtime, with a scope that no other test uses; closed afterwards."""
        with Driver(runtime, pause) as driver:
            use = StoreInUse(store, driver)
            driver(use.store.prepare())
            yield use
            driver(use.store.close())


class StoreContract(StoreSuite):
    """What a store promises; a subclass gives the store."""

    keeps_ended = True
    """False for a store whose records vanish by themselves when their retention is over, as keys in Redis do."""

    keeps_generations = True
    """False for a store that forgets an expired record when its key is claimed afresh."""

    decides = True
    """False for a store without `decide`: under a function as `on_crash` its records stay in doubt, as under hold."""

    keeps_audit = True
    """False for a store that keeps no audit: `Store.audit` raises `ConfigurationError` then."""

    # Claiming.

    def test_a_new_key_is_granted(self, use: StoreInUse) -> None:
        """A key that nobody used is granted, and its record says who holds it, how often and until when."""
        request = use.request(fingerprint="a" * 64, holder="web-1:77", traceparent="00-" + "1" * 32 + "-2-01")
        lease = use.granted(request)
        assert lease.request == request
        assert (lease.attempts, lease.failures, lease.crashes, lease.generation) == (1, 0, 0, 1)
        assert not lease.taken_over
        record = use.record()
        assert (record.scope, record.key, record.state) == (use.scope, "key", State.RUNNING)
        assert (record.fencing_token, record.owner) == (lease.fencing_token, lease.owner)
        assert (record.attempts, record.failures, record.crashes, record.generation) == (1, 0, 0, 1)
        assert (record.fingerprint, record.holder) == (request.fingerprint, "web-1:77")
        assert record.traceparent == request.traceparent
        assert record.outcome is None
        assert record.codec is None
        assert record.completed_at is None
        assert record.attention is None
        assert (record.lease_expires_at - record.updated_at).total_seconds() == pytest.approx(LONG, abs=1)
        assert (record.expires_at - record.created_at).total_seconds() == pytest.approx(7200, abs=1)
        assert record.created_at.utcoffset() is not None

    def test_fencing_tokens_are_microseconds_and_rise(self, use: StoreInUse) -> None:
        """A fencing token is at least the clock in microseconds, so one made later is higher, whatever is lost."""
        first = use.granted("one").fencing_token
        use.driver.pause(0.002)
        assert first > 1_000_000_000 * 1_000_000
        assert use.granted("two").fencing_token > first

    def test_a_request_whose_answer_was_lost_is_granted_again(self, use: StoreInUse) -> None:
        """The same owner asking again gets the claim it has, with the same fencing token (F21, F22)."""
        request = use.request()
        first = use.granted(request)
        again = use.granted(request)
        assert again.fencing_token == first.fencing_token
        assert (again.attempts, again.crashes, again.generation) == (1, 0, 1)
        assert use.record().attempts == 1

    def test_a_takeover_whose_answer_was_lost_is_still_a_takeover(self, use: StoreInUse) -> None:
        """A handler that asks its provider only after a takeover must not be told that there was none (F21)."""
        use.let_expire(use.granted(lease=SHORT))
        request = use.request()
        first, again = use.granted(request), use.granted(request)
        assert first.taken_over
        assert again.taken_over

    def test_two_copies_of_a_message_are_told_apart(self, use: StoreInUse) -> None:
        """Another owner on the same host, with the same arguments, is in progress: it passes no fence (F5)."""
        request = use.request(holder="host:1")
        use.granted(request)
        assert isinstance(use.claim(holder="host:1"), InProgress)

    def test_a_running_key_is_in_progress(self, use: StoreInUse) -> None:
        """A second claim learns how long the first one's lease still is."""
        use.granted()
        answer = use.claim()
        assert isinstance(answer, InProgress)
        assert 0 < answer.retry_after <= LONG
        assert answer.retry_after == pytest.approx(LONG, abs=10)
        assert use.record().attempts == 1

    def test_a_longer_lease_than_ours_is_told_as_it_is(self, use: StoreInUse) -> None:
        """How long to wait is the running holder's lease, whatever lease the next one asks for."""
        use.granted()
        answer = use.claim(lease=1.0)
        assert isinstance(answer, InProgress)
        assert answer.retry_after == pytest.approx(LONG, abs=10)

    def test_in_progress_whatever_the_arguments(self, use: StoreInUse) -> None:
        """Other arguments do not take a running key away from its holder."""
        lease = use.granted(fingerprint="a" * 64)
        assert isinstance(use.claim(fingerprint="b" * 64), InProgress)
        assert use.record().fingerprint == "a" * 64
        assert use.finish(lease) == Recorded()

    # Finishing and replaying.

    def test_finish_records_and_the_next_claim_replays(self, use: StoreInUse) -> None:
        """What is finished once answers every later claim, with the fingerprint it was made with."""
        traceparent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
        lease = use.granted(fingerprint="a" * 64, traceparent=traceparent)
        assert use.finish(lease) == Recorded()
        for _ in range(3):
            answer = use.claim(fingerprint="b" * 64, traceparent="00-other")
            assert isinstance(answer, Finished)
            assert answer.outcome == DONE
            assert answer.fingerprint == "a" * 64
            assert 0 < answer.expires_in <= 7200
            assert answer.fencing_token in (None, lease.fencing_token)
            assert answer.traceparent in (None, traceparent)
        record = use.record()
        assert (record.state, record.outcome, record.codec) == (State.COMPLETED, b'"done"', "json")
        assert record.completed_at is not None
        assert record.created_at <= record.completed_at
        assert record.attention is None
        assert record.fencing_token == lease.fencing_token

    def test_no_fingerprint_stays_none(self, use: StoreInUse) -> None:
        """A claim without a fingerprint is replayed without one."""
        use.finish(use.granted(fingerprint=None))
        answer = use.claim()
        assert isinstance(answer, Finished)
        assert answer.fingerprint is None

    def test_finish_twice_is_recorded_once(self, use: StoreInUse) -> None:
        """A finish whose reply was lost may be sent again: recorded, with the outcome of the first (F21)."""
        lease = use.granted()
        assert use.finish(lease) == Recorded()
        assert use.finish(lease) == Recorded()
        assert use.finish(lease, OTHER) == Recorded()
        assert use.record().outcome == DONE.body

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"null",
            b"0",
            b"false",
            b'""',
            b"[]",
            b"{}",
            bytes(range(256)),
            b"\x00" * 1000,
            b"x" * 200_000,
        ],
        ids=["empty", "null", "0", "false", "''", "[]", "{}", "all bytes", "zeros", "large"],
    )
    def test_outcomes_come_back_byte_by_byte(self, use: StoreInUse, body: bytes) -> None:
        """An outcome is exactly the bytes that were recorded; an empty one is not none (F28)."""
        outcome = EncodedOutcome(body=body, codec="json+zlib")
        use.finish(use.granted(), outcome)
        answer = use.claim()
        assert isinstance(answer, Finished)
        assert answer.outcome == outcome
        assert use.record().outcome == body

    @pytest.mark.parametrize("reason", ["too_large", "skipped", "not_encodable"])
    def test_an_outcome_that_was_not_kept_says_why(self, use: StoreInUse, reason: NotKept) -> None:
        """A completed record without an outcome answers duplicates with the reason, and never runs again (F43)."""
        outcome = EncodedOutcome(not_kept=reason)
        use.finish(use.granted(), outcome)
        answer = use.claim()
        assert isinstance(answer, Finished)
        assert answer.outcome == outcome
        record = use.record()
        assert (record.state, record.outcome, record.not_kept) == (State.COMPLETED, None, reason)

    def test_a_recorded_failure_is_replayed(self, use: StoreInUse) -> None:
        """A final failure comes back with its type and message."""
        use.finish(use.granted(), DECLINED)
        answer = use.claim()
        assert isinstance(answer, Finished)
        assert answer.outcome == DECLINED
        record = use.record()
        assert (record.state, record.attention) == (State.FAILED, "failed")
        assert (record.error_type, record.error_message) == (DECLINED.error_type, DECLINED.error_message)

    def test_a_failure_keeps_its_encoded_error(self, use: StoreInUse) -> None:
        """A failed record may carry bytes as well, from which the error is rebuilt."""
        failure = EncodedOutcome(State.FAILED, b'{"code":5}', "json", None, "shop.Declined", "declined")
        use.finish(use.granted(), failure)
        answer = use.claim()
        assert isinstance(answer, Finished)
        assert answer.outcome == failure

    def test_a_success_forgets_the_error_before_it(self, use: StoreInUse) -> None:
        """A run that succeeds after a failed attempt leaves no error in its record."""
        use.release(use.granted(), failed=True, error_type="ValueError", error_message="first try")
        use.finish(use.granted())
        record = use.record()
        assert (record.error_type, record.error_message) == (None, None)

    @pytest.mark.parametrize("letter", ["x", "\u00e9", "\U0001f600", "\x00"], ids=["1", "2", "4 bytes", "NUL"])
    def test_a_long_error_is_cut_and_never_fails(self, use: StoreInUse, letter: str) -> None:
        """A type or message longer than its column, or with a NUL, is shortened: nothing fails after an effect."""
        failure = EncodedOutcome(
            State.FAILED, error_type="module." + letter * 100_000, error_message="why: " + letter * 100_000
        )
        assert use.finish(use.granted(), failure) == Recorded()
        answer = use.claim()
        assert isinstance(answer, Finished)
        assert (answer.outcome.error_message or "").startswith("why: ")
        assert use.release(
            use.granted("two"), error_type=failure.error_type, error_message=failure.error_message
        ) == Released(State.RELEASED)
        assert (use.record("two").error_message or "").startswith("why: ")

    def test_a_holder_may_be_long(self, use: StoreInUse) -> None:
        """A holder's name longer than its column does not stop a claim."""
        use.granted(holder="h" * 2000)
        assert use.record().holder.startswith("h")

    # The fence.

    def test_a_superseded_finish_is_lost_then_finished(self, use: StoreInUse) -> None:
        """A holder that was taken over records nothing; once the other has finished, it is told that outcome."""
        first = use.granted(lease=SHORT)
        second = use.taken_over()
        assert use.finish(first) == Lost()
        assert use.record().state is State.RUNNING
        assert use.finish(second, OTHER) == Recorded()
        answer = use.finish(first)
        assert isinstance(answer, Finished)
        assert answer.outcome == OTHER
        assert use.record().outcome == OTHER.body

    def test_a_finish_after_its_lease_is_recorded_if_nobody_took_over(self, use: StoreInUse) -> None:
        """The fence decides, never the time: a late finish that nobody overtook is recorded."""
        lease = use.granted(lease=SHORT)
        use.let_expire(lease)
        assert use.finish(lease) == Recorded()
        assert isinstance(use.claim(), Finished)

    def test_the_fence_is_both_token_and_owner(self, use: StoreInUse) -> None:
        """A lease with another owner or another token finishes, releases and renews nothing."""
        lease = use.granted()
        for stranger in (
            Lease(use.request(), lease.fencing_token),
            Lease(lease.request, lease.fencing_token - 1),
            Lease(lease.request, lease.fencing_token + 1),
        ):
            assert use.finish(stranger, OTHER) == Lost()
            assert use.release(stranger) == Lost()
            assert use.renew(stranger) == frozenset()
        assert use.finish(lease) == Recorded()

    def test_finishing_a_record_that_is_gone_is_lost(self, use: StoreInUse) -> None:
        """Where there is no record, nothing is recorded unless the caller knows that its lease still lives."""
        lease = use.granted(lease=SHORT)
        use.let_expire(lease)
        assert use.forget()
        assert use.finish(lease) == Lost()
        assert use.release(lease) == Lost()
        assert use.get() is None

    def test_finishing_a_vanished_record_under_a_live_lease_brings_it_back(self, use: StoreInUse) -> None:
        """A claim that was lost with a server's last moments is still recorded when its handler returns."""
        lease = use.granted(lease=SHORT, fingerprint="a" * 64)
        use.let_expire(lease)
        use.forget()
        assert use.finish(lease, may_insert=True) == Recorded()
        answer = use.claim()
        assert isinstance(answer, Finished)
        assert (answer.outcome, answer.fingerprint) == (DONE, "a" * 64)
        assert 0 < answer.expires_in <= 7200
        assert use.finish(lease, may_insert=True) == Recorded()

    def test_a_vanished_record_is_never_brought_back_over_another(self, use: StoreInUse) -> None:
        """Whoever claimed the key meanwhile keeps it."""
        lease = use.granted(lease=SHORT)
        use.let_expire(lease)
        use.forget()
        other = use.granted()
        assert use.finish(lease, may_insert=True) == Lost()
        assert use.finish(other, OTHER) == Recorded()
        answer = use.finish(lease, may_insert=True)
        assert isinstance(answer, Finished)
        assert answer.outcome == OTHER

    # Releasing.

    def test_a_released_key_is_granted_again_at_once(self, use: StoreInUse) -> None:
        """After a release the next claim is a further attempt, with a higher fencing token."""
        first = use.granted()
        assert use.release(first, error_type="OSError", error_message="refused") == Released(State.RELEASED)
        record = use.record()
        assert (record.state, record.attempts, record.failures) == (State.RELEASED, 1, 0)
        assert (record.error_type, record.error_message) == ("OSError", "refused")
        second = use.granted(fingerprint="b" * 64)
        assert second.fencing_token > first.fencing_token
        assert (second.attempts, second.failures, second.crashes) == (2, 0, 0)
        assert not second.taken_over
        assert use.record().fingerprint == "b" * 64

    def test_the_same_owner_may_claim_again_what_it_released(self, use: StoreInUse) -> None:
        """A release ends a claim: the same request afterwards is a new one, with a higher token."""
        request = use.request()
        first = use.granted(request)
        use.release(first)
        second = use.granted(request)
        assert second.fencing_token > first.fencing_token
        assert use.finish(first) == Lost()
        assert use.finish(second) == Recorded()

    def test_only_failures_count_as_failures(self, use: StoreInUse) -> None:
        """A shutdown or a retry that the handler asked for leaves `failures` alone."""
        use.release(use.granted(), failed=True)
        use.release(use.granted(), failed=False)
        use.release(use.granted(), failed=True)
        lease = use.granted()
        assert (lease.attempts, lease.failures) == (4, 2)

    def test_max_attempts_parks(self, use: StoreInUse) -> None:
        """The last failure allowed parks the record, and every later claim is told so."""
        use.release(use.granted(max_attempts=2), failed=True)
        use.release(use.granted(max_attempts=2), failed=False)
        answer = use.release(use.granted(max_attempts=2), failed=True, error_type="KeyError", error_message="x")
        assert answer == Released(State.PARKED)
        record = use.record()
        assert (record.state, record.attention, record.error_type) == (State.PARKED, "parked", "KeyError")
        assert use.claim() == Parked(crashes=0, failures=2)

    def test_a_limit_lowered_later_parks_at_the_next_failure(self, use: StoreInUse) -> None:
        """What was allowed when it failed is not parked by a shutdown, only by one more failure."""
        use.release(use.granted(), failed=True)
        use.release(use.granted(), failed=True)
        assert use.release(use.granted(max_attempts=1), failed=False) == Released(State.RELEASED)
        assert use.release(use.granted(max_attempts=1), failed=True) == Released(State.PARKED)

    def test_a_release_sent_twice_counts_once(self, use: StoreInUse) -> None:
        """A release whose reply was lost may be sent again."""
        lease = use.granted(max_attempts=5)
        assert use.release(lease, failed=True) == Released(State.RELEASED)
        assert use.release(lease, failed=True) == Released(State.RELEASED)
        assert use.record().failures == 1

    def test_a_parking_release_sent_twice_stays_parked(self, use: StoreInUse) -> None:
        """The second reply tells the state that the first left the record in."""
        lease = use.granted(max_attempts=1)
        assert use.release(lease, failed=True) == Released(State.PARKED)
        assert use.release(lease, failed=True) == Released(State.PARKED)
        assert use.claim() == Parked(crashes=0, failures=1)

    def test_release_in_doubt_waits_for_a_person(self, use: StoreInUse) -> None:
        """A handler that raised though its effect may have happened leaves its record in doubt (F55)."""
        lease = use.granted(on_crash="hold", max_attempts=1)
        answer = use.release(lease, failed=True, in_doubt=True, error_type="TimeoutError", error_message="30 s")
        assert answer == Released(State.IN_DOUBT)
        record = use.record()
        assert (record.state, record.attention) == (State.IN_DOUBT, "in_doubt")
        assert (record.error_type, record.error_message) == ("TimeoutError", "30 s")
        assert use.claim() == InDoubt()
        assert use.release(lease, failed=True, in_doubt=True) == Released(State.IN_DOUBT)

    def test_a_superseded_release_is_lost_then_finished(self, use: StoreInUse) -> None:
        """A superseded handler that raises is told of the recorded success, and releases nothing (F58)."""
        first = use.granted(lease=SHORT)
        second = use.taken_over()
        assert use.release(first, failed=True) == Lost()
        assert use.record().failures == 0
        use.finish(second, OTHER)
        answer = use.release(first, failed=True)
        assert isinstance(answer, Finished)
        assert answer.outcome == OTHER
        assert use.record().state is State.COMPLETED

    def test_nothing_releases_a_finished_record(self, use: StoreInUse) -> None:
        """A release after one's own finish changes nothing and is told the outcome (F62)."""
        lease = use.granted()
        use.finish(lease)
        answer = use.release(lease, failed=True, in_doubt=True)
        assert isinstance(answer, Finished)
        assert answer.outcome == DONE
        assert use.record().state is State.COMPLETED

    # Taking over from a holder that died.

    def test_takeover_only_after_the_lease(self, use: StoreInUse) -> None:
        """While the lease lives nobody takes over; afterwards the next claim does, counts a crash and says so."""
        first = use.granted(lease=1.0)
        early = use.claim()
        assert isinstance(early, InProgress)
        assert early.retry_after <= 1.0
        second = use.taken_over(fingerprint="b" * 64, holder="host:2")
        assert second.fencing_token > first.fencing_token
        assert second.taken_over
        assert (second.attempts, second.failures, second.crashes, second.generation) == (2, 0, 1, 1)
        record = use.record()
        assert (record.state, record.crashes, record.holder) == (State.RUNNING, 1, "host:2")
        assert (record.owner, record.fingerprint) == (second.owner, "b" * 64)
        assert isinstance(use.claim(), InProgress)

    def test_max_crashes_parks(self, use: StoreInUse) -> None:
        """A message that kills its worker each time is parked after `max_crashes` takeovers (F42)."""
        use.granted(lease=SHORT)
        assert use.taken_over(lease=SHORT, max_crashes=1).crashes == 1
        assert use.after_the_lease(max_crashes=1) == Parked(crashes=2, failures=0, new=True)
        assert use.claim(max_crashes=1) == Parked(crashes=2, failures=0)
        record = use.record()
        assert (record.state, record.crashes, record.attention) == (State.PARKED, 2, "parked")

    def test_no_crash_allowed_parks_at_the_first(self, use: StoreInUse) -> None:
        """`max_crashes=0` lets nobody take over, also under `hold`."""
        use.granted(lease=SHORT)
        answer = use.after_the_lease(max_crashes=0, on_crash="hold")
        assert answer == Parked(crashes=1, failures=0, new=True)

    def test_max_crashes_none_never_parks(self, use: StoreInUse) -> None:
        """Without a limit every dead holder is taken over."""
        use.granted(lease=SHORT)
        for crashes in (1, 2):
            assert use.taken_over(lease=SHORT, max_crashes=None).crashes == crashes

    def test_a_late_holder_does_not_end_a_parked_record(self, use: StoreInUse) -> None:
        """What is parked stays parked until a person ends it."""
        lease = use.granted(lease=SHORT)
        assert isinstance(use.after_the_lease(max_crashes=0), Parked)
        assert use.finish(lease) == Lost()
        assert use.release(lease) == Released(State.PARKED)
        assert use.release(lease, failed=True, in_doubt=True) == Released(State.PARKED)
        assert use.renew(lease) == frozenset()
        assert use.record().state is State.PARKED

    def test_hold_puts_in_doubt_and_keeps_the_dead_claims_fence(self, use: StoreInUse) -> None:
        """Under `hold` a dead holder's record waits for a person, and nobody runs it."""
        lease = use.granted(lease=SHORT, on_crash="hold")
        assert use.after_the_lease(on_crash="hold") == InDoubt(new=True)
        assert use.claim(on_crash="hold") == InDoubt()
        assert use.claim(on_crash="rerun") == InDoubt()
        record = use.record()
        assert (record.state, record.attention, record.crashes) == (State.IN_DOUBT, "in_doubt", 1)
        assert (record.fencing_token, record.owner) == (lease.fencing_token, lease.owner)

    def test_a_late_finish_ends_the_doubt_about_it(self, use: StoreInUse) -> None:
        """A holder that was only slow still tells the truth about its own record in doubt."""
        lease = use.granted(lease=SHORT, on_crash="hold")
        assert use.after_the_lease(on_crash="hold") == InDoubt(new=True)
        assert use.renew(lease) == frozenset()
        assert use.finish(lease) == Recorded()
        answer = use.claim(on_crash="hold")
        assert isinstance(answer, Finished)
        assert answer.outcome == DONE
        assert use.record().attention is None

    def test_a_late_release_of_a_record_in_doubt_obeys_its_fence(self, use: StoreInUse) -> None:
        """A slow holder that raises leaves the doubt, or ends it where it knows that nothing happened."""
        unsure = use.granted("unsure", lease=SHORT, on_crash="hold")
        sure = use.granted("sure", lease=SHORT, on_crash="hold")
        for key in ("unsure", "sure"):
            assert use.after_the_lease(key, on_crash="hold") == InDoubt(new=True)
        assert use.release(unsure, failed=True, in_doubt=True) == Released(State.IN_DOUBT)
        assert use.release(unsure, failed=True, in_doubt=True) == Released(State.IN_DOUBT)
        record = use.record("unsure")
        assert (record.state, record.failures, record.crashes) == (State.IN_DOUBT, 1, 1)
        assert use.release(sure, failed=True) == Released(State.RELEASED)
        again = use.granted("sure")
        assert (again.attempts, again.failures, again.crashes) == (2, 1, 1)

    # Ending a doubt by what a function found out.

    def doubted(self, use: StoreInUse, key: str = "key", **how: Any) -> tuple[Lease, Lease]:
        """Put a dead holder's record in doubt; return the lease it had, and what the claim that found it was told."""
        if not self.decides:
            pytest.skip("this store decides nothing")
        held = use.granted(key, lease=SHORT, **how)
        answer = use.after_the_lease(key, on_crash=dont_know)
        assert answer == InDoubt(new=True)
        assert isinstance(answer, InDoubt)
        assert answer.dead is not None
        return held, answer.dead

    def test_a_doubt_tells_whose_claim_it_is_about(self, use: StoreInUse) -> None:
        """Who finds a dead holder, and nobody else, learns its fence and counts; the record keeps that fence."""
        held, dead = self.doubted(use)
        assert (dead.scope, dead.key, dead.owner, dead.fencing_token) == (use.scope, "key", *fence_of(held))
        assert (dead.attempts, dead.failures, dead.crashes, dead.generation) == (1, 0, 1, 1)
        record = use.record()
        assert (record.state, record.attention, record.crashes) == (State.IN_DOUBT, "in_doubt", 1)
        assert (record.owner, record.fencing_token) == fence_of(held)
        other = use.claim(on_crash=dont_know)
        assert other == InDoubt()
        assert isinstance(other, InDoubt)
        assert other.dead is None

    @pytest.mark.parametrize("outcome", [OTHER, DECLINED], ids=["completed", "failed"])
    def test_an_outcome_ends_the_doubt(self, use: StoreInUse, outcome: EncodedOutcome) -> None:
        """It is recorded under a new token and owner, answers every claim, and the dead holder's finish misses."""
        held, dead = self.doubted(use, fingerprint="a" * 64)
        asker = use.request()
        answer = use.decide(dead, asker, outcome)
        assert isinstance(answer, Finished)
        assert (answer.outcome, answer.fingerprint) == (outcome, "a" * 64)
        assert 0 < answer.expires_in <= 7200
        record = use.record()
        assert (record.state, record.outcome, record.error_type) == (outcome.state, outcome.body, outcome.error_type)
        assert (record.owner, record.attention) == (asker.owner, "failed" if outcome is DECLINED else None)
        assert record.fencing_token > dead.fencing_token
        assert record.fencing_token == answer.fencing_token
        assert record.completed_at is not None
        assert record.expires_at > record.completed_at
        late = use.finish(held)
        assert isinstance(late, Finished)
        assert late.outcome == outcome
        replayed = use.claim()
        assert isinstance(replayed, Finished)
        assert replayed.outcome == outcome

    def test_a_rerun_ends_the_doubt(self, use: StoreInUse) -> None:
        """It is granted under a higher token, as a takeover; the dead holder's finish, renewal and release miss."""
        held, dead = self.doubted(use)
        asker = use.request(fingerprint="b" * 64, holder="web-2:5")
        answer = use.decide(dead, asker, None)
        assert isinstance(answer, Granted)
        lease = answer.lease
        assert (lease.owner, lease.attempts, lease.crashes, lease.taken_over) == (asker.owner, 2, 1, True)
        assert lease.fencing_token > dead.fencing_token
        record = use.record()
        assert (record.state, record.attention, record.attempts) == (State.RUNNING, None, 2)
        assert (record.owner, record.fencing_token) == fence_of(lease)
        assert (record.fingerprint, record.holder) == ("b" * 64, "web-2:5")
        assert use.finish(held, OTHER) == Lost()
        assert use.release(held) == Lost()
        assert use.renew(held) == frozenset()
        assert isinstance(use.claim(), InProgress)
        assert use.renew(lease) == {lease.owner}
        assert use.finish(lease) == Recorded()

    @pytest.mark.parametrize("outcome", [OTHER, None], ids=["outcome", "rerun"])
    def test_a_decision_whose_answer_was_lost_is_the_same_again(
        self, use: StoreInUse, outcome: EncodedOutcome | None
    ) -> None:
        """The same owner deciding again, or claiming, gets what its first try did, with the same token (F21)."""
        _, dead = self.doubted(use)
        asker = use.request()
        first = use.decide(dead, asker, outcome)
        again = use.decide(dead, asker.again(), outcome)
        claimed = use.claim(asker.again().again())
        assert type(first) is type(again) is type(claimed)
        assert use.record().attempts == (1 if outcome else 2)
        if isinstance(first, Granted):
            assert isinstance(again, Granted)
            assert isinstance(claimed, Granted)
            assert first.lease.fencing_token == again.lease.fencing_token == claimed.lease.fencing_token
            assert again.lease.taken_over
            assert claimed.lease.taken_over

    @pytest.mark.parametrize("outcome", [OTHER, None], ids=["outcome", "rerun"])
    @pytest.mark.parametrize("how", ["finished", "released", "resolved", "rerun", "forgotten", "doubted again"])
    def test_a_decision_about_a_doubt_that_has_ended_is_lost(
        self, use: StoreInUse, outcome: EncodedOutcome | None, how: str
    ) -> None:
        """Whoever ended it first decided: the late holder, a person; a later doubt is about another claim."""
        held, dead = self.doubted(use)
        match how:
            case "finished":
                assert use.finish(held) == Recorded()
            case "released":
                assert use.release(held) == Released(State.RELEASED)
            case "resolved":
                use.resolve(DONE)
            case "rerun":
                use.resolve(None)
            case "forgotten":
                assert use.forget()
            case "doubted again":
                use.resolve(None)
                use.granted(lease=SHORT)
                assert use.after_the_lease(on_crash=dont_know) == InDoubt(new=True)
        before = use.get()
        assert use.decide(dead, use.request(), outcome) == Lost()
        assert use.get() == before

    @pytest.mark.parametrize("outcome", [OTHER, None], ids=["outcome", "rerun"])
    def test_the_fence_of_a_decision_is_both_token_and_owner(
        self, use: StoreInUse, outcome: EncodedOutcome | None
    ) -> None:
        """A claim that was not the last decides nothing."""
        _, dead = self.doubted(use)
        for stranger in (Lease(use.request(), dead.fencing_token), Lease(dead.request, dead.fencing_token - 1)):
            assert use.decide(stranger, use.request(), outcome) == Lost()
        assert use.record().state is State.IN_DOUBT

    def test_too_many_crashes_park_before_anybody_asks(self, use: StoreInUse) -> None:
        """`max_crashes` goes before a function: a message that kills every worker needs a person."""
        use.granted(lease=SHORT)
        assert use.after_the_lease(max_crashes=0, on_crash=dont_know) == Parked(crashes=1, failures=0, new=True)

    # Retention.

    def ended(self, use: StoreInUse, key: str = "key", outcome: EncodedOutcome = DONE) -> Lease:
        """Finish a record whose retention is over after a good half second."""
        lease = use.granted(key, lease=SHORT, max_hold=SHORT, retention=SHORT)
        assert use.finish(lease, outcome) == Recorded()
        return lease

    @pytest.mark.parametrize("outcome", [DONE, DECLINED], ids=["completed", "failed"])
    def test_after_its_retention_a_key_is_granted_afresh(self, use: StoreInUse, outcome: EncodedOutcome) -> None:
        """When an outcome's retention is over, its key begins a new generation and its counts start again."""
        use.release(use.granted(), failed=True)
        first = self.ended(use, outcome=outcome)
        assert (first.attempts, first.failures, first.generation) == (2, 1, 1)
        again = use.request()
        answer = use.driver.poll(partial(use.store.claim, again), lambda seen: not isinstance(seen, Finished))
        assert isinstance(answer, Granted)
        lease = answer.lease
        assert lease.fencing_token > first.fencing_token
        assert (lease.attempts, lease.failures, lease.crashes) == (1, 0, 0)
        assert not lease.taken_over
        assert lease.generation == (2 if self.keeps_generations else 1)
        record = use.record()
        assert (record.state, record.outcome, record.error_type) == (State.RUNNING, None, None)
        assert (record.attention, record.completed_at) == (None, None)
        assert (record.attempts, record.generation) == (1, lease.generation)
        assert use.finish(first, OTHER) == Lost()
        assert use.finish(lease) == Recorded()

    def test_what_is_in_doubt_or_parked_never_expires(self, use: StoreInUse) -> None:
        """Only a person ends what waits for one, however long ago its retention ended."""
        brief: dict[str, Any] = {"lease": SHORT, "max_hold": SHORT, "retention": SHORT}
        use.release(use.granted("in doubt", on_crash="hold", **brief), in_doubt=True)
        use.release(use.granted("parked", max_attempts=1, **brief), failed=True)
        use.driver.pause(3 * SHORT + 0.2)
        assert use.claim("in doubt") == InDoubt()
        assert use.claim("parked") == Parked(crashes=0, failures=1)
        use.purge()
        assert use.record("in doubt").state is State.IN_DOUBT
        assert use.record("parked").state is State.PARKED

    def test_a_run_longer_than_its_retention_is_kept_for_all_of_it(self, use: StoreInUse) -> None:
        """A finish after `expires_at` keeps the outcome for the whole retention from then on (F61)."""
        lease = use.granted(lease=SHORT, max_hold=SHORT, retention=1.0)
        for _ in range(7):
            use.driver.pause(0.2)
            use.renew(lease)
        assert use.finish(lease) == Recorded()
        answer = use.claim()
        assert isinstance(answer, Finished)
        assert 0 < answer.expires_in <= 1.0

    # Renewing.

    def test_renew_extends_exactly_these_leases(self, use: StoreInUse) -> None:
        """A renewal moves the end of the given leases, to their policy's `lease` from now, and of no other."""
        renewed = use.granted("renewed", lease=20.0)
        left = use.granted("left", lease=20.0)
        before = use.record("renewed"), use.record("left")
        use.driver.pause(0.2)
        assert use.renew(renewed) == {renewed.owner}
        after = use.record("renewed"), use.record("left")
        gained = (after[0].lease_expires_at - before[0].lease_expires_at).total_seconds()
        assert 0.1 < gained < 20
        assert after[1].lease_expires_at == before[1].lease_expires_at
        assert after[0].fencing_token == renewed.fencing_token
        assert after[0].attempts == 1
        assert use.finish(left) == Recorded()

    def test_a_renewed_lease_outlives_its_first_end(self, use: StoreInUse) -> None:
        """A holder that renews in time is not taken over."""
        lease = use.granted(lease=1.0)
        for _ in range(3):
            use.driver.pause(0.4)
            assert use.renew(lease) == {lease.owner}
        assert isinstance(use.claim(), InProgress)
        assert use.finish(lease) == Recorded()

    def test_leases_of_different_lengths_are_renewed_together(self, use: StoreInUse) -> None:
        """Each lease is extended by its own policy's length, in one call."""
        long = use.granted("long", lease=50.0)
        short = use.granted("short", lease=5.0)
        assert use.renew(long, short) == {long.owner, short.owner}
        left = {
            key: (record.lease_expires_at - record.updated_at).total_seconds()
            for key in ("long", "short")
            for record in [use.record(key)]
        }
        assert left["long"] == pytest.approx(50, abs=2)
        assert left["short"] == pytest.approx(5, abs=2)

    def test_a_thousand_leases_are_renewed_in_one_call(self, use: StoreInUse) -> None:
        """One beat renews all claims of a process, however many there are."""
        held = [use.granted(f"key {number}") for number in range(1000)]
        lost = Lease(use.request("key 1000"), 1)
        assert use.renew(*held, lost) == {lease.owner for lease in held}

    @pytest.mark.parametrize("order", [1, -1], ids=["old first", "new first"])
    def test_a_claim_taken_over_within_its_process_stops_no_renewal(self, use: StoreInUse, order: int) -> None:
        """A process that holds a dead claim and the one that took it over renews the living one."""
        dead = use.granted(lease=SHORT)
        living = use.taken_over(lease=SHORT)
        assert use.renew(*[dead, living][::order]) == {living.owner}

    def test_renewing_nothing_is_nothing(self, use: StoreInUse) -> None:
        """A beat without claims does no harm."""
        assert use.renew() == frozenset()

    def test_renew_never_revives_what_is_not_ours_any_more(self, use: StoreInUse) -> None:
        """A claim that was taken over, finished, released or forgotten is not renewed (F3)."""
        taken = use.granted("taken", lease=SHORT)
        gone = use.granted("gone", lease=SHORT)
        finished = use.granted("finished")
        released = use.granted("released")
        taker = use.taken_over("taken")
        use.let_expire(gone)
        use.forget("gone")
        use.finish(finished)
        use.release(released)
        before = use.record("taken")
        assert use.renew(taken, gone, finished, released) == frozenset()
        after = use.record("taken")
        assert (after.owner, after.lease_expires_at) == (taker.owner, before.lease_expires_at)
        assert use.get("gone") is None
        assert use.record("finished").state is State.COMPLETED
        assert use.record("released").state is State.RELEASED

    # The fencing token.

    def test_the_token_rises_over_all_that_happens(self, use: StoreInUse) -> None:
        """A key's fencing token rises over release, takeover, resolve and forget: it never starts again (F5, F10)."""
        tokens = []
        lease = use.granted(lease=SHORT)
        tokens.append(lease.fencing_token)
        use.release(lease)
        tokens.append(use.granted(lease=SHORT).fencing_token)
        lease = use.taken_over()
        tokens.append(lease.fencing_token)
        use.release(lease, in_doubt=True)
        resolved = use.resolve(None)
        assert resolved is not None
        tokens.append(resolved.fencing_token)
        lease = use.granted()
        tokens.append(lease.fencing_token)
        use.finish(lease)
        use.forget()
        tokens.append(use.granted().fencing_token)
        assert tokens == sorted(set(tokens))

    def test_one_claim_records_one_outcome(self, use: StoreInUse) -> None:
        """A claim that has recorded a value is told so when it brings a failure, and the value stays (F58)."""
        lease = use.granted()
        assert use.finish(lease) == Recorded()
        answer = use.finish(lease, DECLINED)
        assert isinstance(answer, Finished)
        assert answer.outcome.body == DONE.body
        assert use.record().state is State.COMPLETED

    def test_the_token_rises_over_forgets_in_quick_succession(self, use: StoreInUse) -> None:
        """A key that is forgotten and claimed again within a millisecond has a higher fencing token (F10)."""
        tokens = []
        for _ in range(20):
            lease = use.granted()
            tokens.append(lease.fencing_token)
            use.release(lease)
            use.forget()
        assert tokens == sorted(set(tokens))

    def test_the_token_rises_over_purge(self, use: StoreInUse) -> None:
        """A row that was purged does not take its fencing token with it (F10)."""
        first = self.ended(use)
        use.driver.poll(partial(self.purged, use), lambda gone: gone)
        assert use.granted().fencing_token > first.fencing_token

    # Different keys and scopes.

    @pytest.mark.parametrize("keys", MEETING_KEYS, ids=range(len(MEETING_KEYS)))
    def test_keys_are_compared_byte_by_byte(self, use: StoreInUse, keys: tuple[str, ...]) -> None:
        """Keys that differ by case, accents, spaces, width or their last byte are different records (F51)."""
        leases = {key: use.granted(key) for key in keys}
        for key, lease in leases.items():
            assert use.finish(lease, EncodedOutcome(body=key.encode(), codec="json")) == Recorded()
        for key in keys:
            answer = use.claim(key)
            assert isinstance(answer, Finished)
            assert answer.outcome.body == key.encode()
            assert use.record(key).key == key

    @pytest.mark.parametrize("endings", MEETING_KEYS, ids=range(len(MEETING_KEYS)))
    def test_scopes_are_compared_byte_by_byte(self, use: StoreInUse, endings: tuple[str, ...]) -> None:
        """Two scopes never share a key, however alike they look (F36, F51)."""
        for ending in endings:
            if len(ending.encode()) < 100:
                use.granted(scope=use.scope + ending)

    def test_scope_and_key_are_not_run_together(self, use: StoreInUse) -> None:
        """The border between scope and key counts: `a:b` with `c` is not `a` with `b:c` (F36)."""
        pairs = [
            (f"{use.scope}{border}a", f"b{border}c") for border in (":", "/", " ", "|", ".", "}", "{", "\t", "")
        ] + [(f"{use.scope}{border}a{border}b", "c") for border in (":", "/", " ", "|", ".", "}", "{", "\t", "")]
        for scope, key in pairs:
            use.granted(key, scope=scope)

    def test_scopes_isolate(self, use: StoreInUse) -> None:
        """What happens to a key in one scope leaves the same key in another alone (F36)."""
        elsewhere = use.scope + ".other"
        ours = use.granted("key")
        theirs = use.granted("key", scope=elsewhere)
        assert use.finish(ours) == Recorded()
        assert isinstance(use.claim("key", scope=elsewhere), InProgress)
        assert use.forget("key")
        assert use.finish(theirs, OTHER) == Recorded()
        answer = use.claim("key", scope=elsewhere)
        assert isinstance(answer, Finished)
        assert answer.outcome == OTHER

    # What people do.

    def test_get_returns_none_where_nothing_is(self, use: StoreInUse) -> None:
        """A key that nobody used has no record."""
        assert use.get() is None

    def test_forget_deletes_and_says_so(self, use: StoreInUse) -> None:
        """A forgotten key is granted as if it had never been used."""
        assert not use.forget()
        first = use.granted()
        use.finish(first)
        assert use.forget()
        assert use.get() is None
        assert not use.forget()
        second = use.granted()
        assert (second.attempts, second.generation) == (1, 1)
        assert second.fencing_token > first.fencing_token

    def test_forget_is_refused_while_it_runs(self, use: StoreInUse) -> None:
        """A running record is not forgotten: its finish would bring it back (F53)."""
        lease = use.granted()
        with pytest.raises(InProgressError) as refused:
            use.forget()
        assert (refused.value.scope, refused.value.key) == (use.scope, "key")
        assert 0 < refused.value.retry_after <= LONG
        assert use.finish(lease) == Recorded()

    def test_forget_ends_what_waits_or_is_overdue(self, use: StoreInUse) -> None:
        """Records that are in doubt, parked, released or overdue can be forgotten; a late finish then misses."""
        use.release(use.granted("in doubt"), in_doubt=True)
        use.release(use.granted("parked", max_attempts=1), failed=True)
        use.release(use.granted("released"))
        overdue = use.granted("overdue", lease=SHORT)
        use.let_expire(overdue)
        for key in ("in doubt", "parked", "released", "overdue"):
            assert use.forget(key)
            assert use.get(key) is None
        assert use.finish(overdue) == Lost()

    def test_resolve_without_a_record_is_none(self, use: StoreInUse) -> None:
        """There is nothing to end where nothing is."""
        assert use.resolve(DONE) is None
        assert use.resolve(None) is None
        assert use.get() is None

    @pytest.mark.parametrize("waiting", ["in doubt", "parked", "overdue"])
    def test_resolve_with_an_outcome_ends_it(self, use: StoreInUse, waiting: str) -> None:
        """A person's outcome answers every later claim, and the late holder is told of it."""
        lease = self.waiting(use, waiting)
        record = use.resolve(OTHER)
        assert record is not None
        assert (record.state, record.outcome, record.attention) == (State.COMPLETED, OTHER.body, None)
        assert record.fencing_token > lease.fencing_token
        answer = use.claim()
        assert isinstance(answer, Finished)
        assert answer.outcome == OTHER
        late = use.finish(lease)
        assert isinstance(late, Finished)
        assert late.outcome == OTHER
        assert use.record().outcome == OTHER.body

    @pytest.mark.parametrize("waiting", ["in doubt", "parked", "overdue"])
    def test_resolve_for_a_rerun_releases_it(self, use: StoreInUse, waiting: str) -> None:
        """A person who says `rerun` lets the next claim run it, and the late holder's finish misses."""
        lease = self.waiting(use, waiting)
        record = use.resolve(None)
        assert record is not None
        assert (record.state, record.attention) == (State.RELEASED, None)
        assert (record.failures, record.crashes) == (0, 0)  # or it would be parked again at once
        assert record.fencing_token > lease.fencing_token
        assert use.finish(lease) == Lost()
        assert use.release(lease) == Lost()
        again = use.granted()
        assert again.fencing_token > record.fencing_token
        assert not again.taken_over
        assert use.finish(again) == Recorded()

    def test_resolve_as_failed(self, use: StoreInUse) -> None:
        """A person may also say that it failed for good."""
        self.waiting(use, "in doubt")
        record = use.resolve(DECLINED)
        assert record is not None
        assert (record.state, record.error_type) == (State.FAILED, DECLINED.error_type)
        answer = use.claim()
        assert isinstance(answer, Finished)
        assert answer.outcome == DECLINED

    def test_a_resolved_outcome_is_kept_although_it_waited_long(self, use: StoreInUse) -> None:
        """A person may take longer than the retention: the outcome still answers afterwards (F61)."""
        lease = use.granted(lease=SHORT, max_hold=SHORT, retention=1.0, on_crash="hold")
        use.release(lease, in_doubt=True)
        use.driver.pause(1.5)
        use.resolve(OTHER)
        answer = use.claim()
        assert isinstance(answer, Finished)
        assert answer.outcome == OTHER
        assert answer.expires_in > 0

    def test_resolve_is_refused_while_it_runs(self, use: StoreInUse) -> None:
        """A holder whose lease lives is not overruled."""
        lease = use.granted()
        for outcome in (DONE, None):
            with pytest.raises(InProgressError) as refused:
                use.resolve(outcome)
            assert 0 < refused.value.retry_after <= LONG
        assert use.finish(lease) == Recorded()

    @pytest.mark.parametrize("outcome", [DONE, DECLINED], ids=["completed", "failed"])
    def test_resolve_is_refused_when_it_has_ended(self, use: StoreInUse, outcome: EncodedOutcome) -> None:
        """The first outcome stays: a person does not overrule a recorded one."""
        use.finish(use.granted(), outcome)
        for answer in (OTHER, None):
            with pytest.raises(ConflictError):
                use.resolve(answer)
        replay = use.claim()
        assert isinstance(replay, Finished)
        assert replay.outcome == outcome

    # Who did it, and on what they saw.

    @pytest.mark.parametrize("outcome", [DONE, DECLINED, None], ids=["resolve", "fail", "rerun"])
    def test_resolve_tells_what_it_did(self, use: StoreInUse, outcome: EncodedOutcome | None) -> None:
        """Its answer, and the audit where there is one, say who did what to which record, when and why."""
        lease = self.waiting(use, "in doubt")
        done = use.driver(use.store.resolve(use.scope, "key", outcome, actor="ann@ops", reason="seen at the bank"))
        record = use.record()
        assert done is not None
        assert (done.action, done.scope, done.key) == (action_of(outcome), use.scope, "key")
        assert (done.actor, done.reason) == ("ann@ops", "seen at the bank")
        assert (done.state_before, done.token_before) == (State.IN_DOUBT, lease.fencing_token)
        assert (done.state_after, done.token_after) == (record.state, record.fencing_token)
        assert abs((done.at - record.updated_at).total_seconds()) < 5
        self.audited(use, done)

    def test_forget_tells_what_it_did(self, use: StoreInUse) -> None:
        """Of a record that is gone the audit is all that is left."""
        lease = self.waiting(use, "parked")
        done = use.forget(actor="ann@ops")
        assert done is not None
        assert (done.action, done.actor, done.reason) == ("forget", "ann@ops", None)
        assert (done.state_before, done.token_before) == (State.PARKED, lease.fencing_token)
        assert (done.state_after, done.token_after) == (None, None)
        self.audited(use, done)

    @pytest.mark.parametrize("outcome", [DONE, None], ids=["outcome", "rerun"])
    def test_a_functions_answer_is_audited_too(self, use: StoreInUse, outcome: EncodedOutcome | None) -> None:
        """A doubt that no person ended can be told from one that was."""
        _, dead = self.doubted(use)
        use.decide(dead, use.request(holder="web-2:5"), outcome)
        if self.keeps_audit:
            [entry] = self.audit(use)
            record = use.record()
            assert (entry.action, entry.actor, entry.state_before) == ("answer", "web-2:5", State.IN_DOUBT)
            assert (entry.state_after, entry.token_after) == (record.state, record.fencing_token)
            assert entry.token_before == dead.fencing_token

    def test_the_audit_is_listed_from_the_last_one(self, use: StoreInUse) -> None:
        """Of a key, of a scope, or of all; no more than asked for."""
        if not self.keeps_audit:
            with pytest.raises(ConfigurationError):
                self.audit(use)
            return
        for number in range(3):
            use.release(use.granted(str(number)), in_doubt=True)
            use.resolve(DONE, str(number))
        use.forget("1")
        assert [(entry.key, entry.action) for entry in self.audit(use)] == [
            ("1", "forget"),
            ("2", "resolve"),
            ("1", "resolve"),
            ("0", "resolve"),
        ]
        assert [entry.action for entry in self.audit(use, key="1")] == ["forget", "resolve"]
        assert [entry.key for entry in self.audit(use, limit=2)] == ["1", "2"]
        assert self.audit(use, scope="nobody's") == []
        assert self.audit(use, scope=None, limit=1)[0].scope == use.scope

    def test_a_long_reason_is_cut_and_never_fails(self, use: StoreInUse) -> None:
        """Nor does a NUL in it, or a name longer than its column."""
        for letter in ("x", "\U0001f600", "\x00"):
            self.waiting(use, "in doubt")
            assert use.forget(actor=letter * 1000, reason="why: " + letter * 100_000)
        if self.keeps_audit:
            assert all((entry.reason or "").startswith("why: ") for entry in self.audit(use))

    @pytest.mark.parametrize("outcome", [DONE, None], ids=["outcome", "rerun"])
    def test_a_person_changes_what_they_saw(self, use: StoreInUse, outcome: EncodedOutcome | None) -> None:
        """With the token of a record that has moved on nothing is done: a late answer ends no later doubt."""
        seen = self.waiting(use, "in doubt").fencing_token
        use.resolve(None)
        self.waiting(use, "in doubt")
        before = use.record()
        for verb in (partial(use.resolve, outcome), use.forget):
            with pytest.raises(ConflictError) as refused:
                verb(expect_token=seen)
            assert not isinstance(refused.value, InProgressError)
            assert (refused.value.scope, refused.value.key) == (use.scope, "key")
            assert str(before.fencing_token) in str(refused.value)
            assert "in_doubt" in str(refused.value)
        assert use.record() == before
        assert use.resolve(outcome, expect_token=before.fencing_token)
        after = use.record()
        assert after.state is (State.RELEASED if outcome is None else State.COMPLETED)
        assert use.forget(expect_token=after.fencing_token)

    def audit(self, use: StoreInUse, **wanted: Any) -> list[AuditEntry]:
        """Return the audit of this test's scope."""
        how: dict[str, Any] = {"scope": use.scope, "key": None, "limit": 100, **wanted}
        return use.driver(use.store.audit(**how))

    def audited(self, use: StoreInUse, done: AuditEntry) -> None:
        """Expect this to be the last entry of the audit, if there is one."""
        if self.keeps_audit:
            entry = self.audit(use)[0]
            assert abs((entry.at - done.at).total_seconds()) < 5
            assert replace(entry, at=done.at) == done

    def waiting(self, use: StoreInUse, what: str) -> Lease:
        """Bring the record into a state that waits for a person, and return its last lease."""
        lease = use.granted(lease=SHORT, max_attempts=1, on_crash="hold")
        if what == "overdue":
            use.let_expire(lease)
        else:
            use.release(lease, in_doubt=what == "in doubt", failed=True)
        return lease

    # Listing, counting, purging.

    def test_records_come_in_pages_in_the_order_of_their_bytes(self, use: StoreInUse) -> None:
        """Paging visits every record of a scope once, in the byte order of its keys."""
        keys = ["a", "B", "b", "10", "9", "\u00e9", "Z z", "\U0001f600", "\uffee", "z"]
        for key in keys:
            use.granted(key)
            use.granted(key, scope=use.scope + ".other")
        seen: list[str] = []
        after: tuple[str, str] | None = None
        for _ in keys:
            page = self.page(use, after=after, limit=3)
            if not page:
                break
            assert len(page) <= 3
            seen += [record.key for record in page]
            after = (page[-1].scope, page[-1].key)
        assert seen == sorted(keys, key=str.encode)
        assert self.page(use, limit=1)[0].scope == use.scope

    def test_records_are_filtered_by_state(self, use: StoreInUse) -> None:
        """A listing by state holds exactly the records in it."""
        use.granted("running")
        use.finish(use.granted("completed"))
        use.finish(use.granted("failed"), DECLINED)
        use.release(use.granted("released"))
        use.release(use.granted("in_doubt"), in_doubt=True)
        use.release(use.granted("parked", max_attempts=1), failed=True)
        for state in State:
            assert [record.key for record in self.page(use, state=state)] == [state.value]
        assert len(self.page(use)) == len(State)
        waiting = [State.FAILED.value, State.IN_DOUBT.value, State.PARKED.value]
        assert [record.key for record in self.page(use, attention=True)] == waiting
        assert [record.key for record in self.page(use, attention=True, state=State.PARKED)] == ["parked"]
        assert [record.key for record in self.page(use, attention=True, state=State.RUNNING)] == []
        assert [record.key for record in self.page(use, attention=True, after=(use.scope, "failed"), limit=1)] == [
            "in_doubt"
        ]

    def test_overdue_records_want_attention(self, use: StoreInUse) -> None:
        """Whoever looks after records is shown those that run past their lease, until somebody has seen to them."""
        use.granted("held")
        overdue = {key: use.granted(key, lease=SHORT) for key in ("finished", "overdue", "taken over")}
        use.release(use.granted("parked", max_attempts=1), failed=True)
        use.let_expire(overdue["taken over"])
        found = [(record.key, record.attention) for record in self.page(use, attention=True)]
        assert found == [
            ("finished", "overdue"),
            ("overdue", "overdue"),
            ("parked", "parked"),
            ("taken over", "overdue"),
        ]
        assert [record.key for record in self.page(use, attention=True, limit=1)] == ["finished"]
        assert [record.key for record in self.page(use, attention=True, after=(use.scope, "overdue"))] == [
            "parked",
            "taken over",
        ]
        use.finish(overdue["finished"])
        use.granted("taken over")
        assert [record.key for record in self.page(use, attention=True, state=State.RUNNING)] == ["overdue"]
        assert [record.key for record in self.page(use, attention=True)] == ["overdue", "parked"]
        assert [record.key for record in self.page(use, state=State.RUNNING)] == ["held", "overdue", "taken over"]

    def test_records_without_a_scope_are_those_of_all(self, use: StoreInUse) -> None:
        """Paging goes on from one scope to the next."""
        other = use.scope + ".b"
        use.granted("2")
        use.granted("1", scope=other)
        page = use.driver(use.store.records(state=None, scope=None, after=(use.scope, "1"), limit=2))
        assert [(record.scope, record.key) for record in page] == [(use.scope, "2"), (other, "1")]

    def page(self, use: StoreInUse, **wanted: Any) -> list[Record]:
        """List records of this test's scope."""
        how: dict[str, Any] = {"state": None, "scope": use.scope, "after": None, "limit": 100, **wanted}
        return use.driver(use.store.records(**how))

    def test_stats_count_every_state(self, use: StoreInUse) -> None:
        """The number of records in each state rises with the records made."""
        before = use.driver(use.store.stats())
        use.granted("1")
        use.granted("2")
        use.finish(use.granted("3"))
        use.release(use.granted("4"), in_doubt=True)
        after = use.driver(use.store.stats())
        risen = {state: after.get(state, 0) - before.get(state, 0) for state in State}
        assert risen[State.RUNNING] == 2
        assert risen[State.COMPLETED] == 1
        assert risen[State.IN_DOUBT] == 1
        assert risen[State.PARKED] == 0

    async def purged(self, use: StoreInUse, key: str = "key", grace: float = 0.0) -> bool:
        """Purge once, and tell whether this record is gone."""
        await use.store.purge(limit=1000, grace=grace)
        return await use.store.get(use.scope, key) is None

    def test_purge_deletes_what_is_over_and_nothing_else(self, use: StoreInUse) -> None:
        """Completed, failed and released records go after their retention; all others stay."""
        self.ended(use, "completed")
        self.ended(use, "failed", DECLINED)
        brief: dict[str, Any] = {"lease": SHORT, "max_hold": SHORT, "retention": SHORT}
        use.release(use.granted("released", **brief))
        use.granted("running", **brief)
        use.release(use.granted("in doubt", **brief), in_doubt=True)
        use.release(use.granted("parked", max_attempts=1, **brief), failed=True)
        use.finish(use.granted("kept"))
        for key in ("completed", "failed", "released"):
            use.driver.poll(partial(self.purged, use, key), lambda gone: gone)
        for key in ("running", "in doubt", "parked", "kept"):
            assert use.record(key).key == key

    def test_purge_tells_what_it_deleted_and_obeys_its_limit(self, use: StoreInUse) -> None:
        """Each call deletes at most `limit` records and names them; a call that finds no more returns none."""
        for number in range(5):
            self.ended(use, f"key {number}")
        use.driver.pause(2 * SHORT + 0.1)
        if not self.keeps_ended:
            assert self.page(use) == []
            assert use.purge(limit=2) == []
            return
        gone: list[tuple[str, str]] = []
        for _ in range(1000):
            batch = use.purge(limit=2)
            if not batch:
                break
            assert len(batch) <= 2
            gone += batch
        assert sorted(key for scope, key in gone if scope == use.scope) == [f"key {number}" for number in range(5)]
        assert use.purge(limit=2) == []

    def test_purge_spares_what_ended_within_the_grace(self, use: StoreInUse) -> None:
        """Right after downtime, an outcome whose redelivery is still to come survives (F17)."""
        self.ended(use)
        use.driver.pause(2 * SHORT + 0.1)
        if not self.keeps_ended:
            assert use.get() is None
            return
        assert (use.scope, "key") not in use.purge(grace=3600)
        assert use.record().state is State.COMPLETED
        assert (use.scope, "key") in use.purge(grace=0)

    # Many at once.

    def test_one_of_a_hundred_workers_is_granted(self, use: StoreInUse) -> None:
        """Of 100 simultaneous claims on one key exactly one runs; all others are in progress, then replay (F6)."""
        answers = use.claim_together([use.request() for _ in range(WORKERS)])
        leases = [answer.lease for answer in answers if isinstance(answer, Granted)]
        assert len(leases) == 1
        assert sum(isinstance(answer, InProgress) for answer in answers) == WORKERS - 1
        assert use.record().attempts == 1
        assert use.finish(leases[0]) == Recorded()
        answers = use.claim_together([use.request() for _ in range(TAKERS)])
        assert [answer.outcome for answer in answers if isinstance(answer, Finished)] == [DONE] * TAKERS

    def test_a_hundred_keys_at_once_are_all_granted(self, use: StoreInUse) -> None:
        """Claims on different keys do not stand in each other's way for good."""
        requests = [use.request(f"key {number}") for number in range(WORKERS)]
        for request, answer in zip(requests, use.claim_together(requests), strict=True):
            if isinstance(answer, InProgress):
                # Only a store that could not wait for its own lock says so; it has to grant it next.
                use.granted(request)
        assert len(self.page(use, state=State.RUNNING, limit=200)) == WORKERS

    def test_one_of_many_takers_takes_over(self, use: StoreInUse) -> None:
        """Of 20 simultaneous takeovers of a dead holder one succeeds, and one crash is counted (F6)."""
        dead = use.granted(lease=SHORT)
        use.let_expire(dead)
        answers = use.claim_together([use.request() for _ in range(TAKERS)])
        leases = [answer.lease for answer in answers if isinstance(answer, Granted)]
        assert [lease.crashes for lease in leases] == [1]
        assert sum(isinstance(answer, InProgress) for answer in answers) == TAKERS - 1
        record = use.record()
        assert (record.owner, record.attempts, record.crashes) == (leases[0].owner, 2, 1)

    def test_many_takers_put_in_doubt_once(self, use: StoreInUse) -> None:
        """Of 20 simultaneous claims under `hold` one finds the dead holder, and one crash is counted."""
        dead = use.granted(lease=SHORT, on_crash="hold")
        use.let_expire(dead)
        answers = use.claim_together([use.request(on_crash="hold") for _ in range(TAKERS)])
        assert answers.count(InDoubt(new=True)) == 1
        assert all(isinstance(answer, InDoubt | InProgress) for answer in answers)
        assert use.record().crashes == 1

    def test_one_of_many_finders_is_to_ask(self, use: StoreInUse) -> None:
        """Of 20 simultaneous claims under a function one is told whose claim it is, and so may ask."""
        dead = use.granted(lease=SHORT)
        use.let_expire(dead)
        answers = use.claim_together([use.request(on_crash=dont_know) for _ in range(TAKERS)])
        told = [answer for answer in answers if isinstance(answer, InDoubt) and (answer.new or answer.dead)]
        assert len(told) == 1
        assert (told[0].dead is not None) == self.decides
        assert all(isinstance(answer, InDoubt | InProgress) for answer in answers)
        assert use.record().crashes == 1

    def test_one_of_many_decisions_counts(self, use: StoreInUse) -> None:
        """Nobody decides beside another; could they, one compare-and-set of them would find the doubt."""
        _, dead = self.doubted(use)
        deciders = [
            partial(use.store.decide, dead, use.request(), OTHER if number % 2 else None) for number in range(TAKERS)
        ]
        answers = use.driver.together(deciders)
        assert len([answer for answer in answers if not isinstance(answer, Lost)]) == 1

    def test_a_late_finish_and_a_decision_do_not_both_win(self, use: StoreInUse) -> None:
        """However they meet, one outcome is recorded, and everybody is told that one."""
        doubts = [self.doubted(use, f"key {number}") for number in range(5)]
        verbs: list[Callable[[], Any]] = []
        for held, dead in doubts:
            verbs.append(partial(use.store.finish, held, DONE, may_insert=False))
            verbs.append(partial(use.store.decide, dead, use.request(held.key), OTHER))
        answers = use.driver.together(verbs)
        for (held, _), finished, decided in zip(doubts, answers[::2], answers[1::2], strict=True):
            assert (finished == Recorded()) == (decided == Lost())
            assert use.record(held.key).outcome == (DONE if finished == Recorded() else OTHER).body

    def test_many_takers_park_once(self, use: StoreInUse) -> None:
        """Of 20 simultaneous claims over the limit of crashes one parks the record."""
        dead = use.granted(lease=SHORT)
        use.let_expire(dead)
        answers = use.claim_together([use.request(max_crashes=0) for _ in range(TAKERS)])
        assert answers.count(Parked(crashes=1, failures=0, new=True)) == 1
        assert all(isinstance(answer, Parked | InProgress) for answer in answers)

    def test_one_of_many_claims_a_released_key(self, use: StoreInUse) -> None:
        """Of 20 simultaneous claims on a released key one is granted."""
        use.release(use.granted())
        answers = use.claim_together([use.request() for _ in range(TAKERS)])
        assert sum(isinstance(answer, Granted) for answer in answers) == 1
        assert sum(isinstance(answer, InProgress) for answer in answers) == TAKERS - 1

    def test_a_late_finish_and_a_takeover_do_not_both_win(self, use: StoreInUse) -> None:
        """However they meet, either the outcome is recorded and replayed, or the taker runs and the finish is lost."""
        keys = [f"key {number}" for number in range(TAKERS)]
        leases = [use.granted(key, lease=SHORT) for key in keys]
        use.let_expire(leases[0])
        verbs: list[Callable[[], Any]] = []
        for key, lease in zip(keys, leases, strict=True):
            verbs.append(partial(use.store.finish, lease, DONE, may_insert=False))
            verbs.append(partial(use.store.claim, use.request(key)))
        answers = use.driver.together(verbs)
        for finished, claimed in zip(answers[::2], answers[1::2], strict=True):
            if finished == Recorded():
                assert isinstance(claimed, Finished | InProgress)
            else:
                assert finished == Lost()
                assert isinstance(claimed, Granted)

    def test_a_late_renewal_and_a_takeover_do_not_both_win(self, use: StoreInUse) -> None:
        """However they meet, a lease is renewed or taken over, never both."""
        keys = [f"key {number}" for number in range(TAKERS)]
        leases = [use.granted(key, lease=SHORT) for key in keys]
        use.let_expire(leases[0])
        longer = [Lease(use.request(lease.key, owner=lease.owner), lease.fencing_token) for lease in leases]
        verbs: list[Callable[[], Any]] = [partial(use.store.renew, longer, lambda _owner: True)]
        verbs += [partial(use.store.claim, use.request(key)) for key in keys]
        renewed, *claimed = use.driver.together(verbs)
        for lease, answer in zip(leases, claimed, strict=True):
            assert isinstance(answer, InProgress if lease.owner in renewed else Granted | InProgress)
            assert use.record(lease.key).attempts == 1 + isinstance(answer, Granted)

    # Life of the store.

    def test_the_same_runtime_gets_the_same_store(self, use: StoreInUse, store: Store) -> None:
        """Connections are shared: `on` returns one store for one runtime."""
        assert store.on(use.driver.runtime, Announcer(())) is use.store
        assert use.driver.runtime in store.runtimes

    def test_prepare_may_be_called_again(self, use: StoreInUse) -> None:
        """What is there is left as it is."""
        use.finish(use.granted())
        use.driver(use.store.prepare())
        assert isinstance(use.claim(), Finished)

    def test_a_closed_store_opens_again(self, use: StoreInUse) -> None:
        """After `close` the store may be used again, and still has its records."""
        lease = use.granted()
        use.driver(use.store.close())
        assert use.finish(lease) == Recorded()
        use.driver(use.store.close())
        use.driver(use.store.close())
        assert isinstance(use.claim(), Finished)

    def test_a_second_event_loop_may_use_it(self, use: StoreInUse, store: Store) -> None:
        """A store outlives an event loop that was not closed properly: the next one starts clean (F54)."""
        lease = use.granted()
        with Driver("asyncio") as second:
            if "asyncio" not in self.runtimes:
                pytest.skip("this store does not serve asyncio")
            asyncio_store = store.on("asyncio", Announcer(()))
            assert second(asyncio_store.finish(lease, DONE, may_insert=False)) == Recorded()
            second(asyncio_store.close())
        assert isinstance(use.claim(), Finished)

    def test_both_runtimes_see_the_same_records(self, use: StoreInUse, store: Store) -> None:
        """What a blocking worker recorded, an asyncio service replays, and the reverse."""
        other: RuntimeName = "asyncio" if use.driver.runtime == "blocking" else "blocking"
        if other not in self.runtimes:
            pytest.skip(f"this store does not serve {other}")
        lease = use.granted()
        with Driver(other) as driver:
            sibling = store.on(other, Announcer(()))
            assert isinstance(driver(sibling.claim(use.request())), InProgress)
            assert driver(sibling.finish(lease, DONE, may_insert=False)) == Recorded()
            driver(sibling.close())
        assert isinstance(use.claim(), Finished)


class RecordTierContract(StoreContract):
    """What a store promises in addition, to stand behind a marker in a `TieredStore`."""

    @pytest.fixture
    def store(self) -> RecordTier:
        """Return the store to test; the subclass overrides this."""
        raise NotImplementedError("give a fixture `store`")

    def write_through(self, use: StoreInUse, lease: Lease, outcome: EncodedOutcome = DONE) -> bool:
        """Bring a pending outcome of this lease to its record."""
        tier: Any = use.store
        pending = MarkerPending(lease.owner, lease.fencing_token, lease.request.fingerprint, outcome, raw=None)
        recorded: bool = use.driver(tier.write_through(lease.scope, lease.key, pending, 3600.0))
        return recorded

    def test_a_pending_outcome_is_written_through_once(self, use: StoreInUse) -> None:
        """An outcome kept in a marker reaches its record, also if it is written twice (F45, F57)."""
        lease = use.granted()
        assert self.write_through(use, lease)
        assert self.write_through(use, lease)
        answer = use.claim()
        assert isinstance(answer, Finished)
        assert answer.outcome == DONE
        assert 0 < answer.expires_in <= 7200
        assert use.finish(lease) == Recorded()

    def test_a_pending_outcome_ends_its_own_doubt(self, use: StoreInUse) -> None:
        """A record in doubt about this very claim takes its outcome."""
        lease = use.granted(lease=SHORT, on_crash="hold")
        assert use.after_the_lease(on_crash="hold") == InDoubt(new=True)
        assert self.write_through(use, lease)
        assert use.record().state is State.COMPLETED

    def test_a_superseded_pending_outcome_is_refused(self, use: StoreInUse) -> None:
        """Once the claim was taken over, released or resolved, its pending outcome can never be recorded."""
        first = use.granted(lease=SHORT)
        second = use.taken_over()
        assert not self.write_through(use, first)
        use.finish(second, OTHER)
        assert not self.write_through(use, first)
        assert use.record().outcome == OTHER.body
        released = use.granted("released")
        use.release(released)
        assert not self.write_through(use, released)
        assert use.record("released").state is State.RELEASED

    def test_a_pending_outcome_never_inserts(self, use: StoreInUse) -> None:
        """What was forgotten is not brought back (F53)."""
        lease = use.granted(lease=SHORT)
        use.let_expire(lease)
        use.forget()
        assert not self.write_through(use, lease)
        assert use.get() is None
