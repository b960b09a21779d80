"""What the decorator itself costs: no server, no file, only Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.case import case
from benchmarks.measuring import Here
from benchmarks.orders import AMOUNT, charge, decorated, new_orders, ours
from benchmarks.place import Place
from idem_tasks import MemoryStore, Policy
from idem_tasks.claims import ClaimRequest, EncodedOutcome, Granted, new_owner
from idem_tasks.runtime import run_sync

GROUP = "The decorator"
BODY = b'"' + b"x" * 98 + b'"'


def claim_and_finish(store: MemoryStore, key: str, policy: Policy) -> None:
    """Do what a first call has the store do."""
    answer = run_sync(store.claim(ClaimRequest("bench", key, "f" * 64, new_owner(), policy, "bench")))
    assert isinstance(answer, Granted)
    run_sync(store.finish(answer.lease, EncodedOutcome(body=BODY, codec="json")))


@case(GROUP, "first call, `MemoryStore`", floor="its store alone", turn=200)
@contextmanager
def first_call(_place: Place) -> Iterator[dict[str, Here]]:
    """The bare handler, and the store's part of it, beside the whole."""
    with ours() as idempotency:
        call, order, store, policy = decorated(idempotency), new_orders(), MemoryStore(), Policy()
        yield {
            "ours": Here(lambda: call(order(), AMOUNT)),
            "its store alone": Here(lambda: claim_and_finish(store, order(), policy)),
            "no protection": Here(lambda: charge(order(), AMOUNT)),
        }


@case(GROUP, "duplicate, `MemoryStore`", floor="its store alone", turn=200)
@contextmanager
def duplicate(_place: Place) -> Iterator[dict[str, Here]]:
    """The same for a duplicate."""
    with ours() as idempotency:
        call, store, policy = decorated(idempotency), MemoryStore(), Policy()
        call("A-1", AMOUNT)
        claim_and_finish(store, "A-1", policy)

        def ask() -> None:
            run_sync(store.claim(ClaimRequest("bench", "A-1", "f" * 64, new_owner(), policy, "bench")))

        yield {
            "ours": Here(lambda: call("A-1", AMOUNT)),
            "its store alone": Here(ask),
            "no protection": Here(lambda: charge("A-1", AMOUNT)),
        }
