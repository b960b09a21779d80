"""The contract of a marker tier as tests: whatever keeps every promise here can shield a record.

Make a subclass in a test module and give it a fixture `marker`, as with `StoreContract`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from idem_tasks.claims import ClaimRequest, EncodedOutcome, Finished, Lease, State, new_owner
from idem_tasks.events import Announcer
from idem_tasks.policy import Policy
from idem_tasks.stores.base import (
    Marker,
    MarkerAnswer,
    MarkerFinished,
    MarkerPending,
    MarkerRunning,
    MarkerTaken,
    RuntimeName,
)
from idem_tasks.testing.driver import Driver
from idem_tasks.testing.store_in_use import DECLINED, DONE, LONG, MEETING_KEYS, OTHER, SHORT, WORKERS


class MarkerInUse:
    """A marker tier's verbs as plain calls with short arguments, in one scope of its own."""

    def __init__(self, marker: Marker, driver: Driver) -> None:
        self.driver = driver
        self.marker = marker.on(driver.runtime, Announcer(()))
        self.scope = f"contract.{uuid.uuid4().hex}"

    def request(self, key: str = "key", *, owner: str | None = None, **policy: Any) -> ClaimRequest:
        """Make a request with a new owner."""
        wanted = Policy(**{"lease": LONG, "max_hold": 3600.0, "retention": 3600.0, **policy})
        return ClaimRequest(self.scope, key, "f" * 64, owner or new_owner(), wanted)

    def take(self, request: ClaimRequest | str = "key", **policy: Any) -> MarkerAnswer:
        if isinstance(request, str):
            request = self.request(request, **policy)
        return self.driver(self.marker.take(request))

    def taken(self, key: str = "key", token: int = 1, **policy: Any) -> Lease:
        """Take a marker that is free, and return a lease such as its record would give."""
        request = self.request(key, **policy)
        assert self.take(request) == MarkerTaken()
        return Lease(request, fencing_token=token)

    def give_back(self, lease: Lease) -> None:
        self.driver(self.marker.give_back(lease.scope, lease.key, lease.owner))

    def renew(self, *leases: Lease) -> None:
        self.driver(self.marker.renew_markers(leases))

    def publish(self, lease: Lease, outcome: EncodedOutcome = DONE, ttl: float = LONG) -> Finished:
        """Publish an outcome as a `TieredStore` does, and return what was published."""
        finished = Finished(outcome, lease.request.fingerprint, 3600.0, lease.fencing_token)
        self.driver(self.marker.publish(lease.request, finished, ttl))
        return finished

    def keep(self, lease: Lease, outcome: EncodedOutcome = DONE) -> bool:
        return self.driver(self.marker.keep(lease, outcome))

    def pending(self, key: str = "key") -> MarkerPending:
        """Take, expect a pending outcome, and return it."""
        answer = self.take(key)
        assert isinstance(answer, MarkerPending)
        return answer

    def drop(self, *keys: str) -> None:
        self.driver(self.marker.drop([(self.scope, key) for key in keys]))

    def let_expire(self, seconds: float) -> None:
        self.driver.pause(seconds + 0.1)


class MarkerSuite:
    """The fixtures of all suites for marker tiers; a subclass gives the marker."""

    runtimes: tuple[RuntimeName, ...] = ("blocking", "asyncio")
    """The runtimes to test it in."""

    @pytest.fixture
    def marker(self) -> Marker:
        """Return the marker tier to test; the subclass overrides this."""
        raise NotImplementedError("give a fixture `marker`")

    @pytest.fixture(params=["blocking", "asyncio"])
    def runtime(self, request: pytest.FixtureRequest) -> RuntimeName:
        """Each runtime in turn."""
        name: RuntimeName = request.param
        if name not in self.runtimes:
            pytest.skip(f"this marker tier does not serve {name}")
        return name

    @pytest.fixture
    def pause(self) -> Callable[[float], None]:
        """Let seconds pass; a tier with a clock of its own moves it instead of waiting."""
        return time.sleep

    @pytest.fixture
    def use(self, marker: Marker, runtime: RuntimeName, pause: Callable[[float], None]) -> Iterator[MarkerInUse]:
        """The marker tier in one runtime, with a scope that no other test uses; closed afterwards."""
        with Driver(runtime, pause) as driver:
            use = MarkerInUse(marker, driver)
            yield use
            driver(use.marker.close())


class MarkerContract(MarkerSuite):
    """What a marker tier promises; a subclass gives the marker."""

    def test_a_free_key_is_taken(self, use: MarkerInUse) -> None:
        """The first to take a key has it; the next learns how long."""
        use.taken()
        answer = use.take()
        assert isinstance(answer, MarkerRunning)
        assert 0 < answer.retry_after <= LONG

    def test_a_longer_lease_than_ours_is_told_as_it_is(self, use: MarkerInUse) -> None:
        """After a deployment that shortens the lease, duplicates wait as long as the running holder's lease says."""
        use.taken(lease=LONG)
        answer = use.take(lease=1.0)
        assert isinstance(answer, MarkerRunning)
        assert answer.retry_after == pytest.approx(LONG, abs=10)

    def test_taking_again_what_is_ours_is_taken(self, use: MarkerInUse) -> None:
        """A first try whose reply was lost does not stand in its own way (F22)."""
        lease = use.taken()
        assert use.take(lease.request) == MarkerTaken()

    def test_a_marker_ends_with_its_lease(self, use: MarkerInUse) -> None:
        """A marker that nobody renews is free when its lease is over."""
        use.taken(lease=SHORT)
        answer = use.driver.poll(
            partial(use.marker.take, use.request()), lambda seen: not isinstance(seen, MarkerRunning)
        )
        assert answer == MarkerTaken()

    def test_only_our_own_is_given_back(self, use: MarkerInUse) -> None:
        """Giving back frees our own running marker, and leaves another's or a finished one (F4)."""
        lease = use.taken()
        use.give_back(Lease(use.request(), 1))
        assert isinstance(use.take(), MarkerRunning)
        use.give_back(lease)
        other = use.taken()
        use.give_back(lease)
        assert isinstance(use.take(), MarkerRunning)
        use.publish(other)
        use.give_back(other)
        assert isinstance(use.take(), MarkerFinished)

    def test_a_renewed_marker_stands_on(self, use: MarkerInUse) -> None:
        """A renewal in time keeps a marker past its first end."""
        lease = use.taken(lease=1.0)
        for _ in range(3):
            use.driver.pause(0.4)
            use.renew(lease)
        assert isinstance(use.take(), MarkerRunning)

    def test_a_renewal_puts_a_vanished_marker_back(self, use: MarkerInUse) -> None:
        """A marker lost to an eviction or a restart stands again after the next beat (F7)."""
        lease = use.taken()
        use.drop("key")
        use.renew(lease)
        assert isinstance(use.take(), MarkerRunning)
        assert use.take(lease.request) == MarkerTaken()

    def test_a_marker_that_was_put_back_becomes_no_outcome(self, use: MarkerInUse) -> None:
        """A renewal that comes after the record was forgotten brings nothing back: its marker is deleted (F53)."""
        lease = use.taken()
        use.drop("key")
        use.renew(lease)
        use.publish(lease)
        use.taken()

    def test_a_renewal_leaves_everybody_elses(self, use: MarkerInUse) -> None:
        """Another's running marker, a finished one and a pending one are not touched by a renewal (F4)."""
        late = use.taken("running", lease=SHORT)
        use.let_expire(SHORT)
        other = use.taken("running")
        finished = use.taken("finished")
        use.publish(finished)
        pending = use.taken("pending")
        use.keep(pending)
        use.renew(late, finished, pending)
        assert use.take(other.request) == MarkerTaken()
        assert isinstance(use.take("finished"), MarkerFinished)
        assert isinstance(use.take("pending"), MarkerPending)

    def test_a_thousand_markers_are_renewed_in_one_call(self, use: MarkerInUse) -> None:
        """One beat renews all markers of a process, however many there are."""
        leases = [use.taken(f"key {number}") for number in range(1000)]
        use.renew(*leases)
        use.renew()
        assert isinstance(use.take("key 999"), MarkerRunning)

    @pytest.mark.parametrize(
        "outcome",
        [
            DONE,
            DECLINED,
            EncodedOutcome(body=b"", codec="json"),
            EncodedOutcome(body=bytes(range(256)), codec="json"),
            EncodedOutcome(body=b"x" * 200_000, codec="json+zlib"),
            EncodedOutcome(not_kept="too_large"),
            EncodedOutcome(not_kept="skipped"),
            EncodedOutcome(State.FAILED, b"{}", "json", None, "a.B", "caf\u00e9 \U0001f600"),
        ],
        ids=["done", "failed", "empty", "all bytes", "large", "too large", "skipped", "failed with bytes"],
    )
    def test_a_published_outcome_is_served_exactly(self, use: MarkerInUse, outcome: EncodedOutcome) -> None:
        """What is published comes back as it was, presence and absence too (F28)."""
        lease = use.taken(token=1_700_000_000_000_000)
        published = use.publish(lease, outcome)
        answer = use.take()
        assert isinstance(answer, MarkerFinished)
        assert answer.finished.outcome == outcome
        assert answer.finished.fingerprint == published.fingerprint
        assert answer.finished.fencing_token in (None, 1_700_000_000_000_000)
        assert 0 < answer.finished.expires_in <= 3600

    def test_a_published_outcome_ends_with_its_time(self, use: MarkerInUse) -> None:
        """After its `ttl` a finished marker is gone, and the record answers again."""
        use.publish(use.taken(), ttl=SHORT)
        answer = use.driver.poll(
            partial(use.marker.take, use.request()), lambda seen: not isinstance(seen, MarkerFinished)
        )
        assert answer == MarkerTaken()

    def test_publishing_replaces_only_our_own(self, use: MarkerInUse) -> None:
        """Another's marker stays, and nothing is published where nothing stands: it may be forgotten (F53)."""
        lease = use.taken()
        stranger = Lease(use.request(), 1)
        use.publish(stranger, OTHER)
        assert isinstance(use.take(), MarkerRunning)
        use.publish(lease)
        use.publish(lease, OTHER)
        use.publish(stranger, OTHER)
        answer = use.take()
        assert isinstance(answer, MarkerFinished)
        assert answer.finished.outcome == DONE
        use.drop("key")
        use.publish(lease)
        assert use.take() == MarkerTaken()

    @pytest.mark.parametrize("outcome", [DONE, DECLINED, EncodedOutcome(body=b"\x00\xff", codec="json")])
    def test_a_pending_outcome_is_kept_with_its_fence(self, use: MarkerInUse, outcome: EncodedOutcome) -> None:
        """What SQL would not take is told to the next delivery, with the token and owner it was made under (F57)."""
        lease = use.taken(token=1_700_000_000_000_000)
        assert use.keep(lease, outcome)
        assert use.keep(lease, outcome)
        pending = use.pending()
        assert (pending.owner, pending.fencing_token) == (lease.owner, 1_700_000_000_000_000)
        assert pending.fingerprint == lease.request.fingerprint
        assert pending.outcome == outcome

    def test_a_pending_outcome_outlives_the_lease(self, use: MarkerInUse) -> None:
        """It is kept for the retention, not for what is left of the lease."""
        lease = use.taken(lease=SHORT)
        assert use.keep(lease)
        use.let_expire(SHORT)
        assert use.pending().owner == lease.owner

    def test_a_pending_outcome_is_kept_where_the_marker_vanished(self, use: MarkerInUse) -> None:
        """A marker that was evicted does not take the outcome with it."""
        lease = use.taken()
        use.drop("key")
        assert use.keep(lease)
        assert use.pending().owner == lease.owner

    def test_a_pending_outcome_never_replaces_anothers(self, use: MarkerInUse) -> None:
        """Over another's running, finished or pending marker nothing is kept."""
        stranger = Lease(use.request(), 1)
        lease = use.taken()
        assert not use.keep(stranger, OTHER)
        assert isinstance(use.take(), MarkerRunning)
        assert use.keep(lease)
        assert not use.keep(stranger, OTHER)
        assert use.pending().outcome == DONE
        published = use.taken("published")
        use.publish(published)
        assert not use.keep(Lease(use.request("published"), 1), OTHER)
        assert isinstance(use.take("published"), MarkerFinished)

    def test_a_pending_outcome_gives_way_to_the_record(self, use: MarkerInUse) -> None:
        """Once it is recorded, the same owner's publish takes it away: the next duplicate asks the record (F53)."""
        lease = use.taken()
        use.keep(lease)
        use.publish(lease)
        use.taken()

    def test_only_the_marker_that_this_take_set_becomes_an_outcome(self, use: MarkerInUse) -> None:
        """One set by another take of the same owner may have come after a person forgot the record (F53)."""
        lease = use.taken()
        again = lease.request.again()
        assert use.take(again) == MarkerTaken()
        use.publish(Lease(again, 1))
        other = use.taken()
        use.publish(Lease(replace(other.request, take=None), 1))
        use.taken()

    def test_only_exactly_this_pending_marker_is_dropped(self, use: MarkerInUse) -> None:
        """What replaced it meanwhile stays."""
        lease = use.taken()
        use.keep(lease)
        pending = use.pending()
        use.driver(use.marker.drop_pending(use.scope, "key", pending))
        newer = use.taken(token=2)
        use.driver(use.marker.drop_pending(use.scope, "key", pending))
        assert isinstance(use.take(), MarkerRunning)
        use.keep(newer, OTHER)
        use.driver(use.marker.drop_pending(use.scope, "key", pending))
        assert use.pending().outcome == OTHER

    def test_drop_deletes_whatever_stands(self, use: MarkerInUse) -> None:
        """What a person forgets is forgotten here too, in any state, also where nothing stands."""
        use.taken("running")
        use.publish(use.taken("finished"))
        use.keep(use.taken("pending"))
        use.drop("running", "finished", "pending", "nothing")
        use.drop()
        for key in ("running", "finished", "pending", "nothing"):
            assert use.take(key) == MarkerTaken()

    @pytest.mark.parametrize("keys", MEETING_KEYS, ids=range(len(MEETING_KEYS)))
    def test_keys_are_compared_byte_by_byte(self, use: MarkerInUse, keys: tuple[str, ...]) -> None:
        """Keys that look alike have different markers (F51)."""
        for key in keys:
            use.taken(key)

    def test_one_of_a_hundred_takes_it(self, use: MarkerInUse) -> None:
        """Of 100 simultaneous tries one takes the marker."""
        answers = use.driver.together([partial(use.marker.take, use.request()) for _ in range(WORKERS)])
        assert answers.count(MarkerTaken()) == 1
        assert sum(isinstance(answer, MarkerRunning) for answer in answers) == WORKERS - 1

    def test_a_closed_tier_opens_again(self, use: MarkerInUse) -> None:
        """After `close` the tier may be used again."""
        use.taken()
        use.driver(use.marker.close())
        assert isinstance(use.take(), MarkerRunning)

    def test_a_second_event_loop_may_use_it(self, use: MarkerInUse, marker: Marker) -> None:
        """A tier outlives an event loop (F54)."""
        if "asyncio" not in self.runtimes:
            pytest.skip("this marker tier does not serve asyncio")
        use.taken()
        with Driver("asyncio") as second:
            other = marker.on("asyncio", Announcer(()))
            assert isinstance(second(other.take(use.request())), MarkerRunning)
            second(other.close())
        assert isinstance(use.take(), MarkerRunning)
