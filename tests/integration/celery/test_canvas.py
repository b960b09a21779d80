"""Chains, groups, chords and links with duplicates in them: each caller sees one outcome, and everything fires."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from celery import chain, chord, group

from tests.integration.celery.workers import Shop

SECONDS = 20.0


def test_a_chain_runs_each_step_once(shop: Shop, unique_name: str) -> None:
    """The chain sent twice: both end with the same outcome, and no step ran twice."""
    steps = [f"{unique_name}-{number}" for number in range(3)]

    def send() -> Any:
        return chain(shop.task("add", "0", steps[0]), *(shop.task("add", step) for step in steps[1:])).apply_async()

    first, second = send(), send()
    expected = f"0+{steps[0]}+{steps[1]}+{steps[2]}"
    assert first.get(timeout=SECONDS) == second.get(timeout=SECONDS) == expected
    assert [shop.ledger.count("effect", step) for step in steps] == [1, 1, 1]


def test_a_group_with_duplicates_is_complete(shop: Shop, unique_name: str) -> None:
    """Three copies of A and one B: four results, two effects."""
    a, b = f"{unique_name}-A", f"{unique_name}-B"
    results = group(shop.task("add", "0", key) for key in (a, a, b, a)).apply_async()
    assert results.get(timeout=SECONDS) == [f"0+{a}", f"0+{a}", f"0+{b}", f"0+{a}"]
    assert (shop.ledger.count("effect", a), shop.ledger.count("effect", b)) == (1, 1)


@pytest.mark.parametrize("order", ["AAB", "ABA"])
@pytest.mark.parametrize("task", ["exact", "annotated"])
def test_a_chord_with_duplicates_fires_once_with_exact_values(
    shop: Shop, unique_name: str, order: str, task: str
) -> None:
    """[A, A', B] and [A, B, A']: a replay is the same value as the run, datetime and Decimal too, and counts once."""
    keys = [f"{unique_name}-{letter}" for letter in order]
    body = shop.task("collect", unique_name)
    values = chord([shop.task(task, key) for key in keys], body).apply_async().get(timeout=SECONDS)
    at, amount = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC), Decimal("1.10")
    if task == "exact":
        assert values == [{"at": at, "amount": amount, "order": key, "nothing": None} for key in keys]
    else:
        assert values == [[at, amount]] * 3
    assert shop.ledger.count("collected", unique_name) == 1
    assert [shop.ledger.count("effect", key) for key in sorted(set(keys))] == [1, 1]


def test_a_chord_waits_for_a_member_that_was_put_back(shop: Shop, unique_name: str) -> None:
    """A member in progress elsewhere is put back with its chord, and the chord fires when it has its outcome."""
    member, other = f"{unique_name}-A", f"{unique_name}-B"
    alone = shop.send("charge", member, hold=True)
    shop.ledger.wait("started", member)
    result = chord([shop.task("charge", member), shop.task("charge", other)], shop.task("collect", unique_name))()
    shop.ledger.wait("put_back", member)
    assert shop.ledger.count("collected", unique_name) == 0
    shop.go(member)
    assert result.get(timeout=SECONDS) == [f"charged {member} 1", f"charged {other} 1"]
    assert alone.get(timeout=SECONDS) == f"charged {member} 1"
    assert shop.ledger.count("effect", member) == 1
    assert shop.ledger.count("collected", unique_name) == 1


def test_a_replay_calls_its_links_again(shop: Shop, unique_name: str) -> None:
    """Each copy of a message dispatches its links: so they need keys of their own, as here."""
    linked = f"{unique_name}-linked"
    for _ in range(2):
        shop.send("charge", unique_name, options={"link": shop.task("add", linked)}).get(timeout=SECONDS)
    shop.ledger.wait("replayed", linked)
    assert shop.ledger.count("effect", linked) == 1
    [row] = shop.ledger.rows("effect", linked)
    assert row.details["before"] == f"charged {unique_name} 1"
