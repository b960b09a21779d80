"""What the demo publishes, and what it takes for a fault: that it runs is in tests/integration/test_demo.py."""

import dataclasses
from collections import Counter
from typing import Any

import pytest

from idem_tasks.demo.orders import make_orders, messages_for, victim_of
from idem_tasks.demo.report import Report, Tally

RIGHT = Tally(deliveries=8, effects=3, expected=3, lost=0, duplicated=0, cents=600, unsettled=0)
EXACT = Report(
    messages=7,
    owed=600,
    sides={"without": dataclasses.replace(RIGHT, effects=7, duplicated=4, cents=1400), "with": RIGHT},
    runs=4,
    replays=4,
    waits=0,
    takeovers=1,
    completed=3,
    records=3,
)


@pytest.mark.parametrize("count", [1, 2, 10, 1000])
def test_every_order_comes_twice_or_three_times(count: int) -> None:
    """Under an id and with an amount of its own; the one whose charge is killed comes first, and again at once."""
    orders = make_orders(count)
    assert len({order.order_id for order in orders}) == count
    assert all(order.cents > 0 for order in orders)
    times = Counter(messages_for(orders))
    assert set(times) == set(orders)
    assert set(times.values()) <= {2, 3}
    assert messages_for(orders)[:2] == [victim_of(orders)] * 2


def test_an_exact_column_has_no_fault() -> None:
    """However many duplicates the other one has."""
    assert EXACT.faults == []


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"lost": 1}, "1 orders were never charged"),
        ({"duplicated": 2}, "2 charges were duplicates"),
        ({"cents": 500}, "the money taken is not the money owed"),
        ({"unsettled": 1}, "1 messages were never settled"),
    ],
)
def test_whatever_is_wrong_with_the_charges_is_a_fault(change: dict[str, int], fault: str) -> None:
    """In the protected column only."""
    wrong = dataclasses.replace(RIGHT, **change)
    assert dataclasses.replace(EXACT, sides={**EXACT.sides, "with": wrong}).faults == [fault]
    assert dataclasses.replace(EXACT, sides={**EXACT.sides, "without": wrong}).faults == []


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"completed": 2}, "2 of 3 records are completed, for 3 orders"),
        ({"records": 4}, "3 of 4 records are completed, for 3 orders"),
        ({"takeovers": 0}, "nobody took over the order whose charge was killed"),
    ],
)
def test_whatever_is_wrong_with_the_records_is_a_fault(change: dict[str, Any], fault: str) -> None:
    """Also a demo in which nothing was taken over: it would have shown nothing."""
    assert dataclasses.replace(EXACT, **change).faults == [fault]
