"""What a process keeps of recorded outcomes: so many, so large, for so long, and not what was forgotten."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from idem_tasks import Policy
from idem_tasks.claims import ClaimRequest, EncodedOutcome, Finished, State, new_owner
from idem_tasks.errors import ConfigurationError
from idem_tasks.stores.local_cache import LARGEST, LocalCache
from idem_tasks.testing import ManualClock

SIZE, TTL = 3, 60.0


def request(key: str = "A-1", fingerprint: str | None = "f", **policy: Any) -> ClaimRequest:
    return ClaimRequest("scope", key, fingerprint, new_owner(), Policy(**policy))


def finished(body: bytes = b"1", *, expires_in: float = 3600.0, fingerprint: str | None = "f") -> Finished:
    return Finished(EncodedOutcome(body=body, codec="json"), fingerprint, expires_in, fencing_token=7, traceparent="00")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1000.0)


@pytest.fixture
def cache(clock: ManualClock) -> LocalCache:
    return LocalCache(SIZE, TTL, clock)


def keep(cache: LocalCache, key: str = "A-1", answer: Finished | None = None, **policy: Any) -> None:
    cache.keep(request(key, **policy), answer or finished(), cache.question())


def test_what_is_kept_is_answered(cache: LocalCache, clock: ManualClock) -> None:
    """As the store told it, but for what is left of its retention; for its own scope and key only."""
    keep(cache)
    clock.advance(10)
    assert cache.answer(request()) == finished(expires_in=3590.0)
    assert cache.answer(request("A-2")) is None
    assert cache.answer(ClaimRequest("other", "A-1", "f", new_owner(), Policy())) is None


def test_a_failure_is_kept_too(cache: LocalCache) -> None:
    """It is final, as a value is."""
    failure = Finished(EncodedOutcome(State.FAILED, error_type="E", error_message="no"), None, 3600.0)
    keep(cache, answer=failure)
    assert cache.answer(request()) == failure


@pytest.mark.parametrize("asked, kept, is_answered", [("f", "g", False), (None, "g", True), ("f", None, True)])
def test_other_arguments_are_the_stores_to_refuse(
    cache: LocalCache, asked: str | None, kept: str | None, is_answered: bool
) -> None:
    """What was forgotten elsewhere must not end a new message as a mismatch."""
    keep(cache, answer=finished(fingerprint=kept))
    assert (cache.answer(request(fingerprint=asked)) is not None) is is_answered


@pytest.mark.parametrize(
    "expires_in, policy, lasts",
    [(3600.0, {}, TTL), (5.0, {}, 5.0), (3600.0, {"cache_ttl": 20}, 20.0), (3600.0, {"retention": 10}, 10.0)],
    ids=["its time", "retention that is left", "cache_ttl", "retention"],
)
def test_it_lasts_as_long_as_the_shortest(
    cache: LocalCache, clock: ManualClock, expires_in: float, policy: dict[str, Any], lasts: float
) -> None:
    """From when the store was asked, not from when it answered; being asked for does not make it last longer."""
    question = cache.question()
    clock.advance(1)
    cache.keep(request(**policy), finished(expires_in=expires_in), question)
    clock.advance(lasts - 1.5)
    assert cache.answer(request()) is not None
    clock.advance(0.5)
    assert cache.answer(request()) is None
    assert len(cache) == 0


def test_what_has_no_time_left_is_not_kept(cache: LocalCache) -> None:
    """Its retention was over when it was answered: it takes no room from another."""
    for number in range(SIZE):
        keep(cache, f"A-{number}")
    keep(cache, "over", finished(expires_in=0.0))
    assert [cache.answer(request(f"A-{number}")) is not None for number in range(SIZE)] == [True] * SIZE
    assert cache.answer(request("over")) is None


def test_a_large_outcome_is_not_kept(cache: LocalCache) -> None:
    """So that as many as there may be are no more bytes than the documents say."""
    keep(cache, "fits", finished(b"x" * LARGEST))
    keep(cache, "large", finished(b"x" * (LARGEST + 1)))
    assert cache.answer(request("fits")) is not None
    assert cache.answer(request("large")) is None


def test_an_answer_from_before_a_drop_is_not_kept(cache: LocalCache) -> None:
    """It was on its way while a person forgot the record, whichever one: that is rare."""
    question = cache.question()
    cache.drop([("scope", "A-1")])
    cache.keep(request(), finished(), question)
    assert cache.answer(request()) is None
    keep(cache)
    assert cache.answer(request()) is not None


def test_what_is_dropped_is_gone(cache: LocalCache) -> None:
    """And nothing else; what is not there may be dropped."""
    keep(cache)
    keep(cache, "A-2")
    cache.drop([("scope", "A-1"), ("scope", "unknown")])
    assert cache.answer(request()) is None
    assert cache.answer(request("A-2")) is not None


class LeastRecentlyUsed(RuleBasedStateMachine):
    """The cache beside the plainest model of it: a list in the order of use."""

    keys = st.sampled_from("abcdef")

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock(1000.0)
        self.cache = LocalCache(SIZE, TTL, self.clock)
        self.model: OrderedDict[str, tuple[bytes, float]] = OrderedDict()

    @rule(key=keys, body=st.binary(max_size=2), expires_in=st.sampled_from([30.0, 600.0]))
    def keep(self, key: str, body: bytes, expires_in: float) -> None:
        keep(self.cache, key, finished(body, expires_in=expires_in))
        self.model.pop(key, None)
        self.model[key] = body, self.clock() + min(TTL, expires_in)
        while len(self.model) > SIZE:
            self.model.popitem(last=False)

    @rule(key=keys)
    def ask(self, key: str) -> None:
        answer = self.cache.answer(request(key))
        body, until = self.model.get(key, (b"", 0.0))
        if self.clock() < until:
            self.model.move_to_end(key)
            assert answer is not None
            assert answer.outcome.body == body
        else:
            self.model.pop(key, None)
            assert answer is None

    @rule(key=keys)
    def forget(self, key: str) -> None:
        self.cache.drop([("scope", key)])
        self.model.pop(key, None)

    @rule(seconds=st.sampled_from([1.0, 29.0, 31.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def is_bounded(self) -> None:
        assert len(self.cache) == len(self.model) <= SIZE


TestLeastRecentlyUsed = LeastRecentlyUsed.TestCase


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(0, 2 * LARGEST), max_size=12))
def test_the_bytes_are_bounded(sizes: list[int]) -> None:
    """By its number times the largest outcome that is kept."""
    cache = LocalCache(SIZE, TTL)
    for number, size in enumerate(sizes):
        keep(cache, str(number), finished(bytes(size)))
    answers = [cache.answer(request(str(number))) for number in range(len(sizes))]
    kept = [len(answer.outcome.body or b"") for answer in answers if answer is not None]
    assert kept == [size for size in sizes if size <= LARGEST][-SIZE:]
    assert sum(kept) <= SIZE * LARGEST


def test_threads_that_meet_keep_its_bounds() -> None:
    """Many keep, ask and drop at once: nobody gets another key's outcome, and no more are kept than may be."""
    cache, barrier = LocalCache(SIZE, TTL), threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait(30)
        for turn in range(500):
            key = str((number + turn) % 6)
            keep(cache, key, finished(key.encode()))
            answer = cache.answer(request(key))
            assert answer is None or answer.outcome.body == key.encode()
            if turn % 50 == 0:
                cache.drop([("scope", key)])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert 0 < len(cache) <= SIZE


def test_a_forked_child_begins_with_an_empty_one(cache: LocalCache) -> None:
    """It would not hear what its parent forgets; and the lock's holder may be a thread that it has not."""
    keep(cache)
    with cache._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if cache.answer(request()) is None and len(cache) == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert cache.answer(request()) is not None


@pytest.mark.parametrize(
    "size, ttl", [(-1, TTL), (True, TTL), (1.5, TTL), (1, -1), (1, 0), (1, "60"), (1, float("inf"))]
)
def test_bounds_that_are_none_are_refused(size: Any, ttl: Any) -> None:
    """When it is made, not when it is full."""
    with pytest.raises(ConfigurationError, match="local_cache"):
        LocalCache(size, ttl)


def test_its_time_may_be_a_timedelta() -> None:
    """As every duration."""
    clock = ManualClock()
    cache = LocalCache(1, timedelta(minutes=2), clock)
    keep(cache)
    clock.advance(119)
    assert cache.answer(request()) is not None
