"""The contract of a store, in words; `idem_tasks.testing` turns it into tests.

A store keeps one record per `(scope, key)` and arbitrates claims on it. Every verb is one atomic step: of any
number of simultaneous claims one is granted. Answers are data (`idem_tasks.claims`); a verb raises only
`StoreUnavailableError` (cannot be reached), `StoreConfigurationError` (is not set up for us: says how to mend it)
or another `StoreError` (answered with an error).

All verbs are written as coroutines and serve both runtimes. A blocking store awaits nothing that waits, so that
`runtime.run_sync` can drive it on its caller's thread; an asyncio store belongs to the running event loop.
`on(runtime)` gives the store as that runtime uses it.

A store holds no state of a call (F26). Its clock decides about leases and retention, never a worker's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast

from idem_tasks.claims import (
    AuditEntry,
    ClaimAnswer,
    ClaimRequest,
    EncodedOutcome,
    Finished,
    Granted,
    Lease,
    Lost,
    OutboxMessage,
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
from idem_tasks.errors import ConfigurationError, ConflictError
from idem_tasks.events import Announcer
from idem_tasks.values import value

RuntimeName = Literal["blocking", "asyncio"]


class Store(Protocol):
    """Keeps records and arbitrates claims."""

    @property
    def runtimes(self) -> frozenset[RuntimeName]:
        """The runtimes it can serve."""
        ...

    def on(self, runtime: RuntimeName, announce: Announcer) -> Store:
        """Return this store as `runtime` uses it; raises `ConfigurationError` if it cannot serve it.

        The same store is returned for the same runtime, so that connections are shared. `announce` hears what
        the store meets on its way and survives, such as a marker that cannot be reached.
        """
        ...

    async def claim(self, request: ClaimRequest) -> ClaimAnswer:
        """Claim the record, or tell why not, in one atomic step.

        Granted when there is no record, it was released, its retention is over, or its holder's lease ran out
        and the policy says rerun. Where it `doubts`, such a dead holder's record is put in doubt under its own
        token and owner, so that its late finish still counts, and the answer tells whose claim that was.

        A request whose own earlier attempt took effect, though the reply was lost, is granted again with the same
        fencing token (F21, F22). The fencing token rises with every other grant.
        """
        ...

    async def decide(
        self, dead: Lease, request: ClaimRequest, outcome: EncodedOutcome | None
    ) -> Granted | Finished | Lost:
        """End the doubt that a claim met: by this outcome, or (None) by granting the record to `request`.

        One compare-and-set on the fencing token, owner and state in doubt of the `dead` claim. It writes a new token
        and the owner of `request`, so that the dead holder's late finish misses. `Finished` or `Granted`: that is
        done, also if an earlier attempt did it whose reply was lost. `Lost`: somebody else ended the doubt.
        """
        ...

    async def renew(self, leases: Sequence[Lease], still_held: Callable[[str], bool]) -> frozenset[str]:
        """Extend these leases by their policy's `lease` from now; return the owners of those extended.

        One that is missing was not extended now: it may be lost, or only locked for the moment. One round trip
        per tier for all of them. `still_held(owner)` turns false when that claim's finish begins.
        """
        ...

    async def finish(
        self, lease: Lease, outcome: EncodedOutcome, *, may_insert: bool = False
    ) -> Recorded | Finished | Lost:
        """Record the outcome, if the record is still under this lease's fencing token and owner.

        Also from `in_doubt`, when it was this very claim that was put in doubt. `Recorded` too when an earlier
        attempt took effect. `Finished`: somebody else's outcome stands. `Lost`: neither.

        `may_insert`: the lease is not over by the caller's own clock, so a record that is gone was lost with the
        database's last moments, and is written again. Never over a record that is there.
        """
        ...

    async def keep_pending(self, lease: Lease, outcome: EncodedOutcome) -> bool:
        """Keep an outcome that `finish` could not bring to the record for the next delivery to write through.

        Returns False where there is no place for it.
        """
        ...

    async def release(self, lease: Lease, release: Release) -> Released | Finished | Lost:
        """Give the claim up without an outcome, under the same fence as `finish`."""
        ...

    async def get(self, scope: str, key: str) -> Record | None:
        """Return the record, or None."""
        ...

    async def forget(
        self, scope: str, key: str, *, expect_token: int | None = None, actor: str = "", reason: str | None = None
    ) -> AuditEntry | None:
        """Delete the record and its marker; returns what was done, or None if there was no record.

        Raises `InProgressError` while a holder's lease lives: its finish would bring the record back; `ConflictError`
        where `expect_token` is given and the record has another fencing token. A store that keeps an audit writes
        there in the same step who did it and why.
        """
        ...

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
        """End `in_doubt`, `parked` or an overdue `running`: by this outcome, or (None) by releasing it.

        Sets a new fencing token in the same step, so that a late holder's finish misses. A release starts its
        failures and crashes again. Returns what was done, or None if there is no record. Raises `InProgressError`
        while a holder's lease lives, and `ConflictError` if the record has ended already, or has another fencing
        token than was expected. Audited as `forget` is.
        """
        ...

    async def audit(self, *, scope: str | None, key: str | None, limit: int) -> list[AuditEntry]:
        """Return what was done to the records of this scope and key, if given, the last first, up to `limit`.

        Raises `ConfigurationError` where none is kept: the events `resolved` and `forgotten` tell the same.
        """
        ...

    async def records(
        self,
        *,
        state: State | None,
        scope: str | None,
        after: tuple[str, str] | None,
        limit: int,
        attention: bool = False,
    ) -> list[Record]:
        """Return up to `limit` records in the order of scope and key, beginning after the given one.

        `attention`: only those that a person should look at: in doubt, parked, failed, or overdue, which are running
        ones whose lease is over.
        """
        ...

    async def stats(self) -> dict[State, int]:
        """Return how many records there are in each state."""
        ...

    async def purge(self, *, limit: int, grace: float) -> list[tuple[str, str]]:
        """Delete up to `limit` completed, failed or released records whose retention ended over `grace` seconds ago.

        Never touches running, in-doubt or parked ones. Returns the scope and key of each deleted record.
        """
        ...

    async def prepare(self) -> None:
        """Make what the store needs (tables); does nothing if it is there."""
        ...

    async def close(self) -> None:
        """Close this runtime's connections; the store opens new ones if it is used again."""
        ...


def refuse_if_moved(scope: str, key: str, state: str, fencing_token: int, expected: int | None) -> None:
    """Raise `ConflictError` for a record that is not the one any more that a person has seen."""
    if expected is not None and fencing_token != expected:
        raise ConflictError(
            f"{scope} {key!r} has changed since you looked: it is {state} now, with fencing token {fencing_token} "
            f"instead of {expected}; nothing was done",
            scope=scope,
            key=key,
        )


def finished_by(lease: Lease, outcome: EncodedOutcome) -> Finished:
    """Return the outcome that a claim has recorded as a duplicate is told of it."""
    return Finished(
        # Its messages are in the outbox: a duplicate sends none.
        outcome=replace(outcome, messages=()) if outcome.messages else outcome,
        fingerprint=lease.request.fingerprint,
        expires_in=lease.policy.retention,
        fencing_token=lease.fencing_token,
        traceparent=lease.request.traceparent,
    )


# A transaction of the user's own, in which the handler writes and its outcome is committed.


class UserTransaction(Protocol):
    """What the transactions for one claim and for many have alike."""

    @property
    def session(self) -> Any:
        """What the handler writes through."""
        ...

    @property
    def commit_begun(self) -> bool:
        """Whether committing was begun: whatever became of it, it must not be begun again."""
        ...

    @property
    def may_be_committed(self) -> bool:
        """Whether a commit was sent, so that only a look at the records can tell."""
        ...

    @property
    def is_cut_off(self) -> bool:
        """Whether its connection to the database broke, and with it all that was not committed."""
        ...

    async def roll_back(self, *, throw_away: bool) -> None:
        """Undo everything that is not committed; `throw_away` the connection on which something struck."""
        ...

    async def close(self) -> None:
        """End the session, if it was made for this run."""
        ...

    def is_conflict(self, error: BaseException) -> bool:
        """Tell whether a deadlock or a serialization failure undid everything, so that it may be begun again."""
        ...


class Transaction(UserTransaction, Protocol):
    """A user's session for one run of a handler: all that is written in it is committed together, or not at all.

    Under a claim the outcome is its last write, under the claim's fence. Every verb may be begun again.
    """

    async def begin(self) -> Finished | Lost | None:
        """Begin, and see to it that the record is there under this claim; tell who has it if it is not.

        Raises `ConfigurationError` for a session that cannot be used: of another database, in another runtime, in
        AUTOCOMMIT, or in a transaction already; and what the database answers.
        """
        ...

    async def commit(self, outcome: EncodedOutcome) -> bool:
        """Write the outcome as the last thing and commit; False, and nothing is committed, if the fence missed.

        Raises what the database answers, `StoreUnavailableError` if it does not, and `ConfigurationError` if the
        handler tried to commit by itself (F63).
        """
        ...

    async def look(self) -> Recorded | Finished | Lost | None:
        """Tell, on a connection of the store's own, how this ended; None: nothing is committed, the claim stands."""
        ...

    def check_steps(self) -> None:
        """Raise `ConfigurationError` where no step can be written while this transaction is open."""
        ...

    def untouched(self) -> AbstractContextManager[None]:
        """Raise `ConfigurationError` for whatever is done in the session meanwhile, and refuse to commit then.

        A step's outcome is committed apart from the session: what it did there would be missing at its replay.
        """
        ...


class SessionSource(Protocol):
    """Where the sessions of a handler come from: what was given as `session=`."""

    def unfenced(self, given: Any) -> Transaction:
        """Return a transaction that no claim guards; `given` is the caller's own session, if there is one."""
        ...


class SQLRecords(Protocol):
    """A store whose records can be written in a transaction of the user's own."""

    def finish_in(self, connection: Any, lease: Lease, outcome: EncodedOutcome) -> bool:
        """Write the outcome in the transaction of a connection of the user's; False if the fence missed."""
        ...

    async def look(self, lease: Lease, outcome: EncodedOutcome) -> Recorded | Finished | Lost | None:
        """Tell whether that transaction was committed; None: it was not, and the lease stands."""
        ...


def sql_records(store: Any) -> SQLRecords:
    """Return the store as one that has `finish_in`; raises `ConfigurationError` where the records are not in SQL."""
    if not hasattr(store, "finish_in"):
        raise ConfigurationError(f"finish_in needs records in SQL; a {type(store).__name__} has them elsewhere")
    records: SQLRecords = store
    return records


def transaction_of(store: Any, lease: Lease, source: SessionSource, given: Any) -> Transaction:
    """Return a transaction under this lease; raises `ConfigurationError` where the records are not in SQL.

    No store needs to have it: `transaction` is not among the verbs of `Store`.
    """
    begin = getattr(store, "transaction", None)
    if begin is None:
        raise ConfigurationError(
            f"session= needs records in SQL, where they can be committed with the handler's own writes; "
            f"a {type(store).__name__} has them elsewhere"
        )
    transaction: Transaction = begin(lease, source, given)
    return transaction


# The outbox: messages that are written with an outcome, in one step, and wait there to be sent.


class Outbox(Protocol):
    """Keeps the messages of recorded outcomes until they are sent, in order for each scope and key.

    A store has one as its attribute `outbox`, or none. Then `finish` and `write_through` write the outcome's
    `messages` in the same step as the outcome, and not where that is not recorded by them.
    """

    async def take(
        self, owner: str, *, lease: float, limit: int, of: tuple[str, str] | None = None
    ) -> list[OutboxMessage]:
        """Lease up to `limit` messages that are due to `owner` for `lease` seconds, in the order to send them in.

        A key whose first message is leased or waits after a failure is passed over, with all its messages; and one
        that is locked just now. `of`: only those of this scope and key.
        """
        ...

    async def settle(
        self, owner: str, *, sent: Sequence[OutboxMessage], failed: Sequence[FailedSend], rest: Sequence[OutboxMessage]
    ) -> None:
        """Delete what was sent, let what failed wait, and give the rest back at once, so far as `owner` has it yet."""
        ...

    async def count(self) -> int:
        """Return how many messages there are, whatever they wait for."""
        ...


@dataclass(frozen=True, slots=True)
class FailedSend:
    """A message that was not sent: `error_type` says why, and in `delay` seconds it is tried again."""

    message: OutboxMessage
    delay: float
    error_type: str


def outbox_of(store: Store) -> Outbox | None:
    """Return the store's outbox, or None: stores need not have one."""
    outbox: Outbox | None = getattr(store, "outbox", None)
    return outbox


# Marks: how far a consumer group has come in a partition, in the database of its handler's effects.


@dataclass(frozen=True, slots=True)
class MarkPlace:
    """The partition of a topic as one consumer group reads it."""

    topic: str
    partition: int
    group: str


class MarkingTransaction(Transaction, Protocol):
    """A user's session for one message of a partition: what is written in it is committed together with the mark."""

    @property
    def mark(self) -> int:
        """The offset of the first message whose effects are not committed, once it has begun."""
        ...

    async def advance(self, offset: int) -> bool:
        """Move the mark behind the message at this offset, as the last thing, and commit.

        False, and nothing is committed, where somebody else has moved it since.
        """
        ...


class Watermarks(Protocol):
    """Keeps one mark for each topic, partition and consumer group.

    A store has them as its attribute `watermarks`, or none.
    """

    async def make(self, place: MarkPlace) -> None:
        """Make the mark, before the first message, unless there is one.

        In a transaction of its own: a handler that rolls back does not undo it, and no other partition waits for it.
        """
        ...

    def transaction(
        self, place: MarkPlace, source: SessionSource, given: Any, *, max_hold: float
    ) -> MarkingTransaction:
        """Return a transaction in a session of the user's, which locks the mark when it begins.

        A worker that is paused in it keeps the mark for `max_hold` seconds at most, where the database can tell.
        """
        ...


def watermarks_of(store: Store) -> Watermarks:
    """Return the store's marks; raises `ConfigurationError` where the records are not in SQL."""
    watermarks: Watermarks | None = getattr(store, "watermarks", None)
    if watermarks is None:
        raise ConfigurationError(
            "watermark=True keeps its mark in the database of the handler's effects, so it needs database_url=; a "
            f"{type(store).__name__} has its records elsewhere"
        )
    return watermarks


# The marker tier. A marker is a shield, never the truth: it may vanish at any moment.


@dataclass(frozen=True, slots=True)
class MarkerTaken:
    """Nobody had a marker; ours stands now (or it was ours already: the reply to our first try was lost)."""


@value(frozen=True, slots=True)
class MarkerRunning:
    """Somebody else's marker stands; it expires in `retry_after` seconds unless it is renewed."""

    retry_after: float


@value(frozen=True, slots=True)
class MarkerFinished:
    """The finished outcome, served without SQL."""

    finished: Finished


@dataclass(frozen=True, slots=True)
class MarkerPending:
    """An outcome that could not be brought to the record yet, with the fence of the claim that made it.

    `raw` is the marker as it stood, to replace exactly it.
    """

    owner: str
    fencing_token: int
    fingerprint: str | None
    outcome: EncodedOutcome
    raw: Any


MarkerAnswer = MarkerTaken | MarkerRunning | MarkerFinished | MarkerPending


class Marker(Protocol):
    """The shield in front of a record; raises `StoreError` where it cannot answer.

    Every key it writes has an expiry, after every operation.
    """

    @property
    def runtimes(self) -> frozenset[RuntimeName]:
        """The runtimes it can serve."""
        ...

    def on(self, runtime: RuntimeName, announce: Announcer) -> Marker:
        """Return this marker tier as `runtime` uses it."""
        ...

    async def take(self, request: ClaimRequest) -> MarkerAnswer:
        """Set our running marker if there is none, else tell what stands there; one round trip if it is ours."""
        ...

    async def give_back(self, scope: str, key: str, owner: str) -> None:
        """Delete our own running marker, and nobody else's."""
        ...

    async def renew_markers(self, leases: Sequence[Lease]) -> None:
        """Extend our own running markers and put back those that are gone; leave everybody else's."""
        ...

    async def publish(self, request: ClaimRequest, finished: Finished, ttl: float) -> None:
        """Replace the running marker that this very take set by the finished outcome; leave another's, or nothing.

        Any other marker of this owner is deleted: a renewal that put it back, an earlier take or a pending outcome,
        which were given up by their sender, may have been on their way while a person forgot the record, and an
        outcome in their place would answer for it (F53). The next duplicate asks the record, and publishes.
        """
        ...

    async def keep(self, lease: Lease, outcome: EncodedOutcome) -> bool:
        """Keep a pending outcome for the retention, over our own running marker or none; False if it was not kept."""
        ...

    async def drop_pending(self, scope: str, key: str, pending: MarkerPending) -> None:
        """Delete exactly this pending marker."""
        ...

    async def drop(self, keys: Sequence[tuple[str, str]]) -> None:
        """Delete whatever markers stand at these scopes and keys."""
        ...

    async def close(self) -> None:
        """Close this runtime's connections."""
        ...


class RecordTier(Store, Protocol):
    """A store that can also stand behind a marker."""

    def on(self, runtime: RuntimeName, announce: Announcer) -> RecordTier:
        """Return this store as `runtime` uses it; see `Store.on`."""
        ...

    async def write_through(self, scope: str, key: str, pending: MarkerPending, retention: float) -> bool:
        """Record a pending outcome under the fence of the claim that made it; never inserts.

        Returns whether that outcome is recorded now (also if it was already).
        """
        ...


# Batches: the usual case of many claims or finishes in one round trip. A store need not have these verbs.


class BatchStore(Protocol):
    """A store that claims and finishes many records at once.

    No two places in one call are the same, and they come sorted by scope and key in bytes, which is the order in which
    a store locks them (F66). What a verb answers None for, it left as it is: that one needs a verb of its own.
    """

    async def claim_batch(self, requests: Sequence[ClaimRequest]) -> list[ClaimAnswer | None]:
        """Claim all these records in one round trip to each tier, and answer each as `Store.claim` does.

        None for one that it leaves to a claim of its own, as most stores do where a record is released, dead or over,
        or came or went meanwhile.
        """
        ...

    async def finish_batch(self, finished: Sequence[tuple[Lease, EncodedOutcome]]) -> list[Recorded | None]:
        """Record these outcomes, each under its lease's fence, in one round trip to each tier and one commit.

        None for one whose fence missed: finish it by itself, which tells why. None of the outcomes has messages.
        """
        ...


def batch_store_of(store: Any) -> BatchStore | None:
    """Return the store as one that claims and finishes many at once, or None: stores need not do that."""
    return cast(BatchStore, store) if hasattr(store, "claim_batch") else None


class BatchTransaction(UserTransaction, Protocol):
    """A user's session in which one handler writes for many claims: all is committed together, or nothing.

    The outcomes are its last writes, each under its claim's fence. Answers come in the order of the leases.
    """

    async def begin_all(self) -> list[Finished | Lost | None]:
        """Begin, and see to it, by one statement, that all records are there under their claims.

        All None: it has begun. Else nothing has, and each that is not None tells who has that record. Raises what
        `Transaction.begin` does.
        """
        ...

    async def commit_all(self, outcomes: Sequence[EncodedOutcome]) -> list[bool]:
        """Write all outcomes as the last thing and commit once; tells of each whether its fence held.

        Unless all held, nothing is committed. Raises what `Transaction.commit` does.
        """
        ...

    async def look_all(self) -> list[Recorded | Finished | Lost | None]:
        """Tell of each, on a connection of the store's own, how this ended.

        All `Recorded`: it is committed. None: that claim stands, and nothing is committed.
        """
        ...


def batch_transaction_of(store: Any, leases: Sequence[Lease], source: SessionSource, given: Any) -> BatchTransaction:
    """Return a transaction under these leases; raises `ConfigurationError` where the records are not in SQL."""
    begin = getattr(store, "batch_transaction", None)
    if begin is None:
        raise ConfigurationError(
            f"session= needs records in SQL, where they can be committed with the handler's own writes; "
            f"a {type(store).__name__} has them elsewhere"
        )
    transaction: BatchTransaction = begin(leases, source, given)
    return transaction


class BatchMarker(Protocol):
    """A marker tier that does the same for many keys in one round trip (in a cluster, one for each node)."""

    async def take_batch(self, requests: Sequence[ClaimRequest]) -> list[MarkerAnswer | None]:
        """As `Marker.take` for each; None where what stands there cannot be read: take it by itself."""
        ...

    async def give_back_batch(self, requests: Sequence[ClaimRequest]) -> None:
        """As `Marker.give_back` for each."""
        ...

    async def publish_batch(self, finished: Sequence[tuple[ClaimRequest, Finished, float]]) -> None:
        """As `Marker.publish` for each, the last being its time to live in seconds."""
        ...


# The journal of steps. A store need not have one.


class StepJournal(Protocol):
    """Keeps the outcome of each step of a handler, beside the record and for as long as it lives.

    Steps belong to one generation of a record, and are deleted with it by `forget` and `purge`. `position` counts
    them from 1 in the order in which a handler begins them. A store with these verbs also keeps `Release.parked`.
    """

    async def begin_step(self, lease: Lease, position: int, name: str) -> StepBegun | StepFinished | StepsDiffer | Lost:
        """Write that the step begins, or return the outcome it has, in one atomic step.

        `Lost` unless the record is running under this lease's fencing token and owner. May be sent again.
        """
        ...

    async def finish_step(
        self, lease: Lease, position: int, name: str, outcome: EncodedOutcome
    ) -> Recorded | StepFinished | Lost:
        """Write the step's outcome under the same fence as `Store.finish`, unless it has one.

        The first wins, and `StepFinished` tells it. `Recorded` too when an earlier try took effect.
        """
        ...

    async def steps(self, scope: str, key: str) -> list[StepRecord]:
        """Return the steps of the record's generation in their order, for people; none where there is no record."""
        ...


def journal_of(store: Store) -> StepJournal:
    """Return the store as what keeps steps; raises `ConfigurationError` if it does not."""
    if not hasattr(store, "begin_step"):
        raise ConfigurationError(
            f"{type(store).__name__} keeps no steps: claim.step() needs records in SQL (or in memory, for tests), "
            "so give a database_url"
        )
    return cast(StepJournal, store)


async def steps_of(store: Store, scope: str, key: str) -> list[StepRecord]:
    """Return the steps that the store keeps of this record: none if it keeps no steps at all."""
    return await journal_of(store).steps(scope, key) if hasattr(store, "begin_step") else []
