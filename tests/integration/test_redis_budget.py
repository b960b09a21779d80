"""What each verb costs in round trips, and that every key it leaves has a time to live."""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import redis.asyncio.connection
import redis.connection
from redis import Redis

from idem_tasks.claims import (
    ClaimRequest,
    EncodedOutcome,
    Finished,
    Granted,
    InDoubt,
    Lease,
    Parked,
    Recorded,
    Release,
    State,
    new_owner,
)
from idem_tasks.events import Announcer
from idem_tasks.policy import Policy
from idem_tasks.runtime import run_sync
from idem_tasks.stores.base import MarkerFinished, MarkerPending, MarkerRunning, MarkerTaken, RuntimeName
from idem_tasks.stores.redis import RedisStore
from idem_tasks.testing.driver import Driver

DONE = EncodedOutcome(body=b'"done"', codec="json")
FAILED = EncodedOutcome(State.FAILED, error_type="E", error_message="no")

YEAR = 365 * 86400.0


def request(key: str = "key", **policy: Any) -> ClaimRequest:
    return ClaimRequest("scope", key, "f" * 64, new_owner(), Policy(**policy))


class Costs:
    """Runs verbs, and asserts how often something was sent for each and that no key is without a time to live."""

    def __init__(self, url: str, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
        self.url = url
        self.driver = driver
        self.sent = 0
        self.store = RedisStore(url).on(driver.runtime, Announcer(()))
        kind: Any = redis.connection if driver.runtime == "blocking" else redis.asyncio.connection
        send = kind.AbstractConnection.send_packed_command

        def count(*args: Any, **kwargs: Any) -> Any:
            self.sent += self.counting
            return send(*args, **kwargs)

        self.counting = 0
        monkeypatch.setattr(kind.AbstractConnection, "send_packed_command", count)
        driver(self.store.prepare())

    def __call__(self, verb: Coroutine[Any, Any, Any], cost: int = 1) -> Any:
        self.sent, self.counting = 0, 1
        answer = self.driver(verb)
        self.counting = 0
        assert self.sent == cost
        self.lifetimes()
        return answer

    def lifetimes(self) -> list[float]:
        """Return the seconds each key still has; every key has some."""
        with Redis.from_url(self.url) as client:
            left = [client.pttl(key) for key in client.scan_iter()]
        assert -1 not in left  # no expiry; -2 would be one that has just gone
        return [milliseconds / 1000 for milliseconds in left]

    def lifetime(self) -> float:
        """Return the seconds that the only key still has."""
        (left,) = self.lifetimes()
        return left


@pytest.fixture(params=["blocking", "asyncio"])
def costs(request: pytest.FixtureRequest, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Costs]:
    runtime: RuntimeName = request.param
    with Driver(runtime) as driver:
        made = Costs(redis_url, driver, monkeypatch)
        yield made
        driver(made.store.close())


def test_a_marker_verb_is_one_round_trip_and_leaves_a_time_to_live(costs: Costs) -> None:
    """One each; only who meets another's running one sends a second, to learn how long it stands, then one a look."""
    marker = costs.store
    first = request(lease=60.0, retention=3600.0)
    lease = Lease(first, 7)
    finished = Finished(DONE, None, 3600.0)
    assert costs(marker.take(first)) == MarkerTaken()
    assert costs.lifetime() == pytest.approx(60, abs=5)
    waiting = request()
    assert isinstance(costs(marker.take(waiting), cost=2), MarkerRunning)
    assert isinstance(costs(marker.take(waiting.again())), MarkerRunning)
    longer = Lease(ClaimRequest("scope", "key", None, first.owner, Policy(lease=90.0)), 7)
    costs(marker.renew_markers([longer]))
    assert costs.lifetime() == pytest.approx(90, abs=5)
    costs(marker.publish(first, finished, 1800.0))
    assert costs.lifetime() == pytest.approx(1800, abs=5)
    assert isinstance(costs(marker.take(request())), MarkerFinished)
    costs(marker.drop([("scope", "key")]))
    costs(marker.keep(lease, DONE))
    assert costs.lifetime() == pytest.approx(3600, abs=5)
    costs(marker.keep(lease, DONE))
    pending = costs(marker.take(request()))
    assert isinstance(pending, MarkerPending)
    costs(marker.drop_pending("scope", "key", pending))
    costs(marker.give_back("scope", "key", first.owner))
    costs(marker.drop([("scope", "key"), ("scope", "other")]))
    assert costs.lifetimes() == []
    costs(marker.keep(lease, DONE))
    assert costs.lifetime() == pytest.approx(3600, abs=5)


def test_any_number_of_markers_is_renewed_in_one_round_trip(costs: Costs) -> None:
    """A heartbeat is one round trip, however many claims a process holds; without any it is none."""
    leases = [Lease(request(f"key {number}"), 1) for number in range(50)]
    costs(costs.store.renew_markers(leases))
    assert len(costs.lifetimes()) == 50
    costs(costs.store.renew_markers([]), cost=0)
    costs(costs.store.renew(leases, lambda _: True))
    costs(costs.store.renew([], lambda _: True), cost=0)


def test_any_number_is_taken_published_and_given_back_in_one_round_trip(costs: Costs) -> None:
    """A batch is one of each, whatever it meets, and no key is left without an end; none is no round trip at all."""
    store = costs.store
    requests = [request(f"key {number}") for number in range(100)]
    assert costs(store.take_batch(requests)) == [MarkerTaken()] * 100
    answers = costs(store.take_batch([request(each.key) for each in requests]))
    assert all(isinstance(answer, MarkerRunning) for answer in answers)
    costs(store.publish_batch([(each, Finished(DONE, None, 3600.0), 60.0) for each in requests[:50]]))
    costs(store.give_back_batch(requests))
    assert len(costs.lifetimes()) == 50
    for verb in (store.take_batch, store.publish_batch, store.give_back_batch):
        costs(verb([]), cost=0)


def test_any_number_of_records_is_claimed_and_finished_in_one_round_trip(costs: Costs) -> None:
    """Each of a batch lives as one that was claimed and finished by itself."""
    asked = [request(f"key {number}", max_hold=60.0, retention=3600.0) for number in range(50)]
    answers = costs(costs.store.claim_batch(asked))
    assert costs.lifetimes() == pytest.approx([YEAR] * 50, abs=60)
    finished = [(answer.lease, DONE) for answer in answers]
    assert costs(costs.store.finish_batch(finished)) == [Recorded()] * 50
    assert costs.lifetimes() == pytest.approx([3660] * 50, abs=60)
    costs(costs.store.claim_batch([]), cost=0)
    costs(costs.store.finish_batch([]), cost=0)


def test_a_shorter_time_than_a_millisecond_is_one(costs: Costs) -> None:
    """Redis refuses a time to live of 0; nothing is ever rounded down to it."""
    owner = request()
    costs(costs.store.take(owner))
    costs(costs.store.publish(owner, Finished(DONE, None, 1.0), 0.0000001))
    costs.driver.poll(
        lambda: costs.store.take(request()), lambda answer: not isinstance(answer, MarkerFinished), every=0.01
    )


def test_a_record_verb_is_one_round_trip_and_leaves_a_time_to_live(costs: Costs) -> None:
    """Ended records live as long as their retention; what may wait for a person, a year."""
    store = costs.store
    short: dict[str, Any] = {"lease": 60.0, "max_hold": 60.0, "retention": 3600.0}
    granted = costs(store.claim(request(**short)))
    assert isinstance(granted, Granted)
    assert costs.lifetime() == pytest.approx(YEAR, abs=60)
    costs(store.claim(granted.lease.request))
    assert costs.lifetime() == pytest.approx(YEAR, abs=60)
    costs(store.claim(request(**short)))
    costs(store.renew([granted.lease], lambda _: True))
    assert costs.lifetime() == pytest.approx(YEAR, abs=60)
    costs(store.release(granted.lease, Release(failed=True)))
    assert costs.lifetime() == pytest.approx(3660, abs=5)
    again = costs(store.claim(request(**short)))
    assert isinstance(again, Granted)
    assert costs(store.finish(again.lease, DONE)) == Recorded()
    assert costs.lifetime() == pytest.approx(3660, abs=5)
    assert costs(store.finish(again.lease, DONE)) == Recorded()
    assert isinstance(costs(store.claim(request())), Finished)
    assert costs(store.get("scope", "key")).state is State.COMPLETED
    assert costs(store.forget("scope", "key"))
    assert costs(store.finish(again.lease, FAILED, may_insert=True), cost=3) == Recorded()
    assert costs.lifetime() == pytest.approx(3660, abs=5)


def test_what_waits_for_a_person_is_one_round_trip_and_leaves_a_time_to_live(costs: Costs) -> None:
    """In doubt, parked and resolved."""
    store = costs.store
    dying: dict[str, Any] = {"lease": 0.1, "max_hold": 0.1, "retention": 3600.0}
    costs(store.claim(request("hold", **dying)))
    costs(store.claim(request("park", **dying)))
    costs.driver.pause(0.2)
    assert costs(store.claim(request("hold", on_crash="hold"))) == InDoubt(new=True)
    assert costs(store.claim(request("park", max_crashes=0))) == Parked(1, 0, new=True)
    assert costs.lifetimes() == pytest.approx([YEAR, YEAR], abs=60)
    costs(store.resolve("scope", "hold", DONE))
    costs(store.resolve("scope", "park", None))
    assert costs.lifetimes() == pytest.approx([3600, 3600], abs=5)
    taken = costs(store.claim(request("hold again", **dying)))
    costs(store.release(taken.lease, Release(in_doubt=True)))
    assert max(costs.lifetimes()) == pytest.approx(YEAR, abs=60)


def test_the_server_counts_the_same(redis_url: str, private_redis: Callable[..., Any]) -> None:
    """By the server's own count a first take is one SET, a duplicate's replay one SET, and nothing else (F11)."""
    server = private_redis()
    store = RedisStore(server.url)
    run_sync(store.prepare())
    owner = request()
    with server.client() as client:
        client.config_resetstat()
        run_sync(store.take(owner))
        run_sync(store.publish(owner, Finished(DONE, None, 60.0), 60.0))
        for _ in range(10):
            run_sync(store.take(request()))
        calls = {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in client.info("commandstats").items()}
    run_sync(store.close())
    calls.pop("config|resetstat", None)
    # The script's own GET and SET are counted too.
    assert calls == {"set": 12, "eval": 1, "get": 1}


def test_the_self_test_is_made_once_per_client(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads share a client, and no call after the first one tests again."""
    with Driver("blocking") as driver:
        costs = Costs(redis_url, driver, monkeypatch)
        for number in range(3):
            costs(costs.store.take(request(f"key {number}")))
        thread = threading.Thread(target=lambda: run_sync(costs.store.take(request("from a thread"))))
        costs.sent, costs.counting = 0, 1
        thread.start()
        thread.join()
        assert costs.sent == 1
        costs.counting = 0
        run_sync(costs.store.close())
