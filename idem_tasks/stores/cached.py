"""A store with a cache in this process in front of it: duplicates of what it knows cost no round trip.

Only what the store has recorded is ever kept. What is forgotten through this object is dropped at once; what other
processes forget is answered for as long as the cache says (docs/decisions/0010-local-cache.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from idem_tasks.claims import (
    AuditEntry,
    ClaimAnswer,
    ClaimRequest,
    EncodedOutcome,
    Finished,
    Lease,
    Lost,
    Recorded,
)
from idem_tasks.events import Announcer
from idem_tasks.stores.base import (
    BatchTransaction,
    RuntimeName,
    SessionSource,
    Store,
    Transaction,
    batch_store_of,
    batch_transaction_of,
    finished_by,
    sql_records,
    transaction_of,
)
from idem_tasks.stores.local_cache import LocalCache, Question


def cached(store: Store, cache: LocalCache) -> Store:
    """Return the store behind the cache, which may be shared by the same store in other runtimes and event loops."""
    return cast(Store, _CachedStore(store, cache))


class _Rest:
    """Has of its own only what it does in another way than what it wraps: so each kind of store keeps its abilities."""

    def __init__(self, wrapped: Any, cache: LocalCache) -> None:
        self._wrapped = wrapped
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def _keep(self, request: ClaimRequest, answer: object, question: Question) -> None:
        """Keep the answer, if it is an outcome. In shadow nothing is kept: every call is to run."""
        if isinstance(answer, Finished) and not request.policy.shadow:
            self._cache.keep(request, answer, question)

    def _keep_own(self, lease: Lease, outcome: EncodedOutcome, answer: object, question: Question) -> None:
        """Keep the outcome of this very claim, if it is recorded, or what is recorded in its place."""
        if isinstance(answer, Recorded):
            if self._cache.doubts(lease.owner):
                return
            answer = finished_by(lease, outcome)
        self._keep(lease.request, answer, question)


class _CachedStore(_Rest):
    """The store in one runtime."""

    def __init__(self, store: Store, cache: LocalCache) -> None:
        super().__init__(store, cache)
        self._store = store
        self._siblings: dict[RuntimeName, Store] = {}

    def on(self, runtime: RuntimeName, announce: Announcer) -> Store:
        """Return the store as `runtime` uses it, behind the same cache."""
        if runtime not in self._siblings:
            self._siblings[runtime] = cached(self._store.on(runtime, announce), self._cache)
        return self._siblings[runtime]

    async def claim(self, request: ClaimRequest) -> ClaimAnswer:
        """Answer a duplicate, or ask the store."""
        known = self._answer(request)
        if known is not None:
            return known
        question = self._cache.question()
        answer = await self._store.claim(request)
        self._keep(request, answer, question)
        return answer

    async def claim_batch(self, requests: Sequence[ClaimRequest]) -> list[ClaimAnswer | None]:
        """Answer the duplicates, and ask the store of the rest at once."""
        known: list[ClaimAnswer | None] = [self._answer(request) for request in requests]
        rest = [place for place, answer in enumerate(known) if answer is None]
        store = batch_store_of(self._store)
        if store is None or not rest:
            return known
        question = self._cache.question()
        answers = await store.claim_batch([requests[place] for place in rest])
        for place, answer in zip(rest, answers, strict=True):
            self._keep(requests[place], answer, question)
            known[place] = answer
        return known

    def _answer(self, request: ClaimRequest) -> Finished | None:
        # Whoever asks again may be granted what he asked for before, and is to hear of it from the store.
        return self._cache.answer(request) if request.take == 1 and not request.policy.shadow else None

    async def finish(
        self, lease: Lease, outcome: EncodedOutcome, *, may_insert: bool = False
    ) -> Recorded | Finished | Lost:
        """Record the outcome, then keep it."""
        question = self._cache.question()
        try:
            answer = await self._store.finish(lease, outcome, may_insert=may_insert)
        except BaseException:  # whatever struck, it may be recorded
            self._cache.doubt([lease.owner])
            raise
        self._keep_own(lease, outcome, answer, question)
        return answer

    async def finish_batch(self, finished: Sequence[tuple[Lease, EncodedOutcome]]) -> list[Recorded | None]:
        """Record the outcomes, then keep those that are."""
        store = batch_store_of(self._store)
        if store is None:
            return [None] * len(finished)
        question = self._cache.question()
        try:
            answers = await store.finish_batch(finished)
        except BaseException:  # as above
            self._cache.doubt([lease.owner for lease, _ in finished])
            raise
        for (lease, outcome), answer in zip(finished, answers, strict=True):
            self._keep_own(lease, outcome, answer, question)
        return answers

    def transaction(self, lease: Lease, source: SessionSource, given: Any) -> Transaction:
        """Return the store's transaction, whose outcome is kept once it is committed."""
        transaction = transaction_of(self._store, lease, source, given)
        return cast(Transaction, _CachedTransaction(transaction, self._cache, lease))

    def batch_transaction(self, leases: Sequence[Lease], source: SessionSource, given: Any) -> BatchTransaction:
        """Return the store's transaction for many claims, whose outcomes are kept once they are committed."""
        transaction = batch_transaction_of(self._store, leases, source, given)
        return cast(BatchTransaction, _CachedBatch(transaction, self._cache, leases))

    async def look(self, lease: Lease, outcome: EncodedOutcome) -> Recorded | Finished | Lost | None:
        """Tell what became of a transaction of the user's, and keep its outcome if it is committed."""
        question = self._cache.question()
        answer = await sql_records(self._store).look(lease, outcome)
        self._keep_own(lease, outcome, answer, question)
        return answer

    async def forget(self, scope: str, key: str, **how: Any) -> AuditEntry | None:
        """Delete the record, and what is kept of it."""
        try:
            return await self._store.forget(scope, key, **how)
        finally:
            self._cache.drop([(scope, key)])

    async def resolve(self, scope: str, key: str, outcome: EncodedOutcome | None, **how: Any) -> AuditEntry | None:
        """End the record as a person says, and drop what is kept of it."""
        try:
            return await self._store.resolve(scope, key, outcome, **how)
        finally:
            self._cache.drop([(scope, key)])

    async def purge(self, *, limit: int, grace: float) -> list[tuple[str, str]]:
        """Purge records, and what is kept of them."""
        purged = await self._store.purge(limit=limit, grace=grace)
        self._cache.drop(purged)
        return purged


class _CachedTransaction(_Rest):
    """That of one claim. A commit whose reply was lost is left to the next duplicate."""

    def __init__(self, transaction: Transaction, cache: LocalCache, lease: Lease) -> None:
        super().__init__(transaction, cache)
        self._lease = lease

    async def commit(self, outcome: EncodedOutcome) -> bool:
        question = self._cache.question()
        is_committed: bool = await self._wrapped.commit(outcome)
        if is_committed:
            self._keep_own(self._lease, outcome, Recorded(), question)
        return is_committed


class _CachedBatch(_Rest):
    """That of many claims."""

    def __init__(self, transaction: BatchTransaction, cache: LocalCache, leases: Sequence[Lease]) -> None:
        super().__init__(transaction, cache)
        self._leases = leases

    async def commit_all(self, outcomes: Sequence[EncodedOutcome]) -> list[bool]:
        question = self._cache.question()
        held: list[bool] = await self._wrapped.commit_all(outcomes)
        if all(held):
            for lease, outcome in zip(self._leases, outcomes, strict=True):
                self._keep_own(lease, outcome, Recorded(), question)
        return held
