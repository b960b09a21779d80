"""Every kind of Celery task, on a real prefork worker, on Redis and on RabbitMQ."""

from decimal import Decimal

import pytest
from celery import states

from idem_tasks import Idempotency, State
from tests.integration.celery.workers import Shop

SECONDS = 20.0


def record_state(shop: Shop, scope: str, key: str) -> State | None:
    idempotency = Idempotency.from_urls(database_url=shop.store["database_url"])
    record = idempotency.get(scope, key)
    idempotency.close()
    return None if record is None else record.state


@pytest.mark.parametrize("task", ["charge", "shared", "refund", "exact"])
def test_a_duplicate_gets_the_recorded_outcome(shop: Shop, unique_name: str, task: str) -> None:
    """Bound, shared, class-based or plain: three messages, one effect, one outcome, scope is the task's name."""
    results = [shop.send(task, unique_name) for _ in range(3)]
    values = [result.get(timeout=SECONDS) for result in results]
    assert values[0] == values[1] == values[2]
    assert shop.ledger.count("effect", unique_name) == 1
    assert shop.ledger.count("replayed", unique_name) == 2
    assert record_state(shop, f"shop.{task}", unique_name) is State.COMPLETED


def test_the_decorator_sees_the_models_of_a_pydantic_task(shop: Shop, unique_name: str) -> None:
    """The key is taken from the model, and the duplicate gets a model that Celery sends as the first one."""
    order = {"id": unique_name, "amount": "1.10"}
    first, second = (shop.send("pydantic", order).get(timeout=SECONDS) for _ in range(2))
    assert first == second == order
    assert [row.details["type"] for row in shop.ledger.rows("effect", unique_name)] == ["Order"]


def test_a_retry_that_meets_its_own_claim_is_put_back(shop: Shop, unique_name: str) -> None:
    """F34: self.retry publishes before it raises; with countdown 0 the retry comes while the claim still stands."""
    result = shop.send("retry_now", unique_name)
    assert result.get(timeout=SECONDS) == 1, "putting back does not count as a retry"
    assert shop.ledger.count("effect", unique_name) == 1
    assert shop.ledger.count("put_back", unique_name) >= 1
    assert result.state == states.SUCCESS


def test_autoretry_retries_and_records_no_failure(shop: Shop, unique_name: str) -> None:
    """F32, F37: the claim is released before the exception leaves, so each retry runs the handler."""
    assert shop.send("autoretry", unique_name).get(timeout=SECONDS) == 2
    assert shop.send("autoretry", unique_name).get(timeout=SECONDS) == 2
    assert shop.ledger.count("started", unique_name) == 3
    assert shop.ledger.count("effect", unique_name) == 1


@pytest.mark.parametrize("what", ["ignore", "reject", "error"])
def test_what_ends_without_an_outcome_is_released(shop: Shop, unique_name: str, what: str) -> None:
    """Ignore, Reject and a handler's own exception leave nothing behind that a next message would meet."""
    result = shop.send("raises", unique_name, what)
    shop.ledger.wait("released", unique_name)
    assert record_state(shop, "shop.raises", unique_name) is State.RELEASED
    if what == "error":
        with pytest.raises(ValueError, match="no"):
            result.get(timeout=SECONDS)
    assert shop.send("raises", unique_name, what).get(timeout=SECONDS) == "done"
    assert shop.ledger.count("effect", unique_name) == 1


def test_reject_with_requeue_comes_back(shop: Shop, unique_name: str) -> None:
    """The handler's own Reject goes on to Celery, and the same message runs again."""
    assert shop.send("raises", unique_name, "again").get(timeout=SECONDS) == "done"
    assert shop.ledger.count("started", unique_name) == 2


def test_an_early_acknowledged_task_is_put_back_too(shop: Shop, unique_name: str) -> None:
    """Without acks_late a duplicate in progress waits for its outcome just the same (F31)."""
    first = shop.send("early", unique_name, hold=True)
    shop.ledger.wait("started", unique_name)
    second = shop.send("early", unique_name)
    shop.ledger.wait("put_back", unique_name)
    shop.go(unique_name)
    assert first.get(timeout=SECONDS) == second.get(timeout=SECONDS) == "done"
    assert shop.ledger.count("effect", unique_name) == 1


def test_a_soft_limit_interrupts_and_releases(shop: Shop, unique_name: str) -> None:
    """The handler sees SoftTimeLimitExceeded, and the next message runs."""
    result = shop.send("limited", unique_name)
    shop.ledger.wait("released", unique_name)
    assert result.get(timeout=SECONDS, propagate=False).__class__.__name__ == "SoftTimeLimitExceeded"
    assert shop.send("limited", unique_name).get(timeout=SECONDS) == "done"
    assert shop.ledger.count("soft_limit", unique_name) == 1
    assert shop.ledger.count("effect", unique_name) == 1


def test_a_hard_limit_does_not_hold_up_the_key(shop: Shop, unique_name: str) -> None:
    """The killed handler's message fails, as Celery says, and the next one of that key runs, after at most a lease."""
    failed = shop.send("hard_limited", unique_name).get(timeout=SECONDS, propagate=False)
    assert "TimeLimitExceeded" in repr(failed)
    assert shop.send("hard_limited", unique_name).get(timeout=SECONDS) == "done"
    assert shop.ledger.count("started", unique_name) == 2


def test_a_killed_child_loses_nothing(shop: Shop, unique_name: str) -> None:
    """SIGKILL in mid-run: the message comes back, waits for the dead holder's lease, and is taken over (F15, F33)."""
    result = shop.send("dies", unique_name)
    assert result.get(timeout=SECONDS) == 2
    assert shop.ledger.count("taken_over", unique_name) == 1
    assert shop.ledger.count("effect", unique_name) == 2, "rerun: at least once when a worker dies in mid-run"


def test_a_killed_child_leaves_a_doubt_under_hold(shop: Shop, unique_name: str) -> None:
    """SIGKILL after the effect and before its record: the message comes back, and nobody runs it again (F15)."""
    failed = shop.send("dies_in_doubt", unique_name).get(timeout=SECONDS, propagate=False)
    assert "InDoubtError" in repr(failed)
    assert shop.ledger.count("effect", unique_name) == 1
    assert record_state(shop, "shop.dies_in_doubt", unique_name) is State.IN_DOUBT


def test_a_message_that_kills_its_worker_is_parked(shop: Shop, unique_name: str) -> None:
    """F42: crashes are counted when the key is taken over, so that a poisoned message ends, and is seen."""
    failed = shop.send("kills", unique_name).get(timeout=SECONDS, propagate=False)
    assert "ParkedError" in repr(failed)
    assert shop.ledger.count("started", unique_name) == 2
    assert record_state(shop, "shop.kills", unique_name) is State.PARKED


def test_a_decimal_survives(shop: Shop, unique_name: str) -> None:
    """What an annotation says comes back as that, for whoever asks the result backend."""
    first, second = (shop.send("annotated", unique_name).get(timeout=SECONDS) for _ in range(2))
    assert first == second
    assert first[1] == Decimal("1.10")
