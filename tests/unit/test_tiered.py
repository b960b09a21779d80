"""Two tiers, one arbiter: whatever the marker does or fails to do, the record decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import pytest

from idem_tasks import MemoryStore, TieredStore
from idem_tasks.claims import (
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
    Release,
    Released,
    State,
    new_owner,
)
from idem_tasks.errors import ConfigurationError, StoreConfigurationError, StoreError, StoreUnavailableError
from idem_tasks.events import Announcer, Event, EventName
from idem_tasks.policy import Policy
from idem_tasks.runtime import run_sync
from idem_tasks.stores.base import RuntimeName
from idem_tasks.stores.memory_marker import MemoryMarker
from idem_tasks.testing import ManualClock
from tests.unit.scripted import Scripted, away

DONE = EncodedOutcome(body=b'"done"', codec="json")
OTHER = EncodedOutcome(body=b'"other"', codec="json")


class Tiers:
    """Both tiers, with every verb under a test's control, and calls in one word."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.marker = Scripted(MemoryMarker(self.clock))
        self.record = Scripted(MemoryStore(self.clock))
        self.events: list[Event] = []
        self.store = TieredStore(cast(Any, self.marker), cast(Any, self.record)).on(
            "blocking", Announcer([self.events.append])
        )

    def request(self, **policy: Any) -> ClaimRequest:
        return ClaimRequest("s", "k", None, new_owner(), Policy(**{"lease": 60, **policy}))

    def claim(self, request: ClaimRequest | None = None, **policy: Any) -> Any:
        return run_sync(self.store.claim(request or self.request(**policy)))

    def granted(self, request: ClaimRequest | None = None, **policy: Any) -> Lease:
        answer = self.claim(request, **policy)
        assert isinstance(answer, Granted)
        return answer.lease

    def finish(self, lease: Lease, outcome: EncodedOutcome = DONE) -> Any:
        return run_sync(self.store.finish(lease, outcome, may_insert=False))

    def standing(self) -> str | None:
        """Return what kind of marker stands, in one word."""
        marker = self.marker.real._standing(("s", "k"), self.clock())
        return None if marker is None else type(marker).__name__.strip("_").lower()

    def verbs(self) -> list[str]:
        """Return what was sent since the last time, in order, to both tiers."""
        sent = [f"marker.{verb}" for verb in self.marker.verbs] + [f"record.{verb}" for verb in self.record.verbs]
        self.marker.verbs.clear()
        self.record.verbs.clear()
        return sent


@pytest.fixture
def tiers() -> Iterator[Tiers]:
    return Tiers()  # type: ignore[return-value]


# What each call costs.


def test_a_first_call_costs_two_round_trips_to_each(tiers: Tiers) -> None:
    """Take and publish, claim and finish."""
    tiers.finish(tiers.granted())
    assert tiers.verbs() == ["marker.take", "marker.publish", "record.claim", "record.finish"]


def test_a_duplicate_costs_one(tiers: Tiers) -> None:
    """While the marker stands the record is not asked; when it is gone, once, and then it stands again."""
    tiers.finish(tiers.granted())
    tiers.verbs()
    assert isinstance(tiers.claim(), Finished)
    assert tiers.verbs() == ["marker.take"]
    tiers.marker.real._markers.clear()
    assert isinstance(tiers.claim(), Finished)
    assert tiers.verbs() == ["marker.take", "marker.publish", "record.claim"]
    assert isinstance(tiers.claim(), Finished)
    assert tiers.verbs() == ["marker.take"]


def test_a_duplicate_in_progress_costs_one(tiers: Tiers) -> None:
    """The running marker answers by itself."""
    tiers.granted()
    tiers.verbs()
    assert isinstance(tiers.claim(), InProgress)
    assert tiers.verbs() == ["marker.take"]


# The marker is gone, wrong or late.


def test_a_running_record_without_a_marker_is_in_progress(tiers: Tiers) -> None:
    """The record decides, and the marker that was taken to ask it is given back (F7)."""
    tiers.granted()
    tiers.marker.real._markers.clear()
    assert isinstance(tiers.claim(), InProgress)
    assert tiers.standing() is None


@pytest.mark.parametrize("state", [State.IN_DOUBT, State.PARKED])
def test_what_waits_for_a_person_leaves_no_marker(tiers: Tiers, state: State) -> None:
    """Neither when it is found, nor when it is made."""
    lease = tiers.granted(max_attempts=1)
    release = Release(failed=state is State.PARKED, in_doubt=state is State.IN_DOUBT)
    assert run_sync(tiers.store.release(lease, release)) == Released(state)
    assert tiers.standing() is None
    assert isinstance(tiers.claim(), InDoubt if state is State.IN_DOUBT else Parked)
    assert tiers.standing() is None


def test_a_marker_of_another_is_never_touched(tiers: Tiers) -> None:
    """A late finish, release and give-back of an old claim leave the new holder's marker (F4)."""
    old = tiers.granted()
    tiers.clock.advance(61)
    new = tiers.granted()
    assert tiers.finish(old) == Lost()
    assert run_sync(tiers.store.release(old, Release())) == Lost()
    assert tiers.standing() == "running"
    assert isinstance(tiers.claim(), InProgress)
    assert tiers.finish(new) == Recorded()
    assert tiers.standing() == "finished"


def test_a_late_finish_publishes_what_was_recorded(tiers: Tiers) -> None:
    """A superseded claim whose marker is its own again shows the outcome that stands, not its own."""
    old = tiers.granted()
    tiers.clock.advance(61)
    new = tiers.granted()
    run_sync(tiers.record.real.finish(new, OTHER))
    tiers.marker.real._markers.clear()
    run_sync(tiers.marker.real.renew_markers([old]))
    answer = tiers.finish(old)
    assert isinstance(answer, Finished)
    assert answer.outcome == OTHER
    duplicate = tiers.claim()
    assert isinstance(duplicate, Finished)
    assert duplicate.outcome == OTHER


def test_the_marker_answers_no_longer_than_the_record(tiers: Tiers) -> None:
    """For `cache_ttl`, and never past the record's retention, though a duplicate's own policy says longer (F16)."""
    tiers.finish(tiers.granted(retention=100, cache_ttl=50, max_hold=60))
    tiers.clock.advance(49)
    tiers.verbs()
    tiers.claim()
    assert tiers.verbs() == ["marker.take"]
    tiers.clock.advance(2)
    assert isinstance(tiers.claim(retention=10_000, cache_ttl=10_000), Finished)
    assert tiers.verbs()[-1] == "record.claim"
    tiers.clock.advance(110)
    tiers.granted()


# A tier is away.


def test_without_the_marker_the_record_is_asked(tiers: Tiers) -> None:
    """Every verb goes on, and says that the marker is away."""
    tiers.marker.down()
    lease = tiers.granted()
    assert isinstance(tiers.claim(), InProgress)
    assert run_sync(tiers.store.renew([lease], lambda _: True)) == {lease.owner}
    assert run_sync(tiers.store.keep_pending(lease, DONE)) is False
    assert tiers.finish(lease) == Recorded()
    assert isinstance(tiers.claim(), Finished)
    tiers.clock.advance(10 * 86400)
    assert run_sync(tiers.store.purge(limit=10, grace=0)) == [("s", "k")]
    assert {event.name for event in tiers.events} == {EventName.MARKER_UNAVAILABLE}


def test_a_marker_taken_with_its_reply_lost_is_ours(tiers: Tiers) -> None:
    """The command took effect though it failed: finish and release remove that marker (F22).

    No outcome takes its place: a take that comes late may come after a person forgot the record (F53).
    """
    tiers.marker.after("take", away("the marker"))
    lease = tiers.granted()
    assert tiers.standing() == "running"
    tiers.finish(lease)
    assert tiers.standing() is None


def test_a_take_that_comes_late_does_not_bring_back_what_was_forgotten(tiers: Tiers) -> None:
    """It was given up by its sender, and takes effect when a person has forgotten the outcome (F53)."""
    tiers.marker.before("take", away("the marker"))
    lease = tiers.granted()
    tiers.marker.before("publish", forgotten_meanwhile(tiers, lease))
    tiers.finish(lease)
    assert tiers.standing() is None
    tiers.granted()


def forgotten_meanwhile(tiers: Tiers, lease: Lease) -> Callable[[], None]:
    def forget() -> None:
        run_sync(tiers.record.real.forget(lease.scope, lease.key))
        run_sync(tiers.marker.real.drop([(lease.scope, lease.key)]))
        run_sync(tiers.marker.real.take(replace(lease.request, take=1)))

    return forget


@pytest.mark.parametrize("lost", [False, True])
def test_a_marker_that_must_be_there_is_given_back(tiers: Tiers, lost: bool) -> None:
    """Under on_marker_unavailable="raise" the claim fails, and leaves no marker that puts the next one off."""
    tiers.marker.after("take", away("the marker")) if lost else tiers.marker.before("take", away("the marker"))
    with pytest.raises(StoreUnavailableError, match="on_marker_unavailable"):
        tiers.claim(on_marker_unavailable="raise")
    assert tiers.standing() is None
    assert "record.claim" not in tiers.verbs()
    tiers.granted(on_marker_unavailable="raise")


@pytest.mark.parametrize("error", [away(), StoreError("odd"), ConfigurationError("no table")], ids=repr)
def test_a_record_that_cannot_be_asked_leaves_no_marker(tiers: Tiers, error: Exception) -> None:
    """The marker that was taken for it would put the next delivery off (F33)."""
    tiers.record.down("claim", error=error)
    with pytest.raises(type(error)):
        tiers.claim()
    assert tiers.standing() is None


def test_a_record_that_is_away_leaves_the_marker_to_its_claim(tiers: Tiers) -> None:
    """A finish or release that SQL refuses changes no marker: it shields the record until the lease is over."""
    lease = tiers.granted()
    tiers.record.down()
    for verb in (lambda: tiers.finish(lease), lambda: run_sync(tiers.store.release(lease, Release()))):
        with pytest.raises(StoreUnavailableError):
            verb()
    assert tiers.standing() == "running"


# Renewing.


def test_only_what_was_renewed_and_is_held_has_its_marker_renewed(tiers: Tiers) -> None:
    """A marker is put back for a claim that SQL has just renewed and whose finish has not begun."""
    lease = tiers.granted()
    tiers.marker.real._markers.clear()
    assert run_sync(tiers.store.renew([lease], lambda _: False)) == {lease.owner}
    assert tiers.standing() is None
    assert run_sync(tiers.store.renew([lease], lambda _: True)) == {lease.owner}
    assert tiers.standing() == "running"
    tiers.marker.real._markers.clear()
    tiers.clock.advance(61)
    tiers.granted()
    tiers.verbs()
    assert run_sync(tiers.store.renew([lease], lambda _: True)) == frozenset()
    assert tiers.verbs() == ["record.renew"]


# Pending outcomes.


def pending(tiers: Tiers, **policy: Any) -> Lease:
    lease = tiers.granted(**policy)
    assert run_sync(tiers.store.keep_pending(lease, DONE))
    assert tiers.standing() == "pending"
    tiers.events.clear()
    return lease


def test_a_pending_outcome_is_written_through(tiers: Tiers) -> None:
    """The next claim records it and answers with it; the one after that publishes it (F57)."""
    pending(tiers)
    tiers.verbs()
    answer = tiers.claim()
    assert isinstance(answer, Finished)
    assert answer.outcome == DONE
    assert tiers.verbs() == ["marker.take", "marker.drop_pending", "record.write_through"]
    assert isinstance(tiers.claim(), Finished)
    assert tiers.verbs() == ["marker.take", "marker.publish", "record.claim"]
    assert isinstance(tiers.claim(), Finished)
    assert tiers.verbs() == ["marker.take"]
    assert [event.name for event in tiers.events] == [EventName.OUTCOME_WRITTEN_THROUGH]


def test_a_pending_outcome_survives_a_doubt(tiers: Tiers) -> None:
    """The claim that was put in doubt meanwhile has its truth told by it."""
    pending(tiers, on_crash="hold")
    tiers.clock.advance(61)
    assert run_sync(tiers.record.real.claim(tiers.request(on_crash="hold"))) == InDoubt(new=True)
    assert isinstance(tiers.claim(), Finished)


def test_a_pending_outcome_is_never_replayed_before_it_is_recorded(tiers: Tiers) -> None:
    """With SQL away the claim fails, and the outcome stays pending (F57)."""
    pending(tiers)
    tiers.record.down()
    for _ in range(2):
        with pytest.raises(StoreUnavailableError):
            tiers.claim()
    assert tiers.standing() == "pending"


def test_a_write_through_whose_reply_is_lost_is_written_once(tiers: Tiers) -> None:
    """The next claim finds it recorded already (F21)."""
    pending(tiers)
    tiers.record.after("write_through", away())
    with pytest.raises(StoreUnavailableError):
        tiers.claim()
    assert isinstance(tiers.claim(), Finished)


@pytest.mark.parametrize("how", ["forgotten", "resolved", "taken over"])
def test_a_pending_outcome_that_misses_the_fence_gives_way(tiers: Tiers, how: str) -> None:
    """Forgotten, resolved or taken over: the record decides, and the pending marker goes (F53)."""
    pending(tiers)
    tiers.clock.advance(61)
    if how == "forgotten":
        run_sync(tiers.record.real.forget("s", "k"))
    elif how == "resolved":
        run_sync(tiers.record.real.resolve("s", "k", None))
    else:
        run_sync(tiers.record.real.claim(tiers.request()))
    answer = tiers.claim()
    assert isinstance(answer, InProgress if how == "taken over" else Granted)
    assert tiers.standing() is None
    assert [event.name for event in tiers.events] == [EventName.OUTCOME_DROPPED]


def test_a_pending_marker_that_cannot_be_dropped_harms_nobody(tiers: Tiers) -> None:
    """The next claim finds out again that it is out of date."""
    pending(tiers)
    tiers.clock.advance(61)
    run_sync(tiers.record.real.forget("s", "k"))
    tiers.marker.before("drop_pending", away("the marker"))
    lease = tiers.granted()
    assert tiers.finish(lease, OTHER) == Recorded()
    answer = tiers.claim()
    assert isinstance(answer, Finished)
    assert answer.outcome == OTHER


def test_a_pending_outcome_is_kept_over_our_own_marker_only(tiers: Tiers) -> None:
    """Nobody else's marker is replaced by it (F4)."""
    old = tiers.granted()
    tiers.clock.advance(61)
    tiers.granted()
    assert run_sync(tiers.store.keep_pending(old, DONE)) is False
    assert tiers.standing() == "running"


# The rest.


def test_the_runtimes_are_those_of_both_tiers() -> None:
    """A marker for one runtime makes a store for one."""

    class AsyncioOnly(MemoryMarker):
        runtimes: frozenset[RuntimeName] = frozenset({"asyncio"})

    store = TieredStore(AsyncioOnly(), MemoryStore())
    assert store.runtimes == {"asyncio"}


def test_what_is_not_the_markers_goes_to_the_record(tiers: Tiers) -> None:
    """Listing, counting and making tables are the record's alone."""
    tiers.finish(tiers.granted())
    tiers.verbs()
    assert run_sync(tiers.store.get("s", "k")) is not None
    assert len(run_sync(tiers.store.records(state=None, scope=None, after=None, limit=9))) == 1
    assert run_sync(tiers.store.stats())[State.COMPLETED] == 1
    run_sync(tiers.store.prepare())
    assert tiers.verbs() == ["record.get", "record.records", "record.stats", "record.prepare"]
    run_sync(tiers.store.close())
    assert tiers.verbs() == ["marker.close", "record.close"]


def test_both_tiers_are_closed_though_one_fails(tiers: Tiers) -> None:
    """A Redis that is away does not keep the database's connections open."""
    tiers.marker.down("close")
    with pytest.raises(StoreUnavailableError):
        run_sync(tiers.store.close())
    assert tiers.verbs() == ["marker.close", "record.close"]


def test_a_persons_word_reaches_the_record_first(tiers: Tiers) -> None:
    """Then the marker goes, also where there was no record (F53)."""
    tiers.finish(tiers.granted())
    run_sync(tiers.record.real.forget("s", "k"))
    assert tiers.standing() == "finished"
    assert run_sync(tiers.store.forget("s", "k")) is None
    assert tiers.standing() is None
    tiers.finish(tiers.granted())
    found: list[Any] = []
    tiers.marker.before("drop", lambda: found.append(run_sync(tiers.record.real.get("s", "k"))))
    assert run_sync(tiers.store.forget("s", "k"))
    assert found == [None], "else a claim between the two would publish the old outcome again"


def test_a_marker_that_was_never_there_is_said(tiers: Tiers) -> None:
    """A mistake in the set-up of Redis is told at once, and SQL does not hide it for months."""
    tiers.marker.down(error=StoreConfigurationError("refuses the password"))
    with pytest.raises(StoreConfigurationError, match="refuses the password"):
        tiers.claim()
    assert tiers.record.verbs == []


def test_an_outcome_whose_time_is_over_is_not_published(tiers: Tiers) -> None:
    """A late finish finds another's outcome past its retention, and sets no marker that would outlive it."""
    late = tiers.granted()
    tiers.clock.advance(61)
    tiers.finish(tiers.granted(retention=10), OTHER)
    tiers.clock.advance(2 * 3600)
    tiers.verbs()
    answer = tiers.finish(late)
    assert isinstance(answer, Finished)
    assert answer.expires_in == 0
    assert "marker.publish" not in tiers.verbs()
    assert tiers.standing() is None


# Many at once.


def batch(tiers: Tiers, *keys: str, **policy: Any) -> list[ClaimRequest]:
    return [replace(tiers.request(**policy), key=key) for key in keys]


def claim_batch(tiers: Tiers, requests: list[ClaimRequest]) -> list[Any]:
    return run_sync(tiers.store.claim_batch(requests))


def granted_batch(tiers: Tiers, *keys: str, **policy: Any) -> list[Lease]:
    leases = [answer.lease for answer in claim_batch(tiers, batch(tiers, *keys, **policy))]
    tiers.verbs()
    return leases


def finish_batch(tiers: Tiers, leases: list[Lease]) -> list[Any]:
    return run_sync(tiers.store.finish_batch([(lease, DONE) for lease in leases]))


def markers(tiers: Tiers) -> dict[str, str]:
    """Return what kinds of markers stand, by key."""
    standing = {key: tiers.marker.real._standing(("s", key), tiers.clock()) for _, key in tiers.marker.real._markers}
    return {key: type(each).__name__.strip("_").lower() for key, each in standing.items() if each is not None}


def test_a_batch_costs_two_round_trips_to_each(tiers: Tiers) -> None:
    """Take and publish, claim and finish, however many there are; a duplicate batch costs one."""
    leases = granted_batch(tiers, "a", "b", "c")
    assert finish_batch(tiers, leases) == [Recorded()] * 3
    assert tiers.verbs() == ["marker.publish_batch", "record.finish_batch"]
    assert all(isinstance(answer, Finished) for answer in claim_batch(tiers, batch(tiers, "a", "b", "c")))
    assert tiers.verbs() == ["marker.take_batch"]
    assert all(isinstance(answer, Granted) for answer in claim_batch(tiers, batch(tiers, "d", "e")))
    assert tiers.verbs() == ["marker.take_batch", "record.claim_batch"]
    assert (claim_batch(tiers, []), finish_batch(tiers, []), tiers.verbs()) == ([], [], [])


def test_of_a_batch_each_marker_follows_its_record(tiers: Tiers) -> None:
    """Granted: ours stands. Finished: its outcome. Anything else, and what is left to a claim of its own: none."""
    finished, running, released, kept = granted_batch(tiers, "finished", "running", "released", "kept")
    assert finish_batch(tiers, [finished]) == [Recorded()]
    run_sync(tiers.store.release(released, Release()))
    run_sync(tiers.marker.real.keep(kept, DONE))
    for key in ("finished", "running"):
        run_sync(tiers.marker.real.drop([("s", key)]))
    tiers.verbs()
    answers = claim_batch(tiers, batch(tiers, "finished", "free", "kept", "released", "running"))
    assert [type(answer) for answer in answers] == [Finished, Granted, type(None), type(None), InProgress]
    assert tiers.verbs() == [
        "marker.take_batch", "marker.publish_batch", "marker.give_back_batch", "record.claim_batch",
    ]  # fmt: skip
    assert markers(tiers) == {"finished": "finished", "free": "running", "kept": "pending"}
    assert running.key == "running"


def test_what_was_not_recorded_of_a_batch_leaves_its_marker(tiers: Tiers) -> None:
    """A finish of its own tells what became of it, and of its marker (F1)."""
    old = granted_batch(tiers, "k", "other")
    tiers.clock.advance(61)
    new = tiers.granted()
    assert finish_batch(tiers, old) == [None, Recorded()]
    assert tiers.finish(old[0]) == Lost()
    assert markers(tiers) == {"k": "running"}
    assert tiers.finish(new) == Recorded()


@pytest.mark.parametrize("when", ["before", "after"])
def test_without_the_markers_a_batch_asks_the_records(tiers: Tiers, when: str) -> None:
    """No outcome takes the place of a marker of which nobody heard whether it was taken (F53)."""
    getattr(tiers.marker, when)("take_batch", away("the marker"))
    leases = granted_batch(tiers, "a", "b")
    assert [lease.request.take for lease in leases] == [None, None]
    assert finish_batch(tiers, leases) == [Recorded()] * 2
    assert markers(tiers) == {}
    assert [event.name for event in tiers.events] == [EventName.MARKER_UNAVAILABLE]


def test_a_batch_whose_markers_must_be_there_gives_them_back(tiers: Tiers) -> None:
    """Under on_marker_unavailable="raise" it fails as a whole, and leaves no marker that puts the next one off."""
    tiers.marker.after("take_batch", away("the marker"))
    with pytest.raises(StoreUnavailableError, match="on_marker_unavailable"):
        claim_batch(tiers, batch(tiers, "a", "b", on_marker_unavailable="raise"))
    assert markers(tiers) == {}
    assert "record.claim_batch" not in tiers.verbs()


def test_a_batch_goes_on_without_markers_that_are_set_up_wrongly_never(tiers: Tiers) -> None:
    """Nobody should run for long on a shield that was never there."""
    tiers.marker.down("take_batch", error=StoreConfigurationError("no such user"))
    with pytest.raises(StoreConfigurationError):
        claim_batch(tiers, batch(tiers, "a"))


def test_records_that_cannot_be_asked_leave_no_markers_of_a_batch(tiers: Tiers) -> None:
    """Those that were taken for it would put the next deliveries off (F33)."""
    tiers.record.down("claim_batch")
    with pytest.raises(StoreUnavailableError):
        claim_batch(tiers, batch(tiers, "a", "b"))
    assert markers(tiers) == {}


def test_a_batch_survives_markers_that_go_away(tiers: Tiers) -> None:
    """They follow when they can; the records hold the truth."""
    tiers.marker.down("publish_batch", "give_back_batch")
    leases = granted_batch(tiers, "a")
    assert finish_batch(tiers, leases) == [Recorded()]
    tiers.marker.real._markers.clear()
    assert isinstance(claim_batch(tiers, batch(tiers, "a"))[0], Finished)
    assert {event.name for event in tiers.events} == {EventName.MARKER_UNAVAILABLE}


def test_tiers_without_the_verbs_leave_all_to_single_ones() -> None:
    """A marker tier or a record tier of somebody else's need not have them."""

    class Single:
        runtimes = frozenset({"blocking"})

    for store in (TieredStore(cast(Any, Single()), MemoryStore()), TieredStore(MemoryMarker(), cast(Any, Single()))):
        request = ClaimRequest("s", "k", None, new_owner(), Policy())
        assert run_sync(store.claim_batch([request])) == [None]
        assert run_sync(store.finish_batch([(Lease(request, 1), DONE)])) == [None]


class OfMany:
    """A transaction for many claims of a record tier, whose answers a test gives."""

    session = commit_begun = may_be_committed = is_cut_off = None

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    async def begin_all(self) -> Any:
        return self.answers.pop(0)

    async def commit_all(self, outcomes: Any) -> Any:
        return self.answers.pop(0)

    look_all = begin_all


@pytest.mark.parametrize("in_batches", [True, False])
def test_markers_follow_a_transaction_of_many(tiers: Tiers, in_batches: bool) -> None:
    """Whoever tells how it ended: its beginning, its commit, or a look after a commit that nobody heard of."""
    leases = granted_batch(tiers, "a", "b", "c")
    tiers.store._can_batch = in_batches
    other = Finished(OTHER, None, 3600.0)
    transaction = OfMany([None, other, Lost()], [True, False, True], [None] * 3, [Recorded()] * 3, [True] * 3)

    class Store:
        batch_transaction = staticmethod(lambda *_: transaction)

    tiers.store._record = cast(Any, Store())
    followed = tiers.store.batch_transaction(leases, cast(Any, None), None)
    assert run_sync(followed.begin_all()) == [None, other, Lost()]
    assert markers(tiers) == {"a": "running", "b": "finished"}
    assert run_sync(followed.commit_all([DONE] * 3)) == [True, False, True]
    assert run_sync(followed.look_all()) == [None] * 3
    assert markers(tiers) == {"a": "running", "b": "finished"}
    assert run_sync(followed.look_all()) == [Recorded()] * 3
    assert markers(tiers) == {"a": "finished", "b": "finished"}
    assert run_sync(followed.commit_all([DONE] * 3)) == [True] * 3


def test_a_transaction_of_many_needs_records_in_sql(tiers: Tiers) -> None:
    """In memory there is none."""
    with pytest.raises(ConfigurationError, match="records in SQL"):
        tiers.store.batch_transaction([], cast(Any, None), None)


def test_an_outcome_whose_retention_is_over_is_not_published_of_a_batch(tiers: Tiers) -> None:
    """Its marker would have no time to live."""
    leases = granted_batch(tiers, "a")
    run_sync(tiers.store._publish_batch([(leases[0].request, Finished(OTHER, None, 0.0))]))
    assert tiers.verbs() == []
