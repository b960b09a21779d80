"""The contract of the batch verbs as tests: for stores and marker tiers that claim and finish many at once.

Make a subclass of `BatchContract` in a test module and give it a fixture `store`, as for `StoreContract`; for a marker
tier one of `BatchMarkerContract` with a fixture `marker`, as for `MarkerContract`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import pytest

from idem_tasks.claims import (
    ClaimAnswer,
    ClaimRequest,
    EncodedOutcome,
    Finished,
    Granted,
    InDoubt,
    InProgress,
    Lease,
    Lost,
    Parked,
    Recorded,
    State,
)
from idem_tasks.stores.base import (
    BatchMarker,
    BatchStore,
    MarkerAnswer,
    MarkerFinished,
    MarkerPending,
    MarkerRunning,
    MarkerTaken,
)
from idem_tasks.testing.contract import StoreSuite
from idem_tasks.testing.marker_contract import MarkerInUse, MarkerSuite
from idem_tasks.testing.store_in_use import DECLINED, DONE, LONG, MEETING_KEYS, OTHER, SHORT, StoreInUse

BRIEF: dict[str, float] = {"retention": SHORT, "max_hold": SHORT, "lease": SHORT, "cache_ttl": SHORT}

SITUATIONS: dict[str, Callable[[StoreInUse, str], ClaimRequest]] = {}
"""What a claim can meet: each prepares the record of a key, and returns the request that asks for it."""


def situation(prepare: Callable[[StoreInUse, str], ClaimRequest]) -> Callable[[StoreInUse, str], ClaimRequest]:
    SITUATIONS[prepare.__name__] = prepare
    return prepare


@situation
def free(use: StoreInUse, key: str) -> ClaimRequest:
    return use.request(key)


@situation
def held(use: StoreInUse, key: str) -> ClaimRequest:
    use.granted(key)
    return use.request(key)


@situation
def ours(use: StoreInUse, key: str) -> ClaimRequest:
    return use.granted(key).request


@situation
def completed(use: StoreInUse, key: str) -> ClaimRequest:
    use.finish(use.granted(key))
    return use.request(key)


@situation
def completed_by_us(use: StoreInUse, key: str) -> ClaimRequest:
    lease = use.granted(key)
    use.finish(lease)
    return lease.request


@situation
def failed(use: StoreInUse, key: str) -> ClaimRequest:
    use.finish(use.granted(key, fingerprint=None), DECLINED)
    return use.request(key)


@situation
def released(use: StoreInUse, key: str) -> ClaimRequest:
    use.release(use.granted(key), failed=True)
    return use.request(key)


@situation
def forgotten(use: StoreInUse, key: str) -> ClaimRequest:
    use.finish(use.granted(key))
    use.forget(key)
    return use.request(key)


@situation
def in_doubt(use: StoreInUse, key: str) -> ClaimRequest:
    use.release(use.granted(key), in_doubt=True)
    return use.request(key)


@situation
def parked(use: StoreInUse, key: str) -> ClaimRequest:
    use.release(use.granted(key, max_attempts=1), failed=True)
    return use.request(key)


@situation
def dead(use: StoreInUse, key: str) -> ClaimRequest:
    use.granted(key, lease=SHORT)
    return use.request(key)


@situation
def dead_and_to_be_held(use: StoreInUse, key: str) -> ClaimRequest:
    use.granted(key, lease=SHORT)
    return use.request(key, on_crash="hold")


@situation
def dead_too_often(use: StoreInUse, key: str) -> ClaimRequest:
    use.granted(key, lease=SHORT)
    return use.request(key, max_crashes=0)


@situation
def over(use: StoreInUse, key: str) -> ClaimRequest:
    use.finish(use.granted(key, **BRIEF))
    return use.request(key)


_PASSING = {"dead", "dead_and_to_be_held", "dead_too_often", "over"}
"""Those that come about as a time passes."""


class BatchInUse:
    """A store's batch verbs as plain calls."""

    def __init__(self, use: StoreInUse) -> None:
        self.use = use
        self.verbs = cast(BatchStore, use.store)

    def requests(self, *keys: str, **wanted: Any) -> list[ClaimRequest]:
        """Make a request for each key, in the order of their bytes."""
        return in_order([self.use.request(key, **wanted) for key in keys])

    def claim(self, requests: Sequence[ClaimRequest]) -> list[ClaimAnswer | None]:
        return self.use.driver(self.verbs.claim_batch(requests))

    def granted(self, *keys: str, **wanted: Any) -> list[Lease]:
        """Claim all these keys, expect all to be granted, and return their leases in the order of their bytes."""
        answers = self.claim(self.requests(*keys, **wanted))
        return [answer.lease for answer in answers if isinstance(answer, Granted)]

    def finish(self, *finished: tuple[Lease, EncodedOutcome]) -> list[Recorded | None]:
        return self.use.driver(self.verbs.finish_batch(finished))

    def met(self, situations: Sequence[str], prefix: str) -> list[ClaimRequest]:
        """Bring a record into each situation, and return what asks for them, in the order of their bytes."""
        return in_order([SITUATIONS[name](self.use, f"{prefix}{number:03}") for number, name in enumerate(situations)])

    def answered_alike(self, situations: Sequence[str]) -> list[ClaimAnswer | None]:
        """Assert that a batch of claims is answered as the same claims are one at a time; return its answers.

        For one that is left to a claim of its own, that is asked then.
        """
        one_by_one, at_once = self.met(situations, "one-by-one-"), self.met(situations, "at-once-")
        if _PASSING.intersection(situations):
            self.use.driver.pause(2 * SHORT + 0.2)  # longer than a lease, and than max_hold and retention
        expected = [self.use.claim(request) for request in one_by_one]
        answers = self.claim(at_once)
        for name, request, answer, wanted in zip(situations, at_once, answers, expected, strict=True):
            assert _comparable(answer or self.use.claim(request)) == _comparable(wanted), name
        return answers


def in_order(requests: Sequence[ClaimRequest]) -> list[ClaimRequest]:
    """Sort requests by their places in bytes, as the verbs want them."""
    return sorted(requests, key=lambda request: (request.scope.encode(), request.key.encode()))


def _comparable(answer: ClaimAnswer) -> Any:
    """Return what of an answer depends neither on the key nor on the moment."""
    match answer:
        case Granted(lease):
            numbers = (lease.attempts, lease.failures, lease.crashes, lease.generation, lease.taken_over)
            return "granted", lease.request.fingerprint, lease.fencing_token > 0, numbers
        case Finished():
            return "finished", answer.outcome, answer.fingerprint, round(answer.expires_in / LONG)
        case InProgress(retry_after):
            return "in progress", round(retry_after / LONG)
        case InDoubt(new, dead_claim):
            return "in doubt", new, dead_claim is None
        case Parked():  # pragma: no branch - there is no other answer
            return answer


class BatchContract(StoreSuite):
    """What the batch verbs of a store promise; a subclass gives the store."""

    @pytest.fixture
    def batches(self, use: StoreInUse) -> BatchInUse:
        """The batch verbs of the store in one runtime."""
        return BatchInUse(use)

    def test_whatever_they_meet_is_answered_as_one_at_a_time(self, batches: BatchInUse) -> None:
        """In every situation at once; the usual ones are not left to a claim of their own."""
        names = list(SITUATIONS)
        answers = dict(zip(names, batches.answered_alike(names), strict=True))
        for name in ("free", "held", "ours", "completed", "completed_by_us", "failed", "in_doubt", "parked"):
            assert answers[name] is not None, name

    def test_a_batch_is_granted_once(self, batches: BatchInUse) -> None:
        """The next one learns how long; the leases are those of single claims, and finish as they do."""
        leases = batches.granted("a", "b", "c")
        assert [lease.key for lease in leases] == ["a", "b", "c"]
        assert all(isinstance(answer, InProgress) for answer in batches.claim(batches.requests("a", "b", "c")))
        assert batches.use.renew(*leases) == {lease.owner for lease in leases}
        assert batches.use.finish(leases[0]) == Recorded()
        assert batches.use.release(leases[1]).state is State.RELEASED  # type: ignore[union-attr]
        assert batches.finish((leases[2], DONE)) == [Recorded()]

    def test_a_batch_whose_reply_was_lost_is_granted_again(self, batches: BatchInUse) -> None:
        """F21: sent again it is answered with the same fencing tokens, also beside others."""
        requests = batches.requests("a", "b")
        first = batches.claim(requests)
        assert all(isinstance(answer, Granted) for answer in first)
        assert batches.claim(requests) == first
        assert batches.claim([*requests, *batches.requests("c")])[:2] == first

    def test_outcomes_are_recorded_as_they_are(self, batches: BatchInUse) -> None:
        """Any bytes, none, failures, and what is not kept; a duplicate gets each of them."""
        outcomes = [
            DONE,
            DECLINED,
            EncodedOutcome(),
            EncodedOutcome(body=b"", codec="json"),
            EncodedOutcome(body=bytes(range(256)), codec="json+zlib"),
            EncodedOutcome(not_kept="too_large"),
            EncodedOutcome(State.FAILED, error_type="E", error_message="'\"\\{}%s:x\n\u00e9\U0001f600"),
        ]
        keys = [f"key-{number}" for number in range(len(outcomes))]
        leases = batches.granted(*keys)
        assert batches.finish(*zip(leases, outcomes, strict=True)) == [Recorded()] * len(outcomes)
        answers = batches.claim(batches.requests(*keys))
        assert [answer.outcome for answer in answers if isinstance(answer, Finished)] == outcomes
        for key, outcome in zip(keys, outcomes, strict=True):
            record = batches.use.record(key)
            assert (record.state, record.completed_at is not None) == (outcome.state, True)
            assert record.attention == ("failed" if outcome.state is State.FAILED else None)

    def test_a_finish_whose_reply_was_lost_is_recorded_once(self, batches: BatchInUse) -> None:
        """F21: it may be left to a finish of its own, which says that it is recorded."""
        finished = [(lease, DONE) for lease in batches.granted("a", "b")]
        assert batches.finish(*finished) == [Recorded()] * 2
        for (lease, outcome), answer in zip(finished, batches.finish(*finished), strict=True):
            assert (answer or batches.use.finish(lease, outcome)) == Recorded()

    def test_only_those_whose_fence_holds_are_recorded(self, batches: BatchInUse) -> None:
        """F1: of a batch one was taken over, one was forgotten and one has ended; the others are recorded."""
        leases = batches.granted("a", "ended", "forgotten", "taken over", "z", lease=SHORT)
        batches.use.finish(leases[1], OTHER)
        batches.use.let_expire(leases[0])
        other = batches.use.taken_over("taken over")
        batches.use.release(leases[2])
        batches.use.forget("forgotten")
        answers = batches.finish(*((lease, DECLINED) for lease in leases))
        assert answers == [Recorded(), None, None, None, Recorded()]
        assert isinstance(batches.use.finish(leases[1], DECLINED), Finished)
        assert batches.use.get("forgotten") is None
        assert batches.use.finish(leases[3], DECLINED) == Lost()
        assert batches.finish((other, DONE)) == [Recorded()]
        assert batches.use.record("a").state is State.FAILED

    def test_one_that_was_put_in_doubt_is_recorded(self, batches: BatchInUse) -> None:
        """A late finish still tells the truth, as long as it is that very claim that is doubted."""
        leases = batches.granted("a", "b", lease=SHORT)
        batches.use.let_expire(leases[0])
        assert isinstance(batches.use.after_the_lease("b", on_crash="hold"), InDoubt)
        assert batches.finish(*((lease, DONE) for lease in leases)) == [Recorded()] * 2

    @pytest.mark.parametrize("keys", MEETING_KEYS, ids=ascii)
    def test_keys_that_look_alike_are_different(self, batches: BatchInUse, keys: tuple[str, ...]) -> None:
        """F51, F52: each is granted, and finished as its own."""
        leases = batches.granted(*keys)
        assert len(leases) == len(keys)
        outcomes = [EncodedOutcome(body=lease.key.encode(), codec="json") for lease in leases]
        assert batches.finish(*zip(leases, outcomes, strict=True)) == [Recorded()] * len(keys)
        for lease in leases:
            assert batches.use.record(lease.key).outcome == lease.key.encode()

    def test_any_number_is_one_batch(self, batches: BatchInUse) -> None:
        """None, one, and more than a statement takes."""
        assert (batches.claim([]), batches.finish()) == ([], [])
        leases = batches.granted(*(f"key-{number:04}" for number in range(1234)))
        assert len({lease.owner for lease in leases}) == 1234
        assert batches.finish(*((lease, DONE) for lease in leases)) == [Recorded()] * 1234
        assert all(isinstance(each, Finished) for each in batches.claim([lease.request for lease in leases]))

    def test_large_outcomes_are_recorded(self, batches: BatchInUse) -> None:
        """Together they are more than a statement takes."""
        leases = batches.granted("a", "b", "c")
        large = EncodedOutcome(body=b"x" * 3_000_000, codec="json")
        assert batches.finish(*((lease, large) for lease in leases)) == [Recorded()] * 3
        assert batches.use.record("c").outcome == large.body

    def test_of_overlapping_batches_each_record_is_granted_once(self, batches: BatchInUse) -> None:
        """F66: ten come at the same moment, each with nearly all keys; what one is not told it asks by itself."""
        keys = [f"key-{number:02}" for number in range(20)]
        asked = [batches.requests(*(key for n, key in enumerate(keys) if n % 10 != left_out)) for left_out in range(10)]
        answers = batches.use.driver.together([partial(batches.verbs.claim_batch, some) for some in asked])
        granted: list[str] = []
        for some, told in zip(asked, answers, strict=True):
            for request, answer in zip(some, told, strict=True):
                if isinstance(answer or batches.use.claim(request), Granted):
                    granted.append(request.key)
        assert sorted(granted) == keys


class BatchMarkerContract(MarkerSuite):
    """What the batch verbs of a marker tier promise; a subclass gives the marker."""

    @pytest.fixture
    def verbs(self, use: MarkerInUse) -> BatchMarker:
        """The batch verbs of the marker tier in one runtime."""
        return cast(BatchMarker, use.marker)

    def test_what_stands_is_told_of_each(self, use: MarkerInUse, verbs: BatchMarker) -> None:
        """Free ones are taken, our own are ours (F22), and of the rest it tells what `take` does."""
        mine = use.taken("mine")
        use.taken("another's", lease=LONG)
        finished = use.publish(use.taken("finished"))
        pending = use.taken("pending")
        assert use.keep(pending, OTHER)
        requests = [use.request("free"), mine.request, *map(use.request, ("another's", "finished", "pending"))]
        answers: list[MarkerAnswer | None] = use.driver(verbs.take_batch(requests))
        assert answers[:2] == [MarkerTaken(), MarkerTaken()]
        running, found, kept = answers[2:]
        assert isinstance(running, MarkerRunning)
        assert running.retry_after == pytest.approx(LONG, abs=5)
        assert isinstance(found, MarkerFinished)
        assert dataclasses.replace(found.finished, expires_in=finished.expires_in) == finished
        assert isinstance(kept, MarkerPending)
        assert (kept.owner, kept.outcome) == (pending.owner, OTHER)
        assert isinstance(use.take("free"), MarkerRunning)
        assert use.driver(verbs.take_batch(requests[:2])) == [MarkerTaken(), MarkerTaken()]

    def test_each_stands_for_its_own_lease(self, use: MarkerInUse, verbs: BatchMarker) -> None:
        """F33: no marker is left without an end."""
        requests = [use.request("brief", lease=SHORT), use.request("long")]
        assert use.driver(verbs.take_batch(requests)) == [MarkerTaken(), MarkerTaken()]
        use.let_expire(SHORT)
        assert isinstance(use.take("long"), MarkerRunning)
        assert use.take("brief") == MarkerTaken()

    def test_only_our_own_are_given_back(self, use: MarkerInUse, verbs: BatchMarker) -> None:
        """F4: another's stays, and so does an outcome."""
        mine, published = use.taken("mine"), use.taken("published")
        use.taken("another's")
        use.publish(published)
        gone = use.request("gone")
        use.driver(verbs.give_back_batch([mine.request, use.request("another's"), published.request, gone]))
        assert use.take("mine") == MarkerTaken()
        assert isinstance(use.take("another's"), MarkerRunning)
        assert isinstance(use.take("published"), MarkerFinished)

    def test_only_the_marker_of_this_very_take_is_replaced(self, use: MarkerInUse, verbs: BatchMarker) -> None:
        """F53: any other of ours is deleted, another's stays, and nothing is brought back that is gone."""
        mine, put_back, gone = use.taken("mine"), use.taken("put back"), use.taken("gone")
        unheard, pending, of_other = use.taken("unheard"), use.taken("pending"), use.taken("another's")
        use.drop("put back", "gone")
        use.renew(put_back)
        assert use.keep(pending)
        asked = [
            mine.request,
            put_back.request,
            gone.request,
            dataclasses.replace(unheard.request, take=None),
            pending.request,
            use.request("another's"),
        ]
        finished = Finished(DONE, None, 3600.0, 7)
        use.driver(verbs.publish_batch([(request, finished, LONG) for request in asked]))
        assert isinstance(use.take("mine"), MarkerFinished)
        for key in ("put back", "gone", "unheard", "pending"):
            assert use.take(key) == MarkerTaken(), key
        assert use.take(of_other.request) == MarkerTaken()

    def test_any_number_is_one_batch(self, use: MarkerInUse, verbs: BatchMarker) -> None:
        """None, and more than a script takes."""
        assert use.driver(verbs.take_batch([])) == []
        requests = [use.request(f"key-{number}") for number in range(1234)]
        assert use.driver(verbs.take_batch(requests)) == [MarkerTaken()] * 1234
        use.driver(verbs.publish_batch([(request, Finished(DONE, None, 3600.0), LONG) for request in requests[:-1]]))
        use.driver(verbs.give_back_batch(requests))
        answers = use.driver(verbs.take_batch([use.request(request.key) for request in requests]))
        assert [type(answer) for answer in answers] == [MarkerFinished] * 1233 + [MarkerTaken]
