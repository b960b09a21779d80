"""The main road: a marker that shields, in front of a record that decides.

The record is the truth. The marker answers duplicates before they reach the database and is free to vanish at any
moment: whatever it does, or fails to do, never changes what is promised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

from idem_tasks.claims import (
    AuditEntry,
    ClaimAnswer,
    ClaimRequest,
    EncodedOutcome,
    Finished,
    Granted,
    InProgress,
    Lease,
    Lost,
    Record,
    Recorded,
    Release,
    Released,
    State,
    StepBegun,
    StepFinished,
    StepRecord,
    StepsDiffer,
)
from idem_tasks.errors import IdemTasksError, StoreConfigurationError, StoreError, StoreUnavailableError
from idem_tasks.events import Announcer, EventName
from idem_tasks.stores.base import (
    BatchMarker,
    BatchStore,
    BatchTransaction,
    Marker,
    MarkerAnswer,
    MarkerFinished,
    MarkerPending,
    MarkerRunning,
    MarkerTaken,
    Outbox,
    RecordTier,
    RuntimeName,
    SessionSource,
    Transaction,
    UserTransaction,
    Watermarks,
    batch_transaction_of,
    finished_by,
    journal_of,
    outbox_of,
    sql_records,
    steps_of,
    transaction_of,
    watermarks_of,
)

A = TypeVar("A", bound=Recorded | Finished | Lost | None)


class TieredStore:
    """A marker tier (Redis) in front of a record tier (SQL).

    A first call costs one round trip to the marker, one to the record, and the same again after the handler.
    A duplicate costs one round trip to the marker as long as it stands.
    """

    def __init__(self, marker: Marker, record: RecordTier) -> None:
        self._marker = marker
        self._record = record
        self._can_batch = hasattr(marker, "take_batch") and hasattr(record, "claim_batch")
        self._announce = Announcer(())
        self._siblings: dict[RuntimeName, TieredStore] = {}

    @property
    def runtimes(self) -> frozenset[RuntimeName]:
        """The runtimes that both tiers serve."""
        return self._marker.runtimes & self._record.runtimes

    def on(self, runtime: RuntimeName, announce: Announcer) -> TieredStore:
        """Return this store as `runtime` uses it; raises `ConfigurationError` if a tier cannot serve it."""
        if runtime not in self._siblings:
            sibling = TieredStore(self._marker.on(runtime, announce), self._record.on(runtime, announce))
            sibling._announce = announce
            self._siblings[runtime] = sibling
        return self._siblings[runtime]

    @property
    def address(self) -> str:
        """Where the records are, without password."""
        return str(getattr(self._record, "address", type(self._record).__name__))

    @property
    def outbox(self) -> Outbox | None:
        """The outbox of the record, if that has one."""
        return outbox_of(self._record)

    @property
    def watermarks(self) -> Watermarks:
        """The marks of the record; `ConfigurationError` if it has none."""
        return watermarks_of(self._record)

    async def claim(self, request: ClaimRequest) -> ClaimAnswer:
        """Ask the marker first, and the record unless the marker knows the answer."""
        try:
            seen = await self._marker.take(request)
        except StoreConfigurationError:
            raise  # nobody should run for long on a shield that was never there
        except StoreError as error:
            self._marker_failed(error, request.scope, request.key)
            if request.policy.on_marker_unavailable == "raise":
                await self._give_back(request.scope, request.key, request.owner)
                raise StoreUnavailableError(
                    f"the marker cannot be taken ({error}), and the policy is on_marker_unavailable='raise'"
                ) from error
            # It may have taken effect, or do so at any later time: our own outcome must not take its place then.
            return await self._claim_record(replace(request, take=None, marked=False))
        match seen:
            case MarkerRunning(retry_after):
                return InProgress(retry_after)
            case MarkerFinished(finished):
                return finished
            case MarkerPending():
                return await self._claim_behind_pending(request, seen)
            case MarkerTaken():  # pragma: no branch - there is no other answer
                return await self._claim_record(replace(request, marked=True))

    async def _claim_record(self, request: ClaimRequest) -> ClaimAnswer:
        """Claim the record; unless it is granted, publish in our marker's place or take that away again."""
        try:
            answer = await self._record.claim(request)
        except IdemTasksError:
            await self._give_back(request.scope, request.key, request.owner)
            raise
        match answer:
            case Granted():
                pass
            case Finished():
                await self._publish(request, answer)
            case _:
                await self._give_back(request.scope, request.key, request.owner)
        return answer

    async def _claim_behind_pending(self, request: ClaimRequest, pending: MarkerPending) -> ClaimAnswer:
        """Bring an outcome that SQL would not take then to its record now; it is never replayed before that."""
        written = await self._record.write_through(
            request.scope, request.key, pending, retention=request.policy.retention
        )
        if written:
            self._announce(EventName.OUTCOME_WRITTEN_THROUGH, request.scope, request.key)
        else:
            # Its claim was taken over, or a person decided: that outcome can never be recorded any more.
            self._announce(EventName.OUTCOME_DROPPED, request.scope, request.key, reason="superseded")
        with self._marker_may_fail(request.scope, request.key):
            await self._marker.drop_pending(request.scope, request.key, pending)
        if not written:
            return await self._claim_record(request)
        return Finished(
            outcome=pending.outcome,
            fingerprint=pending.fingerprint,
            expires_in=request.policy.retention,
            fencing_token=pending.fencing_token,
        )

    async def claim_batch(self, requests: Sequence[ClaimRequest]) -> list[ClaimAnswer | None]:
        """Ask the marker of all, and the record of those of which the marker knows nothing, each in one round trip.

        None for what is to be claimed by itself: what the record leaves, a pending outcome, a marker that cannot be
        read; and for all where a tier has no such verbs.
        """
        if not (self._can_batch and requests):
            return [None] * len(requests)
        try:
            seen = await self._markers.take_batch(requests)
        except StoreConfigurationError:
            raise
        except StoreError as error:
            self._marker_failed(error)
            if any(request.policy.on_marker_unavailable == "raise" for request in requests):
                await self._give_back_batch(requests)
                raise StoreUnavailableError(
                    f"the markers cannot be taken ({error}), and the policy is on_marker_unavailable='raise'"
                ) from error
            # As in `claim`: one of them may have taken effect, or do so at any later time.
            return await self._claim_records([replace(request, take=None) for request in requests])
        taken = [request for request, answer in zip(requests, seen, strict=True) if isinstance(answer, MarkerTaken)]
        claimed = iter(await self._claim_records(taken))
        return [next(claimed) if isinstance(answer, MarkerTaken) else _known(answer) for answer in seen]

    async def _claim_records(self, requests: Sequence[ClaimRequest]) -> list[ClaimAnswer | None]:
        """Claim these records; publish what is finished in our markers' place, and take those of the rest away."""
        if not requests:
            return []
        try:
            answers = await self._records.claim_batch(requests)
        except IdemTasksError:
            await self._give_back_batch(requests)
            raise
        pairs = list(zip(requests, answers, strict=True))
        await self._publish_batch([(request, answer) for request, answer in pairs if isinstance(answer, Finished)])
        await self._give_back_batch([each for each, answer in pairs if not isinstance(answer, Granted | Finished)])
        return answers

    async def decide(
        self, dead: Lease, request: ClaimRequest, outcome: EncodedOutcome | None
    ) -> Granted | Finished | Lost:
        """End the doubt in the record, behind a marker of our own: the outcome or the new run needs one."""
        try:
            seen = await self._marker.take(request)
        except StoreError as error:
            self._marker_failed(error, request.scope, request.key)
            request = replace(request, take=None)
        else:
            if isinstance(seen, MarkerPending):
                return Lost()  # the dead holder woke up: the next claim brings its outcome to the record
            if not isinstance(seen, MarkerTaken):
                request = replace(request, take=None)  # another delivery's, which is about to meet the doubt
        try:
            answer = await self._record.decide(dead, request, outcome)
        except IdemTasksError:
            await self._give_back(request.scope, request.key, request.owner)
            raise
        match answer:
            case Granted():
                pass
            case Finished():
                await self._publish(request, answer)
            case Lost():  # pragma: no branch - there is no other answer
                await self._give_back(request.scope, request.key, request.owner)
        return answer

    async def renew(self, leases: Sequence[Lease], still_held: Callable[[str], bool]) -> frozenset[str]:
        """Renew the records, then the markers of those renewed whose finish has not begun."""
        renewed = await self._record.renew(leases, still_held)
        running = [lease for lease in leases if lease.owner in renewed and still_held(lease.owner)]
        if running:
            try:
                await self._marker.renew_markers(running)
            except StoreError as error:
                self._marker_failed(error)
        return renewed

    async def finish(
        self, lease: Lease, outcome: EncodedOutcome, *, may_insert: bool = False
    ) -> Recorded | Finished | Lost:
        """Record the outcome, then let the marker answer with it."""
        answer = await self._record.finish(lease, outcome, may_insert=may_insert)
        await self._follow(lease, outcome, answer)
        return answer

    async def finish_batch(self, finished: Sequence[tuple[Lease, EncodedOutcome]]) -> list[Recorded | None]:
        """Record the outcomes, then let the markers answer with those that are, each in one round trip.

        None for one whose fence missed, whose marker is left as it is; and for all where a tier has no such verbs.
        """
        if not (self._can_batch and finished):
            return [None] * len(finished)
        answers = await self._records.finish_batch(finished)
        await self._publish_batch(
            [
                (lease.request, finished_by(lease, outcome))
                for (lease, outcome), answer in zip(finished, answers, strict=True)
                if answer is not None
            ]
        )
        return answers

    def transaction(self, lease: Lease, source: SessionSource, given: Any) -> Transaction:
        """Return the record's transaction, which the marker follows; `ConfigurationError` where it has none."""
        return _FollowedTransaction(transaction_of(self._record, lease, source, given), partial(self._follow, lease))

    def batch_transaction(self, leases: Sequence[Lease], source: SessionSource, given: Any) -> BatchTransaction:
        """Return the record's transaction for many claims, which the markers follow, as `transaction` does."""
        transaction = batch_transaction_of(self._record, leases, source, given)
        return _FollowedBatch(transaction, len(leases), partial(self._follow_all, leases))

    async def _follow_all(
        self,
        leases: Sequence[Lease],
        outcomes: Sequence[EncodedOutcome],
        answers: Sequence[Recorded | Finished | Lost | None],
    ) -> None:
        """Let the markers say what the records say, where that is known."""
        known = [
            (lease, outcome, answer)
            for lease, outcome, answer in zip(leases, outcomes, answers, strict=True)
            if answer is not None
        ]
        if not self._can_batch:
            for each in known:
                await self._follow(*each)
            return
        told = [
            (lease.request, answer if isinstance(answer, Finished) else finished_by(lease, outcome))
            for lease, outcome, answer in known
            if not isinstance(answer, Lost)
        ]
        await self._publish_batch(told)
        await self._give_back_batch([lease.request for lease, _, answer in known if isinstance(answer, Lost)])

    def finish_in(self, connection: Any, lease: Lease, outcome: EncodedOutcome) -> bool:
        """Write the outcome of the record in a transaction of the user's; the marker follows when it is looked at."""
        return sql_records(self._record).finish_in(connection, lease, outcome)

    async def look(self, lease: Lease, outcome: EncodedOutcome) -> Recorded | Finished | Lost | None:
        """Tell whether that transaction was committed, and let the marker say the same."""
        answer = await sql_records(self._record).look(lease, outcome)
        if answer is not None:
            await self._follow(lease, outcome, answer)
        return answer

    async def _follow(self, lease: Lease, outcome: EncodedOutcome, answer: Recorded | Finished | Lost) -> None:
        """Let the marker say what the record says."""
        match answer:
            case Recorded():
                await self._publish(lease.request, finished_by(lease, outcome))
            case Finished():
                await self._publish(lease.request, answer)
            case Lost():  # pragma: no branch - there is no other answer
                await self._give_back(lease.scope, lease.key, lease.owner)

    async def keep_pending(self, lease: Lease, outcome: EncodedOutcome) -> bool:
        """Keep the outcome in the marker for the next delivery to write through."""
        try:
            return await self._marker.keep(lease, outcome)
        except StoreError as error:
            self._marker_failed(error, lease.scope, lease.key)
            return False

    async def release(self, lease: Lease, release: Release) -> Released | Finished | Lost:
        """Release the record, then take our marker away."""
        answer = await self._record.release(lease, release)
        if isinstance(answer, Finished):
            await self._publish(lease.request, answer)
        else:
            await self._give_back(lease.scope, lease.key, lease.owner)
        return answer

    async def begin_step(self, lease: Lease, position: int, name: str) -> StepBegun | StepFinished | StepsDiffer | Lost:
        """Begin a step in the record's journal; raises `ConfigurationError` if it has none."""
        return await journal_of(self._record).begin_step(lease, position, name)

    async def finish_step(
        self, lease: Lease, position: int, name: str, outcome: EncodedOutcome
    ) -> Recorded | StepFinished | Lost:
        """Finish a step in the record's journal."""
        return await journal_of(self._record).finish_step(lease, position, name, outcome)

    async def steps(self, scope: str, key: str) -> list[StepRecord]:
        """Return the steps in the record's journal; none if it has no journal."""
        return await steps_of(self._record, scope, key)

    async def get(self, scope: str, key: str) -> Record | None:
        """Return the record."""
        return await self._record.get(scope, key)

    async def forget(
        self, scope: str, key: str, *, expect_token: int | None = None, actor: str = "", reason: str | None = None
    ) -> AuditEntry | None:
        """Delete the record, then the marker, also where there was no record."""
        done = await self._record.forget(scope, key, expect_token=expect_token, actor=actor, reason=reason)
        await self._drop([(scope, key)])
        return done

    async def resolve(
        self,
        scope: str,
        key: str,
        outcome: EncodedOutcome | None,
        *,
        expect_token: int | None = None,
        actor: str = "",
        reason: str | None = None,
    ) -> AuditEntry | None:
        """End the record as a person says, then delete the marker."""
        done = await self._record.resolve(scope, key, outcome, expect_token=expect_token, actor=actor, reason=reason)
        await self._drop([(scope, key)])
        return done

    async def audit(self, *, scope: str | None, key: str | None, limit: int) -> list[AuditEntry]:
        """Return the audit of the record tier."""
        return await self._record.audit(scope=scope, key=key, limit=limit)

    async def records(
        self,
        *,
        state: State | None,
        scope: str | None,
        after: tuple[str, str] | None,
        limit: int,
        attention: bool = False,
    ) -> list[Record]:
        """Return records."""
        return await self._record.records(state=state, scope=scope, after=after, limit=limit, attention=attention)

    async def stats(self) -> dict[State, int]:
        """Return how many records there are in each state."""
        return await self._record.stats()

    async def purge(self, *, limit: int, grace: float) -> list[tuple[str, str]]:
        """Purge records, then their markers."""
        purged = await self._record.purge(limit=limit, grace=grace)
        if purged:
            with self._marker_may_fail("", ""):
                # A marker never outlives its record's retention, so one left behind here is gone already.
                await self._marker.drop(purged)
        return purged

    async def prepare(self) -> None:
        """Make the tables of the record."""
        await self._record.prepare()

    async def close(self) -> None:
        """Close both tiers' connections."""
        try:
            await self._marker.close()
        finally:
            await self._record.close()

    async def _publish(self, request: ClaimRequest, finished: Finished) -> None:
        ttl = min(request.policy.cache_ttl, finished.expires_in)
        if ttl > 0:
            with self._marker_may_fail(request.scope, request.key):
                await self._marker.publish(request, finished, ttl)

    async def _publish_batch(self, finished: Sequence[tuple[ClaimRequest, Finished]]) -> None:
        lasting = [
            (request, each, ttl)
            for request, each in finished
            if (ttl := min(request.policy.cache_ttl, each.expires_in)) > 0
        ]
        if not lasting:
            return
        with self._marker_may_fail("", ""):
            await self._markers.publish_batch(lasting)

    async def _give_back_batch(self, requests: Sequence[ClaimRequest]) -> None:
        if requests:
            with self._marker_may_fail("", ""):
                await self._markers.give_back_batch(requests)

    @property
    def _markers(self) -> BatchMarker:
        return cast(BatchMarker, self._marker)

    @property
    def _records(self) -> BatchStore:
        return cast(BatchStore, self._record)

    async def _give_back(self, scope: str, key: str, owner: str) -> None:
        with self._marker_may_fail(scope, key):
            await self._marker.give_back(scope, key, owner)

    async def _drop(self, keys: Sequence[tuple[str, str]]) -> None:
        """Delete markers after their records; a person has to know when one may still answer."""
        try:
            await self._marker.drop(keys)
        except StoreError as error:
            raise StoreUnavailableError(
                f"the record is changed, but its marker in Redis could not be deleted ({error}); "
                "a duplicate may still be answered by it: do the same again when Redis can be reached"
            ) from error

    @contextlib.contextmanager
    def _marker_may_fail(self, scope: str, key: str) -> Iterator[None]:
        """Go on without the marker, and say so: the record holds the truth."""
        try:
            yield
        except StoreError as error:
            self._marker_failed(error, scope, key)

    def _marker_failed(self, error: StoreError, scope: str = "", key: str = "") -> None:
        self._announce(EventName.MARKER_UNAVAILABLE, scope, key, error=str(error))


def _known(answer: MarkerAnswer | None) -> ClaimAnswer | None:
    """What a marker that is not ours answers a claim of many with; None: not without the record."""
    match answer:
        case MarkerRunning(retry_after):
            return InProgress(retry_after)
        case MarkerFinished(finished):
            return finished
    return None


class _Followed:
    """A transaction of the record tier, after which the marker answers with its outcome."""

    def __init__(self, transaction: UserTransaction) -> None:
        self._transaction = transaction

    @property
    def session(self) -> Any:
        return self._transaction.session

    @property
    def commit_begun(self) -> bool:
        return self._transaction.commit_begun

    @property
    def may_be_committed(self) -> bool:
        return self._transaction.may_be_committed

    @property
    def is_cut_off(self) -> bool:
        return self._transaction.is_cut_off

    async def roll_back(self, *, throw_away: bool) -> None:
        await self._transaction.roll_back(throw_away=throw_away)

    async def close(self) -> None:
        await self._transaction.close()

    def is_conflict(self, error: BaseException) -> bool:
        return self._transaction.is_conflict(error)


class _FollowedTransaction(_Followed):
    """That of one claim."""

    def __init__(
        self,
        transaction: Transaction,
        follow: Callable[[EncodedOutcome, Recorded | Finished | Lost], Awaitable[None]],
    ) -> None:
        super().__init__(transaction)
        self._of_record = transaction
        self._follow = follow
        self._outcome = EncodedOutcome()

    async def begin(self) -> Finished | Lost | None:
        return await self._followed(await self._of_record.begin())

    async def commit(self, outcome: EncodedOutcome) -> bool:
        self._outcome = outcome
        is_committed = await self._of_record.commit(outcome)
        await self._followed(Recorded() if is_committed else None)
        return is_committed

    async def look(self) -> Recorded | Finished | Lost | None:
        return await self._followed(await self._of_record.look())

    def check_steps(self) -> None:
        self._of_record.check_steps()

    def untouched(self) -> contextlib.AbstractContextManager[None]:
        return self._of_record.untouched()

    async def _followed(self, answer: A) -> A:
        if answer is not None:
            await self._follow(self._outcome, answer)
        return answer


class _FollowedBatch(_Followed):
    """That of many claims."""

    def __init__(
        self,
        transaction: BatchTransaction,
        number: int,
        follow: Callable[[Sequence[EncodedOutcome], Sequence[Recorded | Finished | Lost | None]], Awaitable[None]],
    ) -> None:
        super().__init__(transaction)
        self._of_records = transaction
        self._follow = follow
        self._outcomes: Sequence[EncodedOutcome] = [EncodedOutcome()] * number

    async def begin_all(self) -> list[Finished | Lost | None]:
        answers = await self._of_records.begin_all()
        await self._follow(self._outcomes, answers)
        return answers

    async def commit_all(self, outcomes: Sequence[EncodedOutcome]) -> list[bool]:
        self._outcomes = outcomes
        held = await self._of_records.commit_all(outcomes)
        if all(held):
            await self._follow(outcomes, [Recorded()] * len(held))
        return held

    async def look_all(self) -> list[Recorded | Finished | Lost | None]:
        answers = await self._of_records.look_all()
        await self._follow(self._outcomes, answers)
        return answers
