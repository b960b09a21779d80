"""A message that cannot be handled now comes back later: the same message, not too soon, and never lost."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery, group

from idem_tasks.integrations.celery_put_back import delay_of
from tests.integration.celery.limited_queue import limited_queue
from tests.integration.celery.workers import LEASE, Shop

SECONDS = 20.0


def test_the_copy_is_the_same_message(shop: Shop, unique_name: str) -> None:
    """Task id, root, parent, group, headers, retries, links and limits: all but the delay and the count (F31)."""
    shop.send("charge", unique_name, hold=True)
    shop.ledger.wait("started", unique_name)
    options: dict[str, Any] = {
        "headers": {"tenant": "t-1"},
        "retries": 2,
        "expires": 600,
        "time_limit": 50,
        "soft_time_limit": 40,
        "shadow": "charging",
        "root_id": "the-root",
        "group_id": "the-group",
        "group_index": 3,
        "link": shop.task("collect", unique_name),
        "link_error": shop.task("collect", unique_name),
        "argsrepr": "hidden",
        "priority": 5,
    }
    plain = shop.send("charge", unique_name)
    result = shop.send("charge", unique_name, options=options)
    shop.ledger.wait("put_back", unique_name, count=2)
    shop.go(unique_name)
    assert result.get(timeout=SECONDS) == plain.get(timeout=SECONDS) == f"charged {unique_name} 1"
    seen = Counter(row.details["id"] for row in shop.ledger.rows("seen", unique_name))
    assert all(seen[one.id] >= 2 for one in (plain, result)), seen
    for one in (plain, result):
        copies = copies_of(shop, unique_name, one.id)
        for copy in copies[1:]:
            assert copy == copies[0]
    assert copies_of(shop, unique_name, result.id)[0]["headers"]["tenant"] == "t-1"
    assert copies_of(shop, unique_name, result.id)[0]["argsrepr"] == "hidden"
    assert copies_of(shop, unique_name, plain.id)[0]["parent_id"] is None


def copies_of(shop: Shop, order: str, task_id: str) -> list[dict[str, Any]]:
    return [row.details for row in shop.ledger.rows("seen", order) if row.details["id"] == task_id]


def test_duplicates_do_not_spin(shop: Shop, unique_name: str) -> None:
    """Five duplicates, held up for three leases: a few deliveries each, not hundreds; then all have it (F64)."""
    first = shop.send("charge", unique_name, hold=True)
    shop.ledger.wait("started", unique_name)
    duplicates = group(shop.task("charge", unique_name) for _ in range(5)).apply_async()
    shop.ledger.wait("put_back", unique_name, count=15)
    shop.go(unique_name)
    assert duplicates.get(timeout=SECONDS) == [first.get(timeout=SECONDS)] * 5
    assert shop.ledger.count("effect", unique_name) == 1
    put_back = shop.ledger.rows("put_back", unique_name)
    counts = Counter(row.details["count"] for row in put_back)
    assert counts[1] == counts[2] == 5, "each copy carries how often it was put back (F64)"
    took = put_back[-1].at - put_back[0].at
    assert len(put_back) < 5 * (2 + took / (LEASE / 2))
    assert all(row.details["delay"] <= 10 for row in put_back)


@pytest.mark.parametrize("broker", ["rabbitmq"])
def test_putting_back_uses_up_no_delivery(own_shop: Callable[..., Shop], unique_name: str) -> None:
    """F40: a quorum queue drops what is delivered more than twice; a duplicate may be put back more often."""
    shop = own_shop()
    shop.client.conf.task_queues = [limited_queue(shop.name, deliveries=2)]
    shop.start("threads", 2, SHOP_DELIVERY_LIMIT="2")
    first = shop.send("charge", unique_name, hold=True)
    shop.ledger.wait("started", unique_name)
    duplicate = shop.send("charge", unique_name)
    shop.ledger.wait("put_back", unique_name, count=5)
    shop.go(unique_name)
    assert duplicate.get(timeout=SECONDS) == first.get(timeout=SECONDS) == f"charged {unique_name} 1"


def test_arguments_that_the_handler_changed_are_sent_unchanged(shop: Shop, unique_name: str) -> None:
    """F18: what is put back is what came, so that its fingerprint still matches."""
    order = {"id": unique_name, "state": "new"}
    first = shop.send("changes", order)
    shop.ledger.wait("started", unique_name)
    second = shop.send("changes", order)
    shop.ledger.wait("put_back", unique_name)
    shop.go(unique_name)
    assert first.get(timeout=SECONDS) == second.get(timeout=SECONDS) == "done"


def test_a_handler_that_changed_its_argument_gets_it_again_as_it_was_sent(shop: Shop, unique_name: str) -> None:
    """F18: also the copy whose own handler changed it before it was put back."""
    order = {"id": unique_name, "state": "new"}
    assert shop.send("changes_and_comes_again", order).get(timeout=SECONDS) == "new"
    assert shop.ledger.count("put_back", unique_name) == 1


def test_a_soft_limit_while_it_waits_puts_it_back(shop: Shop, unique_name: str) -> None:
    """Nothing has run: Celery would fail and acknowledge it, and if the holder then died nobody would run it (F31)."""
    first = shop.send("charge", unique_name, hold=True)
    shop.ledger.wait("started", unique_name)
    waiting = shop.send("patient", unique_name)
    shop.ledger.wait("put_back", unique_name)
    shop.go(unique_name)
    assert waiting.get(timeout=SECONDS) == first.get(timeout=SECONDS)


def test_a_second_call_within_a_delivery_is_put_back_too(shop: Shop, unique_name: str) -> None:
    """A wrapper that retries may stand between Celery and the decorator; its last call is the one that settles."""
    assert shop.send("insistent", unique_name).get(timeout=SECONDS) == "done"
    assert shop.ledger.count("put_back", unique_name) == 1
    assert shop.ledger.count("started", unique_name) == 3


@pytest.mark.parametrize("visibility_timeout", [2, 60, 3600, 43200])
def test_no_delay_reaches_a_quarter_of_the_visibility_timeout(visibility_timeout: int) -> None:
    """F64: a copy that is held longer than the visibility timeout would be delivered twice."""
    app = Celery("unused", set_as_current=False)
    app.conf.broker_transport_options = {"visibility_timeout": visibility_timeout}
    delays = [delay_of(app, random.choice([0, 1, 60, 1e6]), count) for count in range(1000)]
    assert max(delays) < visibility_timeout / 4
    assert min(delays) >= min(0.5, visibility_timeout / 5)


def test_the_delay_is_the_rest_of_the_lease_and_grows() -> None:
    """Somebody else's lease is waited out; an outage is asked after less and less often (F40, F64)."""
    app = Celery("unused", set_as_current=False)
    assert 40 <= delay_of(app, 40, 0) <= 48
    assert 0.5 <= delay_of(app, 0, 0) <= 0.6
    assert 32 <= delay_of(app, 0, 6) <= 38.4
    assert 300 <= delay_of(app, 0, 10**9) <= 360
