"""A Celery task of many messages: put back while one of them runs elsewhere, and delivered again after a crash."""

from __future__ import annotations

import pytest

from idem_tasks.errors import BatchError
from tests.integration.celery.workers import Shop

SECONDS = 20.0


def test_a_batch_comes_again_while_a_message_runs_elsewhere(shop: Shop, unique_name: str) -> None:
    """What is new in it runs at once; the task comes again until the rest has its outcome too (F31, F38)."""
    a, b = f"{unique_name}-a", f"{unique_name}-b"
    charged = shop.send("charge", a, hold=True)
    shop.ledger.wait("started", a)
    shipped = shop.send("ship", [b, a])
    shop.ledger.wait("put_back_BatchError", a, count=2)
    assert shop.ledger.count("put_back", b) == 0
    shop.go(a)
    assert charged.get(timeout=SECONDS) == f"charged {a} 1"
    assert shipped.get(timeout=SECONDS) == [f"shipped {b}", f"charged {a} 1"]
    assert [shop.ledger.count("effect", order) for order in (a, b)] == [1, 1]


def test_a_message_that_failed_is_celerys(shop: Shop, unique_name: str) -> None:
    """A message's own exception fails the task, as a handler's does; the others are recorded, and not run again."""
    good, bad = f"{unique_name}-good", f"{unique_name}-fails"
    for _ in range(2):
        with pytest.raises(BatchError, match=r"1 of 2 messages have no outcome \(ValueError\)"):
            shop.send("ship", [good, bad]).get(timeout=SECONDS)
    assert [shop.ledger.count("effect", order) for order in (good, bad)] == [1, 2]


def test_a_worker_killed_in_the_midst_of_a_batch(shop: Shop, unique_name: str) -> None:
    """Delivered again, every message of it runs once more and has its outcome; a later batch runs none of them."""
    orders = [f"{unique_name}-first", f"{unique_name}-dies", f"{unique_name}-last"]
    assert shop.send("ship", orders).get(timeout=SECONDS) == [f"shipped {order}" for order in orders]
    assert [shop.ledger.count("effect", order) for order in orders] == [2, 1, 1]
    assert [shop.ledger.count("taken_over", order) for order in orders] == [1, 1, 1]
    assert shop.send("ship", orders[::-1]).get(timeout=SECONDS) == [f"shipped {order}" for order in orders[::-1]]
    assert [shop.ledger.count("effect", order) for order in orders] == [2, 1, 1]


def test_under_hold_a_killed_batch_waits_for_a_person(shop: Shop, unique_name: str) -> None:
    """No message of it runs again, for nobody knows which of them were done: each is in doubt, and the task fails."""
    orders = [f"{unique_name}-first", f"{unique_name}-last"]
    with pytest.raises(BatchError, match="InDoubtError"):
        shop.send("ship_in_doubt", orders).get(timeout=SECONDS)
    assert [shop.ledger.count("effect", order) for order in orders] == [1, 0]
    assert [shop.ledger.count("in_doubt", order) for order in orders] == [1, 1]
