"""The circuit breaker in front of the marker tier: an outage is waited for once, not by every call (F49)."""

from __future__ import annotations

import pytest

from idem_tasks.stores.breaker import CircuitBreaker
from idem_tasks.testing import ManualClock

OUTAGE = OSError("gone")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def breaker(clock: ManualClock) -> CircuitBreaker:
    return CircuitBreaker(patience=5.0, clock=clock)


def test_calls_pass_until_one_fails(breaker: CircuitBreaker) -> None:
    """A server that answers is never kept from a call."""
    for _ in range(3):
        assert breaker.wait() == 0
        breaker.answered()


def test_one_try_per_pause(breaker: CircuitBreaker, clock: ManualClock) -> None:
    """After a failure nobody calls for 1 s; then one does, and the others go on waiting (F49)."""
    breaker.failed(OUTAGE)
    assert breaker.wait() == pytest.approx(1.0)
    assert breaker.reason is OUTAGE
    clock.advance(1.0)
    assert breaker.wait() == 0
    assert breaker.wait() > 0
    breaker.answered()
    assert breaker.wait() == 0
    assert breaker.wait() == 0


def test_the_pause_doubles_up_to_half_a_minute(breaker: CircuitBreaker, clock: ManualClock) -> None:
    """The longer an outage, the rarer the tries, but never rarer than every 30 s."""
    pauses = []
    breaker.failed(OUTAGE)
    for _ in range(8):
        pauses.append(round(breaker.wait(), 3))
        clock.advance(pauses[-1] + 0.001)
        assert breaker.wait() == 0
        breaker.failed(OUTAGE)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]


def test_calls_that_fail_together_count_once(breaker: CircuitBreaker) -> None:
    """A hundred calls that were under way when the server went are one outage (F49)."""
    for _ in range(100):
        breaker.failed(OUTAGE)
    assert breaker.wait() == pytest.approx(1.0)


def test_a_try_that_never_reports_is_followed_by_another(breaker: CircuitBreaker, clock: ManualClock) -> None:
    """A try whose thread died does not keep the breaker open for ever."""
    breaker.failed(OUTAGE)
    clock.advance(1.0)
    assert breaker.wait() == 0
    clock.advance(5.0)
    assert breaker.wait() == 0
